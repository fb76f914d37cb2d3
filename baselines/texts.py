"""Text as characters, for language models: windows of a text, each with the same window one character further on.

The classes are those of printable ASCII, the line feed, the tab, and one for all others, whatever the text.
"""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

WINDOW: Final = 64  # characters
HELD_OUT: Final = 0.1  # of a text that comes in one piece: its end, for testing
KNOWN: Final = "\n\t" + "".join(map(chr, range(32, 127)))  # printable ASCII after the line feed and the tab
CLASSES: Final = len(KNOWN) + 1
STRANGE: Final = 0.1  # of a text, at most: more, and it is not what these classes are for
_TABLE: Final = np.full(128, CLASSES - 1, dtype=np.uint8)
_TABLE[[ord(character) for character in KNOWN]] = range(len(KNOWN))


def encode(text: str) -> Tensor:
    """Classes of the characters, uint8 [N]: 0 the line feed, 1 the tab, 2 to 96 printable ASCII, 97 all others."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return torch.from_numpy(_TABLE[np.minimum(codes, 127)])


def windows(text: str, name: str) -> tuple[Tensor, Tensor]:
    """Cut a text into windows that do not overlap, and drop what is left over.

    Args:
        text: at least 65 characters, nearly all of ASCII.
        name: what it is called in errors.

    Returns:
        Inputs and targets, classes, int64 [N, 64] each; a target is the character after its input.

    Raises:
        ValueError: too short a text, or one of which a tenth is not ASCII.
    """
    classes = encode(text).long()
    count = (len(classes) - 1) // WINDOW
    if count < 1:
        raise ValueError(f"{name} has {len(classes)} characters, and one window takes {WINDOW + 1}; use a longer text")
    strange = (classes == CLASSES - 1).float().mean().item()
    if strange > STRANGE:
        raise ValueError(
            f"{name}: {strange:.0%} of the characters are not ASCII, and the models see no difference between them; "
            "use another text, or write it in ASCII"
        )
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
    """The text of a file in UTF-8, plain or gzipped (told by its content, not by its name), its lines ended as in Unix.

    Raises:
        ValueError: a damaged file, or one in another encoding.
    """
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it first") from error
    return text.replace("\r\n", "\n")


def digest(train: str, test: str) -> str:
    """What tells one text from another: 16 hexadecimal digits."""
    return hashlib.sha256("\0".join((train, test)).encode()).hexdigest()[:16]
