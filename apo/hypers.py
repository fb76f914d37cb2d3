"""What may change: which hyperparameters are tuned, how finely, and within which bounds.

A tuned hyperparameter is its value as the user set it, moved by an offset u in the unconstrained coordinate of its
domain. For a learning rate that is a factor, η = η₀ eᵘ. Parameters that share a key share an offset: one key for all
of them ("global"), one a parameter group, one a layer, one a parameter, or any function of the parameter's name.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from apo.checks import choice, flag, settle
from apo.domains import free
from apo.types import Domain

GRANULARITIES = ("global", "group", "layer", "parameter")


class Coordinate(NamedTuple):
    """One tuned number: the hyperparameter's name and the key of the parameters that share it ("" if all do)."""

    hyper: str
    key: str

    @property
    def label(self) -> str:
        """The name in records and in ``hypers()``: "lr", "lr/0", "lr/encoder.weight"."""
        return f"{self.hyper}/{self.key}" if self.key else self.hyper


@dataclass(frozen=True)
class Tune:
    """How one hyperparameter is tuned.

    Attributes:
        by: "global" for one offset in all (values that differ between groups keep their ratios), "group", "layer" (the
            module that holds the parameter), "parameter", or a function from a parameter's name to its key.
        low: No tuned value goes below this, in the hyperparameter's own units.
        high: No tuned value goes above this, likewise.
        max_change: The largest factor by which a meta-step may change it (of the odds, for a hyperparameter in (0, 1)).
            Without it an exponent changes by 1.02 at most, a damping by 1.05, and anything else without limit.
        force: Allow a hyperparameter that a one-step objective cannot judge, such as momentum.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is outside its set.
    """

    by: str | Callable[[str], str] = "global"
    low: float | None = None
    high: float | None = None
    max_change: float | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if not callable(self.by) and not isinstance(self.by, str):
            raise TypeError(f"by={self.by!r} must be one of {GRANULARITIES} or a function from parameter name to key")
        if isinstance(self.by, str):
            choice("by", self.by, GRANULARITIES)
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                settle(self, name)
        if self.max_change is not None:
            settle(self, "max_change", low=1.0, ends="()")
        flag(force=self.force)
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low={self.low!r} is not below high={self.high!r}")

    @property
    def by_parameter(self) -> bool:
        """Whether parameters of one group may differ."""
        return self.by not in ("global", "group")

    def key(self, group: int, name: str) -> str:
        """The key of a parameter, given the index of its group and its name."""
        if callable(self.by):
            return str(self.by(name))
        layer = name.rpartition(".")[0] or "(root)"
        return {"global": "", "group": str(group), "layer": layer, "parameter": name}[self.by]

    def limit(self, offset: float, domain: Domain, starts: Iterable[float], old: float | None) -> float:
        """The offset nearest to the wanted one that the bounds allow.

        Args:
            offset: The offset that is wanted.
            domain: The domain of the hyperparameter.
            starts: Its values at offset 0, of all that share the key.
            old: The offset before, from which ``max_change`` counts; None leaves that bound out.

        Returns:
            The offset.
        """
        change = self.max_change or domain.pace
        if change is not None and old is not None:
            reach = math.log(change)
            offset = min(max(offset, old - reach), old + reach)
        for bound, nearest in ((self.low, max), (self.high, min)):
            if bound is not None:
                offset = nearest([offset, *(free(domain, bound) - free(domain, start) for start in starts)])
        return offset


def parse_tune(tune: object) -> dict[str, Tune]:
    """The ``tune=`` argument as a dict of `Tune`.

    Raises:
        TypeError: If it is not a dict from hyperparameter names to a granularity, a function, or a `Tune`.
    """
    if not isinstance(tune, dict) or not all(isinstance(name, str) for name in tune):
        raise TypeError(f"tune={tune!r} must be a dict from hyperparameter names, such as {{'lr': 'global'}}")
    return {name: how if isinstance(how, Tune) else Tune(how) for name, how in tune.items()}
