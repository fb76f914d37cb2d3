"""Hugging Face Transformers: a callback hands over what the model is called with, and logs what is tuned.

    opt = apo.APO(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    Trainer(model, args, optimizers=(opt, None), callbacks=[APOCallback()], ...)

A forward pre-hook on the model notes the inputs of each training forward, so the `Trainer` is used as it is. The loss
is the model's own, which it computes from its ``labels``.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apo.integrations.logs import to_log
from apo.optimizer import APO

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    needed = "apo.integrations.transformers needs Transformers; install it, or apo with the extra transformers"
    raise ImportError(needed) from error


class APOCallback(TrainerCallback):
    """Feeds the trainer's `APO`, and adds its learning rates to what is logged.

    The numbers of `apo.integrations.logs.to_log` go into ``state.log_history`` and into the ``logs`` that the callbacks
    after this one are given. Those that `report_to` names come before it: list them among the callbacks instead.

    With gradient accumulation the trainer tells the model the number of items in the whole of a step, so that its
    micro-batches' losses add up. Each is judged with its share of that number, so that they average to the same.
    """

    def __init__(self) -> None:
        """Start idle."""
        self._opt: APO | None = None
        self._hook: RemovableHandle | None = None
        self._watching = False
        self._batches: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer, and hook the model's forward.

        Raises:
            ValueError: If the optimizer is no `APO`, or the model is not given its labels.
        """
        self._release()
        opt = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # without Accelerate's wrapper
        if not isinstance(opt, APO):
            raise ValueError(f"the optimizer is {type(opt).__name__}: pass optimizers=(apo.APO(model, ...), None)")
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} keeps the labels from the model, so its loss "
                "cannot be judged: set it to 0 and smooth in the model's own loss"
            )
        self._opt = opt
        self._hook = kwargs["model"].register_forward_pre_hook(self._note, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the forwards to come, if the next step will use them."""
        self._batches = []
        self._watching = self._opt is not None and self._opt.due

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Feed what has been noted."""
        self._watching = False
        shares = len(self._batches) * (args.world_size if args.average_tokens_across_devices else 1)
        while self._opt is not None and self._batches:
            batch = self._batches.pop(0)
            items = batch.get("num_items_in_batch")
            self._opt.feed(batch if items is None or shares == 1 else {**batch, "num_items_in_batch": items / shares})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the learning rates to the trainer's own numbers."""
        if self._opt is not None and logs is not None and "loss" in logs:
            numbers = to_log(self._opt)
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unhook the model."""
        self._release()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._watching and torch.is_grad_enabled():
            self._batches.append(kwargs)

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._opt, self._hook, self._watching, self._batches = None, None, False, []
