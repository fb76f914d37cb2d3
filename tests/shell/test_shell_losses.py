"""The curvature by losses alone, and the loss at the start of a step that the training's own forward tells."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import backward, batches, net, o, train

Batch = tuple[Tensor, Tensor]
LOSSES = apo.Newton(every=1, curvature="losses")
GRADIENTS = apo.Newton(every=1)


def squares(count: int, seed: int = 0) -> list[Batch]:
    """Batches of a linear regression, of float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 8, 5, generator=generator, dtype=torch.float64)
    return [(x[:, :3], x[:, 3:]) for x in drawn]


def regression(meta: apo.Newton, build: Callable[[nn.Module], Any], **objective: Any) -> tuple[nn.Module, apo.APO]:
    """A linear model, whose objective is a parabola along any step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    return model, apo.APO(model, build(model), F.mse_loss, meta=meta, objective=apo.Proximal(**objective))


def run(opt: apo.APO, model: nn.Module, clip: float | None = None, steps: int = 12) -> apo.Record:
    for x, y in squares(steps):
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step(batch=(x, y))
    return opt.record


BASES: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: o.SGD(m.parameters(), lr=1e-3),
    "adamw": lambda m: o.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1),
    "rule": lambda m: apo.rmsprop(lr=1e-3),
    "list": lambda m: [o.SGD([m.weight], lr=1e-3, momentum=0.9), (apo.adam(lr=1e-3), [m.bias])],
}


@pytest.mark.parametrize("objective", [{}, {"fsd": 0.3, "wsd": 0.2}, {"fsd": 0.3, "loss_model": "linear"}], ids=str)
@pytest.mark.parametrize("build", BASES.values(), ids=BASES)
def test_of_a_parabola_losses_tell_what_gradients_tell(build: Any, objective: dict[str, Any]) -> None:
    found = []
    for meta in (GRADIENTS, LOSSES):
        model, opt = regression(meta, build, **objective)
        found.append((run(opt, model), opt.hypers()["lr"] if len(opt.hypers()) == 1 else opt.hypers()))
    (exact, rate), (record, other) = found
    for name in ("loss", "fsd", "wsd", "slope", "curvature", "lr"):
        # Losses differ by some thousand times less than they are, so that much of their 16 digits is lost.
        expected = pytest.approx(exact.column(name), rel=1e-6, abs=1e-12, nan_ok=True)
        assert record.column(name) == expected, name
    assert other == pytest.approx(rate, rel=1e-6)


def test_losses_need_no_backward() -> None:
    """But for the first meta-step, which searches, and the one in twenty that checks the gradients."""
    model = net(dropout=0.0)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=LOSSES)
    backwards = []
    for batch in batches(30):
        opt.zero_grad()
        backward(model, batch)
        calls: list[int] = []
        first = next(model.parameters())
        hook = first.register_post_accumulate_grad_hook(lambda _, calls=calls: calls.append(1))
        opt.step(batch=batch)
        hook.remove()
        backwards.append(len(calls))
    assert backwards[0] >= 1
    assert sum(backwards[2:20]) == 0
    assert sum(backwards[20:]) == 1


@pytest.mark.parametrize("rate", [1e-9, 1e-7])
def test_what_losses_cannot_tell_gradients_do(rate: float) -> None:
    """A change of the loss that drowns in float32's rounding."""
    rows = []
    for meta in (GRADIENTS, LOSSES):
        model = net(dropout=0.0)
        newton = apo.Newton(every=1, search=False, curvature=meta.curvature)
        opt = apo.APO(model, o.SGD(model.parameters(), lr=rate), F.cross_entropy, meta=newton)
        train(model, opt, batches(5))
        rows.append([{**row, "evaluations": 0.0} for row in opt.record])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("factor", [0.3, 64.0])
def test_gradients_that_are_not_the_losss_own_are_found_out(factor: float) -> None:
    """Clipped, say, or those of a loss that is scaled; by losses, the slope would be taken for that of the loss."""
    rates = []
    for meta in (GRADIENTS, LOSSES):
        model, opt = regression(meta, BASES["sgd"])
        for x, y in squares(12):
            opt.zero_grad()
            (factor * F.mse_loss(model(x), y)).backward()
            opt.step(batch=(x, y))
        rates.append(opt.hypers()["lr"])
    assert rates[0] == rates[1]


def test_losses_judge_one_learning_rate_alone() -> None:
    model = net()
    for tune in ({"lr": "layer"}, {"lr": "global", "eps": "global"}):
        with pytest.raises(ValueError, match="curvature='losses' judges one global lr alone: drop tune="):
            apo.APO(model, apo.rmsprop(), F.cross_entropy, meta=LOSSES, tune=tune)


def test_a_checkpoint_from_before_there_were_losses_is_resumed() -> None:
    import json

    model = net()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy)
    train(model, opt, batches(3))
    state = opt.state_dict()
    for group in state["param_groups"]:
        numbers = json.loads(group["apo/numbers"])
        group["apo/numbers"] = json.dumps({name: x for name, x in numbers.items() if not name.startswith("trust/")})
    other = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy)
    other.load_state_dict(state)
    assert other.hypers() == opt.hypers()


@pytest.mark.parametrize("how", ["as it is", "another input", "outputs in place", "inputs in place", "much"])
def test_the_loss_at_the_start_is_that_of_the_training_only_if_it_was_of_this_batch(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is evaluated; either way it is the loss of the batch that was fed."""
    if how == "much":
        monkeypatch.setattr("apo.recorder.LITTLE", 8)
    model = net(dropout=0.0)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=apo.Newton(every=1, search=False))
    (batch,) = batches(1)
    x, y = batch
    out = model(x.clone() if how == "another input" else x)
    F.cross_entropy(out, y).backward()
    if how == "outputs in place":
        with torch.no_grad():
            out.mul_(0.0)
    if how == "inputs in place":
        x.mul_(1.0)
    opt.step(batch=(x, y))
    assert opt.record[0]["evaluations"] == float(how != "as it is")


def test_a_loss_that_wants_the_graph_of_its_outputs_is_evaluated() -> None:
    """A gradient penalty cannot be had from the outputs' numbers."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(out.sum(), out, create_graph=True)
        return F.cross_entropy(out, y) + 0.0 * slope.sum()

    model = net(dropout=0.0)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), loss, meta=apo.Newton(every=1, search=False))
    (batch,) = batches(1)
    loss(model(batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    assert opt.record[0]["evaluations"] == 1.0


def rows(opt: apo.APO) -> list[dict[str, Any]]:
    """The record, without how often something was evaluated."""
    return [{**row, "evaluations": 0.0} for row in opt.record]


EVALUATED: dict[str, Any] = {"forward": lambda m, batch: m(batch[0])}  # then nothing is known, as it might do anything


@pytest.mark.parametrize("meta", [GRADIENTS, LOSSES], ids=["gradients", "losses"])
def test_a_loss_that_reads_the_weights_is_that_at_the_start(meta: apo.Newton) -> None:
    found = []
    for more in ({}, EVALUATED):
        model = net(dropout=0.0)

        def loss(out: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            return F.cross_entropy(out, y) + 0.1 * sum(p.square().sum() for p in model.parameters())

        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.01), loss, meta=meta, **more)
        for x, y in batches(6):
            opt.zero_grad()
            loss(model(x), y).backward()
            opt.step(batch=(x, y))
        found.append(opt)
    for one, other in zip(rows(found[0]), rows(found[1]), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert sum(found[0].record.column("evaluations")) < sum(found[1].record.column("evaluations"))


def test_a_step_of_another_optimizer_in_between_is_not_counted_as_ours() -> None:
    """The loss at the start is that at the weights which the step starts from."""
    found = []
    for more in ({}, EVALUATED):
        model = net(dropout=0.0)
        first = o.SGD(model[0].parameters(), lr=0.1)
        opt = apo.APO(model, o.SGD(model[5].parameters(), lr=0.01), F.cross_entropy, meta=GRADIENTS, **more)
        for batch in batches(6):
            model.zero_grad()
            backward(model, batch)
            first.step()
            opt.step(batch=batch)
        found.append(rows(opt))
    assert found[0] == found[1]


def test_a_loss_of_outputs_that_have_one_is_not_given_that() -> None:
    class Outputs:
        def __init__(self, logits: Tensor) -> None:
            self.logits, self.loss = logits, logits.square().mean()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(dropout=0.0)

        def forward(self, x: Tensor) -> Outputs:
            return Outputs(self.net(x))

    def loss(out: Any, y: Tensor) -> Tensor:
        out = getattr(out, "logits", out)
        return out.square().mean() if out.ndim == 0 else F.cross_entropy(out, y)

    model = Model()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), loss, meta=apo.Newton(every=1, search=False))
    (batch,) = batches(1)
    loss(model(batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    assert opt.record[0]["evaluations"] == 1.0


def test_nested_inputs_that_are_changed_in_place_are_noticed() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(dropout=0.0)

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.net(inputs["x"])

    counts = []
    for changed in (False, True):
        model = Nested()
        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=apo.Newton(every=1, search=False))
        ((x, y),) = batches(1)
        inputs = {"x": x}
        F.cross_entropy(model(inputs), y).backward()
        if changed:
            x.add_(1.0)
        opt.step(batch=(inputs, y))
        counts.append(opt.record[0]["evaluations"])
    assert counts == [0.0, 1.0]


def test_losses_do_not_judge_weights_of_low_precision() -> None:
    """A step may be less than half a unit of a weight: the loss stays, which says nothing of its curvature."""
    rates = []
    for meta in (GRADIENTS, LOSSES):
        torch.manual_seed(0)
        model = nn.Linear(5, 1).bfloat16()

        def loss(out: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(out.float(), y)

        opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-4), loss, meta=meta)
        for _ in range(20):
            x = torch.randn(16, 5)
            batch = x.bfloat16(), x.sum(1, keepdim=True)
            opt.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            opt.step(batch=batch)
        rates.append(opt.hypers()["lr"])
    assert rates[0] == rates[1]


def test_a_sparse_output_is_not_kept() -> None:
    class Sparse(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to_sparse()

    torch.manual_seed(0)
    model = Sparse(4, 2)
    opt = apo.APO(
        model, o.SGD(model.parameters(), lr=0.1), lambda out, y: F.mse_loss(out.to_dense(), y), meta=GRADIENTS
    )
    x, y = torch.randn(3, 4), torch.randn(3, 2)
    F.mse_loss(model(x).to_dense(), y).backward()
    opt.step(batch=(x, y))
    assert len(opt.record) == 1
