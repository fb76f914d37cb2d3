# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write a rule
#
# Any torch optimizer can be wrapped, and then its learning rate is tuned. To tune other hyperparameters, `apo` has to
# be able to differentiate the step, and so the step has to be a *rule*: a pure function
#
# $$\theta', \xi' = u(\theta, g, \xi; \phi)$$
#
# of parameters, gradients, state and hyperparameters. This tutorial writes one, Lion (Chen et al. 2023, [arXiv
# 2302.06675](https://arxiv.org/abs/2302.06675)), checks it as the library's tests do, and tunes two of its
# hyperparameters. One of the two we have to put in first.

# %%
import os
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import apo
from apo.domains import AVERAGING, POSITIVE, hyper
from baselines.data import load
from baselines.models import mlp

SCALE = float(os.environ.get("APO_TUTORIAL_SCALE", "1"))  # the tests run a fraction of the steps
steps = int(1_000 * SCALE)
torch.set_num_threads(1)  # the network is small

# %% [markdown]
# ## The update
#
# $$u = \beta_1 m + (1 - \beta_1) g, \qquad \theta \leftarrow \theta - \eta \,(\mathrm{sign}\, u + w\, \theta), \qquad
# m \leftarrow \beta_2 m + (1 - \beta_2) g$$
#
# The sign makes every weight move by $\eta$, whatever its gradient is. It also makes $\beta_1$ flat: a small change of
# $\beta_1$ changes no sign, the step stays the same, and its derivative is zero. The learning rate $\eta$ and the
# weight decay $w$ multiply the step, so their derivatives are there.
#
# For a second hyperparameter of interest the sign is replaced by a soft one,
#
# $$\mathrm{sign}\, u \;\to\; \frac{u}{|u| + \varepsilon},$$
#
# which is the sign where $|u| \gg \varepsilon$ and proportional to $u$ where $|u| \ll \varepsilon$. So $\varepsilon$,
# in units of the gradient, leads from Lion to SGD with momentum. With $\varepsilon = 0$ the rule is Lion.
#
# The update is written for one tensor. It makes new tensors and changes none. The hyperparameters and the state are
# NamedTuples.


# %%
class LionHypers(NamedTuple):
    """Hyperparameters, each []: lr in parameter units per step, eps in gradient units."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor


class LionState(NamedTuple):
    """The averaged gradient m, shaped as the parameter."""

    exp_avg: Tensor


def init(param):
    return LionState(torch.zeros_like(param))


def moved(param, u, hypers, *, soft, decay):
    direction = u / (u.abs() + hypers.eps) if soft else u.sign()
    if decay:
        direction = direction + hypers.weight_decay * param
    return param - hypers.lr * direction


def step(param, grad, state, hypers, *, soft, decay):
    u = hypers.beta1 * state.exp_avg + (1.0 - hypers.beta1) * grad
    exp_avg = hypers.beta2 * state.exp_avg + (1.0 - hypers.beta2) * grad
    return moved(param, u, hypers, soft=soft, decay=decay), LionState(exp_avg)


def without_momentum(param, grad, state, hypers, *, soft, decay):
    return moved(param, grad, hypers, soft=soft, decay=decay)


# %% [markdown]
# `without_momentum` is the step with $g$ in the place of $u$: a rule with momentum has it, so that a step can be
# judged without (`apo.Proximal(lookahead="no-momentum")`).
#
# `apo.elementwise` lifts the update of one tensor to a rule on all tensors of a model. It wants the initial values of
# the hyperparameters, which `hyper` checks, and their domains: `POSITIVE` is moved by its logarithm, `AVERAGING` is
# for what a one-step objective cannot judge. What is given as 0 is left out of the step for good: 0 has no logarithm
# and cannot be tuned.


# %%
def lion(lr=1e-4, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.0):
    hypers = LionHypers(
        lr=hyper("lr", lr),
        beta1=hyper("beta1", beta1, below=1.0),
        beta2=hyper("beta2", beta2, below=1.0),
        eps=hyper("eps", eps),
        weight_decay=hyper("weight_decay", weight_decay),
    )
    domains = {"lr": POSITIVE, "beta1": AVERAGING, "beta2": AVERAGING, "eps": POSITIVE, "weight_decay": POSITIVE}
    parts = {"soft": eps != 0.0, "decay": weight_decay != 0.0}
    return apo.elementwise(init, partial(step, **parts), hypers, domains, partial(without_momentum, **parts))


# %% [markdown]
# ## Check it
#
# Is the step pure? The same input twice, and the input is as before. Is it Lion? By hand, for two steps.

# %%
generator = torch.Generator().manual_seed(0)
params = {"w": torch.randn(4, 3, dtype=torch.float64, generator=generator)}
g1, g2 = ({"w": torch.randn(4, 3, dtype=torch.float64, generator=generator)} for _ in range(2))

rule = lion(lr=0.1, weight_decay=0.3)
before = params["w"].clone()
once, state = rule.step(params, g1, rule.init(params), rule.hypers)
again, _ = rule.step(params, g1, rule.init(params), rule.hypers)
pure = torch.equal(once["w"], again["w"]) and torch.equal(params["w"], before)

twice, _ = rule.step(once, g2, state, rule.hypers)
by_hand = before - 0.1 * (g1["w"].sign() + 0.3 * before)
by_hand = by_hand - 0.1 * ((0.9 * 0.01 * g1["w"] + 0.1 * g2["w"]).sign() + 0.3 * by_hand)
distance = (twice["w"] - by_hand).abs().max().item()
print(f"pure: {pure} | Lion: within {distance:.0e}")

# %% [markdown]
# `apo.hypergradient` gives the derivative of an objective after the step with respect to every hyperparameter. It is
# to equal a central difference, in float64, at a step with momentum in it. The objective here is a quadratic, and `h`
# a relative step.


# %%
def objective(new):
    return (0.5 * new["w"].square() + new["w"]).sum()


def compare(rule, h=1e-5):
    start, state = rule.step(params, g1, rule.init(params), rule.hypers)
    _, slopes = apo.hypergradient(rule, objective, start, g2, state, rule.hypers)
    differences = {}
    for name, value in rule.hypers._asdict().items():
        ends = [rule.step(start, g2, state, rule.hypers._replace(**{name: value * s}))[0] for s in (1 + h, 1 - h)]
        differences[name] = ((objective(ends[0]) - objective(ends[1])) / (2 * h * value)).item() if value else 0.0
    return slopes._asdict(), differences


hard = compare(lion(lr=0.1, weight_decay=0.3))
soft = compare(lion(lr=0.1, eps=0.2, weight_decay=0.3))
for title, (slopes, differences) in {"Lion": hard, "soft, eps = 0.2": soft}.items():
    print(f"{title:16} hypergradient, central difference")
    for name in slopes:
        print(f"  {name:13} {slopes[name].item():13.8f} {differences[name]:13.8f}")

# %% [markdown]
# They agree. For Lion the slope of `beta1` is zero, as it must be. With the soft sign it is not, but tuning by it
# would be wrong all the same: an average of gradients pays over many steps, and one step sees only how well $u$ is
# aligned with the present gradient. `beta2` does not enter the step at all, it shapes the next ones. This is what
# `AVERAGING` is for: asked to tune one of them, `apo.APO` refuses.

# %%
model = torch.nn.Linear(2, 2)
refusal = ""
try:
    apo.APO(model, lion(), loss=F.cross_entropy, tune={"beta1": "global"})
except ValueError as error:
    refusal = str(error)
print(refusal)

# %% [markdown]
# ## Train with it
#
# A small network on scikit-learn's digits, batches of 50. First Lion at fixed learning rates (`tune={}`).

# %%
data = load("digits")


def train(rule, tune, **options):
    torch.manual_seed(0)
    model = mlp((1, 8, 8), data.classes, hidden=(64,))
    opt = apo.APO(model, rule, loss=F.cross_entropy, tune=tune, **options)
    generator, trace = torch.Generator().manual_seed(0), []
    for done in range(steps):
        rows = torch.randint(len(data.train_inputs), (50,), generator=generator)
        x, y = data.train_inputs[rows], data.train_targets[rows]
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step(batch=(x, y))
        if done % 10 == 9:
            with torch.no_grad():
                trace.append(F.cross_entropy(model(data.train_inputs), data.train_targets).item())
    with torch.no_grad():
        accuracy = (model(data.test_inputs).argmax(1) == data.test_targets).float().mean().item()
    # The loss goes up and down by a factor at the end, so take the geometric mean over the last 100 steps.
    end = torch.tensor(trace[-10:]).log().mean().exp().item()
    return {"opt": opt, "trace": trace, "loss": end, "accuracy": accuracy}


def report(label, run):
    found = "  ".join(f"{name} = {value:.2e}" for name, value in run["opt"].hypers().items())
    print(f"{label:22} loss {run['loss']:.1e}, test accuracy {run['accuracy']:.3f}  {found}")


fixed = {lr: train(lion(lr), tune={}) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
for lr, run in fixed.items():
    report(f"fixed, lr = {lr:g}", run)

# %% [markdown]
# Now the learning rate is tuned, from three starts. The default objective, $\lambda = 0$, is the loss on the step's
# own batch. Beside it an objective that also wants the outputs on another batch to stay where they are,
# $\lambda_\mathrm{FSD} = 0.01$.

# %%
starts = (1e-6, 1e-3, 1.0)
tuned = {
    fsd: {lr: train(lion(lr), tune={"lr": "global"}, objective=apo.Proximal(fsd=fsd)) for lr in starts}
    for fsd in (0.0, 0.01)
}
for fsd, runs in tuned.items():
    for lr, run in runs.items():
        report(f"λ = {fsd:g}, from {lr:g}", run)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
every_tenth = range(10, 10 * (steps // 10) + 1, 10)
for (fsd, runs), color in zip(tuned.items(), ("C3", "C0"), strict=True):
    for lr, run in runs.items():
        label = f"tuned, λ = {fsd:g}" if lr == starts[0] else None
        record = run["opt"].record
        left.plot([0, *record.column("step")], [lr, *record.column("lr")], color=color, label=label)
        right.plot(every_tenth, run["trace"], color=color, alpha=0.6, label=label)
best = min(fixed, key=lambda lr: fixed[lr]["loss"])
left.axhline(best, color="0.4", linestyle="--", label=f"best fixed, {best:g}")
right.plot(every_tenth, fixed[best]["trace"], color="0.4", linestyle="--", label=f"best fixed, {best:g}")
left.set(yscale="log", xlabel="step", ylabel="lr")
right.set(yscale="log", xlabel="step", ylabel="loss of the training set")
for axis in (left, right):
    axis.legend(fontsize="small")

# %% [markdown]
# With $\lambda = 0$ the learning rate ends far above the best fixed one, and the loss with it. The sign is the reason.
# Near the end most gradients are small, and what is left of them is the noise of the batch; other optimizers then make
# small steps, but Lion's have the same length as ever. On its own batch such a step does good, as it points where this
# batch wants to go. What it does to all other examples, the objective does not see.
#
# The function-space term sees it: it is the change of the outputs on another batch. With it the three starts end near
# the same learning rate, and the loss is well below those of the fixed ones. The learning rate falls all along, which
# no fixed one does; a schedule made by hand is not in the comparison. And $\lambda$ had to be chosen: 0.001 left the
# learning rate near 1e-2 and the loss above 0.1, 0.1 took the learning rate to 1e-4 and left the loss at 1e-2. A few
# values a factor of 10 apart will do.

# %% [markdown]
# ## Two hyperparameters
#
# The soft sign lets the steps shrink with the gradients. How soft it should be is the second thing to tune. Its slope
# is per unit of the gradient's size, and its domain has it moved by its logarithm, as the learning rate is. By default
# the learning rate is moved by Newton's method, and everything else beside it by the paper's, RMSprop on the
# logarithm.
#
# What $\varepsilon$ is measured against is $|u|$, and an average of gradients is smaller than a single one. Judged
# without momentum, with $g$ in the place of $u$, $\varepsilon$ came out several times larger at the same $\lambda$,
# and the loss ended nearly a hundred times higher. So here the step is judged as it is taken, `lookahead="step"`.
# First nine fixed pairs, then the tuned ones, from five starts.

# %%
soft_fixed = {(lr, eps): train(lion(lr, eps=eps), tune={}) for eps in (1e-3, 1e-2, 1e-1) for lr in (3e-3, 1e-2, 3e-2)}
for (lr, eps), run in soft_fixed.items():
    report(f"fixed, {lr:g}, {eps:g}", run)

careful = apo.Proximal(fsd=0.01, lookahead="step")
two = {"lr": "global", "eps": "global"}
pairs = [(1e-6, 1e-2), (1e-3, 1e-2), (1.0, 1e-2), (1e-3, 1.0), (1e-6, 1.0)]
soft_tuned = {(lr, eps): train(lion(lr, eps=eps), tune=two, objective=careful) for lr, eps in pairs}
for (lr, eps), run in soft_tuned.items():
    report(f"from {lr:g}, {eps:g}", run)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for (lr, eps), run in soft_tuned.items():
    record = run["opt"].record
    axes[0].plot([0, *record.column("step")], [lr, *record.column("lr")], label=f"from {lr:g}, {eps:g}")
    axes[1].plot([0, *record.column("step")], [eps, *record.column("eps")])
    axes[2].plot(every_tenth, run["trace"])
best_pair = min(soft_fixed, key=lambda pair: soft_fixed[pair]["loss"])
style = {"color": "0.4", "linestyle": "--", "label": "best fixed"}
axes[0].axhline(best_pair[0], **style)
axes[1].axhline(best_pair[1], **style)
axes[2].plot(every_tenth, soft_fixed[best_pair]["trace"], **style)
axes[0].legend(fontsize="small")
for axis, label in zip(axes, ("lr", "eps", "loss of the training set"), strict=True):
    axis.set(yscale="log", xlabel="step", ylabel=label)

# %% [markdown]
# From $\varepsilon = 0.01$, the three learning rates lead to one pair, and it ends about as low as the best of the
# nine fixed pairs.
#
# From $\eta = 10^{-3}$ and $\varepsilon = 1$ it is another pair. There $|u| \ll \varepsilon$, only the quotient $\eta
# / \varepsilon$ matters, and the slopes in $\log \eta$ and $\log \varepsilon$ are nearly opposite: the learning rate,
# which moves first, has found the quotient, and nothing is left for $\varepsilon$ to gain. This rule is SGD with
# momentum, more or less, and on the digits it ends lowest of all.
#
# From $\eta = 10^{-6}$ and $\varepsilon = 1$ the first step, which is cautious, leaves the learning rate too low by
# far, and it rises by at most 1.1 a meta-step. Meanwhile $\varepsilon$ falls, as that makes the steps longer, too; it
# overshoots, and has to come back. This run ends worst, at a loss more than ten times that of the others. The learning
# rate has a search for its first step, a second hyperparameter has none: give it a sensible start.

# %% [markdown]
# ## Why not weight decay?
#
# It can be tuned as well: its domain is `POSITIVE`, and the slope is exact. But what is it the slope of? The objective
# sees the training loss after one step. Weight decay is there for the test loss, after thousands.

# %%
decayed = {
    fsd: train(
        lion(1e-3, weight_decay=0.01), tune={"lr": "global", "weight_decay": "global"}, objective=apo.Proximal(fsd=fsd)
    )
    for fsd in (0.0, 0.01, 0.1)
}
for fsd, run in decayed.items():
    report(f"λ = {fsd:g}", run)

# %% [markdown]
# With $\lambda = 0$ the decay grows eightyfold: the learning rate is far too high, and the decay pulls back the
# weights that it blows up. With $\lambda = 0.01$ it grows nearly as much, and then the training loss ends above that
# of the run without decay, with no gain in test accuracy. With $\lambda = 0.1$ it halves. Each time it follows what
# the next step of the training has to say, and none of that is about generalisation. So the second hyperparameter of
# this tutorial is $\varepsilon$, and $w$ is one to set by the loss on held-out data.

# %% [markdown]
# ## Into the library
#
# A rule joins `apo` by one file and one row. The file is `apo/rules/lion.py`: the code above, in this order, with
# types and docstrings; the factory is exported from `apo/__init__.py`. The row goes into `RULES` of `tests/cases.py`:
#
# ```python
# _row("lion", apo.lion, lr=0.02, beta1=0.8, eps=1e-2, weight_decay=0.3),
# ```
#
# and every contract test then runs on it: pure, keeps dtype and structure, leaves what has no gradient, finite at
# zero, equal to central differences at every granularity, compiles once, saves and loads.
# [CONTRIBUTING](../CONTRIBUTING.md) has the details. In your own project nothing of this is needed: the rule works as
# it stands here.
