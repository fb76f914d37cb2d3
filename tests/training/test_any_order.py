"""Calls of a training script in any order, errors among them: what holds after every one of them."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import apo
from tests.shell.helpers import batches

o = torch.optim
LOW, HIGH = 1e-4, 0.5
METAS = [
    apo.Newton(every=2),
    apo.Newton(every=3, search=False),
    apo.Gradient(o.RMSprop, lr=0.1, every=1),
]
BASES = {
    "sgd": lambda p: o.SGD(p, lr=0.1, momentum=0.5),
    "adamw": lambda p: o.AdamW(p, lr=1e-3),
    "rule": lambda p: [(apo.rmsprop(lr=1e-3), p)],
}
DATA = batches(8)


class Training(RuleBasedStateMachine):
    """A training script that does anything."""

    @initialize(base=st.sampled_from(sorted(BASES)), meta=st.sampled_from(METAS), fsd=st.sampled_from([0.0, 0.1]))
    def start(self, base: str, meta: Any, fsd: float) -> None:
        torch.manual_seed(0)
        self.base, self.meta, self.fsd = base, meta, fsd
        self.model, self.spare = self.fresh_model()
        self.opt = self.fresh(self.model)
        self.broken, self.wanted, self.count = False, 0, 0
        self.schedule: Any = None
        self.rates: list[float] = [group["lr"] for group in self.opt.param_groups]

    def fresh_model(self) -> tuple[nn.Module, nn.Module]:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3))
        return model, model[0]

    def fresh(self, model: nn.Module) -> apo.APO:
        params = [p for name, p in model.named_parameters() if not name.startswith("0.")]
        return apo.APO(
            model,
            BASES[self.base](params),
            self.loss,
            tune={"lr": apo.Tune(low=LOW, high=HIGH)},
            meta=self.meta,
            objective=apo.Proximal(fsd=self.fsd),
        )

    def loss(self, outputs: Any, target: Any) -> Any:
        if self.broken:
            raise ArithmeticError("broken")
        return F.cross_entropy(outputs, target)

    def batch(self) -> Any:
        self.count += 1
        return DATA[self.count % len(DATA)]

    @rule(times=st.integers(1, 2))
    def backward(self, times: int) -> None:
        """Twice is accumulation without a feed."""
        for _ in range(times):
            x, y = self.batch()
            F.cross_entropy(self.model(x), y).backward()

    @rule(weight=st.floats(0.1, 10.0))
    def feed(self, weight: float) -> None:
        x, y = self.batch()
        F.cross_entropy(self.model(x), y).backward()
        self.opt.feed((x, y), weight)

    @rule(none=st.booleans())
    def zero_grad(self, none: bool) -> None:
        self.opt.zero_grad(none)

    @rule(how=st.sampled_from(["feed", "batch", "not"]), zeroed=st.booleans())
    def step(self, how: str, zeroed: bool) -> None:
        """`due` tells whether a batch is used: where it is false, a broken evaluation is never reached."""
        if zeroed:
            self.opt.zero_grad()
        x, y = self.batch()
        F.cross_entropy(self.model(x), y).backward()
        due, rows = self.opt.due, len(self.opt.record)
        if how == "feed":
            self.opt.feed((x, y))
        self.broken = not due
        try:
            self.opt.step(batch=(x, y) if how == "batch" else None)
        finally:
            self.broken = False
        if not due:
            assert len(self.opt.record) == rows
        assert not self.opt._feeding.fed

    @rule()
    def whole_rounds(self) -> None:
        for _ in range(4):
            self.step("feed", True)

    @precondition(lambda self: self.opt.due)
    @rule()
    def error_in_the_loss(self) -> None:
        """What is tuned stays; before the commit the weights too, and then the step can be taken again."""
        self.opt.zero_grad()
        x, y = self.batch()
        F.cross_entropy(self.model(x), y).backward()
        hypers, counts = self.opt.hypers(), copy.copy(self.opt._counts)
        before, rng = copy.deepcopy(self.model.state_dict()), torch.get_rng_state()
        grads = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        self.broken = True
        try:
            self.opt.step(batch=(x, y))
        except ArithmeticError:
            assert self.opt.hypers() == hypers
            after = self.model.state_dict()
            taken = self.opt._counts.steps > counts.steps
            moved = [name for name in before if not torch.equal(before[name], after[name])]
            assert taken or not moved
            assert all(name in dict(self.model.named_parameters()) for name in moved)
            assert torch.equal(torch.get_rng_state(), rng)
            for p, grad in zip(self.model.parameters(), grads, strict=True):
                assert (p.grad is None) is (grad is None)
        finally:
            self.broken = False
        self.opt.step(batch=(x, y))

    @rule()
    def freeze(self) -> None:
        self.opt.freeze()
        assert not self.opt.due

    @rule()
    def unfreeze(self) -> None:
        self.opt.unfreeze()

    @precondition(lambda self: self.spare is not None and self.schedule is None)
    @rule()
    def add_param_group(self) -> None:
        self.opt.add_param_group({"params": list(self.spare.parameters()), "lr": 0.01})
        self.spare = None
        self.rates.append(0.01)

    @precondition(lambda self: self.schedule is None)
    @rule()
    def schedule_it(self) -> None:
        self.schedule = o.lr_scheduler.LambdaLR(self.opt, lambda n: 1.0 / (1 + n % 4))

    @precondition(lambda self: self.schedule is not None)
    @rule()
    def scheduler_step(self) -> None:
        self.opt.zero_grad()
        self.opt.step()
        self.schedule.step()
        self.rates = [group["lr"] for group in self.opt.param_groups]

    @precondition(lambda self: self.schedule is None)
    @rule()
    def copy_it(self) -> None:
        """Go on with a copy."""
        self.model, self.opt = copy.deepcopy((self.model, self.opt), {id(self): self})
        self.opt._evaluation.loss = self.loss
        self.spare = None if self.spare is None else self.model[0]

    @rule()
    def save_and_load(self) -> None:
        """Into a fresh object, safely; it has the same numbers, and is as due."""
        buffer = io.BytesIO()
        torch.save(self.opt.state_dict(), buffer)
        buffer.seek(0)
        model, _ = self.fresh_model()
        model.load_state_dict(self.model.state_dict())
        other = self.fresh(model)
        if self.spare is None:
            other.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert other.hypers() == pytest.approx(self.opt.hypers(), rel=1e-12)
        assert vars(other._counts) == vars(self.opt._counts)
        assert other.due == self.opt.due
        assert [g["lr"] for g in other.param_groups] == self.rates

    @invariant()
    def all_is_well(self) -> None:
        if not hasattr(self, "opt"):
            return
        assert all(bool(p.isfinite().all()) for p in self.model.parameters())
        assert all(LOW * (1 - 1e-9) <= lr <= HIGH * (1 + 1e-9) for lr in self.opt.hypers().values())
        assert [group["lr"] for group in self.opt.param_groups] == self.rates
        assert all(type(group["lr_factor"]) is float for group in self.opt.param_groups)
        assert all(math.isfinite(group["effective_lr"]) for group in self.opt.param_groups)
        assert all(p.requires_grad for p in self.model.parameters())
        assert self.model.training
        assert not type(self.opt._evaluation.recorder).evaluations


TestTraining = Training.TestCase
TestTraining.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestTraining = pytest.mark.filterwarnings("ignore::UserWarning")(TestTraining)
