"""The Fisher information of a model, measured as one pair of Kronecker factors for each layer.

For a loss that is the mean over N examples, the Fisher information of a layer's weights is the mean over examples of
E[v vᵀ], v the gradient of −log p(y|x) and y drawn from the model's own prediction. With input rows a and gradients δ at
the outputs it is taken as

    F ≈ S ⊗ A,     A = mean over rows of a aᵀ,     S = sum over rows of N E[δ δᵀ]  (δ of the mean loss)

Rows are examples, and positions where there are several for each: those of a sequence, the patches of an image, and
repeated uses of one weight. (Grosse & Martens 2016, arXiv 1602.01407, sum A over positions and average S; the product
is the same.) Source: Martens & Grosse 2015, arXiv 1503.05671.

δ comes from an ordinary backward, whose start is a cotangent at the model's outputs: drawn ("mc"), each in turn
("exact"), or that of the training loss ("empirical").
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from apo.batches import logits
from apo.checks import function, instance
from apo.discrepancies import Loss
from apo.graphs import aside, leaves_below
from apo.layers import check_layers, input_rows, output_rows, uncompiled, unwrapped
from apo.recorder import Recorder
from apo.types import Factors, Fisher, Layer, Rule, Statistics


class Collector:
    """Sums the products of rows, layer by layer, of all forwards and backwards while it is on.

    A copy of it starts idle; hooks that a copy of the model carries stay without effect.

    Attributes:
        examples: How many the model's outputs had in all; 0 where these are no tensor and have no logits.
        float16: Whether gradients at a layer's outputs were in float16.
    """

    def __init__(self, fisher: Fisher) -> None:
        """Start idle."""
        self._layers = fisher.layers
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._round, self._on, self._depth = 0, False, 0
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is idle, and has seen nothing; the copied hooks remove themselves when they are called."""
        blank = {"_on": False, "examples": 0, "float16": False, "_rows": {}, "_inputs": {}, "_outputs": {}}
        return {**vars(self), **blank}

    def start(self, model: nn.Module) -> None:
        """Watch a model from now on, afresh."""
        self.stop()
        self.clear()
        self._round += 1  # hooks of earlier rounds, in copies of the model, are void
        self._on, self._depth = True, len(Recorder.evaluations)
        self._hooks.append(model.register_forward_hook(partial(self._count, self._round)))
        for weight, layer in self._layers.items():
            for path in layer.modules:
                hook = partial(self._watch, self._round, weight, layer)
                self._hooks.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Watch no more; what has been seen stays."""
        self._on = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch a model for a while, uncompiled: code that is compiled already runs no new hooks."""
        try:
            self.start(model)
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.stop()

    def statistics(self, scale: float) -> Statistics:
        """The factors of what has been seen.

        Args:
            scale: What the sums of δ δᵀ are to be multiplied with.

        Returns:
            Factors of every layer that has been used.
        """
        return {
            weight: Factors(self._inputs[weight] / rows, scale * self._outputs[weight])
            for weight, rows in self._rows.items()
        }

    def clear(self) -> None:
        """Forget what has been seen; forwards under way are still watched."""
        self.examples, self.float16 = 0, False
        self._rows: dict[str, int] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def _heeds(self, round_: int) -> bool:
        """Whether what happens now is to be watched: not the evaluations of another optimizer of the same model."""
        here = self._on and round_ == self._round and self._depth == len(Recorder.evaluations)
        return here and torch.is_grad_enabled()

    def _count(self, round_: int, module: nn.Module, args: Any, outputs: Any) -> None:
        """Wait for the gradient at the outputs of the whole model, to count their examples."""
        if not self._on:
            self.stop()
        outputs = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if self._heeds(round_) and isinstance(outputs, Tensor) and outputs.ndim and outputs.requires_grad:
            outputs.register_hook(partial(self._add_examples, round_))  # type: ignore[no-untyped-call]

    def _add_examples(self, round_: int, grad: Tensor) -> None:
        if self._on and round_ == self._round:
            self.examples += len(grad)

    def _watch(
        self, round_: int, weight: str, layer: Layer, module: nn.Module, args: Any, kwargs: Any, outputs: Any
    ) -> None:
        """Wait for the gradient at the outputs of a layer; where a forward is run again, only one of them gets it."""
        trained = cast(Tensor, module.weight).requires_grad
        if trained and self._heeds(round_) and isinstance(outputs, Tensor) and outputs.requires_grad:
            inputs = (args[0] if args else kwargs["input"]).detach()
            outputs.register_hook(partial(self._add, round_, weight, layer, module, inputs))  # type: ignore[no-untyped-call]

    def _add(self, round_: int, weight: str, layer: Layer, module: nn.Module, inputs: Tensor, grad: Tensor) -> None:
        if not self._on or round_ != self._round:
            return
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            a, delta = input_rows(module, inputs, layer.bias is not None), output_rows(module, grad)
            self._inputs[weight] = self._inputs.get(weight, 0.0) + a.T @ a
            self._outputs[weight] = self._outputs.get(weight, 0.0) + delta.T @ delta
        self._rows[weight] = self._rows.get(weight, 0) + len(a)
        self.float16 = self.float16 or grad.dtype == torch.float16


def fisher_factors(
    rule: Rule[Any, Any],
    model: nn.Module,
    forward: Callable[[], Any],
    loss: Loss | None = None,
    targets: Any = None,
) -> Statistics:
    """Measure what a rule such as `apo.kfac` observes, on one batch.

    Every ``.grad`` stays as it is; buffers and random numbers are used as by any forward.

    Args:
        rule: The rule, made for this model.
        model: The module.
        forward: ``forward() -> outputs``, the model on a batch; outputs are [B, ...], or have such ``logits``.
        loss: ``loss(outputs, targets) -> []``, a mean over examples; needed by "empirical" and by ``sample=``.
        targets: The targets of the batch, for "empirical".

    Returns:
        Factors of every layer that the forward uses.

    Raises:
        TypeError: If an argument is of the wrong type, or outputs are no tensor and have no logits.
        ValueError: If the rule needs no such statistics, or was made for another model, or a loss is missing, or the
            outputs do not suit.
    """
    instance("rule", rule, Rule, "an update rule that observes, such as apo.kfac(model)")
    instance("model", model, nn.Module, "the torch.nn.Module that the rule was made for")
    function(optional=False, forward=forward)
    function(loss=loss)
    if rule.fisher is None:
        raise ValueError("the rule has no use for a Fisher information: its fisher is None")
    model = uncompiled(unwrapped(model))
    check_layers(model, rule.fisher.layers)
    collector = Collector(rule.fisher)
    with collector.watching(model), torch.enable_grad():
        outputs = logits(forward())
        with aside({*model.parameters(), *leaves_below(outputs)}):
            for cotangent in cotangents(rule.fisher, outputs, loss, targets):
                torch.autograd.backward(outputs, cotangent, retain_graph=True)
    return collector.statistics(1.0)


def cotangents(fisher: Fisher, outputs: Tensor, loss: Loss | None = None, targets: Any = None) -> Iterator[Tensor]:
    """What to pull back from the outputs so that the sum of δ δᵀ over rows is S.

    Args:
        fisher: Which Fisher information, of which likelihood.
        outputs: [B, C] or [B, ..., C]; for a Gaussian also [B].
        loss: ``loss(outputs, targets) -> []``, a mean over examples.
        targets: The targets of the batch, for "empirical".

    Yields:
        Tensors shaped as the outputs: one, or for "exact" one for each output of an example.

    Raises:
        ValueError: If a loss is missing, or a categorical likelihood has fewer than two classes.
    """
    flat = outputs.detach()
    if not flat.ndim:
        raise ValueError("the outputs are a single number, not [B, ...]: return the model's outputs, not its loss")
    if fisher.kind == "empirical" or fisher.sample is not None:
        drawn = targets if fisher.sample is None else fisher.sample(flat)
        single = fisher.sample is not None and isinstance(drawn, Tensor) and drawn.ndim == flat.ndim - 1
        yield _of_loss(flat, loss, drawn, drawn.numel() if single else len(flat))
        return
    if fisher.likelihood == "categorical" and (flat.ndim < 2 or flat.shape[-1] < 2):
        raise ValueError(
            f"outputs of shape {list(flat.shape)} have no classes in their last dimension: give kfac "
            "likelihood='gaussian' for a squared error, or sample= for another likelihood"
        )
    shape, dtype = flat.shape, flat.dtype
    flat = flat if flat.ndim > 1 else flat.unsqueeze(-1)
    rows = flat.shape[:-1].numel()
    if fisher.kind == "mc":
        yield (_drawn(fisher, flat) / math.sqrt(rows)).to(dtype).reshape(shape)
        return
    scores = _scores(fisher, flat) / math.sqrt(rows)
    # Positions of one example depend on each other's inputs, so each is pulled back alone.
    for position in range(flat.shape[1:-1].numel()):
        for score in scores:
            alone = torch.zeros_like(score).reshape(len(flat), -1, flat.shape[-1])
            alone[:, position] = score.reshape(alone.shape)[:, position]
            yield alone.to(dtype).reshape(shape)


def _of_loss(outputs: Tensor, loss: Loss | None, targets: Any, terms: int) -> Tensor:
    """The gradient of a mean loss at the outputs, times the root of the number of terms in the mean."""
    if loss is None:
        raise ValueError("this Fisher information needs loss=, a function of outputs and targets")
    leaf = outputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf, targets), leaf)
    return slope * math.sqrt(terms)


def _drawn(fisher: Fisher, outputs: Tensor) -> Tensor:
    """∇ −log p(y|outputs) for one y drawn for each row, [..., C]."""
    if fisher.likelihood == "gaussian":
        return torch.randn_like(outputs, dtype=torch.promote_types(outputs.dtype, torch.float32))
    chances = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(-1)
    if not bool(chances.isfinite().all()):
        return torch.full_like(chances, math.nan)  # nothing can be drawn; the factors will say so
    drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1).reshape(*chances.shape[:-1], 1)
    return chances.scatter_add(-1, drawn, torch.full_like(drawn, -1, dtype=chances.dtype))


def _scores(fisher: Fisher, outputs: Tensor) -> Tensor:
    """Columns whose outer products add up to the Fisher information of the outputs, [C, ..., C]."""
    classes = outputs.shape[-1]
    unit = torch.eye(classes, dtype=outputs.dtype, device=outputs.device)
    unit = unit.reshape(classes, *[1] * (outputs.ndim - 1), classes).expand(classes, *outputs.shape)
    if fisher.likelihood == "gaussian":
        return unit
    chances = outputs.softmax(-1)
    return chances.movedim(-1, 0).sqrt().unsqueeze(-1) * (unit - chances)
