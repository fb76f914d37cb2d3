"""Whether a rule may step the shards of a parameter one by one, found by trying.

Where every element is stepped alone, as in Adam, the shards of a step are the steps of the shards. A rule that uses
norms, inner products or products of matrices would silently take those of each shard.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from apo.bases.base import Base
from apo.bases.rule import RuleBase
from apo.shards import is_sharded
from apo.types import H, Params, Rule, S

SCALES = (1.0, 1.0, 1e6, 1e-6)
"""The sizes of the gradients that are tried: a rule that clips norms works by element as long as they are small."""


def check_shards(bases: Sequence[Base]) -> None:
    """Raise if parameters are sharded and the rule that takes them does not step every element alone.

    Raises:
        ValueError: If so.
    """
    for base in bases:
        if not isinstance(base, RuleBase):
            continue
        params = [param for _, group in base.groups() for param in group["params"]]
        sharded = {base.names[p]: (p.ndim, cast(Any, p).placements[-1].dim) for p in params if is_sharded(p)}
        rule = base.optimizer.rule
        if sharded and (rule.fisher is not None or not _by_element(rule, sharded)):
            raise ValueError(
                f"{next(iter(sharded))} is sharded, but the rule does not step every element alone, so it would step "
                "the shards wrongly; train with DistributedDataParallel, or with another rule"
            )


def _by_element(rule: Rule[S, H], sharded: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the halves of a step are the steps of the halves.

    Args:
        rule: The rule.
        sharded: The number of dimensions of each parameter, and which of them is cut.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Params:
        return {
            name: torch.randn([4] * ndim, generator=generator, dtype=torch.float64)
            for name, (ndim, _) in sharded.items()
        }

    def half(tensors: Params, end: int) -> Params:
        return {name: tensor.chunk(2, sharded[name][1])[end] for name, tensor in tensors.items()}

    wholes, curvatures = drawn(), drawn()
    halves = [half(wholes, end) for end in (0, 1)]
    state, states = rule.init(wholes), [rule.init(part) for part in halves]
    for scale in SCALES:
        # Of a convex quadratic: secant pairs are accepted.
        grads = {name: scale * curvatures[name].square() * whole for name, whole in wholes.items()}
        wholes, state = rule.step(wholes, grads, state, rule.hypers)
        for end in (0, 1):
            halves[end], states[end] = rule.step(halves[end], half(grads, end), states[end], rule.hypers)
        for name, (_, dim) in sharded.items():
            if not torch.allclose(wholes[name], torch.cat([part[name] for part in halves], dim), equal_nan=True):
                return False
    return True
