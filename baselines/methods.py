"""What a run can be trained with: one table of methods; `baselines.comparators.contract` says what a method is."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from torch import nn

from baselines.comparators.contract import Method
from baselines.comparators.estimating import DoG, Prodigy, d_adaptation
from baselines.comparators.gdtuo import Gdtuo
from baselines.comparators.gen import GeN
from baselines.comparators.hypergradient import Hypergradient
from baselines.comparators.schedule_free import ScheduleFree
from baselines.comparators.schedules import (
    Plateau,
    Schedule,
    Scheduled,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    steps,
    wsd,
)
from baselines.comparators.tuned import Apo
from baselines.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from baselines.config import Config


class Entry(NamedTuple):
    """A method under one name.

    Attributes:
        make: the method, for a model and a configuration.
        options: fields of `Config` that only this method and those that list them too heed.
        optimizers: the optimizers that it works with.
        ignores: fields of `Config` that the other methods heed.
        lr: the learning rate where none is given.
    """

    make: Callable[[nn.Module, "Config"], Method]
    options: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    ignores: tuple[str, ...] = ()
    lr: float = 1e-3


def _scheduled(schedule: Schedule, *options: str) -> Entry:
    return Entry(partial(Scheduled, schedule=schedule), ("warmup", *options))


_DIFFERENTIATED: Final = tuple(name for name, optimizer in OPTIMIZERS.items() if not optimizer.evaluates_itself)

METHODS: Final[dict[str, Entry]] = {
    "fixed": _scheduled(constant),
    "step": _scheduled(steps, "decay_factor", "decay_at"),
    "exponential": _scheduled(exponential, "decay_factor"),
    "linear": _scheduled(linear),
    "cosine": _scheduled(cosine),
    "wsd": _scheduled(wsd),
    "inverse-sqrt": _scheduled(inverse_sqrt),
    "plateau": Entry(Plateau),
    "hd": Entry(Hypergradient, ("meta_lr",), ("sgd", "sgdm", "adam"), ("rule",)),
    "gdtuo": Entry(Gdtuo, ("meta_lr",), ("sgd", "adam"), ("rule", "weight_decay", "clip")),
    "prodigy": Entry(Prodigy, (), ("adam", "adamw"), ("rule",), lr=1.0),
    "dadapt": Entry(d_adaptation, (), ("sgd", "sgdm", "adam", "adamw"), ("rule",), lr=1.0),
    "dog": Entry(DoG, (), ("sgd",), ("rule",), lr=1.0),
    "schedule-free": Entry(ScheduleFree, ("warmup",), ("sgdm", "adamw"), ("rule",)),
    "gen": Entry(GeN, ("every",), ("sgd", "sgdm", "rmsprop", "adam", "adamw", "radam"), ("rule",)),
    "pbt": Entry(partial(Scheduled, schedule=constant), ("population", "perturb_every")),  # of a member
    "apo": Entry(
        Apo,
        (
            "meta",
            "meta_lr",
            "every",
            "fsd",
            "wsd",
            "curvature",
            "relaxation",
            "lookahead",
            "loss_model",
            "other_fraction",
            "tune",
            "by",
            "relative",
        ),
        _DIFFERENTIATED,
    ),
}
