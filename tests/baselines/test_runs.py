"""A run is deterministic, follows its schedule, trains, and resumes bit by bit."""

import io
import math
from typing import Any

import pytest
import torch

from baselines.config import Config
from baselines.data import load
from baselines.methods import METHODS
from baselines.optimizers import OPTIMIZERS
from baselines.run import Order, Run, evaluate, pick_device

DIGITS = load("digits")
SMALL: dict[str, Any] = {"hidden": (16,), "steps": 47, "log_every": 5, "eval_every": 20, "batch_size": 100}
APO: list[dict[str, Any]] = [
    {"optimizer": "adamw"},
    {"optimizer": "sgdm", "meta": "paper"},
    {"optimizer": "rmsprop", "rule": True, "every": 3},
    {"optimizer": "adam", "fsd": 0.1, "wsd": 1e-3},
    {"optimizer": "sgd", "fsd": 0.1, "every": 1},
    {"optimizer": "apollo", "tune": ("lr", "eps")},
    {"optimizer": "quasi-adam"},
    {"optimizer": "quasi-adam-switch", "fsd": 0.1, "every": 3},
    {"optimizer": "kfac", "tune": ("lr", "damping"), "every": 3},
    {"optimizer": "kfac", "tune": ("damping",), "meta": "paper"},
    {"optimizer": "sgd", "fsd": 0.1, "augment": True},
]
CASES: list[dict[str, Any]] = [
    *({"method": method, "optimizer": name} for method in ("fixed", "cosine", "step") for name in ("sgdm", "adamw")),
    *({"method": "cosine", "optimizer": name} for name in ("apollo", "quasi-adam", "kfac")),
    *({"method": "apo", **case} for case in APO),
]


def untimed(run: Run) -> list[dict[str, float | None]]:
    """The history without its clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


def assert_same(one: Run, two: Run) -> None:
    """Weights, history and data order agree bit by bit."""
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    assert untimed(one) == untimed(two)
    order, other = one.order.state_dict(), two.order.state_dict()
    assert order["position"] == other["position"]
    assert all(torch.equal(order[name], other[name]) for name in ("permutation", "generator"))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a checkpoint that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(case: dict[str, Any]) -> None:
    config = Config(**SMALL, **case)
    whole = Run(config, DIGITS)
    list(whole.rows())
    for stop in (1, 20, 33):
        first = Run(config, DIGITS)
        for _ in range(stop):
            first.advance()
        state = through_a_file(first.state_dict())
        torch.manual_seed(99)
        second = Run(Config.from_dict(state["config"]), DIGITS)
        torch.manual_seed(98)
        second.load_state_dict(state)
        assert second.step == stop
        list(second.rows())
        assert_same(whole, second)


def test_the_seed_decides_the_run() -> None:
    runs = [Run(Config(method="fixed", seed=seed, **SMALL), DIGITS) for seed in (0, 0, 1)]
    for run in runs:
        torch.manual_seed(5)  # the data order has a generator of its own
        list(run.rows())
    assert_same(runs[0], runs[1])
    assert untimed(runs[0]) != untimed(runs[2])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer: str) -> None:
    rates = {"sgd": 0.1, "sgdm": 0.03, "apollo": 0.3, "quasi-adam-switch": 1e-2, "radam": 1e-2, "adahessian": 0.1}
    lr = (rates | {"radamw": 1e-2, "sdlbfgs": 1.0, "sdlbfgs-released": 0.1}).get(optimizer, 3e-3)
    run = Run(Config(optimizer=optimizer, method="fixed", lr=lr, epochs=6, batch_size=50, hidden=(50,)), DIGITS)
    before = run.outcome()
    list(run.rows())
    after = run.outcome()
    assert abs(before["train_loss"] - math.log(10)) < 0.5
    assert after["train_loss"] < 0.3 and after["test_accuracy"] > 0.85
    assert after["test_accuracy"] == run.history[-1]["test_accuracy"]


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if "kfac" in entry.optimizers])
@pytest.mark.parametrize(("optimizer", "lr"), [("apollo", 0.3), ("quasi-adam", 3e-3), ("kfac", 3e-3)])
def test_a_rule_that_torch_lacks_trains_by_every_method(optimizer: str, lr: float, method: str) -> None:
    warmup = {"warmup": 0.1} if method == "inverse-sqrt" else {}
    config = Config(optimizer=optimizer, method=method, lr=lr, epochs=3, batch_size=50, hidden=(50,), **warmup)
    run = Run(config, DIGITS)
    list(run.rows())
    assert run.outcome()["train_loss"] < 1.0
    assert (run.history[0]["lr"] == run.history[-1]["lr"]) == (method in ("fixed", "pbt"))  # of one member


def test_an_option_of_the_optimizer_reaches_it() -> None:
    config = Config(optimizer="kfac", method="fixed", weight_decay=0.1, damping=0.5, **SMALL)
    (group,) = Run(config, DIGITS).method.state_dict()["param_groups"]
    assert (group["lr"], group["weight_decay"], group["damping"]) == (1e-3, 0.1, 0.5)


def test_what_is_tuned_is_in_every_row() -> None:
    run = Run(Config(optimizer="kfac", damping=1e-3, tune=("lr", "damping"), **SMALL), DIGITS)
    list(run.rows())
    dampings = [row["damping"] for row in run.history]
    assert dampings[0] == 1e-3 and len(set(dampings)) > 3 and run.outcome()["damping"] == dampings[-1]
    alone = Run(Config(optimizer="kfac", tune=("damping",), **SMALL), DIGITS)
    list(alone.rows())
    assert {row["lr"] for row in alone.history} == {1e-3} and alone.history[-1]["damping"] != 1e-3


def test_the_autoencoder_learns_its_inputs() -> None:
    images = torch.linspace(0, 1, 40).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    data = DIGITS._replace(train_inputs=images, train_targets=images, test_inputs=images, test_targets=images)
    for method, reached in (("fixed", 0.03), ("apo", 0.07)):
        run = Run(Config(model="autoencoder", method=method, lr=3e-3, steps=60, batch_size=20), data)
        before = run.outcome()
        list(run.rows())
        after = run.outcome()
        assert after["test_loss"] < reached < 0.08 < before["test_loss"] < 0.2  # 1/12 is the variance
        assert after["test_loss"] == pytest.approx((run.model.eval()(images) - images).square().mean().item(), rel=1e-5)
        assert after["train_accuracy"] is None and run.history[-1]["test_accuracy"] is None


def test_schedules_set_the_learning_rate_they_name() -> None:
    def lrs(**options: Any) -> list[float]:
        run = Run(Config(lr=0.1, steps=8, log_every=1, hidden=(4,), optimizer="sgd", **options), DIGITS)
        list(run.rows())
        return [float(row["lr"] or 0.0) for row in run.history[1:]]

    assert lrs(method="fixed") == [0.1] * 8
    assert lrs(method="cosine") == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert lrs(method="linear") == pytest.approx([0.1 * (1 - step / 8) for step in range(8)])
    assert lrs(method="exponential", decay_factor=0.01) == pytest.approx([10 ** (-1 - step / 4) for step in range(8)])
    assert lrs(method="wsd") == pytest.approx([0.1] * 6 + [0.1 * 0.25 / 0.3, 0.1 * 0.125 / 0.3])
    ramp = [0.0, 0.05]
    assert lrs(method="fixed", warmup=0.25) == pytest.approx(ramp + [0.1] * 6)
    assert lrs(method="linear", warmup=0.25) == pytest.approx(ramp + [0.1 * (1 - step / 6) for step in range(6)])
    assert lrs(method="wsd", warmup=0.25) == pytest.approx(ramp + lrs(method="wsd")[2:])
    root = [0.1 / math.sqrt(step / 2) for step in range(2, 8)]
    assert lrs(method="inverse-sqrt", warmup=0.25) == pytest.approx(ramp + root)
    expected = [0.1] * 4 + [0.02] * 2 + [0.004] * 2
    assert lrs(method="step", decay_factor=0.2) == pytest.approx(expected)
    assert lrs(method="step", decay_factor=0.2, decay_at=(0.25,)) == pytest.approx([0.1] * 2 + [0.02] * 6)


def test_every_example_is_visited_once_an_epoch_in_another_order() -> None:
    order = Order(10, 4, seed=0)
    epochs = [[order.draw() for _ in range(3)] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    first, second = (torch.cat(epoch) for epoch in epochs)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)


def test_evaluation_is_the_mean_over_all_examples_and_leaves_the_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Dropout(0.5))
    loss, accuracy = evaluate(model, DIGITS.test, batch_size=100)
    assert model.training
    logits = model.eval()(DIGITS.test_inputs)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, DIGITS.test_targets).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == DIGITS.test_targets).double().mean().item())


def test_rows_hold_what_they_say() -> None:
    run = Run(Config(method="fixed", examples=300, label_noise=0.5, **SMALL))
    assert len(run.data.train_targets) == 300 and run.steps_per_epoch == 3
    list(run.rows())
    assert [row["step"] for row in run.history] == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 47]
    assert [row["step"] for row in run.history if row["test_accuracy"] is not None] == [0, 20, 40, 47]
    assert run.history[0]["loss"] is None and run.history[-1]["epoch"] == pytest.approx(47 / 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "imagenet"}, "data='imagenet'.*digits"),
        ({"optimizer": "sdg"}, "optimizer='sdg'.*sgdm"),
        ({"lr": -1.0}, "lr=-1.0.*at least 0"),
        ({"lr": math.nan}, "lr=nan.*finite"),
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"label_noise": 2.0}, r"label_noise=2.0.*\[0, 1\]"),
        ({"decay_at": (0.5, 1.5)}, "decay_at"),
        ({"epochs": 2, "steps": 3}, "give one"),
        ({"optimizer": "kfac", "damping": -1.0}, "damping=-1.0.*at least 0"),
        ({"damping": 0.1}, "damping=0.1 is an option of kfac, and adamw has none"),
        ({"optimizer": "quasi-adam", "weight_decay": 0.1}, "weight_decay=0.1 is an option of sgd.*quasi-adam has none"),
        ({"method": "cosine", "fsd": 1.0}, "fsd=1.0 is an option of --method apo, and --method cosine ignores it"),
        ({"method": "fixed", "tune": ("lr", "eps")}, "tune=.*--method fixed ignores it"),
        ({"decay_at": (0.2,)}, "decay_at=.*of --method step, and --method apo ignores it; leave out --decay-at"),
        ({"decay_factor": 0.2}, "decay_factor=0.2 is an option of --method step, exponential, and"),
        ({"method": "apo", "warmup": 0.1}, "warmup=0.1 is an option of --method fixed, step.*--method apo ignores it"),
        ({"method": "plateau", "warmup": 0.1}, "--method plateau ignores it; leave out --warmup"),
        ({"method": "cosine", "warmup": 0.8}, r"warmup=0.8.*\[0, 0.7\]"),
        ({"optimizer": "sdlbfgs"}, "--method apo does not work with sdlbfgs; it does with sgd, sgdm"),
        ({"optimizer": "radam", "rule": True}, "apo has no radam of its own; leave out --rule"),
        ({"eps": 0.1}, "eps=0.1 is an option of adahessian, and adamw has none"),
        ({"model": "autoencoder", "label_noise": 0.1}, "label_noise=0.1 has no effect: the autoencoder"),
        ({"model": "autoencoder", "optimizer": "kfac"}, "logits of classes, which the autoencoder's are not"),
        (
            {"model": "autoencoder", "augment": True},
            "the autoencoder's targets are its inputs, which --augment changes",
        ),
        ({"tune": ()}, "tune.*one name or more"),
        ({"optimizer": "sgd", "tune": ("damping",)}, "torch.optim's sgd only lr can be tuned.*--rule.*kfac"),
    ],
)
def test_a_configuration_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_impossible_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="has only 1438"):
        Run(Config(examples=2000))
    with pytest.raises(ValueError, match="cannot be used here"):
        pick_device("nonsense")
    with pytest.raises(ValueError, match=r"'damping'.*can adapt 'lr', 'rho'"):
        Run(Config(optimizer="rmsprop", rule=True, tune=("damping",), **SMALL), DIGITS)
    run = Run(Config(method="fixed", **SMALL), DIGITS)
    with pytest.raises(ValueError, match="reads format 1"):
        run.load_state_dict({"format": 2})
