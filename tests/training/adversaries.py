"""A small GAN on a noisy ring, with BatchNorm and dropout in both: a generator judged through a discriminator."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo

Pair = tuple[Tensor, Tensor]


def ring(count: int) -> Tensor:
    """Points [count, 2] on the unit circle, with a little noise."""
    angle = 2.0 * math.pi * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def generator(dropout: float = 0.1) -> nn.Sequential:
    """From noise [B, 2] to points [B, 2]."""
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))


def discriminator(dropout: float = 0.1) -> nn.Sequential:
    """From points [B, 2] to logits [B, 1]."""
    return nn.Sequential(
        nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(16, 16), nn.BatchNorm1d(16),
        nn.LeakyReLU(0.2), nn.Linear(16, 1),
    )  # fmt: skip


def logistic(logits: Tensor, label: float) -> Tensor:
    """The loss of logits against one label for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class Game:
    """Both models, both losses, and an `apo.APO` for each."""

    def __init__(self, base: Any, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Build the game; ``base(parameters)`` is a torch optimizer, and options are those of both `apo.APO`."""
        torch.manual_seed(seed)
        self.g, self.d, self.dtype = generator().to(dtype), discriminator().to(dtype), dtype
        self.of_d = apo.APO(
            self.d, base(self.d.parameters()), evaluate=lambda d, b: (self.loss_d(d, b), None), **options
        )
        self.of_g = apo.APO(
            self.g, base(self.g.parameters()), evaluate=lambda g, z: (self.loss_g(g, z), None), **options
        )

    @staticmethod
    def loss_d(d: nn.Module, pair: Pair) -> Tensor:
        """Real points against fake ones."""
        return 0.5 * (logistic(d(pair[0]), 1.0) + logistic(d(pair[1]), 0.0))

    def loss_g(self, g: nn.Module, noise: Tensor) -> Tensor:
        """What the discriminator makes of fake points."""
        return logistic(self.d(g(noise)), 1.0)

    def noise(self, count: int = 64) -> Tensor:
        """What the generator starts from."""
        return torch.randn(count, 2, dtype=self.dtype)

    def pair(self, count: int = 64) -> Pair:
        """Real points, and detached fake ones."""
        real = ring(count).to(self.dtype)
        return real, self.g(self.noise(count)).detach()

    def round(self) -> None:
        """One step of each."""
        pair = self.pair()
        self.of_d.zero_grad()
        self.loss_d(self.d, pair).backward()
        self.of_d.step(batch=pair)
        noise = self.noise()
        self.of_g.zero_grad()
        self.loss_g(self.g, noise).backward()
        self.of_g.step(batch=noise)

    def radius(self) -> tuple[float, float]:
        """Mean and deviation of the distance of fake points from the centre."""
        with torch.no_grad():
            apart = self.g(self.noise(2000)).norm(dim=1)
        return apart.mean().item(), apart.std().item()
