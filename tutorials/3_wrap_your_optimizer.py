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
# # Wrap your own optimizer
#
# You have a training loop and an optimizer, and do not know the learning rate. Here `apo` goes around the optimizer:
# first AdamW, then a list of Muon and AdamW, on a small network for Fashion-MNIST. After that come the things that one
# does around an optimizer: reading what was found, putting a schedule on top, saving, resuming, replaying.
#
# Every ten steps, `apo` looks at the step that was just taken, asks whether the batch that its gradient is of would
# have liked a longer or a shorter one, and changes the learning rate accordingly. The text speaks of Fashion-MNIST;
# where it is not on your machine, scikit-learn's digits take its place, and the numbers are others.

# %%
import io
import os
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import apo
from baselines.data import load
from baselines.models import mlp

SCALE = float(os.environ.get("APO_TUTORIAL_SCALE", "1"))  # the tests run a fraction of the steps
steps = int(400 * SCALE)
torch.set_num_threads(1)  # the network is small

try:
    name, data = "Fashion-MNIST", load("fashion-mnist")
except FileNotFoundError:
    name, data = "digits", load("digits")
images, labels = data.train_inputs[:20_000], data.train_targets[:20_000]
print(f"{name}: {len(images)} training images, {len(data.test_inputs)} test images, {steps} steps of 100")

# %% [markdown]
# The batch of a step is drawn from the number of the step, so that all runs below see the same batches. The loop is an
# ordinary one. The only thing in it that knows of `apo` is the last argument of `opt.step`, and a hand-set learning
# rate goes through the same loop without it.


# %%
def fresh_model():
    torch.manual_seed(0)
    return mlp(images.shape[1:], data.classes, hidden=(100, 100, 100))


def train(model, opt, first=0, last=steps, scheduler=None):
    for step in range(first, last):
        rows = torch.randint(len(images), (100,), generator=torch.Generator().manual_seed(step))
        x, y = images[rows], labels[rows]
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if isinstance(opt, apo.APO):
            opt.step(batch=(x, y))  # the batch that the gradient is of
        else:
            opt.step()
        if scheduler:
            scheduler.step()


@torch.no_grad()
def losses(model):
    test = model(data.test_inputs)
    accuracy = (test.argmax(1) == data.test_targets).float().mean().item()
    return F.cross_entropy(model(images), labels).item(), accuracy


# %% [markdown]
# ## AdamW, from three learning rates
#
# Two lines change: `opt = apo.APO(model, opt, loss=...)`, and the batch goes to `opt.step`. Here it is done three
# times, from initial learning rates that lie six decades apart. By hand, two of them end a training: 1e-6 goes
# nowhere, 1 blows up.

# %%
starts = (1e-6, 1e-3, 1.0)
adamw = {}
print("started at    loss of the training set, test accuracy")
for lr in starts:
    model = fresh_model()
    train(model, torch.optim.AdamW(model.parameters(), lr=lr))
    print(f"{lr:<8g}  by hand  {losses(model)[0]:10.3f}  {losses(model)[1]:.3f}")

    model = fresh_model()
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    opt = apo.APO(model, opt, loss=F.cross_entropy)
    train(model, opt)
    adamw[lr] = opt, *losses(model)
    print(f"{lr:<8g}  with apo {adamw[lr][1]:10.3f}  {adamw[lr][2]:.3f}  it ends at lr = {opt.hypers()['lr']:.2e}")

# %% [markdown]
# All three end near the same learning rate and near the same loss. `opt.hypers()` is what has been found so far. How
# it was found is in `opt.record`, one row of floats for each meta-step:

# %%
found = adamw[1e-6][0]
print(found.hypers())
for key in ("step", "loss", "lr", "scale", "evaluations"):
    print(f"{key:12}", "  ".join(f"{value:9.3g}" for value in found.record.column(key)[:6]))

# %% [markdown]
# `scale` and `evaluations` of the first row say how the far-off start was left: before the very first step, powers of
# 4 are tried on its own batch, a forward each, and the step is taken at the one that was found, a cautious one. From
# then on a meta-step changes the learning rate by at most 1.1 up or 4 down.
#
# `opt.record.plot("lr.png")` and `opt.record.to_csv("lr.csv")` write the record to a file. Here it is drawn by hand,
# beside the question that matters: what would a search over fixed learning rates have found?

# %%
adamw_grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
by_hand = {}
for lr in adamw_grid:
    model = fresh_model()
    train(model, torch.optim.AdamW(model.parameters(), lr=lr))
    by_hand[lr] = losses(model)


def draw(runs, by_hand, pick):
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for (lr, (opt, loss, _)), line, marker in zip(runs.items(), ("-", "--", ":"), "osv", strict=True):
        left.plot([0, *opt.record.column("step")], [lr, *map(pick, opt.record)], line, label=f"start {lr:g}")
        middle.plot(opt.record.column("step"), opt.record.column("loss"), line)
        right.plot(pick(opt.record[-1]), loss, marker, label=f"start {lr:g}")
    right.plot(by_hand.keys(), [loss for loss, _ in by_hand.values()], ".-", color="0.5", label="by hand", zorder=0)
    left.set(yscale="log", xlabel="step", ylabel="learning rate")
    middle.set(xlabel="step", ylabel="loss of the batch, after its step")
    right.set(xscale="log", xlabel="learning rate (apo: the last)", ylabel="final loss of the training set")
    right.xaxis.set_minor_formatter("")
    for axis in (left, right):
        axis.legend(fontsize="small")


draw(adamw, by_hand, lambda row: row["lr"])
for lr, (loss, accuracy) in by_hand.items():
    print(f"by hand, lr = {lr:g}: loss {loss:.3f}, test accuracy {accuracy:.3f}")

# %% [markdown]
# On the right, the grey curve is the search: five trainings. The three coloured dots lie near it, together, and left
# of its bottom: **the best fixed learning rate ends lower than `apo` does.** The objective is greedy, and it judges
# Adam's step without its momentum, as the paper does. Such a step is noisier than the one that is taken, and wants to
# be shorter; `apo` aims at up to twice its length for that. What one has for little more than the price of one training
# is a learning rate with which any start gets going; in this short run it is a third of the best. The start at 1e-6 is
# the slowest, as a tenth more at each meta-step takes a while.

# %% [markdown]
# ## A list: Muon and AdamW
#
# Muon orthogonalises the momentum of a matrix. It is meant for the weight matrices inside a network; the first and the
# last layer and the biases stay with AdamW. `apo.APO` takes the two as a list, as one optimizer with one step, which
# is judged as one. One factor is learned for all of it, so that the ratio of the two learning rates, here 20, stays
# yours.
#
# The momentum of Muon cannot be told from its step, so the step is judged as it is: `lookahead="step"`. And this
# training is short: with the default, a meta-step every ten steps, there would be 40, each a factor of 1.1 up at most.
# `meta=apo.Newton(every=4)` looks more often.


# %%
def muon_and_adamw(model, lr):
    inside = [model[3].weight, model[5].weight]
    rest = [p for p in model.parameters() if all(p is not weight for weight in inside)]
    return [torch.optim.Muon(inside, lr=20 * lr), torch.optim.AdamW(rest, lr=lr)]


def both(lr, **options):
    model = fresh_model()
    options = {"objective": apo.Proximal(lookahead="step"), "meta": apo.Newton(every=4), **options}
    return model, apo.APO(model, muon_and_adamw(model, lr), loss=F.cross_entropy, **options)


lists = {}
for lr in starts:
    model, opt = both(lr)
    train(model, opt)
    lists[lr] = opt, *losses(model)
    print(f"started at {lr:<6g} loss {lists[lr][1]:.3f}, test accuracy {lists[lr][2]:.3f}", end="  ")
    print({key: float(f"{value:.3g}") for key, value in opt.hypers().items()})

# %% [markdown]
# `lr/0` is Muon's, `lr/1` AdamW's. With `tune={}` nothing is tuned, and the list is a bare optimizer with one `step`;
# that is how learning rates are set by hand for it:

# %%
lists_by_hand = {}
for lr in (1e-4, 3e-4, 1e-3, 3e-3):
    model, opt = both(lr, tune={})
    train(model, opt)
    lists_by_hand[lr] = losses(model)
    print(f"by hand, {20 * lr:g} and {lr:g}: loss {lists_by_hand[lr][0]:.3f}, accuracy {lists_by_hand[lr][1]:.3f}")

draw(lists, lists_by_hand, lambda row: row["lr/1"])

# %% [markdown]
# Again the starts make no difference, and again a fixed learning rate ends lower; but this time the dots are right of
# the bottom. With momentum in the judgement, each step is as long as its own batch likes it, and the noise of the
# batches keeps the loss up. That is what a schedule is for.

# %% [markdown]
# ## A schedule on top
#
# `relative=` is a function of the number of steps taken, in units of the tuned learning rate. The tuning does not undo
# it: it goes on aiming at the learning rate without the schedule, and the steps are shorter by this factor.

# %%
scheduled = {}


def linear(step):
    return 1.0 - step / steps


for label, lr, options in (
    ("apo, from 1e-6", 1e-6, {}),
    ("apo, from 1", 1.0, {}),
    ("by hand, 1e-3", 1e-3, {"tune": {}}),
    ("by hand, 3e-3", 3e-3, {"tune": {}}),
):
    model, opt = both(lr, relative=linear, **options)
    train(model, opt)
    scheduled[label] = losses(model)
    print(f"linear to 0, {label:15} loss {scheduled[label][0]:.3f}, test accuracy {scheduled[label][1]:.3f}")

# %% [markdown]
# From both far-off starts, `apo` with the schedule ends lower than any constant learning rate that was set by hand
# above. A learning rate set by hand under the same schedule still ends lower, if it is the right one.
#
# A scheduler of torch does the same. It goes on top of `opt` as over any optimizer: `group["lr"]` is the scheduler's
# number, and `group["effective_lr"]` is what the last step used, the number to log.

# %%
half = steps // 2
cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)

model, opt = both(1e-6)
scheduler = cosine(opt)
train(model, opt, 0, half, scheduler)

file = io.BytesIO()
parts = {"model": model, "opt": opt, "scheduler": scheduler}
torch.save({key: part.state_dict() for key, part in parts.items()}, file)

train(model, opt, half, steps, scheduler)
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
axis.plot(opt.record.column("step"), opt.record.column("lr/1"), "--", label="tuned: opt.hypers()")
axis.plot(opt.record.rates[1], label='used: group["effective_lr"]')
axis.legend()
axis.set_xlabel("step")
axis.set_ylabel("learning rate of AdamW")
print(f"cosine: loss {losses(model)[0]:.3f}, test accuracy {losses(model)[1]:.3f}")

# %% [markdown]
# ## Save and resume
#
# In the middle of that run its state was saved: model, optimizer, scheduler. What has been tuned is in the optimizer's
# `state_dict`, as plain numbers. A new optimizer, made with any learning rate, loads it and goes on. It ends at the
# same weights, to the bit.

# %%
model_2, opt_2 = both(0.5)
scheduler_2 = cosine(opt_2)
file.seek(0)
saved = torch.load(file, weights_only=True)
for key, part in {"model": model_2, "opt": opt_2, "scheduler": scheduler_2}.items():
    part.load_state_dict(saved[key])
train(model_2, opt_2, half, steps, scheduler_2)

same = all(torch.equal(a, b) for a, b in zip(model.parameters(), model_2.parameters(), strict=True))
print("the same weights:", same, "| the same hyperparameters:", opt.hypers() == opt_2.hypers())

# %% [markdown]
# Random numbers (dropout, the order of the data) are yours to save, as without `apo`;
# [checkpoints](../docs/training/checkpoints.md) has a loop that can be killed at any moment. The record is not in the
# checkpoint: write it to a file if you want to keep it.

# %% [markdown]
# ## Replay, without apo
#
# The learning rates that were found are a schedule. `apo.replay` gives them to the bare optimizer: nothing is judged,
# no batch is passed, and a step costs what it did before. It takes the record or the file that `opt.record.to_csv`
# wrote. From the same initial weights and batches, the training is the same:

# %%
model = fresh_model()
bare = torch.optim.AdamW(model.parameters())
train(model, bare, scheduler=apo.replay(found.record, bare))
replayed = losses(model)
print(f"tuned {found.record.rates[0][-1]:.3e}, {adamw[1e-6][1]:.4f}")
print(f"replayed {bare.param_groups[0]['lr']:.3e}, {replayed[0]:.4f}")

# %% [markdown]
# Use it for other seeds, or to see that it was the learning rate that made the difference.
#
# ## What to take away
#
# - Wrap the optimizer, pass the batch. A learning rate that is wrong by decades costs a few forwards, and at worst a
#   slow beginning.
# - `opt.hypers()` is what was found, `opt.record` how, `group["effective_lr"]` what a step used.
# - What is found is what suits the next step. On these batches that was too small for AdamW (judged without momentum)
#   and too large for Muon (judged with it): look at a hand-set one or two before you rely on it.
# - Put a schedule to zero on top where the steps stay long: `relative=`, or any scheduler of torch.
#
# Further: [several optimizers](../docs/training/several_optimizers.md), [schedulers](../docs/training/schedulers.md),
# and the next tutorial, [write a rule](4_write_a_rule.ipynb).
