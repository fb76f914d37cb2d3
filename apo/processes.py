"""The processes that train one model together, and what they tell each other: a handful of numbers.

Each process has batches of its own, and all must take the same steps with the same hyperparameters. So whatever is
decided from local data is decided on numbers that they share, in every process at the same point. The weights are
either copies (`DistributedDataParallel`) or shards (`fully_shard`); a parameter-sized tensor is never sent.
"""

import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apo.layers import uncompiled
from apo.shards import is_sharded, local
from apo.trees import inner, total

FAILED = "the evaluation failed in another process; its own message says why"
SAME = 1e-3
"""Norms of one gradient in several processes differ by less than this, relatively."""


class Processes:
    """The data-parallel processes: those of the parameters' mesh, of the wrapper around the model, or all there are."""

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor], group: Any = None) -> None:
        """Find the group of a model as it was given.

        Args:
            model: The module, in its data-parallel wrapper if it has one.
            params: The parameters, by name.
            group: The process group, if it is to be another one.
        """
        wrapper = uncompiled(model)
        if group is None and isinstance(wrapper, nn.parallel.DistributedDataParallel):
            group = wrapper.process_group if wrapper.process_group is not dist.group.WORLD else None
        self._params, self._group = params, group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        """A copy in the same group, which cannot be copied."""
        like = object.__new__(Processes)
        like._params, like._group = copy.deepcopy(self._params, memo), self._group
        return like

    @property
    def sharded(self) -> bool:
        """Whether the parameters here are shards."""
        return any(is_sharded(param) for param in self._params.values())

    @property
    def rank(self) -> int:
        """The number of this process, 0 if there is one alone."""
        return dist.get_rank() if self._groups() else 0

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The mean over all processes of each number."""
        return self._summed(numbers, math.prod(map(dist.get_world_size, self._groups())))

    def whole(self, parts: Sequence[float]) -> list[float]:
        """Numbers that are sums over parameters: added up over shards, averaged over copies."""
        sharded = next((param for param in self._params.values() if is_sharded(param)), None)
        if sharded is None:
            return self.mean(parts)
        mesh, placements = cast(Any, sharded).device_mesh, cast(Any, sharded).placements
        return self._summed(parts, math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_replicate()))

    def any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return self.largest(float(here)) > 0.0

    def largest(self, number: float) -> float:
        """The largest of a number over all processes."""
        return self._reduced([number], dist.ReduceOp.MAX)[0] if self._groups() else number

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all processes: what a rule that measures curvature sends."""
        groups = self._groups()
        for group in groups:
            for tensor in tensors:
                dist.all_reduce(tensor, group=group)
                tensor /= dist.get_world_size(group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what fails in one process fail in all; not of shards, whose forward communicates itself."""
        if self.sharded or not self._groups():
            yield
            return
        try:
            yield
        except Exception:
            self.any(True)
            raise
        if self.any(False):
            raise RuntimeError(FAILED)

    def check(self, batches: Mapping[str, int], hypers: Mapping[str, float]) -> None:
        """Raise in every process if one is about to judge something else than the others.

        Args:
            batches: How many batches there are, by what they are.
            hypers: The tuned hyperparameters.

        Raises:
            RuntimeError: If batches, gradients or hyperparameters differ.
        """
        if not self._groups():
            return
        gradients = [local(param.grad) for param in self._params.values() if param.grad is not None]
        facts = {name: float(number if self.sharded else min(number, 1)) for name, number in batches.items()}
        facts["numbers of gradients"] = float(len(gradients))
        facts["hyperparameters"] = float(zlib.crc32(repr(sorted(hypers.items())).encode()))
        if not self.sharded:
            square = total(inner(grad, grad) for grad in gradients if not grad.is_sparse)
            facts["norms of the gradient"] = math.sqrt(square) if math.isfinite(square) else -1.0
        values = list(facts.values())
        ends = self._reduced([*values, *(-value for value in values)], dist.ReduceOp.MAX)
        for name, number, most, least in zip(facts, values, ends, ends[len(values) :], strict=False):
            slack = SAME * abs(most) if name == "norms of the gradient" else 0.0
            if most + least > slack:
                here = dict(hypers) if name == "hyperparameters" else f"{number:g}"
                raise RuntimeError(f"{name} differ between processes ({here} here): {_ADVICE.get(name, _FEED)}")

    def _groups(self) -> list[Any]:
        """The groups to reduce over, one after the other; none for a process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return []
        mesh = next((cast(Any, param).device_mesh for param in self._params.values() if is_sharded(param)), None)
        groups = [self._group or dist.group.WORLD] if mesh is None else mesh.get_all_groups()
        return [group for group in groups if dist.get_world_size(group) > 1]

    def _summed(self, numbers: Sequence[float], shares: int) -> list[float]:
        """The sum over all processes of each number, divided; the numbers themselves in a process alone."""
        if not self._groups():
            return list(numbers)
        return [number / shares for number in self._reduced(numbers, dist.ReduceOp.SUM)]

    def _reduced(self, numbers: Sequence[float], op: Any) -> list[float]:
        device = next(iter(self._params.values())).device
        reduced = torch.tensor(numbers, dtype=torch.float64, device=device)
        for group in self._groups():
            dist.all_reduce(reduced, op, group=group)
        return cast(list[float], reduced.tolist())


_FEED = "feed() as many in every process, or none in any"
_ADVICE = {
    "numbers of gradients": "every process must have the gradients of the same parameters",
    "hyperparameters": "build the optimizer alike, schedule it alike and load the same checkpoint in every process",
    "norms of the gradient": "average the gradients before step(), as DistributedDataParallel does; for a model that "
    "this process trains alone, pass process_group=torch.distributed.new_group([torch.distributed.get_rank()], "
    "use_local_synchronization=True)",
}
