import pytest
import torch
from torch import Tensor

from apo.problems import IllConditionedRegression, rosenbrock
from apo.proximal import value_and_grad


def point(x: float, y: float) -> dict[str, Tensor]:
    return {"x": torch.tensor(x, dtype=torch.float64), "y": torch.tensor(y, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("x", "y", "value", "slope_x", "slope_y"),
    [
        (1.0, 1.0, 0.0, 0.0, 0.0),
        (1.0, -1.5, 625.0, 1000.0, -500.0),
        (0.0, 0.0, 1.0, -2.0, 0.0),
        (-2.0, 2.0, 409.0, -1606.0, -400.0),
    ],
)
def test_rosenbrock_has_its_values_and_gradients(
    x: float, y: float, value: float, slope_x: float, slope_y: float
) -> None:
    f, slopes = value_and_grad(rosenbrock, point(x, y))
    assert f.shape == () and f.dtype == torch.float64
    assert (f.item(), slopes["x"].item(), slopes["y"].item()) == (value, slope_x, slope_y)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e10])
def test_the_matrix_has_the_condition_number_asked_for(condition: float) -> None:
    problem = IllConditionedRegression(condition)
    assert problem.matrix.shape == (10, 6)
    singular = torch.linalg.svdvals(problem.matrix)
    expected = torch.logspace(0.0, -torch.log10(torch.tensor(condition)).item(), 6, dtype=torch.float64)
    # An absolute error of rounding, 1e-16, is a relative one of 1e-6 in the smallest of them.
    torch.testing.assert_close(singular, expected, rtol=1e-5, atol=0.0)


def test_the_loss_is_the_mean_squared_error_over_the_inputs() -> None:
    problem = IllConditionedRegression(seed=3)
    params = problem.init()
    errors = [
        (problem.matrix @ x - params["w2"] @ (params["w1"] @ x)).square().sum().item() for x in problem.inputs.unbind()
    ]
    loss = problem.loss(params)
    assert len(errors) == 1000 and loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(errors) / 1000, rel=1e-12)


def test_the_gradient_of_the_regression_is_that_of_central_differences() -> None:
    problem = IllConditionedRegression(inputs=20)
    weights = [weight.requires_grad_() for weight in problem.init().values()]
    torch.autograd.gradcheck(lambda w1, w2: problem.loss({"w1": w1, "w2": w2}), weights)


def test_the_model_can_reach_the_minimum_zero() -> None:
    problem = IllConditionedRegression()
    left, singular, right = torch.linalg.svd(problem.matrix, full_matrices=False)
    loss, slopes = value_and_grad(problem.loss, {"w1": right, "w2": left * singular})
    assert loss.item() < 1e-28
    assert max(slope.abs().max().item() for slope in slopes.values()) < 1e-14


def test_a_seed_determines_the_problem_and_every_init_is_fresh() -> None:
    first, same, other = (IllConditionedRegression(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.matrix, same.matrix) and torch.equal(first.inputs, same.inputs)
    assert not torch.equal(first.matrix, other.matrix)
    params = first.init()
    params["w1"].zero_()
    assert torch.equal(first.init()["w1"], same.init()["w1"])
    assert all(weight.abs().max() <= 6**-0.5 for weight in first.init().values())


def test_drawing_a_problem_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    IllConditionedRegression().init()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("condition", [0.5, -1.0, float("inf"), float("nan")])
def test_a_condition_number_below_one_is_refused(condition: float) -> None:
    with pytest.raises(ValueError, match="condition="):
        IllConditionedRegression(condition)


def test_too_few_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs=5"):
        IllConditionedRegression(inputs=5)
