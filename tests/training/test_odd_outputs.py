"""Outputs and graphs of unusual make, and what an ordinary step looks at."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.bases.torch_optimizer import TorchBase


class Wrapping(nn.Module):
    """Logits beside tensors that no gradient goes through, and further in than these."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3))
        self.how, self.out = how, torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        mask, self.out = torch.ones(3), self.body(x)
        wrapped = {
            "list in mapping": {"mask": mask, "logits": [self.out]},
            "mapping in mapping": {"mask": mask, "inner": {"logits": self.out}},
            "tuple in mapping in tuple": (mask, {"logits": (self.out, None)}),
        }
        return wrapped[self.how]


@pytest.mark.parametrize("how", ["list in mapping", "mapping in mapping", "tuple in mapping in tuple"])
def test_the_mask_of_the_forward_is_found_whatever_its_outputs_are_in(how: str) -> None:
    def logits(model: Any, batch: Any) -> Tensor:
        model(batch[0])
        return model.out

    torch.manual_seed(0)
    model = Wrapping(how).double()
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=1e-9), F.cross_entropy, forward=logits, meta="paper")
    batch = torch.randn(16, 6, dtype=torch.float64), torch.randint(3, (16,))
    loss = F.cross_entropy(logits(model, batch), batch[1])
    loss.backward()
    opt.step(batch=batch)
    assert opt.record[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


class Named(torch.autograd.Function):
    """Twice its input; it keeps a note under the name that torch has for leaves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "x"
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad


class Doubled(nn.Linear):
    """A layer that uses it."""

    def forward(self, x: Tensor) -> Tensor:
        return Named.apply(super().forward(x))


def test_a_function_may_call_what_it_keeps_as_it_likes() -> None:
    model = Doubled(6, 3)
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy)
    batch = torch.randn(16, 6), torch.randint(3, (16,))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    assert len(opt.record) == 1


def test_an_ordinary_step_does_not_go_through_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=1e-3), F.mse_loss)
    looked: list[str] = []
    moving = TorchBase.moving

    def counted(base: TorchBase) -> Any:
        for item in moving(base):
            looked.append(item[2])
            yield item

    for _ in range(2):
        batch = torch.randn(8, 4), torch.randn(8, 4)
        F.mse_loss(model(batch[0]), batch[1]).backward()
        looked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(TorchBase, "moving", counted)
            opt.step(batch=batch)
    assert looked == ["0.weight"]  # whether there is a gradient at all
