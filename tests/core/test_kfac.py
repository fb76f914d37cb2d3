"""K-FAC against the dense Fisher information and curvlinops; its factors, and their eigendecomposition."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import apo
from apo.rules.kfac import eigen
from apo.types import Factors
from tests.cases import randn, spd


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """½·sum over outputs, mean over examples."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def preconditioned(rule: apo.Rule, model: nn.Module, statistics: Any, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The direction of the step with unit learning rate."""
    params = values(model)
    state = rule.observe(rule.init(params), statistics)
    new, _ = rule.step(params, grads, state, rule.hypers._replace(lr=torch.tensor(1.0).double()))
    return {name: params[name] - new[name] for name in params}


class Regression:
    """One layer, squared error: here the Kronecker product is the Fisher information itself."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3).double()
        self.x, self.y = randn(50, 4, seed=1), randn(50, 3, seed=2)
        self.loss = half_squared_error(self.model(self.x), self.y)

    def rule(self, **options: Any) -> tuple[apo.Rule, Any]:
        rule = apo.kfac(self.model, likelihood="gaussian", fisher="exact", **options)
        return rule, apo.fisher_factors(rule, self.model, lambda: self.model(self.x))


@pytest.mark.parametrize("damping", [1e-3, 0.3, 20.0])
def test_is_the_damped_dense_fisher_inverse_on_one_layer(damping: float) -> None:
    task = Regression()
    rule, statistics = task.rule(damping=damping)
    grads, params = gradients(task.model, task.loss), values(task.model)
    jacobian = jacrev(lambda p: functional_call(task.model, p, (task.x,)))(params)
    rows = torch.cat([j.flatten(2) for j in jacobian.values()], 2)  # [N, out, parameters]
    fisher = torch.einsum("noi,noj->ij", rows, rows) / len(task.x)
    dense = torch.linalg.solve(
        fisher + damping * torch.eye(len(fisher), dtype=torch.float64), torch.cat([g.flatten() for g in grads.values()])
    )
    found = preconditioned(rule, task.model, statistics, grads)
    torch.testing.assert_close(torch.cat([d.flatten() for d in found.values()]), dense, rtol=1e-10, atol=1e-12)


def test_solves_linear_regression_in_one_step() -> None:
    task = Regression()
    rule, statistics = task.rule(damping=0.0)
    direction = preconditioned(rule, task.model, statistics, gradients(task.model, task.loss))
    solution = torch.linalg.lstsq(torch.cat([task.x, torch.ones(50, 1)], 1), task.y).solution
    for name, expected in (("weight", solution[:4].T), ("bias", solution[4])):
        torch.testing.assert_close(values(task.model)[name] - direction[name], expected, rtol=1e-12, atol=1e-12)


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)), (
        randn(9, 5, seed=3)
    )


def cnn() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 0), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ]
    model, x = nn.Sequential(*layers).double(), randn(6, 2, 7, 6, seed=4)
    model(x)
    return model, x


class Pooled(nn.Module):
    """Linear layers along a sequence, whose mean is classified: their weights are shared by positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh()).mean(1)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "sequence": lambda: (Pooled(), randn(6, 4, 4, seed=5)),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_curvlinops(name: str, fisher: Any) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model = model.double()
    y, damping = torch.arange(len(x)) % 3, 3e-2
    rule = apo.kfac(model, damping=damping, fisher=fisher)
    grads = gradients(model, F.cross_entropy(model(x), y))
    statistics = apo.fisher_factors(rule, model, lambda: model(x), F.cross_entropy, y)
    found = preconditioned(rule, model, statistics, grads)
    theirs = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2" if fisher == "exact" else "empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    inverse = KFACInverseLinearOperator(theirs, damping=damping, use_exact_damping=True)
    for ours, expected in zip(found.values(), inverse @ list(grads.values()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_observations_are_averaged() -> None:
    """The k-th is taken with weight min(1, 8/k), until the average's own 1 − ema is more."""
    model = nn.Linear(3, 2).double()
    rule = apo.kfac(model, ema=0.4)
    state = rule.init(values(model))
    seen = [Factors(spd(4, seed), spd(2, seed + 50)) for seed in range(16)]
    expected = Factors(*(torch.zeros_like(f) for f in seen[0]))
    for k, factors in enumerate(seen, 1):
        before = copy.deepcopy(state)
        new = rule.observe(state, {"weight": factors, "elsewhere": factors})
        for one, other in zip(state, before, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        weight = max(min(1.0, 8.0 / k), 0.6)
        expected = Factors(*((1 - weight) * e + weight * f for e, f in zip(expected, factors, strict=True)))
        state = new
        torch.testing.assert_close(state.inputs["weight"], expected.inputs)
        torch.testing.assert_close(state.outputs["weight"], expected.outputs)
    basis, spectrum = state.input_basis["weight"], state.input_values["weight"]
    torch.testing.assert_close(basis @ torch.diag(spectrum) @ basis.T, expected.inputs)
    with pytest.raises(ValueError, match=r"^a Fisher factor of weight is not finite"):
        rule.observe(state, {"weight": Factors(spd(4, 0) / 0.0, spd(2, 1))})


def low_rank(n: int, rank: int) -> Tensor:
    root = randn(n, rank, seed=9)
    return root @ root.T


MATRICES = {
    "zero": torch.zeros(5, 5),
    "one": torch.full((6, 6), 3.0),
    "rank-deficient": low_rank(60, 4),
    "ill-conditioned": torch.diag(torch.logspace(-30, 8, 20, dtype=torch.float64)) + 1e-3 * low_rank(20, 2),
    "tiny": 1e-37 * spd(7, 1),
    "huge": 1e37 * spd(7, 1),
    "repeated": torch.eye(9),
    "single": torch.tensor([[2.0]]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rounded", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MATRICES)
def test_decomposes_difficult_matrices(name: str, rounded: Any, dtype: torch.dtype) -> None:
    matrix = MATRICES[name].to(dtype)
    matrix = matrix if rounded is None else matrix.to(rounded).to(dtype)
    spectrum, basis = eigen(matrix)
    assert spectrum.dtype == basis.dtype == dtype
    assert bool((spectrum >= 0).all())
    top = matrix.abs().max()
    error = (basis * (spectrum / top.clamp_min(1e-38))) @ basis.T - matrix / top.clamp_min(1e-38)
    assert error.abs().max() < (2e-2 if rounded else 2e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(matrix), dtype=dtype), atol=2e-5, rtol=0)


def test_decomposes_where_lapack_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, eigh = low_rank(12, 3).float(), torch.linalg.eigh
    expected = eigen(matrix)[0]

    def fails_in_float32(m: Tensor) -> Any:
        if m.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(m)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    torch.testing.assert_close(eigen(matrix)[0], expected, atol=1e-4, rtol=1e-4)

    def fails_always(m: Tensor) -> Any:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fails_always)
    spectrum, basis = eigen(matrix)
    assert torch.equal(spectrum, matrix.diagonal())
    assert torch.equal(basis, torch.eye(12))


def test_without_damping_it_is_the_pseudo_inverse() -> None:
    model = nn.Linear(6, 4, bias=False).double()
    a, s = low_rank(6, 3), low_rank(4, 2)
    grads = {"weight": randn(4, 6, seed=11)}
    found = preconditioned(apo.kfac(model, damping=0.0), model, {"weight": Factors(a, s)}, grads)
    expected = torch.linalg.pinv(s, hermitian=True) @ grads["weight"] @ torch.linalg.pinv(a, hermitian=True)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-9, atol=1e-11)


def test_decays_in_float32_whatever_the_weights_are() -> None:
    """The new bfloat16 weights are those of float32, rounded once."""
    model = nn.Linear(30, 20).bfloat16()
    rule = apo.kfac(model, lr=0.1, damping=0.1, weight_decay=0.3)
    seen = {"weight": Factors(spd(31, 1), spd(20, 2))}
    grads = {name: torch.randn_like(p) for name, p in values(model).items()}
    new, _ = rule.step(values(model), grads, rule.observe(rule.init(values(model)), seen), rule.hypers)
    params, slopes = ({name: t.float() for name, t in tree.items()} for tree in (values(model), grads))
    exact, _ = rule.step(params, slopes, rule.observe(rule.init(params), seen), rule.hypers)
    for name, p in new.items():
        assert torch.equal(p, exact[name].bfloat16())


def test_what_has_no_factors_takes_the_plain_step() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
            self.grouped, self.plain = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.custom = type("Custom", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T})(4, 4)

    with pytest.warns(UserWarning, match=r"plain gradient step.*: embedding.weight, grouped.weight, custom.weight;"):
        rule = apo.kfac(Mixed(), lr=0.1)
    assert set(rule.fisher.layers) == {"plain.weight"}
    params = values(Mixed())
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    new, _ = rule.step(params, grads, rule.init(params), rule.hypers)
    for name in set(params) - {"plain.weight", "plain.bias"}:
        torch.testing.assert_close(new[name], params[name] - 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, "fisher='true' is not one of 'mc', 'exact', 'empirical'"),
        ({"likelihood": "poisson"}, "likelihood='poisson' is not one of 'categorical', 'gaussian'"),
        ({"fisher": "exact", "sample": torch.relu}, "sample= draws targets, which fisher='exact' does not"),
        ({"ema": 1.0}, "ema=1.0 is not in [0, 1)"),
        ({"every": 0}, "every=0 is not at least 1"),
        ({"damping": -1.0}, "damping=-1.0 is not in [0, ∞)"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        apo.kfac(nn.Linear(2, 2), **options)
