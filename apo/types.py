"""The vocabulary of the library: parameters by name, hyperparameters, and the update rule.

An *update rule* is one step of a base optimizer as a pure function,

    θ', ξ' = u(θ, g, ξ; φ)

of parameters θ, gradients g, optimizer state ξ and hyperparameters φ. It works out of place, has no side effects, and
is differentiable in φ. Everything else in the library is built on that signature. Source: the paper, Eq. 10.

*The paper*, here and in every other docstring, is *Online Hyperparameter Adaptation via Amortized Proximal
Optimization*, whose equation numbers are given; its published successor is Bae et al., arXiv 2203.00089.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

Params = dict[str, Tensor]
"""Tensors by parameter name, as in ``dict(model.named_parameters())``; gradients and displacements too."""

Judged = Literal["steady", "no-momentum", "step"]
"""Which step a hyperparameter is judged by. "no-momentum" is the one without the base optimizer's momentum, "steady"
that at the length that momentum gives it while the gradient stays, and "step" the step itself. Where momentum adds
gradients up, as SGD's does, "steady" is 1 / (1 − μ) times as long as "no-momentum"."""

S = TypeVar("S", bound=tuple[Any, ...])
H = TypeVar("H", bound=tuple[Any, ...])


class Domain(NamedTuple):
    """Where a hyperparameter lives: an open set, and a smooth bijection from the reals onto it.

    Attributes:
        name: The set in mathematical notation, used in error messages.
        contains: Whether a number lies in the set.
        constrain: The bijection from the reals onto the set, elementwise on tensors.
        unconstrain: Its inverse.
        one_step: Whether a one-step objective can judge the hyperparameter. False for averaging coefficients
            (momentum, betas), whose effect takes many steps to show.
        pace: The largest factor by which a meta-step changes the hyperparameter unless the user says otherwise; None
            for no limit.
    """

    name: str
    contains: Callable[[float], bool]
    constrain: Callable[[Tensor], Tensor]
    unconstrain: Callable[[Tensor], Tensor]
    one_step: bool = True
    pace: float | None = None


class Factors(NamedTuple):
    """The Kronecker factors of the Fisher information of one layer, S ⊗ A; a bias counts as one more input.

    Attributes:
        inputs: A, [d_in, d_in].
        outputs: S, [d_out, d_out].
    """

    inputs: Tensor
    outputs: Tensor


Statistics = dict[str, Factors]
"""Factors by the name of the layer's weight."""


class Layer(NamedTuple):
    """A linear map of the model.

    Attributes:
        modules: The paths of the modules that share its weight.
        bias: The name of its bias, or None.
    """

    modules: tuple[str, ...]
    bias: str | None


class Fisher(NamedTuple):
    """How the Fisher information of a model is measured, for a rule that needs it.

    Attributes:
        kind: "mc" draws targets from the model's own predictive distribution, "exact" sums over all of them,
            "empirical" takes the gradients of the training loss.
        layers: The layers, by the name of the weight.
        likelihood: The predictive distribution, "categorical" or "gaussian".
        sample: ``sample(outputs) -> targets`` of another predictive distribution, or None.
        every: The most steps between two measurements; there are more at the beginning.
    """

    kind: Literal["mc", "exact", "empirical"]
    layers: Mapping[str, Layer]
    likelihood: Literal["categorical", "gaussian"]
    sample: Callable[[Tensor], Any] | None
    every: int


class Rule(NamedTuple, Generic[S, H]):
    """One step of a base optimizer as pure functions, with the hyperparameters as an argument.

    Attributes:
        init: ``init(params) -> state``.
        step: ``step(params, grads, state, hypers) -> (params, state)``. Parameters without an entry in ``grads`` stay
            as they are, and so does their state.
        hypers: The hyperparameters given to the factory: a NamedTuple of 0-d float64 tensors. Wherever a rule takes
            hypers, each field may also be a dict of 0-d tensors keyed as ``params``. `apo.elementwise`'s rules take
            plain numbers, too.
        domains: The domain of every field of ``hypers``.
        without_momentum: ``without_momentum(params, grads, state, hypers) -> params``, the step with its momentum
            left out, given the state before the step; None where ``step`` itself has none.
        observe: ``observe(state, statistics) -> state``, for a rule that uses the curvature of the model: folds newly
            measured factors into the state, and is pure.
        fisher: What ``observe`` is to be given, and how often; None where ``observe`` is.
    """

    init: Callable[[Params], S]
    step: Callable[[Params, Params, S, H], tuple[Params, S]]
    hypers: H
    domains: Mapping[str, Domain]
    without_momentum: Callable[[Params, Params, S, H], Params] | None = None
    observe: Callable[[S, Statistics], S] | None = None
    fisher: Fisher | None = None
