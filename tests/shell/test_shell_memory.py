"""Memory stays flat, and no tensor with a graph survives a step."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from benchmarks.memory import Counting
from tests.shell.helpers import backward, batches, net

o = torch.optim
BASES: dict[str, Callable[[nn.Module], Any]] = {
    "torch": lambda model: o.AdamW(model.parameters(), lr=1e-3),
    "rule": lambda model: apo.adamw(lr=1e-3),
    "rule-without-momentum": lambda model: apo.rmsprop(lr=1e-3),
    "list": lambda model: [
        (apo.sgd(0.1, 0.9), list(model[0].parameters())),
        o.SGD([*model[1].parameters(), *model[5].parameters()], lr=0.1, momentum=0.9),
    ],
}
OBJECTIVE = apo.Proximal(fsd=0.1, wsd=0.1)


def tensors() -> list[Tensor]:
    """All that live, without asking odd objects for their class."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


def run(model: nn.Module, opt: apo.APO, steps: int, others: list[Tensor]) -> tuple[int, int]:
    """The number of live tensors, and their bytes, after some steps; others, of other tests, are left out."""
    for batch in batches(10) * (steps // 10):
        opt.zero_grad()
        backward(model, batch)
        opt.step(batch=batch)
    opt.zero_grad()
    del batch
    known = set(map(id, others))
    found = [tensor for tensor in tensors() if id(tensor) not in known]
    return len(found), sum(t.untyped_storage().nbytes() for t in found if t.device.type == "cpu")


@pytest.mark.parametrize("build", [BASES["torch"], BASES["rule"]], ids=["torch", "rule"])
def test_flat_over_a_thousand_steps(build: Any) -> None:
    """One call in ten is a meta-step; the record alone grows, by floats."""
    others = tensors()
    model = net()
    opt = apo.APO(model, build(model), F.cross_entropy, objective=OBJECTIVE)
    early = run(model, opt, 100, others)
    assert run(model, opt, 1000, others) == early
    assert len(opt.record) == 110


@pytest.mark.parametrize(("by", "lookahead"), [("global", "no-momentum"), ("parameter", "step")])
@pytest.mark.parametrize("build", BASES.values(), ids=BASES)
def test_no_graph_survives_a_step(build: Any, lookahead: Any, by: str) -> None:
    """Neither in what lives, nor in cycles that wait for the collector."""
    model = net()
    meta = apo.Newton(every=2)
    objective = apo.Proximal(fsd=0.1, wsd=0.1, lookahead=lookahead)
    opt = apo.APO(model, build(model), F.cross_entropy, tune={"lr": by}, meta=meta, objective=objective)
    before = {id(t) for t in tensors() if t.grad_fn is not None}
    gc.disable()
    try:
        for batch in batches(3):
            opt.zero_grad()
            backward(model, batch)
            opt.step(batch=batch)
            alive = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
            assert [t.shape for t in alive if t.grad_fn is not None and id(t) not in before] == []
    finally:
        gc.enable()
    assert all(t.grad_fn is None for p in model.parameters() for t in opt.state[p].values() if isinstance(t, Tensor))


def test_no_batch_is_kept_longer_than_it_serves() -> None:
    """Not after a meta-step, and between meta-steps only the one that will be B'."""
    import weakref

    model = net()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, objective=OBJECTIVE, meta=apo.Newton(3))
    alive: list[list[bool]] = []
    seen: list[Any] = []
    for seed in range(5):
        x, y = batches(1, seed=seed)[0]
        opt.zero_grad()
        backward(model, (x, y))
        opt.step(batch=(x, y))
        seen.append(weakref.ref(x))
        del x, y
        opt.zero_grad()
        alive.append([ref() is not None for ref in seen])
    assert [sum(row) for row in alive] == [0, 0, 1, 0, 0]


def test_the_gradient_of_the_user_is_the_same_tensor() -> None:
    model = net()
    opt = apo.APO(model, apo.adam(), F.cross_entropy, meta=apo.Newton(every=1))
    (batch,) = batches(1)
    backward(model, batch)
    grads = [p.grad for p in model.parameters()]
    opt.step(batch=batch)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def wide() -> nn.Sequential:
    """A model of layers of one size, whose weights are most of what a step holds."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(200, 200) for _ in range(12)), nn.Linear(200, 3))


def peak(build: Callable[[nn.Module], Any], meta: apo.Newton | None, **objective: Any) -> float:
    """The most bytes that live at once in later meta-steps, in copies of the weights; no meta is the bare optimizer."""
    model = wide()
    base = build(model)
    opt = base
    if meta is not None:
        opt = apo.APO(model, base, F.cross_entropy, objective=apo.Proximal(**objective), meta=meta)
    with Counting() as counting:
        for number in range(8):
            x, y = torch.randn(4, 200), torch.randint(3, (4,))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if number > 2:  # the state is there, and nothing is searched any more
                counting.peak = counting.live
            opt.step() if meta is None else opt.step(batch=(x, y))
    return counting.peak / sum(p.nbytes for p in model.parameters())


PEAKS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: o.SGD(m.parameters(), lr=1e-3),
    "adam": lambda m: o.Adam(m.parameters(), lr=1e-3),
    "adamw": lambda m: o.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda m: o.RMSprop(m.parameters(), lr=1e-3),
}


@pytest.mark.parametrize("curvature", ["gradients", "losses"])
@pytest.mark.parametrize("objective", [{}, {"fsd": 0.1, "wsd": 0.1}], ids=str)
@pytest.mark.parametrize("build", PEAKS.values(), ids=PEAKS)
def test_a_meta_step_holds_one_copy_of_the_weights(
    build: Any, objective: dict[str, Any], curvature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it what is of one layer, a thirteenth of the weights: its gradient, its displacement. None is kept."""
    monkeypatch.setattr("apo.pieces.PIECE", {"cpu": 200 * 200})
    newton = apo.Newton(every=1, curvature=curvature)
    assert peak(build, newton, **objective) < peak(build, None) + 1.0 + 3 / 13


def test_a_rule_holds_its_old_state_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes out of place; what has been computed is written piece by piece."""
    monkeypatch.setattr("apo.pieces.PIECE", {"cpu": 200 * 200})
    bare = peak(PEAKS["adam"], None)
    assert peak(lambda m: apo.adam(lr=1e-3), apo.Newton(every=1)) < bare + 1.0 + 2.0 + 3 / 13
