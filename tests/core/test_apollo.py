"""Apollo: against its algorithm boxes written in NumPy, against an independent implementation, and its Theorem 1."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_optimizer import ApolloDQN

import apo
from apo.types import Params
from tests.cases import randn, spd

STEPS, LR = 50, 0.03  # stable, so that rounding does not grow
CURVATURE = 12.0 * spd(11, seed=1)
START = {"matrix": randn(3, 2, seed=2), "vector": randn(4, seed=3), "scalar": randn(seed=4)}
DECAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "l2": {"weight_decay": 0.2, "decay": "l2"},
    "decoupled": {"weight_decay": 0.2, "decay": "decoupled"},
}
every_decay = pytest.mark.parametrize("decay", DECAYS)


def slope(params: Params) -> Params:
    """The gradient of a quadratic that couples three tensors, with waves on it; its curvatures are up to about 30."""
    theta = torch.cat([p.reshape(-1) for p in params.values()])
    parts = (CURVATURE @ theta + 2.0 * torch.sin(3.0 * theta)).split([p.numel() for p in params.values()])
    return {key: part.reshape(p.shape) for (key, p), part in zip(params.items(), parts, strict=True)}


def run(rule: apo.Rule, steps: int = STEPS) -> list[tuple[Params, Any]]:
    """Parameters and state after each step."""
    params, state, seen = START, rule.init(START), []
    for _ in range(steps):
        params, state = rule.step(params, slope(params), state, rule.hypers)
        seen.append((params, state))
    return seen


def largest(state: Any) -> float:
    """The largest |B|."""
    return max(b.abs().max().item() for b in state.curvature.values())


def apart(a: Params, b: Params) -> float:
    """The largest difference of two sets of tensors."""
    return max((a[key] - b[key]).abs().max().item() for key in b)


def box(lr: float, beta: float, eps: float, weight_decay: float, decay: str, sigma: float) -> list[dict[str, Any]]:
    """Algorithm 2 line by line (Algorithm 1 without decay), and the direction that has g in the place of m."""
    theta = {key: p.numpy() for key, p in START.items()}
    m, d, B = ({key: np.zeros(p.shape) for key, p in START.items()} for _ in range(3))
    seen = []
    for t in range(STEPS):
        gradients = {key: g.numpy() for key, g in slope({key: torch.tensor(p) for key, p in theta.items()}).items()}
        free = {}
        for key in theta:
            g = gradients[key]
            if decay == "l2":
                g = g + weight_decay * theta[key]
            m_next = beta * (1 - beta**t) / (1 - beta ** (t + 1)) * m[key] + (1 - beta) / (1 - beta ** (t + 1)) * g
            norm = np.sum(np.abs(d[key]) ** 4) ** 0.25
            alpha = (np.sum(d[key] * (m_next - m[key])) + np.sum(d[key] * B[key] * d[key])) / (norm + eps) ** 4
            B[key] = B[key] - alpha * d[key] ** 2
            D = np.maximum(np.abs(B[key]), sigma)
            d[key] = m_next / D
            free[key] = g / D
            if decay == "decoupled":
                d[key] = d[key] + weight_decay * theta[key]
                free[key] = free[key] + weight_decay * theta[key]
            free[key] = theta[key] - lr * free[key]
            theta = {**theta, key: theta[key] - lr * d[key]}
            m[key] = m_next
        seen.append({"theta": dict(theta), "m": dict(m), "B": dict(B), "d": dict(d), "free": free})
    return seen


@pytest.mark.parametrize("sigma", [1.0, 0.4])
@every_decay
def test_is_the_algorithm_of_the_box(decay: str, sigma: float) -> None:
    options = {"lr": sigma * LR, "beta": 0.8, "eps": 1e-2, "weight_decay": 0.0, "decay": "l2", "sigma": sigma}
    options |= DECAYS[decay]
    rule = apo.apollo(**options)
    params, state, curvatures = START, rule.init(START), []
    for expected in box(**options):
        grads = slope(params)
        free = rule.without_momentum(params, grads, state, rule.hypers)
        params, state = rule.step(params, grads, state, rule.hypers)
        pairs = [
            (params, "theta"),
            (free, "free"),
            (state.exp_avg, "m"),
            (state.curvature, "B"),
            (state.direction, "d"),
        ]
        for found, name in pairs:
            for key, tensor in found.items():
                np.testing.assert_allclose(tensor.numpy(), expected[name][key], rtol=1e-10, atol=1e-10, err_msg=name)
        curvatures.append(largest(state))
    assert max(curvatures) > 1.5 > sigma
    assert apart(params, START) > 0.1


@every_decay
def test_takes_the_steps_of_pytorch_optimizer(decay: str) -> None:
    """Which fixes σ = 0.01: Theorem 1 gives the learning rate, ε and the decoupled decay that correspond."""
    eps, options = 1e-2, DECAYS[decay]
    rule = apo.apollo(lr=LR, eps=eps, **options)
    theirs = {key: p.clone().requires_grad_() for key, p in START.items()}
    strength = options.get("weight_decay", 0.0) * (100.0 if decay == "decoupled" else 1.0)
    twin = ApolloDQN(
        theirs.values(),
        lr=0.01 * LR,
        init_lr=0.01 * LR,
        warmup_steps=1,
        eps=eps,
        rebound="constant",
        weight_decay=strength,
        weight_decay_type=options.get("decay", "l2"),
    )
    found = run(rule)
    for params, _ in found:
        for key, g in slope({key: p.detach() for key, p in theirs.items()}).items():
            theirs[key].grad = g
        twin.step()
        assert apart(params, {key: p.detach() for key, p in theirs.items()}) < 1e-14
    assert max(largest(state) for _, state in found) > 2.0


@pytest.mark.parametrize("factor", [4.0, 100.0, 0.3])
@every_decay
def test_only_the_ratio_of_lr_and_sigma_matters(decay: str, factor: float) -> None:
    """Theorem 1, with what its proof leaves out: ε falls as σ grows, and so does a decoupled decay."""
    options = {"lr": LR, "eps": 1e-2, **DECAYS[decay]}
    scaled = {**options, "lr": LR * factor, "eps": 1e-2 / factor, "sigma": factor}
    if decay == "decoupled":
        scaled["weight_decay"] /= factor
    found, expected = run(apo.apollo(**scaled)), run(apo.apollo(**options))
    for (params, state), (others, other) in zip(found, expected, strict=True):
        assert apart(params, others) <= (0.0 if factor == 4.0 else 1e-12)  # a power of 2 rounds nothing
        scales = {key: b / factor for key, b in state.curvature.items()}
        assert apart(scales, other.curvature) < 1e-10
    assert max(largest(state) for _, state in expected) > 2.0


@pytest.mark.parametrize("kept", ["eps", "weight_decay"])
def test_the_ratio_alone_does_not_fix_the_trajectory(kept: str) -> None:
    """With σ and lr scaled, but not ε or not the decoupled decay, it is another run."""
    options = {"lr": LR, "eps": 1e-2, **DECAYS["decoupled"]}
    scaled = {**options, "lr": 4.0 * LR, "eps": 0.0025, "weight_decay": 0.05, "sigma": 4.0, kept: options[kept]}
    assert apart(run(apo.apollo(**scaled))[-1][0], run(apo.apollo(**options))[-1][0]) > 1e-3


def test_the_curvature_is_that_of_the_last_step() -> None:
    """At ε = 0, d changes m by −dᵀBd: the weak secant equation, for each tensor on its own (Eq. 8)."""
    seen = run(apo.apollo(lr=LR, eps=0.0))
    for (_, before), (_, after) in itertools.pairwise(seen):
        for key, d in before.direction.items():
            along = (d * after.curvature[key] * d).sum()
            change = (d * (after.exp_avg[key] - before.exp_avg[key])).sum()
            torch.testing.assert_close(along, -change, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("lr", [0.21, 1.0, 30.0])
def test_the_step_is_newtons_whatever_the_learning_rate(lr: float) -> None:
    """B is η times the curvature, once that is above σ: the second step ends in the minimum of ½ · 5θ²."""
    rule = apo.apollo(lr=lr, beta=0.0, eps=0.0)
    params = {"w": torch.tensor(2.0, dtype=torch.float64)}
    state = rule.init(params)
    for _ in range(2):
        params, state = rule.step(params, {"w": 5.0 * params["w"]}, state, rule.hypers)
    assert state.curvature["w"].item() == pytest.approx(5.0 * lr)
    assert params["w"].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_fourth_powers_neither_overflow_nor_vanish(scale: float, dtype: torch.dtype) -> None:
    """B does not depend on the unit of the loss per step: gradients and ε scaled together leave it as it was."""
    start = {"w": torch.zeros(50, dtype=dtype)}
    grads = [randn(50, seed=i) for i in range(5)]

    def curvature(scale: float) -> torch.Tensor:
        rule = apo.apollo(lr=0.1, eps=1e-2 * scale)
        state = rule.init(start)
        for g in grads:
            _, state = rule.step(start, {"w": (scale * g).to(dtype)}, state, rule.hypers)
        return state.curvature["w"].double()

    expected = curvature(1.0)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(curvature(scale), expected, rtol=1e3 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_sigma_outside_its_set(sigma: float) -> None:
    with pytest.raises(ValueError, match=rf"^sigma={re.escape(repr(sigma))} is not in \(0, ∞\)$"):
        apo.apollo(sigma=sigma)


def test_refuses_what_is_no_decay() -> None:
    with pytest.raises(ValueError, match=r"^decay='adamw' is not one of 'l2', 'decoupled'$"):
        apo.apollo(decay="adamw")
    with pytest.raises(TypeError, match="sigma must be a float"):
        apo.apollo(sigma="1")
