"""Data sets, read from files that are already on the machine: images to classify, and texts to continue.

`digits` comes with scikit-learn, and `python-topics` with Python. The others are read from where Debian's package or
torchvision puts them, or from `data_dir`; nothing is downloaded, and no data set stands in for another under its name.
Images are standardised per channel by the training set's mean and deviation, or left as pixels in [0, 1].
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from baselines.formats import Bytes, read_cifar, read_idx, read_svhn
from baselines.texts import CLASSES, digest, python_topics, read_text, windows

DIGITS: Final = "With no data at hand, `--data digits` (8x8 digits, bundled with scikit-learn) always works."
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# The first ten training labels. MNIST and Fashion-MNIST have the same file names and sizes: this tells them apart.
FIRST_LABELS: Final = {"mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}

Arrays = tuple[Bytes, Bytes, Bytes, Bytes]  # train images [N, C, H, W], train labels [N], test images, test labels


class Data(NamedTuple):
    """A task.

    Attributes:
        train_inputs: images, float32 [N, C, H, W]; for text, classes of characters, int64 [N, T].
        train_targets: classes, int64 [N]; for text, the next characters, [N, T]; for an autoencoder the inputs.
        test_inputs: likewise, M of them.
        test_targets: likewise.
        classes: how many classes there are.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the training set."""
        return self.train_inputs, self.train_targets

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the test set."""
        return self.test_inputs, self.test_targets

    def to(self, device: torch.device | str) -> "Data":
        """The same data on `device`."""
        return Data(
            self.train_inputs.to(device),
            self.train_targets.to(device),
            self.test_inputs.to(device),
            self.test_targets.to(device),
            self.classes,
        )


def _locate(name: str, folders: Sequence[Path], files: Sequence[str], hint: str, stand_in: str = DIGITS) -> list[Path]:
    """The paths of `files` in the first folder that has them all, each plain or with `.gz` behind its name."""
    for folder in folders:
        found = [path for file in files for path in (folder / file, folder / f"{file}.gz") if path.is_file()]
        names = {path.name.removesuffix(".gz"): path for path in found}
        if len(names) == len(files):
            return [names[file] for file in files]
    looked = "\n".join(f"  {folder}" for folder in folders)
    needed = f"Needed: {', '.join(files)}"
    raise FileNotFoundError(f"{name} is not on this machine.\n{needed}\nLooked in:\n{looked}\n{hint}\n{stand_in}")


def _refuse_folder(name: str, package: str, data_dir: Path | None) -> None:
    """Raise if a folder is given for data that comes with a package."""
    if data_dir is not None:
        raise ValueError(f"{name} comes with {package} and takes no data directory, got {data_dir}; drop --data-dir")


def _digits(data_dir: Path | None) -> Arrays:
    """scikit-learn's bundled 8x8 digits: every fifth image is a test image (so both parts have all the writers)."""
    from sklearn.datasets import load_digits

    _refuse_folder("digits", "scikit-learn", data_dir)
    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, 1, 8, 8).astype(np.uint8), labels.astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test]


def _idx(name: str, folder: str, default: Sequence[Path], hint: str) -> Callable[[Path | None], Arrays]:
    """A loader of the four IDX files of MNIST and of its drop-in replacement Fashion-MNIST."""
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

    def read(data_dir: Path | None) -> Arrays:
        bases = [Path("data")] if data_dir is None else [data_dir]
        folders = [place for base in bases for place in (base / folder / "raw", base / folder, base)]
        paths = _locate(name, [*(default if data_dir is None else []), *folders], files, hint)
        train_images, train_labels, test_images, test_labels = (
            read_idx(path, dims) for path, dims in zip(paths, (3, 1, 3, 1), strict=True)
        )
        for other, first in FIRST_LABELS.items():
            if other != name and train_labels[:10].tolist() == first:
                raise ValueError(f"{paths[1].parent} holds {other}, not {name}: pass another --data or --data-dir")
        return train_images[:, None], train_labels, test_images[:, None], test_labels

    return read


def _cifar(name: str, folder: str, train: Sequence[str], test: str, labels: str) -> Callable[[Path | None], Arrays]:
    """A loader of CIFAR-10 or CIFAR-100 in the Python format."""

    def read(data_dir: Path | None) -> Arrays:
        base = Path("data") if data_dir is None else data_dir
        hint = f"Unpack the archive of {name}'s Python version and pass the folder that holds {folder}/ as --data-dir."
        paths = _locate(name, [base / folder, base], [*train, test], hint)
        parts = [read_cifar(path, labels) for path in paths]
        images, targets = zip(*parts[:-1], strict=True)
        return np.concatenate(images), np.concatenate(targets), *parts[-1]

    return read


def _svhn(data_dir: Path | None) -> Arrays:
    """SVHN's cropped digits (format 2): the training and test files, without the extra one."""
    base = Path("data") if data_dir is None else data_dir
    files = ["train_32x32.mat", "test_32x32.mat"]
    paths = _locate("svhn", [base / "svhn", base], files, "Pass the folder that holds the two files as --data-dir.")
    return *read_svhn(paths[0]), *read_svhn(paths[1])


def _images(
    read: Callable[[Path | None], Arrays], classes: int, name: str, data_dir: Path | None, standardise: bool
) -> Data:
    """Images, checked and scaled: to mean 0 and deviation 1 per channel, or to [0, 1]."""
    train_images, train_labels, test_images, test_labels = read(data_dir)
    for part, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if len(images) != len(labels) or len(labels) == 0:
            raise ValueError(f"{name}: {len(images)} {part} images and {len(labels)} labels; the numbers must match")
        if labels.max() >= classes:
            raise ValueError(f"{name}: a {part} label is {labels.max()}, but there are only {classes} classes")
    zero, unit = np.zeros((1, 1, 1)), np.full((1, 1, 1), float(max(train_images.max(), test_images.max(), 1)))
    if standardise:
        zero = train_images.mean(axis=(0, 2, 3), dtype=np.float64)[:, None, None]
        unit = np.maximum(train_images.std(axis=(0, 2, 3), dtype=np.float64), 1e-6)[:, None, None]

    def inputs(images: Bytes) -> Tensor:
        scaled = torch.tensor(images, dtype=torch.float32)
        return scaled.sub_(torch.from_numpy(zero).float()).div_(torch.from_numpy(unit).float())

    return Data(
        inputs(train_images),
        torch.tensor(train_labels, dtype=torch.int64),
        inputs(test_images),
        torch.tensor(test_labels, dtype=torch.int64),
        classes,
    )


def _text(read: Callable[[Path | None], tuple[str, str]], name: str, data_dir: Path | None, standardise: bool) -> Data:
    """A text for training and one for testing, as windows of characters."""
    train, test = read(data_dir)
    return Data(
        *windows(train, f"{name}: the text to train on"), *windows(test, f"{name}: the text to test on"), CLASSES
    )


def _topics(data_dir: Path | None) -> tuple[str, str]:
    _refuse_folder("python-topics", "Python", data_dir)
    return python_topics()


def _files(data_dir: Path | None) -> tuple[str, str]:
    base = Path("data") if data_dir is None else data_dir
    hint = "Put two texts in UTF-8 there, one to train on and one to test on, or pass their folder as --data-dir."
    stand_in = "With none at hand, `--data python-topics` (Python's own help, bundled with it) always works."
    train, test = _locate("text", [base / "text", base], ["train.txt", "test.txt"], hint, stand_in)
    return read_text(train), read_text(test)


Loader = Callable[[str, Path | None, bool], Data]  # from the name, the folder, and whether to standardise

LOADERS: Final[dict[str, Loader]] = {
    "digits": partial(_images, _digits, 10),
    "fashion-mnist": partial(
        _images,
        _idx(
            "fashion-mnist",
            "FashionMNIST",
            [DEBIAN_FASHION_MNIST],
            "On Debian and Ubuntu `apt-get install dataset-fashion-mnist` installs it; elsewhere pass the folder of "
            "the four IDX files (gzipped or not), or torchvision's data folder, as --data-dir.",
        ),
        10,
    ),
    "mnist": partial(
        _images,
        _idx(
            "mnist", "MNIST", [], "Pass the folder of its four IDX files, or torchvision's data folder, as --data-dir."
        ),
        10,
    ),
    "cifar10": partial(
        _images,
        _cifar("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"),
        10,
    ),
    "cifar100": partial(_images, _cifar("cifar100", "cifar-100-python", ["train"], "test", "fine_labels"), 100),
    "svhn": partial(_images, _svhn, 10),
    "python-topics": partial(_text, _topics),
    "text": partial(_text, _files),
}
TEXTS: Final = {"python-topics": _topics, "text": _files}


@cache
def text_digest(name: str, data_dir: str | None) -> str | None:
    """A digest of a text, as another one may have the same name; "absent" where it is not; of images None."""
    if name not in TEXTS:
        return None
    try:
        return digest(*TEXTS[name](None if data_dir is None else Path(data_dir)))
    except FileNotFoundError:
        return "absent"


def load(name: str, data_dir: str | Path | None = None, *, standardise: bool = True) -> Data:
    """Read a data set from this machine.

    Args:
        name: a key of `LOADERS`: digits, fashion-mnist, mnist, cifar10, cifar100, svhn, python-topics or text.
        data_dir: where its files are; without it, the usual places (`./data` and Debian's folder) are tried.
        standardise: scale images to mean 0 and deviation 1 per channel; otherwise to [0, 1], by the brightest pixel.

    Returns:
        The task of classifying them, or of predicting the next character.

    Raises:
        ValueError: an unknown name, or a file that is damaged or of another kind.
        FileNotFoundError: the files are not there; the message says what to put where.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(LOADERS)}")
    return LOADERS[name](name, None if data_dir is None else Path(data_dir), standardise)


def with_label_noise(data: Data, fraction: float, seed: int = 0) -> Data:
    """Give a fraction of the training examples a class drawn uniformly from all classes; test labels stay as they are.

    About one in `classes` of the drawn labels is the right one again, so a little less than `fraction` is wrong.

    Args:
        data: the task.
        fraction: in [0, 1].
        seed: of the choice of examples and of their labels, apart from any run's own seed.

    Raises:
        ValueError: `fraction` outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"label noise of {fraction} is not in [0, 1]: the fraction of training labels drawn anew")
    generator = torch.Generator().manual_seed(seed)
    total = len(data.train_targets)
    chosen = torch.randperm(total, generator=generator)[: round(fraction * total)]
    targets = data.train_targets.clone()
    targets[chosen] = torch.randint(data.classes, (len(chosen),), generator=generator)
    return data._replace(train_targets=targets)
