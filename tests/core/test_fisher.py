"""Measuring the Fisher information: the rows of layers, drawn targets, shared weights, activation checkpointing."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import apo
from apo.layers import input_rows, output_rows
from tests.cases import randn


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double(), randn(9, 5, seed=3)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_drawn_targets_give_the_fisher_on_average(likelihood: Any) -> None:
    model, x = mlp()
    exact = apo.kfac(model, fisher="exact", likelihood=likelihood)
    drawn = apo.kfac(model, fisher="mc", likelihood=likelihood)
    expected = apo.fisher_factors(exact, model, lambda: model(x))
    draws = [apo.fisher_factors(drawn, model, lambda: model(x)) for _ in range(3000)]
    for name, factors in expected.items():
        torch.testing.assert_close(draws[0][name].inputs, factors.inputs)
        mean = torch.stack([draw[name].outputs for draw in draws]).mean(0)
        assert (mean - factors.outputs).norm() < 0.05 * factors.outputs.norm()
        assert (draws[0][name].outputs - factors.outputs).norm() > 0.05 * factors.outputs.norm()


def test_sampled_targets_of_another_likelihood() -> None:
    """A Bernoulli likelihood by ``sample=``, against its exact Fisher information."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2).double(), randn(40, 4, seed=6)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1).mean()

    rule = apo.kfac(model, sample=lambda outputs: torch.bernoulli(outputs.sigmoid()))
    draws = [apo.fisher_factors(rule, model, lambda: model(x), loss)["weight"].outputs for _ in range(4000)]
    p = model(x).sigmoid().detach()
    exact = torch.diag((p * (1 - p)).mean(0))
    assert (torch.stack(draws).mean(0) - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(ValueError, match="needs loss="):
        apo.fisher_factors(rule, model, lambda: model(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3),
        nn.Linear(5, 3, bias=False),
        nn.Conv2d(2, 3, 3),
        nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(2, 3, (2, 4), padding="same"),
        nn.Conv2d(2, 3, 3, padding="valid", bias=False),
        nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        nn.Conv2d(2, 3, (3, 2), padding="same", padding_mode="reflect"),
    ],
    ids=str,
)
def test_a_layer_is_a_product_of_matrices(layer: Any) -> None:
    """The rows of inputs times the weight are the rows of outputs."""
    layer = copy.deepcopy(layer).double()
    x = randn(4, 6, 5, seed=7) if isinstance(layer, nn.Linear) else randn(4, 2, 7, 6, seed=7)
    for inputs in (x, x[0]):  # with a batch, and a single example
        weight = layer.weight.flatten(1)
        weight = weight if layer.bias is None else torch.cat([weight, layer.bias.unsqueeze(1)], 1)
        product = input_rows(layer, inputs, layer.bias is not None) @ weight.T
        torch.testing.assert_close(output_rows(layer, layer(inputs)), product)


class Shared(nn.Module):
    """A layer that is used twice, and two layers with one weight."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how
        self.twice, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(4, 3)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.twice(self.first(self.twice(x).tanh()).tanh()).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "plain":
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.how == "reentrant"))


def test_uses_of_one_weight_are_summed() -> None:
    torch.manual_seed(0)
    model, x = Shared().double(), randn(5, 4, seed=8)
    rule = apo.kfac(model, fisher="empirical")
    assert set(rule.fisher.layers) == {"twice.weight", "first.weight", "head.weight"}
    found = apo.fisher_factors(rule, model, lambda: model(x), F.cross_entropy, torch.arange(5) % 3)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.twice.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    loss = F.cross_entropy(model(x), torch.arange(5) % 3)
    hook.remove()
    slopes = torch.autograd.grad(loss, [output for _, output in seen])
    a = torch.cat([torch.cat([inputs, torch.ones(5, 1)], 1) for inputs, _ in seen])
    delta = torch.cat(slopes)
    torch.testing.assert_close(found["twice.weight"].inputs, a.T @ a / 10)
    torch.testing.assert_close(found["twice.weight"].outputs, 5 * delta.T @ delta)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_activation_checkpointing_changes_nothing(how: str, fisher: Any) -> None:
    torch.manual_seed(0)
    plain, x, y = Shared().double(), randn(5, 4, seed=8).requires_grad_(), torch.arange(5) % 3
    again = Shared(how).double()
    again.load_state_dict(plain.state_dict())
    expected, found = (
        apo.fisher_factors(apo.kfac(m, fisher=fisher), m, lambda m=m: m(x), F.cross_entropy, y) for m in (plain, again)
    )
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other)


def test_positions_with_targets_of_their_own() -> None:
    """Outputs [B, T, C], the loss a mean over both: "exact", "mc" and drawn targets agree on the scale."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), randn(5, 6, 4, seed=6)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def drawn(outputs: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=outputs).sample()

    exact = apo.fisher_factors(apo.kfac(model, fisher="exact"), model, lambda: model(x))["weight"].outputs
    p = model(x).softmax(-1).detach().flatten(0, 1)
    torch.testing.assert_close(exact, torch.diag(p.mean(0)) - p.T @ p / len(p))
    for rule in (apo.kfac(model), apo.kfac(model, sample=drawn)):
        draws = [apo.fisher_factors(rule, model, lambda: model(x), loss)["weight"].outputs for _ in range(2000)]
        assert (torch.stack(draws).mean(0) - exact).norm() < 0.05 * exact.norm()


def test_measuring_leaves_gradients_alone() -> None:
    model, x = mlp()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in model.parameters()]
    x = x.requires_grad_()
    apo.fisher_factors(apo.kfac(model), model, lambda: model(x))
    assert x.grad is None
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), kept, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_refuses_models_and_outputs_that_do_not_suit() -> None:
    with pytest.raises(TypeError, match=r"^model=.* must be a torch.nn.Module"):
        apo.kfac([nn.Linear(2, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable Linear or Conv2d"):
        apo.kfac(nn.LayerNorm(3))
    model, x = nn.Linear(3, 1), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"outputs of shape \[4, 1\] have no classes .* likelihood='gaussian'"):
        apo.fisher_factors(apo.kfac(model), model, lambda: model(x))
    with pytest.raises(ValueError, match="has no use for a Fisher information"):
        apo.fisher_factors(apo.sgd(), model, lambda: model(x))
    flat = apo.fisher_factors(apo.kfac(model, likelihood="gaussian"), model, lambda: model(x).squeeze(1))
    assert flat["weight"].outputs.shape == (1, 1)
