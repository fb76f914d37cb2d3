"""K-FAC: natural gradient descent with a Kronecker-factored Fisher information.

For a layer with weights W [d_out, d_in] (the bias one column more) and gradient G, in the eigenbases of its factors
A = U_A diag(a) U_Aᵀ of the inputs and S = U_S diag(s) U_Sᵀ of the gradients at the outputs:

    W ← W − η U_S [(U_Sᵀ G U_A) ⊘ (s aᵀ + λ)] U_Aᵀ  =  W − η (S ⊗ A + λI)⁻¹ G

η lr, λ damping, ⊘ elementwise division. This is Tikhonov damping of the whole product, which costs one division to
change and one to differentiate, not the factored damping of Martens & Grosse. `observe` folds new factors into running
averages A and S and decomposes them. Before the first observation, and for a parameter that belongs to no layer,
the step is the plain gradient's, W ← W − ηG. The L2 decay wθ is added to the gradient.

Source: the paper, §5 (lr and damping are tuned); Martens & Grosse 2015, arXiv 1503.05671; for convolutions Grosse &
Martens 2016, arXiv 1602.01407. How the factors are measured is in `apo.fisher`.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from apo.checks import choice, function, instance, real, whole
from apo.domains import DAMPING, POSITIVE, hyper
from apo.layers import layers_of, uncompiled, unwrapped, without_factors
from apo.lifting import collect, slices
from apo.trees import compute_dtype, scalar
from apo.types import Fisher, Layer, Params, Rule, Statistics

RECENT = 8.0
"""While the average is still short, about an eighth of the observations counts: the latest."""


class KFACHypers(NamedTuple):
    """Hyperparameters, each []: lr without a unit (1 is a whole step of natural gradient descent).

    damping and weight_decay are in units of the loss per squared parameter unit.
    """

    lr: Tensor
    damping: Tensor
    weight_decay: Tensor


class KFACState(NamedTuple):
    """What is known of each layer, by the name of its weight.

    Attributes:
        inputs: Averaged factors A, [d_in, d_in].
        outputs: Averaged factors S, [d_out, d_out].
        input_basis: Eigenvectors of A in columns, [d_in, d_in].
        output_basis: Eigenvectors of S in columns, [d_out, d_out].
        input_values: Eigenvalues of A, [d_in].
        output_values: Eigenvalues of S, [d_out].
        observations: How often the layer has been observed, [].
    """

    inputs: Params
    outputs: Params
    input_basis: Params
    output_basis: Params
    input_values: Params
    output_values: Params
    observations: Params


def init(params: Params, *, layers: Mapping[str, Layer]) -> KFACState:
    """State before the first observation: identities for factors and bases, ones for eigenvalues."""
    state = KFACState(*({} for _ in KFACState._fields))
    for name in params.keys() & layers.keys():
        weight = params[name].detach().flatten(1)
        weight = weight.to(compute_dtype(weight.dtype))
        widths = weight.shape[1] + (layers[name].bias is not None), weight.shape[0]
        a, s = (torch.eye(width, dtype=weight.dtype, device=weight.device) for width in widths)
        fields = a, s, a.clone(), s.clone(), a.diagonal().clone(), s.diagonal().clone()
        for field, value in zip(state, (*fields, scalar(0.0)), strict=True):
            field[name] = value
    return state


def step(
    params: Params, grads: Params, state: KFACState, hypers: KFACHypers, *, layers: Mapping[str, Layer], decay: bool
) -> tuple[Params, KFACState]:
    """One step of all tensors with a gradient."""
    parts = list(slices(params, grads, state, hypers))
    directions = {name: grad + own.weight_decay * param if decay else grad for name, param, grad, _, own in parts}
    for name, _, _, known, own in parts:
        if name not in layers or name not in state.inputs:
            continue
        bias = layers[name].bias
        weight = joint = directions[name].flatten(1)
        if bias is not None:
            column = directions.get(bias, weight.new_zeros(len(weight)))
            joint = torch.cat([weight, column.unsqueeze(1)], 1)
        natural = _precondition(joint, known, own.damping)
        directions[name] = natural.narrow(1, 0, weight.shape[1]).reshape_as(directions[name])
        if bias in directions:
            directions[bias] = natural.select(1, -1)
    return collect(params, state, ((name, p - own.lr * directions[name], known) for name, p, _, known, own in parts))


def observe(state: KFACState, statistics: Statistics, *, ema: float) -> KFACState:
    """Fold the factors of a batch into the averages, and decompose these.

    The k-th observation has the weight min(1, 8/k), until that is less than 1 − ema: while the curvature still changes
    fast, old observations are soon forgotten. Layers that the state does not have are left aside.

    Raises:
        ValueError: If a factor is not finite.
    """
    new = KFACState(*(dict(field) for field in state))
    for name, factors in statistics.items():
        if name not in state.inputs:
            continue
        count = state.observations[name] + 1.0
        fresh = torch.maximum((RECENT / count).clamp_max(1.0), scalar(1.0 - ema))
        for average, basis, values, factor in (
            (new.inputs, new.input_basis, new.input_values, factors.inputs),
            (new.outputs, new.output_basis, new.output_values, factors.outputs),
        ):
            if not bool(factor.isfinite().all()):
                raise ValueError(f"a Fisher factor of {name} is not finite: leave this observation out")
            average[name] = (1.0 - fresh) * average[name] + fresh * factor.to(average[name].dtype)
            values[name], basis[name] = eigen(average[name])
        new.observations[name] = count
    return new


def kfac(
    model: nn.Module,
    lr: float = 1e-3,
    damping: float = 1e-3,
    weight_decay: float = 0.0,
    *,
    fisher: Literal["mc", "exact", "empirical"] = "mc",
    likelihood: Literal["categorical", "gaussian"] = "categorical",
    sample: Callable[[Tensor], Any] | None = None,
    ema: float = 0.95,
    every: int = 50,
) -> Rule[KFACState, KFACHypers]:
    """K-FAC for the linear and convolutional layers of a model.

    Only the names of layers are recorded, not the model. Under `apo.APO` the Fisher information is measured on the
    batch of the step: at each of the first 16 steps, then ever more rarely, at last every ``every`` steps. For "mc" and
    "exact" ``opt.due`` is true then, also where nothing is tuned.

    Args:
        model: The module. Its `torch.nn.Linear` and `torch.nn.Conv2d` (any stride, padding and dilation; one group)
            have factors, also if they are shared or applied to sequences; everything else, normalisation, embeddings,
            recurrent layers and grouped convolutions, takes the plain gradient step.
        lr: Learning rate η ≥ 0; 1 is a whole step of natural gradient descent.
        damping: Damping λ ≥ 0, added to the eigenvalues of S ⊗ A, in units of the loss's curvature. With 0, directions
            without curvature are left out of the step. A meta-step changes it by a factor of 1.05 at most unless
            ``Tune(max_change=...)`` says otherwise.
        weight_decay: L2 decay w ≥ 0, added to the gradient as wθ.
        fisher: "mc" draws one target for each example from the model's predictive distribution. "exact" sums over all
            targets, at the cost of a backward for each output. "empirical" takes the gradients of the training loss
            from the training backward itself: it costs least, and is another matrix wherever the model does not fit.
        likelihood: What the outputs mean, for "mc" and "exact": "categorical" logits, classes in the last dimension;
            or "gaussian" means with unit variance, for the loss ½·(sum over outputs), mean over examples.
        sample: ``sample(outputs) -> targets`` draws from another likelihood, for "mc"; the loss is then the shell's.
        ema: Decay of the averaged factors for each measurement, in [0, 1).
        every: The most steps between two measurements, each followed by eigendecompositions.

    Returns:
        The rule, differentiable in every hyperparameter. A weight_decay given as 0 is left out of the step for good.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is outside its set, or the model has no layer with factors.

    Warns:
        UserWarning: If matrices or kernels of the model belong to no such layer; they are named.
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    choice("fisher", fisher, ("mc", "exact", "empirical"))
    choice("likelihood", likelihood, ("categorical", "gaussian"))
    function(sample=sample)
    if sample is not None and fisher != "mc":
        raise ValueError(f"sample= draws targets, which fisher={fisher!r} does not: leave it out, or use fisher='mc'")
    real("ema", ema, high=1.0)
    whole("every", every)
    hypers = KFACHypers(
        lr=hyper("lr", lr), damping=hyper("damping", damping), weight_decay=hyper("weight_decay", weight_decay)
    )
    model = uncompiled(unwrapped(model))
    layers = layers_of(model)
    others = without_factors(model, layers)
    if not any(weight.requires_grad for name, weight in model.named_parameters() if name in layers):
        raise ValueError("the model has no trainable Linear or Conv2d layer, so K-FAC has nothing to precondition")
    if others:
        warnings.warn(
            f"these take the plain gradient step, as they have no Kronecker factors: {', '.join(others)}; "
            "to train them otherwise, give apo.APO a list of (rule, parameters) and optimizers",
            stacklevel=2,
        )
    return Rule(
        partial(init, layers=layers),
        partial(step, layers=layers, decay=weight_decay != 0.0),
        hypers,
        {"lr": POSITIVE, "damping": DAMPING, "weight_decay": POSITIVE},
        observe=partial(observe, ema=float(ema)),
        fisher=Fisher(fisher, layers, likelihood, sample, every),
    )


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, at least 0, and eigenvectors of a symmetric positive semidefinite matrix up to rounding.

    LAPACK can fail to converge on matrices of low rank and wide range: then they are decomposed in float64, with
    growing multiples of the identity added, which change eigenvalues only.

    Args:
        matrix: [n, n], finite.

    Returns:
        Eigenvalues [n] and eigenvectors [n, n] in columns, in the dtype of the matrix.
    """
    matrix = (matrix + matrix.mT) / 2.0
    scale = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
    unit = matrix / scale
    identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    for jitter in (None, 0.0, 1e-12, 1e-9, 1e-6):
        try:
            attempt = unit if jitter is None else unit.double() + jitter * identity
            values, basis = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()) and bool(basis.isfinite().all()):
            values = (values - (jitter or 0.0)).clamp_min(0.0) * scale
            return values.to(matrix.dtype), basis.to(matrix.dtype).contiguous()
    # Never seen. The diagonal is what is left, and a descent direction all the same.
    return matrix.diagonal().clamp_min(0.0), identity.to(matrix.dtype)


def _precondition(grad: Tensor, known: Any, damping: Tensor) -> Tensor:
    """(S ⊗ A + λI)⁻¹ G, [d_out, d_in], with one layer's slice of the state; where λ = 0, its pseudo-inverse.

    Before the first observation it is G itself.
    """
    curvature = torch.outer(known.output_values, known.input_values)
    rounding = torch.finfo(curvature.dtype).eps * max(curvature.shape) * curvature.max()
    seen = (curvature > rounding) | (damping > 0.0).to(curvature.device)
    denominator = torch.where(seen, curvature + damping, torch.ones_like(curvature))
    rotated = torch.where(seen, known.output_basis.mT @ grad @ known.input_basis, torch.zeros_like(curvature))
    natural: Tensor = known.output_basis @ (rotated / denominator) @ known.input_basis.mT
    observed: Tensor = (known.observations > 0.0).to(grad.dtype)
    return observed * natural + (1.0 - observed) * grad
