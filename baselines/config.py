"""Everything that decides the outcome of a run, in one frozen record of plain values."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from baselines.comparators.schedules import STABLE
from baselines.comparators.tuned import BY, RELATIVE
from baselines.data import LOADERS, TEXTS
from baselines.methods import METHODS
from baselines.models import MODELS
from baselines.optimizers import OPTIMIZERS

META: Final = ("newton", "paper")
CURVATURE: Final = ("gradients", "losses")
LOOKAHEAD: Final = ("steady", "no-momentum", "step")
LOSS_MODEL: Final = ("exact", "linear")
CLIP_BY: Final = ("global", "parameter")
DEFAULT_EPOCHS: Final = 10
DEFAULT_EPOCHS_DIGITS: Final = 60


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of one run; the same configuration on the same machine gives the same run, bit by bit.

    Attributes:
        data: name of the data set (`baselines.data.LOADERS`).
        data_dir: where its files are, if not in the usual places. Not part of a run's identity.
        examples: train on the first so many training examples; None: on all.
        label_noise: fraction of the training labels drawn anew, in [0, 1].
        augment: train on random crops, after padding by 4 pixels, and horizontal reflections of the images.
        model: name of the model (`baselines.models.MODELS`).
        hidden: widths of the mlp's hidden layers; None: the model's default.
        optimizer: name of the optimizer (`baselines.optimizers.OPTIMIZERS`): as in `torch.optim` where it has one
            (sgdm has Nesterov momentum 0.9), else apo's rule.
        method: name of the method (`baselines.methods.METHODS`), which sets the learning rate.
        lr: initial learning rate, in parameter units per gradient unit (for schedules: the peak). None: 1e-3, and 1 for
            the methods that estimate the learning rate, where it is a factor on the estimate.
        weight_decay: None: the default (0.01 for adamw, else 0); quasi-adam and sdlbfgs have none.
        clip: gradients that are longer than this norm are shortened to it; None: they are not.
        clip_by: global or parameter, whose norm that is.
        damping: of kfac; None: its default.
        eps: of adahessian; None: its default.
        rule: use apo's own update rule where `torch.optim` has the optimizer too.
        epochs: passes over the training set; None: 10 (digits: 60), unless `steps` is given.
        steps: length of the run in steps, instead of `epochs`.
        batch_size: examples a step; the last batch of an epoch holds what is left.
        seed: of the initial weights and of the data order.
        meta_lr: of hd (its β), gdtuo (of the SGD on top) and apo with meta paper: the learning rate of the learning
            rate; None: the authors' for the optimizer.
        warmup: of schedules and schedule-free: the fraction of the run over which the learning rate first grows along a
            line from 0.
        decay_factor: the learning rate is multiplied by it at each of `decay_at` by the step method, and over the whole
            run by the exponential method.
        decay_at: of the step method: fractions of the run, each in (0, 1).
        tune: of apo: names of the hyperparameters that are tuned; for all but lr a rule is needed.
        by: of apo: global, layer or parameter, what has a value of its own of each of these.
        relative: of apo: constant, linear, cosine or wsd, a schedule in units of the tuned learning rate.
        meta: of apo: newton or paper, what moves them.
        every: of apo and gen: steps between two changes of the learning rate.
        fsd: of apo: weight of the function-space discrepancy.
        wsd: of apo: weight of the weight-space discrepancy.
        curvature: of apo with meta newton: gradients or losses, what the curvature along a step is taken from.
        relaxation: of apo with meta newton: the learning rate aimed at, over the one that minimises the objective;
            None: the library's own.
        lookahead: of apo: steady, no-momentum or step, which step is judged.
        loss_model: of apo: exact or linear, how the loss on the step's own batch is judged.
        other_fraction: of apo: the part of the other batch on which the function-space discrepancy is measured.
        population: of pbt: how many networks are trained.
        perturb_every: of pbt: steps between two changes of learning rates, a multiple of `log_every`; None: about a
            twentieth of the run.
        eval_every: steps between two evaluations on the test set; None: an epoch's.
        log_every: steps between two rows of the history.
        device: auto (cuda where there is one), cpu, cuda, cuda:0, ...

    Raises:
        ValueError: a value outside its range, or one that would be ignored.
    """

    data: str = "digits"
    data_dir: str | None = None
    examples: int | None = None
    label_noise: float = 0.0
    augment: bool = False
    model: str = "mlp"
    hidden: tuple[int, ...] | None = None
    optimizer: str = "adamw"
    method: str = "apo"
    lr: float = None  # type: ignore[assignment]  # filled in from the method's entry
    weight_decay: float | None = None
    clip: float | None = None
    clip_by: str = "global"
    damping: float | None = None
    eps: float | None = None
    rule: bool = False
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 100
    seed: int = 0
    meta_lr: float | None = None
    warmup: float = 0.0
    decay_factor: float = 0.1
    decay_at: tuple[float, ...] = (0.5, 0.75)
    tune: tuple[str, ...] = ("lr",)
    by: str = "global"
    relative: str = "constant"
    meta: str = "newton"
    every: int = 10
    fsd: float = 0.0
    wsd: float = 0.0
    curvature: str = "gradients"
    relaxation: float | None = None
    lookahead: str = "steady"
    loss_model: str = "exact"
    other_fraction: float = 1.0
    population: int = 4
    perturb_every: int | None = None
    eval_every: int | None = None
    log_every: int = 10
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("data", tuple(LOADERS)),
            ("model", tuple(MODELS)),
            ("optimizer", tuple(OPTIMIZERS)),
            ("method", tuple(METHODS)),
            ("meta", META),
            ("curvature", CURVATURE),
            ("lookahead", LOOKAHEAD),
            ("loss_model", LOSS_MODEL),
            ("by", BY),
            ("clip_by", CLIP_BY),
            ("relative", tuple(RELATIVE)),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        if vars(self)["lr"] is None:
            object.__setattr__(self, "lr", METHODS[self.method].lr)
        for name in ("examples", "epochs", "steps", "batch_size", "every", "eval_every", "log_every", "perturb_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.clip is None or 0 < self.clip < math.inf, "clip", self.clip, "finite and above 0")
        for name in ("lr", "weight_decay", "damping", "eps", "meta_lr", "fsd", "wsd"):
            value = getattr(self, name)
            _require(value is None or (math.isfinite(value) and value >= 0), name, value, "finite and at least 0")
        _require(self.relaxation is None or 0 < self.relaxation < math.inf, "relaxation", self.relaxation, "above 0")
        if self.relaxation is not None and self.method == "apo" and self.meta != "newton":
            raise ValueError(f"relaxation={self.relaxation!r} has no effect with meta paper; leave out --relaxation")
        _require(0 < self.other_fraction <= 1, "other_fraction", self.other_fraction, "in (0, 1]")
        if self.curvature != "gradients" and self.meta != "newton":
            raise ValueError(f"curvature={self.curvature!r} has no effect with meta paper; leave out --curvature")
        _require(self.population >= 2, "population", self.population, "at least 2")
        aligned = self.perturb_every is None or self.perturb_every % self.log_every == 0
        _require(aligned, "perturb_every", self.perturb_every, f"a multiple of log_every={self.log_every}")
        _require(0 <= self.label_noise <= 1, "label_noise", self.label_noise, "in [0, 1]")
        _require(0 <= self.warmup <= STABLE, "warmup", self.warmup, f"in [0, {STABLE}]")
        _require(0 < self.decay_factor <= 1, "decay_factor", self.decay_factor, "in (0, 1]")
        _require(all(0 < at < 1 for at in self.decay_at), "decay_at", self.decay_at, "fractions of the run, in (0, 1)")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs={self.epochs} and steps={self.steps} both set the length of the run; give one")
        self.refuse_ignored(f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        reads = "text" if self.data in TEXTS else "images"
        if MODELS[self.model].reads != reads:
            readers = ", ".join(name for name, model in MODELS.items() if model.reads == reads)
            own = ", ".join(name for name in LOADERS if (name in TEXTS) == (reads == "images"))
            raise ValueError(
                f"the {self.model} reads {MODELS[self.model].reads}, and {self.data} has {reads}; use --data {own}, or "
                f"--model {readers}"
            )
        if self.method == "inverse-sqrt" and self.warmup == 0:
            raise ValueError("--method inverse-sqrt decays in units of the warmup; give --warmup too")
        if self.clip is not None and OPTIMIZERS[self.optimizer].evaluates_itself:
            raise ValueError(f"clip={self.clip!r}: {self.optimizer} takes its own gradients; leave out --clip")
        if self.clip_by != "global" and self.clip is None:
            raise ValueError(f"clip_by={self.clip_by!r} has no effect without --clip; give both")
        if self.optimizer == "kfac" and MODELS[self.model].reconstructs:
            raise ValueError(
                f"kfac takes a model's outputs for the logits of classes, which the {self.model}'s are not; "
                "use another --optimizer or --model"
            )
        suited = METHODS[self.method].optimizers
        if self.optimizer not in suited:
            raise ValueError(
                f"--method {self.method} does not work with {self.optimizer}; it does with {', '.join(suited)}"
            )
        if self.rule and OPTIMIZERS[self.optimizer].rule is None:
            raise ValueError(f"--rule is not possible: apo has no {self.optimizer} of its own; leave out --rule")
        if self.meta_lr is not None and self.method == "apo" and self.meta == "newton":
            raise ValueError(f"meta_lr={self.meta_lr!r} has no effect with meta newton; leave out --meta-lr")
        _require(len(self.tune) > 0, "tune", self.tune, "one name or more, such as lr")
        if set(self.tune) != {"lr"} and not self.uses_rule:
            rules = ", ".join(name for name, optimizer in OPTIMIZERS.items() if optimizer.of_torch is None)
            raise ValueError(
                f"tune={','.join(self.tune)} is not possible: of torch.optim's {self.optimizer} only lr can be tuned; "
                f"pass --rule for apo's own {self.optimizer}, or an optimizer that is a rule anyway: {rules}"
            )

    @property
    def uses_rule(self) -> bool:
        """Whether steps are taken by one of apo's rules, not by `torch.optim`."""
        return self.rule or OPTIMIZERS[self.optimizer].of_torch is None

    def refuse_ignored(self, given: Iterable[str]) -> None:
        """Raise if one of the options given explicitly has no effect in this configuration.

        Args:
            given: names of fields.

        Raises:
            ValueError: the option, what ignores it, and what does not.
        """
        for name in given:
            value = getattr(self, name)
            methods = [method for method, entry in METHODS.items() if name in entry.options]
            if (methods and self.method not in methods) or name in METHODS[self.method].ignores:
                of = f" is an option of --method {', '.join(methods)}, and" if methods else ":"
                raise ValueError(
                    f"{name}={value!r}{of} --method {self.method} ignores it; leave out --{name.replace('_', '-')}"
                )
            owners = [owner for owner, optimizer in OPTIMIZERS.items() if name in optimizer.options]
            if owners and self.optimizer not in owners:
                raise ValueError(
                    f"{name}={value!r} is an option of {', '.join(owners)}, and {self.optimizer} has none; leave out "
                    f"--{name.replace('_', '-')}"
                )
            if name in ("label_noise", "augment") and self.data in TEXTS:
                raise ValueError(f"{name}={value!r} is for images, and {self.data} is text; leave it out")
            if name == "label_noise" and MODELS[self.model].reconstructs:
                raise ValueError(f"{name}={value!r} has no effect: the {self.model} learns no labels; leave it out")
            if name == "augment" and MODELS[self.model].reconstructs:
                raise ValueError(f"the {self.model}'s targets are its inputs, which --augment changes; leave it out")

    def total_steps(self, examples: int) -> int:
        """The length of the run in steps, for a training set of `examples` examples."""
        if self.steps is not None:
            return self.steps
        epochs = self.epochs or (DEFAULT_EPOCHS_DIGITS if self.data == "digits" else DEFAULT_EPOCHS)
        return epochs * math.ceil(examples / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, for JSON and checkpoints."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)
