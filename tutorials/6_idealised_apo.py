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
# # Idealised APO: what the proximal objective would do if it were minimised exactly
#
# APO takes one step of an optimizer and asks how well it served the proximal objective. Its hyperparameters are a few
# numbers, so the objective is never minimised, only lowered. The theory in the paper (§3, App. A and B) is about an
# oracle that *does* minimise it. This tutorial runs that oracle, `apo.oracle`, on problems so small that it can be
# drawn, and checks both theorems by measurement. The first one needs a correction.
#
# Collect the outputs of a network on all training examples into one point $Z$. As the weights move, $Z$ moves on a
# manifold $M$, the *range* of the network. The loss $L(Z)$ is a simple, often convex function of the outputs; all the
# difficulty is in the shape of $M$. With the loss linearised, the oracle takes
#
# $$Z' = \arg\min_{Z' \in M}\; \langle \nabla L(Z), Z' - Z \rangle + \lambda\, D(Z', Z).$$
#
# With $D = \lVert Z' - Z \rVert^2$ this is *projected gradient descent*: step by $-\nabla L / 2\lambda$ in output
# space, then go to the nearest point of $M$. With the Hessian of the loss as the metric and $\lambda = 1/2$ it is a
# *proximal Newton* step.

# %%
import math
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import apo
from apo import oracle

SCALE = float(os.environ.get("APO_TUTORIAL_SCALE", "1"))
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Three manifolds in the plane
#
# Two training examples with one output each make output space a plane, so that $M$, the path and the level lines of
# the loss fit in one picture. A line is the range of a linear model with one weight. A circle is curved, but simple.
# The third is the range of a small network with one trained weight $w$, a residual block
# $f(x) = xw + v^\top \tanh(u\,xw + b)$.
#
# `oracle.Affine` and `oracle.Circle` know their nearest points. `oracle.Range` finds them by least squares over the
# weight (Levenberg-Marquardt), from several starts, since the distance has local minima.

# %%
inputs = torch.tensor([1.0, -0.6])
u, v, b = torch.tensor([[2.0, -1.5, 3.0], [1.2, 1.0, -0.8], [0.5, -1.0, 0.3]])


def network(weight):
    """Outputs for both inputs, [2], as a function of the trained weight, [1]."""
    return weight * inputs + torch.tanh(weight * inputs[:, None] * u + b) @ v


def squared_error(target, lipschitz=1.0):
    """The loss L/2 ‖z − target‖², whose gradient is L-Lipschitz."""
    return lambda z: 0.5 * lipschitz * (z - target).square().sum()


angles = torch.linspace(0.0, 2.0 * math.pi, 400)
weights = torch.linspace(-3.0, 3.0, 1201)[:, None]
target = torch.tensor([1.6, 1.2])
loss = squared_error(target)
network_range = oracle.Range(network, torch.linspace(-3.0, 3.0, 5)[:, None], iterations=30)
cases = {
    "a line": (
        oracle.Affine(torch.tensor([0.0, -0.5]), torch.tensor([[1.0], [0.4]])),
        torch.tensor([0.0, -0.5]) + torch.linspace(-3.0, 3.0, 2)[:, None] * torch.tensor([1.0, 0.4]),
        torch.tensor([-2.5, -1.5]),
    ),
    "a circle": (
        oracle.Circle(1.5),
        1.5 * torch.stack([angles.cos(), angles.sin()], 1),
        1.5 * torch.tensor([math.cos(3.6), math.sin(3.6)]),
    ),
    "the range of a network": (network_range, torch.func.vmap(network)(weights), network(torch.tensor([-1.8]))),
}
paths = {
    (name, penalty): oracle.projected_gradient(manifold, loss, start, penalty, steps=max(3, int(15 * SCALE)))
    for name, (manifold, _, start) in cases.items()
    for penalty in (2.0, 0.6)
}

# %%
across, up = torch.meshgrid(torch.linspace(-3.2, 3.2, 200), torch.linspace(-3.2, 3.2, 200), indexing="xy")
figure, panels = plt.subplots(1, 3, figsize=(8.4, 3.1), sharex=True, sharey=True, layout="constrained")
for axes, (name, (_, curve, _)) in zip(panels, cases.items(), strict=True):
    levels = 0.5 * ((across - target[0]) ** 2 + (up - target[1]) ** 2)
    axes.contour(across, up, levels, levels=[0.3, 1.5, 4, 8, 13], colors="0.8", linewidths=0.8)
    axes.plot(curve[:, 0], curve[:, 1], color="0.25", lw=1.2)
    for penalty, style in ((0.6, "D:C2"), (2.0, "o-C1")):
        axes.plot(*paths[name, penalty].points.T, style, ms=3.5, lw=1, label=rf"$\lambda = {penalty:g}$")
    axes.plot(*paths[name, 2.0].points[0], "s", color="C0", ms=6)
    axes.plot(*target, "*", color="C3", ms=10)
    axes.set(title=name, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xlabel="output on example 1")
panels[0].set_ylabel("output on example 2")
_ = panels[0].legend(fontsize="small", loc="lower right")

# %% [markdown]
# The square is the start, the star the targets, grey rings the levels of the loss; each dot is one step of the oracle,
# and $L = 1$. The paths go to where a level line touches $M$: there the projection of $\nabla L$ on the tangent, called
# the *effective gradient*, is zero. With the smaller $\lambda$ steps are longer.
#
# On the range of the network the cautious path stops early, at a stationary point that is not the minimum. With
# $\lambda = 0.6$ the oracle looks farther, and *jumps*: the nearest point of $M$ lies on the other side of the bend. A
# small step of the weight does not do that.

# %%
print(f"{'':24s}   λ   loss at the end   effective gradient")
for (name, penalty), path in paths.items():
    print(f"{name:24s} {penalty:3g} {path.losses[-1]:17.4f} {path.effective[-1]:20.1e}")

# %% [markdown]
# ## Theorem 1: projected gradient descent comes to rest
#
# Let $\nabla L$ be $L$-Lipschitz and of norm at most $G$, and let the curvature of $M$ be at most $C$. If
#
# $$\lambda \ge \max(CG,\ L/2),$$
#
# then the smallest effective gradient $g$ among the first $T$ points obeys
#
# $$\min_{k<T} \lVert g_k \rVert^2 \;\le\; \frac{8\lambda\,(L_0 - L^*)}{T}.$$
#
# The paper prints the condition $\lambda \ge L/4$ in place of $L/2$, and 16 in place of 8. With $L/4$ the theorem does
# not hold, not even on a straight line, which has no curvature at all. Take $M = \mathbb{R}$ and
# $\ell(z) = \tfrac12 L z^2$. The step is $z' = z - Lz/2\lambda$. At $\lambda = L/4$ it is $z' = -z$: the path swings
# for ever and the gradient never shrinks. A little above $L/4$ it does shrink, but more slowly than printed.

# %%
line = oracle.Affine(torch.zeros(1), torch.ones(1, 1))
steps = 20
swings = {
    factor: oracle.projected_gradient(line, squared_error(torch.zeros(1)), torch.ones(1), factor, steps)
    for factor in (0.25, 0.26, 0.5)
}
counts = torch.arange(1, steps + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8), layout="constrained")
for colour, (factor, path) in zip(("C3", "C1", "C2"), swings.items(), strict=True):
    left.plot(path.points[:13, 0], color=colour, lw=1, label=rf"$\lambda = {factor:g}\,L$")
    if factor < 0.5:
        least = path.effective[:-1].square().cummin(0).values
        right.loglog(counts, least, color=colour, label=rf"measured, $\lambda = {factor:g}\,L$")
        printed = 2.0 * oracle.bound(factor, path.losses[0].item(), 1) / counts
        right.loglog(counts, printed, "--", color=colour, label="printed bound")
left.set(xlabel="step", ylabel="z")
right.set(xlabel="T", ylabel="smallest squared gradient")
left.legend(fontsize="small")
right.legend(fontsize="small")
for factor, path in swings.items():
    print(f"λ = {factor:4g} L: after {steps} steps |z| = {path.points[-1].abs().item():.2e}")

# %% [markdown]
# At $L/4$ the measured line is flat and crosses the printed bound after two steps. At $0.26\,L$ it crosses the bound
# too, for some steps in the middle. At $L/2$ the very first step lands on the minimum.
#
# Now the corrected statement, on many random problems of three kinds: subspaces of $\mathbb{R}^4$, circles of radii
# from 0.2 to 10, and ranges of random residual networks with two to four training examples. The loss falls along every
# path, so the gradients stay below $G = \sqrt{2 L \cdot L_0}$; the curvature of a range is the largest on a fine grid
# of its weight. For each problem $\lambda$ is between the smallest that the theorem allows and ten times that.


# %%
def random_subspace(generator):
    """A plane in four dimensions, and the least loss on it."""
    origin, start, target = torch.randn(3, 4, generator=generator)
    plane = oracle.Affine(origin, torch.randn(4, 2, generator=generator))
    return plane, start, target, 0.0, plane.nearest(target, torch.eye(4))


def random_circle(generator):
    """A circle, a target inside or outside, and the nearest point to it."""
    radius = 0.2 * 50.0 ** torch.rand([], generator=generator).item()
    circle = oracle.Circle(radius)
    start, target = radius * torch.randn(2, 2, generator=generator)
    return circle, start, target, 1.0 / radius, circle.nearest(target, torch.eye(2))


def random_range(generator):
    """The range of a random residual network with one trained weight, its curvature, and the nearest point."""
    count = int(torch.randint(2, 5, (), generator=generator))
    x = torch.randn(count, generator=generator)
    u, v, b = torch.randn(3, 3, generator=generator)

    def outputs(weight):
        return weight * x + torch.tanh(weight * x[:, None] * u + b) @ v

    grid = torch.linspace(-6.0, 6.0, 1201)[:, None]
    curve = torch.func.vmap(outputs)(grid)
    slope = torch.func.jacrev(outputs)
    first = torch.func.vmap(slope)(grid)[..., 0]
    second = torch.func.vmap(torch.func.jacrev(slope))(grid)[..., 0, 0]
    speed = first.square().sum(1, keepdim=True)
    normal = second - (second * first).sum(1, keepdim=True) / speed * first
    curvature = (normal.norm(dim=1) / speed[:, 0]).max().item()
    target = curve[800] + 0.3 * torch.randn(count, generator=generator)
    nearest = curve[(curve - target).norm(dim=1).argmin()]
    return oracle.Range(outputs, torch.linspace(-4.0, 4.0, 5)[:, None], 30), curve[400], target, curvature, nearest


def measure(make, seed, longest):
    """The bound and the smallest squared effective gradient, for every T up to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lipschitz = 10.0 ** (2.0 * torch.rand([], generator=generator).item() - 1.0)
    manifold, start, target, curvature, nearest = make(generator)
    loss = squared_error(target, lipschitz)
    start = manifold.nearest(start, torch.eye(len(start)))
    smallest = max(curvature * math.sqrt(2.0 * lipschitz * loss(start)), lipschitz / 2.0)
    penalty = smallest * 10.0 ** torch.rand([], generator=generator).item()
    path = oracle.projected_gradient(manifold, loss, start, penalty, longest)
    excess = (path.losses[0] - loss(nearest)).item()
    bounds = torch.tensor([oracle.bound(penalty, excess, steps) for steps in range(1, longest + 1)])
    return bounds, path.effective[:-1].square().cummin(0).values


kinds = {
    "subspaces": (random_subspace, max(3, int(100 * SCALE)), 20),
    "circles": (random_circle, max(3, int(100 * SCALE)), 20),
    "ranges of networks": (random_range, max(3, int(30 * SCALE)), 5),
}
measured = {}
for name, (make, problems, longest) in kinds.items():
    pairs = [measure(make, seed, longest) for seed in range(problems)]
    measured[name] = [torch.stack(column) for column in zip(*pairs, strict=True)]
    ratios = measured[name][1] / measured[name][0]
    print(
        f"{name:20s} {problems:4d} problems, T = 1 ... {longest:2d}: "
        f"measured / bound at most {ratios.max():.2f}, median {ratios.median():.1e}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.loglog([1e-5, 1e5], [1e-5, 1e5], color="0.3", lw=1)
for colour, marker, (name, (bounds, least)) in zip(("C0", "C1", "C2"), "os^", measured.items(), strict=True):
    left.loglog(bounds[:, -1], least[:, -1].clamp_min(1e-12), marker, ms=3, color=colour, label=name)
    counts = torch.arange(1, bounds.shape[1] + 1)
    right.plot(counts, (least / bounds).max(0).values, marker + "-", ms=3, color=colour, label=name)
left.set(xlim=(1e-4, 1e5), ylim=(5e-13, 1e5), xlabel="bound", ylabel="smallest squared effective gradient")
left.legend(fontsize="small", loc="upper left")
right.set(xlabel="T", ylabel="largest measured / bound", xticks=range(1, 21, 3), ylim=(0, 1))
_ = right.legend(fontsize="small")

# %% [markdown]
# No problem is above the diagonal (points at the bottom, drawn at $10^{-12}$, have come to rest). On the right is the
# worst problem of each kind for every $T$. The bound is within a small factor of the worst case for one step, and loose
# for many: these losses are quadratic, so the true convergence is faster than $1/T$. Where the bend of the manifold
# decides, $CG$ is a worst case over the whole curve, and often much larger than needed.
#
# ## Theorem 2: proximal Newton is quadratic at the end
#
# Now the discrepancy is $(z' - z)^\top \nabla^2 \ell(z)\,(z' - z)$, with $\lambda = \tfrac12$. If the minimum $Z^*$ of
# $L$ lies on $M$, if $\nabla^2 \ell$ is $L_H$-Lipschitz and $\nabla^2 \ell \succeq \mu$, then close to $Z^*$
#
# $$\frac{\lVert Z' - Z^* \rVert}{\lVert Z - Z^* \rVert^2} \;\le\; \frac{L_H}{\mu}.$$
#
# (The paper asks for quadratic growth only, but its proof uses $\nabla^2 \ell \succeq \mu$.) Each step about doubles
# the number of correct digits. A loss that meets the assumptions, and is not quadratic, is the logistic one with *soft*
# targets $t \in (0, 1)$: $\ell(z) = \mathrm{softplus}(z) - tz$, with the minimum at $z^* = \mathrm{logit}\,t$,
# $\nabla^2 \ell = \sigma(z)(1 - \sigma(z))$ and $L_H = 1/(6\sqrt 3)$. With hard labels, 0 or 1, the minimum is at
# infinity, and the theorem says nothing.
#
# The targets are what some point of $M$ predicts, so that $Z^* \in M$. $M$ is a random three-dimensional subspace of
# $\mathbb{R}^6$, or the range of a residual network with one trained weight on three examples. $\mu$ is the least
# $\sigma(1 - \sigma)$ on the path.


# %%
def logistic(best):
    """The logistic loss whose soft targets are σ(best)."""
    return lambda z: (F.softplus(z) - torch.sigmoid(best) * z).sum()


def newton_problems(seed):
    """A manifold, Z* on it, and a start near it; first a subspace, then a range."""
    generator = torch.Generator().manual_seed(seed)
    best, directions = torch.randn(6, generator=generator), torch.randn(6, 3, generator=generator)
    start = best + directions @ (0.6 * torch.randn(3, generator=generator))
    yield f"subspace {seed}", oracle.Affine(best, directions), best, start
    x = torch.randn(3, generator=generator)
    u, v, b = torch.randn(3, 3, generator=generator)

    def outputs(weight):
        return weight * x + torch.tanh(weight * x[:, None] * u + b) @ v

    manifold = oracle.Range(outputs, torch.linspace(-2.0, 2.0, 3)[:, None], iterations=30)
    yield f"network {seed}", manifold, outputs(torch.tensor([0.4])), outputs(torch.tensor([1.0]))


errors, ratios, limits = {}, {}, {}
for name, manifold, best, start in sorted(p for seed in range(3) for p in newton_problems(seed)):
    path = oracle.proximal_newton(manifold, logistic(best), start, steps=6)
    spread = torch.sigmoid(path.points) * (1.0 - torch.sigmoid(path.points))
    limits[name] = 1.0 / (6.0 * math.sqrt(3.0)) / spread.min().item()
    errors[name] = (path.points - best).norm(dim=1)
    kept = errors[name][:-1] > 1e-5  # below, the next error is rounding
    ratios[name] = (errors[name][1:][kept] / errors[name][:-1][kept].square()).tolist()
print(f"{'':11s}  L_H/μ   ‖Z′ − Z*‖ / ‖Z − Z*‖², step by step")
for name, values in ratios.items():
    print(f"{name:11s}  {limits[name]:5.2f}   " + "  ".join(f"{value:.3f}" for value in values))

# %% [markdown]
# Every ratio is below $L_H/\mu$, here by a factor of about three or more. For comparison, projected gradient descent on
# the same problems, with $\lambda = L/2 = 1/8$, the smallest that Theorem 1 could allow:

# %%
figure, panels = plt.subplots(1, 2, figsize=(8.5, 2.8), sharey=True, layout="constrained")
for name, manifold, best, start in (p for seed in range(3) for p in newton_problems(seed)):
    axes = panels[int(name.startswith("network"))]
    slow = oracle.projected_gradient(manifold, logistic(best), start, 1.0 / 8.0, steps=max(3, int(15 * SCALE)))
    axes.semilogy(errors[name].clamp_min(1e-15), "o-", ms=3, color="C0")
    axes.semilogy((slow.points - best).norm(dim=1).clamp_min(1e-15), "s--", ms=3, color="C1", lw=1)
panels[0].set(xlabel="step", ylabel="distance to Z*", title="subspaces")
panels[1].set(xlabel="step", title="ranges of networks")
_ = panels[1].legend(panels[1].lines[:2], ["proximal Newton", "projected gradient"], fontsize="small")

# %% [markdown]
# Proximal Newton is at the rounding of float64 after three to five steps. The gradient gains about a constant factor a
# step, sometimes a large one.
#
# ## What the practical method has of this
#
# APO differs from the oracle in three ways. Its step is *one step of a rule*: instead of all of $M$, it chooses among
# the few points that a learning rate (and a damping, ...) can reach from here. It *amortises*: the hyperparameters are
# not solved for at every step but moved a little, and kept. And it sees a *batch*, not all examples.
#
# The first two can be measured against the oracle. A network with 13 weights on 20 examples, the full batch for both
# terms, and one objective for all: the linearised loss and $\lambda = 1$. SGD and K-FAC have their learning rate tuned
# by `apo.APO` with that objective; the oracle takes the same number of steps. (A sum over examples and a mean over
# examples have the same minimum, so $\lambda$ means the same in both.)

# %%
steps = max(5, int(150 * SCALE))
generator = torch.Generator().manual_seed(0)
x = torch.linspace(-1.5, 1.5, 20)[:, None]
y = torch.sin(2.0 * x) + 0.1 * torch.randn(20, 1, generator=generator)


def half_squared_error(outputs, targets):
    """½(z − t)², mean over examples."""
    return 0.5 * F.mse_loss(outputs, targets)


def new_model():
    """The same network with the same weights each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def train(make):
    """The loss before every step of a rule whose lr is tuned."""
    model = new_model()
    objective = apo.Proximal(fsd=1.0, loss_model="linear", other_fraction=1.0)
    meta = apo.Newton(every=2, curvature="gradients", relaxation=1.0)
    opt = apo.APO(model, make(model), half_squared_error, objective=objective, meta=meta)
    losses = []
    for _ in range(steps):
        loss = half_squared_error(model(x), y)
        loss.backward()
        opt.step(batch=(x, y), other=(x, y))
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def flat_outputs(flat):
    """The outputs on all examples, [20], as a function of all weights in one vector, [13]."""
    sizes = [p.numel() for p in model.parameters()]
    parts = zip(model.named_parameters(), flat.split(sizes), strict=True)
    return torch.func.functional_call(model, {name: part.view_as(p) for (name, p), part in parts}, x)[:, 0]


rules = {
    "SGD, lr tuned": lambda model: apo.sgd(lr=0.1),
    "K-FAC, lr tuned": lambda model: apo.kfac(model, lr=0.1, damping=1e-3, fisher="exact", likelihood="gaussian"),
}
losses = {name: train(make) for name, make in rules.items()}
model = new_model()
flat = torch.cat([p.detach().flatten() for p in model.parameters()])
starts = torch.stack([flat, *(flat + torch.randn(3, 13, generator=generator))])
path = oracle.projected_gradient(
    oracle.Range(flat_outputs, starts, 30), squared_error(y[:, 0]), flat_outputs(flat), 1.0, min(steps, 30)
)
losses["oracle"] = (path.losses / len(y)).tolist()
figure, axes = plt.subplots(figsize=(8.5, 2.8), layout="constrained")
for colour, (name, values) in zip(("C0", "C1", "C2"), losses.items(), strict=True):
    axes.semilogy(values, color=colour, label=name)
    print(f"{name:16s} loss after {len(values) - 1:3d} steps {values[-1]:.4f}")
axes.set(xlabel="step", ylabel="training loss")
_ = axes.legend(fontsize="small")

# %% [markdown]
# The oracle is down to the noise of the targets in a few steps, K-FAC in some tens, and SGD is well above at the end.
# Near the current weights, the best linear map from a gradient to a step is, for this objective, the inverse of
# $\lambda\,J^\top (\nabla^2 D) J$, with $J$ the derivative of the outputs: the Gauss-Newton matrix. K-FAC approximates
# it by blocks, and so comes closer to the oracle than one number for all weights can. Neither follows the curved
# manifold as far as the oracle does.
#
# The third difference, the batch, is the one that bites. A hyperparameter that is judged by the batch that its gradient
# came from looks better the more it fits that batch's noise, and the objective sees one step ahead only. The theorems
# say nothing of that: [the noisy quadratic](2_noisy_quadratic.ipynb) does.
#
# **What to take away.** Minimised exactly, the proximal objective leads to a stationary point at the rate $1/T$, if
# $\lambda$ is at least half the curvature of the loss in output space and large enough for the bend of the manifold;
# with the loss's own metric it ends quadratically. A rule gets as close to that as its hyperparameters can bring it.
