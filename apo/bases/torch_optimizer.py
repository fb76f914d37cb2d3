"""A torch optimizer as a base optimizer: its step is linear in its learning rate, and that is all there is to know."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from apo.bases.base import Base, Piece, Terms, Trial, Values
from apo.bases.directions import BY_CLASS, UNCORRECTED, gain, momentum
from apo.bases.linearity import why_not_linear
from apo.domains import POSITIVE
from apo.hypers import Tune
from apo.pieces import Cut, in_pieces, rows
from apo.shards import local
from apo.trees import compute_dtype, inner
from apo.types import Domain, Judged, Params


class TorchBase(Base):
    """A torch optimizer whose step is linear in its learning rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tune: Mapping[str, Tune],
        names: Mapping[Tensor, str],
        *,
        assume_linear: bool,
        judged: Judged,
    ) -> None:
        """Wrap an optimizer.

        Raises:
            ValueError: If its step is not, or cannot be shown to be, linear in its learning rate.
        """
        super().__init__(optimizer, tune, names)
        reason = None if assume_linear or not tune else why_not_linear(optimizer)
        if reason:
            raise ValueError(reason)
        unknown = type(optimizer) not in BY_CLASS and any(momentum(g) for g in optimizer.param_groups)
        if tune and unknown and judged != "step":
            warnings.warn(
                f"the momentum of {type(optimizer).__name__} cannot be told from its step, so the step itself is "
                "judged, momentum included; objective=apo.Proximal(lookahead='step') says the same without a warning",
                stacklevel=4,
            )

    @property
    def domains(self) -> Mapping[str, Domain]:
        """Only the learning rate."""
        return {"lr": POSITIVE}

    def step(self, values: Values) -> None:
        """Take the step; learning rates that differ within a group scale each parameter's displacement."""
        apart = [index for index, _ in self.groups() if isinstance(values[index].get("lr"), dict)]
        scaled = {name for index, _, name, _ in self.moving() if index in apart} if apart else set()
        self._step(values, self.copies(scaled) if scaled else {})

    def takes(self, judged: Judged) -> bool:
        """Where its class is not known, or the step that is judged is the one that is taken.

        It is another without momentum; and without rounding, which is all that may be left of a step of weights of low
        precision.
        """
        moving = [(bool(momentum(group)), param.dtype) for _, group, _, param in self.moving()]
        told = type(self.optimizer) in BY_CLASS and (judged != "step" or not any(a for a, _ in moving))
        return not (told and any(averages or compute_dtype(dtype) != dtype for averages, dtype in moving))

    def trial(self, values: Values, judged: Judged) -> Trial:
        """The step to be judged; the pullback of a piece is ⟨G, Δ⟩."""
        moving = {name: (index, group, param) for index, group, name, param in self.moving()}
        before, takes = self.copies(), self.takes(judged)
        # With foreach, SGD leaves g + μv in the place of a gradient g under nesterov.
        kept = {name for name, (_, group, _) in moving.items() if takes and group.get("nesterov")}
        gradient = {n: grad.clone() if n in kept else grad for n, grad in self.gradients().items()}
        rates = {n: values[index].get("lr", group["lr"]) for n, (index, group, _) in moving.items()}
        gains = {index: self.gains(group)[1] if judged == "steady" else 1.0 for index, group in self.groups()}
        owners = {
            name: (self.coordinate("lr", group, name), index)
            for name, (index, group, _) in moving.items()
            if "lr" in self.tune
        }

        def displacement(name: str, at: slice | None) -> Tensor:
            index, group, param = moving[name]
            start = rows(before[name], at)
            if takes:
                return rows(local(param.detach()), at) - start
            wide, rate = compute_dtype(param.dtype), rates[name]
            state = self.optimizer.state.get(param, {})
            parts = {key: rows(local(x), at) if isinstance(x, Tensor) else x for key, x in state.items()}
            slope = rows(gradient[name], at).to(wide)
            size: float = (rate[name] if isinstance(rate, dict) else rate) * gains[index]
            return BY_CLASS[type(self.optimizer)](group, parts, slope, start.to(wide), -size)

        def look(cut: Cut) -> Piece:
            delta = {name: displacement(name, at) for name, at in cut.items()}

            def pullback(cotangents: Params) -> Terms:
                terms: Terms = {}
                for name in (name for name in cut if name in cotangents and name in owners):
                    terms.setdefault(owners[name], []).append(inner(cotangents[name], delta[name]))
                return terms

            return Piece(delta, pullback)

        if takes:
            self._step(values, before)
        commit = None if takes else partial(self._commit, values)
        return Trial(gradient, before, list(in_pieces(before)), look, commit)

    def judges(self, judged: Judged) -> Judged:
        """Momentum can be left out of the classes that are known."""
        return judged if type(self.optimizer) in BY_CLASS else "step"

    def momentum(self, group: Mapping[str, Any]) -> float:
        """The momentum, or the first of the betas."""
        return momentum(group)

    def _commit(self, values: Values) -> None:
        """Take a step that has been judged; its gradients should be those that were judged."""

        def gradients() -> list[tuple[int, int]]:
            return [(id(param.grad), cast(Tensor, param.grad)._version) for *_, param in self.moving()]

        judged = gradients()
        self.step(values)
        if self.optimizer._optimizer_step_pre_hooks and gradients() != judged:
            warnings.warn(
                f"a step pre-hook of {type(self.optimizer).__name__} changes gradients after the step has been judged: "
                "change them before opt.step(), or in a pre-hook of the apo.APO",
                stacklevel=2,
            )

    def gains(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """1 where momentum is an average that is corrected for its start."""
        if not isinstance(self.optimizer, UNCORRECTED):
            return 1.0, 1.0
        return 1.0 + momentum(group) * bool(group.get("nesterov")), gain(group)

    def _step(self, values: Values, before: Params) -> None:
        moving = list(self.moving()) if before else []
        self._separate()
        kept = {index: _copy(group["lr"]) for index, group in self.groups()}
        rates = {index: values[index].get("lr", lr) for index, lr in kept.items()}
        # Rates that differ within a group scale a step at the largest of them: a longer one would lose digits.
        taken = {
            index: max(rate.values(), default=0.0) if isinstance(rate, dict) else rate for index, rate in rates.items()
        }
        try:
            for index, group in self.groups():
                _set(group, taken[index])
            self.optimizer.step()
        finally:
            for index, group in self.groups():
                _set(group, kept[index])
        with torch.no_grad():
            for index, _, name, param in moving:
                rate = rates[index]
                if isinstance(rate, dict) and rate[name] != taken[index]:
                    live = local(param)
                    live.copy_(before[name] + (rate[name] / taken[index]) * (live - before[name]))

    def _separate(self) -> None:
        """Give a group a learning rate of its own where torch put one tensor into several, which may come to differ."""
        seen: set[int] = set()
        for _, group in self.groups():
            if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))


def _copy(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: Any) -> None:
    """Set a group's learning rate; a tensor is written into, as a compiled step holds on to it."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
    else:
        group["lr"] = rate
