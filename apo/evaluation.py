"""Q and its gradient at the live weights, leaving no trace.

The weights that are judged are in the live parameters, so an ordinary forward and backward is all there is: activation
checkpointing, compiled models, shared modules and tied weights work as they do in training. What an extra evaluation
would disturb is put back: buffers, ``.grad``, training flags, attributes of modules, and the state of the random number
generators.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from apo.batches import Fed, describe, logits, own_loss, themselves
from apo.conditions import Conditions, now, restore_rng, seed_rng, under
from apo.discrepancies import Loss, check_vanishes
from apo.graphs import aside, casts_leaves, leaves_below
from apo.layers import uncompiled
from apo.processes import Processes
from apo.proximal import Proximal
from apo.recorder import Recorder
from apo.shards import is_sharded, local, reshard
from apo.traces import Traces, weights_stay
from apo.trees import dense

Evaluate = Callable[[nn.Module, Any], tuple[Any, Any]]
FP16_SCALE = 1024.0
"""Q is scaled by this before a backward in float16, and the gradient unscaled after it."""
ROUNDING = 8.0 * torch.finfo(torch.float32).eps
AUTOCAST = 0.25
"""The relative error of a mean over examples, in units of the dtype that they were computed in."""
EVALUATED = (
    "This happened in an evaluation of the batch that apo.APO was given, not in a forward of the training: without "
    "forward=, target= or evaluate= it is loss(model(batch[0]), batch[1]), or with a mapping "
    "loss(model(**batch), batch['labels'])"
)
"""Goes with an error of user code, which is otherwise far from the line that is wrong."""


class Evaluation:
    """How a batch becomes a loss and outputs, and how both are taken at the live weights.

    Attributes:
        model: The module, without a data-parallel wrapper.
        processes: Those that train it together: losses are means over all of them.
        recorder: Notes the conditions of training forwards.
        rounding: The relative error of a loss: of a sum in float32, or of the dtype that the loss last came in
            or was computed in.
        noise: How far apart, relatively, one loss comes out when it is taken again, which random numbers of a model's
            own do; None until somebody has tried.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        processes: Processes,
        loss: Loss | None,
        forward: Callable[[nn.Module, Any], Any] | None,
        target: Callable[[Any], Any] | None,
        evaluate: Evaluate | None,
    ) -> None:
        """Hold the model and the functions, and hook the model's forward."""
        self.model, self.params, self.processes = model, params, processes
        self.loss, self.forward, self.target, self.evaluate = loss, forward, target, evaluate
        self._checked, self.rounding = False, ROUNDING
        self.noise: float | None = None
        self.recorder = Recorder()
        if forward is None and evaluate is None:
            self.recorder.keeps = themselves if loss else own_loss
        self.recorder.watch(model)
        weakref.finalize(self, self.recorder.stop).atexit = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy owns the copied hooks on the copied model."""
        vars(self).update(state)
        self.recorder.owned = True
        weakref.finalize(self, self.recorder.stop).atexit = False

    def value(self, feeds: Sequence[Fed]) -> float:
        """The weighted mean loss over batches at the live weights; a loss may take gradients of its own."""
        total = sum(fed.weight for fed in feeds)
        with self.processes.together(), self.undisturbed(), torch.enable_grad():
            here = sum(fed.weight / total * self._run(fed)[0].item() for fed in feeds)
        return self.processes.mean([here])[0]

    def known(self, feeds: Sequence[Fed]) -> float | None:
        """L_B(θ), of the outputs that the training's own forward gave, while the live weights are still θ; or None."""
        here = self._known(feeds[0]) if len(feeds) == 1 else None
        return None if self.processes.any(here is None) else self.processes.mean([here or 0.0])[0]

    def _known(self, fed: Fed) -> float | None:
        if fed.outputs is None:
            return None
        try:
            with self.undisturbed(), under(self._conditions(fed)), torch.no_grad():
                found: Any = self.loss(fed.outputs, self._target(fed.batch)) if self.loss else fed.outputs
                return float(found)
        except Exception:  # a loss that wants more than the numbers, such as their graph, says so when it is evaluated
            return None

    def outputs(self, objective: Proximal, feeds: Sequence[Fed]) -> list[tuple[Tensor, Conditions]]:
        """The outputs on batches at the live weights, and the conditions under which to take them again.

        Raises:
            TypeError: If outputs are no tensor and have no logits.
            ValueError: If a custom discrepancy does not vanish at equality; it is checked once.
        """
        taken = []
        with self.processes.together(), self.undisturbed(), torch.no_grad():
            for fed in feeds:
                conditions = self._conditions(fed)
                with under(conditions):
                    taken.append((logits(self._outputs(fed.batch)).clone(), conditions))
            if taken and callable(objective.discrepancy) and not self._checked and bool(taken[0][0].isfinite().all()):
                check_vanishes(objective.discrepancy, taken[0][0])
                self._checked = True
        return taken

    def judge(
        self,
        objective: Proximal,
        feeds: Sequence[Fed],
        other: Sequence[Fed],
        old: Sequence[tuple[Tensor, Conditions]],
        fsd: float,
        take_in: Callable[[str, Tensor], None] | None,
    ) -> tuple[float, float]:
        """The loss and the function-space discrepancy at the live weights, and their gradient if it is wanted.

        Args:
            objective: Says how the discrepancy is measured.
            feeds: B; empty leaves the loss out.
            other: B'.
            old: The outputs on B' at θ.
            fsd: λ_FSD.
            take_in: Called with a parameter's name and its gradient, as often as a backward comes upon it: the gradient
                of the sum of both adds up from these. Of copies of the weights it is that of this process, of shards
                the shard that is here. With None no backward is made.

        Returns:
            The loss on B, and fsd times the mean discrepancy on B'.
        """
        loss = distance = 0.0
        scale = FP16_SCALE if any(fed.conditions is not None and fed.conditions.float16 for fed in feeds) else 1.0
        taking = nullcontext() if take_in is None else self._taking(take_in, scale)
        take = self._backward if take_in else lambda part, scale: part.item()
        with self.processes.together(), self.undisturbed(), aside(self._own()), torch.enable_grad(), taking:
            for fed in feeds:  # a loss may take gradients of its own
                loss += take(fed.weight / sum(f.weight for f in feeds) * self._run(fed)[0], scale)
            torch.set_grad_enabled(take_in is not None)
            for fed, (before, conditions) in zip(other, old, strict=True):
                with under(conditions):
                    after = logits(self._outputs(fed.batch))
                    targets = self._target(fed.batch) if objective.needs_targets else None
                    apart = objective.distance(after, before, self.loss, targets)
                distance += take(fsd * fed.weight / sum(f.weight for f in other) * apart, scale)
        loss, distance = self.processes.mean([loss, distance])
        return loss, distance

    def pull(
        self,
        fed: Fed,
        watching: Callable[[nn.Module], AbstractContextManager[None]],
        cotangents: Callable[[Tensor], Iterable[Tensor]],
        seed: int,
    ) -> None:
        """Pull cotangents at the outputs on a batch back through the model, for hooks to see the gradients.

        Args:
            fed: The batch.
            watching: ``with watching(model)`` is when the hooks are there.
            cotangents: From the outputs to tensors of their shape.
            seed: Of the random numbers that they draw. The generators are put back afterwards, so without it a training
                that draws none itself would draw the same at every step.
        """
        with self.undisturbed(), watching(uncompiled(self.model)), aside(self._own()), torch.enable_grad():
            with under(self._conditions(fed)):
                outputs = logits(self._outputs(fed.batch))
            seed_rng(self.recorder.devices, seed)
            with aside(leaves_below(outputs)):
                for cotangent in cotangents(outputs):
                    torch.autograd.backward(outputs, cotangent, retain_graph=True)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put back what models and random number generators were at the end, also after an error."""
        reshard(self.model)
        before, traces = now(self.recorder.devices), Traces()
        traces.keep(self.model)
        Recorder.evaluations.append(traces)
        try:
            with weights_stay(self.params.values()):
                yield
        except Exception as error:
            error.add_note(EVALUATED)
            raise
        finally:
            reshard(self.model)
            Recorder.evaluations.remove(traces)
            traces.put_back()
            restore_rng(before)

    @contextmanager
    def _taking(self, take_in: Callable[[str, Tensor], None], scale: float) -> Iterator[None]:
        """Take gradients from the parameters as they appear: no more than a few are there at once."""
        names = {param: name for name, param in self.params.items()}
        trainable: list[Any] = [param for param in names if param.requires_grad and not is_sharded(param)]
        hooks: list[Any] = []

        def take(param: Tensor) -> None:
            grad, param.grad = param.grad, None
            if grad is not None:
                found = dense(local(grad))
                take_in(names[param], found if scale == 1.0 else found / scale)

        try:
            hooks.extend(param.register_post_accumulate_grad_hook(take) for param in trainable)
            yield
            for param in names:  # those of shards may still be on their way when their hooks are called
                take(param)
        finally:
            for hook in hooks:
                hook.remove()

    def _backward(self, part: Tensor, scale: float) -> float:
        """Add the gradient of a part of Q to the model's parameters, and to nothing else."""
        if not part.requires_grad:
            raise ValueError("the loss does not depend on the model's parameters: was it detached?")
        own = set(self._own())
        with aside(leaf for leaf in leaves_below(part) if leaf not in own):
            torch.autograd.backward(scale * part)
        return part.item()

    def _own(self) -> list[Tensor]:
        """The parameters of the model, and those of the optimizer that are not in it."""
        return list({**dict(self.model.named_parameters()), **self.params}.values())

    def _conditions(self, fed: Fed) -> Conditions:
        """Those of the forward of a batch, or those of this moment."""
        return fed.conditions or now(self.recorder.devices)

    def _run(self, fed: Fed) -> tuple[Tensor, Any]:
        """Loss and outputs on one batch, under the conditions of its forward."""
        with under(self._conditions(fed)):
            if self.evaluate is not None:
                loss, outputs = self._evaluated(fed.batch)
            else:
                outputs = self._outputs(fed.batch)
                loss = self.loss(outputs, self._target(fed.batch)) if self.loss else own_loss(outputs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            way = "loss= must return it" if self.loss else "pass loss= or evaluate="
            way = "evaluate= must return it first, and then the outputs" if self.evaluate else way
            raise TypeError(f"the loss must be a tensor with one element, not {describe(loss)}: {way}")
        self.rounding = max(ROUNDING, torch.finfo(loss.dtype).eps, self._autocast_rounding(fed, loss))
        return loss.reshape(()), outputs

    def _evaluated(self, batch: Any) -> Any:
        found: Any = cast(Evaluate, self.evaluate)(self.model, batch)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise TypeError(f"evaluate= must return a pair (loss, outputs), not {describe(found)}")
        return found

    def _autocast_rounding(self, fed: Fed, loss: Tensor) -> float:
        """The relative error of a loss of float32 that was computed under autocast, of the forward's own included."""
        autocast = self._conditions(fed).autocast.values()
        dtypes = [dtype for enabled, dtype in autocast if enabled]
        if not dtypes and casts_leaves(loss):
            dtypes = [torch.bfloat16]
        return max((AUTOCAST * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def _outputs(self, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(self.model, batch)
        if self.evaluate is not None:
            return self._evaluated(batch)[1]
        if isinstance(batch, Mapping):
            return self.model(**batch)
        if isinstance(batch, Sequence) and len(batch):
            return self.model(batch[0])
        raise TypeError(f"a batch must be a sequence or a mapping, not {describe(batch)}; pass forward= and target=")

    def _target(self, batch: Any) -> Any:
        if self.target is not None:
            return self.target(batch)
        if isinstance(batch, Mapping) and "labels" in batch:
            return batch["labels"]
        if isinstance(batch, Sequence) and len(batch) == 2:
            return batch[1]
        size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
        raise TypeError(f"no targets in {describe(batch)}{size}: pass target=, a function from a batch to its targets")
