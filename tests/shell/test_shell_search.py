"""The scale of the first step is searched before it stays, and later steps may be shortened."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from apo.newton import search, shorten
from tests.cases import randn
from tests.shell.helpers import TORCH_BASES, Base, batches, net, state, traces, train, weights

o = torch.optim
every_base = pytest.mark.parametrize("base", TORCH_BASES, ids=[base.name for base in TORCH_BASES])
pytestmark = pytest.mark.filterwarnings("ignore:the momentum of Muon")


def quadratic(best: float, calls: list[float]) -> Any:
    """A loss of 1 at scale 0, whose minimum is at a scale."""

    def loss_at(scale: float) -> float:
        calls.append(scale)
        return (1.0 - scale / best) ** 2

    return loss_at


@pytest.mark.parametrize("best", [1e-9, 1e-3, 0.1, 1.0, 30.0, 1e4, 1e9])
def test_a_search_ends_short_of_the_best_scale(best: float) -> None:
    """At no more than half of it and at no less than 1/40, in at most 21 losses."""
    calls: list[float] = []
    scale = search(quadratic(best, calls), 1.0, -2.0 / best, 1e-6)
    assert best / 40 <= scale <= best / 2
    assert len(calls) <= 21
    assert scale in calls


def test_a_search_without_end_is_bounded() -> None:
    calls: list[float] = []
    for endless in (lambda s: calls.append(s) or 1.0, lambda s: calls.append(s) or 1.0 - s):
        calls.clear()
        assert search(endless, 1.0, -1.0, 1e-6) == 1.0, "nothing to find"
        assert len(calls) == 21
    calls.clear()
    assert search(lambda s: calls.append(s) or float("nan"), 1.0, -1.0, 1e-6) == 4.0**-20
    assert len(calls) == 21


def test_shortening_takes_the_first_scale_that_does_no_harm() -> None:
    assert shorten(lambda s: (1.0 - s / 0.01) ** 2, 1.0) == 4.0**-3
    assert shorten(lambda s: 2.0, 1.0) == 4.0**-6


@pytest.mark.parametrize("start", [1e-5, 1e3])
@every_base
def test_the_first_step_that_stays_is_a_step_at_the_searched_rate(base: Base, start: float) -> None:
    """Weights, state, buffers, random numbers: as if the base had been given that learning rate."""
    (batch,) = batches(1)
    model = net()
    built = base.build(model)
    for opt in built if isinstance(built, list) else [built]:
        for group in opt.param_groups:
            group["lr"] *= start
    opt = apo.APO(model, built, F.cross_entropy, tune={"lr": apo.Tune(max_change=1.0 + 1e-12)})
    torch.manual_seed(1)
    train(model, opt, [batch])
    row = opt.record[0]
    rates = [group["lr"] * opt.param_groups[0]["lr_factor"] for group in opt.param_groups]
    assert row["scale"] != 1.0
    assert row["evaluations"] >= 2.0
    twin = net()
    built = base.build(twin)
    opts = built if isinstance(built, list) else [built]
    for group, rate in zip((g for b in opts for g in b.param_groups), rates, strict=True):
        group["lr"] = rate
    torch.manual_seed(1)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    for b in opts:
        b.step()
    assert traces(model) == traces(twin)
    assert state(model, [opt]) == state(twin, opts)
    assert weights(model) == weights(twin)
    assert opt.param_groups[0]["lr_factor"] == pytest.approx(row["scale"], rel=1e-9)


@pytest.mark.parametrize(("judged", "lr"), [("steady", 1e-4), ("no-momentum", 1e-3), ("step", 1e-3)])
def test_the_search_allows_for_a_momentum_that_has_not_built_up(judged: Any, lr: float) -> None:
    """What stays is the searched scale over 1 / (1 − μ), unless that is in what is judged; the first step is g."""
    scales = []
    for momentum, rate in ((0.0, 1e-3), (0.9, lr)):
        torch.manual_seed(0)
        model = nn.Linear(6, 3).double()
        base, objective = o.SGD(model.parameters(), lr=rate, momentum=momentum), apo.Proximal(lookahead=judged)
        opt = apo.APO(model, base, F.cross_entropy, objective=objective)
        train(model, opt, batches(1, dtype=torch.float64))
        scales.append(opt.record[0]["scale"])
    assert scales[0] == pytest.approx((1.0 if judged == "steady" else 10.0) * scales[1], rel=1e-9)


def test_the_search_allows_for_a_schedule() -> None:
    """At 1% of a warm-up the tuned learning rate is the searched one, and the step 1% of it."""
    rates = []
    for relative in (None, lambda steps: 0.01):
        torch.manual_seed(0)
        model = nn.Linear(6, 3).double()
        opt = apo.APO(
            model,
            o.SGD(model.parameters(), lr=0.4096 if relative is None else 40.96),
            F.cross_entropy,
            relative=relative,
            tune={"lr": apo.Tune(max_change=1.0 + 1e-12)},
        )
        before = [p.detach().clone() for p in model.parameters()]
        train(model, opt, batches(1, dtype=torch.float64))
        moved = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(model.parameters(), before, strict=True)])
        rates.append((opt.hypers()["lr"], moved.norm().item()))
    assert rates[1][0] == pytest.approx(rates[0][0], rel=1e-9)
    assert rates[1][1] == pytest.approx(0.01 * rates[0][1], rel=1e-9)


@pytest.mark.parametrize("options", [{"meta": "paper"}, {"meta": apo.Newton(search=False)}, {"tune": {}}])
def test_no_search_where_none_is_wanted(options: dict[str, Any]) -> None:
    model = net()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, **options)
    train(model, opt, batches(1))
    assert [row["scale"] for row in opt.record] == [1.0] * len(opt.record)
    assert all(row["evaluations"] <= 1.0 for row in opt.record), "the start of the step, for Newton"


def test_only_the_first_step_is_searched_and_none_after_a_resume() -> None:
    model = net()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-4), F.cross_entropy, meta=apo.Newton(every=1))
    train(model, opt, batches(3))
    assert [row["scale"] == 1.0 for row in opt.record] == [False, True, True]
    twin = net()
    again = apo.APO(twin, o.SGD(twin.parameters(), lr=1e-4), F.cross_entropy, meta=apo.Newton(every=1))
    again.load_state_dict(opt.state_dict())
    train(twin, again, batches(1))
    assert [row["scale"] for row in again.record] == [1.0]


def test_a_resume_from_a_bare_checkpoint_searches_nothing() -> None:
    model = net()
    bare = o.AdamW(model.parameters(), lr=1e-4)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    bare.step()
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1.0), F.cross_entropy)
    opt.load_state_dict(bare.state_dict())
    train(model, opt, batches(1))
    assert opt.record[0]["scale"] == 1.0
    assert opt.hypers()["lr"] <= 1.11e-4


def test_the_bounds_hold_during_the_search() -> None:
    for low, high, start in ((None, 2e-3, 1e-4), (0.5, None, 30.0)):
        model = net()
        tune = {"lr": apo.Tune(low=low, high=high, max_change=1.0001)}
        opt = apo.APO(model, o.SGD(model.parameters(), lr=start), F.cross_entropy, tune=tune)
        train(model, opt, batches(1))
        assert opt.hypers()["lr"] == pytest.approx(high or low, rel=1e-3)
        assert opt.record[0]["scale"] == pytest.approx((high or low) / start, rel=1e-6)


class Cliff(nn.Module):
    """½‖θ‖² times a stiffness."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(randn(5, seed=1))

    def forward(self, stiffness: torch.Tensor) -> torch.Tensor:
        return stiffness * self.theta.square().sum() / 2


def test_a_step_that_harms_its_own_batch_is_shortened() -> None:
    """After some meta-steps on a mild loss comes a stiff one: the step and the learning rate shrink together."""
    model = Cliff()
    opt = apo.APO(
        model,
        o.SGD(model.parameters(), lr=0.5),
        evaluate=lambda m, b: (m(b), None),
        meta=apo.Newton(every=1, search=False, growth=1.0001, average=0.999),
    )
    mild, stiff = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1e4, dtype=torch.float64)
    for batch in [*[mild] * 4, stiff]:
        before, rate = model.theta.detach().clone(), opt.hypers()["lr"]
        opt.zero_grad()
        model(batch).backward()
        opt.step(batch=batch)
    row = opt.record[-1]
    assert row["scale"] == pytest.approx(4.0**-6, rel=1e-12)
    assert row["evaluations"] == 7.0
    assert opt.hypers()["lr"] == pytest.approx(rate * 4.0**-6, rel=1e-9)
    torch.testing.assert_close(model.theta.detach(), before - rate * 4.0**-6 * 1e4 * before, rtol=1e-9, atol=0.0)


def test_a_loss_that_is_not_finite_does_not_end_the_watch() -> None:
    """A batch with a NaN, then a stiff one."""
    model = Cliff()
    meta = apo.Newton(every=1, search=False, growth=1.0001, average=0.999)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.5), evaluate=lambda m, b: (m(b), None), meta=meta)
    values = [1.0, 1.0, 1.0, 1.0, float("nan"), 1.0, 1e4]
    for value in values:
        batch = torch.tensor(value, dtype=torch.float64)
        opt.zero_grad()
        model(torch.nan_to_num(batch, 1.0)).backward()
        if value != value:
            with pytest.warns(UserWarning, match="not finite: the meta-step is skipped"):
                opt.step(batch=batch)
        else:
            opt.step(batch=batch)
    assert opt.record[-1]["scale"] < 1.0


def test_weights_of_the_losses_are_exact() -> None:
    """Every loss of the search is taken with the weights back and forth: the weights end on the line of the step."""
    model = net(dropout=0.0)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-6), F.cross_entropy)
    before = weights(model)
    train(model, opt, batches(1))
    assert weights(model) != before
