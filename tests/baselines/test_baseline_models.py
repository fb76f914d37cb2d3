"""Models fit every task's inputs and reject what they cannot take."""

import pytest
import torch
from torch import nn

from baselines.models import MODELS, autoencoder, cnn, lenet, mlp

SHAPES = {
    "mlp": [(1, 8, 8), (3, 32, 32)],
    "cnn": [(1, 8, 8), (3, 32, 32)],
    "lenet": [(1, 12, 13), (3, 32, 32)],
    "toy-cnn": [(1, 16, 17), (3, 32, 32)],
    "resnet8": [(1, 8, 8), (3, 32, 32)],
}


RESNET = MODELS["resnet8"].build


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.reads == "images"])
def test_every_model_takes_the_inputs_it_is_for(name: str) -> None:
    for shape in [*SHAPES.get(name, []), (1, 28, 28)]:
        inputs = torch.rand(4, *shape)
        outputs = MODELS[name].build(shape, 10, None)(inputs)
        assert outputs.shape == (inputs.shape if MODELS[name].reconstructs else (4, 10))


def test_the_numbers_of_parameters_are_the_published_ones() -> None:
    assert parameters(lenet((1, 28, 28), 10)) == 61_706  # LeNet-5 with full connections between its feature maps
    assert parameters(autoencoder((1, 28, 28), 10)) == 87_125  # the Quasi-Adam paper's

    def on_cifar(name: str) -> int:
        return parameters(MODELS[name].build((3, 32, 32), 10, None))

    assert on_cifar("resnet18") == 11_173_962 and on_cifar("resnet34") == 21_282_122  # as commonly built for CIFAR
    assert on_cifar("resnet110") == 1_730_714  # the Apollo paper's 1.73 million
    assert on_cifar("toy-cnn") == 62_006  # that of PyTorch's tutorial


def test_the_autoencoder_gives_pixels() -> None:
    outputs = autoencoder((1, 28, 28), 10)(10 * torch.randn(8, 1, 28, 28))
    assert 0 < outputs.min() and outputs.max() < 1


def test_the_widths_are_the_stated_ones() -> None:
    def widths(model: nn.Module) -> list[int]:
        return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]

    assert widths(mlp((1, 28, 28), 10)) == [1000, 1000, 10]
    assert widths(mlp((1, 8, 8), 10)) == [100, 100, 10]
    assert widths(mlp((1, 8, 8), 7, (5, 6))) == [5, 6, 7]
    assert widths(mlp((1, 8, 8), 7, ())) == [7]
    convolutions = [layer for layer in cnn((1, 28, 28), 10).modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size) for layer in convolutions] == [(16, (5, 5)), (32, (5, 5))]


def test_a_residual_network_adds_its_input_to_each_block() -> None:
    model = RESNET((1, 8, 8), 10, None).eval()
    assert isinstance(model, nn.Sequential)
    stem, (first, second) = model[:3], model[3:5]
    x = stem(torch.rand(2, 1, 8, 8))
    for block in (first, second):
        nn.init.zeros_(block.residual[3].weight)
    torch.testing.assert_close(first(x), x)
    torch.testing.assert_close(second(x), block.shortcut(x).relu())
    assert second(x).shape == (2, 32, 4, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden widths"):
        mlp((1, 8, 8), 10, (0,))
    for build, name in ((cnn, "cnn"), (lenet, "lenet"), (autoencoder, "autoencoder"), (RESNET, "resnet")):
        with pytest.raises(ValueError, match=f"the {name} has no hidden widths"):
            build((1, 28, 28), 10, (5,))
    with pytest.raises(ValueError, match="at least 4"):
        cnn((1, 3, 8), 10)
    with pytest.raises(ValueError, match="at least 12"):
        lenet((1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"12x12 are too small .* at least 16"):
        MODELS["toy-cnn"].build((1, 12, 12), 10, None)
    with pytest.raises(ValueError, match="1x28x28, not 1x8x8; use --data fashion-mnist"):
        autoencoder((1, 8, 8), 10)
