"""Readers of the file formats in which image data sets are published: IDX, the CIFAR pickles, SVHN's .mat.

Every reader returns NumPy arrays, checks what it reads, and raises `ValueError` with the file's name and what is wrong
with it. No reader runs code from a file.
"""

import gzip
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def read_idx(path: Path, dims: int) -> Bytes:
    """Read an IDX file of unsigned bytes, plain or gzipped (told by its content, not by its name).

    Args:
        path: the file, e.g. `train-images-idx3-ubyte.gz`.
        dims: how many dimensions it must have: 3 for images, 1 for labels.

    Returns:
        Array [N, H, W] for `dims=3`, [N] for `dims=1`.

    Raises:
        ValueError: wrong magic number, another number of dimensions, or a file shorter or longer than its header says.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or truncated gzip file ({error}); fetch it again") from error
    header = 4 + 4 * dims
    if len(raw) < header:
        raise ValueError(f"{path} is truncated: {len(raw)} bytes, and an IDX header alone takes {header}")
    magic = struct.unpack(">I", raw[:4])[0]
    if magic != 0x800 + dims:
        raise ValueError(
            f"{path} has magic number 0x{magic:08x}, expected 0x{0x800 + dims:08x} "
            f"(IDX, unsigned bytes, {dims} dimensions): it is another kind of file"
        )
    shape = struct.unpack(f">{dims}I", raw[4:header])
    if len(raw) != header + math.prod(shape):
        raise ValueError(
            f"{path} is truncated or damaged: its header announces {math.prod(shape)} bytes of data for shape "
            f"{list(shape)}, and {len(raw) - header} follow"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes for `bytes` in a protocol-2 pickle: the codec call, narrowed to the one codec it uses."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r} is not admitted")
    return text.encode("latin-1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits built-in containers, numbers, strings and NumPy arrays; anything else could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a NumPy array nor a built-in type")


def read_cifar(path: Path, labels: str) -> tuple[Bytes, Bytes]:
    """Read one file of CIFAR-10 or CIFAR-100 in its Python format, without running code from it.

    Args:
        path: the file, e.g. `cifar-10-batches-py/data_batch_1` or `cifar-100-python/train`.
        labels: the key of the labels: `"labels"` (CIFAR-10), `"fine_labels"` or `"coarse_labels"` (CIFAR-100).

    Returns:
        Images [N, 3, 32, 32] and labels [N].

    Raises:
        ValueError: truncated or damaged, another kind of pickle, or one that holds more than arrays and built-ins.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # an unpickler fed a damaged file raises almost anything
        raise ValueError(f"{path} cannot be read as a CIFAR file in Python format: {error}; fetch it again") from error
    if not isinstance(content, dict) or not {b"data", labels.encode()} <= content.keys():
        found = sorted(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} is another kind of file: CIFAR has the keys b'data' and b'{labels}', this has {found}"
        )
    images, targets = np.asarray(content[b"data"]), np.asarray(content[labels.encode()])
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or targets.shape != images.shape[:1]:
        raise ValueError(
            f"{path} is not the expected CIFAR file: data of shape {list(images.shape)} ({images.dtype}) with labels "
            f"{list(targets.shape)}, where [N, 3072] (uint8) with [N] belongs"
        )
    return images.reshape(-1, 3, 32, 32), targets.astype(np.uint8)


def read_svhn(path: Path) -> tuple[Bytes, Bytes]:
    """Read one file of SVHN's format 2 (cropped digits), `train_32x32.mat` or `test_32x32.mat`.

    Returns:
        Images [N, 3, 32, 32] and labels [N] in 0..9 (the file writes the digit 0 as 10).

    Raises:
        ValueError: truncated or damaged, or not SVHN's format 2.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except Exception as error:  # SciPy raises several kinds for a damaged file
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}; fetch it again") from error
    if not {"X", "y"} <= content.keys():
        found = sorted(key for key in content if not key.startswith("__"))
        raise ValueError(f"{path} is not SVHN's cropped-digits file: it needs the variables X and y, has {found}")
    images, labels = content["X"], content["y"].reshape(-1)
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise ValueError(
            f"{path} is not SVHN's cropped-digits file: X has shape {list(images.shape)} ({images.dtype}) with "
            f"{len(labels)} labels, where [32, 32, 3, N] (uint8) with N labels belongs"
        )
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), (labels % 10).astype(np.uint8)
