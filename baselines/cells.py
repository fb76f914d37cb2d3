"""The cell store: every run is a cell, a small JSON file named by what was run and by the code that ran it.

A cell that is there is not run again, so evidence accumulates: over sittings, machines and experiments. When the code
that a cell depends on changes, its name does too; the old one stays, and may be accepted as it is (`older`).
"""

import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from baselines.config import Config
from baselines.data import text_digest
from baselines.fingerprint import ROOT, fingerprint
from baselines.run import Run, cost_clock, pick_device
from baselines.storage import load_checkpoint, provenance, save_checkpoint, write_text

CELLS: Final = ROOT / "results" / "cells"
FORMAT: Final = 1
FLOOR: Final = 1e-2  # a loss below it counts as it: what is left is noise
CHECKPOINT_SECONDS: Final = 120.0
DIGITS: Final = 5


def identity(config: Config, text: str | None) -> dict[str, Any]:
    """What decides the outcome of a run, the code apart: the values that are not the defaults, the device, a text."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    values.pop("data_dir", None)
    return values | {"device": pick_device(config.device).type} | ({} if text is None else {"text": text})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _round(value: Any) -> Any:
    """Numbers with few digits; None for what JSON cannot hold."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _round(entry) for key, entry in value.items()}
    return [_round(entry) for entry in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Cell:
    """One run that has ended.

    Attributes:
        config: What was run.
        code: The fingerprint of the code that ran it.
        finished: Whether it reached its end with a finite loss.
        steps: Steps taken.
        parameters: Of the model.
        outcome: Losses and accuracies at the end, on the whole training set and the test set in eval mode, the
            hyperparameters, and the seconds spent in training steps (on a CPU: of its time). None where a
            number was not finite.
        curves: By name, and "step": the mean batch loss since the last row, the learning rate, and where it was
            measured the test set's loss and accuracy; None between. What else is tuned follows by its name.
        about: Device, threads, versions and commit; of a text, its digest; the time when it ended, the seconds that it
            took in all, and what it warned of.
    """

    config: Config
    code: str
    finished: bool
    steps: int
    parameters: int
    outcome: dict[str, float | None]
    curves: dict[str, list[float | None]]
    about: dict[str, Any]

    @property
    def loss(self) -> float:
        """The loss on the whole training set at the end; infinite for a run that did not get there."""
        loss = self.outcome["train_loss"]
        return loss if self.finished and loss is not None else math.inf

    @cached_property
    def area(self) -> float:
        """The mean of the logarithm of the batch loss over the run, with losses below `FLOOR` counted as it."""
        pairs = zip(self.curves["step"][:-1], self.curves["step"][1:], self.curves["loss"][1:], strict=True)
        spans = [(b - a, loss) for a, b, loss in pairs if a is not None and b is not None]
        if not self.finished or any(loss is None for _, loss in spans):
            return math.inf
        weighed = sum(span * math.log(max(loss, FLOOR)) for span, loss in spans if loss is not None)
        return weighed / sum(span for span, _ in spans)

    def to_json(self) -> dict[str, Any]:
        """Plain values, of which `from_json` makes the cell."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"format": FORMAT, **own, "config": self.config.to_dict()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Cell":
        """The inverse of `to_json`.

        Raises:
            ValueError: another format.
        """
        if content.get("format") != FORMAT:
            raise ValueError(f"the cell has format {content.get('format')!r}; this version reads format {FORMAT}")
        own = {f.name: content[f.name] for f in fields(cls)}
        return cls(**own | {"config": Config.from_dict(own["config"])})


class Store:
    """The cells of a folder."""

    def __init__(self, folder: Path = CELLS, *, older: bool = False) -> None:
        """Read all cells.

        Args:
            folder: Where they are; made when the first one is stored.
            older: Whether the newest cell of a configuration counts where there is none of the present code.

        Raises:
            ValueError: A file that cannot be read, with what to do.
        """
        self.folder, self.older = folder, older
        self._cells: dict[str, Cell] = {}
        self._by_config: dict[str, list[Cell]] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                cell = Cell.from_json(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} cannot be read ({error!r}); delete it, and it is run again") from error
            self._keep(path.stem, cell)

    def __iter__(self) -> Iterator[Cell]:
        yield from self._cells.values()

    def get(self, config: Config) -> Cell | None:
        """The cell of a configuration, or None."""
        cell = self._cells.get(name(config))
        if cell is None and self.older:
            same = self._by_config.get(_digest(identity(config, text_digest(config.data, config.data_dir))), [])
            return max(same, key=lambda each: each.about["time"], default=None)
        return cell

    def put(self, cell: Cell) -> None:
        """Store a cell: whole or not at all, whatever happens meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_round(cell.to_json()), separators=(",", ":"), allow_nan=False) + "\n"
        own = identity(cell.config, cell.about.get("text")) | {"code": cell.code}
        path = self.folder / f"{_digest(own)}.json"
        write_text(text, path)
        self._keep(path.stem, Cell.from_json(json.loads(text)))

    def _keep(self, key: str, cell: Cell) -> None:
        self._cells[key] = cell
        self._by_config.setdefault(_digest(identity(cell.config, cell.about.get("text"))), []).append(cell)


def name(config: Config, code: str | None = None) -> str:
    """The name of a configuration's cell, on the text that is there, under some code; None: the present one."""
    own = identity(config, text_digest(config.data, config.data_dir))
    return _digest(own | {"code": fingerprint(config) if code is None else code})


class Trained(NamedTuple):
    """What training came to: those fields of a `Cell`."""

    finished: bool
    steps: int
    parameters: int
    outcome: dict[str, float | None]
    curves: dict[str, list[float | None]]


def compute(config: Config, scratch: Path | None = None) -> Cell:
    """Run a configuration on one thread, up to its end or to the first loss that is not finite.

    Args:
        config: What to run.
        scratch: A folder for a checkpoint every two minutes, from which a run that was killed goes on; None: no
            checkpoints. A population has none, and begins anew.
    """
    torch.set_num_threads(1)
    code, text = fingerprint(config), text_digest(config.data, config.data_dir)
    folder = None if scratch is None else scratch / name(config)
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        if config.method == "pbt":
            from baselines.comparators import pbt  # imports Ray, which takes seconds

            trained = pbt.train(config)
        else:
            trained = _train(config, folder)
    cell = Cell(
        config=dataclasses.replace(config, data_dir=None),  # another machine has its data elsewhere
        code=code,
        **trained._asdict(),
        about={
            **provenance(pick_device(config.device)),
            **({} if text is None else {"text": text}),
            "time": int(time.time()),
            "wall": time.monotonic() - started,
            "warnings": sorted({str(warning.message) for warning in warned}),
        },
    )
    if folder is not None and folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return cell


def _train(config: Config, folder: Path | None) -> Trained:
    """Train one model, from its checkpoint if there is one."""
    run = Run(config, clock=cost_clock(config.device))
    if folder is not None and any(folder.glob("checkpoint*")):
        run.load_state_dict(load_checkpoint(folder))
    _advance(run, folder)
    last = run.history[-1]["loss"]
    return Trained(
        finished=run.finished and last is not None and math.isfinite(last),
        steps=run.step,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        outcome=run.outcome(),
        curves={column: [row[column] for row in run.history] for column in run.history[0] if column != "epoch"},
    )


def _advance(run: Run, folder: Path | None) -> None:
    """Train to the end, or to the first loss that is not finite, leaving checkpoints."""
    saved = time.monotonic()
    for row in run.rows():
        if row is not None and not math.isfinite(row["loss"] or 0.0):
            return
        if folder is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
            folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(run, folder)
            saved = time.monotonic()


def missing(configs: Iterable[Config], store: Store) -> list[Config]:
    """The configurations, each once, that the store has no cell of."""
    unique = dict.fromkeys(configs)
    return [config for config in unique if store.get(config) is None]
