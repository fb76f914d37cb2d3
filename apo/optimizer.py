"""`APO`: any optimizer, with hyperparameters that tune themselves while it trains.

At a meta-step the shell (1) takes the outputs on B' at θ, (2) puts the live weights where the step leads, (3) takes Q
and its gradient G there, and (4) pulls G back to the hyperparameters and moves them for the steps to come. It only
conducts: `bases` take steps, `evaluation` judges, `tuning` moves, `metastep` puts these in order.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apo import checkpoint
from apo.bases.build import bases_of, follow
from apo.batches import Fed
from apo.checks import flag, function, instance, real
from apo.combined import Combined
from apo.discrepancies import Loss
from apo.evaluation import Evaluate, Evaluation
from apo.feeding import Feeding
from apo.gradient import Gradient
from apo.hypers import parse_tune
from apo.layers import uncompiled, unwrapped
from apo.meta import parse_meta
from apo.metastep import NOTHING_FED, SKIPPED, MetaStep
from apo.newton import Newton
from apo.observing import Observing
from apo.processes import Processes
from apo.proximal import Proximal
from apo.record import Record
from apo.stepping import step_all
from apo.tuning import Tuning
from apo.types import Rule


class APO(Combined):
    """A base optimizer whose hyperparameters are tuned by amortized proximal optimization.

    It is a `torch.optim.Optimizer`: its groups and state are the base optimizer's own, live. ``group["lr"]`` stays the
    user's or the scheduler's number; the step uses it times ``group["lr_factor"]`` (times ``relative``), which is
    ``group["effective_lr"]``.

    Attributes:
        objective: What is judged.
        record: One row for each meta-step.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Rule[Any, Any] | torch.optim.Optimizer | Sequence[Any],
        loss: Loss | None = None,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        evaluate: Evaluate | None = None,
        objective: Proximal | None = None,
        tune: dict[str, Any] | None = None,
        meta: str | Newton | Gradient = "newton",
        relative: Callable[[int], float] | None = None,
        assume_linear: bool = False,
        skip_nonfinite: bool = False,
        process_group: Any = None,
    ) -> None:
        """Wrap a base optimizer.

        Args:
            model: The module that is trained.
            base: A rule (``apo.rmsprop(lr=1e-3)``), which takes every parameter of the model; a torch optimizer whose
                step is linear in its learning rate; or a list of torch optimizers and pairs (rule, parameters).
            loss: ``loss(outputs, target) -> []``, averaged over examples; None if outputs have ``.loss``.
            forward: ``forward(model, batch) -> outputs``; the default is ``model(batch[0])`` for a sequence and
                ``model(**batch)`` for a mapping.
            target: ``target(batch)``; the default is ``batch[1]``, or ``batch["labels"]``.
            evaluate: ``evaluate(model, batch) -> (loss, outputs)`` in the place of the three above.
            objective: What is judged; the default is the loss alone.
            tune: What may change: from hyperparameter names to "global", "group", "layer", "parameter", a function
                from parameter name to key, or a `Tune`. The default is one factor on every learning rate.
            meta: How it changes: "newton", "paper", `Newton` or `Gradient`.
            relative: A schedule on top: a function of the number of steps taken, in units of the tuned learning rate.
            assume_linear: Take it as given that a torch optimizer's step is linear in its learning rate.
            skip_nonfinite: Skip (and count) steps whose gradient is not finite.
            process_group: The processes that train it together; by default its data-parallel wrapper's, else all.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value cannot work; the message says what to do.
        """
        self.objective = Proximal() if objective is None else objective
        instance("model", model, nn.Module, "a torch.nn.Module; for plain functions see apo.hypergradient")
        instance("objective", self.objective, Proximal, "an apo.Proximal")
        function(loss=loss, forward=forward, target=target, evaluate=evaluate, relative=relative)
        flag(assume_linear=assume_linear, skip_nonfinite=skip_nonfinite)
        self.objective.check_loss(loss)
        how = parse_tune({"lr": "global"} if tune is None else tune)
        configured = parse_meta(meta, any(t.by_parameter for t in how.values()))
        self.record = Record()
        self._model, self._skip_nonfinite = uncompiled(unwrapped(model)), skip_nonfinite
        self._counts, self._warned = checkpoint.Counts(), set[str]()
        self._names, self._params = dict[Tensor, str](), dict[str, Tensor]()  # kept up to date by `_link` for all parts
        self._bases = bases_of(base, self._model, how, self._names, assume_linear, self.objective.lookahead)
        super().__init__([base.optimizer for base in self._bases])
        self._processes = Processes(model, self._params, process_group)
        self._evaluation = Evaluation(unwrapped(model), self._params, self._processes, loss, forward, target, evaluate)
        self._feeding = Feeding(self._evaluation.recorder)
        self._tuning = Tuning(how, configured, relative)
        self._observing = Observing(self._bases, self._evaluation)
        self._shape, self._rates = list[tuple[int, int]](), list[float]()
        self._link()
        self._arm()

    @property
    def due(self) -> bool:
        """Whether the next step will use a batch: to judge itself or the one after, or to measure curvature."""
        ahead = int(self.objective.fsd != 0.0)
        return self._until_meta_step() <= ahead or self._guarded or self._observing.wants_batch(self._counts.steps)

    @property
    def _guarded(self) -> bool:
        """Whether the next step is guarded: along curvature that has just been measured, it can be far too long."""
        return self._tuning.backtracks and not self._counts.frozen and self._observing.due(self._counts.steps)

    def feed(self, batch: Any, weight: float = 1.0) -> None:
        """Hand over a batch that the gradient of the next step is of; call it once for each accumulated batch.

        Args:
            batch: What the training loop calls a batch.
            weight: Its weight in the mean over the batches of the step, positive; else a TypeError or ValueError.
        """
        real("weight", weight, ends="()")
        if self.due:
            self._feeding.add(batch, weight)

    def step(self, closure: Callable[[], Any] | None = None, *, batch: Any = None, other: Any = None) -> Any:
        """Take a step; at a meta-step, judge it and move the hyperparameters.

        Args:
            closure: Run first, with gradients enabled; it recomputes the loss and its gradient, and may feed.
            batch: The batch that the gradient is of; the same as ``feed(batch)`` before.
            other: Another batch for the function-space discrepancy, in the place of that of the call before.

        Returns:
            What the closure returned.
        """
        self._link()
        if closure is not None and not callable(closure):
            raise TypeError("the first argument of step is a closure; a batch goes by name: step(batch=...)")
        with torch.enable_grad():
            loss = None if closure is None else closure()
        feeds = self._feeding.paired(batch if self.due else None)
        if batch is None and checkpoint.makes_states(self.param_groups):
            step_all(self._bases, self._tuning.values(self._counts.steps))
            return loss
        taken = self._counts.steps
        try:
            message = self._advance(feeds, self._feeding.others(other))
        finally:
            if self._counts.steps > taken:
                self._clear(keep=feeds if self._until_meta_step() == 0 and self.objective.fsd != 0.0 else ())
                self._show(self._rates)
                self.record.note(taken, self._tuning.whole(self._rates))
            else:  # an error before the commit leaves everything as it was
                self._observing.undo()
        if message and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)
        return loss

    def hypers(self) -> dict[str, float]:
        """The next step's tuned hyperparameters, schedules apart: "lr", "lr/0" if groups differ, or "lr/key" by key."""
        self._link()
        return self._tuning.hypers()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the batches of gradients that no step has used are forgotten with them."""
        super().zero_grad(set_to_none)
        self._feeding.forget()
        self._observing.forget()

    def freeze(self) -> None:
        """Stop tuning: hyperparameters stay as they are."""
        self._counts.frozen = 1

    def unfreeze(self) -> None:
        """Tune again."""
        self._counts.frozen = 0
        self._arm()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, and in these what the tuning knows, as plain numbers; no record."""
        self._link()
        with checkpoint.packed(self.param_groups, {**vars(self._counts), **self._tuning.numbers()}):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], keep_hypers: bool = False) -> None:
        """Resume from `state_dict`, or from the bare base optimizer's.

        Args:
            state_dict: What `state_dict` returned. Without the tuning's numbers, tuning starts afresh.
            keep_hypers: Keep this optimizer's hyperparameters, tuned ones included, instead of the checkpoint's.

        Raises:
            ValueError: If it is of a newer format, its groups do not fit, or it is damaged; nothing is loaded then.
        """
        self._link()
        kept = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        with self._loading(state_dict, self._tuning) as given:
            plain, numbers = checkpoint.unpack(given)
            self._counts = checkpoint.restored(checkpoint.Counts(), numbers)
            self._load(plain)
            for group, options in zip(self.param_groups, kept if keep_hypers else (), strict=keep_hypers):
                group.update(options)
            self._link()
            self._tuning.restore(numbers, offsets=not keep_hypers, searched=bool(plain["state"]))
            self._show(self._tuning.rates(self._tuning.values(self._counts.steps)))
            self._clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was; the copied recorder, which starts idle, notes forwards again."""
        super().__setstate__(state)
        self._shape = []
        self._link()
        self._arm()

    def _until_meta_step(self) -> float:
        """How many counted calls come before the next meta-step; infinity where nothing is tuned."""
        idle = self._counts.frozen or not self._tuning.offsets
        return math.inf if idle else -self._counts.counted % self._tuning.meta.every

    def _advance(self, feeds: Sequence[Fed], others: Sequence[Fed]) -> str | None:
        """Take a step, and judge it if it is a meta-step's; return what the user should be told."""
        if self._skip_nonfinite and self._processes.any(not all(base.finite() for base in self._bases)):
            self._counts.skipped += 1
            self._clear(keep=self._feeding.others())
            return "a gradient is not finite: steps with such gradients are skipped"
        unseen = self._observing.observe(feeds, self._counts.steps)
        if (meta_step := self._until_meta_step() == 0) or self._guarded:
            self._processes.check({"batches of B": len(feeds), "batches of B'": len(others)}, self._tuning.hypers())
        if meta_step and (feeds or self.objective.loss_model == "linear"):
            return self._meta_step(feeds, others) or unseen
        if feeds and self._guarded:
            return self._meta_step(feeds, [], guard=True) or unseen
        values = self._tuning.values(self._counts.steps)
        self._rates = self._tuning.rates(values)
        moving = any(any(base.moving()) for base in self._bases)
        step_all(self._bases, values)
        self._counts.steps += 1
        self._counts.counted += moving and any(rate > 0.0 for rate in self._rates)
        return NOTHING_FED if meta_step and moving else unseen

    def _meta_step(self, feeds: Sequence[Fed], others: Sequence[Fed], guard: bool = False) -> str | None:
        """Take a step and judge it, or only guard against one that is far too long."""
        counts = self._counts
        meta_step = MetaStep(self._bases, self._evaluation, self.objective, self._tuning, feeds, others, counts.steps)
        moved = meta_step.look(guarding=guard)
        try:
            if moved:
                meta_step.guard() if guard else meta_step.judge()
        finally:
            meta_step.commit()
            counts.steps += 1
            counts.counted += moved
            self._rates = meta_step.rates
        if not moved:
            return meta_step.too_small
        if row := meta_step.settle():
            counts.without_other += meta_step.without_other
            counts.skipped += meta_step.skipped
            so_far = {"skipped": float(counts.skipped), "without_other": float(counts.without_other)}
            self.record.rows.append({**row, **so_far, **self._tuning.hypers()})
        self._rates = meta_step.rates
        return SKIPPED if meta_step.skipped else None

    def _clear(self, keep: Sequence[Fed] = ()) -> None:
        """Forget the batches that have been fed, keep those of B', and make ready for the next."""
        self._feeding.clear(keep)
        self._arm()

    def _arm(self) -> None:
        """Note the conditions of the forwards to come if their batches will be used; watch them if need be."""
        self._feeding.arm(self.due, self._params.values())
        self._observing.arm(self._counts.steps)

    def _link(self) -> None:
        """Follow the base optimizers when their groups have changed."""
        shape = [(id(group), len(group["params"])) for group in self.param_groups]
        if shape == self._shape:
            return
        follow(self._bases, self._model, self._names, self._params)
        self._tuning.link(self._bases)
        self._shape = shape
        self._show(self._tuning.rates(self._tuning.values(self._counts.steps)))

    def _show(self, rates: Sequence[float]) -> None:
        """Write factors and effective learning rates into the groups, as plain floats."""
        for group, factor, rate in zip(self.param_groups, self._tuning.factors(), rates, strict=True):
            group["lr_factor"], group["effective_lr"] = factor, rate
