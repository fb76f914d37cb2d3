"""higher and TorchOpt: they differentiate through a step, so the caller owns the learning rate.

It is its logarithm that is moved, by Adam, and the step is judged as apo judges it, by the loss on its own batch after
it. `torch.autograd.grad` is asked for the derivative by the learning rate alone, which spares them the second
derivatives of the weights.
"""

import math
from typing import Any

import higher
import torch
import torchopt
from torch import Tensor, nn

from tests.training.models import Batch
from tests.training.peer import NotApplicable, Peer, named

META = 0.1
"""How far Adam moves the logarithm of a learning rate."""


class Unrolled(Peer):
    """What the caller keeps where a package only differentiates through a step."""

    def __init__(self, model: nn.Module, lr: float = 0.05, *args: Any, **options: Any) -> None:
        self.log_lr = torch.tensor(math.log(lr), dtype=torch.float64, requires_grad=True)
        self.meta = torch.optim.Adam([self.log_lr], lr=META)
        super().__init__(model, lr, *args, **options)

    def differentiated(self, judged: Tensor) -> Tensor:
        """The derivative by the learning rate's logarithm."""
        return torch.autograd.grad(judged, self.log_lr)[0]

    def move(self, slope: Tensor) -> None:
        self.log_lr.grad = slope
        self.meta.step()

    @property
    def lr(self) -> float:
        return self.log_lr.exp().item()

    def save(self) -> Any:
        return [self.optimizer.state_dict(), self.log_lr.detach(), self.meta.state_dict()]

    def load(self, saved: Any) -> None:
        self.optimizer.load_state_dict(saved[0])
        self.log_lr.data.copy_(saved[1])
        self.meta.load_state_dict(saved[2])


class Higher(Unrolled):
    """A copy of the model looks one step ahead; torch's own optimizer takes the step."""

    def build(self, cls: str, lr: float, groups: list[dict[str, Any]] | None) -> Any:
        optimizer = getattr(torch.optim, cls)(groups or self.model.parameters(), lr=lr)
        self.ratios = [group["lr"] / lr for group in optimizer.param_groups]
        return optimizer

    def clipped(self, grads: list[Tensor]) -> list[Tensor]:
        if self.clip is None:
            return grads
        norm = torch.stack([g.norm() for g in grads]).norm()
        return [g * (self.clip / (norm + 1e-6)).clamp(max=1.0) for g in grads]

    def ahead(self, batches: tuple[Batch, ...]) -> Tensor:
        options = {"override": self.override(), "copy_initial_weights": True}
        model = getattr(self.model, "module", self.model)  # DistributedDataParallel cannot be copied by higher
        with higher.innerloop_ctx(model, self.optimizer, **options) as (model, optimizer):
            optimizer.step(self.total(model, batches), grad_callback=self.clipped)
            return self.differentiated(self.total(model, batches))

    def override(self) -> dict[str, list[Tensor]]:
        return {"lr": [self.log_lr.exp() * ratio for ratio in self.ratios]}

    def step(self, *batches: Batch) -> float:
        slope = self.ahead(batches)
        higher.optim.apply_trainable_opt_params(self.optimizer, self.override())
        self.optimizer.zero_grad()
        before = self.backward(batches)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.move(slope)
        return before

    def slope(self, *batches: Batch) -> float:
        return self.ahead(batches).item()


class TorchOpt(Unrolled):
    """A `MetaOptimizer` takes the step, the graph of which is cut by `stop_gradient` once it has been judged."""

    def build(self, cls: str, lr: float, groups: list[dict[str, Any]] | None) -> Any:
        if groups:
            raise NotApplicable("it takes a module, no groups")
        rate = {"lr": lambda count: self.log_lr.exp()}
        if self.clip is None:
            return named(torchopt, "Meta" + cls)(self.model, **rate)
        chain = torchopt.chain(torchopt.clip.clip_grad_norm(self.clip), getattr(torchopt, cls.lower())(**rate))
        return torchopt.MetaOptimizer(self.model, chain)

    def judged(self, batches: tuple[Batch, ...]) -> tuple[float, Tensor]:
        before = self.total(self.model, batches)
        self.optimizer.step(before)
        slope = self.differentiated(self.total(self.model, batches))
        torchopt.stop_gradient(self.model)
        torchopt.stop_gradient(self.optimizer)
        return before.item(), slope

    def step(self, *batches: Batch) -> float:
        before, slope = self.judged(batches)
        self.move(slope)
        return before

    def slope(self, *batches: Batch) -> float:
        return self.judged(batches)[1].item()


class ByBackward(Unrolled):
    """The judged loss sends its gradient everywhere, second derivatives of the weights included, as in MAML."""

    def differentiated(self, judged: Tensor) -> Tensor:
        self.log_lr.grad = None
        judged.backward()
        assert self.log_lr.grad is not None
        return self.log_lr.grad


class HigherByBackward(ByBackward, Higher):
    """higher, with `loss.backward()`."""


class TorchOptByBackward(ByBackward, TorchOpt):
    """TorchOpt, with `loss.backward()`."""
