"""Many runs in one file: each is stored as it finishes, so an interrupted sweep goes on where it stopped."""

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from baselines.config import Config
from baselines.run import Run
from baselines.storage import provenance, write_json

Result = dict[str, Any]  # of a run: config, commit, parameters, rows (history.csv's, and train_loss), seconds, finished


def train(config: Config, train_examples: int) -> Result:
    """One run on one thread, up to its end or to the first loss that is not finite.

    Args:
        config: what to run.
        train_examples: how many of the first training examples the training loss is measured on at each evaluation;
            0 leaves it out.

    Returns:
        The result, of which `finished` says whether the end was reached.
    """
    torch.set_num_threads(1)
    run = Run(config)
    inputs, targets = (tensor[:train_examples] for tensor in run.data.train)

    train_losses: dict[float | None, float] = {}  # by step

    def measure() -> None:
        if train_examples:
            train_losses[run.step], _ = run.evaluate((inputs, targets))

    measure()
    for row in run.rows():
        if row is not None and row["test_loss"] is not None:
            measure()
        if row is not None and not math.isfinite(row["loss"] or 0.0):
            break
    return {
        "config": config.to_dict(),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "finished": run.finished and math.isfinite(run.history[-1]["loss"] or 0.0),
        "seconds": run.seconds,
        "rows": [row | {"train_loss": train_losses.get(row["step"])} for row in run.history],
    }


def _train_all(configs: Sequence[Config], train_examples: int, workers: int) -> Iterator[Result]:
    """The results, as they are there."""
    if workers == 1:
        yield from (train(config, train_examples) for config in configs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, config, train_examples) for config in configs]):
            yield future.result()


def sweep(
    configs: Sequence[Config],
    path: Path,
    *,
    workers: int = 1,
    train_examples: int = 0,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run every configuration whose result `path` does not hold yet, and store each one there as it finishes.

    Args:
        configs: what to run.
        path: a JSON file with the results under "runs", and where and with what the last one was computed.
        workers: processes, of one thread each; 1: this one.
        train_examples: as for `train`.
        report: called with each new result.

    Returns:
        The results, in the order of `configs`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text())["runs"] if path.exists() else []
    done: dict[Config, Result] = {Config.from_dict(result["config"]): result for result in stored}
    about = provenance(torch.device("cpu")) | {"threads": 1}
    missing = [config for config in configs if config not in done]
    for result in _train_all(missing, train_examples, workers):
        done[Config.from_dict(result["config"])] = result | {"commit": about["commit"]}
        write_json({"train_examples": train_examples, **about, "runs": list(done.values())}, path)
        report(done[Config.from_dict(result["config"])])
    return [done[config] for config in configs]
