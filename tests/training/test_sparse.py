"""Sparse gradients: judged as the dense ones that they stand for, or refused by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.training.models import WORDS

o = torch.optim
Build = Callable[[nn.Module], Any]
X = torch.tensor([[1, 4], [4, 2], [7, 1]])
Y = torch.tensor([0, 2, 1])
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


def tagger(sparse: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two words to one of three classes; most rows of the table have no gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WORDS, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3)).to(dtype)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int, **fed: Any) -> None:
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        opt.step(**fed)


def copies(model: nn.Module, opt: apo.APO) -> list[Tensor]:
    """Weights, gradients and state, dense."""
    state = [v for p in model.parameters() for v in opt.state.get(p, {}).values() if isinstance(v, Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [tensor.detach().clone().to_dense() for tensor in (*model.parameters(), *grads, *state)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


SAME_AS_DENSE: dict[str, Build] = {
    "sgd": lambda m: o.SGD(m.parameters(), lr=0.1),
    "sgd-momentum": lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "sgd-nesterov": lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "adagrad": lambda m: o.Adagrad(m.parameters(), lr=0.1),
}
every_build = pytest.mark.parametrize("build", SAME_AS_DENSE.values(), ids=SAME_AS_DENSE)


@pytest.mark.parametrize("lookahead", ["no-momentum", "step"])
@every_build
def test_judged_as_the_dense_gradients_that_they_stand_for(build: Build, lookahead: Any) -> None:
    """Search, meta-steps with both discrepancies, per parameter: all numbers are those of a dense table."""
    runs = []
    for sparse in (True, False):
        model = tagger(sparse)
        objective = apo.Proximal(fsd=0.1, wsd=0.1, lookahead=lookahead)
        records: list[Any] = []
        for tune, meta in (("global", apo.Newton(every=2)), ("parameter", apo.Gradient(o.SGD, lr=0.1, every=2))):
            opt = apo.APO(
                model, build(model), F.cross_entropy, tune={"lr": tune}, meta=meta, objective=objective,
                skip_nonfinite=True,
            )  # fmt: skip
            train(model, opt, 5, batch=(X, Y))
            records += [value for row in opt.record for value in row.values()]
        assert model[0].weight.grad.is_sparse == sparse
        runs.append(records + [p.detach() for p in model.parameters()])
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("lookahead", ["steady", "step"])
def test_sparse_adam(lookahead: Any) -> None:
    """Beside AdamW for the rest: the first slope, before there is momentum, by central differences."""
    rate, h = 1e-3, 1e-4

    def bases(model: nn.Module, scale: float = 1.0) -> list[o.Optimizer]:
        return [
            o.SparseAdam(model[0].parameters(), lr=0.02 * scale, eps=1e-3),
            o.AdamW(model[2].parameters(), lr=0.01 * scale),
        ]

    def loss_after(scale: float) -> float:
        model = tagger()
        F.cross_entropy(model(X), Y).backward()
        for base in bases(model, scale):
            base.step()
        return F.cross_entropy(model(X), Y).item()

    model = tagger()
    meta, objective = apo.Gradient(o.SGD, lr=rate, every=1), apo.Proximal(lookahead=lookahead)
    opt = apo.APO(model, bases(model), F.cross_entropy, meta=meta, objective=objective)
    before = opt.hypers()["lr/0"]
    train(model, opt, 1, batch=(X, Y))
    slope = math.log(before / opt.hypers()["lr/0"]) / rate
    expected = (loss_after(math.exp(h)) - loss_after(math.exp(-h))) / (2 * h)
    assert abs(expected) > 1e-4
    assert slope == pytest.approx(expected, rel=1e-6)
    untouched = [row for row in range(WORDS) if row not in X.unique()]
    assert torch.equal(model[0].weight[untouched], tagger()[0].weight[untouched])


def test_sparse_adam_is_judged_without_its_momentum_by_default() -> None:
    model = tagger()
    base = o.SparseAdam(model[0].parameters(), lr=0.02, betas=(0.9, 0.99), eps=1e-3)
    opt = apo.APO(model, base, F.cross_entropy, objective=apo.Proximal(wsd=1.0), meta=apo.Gradient(o.SGD, lr=0.0))
    second = torch.zeros_like(model[0].weight)
    for _ in range(11):
        opt.zero_grad()
        model[2].zero_grad()
        F.cross_entropy(model(X), Y).backward()
        grad = model[0].weight.grad.to_dense()
        second = torch.where(grad != 0.0, 0.99 * second + 0.01 * grad**2, second)
        opt.step(batch=(X, Y))
    correction = math.sqrt(1.0 - 0.99**11)
    judged = 0.02 * correction * grad / (second.sqrt() + 1e-3)
    assert opt.record[-1]["step"] == 10.0
    assert opt.record[-1]["wsd"] == pytest.approx(0.5 * judged.square().sum().item(), rel=1e-9)


@every_build
def test_nothing_tuned_is_the_bare_optimizer(build: Build) -> None:
    bare, model = tagger(), tagger()
    train(bare, build(bare), 5)
    opt = apo.APO(model, build(model), F.cross_entropy, tune={}, skip_nonfinite=True)
    train(model, opt, 5, batch=(X, Y))
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in bare.parameters()])


def test_a_sparse_gradient_that_is_not_finite_is_skipped_on_request() -> None:
    model = tagger()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, skip_nonfinite=True)
    F.cross_entropy(model(X), Y).backward()
    indices, values = model[0].weight.grad.coalesce().indices(), model[0].weight.grad.coalesce().values().clone()
    values[0, 0] = math.inf
    model[0].weight.grad = torch.sparse_coo_tensor(indices, values, (WORDS, 4), check_invariants=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        opt.step(batch=(X, Y))
    assert same([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_error_in_the_search_leaves_everything_as_it_was(fails_at: int) -> None:
    model, left = tagger(), [fails_at]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("trapped")
        return F.cross_entropy(outputs, targets)

    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1, momentum=0.9), loss)
    F.cross_entropy(model(X), Y).backward()
    grad, before = model[0].weight.grad, copies(model, opt)
    with pytest.raises(RuntimeError, match="trapped"):
        opt.step(batch=(X, Y))
    assert model[0].weight.grad is grad
    assert same(copies(model, opt), before)


@pytest.mark.parametrize("options", [{}, {"tune": {}}, {"meta": "paper", "skip_nonfinite": True}])
@pytest.mark.parametrize("ordinary", [False, True])
def test_rules_refuse_them_by_name_at_every_step(ordinary: bool, options: dict[str, Any]) -> None:
    """At meta-steps, and at ordinary ones, where the second of two groups is the sparse one."""
    model = tagger()
    rule = apo.kfac(model[2:], every=1) if options == {"tune": {}} else apo.adam()
    opt = apo.APO(
        model, [(rule, model[2].parameters()), (apo.sgd(), model[0].parameters())], F.cross_entropy, **options
    )
    if ordinary:
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            model[0].weight.grad = model[0].weight.grad.to_dense()
            opt.step(batch=(X, Y))
    opt.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    before, due = copies(model, opt), opt.due
    with pytest.raises(ValueError, match=r"^0\.weight has a sparse gradient, which a rule cannot take.*sparse=False"):
        opt.step(batch=(X, Y))
    assert same(copies(model, opt), before)
    assert opt.due == due


def test_torchs_own_refusal_comes_through_with_everything_as_it_was() -> None:
    model = tagger()
    opt = apo.APO(model, [o.SGD(model[2].parameters(), lr=0.1), o.Adam(model[0].parameters())], F.cross_entropy)
    F.cross_entropy(model(X), Y).backward()
    before = copies(model, opt)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        opt.step(batch=(X, Y))
    assert same(copies(model, opt), before)
