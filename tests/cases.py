"""The tables that the tests run over: a new rule, domain or problem joins them by one row."""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

import apo
from apo.domains import AVERAGING, POSITIVE, UNIT_INTERVAL
from apo.trees import leaves
from apo.types import Factors, Params


class RuleCase(NamedTuple):
    """A rule with options, and the optimizer of torch that it equals, if there is one.

    Attributes:
        name: Names the test.
        make: The factory of the rule.
        options: What the factory gets.
        twin: ``twin(parameters) -> torch.optim.Optimizer`` with the same options.
        coupled: Whether the step of a tensor depends on the others'.
    """

    name: str
    make: Callable[..., apo.Rule]
    options: dict[str, Any]
    twin: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None
    coupled: bool = False

    def rule(self, **options: Any) -> apo.Rule:
        """The rule, with more options."""
        return self.make(**{**self.options, **options})

    def adaptable(self) -> list[str]:
        """The hyperparameters that lie in the interior of their domains, so that they can be adapted."""
        rule = self.rule()
        return [name for name in rule.hypers._fields if rule.domains[name].contains(getattr(rule.hypers, name).item())]


def _row(name: str, make: Callable[..., apo.Rule], twin: Any = None, coupled: bool = False, **options: Any) -> RuleCase:
    """A row; ``twin`` is a class of torch with the same options, under the names that torch gives them."""
    if twin is None:
        return RuleCase(name, make, options, coupled=coupled)
    renamed = {k: v for k, v in options.items() if k not in ("beta1", "beta2", "rho")}
    if "beta1" in options:
        renamed["betas"] = (options["beta1"], options["beta2"])
    return RuleCase(name, make, options, partial(twin, **renamed))


@wraps(apo.apollo, assigned=())
def clipped_apollo(**options: Any) -> apo.Rule:
    """Apollo on clipped gradients; the options are those of Apollo."""
    return apo.chain(apo.clip_by_norm(0.5), apo.apollo(**options))


class Layers(torch.nn.Module):
    """Linear layers with the names that parameters have in the problems below."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Linear(2, 2, bias=False)
        self.add_module("0", torch.nn.Linear(3, 4))
        self.add_module("2", torch.nn.Linear(4, 3))


@wraps(apo.kfac, assigned=())
def kfac(**options: Any) -> apo.Rule:
    """K-FAC for the problems below; the options are its own."""
    return apo.kfac(Layers(), **options)


SGD, RMSprop, Adam, AdamW = torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW

RULES = [
    _row("sgd", apo.sgd, SGD, lr=0.1),
    _row("sgd-defaults", apo.sgd, SGD),
    _row("sgd-decay", apo.sgd, SGD, lr=0.1, weight_decay=0.2),
    _row("sgd-momentum", apo.sgd, SGD, lr=0.05, momentum=0.9),
    _row("sgd-dampening", apo.sgd, SGD, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.2),
    _row("sgd-nesterov", apo.sgd, SGD, lr=0.05, momentum=0.9, nesterov=True),
    _row("sgd-nesterov-decay", apo.sgd, SGD, lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.1),
    _row("rmsprop-defaults", apo.rmsprop, RMSprop),
    _row("rmsprop", apo.rmsprop, RMSprop, lr=0.02, eps=1e-3, alpha=0.9),
    _row("rmsprop-decay", apo.rmsprop, RMSprop, lr=0.02, eps=1e-2, alpha=0.95, weight_decay=0.3),
    _row("rmsprop-rho", apo.rmsprop, lr=0.02, rho=0.3, eps=1e-2, alpha=0.9),
    _row("rmsprop-rho-one", apo.rmsprop, lr=0.02, rho=1.0, eps=1e-2, alpha=0.9, weight_decay=0.1),
    # With its bias corrected, RMSprop is Adam without averaging of the gradient.
    RuleCase(
        "rmsprop-corrected",
        apo.rmsprop,
        {"lr": 0.02, "eps": 1e-3, "alpha": 0.9, "bias_correction": True},
        partial(Adam, lr=0.02, eps=1e-3, betas=(0.0, 0.9)),
    ),
    _row("adam-defaults", apo.adam, Adam),
    _row("adam", apo.adam, Adam, lr=0.02, beta1=0.8, beta2=0.95, eps=1e-3),
    _row("adam-decay", apo.adam, Adam, lr=0.02, beta1=0.7, beta2=0.99, eps=1e-2, weight_decay=0.3),
    _row("adam-no-average", apo.adam, Adam, lr=0.02, beta1=0.0, beta2=0.0, eps=1e-2),
    _row("adamw-defaults", apo.adamw, AdamW),
    _row("adamw", apo.adamw, AdamW, lr=0.02, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3),
    _row("adamw-no-decay", apo.adamw, AdamW, lr=0.02, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.0),
    _row("apollo-defaults", apo.apollo),
    _row("apollo-decay", apo.apollo, lr=0.2, beta=0.8, eps=1e-2, weight_decay=0.3),
    _row("apollo-decoupled-decay", apo.apollo, lr=0.2, beta=0.8, eps=0.1, weight_decay=0.3, decay="decoupled"),
    # So small that most of the curvature is above it, and eps shows in the step.
    _row("apollo-sigma", apo.apollo, lr=0.03, beta=0.7, eps=0.1, sigma=0.02),
    _row("apollo-clipped", clipped_apollo, lr=0.03, beta=0.7, eps=0.1, weight_decay=0.2, sigma=0.02),
    _row("kfac-defaults", kfac),
    _row("kfac", kfac, lr=0.1, damping=0.3),
    _row("kfac-decay", kfac, lr=0.1, damping=0.05, weight_decay=0.2),
    _row("quasi-adam-defaults", apo.quasi_adam, coupled=True),
    _row("quasi-adam", apo.quasi_adam, coupled=True, lr=0.02, qn_weight=0.6, beta1=0.8, beta2=0.95, eps=1e-3),
    _row("quasi-adam-tensor", apo.quasi_adam, lr=0.02, qn_weight=0.6, beta1=0.8, eps=1e-3, secant="tensor"),
    # Early averages mostly grow, which is no pair; the less of an average, the earlier there is one.
    _row("quasi-adam-switch", apo.quasi_adam, coupled=True, lr=0.1, beta1=0.3, eps=1e-3, variant="switch"),
    _row("quasi-adam-no-pair", apo.quasi_adam, lr=0.02, qn_weight=0.0, beta1=0.8, beta2=0.95, eps=1e-3),
]

DOMAINS = {"positive": POSITIVE, "unit_interval": UNIT_INTERVAL, "averaging": AVERAGING}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Problem(NamedTuple):
    """Parameters, the loss on a batch B, and the outputs on another batch B', all in float64.

    Attributes:
        params: Where to start.
        loss: ``loss(params) -> []`` on B.
        outputs: ``outputs(params) -> [B', ...]``.
    """

    params: Params
    loss: Callable[[Params], Tensor]
    outputs: Callable[[Params], Tensor]


def randn(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64, the same ones for the same seed and shape."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(n: int, seed: int) -> Tensor:
    """A symmetric positive definite matrix, [n, n], with eigenvalues of 0.1 and more."""
    root = randn(n, n, seed=seed)
    return root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def flat(params: Params) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def quadratic() -> Problem:
    """½θᵀHθ − bᵀθ over a vector, a matrix and a 0-d parameter; linear outputs."""
    params = {"vector": randn(3, seed=1), "matrix.weight": randn(2, 2, seed=2), "scalar": randn(seed=3)}
    hessian, slope, features = spd(8, seed=4), randn(8, seed=5), randn(5, 8, seed=6)
    return Problem(params, lambda p: flat(p) @ hessian @ flat(p) / 2 - slope @ flat(p), lambda p: features @ flat(p))


def mlp() -> Problem:
    """A two-layer classifier with cross-entropy, called functionally."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    x, y, other = randn(6, 3, seed=7), torch.arange(6) % 3, randn(5, 3, seed=8)
    params = {name: 2.0 * p.detach() for name, p in net.named_parameters()}
    return Problem(
        params, lambda p: F.cross_entropy(functional_call(net, p, x), y), lambda p: functional_call(net, p, other)
    )


def rosenbrock() -> Problem:
    """(1 − x)² + 100(y − x²)² over two 0-d parameters, divided by 100 to suit the learning rates of the table."""
    params = {"x": torch.tensor(1.0, dtype=torch.float64), "y": torch.tensor(-1.5, dtype=torch.float64)}
    return Problem(
        params,
        lambda p: ((1.0 - p["x"]) ** 2 + 100.0 * (p["y"] - p["x"] ** 2) ** 2) / 100.0,
        lambda p: torch.stack([p["x"], p["y"] - p["x"] ** 2]).reshape(1, 2),
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"quadratic": quadratic, "mlp": mlp, "rosenbrock": rosenbrock}


class Moment(NamedTuple):
    """Everything that the next step of a rule depends on, besides its hyperparameters."""

    params: Params
    grads: Params
    state: Any


def observed(rule: apo.Rule, state: Any, seed: int) -> Any:
    """The state of a rule after an observation of arbitrary curvature, if it takes any."""
    if rule.observe is None:
        return state
    sizes = {name: (len(state.inputs[name]), len(state.outputs[name])) for name in state.inputs}
    return rule.observe(state, {name: Factors(spd(a, seed), spd(s, seed + 1)) for name, (a, s) in sizes.items()})


def moment(rule: apo.Rule, problem: Problem, steps: int) -> Moment:
    """Where a rule is on a problem after a number of steps."""
    params, state = problem.params, rule.init(problem.params)
    for step in range(steps):
        state = observed(rule, state, seed=10 + step)
        params, state = rule.step(params, grad(problem.loss)(params), state, rule.hypers)
    return Moment(params, grad(problem.loss)(params), state)


def per_parameter(hypers: Any, params: Params) -> Any:
    """Hyperparameters with a different value for every parameter: falling by 2% from one to the next."""
    return type(hypers)(*({key: h * (1.0 - 0.02 * i) for i, key in enumerate(params)} for h in hypers))


def granular(granularity: str, rule: apo.Rule, params: Params) -> Any:
    """The rule's hyperparameters, one for all ("global") or one for each parameter ("parameter")."""
    return rule.hypers if granularity == "global" else per_parameter(rule.hypers, params)


def names(cases: Iterable[RuleCase]) -> list[str]:
    """The ids of a parametrised test."""
    return [case.name for case in cases]


def tensors(*trees: Any) -> list[Tensor]:
    """All tensors of params, gradients, states and hypers."""
    return [t for tree in trees for t in (list(tree.values()) if isinstance(tree, dict) else leaves(tree))]


def bits(tensor: Tensor) -> bytes:
    """The tensor's numbers, for comparisons that tell −0 from 0 and take NaN as equal to itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
