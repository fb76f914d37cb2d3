"""Should a learning rate be judged with the momentum of its optimizer, or without?

SGD with Nesterov momentum and AdamW train a small MLP on scikit-learn's digits, with clean labels and with a tenth of
them random, for 4,000 steps of 50 examples. Each is tuned by `apo.Newton` and by the paper's meta-optimizer, its steps
judged without momentum (as in the paper) and with it, from three initial learning rates. The best fixed learning rate
of a 1-3-10 grid stands beside.

    python examples/momentum_in_the_judgement.py --out runs/momentum
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import apo
from baselines.data import Data, load, with_label_noise
from baselines.models import mlp

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
STARTS = (1e-6, 1e-3, 1.0)
BATCH = 50

Config = dict[str, Any]
BASES: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGDm": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True),
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr),
}


def configurations(seeds: Sequence[int]) -> list[Config]:
    """Every run: tuned ones, and the fixed learning rates beside them."""
    cells = list(product(BASES, ("clean", "noisy"), seeds))
    tuned = product(cells, ("newton", "paper"), ("no-momentum", "step"), STARTS)
    fixed = product(cells, GRID)
    return [
        *({"base": b, "labels": n, "seed": s, "meta": m, "judged": j, "lr": lr} for (b, n, s), m, j, lr in tuned),
        *({"base": b, "labels": n, "seed": s, "meta": "fixed", "judged": "", "lr": lr} for (b, n, s), lr in fixed),
    ]


def train(config: Config, steps: int) -> Config:
    """One run: the loss on the training set and the accuracy on the test set at its end."""
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    data = with_label_noise(load("digits"), 0.1 if config["labels"] == "noisy" else 0.0)
    model = mlp((1, 8, 8), data.classes)
    opt = BASES[config["base"]](model, config["lr"])
    if config["meta"] != "fixed":
        objective = apo.Proximal(lookahead=config["judged"])
        meta = apo.Newton(relaxation=1.0) if config["meta"] == "newton" else config["meta"]
        opt = apo.APO(model, opt, F.cross_entropy, objective=objective, meta=meta)
    order = torch.Generator().manual_seed(config["seed"])
    taken = 0
    while taken < steps:
        for rows in torch.randperm(len(data.train_inputs), generator=order).split(BATCH)[: steps - taken]:
            batch = data.train_inputs[rows], data.train_targets[rows]
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            opt.step(batch=batch) if isinstance(opt, apo.APO) else opt.step()
            opt.zero_grad()
            taken += 1
    tuned = opt.hypers()["lr"] if isinstance(opt, apo.APO) else config["lr"]
    return {**config, **_measured(model, data), "final_lr": tuned}


def summary(runs: Sequence[Config]) -> list[Config]:
    """One row for each way of choosing the learning rate: geometric mean over seeds of the training loss."""
    rows = []
    for base, labels in product(BASES, ("clean", "noisy")):
        here = [run for run in runs if run["base"] == base and run["labels"] == labels]
        for meta, judged, lr in dict.fromkeys((run["meta"], run["judged"], run["lr"]) for run in here):
            seeds = [r for r in here if (r["meta"], r["judged"], r["lr"]) == (meta, judged, lr)]
            logs = [math.log(max(r["loss"], 1e-2) if math.isfinite(r["loss"]) else 1e9) for r in seeds]
            rows.append(
                {
                    "base": base,
                    "labels": labels,
                    "meta": meta,
                    "judged": judged,
                    "lr": lr,
                    "loss": math.exp(statistics.mean(math.log(max(r["loss"], 1e-12)) for r in seeds)),
                    "judged_loss": math.exp(statistics.mean(logs)),
                    "accuracy": statistics.mean(r["accuracy"] for r in seeds),
                    "final_lr": math.exp(statistics.mean(math.log(max(r["final_lr"], 1e-30)) for r in seeds)),
                    "dead": sum(not r["loss"] < 2.2 for r in seeds),
                    "seeds": len(seeds),
                }
            )
    return rows


def table(rows: Sequence[Config]) -> str:
    """The summary in Markdown; of the fixed learning rates, the best."""
    lines = [
        "| base | labels | learning rate | start | loss | test accuracy | final lr | dead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for base, labels in product(BASES, ("clean", "noisy")):
        here = [row for row in rows if row["base"] == base and row["labels"] == labels]
        best = min((row for row in here if row["meta"] == "fixed"), key=lambda row: row["loss"])
        for row in [best, *(row for row in here if row["meta"] != "fixed")]:
            how = "best fixed" if row["meta"] == "fixed" else f"{row['meta']}, judged: {row['judged']}"
            start = "grid" if row["meta"] == "fixed" else f"{row['lr']:g}"
            lines.append(
                f"| {base} | {labels} | {how} | {start} | {row['loss']:.2e} | {row['accuracy']:.3f} "
                f"| {row['final_lr']:.1e} | {row['dead']} of {row['seeds']} |"
            )
    return "\n".join(lines)


def _measured(model: nn.Module, data: Data) -> Config:
    with torch.no_grad():
        loss = F.cross_entropy(model(data.train_inputs), data.train_targets).item()
        accuracy = (model(data.test_inputs).argmax(1) == data.test_targets).float().mean().item()
    return {"loss": loss, "accuracy": accuracy}


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything and write ``results.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/momentum"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    jobs = configurations(range(options.seeds))
    with ProcessPoolExecutor(options.processes) as pool:
        runs = list(pool.map(train, jobs, [options.steps] * len(jobs)))
    rows = summary(runs)
    report = {"steps": options.steps, "seconds": round(time.time() - begun), "summary": rows, "runs": runs}
    (options.out / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (options.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
