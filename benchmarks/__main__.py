"""`python -m benchmarks`: measure, and write the report."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from baselines.run import pick_device
from baselines.storage import provenance
from benchmarks.contestants import BARE, CONTESTANTS, Contestant
from benchmarks.memory import Peak
from benchmarks.report import Outcome, write
from benchmarks.tasks import GROWTH, LARGE, TASKS, Task
from benchmarks.timing import BLOCK, measure, summary

CYCLES: Final = 2  # of meta-steps, over which the peak is taken


def peak(task: Task, contestant: Contestant, device: torch.device) -> int:
    """The most bytes at once, from before the model is made until its second meta-step is done."""
    batches = task.batches(1, 0, device)
    with Peak(device) as found:
        step = contestant.make(task.build().to(device), task)
        for _ in range(1 + (CYCLES - 1) * contestant.every):
            step(batches[0])
    return found.bytes


def run(task: Task, names: Sequence[str], rounds: int, block: int, device: torch.device) -> Outcome:
    """Time and memory of the contestants of these names on a task."""
    chosen = {name: CONTESTANTS[name] for name in names}
    seconds = measure(task, chosen, rounds, device, lambda line: print(f"{task.about}: {line}", flush=True), block)
    peaks = {name: peak(task, contestant, device) for name, contestant in chosen.items()}
    weights = sum(param.nbytes for param in task.build().parameters())
    return Outcome(task.about, weights, summary(seconds), peaks, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the tables, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    everything = {**TASKS, **LARGE, **GROWTH}
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(everything)} (default: by device)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contestants whose name has one in it, and bare Adam")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument("--block", type=int, default=BLOCK, metavar="N", help=f"steps in a round (default: {BLOCK})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    options = parser.parse_args(argv)
    if unknown := set(options.tasks) - set(everything):
        parser.error(f"there is no task {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    for option in ("rounds", "block"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} {getattr(options, option)}: at least 1")
    device = pick_device(options.device)
    default = {**TASKS, **LARGE} if device.type == "cuda" else TASKS
    for text in options.only or ():
        if not any(text in name for name in CONTESTANTS):
            parser.error(f"no contestant has {text!r} in its name; there are {', '.join(CONTESTANTS)}")
    wanted = options.only or [""]
    names = [name for name in CONTESTANTS if name == BARE or any(text in name for text in wanted)]
    # What packages say of themselves at every step would be part of the time.
    warnings.filterwarnings("ignore")
    about, outcomes = provenance(device), {}
    command = " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)])
    for name in options.tasks or default:
        outcomes[name] = run(everything[name], names, options.rounds, options.block, device)
        print(f"\n{name}: {outcomes[name].about}\n{outcomes[name].table()}\n", flush=True)
        write(options.out, outcomes, about, command, options.rounds)  # what is stopped has the tasks that are done
    print(options.out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
