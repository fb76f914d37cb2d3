"""What must not end up in K-FAC's factors, nor be lost from them; checkpoints of rules with other options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.differences import model_of
from tests.shell.helpers import Batch, backward, batches, matrices, net, train, weights


def one_batch() -> Batch:
    return batches(1, seed=6, size=9, dtype=torch.float64)[0]


def factors(before: Callable[[nn.Module, apo.APO, Batch], None], fisher: str = "empirical") -> dict[str, Tensor]:
    """What is observed at the first step, after something else that the user did."""
    model, batch = model_of(), one_batch()
    opt = apo.APO(model, apo.kfac(model, fisher=fisher), F.cross_entropy, tune={})  # type: ignore[arg-type]
    before(model, opt, batch)
    backward(model, batch)
    opt.step(batch=batch)
    return {field: opt.state[model[0].weight][field] for field in ("inputs", "outputs")}


def discard(model: nn.Module, opt: apo.APO, batch: Batch) -> None:
    (100.0 * model(batch[0]).sum()).backward()
    opt.zero_grad()


def discard_after_the_forward(model: nn.Module, opt: apo.APO, batch: Batch) -> None:
    discard(model, opt, batch)
    opt.zero_grad()


def forward_only(model: nn.Module, opt: apo.APO, batch: Batch) -> None:
    model(batch[0])
    model(batch[0])


def without_grad(model: nn.Module, opt: apo.APO, batch: Batch) -> None:
    with torch.no_grad():
        model(batch[0])


@pytest.mark.parametrize("before", [discard, discard_after_the_forward, forward_only, without_grad])
def test_only_the_backward_that_counts_is_seen(before: Any) -> None:
    expected = factors(lambda *_: None)
    for field, found in factors(before).items():
        torch.testing.assert_close(found, expected[field])


def test_gradients_may_be_cleared_between_forward_and_backward() -> None:
    model, batch = model_of(), one_batch()
    opt = apo.APO(model, apo.kfac(model, fisher="empirical"), F.cross_entropy, tune={})
    loss = F.cross_entropy(model(batch[0]), batch[1])
    opt.zero_grad()
    loss.backward()
    opt.step(batch=batch)
    torch.testing.assert_close(opt.state[model[0].weight]["outputs"], factors(lambda *_: None)["outputs"])


class ReturnsItsLoss(nn.Module):
    """A model without outputs that could be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_of()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def test_without_examples_nothing_is_observed() -> None:
    """The step is then the plain gradient's."""
    model, batch = ReturnsItsLoss(), one_batch()
    opt = apo.APO(model, apo.kfac(model, lr=0.1, fisher="empirical"), forward=lambda m, b: m(*b), tune={})
    before = model.net[0].weight.detach().clone()
    model(*batch).backward()
    expected = before - 0.1 * model.net[0].weight.grad
    with pytest.warns(UserWarning, match="curvature is not being measured: fisher='empirical'"):
        opt.step(batch=batch)
    assert opt.state[model.net[0].weight]["observations"] == 0.0
    torch.testing.assert_close(model.net[0].weight.detach(), expected)
    measured = apo.APO(model, apo.kfac(model, likelihood="gaussian"), forward=lambda m, b: m(*b), tune={})
    model.zero_grad()
    model(*batch).backward()
    with pytest.raises(ValueError, match="single number"):
        measured.step(batch=batch)


def test_a_layer_that_is_never_called_takes_the_plain_step() -> None:
    """Its weight is used, but not by calling it: the output projection of attention."""

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x, self.aside.weight))

    torch.manual_seed(0)
    model, (x, y) = Uses().double(), one_batch()
    opt = apo.APO(model, apo.kfac(model, lr=0.1, damping=1.0), F.cross_entropy, tune={})
    before = model.aside.weight.detach().clone()
    backward(model, (x, y))
    expected = before - 0.1 * model.aside.weight.grad
    opt.step(batch=(x, y))
    torch.testing.assert_close(model.aside.weight.detach(), expected)
    assert opt.state[model.head.weight]["observations"] == 1.0


def test_measures_a_compiled_model() -> None:
    """Compiled code does not run the hooks that a measurement adds, so the measurement runs the model uncompiled."""
    found = []
    for compiled in (False, True):
        model = model_of()
        called = torch.compile(model, backend="eager") if compiled else model
        opt = apo.APO(
            model,
            apo.kfac(model, fisher="exact"),
            F.cross_entropy,
            tune={},
            forward=lambda _, b, called=called: called(b[0]),
        )
        for batch in batches(3, dtype=torch.float64):
            opt.zero_grad()
            F.cross_entropy(called(batch[0]), batch[1]).backward()
            opt.step(batch=batch)
        found.append(opt.state[model[0].weight])
    for field, value in found[0].items():
        torch.testing.assert_close(found[1][field], value)
    torch.compiler.reset()


def test_draws_seed_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would seed every accelerator there is, and nobody would put those back."""
    model, (x, y) = model_of(), one_batch()
    opt = apo.APO(model, apo.kfac(model, fisher="mc"), F.cross_entropy, tune={})
    backward(model, (x, y))
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", calls.append)
    opt.step(batch=(x, y))
    assert opt.state[model[0].weight]["observations"] == 1.0
    assert calls == []


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_freezing_before_the_step_loses_no_observation(fisher: Any) -> None:
    model, batch = net(dropout=0.0), batches(1)[0]
    opt = apo.APO(model, apo.kfac(model, fisher=fisher), F.cross_entropy)
    backward(model, batch)
    opt.feed(batch)
    opt.freeze()
    opt.step()
    assert [opt.state[p]["observations"].item() for p in matrices(model)] == [1.0, 1.0]


def made(rule: Callable[[nn.Module], apo.Rule]) -> tuple[nn.Module, apo.APO]:
    model = net(dropout=0.0)
    return model, apo.APO(model, rule(model), F.cross_entropy)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (
            lambda m: apo.quasi_adam(),
            lambda m: apo.quasi_adam(qn_weight=0.0),
            "last_param, step, that of this rule exp_avg, exp_avg_sq, step",
        ),
        (lambda m: apo.quasi_adam(qn_weight=0.0), lambda m: apo.quasi_adam(), "is of another rule, or of one with"),
        (lambda m: apo.quasi_adam(), lambda m: apo.quasi_adam(variant="switch"), "last_grad, last_param, step, that"),
        (lambda m: apo.quasi_adam(variant="switch"), lambda m: apo.quasi_adam(), "that of this rule .* last_grad, "),
        (lambda m: apo.kfac(m, weight_decay=0.5), lambda m: apo.kfac(m), "weight_decay=0.5, but its rule was made"),
        (lambda m: apo.kfac(m), lambda m: apo.kfac(nn.Sequential(m[0])), "is of another rule, or of one with"),
        (lambda m: apo.rmsprop(bias_correction=True), lambda m: apo.rmsprop(), "is of another rule, or of one with"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(saved: Any, loaded: Any, message: str) -> None:
    model, opt = made(saved)
    train(model, opt, batches(3))
    other, fresh = made(loaded)
    groups = [dict(group) for group in fresh.param_groups]
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(opt.state_dict())
    assert not any(fresh.state.values())
    assert [{k: v for k, v in g.items() if k != "params"} for g in fresh.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    train(other, fresh, batches(1))


def test_loads_into_groups_that_have_just_been_added() -> None:
    runs = []
    for _ in range(2):
        model = net(dropout=0.0)
        opt = apo.APO(model, [(apo.adam(), list(model[0].parameters()))], F.cross_entropy)
        opt.add_param_group({"params": list(model[5].parameters()), "lr": 0.01})
        runs.append((model, opt))
    train(*runs[0], batches(3))
    runs[1][1].load_state_dict(runs[0][1].state_dict())
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    for model, opt in runs:
        train(model, opt, batches(2, seed=9))
    assert weights(runs[0][0]) == weights(runs[1][0])
