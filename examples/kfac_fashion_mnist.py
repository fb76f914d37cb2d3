"""K-FAC on Fashion-MNIST, with fixed learning rates and tuned by apo: the experiment of the APO paper's App. C.

A CNN of two 5x5 convolutions (16 and 32 filters) and a linear layer, batches of 100. K-FAC with two dampings and four
learning rates each; with the learning rate tuned, and with the damping tuned too, at two weights of the function-space
discrepancy; and RMSprop with three learning rates. The best of K-FAC's and of RMSprop's fixed learning rates, by the
training loss at the end, is run with every seed; so are K-FAC's neighbours at the same damping. A run ends at the first
loss that is not finite.

    python examples/kfac_fashion_mnist.py --out docs/results/kfac

Finished runs are in results.json and are not repeated: after an interruption, the same command goes on.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from baselines.config import Config
from baselines.plots import BLUE, GREEN, GREY, INK, VERMILION, save, tidy
from baselines.sweep import Result, sweep

GRIDS: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("kfac", {"damping": 1e-3}, (3e-4, 1e-3, 3e-3, 1e-2)),
    ("kfac", {"damping": 1e-2}, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("rmsprop", {}, (3e-4, 1e-3, 3e-3)),
]
TUNED: list[dict[str, Any]] = [
    {"lr": 1e-3, "damping": 1e-3, "fsd": fsd, "meta": "newton", "tune": tune}
    for fsd, tune in product((0.1, 1.0), (("lr",), ("lr", "damping")))
]
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
HEAD = ("method", "lr", "damping", "λ", "loss, half", "loss, end", "test accuracy, %", "lr, end", "damping, end")
HEAD += ("ms a step", "diverged")


def fixed(seed: int, optimizer: str, **settings: Any) -> dict[str, Any]:
    """The settings of a run with a fixed learning rate."""
    return {"optimizer": optimizer, "method": "fixed", "seed": seed, **settings}


def tuned(seed: int, **settings: Any) -> dict[str, Any]:
    """The settings of a run of K-FAC under apo."""
    return {"optimizer": "kfac", "method": "apo", "seed": seed, **settings}


def final(result: Result, name: str) -> float:
    """A measure at the end of a run; infinite if it has diverged, or has no such measure."""
    value = result["rows"][-1].get(name)
    return float(value) if result["finished"] and value is not None else math.inf


def spread(values: Sequence[float], digits: str) -> str:
    """Mean and standard deviation of what is finite; a dash where nothing is."""
    kept = [value for value in values if math.isfinite(value)]
    deviation = f" ± {np.std(kept, ddof=1):{digits}}" if len(kept) > 1 else ""
    return f"{np.mean(kept):{digits}}{deviation}" if kept else "-"


def name(result: Result) -> str:
    """What a run is, learning rate and seed apart."""
    config = result["config"]
    if config["method"] == "fixed":
        return "K-FAC, fixed" if config["optimizer"] == "kfac" else "RMSprop, fixed"
    return f"K-FAC, {' and '.join(config['tune'])} tuned, {config['meta']}"


def pace(results: Sequence[Result]) -> float:
    """Milliseconds a step: the median over the stretches between two rows, which a busy machine disturbs less."""
    rows = [(a, b) for result in results for a, b in zip(result["rows"], result["rows"][1:], strict=False)]
    return float(np.median([1000 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in rows]))


def table(groups: Sequence[Sequence[Result]]) -> str:
    """A line for each method in Markdown: means over the seeds that have not diverged."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for results in groups:
        config = results[0]["config"]
        evaluated = [[r["train_loss"] for r in result["rows"] if r["train_loss"] is not None] for result in results]
        halves = [losses[len(losses) // 2] for losses, r in zip(evaluated, results, strict=True) if r["finished"]]
        cells = [
            name(results[0]),
            f"{config['lr']:g}",
            "" if config["damping"] is None else f"{config['damping']:g}",
            f"{config['fsd']:g}" if config["method"] == "apo" else "",
            spread(halves, ".3f"),
            spread([final(r, "train_loss") for r in results], ".3f"),
            spread([100 * final(r, "test_accuracy") for r in results], ".2f"),
            spread([final(r, "lr") for r in results], ".1e") if config["method"] == "apo" else "",
            spread([final(r, "damping") for r in results], ".1e") if "damping" in config["tune"] else "",
            f"{pace(results):.0f}",
            f"{sum(not r['finished'] for r in results)} of {len(results)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(groups: Sequence[Sequence[Result]]) -> Figure:
    """Loss of the batches over steps and over seconds, and the traces of learning rate and damping."""
    picture = Figure(figsize=(17, 5), layout="constrained", dpi=120)
    panels = dict(zip(("step", "seconds", "lr", "damping"), picture.subplots(1, 4), strict=True))
    colours, greys = iter(COLOURS), iter((INK, GREY))
    for results in groups:
        config = results[0]["config"]
        by_hand = config["method"] == "fixed"
        style: dict[str, Any] = {
            "color": next(greys if by_hand else colours),
            "lw": 1.2,
            "ls": "--" if by_hand else "-",
        }
        label = f"{name(results[0])}, from lr {config['lr']:g}"
        label += "" if config["damping"] is None else f" and damping {config['damping']:g}"
        label += f", λ {config['fsd']:g}" if config["method"] == "apo" else ""
        for panel, axes in panels.items():
            x, y = (panel, "loss") if panel in ("step", "seconds") else ("step", panel)
            for number, result in enumerate(results):
                points = [(row[x], row[y]) for row in result["rows"] if row.get(y) is not None]
                axes.plot([a for a, _ in points], [b for _, b in points], label=None if number else label, **style)
    for panel, axes in panels.items():
        axes.set_yscale("log")
        over = panel in ("step", "seconds")
        tidy(axes, panel if over else "step", "loss of the batches, mean of 50 (nats)" if over else panel)
    picture.legend(*panels["step"].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write results.json, table.md and curves.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kfac"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", metavar="DIR", help="where Fashion-MNIST is, if not in the usual places")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    options = parser.parse_args(argv)

    def run(cells: Sequence[dict[str, Any]]) -> list[Result]:
        shared = {"data": "fashion-mnist", "data_dir": options.data_dir, "model": "cnn", "batch_size": 100}
        shared |= {"epochs": options.epochs, "eval_every": 300, "log_every": 50}
        configs = [Config(**shared, **cell) for cell in cells]
        path = options.out / "results.json"
        return sweep(configs, path, workers=options.workers, train_examples=10_000, report=report)

    seeds = range(options.seeds)
    groups: list[list[Result]] = []
    chosen: list[list[Result]] = []
    for optimizer in ("kfac", "rmsprop"):
        cells = [{"lr": lr, **settings} for owner, settings, lrs in GRIDS if owner == optimizer for lr in lrs]
        losses = [final(result, "train_loss") for result in run([fixed(0, optimizer, **cell) for cell in cells])]
        best = losses.index(min(losses))
        for place, cell in enumerate(cells):
            beside = abs(place - best) == 1 and optimizer == "kfac" and cell["damping"] == cells[best]["damping"]
            again = seeds if place == best or beside else (0,)
            groups.append(run([fixed(seed, optimizer, **cell) for seed in again]))
        chosen.append(groups[best - len(cells)])
    for settings in TUNED:
        groups.append(run([tuned(seed, **settings) for seed in seeds]))
    chosen += [results for results in groups[-len(TUNED) :] if any(result["finished"] for result in results)]
    save(figure(chosen), options.out / "curves.png")
    text = table(groups)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def report(result: Result) -> None:
    """Print a finished run."""
    config, loss = result["config"], final(result, "train_loss")
    cell = {key: config[key] for key in ("lr", "damping", "fsd", "seed")}
    print(f"{name(result)} {cell}: {result['seconds']:.0f} s, training loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
