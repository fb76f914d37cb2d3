"""Seconds a step, side by side: what disturbs the machine falls on all alike, and only ratios are reported."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import torch

from benchmarks.contestants import BARE, Contestant
from benchmarks.tasks import Task

BLOCK: Final = 20  # steps of a contestant in a round, if nothing else is said
UNTIMED: Final = 3  # steps before a block, in which memory is first touched


class Measured(NamedTuple):
    """One contestant's time.

    Attributes:
        seconds: A step's, the median over rounds.
        low: The ratio to the reference in the same round: the lower quartile,
        ratio: the median,
        high: and the upper quartile.
    """

    seconds: float
    low: float
    ratio: float
    high: float


class Clock:
    """Seconds between `start` and `stop`: of this process's CPU time, or of a GPU's by events."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        """Begin, when all that was asked of a GPU before is done."""
        if self.cuda:
            torch.cuda.synchronize()
            self.begun = torch.cuda.Event(enable_timing=True)
            self.begun.record()
        self.at = time.process_time()

    def stop(self) -> float:
        """The seconds since then."""
        if not self.cuda:
            return time.process_time() - self.at
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        torch.cuda.synchronize()
        return float(self.begun.elapsed_time(ended)) / 1e3


def measure(
    task: Task,
    contestants: Mapping[str, Contestant],
    rounds: int,
    device: torch.device,
    report: Callable[[str], None] = lambda line: None,
    block: int = BLOCK,
) -> dict[str, list[float]]:
    """Seconds a step of every contestant in every round.

    Models, states and what is timed are made anew in each round: the averages of aged states turn denormal, and slow.

    Args:
        task: What is trained.
        contestants: By name; the reference is among them.
        rounds: How many.
        device: Where. On a CPU everything is on one thread.
        report: Called with a line a round.
        block: Steps of a contestant in a round; rounded up to a multiple of its meta-step's interval.
    """
    torch.set_num_threads(1)
    clock, names = Clock(device), list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        batches = task.batches(min(block, BLOCK), number, device)
        for name in names[turn:] + names[:turn]:
            # In whole intervals: after the untimed ones it is at the same place of one as a run that begins.
            untimed, timed = (_whole(steps, contestants[name].every) for steps in (UNTIMED, block))
            torch.manual_seed(0)
            step = contestants[name].make(task.build().to(device), task)
            for place in range(untimed):
                step(batches[place % len(batches)])
            clock.start()
            for place in range(timed):
                step(batches[place % len(batches)])
            seconds[name].append(clock.stop() / timed)
        report(f"round {number + 1} of {rounds}")
    return seconds


def _whole(steps: int, every: int) -> int:
    """The least multiple of an interval that is at least so many steps."""
    return -(-steps // every) * every


def summary(seconds: Mapping[str, list[float]], reference: str = BARE) -> dict[str, Measured]:
    """Medians, and the quartiles of the ratio to the reference."""
    found = {}
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        found[name] = Measured(statistics.median(times), low, middle, high)
    return found
