"""Small copies of what people train: a ResNet, a Transformer, an LSTM, each with a batch for it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = tuple[Tensor, Tensor]
Checkpointing = str | None
"""How activations are kept: None keeps them, "reentrant" and "non-reentrant" recompute them."""

CLASSES, WORDS, WIDTH, LENGTH = 4, 11, 8, 6


def _recomputed(block: nn.Module, x: Tensor, how: Checkpointing) -> Tensor:
    return block(x) if how is None else checkpoint(block, x, use_reentrant=how == "reentrant")


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class ResNet(nn.Module):
    """Images [B, 3, 8, 8] to logits [B, 4]."""

    def __init__(self, dropout: float = 0.2, checkpointing: Checkpointing = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.blocks = nn.ModuleList(ResidualBlock(WIDTH, dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = _recomputed(block, x, self.checkpointing)
        return self.head(x.mean((2, 3)))


class AttentionBlock(nn.Module):
    """Causal attention by `scaled_dot_product_attention`, and an MLP, both with a shortcut and LayerNorm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before_attention(x)).chunk(3, -1)
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        p = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(*heads, dropout_p=p, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + F.dropout(self.mlp(self.before_mlp(x)), p, self.training)


class Transformer(nn.Module):
    """Words [B, T] to logits [B, T, 11]; the matrix of the embedding is the matrix of the output layer."""

    def __init__(self, dropout: float = 0.1, checkpointing: Checkpointing = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding, self.position = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(AttentionBlock(WIDTH, dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words) + self.position
        for block in self.blocks:
            x = _recomputed(block, x, self.checkpointing)
        return self.head(self.norm(x))


class LSTM(nn.Module):
    """Words [B, T] to logits [B, T, 11], by two layers with dropout between them."""

    def __init__(self, dropout: float = 0.2, checkpointing: Checkpointing = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def _states(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        if self.checkpointing is None:
            return self.head(self._states(x))
        return self.head(checkpoint(self._states, x, use_reentrant=self.checkpointing == "reentrant"))


def images(count: int, seed: int = 1, size: int = 8) -> list[Batch]:
    """Batches of images, classified by the mean of their quarters."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(size, 3, 8, 8, generator=generator)
        found.append((x, F.avg_pool2d(x.mean(1), 4).flatten(1).argmax(1)))
    return found


def sentences(count: int, seed: int = 1, size: int = 8) -> list[Batch]:
    """Batches of words that count upwards, with mistakes, and the words that follow them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        words = torch.randint(WORDS, (size, 1), generator=generator) + torch.arange(LENGTH + 1)
        noise = torch.randint(WORDS, words.shape, generator=generator)
        words = torch.where(torch.rand(words.shape, generator=generator) < 0.1, noise, words) % WORDS
        found.append((words[:, :-1], words[:, 1:]))
    return found


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over classes, or over the words at every position."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Task(NamedTuple):
    """A row of the table of models."""

    name: str
    model: Callable[..., nn.Module]
    batches: Callable[..., list[Batch]]


TASKS = [Task("resnet", ResNet, images), Task("transformer", Transformer, sentences), Task("lstm", LSTM, sentences)]


def made(task: Task, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A task's model from a seed."""
    torch.manual_seed(seed)
    return task.model(**options).to(dtype)
