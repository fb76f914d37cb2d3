"""K-FAC under the shell: when it observes the model's curvature, on what, and that it leaves no trace."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.shell.differences import model_of, values_of
from tests.shell.helpers import (
    Batch,
    backward,
    batches,
    endless,
    everything,
    matrices,
    net,
    state,
    traces,
    train,
    vectors,
    weights,
)

DUE = (*range(16), *range(16, 32, 2), *range(32, 40, 4))  # with every=4
pytestmark = pytest.mark.filterwarnings("error")


def data(count: int) -> list[Batch]:
    return batches(count, seed=6, size=9, dtype=torch.float64)


def functional_run(fisher: Any, steps: int, **options: Any) -> list[dict[str, Any]]:
    """K-FAC without the shell: measured by hand at the steps that are due."""
    model = model_of()
    rule = apo.kfac(model, fisher=fisher, every=4, **options)
    kept, seen = rule.init(values_of(model)), []
    for step, (x, y) in enumerate(data(steps)):
        if step in DUE:
            statistics = apo.fisher_factors(rule, model, lambda x=x: model(x), F.cross_entropy, y)
            kept = rule.observe(kept, statistics)
        model.zero_grad()
        backward(model, (x, y))
        grads = {name: p.grad for name, p in model.named_parameters()}
        new, kept = rule.step(values_of(model), grads, kept, rule.hypers)
        model.load_state_dict(new)
        seen.append(new)
    return seen


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_is_the_functional_rule(fisher: Any) -> None:
    """Observed often at first, then every fourth step; a batch is due then and only then, if one is evaluated."""
    model = model_of()
    rule = apo.kfac(model, lr=0.05, damping=0.05, fisher=fisher, every=4, ema=0.7)
    opt = apo.APO(model, rule, F.cross_entropy, tune={})
    expected = functional_run(fisher, 40, lr=0.05, damping=0.05, ema=0.7)
    for step, (batch, new) in enumerate(zip(data(40), expected, strict=True)):
        assert opt.due == (fisher == "exact" and step in DUE)
        opt.zero_grad()
        backward(model, batch)
        opt.step(batch=batch)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), new[name], rtol=1e-11, atol=1e-12)
    counts = [opt.state[p]["observations"].item() for p in matrices(model)]
    assert counts == [len(DUE)] * 2


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_accumulated_batches_are_one_batch(fisher: Any) -> None:
    """Two halves, their losses halved, give the factors of the whole."""
    runs = []
    for halves in (False, True):
        model = model_of()
        opt = apo.APO(model, apo.kfac(model, lr=0.05, fisher=fisher, every=3), F.cross_entropy, tune={})
        for x, y in batches(7, size=12, dtype=torch.float64):
            opt.zero_grad()
            parts = list(zip(x.split(6), y.split(6), strict=True)) if halves else [(x, y)]
            for part in parts:
                backward(model, part, share=1.0 / len(parts))
                opt.feed(part)
            opt.step()
        runs.append(values_of(model))
    for name, p in runs[0].items():
        torch.testing.assert_close(runs[1][name], p, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_observing_leaves_no_trace(fisher: Any) -> None:
    """Buffers, gradients, flags and random numbers are as the same training without observations leaves them."""
    seen = []
    for observes in (True, False):
        model = net()
        model[1].momentum = None  # a cumulative average: one forward more would show
        rule = apo.kfac(model, lr=0.0, fisher=fisher, every=2)
        opt = apo.APO(model, rule if observes else apo.sgd(lr=0.0), F.cross_entropy, tune={})
        torch.manual_seed(5)
        for batch in batches(6):
            opt.zero_grad()
            backward(model, batch)
            opt.step(batch=batch)
            seen.append((weights(model), traces(model)))
        hooks = [hook for m in model.modules() for hook in m._forward_hooks]
        assert len(hooks) <= 4  # "empirical" is armed for the forward to come
    assert seen[:6] == seen[6:]


def test_draws_differ_from_step_to_step() -> None:
    """A training that draws no random numbers still draws new targets at each observation."""
    model = model_of()
    opt = apo.APO(model, apo.kfac(model, lr=0.0, ema=0.0, every=1), F.cross_entropy, tune={})
    torch.manual_seed(0)
    batch, seen = data(1)[0], []
    for _ in range(3):
        opt.zero_grad()
        backward(model, batch)
        opt.step(batch=batch)
        seen.append(opt.state[model[0].weight]["outputs"])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_hypergradients_of_lr_and_damping() -> None:
    """Both at once, against central differences of the loss after the step."""
    model, (batch, second) = model_of(), data(2)
    rate = 1e-6
    opt = apo.APO(
        model,
        apo.kfac(model, lr=0.3, damping=0.02, fisher="exact", every=1),
        F.cross_entropy,
        tune={"lr": "global", "damping": apo.Tune(max_change=1e9)},
        meta=apo.Gradient(torch.optim.SGD, lr=rate, every=1),
    )
    train(model, opt, [batch])
    start, before = values_of(model), opt.hypers()
    rule = apo.kfac(model, fisher="exact")
    kept = {name: dict(opt.state.get(p, {})) for name, p in model.named_parameters()}
    kind = type(rule.init(start))
    fields = kind(*({n: f[field] for n, f in kept.items() if field in f} for field in kind._fields))
    fields = rule.observe(fields, apo.fisher_factors(rule, model, lambda: model(second[0]), F.cross_entropy, second[1]))
    grads = dict(
        zip(start, torch.autograd.grad(F.cross_entropy(model(second[0]), second[1]), model.parameters()), strict=True)
    )
    train(model, opt, [second])

    def q(name: str, shift: float) -> float:
        values = {**before, name: before[name] * torch.tensor(shift).double().exp().item()}
        hypers = rule.hypers._replace(**{n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()})
        new, _ = rule.step(start, grads, fields, hypers)
        return F.cross_entropy(torch.func.functional_call(model, new, (second[0],)), second[1]).item()

    for name, value in opt.hypers().items():
        found = -torch.tensor(value / before[name], dtype=torch.float64).log().item() / rate
        expected = (q(name, 1e-5) - q(name, -1e-5)) / 2e-5
        assert abs(expected) > 1e-4
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tune", [{"lr": "global"}, {"lr": "global", "damping": "global"}])
@pytest.mark.parametrize("lr", [1e-5, 1e-3, 0.1])
def test_tunes(tune: Any, lr: float) -> None:
    model = net(dropout=0.0)
    opt = apo.APO(model, apo.kfac(model, lr=lr, damping=1e-2), F.cross_entropy, tune=tune)
    stream = endless()
    losses = train(model, opt, (next(stream) for _ in range(300)))
    assert sum(losses[-50:]) / 50 < 0.6 * sum(losses[:3]) / 3
    assert 1e-3 < opt.hypers()["lr"] < 1.0
    assert ("damping" in tune) == (opt.hypers().get("damping", 1e-2) != 1e-2)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_resumes_to_the_bit(fisher: Any) -> None:
    def make() -> tuple[nn.Module, apo.APO]:
        model = net()
        rule = apo.kfac(model, lr=0.01, damping=0.05, fisher=fisher, every=3)
        return model, apo.APO(model, rule, F.cross_entropy, tune={"lr": "global", "damping": "global"})

    whole = list(batches(15))
    model, opt = make()
    train(model, opt, whole[:7])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "rng": torch.get_rng_state()}, file)
    expected = train(model, opt, whole[7:])
    again, resumed = make()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["rng"])
    assert train(again, resumed, whole[7:]) == expected
    assert everything(again, resumed) == everything(model, opt)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_copies_go_on_as_the_original(fisher: Any, duplicate: Any) -> None:
    model = net(dropout=0.0)
    opt = apo.APO(model, apo.kfac(model, lr=0.01, damping=0.05, fisher=fisher, every=2), F.cross_entropy)
    train(model, opt, batches(4))  # the fifth step is due, and watched
    other, copied = duplicate((model, opt))
    assert train(other, copied, batches(5, seed=2)) == train(model, opt, batches(5, seed=2))
    assert state(other, [copied]) == state(model, [opt])


def test_an_error_before_the_step_takes_the_observation_back() -> None:
    model = net(dropout=0.0)
    opt = apo.APO(model, apo.kfac(model, lr=0.01, every=2), F.cross_entropy)
    train(model, opt, batches(4))
    batch = batches(1, seed=3)[0]
    opt.zero_grad()
    backward(model, batch)
    before = everything(model, opt)
    lr = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        opt.step(batch=batch)
    opt.param_groups[0]["lr"] = lr
    assert everything(model, opt) == before


def test_says_what_keeps_it_from_observing() -> None:
    model = net()
    opt = apo.APO(model, apo.kfac(model, every=1), F.cross_entropy, tune={})
    backward(model, batches(1)[0])
    with pytest.warns(UserWarning, match=r"curvature is not being measured: pass batch="):
        opt.step()
    opt = apo.APO(model, apo.kfac(model, every=1, fisher="empirical"), F.cross_entropy, tune={})
    model.zero_grad()
    F.cross_entropy(nn.Sequential(*model)(batches(1)[0][0]), batches(1)[0][1]).backward()
    with pytest.warns(UserWarning, match=r"fisher='empirical' watches the model's own forward and backward"):
        opt.step()
    with pytest.raises(ValueError, match=r"^the rule was made for another model: this one has no layers inner"):
        apo.APO(model, apo.kfac(nn.ModuleDict({"inner": nn.Linear(2, 2)})), F.cross_entropy)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_what_is_not_finite_is_not_observed(fisher: Any) -> None:
    model = net(dropout=0.0)
    opt = apo.APO(model, apo.kfac(model, every=1, fisher=fisher), F.cross_entropy, tune={}, skip_nonfinite=False)
    train(model, opt, batches(2))
    kept = copy.deepcopy([opt.state[p] for p in matrices(model)])
    x, y = batches(1, seed=9)[0]
    opt.zero_grad()
    backward(model, (x, y))
    grads = [p.grad.clone() for p in model.parameters()]
    backward(model, (x * torch.nan, y))
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    with pytest.warns(UserWarning, match=r"a Fisher factor is not finite"):
        opt.step(batch=(x * torch.nan, y))
    for p, was in zip(matrices(model), kept, strict=True):
        assert all(torch.equal(opt.state[p][field], was[field]) for field in was)


def test_beside_another_optimizer() -> None:
    """K-FAC on the linear layers, AdamW on everything else."""
    model = net(dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = [(apo.kfac(model, lr=0.01, damping=0.05), matrices(model)), torch.optim.AdamW(vectors(model))]
        opt = apo.APO(model, pair, F.cross_entropy)
        stream = endless()
        losses = train(model, opt, (next(stream) for _ in range(200)))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert set(opt.state[model[0].weight]) >= {"inputs", "outputs", "observations"}
    assert set(opt.state[model[0].bias]) == {"step", "exp_avg", "exp_avg_sq"}
