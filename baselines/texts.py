"""Text as characters, for language models: windows of a text, each with the same window one character further on.

The characters are those of printable ASCII, the line feed and one class for all others, whatever the text.
"""

import gzip
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

WINDOW: Final = 64  # characters
HELD_OUT: Final = 0.1  # of a text that comes in one piece: its end, for testing
PRINTABLE: Final = range(32, 127)  # of ASCII
CLASSES: Final = len(PRINTABLE) + 2


def encode(text: str) -> Tensor:
    """Classes of the characters, int64 [N]: 0 the line feed, 1 to 95 printable ASCII by its code, 96 all others."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    printable = (codes >= PRINTABLE.start) & (codes < PRINTABLE.stop)
    classes = np.where(printable, codes - PRINTABLE.start + 1, CLASSES - 1)
    return torch.from_numpy(np.where(codes == ord("\n"), 0, classes))


def windows(text: str) -> tuple[Tensor, Tensor]:
    """Cut a text into windows that do not overlap, and drop what is left over.

    Returns:
        Inputs and targets, classes, int64 [N, 64] each; a target is the character after its input.

    Raises:
        ValueError: a text that is shorter than one window.
    """
    classes = encode(text)
    count = (len(classes) - 1) // WINDOW
    if count < 1:
        raise ValueError(f"a text of {len(classes)} characters is too short: one window takes {WINDOW + 1}")
    return classes[: count * WINDOW].view(count, WINDOW), classes[1 : count * WINDOW + 1].view(count, WINDOW)


def python_topics() -> tuple[str, str]:
    """The topics of Python's own help, in the words of the Python that runs this, for training and testing.

    About 460,000 characters of English and examples of code, which differ a little from one version of Python to the
    next. The topics are in the order of their names; the last tenth of the characters is for testing.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    cut = round((1 - HELD_OUT) * len(text))
    return text[:cut], text[cut:]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, plain or gzipped (told by its content, not by its name).

    Raises:
        ValueError: a damaged file, or one in another encoding.
    """
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it first") from error
