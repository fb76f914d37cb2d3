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
# # The noisy quadratic: why one step ahead is too short
#
# A learning rate that is judged by the next step has a flaw, which has a name: *short-horizon bias* ([Wu et al.,
# 2018](https://arxiv.org/abs/1803.02021)). It falls too fast, and training stalls. This notebook shows it on the
# smallest problem that has it, where everything can be computed exactly, and then what each variant of APO makes of it,
# good or bad.
#
# The problem is a quadratic bowl that is seen through noise. At every step the bowl's centre $c$ is drawn anew:
#
# $$\tilde f(x) = \tfrac12 (x - c)^\top H (x - c), \qquad g = H (x - c), \qquad x \leftarrow x - \eta g,$$
#
# with 1000 coordinates, curvatures $h$ evenly spaced from 0.01 to 1, and noise of variance $V = 1/h$ in each. Drawing
# $c$ is like drawing a batch. What counts is $f(x) = \tfrac12 x^\top H x$, the loss without the noise.

# %%
import os

import matplotlib.pyplot as plt
import torch

import apo
from apo.problems import LEARNING_RATES, PENALTIES, Course, NoisyQuadratic, best, receding

SCALE = float(os.environ.get("APO_TUTORIAL_SCALE", "1"))  # below 1 training is shorter, and ends at higher losses
steps = int(300 * SCALE)
problem = NoisyQuadratic()
print(f"curvatures {problem.curvature[0]:.2f} to {problem.curvature[-1]:.2f}, loss {problem.loss(problem.start):.0f}")

# %% [markdown]
# Nothing has to be sampled: the mean square $A = \mathbb{E}\, x^2$ of each coordinate follows
#
# $$A \leftarrow (1 - \eta h)^2 A + \eta^2 h^2 V, \qquad \mathbb{E} f = \tfrac12 \textstyle\sum h A.$$
#
# The first term is progress: with a long step, coordinates shrink. The second is noise: it grows with $\eta^2$, and
# most where $h$ is large. `problem.run` iterates this for a *policy*, a function from the step and the state to the
# next learning rate, such as `problem.scheduled`, which reads it from a list.

# %%
short, long = (problem.run(problem.scheduled([lr] * steps), steps) for lr in (0.1, 1.0))
print(f"after {steps} steps: loss {short.loss[-1]:.0f} at lr 0.1, {long.loss[-1]:.0f} at lr 1")

# %% [markdown]
# ## What one step sees
#
# Take SGD after 100 steps, each of which was the best for the next loss, and ask: which fixed learning rate would be
# best from here on? The answer depends on how far one looks.

# %%
here = problem.run(problem.greedy(), 100).moments
lrs = torch.logspace(-2, 0.2, 60, dtype=torch.float64)
figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
for ahead in (1, 10, 100, 300):
    losses = problem.run(problem.scheduled(lrs[:, None].expand(-1, ahead)), ahead, start=here).loss[:, -1]
    (line,) = axes.loglog(lrs, losses, label=f"{ahead} step{'s' * (ahead > 1)} ahead")
    axes.plot(lrs[losses.argmin()], losses.min(), "o", color=line.get_color())
axes.set(xlabel="learning rate from here on", ylabel="loss that many steps later")
_ = axes.legend(fontsize="small")

# %% [markdown]
# Each dot is the best choice for its horizon. For one step it pays to take a short step: the steep coordinates hold
# little but noise by now, and a short step stops adding to it at once. The flat coordinates would need long steps, but
# what these gain in a single step is next to nothing. It adds up only over many.
#
# ## Looking 1, 10, 100 and 300 steps ahead
#
# `receding` plans like that during the whole run: it takes the learning rate that is best for so many steps to come,
# and plans anew as it goes. A look of one step is `problem.greedy()`, which has a formula.

# %%
looking = {f"look {ahead} ahead": problem.run(receding(problem, ahead, steps), steps) for ahead in (10, 100, 300)}
looking = {"look 1 ahead (greedy)": problem.run(problem.greedy(), steps)} | looking


def flat_share(course: Course) -> float:
    """How much of the loss that is left lies in the flat coordinates."""
    parts = problem.curvature * course.moments.position
    return (parts[problem.curvature < 0.1].sum() / parts.sum()).item()


def table(courses: dict[str, Course]) -> None:
    """How runs end."""
    print(f"{'':30}{'final loss':>10}{'last lr':>10}{'left in h < 0.1':>18}")
    for name, course in courses.items():
        print(f"{name:30}{course.loss[-1]:10.2f}{course.rates[-1]:10.3f}{flat_share(course):18.0%}")


def draw(courses: dict[str, Course]) -> None:
    """Losses and learning rates."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, course in courses.items():
        left.semilogy(course.loss, label=name)
        right.semilogy(course.rates, label=name)
    left.set(xlabel="step", title="expected loss", ylim=(1, 1e7))
    right.set(xlabel="step", title="learning rate")
    right.legend(fontsize="small")


table(looking)
draw(looking)

# %% [markdown]
# This is the bias. Greedy is fast for the first steps and then pays for it: its learning rate has fallen so far that
# the flat coordinates stand still, and 97% of the loss that is left is theirs. Ten steps are not much better. A look of
# a hundred ends at less than a third of greedy's loss. One of 300 ends a little above that: it plans with a fixed
# learning rate, which over 300 steps is a crude plan.
#
# ## The best schedule of a family
#
# How good could it get? The final loss is a differentiable function of the whole schedule, so `best` takes its exact
# gradient through all steps and minimises it, over all schedules of a family: a fixed learning rate, an exponential
# decay, or every learning rate free ("optimal").

# %%
scheduled = {}
for family in ("fixed", "exponential", "optimal"):
    found = best(problem, problem.scheduled, LEARNING_RATES[family], steps)
    scheduled[f"best {family} lr"] = problem.run(problem.scheduled(found.sequence), steps)
table(scheduled)
draw(scheduled | {"look 1 ahead (greedy)": looking["look 1 ahead (greedy)"]})

# %% [markdown]
# A decay that is made for this number of steps ends far below everything above. So falling is right; greedy's fault is
# that it falls too soon. But look at the left picture, which these two curves leave at the top: they start at learning
# rates of 10 and 90, where the steep coordinates diverge, up to losses of $10^{65}$ and $10^{38}$, while the flat ones
# are brought home; the steep ones recover later. On a quadratic this is the exact optimum; it is no advice for a
# network.
#
# ## What APO does here
#
# APO judges a step by $Q = \tilde f(x') + \lambda \lVert x' - x \rVert^2$. `problem.apo` takes the learning rate that
# minimises its expectation. Two things can vary: $\lambda$, and the batch on which $\tilde f$ is judged. On the *same*
# batch that gave the gradient, the step is judged by noise that it is free to fit, and
#
# $$\eta = \frac{\sum h^2 (A + V)}{\sum h^2 (h + 2\lambda)(A + V)}.$$
#
# On a *fresh* batch, $V$ is absent from the numerator; with $\lambda = 0$ that is greedy's formula.

# %%
judged = {
    "same batch, λ = 0": problem.run(problem.apo(0.0), steps),
    "fresh batch, λ = 0": problem.run(problem.apo(0.0, fresh=True), steps),
    "fresh batch, λ = 1": problem.run(problem.apo(1.0, fresh=True), steps),
}
for family in ("fixed", "exponential"):
    found = best(problem, problem.apo, PENALTIES[family], steps)
    judged[f"same batch, best {family} λ"] = problem.run(problem.apo(found.sequence), steps)
    print(f"best {family} λ: {found.sequence[0]:.3g} at first, {found.sequence[-1]:.3g} at last")
table(judged)
draw(judged)

# %% [markdown]
# Five variants, four lessons:
#
# - **Fresh batch, λ = 0** is greedy, with the whole bias.
# - **Fresh batch, λ > 0** makes steps that were too short already shorter still. It is worse.
# - **Same batch, λ = 0** has the opposite fault. The learning rate does not fall, because a long step always fits its
#   own batch. The noise stays, and here it ends above greedy.
# - **Same batch, λ > 0**: a fixed λ amounts to a fixed learning rate, and the best of the one is about as good as the
#   best of the other. A λ that grows during training amounts to a decay, and ends not far above the best exponential
#   learning rate (6.9 against 3.8), without its excursion.
#
# So APO on the same batch has no short-horizon bias of its own, and no knowledge of the horizon either: that enters by
# the schedule of λ, as it otherwise enters by the schedule of the learning rate. The paper's Table 2, with all
# families, is [rebuilt in full](../docs/results/short_horizon/README.md).
#
# ## Is the expectation right?
#
# All of this was computed, without any training. `problem.simulate` trains: it draws the noise and steps with a rule,
# here `apo.sgd`, 50 runs at once, with the learning rates of the last variant. If the recursion is right, their mean is
# the expected loss, up to a standard error or two.

# %%
course = judged["same batch, best exponential λ"]
sampled = problem.simulate(apo.sgd(), course.rates, runs=50)[:, -1]
mean, error = sampled.mean().item(), (sampled.std() / len(sampled) ** 0.5).item()
print(f"expected {course.loss[-1]:.3f}, simulated {mean:.3f} ± {error:.3f}")

# %% [markdown]
# ## Two knobs
#
# How bad it is depends on how much the curvatures differ (the condition number), and on the noise. Here greedy is set
# against a look of 100 steps, on 100 coordinates instead of 1000, which makes losses ten times smaller and changes
# little else.

# %%
ratios = {}
print(f"{'condition':>9}{'noise':>8}{'greedy':>10}{'look 100':>10}{'ratio':>8}")
for condition in (1.0, 10.0, 100.0, 1000.0):
    for noise in (0.01, 1.0):
        setting = NoisyQuadratic(dimension=100, condition=condition, noise=noise)
        greedy = setting.run(setting.greedy(), steps).loss[-1].item()
        planned = setting.run(receding(setting, 100, steps), steps).loss[-1].item()
        ratios[condition, noise] = greedy / planned
        print(f"{condition:9.0f}{noise:8.2f}{greedy:10.2g}{planned:10.2g}{greedy / planned:8.1f}")

# %% [markdown]
# Where all curvatures are equal, greedy is the better of the two: what is right for the next step is right for all. At
# a condition number of 10 they are about even. It takes flat coordinates beside steep ones for a bias, and a hundred
# times less noise does not make it go away.
#
# ## For someone who trains a network
#
# - Judge a step on the batch that its gradient is of: `opt.step(batch=...)` wants that one. On a fresh batch, as on a
#   validation set, the question "was this step good?" is greedy's, and the learning rate collapses.
# - The default, λ = 0, is then free of that collapse, but has the opposite fault: it does not see the noise that long
#   steps leave behind. If the loss stays on a noisy level, that is what λ > 0 is for, `apo.Proximal(fsd=...)`, or a λ
#   that grows, `fsd=lambda step: ...`, or a learning rate schedule on top of the tuned one, `relative=`. (The λ of this
#   notebook is a price on the weights: `wsd` is twice it.)
# - Any method that adapts the learning rate to the next step's loss on fresh data has this bias. A quick win right
#   after the learning rate has dropped is no evidence: in the first figure, one step ahead, the short step wins.
# - This is a model, with a recursion for each of its coordinates. It says what can go wrong, and why, and not how much
#   of it a given network will show.
#
# ## To try
#
# - Make training longer, `steps = 1000`, and see which of the lessons stay.
# - Give the families a new member: `best` takes any `apo.problems.Family`, a function from a few numbers `u` and the
#   times `t`, which go from 0 to 1, to a sequence, and where to start searching. A half cosine ends at 8.8, with
#   `Family(lambda u, t: u.exp() * (1 + torch.cos(torch.pi * t)), lambda steps: [(0.0,)])`.
# - Add momentum: `problem.run(policy, steps, momentum=0.9)`.
