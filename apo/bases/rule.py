"""An update rule as a base optimizer: its state in an optimizer's groups, its tape as the pullback."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from apo.bases.base import Base, Piece, Settings, Terms, Trial, Values
from apo.bases.gains import gains_of
from apo.bases.rule_optimizer import RuleOptimizer
from apo.domains import derivative
from apo.hypers import Coordinate, Tune
from apo.lifting import Lifted, is_lifted
from apo.pieces import Cut, in_pieces, rows, some
from apo.proximal import Lookahead, lookahead, momentum_free
from apo.shards import local
from apo.trees import leaves, rebuild, scalar
from apo.types import Domain, Judged, Params, Statistics

TRIFLE = 2**14
"""Elements with hyperparameters of their own, on average, for which it is better to step them all out of place."""


class RuleBase(Base):
    """One of our update rules, or a user's own."""

    optimizer: RuleOptimizer

    def __init__(self, optimizer: RuleOptimizer, tune: Mapping[str, Tune], names: Mapping[Tensor, str]) -> None:
        """Hold a rule's optimizer."""
        super().__init__(optimizer, tune, names)
        self._known: dict[str, tuple[float, float]] = {}

    @property
    def domains(self) -> Mapping[str, Domain]:
        """Every hyperparameter of the rule."""
        return self.optimizer.rule.domains

    def step(self, values: Values) -> None:
        """Take the step, of all groups at once; in place where the rule can, as torch's optimizers do."""
        rule, done = self.optimizer.rule, []
        parts = [self._part(index, group, values[index], ()) for index, group in self.groups()]
        with torch.no_grad():
            for part in parts:
                taken = self._in_place(part)
                if not taken or len(taken) < len(part.live):
                    done.append((part, *rule.step(*part.of(part.without(taken)))))
            for part, new, state in done:
                self._write(part, new, state)

    def takes(self, judged: Judged) -> bool:
        """A rule says where it leads without going there."""
        return False

    def trial(self, values: Values, judged: Judged) -> Trial:
        """The step to be judged; the pullback of a piece is the tape of the rule.

        The tape of an elementwise rule is made anew whenever a piece is looked at, that of any other one is kept.
        """
        rule, alone, judged = self.optimizer.rule, is_lifted(self.optimizer.rule), self.judges(judged)
        judge = rule if judged == "step" else momentum_free(rule)
        gradient: Params = {}
        before: Params = {}
        own: list[_Part] = []
        cuts: list[Cut] = []
        parts: dict[str, _Part] = {}
        lengthened = {i: self._lengthened(group, values[i], judged) for i, group in self.groups()}
        for index, group in self.groups():
            part = self._part(index, group, values[index], self.tune)
            part = part._replace(params={name: p.clone() for name, p in part.params.items()})
            own.append(part)
            if part.params:
                cuts += part.cuts(rule.step) if alone else [dict.fromkeys(part.params)]
            if lengthened[index] is not values[index]:
                part = part._replace(hypers=self._hypers(group, lengthened[index], part.tuned))
            parts |= dict.fromkeys(part.params, part)
            gradient |= part.grads
            before |= part.params
        kept: dict[int, Lookahead[Any, Any]] = {}
        speed = cache(lambda hyper, at: derivative(self.domains[hyper], at))  # the same for every piece

        def ahead(part: "_Part", cut: Cut) -> Lookahead[Any, Any]:
            if alone:
                return lookahead(judge, *part.of(cut), wrt=part.tuned)
            if part.number not in kept:
                kept[part.number] = lookahead(judge, *part.whole, wrt=part.tuned)
            return kept[part.number]

        def look(cut: Cut) -> Piece:
            part = parts[next(iter(cut))]
            found = ahead(part, cut)

            def pullback(cotangents: Params) -> Terms:
                natural, terms = found.pullback(cotangents)._asdict(), Terms()
                for hyper in (hyper for hyper in self.tune if hyper in natural and hyper in part.tuned):
                    setting = lengthened[part.number][hyper]
                    for coordinate, slope in self._chain(part.group, hyper, natural[hyper], setting, speed):
                        terms.setdefault((coordinate, part.number), []).append(slope)
                return terms

            return Piece({name: found.params[name] - rows(before[name], at) for name, at in cut.items()}, pullback)

        def commit() -> None:
            if judge is not rule and not alone:
                return self.step(values)
            restore = self._state()
            try:
                with torch.no_grad():
                    for part in own:
                        if alone:
                            self._commit(part)
                        else:
                            self._write(part, *ahead(part, dict.fromkeys(part.params))[:2])
            except BaseException:
                restore()
                raise

        return Trial(gradient, before, cuts, look, commit)

    def observe(self, statistics: Statistics) -> Callable[[], None]:
        """Fold statistics of the model's curvature into the state; the returned function takes it back."""
        restore = self._state()
        gathered = [(group, *self.optimizer.gather(group)) for _, group in self.groups()]
        for group, live, _, _, before in gathered:
            self.optimizer.keep(group, live, cast(Any, self.optimizer.rule.observe)(before, statistics))
        return restore

    def gains(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Of a rule with a hyperparameter ``momentum``; others are taken for averages."""
        if not group.get("momentum") or self.optimizer.rule.without_momentum is None:
            return 1.0, 1.0
        key = repr([group[name] for name in self.optimizer.rule.hypers._fields if name != "lr"])
        if key not in self._known:
            hypers = self._hypers({**group, "lr": 1.0}, {}, ())
            self._known[key] = gains_of(self.optimizer.rule, hypers, group)
        return self._known[key]

    def momentum(self, group: Mapping[str, Any]) -> float:
        """The hyperparameter of that name, or of the averaging of the gradient."""
        found = next((float(group[name]) for name in ("momentum", "beta1", "beta") if name in group), 0.0)
        return found if 0.0 < found < 1.0 else 0.0

    def judges(self, judged: Judged) -> Judged:
        """Momentum can be left out if the rule says how, and unless it is itself to be judged."""
        forced = any(not self.domains[hyper].one_step for hyper in self.tune if hyper in self.domains)
        whole = self.optimizer.rule.without_momentum is None or (forced and judged == "steady")
        return "step" if whole else judged

    def _lengthened(self, group: dict[str, Any], settings: Settings, judged: Judged) -> Settings:
        """The settings with the learning rate of the step that is judged."""
        longer = self.gains(group)[1] if judged == "steady" and "lr" in group else 1.0
        if longer == 1.0:
            return settings
        rate = settings.get("lr", group["lr"])
        return {**settings, "lr": {n: longer * r for n, r in rate.items()} if isinstance(rate, dict) else longer * rate}

    def _state(self) -> Callable[[], None]:
        """Note which tensors the state is; the returned function puts them back."""
        state = self.optimizer.state
        kept = {param: dict(entry) for param, entry in state.items()}

        def restore() -> None:
            state.clear()
            state.update(kept)

        return restore

    def _part(self, index: int, group: dict[str, Any], settings: Settings, tune: Collection[str]) -> "_Part":
        """What goes into the step of a group, some of whose hyperparameters it is differentiated by."""
        live, params, grads, state = self.optimizer.gather(group)
        tuned = set(tune) & settings.keys()
        return _Part(index, group, live, params, grads, state, self._hypers(group, settings, tuned), tuned)

    def _in_place(self, part: "_Part", *, copied: bool = False) -> Params:
        """Step a group in place, as far as the rule can: the live weights, and the state or a copy in its place.

        Returns:
            What has been stepped.
        """
        step: Any = self.optimizer.rule.step
        taken: Params = {}
        if not isinstance(step, Lifted) or step.in_place is None:
            return taken
        if copied:
            part = part._replace(state=rebuild(part.state, [entry.clone() for entry in leaves(part.state)]))
        for names, hypers in part.alike():
            params, grads = [local(part.live[n].detach()) for n in names], [part.grads[n] for n in names]
            columns = ([field[name] for name in names] if field else None for field in part.state)
            if step.in_place(params, grads, type(part.state)(*columns), hypers):
                taken |= {name: part.live[name] for name in names}
        if copied or not all(self.optimizer.state.get(param) for param in taken.values()):
            self.optimizer.keep(part.group, taken, part.of(dict.fromkeys(taken))[2])
        return taken

    def _commit(self, part: "_Part") -> None:
        """Take a step that has been judged, tensor by tensor where not in place, without touching the old state."""
        part = part._replace(hypers=type(part.hypers)(*map(_plain, part.hypers)))
        left = part.without(self._in_place(part, copied=True))
        for cut in in_pieces({name: part.params[name] for name in left}, left):
            self._write(part, *self.optimizer.rule.step(*part.of(cut)))

    def _write(self, part: "_Part", new: Params, state: Any) -> None:
        """Write what has been computed of some of a group."""
        for name, param in new.items():
            local(part.live[name]).copy_(param)
        self.optimizer.keep(part.group, {name: part.live[name] for name in new}, state)

    def _hypers(self, group: dict[str, Any], settings: Settings, tuned: Collection[str]) -> Any:
        """The rule's hyperparameters for a group, or dicts of them by parameter name.

        What it is not differentiated by are plain numbers, if the rule takes them.
        """
        self.optimizer.check_left_out(group)
        kind, numbers = type(self.optimizer.rule.hypers), is_lifted(self.optimizer.rule)
        given = {hyper: settings.get(hyper, group[hyper]) for hyper in kind._fields}
        return kind(*(_plain(h) if numbers and hyper not in tuned else _tensors(h) for hyper, h in given.items()))

    def _chain(
        self,
        group: dict[str, Any],
        hyper: str,
        natural: Tensor | Params,
        value: float | dict[str, float],
        speed: Callable[[str, float], float],
    ) -> Iterable[tuple[Coordinate, Tensor]]:
        """Derivatives with respect to offsets, from those in natural units."""
        if isinstance(natural, dict) and isinstance(value, dict):
            pairs = [(name, natural[name], value[name]) for name in natural]
        else:
            pairs = [("", cast(Tensor, natural), cast(float, value))]
        for name, slope, at in pairs:
            if self.domains[hyper].contains(at):
                yield self.coordinate(hyper, group, name), slope * speed(hyper, at)


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

    def cuts(self, step: Any) -> list[Cut]:
        """Its pieces; a tensor is cut if every element of it is stepped on its own."""
        odd = {n for f in self.state for n, x in f.items() if x.ndim and x.shape != self.params[n].shape}
        return list(in_pieces(self.params, odd if step.pack else self.params.keys()))

    def alike(self) -> list[tuple[list[str], Any]]:
        """The names that have the same hyperparameters, and these; none where that would be a call for each trifle."""
        if self.live and not any(isinstance(h, dict) for h in self.hypers):
            return [(list(self.live), self.hypers)]
        kinds: dict[tuple[float, ...], list[str]] = {}
        for name in self.live:
            kinds.setdefault(tuple(h[name] if isinstance(h, dict) else h for h in self.hypers), []).append(name)
        if len(kinds) > 1 and sum(param.numel() for param in self.params.values()) < TRIFLE * len(kinds):
            return []
        return [(names, type(self.hypers)(*numbers)) for numbers, names in kinds.items()]

    def without(self, taken: Params) -> Cut:
        """What is in it beside these."""
        return {name: None for name in self.params if name not in taken}

    def of(self, cut: Cut) -> tuple[Params, Params, Any, Any]:
        """What goes into the step of a piece."""

        def part(field: Any) -> Any:
            return some(field, cut) if isinstance(field, dict) else field

        params, grads, state, hypers = self.whole
        mine = (h if not isinstance(h, dict) else {name: h[name] for name in cut} for h in hypers)
        return part(params), part(grads), type(state)(*map(part, state)), type(hypers)(*mine)


def _plain(value: Any) -> float | dict[str, float]:
    return {name: float(v) for name, v in value.items()} if isinstance(value, dict) else float(value)


def _tensors(value: float | dict[str, float]) -> Tensor | Params:
    if isinstance(value, dict):
        return {name: scalar(v) for name, v in value.items()}
    return scalar(float(value))
