"""Which batch is B', how much of it is taken, and under which conditions."""

from typing import Any

import pytest
import torch
from torch import nn

import apo
from tests.shell.helpers import Batch, backward, batches, call, shell

o = torch.optim


def test_with_a_function_space_term_the_call_before_is_due_too() -> None:
    model, opt = shell(objective=apo.Proximal(fsd=0.5))
    due, judged = [], []
    for batch in batches(8):
        due.append(opt.due)
        judged.append(call(model, opt, batch))
    assert judged == [True, False, False, True, False, False, True, False]
    assert due == [True, False, True, True, False, True, True, False]
    assert opt.record.column("without_other") == [1.0, 1.0, 1.0]
    assert [row["fsd"] > 0.0 for row in opt.record] == [False, True, True]


def test_the_other_batch_is_that_of_the_call_before() -> None:
    """And `other=` takes its place: the outputs on it are taken at θ and at θ'."""
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Batch) -> Any:
        seen.append(batch[0].sum().item())
        return model(batch[0])

    model, opt = shell(
        apo.Newton(every=3, curvature="gradients", search=False), objective=apo.Proximal(fsd=0.5), forward=forward
    )
    data = batches(5)
    sums = [batch[0].sum().item() for batch in data]
    assert len(set(sums)) == len(sums)
    call(model, opt, data[0])
    call(model, opt, data[1])
    call(model, opt, data[2])
    assert seen == 3 * [sums[0]], "its end, its start, and once more to see that the loss repeats itself"
    call(model, opt, data[3])
    assert seen[3:] == [sums[2], sums[3], sums[2], sums[3]], "at last the start of the step"
    seen.clear()
    call(model, opt, data[0])
    call(model, opt, data[1])
    call(model, opt, data[2], other=data[4])
    assert seen == [sums[4], sums[2], sums[4], sums[2]]


@pytest.mark.parametrize("given", [True, False])
def test_outputs_on_the_other_batch_share_one_dropout_mask(given: bool) -> None:
    """A step of next to nothing changes next to nothing."""
    still = apo.Gradient(o.SGD, lr=0.0, every=1)
    model, opt = shell(still, lr=1e-6, objective=apo.Proximal(fsd=1.0))
    data = batches(3)
    call(model, opt, data[0])
    call(model, opt, data[1], **({"other": data[2]} if given else {}))
    assert 0.0 < opt.record[1]["fsd"] < 1e-8


def test_the_other_batch_is_kept_for_one_call_only() -> None:
    """One call before the meta-step fed nothing: its term is skipped, and counted."""
    model, opt = shell(objective=apo.Proximal(fsd=0.5))
    data = batches(4)
    call(model, opt, data[0])
    call(model, opt, data[1])
    backward(model, data[2])
    opt.step()
    call(model, opt, data[3])
    assert opt.record.column("fsd") == [0.0, 0.0]
    assert opt.record[1]["without_other"] == 2.0


def test_a_fraction_of_the_other_batch() -> None:
    sizes: list[int] = []

    def forward(model: nn.Module, batch: Batch) -> Any:
        sizes.append(len(batch[0]))
        return model(batch[0])

    meta = apo.Newton(every=1, curvature="gradients", search=False)
    model, opt = shell(meta, objective=apo.Proximal(fsd=1.0, other_fraction=0.3))
    opt._evaluation.forward = forward
    data = batches(2)
    call(model, opt, data[0])
    call(model, opt, data[1])
    assert sizes == [12, 12, 4, 12, 4]  # the first loss at the start of a step, which is known, is taken once more
