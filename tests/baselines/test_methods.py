"""Every method with every optimizer keeps the contract: trains, repeats and resumes to the bit, reports its rate."""

import io
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from baselines.config import Config
from baselines.data import load
from baselines.methods import METHODS
from baselines.optimizers import OPTIMIZERS
from baselines.run import Run

DIGITS = load("digits")


class Case(NamedTuple):
    """A method with an optimizer."""

    method: str
    optimizer: str

    def config(self, **options: Any) -> Config:
        """20 steps that should reduce the loss."""
        rates = {"sgd": 0.1, "sgdm": 0.03, "apollo": 0.3, "adahessian": 0.1, "sdlbfgs": 0.5, "sdlbfgs-released": 0.1}
        lr = {} if METHODS[self.method].lr == 1.0 else {"lr": rates.get(self.optimizer, 3e-3)}
        own: dict[str, Any] = {"every": 3} if "every" in METHODS[self.method].options else {}
        if self.method == "inverse-sqrt":
            own = {"warmup": 0.1}
        settings: dict[str, Any] = {"steps": 20, "log_every": 1, "eval_every": 7, "hidden": (16,)}
        return Config(**self._asdict(), **{**settings, **lr, **own, **options})


def cases() -> list[Case]:
    """A fixed learning rate with every optimizer, the other schedules with two, and all that the other methods take."""
    schedules = [name for name, entry in METHODS.items() if entry.optimizers == tuple(OPTIMIZERS) and name != "fixed"]
    others = [method for method in METHODS if method not in ("fixed", *schedules)]
    return [
        *(Case("fixed", optimizer) for optimizer in OPTIMIZERS),
        *(Case(method, optimizer) for method in schedules for optimizer in ("sgdm", "adahessian")),
        *(Case(method, optimizer) for method in others for optimizer in METHODS[method].optimizers),
    ]


CASES = cases()
by_case = pytest.mark.parametrize("case", CASES, ids="-".join)


@cache
def whole(case: Case) -> Run:
    """The run without a break."""
    run = Run(case.config(), DIGITS)
    list(run.rows())
    return run


def untimed(run: Run) -> list[dict[str, float | None]]:
    """The history without its clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


def plain(state: Any) -> Any:
    """A state whose tensors are lists, so that == compares it."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


@by_case
def test_twenty_steps_reduce_the_loss(case: Case) -> None:
    before, after = (whole(case).history[place]["test_loss"] for place in (0, -1))
    assert before is not None and after is not None
    assert after < before - (1e-6 if case.method in ("prodigy", "dadapt", "dog") else 0.05)  # they start from 1e-6


@by_case
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(case: Case) -> None:
    first = Run(case.config(), DIGITS)
    for _ in range(8):
        first.advance()
    first.evaluate(DIGITS.test)  # leaves no trace
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    second = Run(Config.from_dict(state["config"]), DIGITS)
    second.load_state_dict(state)
    assert second.method.hypers() == first.method.hypers()
    list(second.rows())
    assert untimed(second) == untimed(whole(case))
    for name, value in whole(case).model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert plain(second.method.state_dict()) == plain(whole(case).method.state_dict())


@pytest.mark.parametrize("method", [method for method, entry in METHODS.items() if "sgd" in entry.optimizers])
def test_the_learning_rate_that_is_reported_is_the_one_used(method: str) -> None:
    """With SGD: every step is the reported learning rate times the gradient."""
    run = Run(Case(method, "sgd").config(log_every=1), DIGITS)
    twin = Run(Case("fixed", "sgd").config(), DIGITS)
    reported = []
    for _ in range(8):
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        twin.model.load_state_dict(before)
        twin.advance()
        coming = run.method.hypers().get("lr")
        run.advance()
        rate = coming if method == "apo" else run.method.hypers()["lr"]
        if method == "apo" and run.step == 1:  # this rate is searched within the step
            continue
        assert rate is not None
        reported.append(rate)
        for name, parameter in twin.model.named_parameters():
            moved = before[name] - run.model.state_dict()[name]
            assert parameter.grad is not None
            torch.testing.assert_close(moved, rate * parameter.grad, rtol=1e-3, atol=3e-8)
    later_or_never = ("fixed", "step", "plateau", "wsd", "pbt")
    assert (len(set(reported)) == 1) == (method in later_or_never)


def test_the_rate_of_the_adam_family_scales_its_first_step() -> None:
    """|Δ| per weight at the first step: lr for Adam; (1 − β₁)/√(1 − β₂) of it where no bias is corrected."""
    for method, optimizer, size in (
        ("fixed", "adam", 1.0),
        ("hd", "adam", 1.0),
        ("gen", "adam", 1.0),
        ("prodigy", "adam", 0.1 / 1e-3**0.5),
        ("dadapt", "adam", 0.1 / 1e-3**0.5),
    ):
        run = Run(Case(method, optimizer).config(), DIGITS)
        before = {name: value.clone().double() for name, value in run.model.state_dict().items()}
        run.advance()
        moved = torch.cat([(run.model.state_dict()[name] - before[name]).flatten() for name in before])
        rate = run.method.hypers()["lr"]
        assert moved.abs().max().item() == pytest.approx(size * rate, rel=0.1), (method, optimizer)


@pytest.mark.parametrize(
    ("method", "optimizer", "options", "extra"),
    [
        ("fixed", "adahessian", {}, [0, 0, 0, 0]),
        ("fixed", "sdlbfgs", {}, [1, 1, 1, 1]),
        ("gdtuo", "adam", {}, [0, 0, 0, 0]),
        ("gen", "adam", {"every": 3}, [2, 0, 0, 2]),
        ("apo", "adamw", {"every": 3, "meta": "paper"}, [1, 0, 0, 1]),
        ("apo", "adamw", {"every": 3}, [None, 0, 0, 1]),  # the first is searched
        ("apo", "adamw", {"every": 3, "fsd": 0.1}, [None, 0, 0, 3]),
    ],
)
def test_a_step_takes_the_forwards_that_the_page_names(
    method: str, optimizer: str, options: dict[str, Any], extra: list[int | None]
) -> None:
    run = Run(Case(method, optimizer).config(**options), DIGITS)
    forwards = [0]
    run.model.register_forward_hook(lambda module, inputs, outputs: forwards.append(forwards.pop() + module.training))
    for expected in extra:
        forwards[:] = [0]
        run.advance()
        assert expected is None or forwards == [1 + expected]


def test_the_page_names_every_method_and_every_optimizer() -> None:
    """In the tables of docs/comparators.md, with the optimizers that each method takes."""
    text = (Path(__file__).parents[2] / "docs" / "comparators.md").read_text(encoding="utf-8")
    methods, optimizers = text.split("## Optimizers")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|(.*)\|$", methods.partition("|---")[2], re.MULTILINE))
    assert list(rows) == list(METHODS)
    assert re.findall(r"^\| `([a-z-]+)` \|", optimizers.partition("|---")[2], re.MULTILINE) == list(OPTIMIZERS)
    for method, row in rows.items():
        column = row.split("|")[3]
        named = set(re.findall(r"`([a-z-]+)`", column))
        taken = set(OPTIMIZERS) - named if column.strip().startswith("all") else named
        assert taken == set(METHODS[method].optimizers), method


OPTIONS = {"weight_decay": 0.3, "eps": 0.1, "meta_lr": 1e-4, "warmup": 0.5, "decay_factor": 0.5, "decay_at": (0.3,)}
TAKEN = [
    (method, optimizer, option)
    for method, optimizer in CASES
    for option in OPTIONS
    if option in (*METHODS[method].options, *OPTIMIZERS[optimizer].options) and option not in METHODS[method].ignores
]


@pytest.mark.parametrize(("method", "optimizer", "option"), TAKEN, ids=map("-".join, TAKEN))
def test_an_option_that_is_taken_has_an_effect(method: str, optimizer: str, option: str) -> None:
    needed = {"meta": "paper"} if (method, option) == ("apo", "meta_lr") else {}
    without, given = (
        Run(Case(method, optimizer).config(steps=4, eval_every=4, **needed, **options), DIGITS)
        for options in ({}, {option: OPTIONS[option]})
    )
    for run in (without, given):
        torch.manual_seed(0)
        list(run.rows())
    rates = [[row["lr"] for row in run.history] for run in (without, given)]
    weights = [torch.cat([value.flatten() for value in run.model.state_dict().values()]) for run in (without, given)]
    assert rates[0] != rates[1] or not torch.equal(*weights)


def test_every_pair_that_is_not_offered_is_refused() -> None:
    for method, entry in METHODS.items():
        for optimizer in set(OPTIMIZERS) - set(entry.optimizers):
            with pytest.raises(ValueError, match=f"--method {method} does not work with {optimizer}; it does with"):
                Config(method=method, optimizer=optimizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "hd", "optimizer": "sgd", "rule": True}, "rule=True: --method hd ignores it; leave out --rule"),
        ({"method": "gdtuo", "optimizer": "sgd", "weight_decay": 0.1}, "weight_decay=0.1: --method gdtuo ignores it"),
        ({"method": "prodigy", "warmup": 0.1}, "warmup=0.1 is an option of --method fixed.*--method prodigy ignores"),
        ({"method": "fixed", "meta_lr": 0.1}, "meta_lr=0.1 is an option of --method hd, gdtuo, apo, and"),
        ({"method": "hd", "optimizer": "sgd", "meta_lr": -1.0}, "meta_lr=-1.0.*at least 0"),
    ],
)
def test_what_would_be_ignored_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_an_lr_that_is_not_given_is_the_methods() -> None:
    assert Config(method="prodigy").lr == Config(method="dog", optimizer="sgd").lr == 1.0
    assert Config().lr == Config(method="hd", optimizer="sgd").lr == 1e-3
    assert Config.from_dict(Config(method="prodigy", lr=0.5).to_dict()).lr == 0.5


def test_apo_by_layer_under_a_schedule_of_its_own_resumes_to_the_bit() -> None:
    config = Config(
        **{"method": "apo", "optimizer": "sgd", "lr": 0.1, "by": "layer", "meta": "paper", "relative": "wsd"},
        **{"steps": 20, "every": 3, "fsd": 0.1, "log_every": 1, "hidden": (16,)},
    )
    run, again = Run(config, DIGITS), Run(config, DIGITS)
    for _ in range(17):
        run.advance()
    again.load_state_dict(run.state_dict())
    assert again.method.hypers() == run.method.hypers()
    list(run.rows())
    list(again.rows())
    assert untimed(again) == untimed(run)
    last, middle = run.history[-1], run.history[10]
    assert last["lr"] == pytest.approx(0.1 * (1 - 19 / 20) / 0.3) and middle["lr"] == 0.1
    assert len({last["lr/1"], last["lr/3"]}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fixed", "by": "layer"}, "by='layer' is an option of --method apo"),
        ({"method": "apo", "relative": "square"}, "relative='square' is not allowed"),
        ({"method": "apo", "meta_lr": 0.1}, "meta_lr=0.1 has no effect with meta newton"),
    ],
)
def test_what_apo_would_ignore_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**options)
