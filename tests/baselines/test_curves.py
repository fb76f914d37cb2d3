"""A curve is the best of its search with all seeds, at equal steps or in equal time; a table says how it stands."""

import dataclasses
import math
from typing import cast

import pytest

from baselines.cells import Cell
from baselines.config import Config
from baselines.experiments.base import Curve, Found
from baselines.experiments.report import figure, numbers, summary, table
from tests.baselines.driving import drive

START = Config(optimizer="sgd", method="fixed", steps=100, hidden=(8,))


def cell(config: Config) -> Cell:
    """Loss 0.1 × (1 + the distance to lr 0.01), and 1 ms a step, of adam 3 ms; of seed 1 a tenth more loss."""
    loss = 0.1 * (1.0 + abs(math.log(config.lr / 0.01))) * (1.1 if config.seed == 1 else 1.0)
    seconds = 0.001 * (config.steps or 0) * (3.0 if config.optimizer == "adam" else 1.0)
    outcome = {"train_loss": loss, "test_loss": 2.0 * loss, "test_accuracy": 0.9, "seconds": seconds}
    curves = {"step": [0, 100], "loss": [None, loss], "lr": [config.lr] * 2}
    return Cell(config, "", True, config.steps or 0, 1, outcome, curves, {"wall": 1.0, "time": 0})


def found(curve: Curve) -> Found:
    """What a curve's plan finds where every run ends as above."""
    return cast(Found, drive(curve.plan(), cell)[0])


def test_the_winner_of_a_walk_or_of_options_gets_all_seeds() -> None:
    walked = found(Curve("sgd", dataclasses.replace(START, lr=0.1), walk="lr", seeds=2))
    assert [(c.config.lr, c.config.seed) for c in walked.cells] == [(0.01, 0), (0.01, 1)]
    assert walked.setting == "lr 0.01" and {c.config.lr for c in walked.tried} == {0.3, 0.1, 0.03, 0.01, 0.003}
    assert walked.seconds == pytest.approx(0.1) and walked.search_seconds == pytest.approx(0.5)
    chosen = found(Curve("sgd", START, options=({"lr": 1.0}, {"lr": 0.03}), seeds=1))
    assert chosen.setting == "lr 0.03" and len(chosen.tried) == 2
    plain = found(Curve("sgd", START))
    assert plain.setting == "" and [c.config.seed for c in plain.cells] == [0, 1, 2]


def test_equal_time_is_as_many_steps_as_fit() -> None:
    reference = Curve("sgd", START, seeds=2)
    slow = Curve("adam", dataclasses.replace(START, optimizer="adam"), time_of=reference, seeds=2)
    fit = found(slow)
    assert [c.steps for c in fit.cells] == [33, 33] and [c.steps for c in fit.tried] == [100]
    assert fit.seconds == pytest.approx(0.099)


def test_a_table_compares_within_a_panel() -> None:
    good = found(Curve("good", dataclasses.replace(START, lr=0.01), seeds=2))
    slow = dataclasses.replace(START, optimizer="adam", lr=1.0)
    bad = found(Curve("bad", slow, against="good", seeds=2))
    lost = Found(
        Curve("lost", START, against="good"), [dataclasses.replace(bad.cells[0], finished=False)], tried=bad.tried
    )
    rows = [[entry.strip() for entry in row.split("|")[1:-1]] for row in table([good, bad, lost]).splitlines()]
    assert len({len(row) for row in rows}) == 1
    columns = dict(zip(rows[0], zip(*rows[2:], strict=True), strict=True))
    assert columns["training loss"] == ("0.105", "0.588", "diverged")
    assert columns["ratio"] == ("", "5.61", "-") and columns["verdict"] == ("", "worse", "worse")
    assert columns["cost"] == ("", "3", "3")
    assert columns["spread"][:2] == ("×1.10", "×1.10") and columns["test accuracy"][0] == "90.0"
    for measure, shown in (("loss", 0.21), ("perplexity", (math.exp(0.2) + math.exp(0.22)) / 2)):
        head, _, first = table([good], measure).splitlines()
        assert dict(zip(head.split(" | "), first.split(" | "), strict=True))[f"test {measure}"] == f"{shown:.3g}"
    assert summary({"one": [good, bad], "two": [good, lost]}) == [
        "- **bad** against good: worse in 1",
        "- **lost** against good: worse in 1",
    ]
    assert numbers({"panel": [good]})["panel"]["good"]["train_loss"] == pytest.approx([0.1, 0.11])


def test_a_figure_shows_learning_rates_whatever_they_end_at() -> None:
    """A schedule that ends at 0, and a hypergradient that goes below it."""
    good = found(Curve("good", dataclasses.replace(START, lr=0.01), seeds=1))
    ends = dataclasses.replace(
        good.cells[0], curves={"step": [0, 50, 100], "loss": [None, 0.1, 0.1], "lr": [0.01, 2e-3, 1e-9]}
    )
    below = dataclasses.replace(ends, curves={**ends.curves, "lr": [0.01, -1.0, -2.0]})
    founds = [good, good._replace(cells=[ends]), good._replace(cells=[below])]
    picture = figure({"panel": founds}, {"loss": "loss", "lr": "learning rate"})
    assert picture.axes[1].get_ylim()[0] == pytest.approx(1e-3)
