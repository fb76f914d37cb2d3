"""One training run: deterministic for its configuration, and resumable after any step.

A `Run` holds all that changes while training (weights, method, data order, random state, history) and nothing of where
it is shown or stored.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.augmentation import Augmented
from baselines.config import Config
from baselines.data import Data, load, with_label_noise
from baselines.methods import METHODS
from baselines.models import MODELS

Row = dict[str, float | None]
COLUMNS: Final = ("step", "epoch", "loss", "lr", "test_loss", "test_accuracy", "seconds")
FORMAT: Final = 1


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda where there is one, else the CPU.

    Raises:
        ValueError: a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({error}); --device cpu always works") from error
    return device


def cost_clock(device: str) -> Callable[[], float]:
    """What a run's cost is read from: on a CPU its own time, which other processes do not change, else the time."""
    return time.process_time if pick_device(device).type == "cpu" else time.perf_counter


def load_task(config: Config) -> Data:
    """The data of a configuration: read, shortened to `examples`, with label noise or its inputs as its targets."""
    reconstructs = MODELS[config.model].reconstructs
    data = load(config.data, config.data_dir, standardise=not reconstructs)
    if config.examples is not None:
        if config.examples > len(data.train_targets):
            raise ValueError(f"examples={config.examples}, but {config.data} has only {len(data.train_targets)}")
        data = data._replace(
            train_inputs=data.train_inputs[: config.examples], train_targets=data.train_targets[: config.examples]
        )
    if reconstructs:
        return data._replace(train_targets=data.train_inputs, test_targets=data.test_inputs)
    return with_label_noise(data, config.label_noise) if config.label_noise > 0 else data


class Order:
    """The order in which examples are visited: a new permutation each epoch, from a generator of its own."""

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.permutation = torch.randperm(examples, generator=self.generator)
        self.position = 0

    def draw(self) -> Tensor:
        """The indices of the next batch, int64 [B]; the last batch of an epoch holds what is left."""
        if self.position >= len(self.permutation):
            self.permutation = torch.randperm(len(self.permutation), generator=self.generator)
            self.position = 0
        indices = self.permutation[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return indices

    def state_dict(self) -> dict[str, Any]:
        """Where in which permutation, and the generator that draws the next one."""
        return {
            "permutation": self.permutation,
            "position": self.position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.permutation, self.position = state["permutation"], state["position"]
        self.generator.set_state(state["generator"])


def evaluate(
    model: nn.Module, data: tuple[Tensor, Tensor], loss: Callable[..., Tensor] = F.cross_entropy, batch_size: int = 1000
) -> tuple[float, float | None]:
    """Mean loss and accuracy in eval mode, without a graph.

    Args:
        model: inputs -> logits [B, ..., classes], or outputs in the shape of the targets.
        data: inputs [N, ...] and targets, classes [N, ...] or numbers [N, ...].
        loss: of outputs and targets, as in `torch.nn.functional`.
        batch_size: examples at once; it bounds the memory.

    Returns:
        The mean loss, and the fraction of right answers, None where targets are no classes.
    """
    inputs, targets = data
    classes = not targets.is_floating_point()
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    right = torch.zeros((), dtype=torch.int64, device=inputs.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
                outputs = model(x)
                total += loss(outputs, y, reduction="sum").double()
                if classes:
                    right += (outputs.argmax(-1) == y).sum()
    finally:
        model.train(training)
    return total.item() / targets.numel(), right.item() / targets.numel() if classes else None


class Run:
    """A training run and its whole state. Building one seeds torch's global generator.

    Args:
        config: what to run.
        data: the task as `load_task(config)` gives it; read here when left out.
        clock: what the seconds of training steps are read from.
    """

    def __init__(
        self, config: Config, data: Data | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.config, self.clock = config, clock
        self.device = pick_device(config.device)
        self.data = (load_task(config) if data is None else data).to(self.device)
        examples, *shape = self.data.train_inputs.shape
        self.steps = config.total_steps(examples)
        self.steps_per_epoch = math.ceil(examples / config.batch_size)
        self.eval_every = config.eval_every or self.steps_per_epoch
        torch.manual_seed(config.seed)
        entry = MODELS[config.model]
        self.loss = entry.loss
        self.model = entry.build(tuple(shape), self.data.classes, config.hidden)
        self.model.to(self.device).train()
        self.method = METHODS[config.method].make(self.model, config)
        if config.augment:
            self.method = Augmented(self.method, self.device)
        self.order = Order(examples, config.batch_size, config.seed)
        self.step = 0
        self.seconds = 0.0  # spent in training steps; evaluations are not counted
        self.history: list[Row] = []
        self._losses: list[Tensor] = []  # of the batches since the last row

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def advance(self) -> Row | None:
        """Take one training step; at row steps, return the new row of the history."""
        if not self.history:
            self._record(None)
        started = self.clock()
        indices = self.order.draw().to(self.device)
        batch = self.data.train_inputs[indices], self.data.train_targets[indices]
        self._losses.append(self.method.step(batch, self.step / self.steps))
        self.step += 1
        at_row = self.finished or self.step % self.eval_every == 0 or self.step % self.config.log_every == 0
        loss = torch.stack(self._losses).double().mean().item() if at_row else None  # waits for the device
        self.seconds += self.clock() - started
        return self._record(loss) if at_row else None

    def rows(self) -> Iterator[Row | None]:
        """Advance to the end, giving each step's row, or None."""
        while not self.finished:
            yield self.advance()

    def _record(self, loss: float | None) -> Row:
        """Append a row: mean batch loss since the last row, hyperparameters, and (each `eval_every`) the test set's."""
        row: Row = dict.fromkeys(COLUMNS)
        row |= {"step": self.step, "epoch": self.step / self.steps_per_epoch, "loss": loss, "seconds": self.seconds}
        row |= self.method.hypers()
        self._losses = []
        if self.finished or self.step % self.eval_every == 0:
            row["test_loss"], row["test_accuracy"] = self.evaluate(self.data.test)
        self.history.append(row)
        return row

    def evaluate(self, data: tuple[Tensor, Tensor]) -> tuple[float, float | None]:
        """Mean loss and accuracy (None without classes) on inputs and targets, in eval mode, as things stand now."""
        with self.method.evaluating():
            return evaluate(self.model, data, self.loss)

    def outcome(self) -> dict[str, Any]:
        """Loss and accuracy on the whole training set and on the test set, and the hyperparameters, as things stand."""
        train_loss, train_accuracy = self.evaluate(self.data.train)
        test_loss, test_accuracy = self.evaluate(self.data.test)
        return {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            **self.method.hypers(),
            "seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, in types that `torch.load(weights_only=True)` accepts."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "order": self.order.state_dict(),
            "history": [dict(row) for row in self.history],
            "losses": list(self._losses),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, bit by bit as if there had been no break.

        Raises:
            ValueError: a checkpoint of another format.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"the checkpoint has format {state.get('format')!r}; this version reads format {FORMAT}")
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        self.order.load_state_dict(state["order"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = [dict(row) for row in state["history"]]
        self._losses = [loss.to(self.device) for loss in state["losses"]]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
