"""Quasi-Adam against Adam on Fashion-MNIST: experiments II and V of the Quasi-Adam paper (§VI.D), early in training.

A LeNet classifies with batches of 256 and 512 and a learning rate of 1e-2 (experiment II); an autoencoder reconstructs
with batches of 256 and a learning rate of 1e-3 (V), and with 1e-2 (that of IV, which is on MNIST). Each is trained by
`torch.optim.Adam`, by Adam with ε inside the root as the paper has it, by `apo.quasi_adam`, and by its variant
"switch", from the same weights with the same batches.

    python examples/quasi_adam_vs_adam.py --out docs/results/quasi_adam

Finished runs are in results.json and are not repeated: after an interruption, the same command goes on.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from baselines.config import Config
from baselines.plots import BLUE, GREEN, GREY, VERMILION, save, tidy
from baselines.sweep import Result, sweep

OPTIMIZERS = {
    "adam": "Adam",
    "adam-eps-inside": "Adam, ε inside",
    "quasi-adam": "Quasi-Adam",
    "quasi-adam-switch": "Quasi-Adam, switch",
}
COLOURS = dict(zip(OPTIMIZERS, (BLUE, GREY, VERMILION, GREEN), strict=True))
EXPERIMENTS: dict[str, dict[str, Any]] = {  # the learning rate and the batch size are the paper's
    "II, batch 256": {"model": "lenet", "batch_size": 256, "lr": 1e-2, "eval_every": 47},
    "II, batch 512": {"model": "lenet", "batch_size": 512, "lr": 1e-2, "eval_every": 59},
    "V": {"model": "autoencoder", "batch_size": 256, "lr": 1e-3, "log_every": 235},
    "V, lr of IV": {"model": "autoencoder", "batch_size": 256, "lr": 1e-2, "log_every": 235},
}
MEASURES = {"first half": "mean of the first half", "half": "at the half", "end": "at the end"}


def config(experiment: str, optimizer: str, seed: int, epochs: int, data_dir: str | None) -> Config:
    """One run."""
    settings = {"log_every": 10**6, "eval_every": None} | EXPERIMENTS[experiment]
    return Config(
        data="fashion-mnist",
        method="fixed",
        optimizer=optimizer,
        seed=seed,
        epochs=epochs,
        data_dir=data_dir,
        **settings,
    )


def curve(result: Result, name: str) -> list[tuple[float, float]]:
    """A measure at every evaluation after the first step; NaN where a run has diverged."""
    rows = [row for row in result["rows"] if row["step"] and row["test_loss"] is not None]
    return [(row["step"], math.nan if row[name] is None else row[name]) for row in rows]


def measures(result: Result, name: str) -> dict[str, float]:
    """The mean over the evaluations of the first half of the steps, the last of these, and the last of all."""
    points = curve(result, name)
    first = [value for step, value in points if step <= points[-1][0] / 2] or [points[0][1]]
    found = {"first half": statistics.fmean(first), "half": first[-1], "end": points[-1][1]}
    return found if result["finished"] else dict.fromkeys(found, math.nan)


def quantities(experiment: str) -> list[tuple[str, str, float]]:
    """What is shown of an experiment: the name in the rows, in the table, and the unit."""
    if EXPERIMENTS[experiment]["model"] == "lenet":
        return [("test_accuracy", "test accuracy, %", 100.0)]
    return [("test_loss", "test MSE, 1e-3", 1e3), ("loss", "training MSE, 1e-3", 1e3)]


def spread(values: Sequence[float]) -> float:
    """The standard deviation; 0 of a single value, and NaN if one is."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(runs: dict[tuple[str, str], list[Result]], experiments: Sequence[str]) -> str:
    """Mean and standard deviation over the seeds, in Markdown, and for how many seeds Quasi-Adam beats each Adam."""
    lines = [
        f"| experiment | measure | {' | '.join(OPTIMIZERS.values())} | better than Adam | than Adam, ε inside |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for experiment in experiments:
        for name, title, unit in quantities(experiment):
            found = {
                optimizer: [measures(run, name) for run in runs[experiment, optimizer]] for optimizer in OPTIMIZERS
            }
            sign = 1 if name == "test_accuracy" else -1
            for measure, words in MEASURES.items():
                values = {o: [unit * seed[measure] for seed in seeds] for o, seeds in found.items()}
                cells = [f"{statistics.fmean(v):.2f} ± {spread(v):.2f}" for v in values.values()]
                for adam in ("adam", "adam-eps-inside"):
                    pairs = zip(values["quasi-adam"], values[adam], strict=True)
                    wins = sum(sign * own > sign * other for own, other in pairs)
                    cells.append(f"{wins} of {len(values[adam])}")
                lines.append(f"| {experiment} | {title}, {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(runs: dict[tuple[str, str], list[Result]], experiments: Sequence[str]) -> Figure:
    """The test measure of every run over the steps, the mean over the seeds drawn thick."""
    picture = Figure(figsize=(4.2 * len(experiments), 3.8), layout="constrained", dpi=120)
    for experiment, axes in zip(experiments, picture.subplots(1, len(experiments), squeeze=False)[0], strict=True):
        name, title, unit = quantities(experiment)[0]
        for optimizer, label in OPTIMIZERS.items():
            curves = [curve(run, name) for run in runs[experiment, optimizer]]
            for points in curves:
                axes.plot(
                    [s for s, _ in points], [unit * v for _, v in points], color=COLOURS[optimizer], alpha=0.3, lw=0.8
                )
            means = [statistics.fmean(v for _, v in points) for points in zip(*curves, strict=False)]
            steps = [step for step, _ in min(curves, key=len)]
            axes.plot(steps, [unit * v for v in means], color=COLOURS[optimizer], lw=1.8, label=label)
        if name == "test_loss":
            axes.set_yscale("log")
        axes.set_title(experiment)
        tidy(axes, "step", title)
    axes.legend(frameon=False)
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write results.json, table.md and curves.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quasi_adam"))
    parser.add_argument("--experiments", nargs="+", choices=tuple(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", metavar="DIR", help="where Fashion-MNIST is, if not in the usual places")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    options = parser.parse_args(argv)
    cells = [(e, o, s) for e in options.experiments for s in range(options.seeds) for o in OPTIMIZERS]
    configs = [config(*cell, options.epochs, options.data_dir) for cell in cells]

    def report(result: Result) -> None:
        had = {name: result["config"][name] for name in ("model", "batch_size", "lr", "optimizer", "seed")}
        last = result["rows"][-1]
        end = f"test loss {last['test_loss']}, accuracy {last['test_accuracy']}"
        print(*had.values(), f"{result['seconds']:.0f} s", end, flush=True)

    results = sweep(configs, options.out / "results.json", workers=options.workers, report=report)
    runs: dict[tuple[str, str], list[Result]] = {}
    for (experiment, optimizer, _), result in zip(cells, results, strict=True):
        runs.setdefault((experiment, optimizer), []).append(result)
    save(figure(runs, options.experiments), options.out / "curves.png")
    text = table(runs, options.experiments)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
