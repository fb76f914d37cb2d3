"""What schedulers write besides learning rates: momenta, and learning rates that are tensors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler as s

import apo
from tests.shell.helpers import batches, entries, matrices, net, o, train, vectors, weights
from tests.training.test_schedulers import META, SCHEDULERS, STEPS, Optimizer, cycles, one_cycle


def test_cycled_momentum_is_that_of_the_step_and_not_of_the_judgement() -> None:
    """With betas and momentum cycled by hand on a bare twin, weights agree; along g alone, slopes do not see them."""
    slopes = []
    for cycle in (True, False):
        model = net(dropout=0.0)
        opt = apo.APO(
            model,
            o.SGD(model.parameters(), lr=1e-2, momentum=0.9),
            F.cross_entropy,
            objective=apo.Proximal(lookahead="no-momentum"),
            meta=apo.Gradient(o.SGD, lr=0.0, every=1),
        )
        scheduler = s.CyclicLR(opt, 1e-2, 2e-2, step_size_up=4, cycle_momentum=cycle)
        twin = net(dropout=0.0)
        bare = o.SGD(twin.parameters(), lr=1e-2, momentum=0.9)
        for x, y in batches(5):
            group = opt.param_groups[0]
            bare.param_groups[0].update(lr=group["lr"], momentum=group["momentum"])
            train(model, opt, [(x, y)])
            bare.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            bare.step()
            g = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
            assert opt.record[-1]["slope"] == pytest.approx(-(group["lr"] * g @ g).item(), rel=1e-3)
            assert weights(model) == weights(twin)
            scheduler.step()
        assert (group["momentum"] == 0.9) != cycle
        slopes.append([entries(opt.state[p]) for p in model.parameters()])
    assert slopes[0] != slopes[1]


@pytest.mark.parametrize("make", [one_cycle, SCHEDULERS["CyclicLR"]])
def test_momentum_that_cannot_be_cycled_is_refused(make: Callable[[Optimizer], Any]) -> None:
    """By torch where the optimizer has none (or not all of a list have), and by us where a rule leaves it out."""

    def forced(opt: Optimizer) -> Any:
        assert cycles(opt) is ("momentum" in opt.defaults)
        return s.OneCycleLR(opt, max_lr=0.05, total_steps=STEPS)

    model = net()
    mixed = [o.SGD(matrices(model), lr=0.1, momentum=0.9), o.AdamW(vectors(model))]
    for base in (apo.adamw(lr=1e-3), mixed):
        with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
            forced(apo.APO(model, base, F.cross_entropy, meta=META))
    opt = apo.APO(model, apo.sgd(lr=1e-3), F.cross_entropy, meta=META)
    make(opt)
    before = weights(model)
    with pytest.raises(ValueError, match=r"a group has momentum=0\.9.*make the rule with a positive momentum"):
        train(model, opt, batches(1))
    assert weights(model) == before


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor() -> None:
    """One that torch shares between groups is separated, so that their learning rates can differ."""
    model = net(dropout=0.0)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    groups = [{"params": matrices(model)}, {"params": vectors(model), "weight_decay": 0.0}]
    base = o.AdamW(groups, lr=rate, foreach=False)
    assert base.param_groups[0]["lr"] is base.param_groups[1]["lr"]
    twin = net(dropout=0.0)
    theirs = zip(groups, (matrices, vectors), strict=True)
    plain = o.AdamW([{**g, "params": f(twin), "lr": rate.clone()} for g, f in theirs], foreach=False)
    tune = {"lr": "group"}
    runs = [
        (m, apo.APO(m, b, F.cross_entropy, tune=tune, meta=apo.Gradient(o.SGD, lr=0.3, every=2)))
        for m, b in ((model, base), (twin, plain))
    ]
    for m, opt in runs:
        train(m, opt, batches(6))
    assert base.param_groups[0]["lr"] is rate
    assert [float(group["lr"]) for group in base.param_groups] == [1e-2, 1e-2]
    assert weights(model) == weights(twin)
    assert runs[0][1].hypers() == runs[1][1].hypers()
    assert len(set(runs[0][1].hypers().values())) == 2
    assert all(math.isfinite(value) for value in runs[0][1].hypers().values())
