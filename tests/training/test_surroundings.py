"""What surrounds a step in people's code: parametrised and lazy layers, hooks, inference mode, default devices."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import apo
from tests.cases import bits
from tests.shell.helpers import batches, weights
from tests.training import test_real_hypergradients as real
from tests.training.models import Transformer
from tests.training.odd import found

o = torch.optim
FAR = apo.Newton(every=1)


def tagged(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def stepped(model: nn.Module, opt: torch.optim.Optimizer, data: Any) -> Iterator[None]:
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        yield
        opt.step(**({"batch": (x, y)} if isinstance(opt, apo.APO) else {}))


def test_flash_attention() -> None:
    """It has no second derivative; on the CPU it takes no dropout."""
    task = real.TRANSFORMER._replace(model=lambda **options: Transformer(dropout=0.0, **options))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        real.check(task, real.BY_NAME["adamw"], "global", checkpointing="non-reentrant")


@pytest.mark.parametrize("tune", [{}, {"lr": "global"}])
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weights(wrap: Any, tune: Any) -> None:
    """Spectral norm iterates on buffers of its own at every forward: those of the training forwards alone."""
    runs = []
    for shelled in (False, True):
        model = tagged()
        wrap(model[0])
        opt: Any = o.AdamW(model.parameters(), lr=1e-2)
        if shelled:
            still = apo.Gradient(o.SGD, lr=0.0, every=1)
            opt = apo.APO(model, opt, F.cross_entropy, tune=tune, meta=still, objective=apo.Proximal(fsd=0.1))
        torch.manual_seed(1)
        for _ in stepped(model, opt, batches(5)):
            pass
        runs.append((weights(model), [bits(b) for b in model.buffers()]))
        assert not shelled or len(opt.record) == 5 * len(tune)
    assert runs[0] == runs[1]


def test_lazy_layers_that_have_run_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    data = batches(3)
    model(data[0][0])
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=FAR)
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = found(model)
        opt.step(batch=(x, y))
        assert found(model) == before
    assert len(opt.record) == 3


def test_saved_tensors_that_are_kept_elsewhere() -> None:
    runs = []
    for context in (torch.autograd.graph.save_on_cpu, nullcontext):
        model = tagged()
        plain = model.forward

        def forward(x: Tensor, plain: Any = plain, context: Any = context) -> Tensor:
            with context():
                return plain(x)

        model.forward = forward
        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=FAR)
        torch.manual_seed(1)
        for _ in stepped(model, opt, batches(3)):
            pass
        runs.append((weights(model), list(opt.record)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("build", [lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9), lambda m: apo.adam(lr=0.1)])
def test_numbers_stay_on_the_cpu_under_another_default_device(build: Any) -> None:
    runs = []
    for device in ("cpu", "meta"):
        model, data = tagged(), batches(4)
        torch.manual_seed(1)
        try:
            torch.set_default_device(device)
            meta = apo.Gradient(o.SGD, lr=0.1, every=1)
            objective = apo.Proximal(fsd=0.1, wsd=0.1)
            for how in (FAR, meta):
                opt = apo.APO(model, build(model), F.cross_entropy, meta=how, objective=objective)
                for _ in stepped(model, opt, data):
                    pass
                opt.load_state_dict(opt.state_dict())
        finally:
            torch.set_default_device(None)
        runs.append((weights(model), opt.hypers()))
    assert runs[0] == runs[1]


def test_another_batch_made_in_inference_mode() -> None:
    """Such tensors cannot be saved for a backward; the training batch never is one, as its own forward would fail."""
    model, (batch, other) = tagged(), batches(2)
    with torch.inference_mode():
        made = other[0] * 1.0, other[1].clone()
    runs = []
    for b in (other, made):
        model = tagged()
        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, objective=apo.Proximal(fsd=1.0))
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch, other=b)
        runs.append(opt.record[0]["fsd"])
    assert runs[0] == runs[1] > 0.0


def test_a_step_without_gradients_enabled_is_judged_all_the_same() -> None:
    model, (batch,) = tagged(), batches(1)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=FAR)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with torch.no_grad():
        opt.step(batch=batch)
    assert opt.record[0]["slope"] < 0.0


@pytest.mark.parametrize("how", [None, "non-reentrant", "reentrant"])
def test_gradients_reach_no_leaf_that_is_not_judged(how: str | None) -> None:
    """Inputs, frozen weights and a scale outside the model, which a block uses; but for one case that torch hides."""
    scale = nn.Parameter(torch.ones(()))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tagged(dropout=0.1)
            self.inner[0].weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            def block(z: Tensor) -> Tensor:
                return scale * self.inner(z)

            return block(x) if how is None else checkpoint(block, x, use_reentrant=how == "reentrant")

    model, (batch,) = Scaled(), batches(1)
    x = batch[0].clone().requires_grad_()
    opt = apo.APO(model, o.SGD(real.trained(model), lr=0.1), F.cross_entropy, meta=FAR)
    F.cross_entropy(model(x), batch[1]).backward()
    leaves = [x, scale, *model.parameters()]
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in leaves]
    opt.step(batch=(x, batch[1]))
    assert model.inner[0].weight.grad is None
    for p, (grad, content) in zip(leaves, before, strict=True):
        assert p.grad is grad
        hidden = p is scale and how == "reentrant"  # its graph is made within the backward, where none can look
        assert grad is None or torch.equal(grad, content) != hidden


def test_a_generator_of_the_users_own_goes_on() -> None:
    """It is not put back: the shell cannot know of it."""
    model, generator = tagged(0.0), torch.Generator().manual_seed(0)
    noisy = model[0].register_forward_hook(lambda m, a, y: y + 0.01 * torch.randn(y.shape, generator=generator))
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=FAR)
    (batch,) = batches(1)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    before = generator.get_state()
    opt.step(batch=batch)
    assert not torch.equal(generator.get_state(), before)
    noisy.remove()
