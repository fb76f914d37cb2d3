"""Numbers that are not finite, thrown at a training at random: nothing is lost."""

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import traces

o = torch.optim
NOISE = 0.1
"""Of the targets: no loss stays below its square."""
WEIGHT = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
LOW, HIGH = 1e-6, 1.0


class NaNSlope(torch.autograd.Function):
    """The identity, with NaN for a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return math.nan * gradient


def example(generator: torch.Generator, size: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 4, generator=generator)
    return x, torch.tanh(x @ WEIGHT) + NOISE * torch.randn(size, 2, generator=generator)


def learner() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


KINDS = ("input", "target", "value", "infinite", "slope", "gradient", "scaler")
"""In the inputs or the targets that are fed; in the loss of the evaluation, or in its derivative only; in a gradient
after and before it is unscaled."""


class Storm:
    """A training under injections; what must be skipped is counted from the injections alone."""

    def __init__(self, base: Callable[[nn.Module], Any], share: float, **options: Any) -> None:
        self.model, self.share, self.kind = learner(), share, ""
        self.opt = apo.APO(self.model, base(self.model), evaluate=self.evaluate, skip_nonfinite=True, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=20)
        self.random, self.generator = random.Random(7), torch.Generator().manual_seed(1)
        self.skipped = self.taken = 0
        self.poisoned_before = False
        self.losses: list[float] = []
        self.seen: Counter[str] = Counter()

    def evaluate(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        loss = F.mse_loss(outputs, batch[1])
        factor = {"value": math.nan, "infinite": math.inf}.get(self.kind, 1.0)
        return (NaNSlope.apply(loss) if self.kind == "slope" else factor * loss), outputs

    def step(self) -> None:
        x, y = example(self.generator)
        self.kind = kind = self.random.choice(KINDS) if self.random.random() < self.share else ""
        self.opt.zero_grad()
        loss = F.mse_loss(self.model(x), y)
        self.losses.append(loss.item())
        self.scaler.scale(loss).backward()
        weight = self.model[0].weight.grad
        if kind == "scaler":
            weight[0, 0] = math.inf
        self.scaler.unscale_(self.opt)
        if kind == "gradient":
            weight[0, 0] = math.nan
        fed = [x.clone(), y.clone()]
        if kind in ("input", "target"):
            fed[kind == "target"][3, 1] = math.nan
        rows, lr = len(self.opt.record), self.opt.hypers()
        self.scaler.step(self.opt, batch=tuple(fed))
        self.scaler.update()
        self._count(kind, len(self.opt.record) > rows, lr)

    def _count(self, kind: str, judged: bool, before: dict[str, float]) -> None:
        self.seen[kind] += 1
        if kind == "gradient":
            self.skipped += 1
        if kind not in ("gradient", "scaler"):
            self.taken += 1
            bad = kind != "" or self.poisoned_before
            self.skipped += judged and bad
            if bad:
                assert self.opt.hypers() == before
            self.poisoned_before = kind == "input"


BASES: dict[str, tuple[Any, Any, Any, int]] = {
    "newton-adamw": (lambda m: o.AdamW(m.parameters(), lr=1e-2), apo.Newton(5, "gradients", 1.0), {}, 2000),
    "newton-rule": (lambda m: apo.rmsprop(lr=1e-3), apo.Newton(every=5, relaxation=1.0), {"eps": "global"}, 700),
    "paper-sgd": (lambda m: o.SGD(m.parameters(), lr=0.02), apo.Gradient(o.RMSprop, lr=0.1, every=5), {}, 700),
    "paper-rule": (lambda m: apo.adam(lr=1e-2), apo.Gradient(o.RMSprop, lr=0.1, every=5), {"eps": "global"}, 2000),
}


@pytest.mark.parametrize(("base", "meta", "more", "steps"), BASES.values(), ids=BASES)
def test_a_storm(base: Any, meta: Any, more: Any, steps: int) -> None:
    """A third of the steps are hit; the loss falls to the noise all the same, and every count is exact."""
    tune = {"lr": apo.Tune(low=LOW, high=HIGH), **more}
    storm = Storm(base, share=0.33, meta=meta, tune=tune, objective=apo.Proximal(fsd=0.05))
    opt = storm.opt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            storm.step()
    assert all(storm.seen[kind] > 20 for kind in KINDS)
    assert sorted(str(w.message).partition(":")[0] for w in caught) == [
        "a gradient is not finite",
        "the objective or its gradient is not finite",
    ]
    assert all(bool(p.isfinite().all()) for p in storm.model.parameters())
    assert sum(storm.losses[:20]) / 20 > 10 * NOISE**2
    assert sum(storm.losses[-200:]) / 200 < 1.3 * NOISE**2
    counts = opt._counts
    assert (counts.steps, counts.counted) == (storm.taken, storm.taken)
    assert (counts.skipped, counts.without_other) == (storm.skipped, 1)
    assert len(opt.record) == math.ceil(storm.taken / 5)
    assert opt.record.column("step") == [5.0 * i for i in range(len(opt.record))]
    assert opt.record[-1]["skipped"] <= storm.skipped
    for column in ("lr", *more):
        assert all(map(math.isfinite, opt.record.column(column)))
    assert all(LOW <= lr <= HIGH for lr in opt.record.column("lr"))
    assert len(set(opt.record.column("lr"))) > 50
    numbers = {name: x for name, x in opt._tuning.numbers().items() if not isinstance(x, str)}
    assert all(map(math.isfinite, numbers.values()))
    assert not opt._feeding.fed


@pytest.mark.parametrize("spared", [0, 1, 3])
def test_the_search_waits_for_a_loss_that_is_finite(spared: int) -> None:
    """All first batches are NaN to the evaluation: the steps are the bare ones, and then the search is made."""
    model, twin = learner(), learner()
    calls = [0]

    def evaluate(m: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        out = m(batch[0])
        return F.mse_loss(out, batch[1]) * (math.nan if calls[0] < spared else 1.0), out

    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-5), evaluate=evaluate, meta=apo.Newton(every=1))
    bare = o.SGD(twin.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the objective or its gradient is not finite")
        for i in range(spared + 1):
            calls[0] = i
            x, y = example(generator)
            for m, opt_ in ((model, opt), (twin, bare)):
                opt_.zero_grad()
                F.mse_loss(m(x), y).backward()
            opt.step(batch=(x, y))
            bare.step()
            if i < spared:
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
                assert opt.hypers() == {"lr": 1e-5}
    assert opt.hypers()["lr"] > 1e-2
    assert opt.record.column("skipped")[-1] == spared


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_search_meets_losses_that_are_not_finite(bad: float) -> None:
    """Beyond a distance from the start: the step stays within it."""
    model = learner()
    start = [p.detach().clone() for p in model.parameters()]

    def evaluate(m: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        out = m(batch[0])
        far = sum((p.detach() - q).square().sum() for p, q in zip(m.parameters(), start, strict=True)) > 1e-2
        return F.mse_loss(out, batch[1]) * (bad if far else 1.0), out

    for lr in (1e-6, 1e3):
        torch.nn.utils.vector_to_parameters(torch.cat([p.flatten() for p in start]), model.parameters())
        opt = apo.APO(model, o.SGD(model.parameters(), lr=lr), evaluate=evaluate, meta=apo.Newton(every=1))
        batch = example(torch.Generator().manual_seed(3))
        opt.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
        moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(model.parameters(), start, strict=True)))
        assert 0.02 < moved <= 0.1
        assert math.isfinite(opt.record[0]["objective"])


@pytest.mark.parametrize("discrepancy", ["squared_error", "kl", lambda new, old: (new - old).square().sum(1)])
def test_only_the_other_batch_is_not_finite(discrepancy: Any) -> None:
    """The first B' of all, with a discrepancy of one's own too, which is checked on the first that is finite."""
    model = learner()
    objective = apo.Proximal(fsd=0.1, discrepancy=discrepancy)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.mse_loss, objective=objective, meta=apo.Newton(every=1))
    generator = torch.Generator().manual_seed(2)
    for i in range(3):
        batch, other = example(generator), example(generator)
        other[0][0, 0] = math.nan if i < 2 else 0.0
        opt.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        kept, before = traces(model), opt.hypers()
        if i == 0:
            with pytest.warns(UserWarning, match="the objective or its gradient is not finite"):
                opt.step(batch=batch, other=other)
        else:
            opt.step(batch=batch, other=other)
        assert traces(model) == kept
        if i == 1:
            assert opt.hypers() == before
    assert opt.record.column("skipped") == [1.0, 2.0, 2.0]
    assert math.isnan(opt.record[1]["fsd"])
    assert opt.record[2]["fsd"] > 0.0


def test_a_nan_gradient_ruins_the_bare_optimizer_too() -> None:
    model, twin = learner(), learner()
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), F.mse_loss)
    bare = o.AdamW(twin.parameters(), lr=1e-3)
    batch = example(torch.Generator().manual_seed(2))
    for m, opt_ in ((model, opt), (twin, bare)):
        F.mse_loss(m(batch[0]), batch[1]).backward()
        m[0].weight.grad[0, 0] = math.nan
        if opt_ is bare:
            bare.step()
        else:
            with pytest.warns(UserWarning, match="the meta-step is skipped"):
                opt.step(batch=batch)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, rtol=0.0, atol=0.0)
    assert bool(model[0].weight.isnan().any())


@pytest.mark.parametrize("search", [True, False])
def test_a_model_that_is_all_frozen_and_then_thawed(search: bool) -> None:
    """A step without gradients does nothing, as the bare one's; the first that moves something is searched."""
    model = learner().requires_grad_(False)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-4), F.mse_loss, meta=apo.Newton(every=1, search=search))
    generator = torch.Generator().manual_seed(2)
    before = [p.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="no parameter has a gradient, so there is no step to judge"):
        opt.step(batch=example(generator))
    opt.step(batch=example(generator))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert (len(opt.record), opt._counts.counted, opt.hypers()) == (0, 0, {"lr": 1e-4})
    model.requires_grad_(True)
    batch = example(generator)
    F.mse_loss(model(batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    assert len(opt.record) == 1
    assert (opt.hypers()["lr"] > 1e-2) is search


def test_slopes_beyond_the_floating_point_range_are_not_averaged() -> None:
    newton = apo.Newton(every=1)
    for unit in (1e-210, 1e210):
        averages = apo.newton.NewtonState(-1.0, 2.0)
        for a, c in ((-1e300, 1e300), (-1e200, 1e-300), (1e305, 1.0)):
            factor = averages.move(newton, unit, a, c, 1.2)
            assert 1.0 / newton.shrink <= factor <= newton.growth
            assert math.isfinite(averages.slope)
            assert math.isfinite(averages.curvature)


@pytest.mark.parametrize("lr", [1e8, -1e8])
def test_an_offset_too_far_for_floats_is_not_taken(lr: float) -> None:
    """A meta-optimizer that wants a factor of e to the ten thousand."""
    model = learner()
    meta = apo.Gradient(lambda params: o.SGD(params, lr=abs(lr), maximize=lr < 0), every=1)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-3), F.mse_loss, meta=meta)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        batch = example(generator)
        opt.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
    assert opt.hypers() == {"lr": 1e-3}
