"""Every run is a cell that is computed once, survives what happens, and knows the code that it came from."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from baselines import fingerprint as fingerprints
from baselines.cells import Store, compute, missing, name
from baselines.config import Config
from baselines.fingerprint import ROOT, fingerprint

QUICK = Config(method="fixed", steps=6, eval_every=3, log_every=1, hidden=(8,))


def test_a_cell_is_stored_whole_and_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert missing([QUICK, QUICK], store) == [QUICK]
    cell = compute(QUICK)
    store.put(cell)
    again = Store(tmp_path)
    assert missing([QUICK], again) == [] and [path.stem for path in tmp_path.iterdir()] == [name(QUICK)]
    stored = again.get(QUICK)
    assert stored is not None and stored == store.get(QUICK)
    assert stored.config == QUICK and stored.finished and stored.steps == 6
    assert stored.loss == pytest.approx(cell.loss, rel=1e-4)
    assert [len(curve) for curve in stored.curves.values()] == [7] * len(stored.curves)
    assert stored.curves["test_loss"][3] is not None and stored.curves["test_loss"][1] is None
    assert stored.area == pytest.approx(sum(math.log(loss) for loss in stored.curves["loss"][1:] if loss) / 6)


def test_a_name_is_of_what_decides_the_outcome() -> None:
    def other(**values: object) -> str:
        return name(dataclasses.replace(QUICK, **values))  # type: ignore[arg-type]

    assert len({name(QUICK), other(lr=2e-3), other(seed=1), other(method="cosine"), name(QUICK, "other code")}) == 5
    assert other(data_dir="elsewhere") == name(QUICK)
    assert other(device="cpu") == name(dataclasses.replace(QUICK, device="cpu"))


def test_a_fingerprint_is_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    apo = Config(method="apo", optimizer="adamw")
    kinds = {
        "fixed": QUICK,
        "cosine": dataclasses.replace(QUICK, method="cosine"),
        "digits cnn": dataclasses.replace(QUICK, model="cnn", hidden=None),
        "newton": apo,
        "paper": dataclasses.replace(apo, meta="paper"),
        "kfac": dataclasses.replace(apo, optimizer="kfac"),
        "augmented": dataclasses.replace(QUICK, augment=True),
    }
    before = {kind: fingerprint(config) for kind, config in kinds.items()}

    def changed(path: str, old: str, new: str) -> set[str]:
        """Which of the kinds of run another text of a file puts out of date."""
        read = Path.read_text

        def read_text(self: Path, encoding: str | None = None) -> str:
            text = read(self, encoding=encoding)
            assert self != ROOT / path or old in text
            return text.replace(old, new) if self == ROOT / path else text

        def forget() -> None:
            for cached in ("_parse", "_text", "_definitions", "_fingerprint"):
                getattr(fingerprints, cached).cache_clear()

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read_text)
            forget()
            after = {kind: fingerprint(config) for kind, config in kinds.items()}
        forget()
        return {kind for kind in kinds if before[kind] != after[kind]}

    everything = {"fixed", "cosine", "digits cnn", "newton", "paper", "kfac", "augmented"}
    assert changed("baselines/run.py", "generator=self.generator)", "generator=None)") == everything
    assert changed("baselines/run.py", "# spent in training steps", "# other words") == set()
    assert changed("baselines/models.py", "nn.Conv2d(channels, 16", "nn.Conv2d(channels, 17") == {"digits cnn"}
    assert changed("baselines/augmentation.py", "F.pad(images", "F.pad(1 + images") == {"augmented"}
    assert changed("baselines/run.py", "Augmented(self.method", "Augmented(None") == {"augmented"}
    assert changed("apo/newton.py", "import ", "import os\nimport ") == {"newton", "kfac"}
    assert changed("apo/gradient.py", "import ", "import os\nimport ") == {"paper"}
    assert changed("apo/rules/kfac.py", "import ", "import os\nimport ") == {"kfac"}
    assert changed("apo/rules/adam.py", "import ", "import os\nimport ") == set()


def test_a_cell_of_earlier_code_is_accepted_only_when_asked_for(tmp_path: Path) -> None:
    cell = dataclasses.replace(compute(QUICK), code="earlier")
    Store(tmp_path).put(cell)
    assert Store(tmp_path).get(QUICK) is None
    accepted = Store(tmp_path, older=True).get(QUICK)
    assert accepted is not None and accepted.code == "earlier"
    assert Store(tmp_path, older=True).get(dataclasses.replace(QUICK, seed=1)) is None
    Store(tmp_path).put(dataclasses.replace(compute(QUICK), about=cell.about | {"time": 0}))
    present = Store(tmp_path, older=True).get(QUICK)
    assert present is not None and present.code == fingerprint(QUICK)


def test_a_run_that_diverges_ends_there_and_is_kept(tmp_path: Path) -> None:
    cell = compute(Config(optimizer="sgd", lr=1e30, method="fixed", steps=6, log_every=1, hidden=(8,)))
    assert not cell.finished and cell.steps < 6 and cell.loss == cell.area == math.inf
    Store(tmp_path).put(cell)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["outcome"]["train_loss"] is None
    (stored,) = Store(tmp_path)
    assert stored.loss == stored.area == math.inf


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', '{"format": 1, "config": {"colour": 1}}'])
def test_a_damaged_cell_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "0123.json").write_text(content)
    with pytest.raises(ValueError, match=r"0123\.json cannot be read .* delete it, and it is run again"):
        Store(tmp_path)


SCRIPT = """
import sys, pathlib
from baselines import cells
from baselines.config import Config
cells.CHECKPOINT_SECONDS = 0.0
config = Config(method="apo", optimizer="sgd", steps=100_000, eval_every=100_000, log_every=1, hidden=(8,))
cells.compute(config, pathlib.Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    config = Config(method="apo", optimizer="sgd", steps=100_000, eval_every=100_000, log_every=1, hidden=(8,))
    assert folder.name == name(config)
    reached = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    short = dataclasses.replace(config, steps=reached + 3)
    folder.rename(tmp_path / name(short))
    resumed = compute(short, tmp_path)
    assert list(tmp_path.iterdir()) == []
    whole = compute(short)
    assert resumed.curves["loss"] == whole.curves["loss"] and resumed.outcome["lr"] == whole.outcome["lr"]
    assert resumed.steps == reached + 3
