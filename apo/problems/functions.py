"""Two deterministic problems that are hard on a fixed learning rate, as functions of `Params`.

    rosenbrock                 f(x, y) = (1 − x)² + 100(y − x²)²
    IllConditionedRegression   L(W₁, W₂) = E‖Ax − W₂W₁x‖²,   κ(A) = 10¹⁰

Source: the paper, §5.1 and App. D-E; the regression is from Recht & Rahimi (2017).
"""

import torch
from torch import Tensor

from apo.types import Params


def rosenbrock(params: Params) -> Tensor:
    """The Rosenbrock function, a curved valley with its minimum, 0, at (1, 1) (the paper, §5.1).

    The source starts at (1, −1.5):

        {"x": torch.tensor(1.0, dtype=torch.float64), "y": torch.tensor(-1.5, dtype=torch.float64)}

    Args:
        params: The point, ``{"x": [], "y": []}``. Take float64: the last steps are lost to rounding in float32.

    Returns:
        f(x, y), [].
    """
    x, y = params["x"], params["y"]
    return (1.0 - x).square() + 100.0 * (y - x.square()).square()


class IllConditionedRegression:
    """Fitting a two-layer linear model to an ill-conditioned linear map, in float64 (the paper, §5.1).

    Targets are y = Ax for Gaussian inputs, with A in ℝ¹⁰ˣ⁶ of log-spaced singular values from 1 down to 1/κ. The model
    is f(x) = W₂W₁x with six hidden units, so it can represent A and the minimum of the loss is 0. The source gives
    κ(A) and the loss; the sizes are those of its reference, the spacing of the singular values and the scale are ours.

    Attributes:
        matrix: A, [10, 6].
        inputs: The inputs x, one a row, [N, 6].
    """

    def __init__(self, condition: float = 1e10, inputs: int = 1000, seed: int = 0) -> None:
        """Draw A, the inputs and the initial weights.

        Args:
            condition: κ(A) ≥ 1, the ratio of the extreme singular values.
            inputs: The number N ≥ 6 of inputs over which the loss is averaged.
            seed: Seeds every draw.

        Raises:
            ValueError: If ``condition`` or ``inputs`` is too small, or ``condition`` not finite.
        """
        if not 1.0 <= condition < float("inf"):
            raise ValueError(f"condition={condition!r} is not in [1, ∞)")
        if inputs < 6:
            raise ValueError(f"inputs={inputs!r} is below 6, the dimension of an input: the loss would not determine A")
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return 2.0 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1.0

        left, right = torch.linalg.qr(normal(10, 6)).Q, torch.linalg.qr(normal(6, 6)).Q
        spectrum = condition ** -torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
        self.matrix: Tensor = left * spectrum @ right.T
        self.inputs = normal(inputs, 6)
        # E‖Mx‖² over the inputs is ‖RMᵀ‖², with R from X/√N = QR: the same number at the cost of six inputs.
        self._root: Tensor = torch.linalg.qr(self.inputs / inputs**0.5).R
        self._init = {"w1": uniform(6, 6) / 6**0.5, "w2": uniform(10, 6) / 6**0.5}

    def init(self) -> Params:
        """Initial weights, ``{"w1": [6, 6], "w2": [10, 6]}``: those of `torch.nn.Linear`, uniform in ±1/√6."""
        return {key: weight.clone() for key, weight in self._init.items()}

    def loss(self, params: Params) -> Tensor:
        """The mean over the inputs of ‖Ax − W₂W₁x‖².

        Args:
            params: Weights as `init` makes them.

        Returns:
            The loss, [].
        """
        error = self.matrix - params["w2"] @ params["w1"]
        return (self._root @ error.T).square().sum()
