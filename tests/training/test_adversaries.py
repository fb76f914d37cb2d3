"""A GAN: two models, two optimizers, and losses that run through both."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from tests.shell.helpers import traces, weights
from tests.training.adversaries import Game, discriminator, generator, logistic, ring

o = torch.optim
RATE, STEP = 1e-4, 1e-5
STEPWISE = apo.Proximal(lookahead="step")


def adam(params: Any, lr: float = 2e-3) -> torch.optim.Optimizer:
    return o.Adam(params, lr=lr, betas=(0.5, 0.99))


def judged(game: Game, which: str, batch: Any, rng: Tensor) -> float:
    """Q by hand, with random numbers from a given state, on copies of both models as they are."""
    with torch.random.fork_rng():
        d, g = copy.deepcopy((game.d, game.g))
        torch.set_rng_state(rng)
        if which == "d":
            return 0.5 * (logistic(d(batch[0]), 1.0) + logistic(d(batch[1]), 0.0)).item()
        return logistic(d(g(batch)), 1.0).item()


def stepped(game: Game, which: str, base: torch.optim.Optimizer, lr: float) -> Game:
    """A copy of the game after the bare base optimizer's step on the gradients that are there."""
    twin = copy.copy(game)
    twin.d, twin.g, base = copy.deepcopy((game.d, game.g, base))
    mine, theirs = (twin.d, game.d) if which == "d" else (twin.g, game.g)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    fresh = type(base)(mine.parameters(), lr=lr, betas=(0.5, 0.99))
    fresh.load_state_dict(base.state_dict())
    fresh.param_groups[0]["lr"] = lr
    fresh.step()
    return twin


def rounds(game: Game, bases: dict[str, torch.optim.Optimizer], check: Callable[..., None], grad: bool) -> None:
    """Rounds of the game; each step is checked against the state before it."""
    for _ in range(4):
        for which, model, opt in (("d", game.d, game.of_d), ("g", game.g, game.of_g)):
            with torch.set_grad_enabled(grad):
                batch = game.pair(16) if which == "d" else game.noise(16)
            opt.zero_grad()
            forward = torch.get_rng_state()
            (game.loss_d(model, batch) if which == "d" else game.loss_g(model, batch)).backward()
            # The discriminator has been run more often than it was fed, so its masks are those of the step.
            rng = forward if which == "g" else torch.get_rng_state()
            lr = opt.hypers()["lr"]
            before = [stepped(game, which, bases[which], lr * math.exp(x)) for x in (-STEP, 0.0, STEP)]
            kept = traces(game.d), traces(game.g), weights(game.g if which == "d" else game.d)
            opt.step(batch=batch)
            after = traces(game.d), traces(game.g), weights(game.g if which == "d" else game.d)
            assert after == kept
            low, plain, high = (judged(twin, which, batch, rng) for twin in before)
            check(opt, plain, math.log(lr / opt.hypers()["lr"]) / RATE, (high - low) / (2 * STEP))


@pytest.mark.parametrize("grad", [False, True], ids=["fakes-without-graph", "fakes-detached"])
def test_losses_and_hypergradients_of_both(grad: bool) -> None:
    """Equal to a computation by hand and to central differences, step by step; neither model shows a trace."""
    bases: list[torch.optim.Optimizer] = []

    def base(params: Any) -> torch.optim.Optimizer:
        bases.append(adam(params))
        return bases[-1]

    game = Game(base, dtype=torch.float64, meta=apo.Gradient(o.SGD, lr=RATE, every=1), objective=STEPWISE)
    largest = 0.0

    def check(opt: apo.APO, loss: float, slope: float, difference: float) -> None:
        nonlocal largest
        assert opt.record[-1]["loss"] == pytest.approx(loss, rel=1e-12)
        assert slope == pytest.approx(difference, rel=1e-5, abs=1e-8)
        largest = max(largest, abs(difference))

    rounds(game, dict(zip("dg", bases, strict=True)), check, grad)
    assert largest > 1e-3
    assert len(game.of_d.record) == len(game.of_g.record) == 4


@pytest.mark.parametrize("meta", [apo.Newton(every=1), apo.Newton(every=3)], ids=["1", "3"])
def test_no_trace_with_searches_and_shortened_steps(meta: apo.Newton) -> None:
    """The search of the first step, from a rate far too long."""
    game = Game(lambda p: adam(p, 3.0), meta=meta)

    def check(*_: Any) -> None:
        pass

    bases = {"d": game.of_d._optimizers[0], "g": game.of_g._optimizers[0]}
    rounds(game, bases, check, grad=True)
    assert game.of_d.record[0]["scale"] < 0.1
    assert game.of_g.record[0]["scale"] < 0.1


@pytest.mark.parametrize("lr", [1e-5, 0.1])
def test_both_are_tuned(lr: float) -> None:
    """From a start far too short, and one at which plain Adam throws the points away, to a ring of radius 1."""
    game = Game(lambda p: adam(p, lr), meta=apo.Newton(every=5))
    for _ in range(250):
        game.round()
    mean, deviation = game.radius()
    assert 0.75 < mean < 1.4
    assert deviation < 0.5
    assert all(5e-4 < opt.hypers()["lr"] < 2e-2 for opt in (game.of_d, game.of_g))


def test_a_module_that_only_a_container_knows() -> None:
    """A discriminator under no `apo.APO` is left as it is if the generator is handed over together with it."""
    torch.manual_seed(0)
    both = nn.ModuleDict({"g": generator(), "d": discriminator()})
    opt = apo.APO(
        both, adam(both["g"].parameters()), evaluate=lambda m, z: (logistic(m["d"](m["g"](z)), 1.0), None),
        meta=apo.Newton(every=1),
    )  # fmt: skip
    for _ in range(3):
        noise = torch.randn(16, 2)
        both.zero_grad()
        logistic(both["d"](both["g"](noise)), 1.0).backward()
        kept = traces(both), weights(both["d"])
        opt.step(batch=noise)
        assert (traces(both), weights(both["d"])) == kept
    assert len(opt.record) == 3


def test_one_optimizer_of_two_modules() -> None:
    """An encoder and a decoder in a list, which has no forward of its own."""
    torch.manual_seed(0)
    parts = nn.ModuleList([generator(), nn.Linear(2, 2)])

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        out = m[1](m[0](x))
        return (out - x).square().mean(), out

    opt = apo.APO(
        parts, o.SGD(parts.parameters(), lr=1e-4), evaluate=run, objective=apo.Proximal(fsd=0.1, lookahead="step")
    )
    losses = []
    for _ in range(60):
        x = ring(32)
        opt.zero_grad()
        loss = run(parts, x)[0]
        loss.backward()
        opt.step(batch=x)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert opt.hypers()["lr"] > 1e-3
    assert opt.record[-1]["fsd"] > 0.0
