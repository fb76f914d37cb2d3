"""When the shell wants a batch, what it does with it, and what it does without."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.shell.helpers import backward, batches, call, net, shell, traces, train, weights

o = torch.optim


def test_meta_steps_are_calls_1_and_every_k_later() -> None:
    model, opt = shell()
    due, judged = [], []
    for batch in batches(8):
        due.append(opt.due)
        judged.append(call(model, opt, batch))
    assert judged == [True, False, False, True, False, False, True, False]
    assert due == judged
    assert opt.record.column("step") == [0.0, 3.0, 6.0]


def test_a_closure_runs_once_with_gradients_and_may_feed() -> None:
    model, opt = shell()
    batch, calls = batches(1)[0], []

    def closure() -> float:
        opt.zero_grad()
        calls.append(torch.is_grad_enabled())
        opt.feed(batch)
        return backward(model, batch)

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert isinstance(loss, float)
    assert len(opt.record) == 1
    twin, other = shell()
    train(twin, other, [batch])
    assert weights(model) == weights(twin)
    assert opt.record[0] == other.record[0]


def test_feed_before_step_is_the_same_as_batch() -> None:
    runs = []
    for feeding in (True, False):
        model, opt = shell()
        for batch in batches(5):
            opt.zero_grad()
            if feeding:
                opt.feed(batch)
            backward(model, batch)
            opt.step(batch=None if feeding else batch)
        runs.append((weights(model), traces(model), opt.record.rows))
    assert runs[0] == runs[1]


def test_accumulated_batches_are_one_batch() -> None:
    """Two halves with weights 1 and 2 give the rows of the whole, of a model without BatchNorm."""
    rows = []
    (x, y) = batches(1, dtype=torch.float64)[0]
    for parts in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]):
        torch.manual_seed(0)
        model, opt = shell(model=nn.Linear(6, 3).double())
        for part in parts:
            share = len(part[0]) / len(x)
            backward(model, part, share)
            opt.feed(part, weight=3 * share)
        opt.step()
        rows.append(opt.record[0])
    assert rows[0] == pytest.approx({**rows[1], "evaluations": 0.0}, rel=1e-9)


def test_nothing_fed_warns_once_and_takes_the_bare_step() -> None:
    model, opt = shell()
    twin = net()
    bare = o.SGD(twin.parameters(), lr=0.1)
    for m, step in ((model, opt.step), (twin, bare.step)):
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches(8):
                m.zero_grad()
                backward(m, batch)
                step()
        if m is model:
            assert [str(w.message)[:24] for w in caught] == ["lr is not being tuned: p"]
            assert caught[0].filename == __file__
    assert weights(model) == weights(twin)
    assert opt.hypers() == {"lr": 0.1}
    assert len(opt.record) == 0


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("search", [True, False])
def test_calls_that_move_nothing_are_not_counted(search: bool) -> None:
    """A warm-up from 0: the first step with a learning rate is the first meta-step."""
    model, opt = shell(apo.Newton(every=3, search=search))
    warm_up = o.lr_scheduler.LambdaLR(opt, lambda step: max(0, step - 1) / 10)
    due, judged = [], []
    for batch in batches(6):
        due.append(opt.due)
        judged.append(call(model, opt, batch))
        warm_up.step()
    assert judged == [False, False, True, False, False, True]
    assert due == [True, True, True, False, False, True]
    assert opt.record.column("step") == [2.0, 5.0]


def test_steps_without_any_gradient_are_not_counted() -> None:
    _, opt = shell()
    with pytest.warns(UserWarning, match=r"no parameter has a gradient.* and zero_grad\(\) not in between"):
        opt.step(batch=batches(1)[0])
    assert len(opt.record) == 0
    assert opt.due


def test_frozen_hyperparameters_stay_and_nothing_is_wanted() -> None:
    model, opt = shell()
    data = batches(8)
    call(model, opt, data[0])
    tuned = opt.hypers()
    opt.freeze()
    assert not opt.due
    assert not any(call(model, opt, batch) for batch in data[1:4])
    assert opt.hypers() == tuned
    assert not opt._evaluation.recorder.seen
    opt.unfreeze()
    assert not opt.due
    call(model, opt, data[4])
    call(model, opt, data[5])
    assert opt.due
    assert call(model, opt, data[6])
    assert opt.hypers() != tuned


def test_batches_that_are_not_wanted_are_dropped() -> None:
    model, opt = shell()
    data = batches(5)
    call(model, opt, data[0])
    opt.feed(data[1])
    assert not opt._feeding.fed


def test_mappings_and_outputs_with_a_loss() -> None:
    """The shape of Hugging Face: `model(**batch)` returns an object with `loss` and `logits`."""

    class Output:
        def __init__(self, loss: Any, logits: Any) -> None:
            self.loss, self.logits = loss, logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(dropout=0.0)

        def forward(self, x: Any, labels: Any) -> Output:
            logits = self.net(x)
            return Output(F.cross_entropy(logits, labels), logits)

    model, plain = Wrapped(), net(dropout=0.0)
    meta, objective = apo.Newton(every=1), apo.Proximal(fsd=0.5, discrepancy="kl")
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), meta=meta, objective=objective)
    twin = apo.APO(plain, o.SGD(plain.parameters(), lr=0.1), F.cross_entropy, meta=meta, objective=objective)
    for x, y in batches(3):
        batch = {"x": x, "labels": y}
        opt.zero_grad()
        model(**batch).loss.backward()
        opt.step(batch=batch)
    train(plain, twin, batches(3))
    assert opt.record.rows == twin.record.rows
    assert weights(model) == weights(plain)


def test_functions_of_the_user() -> None:
    """`forward=` and `target=`, or `evaluate=` in their place, give the same as the defaults, which evaluate less."""
    records, counts = [], []
    for options in (
        {"loss": F.cross_entropy},
        {"loss": F.cross_entropy, "forward": lambda m, b: m(b[0]), "target": lambda b: b[1]},
        {"evaluate": lambda m, b: ((z := m(b[0])) is None or F.cross_entropy(z, b[1]), z)},
    ):
        model = net()
        opt = apo.APO(model, apo.adam(lr=1e-2), objective=apo.Proximal(fsd=1.0), meta=apo.Newton(every=1), **options)
        train(model, opt, batches(3))
        rows = [{**row, "evaluations": None} for row in opt.record]
        records.append((rows, weights(model)))
        counts.append(sum(opt.record.column("evaluations")))
    assert records[0] == records[1] == records[2]
    assert counts[0] < counts[1] == counts[2]


def test_schedules_of_the_weights_of_both_terms() -> None:
    """They are functions of the number of steps taken."""
    asked: list[int] = []

    def fsd(steps: int) -> float:
        asked.append(steps)
        return 0.1 * (steps + 1)

    model, opt = shell(objective=apo.Proximal(fsd=fsd, wsd=lambda steps: 1.0 / (steps + 1)))
    train(model, opt, batches(7))
    assert asked == [0, 3, 6]
    assert all(row["wsd"] > 0.0 for row in opt.record)
