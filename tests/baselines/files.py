"""Files in the format of MNIST."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def idx(array: NDArray[Any], magic: int | None = None) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    magic = 0x800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx_set(folder: Path, compressed: bool, labels: list[int] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Four IDX files: 12 training and 4 test images of 28x28."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 256, (16, 28, 28)), rng.integers(0, 10, 16)
    if labels is not None:
        targets[: len(labels)] = labels
    pieces = {
        "train-images-idx3-ubyte": images[:12],
        "train-labels-idx1-ubyte": targets[:12],
        "t10k-images-idx3-ubyte": images[12:],
        "t10k-labels-idx1-ubyte": targets[12:],
    }
    for name, array in pieces.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return images, targets
