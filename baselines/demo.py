"""`python -m baselines demo`: three far-off initial learning rates, with and without apo; one table, one picture."""

import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

from baselines.config import Config
from baselines.data import load
from baselines.display import display, number, percent
from baselines.plots import Curve, demo_figure, save
from baselines.run import Run
from baselines.storage import provenance, write_json

LRS: Final = (1e-6, 1e-3, 1.0)
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "digits": {"epochs": 40, "batch_size": 50},
    "fashion-mnist": {"epochs": 5, "batch_size": 100},
}


class Entry(NamedTuple):
    """One of the six runs, finished."""

    run: Run
    outcome: dict[str, Any]


def _table(entries: dict[tuple[str, float], Entry]) -> Table:
    caption = "loss: mean over the whole training set; accuracy: of the test set"
    table = Table(title="AdamW alone, and tuned by apo", caption=caption)
    table.add_column("\ninitial LR", justify="right")
    for group in ("alone", "with apo"):
        table.add_column(f"{group}\nloss", justify="right")
        table.add_column("\naccuracy", justify="right")
    table.add_column("\ntuned LR", justify="right")
    for lr in LRS:
        plain, tuned = entries["fixed", lr].outcome, entries["apo", lr].outcome
        cells = [
            f(entry[name])
            for entry in (plain, tuned)
            for f, name in ((number, "train_loss"), (percent, "test_accuracy"))
        ]
        table.add_row(f"{lr:g}", *cells, number(tuned["lr"]))
    return table


def demo(
    console: Console,
    data: str = "digits",
    data_dir: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Run the command.

    Args:
        console: where to show it.
        data: digits or fashion-mnist.
        data_dir: where the data's files are, if not in the usual places.
        epochs: passes over the training set; None: 40 for digits, 5 for Fashion-MNIST.
        seed: of initial weights and data order, the same for all six runs.
        out: the folder of `demo.png` and `demo.json`; None: under `runs/`.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: a setting out of range.
        FileNotFoundError: no data; the message says what to put where.
    """
    folder = out or Path("runs") / f"demo-{data}"
    settings = SETTINGS[data] | ({} if epochs is None else {"epochs": epochs})
    configs = [
        Config(
            data=data, data_dir=data_dir, optimizer="adamw", method=method, lr=lr, seed=seed, log_every=1, **settings
        )
        for method in ("fixed", "apo")
        for lr in LRS
    ]
    task = load(data, data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(
        f"Training an MLP on {data} ({len(task.train_targets)} examples, {settings['epochs']} epochs) six times: from "
        "initial learning rates 1e-6, 1e-3 and 1, with AdamW alone and with AdamW tuned by apo.",
        soft_wrap=True,
    )
    started = time.perf_counter()
    entries: dict[tuple[str, float], Entry] = {}
    with display(console, lines=4) as shown:
        for config in configs:
            run = Run(config, task)
            stage = shown.stage(f"{'apo' if config.method == 'apo' else 'alone':<5} {config.lr:<5g}", run.steps)
            for row in run.rows():
                stage.update(run.step, row)
            entries[config.method, config.lr] = Entry(run, run.outcome())
    curves = [Curve(method, lr, entry.run.history) for (method, lr), entry in entries.items()]
    save(demo_figure(curves, f"An MLP on {data}, from three initial learning rates"), folder / "demo.png")
    write_json(
        {
            "data": data,
            "train_examples": len(task.train_targets),
            "test_examples": len(task.test_targets),
            "runs": [{"config": entry.run.config.to_dict(), "outcome": entry.outcome} for entry in entries.values()],
            "seconds": time.perf_counter() - started,
            **provenance(run.device),
        },
        folder / "demo.json",
    )
    console.print(_table(entries))
    console.print(f"{time.perf_counter() - started:.0f} s. Picture: {folder / 'demo.png'}", soft_wrap=True)
    return 0
