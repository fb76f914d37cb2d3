"""Models fit every task's inputs and reject what they cannot take."""

import pytest
import torch
from torch import nn

from baselines.models import MODELS, cnn, mlp


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_every_model_takes_every_tasks_inputs(name: str, shape: tuple[int, int, int]) -> None:
    model = MODELS[name](shape, 10, None)
    assert model(torch.randn(4, *shape)).shape == (4, 10)


def test_the_widths_are_the_stated_ones() -> None:
    def widths(model: nn.Module) -> list[int]:
        return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]

    assert widths(mlp((1, 28, 28), 10)) == [1000, 1000, 10]
    assert widths(mlp((1, 8, 8), 10)) == [100, 100, 10]
    assert widths(mlp((1, 8, 8), 7, (5, 6))) == [5, 6, 7]
    assert widths(mlp((1, 8, 8), 7, ())) == [7]
    convolutions = [layer for layer in cnn((1, 28, 28), 10).modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size) for layer in convolutions] == [(16, (5, 5)), (32, (5, 5))]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden widths"):
        mlp((1, 8, 8), 10, (0,))
    with pytest.raises(ValueError, match="no hidden widths"):
        cnn((1, 8, 8), 10, (5,))
    with pytest.raises(ValueError, match="at least 4"):
        cnn((1, 3, 8), 10)
