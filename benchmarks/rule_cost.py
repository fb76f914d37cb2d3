"""What an iteration costs with each base optimizer, against plain SGD: Table 5 of the Apollo paper, on one CNN.

Every optimizer trains its own copy of the CNN of the APO paper (App. C) on Fashion-MNIST, batch 100, one CPU thread. In
each round all of them take a block of iterations (forward, backward, step), in an order that turns from round to round,
so that other work on the machine falls on all alike; a round gives one ratio to SGD's time in the same round. Medians
and quartiles over rounds are reported. Models and state are made anew in each round: aged averages turn denormal, and
slow. K-FAC measures the curvature more often at the beginning of a training: it is timed as it is 1,000 steps later.

    python benchmarks/rule_cost.py --out docs/results/rule_cost
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from baselines.data import load
from baselines.models import cnn
from benchmarks import timing

Batch = tuple[Tensor, Tensor]
Iteration = Callable[[Batch], None]
PAPER = {"Adam": 1.16, "Apollo": 1.42, "AdaHessian": 5.76}
"""CIFAR-10, ResNet-110: seconds per iteration relative to SGD, Table 5."""
UNTIMED = 40


def iteration(model: nn.Module, optimizer: torch.optim.Optimizer, create_graph: bool = False) -> Iteration:
    """One iteration of a torch optimizer."""

    def run(batch: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward(create_graph=create_graph)
        optimizer.step()

    return run


def of_rule(
    make: Callable[[nn.Module], apo.Rule[Any, Any]], fsd: float = 0.0, *tune: str
) -> Callable[[nn.Module], Iteration]:
    """One iteration of an update rule under `apo.APO`, with what is named tuned."""

    def build(model: nn.Module) -> Iteration:
        optimizer = apo.APO(
            model,
            make(model),
            F.cross_entropy,
            objective=apo.Proximal(fsd=fsd),
            tune=dict.fromkeys(tune, "global"),
            meta=apo.Newton(search=False),
        )
        # K-FAC measures more often at first; start where it no longer does.
        state = optimizer.state_dict()
        numbers = {**json.loads(state["param_groups"][0]["apo/numbers"]), "steps": 1000}
        state["param_groups"] = [{**group, "apo/numbers": json.dumps(numbers)} for group in state["param_groups"]]
        optimizer.load_state_dict(state)

        def run(batch: Batch) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step(batch=batch)

        return run

    return build


ITERATIONS: dict[str, Callable[[nn.Module], Iteration]] = {
    "SGD (torch)": lambda model: iteration(model, torch.optim.SGD(model.parameters(), lr=1e-3)),
    "Adam (torch)": lambda model: iteration(model, torch.optim.Adam(model.parameters(), lr=1e-4)),
    "AdaHessian (pytorch_optimizer)": lambda model: iteration(
        model, pytorch_optimizer.AdaHessian(model.parameters(), lr=1e-3), create_graph=True
    ),
    "ApolloDQN (pytorch_optimizer)": lambda model: iteration(
        model, pytorch_optimizer.ApolloDQN(model.parameters(), lr=1e-4, rebound="constant")
    ),
    "SGD": of_rule(lambda _: apo.sgd(lr=1e-3)),
    "Adam": of_rule(lambda _: apo.adam(lr=1e-4)),
    "Apollo": of_rule(lambda _: apo.apollo(lr=1e-3)),
    "Quasi-Adam": of_rule(lambda _: apo.quasi_adam(lr=1e-4)),
    "K-FAC": of_rule(lambda model: apo.kfac(model, lr=1e-5)),
    "K-FAC, empirical": of_rule(lambda model: apo.kfac(model, lr=1e-5, fisher="empirical")),
    "K-FAC, lr tuned": of_rule(lambda model: apo.kfac(model, lr=1e-5), 1.0, "lr"),
    "K-FAC, lr and damping tuned": of_rule(lambda model: apo.kfac(model, lr=1e-5), 1.0, "lr", "damping"),
}


def measure(rounds: int, block: int, batch_size: int, data: str) -> dict[str, list[float]]:
    """Seconds per iteration of every optimizer in every round.

    Args:
        rounds: Rounds.
        block: Iterations of each optimizer in a round; in a multiple of 50, each has as many measurements of K-FAC.
        batch_size: Examples in a batch.
        data: The data set.

    Returns:
        By name, one number a round.
    """
    torch.set_num_threads(1)
    task = load(data)
    shape = tuple(task.train_inputs.shape[1:])
    order = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in ITERATIONS}
    names = list(ITERATIONS)
    for number in range(rounds):
        rows = torch.randint(len(task.train_inputs), (UNTIMED + block, batch_size), generator=order)
        batches = [(task.train_inputs[r], task.train_targets[r]) for r in rows]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            torch.manual_seed(0)
            run = ITERATIONS[name](cnn(shape, task.classes))
            for batch in batches[:UNTIMED]:
                run(batch)
            start = time.perf_counter()
            for batch in batches[UNTIMED:]:
                run(batch)
            seconds[name].append((time.perf_counter() - start) / block)
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds


def summary(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median seconds, and the quartiles of the ratio to SGD of torch in the same round."""
    return [
        {"name": name, "ms": 1e3 * found.seconds, "low": found.low, "median": found.ratio, "high": found.high}
        for name, found in timing.summary(seconds, "SGD (torch)").items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| optimizer | ms | relative to SGD | quartiles | paper |", "|---|---:|---:|---|---:|"]
    for row in rows:
        paper = PAPER.get(row["name"].split(" ")[0], "")
        lines.append(
            f"| {row['name']} | {row['ms']:.1f} | {row['median']:.2f} | {row['low']:.2f}-{row['high']:.2f} | {paper} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, store the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rule_cost"))
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    options = parser.parse_args()
    # AdaHessian needs a graph of the backward; the cycle that torch warns of is broken by zero_grad.
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    seconds = measure(options.rounds, options.block, options.batch_size, options.data)
    rows = summary(seconds)
    print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    content = {"machine": machine, "options": {k: str(v) for k, v in vars(options).items() if k != "out"}}
    (options.out / "results.json").write_text(
        json.dumps({**content, "rows": rows, "seconds": seconds}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
