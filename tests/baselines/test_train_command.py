"""The train command: what it leaves behind, and what an interrupt leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from baselines.cli import main
from baselines.display import Interrupt
from baselines.storage import commit, finite, replace_file
from tests.baselines.files import write_idx_set

ROOT = Path(__file__).parents[2]
QUICK = ["train", "--method", "fixed", "--steps", "40", "--hidden", "16"]


def rows(folder: Path) -> list[dict[str, str]]:
    """The history without its clock."""
    with (folder / "history.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights in the folder's checkpoint."""
    model: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return model


def test_a_run_leaves_its_results_history_picture_and_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--label-noise", "0.1", "--out", str(tmp_path / "r")]) == 0
    content = json.loads((tmp_path / "r" / "results.json").read_text())
    assert content["data"] == {
        "name": "digits",
        "train_examples": 1438,
        "test_examples": 359,
        "shape": [1, 8, 8],
        "classes": 10,
        "label_noise": 0.1,
    }
    assert content["config"]["hidden"] == [16] and content["config"]["lr"] == 1e-3 and content["steps"] == 40
    assert content["outcome"]["train_loss"] < 2.5 and 0 < content["outcome"]["test_accuracy"] <= 1
    assert content["lr_curve"][0] == [0, 1e-3] and content["versions"]["torch"] and "commit" in content
    assert content["device"].startswith("cpu") and not content["outcome"]["diverged"]
    assert [row["step"] for row in rows(tmp_path / "r")] == ["0", "10", "15", "20", "30", "40"]
    assert (tmp_path / "r" / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "r" / "tensorboard").glob("events*"))
    out = capsys.readouterr().out
    assert "1438 training, 359 test examples" in out and "step 40/40" in out and "Training loss" in out


def test_sigint_leaves_a_run_that_resumes_bit_by_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "baselines", "train", "--method", "apo", "--steps", "1000", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    cut = [*command, str(tmp_path / "cut")]
    with subprocess.Popen(cut, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "/1000" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 130, rest
    assert "--resume" in rest
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint.pt", "history.csv", "tensorboard"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stopped = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"]
        assert 0 < stopped < 1000
        assert main(["train", "--resume", "--out", str(tmp_path / "cut")]) == 0
        assert main([*command[3:], str(tmp_path / "whole")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    resumed, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_first_signal_is_a_flag_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stored_run_is_neither_overwritten_nor_changed_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "r")
    assert main([*QUICK, "--out", folder, "--resume"]) == 2
    assert "no checkpoint.pt to resume from" in capsys.readouterr().err
    assert main([*QUICK, "--out", folder]) == 0
    capsys.readouterr()
    assert main([*QUICK, "--out", folder]) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main(["train", "--resume", "--lr", "0.5", "--out", folder]) == 2
    assert "lr: 0.001 in the checkpoint, 0.5 asked for" in capsys.readouterr().err
    before = weights(tmp_path / "r")
    assert main([*QUICK, "--out", folder, "--resume"]) == 0  # finished: nothing left but to report
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "r").items())
    assert main([*QUICK, "--seed", "3", "--out", folder, "--overwrite"]) == 0
    assert json.loads((tmp_path / "r" / "results.json").read_text())["config"]["seed"] == 3
    (tmp_path / "r" / "checkpoint.pt").write_bytes(b"rubbish")
    capsys.readouterr()
    assert main(["train", "--resume", "--out", folder]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_what_is_tuned_besides_lr_is_stored_and_survives_an_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = ["--optimizer", "kfac", "--tune", "lr", "--tune", "damping", "--damping", "0.01"]
    command = ["train", *tuned, "--steps", "40", "--hidden", "16", "--out", str(tmp_path / "r")]
    assert main(command) == 0
    content = json.loads((tmp_path / "r" / "results.json").read_text())
    assert content["config"]["tune"] == ["lr", "damping"] and list(content["tuned_curves"]) == ["damping"]
    curve = content["tuned_curves"]["damping"]
    assert curve[0] == [0, 0.01] and curve[-1] == [40, content["outcome"]["damping"]] and curve[-1][1] != 0.01
    assert [float(row["damping"]) for row in rows(tmp_path / "r")] == [value for _, value in curve]
    assert "damping" in capsys.readouterr().out
    assert main(["train", "--resume", *tuned, "--out", str(tmp_path / "r")]) == 0


def test_an_autoencoder_reports_losses_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx_set(tmp_path / "d", compressed=False)
    task = ["--data", "mnist", "--data-dir", str(tmp_path / "d"), "--model", "autoencoder", "--batch-size", "6"]
    assert main(["train", *task, "--steps", "4", "--out", str(tmp_path / "r")]) == 0
    outcome = json.loads((tmp_path / "r" / "results.json").read_text())["outcome"]
    assert outcome["test_accuracy"] is None and 0 < outcome["test_loss"] < 0.5
    out = capsys.readouterr().out
    assert "test loss" in out and "accuracy" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "lr=-1.0 is not allowed"),
        (["--data", "mnist", "--data-dir", "nowhere"], "mnist is not on this machine"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--model", "cnn", "--hidden", "5"], "no hidden widths"),
        (["--device", "nonsense"], "cannot be used here"),
        (["--method", "cosine", "--fsd", "0"], "fsd=0.0 is an option of --method apo, and --method cosine ignores it"),
        (["--method", "fixed", "--tune", "lr"], "--method fixed ignores it; leave out --tune"),
        (["--decay-factor", "0.1"], "decay_factor=0.1 is an option of --method step"),
        (["--damping", "0.1"], "damping=0.1 is an option of kfac"),
        (["--optimizer", "quasi-adam", "--weight-decay", "0"], "quasi-adam has none; leave out --weight-decay"),
        (["--optimizer", "sgd", "--tune", "lr,damping"], "only lr can be tuned"),
        (["--optimizer", "kfac", "--tune", "momentum"], "can adapt 'lr', 'damping'"),
        (["--model", "autoencoder"], "1x28x28, not 1x8x8"),
    ],
)
def test_mistakes_are_explained_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", "--out", str(tmp_path / "r"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dog", None)
    assert main(["train", "--method", "dog", "--optimizer", "sgd", "--out", str(tmp_path / "r")]) == 2
    assert "import of dog" in (message := capsys.readouterr().err) and "pip install '.[baselines]'" in message


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"


def test_json_takes_null_for_what_it_cannot_hold() -> None:
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"), "x")}) == {"a": [1.0, None], "b": [None, "x"]}
    assert commit() is None or len(commit() or "") >= 40
