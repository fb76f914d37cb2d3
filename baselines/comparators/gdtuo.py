"""Gradient descent, the ultimate optimizer: each step's hyperparameters follow the gradient of the next loss.

Source: Chandra et al. 2022 (arXiv 1909.13371), by the authors' package, with the rates of its documents: SGD under
SGD(1e-2), and Adam, with its β₁ and β₂, under SGD(1e-5). It puts non-leaf tensors in the place of the parameters,
whose graph leads from one step to the next: a checkpoint holds what the last step was taken from, and it is repeated.
"""

import warnings
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from baselines.comparators.contract import Batch, Method

if TYPE_CHECKING:
    from baselines.config import Config

RATES: Final = {"sgd": 1e-2, "adam": 1e-5}  # of the SGD on top


class Gdtuo(Method):
    """SGD or Adam from the authors' package, under SGD."""

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        from gradient_descent_the_ultimate_optimizer import gdtuo

        top = gdtuo.SGD(RATES[config.optimizer] if config.meta_lr is None else config.meta_lr)
        make = {"sgd": gdtuo.SGD, "adam": gdtuo.Adam}[config.optimizer]
        self.tuned = make(alpha=config.lr, optimizer=top)
        self.wrapper = gdtuo.ModuleWrapper(model, optimizer=self.tuned)
        self.wrapper.initialize()
        self.origin: dict[str, Any] = {}  # what the last step was taken from

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step, and the betas of Adam."""
        values = self.tuned.parameters
        betas = {name: ((values[name].tanh() + 1) / 2).item() for name in ("beta1", "beta2") if name in values}
        return {"lr": values["alpha"].item()} | betas

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Differentiate through the last step, move the hyperparameters, then the weights."""
        self.wrapper.begin()
        self.wrapper.zero_grad()
        loss: Tensor = self.loss(self.model(batch[0]), batch[1])
        with warnings.catch_warnings():
            # The package needs the graph of .grad, and breaks the cycle that torch warns of at the next step.
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
            loss.backward(create_graph=True)
        self.origin = {
            "weights": self._values(self.wrapper.parameters),
            "hypers": self._values(self.tuned.parameters),
            "averages": {
                name: {kind: tensor.detach() for kind, tensor in cache.items()}
                for name, cache in getattr(self.tuned, "cache", {}).items()
            },
            "steps": getattr(self.tuned, "num_stepments", 0),
        }
        self.wrapper.step()
        return loss.detach()

    @staticmethod
    def _values(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and gradients."""
        found = {}
        for name, tensor in tensors.items():
            assert tensor.grad is not None  # zero_grad has made one for each
            found[name] = (tensor.detach(), tensor.grad.detach())
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the last step was taken from; empty before the first."""
        return self.origin

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the last step once more, which brings back the graph that it left."""
        if not state:
            return
        device = next(self.model.parameters()).device
        self.origin = state
        self.wrapper.begin()  # from here on the rates require gradients
        for name, (value, grad) in state["weights"].items():
            self._put(self.wrapper.parameters, name, value.to(device), grad.to(device))
        for name, (value, grad) in state["hypers"].items():
            self._put(self.tuned.parameters, name, value, grad)
        if state["averages"]:
            self.tuned.cache = {
                name: {kind: tensor.to(device) for kind, tensor in cache.items()}
                for name, cache in state["averages"].items()
            }
            self.tuned.num_stepments = state["steps"]
        self.wrapper.step()

    @staticmethod
    def _put(tensors: dict[str, Tensor], name: str, value: Tensor, grad: Tensor) -> None:
        tensors[name] = value.clone()
        tensors[name].grad = grad
