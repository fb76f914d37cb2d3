"""RMSprop tunes its own learning rate, and its exponent ρ, on a badly conditioned regression (the paper, §5.1).

    python examples/ill_conditioned_regression.py --out runs/ill_conditioned_regression

The loss of RMSprop-APO at every horizon, beside that of the best fixed learning rate of a grid *at that horizon*.
A large fixed learning rate leaves the loss oscillating over orders of magnitude, so that the best of a grid at one
step is in part luck: a second table compares the medians over the last tenth of the steps.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from functional_apo import best, number, save, side_by_side, summary

import apo

GRID = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizons", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="steps to report at")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10], help="steps between meta-steps")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3], help="initial LRs")
    parser.add_argument("--rho-rates", type=float, nargs="*", default=[0.01], help="meta learning rates of log ρ")
    parser.add_argument("--fixed-lrs", type=float, nargs="+", default=GRID)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of A, the inputs and the initial weights")
    parser.add_argument("--out", type=Path, default=Path("runs/ill_conditioned_regression"))
    args = parser.parse_args(argv)

    runs: list[dict[str, Any]] = []
    methods: list[tuple[str, dict[str, float], int]] = [("fixed lr", {}, 0)]
    for every in args.every:
        methods.append((f"lr, every={every}", {"lr": 0.1}, every))
        for rate in args.rho_rates:
            methods.append((f"lr and rho ({rate:g}), every={every}", {"lr": 0.1, "rho": rate}, every))
    print(f"seed  {'method':27}{'first lr':>9}{''.join(f'{h:10}' for h in args.horizons)}{'s':>8}")
    for seed in args.seeds:
        problem = apo.problems.IllConditionedRegression(seed=seed)
        for method, tune, every in methods:
            began = time.perf_counter()
            lrs = args.lrs if tune else args.fixed_lrs
            starts = [problem.init() for _ in lrs]
            results = side_by_side(apo.rmsprop(), problem.loss, starts, lrs, max(args.horizons), tune, every)
            seconds = time.perf_counter() - began
            for lr, run in zip(lrs, results, strict=True):
                kept = summary(run, args.horizons)
                runs.append({"method": method, "seed": seed, "lr": lr, "tune": tune, "every": every, **kept})
                losses = "".join(f"{number(kept['loss'][str(h)]):10.1e}" for h in args.horizons)
                print(f"{seed:4}  {method:27}{lr:9.0e}{losses}{seconds:8.0f}", flush=True)

    first = [r for r in runs if r["seed"] == args.seeds[0]]
    curves = {f"fixed {r['lr']:.0e}": r for r in hands(first, args.horizons, "loss")}
    curves |= {f"{r['method']}, from {r['lr']:.0e}": r for r in first if r["every"]}
    save(args.out, {key: str(value) for key, value in vars(args).items()}, runs, curves)
    for measure, title in (("loss", "final loss"), ("median", "median loss over the last tenth of the steps")):
        print(f"\n{title}\nseed  {'method':27}{'first lr':>9}{''.join(f'{h:20}' for h in args.horizons)}")
        for seed in args.seeds:
            compare([r for r in runs if r["seed"] == seed], args.horizons, measure)
    print(f"\n{args.out}/results.json, {args.out}/curves.png")


def compare(runs: Sequence[dict[str, Any]], horizons: Sequence[int], measure: str) -> None:
    """Print the best fixed learning rate at each horizon, then every tuned run and how many times lower it ends."""
    by_hand = hands(runs, horizons, measure)
    reference = [number(r[measure][str(h)]) for r, h in zip(by_hand, horizons, strict=True)]
    cells = "".join(f"{x:12.1e} ({r['lr']:.0e})" for x, r in zip(reference, by_hand, strict=True))
    print(f"{runs[0]['seed']:4}  {'best fixed lr':36}{cells}")
    for r in (r for r in runs if r["every"]):
        losses = [number(r[measure][str(h)]) for h in horizons]
        cells = "".join(f"{x:12.1e} {f'({b / x:.3g}x)':7}" for x, b in zip(losses, reference, strict=True))
        print(f"{r['seed']:4}  {r['method']:27}{r['lr']:9.0e}{cells}")


def hands(runs: Sequence[dict[str, Any]], horizons: Sequence[int], measure: str) -> list[dict[str, Any]]:
    """The best run with a fixed learning rate at each horizon."""
    return [best([r for r in runs if not r["every"]], h, measure) for h in horizons]


if __name__ == "__main__":
    main()
