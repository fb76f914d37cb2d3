"""Random crops and flips of the training images, on the device that holds them."""

from contextlib import AbstractContextManager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.comparators.contract import Batch, Method

PADDING: Final = 4


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad each image by 4 pixels of value 0, cut a window of its own size out anywhere, and mirror it half the time.

    Args:
        images: [B, C, H, W].
        generator: of the choices, on the images' device.

    Returns:
        Images of the same shape.
    """
    examples, _, height, width = images.shape
    device = images.device
    corners = torch.randint(2 * PADDING + 1, (2, examples, 1), generator=generator, device=device)
    mirrored = torch.rand((examples, 1), generator=generator, device=device) < 0.5
    across = torch.arange(width, device=device)
    rows = corners[0] + torch.arange(height, device=device)
    columns = corners[1] + torch.where(mirrored, across.flip(0), across)
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(examples, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Augmented(Method):
    """A method that trains on random crops and reflections of its batches.

    Args:
        method: which.
        device: where the batches are.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        super().__init__(method.model, method.config)
        self.method = method
        # Below 0, so that no run's crops are drawn with the numbers of a run's data order.
        self.generator = torch.Generator(device).manual_seed(-1 - self.config.seed)

    def hypers(self) -> dict[str, float]:
        """The method's own."""
        return self.method.hypers()

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the method's step on other views of the batch."""
        return self.method.step((crop_and_flip(batch[0], self.generator), batch[1]), progress)

    def state_dict(self) -> dict[str, Any]:
        """The method's state, and that of the generator."""
        return {"method": self.method.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.method.load_state_dict(state["method"])
        self.generator.set_state(state["generator"])

    def evaluating(self) -> AbstractContextManager[None]:
        """The method's own."""
        return self.method.evaluating()
