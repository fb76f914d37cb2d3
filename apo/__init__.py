"""Amortized proximal optimization: optimizers that tune themselves while they train."""

from apo import discrepancies, domains, problems
from apo.fisher import fisher_factors
from apo.gradient import Gradient
from apo.hypers import Tune
from apo.lifting import elementwise
from apo.newton import Newton
from apo.optimizer import APO
from apo.proximal import Proximal, hypergradient, lookahead, momentum_free
from apo.record import Record
from apo.replaying import Replay, replay
from apo.rules.adam import adam, adamw
from apo.rules.apollo import apollo
from apo.rules.kfac import kfac
from apo.rules.quasi_adam import quasi_adam
from apo.rules.rmsprop import rmsprop
from apo.rules.sgd import sgd
from apo.transforms import chain, clip_by_norm
from apo.types import Domain, Params, Rule

__version__ = "0.1.0.dev0"

__all__ = [
    "APO",
    "Domain",
    "Gradient",
    "Newton",
    "Params",
    "Proximal",
    "Record",
    "Replay",
    "Rule",
    "Tune",
    "adam",
    "adamw",
    "apollo",
    "chain",
    "clip_by_norm",
    "discrepancies",
    "domains",
    "elementwise",
    "fisher_factors",
    "hypergradient",
    "kfac",
    "lookahead",
    "momentum_free",
    "problems",
    "quasi_adam",
    "replay",
    "rmsprop",
    "sgd",
]
