"""What the weight of the function-space discrepancy does: learning rates and losses for five λ.

SGD and RMSprop train a small MLP on scikit-learn's digits and on Fashion-MNIST, and SGD with Nesterov momentum one on
digits with a tenth of the labels random, which λ = 0 is known to spoil. It is tuned by `apo.Newton` and by the paper's
meta-optimizer, with λ from 0 to 1 on the squared error and, with `apo.Newton`, 0.1 and 1 on the KL divergence. The best
fixed learning rate of a grid stands beside.

    python examples/choosing_lambda.py --out docs/results/choosing_lambda

Finished runs are in results.json and are not repeated: after an interruption, the same command goes on.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import apo
from baselines.data import Data, load, with_label_noise
from baselines.models import mlp
from baselines.run import Order, evaluate
from baselines.storage import provenance, write_json

LAMBDAS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
TASKS: dict[str, tuple[str, float, tuple[int, ...], int]] = {  # data, label noise, hidden widths, steps
    "digits": ("digits", 0.0, (100, 100), 1000),
    "digits, noisy labels": ("digits", 0.1, (100, 100), 2000),
    "Fashion-MNIST": ("fashion-mnist", 0.0, (200, 200), 1000),
}
BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], float, tuple[float, ...]]] = {  # start, grid
    "SGD": (torch.optim.SGD, 0.1, (0.1, 0.3, 1.0)),
    "RMSprop": (torch.optim.RMSprop, 1e-3, (3e-4, 1e-3, 3e-3)),
    "SGDm": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True), 0.1, (0.03, 0.1, 0.3)),
}
BASES_OF = {"digits": ("SGD", "RMSprop"), "Fashion-MNIST": ("SGD", "RMSprop"), "digits, noisy labels": ("SGDm",)}
JUDGED = [  # meta, discrepancy, λ
    *(("newton", "squared_error", fsd) for fsd in LAMBDAS),
    *(("paper", "squared_error", fsd) for fsd in LAMBDAS),
    *(("newton", "kl", fsd) for fsd in (0.1, 1.0)),
]
BATCH = 100
DEAD = 2.2

Config = dict[str, Any]


def configurations(tasks: Sequence[str], seeds: int) -> Iterator[Config]:
    """Every run: the tuned ones, and the fixed learning rates beside them."""
    for seed, (task, base) in product(range(seeds), [(name, base) for name in tasks for base in BASES_OF[name]]):
        _, start, grid = BASES[base]
        config = {"task": task, "base": base, "seed": seed}
        for meta, discrepancy, fsd in JUDGED:
            yield config | {"meta": meta, "discrepancy": discrepancy, "fsd": fsd, "start": start}
        for lr in grid:
            yield config | {"meta": "fixed", "discrepancy": None, "fsd": None, "start": lr}


@cache
def data_of(name: str, label_noise: float) -> Data:
    """A data set, read once by each process."""
    return with_label_noise(load(name), label_noise)


def train(config: Config, most: int) -> Config:
    """One run: training loss and test accuracy at its end, and the learning rate over its last tenth."""
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    name, label_noise, hidden, steps = TASKS[config["task"]]
    data, steps = data_of(name, label_noise), min(steps, most)
    _, channels, height, width = data.train_inputs.shape
    model = mlp((channels, height, width), data.classes, hidden)
    opt = BASES[config["base"]][0](model.parameters(), lr=config["start"])
    if config["meta"] != "fixed":
        # Exactly, on the whole of the other batch, also where losses on a half of it are the default.
        objective = apo.Proximal(
            fsd=config["fsd"], discrepancy=config["discrepancy"], other_fraction=1.0, lookahead="step"
        )
        meta = apo.Newton(curvature="gradients", relaxation=1.0) if config["meta"] == "newton" else config["meta"]
        opt = apo.APO(model, opt, F.cross_entropy, objective=objective, meta=meta)
    order, rates = Order(len(data.train_inputs), BATCH, config["seed"]), []
    for _ in range(steps):
        rows = order.draw()
        batch = data.train_inputs[rows], data.train_targets[rows]
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch) if isinstance(opt, apo.APO) else opt.step()
        opt.zero_grad()
        rates.append(opt.hypers()["lr"] if isinstance(opt, apo.APO) else config["start"])
    loss, _ = evaluate(model, data.train)
    _, accuracy = evaluate(model, data.test)
    return {**config, "steps": steps, "loss": loss, "accuracy": accuracy, "lr": geometric(rates[-steps // 10 :])}


def geometric(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def entry(runs: Sequence[Config]) -> str:
    """Learning rate and loss over the seeds, and how many of them died."""
    alive = [run for run in runs if run["loss"] is not None and run["loss"] < DEAD]
    dead = f"{len(runs) - len(alive)} of {len(runs)} dead" if len(alive) < len(runs) else ""
    found = f"{geometric([r['lr'] for r in alive]):.1e}, {geometric([r['loss'] for r in alive]):.2g}" if alive else ""
    return "; ".join(filter(None, (found, dead)))


def tables(runs: Sequence[Config]) -> str:
    """A table for each task in Markdown: geometric means over the seeds of the learning rate and the loss."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in runs):
        here, bases = [run for run in runs if run["task"] == task], BASES_OF[task]
        lines += [f"### {task}", "", f"| | λ | {' | '.join(bases)} |", "|---|---|" + "---|" * len(bases)]
        for meta, discrepancy, fsd in JUDGED:
            key = {"meta": meta, "discrepancy": discrepancy, "fsd": fsd}
            cells = [[run for run in here if run.items() >= (key | {"base": base}).items()] for base in bases]
            name = f"{meta}, {discrepancy.replace('_', ' ')}"
            lines.append(f"| {name} | {fsd:g} | {' | '.join(entry(cell) for cell in cells)} |")
        best = []
        for base in bases:
            fixed = [run for run in here if run["meta"] == "fixed" and run["base"] == base]
            cells = [[run for run in fixed if run["start"] == lr] for lr in BASES[base][2]]
            best.append(min((cell for cell in cells if cell), key=lambda cell: geometric([loss(r) for r in cell])))
        lines += [f"| best fixed | | {' | '.join(entry(cell) for cell in best)} |", ""]
    return "\n".join(lines)


def loss(run: Config) -> float:
    """The loss of a run; a large number if it is not finite."""
    return 1e9 if run["loss"] is None else max(float(run["loss"]), 1e-12)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write ``results.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/choosing_lambda"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many steps a run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    missing = [c for c in configurations(options.tasks, options.seeds) if not any(r.items() >= c.items() for r in runs)]
    about = provenance(torch.device("cpu")) | {"threads": 1}
    with ProcessPoolExecutor(options.processes) as pool:
        for run in pool.map(train, missing, [options.steps] * len(missing)):
            runs = [*runs, {name: value if value == value else None for name, value in run.items()}]
            write_json({**about, "runs": runs}, path)
    (options.out / "table.md").write_text(tables(runs), encoding="utf-8")
    print(tables(runs))


if __name__ == "__main__":
    main()
