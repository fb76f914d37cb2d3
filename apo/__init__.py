"""Amortized proximal optimization: optimizers that tune themselves while they train."""

from apo import discrepancies, domains, problems
from apo.proximal import Proximal, hypergradient, lookahead, momentum_free
from apo.rules.adam import adam, adamw
from apo.rules.rmsprop import rmsprop
from apo.rules.sgd import sgd
from apo.types import Domain, Params, Rule, elementwise

__version__ = "0.1.0.dev0"

__all__ = [
    "Domain",
    "Params",
    "Proximal",
    "Rule",
    "adam",
    "adamw",
    "discrepancies",
    "domains",
    "elementwise",
    "hypergradient",
    "lookahead",
    "momentum_free",
    "problems",
    "rmsprop",
    "sgd",
]
