"""What a judged step could silently get wrong in training code that does nothing wrong."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.bases.directions import adam, adamw
from tests.shell.helpers import backward, batches, net, o, train

EVERY = apo.Newton(every=1)


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("search", [True, False])
def test_a_step_inside_autocast_judges_the_new_weights(search: bool) -> None:
    """Autocast keeps the casts of the old weights until its block ends."""
    found = []
    for inside in (False, True):
        model = plain()
        opt = apo.APO(
            model, o.SGD(model.parameters(), lr=0.01), F.cross_entropy, meta=apo.Newton(every=1, search=search)
        )
        for batch in batches(3):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                if inside:
                    opt.step(batch=batch)
            if not inside:
                opt.step(batch=batch)
        found.append((opt.record.column("loss"), opt.hypers()))
    assert found[0] == found[1]
    assert all(curvature != 0.0 for curvature in opt.record.column("curvature"))


def test_gradients_of_other_leaves_are_left_alone() -> None:
    """Of an activation that a larger graph goes on from, and of a criterion's own parameter."""
    x, y = batches(1)[0]
    temperature = nn.Parameter(torch.tensor(1.5))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs * temperature, target)

    model = plain()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), loss, meta=EVERY)
    inputs = x.clone().requires_grad_()
    loss(model(inputs), y).backward()
    kept = inputs.grad.clone(), temperature.grad.clone()
    opt.step(batch=(inputs, y))
    assert torch.equal(inputs.grad, kept[0])
    assert torch.equal(temperature.grad, kept[1])


def test_a_batch_that_carries_a_graph() -> None:
    encoder, model = nn.Linear(6, 6), plain()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=EVERY)
    x, y = batches(1)[0]
    hidden = encoder(x)
    F.cross_entropy(model(hidden), y).backward()
    kept = encoder.weight.grad.clone()
    opt.step(batch=(hidden, y))
    assert len(opt.record) == 1
    assert torch.equal(encoder.weight.grad, kept)


def test_nesterov_leaves_its_momentum_in_the_gradient_only_with_foreach() -> None:
    found = []
    for foreach in (False, True):
        model = plain()
        base = o.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
        opt = apo.APO(model, base, F.cross_entropy, meta=EVERY)
        train(model, opt, batches(4))
        found.append((opt.record.column("slope"), opt.record.column("curvature")))
    for column, again in zip(*found, strict=True):
        assert column == pytest.approx(again, rel=1e-4)


def test_outputs_that_are_a_parameter_are_compared_with_what_they_were() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))

        def forward(self, rows: Tensor) -> Tensor:
            return self.w

    model = Table()
    objective = apo.Proximal(fsd=1.0)
    opt = apo.APO(
        model, o.SGD(model.parameters(), lr=0.1), lambda z, t: (z - t).square().mean(), objective=objective, meta=EVERY
    )
    batch = torch.zeros(4), torch.zeros(4, 3)
    for _ in range(3):
        opt.zero_grad()
        (model(batch[0]) - batch[1]).square().mean().backward()
        opt.step(batch=batch)
    assert opt.record[-1]["fsd"] > 0.0


def test_buffers_that_did_not_change_are_not_written() -> None:
    """A write would spoil a graph that still needs them."""
    model = plain()
    model.register_buffer("scale", torch.full((3,), 2.0).requires_grad_(False))
    model.register_buffer("wide", torch.ones(1).expand(3))
    x, y = batches(1)[0]
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=EVERY)
    parameter = torch.ones(3, requires_grad=True)
    second = (parameter * model.scale).sum()
    backward(model, (x, y))
    opt.step(batch=(x, y))
    second.backward()
    assert torch.equal(parameter.grad, model.scale)


@pytest.mark.parametrize("cls", [o.SGD, o.Adam])
def test_maximising_is_refused(cls: Any) -> None:
    model = plain()
    with pytest.raises(ValueError, match=r"maximize=True cannot be tuned: .*minimise −loss instead"):
        apo.APO(model, cls(model.parameters(), lr=0.1, maximize=True), F.cross_entropy)
    apo.APO(model, cls(model.parameters(), lr=0.1, maximize=True), F.cross_entropy, tune={})


def test_complex_parameters_are_refused_by_name() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    model = Phase()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), evaluate=lambda m, _: (m.w.abs().sum(), m.w))
    model.w.abs().sum().backward()
    with pytest.raises(ValueError, match=r"^w is complex, which cannot be judged"):
        opt.step(batch=0)


def test_a_gradient_that_is_not_finite_moves_no_hyperparameter() -> None:
    model = plain()
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), F.cross_entropy, meta=EVERY)
    batch = batches(1)[0]
    backward(model, batch)
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"not finite: the meta-step is skipped"):
        opt.step(batch=batch)
    assert opt.hypers() == {"lr": 1e-3}
    assert opt.record[-1]["skipped"] == 1.0


def test_a_loss_without_a_minimum_is_not_searched_for_one() -> None:
    model = nn.Linear(6, 1, bias=False)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-4), evaluate=lambda m, x: (m(x).mean(), m(x)))
    x = batches(1)[0][0]
    model(x).mean().backward()
    opt.step(batch=x)
    assert opt.record[0]["scale"] == 1.0
    assert opt.hypers()["lr"] <= 1.1e-4 * 1.001


def test_each_optimizer_of_a_list_keeps_its_own_state() -> None:
    model = net()
    bases = [o.SGD(model[0].parameters(), lr=0.1, momentum=0.9), o.AdamW(model[5].parameters(), lr=1e-3)]
    opt = apo.APO(model, bases, F.cross_entropy)
    train(model, opt, batches(3))
    assert [len(base.state_dict()["state"]) for base in bases] == [2, 2]
    assert len(opt.state) == 4
    loaded = copy.deepcopy(bases[0].state_dict())
    loaded["state"][0]["momentum_buffer"].fill_(7.0)
    bases[0].load_state_dict(loaded)
    opt.hypers()
    assert bases[0].state[model[0].weight]["momentum_buffer"].unique().tolist() == [7.0]


def test_a_checkpoint_of_another_meta_optimizer() -> None:
    model = plain()
    kinds = {"rmsprop": apo.Gradient(o.RMSprop, lr=0.1, every=1), "adam": apo.Gradient(o.Adam, lr=0.1, every=1)}
    opts = {
        name: apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=m) for name, m in kinds.items()
    }
    train(model, opts["rmsprop"], batches(3))
    with pytest.warns(UserWarning, match=r"of another meta-optimizer, whose state starts afresh"):
        opts["adam"].load_state_dict(copy.deepcopy(opts["rmsprop"].state_dict()))
    assert opts["adam"].hypers() == opts["rmsprop"].hypers()
    train(model, opts["adam"], batches(3))


def test_learning_rates_of_layers_do_not_lose_the_digits_of_a_small_step() -> None:
    model = plain()
    model.requires_grad_(True)
    reference = copy.deepcopy(model)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-7), F.cross_entropy, tune={"lr": "layer"}, meta="paper")
    opt._tuning.offsets = dict.fromkeys(opt._tuning.offsets, torch.tensor(1e5).log().item())
    batch = batches(1)[0]
    backward(model, batch)
    backward(reference, batch)
    opt.step(batch=batch)
    for moved, start in zip(model.parameters(), reference.parameters(), strict=True):
        expected = (start.double() - 1e-2 * start.grad.double()).float()
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-6, atol=1e-8)


def test_adamw_decays_apart_also_where_its_groups_do_not_say_so() -> None:
    """As in versions of torch before 2.7."""
    group = {"betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.5, "maximize": False}
    state = {"exp_avg_sq": torch.full((2,), 1.0), "step": torch.tensor(1.0)}
    grad, param = torch.ones(2), torch.full((2,), 4.0)
    for decay, found in ((0.5, adam(group, state, grad, param)), (0.0, adamw(group, state, grad, param))):
        along = 1.0 + decay * 4.0
        corrected = (0.99 + 0.01 * along**2) / (1.0 - 0.99**2)
        torch.testing.assert_close(found, torch.full((2,), along / corrected**0.5 + (0.0 if decay else 0.5 * 4.0)))


def test_a_batch_of_its_own_kind_survives_the_cut() -> None:
    from typing import NamedTuple

    from apo.batches import head

    class Pair(NamedTuple):
        x: Tensor
        y: Tensor

    pair = head(Pair(torch.arange(8), torch.tensor(3)), 0.25)
    assert isinstance(pair, Pair)
    assert (len(pair.x), pair.y.item()) == (2, 3)
    assert head({"a": [torch.arange(4)], "b": "text"}, 0.5)["b"] == "text"


def test_mistakes_that_would_be_silent() -> None:
    model, another = plain(), plain(1)
    with pytest.raises(ValueError, match=r"none of the optimizer's parameters is the model's"):
        apo.APO(model, o.SGD(another.parameters(), lr=0.1), F.cross_entropy)
    with pytest.raises(TypeError, match=r"an instance, not a class"):
        apo.APO(model, o.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy)
    with pytest.raises(TypeError, match=r"a batch goes by name: step\(batch=\.\.\.\)"):
        opt.step(batches(1)[0])


def test_an_exponent_that_is_tuned_with_the_defaults_does_no_harm() -> None:
    """Moved like a learning rate, by a factor e at once, it ends a run in a few steps."""
    model = plain()
    opt = apo.APO(model, apo.rmsprop(lr=1e-3), F.cross_entropy, tune={"lr": "global", "rho": "global"})
    losses = train(model, opt, batches(300, size=32))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert 0.3 < opt.hypers()["rho"] < 1.0


def test_a_parameter_outside_the_model() -> None:
    """A loss with a parameter of its own: tuned with the rest, under a name of its own."""
    model, scale = net(), nn.Parameter(torch.ones(()))
    base = o.SGD([*model.parameters(), scale], lr=0.1)
    opt = apo.APO(
        model,
        base,
        lambda z, y: F.cross_entropy(scale * z, y),
        tune={"lr": "parameter"},
        meta=apo.Gradient(o.SGD, lr=0.1, every=1),
    )
    for x, y in batches(2):
        opt.zero_grad()
        F.cross_entropy(scale * model(x), y).backward()
        grad = scale.grad
        opt.step(batch=(x, y))
        assert scale.grad is grad
    assert "lr/extra.0" in opt.hypers()
    assert opt.hypers()["lr/extra.0"] != 0.1
