"""Amortized proximal optimization in fifteen lines of the functional core (the paper, Alg. 1), shared by the examples.

Every few steps, ask how the step about to be taken would have served the loss L, had its hyperparameters φ been a
little different; move them; take the step:

    φ ← φ − meta-step along ∇_φ J(φ),     J(φ) = L(u(θ, g, ξ; φ))          (the paper, Eq. 11, λ = 0)
    θ ← u(θ, g, ξ; φ)

where u is one step of the base optimizer. Positive hyperparameters move in log φ, so they stay positive and a
meta-step means the same at every scale. λ = 0, as the problems of these examples are deterministic (the paper, §5.1).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import apo
from apo.proximal import value_and_grad


class Run(NamedTuple):
    """The loss after t steps, ``losses[t]``, and the hyperparameters of step t + 1, ``hypers[name][t]``."""

    losses: Tensor
    hypers: dict[str, Tensor]


def train(
    rule: apo.Rule[Any, Any],
    loss: Callable[[apo.Params], Tensor],
    params: apo.Params,
    steps: int,
    tune: Mapping[str, float],
    every: int = 10,
) -> Run:
    """Minimise a loss with a rule, moving hyperparameters every so many steps.

    ``tune`` maps their names to meta learning rates. The meta-optimizer is RMSprop, at 0.1 in the paper, §5.
    """
    losses, history = [], []
    hypers, state = rule.hypers, rule.init(params)
    logs = {name: getattr(hypers, name).log().requires_grad_() for name in tune}
    meta = torch.optim.RMSprop([{"params": [logs[name]], "lr": rate} for name, rate in tune.items()]) if tune else None
    for t in range(steps):
        losses.append(loss(params))
        _, grads = value_and_grad(lambda p: loss(p).sum(), params)  # a sum over the runs of `side_by_side`
        if meta and t % every == 0:
            _, slopes = apo.hypergradient(rule, lambda p: loss(p).sum(), params, grads, state, hypers)
            for name, log in logs.items():
                log.grad = getattr(hypers, name) * getattr(slopes, name)  # ∂J/∂log φ = φ ∂J/∂φ
            meta.step()
            hypers = hypers._replace(**{name: log.detach().exp() for name, log in logs.items()})
        params, state = rule.step(params, grads, state, hypers)
        history.append(hypers)
    losses.append(loss(params))
    return Run(torch.stack(losses), {name: torch.stack([getattr(h, name) for h in history]) for name in ("lr", *tune)})


def side_by_side(
    rule: apo.Rule[Any, Any],
    loss: Callable[[apo.Params], Tensor],
    starts: Sequence[apo.Params],
    lrs: Sequence[float],
    *options: Any,
) -> list[Run]:
    """`train` from every start with the learning rate beside it, all in one loop.

    A rule is a pure function, so `torch.func.vmap` gives it a leading dimension of independent runs. It costs about
    three times one run, however many there are.
    """
    if len(lrs) == 1:
        hypers = rule.hypers._replace(lr=torch.tensor(lrs[0], dtype=torch.float64))
        return [train(rule._replace(hypers=hypers), loss, starts[0], *options)]
    hypers = rule.hypers._replace(lr=torch.tensor(lrs, dtype=torch.float64))
    hypers = type(hypers)(*(h.expand(len(lrs)) for h in hypers))
    batched = rule._replace(init=vmap(rule.init), step=vmap(rule.step), hypers=hypers)
    params = {key: torch.stack([start[key] for start in starts]) for key in starts[0]}
    runs = train(batched, vmap(loss), params, *options)
    return [Run(runs.losses[:, i], {name: h[:, i] for name, h in runs.hypers.items()}) for i in range(len(lrs))]


def summary(run: Run, horizons: Sequence[int], points: int = 60) -> dict[str, Any]:
    """What is kept of a run: the loss at each horizon, its median over the tenth before, and a thinned curve.

    The median is there because a fixed learning rate leaves the loss oscillating over orders of magnitude.
    """
    last = len(run.losses) - 1
    steps = sorted({round(last ** (i / (points - 1))) for i in range(points)})
    return {
        "loss": {str(h): _short(run.losses[h]) for h in horizons},
        "median": {str(h): _short(run.losses[h - h // 10 : h + 1].median()) for h in horizons},
        "curve": {
            "step": steps,
            "loss": [_short(run.losses[t]) for t in steps],
            **{name: [_short(values[t - 1]) for t in steps] for name, values in run.hypers.items()},
        },
    }


def best(runs: Sequence[dict[str, Any]], horizon: int, measure: str = "loss") -> dict[str, Any]:
    """The run of the lowest loss (or ``measure="median"``) at a horizon."""
    return min(runs, key=lambda run: number(run[measure][str(horizon)]))


def number(value: float | None) -> float:
    """A number of `summary`, where None stands for one that is not finite."""
    return math.inf if value is None else value


def save(out: Path, config: dict[str, Any], runs: Sequence[dict[str, Any]], curves: dict[str, dict[str, Any]]) -> None:
    """Write ``results.json``, and ``curves.png``: the loss and the learning rate of the labelled runs.

    Only the runs of the figure keep their curves in the file.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn = [id(run) for run in curves.values()]
    kept = ({key: value for key, value in run.items() if key != "curve" or id(run) in drawn} for run in runs)
    lines = ",\n  ".join(json.dumps(run, allow_nan=False) for run in kept)
    (out / "results.json").write_text(f'{{"config": {json.dumps(config)},\n "runs": [\n  {lines}\n ]}}\n')
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column, title in zip(panels, ("loss", "lr"), ("loss", "learning rate"), strict=True):
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
        for label, run in curves.items():
            curve = run["curve"]
            axes.loglog(curve["step"], curve[column], label=label, linestyle="-" if run["every"] else ":")
        axes.set(xlabel="step", title=title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(out / "curves.png", dpi=100)


def _short(value: Tensor) -> float | None:
    """A number for results.json: four digits, null where it is not finite."""
    return float(f"{value.item():.4g}") if value.isfinite() else None
