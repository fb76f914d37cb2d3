"""The experiment scripts on real data go on where they stopped, and draw and tabulate."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.baselines.files import idx
from tests.documents import example


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with files in Fashion-MNIST's format: 60 training and 20 test images, classes by brightness."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, size in (("train", 60), ("t10k", 20)):
        labels = rng.integers(0, 10, size)
        images = rng.integers(0, 50, (size, 28, 28)) + 20 * labels[:, None, None]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return str(folder)


def test_quasi_adam_against_adam(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("quasi_adam_vs_adam", monkeypatch)
    arguments = ["--epochs", "2", "--seeds", "1", "--data-dir", data, "--out", str(tmp_path), "--experiments"]
    module.main([*arguments, "V"])
    first = capsys.readouterr().out
    assert first.count("autoencoder 256") == 4 and "| V | test MSE, 1e-3, at the end |" in first
    module.main([*arguments, "II, batch 256", "V"])
    both = capsys.readouterr().out
    assert first.splitlines()[-6:] == both.splitlines()[-6:]
    assert both.count("lenet 256 0.01") == 4 and "autoencoder 256" not in both  # these are stored
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [r["config"]["optimizer"] for r in content["runs"]] == list(module.OPTIMIZERS) * 2
    assert (tmp_path / "table.md").read_text().strip() in both


def test_a_run_that_diverges_is_no_best(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("quasi_adam_vs_adam", monkeypatch)
    rows = [{"step": step, "test_loss": 0.5, "test_accuracy": step / 100} for step in (0, 10, 20, 30, 40)]
    assert module.measures({"finished": True, "rows": rows}, "test_accuracy") == pytest.approx(
        {"first half": 0.15, "half": 0.2, "end": 0.4}
    )
    assert np.isnan(module.measures({"finished": False, "rows": rows}, "test_accuracy")["end"])
    kfac = example("kfac_fashion_mnist", monkeypatch)
    assert kfac.final({"finished": False, "rows": [{"train_loss": 0.1}]}, "train_loss") == np.inf
    assert kfac.spread([1.0, 3.0, np.inf], ".1f") == "2.0 ± 1.4" and kfac.spread([np.inf], ".1f") == "-"


def test_kfac_on_fashion_mnist(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("kfac_fashion_mnist", monkeypatch)
    grids = [("kfac", {"damping": 1e-2}, (1e-3, 1e-2)), ("rmsprop", {}, (1e-3, 1e-2))]
    monkeypatch.setattr(module, "GRIDS", grids)
    monkeypatch.setattr(module, "TUNED", [module.TUNED[0], module.TUNED[-1]])
    module.main(["--epochs", "1", "--seeds", "1", "--data-dir", data, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("| RMSprop, fixed |") == printed.count("| K-FAC, fixed |") == 2
    assert "| K-FAC, lr and damping tuned, newton | 0.001 | 0.001 | 1 |" in printed
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert len(content["runs"]) == 6 and content["train_examples"] == 10_000
    traced = [r for r in content["runs"] if "damping" in r["config"]["tune"]]
    assert len(traced) == 1 and all(row["damping"] > 0 for r in traced for row in r["rows"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
