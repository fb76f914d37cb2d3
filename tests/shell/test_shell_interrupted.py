"""An error of the user's code before the commit leaves everything as it was, and one after it the bare step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import (
    TORCH_BASES,
    Base,
    backward,
    batches,
    everything,
    net,
    optimizers,
    state,
    traces,
    train,
    weights,
)

every_error = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
BASES = [*TORCH_BASES, Base("rule-adam", lambda _: apo.adam(lr=1e-2)), Base("rule-sgd", lambda _: apo.sgd(0.1, 0.9))]
every_base = pytest.mark.parametrize("base", BASES, ids=[base.name for base in BASES])
pytestmark = pytest.mark.filterwarnings("ignore:the momentum of Muon")


class Trap:
    """A loss that raises at its n-th evaluation from now on, after it has disturbed what it can."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.left, self.error = model, -1, RuntimeError

    def set(self, calls: int, error: type[BaseException]) -> None:
        self.left, self.error = calls, error

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.model.eval()
            self.model[1].running_mean.add_(1.0)
            torch.rand(3)
            raise self.error("trapped")
        return F.cross_entropy(outputs, target)


def trapped(base: Base, **options: Any) -> tuple[nn.Module, apo.APO, Trap]:
    model = net()
    trap = Trap(model)
    return model, apo.APO(model, base.build(model), trap, **options), trap


@every_error
@pytest.mark.parametrize("calls", [1, 2, 3])
@every_base
def test_in_the_search(base: Base, calls: int, error: type[BaseException]) -> None:
    model, opt, trap = trapped(base)
    (batch,) = batches(1)
    backward(model, batch)
    before = everything(model, opt)
    trap.set(calls, error)
    with pytest.raises(error, match="trapped"):
        opt.step(batch=batch)
    assert everything(model, opt) == before
    assert len(opt.record) == 0
    assert opt.due
    opt.step(batch=batch)
    assert len(opt.record) == 1, "the search can be tried again"


@every_error
@every_base
def test_on_the_other_batch_before_the_step(base: Base, error: type[BaseException]) -> None:
    """The outputs on B' at θ are the first thing that a meta-step takes."""
    model = net()
    fail: list[bool] = []

    def forward(inner: nn.Module, batch: Any) -> Tensor:
        if fail:
            raise error("trapped")
        return inner(batch[0])

    meta, objective = apo.Newton(every=2, search=False), apo.Proximal(fsd=0.5)
    opt = apo.APO(model, base.build(model), F.cross_entropy, forward=forward, objective=objective, meta=meta)
    data = batches(3)
    train(model, opt, data[:2])
    opt.zero_grad()
    backward(model, data[2])
    before = everything(model, opt)
    fail.append(True)
    with pytest.raises(error, match="trapped"):
        opt.step(batch=data[2])
    assert everything(model, opt) == before
    fail.clear()
    opt.step(batch=data[2])
    assert len(opt.record) == 2


@every_error
@pytest.mark.parametrize("meta", [apo.Newton(every=2, search=False), apo.Gradient(torch.optim.SGD, lr=0.1, every=2)])
@every_base
def test_in_the_evaluation(base: Base, meta: Any, error: type[BaseException]) -> None:
    """Exactly the bare step is done, and the next meta-step is in its turn."""
    model, opt, trap = trapped(base, meta=meta)
    data = batches(5)
    train(model, opt, data[:2])
    twin = net()
    bare = apo.APO(twin, base.build(twin), F.cross_entropy, meta=meta)
    torch.manual_seed(0)
    bare.load_state_dict(copy.deepcopy(opt.state_dict()))
    twin.load_state_dict(model.state_dict())
    bare.freeze()
    for m, shell in ((model, opt), (twin, bare)):
        torch.manual_seed(8)
        m.zero_grad()
        backward(m, data[2])
        hypers = opt.hypers()
        trap.set(1 + isinstance(meta, apo.Newton), error)  # before, Newton takes the loss of the training's outputs
        if shell is opt:
            with pytest.raises(error, match="trapped"):
                shell.step(batch=data[2])
        else:
            shell.step(batch=data[2])
    assert weights(model) == weights(twin)
    assert traces(model) == traces(twin)
    assert state(model, [opt]) == state(twin, [bare])
    assert opt.hypers() == hypers
    trap.set(-1, error)
    rows = len(opt.record)
    train(model, opt, data[3:5])
    assert opt.record.column("step")[rows:] == [4.0]


@every_error
def test_in_a_closure(error: type[BaseException]) -> None:
    model, opt, _ = trapped(TORCH_BASES[0])
    before = everything(model, opt)

    def closure() -> float:
        raise error("trapped")

    with pytest.raises(error, match="trapped"):
        opt.step(closure)
    assert everything(model, opt) == before


def fail_once(model: nn.Module, opt: apo.APO, trap: Trap, batch: Any, feed: Callable[[Any], None] | None) -> None:
    opt.zero_grad()
    if feed:
        feed(batch)
    backward(model, batch)
    trap.set(2, RuntimeError)  # in the judgement
    with pytest.raises(RuntimeError, match="trapped"):
        opt.step(batch=None if feed else batch)


@pytest.mark.parametrize("feeding", [True, False])
def test_a_batch_of_a_failed_evaluation_is_not_judged_again(feeding: bool) -> None:
    """The step that the batch belonged to is done; the next meta-step is on its own batch alone."""
    runs = []
    for fails in (True, False):
        model, opt, trap = trapped(TORCH_BASES[0], meta=apo.Newton(every=1, search=False))
        seen: list[int] = []
        opt._evaluation.forward = lambda m, b, seen=seen: seen.append(len(b[0])) or m(b[0])
        first, second = batches(1, size=5)[0], batches(1, size=9)[0]
        if fails:
            fail_once(model, opt, trap, first, opt.feed if feeding else None)
        else:
            train(model, opt, [first])
        seen.clear()
        trap.set(-1, RuntimeError)
        train(model, opt, [second])
        runs.append(set(seen))
    assert runs[0] == runs[1] == {9}


@pytest.mark.parametrize("base", [TORCH_BASES[0]], ids=["sgd"])
def test_a_bad_batch_leaves_the_optimizers_alone(base: Base) -> None:
    """One that the model cannot take, and one without targets."""
    model = net()
    opt = apo.APO(model, base.build(model), F.cross_entropy)
    (batch,) = batches(1)
    backward(model, batch)
    before = everything(model, opt)
    for bad, reason in (
        ((torch.ones(4, 5), batch[1]), "mat1 and mat2"),
        (batch[:1], r"no targets in a tuple of 1: pass target="),
        ([batch[0]], r"no targets in a list of 1: pass target="),
        (batch[0], r"a batch must be a sequence or a mapping, not shape \(12, 6\); pass forward="),
        (7, "a batch must be a sequence or a mapping, not a int"),
    ):
        with pytest.raises((TypeError, RuntimeError), match=reason):
            opt.step(batch=bad)
        assert everything(model, opt) == before
    assert len(optimizers(base.build(model))) == 1


@every_error
def test_in_the_step_after_the_judgement(error: type[BaseException]) -> None:
    """A step that is taken only after it has been judged, and searched, may still fail: then nothing has moved."""

    def refuse(*_: Any) -> None:
        raise error("refused")

    model = net()
    opt = apo.APO(model, torch.optim.AdamW(model.parameters(), lr=1e-4), F.cross_entropy)
    ((x, y),) = batches(1)
    backward(model, (x, y))
    before, hypers = weights(model), opt.hypers()
    hook = opt._bases[0].optimizer.register_step_pre_hook(refuse)
    with pytest.raises(error, match="refused"):
        opt.step(batch=(x, y))
    hook.remove()
    assert weights(model) == before
    assert opt.hypers() == hypers and len(opt.record) == 0 and not opt._tuning.searched
    opt.step(batch=(x, y))  # and it searches yet
    assert opt.hypers()["lr"] > 2e-4
