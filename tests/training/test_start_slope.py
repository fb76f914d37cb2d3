"""The slope at the start of a step from losses, where losses are a bad witness: noise, and a loss that bends."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo


class OwnDropout(nn.Module):
    """Dropout by a generator of its own, which nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3) / 0.7


class Power(nn.Module):
    """-wⁿ."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, power: Tensor) -> Tensor:
        return -(self.w**power)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_loss_that_does_not_repeat_itself_leaves_the_learning_rate_alive(seed: int, clipped: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), OwnDropout(), nn.Linear(32, 5))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = apo.APO(model, sgd, F.cross_entropy)
    for _ in range(200):
        x = torch.randn(32, 20)
        y = x[:, :5].argmax(1)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        opt.step(batch=(x, y))
    assert opt.hypers()["lr"] > 1e-3


def test_a_loss_that_repeats_itself_is_tried_once() -> None:
    torch.manual_seed(0)
    model, runs = nn.Linear(4, 2), []
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=apo.Newton(every=1))
    for _ in range(6):
        x, y = torch.randn(8, 4), torch.randint(2, (8,))
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        calls: list[int] = []
        hook = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        opt.step(batch=(x, y))
        hook.remove()
        runs.append(len(calls))
    assert runs[1:] == [1] * 5  # the judgement; the loss at the start is known


def test_a_loss_that_falls_ever_faster_along_the_step_does_not_shorten_the_next() -> None:
    model = Power()
    newton = apo.Newton(search=False)
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.5), lambda out, _: out, meta=newton)
    batch = torch.tensor(4.0), None
    model(batch[0]).backward()
    opt.step(batch=batch)
    # From -1 at w = 1 to -81 at w = 3: slopes of -8 and -216 along the step, of which a parabola makes +56 and -216.
    assert opt.record[-1]["slope"] == pytest.approx(-8.0)
    assert opt.hypers()["lr"] == pytest.approx(0.5 * newton.growth)
