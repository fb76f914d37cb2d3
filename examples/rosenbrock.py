"""RMSprop tunes its own learning rate on the Rosenbrock function (the paper, §5.1, App. D and E).

    python examples/rosenbrock.py --out runs/rosenbrock

From (1, −1.5) and from the five starts of App. D, with every initial learning rate: RMSprop-APO with a meta-step every
1 and every 10 steps, and fixed learning rates beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from functional_apo import best, number, save, side_by_side, summary

import apo

STARTS = ((1.0, -1.5), (-1.0, 1.5), (-2.0, 2.0), (0.0, 0.0), (0.5, 0.5), (1.0, -1.0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10], help="steps between meta-steps")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5, 1e-6], help="initial LRs")
    parser.add_argument("--fixed-lrs", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3, 1e-4])
    parser.add_argument("--out", type=Path, default=Path("runs/rosenbrock"))
    args = parser.parse_args(argv)

    runs: list[dict[str, Any]] = []
    print(f"{'start':>14}  {'method':14}{'first lr':>10}{'final loss':>12}{'final lr':>12}")
    for every in (0, *args.every):
        method, lrs = (f"APO every={every}", args.lrs) if every else ("fixed", args.fixed_lrs)
        cases = [(start, lr) for start in STARTS for lr in lrs]
        starts = [{k: torch.tensor(x, dtype=torch.float64) for k, x in zip("xy", at, strict=True)} for at, _ in cases]
        options = (args.steps, {"lr": 0.1} if every else {}, every)
        results = side_by_side(apo.rmsprop(), apo.problems.rosenbrock, starts, [lr for _, lr in cases], *options)
        for (start, lr), run in zip(cases, results, strict=True):
            runs.append({"start": start, "lr": lr, "every": every, **summary(run, [args.steps])})
            print(f"{start!s:>14}  {method:14}{lr:10.0e}{run.losses[-1]:12.2e}{run.hypers['lr'][-1]:12.2e}", flush=True)

    from_first = [r for r in runs if r["start"] == STARTS[0]]
    curves = {f"fixed {r['lr']:.0e}": r for r in from_first if not r["every"]}
    curves |= {f"APO every={r['every']} from {r['lr']:.0e}": r for r in from_first if r["every"]}
    save(args.out, {key: str(value) for key, value in vars(args).items()}, runs, curves)
    print(f"\nfinal loss, worst tuned run from each start beside the best fixed learning rate ({args.steps} steps)")
    at = str(args.steps)
    for start in STARTS:
        here = [r for r in runs if r["start"] == start]
        hand = best([r for r in here if not r["every"]], args.steps)
        tuned = (f"every={e}: {max(number(r['loss'][at]) for r in here if r['every'] == e):.1e}" for e in args.every)
        print(f"{start!s:>14}  {'  '.join(tuned)}  fixed: {number(hand['loss'][at]):.1e} (lr {hand['lr']:.0e})")
    print(f"\n{args.out}/results.json, {args.out}/curves.png")


if __name__ == "__main__":
    main()
