"""The linear maps of a model: which parameters belong to them, and what goes in and out as rows of a matrix.

A layer is written as Y = X Wᵀ with W [d_out, d_in], the bias being one more column of W and a column of ones in X. The
rows of X and Y are examples, positions of a sequence, patches of an image, and repeated uses of the same weight alike.
"""

import itertools
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apo.trees import compute_dtype
from apo.types import Layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a data-parallel wrapper, or the module itself; compiled, if that is outermost then."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner = uncompiled(model)
    return unwrapped(cast(nn.Module, inner.module)) if isinstance(inner, wrappers) else model


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returned, or the module itself; it has the names of its parameters."""
    return dict(model.named_children()).get("_orig_mod", model)


def check_layers(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Raise if layers are not those of a model.

    Raises:
        ValueError: If one is missing.
    """
    own = dict(uncompiled(model).named_modules(remove_duplicate=False))
    paths = [path for layer in layers.values() for path in layer.modules]
    missing = [path for path in paths if not _is_linear_map(own.get(path), getattr(own.get(path), "weight", None))]
    if missing:
        raise ValueError(f"the rule was made for another model: this one has no layers {', '.join(missing)}")


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The layers of a model whose Fisher information has Kronecker factors.

    They are `torch.nn.Linear` and `torch.nn.Conv2d` without groups; a weight that several of them share counts as one
    layer if no other kind of module has it too. Frozen ones are among them: they may be trained later. A frozen bias
    of a trainable weight stays apart.

    Args:
        model: The module.

    Returns:
        The layers, by the name of the weight.
    """
    model = uncompiled(model)
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append((path, module))
    layers: dict[str, Layer] = {}
    for weight, users in owners.items():
        if not all(_is_linear_map(module, weight) for _, module in users):
            continue
        biases = {cast(Tensor | None, module.bias) for _, module in users}
        bias = biases.pop() if len(biases) == 1 else None
        folded = bias is not None and bias.requires_grad >= weight.requires_grad and len(owners[bias]) == len(users)
        layers[names[weight]] = Layer(tuple(path for path, _ in users), names[cast(Tensor, bias)] if folded else None)
    return layers


def without_factors(model: nn.Module, layers: dict[str, Layer]) -> list[str]:
    """The names of the trainable matrices and kernels (two dimensions and more) that belong to no layer."""
    named = uncompiled(model).named_parameters()
    return [name for name, param in named if param.requires_grad and param.ndim > 1 and name not in layers]


def input_rows(module: nn.Module, inputs: Tensor, bias: bool) -> Tensor:
    """The rows of X, [R, d_in], with a last column of ones where the bias is folded in."""
    if isinstance(module, nn.Conv2d):
        inputs = _patches(module, inputs)
    rows = inputs.reshape(-1, inputs.shape[-1]).to(compute_dtype(inputs.dtype))
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if bias else rows


def output_rows(module: nn.Module, outputs: Tensor) -> Tensor:
    """The rows of Y, or of a gradient with respect to it, [R, d_out]."""
    if isinstance(module, nn.Conv2d):
        outputs = outputs.movedim(-3, -1)
    return outputs.reshape(-1, outputs.shape[-1]).to(compute_dtype(outputs.dtype))


def _is_linear_map(module: nn.Module | None, weight: Tensor | None) -> bool:
    """Whether a module's forward is Y = X Wᵀ with this weight: by the forward itself, which a subclass may replace."""
    if module is None or weight is None or module._parameters.get("weight") is not weight:
        return False
    if isinstance(module, nn.Conv2d):
        return type(module).forward is nn.Conv2d.forward and module.groups == 1
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The patch of the input that each output position sees, [B, L, C·kh·kw]."""
    inputs = inputs if inputs.ndim == 4 else inputs.unsqueeze(0)
    if module.padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(0, 0), (0, 0)] if module.padding == "valid" else [(int(p), int(p)) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, tuple(itertools.chain(*reversed(sides))), mode=mode)
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride).transpose(1, 2)
