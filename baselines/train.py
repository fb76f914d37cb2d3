"""`python -m baselines train`: one run, shown live, stored whole, resumable."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from baselines.config import Config
from baselines.display import Interrupt, display, number, percent
from baselines.models import MODELS
from baselines.plots import save, training_figure
from baselines.run import Row, Run
from baselines.storage import CHECKPOINT, load_checkpoint, results, save_checkpoint, write_history, write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SAVE_SECONDS: Final = 30.0  # between two checkpoints; they are written at evaluations
INTERRUPTED: Final = 130  # the shell's exit status for Ctrl-C
TAGS: Final = {"loss": "train/batch_loss", "test_loss": "test/loss", "test_accuracy": "test/accuracy"}


def default_folder(config: Config) -> Path:
    """Where a run goes when `--out` is not given."""
    task = f"{config.data}-{config.model}"
    return Path("runs") / f"{task}-{config.optimizer}-{config.method}-lr{config.lr:g}-seed{config.seed}"


def _same_config(stored: dict[str, Any], asked: dict[str, Any]) -> Config:
    """The configuration of a stored run, after checking that nothing else is asked for now."""
    now = Config.from_dict(stored | asked).to_dict()
    changed = [
        f"{name}: {stored[name]} in the checkpoint, {now[name]} asked for"
        for name in stored
        if now[name] != stored[name] and name != "data_dir"
    ]
    if changed:
        raise ValueError(
            "the run to resume has another configuration (" + "; ".join(changed) + "); "
            "leave these options out, or start a new run in another --out"
        )
    config = Config.from_dict(now)
    config.refuse_ignored(asked)
    return config


def open_run(asked: dict[str, Any], folder: Path | None, resume: bool, overwrite: bool) -> tuple[Run, Path]:
    """A new run, or a stored one brought back.

    Args:
        asked: the configuration's values that were given explicitly.
        folder: where the run is stored; None: the default for its configuration.
        resume: continue the run in `folder`.
        overwrite: start anew although `folder` holds a run.

    Raises:
        ValueError: contradictory options, a run in the way, or another configuration than the stored one.
        FileNotFoundError: nothing to resume, or no data.
    """
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite starts it anew; give one of them")
    if asked.get("method") == "pbt":
        raise ValueError("--method pbt trains a population, not one model: python -m baselines run apo-fig15")
    folder = folder or default_folder(Config.from_dict(asked))
    if resume:
        state = load_checkpoint(folder)
        run = Run(_same_config(state["config"], asked))
        before, now = len(state["order"]["permutation"]), len(run.data.train_targets)
        if before != now:
            raise ValueError(f"the run to resume had {before} training examples, and there are {now} now")
        run.load_state_dict(state)
        return run, folder
    if (folder / CHECKPOINT).exists() and not overwrite:
        raise ValueError(f"{folder} holds a run: --resume continues it, --overwrite starts anew, --out goes elsewhere")
    config = Config.from_dict(asked)
    config.refuse_ignored(asked)
    run = Run(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, "results.json"):  # so that no file there belongs to another run
        (folder / name).unlink(missing_ok=True)
    return run, folder


def _tensorboard(folder: Path, step: int) -> "SummaryWriter":
    """A writer that drops what an interrupted run wrote beyond its checkpoint."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"TensorBoard is not installed ({error}); pip install '.[baselines]' in a checkout") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def _log(writer: "SummaryWriter", row: Row) -> None:
    for name, value in row.items():
        if name not in ("step", "epoch", "seconds") and value is not None:
            writer.add_scalar(TAGS.get(name, name), value, int(row["step"] or 0))


def _store(run: Run, folder: Path) -> None:
    save_checkpoint(run, folder)
    write_history(run.history, folder / "history.csv")


def _advance(run: Run, folder: Path, console: Console) -> bool:
    """Train to the end or to the first interrupt, storing as it goes; whether the end was reached."""
    writer = _tensorboard(folder, run.step)
    saved = time.monotonic()
    with writer, Interrupt() as interrupt, display(console) as shown:
        stage = shown.stage(run.config.method, run.steps, run.step)
        while not run.finished and not interrupt.asked:
            row = run.advance()
            stage.update(run.step, row)
            if row is None:
                continue
            _log(writer, row)
            if row["test_loss"] is not None and time.monotonic() - saved > SAVE_SECONDS:
                _store(run, folder)
                saved = time.monotonic()
        _store(run, folder)
    return run.finished


def train(
    asked: dict[str, Any], console: Console, folder: Path | None = None, resume: bool = False, overwrite: bool = False
) -> int:
    """Run the command.

    Args:
        asked: the configuration's values that were given explicitly; the rest are `Config`'s defaults.
        console: where to show it.
        folder: the run's folder; None: one named after the configuration, under `runs/`.
        resume: continue the run stored there.
        overwrite: start anew although a run is stored there.

    Returns:
        The exit status: 0, or 130 when interrupted (with everything stored).
    """
    run, folder = open_run(asked, folder, resume, overwrite)
    config = run.config
    console.print(
        f"{config.data} ({len(run.data.train_targets)} training, {len(run.data.test_targets)} test examples), "
        f"{config.model}, {config.optimizer}, {config.method}, lr {config.lr:g}, seed {config.seed}, {run.steps} steps "
        f"of {config.batch_size} on {run.device}" + (f", resumed at step {run.step}" if resume else ""),
        soft_wrap=True,
    )
    if not _advance(run, folder, console):
        console.print(
            f"Interrupted at step {run.step} of {run.steps}; everything is in {folder}. "
            f"To continue: python -m baselines train --resume --out {folder}",
            soft_wrap=True,
        )
        return INTERRUPTED
    content = results(run)
    write_json(content, folder / "results.json")
    unit = "mean squared error" if MODELS[config.model].reconstructs else "loss (nats)"
    save(training_figure(run.history, _title(config), unit), folder / "training.png")
    outcome = content["outcome"]
    classes = outcome["test_accuracy"] is not None
    test = f"accuracy {percent(outcome['test_accuracy'])}" if classes else f"loss {number(outcome['test_loss'])}"
    hypers = ", ".join(f"{name} {number(value)}" for name, value in run.method.hypers().items())
    console.print(
        f"Training loss {number(outcome['train_loss'])}, test {test}, {hypers}, {outcome['seconds']:.1f} s. "
        f"Picture: {folder / 'training.png'}",
        soft_wrap=True,
    )
    return 0


def _title(config: Config) -> str:
    """One line that names a run."""
    shown = (
        "label_noise",
        "weight_decay",
        "clip",
        "clip_by",
        "damping",
        "eps",
        "meta_lr",
        "warmup",
        "fsd",
        "wsd",
        "meta",
    )
    changed = [
        f"{field.name.replace('_', ' ')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name in shown and getattr(config, field.name) != field.default
    ]
    parts = [config.data, config.model, config.optimizer, config.method, f"initial lr {config.lr:g}", *changed]
    return ", ".join(parts)
