"""What a script does with the optimizer itself: checks, saves, copies, other base optimizers."""

import copy
import io
import math
from typing import Any

import torch
from torch import nn

from tests.training.models import TASKS, loss, made, sentences
from tests.training.peer import NotApplicable, Peer
from tests.training.peers import Prodigy
from tests.training.situations.registry import situation

_, _, LSTM = TASKS


@situation
def is_an_optimizer(peer: type[Peer]) -> str | None:
    """It is a `torch.optim.Optimizer`, and takes a closure as trainers pass one."""
    model = made(LSTM, dropout=0.0)
    optimizer = peer(model).optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"a {type(optimizer).__name__} is none"
    (x, y), called = sentences(1)[0], []

    def closure() -> Any:
        optimizer.zero_grad()
        called.append(loss(model(x), y))
        called[-1].backward()
        return called[-1]

    with_batch = {"batch": (x, y)} if hasattr(optimizer, "feed") else {}
    returned = optimizer.step(closure, **with_batch)
    return None if len(called) == 1 and returned is called[0] else f"the closure was called {len(called)} times"


def resumed(peer: type[Peer], weights_only: bool) -> str | None:
    """Saved after 7 steps, loaded into new objects: the losses of the next 8 are those of a run without a break."""
    batches = sentences(15)
    model = made(LSTM, dropout=0.0)
    trained = peer(model)
    for batch in batches[:7]:
        trained.step(batch)
    file = io.BytesIO()
    torch.save([model.state_dict(), trained.save()], file)
    expected = [trained.step(batch) for batch in batches[7:]]
    file.seek(0)
    weights, state = torch.load(file, weights_only=weights_only)
    model = made(LSTM, seed=1, dropout=0.0)
    model.load_state_dict(weights)
    trained = peer(model)
    trained.load(state)
    found = [trained.step(batch) for batch in batches[7:]]
    apart = [step for step, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    return f"the loss differs from step {apart[0]} on" if apart else None


@situation
def resume(peer: type[Peer]) -> str | None:
    return resumed(peer, weights_only=False)


@situation
def resume_with_weights_only(peer: type[Peer]) -> str | None:
    return resumed(peer, weights_only=True)


@situation
def deep_copy(peer: type[Peer]) -> str | None:
    """A copy of model and optimizer goes on as the original does."""
    batches = sentences(15)
    trained = peer(made(LSTM, dropout=0.0))
    for batch in batches[:7]:
        trained.step(batch)
    twin = copy.deepcopy(trained)
    expected, found = ([which.step(batch) for batch in batches[7:]] for which in (trained, twin))
    return None if found == expected else "the copy goes another way"


@situation
def adamw(peer: type[Peer]) -> str | None:
    trained = peer(made(LSTM, dropout=0.0), 1e-3, "AdamW")
    for batch in sentences(12):
        trained.step(batch)
    return None if trained.lr != 1e-3 else "nothing was learned"


@situation
def bare_checkpoint(peer: type[Peer]) -> str | None:
    """A checkpoint of the optimizer as it was before it was tuned: its averages go on."""
    if peer is Prodigy:
        raise NotApplicable("it is an optimizer of its own")
    batches = sentences(6)
    model = made(LSTM, dropout=0.0)
    bare = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in batches:
        bare.zero_grad()
        loss(model(x), y).backward()
        bare.step()
    trained = peer(model, 1e-3, "Adam")
    trained.optimizer.load_state_dict(bare.state_dict())
    for batch in batches:
        trained.step(batch)
    steps = trained.optimizer.state[next(model.parameters())]["step"]
    return None if steps == 12 else f"Adam's step is {steps} after 12"


CLASSES = (
    "SGD Adam AdamW RMSprop Adagrad Adadelta Adamax NAdam RAdam Muon ASGD Rprop LBFGS Adafactor SparseAdam".split()
)
PROPORTIONAL = 10
"""As many of them have a step that is proportional to the learning rate."""


@situation
def any_base(peer: type[Peer]) -> str | None:
    """Of torch's optimizers, those under which the learning rate has a slope and can move."""
    if peer is Prodigy:
        raise NotApplicable("it is an optimizer of its own")
    works = []
    for name in CLASSES:
        torch.manual_seed(0)
        model = nn.Linear(6, 3, bias=False)
        batch = (torch.randn(8, 6), torch.randint(3, (8,)))
        try:
            trained = peer(model, 1e-2, name)
            slopes = [trained.slope(batch) for _ in range(3)]
        except Exception:
            continue
        else:
            if all(math.isfinite(slope) for slope in slopes) and any(slopes):
                works.append(name)
    return None if len(works) >= PROPORTIONAL else f"{len(works)} of {len(CLASSES)}: {', '.join(works)}"
