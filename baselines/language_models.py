"""Models of sequences of characters: classes [B, T] -> logits of each next one [B, T, classes].

Their weights are drawn as PyTorch does, from the global generator: seed it first.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT: Final = 0.1  # of the Apollo paper (App. C.2, C.3)


def sequence_cross_entropy(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The cross-entropy of every place of every sequence, in nats.

    Args:
        outputs: logits [B, T, classes].
        targets: classes [B, T].
        reduction: as in `torch.nn.functional.cross_entropy`: the mean over all places, or their sum.
    """
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


class LSTM(nn.Module):
    """A language model with LSTM layers (Apollo paper, App. C.2), which start from zero at each sequence.

    Args:
        classes: number of characters.
        embedding: width of their embedding.
        width: of each layer.
        layers: how many.
    """

    def __init__(self, classes: int, embedding: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.layers = nn.LSTM(embedding, width, layers, batch_first=True, dropout=DROPOUT)
        self.drop = nn.Dropout(DROPOUT)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] -> [B, T, classes]."""
        with torch.backends.cudnn.flags(enabled=False):  # whose LSTM cannot be differentiated twice
            hidden, _ = self.layers(self.drop(self.embedding(x)))
        logits: Tensor = self.head(self.drop(hidden))
        return logits


class Attention(nn.Module):
    """Self-attention that sees no later places, in plain operations, so that it can be differentiated twice.

    Args:
        width: of input and output.
        heads: a divisor of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        length = x.shape[1]
        split = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, T, each]
        queries, keys, values = split
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        merged: Tensor = self.merge((weights @ values).transpose(1, 2).flatten(2))
        return merged


class TransformerLayer(nn.Module):
    """Attention and a network of one hidden layer, each added to its input and normalised after it.

    Args:
        width: of input and output.
        heads: of the attention.
        inner: width of the hidden layer.
    """

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.network = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.norms = nn.ModuleList((nn.LayerNorm(width), nn.LayerNorm(width)))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        for part, norm in zip((self.attention, self.network), self.norms, strict=True):
            x = norm(x + self.drop(part(x)))
        return x


def positions(length: int, width: int) -> Tensor:
    """The sines and cosines that tell places apart (Vaswani et al. 2017, §3.5), [length, width]; an even width."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class Transformer(nn.Module):
    """A language model in the way of the decoder of Vaswani et al. 2017, which the Apollo paper takes (App. C.3).

    The embedding is neither scaled nor shared with the last layer.

    Args:
        length: of the sequences, at most.
        classes: number of characters.
        width: of the embedding and the layers.
        layers: how many.
        heads: of each layer's attention.
    """

    def __init__(self, length: int, classes: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.register_buffer("places", positions(length, width), persistent=False)
        self.drop = nn.Dropout(DROPOUT)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, 4 * width) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] -> [B, T, classes]."""
        places = self.get_buffer("places")[: x.shape[1]]
        logits: Tensor = self.head(self.layers(self.drop(self.embedding(x) + places)))
        return logits
