"""Every loader on a tiny file in its real format, and on files that are damaged, missing or of another kind."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.io import savemat

from baselines.data import FIRST_LABELS, LOADERS, TEXTS, load, with_label_noise
from baselines.formats import read_cifar, read_idx, read_svhn
from tests.baselines.files import idx, write_idx_set


def cifar_bytes(images: NDArray[Any], labels: dict[bytes, object]) -> bytes:
    """A CIFAR file: a protocol-2 pickle of byte-string keys, as Python 2 wrote it."""
    return pickle.dumps({b"data": images, b"batch_label": b"batch", **labels}, protocol=2)


def test_digits_is_whole_fixed_and_standardised() -> None:
    data = load("digits")
    assert data.train_inputs.shape == (1438, 1, 8, 8) and data.test_inputs.shape == (359, 1, 8, 8)
    assert data.train_inputs.dtype == torch.float32 and data.train_targets.dtype == torch.int64
    assert set(data.train_targets.tolist()) == set(data.test_targets.tolist()) == set(range(10)) and data.classes == 10
    assert abs(data.train_inputs.mean().item()) < 1e-5 and abs(data.train_inputs.std().item() - 1) < 1e-3
    again = load("digits")
    assert all(torch.equal(one, two) for one, two in zip(data[:4], again[:4], strict=True))
    assert data.to("cpu").classes == 10


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "below"), [("fashion-mnist", "."), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "MNIST/raw")]
)
def test_idx_sets_load_from_a_folder_and_from_torchvisions_layout(
    tmp_path: Path, name: str, below: str, compressed: bool
) -> None:
    images, targets = write_idx_set(tmp_path / "d" / below, compressed)
    data = load(name, tmp_path / "d")
    assert data.train_inputs.shape == (12, 1, 28, 28) and data.test_inputs.shape == (4, 1, 28, 28)
    assert data.train_targets.tolist() == targets[:12].tolist() and data.test_targets.tolist() == targets[12:].tolist()
    train = images[:12].astype(np.float64)
    expected = (images[12:] - train.mean()) / train.std()
    np.testing.assert_allclose(data.test_inputs[:, 0].numpy(), expected, atol=1e-5)
    pixels = load(name, tmp_path / "d", standardise=False)
    np.testing.assert_allclose(pixels.test_inputs[:, 0].numpy(), images[12:] / images.max(), rtol=1e-6)


@pytest.mark.parametrize(("asked", "held"), [("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")])
def test_one_data_set_is_never_read_under_the_others_name(tmp_path: Path, asked: str, held: str) -> None:
    write_idx_set(tmp_path / "d", True, FIRST_LABELS[held])
    assert load(held, tmp_path / "d").classes == 10
    with pytest.raises(ValueError, match=f"holds {held}, not {asked}: pass another"):
        load(asked, tmp_path / "d")


def test_damaged_idx_files_say_what_is_wrong(tmp_path: Path) -> None:
    good = idx(np.arange(2 * 3 * 3).reshape(2, 3, 3))
    path = tmp_path / "images"
    cases = {
        "magic number 0x00000801": idx(np.arange(18).reshape(2, 3, 3), 0x801),
        "header alone": good[:7],
        "truncated or damaged: its header announces 18 bytes": good[:-1],
        "and 19 follow": good + b"x",
        "truncated gzip": gzip.compress(good)[:-9],
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(path, 3)
    path.write_bytes(gzip.compress(good))
    assert read_idx(path, 3).tolist() == np.arange(18).reshape(2, 3, 3).tolist()


@pytest.mark.parametrize("python3", [False, True])
def test_cifar10_and_cifar100_load_from_their_pickles(tmp_path: Path, python3: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
    labels: object = [1, 0, 9] if not python3 else np.array([1, 0, 9])
    ten = tmp_path / "cifar-10-batches-py"
    ten.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (ten / name).write_bytes(cifar_bytes(images, {b"labels": labels}))
    data = load("cifar10", tmp_path)
    assert data.train_inputs.shape == (15, 3, 32, 32) and data.test_targets.tolist() == [1, 0, 9]
    mean, deviation = images.reshape(3, 3, 1024).mean((0, 2)), images.reshape(3, 3, 1024).std((0, 2))
    red = (images[0, :1024].reshape(32, 32) - mean[0]) / deviation[0]
    np.testing.assert_allclose(data.test_inputs[0, 0].numpy(), red, atol=1e-5)
    hundred = tmp_path / "cifar-100-python"
    hundred.mkdir()
    for name in ("train", "test"):
        content = cifar_bytes(images, {b"fine_labels": [99, 50, 0], b"coarse_labels": [1, 2, 3]})
        (hundred / name).write_bytes(content)
    data = load("cifar100", hundred)
    assert data.train_targets.tolist() == [99, 50, 0] and data.classes == 100


def test_a_pickle_can_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "data_batch_1"
    for content in (Evil(), {b"data": Evil(), b"labels": [0]}, {b"data": print, b"labels": [0]}):
        path.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match="neither a NumPy array nor a built-in type"):
            read_cifar(path, "labels")
    assert not (tmp_path / "ran").exists()


def test_damaged_cifar_files_say_what_is_wrong(tmp_path: Path) -> None:
    images = np.zeros((2, 3072), np.uint8)
    path = tmp_path / "test_batch"
    cases = {
        "cannot be read as a CIFAR file": cifar_bytes(images, {b"labels": [0, 1]})[:-100],
        "CIFAR has the keys b'data' and b'labels', this has": cifar_bytes(images, {b"fine_labels": [0, 1]}),
        r"\[2, 3072\] \(uint8\) with labels \[3\]": cifar_bytes(images, {b"labels": [0, 1, 2]}),
        r"\(float64\)": cifar_bytes(images.astype(np.float64), {b"labels": [0, 1]}),
        "this has list": pickle.dumps([1], protocol=2),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_cifar(path, "labels")


def test_svhn_loads_and_writes_zero_as_zero(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / name, {"X": images, "y": np.array([[10], [1], [9], [5]], np.uint8)})
    data = load("svhn", tmp_path)
    assert data.train_inputs.shape == (4, 3, 32, 32) and data.train_targets.tolist() == [0, 1, 9, 5]
    pixels, _ = read_svhn(tmp_path / "test_32x32.mat")
    assert pixels[2, 1].tolist() == images[:, :, 1, 2].tolist()
    whole = (tmp_path / "test_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"test_32x32\.mat cannot be read"):
        load("svhn", tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": images[:, :, :, :2], "y": np.ones((4, 1))})
    with pytest.raises(ValueError, match="not SVHN's cropped-digits file"):
        load("svhn", tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"digitStruct": 1.0})
    with pytest.raises(ValueError, match="needs the variables X and y"):
        load("svhn", tmp_path)


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in ("digits", *TEXTS)])
def test_absent_data_says_what_to_put_where(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"(?s){name} is not on this machine.*Needed.*{tmp_path}.*digits"):
        load(name, tmp_path)


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'imagenet'; choose one of digits"):
        load("imagenet")
    with pytest.raises(ValueError, match="drop --data-dir"):
        load("digits", tmp_path)
    with pytest.raises(ValueError, match=r"label noise of 1\.5"):
        with_label_noise(load("digits"), 1.5)
    write_idx_set(tmp_path / "d", False, [10])
    with pytest.raises(ValueError, match="a training label is 10"):
        load("mnist", tmp_path / "d")
    (tmp_path / "d" / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3)))
    with pytest.raises(ValueError, match="12 training images and 3 labels"):
        load("mnist", tmp_path / "d")


def test_label_noise_changes_a_fraction_of_the_training_labels_the_same_way_each_time() -> None:
    data = load("digits")
    noisy = with_label_noise(data, 0.1)
    wrong = (noisy.train_targets != data.train_targets).float().mean().item()
    assert 0.07 < wrong <= 0.1
    assert torch.equal(noisy.train_targets, with_label_noise(data, 0.1).train_targets)
    assert torch.equal(noisy.test_targets, data.test_targets)
    assert torch.equal(with_label_noise(data, 0.0).train_targets, data.train_targets)
