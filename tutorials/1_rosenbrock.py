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
# # Rosenbrock: the whole method in one loop
#
# Every optimizer has a learning rate, and somebody has to choose it. Amortized proximal optimization chooses it during
# training, by asking at a step:
#
# > Had the learning rate been a little different, would this step have ended at a lower loss?
#
# In symbols: $u$ is one step of an optimizer from the parameters $\theta$ with the gradient $g$ and the optimizer's
# state $\xi$, and $\phi$ are its hyperparameters, such as the learning rate. The step is judged by
#
# $$Q(\phi) = L(\theta') + \lambda\, D(\theta', \theta), \qquad \theta' = u(\theta, g, \xi; \phi),$$
#
# the loss where it ends, plus a price $\lambda$ on how far it goes. Then $\phi$ moves a little along $-\nabla_\phi Q$,
# the *hypergradient*, and training goes on, without a restart.
#
# This notebook builds that up on a function of two variables, where everything can be drawn and checked. The problem
# has no noise, so $\lambda = 0$ throughout, as in the paper ([Amortized Proximal
# Optimization](https://arxiv.org/abs/2203.00089)). [The next notebook](2_noisy_quadratic.ipynb) is about noise.

# %%
import os

import matplotlib.pyplot as plt
import torch

import apo

SCALE = float(os.environ.get("APO_TUTORIAL_SCALE", "1"))  # below 1 everything is shorter, and ends at higher losses
steps = int(10_000 * SCALE)

# %% [markdown]
# ## The problem
#
# $f(x, y) = (1 - x)^2 + 100\,(y - x^2)^2$ is a curved valley with steep walls and a nearly flat floor. Its minimum, 0,
# is at $(1, 1)$. A learning rate that is safe on the walls takes forever on the floor. Parameters are a dict of tensors
# by name, as in `dict(model.named_parameters())`; float64, because the last steps are lost to rounding in float32.

# %%
rosenbrock = apo.problems.rosenbrock
start = {"x": torch.tensor(1.0, dtype=torch.float64), "y": torch.tensor(-1.5, dtype=torch.float64)}
grads, loss = torch.func.grad_and_value(rosenbrock)(start)
print(f"loss {loss:.0f}, gradient ({grads['x']:.0f}, {grads['y']:.0f})")

# %% [markdown]
# ## A rule
#
# The optimizer is a *rule*: pure functions, with the hyperparameters as an argument. RMSprop divides the gradient by a
# running root mean square of itself,
#
# $$s \leftarrow \gamma s + (1 - \gamma)\, g^2, \qquad \theta \leftarrow \theta - \eta\, \frac{g}{s^\rho + \epsilon},$$
#
# with the exponent $\rho = \tfrac12$ of plain RMSprop as one more hyperparameter.

# %%
rule = apo.rmsprop(lr=1e-3)
for name, value in rule.hypers._asdict().items():
    print(f"{name:13} {value.item():g}")

# %% [markdown]
# `rule.init` makes the state and `rule.step` takes a step. Nothing is changed in place: parameters and state go in, new
# ones come out. Here are 100 steps, so that there is some state to speak of.

# %%
params, state = start, rule.init(start)
for _ in range(100):
    params, state = rule.step(params, torch.func.grad(rosenbrock)(params), state, rule.hypers)
print(f"({params['x']:.3f}, {params['y']:.3f}), loss {rosenbrock(params):.1f}")
print("s =", {name: f"{s:.0f}" for name, s in state.square_avg.items()})

# %% [markdown]
# ## The hypergradient
#
# Now the question from above, about the step that comes next. `apo.hypergradient` answers it for every hyperparameter
# at once. It is cheap: the gradient $g$ of the step does not depend on $\phi$, so $\nabla_\phi Q$ needs an ordinary
# gradient of the loss at $\theta'$ and the derivative of the step's own arithmetic. No second derivatives are taken.

# %%
grads = torch.func.grad(rosenbrock)(params)
value, slopes = apo.hypergradient(rule, rosenbrock, params, grads, state, rule.hypers)
print(f"Q = {value:.4f}, dQ/dlr = {slopes.lr:.4f}, dQ/drho = {slopes.rho:.4f}, dQ/deps = {slopes.eps:.6f}")

# %% [markdown]
# Do not take its word for it. The step is a pure function, so it can be taken with any other learning rate, and the
# slope must be that of a central finite difference.


# %%
def loss_after_step(**changes: torch.Tensor) -> torch.Tensor:
    """Q with other hyperparameters."""
    after, _ = rule.step(params, grads, state, rule.hypers._replace(**changes))
    return rosenbrock(after)


for name in ("lr", "rho"):
    phi = getattr(rule.hypers, name)
    difference = loss_after_step(**{name: phi * 1.0001}) - loss_after_step(**{name: phi * 0.9999})
    central = difference / (0.0002 * phi)
    print(f"dQ/d{name}: {getattr(slopes, name):.6f}, by differences {central:.6f}")
    torch.testing.assert_close(getattr(slopes, name), central, rtol=1e-5, atol=0)

# %% [markdown]
# The slope in `lr` is negative: a longer step would have been better. How much longer shows when the step is taken with
# many learning rates. The hypergradient is the tangent at the learning rate in use: it sees which way is down, and not
# where the bottom is.

# %%
lrs = torch.linspace(0, 2, 200, dtype=torch.float64)
curve = torch.stack([loss_after_step(lr=lr) for lr in lrs])
lr = rule.hypers.lr

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(lrs, curve, label="Q, the loss after the step")
axes.plot(lrs, value + slopes.lr * (lrs - lr), "--", label="its tangent, from the hypergradient")
axes.plot(lr, value, "o", color="black", label="the learning rate in use")
axes.set(xlabel="learning rate of the step", ylim=(0, 1.1 * value.item()))
_ = axes.legend()
# %% [markdown]
# ## The loop
#
# A learning rate is positive, and its candidates lie decades apart, so it is $\log \eta$ that moves: $\partial
# Q / \partial \log \eta = \eta\, \partial Q / \partial \eta$. Who moves it? Any optimizer can; it is called the
# *meta-optimizer*. The paper takes RMSprop again, with a learning rate of 0.1 for $\log \eta$. That makes ten lines:

# %%
params, state, hypers = start, rule.init(start), rule.hypers
log_lr = hypers.lr.log().requires_grad_()
meta = torch.optim.RMSprop([log_lr], lr=0.1)
for _ in range(int(1000 * SCALE)):
    grads = torch.func.grad(rosenbrock)(params)
    _, slopes = apo.hypergradient(rule, rosenbrock, params, grads, state, hypers)
    log_lr.grad = slopes.lr * hypers.lr
    meta.step()
    hypers = hypers._replace(lr=log_lr.detach().exp())
    params, state = rule.step(params, grads, state, hypers)
print(f"loss {rosenbrock(params):.1e}, learning rate {hypers.lr:.1e}")

# %% [markdown]
# ## Against fixed learning rates
#
# The same loop as a function: it may tune any hyperparameters, or none, only every so many steps, and keeps what
# happened. One meta-step in ten costs a tenth as much, which is what one would do on a network.


# %%
def train(lr: float, every: int = 1, tune: tuple[str, ...] = ("lr",), steps: int = steps) -> dict[str, torch.Tensor]:
    """What happened at every step of a run."""
    params, state, hypers = start, rule.init(start), apo.rmsprop(lr=lr).hypers
    logs = {name: getattr(hypers, name).log().requires_grad_() for name in tune}
    meta = torch.optim.RMSprop(logs.values(), lr=0.1) if tune else None
    rows = []
    for step in range(steps):
        grads, loss = torch.func.grad_and_value(rosenbrock)(params)
        if meta and step % every == 0:
            _, slopes = apo.hypergradient(rule, rosenbrock, params, grads, state, hypers)
            for name, log in logs.items():
                log.grad = getattr(slopes, name) * getattr(hypers, name)
            meta.step()
            hypers = hypers._replace(**{name: log.detach().exp() for name, log in logs.items()})
        rows.append(torch.stack([loss, params["x"], params["y"], hypers.lr, hypers.rho]))
        params, state = rule.step(params, grads, state, hypers)
    return dict(zip(("loss", "x", "y", "lr", "rho"), torch.stack(rows, dim=1), strict=True))


runs = {f"fixed {lr:.0e}": train(lr, tune=()) for lr in (1e-1, 1e-2, 1e-3, 1e-4)}
runs |= {f"APO, every={every}": train(1e-3, every) for every in (1, 10)}
for name, run in runs.items():
    print(f"{name:14} loss {run['loss'][-1]:8.1e}   learning rate {run['lr'][-1]:.1e}")


# %%
def draw(runs: dict[str, dict[str, torch.Tensor]]) -> None:
    """Losses and learning rates."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, run in runs.items():
        step = range(1, len(run["loss"]) + 1)
        style = ":" if "fixed" in name else "-"
        left.loglog(step, run["loss"], style, label=name)
        right.loglog(step, run["lr"], style, label=name)
    left.set(xlabel="step", title="loss")
    right.set(xlabel="step", title="learning rate")
    right.legend(fontsize="small")


draw(runs)

# %% [markdown]
# Every fixed learning rate is a compromise. RMSprop's steps have about the length of the learning rate, however small
# the gradient, so a run ends by jumping around the minimum at that distance (1e-1, 1e-2, 1e-3), or is still on its way
# (1e-4). Tuned at every step, the learning rate first rises more than a hundredfold, stays while the run follows the
# valley, and falls when steps begin to jump from wall to wall (the spikes in the loss). From there loss and learning
# rate fall together, to six decades below the best fixed one.
#
# Tuned every ten steps it does the same, more slowly: it was behind the best fixed learning rate for thousands of
# steps, and has overtaken it at the end. Ten times fewer meta-steps are ten times fewer chances to move, and a
# deterministic problem that can be followed down to 1e-10 rewards every one of them. After 20,000 steps the two are at
# 1e-12 and 1e-6 ([the full experiment](../docs/results/rosenbrock/README.md), from six starting points).
#
# On the map, with the places after 10, 100 and 1000 steps:

# %%
x, y = torch.meshgrid(torch.linspace(-0.6, 1.6, 200), torch.linspace(-1.7, 1.7, 200), indexing="xy")
height = rosenbrock({"x": x, "y": y}).log10()
figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained", sharey=True)
for axes, name in zip(panels, ("fixed 1e-02", "fixed 1e-03", "APO, every=1"), strict=True):
    run = runs[name]
    axes.contour(x, y, height, levels=torch.linspace(-1, 3, 7), colors="lightgrey", linewidths=0.8)
    axes.plot(run["x"], run["y"], linewidth=1)
    for step, marker in ((10, "o"), (100, "s"), (1000, "D")):
        axes.plot(run["x"][step : step + 1], run["y"][step : step + 1], marker, label=f"after {step}")
    axes.plot(1, 1, "*", color="red", markersize=10)
    axes.set(title=name, xlabel="x")
panels[0].set_ylabel("y")
_ = panels[0].legend(fontsize="small", loc="lower left")
# %% [markdown]
# ## Any initial learning rate will do
#
# If the method finds the learning rate, the one given to it should not matter. Five runs, from initial learning rates
# four decades apart:

# %%
first = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
meeting = {f"from {lr:.0e}": train(lr, steps=int(2000 * SCALE)) for lr in first}
draw(meeting)
at = [torch.stack([run["lr"][int(step * SCALE)] for run in meeting.values()]) for step in (0, 500, 1500)]
spread = [(lrs.max() / lrs.min()).item() for lrs in at]
print("largest lr / smallest lr: " + ", ".join(f"{ratio:.3g}" for ratio in spread))

# %% [markdown]
# The losses meet within some thirty steps. The learning rates, a factor of 10,000 apart at first, are within a factor
# of 4 on the plateau, and after 1500 steps within a few tenths. A start that is too small costs a few steps more.
#
# ## Two hyperparameters at once
#
# `slopes` has an entry for each hyperparameter, so tuning two is a matter of naming them. The exponent $\rho$ goes from
# RMSprop ($\tfrac12$) towards gradient descent ($0$), where steps shrink with the gradient by themselves.

# %%
both = train(1e-3, every=10, tune=("lr", "rho"))
both_early = train(1e-3, every=1, tune=("lr", "rho"), steps=int(2000 * SCALE))
alone, alone_early = runs["APO, every=10"], meeting["from 1e-03"]
for every, one, two in ((10, alone, both), (1, alone_early, both_early)):
    print(
        f"every={every}, {len(one['loss'])} steps: lr alone {one['loss'][-1]:.1e}, "
        f"lr and rho {two['loss'][-1]:.1e} (rho ends at {two['rho'][-1]:.2f})"
    )

# %% [markdown]
# Either way $\rho$ falls. With a meta-step every ten steps this helps; with one at every step the learning rate alone
# does better. More freedom is not always better: each hyperparameter is moved for the sake of the next step only.
#
# ## To try
#
# - Tune `eps` as well. It hardly moves: at $10^{-8}$ it plays no part next to $s^\rho$, so its slope in $\log \epsilon$
#   is nearly 0.
# - Take another rule in the loop of ten lines: `apo.sgd(lr=1e-4)`, or `apo.adam()`.
# - Take another meta-optimizer, such as `torch.optim.Adam([log_lr], lr=0.05)`.
# - Take a function of your own. `apo.hypergradient` wants any function of a dict of tensors.
#
# For a network, `apo.APO` is this loop around your own optimizer, with two lines of change to a training loop:
# [wrap your own optimizer](3_wrap_your_optimizer.ipynb).
