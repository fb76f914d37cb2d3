"""Optimizers within optimizers: inner loops in an evaluation or a closure, and two on parts of one model."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.shell.helpers import backward, batches, everything, net, traces, weights

o = torch.optim
EVERY = apo.Newton(every=1)


def taught(batch: Any, inner: str) -> nn.Module:
    """A teacher after three inner steps; an evaluation may be of values alone, so the loop asks for graphs."""
    teacher = net(seed=3, dropout=0.0)
    base = o.SGD(teacher.parameters(), lr=0.05)
    opt = apo.APO(teacher, base, F.cross_entropy, meta=apo.Newton(every=2, search=False)) if inner == "apo" else base
    with torch.enable_grad():
        for step in range(3):
            opt.zero_grad()
            backward(teacher, batch)
            if isinstance(opt, apo.APO):
                opt.step(batch=batch)
                assert len(opt.record) == 1 + step // 2
            else:
                opt.step()
    return teacher


@pytest.mark.parametrize("inner", ["apo", "bare"])
def test_an_inner_loop_in_an_evaluation(inner: str) -> None:
    """Distillation from a teacher that is trained within: the same as if it had been trained before."""
    found = []
    for within in (True, False):
        model = net(dropout=0.0)
        ready: dict[torch.Tensor, nn.Module] = {}

        def evaluate(
            m: nn.Module, batch: Any, within: bool = within, ready: dict[torch.Tensor, nn.Module] = ready
        ) -> tuple[Any, None]:
            teacher = taught(batch, inner) if within else ready[batch[0]]
            with torch.no_grad():
                target = copy.deepcopy(teacher)(batch[0]).softmax(1)
            return F.cross_entropy(m(batch[0]), target), None

        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), evaluate=evaluate, meta=EVERY)
        for batch in batches(3):
            opt.zero_grad()
            with torch.random.fork_rng():
                ready[batch[0]] = taught(batch, inner)
            evaluate(model, batch, within=False)[0].backward()
            before = traces(model)
            opt.step(batch=batch)
            assert traces(model) == before
        found.append((weights(model), list(opt.record)))
    assert found[0] == found[1]
    assert len(found[0][1]) == 3


def test_the_inner_loop_knows_its_own_forwards() -> None:
    """Its dropout masks are those of its own gradients, though an evaluation is under way."""
    model, seen = net(), []

    def evaluate(m: nn.Module, batch: Any) -> tuple[Any, Any]:
        twin = net(seed=3)
        opt = apo.APO(twin, o.SGD(twin.parameters(), lr=0.01), F.cross_entropy, meta=EVERY)
        for _ in range(2):
            opt.zero_grad()
            backward(twin, batch)
            seen.append([fed.conditions is not None for fed in opt._feeding.paired(batch)])
            opt.step(batch=batch)
        out = m(batch[0])
        return F.cross_entropy(out, batch[1]), out

    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), evaluate=evaluate, meta=apo.Newton(every=1, search=False))
    (batch,) = batches(1)
    backward(model, batch)
    opt.step(batch=batch)
    assert seen == 3 * [[True], [True]], "at the end of the step, and twice at its start"


INSIDE: dict[str, Any] = {
    "itself": lambda model, opts: opts[0].step(),
    "another": lambda model, opts: apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy).step(),
    "bare": lambda model, opts: o.SGD([model[0].weight], lr=0.1).step(),
}


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("act", INSIDE.values(), ids=INSIDE)
def test_a_step_on_what_is_being_judged_is_refused(act: Any, search: bool) -> None:
    """As an error of the evaluation: before the commit nothing has happened, after it the bare step."""
    model, opts, on = net(), [], [False]

    def evaluate(m: nn.Module, batch: Any) -> tuple[Any, Any]:
        if on[0]:
            act(m, opts)
        out = m(batch[0])
        return F.cross_entropy(out, batch[1]), out

    opts.append(
        apo.APO(model, o.SGD(model.parameters(), lr=0.1), evaluate=evaluate, meta=apo.Newton(every=1, search=search))
    )
    first, second = batches(2)
    backward(model, first)
    bare = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    on[0], before = True, everything(model, opts[0])
    with pytest.raises(
        RuntimeError, match=r"step\(\) was called inside an evaluation, on the parameters that are being"
    ):
        opts[0].step(batch=first)
    if search:
        assert everything(model, opts[0]) == before
    else:
        torch.testing.assert_close(list(model.parameters()), bare, atol=1e-7, rtol=1e-6)
        assert opts[0].hypers() == {"lr": 0.1}
    on[0] = False
    opts[0].zero_grad()
    backward(model, second)
    opts[0].step(batch=second)
    assert len(opts[0].record) == 1


def test_a_step_in_the_closure_of_another() -> None:
    """The same as the inner step just before the outer one."""
    found = []
    for nested in (True, False):
        outer_model, inner_model = net(0), net(1)
        outer = apo.APO(outer_model, o.SGD(outer_model.parameters(), lr=0.1), F.cross_entropy, meta=EVERY)
        inner = apo.APO(inner_model, o.AdamW(inner_model.parameters(), lr=1e-3), F.cross_entropy, meta=EVERY)

        def inner_step(batch: Any, model: nn.Module = inner_model, opt: apo.APO = inner) -> None:
            opt.zero_grad()
            backward(model, batch)
            opt.step(batch=batch)

        for batch in batches(4):

            def closure(
                batch: Any = batch, model: nn.Module = outer_model, opt: apo.APO = outer, inside: bool = nested
            ) -> float:
                if inside:
                    inner_step(batch)
                opt.zero_grad()
                loss = backward(model, batch)
                opt.feed(batch)
                return loss

            if not nested:
                inner_step(batch)
            assert isinstance(outer.step(closure), float)
        found.append([weights(m) for m in (outer_model, inner_model)] + [list(outer.record), list(inner.record)])
    assert found[0] == found[1]
    assert len(found[0][2]) == len(found[0][3]) == 4


def parts(model: nn.Sequential) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The body of the model, and its head."""
    return [*model[0].parameters(), *model[1].parameters()], list(model[5].parameters())


def test_two_on_disjoint_parameters_of_one_model() -> None:
    """Each is fed, judged and tuned apart; the second is judged at the weights that the first has left."""
    model = net().double()
    body, head = parts(model)
    meta = apo.Gradient(o.SGD, lr=1e-4, every=1)
    opts = [
        apo.APO(model, o.SGD(body, lr=0.2), F.cross_entropy, meta=meta),
        apo.APO(model, o.RMSprop(head, lr=0.01), F.cross_entropy, meta=meta),
    ]
    for batch in batches(4, dtype=torch.float64):
        model.zero_grad()
        rng = torch.get_rng_state()
        backward(model, batch)
        grads = [p.grad.clone() for p in model.parameters()]
        for opt in opts:
            start, (low, high) = copy.deepcopy((model.state_dict(), opt._optimizers[0].state_dict())), (-1e-4, 1e-4)
            q = []
            for shift in (low, 0.0, high):
                twin = net().double()
                twin.load_state_dict(start[0])
                own = parts(twin)[opts.index(opt)]
                base = type(opt._optimizers[0])(own, lr=0.1)
                base.load_state_dict(copy.deepcopy(start[1]))
                base.param_groups[0]["lr"] = opt.hypers()["lr"] * math.exp(shift)
                for p, grad in zip(twin.parameters(), grads, strict=True):
                    p.grad = grad
                base.step()
                with torch.random.fork_rng():
                    torch.set_rng_state(rng)
                    q.append(F.cross_entropy(twin(batch[0]), batch[1]).item())
            before, lr = traces(model), opt.hypers()["lr"]
            opt.step(batch=batch)
            assert traces(model) == before
            assert opt.record[-1]["loss"] == pytest.approx(q[1], rel=1e-12)
            slope = math.log(lr / opt.hypers()["lr"]) / 1e-4
            assert slope == pytest.approx((q[2] - q[0]) / 2e-4, rel=1e-5, abs=1e-9)
    assert [len(opt.record) for opt in opts] == [4, 4]


def test_two_on_the_same_parameters_are_two_optimizers() -> None:
    """Each judges its own step: as two bare optimizers that take turns."""
    model, twin = net(dropout=0.0), net(dropout=0.0)
    opts = [apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=EVERY) for _ in range(2)]
    for opt in opts:
        opt._tuning.searched = True
    bare = [o.SGD(twin.parameters(), lr=0.1) for _ in range(2)]
    for i, batch in enumerate(batches(6)):
        opt, plain = opts[i % 2], bare[i % 2]
        plain.param_groups[0]["lr"] = opt.hypers()["lr"]
        for m, stepper in ((model, opt), (twin, plain)):
            stepper.zero_grad()
            backward(m, batch)
        opt.step(batch=batch)
        plain.param_groups[0]["lr"] = opt.param_groups[0]["effective_lr"]
        plain.step()
        assert weights(model) == weights(twin)
    assert [len(opt.record) for opt in opts] == [3, 3]
