"""What a run leaves in its folder: a checkpoint, `history.csv`, `results.json`; each replaced whole or not at all."""

import csv
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from baselines.run import COLUMNS, Row, Run

CHECKPOINT: Final = "checkpoint.pt"
PACKAGES: Final = ("torch", "numpy", "scipy", "scikit-learn")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whatever happens, `path` holds either the old content or the new one in full."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(run: Run, folder: Path) -> None:
    """Write the run's whole state to `folder`, atomically."""
    replace_file(folder / CHECKPOINT, lambda file: torch.save(run.state_dict(), file))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the state that `save_checkpoint` wrote, running no code from the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CHECKPOINT} to resume from; leave out --resume to start one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises several kinds
        raise ValueError(f"{path} cannot be read ({error}); pass --overwrite to start the run anew") from error
    if not isinstance(state, dict) or "config" not in state:
        raise ValueError(f"{path} is not a checkpoint of a run; pass another --out, or --overwrite to replace it")
    return state


def write_history(history: Sequence[Row], path: Path) -> None:
    """Write the rows as CSV, one column a field, with empty cells where nothing was measured."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(history[0]) if history else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(text.getvalue(), path)


def finite(value: Any) -> Any:
    """The same structure with null in place of numbers that JSON cannot hold (NaN and infinities)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def write_text(text: str, path: Path) -> None:
    """Write text as UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON with null for NaN and infinities."""
    write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", path)


def commit() -> str | None:
    """The git commit of this code, with `+changes` where tracked files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what something was run: device, threads, versions, commit."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, "apo"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
    }


def results(run: Run) -> dict[str, Any]:
    """The content of `results.json`: what was run, on what, and what came out.

    `outcome` is measured in eval mode at the end: the losses are means over the whole training and test set. Its
    seconds are wall-clock time in training steps, evaluations left out. `tuned_curves` has what is tuned besides lr.
    """

    def curve(name: str) -> list[list[float | None]]:
        return [[row["step"], row[name]] for row in run.history if row[name] is not None]

    outcome = run.outcome()
    diverged = not math.isfinite(outcome["train_loss"])
    return {
        "format": 1,
        "config": run.config.to_dict(),
        "data": {
            "name": run.config.data,
            "train_examples": len(run.data.train_targets),
            "test_examples": len(run.data.test_targets),
            "shape": list(run.data.train_inputs.shape[1:]),
            "classes": run.data.classes,
            "label_noise": run.config.label_noise,
        },
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "steps": run.step,
        "epochs": run.step / run.steps_per_epoch,
        "outcome": outcome | {"diverged": diverged},
        "lr_curve": curve("lr"),
        "loss_curve": curve("loss"),
        "accuracy_curve": curve("test_accuracy"),
        "tuned_curves": {name: curve(name) for name in run.history[0] if name not in COLUMNS},
        **provenance(run.device),
    }
