"""autocast, GradScaler, weights of low precision: what is judged is what was trained, in the same precision."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import apo
from tests.cases import bits
from tests.documents import programs
from tests.training.models import TASKS, Batch, Task, loss, made

o = torch.optim
FLOAT16 = TASKS[:2]  # there is no LSTM in float16 on the CPU
HALVES = [*((task, torch.float16) for task in FLOAT16), *((task, torch.bfloat16) for task in TASKS)]
PAGE = "docs/training/mixed_precision.md"


class Watched(nn.Module):
    """Keeps the dtypes of what comes out, and whether in a forward of the training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        DTYPES.append(out.dtype)
        return out


DTYPES: list[torch.dtype] = []


def amp_step(model: nn.Module, opt: o.Optimizer, scaler: GradScaler, batch: Batch, dtype: torch.dtype) -> float:
    """One iteration of the recipe."""
    opt.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(model(batch[0]), batch[1])
    scaler.scale(value).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt, **({"batch": batch} if isinstance(opt, apo.APO) else {}))
    scaler.update()
    return value.item()


@pytest.mark.parametrize(("task", "dtype"), HALVES)
def test_an_evaluation_runs_in_the_precision_of_the_forward(task: Task, dtype: torch.dtype) -> None:
    """Every forward of the search and of the judgement; and the first loss of the record is the training's."""
    model = Watched(made(task))
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-6), loss, meta=apo.Newton(every=1))
    scaler, (batch,) = GradScaler("cpu", init_scale=256.0), task.batches(1)
    DTYPES.clear()
    value = amp_step(model, opt, scaler, batch, dtype)
    assert len(DTYPES) > 3
    assert set(DTYPES) == {dtype}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    still = apo.APO(model, o.SGD(model.parameters(), lr=1e-6), loss, meta=apo.Newton(every=1, search=False))
    value = amp_step(model, still, GradScaler("cpu", init_scale=256.0), batch, dtype)
    assert still.record[0]["loss"] == pytest.approx(value, rel=1e-3), "the same dropout mask"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("task", FLOAT16, ids=lambda task: task.name)
def test_the_step_is_unscaled_once(task: Task, fused: bool) -> None:
    """With nothing tuned it is the bare optimizer under the same scaler to the bit, its skips included."""
    runs = []
    for wrap in (True, False):
        model = made(task)
        base = o.AdamW(model.parameters(), lr=1e-2, fused=fused)
        opt = apo.APO(model, base, loss, tune={}) if wrap else base
        scaler = GradScaler("cpu", init_scale=2.0**36, growth_interval=2)
        for batch in task.batches(22):
            amp_step(model, opt, scaler, batch, torch.float16)
        runs.append([bits(p) for p in model.parameters()] + [scaler.get_scale()])
        assert 1.0 < scaler.get_scale() < 2.0**36
    assert runs[0] == runs[1]


def test_a_scheduler_under_a_scaler_warns_no_more_than_without() -> None:
    """Its first step comes after a skipped one; torch's own recipe steps it only if the scale has not fallen."""
    task = TASKS[0]
    model = made(task)
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), loss)
    schedule = o.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
    scaler, taken = GradScaler("cpu", init_scale=2.0**40), 0
    for batch in task.batches(30):
        scale = scaler.get_scale()
        amp_step(model, opt, scaler, batch, torch.float16)
        if scaler.get_scale() >= scale:
            schedule.step()
            taken += 1
    assert 0 < taken < 30
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-3 / (1 + taken))


@pytest.mark.parametrize("task", FLOAT16, ids=lambda task: task.name)
def test_tuning_in_float16_is_tuning_in_float32(task: Task) -> None:
    """Slopes in float16, scaled and unscaled, agree with those of the same training in float32."""
    rows = []
    for half in (True, False):
        model = made(task, dropout=0.0)
        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.05), loss, meta=apo.Newton(every=1, search=False))
        scaler = GradScaler("cpu", init_scale=256.0, enabled=half)
        batch = task.batches(1)[0]
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            value = loss(model(batch[0]), batch[1])
        scaler.scale(value).backward()
        scaler.step(opt, batch=batch)
        rows.append(opt.record[0])
    for name in ("loss", "slope"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=0.05)
    assert rows[0]["slope"] + rows[0]["curvature"] == pytest.approx(rows[1]["slope"] + rows[1]["curvature"], rel=0.05)


class Steep(nn.Module):
    """A loss whose gradient at the activations overflows float16 once it is scaled by 1024, and not before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 500.0 * self.linear(x).float()


def test_an_overflow_of_the_judgement_skips_it_and_leaves_the_step() -> None:
    torch.manual_seed(0)
    model = Steep()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-4), lambda out, y: (out - y).sum(), meta="paper")
    batch = torch.ones(8, 4), torch.zeros(8, 1)
    with torch.autocast("cpu", dtype=torch.float16):
        value = (model(batch[0]) - batch[1]).sum()
    value.backward()
    expected = [p.detach() - 1e-4 * p.grad for p in model.parameters()]
    with pytest.warns(UserWarning, match="the objective or its gradient is not finite"):
        opt.step(batch=batch)
    assert opt.record[-1]["skipped"] == 1.0
    assert opt.hypers() == {"lr": 1e-4}
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q)


BASES: dict[str, Any] = {
    "sgd": lambda m, lr: o.SGD(m.parameters(), lr=lr, weight_decay=1e-2),
    "sgd-momentum": lambda m, lr: o.SGD(m.parameters(), lr=lr, momentum=0.9),
    "adamw": lambda m, lr: o.AdamW(m.parameters(), lr=lr),
    "rmsprop": lambda m, lr: o.RMSprop(m.parameters(), lr=lr),
    "rule-sgd": lambda m, lr: apo.sgd(lr),
    "rule-adamw": lambda m, lr: apo.adamw(lr),
}


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", BASES)
def test_hypergradients_of_bfloat16_weights(name: str, lr: float) -> None:
    """Against float64 with the same weights and gradients; the smaller steps leave nearly every weight where it was."""
    objective = apo.Proximal(lookahead="no-momentum")
    meta = apo.Newton(every=1, search=False, backtrack=False)
    low = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    torch.manual_seed(1)
    for p in low.parameters():
        nn.init.normal_(p, std=0.3)
    low, x, y = low.bfloat16(), torch.randn(64, 20).bfloat16(), torch.randint(4, (64,))
    high = copy.deepcopy(low).double()
    gradients = torch.autograd.grad(loss(low(x).double(), y), list(low.parameters()))
    slopes = []
    for model in (low, high):
        kind = next(model.parameters()).dtype
        opt = apo.APO(
            model,
            BASES[name](model, lr),
            lambda out, target: loss(out.double(), target),
            forward=lambda m, batch, kind=kind: m(batch[0].to(kind)),
            objective=objective,
            meta=meta,
        )
        for p, grad in zip(model.parameters(), gradients, strict=True):
            p.grad = grad.to(kind)
        opt.step(batch=(x, y))
        slopes.append(opt.record[0]["slope"] + opt.record[0]["curvature"])
        assert type(opt.hypers()["lr"]) is float
        assert all(type(group["effective_lr"]) is float for group in opt.param_groups)
    assert slopes[0] == pytest.approx(slopes[1], rel=0.02)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_model_in_bfloat16_is_tuned(task: Task) -> None:
    """Weights, losses and gradients in bfloat16, hyperparameters in float64; lr is 100 times too small."""
    model = made(task, dtype=torch.bfloat16)
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-5), loss, meta=apo.Newton(every=2))
    losses = []
    for x, y in task.batches(40):
        opt.zero_grad()
        value = loss(model(x.bfloat16() if x.is_floating_point() else x), y)
        value.backward()
        opt.step(batch=(x.bfloat16() if x.is_floating_point() else x, y))
        losses.append(value.item())
    assert opt.hypers()["lr"] > 1e-4
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert opt.record[-1]["skipped"] == 0.0


def test_master_weights_are_refused() -> None:
    model = made(TASKS[1], dtype=torch.bfloat16)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    with pytest.raises(ValueError, match="none of the optimizer's parameters is the model's"):
        apo.APO(model, o.AdamW(masters, lr=1e-3), loss)


def test_empirical_curvature_of_scaled_gradients_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    batch = torch.randn(8, 6), torch.randint(4, (8,))
    for fisher, accepted in (("empirical", False), ("mc", True)):
        opt = apo.APO(model, apo.kfac(model, fisher=fisher), loss, tune={})  # type: ignore[arg-type]
        before = [bits(p) for p in model.parameters()]
        if accepted:
            amp_step(model, opt, GradScaler("cpu"), batch, torch.float16)
            assert [bits(p) for p in model.parameters()] != before
        else:
            with pytest.raises(ValueError, match="fisher='empirical' takes the gradients of the training backward"):
                amp_step(model, opt, GradScaler("cpu"), batch, torch.float16)
            assert [bits(p) for p in model.parameters()] == before


def test_a_scaler_refuses_a_closure_by_keyword() -> None:
    """By position it does not notice; the page says so."""
    model = made(TASKS[0])
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), loss)
    scaler, (batch,) = GradScaler("cpu"), TASKS[0].batches(1)
    scaler.scale(loss(model(batch[0]), batch[1])).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: None)


@pytest.mark.parametrize("program", programs(PAGE), ids=lambda program: program.split("\n")[0])
def test_programs_of_the_page(program: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(program, {})
