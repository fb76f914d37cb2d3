"""What one step can tell of a learning rate: how far along it its own batch's loss is least, and a fresh batch's.

Small networks are trained at fixed learning rates, and every 20 steps the step without its momentum, at the length that
momentum gives it, is measured: with the slope a and the curvature c of a loss along it, that loss is least at -a / c of
the step. Slopes and curvatures are averaged over the last two thirds of the run, where training is under way.

    python examples/what_one_step_tells.py --out runs/one_step
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from baselines.data import load, with_label_noise

Config = dict[str, Any]
TASKS = ("classifier, noisy labels", "autoencoder")
RATES = {
    "SGD": (0.03, 0.1, 0.3, 1.0),
    "SGDm": (0.003, 0.01, 0.03, 0.1),
    "RMSprop": (3e-4, 1e-3, 3e-3, 1e-2),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2),
}
MOMENTUM = 0.9
BATCH, FRESH, EVERY = 50, 400, 20


def rule_of(base: str, lr: float) -> tuple[apo.Rule[Any, Any], float]:
    """The update rule, and the length of its steps while the gradient stays, over those without momentum."""
    if base == "SGDm":
        return apo.sgd(lr=lr, momentum=MOMENTUM, nesterov=True), 1.0 / (1.0 - MOMENTUM)
    rules = {"SGD": apo.sgd, "RMSprop": apo.rmsprop, "AdamW": apo.adamw}
    return rules[base](lr=lr), 1.0


def problem(task: str) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """A network, inputs, targets and the loss of outputs and targets."""
    data = with_label_noise(load("digits"), 0.1)
    inputs = data.train_inputs.flatten(1)
    widths = (64, 100, 100, 10) if task == TASKS[0] else (64, 48, 12, 48, 64)
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return (
        (model, inputs, data.train_targets, F.cross_entropy)
        if task == TASKS[0]
        else (model, inputs, inputs, F.mse_loss)
    )


def train(config: Config, steps: int) -> Config:
    """One run: where along the step the losses are least, and the training loss at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    model, inputs, targets, loss = problem(config["task"])
    rule, gain = rule_of(config["base"], config["lr"])
    params = {name: p.detach() for name, p in model.named_parameters()}
    state, judged = rule.init(params), apo.momentum_free(rule)
    sums = dict.fromkeys(("own slope", "own curvature", "fresh slope", "fresh curvature"), 0.0)

    def gradient(at: apo.Params, rows: Tensor) -> apo.Params:
        def value(p: apo.Params) -> Tensor:
            return loss(torch.func.functional_call(model, p, (inputs[rows],)), targets[rows])

        return torch.func.grad(value)(at)

    def slope(at: apo.Params, rows: Tensor, along: apo.Params) -> float:
        return sum((g * along[name]).sum().item() for name, g in gradient(at, rows).items())

    for step in range(steps):
        rows = torch.randint(len(inputs), (BATCH,))
        grads = gradient(params, rows)
        if step % EVERY == 0 and 3 * step >= steps:
            end, _ = judged.step(params, grads, state, rule.hypers)
            along = {name: gain * (end[name] - p) for name, p in params.items()}
            end = {name: p + along[name] for name, p in params.items()}
            for name, batch in (("own", rows), ("fresh", torch.randint(len(inputs), (FRESH,)))):
                start = slope(params, batch, along)
                sums[f"{name} slope"] += start
                sums[f"{name} curvature"] += slope(end, batch, along) - start
        params, state = rule.step(params, grads, state, rule.hypers)
    with torch.no_grad():
        final = loss(torch.func.functional_call(model, params, (inputs,)), targets).item()
    least = {name: -sums[f"{name} slope"] / sums[f"{name} curvature"] for name in ("own", "fresh")}
    return {**config, "loss": final, **least}


def table(runs: Sequence[Config]) -> str:
    """In Markdown: a row for each task, base and learning rate, the means over seeds."""
    lines = [
        "| task | base | lr | training loss | least, own batch | least, fresh batch |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task, base in product(TASKS, RATES):
        for lr in RATES[base]:
            own = [run for run in runs if (run["task"], run["base"], run["lr"]) == (task, base, lr)]
            mean = {name: sum(run[name] for run in own) / len(own) for name in ("loss", "own", "fresh")}
            lines.append(f"| {task} | {base} | {lr:g} | {mean['loss']:.3g} | {mean['own']:.2f} | {mean['fresh']:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything and write ``results.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/one_step"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        {"task": task, "base": base, "lr": lr, "seed": seed}
        for task, base, seed in product(TASKS, RATES, range(options.seeds))
        for lr in RATES[base]
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        runs = list(pool.map(train, jobs, [options.steps] * len(jobs)))
    (options.out / "results.json").write_text(
        json.dumps({"steps": options.steps, "runs": runs}, indent=1), encoding="utf-8"
    )
    (options.out / "table.md").write_text(table(runs) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
