"""The tuned learning rate is where closed forms say, and schedules on top are left alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.meta import parse_meta
from tests.cases import randn, spd

FREE = {"search": False, "backtrack": False, "growth": 1e9, "shrink": 1e9, "average": 0.0, "relaxation": 1.0}


class Point(nn.Module):
    """½θᵀHθ for an input of ones, whatever the batch."""

    def __init__(self, hessian: Tensor, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.register_buffer("hessian", hessian)

    def forward(self, scale: Tensor) -> Tensor:
        return scale * (self.theta @ self.hessian @ self.theta) / 2


def hold(model: nn.Module, opt: apo.APO, steps: int, loss: Callable[[], Tensor], batch: Any, **fed: Any) -> None:
    """Meta-steps with the parameters put back after each."""
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step(batch=batch, **fed)
        with torch.no_grad():
            for p, kept in zip(model.parameters(), start, strict=True):
                p.copy_(kept)


HESSIAN, START = spd(6, seed=1), randn(6, seed=2)
LR = 0.05
ONE = torch.ones((), dtype=torch.float64)
GRADIENT = HESSIAN @ START


def point(base: Callable[[nn.Module], Any], **options: Any) -> tuple[Point, apo.APO]:
    model = Point(HESSIAN, START)
    options = {"objective": apo.Proximal(lookahead="no-momentum"), **options}
    opt = apo.APO(model, base(model), evaluate=lambda m, b: (m(b), m(b)), **options)
    return model, opt


def hold_point(model: Point, opt: apo.APO, steps: int) -> None:
    hold(model, opt, steps, lambda: model(ONE), ONE)


BASES: dict[str, Callable[[nn.Module], Any]] = {
    "rule": lambda model: apo.sgd(lr=LR),
    "torch": lambda model: torch.optim.SGD(model.parameters(), lr=LR),
    "rule-momentum": lambda model: apo.sgd(lr=LR, momentum=0.9, nesterov=True),
    "torch-momentum": lambda model: torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


@pytest.mark.parametrize("wsd", [0.0, 0.8])
@every_base
def test_newton_is_there_after_one_meta_step(base: Any, wsd: float) -> None:
    """GᵀG / Gᵀ(H + λI)G, with momentum too, as it stays out of the judgement."""
    model, opt = point(base, objective=apo.Proximal(wsd=wsd, lookahead="no-momentum"), meta=apo.Newton(every=1, **FREE))
    best = GRADIENT @ GRADIENT / (GRADIENT @ HESSIAN @ GRADIENT + wsd * GRADIENT @ GRADIENT)
    hold_point(model, opt, 1)
    assert opt.hypers()["lr"] == pytest.approx(best.item(), rel=1e-9)
    hold_point(model, opt, 3)
    assert opt.hypers()["lr"] == pytest.approx(best.item(), rel=1e-9)


@pytest.mark.parametrize("wsd", [0.0, 0.8])
@every_base
def test_the_paper_ends_within_its_two_cycle(base: Any, wsd: float) -> None:
    meta = apo.Gradient(torch.optim.RMSprop, lr=0.1, every=1)
    model, opt = point(base, objective=apo.Proximal(wsd=wsd, lookahead="no-momentum"), meta=meta)
    best = GRADIENT @ GRADIENT / (GRADIENT @ HESSIAN @ GRADIENT + wsd * GRADIENT @ GRADIENT)
    hold_point(model, opt, 300)
    assert opt.hypers()["lr"] == pytest.approx(best.item(), rel=0.06)


def test_the_paper_is_rmsprop_on_log_lr() -> None:
    assert repr(parse_meta("paper", by_parameter=False)) == "Gradient(RMSprop, every=10, clip=None, lr=0.1)"
    assert repr(parse_meta("paper", by_parameter=True)) == "Gradient(RMSprop, every=1, clip=None, lr=0.001)"
    model, opt = point(BASES["torch"], meta="paper")
    hold_point(model, opt, 21)
    assert [row["step"] for row in opt.record] == [0.0, 10.0, 20.0]
    # Without a correction of its bias, RMSprop's first step is lr / √(1 − γ) = 1 in log lr.
    assert opt.record[0]["lr"] == pytest.approx(LR * math.e, rel=1e-6)
    assert opt.record[0]["evaluations"] == 0.0


@pytest.mark.parametrize(
    ("curvature", "fraction", "examples"),
    [("auto", None, 2), ("losses", None, 2), ("gradients", None, 5), ("auto", 1.0, 5), ("gradients", 0.3, 2)],
)
@pytest.mark.parametrize("loss_model", ["exact", "linear"])
def test_newton_on_a_linear_model_with_both_discrepancies(
    loss_model: Any, curvature: Any, fraction: float | None, examples: int
) -> None:
    """H + 2λ_FSD JᵀJ/n + λ_WSD I, with n examples in B'; the linear model of the loss has no H."""
    fsd, wsd = 0.6, 0.3
    x, y, other = randn(9, 4, seed=5), randn(9, 1, seed=6), randn(5, 4, seed=7)
    model = nn.Linear(4, 1, bias=False).double()

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().mean()

    objective = apo.Proximal(fsd=fsd, wsd=wsd, loss_model=loss_model, other_fraction=fraction)
    meta = apo.Newton(every=1, curvature=curvature, **FREE)
    opt = apo.APO(model, apo.sgd(lr=LR), loss, objective=objective, meta=meta)
    hold(model, opt, 1, lambda: loss(model(x), y), (x, y), other=(other, None))
    g = 2 * x.T @ (x @ model.weight.T.detach() - y) / 9
    other = other[:examples]
    curved = 2 * fsd * other.T @ other / examples + wsd * torch.eye(4, dtype=torch.float64)
    if loss_model == "exact":
        curved = curved + 2 * x.T @ x / 9
    assert opt.hypers()["lr"] == pytest.approx((g.T @ g / (g.T @ curved @ g)).item(), rel=1e-9)


@pytest.mark.parametrize("by", ["scheduler", "relative"])
@pytest.mark.parametrize("meta", ["newton", "gradient"])
@every_base
def test_a_schedule_on_top_is_not_undone(base: Any, meta: str, by: str) -> None:
    """The tuned learning rate is the best one, schedule apart, wherever the schedule stands."""
    chosen = apo.Newton(every=1, **FREE) if meta == "newton" else apo.Gradient(torch.optim.SGD, lr=0.4, every=1)
    best = (GRADIENT @ GRADIENT / (GRADIENT @ HESSIAN @ GRADIENT)).item()

    def ratio(step: int) -> float:
        return 0.1 + 0.05 * (step % 7)

    model, opt = point(base, meta=chosen, relative=ratio if by == "relative" else None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, ratio) if by == "scheduler" else None
    for step in range(8 if meta == "newton" else 120):
        number = opt.param_groups[0]["lr"]
        assert number == LR * (ratio(step) if scheduler else 1.0)
        tuned = opt.hypers()["lr"]
        hold_point(model, opt, 1)
        assert opt.param_groups[0]["lr"] == number, "the scheduler's number stays the scheduler's"
        assert opt.param_groups[0]["effective_lr"] == pytest.approx(tuned * ratio(step), rel=1e-12)
        if scheduler:
            scheduler.step()
        if meta == "newton":
            assert opt.hypers()["lr"] == pytest.approx(best, rel=1e-9)
    assert opt.hypers()["lr"] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(
    ("relaxation", "judged", "beyond"),
    [(None, "steady", 1.92), (None, "no-momentum", 1.92), (None, "step", 1.2), (1.5, "steady", 1.5)],
)
@pytest.mark.parametrize(("base", "first"), [("rule-momentum", 1.9), ("torch-momentum", 1.0)])
def test_newton_aims_beyond_the_minimum(base: str, first: float, relaxation: Any, judged: Any, beyond: float) -> None:
    """By 1.2, by 2 − 0.8 (1 − μ) where momentum is left out; a steady step is 1 / (1 − μ) times as long."""
    length = {"steady": 10.0, "no-momentum": 1.0, "step": first}[judged]
    objective = apo.Proximal(lookahead=judged)
    model, opt = point(BASES[base], objective=objective, meta=apo.Newton(every=1, **{**FREE, "relaxation": relaxation}))
    hold_point(model, opt, 1)
    best = (GRADIENT @ GRADIENT / (GRADIENT @ HESSIAN @ GRADIENT)).item()
    assert opt.hypers()["lr"] == pytest.approx(best * beyond / length, rel=1e-9)


def test_the_slope_under_a_schedule() -> None:
    """a/r + (b − a)/r², which is dQ/d log lr at the tuned learning rate for a quadratic."""
    model, opt = point(BASES["torch"], meta=apo.Gradient(torch.optim.SGD, lr=1e-3, every=1), relative=lambda _: 0.25)
    lr, log = opt.hypers()["lr"], torch.log
    hold_point(model, opt, 1)
    slope = -lr * GRADIENT @ GRADIENT + lr**2 * GRADIENT @ HESSIAN @ GRADIENT
    moved = log(torch.tensor(opt.hypers()["lr"], dtype=torch.float64) / lr)
    assert -moved.item() / 1e-3 == pytest.approx(slope.item(), rel=1e-7)


class Noisy(nn.Module):
    """A linear model behind dropout, which keeps what its layer saw."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(8, 1, bias=False)
        self.log: list[list[Tensor]] = [[]]  # a list of the module's own would be put back

    @property
    def seen(self) -> list[Tensor]:
        return self.log[0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.dropout(x))
        return self.linear(self.seen[-1])


def test_the_evaluation_has_the_dropout_mask_of_the_forward() -> None:
    """Each batch's own mask, with several batches fed: slope and curvature are those of one quadratic."""
    torch.manual_seed(11)
    model = Noisy().double()
    pairs = [(randn(6, 8, seed=i), randn(6, 1, seed=10 + i)) for i in range(2)]
    loss = nn.functional.mse_loss
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.05), loss, meta=apo.Newton(every=1, **FREE))
    hessian = torch.zeros(8, 8, dtype=torch.float64)
    for x, y in pairs:
        (loss(model(x), y) / 2).backward()
        seen = model.seen[-1].detach()
        hessian += seen.T @ seen / 6
        opt.feed((x, y))
    forwards = len(model.seen)
    assert not torch.equal(model.seen[0] == 0, model.seen[1] == 0)
    step = -0.05 * model.linear.weight.grad[0]
    opt.step()
    # At the end of the step, at its start, and once more there to see that the loss repeats itself.
    assert all(torch.equal(a, b) for a, b in zip(3 * model.seen[:2], model.seen[forwards:], strict=True))
    row = opt.record[0]
    assert row["curvature"] == pytest.approx((step @ hessian @ step).item(), rel=1e-9)
    assert row["slope"] == pytest.approx((-step @ step / 0.05).item(), rel=1e-9)


@pytest.mark.parametrize("noted", [True, False])
def test_slopes_come_from_losses(noted: bool) -> None:
    """The gradient may be of something else, here three times the loss; a = 2(Q(1) − Q(0)) − b is not."""
    model, opt = point(BASES["torch"], meta=apo.Newton(every=1, **FREE))
    hold(model, opt, 1, lambda: 3.0 * (model if noted else model.forward)(ONE), ONE)
    best = (GRADIENT @ GRADIENT / (GRADIENT @ HESSIAN @ GRADIENT)).item()
    assert opt.hypers()["lr"] == pytest.approx(best / 3, rel=1e-6)
