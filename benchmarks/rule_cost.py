"""What base optimizers cost: an iteration against plain SGD's, and a step alone against torch's.

The iteration is Table 5 of the Apollo paper: forward, backward and step on one CNN, that of the APO paper (App. C),
with batches of 100. K-FAC measures the curvature more often at the beginning of a training: it is timed as it is 1,000
steps later, in blocks of as many iterations as lie between two measurements.

The step is that of our rules, untuned, under `apo.APO`, and that of torch's optimizers, with given gradients.

    python -m benchmarks.rule_cost --out docs/results/rule_cost
"""

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytorch_optimizer
import torch
from torch import nn

import apo
from baselines.storage import provenance, write_json, write_text
from benchmarks.contestants import Contestant, Step, fed, plain
from benchmarks.tasks import TASKS, Task
from benchmarks.timing import Measured, measure, summary

o = torch.optim
PAPER: Final = {"Adam (torch)": 1.16, "Apollo": 1.42, "AdaHessian (pytorch_optimizer)": 5.76}
"""CIFAR-10, ResNet-110: seconds per iteration relative to SGD, Table 5."""
EVERY: Final = 50
"""Iterations between two measurements of K-FAC."""
SGD: Final = "SGD (torch)"
FOREACH: Final = "Adam (torch, foreach)"


def iteration(model: nn.Module, task: Task, *, make: Callable[..., o.Optimizer], create_graph: bool = False) -> Step:
    """An iteration of an optimizer of torch's kind."""
    return plain(make(model.parameters()), model, task, create_graph=create_graph)


def of_rule(
    model: nn.Module,
    task: Task,
    *,
    make: Callable[[nn.Module], apo.Rule[Any, Any]],
    fsd: float = 0.0,
    tune: Sequence[str] = (),
) -> Step:
    """An iteration of an update rule under `apo.APO`, with what is named tuned."""
    optimizer = apo.APO(
        model,
        make(model),
        task.loss,
        objective=apo.Proximal(fsd=fsd),
        tune=dict.fromkeys(tune, "global"),
        meta=apo.Newton(search=False),
    )
    # K-FAC measures more often at first; start where it no longer does.
    state = optimizer.state_dict()
    numbers = {**json.loads(state["param_groups"][0]["apo/numbers"]), "steps": 1000}
    state["param_groups"] = [{**group, "apo/numbers": json.dumps(numbers)} for group in state["param_groups"]]
    optimizer.load_state_dict(state)
    return fed(optimizer, model, task)


def alone(model: nn.Module, task: Task, *, make: Callable[[nn.Module], Callable[[], Any]]) -> Step:
    """A step on the same gradients again and again."""
    for param in model.parameters():
        param.grad = torch.randn_like(param) / 100
    take = make(model)
    return lambda batch: take()


def _torch(make: Callable[..., o.Optimizer], **options: Any) -> Contestant:
    return Contestant(partial(alone, make=lambda model: make(model.parameters(), lr=1e-4, **options).step))


def _rule(make: Callable[..., apo.Rule[Any, Any]], **options: Any) -> Contestant:
    def build(model: nn.Module) -> Callable[[], Any]:
        return apo.APO(model, make(lr=1e-4, **options), lambda outputs, targets: outputs.sum(), tune={}).step

    return Contestant(partial(alone, make=build))


def _kfac(*tune: str, fsd: float = 0.0, **options: Any) -> Contestant:
    make = partial(of_rule, make=lambda model: apo.kfac(model, lr=1e-5, **options), fsd=fsd, tune=tune)
    return Contestant(make, EVERY)


ITERATIONS: Final[dict[str, Contestant]] = {
    SGD: Contestant(partial(iteration, make=partial(o.SGD, lr=1e-3))),
    "Adam (torch)": Contestant(partial(iteration, make=partial(o.Adam, lr=1e-4))),
    "AdaHessian (pytorch_optimizer)": Contestant(
        partial(iteration, make=partial(pytorch_optimizer.AdaHessian, lr=1e-3), create_graph=True)
    ),
    "ApolloDQN (pytorch_optimizer)": Contestant(
        partial(iteration, make=partial(pytorch_optimizer.ApolloDQN, lr=1e-4, rebound="constant"))
    ),
    "SGD": Contestant(partial(of_rule, make=lambda _: apo.sgd(lr=1e-3))),
    "Adam": Contestant(partial(of_rule, make=lambda _: apo.adam(lr=1e-4))),
    "Apollo": Contestant(partial(of_rule, make=lambda _: apo.apollo(lr=1e-3))),
    "Quasi-Adam": Contestant(partial(of_rule, make=lambda _: apo.quasi_adam(lr=1e-4))),
    "K-FAC": _kfac(),
    "K-FAC, empirical": _kfac(fisher="empirical"),
    "K-FAC, lr tuned": _kfac("lr", fsd=1.0),
    "K-FAC, lr and damping tuned": _kfac("lr", "damping", fsd=1.0),
}
STEPS: Final[dict[str, Contestant]] = {
    FOREACH: _torch(o.Adam, foreach=True),
    "Adam (torch, default)": _torch(o.Adam),
    "Adam (torch, fused)": _torch(o.Adam, fused=True),
    "Adam": _rule(apo.adam),
    "RMSprop (torch, foreach)": _torch(o.RMSprop, foreach=True),
    "RMSprop": _rule(apo.rmsprop),
    "RMSprop, ρ = 0.4": _rule(apo.rmsprop, rho=0.4),
    "SGD with momentum (torch, foreach)": _torch(o.SGD, momentum=0.9, foreach=True),
    "SGD with momentum": _rule(apo.sgd, momentum=0.9),
    "ApolloDQN (pytorch_optimizer)": _torch(pytorch_optimizer.ApolloDQN, rebound="constant"),
    "Apollo": _rule(apo.apollo),
}


HEAD: Final = """# What base optimizers cost

    python -m benchmarks.rule_cost --out docs/results/rule_cost

An iteration is forward, backward and step, on the CNN of the APO paper (App. C), as in Table 5 of the Apollo paper; its
figures for a ResNet-110 on CIFAR-10 are in the last column. K-FAC's is as 1,000 steps into a training, when it measures
the curvature every 50 steps. A step is that alone, on gradients that are given. "(torch)" and "(pytorch_optimizer)" are
those packages' optimizers; the others are our rules under `apo.APO`, with nothing tuned unless it says so. By CPU time,
one thread; all take a block in each round, in an order that turns, and ratios are of the same round."""


def table(found: Mapping[str, Measured], reference: str, published: Mapping[str, float]) -> str:
    """Markdown."""
    lines = [f"| | ms | of {reference} | quartiles | paper |", "|---|---:|---:|---:|---:|"]
    for name, time in found.items():
        numbers = f"{1e3 * time.seconds:.2f} | {time.ratio:.2f} | {time.low:.2f}-{time.high:.2f}"
        lines.append(f"| {name} | {numbers} | {published.get(name, '')} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, write them and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rule_cost"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    options = parser.parse_args()
    # AdaHessian needs a graph of the backward; the cycle that torch warns of is broken by zero_grad.
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    device = torch.device("cpu")
    about, seconds, parts = provenance(device), {}, [HEAD]
    parts[0] += f" Medians and quartiles of {options.rounds} rounds, on {about['device']}, torch {torch.__version__}."
    for name, contestants, reference in (
        ("cnn", ITERATIONS, SGD),
        *((task, STEPS, FOREACH) for task in ("mlp", "transformer", "tensors")),
    ):
        what = "An iteration" if contestants is ITERATIONS else "A step"
        found = measure(TASKS[name], contestants, options.rounds, device, lambda line: print(line, flush=True))
        seconds[f"{what}: {name}"] = found
        parts += [
            f"## {what}: {TASKS[name].about}",
            table(summary(found, reference), reference, PAPER if contestants is ITERATIONS else {}),
        ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(text, options.out / "README.md")
    write_json({**about, "rounds": options.rounds, "seconds": seconds}, options.out / "results.json")


if __name__ == "__main__":
    main()
