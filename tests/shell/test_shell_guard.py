"""Steps along curvature that has just been measured are guarded: shortened where they make their own batch worse."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apo
from tests.cases import bits
from tests.shell.helpers import Batch, backward, batches, net, train


def made(**options: object) -> tuple[torch.nn.Module, apo.APO]:
    model = net(dropout=0.0)
    rule = apo.kfac(model, lr=0.01, damping=0.05, every=4)
    return model, apo.APO(model, rule, F.cross_entropy, meta=apo.Newton(every=10, search=False), **options)  # type: ignore[arg-type]


def disturbed(model: torch.nn.Module, opt: apo.APO, batch: Batch) -> tuple[Tensor, float]:
    """A step whose gradient points the wrong way, and far; the weights after it, and the loss on its batch."""
    opt.zero_grad()
    backward(model, batch)
    for p in model.parameters():
        p.grad = -3000.0 * p.grad
    opt.step(batch=batch)
    with torch.no_grad():
        return model[0].weight.clone(), F.cross_entropy(model(batch[0]), batch[1]).item()


@pytest.mark.parametrize("fisher_step", [13, 18])
def test_shortens_a_step_and_the_learning_rate(fisher_step: int) -> None:
    """Neither is a meta-step (0, 10, 20): both are preceded by an observation."""
    model, opt = made()
    train(model, opt, batches(fisher_step))
    before, weight, batch = opt.hypers()["lr"], model[0].weight.detach().clone(), batches(1, seed=8)[0]
    assert opt.due
    rows = len(opt.record)
    after, loss = disturbed(model, opt, batch)
    assert opt.hypers()["lr"] <= before / 4
    assert loss < 20.0
    assert not torch.equal(after, weight)
    assert opt.param_groups[0]["effective_lr"] == pytest.approx(opt.hypers()["lr"])
    assert len(opt.record) == rows  # it is no meta-step


def test_leaves_alone_what_is_not_guarded() -> None:
    for options in ({"tune": {}}, {"tune": {"damping": "global"}}):
        model, opt = made(**options)
        train(model, opt, batches(18))
        lr = opt.param_groups[0]["effective_lr"]
        disturbed(model, opt, batches(1, seed=8)[0])
        assert opt.param_groups[0]["effective_lr"] == lr
    model, opt = made()
    train(model, opt, batches(18))
    opt.freeze()
    lr = opt.hypers()["lr"]
    disturbed(model, opt, batches(1, seed=8)[0])
    assert opt.hypers()["lr"] == lr


def test_a_good_step_is_the_bare_one() -> None:
    """Between meta-steps the guard changes nothing: the run is that of the same learning rates without it."""
    model, opt = made()
    other, plain = made(tune={})
    for number, batch in enumerate(batches(10)):
        for m, o in ((model, opt), (other, plain)):
            o.zero_grad()
            backward(m, batch)
            o.step(batch=batch)
        if number == 0:
            plain.param_groups[0]["lr"] = opt.hypers()["lr"]
        assert [bits(p) for p in model.parameters()] == [bits(p) for p in other.parameters()]
