"""Lightning: a callback hands over the batches, and logs what is tuned.

    def configure_optimizers(self):
        return apo.APO(self.net, torch.optim.AdamW(self.parameters(), lr=1e-3), loss=F.cross_entropy)

    Trainer(callbacks=[APOCallback()])

The module is the one that ``training_step`` calls. Where the loss is made in ``training_step`` itself, give the whole
module and ``evaluate=training_step``.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from apo.integrations.logs import to_log
from apo.optimizer import APO

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torchmetrics import Metric, MetricCollection
except ImportError as error:
    raise ImportError(
        "apo.integrations.lightning needs Lightning; install it, or apo with the extra lightning"
    ) from error


class APOCallback(Callback):
    """Feeds every `APO` of the trainer, and logs its learning rates.

    A batch is fed when its loss is about to be differentiated, so a ``training_step`` that returns None feeds nothing.
    In manual optimization nothing is fed: the loop is the module's own, and says ``opt.step(batch=batch)`` itself.
    Logged are, at the trainer's ``log_every_n_steps``, the numbers of `apo.integrations.logs.to_log`; with several
    optimizers under "apo0/", "apo1/", ... in their order.
    """

    def __init__(self) -> None:
        """Start without a batch."""
        self._batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is something to tune.

        Raises:
            ValueError: If no optimizer is an `APO`.
        """
        if not _tuned(trainer):
            names = ", ".join(type(opt).__name__ for opt in trainer.optimizers) or "none"
            raise ValueError(f"the optimizers are {names}: return an apo.APO from configure_optimizers")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Feed the batch whose loss goes into the gradient."""
        if pl_module.automatic_optimization:
            for opt in _tuned(trainer):
                opt.feed(self._batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the batch go, and log."""
        self._batch = None
        tuned = _tuned(trainer)
        for number, opt in enumerate(tuned):
            pl_module.log_dict(to_log(opt, "apo" if len(tuned) == 1 else f"apo{number}"), on_step=True, on_epoch=False)


def training_step(module: nn.Module, batch: Any) -> tuple[Any, Any]:
    """``APO(self, base, evaluate=training_step)``: the loss is what the module's ``training_step`` returns.

    What it logs by ``self.log`` and ``self.log_dict`` is logged once, by the training itself, and its metrics
    (`torchmetrics.Metric`) see no batch twice. Anything else that it leaves behind, such as an entry in a list, it
    leaves behind at each evaluation too. Discrepancies (``fsd``) need ``forward=`` besides.

    Args:
        module: The `LightningModule` whose ``configure_optimizers`` made the optimizer.
        batch: The batch.

    Returns:
        The loss, and what ``training_step`` returned.

    Raises:
        TypeError: If the module is no `LightningModule`.
    """
    if not isinstance(module, LightningModule):
        raise TypeError(
            f"evaluate=training_step needs APO(self, ...), the LightningModule, not a {type(module).__name__}"
        )
    trainer = module.trainer
    numbered = len(inspect.signature(module.training_step).parameters) > 1
    with _apart(module), trainer.precision_plugin.train_step_context():
        outputs = module.training_step(batch, *([trainer.fit_loop.batch_idx] if numbered else []))
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs, outputs


def _tuned(trainer: Trainer) -> list[APO]:
    return [opt for opt in trainer.optimizers if isinstance(opt, APO)]


@contextmanager
def _apart(module: LightningModule) -> Iterator[None]:
    """Without logging; metrics are put back at the end."""
    metrics = [metric for metric in module.modules() if isinstance(metric, (Metric, MetricCollection))]
    kept = [(metric, [(name, value, _content(value)) for name, value in vars(metric).items()]) for metric in metrics]
    vars(module)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del vars(module)["log"]
        for metric, attributes in kept:
            vars(metric).clear()
            for name, value, content in attributes:
                vars(metric)[name] = value
                if isinstance(content, Tensor):
                    value.copy_(content)
                elif content is not None:
                    value[:] = content


def _content(value: Any) -> Any:
    """A copy of what a metric may write into: its own tensors, which carry no graph, and lists."""
    if isinstance(value, Tensor):
        return value.clone() if value.grad_fn is None else None
    return list(value) if isinstance(value, list) else None
