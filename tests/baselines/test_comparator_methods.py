"""The methods against what their papers say, written out in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.comparators.contract import Batch, Method
from baselines.comparators.gen import GeN, best_scale
from baselines.config import Config
from baselines.data import load
from baselines.methods import METHODS
from baselines.run import Run, evaluate

F64 = torch.float64
DIGITS = load("digits")


def small(method: str, optimizer: str, **options: Any) -> tuple[nn.Module, Method]:
    """A linear model with squared error (the autoencoder's loss) in float64, under a method."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    config = Config(method=method, optimizer=optimizer, model="autoencoder", data="mnist", **options)
    return model, METHODS[method].make(model, config)


def batches(count: int) -> list[Batch]:
    """Random inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, 8, 7, dtype=F64, generator=generator)
    return [(rows[:, :4], rows[:, 4:]) for rows in drawn]


def flat(model: nn.Module) -> Tensor:
    """A copy of all weights, [N]."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def loss_at(model: nn.Module, weights: Tensor, batch: Batch) -> Tensor:
    """The squared error at other weights, which are left there."""
    nn.utils.vector_to_parameters(weights, model.parameters())
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Of the squared error, [N]."""
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("optimizer", METHODS["hd"].optimizers)
def test_hypergradient_descent_follows_the_central_difference_of_the_loss(optimizer: str) -> None:
    """With respect to the learning rate of the step before."""
    model, method = small("hd", optimizer, lr=0.05, meta_lr=1e-2, weight_decay=0.0)
    *earlier, last = batches(4)
    for batch in earlier:
        before = flat(model)
        method.step(batch, 0.0)
    after, lr = flat(model), method.hypers()["lr"]
    direction = (before - after) / lr
    losses = [loss_at(model, before - (lr + change) * direction, last).item() for change in (1e-5, -1e-5)]
    nn.utils.vector_to_parameters(after, model.parameters())
    method.step(last, 0.0)
    slope = (losses[0] - losses[1]) / 2e-5
    assert method.hypers()["lr"] - lr == pytest.approx(-1e-2 * slope, rel=1e-7) and abs(slope) > 0.01


def test_hypergradient_descent_includes_weight_decay_as_its_authors_do() -> None:
    model, method = small("hd", "sgd", lr=0.05, meta_lr=1e-2, weight_decay=0.3)
    one, two = batches(2)
    decayed = []
    for batch in (one, two):
        decayed.append(gradient(model, batch) + 0.3 * flat(model))
        method.step(batch, 0.0)
    assert method.hypers()["lr"] == pytest.approx(0.05 + 1e-2 * (decayed[0] @ decayed[1]).item(), rel=1e-12)


def test_gdtuo_on_sgd_is_hypergradient_descent() -> None:
    settings: dict[str, Any] = {"steps": 12, "log_every": 1, "hidden": (8,), "lr": 0.1, "meta_lr": 1e-2}
    rates = []
    for method in ("hd", "gdtuo"):
        run = Run(Config(method=method, optimizer="sgd", **settings), DIGITS)
        rates.append([row["lr"] for row in run.rows() if row is not None])
    assert rates[0] == pytest.approx(rates[1], rel=1e-4) and abs(rates[0][-1] / 0.1 - 1) > 0.05


def test_gen_finds_the_exact_rate_of_a_quadratic() -> None:
    model, method = small("gen", "sgd", lr=0.2, every=1)
    (batch,) = batches(1)
    start, grad = flat(model), gradient(model, batch)
    hessian = torch.autograd.functional.hessian(lambda w: nn.functional.mse_loss(_linear(w, batch[0]), batch[1]), start)
    exact = (grad @ grad / (grad @ hessian @ grad)).item()
    method.step(batch, 0.0)
    expected = 0.2 * (0.9 + 0.1 * min(max(exact / 0.2, 0.5), 2.0))
    assert method.hypers()["lr"] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(flat(model), start - expected * grad)
    for _ in range(300):  # at these weights for ever, it settles at the exact rate
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
        method.step(batch, 0.0)
    assert method.hypers()["lr"] == pytest.approx(exact, rel=1e-6)


def _linear(weights: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ weights[:12].reshape(3, 4).T + weights[12:]


def test_gens_parabola() -> None:
    def losses(slope: float, bend: float) -> tuple[float, float, float]:
        return (1 + slope + bend / 2, 1.0, 1 - slope + bend / 2)

    assert best_scale(*losses(3.0, 2.0)) == pytest.approx(1.5)
    assert best_scale(*losses(-3.0, 2.0)) is best_scale(*losses(3.0, -2.0)) is None
    assert GeN.factor(*losses(3.0, 0.1)) == pytest.approx(0.9 + 0.1 * 2)
    assert GeN.factor(*losses(3.0, 100.0)) == pytest.approx(0.9 + 0.1 * 0.5)
    assert GeN.factor(*losses(3.0, -2.0)) == 1.0
    assert GeN.factor(1.0, 1.0, float("inf")) == 0.5


def test_schedule_free_is_judged_at_its_average() -> None:
    """The equations of the paper, (3)-(5), with lr constant and β = 0.9."""
    model, method = small("schedule-free", "sgdm", lr=0.1)
    average = leading = flat(model)
    for step, batch in enumerate(batches(6), start=1):
        between = 0.1 * leading + 0.9 * average
        torch.testing.assert_close(flat(model), between)
        leading = leading - 0.1 * gradient(model, batch)
        average = average + (leading - average) / step
        method.step(batch, 0.0)
        trained = flat(model)
        with method.evaluating():
            torch.testing.assert_close(flat(model), average)
        assert torch.equal(flat(model), trained)
    assert (average - trained).abs().max() > 1e-3


def test_schedule_free_brings_statistics_to_its_average() -> None:
    """An average from 0 with momentum 0.1, over the means at x of the batches so far on top of those at y."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    config = Config(method="schedule-free", optimizer="sgdm", lr=0.1, model="autoencoder", data="mnist")
    method = METHODS["schedule-free"].make(model, config)
    inputs = [batch[0] for batch in batches(3)]
    for batch in batches(3):
        method.step(batch, 0.0)
    norm = model[1]
    trained = norm.running_mean.clone()
    with method.evaluating():
        expected = trained
        for x in inputs:
            expected = 0.9 * expected + 0.1 * model[0](x).mean(0)
        torch.testing.assert_close(norm.running_mean, expected)
    assert torch.equal(norm.running_mean, trained) and not torch.equal(expected, trained)


def test_schedule_free_warms_up() -> None:
    _, method = small("schedule-free", "adamw", lr=0.1, warmup=0.5)
    rates = []
    for step, batch in enumerate(batches(4)):
        method.step(batch, step / 4)
        rates.append(method.hypers()["lr"])
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1])


def test_dog_is_its_equation_and_is_judged_at_its_average() -> None:
    model, method = small("dog", "sgd")
    assert method.hypers() == {}
    start = weights = average = flat(model)
    furthest, squares = 1e-6 * (1 + start.norm()), 0.0
    for step, batch in enumerate(batches(6), start=1):
        furthest = torch.maximum(furthest, (weights - start).norm())
        grad = gradient(model, batch)
        squares += grad.square().sum().item()
        rate = furthest / (squares + 1e-8) ** 0.5
        weights = weights - rate * grad
        method.step(batch, 0.0)
        assert method.hypers()["lr"] == pytest.approx(rate.item(), rel=1e-9)
        torch.testing.assert_close(flat(model), weights)
        average = average + 9 / (8 + step) * (weights - average)
        with method.evaluating():
            torch.testing.assert_close(flat(model), average)
        torch.testing.assert_close(flat(model), weights, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("method", "optimizer"), [("dog", "sgd"), ("schedule-free", "sgdm")])
def test_a_run_evaluates_the_average(method: str, optimizer: str) -> None:
    run = Run(Config(method=method, optimizer=optimizer, lr=1.0, steps=60, hidden=(8,)), DIGITS)
    list(run.rows())
    with run.method.evaluating():
        expected = evaluate(run.model, DIGITS.test)
    assert run.history[-1]["test_loss"] == expected[0] != evaluate(run.model, DIGITS.test)[0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_packages_print_nothing(weight_decay: float, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("prodigy", "dadapt"):
        small(method, "adamw", weight_decay=weight_decay)
    assert capsys.readouterr().out == ""


NORMALISED = [
    ("dog", "sgd"),
    ("schedule-free", "adamw"),
    ("gen", "adam"),
    ("gdtuo", "adam"),
    ("hd", "adam"),
    ("prodigy", "adam"),
    ("dadapt", "sgd"),
    ("fixed", "adahessian"),
    ("fixed", "sdlbfgs"),
    ("plateau", "radam"),
]


@pytest.mark.parametrize(("method", "optimizer"), NORMALISED, ids=map("-".join, NORMALISED))
def test_buffers_survive(method: str, optimizer: str) -> None:
    """With batch normalisation: statistics count training forwards, an evaluation changes nothing, and runs resume."""
    images = torch.linspace(0, 1, 40).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    data = DIGITS._replace(train_inputs=images, train_targets=images, test_inputs=images, test_targets=images)
    every = {"every": 2} if method == "gen" else {}
    config = Config(method=method, optimizer=optimizer, model="autoencoder", steps=4, batch_size=20, **every)
    whole = Run(config, data)
    list(whole.rows())
    first = Run(config, data)
    for _ in range(2):
        first.advance()
    first.evaluate(data.test)
    state = first.state_dict()
    second = Run(config, data)
    second.load_state_dict(state)
    list(second.rows())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        if name.endswith("num_batches_tracked"):
            assert value == (8 if optimizer == "sdlbfgs" else 4)  # which takes a second gradient
