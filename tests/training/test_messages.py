"""Slips of a training script: the message says what was wrong and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.documents import programs
from tests.shell.helpers import backward, batches, net

Made = tuple[nn.Module, apo.APO, Any]


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def called(loss: Any = F.cross_entropy, given: Callable[[Any], Any] = lambda batch: batch, **arguments: Any) -> None:
    """One step, with a batch that is made from the one that gave the gradient."""
    model, batch = net(), batches(1)[0]
    opt = apo.APO(model, sgd(model), loss, **arguments)
    backward(model, batch)
    opt.step(batch=given(batch))


LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"loss": None}, r"not shape \(.*\): pass loss= or evaluate="),
    "each": ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"not shape \(.*\): loss= must return it"),
    "number": ({"loss": lambda out, y: F.cross_entropy(out, y).item()}, "not a float: loss= must return it"),
    "evaluate": (
        {"loss": None, "evaluate": lambda model, batch: (model(batch[0]), F.cross_entropy(model(batch[0]), batch[1]))},
        r"not shape \(.*\): evaluate= must return it first, and then the outputs",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), LOSSES.values(), ids=LOSSES)
def test_what_is_no_loss(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^the loss must be a tensor with one element, {message}"):
        called(**arguments)


def twice(model: nn.Module, batch: Any) -> Any:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss, None


EVALUATIONS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "outputs for inputs": ({"given": lambda batch: (batch[1], batch[1])}, RuntimeError),
    "names of one's own": ({"given": lambda batch: {"x": batch[0], "y": batch[1]}}, TypeError),
    "a loss that wants something else": ({"loss": lambda out, y: out.loss}, AttributeError),
    "a backward in evaluate=": ({"loss": None, "evaluate": twice}, RuntimeError),
}


@pytest.mark.parametrize(("arguments", "error"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_an_error_of_user_code_says_where_it_ran(arguments: dict[str, Any], error: type[Exception]) -> None:
    """Such an error is far from the line that is wrong, the one that gives the batch."""
    with pytest.raises(error) as caught:
        called(**arguments)
    (note,) = caught.value.__notes__
    assert "evaluation of the batch that apo.APO was given" in note
    assert "loss(model(batch[0]), batch[1])" in note


def test_what_was_given_is_not_printed_at_length() -> None:
    """A rule, an optimizer or a batch in the wrong place is not printed in full."""
    model = net()
    slips: list[Callable[[], Any]] = [
        lambda: apo.APO(model, [apo.adamw()]),  # type: ignore[list-item]
        lambda: apo.APO(sgd(model), model),  # type: ignore[arg-type]
        lambda: apo.APO(model, sgd(model)).feed(torch.ones(99), torch.ones(99)),  # type: ignore[arg-type]
    ]
    for slip in slips:
        with pytest.raises(TypeError) as caught:
            slip()
        assert len(str(caught.value)) < 160
        assert "\n" not in str(caught.value)


def test_a_bound_of_zero_is_called_a_bound() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"^low=0.0 is not in \(0, ∞\), as lr is: give another or None$"):
        apo.APO(model, sgd(model), tune={"lr": apo.Tune(low=0.0)})


@pytest.mark.parametrize("record", [3, net(), None])
def test_a_replay_of_no_record(record: Any) -> None:
    with pytest.raises(TypeError, match=r"^record=.* must be opt.record, or the path of what opt.record.to_csv"):
        apo.replay(record, sgd(net()))


def test_state_of_another_optimizer_is_refused_whole() -> None:
    """SGD's momenta in AdamW: torch ends in a KeyError, with the groups replaced."""
    model, batch = net(), batches(1)[0]
    old = apo.APO(model, sgd(model, momentum=0.9), F.cross_entropy)
    backward(model, batch)
    old.step(batch=batch)
    new = apo.APO(model, torch.optim.AdamW(model.parameters(), lr=1e-3), F.cross_entropy)
    with pytest.raises(ValueError, match="the checkpoint lacks 'step', which AdamW needs: it is of another"):
        new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["lr"] == 1e-3
    assert not new.state


def test_the_page_on_what_looks_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """Its program runs; and its signs of a loss with the wrong sign are seen."""
    names: dict[str, Any] = {}
    (program,) = programs("docs/training/troubleshooting.md")
    exec(compile(program, "troubleshooting", "exec"), names)
    assert len(names["opt"].record) == 6
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(float(line[-2]) < float(line[-3]) for line in lines), "the losses after the step, and before"
    wrong: dict[str, Any] = {}
    exec(program.replace("loss=F.cross_entropy", "loss=lambda out, y: -F.cross_entropy(out, y)"), wrong)
    assert wrong["row"]["loss"] < 0.0 < wrong["loss"].item()
    lrs = wrong["opt"].record.column("lr")
    assert lrs[0] < 1e-3 / 1000
    assert lrs == sorted(lrs, reverse=True)


def test_steps_of_the_base_alone_are_not_noticed() -> None:
    model, batch = net(), batches(1)[0]
    base = sgd(model)
    opt = apo.APO(model, base, F.cross_entropy)
    backward(model, batch)
    base.step()
    assert len(opt.record) == 0
    assert opt.hypers() == {"lr": pytest.approx(0.1)}
