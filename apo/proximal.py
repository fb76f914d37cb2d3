"""The proximal objective, and its gradient with respect to hyperparameters.

    Q(φ) = L_B(θ') + λ_FSD · mean_{x̃∈B'} D(f(x̃,θ'), f(x̃,θ)) + λ_WSD · ½‖θ' − θ‖²,     θ' = u(θ, g, ξ; φ)

The step θ' should lower the loss on its own batch B without changing the function on another batch B' (function-space
discrepancy, FSD) or the weights (weight-space discrepancy, WSD) more than it must. The gradient g does not depend on
φ, so no derivative of a gradient is ever needed; two stages are exact:

    θ', ξ', pullback = lookahead(rule, θ, g, ξ, φ)     a tape through the arithmetic of the update alone
    Q, G             = value and gradient of Q at θ'   an ordinary forward and backward
    ∇_φ Q            = pullback(G)

Source: the paper, Eq. 2, 4 and 11; WSD from Bae et al., arXiv 2203.00089.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, cast

import torch
from torch import Tensor

from apo.checks import check_step, choice, function, instance, real, settle
from apo.discrepancies import BY_NAME, NEEDS_LOSS, Discrepancy, Loss, check_vanishes, mean_of
from apo.trees import as_scalar, detached, half_square, inner, leaves, rebuild
from apo.types import H, Judged, Params, Rule, S

Objective = Callable[[Params], Tensor]
Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class Proximal:
    """What is judged: the proximal objective Q of the module docstring.

    Attributes:
        fsd: λ_FSD ≥ 0, or a function of the number of steps taken. Units: loss per unit of discrepancy.
        wsd: λ_WSD ≥ 0, or a function of the number of steps taken. Units: loss per squared parameter unit.
        discrepancy: "squared_error", "kl", "bregman", "gauss_newton", or a function ``D(new, old)`` that returns [] or
            [B], zero with zero gradient at equality.
        loss_model: "exact" for the loss at θ', or "linear" for its first-order Taylor polynomial at θ (paper, Eq. 4).
        lookahead: Which step is judged where there is momentum. "no-momentum" is the step without it, as in the paper;
            "steady" that at the length that momentum gives it while the gradient stays: 1 / (1 − μ) times as long for
            SGD, the same for the Adam family; "step" the step itself.
        other_fraction: The leading part of B' that D is measured on, in (0, 1]; None: ½ where losses judge, else 1.

    Raises:
        TypeError: If a number is expected and something else is given.
        ValueError: If a value is outside its set, or the linear model has no minimum.
    """

    fsd: Schedule = 0.0
    wsd: Schedule = 0.0
    discrepancy: str | Discrepancy = "squared_error"
    loss_model: Literal["exact", "linear"] = "exact"
    lookahead: Judged = "steady"
    other_fraction: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("fsd", "wsd"):
            if not callable(getattr(self, name)):
                settle(self, name)
        choice("loss_model", self.loss_model, ("exact", "linear"))
        choice("lookahead", self.lookahead, ("steady", "no-momentum", "step"))
        if not callable(self.discrepancy):
            choice("discrepancy", self.discrepancy, tuple(BY_NAME))
        if self.other_fraction is not None:
            settle(self, "other_fraction", high=1.0, ends="(]")
        if self.loss_model == "linear" and self.fsd == 0.0 and self.wsd == 0.0:
            raise ValueError("loss_model='linear' with fsd=0 and wsd=0 has no minimum: make fsd or wsd positive")

    def at(
        self,
        params: Params,
        loss: Objective,
        outputs: Callable[[Params], Tensor] | None = None,
        *,
        grads: Params | None = None,
        output_loss: Loss | None = None,
        targets: Any = None,
        steps: int = 0,
    ) -> Objective:
        """Q as a function of θ', for a step taken from θ = ``params``.

        Args:
            params: Parameters θ.
            loss: L_B as a function of parameters.
            outputs: f(B', ·) as a function of parameters; needed where fsd is positive.
            grads: The gradient of ``loss`` at θ; needed where ``loss_model`` is "linear".
            output_loss: The loss as a function of outputs and targets, for "bregman" and "gauss_newton".
            targets: The targets of B', likewise.
            steps: The number of steps taken, for schedules of λ.

        Returns:
            A function from θ' to Q, [].

        Raises:
            ValueError: If an argument that the terms need is missing, or the discrepancy is not zero at equality.
        """
        fsd, wsd = self.weights(steps)
        theta = {key: p.detach() for key, p in params.items()}
        loss_model = self._linearised(loss, theta, grads) if self.loss_model == "linear" else loss
        function_space = self._function_space(outputs, theta, output_loss, targets) if fsd else None

        def objective(new: Params) -> Tensor:
            q = loss_model(new)
            if function_space:
                q = q + fsd * function_space(new)
            if wsd:
                q = q + wsd * half_square({key: new[key] - theta[key] for key in new})
            return q

        return objective

    def weights(self, steps: int) -> tuple[float, float]:
        """λ_FSD and λ_WSD after a number of steps.

        Raises:
            TypeError: If a schedule returns something that is no number.
            ValueError: If it returns a negative or non-finite one.
        """
        fsd = self.fsd(steps) if callable(self.fsd) else self.fsd
        wsd = self.wsd(steps) if callable(self.wsd) else self.wsd
        return real("fsd", fsd), real("wsd", wsd)

    @property
    def needs_targets(self) -> bool:
        """Whether the discrepancy involves the loss, and so the targets of B'."""
        return self.discrepancy in NEEDS_LOSS

    def check_loss(self, loss: Loss | None) -> None:
        """Raise if the discrepancy involves the loss, and there is none.

        Raises:
            ValueError: If so.
        """
        if self.needs_targets and loss is None:
            raise ValueError(f"discrepancy={self.discrepancy!r} needs loss=, a function of outputs and targets")

    def distance(self, new: Tensor, old: Tensor, loss: Loss | None = None, targets: Any = None) -> Tensor:
        """The mean discrepancy between outputs, [].

        Args:
            new: Outputs at θ', [B, ...].
            old: Outputs at θ, shaped as ``new``.
            loss: The loss of outputs and targets, for "bregman" and "gauss_newton".
            targets: The targets of B', likewise.

        Returns:
            The mean over examples, [].

        Raises:
            ValueError: If the discrepancy needs a loss and there is none.
        """
        measure = BY_NAME[self.discrepancy] if isinstance(self.discrepancy, str) else self.discrepancy
        if not self.needs_targets:
            return mean_of(measure, new, old)
        self.check_loss(loss)
        return measure(new, old, loss, targets)

    def _linearised(self, loss: Objective, theta: Params, grads: Params | None) -> Objective:
        """The first-order Taylor polynomial of the loss at θ."""
        if grads is None:
            raise ValueError("loss_model='linear' needs grads=, the gradient of the loss at params")
        slopes = {key: g.detach() for key, g in grads.items()}
        with torch.no_grad():
            origin = loss(theta)
        return lambda new: origin + sum(inner(slope, new[key] - theta[key]) for key, slope in slopes.items())

    def _function_space(
        self, outputs: Callable[[Params], Tensor] | None, theta: Params, output_loss: Loss | None, targets: Any
    ) -> Objective:
        """The mean discrepancy from the outputs at θ."""
        if outputs is None:
            raise ValueError("fsd > 0 needs outputs=, the model's outputs on another batch as a function of params")
        with torch.no_grad():
            old = outputs(theta)
        if callable(self.discrepancy):
            check_vanishes(self.discrepancy, old)
        return lambda new: self.distance(outputs(new), old, output_loss, targets)


def hypergradient(
    rule: Rule[S, H], objective: Objective, params: Params, grads: Params, state: S, hypers: H
) -> tuple[Tensor, H]:
    """The gradient of an objective after one step of a rule, with respect to the rule's hyperparameters.

    Args:
        rule: The update rule.
        objective: ``objective(new_params) -> []``, for instance ``Proximal(...).at(...)``.
        params: Parameters θ before the step.
        grads: Gradients g at θ, keyed as ``params``.
        state: The rule's state ξ before the step.
        hypers: Hyperparameters φ.

    Returns:
        The objective at θ', [], and its gradient: the type of ``hypers``, in natural units (per unit of each
        hyperparameter).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a gradient is of no parameter, or of another shape, or the objective is not a scalar that depends
            on the parameters.
    """
    function(optional=False, objective=objective)
    new_params, _, pullback = lookahead(rule, params, grads, state, hypers)
    value, cotangents = value_and_grad(objective, new_params)
    return value, pullback(cotangents)


class Lookahead(NamedTuple, Generic[S, H]):
    """A step taken on paper: the new parameters and state, and the way back to the hyperparameters.

    ``pullback(G)`` maps a gradient with respect to the new parameters to one with respect to the hyperparameters.
    """

    params: Params
    state: S
    pullback: Callable[[Params], H]


def lookahead(
    rule: Rule[S, H], params: Params, grads: Params, state: S, hypers: H, wrt: Collection[str] | None = None
) -> Lookahead[S, H]:
    """Take one step of a rule and keep the tape from the hyperparameters to the new parameters.

    Args:
        rule: The update rule.
        params: Parameters θ.
        grads: Gradients g, keyed as ``params``; parameters without one stay.
        state: The rule's state ξ.
        hypers: Hyperparameters φ, each a 0-d tensor, a plain number, or a dict of them keyed as ``params``.
        wrt: The names of those that the tape is kept from; None for all. For the others the pullback gives 0.

    Returns:
        θ', ξ' (both detached), and the pullback, which may be called any number of times.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a gradient is of no parameter, or of another shape, or the rule works in place.
    """
    check_step(rule, params, grads, state, hypers)
    untouched = [*params.values(), *grads.values(), *leaves(state)]
    versions = [tensor._version for tensor in untouched]
    named = cast(Any, hypers)._asdict().items()
    marked: list[tuple[Any, bool]] = [(h, wrt is None or name in wrt) for name, field in named for h in leaves([field])]
    taken = [as_scalar(h).detach().clone().requires_grad_(on) if on or isinstance(h, Tensor) else h for h, on in marked]
    sources = [h for h in taken if isinstance(h, Tensor) and h.requires_grad]
    fixed, slopes = ({key: tensor.detach() for key, tensor in given.items()} for given in (params, grads))
    with torch.enable_grad():
        new_params, new_state = rule.step(fixed, slopes, detached(state), rebuild(hypers, taken))
    if versions != [tensor._version for tensor in untouched]:
        raise ValueError("the rule changed params, grads or state in place: write p = p - d, not p -= d or p.sub_(d)")

    def pullback(cotangents: Params) -> H:
        outputs = {key: p for key, p in new_params.items() if p.requires_grad and key in cotangents}
        if not outputs or not sources:
            return rebuild(hypers, [torch.zeros_like(as_scalar(h)) for h in taken])
        seeds = [cotangents[key].to(p.dtype) for key, p in outputs.items()]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = iter(torch.autograd.grad(list(outputs.values()), sources, seeds, **options))
        pairs = zip(taken, marked, strict=True)
        return rebuild(hypers, [next(found) if on else torch.zeros_like(as_scalar(h)) for h, (_, on) in pairs])

    return Lookahead({key: p.detach() for key, p in new_params.items()}, detached(new_state), pullback)


def value_and_grad(objective: Objective, params: Params) -> tuple[Tensor, Params]:
    """The value of an objective, [], and its gradient, by one ordinary forward and backward.

    Args:
        objective: A function of parameters.
        params: Where to evaluate it.

    Returns:
        The value, detached, and the gradient, keyed as ``params``.

    Raises:
        ValueError: If the objective is not a scalar that depends on the parameters.
    """
    inputs = {key: p.detach().requires_grad_() for key, p in params.items()}
    with torch.enable_grad():
        value: Any = objective(inputs)
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise ValueError(f"the objective must return a 0-d tensor that depends on its argument, not {value!r}")
    grads = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(inputs, grads, strict=True))


def momentum_free(rule: Rule[S, H]) -> Rule[S, H]:
    """The rule whose step is the given rule's without its momentum, for judging a step; see the paper, §5 and App. G.

    Its step leaves the state as it was. A rule without momentum is returned unchanged.
    """
    instance("rule", rule, Rule, "an update rule, such as apo.sgd()")
    free = rule.without_momentum
    if free is None:
        return rule
    return rule._replace(step=lambda params, grads, state, hypers: (free(params, grads, state, hypers), state))
