"""An update rule as a base optimizer: its state in an optimizer's groups, its tape as the pullback."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from apo.bases.base import Base, Piece, Terms, Trial, Values, in_pieces
from apo.bases.directions import built_up
from apo.bases.rule_optimizer import RuleOptimizer
from apo.domains import derivative
from apo.hypers import Coordinate
from apo.lifting import is_elementwise
from apo.proximal import Lookahead, lookahead, momentum_free
from apo.shards import local
from apo.trees import scalar
from apo.types import Domain, Judged, Params, Statistics


class RuleBase(Base):
    """One of our update rules, or a user's own."""

    optimizer: RuleOptimizer

    @property
    def domains(self) -> Mapping[str, Domain]:
        """Every hyperparameter of the rule."""
        return self.optimizer.rule.domains

    def step(self, values: Values) -> None:
        """Take the step."""
        rule, done = self.optimizer.rule, []
        for index, group in self.groups():
            live, params, grads, state = self.optimizer.gather(group)
            with torch.no_grad():
                done.append((group, live, *rule.step(params, grads, state, self._hypers(group, values[index]))))
        self._commit(done)

    def takes(self, judged: Judged) -> bool:
        """A rule says where it leads without going there."""
        return False

    def trial(self, values: Values, judged: Judged) -> Trial:
        """The step to be judged; the pullback of a piece is the tape of the rule.

        The tape of an elementwise rule is made anew whenever a piece is looked at, that of any other one is kept.
        """
        rule = self.optimizer.rule
        free, alone = self.without_momentum(judged), is_elementwise(rule)
        judge = momentum_free(rule) if free else rule
        gradient: Params = {}
        before: Params = {}
        pieces: list[tuple[_Part, list[str]]] = []
        parts: dict[str, _Part] = {}
        for index, group in self.groups():
            live, params, grads, state = self.optimizer.gather(group)
            params = {name: param.clone() for name, param in params.items()}  # the commit must not touch the tape
            hypers, tuned = self._hypers(group, values[index]), self.tune.keys() & values[index].keys()
            part = _Part(index, group, live, params, grads, state, hypers, tuned)
            pieces += [(part, names) for names in in_pieces(params)] if alone and params else [(part, list(params))]
            parts |= dict.fromkeys(params, part)
            gradient |= grads
            before |= params
        kept: dict[int, Lookahead[Any, Any]] = {}

        def ahead(part: "_Part", names: Sequence[str]) -> Lookahead[Any, Any]:
            if alone:
                return lookahead(judge, *part.of(names), wrt=part.tuned)
            if part.number not in kept:
                kept[part.number] = lookahead(judge, *part.whole, wrt=part.tuned)
            return kept[part.number]

        def look(names: Sequence[str]) -> Piece:
            part = parts[names[0]]
            found = ahead(part, names)

            def pullback(cotangents: Params) -> Terms:
                natural, terms = found.pullback(cotangents)._asdict(), Terms()
                for hyper in (hyper for hyper in self.tune if hyper in natural and hyper in part.tuned):
                    setting = values[part.number][hyper]
                    for coordinate, slope in self._chain(part.group, hyper, natural[hyper], setting):
                        terms.setdefault((coordinate, part.number), []).append(slope)
                return terms

            return Piece({name: found.params[name] - before[name] for name in names}, pullback)

        def commit() -> None:
            if judge is not rule and not alone:
                return self.step(values)
            restore = self._state()
            try:
                for part, names in pieces:  # of an elementwise rule, no more is computed at a time than a piece
                    with torch.no_grad():
                        new, state = rule.step(*part.of(names)) if alone else ahead(part, names)[:2]
                    self._commit([(part.group, {name: part.live[name] for name in names}, new, state)])
            except BaseException:
                restore()
                raise

        return Trial(gradient, before, [names for _, names in pieces if names], look, commit)

    def observe(self, statistics: Statistics) -> Callable[[], None]:
        """Fold statistics of the model's curvature into the state; the returned function takes it back."""
        restore = self._state()
        gathered = [(group, *self.optimizer.gather(group)) for _, group in self.groups()]
        for group, live, _, _, before in gathered:
            self.optimizer.keep(group, live, cast(Any, self.optimizer.rule.observe)(before, statistics))
        return restore

    def backup(self) -> Callable[[], None]:
        """Save what a step may change: the weights. It computes out of place, so the state's tensors need no copies."""
        restore_state = self._state()
        kept = [(param, param.detach().clone()) for *_, param in self.moving()]

        def restore() -> None:
            with torch.no_grad():
                for param, value in kept:
                    param.copy_(value)
            restore_state()

        return restore

    def build_up(self) -> float:
        """That of a rule with a hyperparameter ``momentum``, by the first step that it takes on a toy."""
        groups = [group for group in self.optimizer.param_groups if group.get("momentum")]
        return max([1.0, *(built_up(group, self._first(group)) for group in groups)])

    def _first(self, group: dict[str, Any]) -> float:
        """The length of the rule's first step, against that without momentum."""
        rule, params, grads = self.optimizer.rule, {"": torch.zeros(1)}, {"": torch.ones(1)}
        hypers = self._hypers({**group, "lr": 1.0}, {})
        with torch.no_grad():
            taken, free = (r.step(params, grads, rule.init(params), hypers)[0][""] for r in (rule, momentum_free(rule)))
        return (taken / free).item()

    def _state(self) -> Callable[[], None]:
        """Note which tensors the state is; the returned function puts them back."""
        state = self.optimizer.state
        kept = {param: dict(entry) for param, entry in state.items()}

        def restore() -> None:
            state.clear()
            state.update(kept)

        return restore

    def _commit(self, done: Sequence[tuple[dict[str, Any], Params, Params, Any]]) -> None:
        """Write what all groups have computed, once none can fail any more."""
        for group, live, new, state in done:
            with torch.no_grad():
                for name, param in live.items():
                    local(param).copy_(new[name])
            self.optimizer.keep(group, live, state)

    def _hypers(self, group: dict[str, Any], settings: Mapping[str, float | dict[str, float]]) -> Any:
        """The rule's hyperparameters for a group: 0-d float64 tensors, or dicts of them by parameter name."""
        self.optimizer.check_left_out(group)
        kind = type(self.optimizer.rule.hypers)
        return kind(*(_tensors(settings.get(hyper, group[hyper])) for hyper in kind._fields))

    def _chain(
        self, group: dict[str, Any], hyper: str, natural: Tensor | Params, value: float | dict[str, float]
    ) -> Iterable[tuple[Coordinate, Tensor]]:
        """Derivatives with respect to offsets, from those in natural units."""
        domain = self.domains[hyper]
        if isinstance(natural, dict) and isinstance(value, dict):
            pairs = [(name, natural[name], value[name]) for name in natural]
        else:
            pairs = [("", cast(Tensor, natural), cast(float, value))]
        for name, slope, at in pairs:
            if domain.contains(at):
                yield self.coordinate(hyper, group, name), slope * derivative(domain, at)


class _Part(NamedTuple):
    """What goes into the step of a group, which has this number among all."""

    number: int
    group: dict[str, Any]
    live: Params
    params: Params
    grads: Params
    state: Any
    hypers: Any
    tuned: set[str]

    @property
    def whole(self) -> tuple[Params, Params, Any, Any]:
        """All of it."""
        return self.params, self.grads, self.state, self.hypers

    def of(self, names: Sequence[str]) -> tuple[Params, Params, Any, Any]:
        """What goes into the steps of some parameters."""

        def some(field: Any) -> Any:
            return {name: field[name] for name in names if name in field} if isinstance(field, dict) else field

        params, grads, state, hypers = self.whole
        return some(params), some(grads), type(state)(*map(some, state)), type(hypers)(*map(some, hypers))


def _tensors(value: float | dict[str, float]) -> Tensor | Params:
    if isinstance(value, dict):
        return {name: scalar(v) for name, v in value.items()}
    return scalar(float(value))
