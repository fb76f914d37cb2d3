"""Quasi-Adam: its H against dense BFGS, its pair, and whole runs against a slow transcription of the equations."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad

import apo
from apo.rules.quasi_adam import QuasiAdamState
from apo.types import Params
from tests.cases import bits, mlp, moment, quadratic, randn, rosenbrock

N = 6
VARIANTS, SECANTS = ["sum", "switch"], ["global", "tensor"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_secant = pytest.mark.parametrize("secant", SECANTS)


def with_pair(s: Tensor, y: Tensor, g: Tensor, at: Tensor | None = None) -> tuple[Params, Params, QuasiAdamState]:
    """One tensor at its second step, at 0 or where said, with the pair (s, y); (s, (1 − β₁)y) in "switch"."""
    at = torch.zeros_like(s) if at is None else at
    zero, one = torch.zeros_like(s), torch.ones((), dtype=torch.float64)
    fields = (g - y, zero + 0.1, at - s, g - y, one)
    return {"w": at}, {"w": g}, QuasiAdamState(*({"w": field} for field in fields))  # type: ignore[arg-type]


def without_pair(state: QuasiAdamState) -> QuasiAdamState:
    """The same state, as a rule without a quasi-Newton part keeps it: its step is Adam's."""
    return state._replace(last_param={}, last_grad={})  # type: ignore[arg-type]


def inverse_hessian(s: Tensor, y: Tensor) -> Tensor:
    """H of the rule, [N, N], a column a step: from 0, with lr 1 and no momentum, "switch" steps to −H g."""
    rule = apo.quasi_adam(lr=1.0, beta1=0.0, variant="switch")
    steps = [rule.step(*with_pair(s, y, unit), rule.hypers)[0]["w"] for unit in torch.eye(N, dtype=s.dtype)]
    return -torch.stack(steps, 1)


def random_pairs(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of lengths from 1e-3 to 1e3, at acute angles."""
    for seed in range(count):
        s, y = 10.0 ** (seed % 7 - 3) * randn(N, seed=seed), 10.0 ** (seed % 5 - 2) * randn(N, seed=1000 + seed)
        yield s, y if s @ y > 0.0 else -y


def test_the_inverse_hessian_is_that_of_bfgs() -> None:
    """The recursion (7) and the compact form (8), in dense matrices; symmetric, positive definite, and H y = s."""
    eye = np.eye(N)
    for pair in random_pairs(200):
        found = inverse_hessian(*pair).numpy()
        s, y = (vector.numpy()[:, None] for vector in pair)
        rho, gamma = 1.0 / (s.T @ y).item(), (s.T @ y / (y.T @ y)).item()
        recursion = (eye - rho * s @ y.T) @ (gamma * eye) @ (eye - rho * y @ s.T) + rho * s @ s.T
        wide = np.hstack([s, gamma * y])
        middle = np.array([[rho + gamma * rho**2 * (y.T @ y).item(), -rho], [-rho, 0.0]])
        compact = gamma * eye + wide @ middle @ wide.T
        scale = np.abs(recursion).max()
        np.testing.assert_allclose(found, recursion, rtol=0.0, atol=1e-12 * scale)
        np.testing.assert_allclose(found, compact, rtol=0.0, atol=1e-12 * scale)
        np.testing.assert_allclose(found, found.T, rtol=0.0, atol=1e-12 * scale)
        np.testing.assert_allclose(found @ y, s, rtol=0.0, atol=1e-12 * scale * np.linalg.norm(y))
        assert np.linalg.eigvalsh(found).min() > 0.0


S = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
ACROSS = torch.tensor([4.0, 0.0, -3.0], dtype=torch.float64)  # orthogonal to S, of the same length
G = randn(3, seed=1)
REJECTED = {
    "negative": (S, -S),
    "orthogonal": (S, ACROSS),
    "nearly-orthogonal": (S, ACROSS + 0.5e-10 * S),
    "no-displacement": (0.0 * S, S),
    "no-difference": (S, 0.0 * S),
    "neither": (0.0 * S, 0.0 * S),
    "underflow": (1e-160 * S, 1e-160 * S),
}


@every_variant
@every_secant
@pytest.mark.parametrize("pair", REJECTED.values(), ids=REJECTED)
def test_without_a_pair_the_step_is_adams(pair: tuple[Tensor, Tensor], secant: Any, variant: Any) -> None:
    """Bit for bit; and no derivative is touched by what was rejected."""
    rule = apo.quasi_adam(lr=0.1, secant=secant, variant=variant)
    params, grads, state = with_pair(*pair, g=G, at=randn(3, seed=2))
    for judged in (rule, apo.momentum_free(rule)):
        new, plain = (apo.lookahead(judged, params, grads, s, rule.hypers) for s in (state, without_pair(state)))
        assert bits(new.params["w"]) == bits(plain.params["w"])
        slopes = new.pullback({"w": G})
        assert slopes == plain.pullback({"w": G})
        assert slopes.lr != 0.0
        assert slopes.qn_weight == 0.0


@every_variant
@every_secant
def test_the_first_step_is_adams(secant: Any, variant: Any) -> None:
    """And the second is not; without an average, whose first change is mostly growth, rejected in "switch"."""
    for steps, beta1 in ((0, 0.9), (1, 0.0)):
        rule = apo.quasi_adam(lr=0.1, beta1=beta1, secant=secant, variant=variant)
        params, grads, state = moment(rule, quadratic(), steps)
        new, plain = (rule.step(params, grads, s, rule.hypers)[0] for s in (state, without_pair(state)))
        assert {bits(new[key]) == bits(plain[key]) for key in new} == {steps == 0}


@every_secant
@pytest.mark.parametrize("cosine", [0.9e-10, 1.1e-10, -1.1e-10])
def test_acceptance_has_no_scale(cosine: float, secant: Any) -> None:
    """A loss in other units, or parameters in other units, keep or reject the same pairs."""
    rule = apo.quasi_adam(secant=secant, variant="switch")
    seen = set()
    for length in (1e-30, 1.0, 1e30):
        for slope in (1e-30, 1.0, 1e30):
            s, y = length * S, slope * (ACROSS + cosine * S)
            params, grads, state = with_pair(s, y, g=y)
            new, plain = (rule.step(params, grads, x, rule.hypers)[0]["w"] for x in (state, without_pair(state)))
            assert bool(new.isfinite().all())
            seen.add(bits(new) != bits(plain))
    assert seen == {cosine > 1e-10}


@every_variant
@pytest.mark.parametrize("cosine", [0.3, 1e-9, -0.3])
def test_is_finite_whatever_the_scales(cosine: float, variant: Any) -> None:
    """In float32, where squares below 1e-19 vanish: the step, and its derivatives."""
    rule = apo.quasi_adam(variant=variant)
    for s, y, g in itertools.product((0.0, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10), repeat=3):
        at = with_pair(*((x * v).float() for x, v in ((s, S), (y, ACROSS + cosine * S), (g, G))))
        ahead = apo.lookahead(rule, *at, rule.hypers)
        assert bool(ahead.params["w"].isfinite().all())
        assert all(bool(slope.isfinite()) for slope in ahead.pullback({"w": torch.ones(3)}))


@every_variant
def test_one_tensor_alone_is_all_tensors_together(variant: Any) -> None:
    one, all_ = (apo.quasi_adam(lr=0.1, variant=variant, secant=secant) for secant in SECANTS)  # type: ignore[arg-type]
    for s, y in random_pairs(20):
        at = with_pair(s, y, randn(N, seed=3), randn(N, seed=4))
        assert bits(one.step(*at, one.hypers)[0]["w"]) == bits(all_.step(*at, all_.hypers)[0]["w"])


@every_variant
def test_what_is_kept_is_a_copy(variant: Any) -> None:
    """Whoever owns parameters and gradients may write into them afterwards. "switch" keeps the average alone."""
    rule = apo.quasi_adam(beta1=0.0, variant=variant)
    params, grads = {"w": randn(3, seed=1)}, {"w": randn(3, seed=2)}
    _, state = rule.step(params, grads, rule.init(params), rule.hypers)
    params["w"].zero_()
    grads["w"].zero_()
    assert bits(state.last_param["w"]) == bits(randn(3, seed=1))
    assert bits(state.exp_avg["w"]) == bits(randn(3, seed=2))
    if variant == "switch":
        assert state.last_grad == {}
    else:
        assert bits(state.last_grad["w"]) == bits(randn(3, seed=2))


def arrays(tensors: Params) -> dict[str, Any]:
    return {key: tensor.numpy().ravel() for key, tensor in tensors.items()}


class Slow:
    """The equations in NumPy, with dense matrices."""

    def __init__(self, lr: float, qn_weight: float, betas: tuple[float, float], eps: float, secant: str, variant: str):
        self.lr, self.w, self.betas, self.eps, self.secant, self.variant = lr, qn_weight, betas, eps, secant, variant
        self.kept: dict[str, list[Any]] = {}
        self.verdicts: list[bool] = []

    def step(self, theta: dict[str, Any], g: dict[str, Any]) -> dict[str, Any]:
        adam, average, s, y = {}, {}, {}, {}
        for key in g:
            before, v, t, theta_before, g_before = self.kept.get(key, (0.0, 0.0, 0, theta[key], g[key]))
            m, v = (b * a + (1 - b) * x for b, a, x in zip(self.betas, (before, v), (g[key], g[key] ** 2), strict=True))
            average[key] = m / (1 - self.betas[0] ** (t + 1))
            adam[key] = average[key] / np.sqrt(v / (1 - self.betas[1] ** (t + 1)) + self.eps)
            # At a tensor's first step nothing has changed.
            s[key], y[key] = theta[key] - theta_before, g[key] - g_before
            if self.variant == "switch" and t > 0:
                y[key] = m - before
            self.kept[key] = [m, v, t + 1, theta[key], g[key]]
        new = dict(theta)
        for keys in [list(g)] if self.secant == "global" else [[key] for key in g]:
            h = self.dense(*(np.concatenate([d[key] for key in keys]) for d in (s, y)))
            u = np.concatenate([(g if self.variant == "sum" else average)[key] for key in keys])
            ends = np.cumsum([g[key].size for key in keys])[:-1]
            newton = [0.0] * len(keys) if h is None else np.split(self.w * h @ u, ends)
            for key, direction in zip(keys, newton, strict=True):
                plain = 0.0 if self.variant == "switch" and h is not None else adam[key]
                new[key] = theta[key] - self.lr * (plain + direction)
        return new

    def dense(self, s: Any, y: Any) -> Any:
        accepted = s @ y > 0.0 and s @ y >= 1e-10 * np.linalg.norm(s) * np.linalg.norm(y)
        self.verdicts.append(accepted)
        if not accepted:
            return None
        fold = np.eye(len(s)) - np.outer(s, y) / (s @ y)
        return (s @ y) / (y @ y) * fold @ fold.T + np.outer(s, s) / (s @ y)


def missing(key: str, step: int) -> bool:
    """One parameter misses its first three steps, one every fifth."""
    return step < 3 if key == "2.bias" else key == "0.weight" and step % 5 == 1


@every_variant
@every_secant
def test_fifty_steps_are_those_of_the_equations(secant: Any, variant: Any) -> None:
    """Each on its own way; with noise, so that pairs are rejected, steps cut short by others, and gradients missing."""
    options = {"lr": 0.01, "qn_weight": 0.7, "eps": 1e-4}
    rule = apo.quasi_adam(**options, beta1=0.8, beta2=0.95, secant=secant, variant=variant)
    slow = Slow(**options, betas=(0.8, 0.95), secant=secant, variant=variant)
    problem = mlp()

    def noisy(params: Params, step: int) -> Params:
        slopes = {key: g for key, g in grad(problem.loss)(params).items() if not missing(key, step)}
        return {key: g + 0.02 * randn(*g.shape, seed=100 * step + i) for i, (key, g) in enumerate(slopes.items())}

    params, state, theta = problem.params, rule.init(problem.params), arrays(problem.params)
    for step in range(50):
        kept = 0.3 if step % 7 == 3 else 1.0
        new, state = rule.step(params, noisy(params, step), state, rule.hypers)
        params = {key: params[key] + kept * (new[key] - params[key]) for key in new}
        own = {key: torch.from_numpy(x).view_as(params[key]) for key, x in theta.items()}
        after = slow.step(theta, arrays(noisy(own, step)))
        theta = {key: theta[key] + kept * (after[key] - theta[key]) for key in theta}
        for key, x in arrays(params).items():
            np.testing.assert_allclose(x, theta[key], rtol=1e-10, atol=1e-10)
    assert 10 < sum(slow.verdicts) < len(slow.verdicts) - 5


def test_without_weight_it_is_adam_with_epsilon_inside_the_root() -> None:
    """Made without, which keeps no pair, or with a weight of 0 later."""
    options = {"lr": 0.02, "eps": 1e-3}
    made, later = (apo.quasi_adam(**options, qn_weight=w, beta1=0.8, beta2=0.95) for w in (0.0, 1.0))
    assert made.init(mlp().params).last_param == {}
    slow = Slow(**options, qn_weight=0.0, betas=(0.8, 0.95), secant="global", variant="sum")
    params, states = mlp().params, [rule.init(mlp().params) for rule in (made, later)]
    for _ in range(50):
        grads = grad(mlp().loss)(params)
        expected = slow.step(arrays(params), arrays(grads))
        (new, states[0]), (same, states[1]) = (
            rule.step(params, grads, state, made.hypers) for rule, state in zip((made, later), states, strict=True)
        )
        for key in new:
            np.testing.assert_allclose(new[key].numpy().ravel(), expected[key], rtol=1e-12, atol=1e-12)
            assert bits(new[key]) == bits(same[key])
        params = new


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["accepted", "rejected"])
@every_variant
@every_secant
@pytest.mark.parametrize("free", [False, True])
def test_hypergradients_on_both_sides_of_acceptance(free: bool, secant: Any, variant: Any, sign: float) -> None:
    """Central differences, by gradcheck, in every hyperparameter."""
    rule = apo.quasi_adam(lr=0.1, qn_weight=0.7, beta1=0.3, beta2=0.9, eps=1e-2, secant=secant, variant=variant)
    judged = apo.momentum_free(rule) if free else rule
    params, grads, state = moment(rule, quadratic(), 3)
    # With y mirrored, sᵀy changes its sign.
    field = "last_grad" if variant == "sum" else "exp_avg"
    last = {key: g - sign * (g - getattr(state, field)[key]) for key, g in grads.items()}
    state = state._replace(**{field: last})

    def q(*hypers: Tensor) -> Tensor:
        after, _ = judged.step(params, grads, state, type(rule.hypers)(*hypers))
        return torch.cat([p.reshape(-1) for p in after.values()])

    hypers = [h.clone().requires_grad_() for h in rule.hypers]
    assert torch.autograd.gradcheck(q, hypers, eps=1e-6, atol=1e-9, rtol=1e-7)
    weight = apo.lookahead(judged, params, grads, state, rule.hypers).pullback(grads).qn_weight
    assert (weight != 0.0) == (sign > 0.0)


@pytest.mark.parametrize("lr", [1e-3, 1e-2, 3e-2, 1e-1])
def test_descends_on_rosenbrock_and_faster_than_its_part(lr: float) -> None:
    """After 500 steps at half of what Adam's part alone gets to, or less; with a learning rate of 0.03, below 1e-6."""
    problem, ends = rosenbrock(), []
    for weight in (1.0, 0.0):
        at = moment(apo.quasi_adam(lr=lr, qn_weight=weight), problem, 500)
        ends.append(problem.loss(at.params).item())
    assert ends[0] < 0.5 * ends[1] < 0.5 * problem.loss(problem.params).item()
    assert ends[0] < 1e-6 or lr < 0.03


@pytest.mark.parametrize("option", ["secant", "variant"])
def test_refuses_an_option_it_does_not_know(option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}='all' is not one of '"):
        apo.quasi_adam(**{option: "all"})  # type: ignore[arg-type]
