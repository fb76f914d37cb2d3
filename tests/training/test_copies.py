"""Copies of a training go on as the training does; a copy of the model alone is a plain model."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import apo
from tests.shell.helpers import state, weights
from tests.training.checkpointing import CASES, NEWTON, Case, Run, data, run
from tests.training.models import Batch, loss

o = torch.optim
EMPIRICAL = Case("empirical", "resnet", lambda m: apo.kfac(m, lr=1e-2, fisher="empirical"), {"meta": NEWTON})
# Also without us: a copied optimizer's step is its own, not the one that the copied scheduler has wrapped.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like")
every_case = pytest.mark.parametrize("case", [CASES[3], CASES[7], EMPIRICAL], ids=lambda case: case.name)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def end(each: Run) -> list[Any]:
    return [each.opt.hypers(), weights(each.model), state(each.model, [each.opt]), each.opt.record.rows]


@pytest.mark.parametrize(("how", "after"), [("deepcopy", 0), ("pickle", 4), ("deepcopy", 7), ("pickle", 7)])
@every_case
def test_a_copied_training_goes_on(case: Case, how: str, after: int) -> None:
    """Before any step, after a meta-step, and before one, with B' at hand."""
    batches = data(case, after + 3)
    first = run(case)
    first.train(batches[:after])
    first.opt.zero_grad()
    second = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    assert hooks(second.model) == hooks(first.model)
    ends = []
    for each in (first, second):
        torch.manual_seed(4)
        ends.append([each.train(batches[after:]), end(each)])
    assert ends[0] == ends[1]
    assert hooks(second.model) == hooks(first.model)


@pytest.mark.parametrize("fed", ["before", "between", "after"])
def test_in_the_middle_of_a_step(fed: str) -> None:
    """A batch fed before its forward comes along; one whose gradient has been made stays behind with it."""
    case = CASES[2]
    batches = data(case, 2)
    first = run(case)

    def forward(each: Run, batch: Batch, *, feed: bool) -> None:
        value = loss(each.model(batch[0]), batch[1])
        if feed:
            each.opt.feed(batch)
        value.backward()

    if fed == "before":
        first.opt.feed(batches[0])
    else:
        forward(first, batches[0], feed=True)
        if fed == "after":
            first.opt.zero_grad()
    second = copy.deepcopy(first)
    assert all(p.grad is None for p in second.model.parameters())
    assert len(second.opt._feeding.fed) == (fed == "before")
    if fed == "between":
        first.opt.zero_grad()
    ends = []
    for each in (first, second):
        torch.manual_seed(4)
        forward(each, batches[0 if fed == "before" else 1], feed=fed != "before")
        each.opt.step()
        ends.append(end(each))
    assert ends[0] == ends[1]
    assert len(first.opt.record) == 1


@every_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_alone_is_rid_of_our_hooks(case: Case, how: str) -> None:
    batches = data(case, 3)
    each = run(case)
    each.train(batches[:1])
    each.opt.zero_grad()
    twin = copy.deepcopy(each.model) if how == "deepcopy" else pickle.loads(pickle.dumps(each.model))
    ours = hooks(each.model)
    twin(batches[0][0])
    assert hooks(twin) == 0
    assert hooks(each.model) == ours


def test_a_copy_that_is_gone_leaves_nothing_on_its_model() -> None:
    first = run(EMPIRICAL)
    model, opt, _ = copy.deepcopy(first)
    assert hooks(model) > 2, "the layers are watched"
    del opt, _
    gc.collect()
    assert hooks(model) == 0
    assert hooks(first.model) > 2


def test_averaged_weights_of_a_tuned_model() -> None:
    """`AveragedModel` copies the model: its forwards are not taken for training ones."""
    case = CASES[1]
    runs = []
    for averaging in (False, True):
        each = run(case)
        average = o.swa_utils.AveragedModel(each.model) if averaging else None
        losses = []
        for batch in data(case, 6):
            losses += each.train([batch])
            if average is not None:
                average.update_parameters(each.model)
                with torch.random.fork_rng():
                    average(batch[0])
        runs.append([losses, end(each)])
    assert runs[0] == runs[1]
