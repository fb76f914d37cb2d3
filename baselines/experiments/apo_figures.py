"""The figures of Amortized Proximal Optimization on MNIST and Fashion-MNIST: 2a and b, 7, 8 and 11."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import PAPER, SMOKE, lambdas, task
from baselines.experiments.base import ROWS, Budget, Curve, Experiment, Panels, seeds_of

FULL: Final = {"data": "mnist", "steps": 60_000}
SHORT: Final = {"data": "fashion-mnist", "steps": 6000}
MLP: Final[Mapping[Budget, str]] = {
    "smoke": SMOKE,
    "short": "Fashion-MNIST in the place of MNIST, 10 epochs (6,000 steps) in the place of 100; the paper's MLP, "
    "784-1000-1000-10, and batches of 100.",
    "full": "MNIST, 100 epochs, 784-1000-1000-10, batches of 100: the paper's setting.",
}
CNN: Final[Mapping[Budget, str]] = {
    "smoke": SMOKE,
    "short": "The paper's data set and CNN (two 5x5 convolutions of 16 and 32 filters, one linear layer), 2 epochs "
    "(1,200 steps), batches of 100. `apo.Newton`, this library's default, stands beside the paper's method.",
    "full": "The paper's data set and CNN, 50 epochs (it does not say how many), batches of 100. "
    "`apo.Newton`, this library's default, stands beside the paper's method.",
}
LAYERS: Final = {f"lr/{place}": f"learning rate, layer {layer}" for layer, place in enumerate((1, 3, 5), 1)}


def mlp(panel: str, curves: Callable[..., list[Curve]]) -> Callable[[Budget], Panels]:
    """The panels of a figure on the MLP, from its curves as a function of the task's fields and the seeds."""

    def panels(budget: Budget) -> Panels:
        fields = task(budget, **(FULL if budget == "full" else SHORT))
        return {panel: curves(fields, seeds_of(budget))}

    return panels


def tuned(optimizer: str, lr: float, fields: Mapping[str, Any], **more: Any) -> Config:
    """A configuration of the paper's method."""
    return Config(**{"optimizer": optimizer, "method": "apo", "meta": "paper", "lr": lr, **fields, **more})


def fixed(optimizer: str, lr: float, fields: Mapping[str, Any], **more: Any) -> Config:
    """A configuration with a fixed learning rate."""
    return Config(**{"optimizer": optimizer, "method": "fixed", "lr": lr, **fields, **more})


def _fig2a(fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    return [
        Curve("SGD 0.1", fixed("sgd", 0.1, fields), seeds=seeds),
        Curve("SGD 0.01", fixed("sgd", 0.01, fields), seeds=seeds),
        Curve("SGDm 0.01", fixed("sgdm", 0.01, fields), seeds=seeds),
        Curve("SGD-APO", tuned("sgd", 0.1, fields), options=lambdas("sgd"), against="SGD 0.1", seeds=seeds),
        Curve("SGDm-APO", tuned("sgdm", 0.1, fields), options=lambdas("sgdm"), against="SGDm 0.01", seeds=seeds),
    ]


def _fig2b(fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    grid = tuple({"lr": lr} for lr in (1e-2, 1e-3, 1e-4))
    return [
        Curve("RMSprop", fixed("rmsprop", 1e-3, fields), options=grid, seeds=seeds),
        Curve(
            "RMSprop-APO", tuned("rmsprop", 1e-3, fields), options=lambdas("rmsprop"), against="RMSprop", seeds=seeds
        ),
    ]


def _fig7a(fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    sets = {"η": ("lr",), "η, ρ": ("lr", "rho"), "η, ε": ("lr", "eps"), "η, ρ, ε": ("lr", "rho", "eps")}
    runs = {label: tuned("rmsprop", 1e-3, fields, rule=True, fsd=1e-5, tune=names) for label, names in sets.items()}
    return [
        Curve("RMSprop", fixed("rmsprop", 1e-3, fields), options=({"lr": 1e-3}, {"lr": 1e-4}), seeds=seeds),
        *(Curve(label, config, against="RMSprop", seeds=seeds) for label, config in runs.items()),
    ]


def _by_layer(optimizer: str, lr: float, fsd: float) -> Callable[..., list[Curve]]:
    def curves(fields: Mapping[str, Any], seeds: int) -> list[Curve]:
        layers = tuned(optimizer, lr, fields, by="layer", every=1, fsd=fsd)
        return [
            Curve("fixed", fixed(optimizer, lr, fields), seeds=seeds),
            Curve("APO, global", tuned(optimizer, lr, fields, fsd=fsd), against="fixed", seeds=seeds),
            Curve("APO, by layer", layers, against="APO, global", seeds=seeds),
        ]

    return curves


def _fig7d(budget: Budget) -> Panels:
    fields = task(budget, data="fashion-mnist", model="cnn", steps=30_000 if budget == "full" else 1200)
    seeds = seeds_of(budget)
    grid = ({"fsd": 1.0}, {"fsd": 1e-2})

    def kfac(label: str, **more: Any) -> Curve:
        config = tuned("kfac", 1e-3, fields, damping=1e-3, **more)
        return Curve(label, config, options=grid, against="K-FAC", seeds=seeds)

    return {
        "the CNN": [
            Curve("K-FAC", fixed("kfac", 1e-3, fields, damping=1e-3), walk="lr", seeds=seeds),
            kfac("K-FAC-APO, η"),
            kfac("K-FAC-APO, η and damping", tune=("lr", "damping")),
            kfac("APO by Newton, η", meta="newton"),
            kfac("APO by Newton, η and damping", meta="newton", tune=("lr", "damping")),
            Curve("RMSprop", fixed("rmsprop", 1e-3, fields), walk="lr", against="K-FAC", seeds=seeds),
            Curve(
                "RMSprop-APO",
                tuned("rmsprop", 1e-3, fields),
                options=({"fsd": 1e-3}, {"fsd": 0.0}),
                against="RMSprop",
                seeds=seeds,
            ),
        ]
    }


def _fig11(fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    starts = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    return [
        Curve(f"from {lr:.0e}", tuned("rmsprop", lr, fields, fsd=1e-4), against="from 1e-03", seeds=1) for lr in starts
    ]


EXPERIMENTS: Final[dict[str, Experiment]] = {
    "apo-fig2a": Experiment(
        f"{PAPER}, Fig. 2a", "SGD and SGD with momentum on the MLP", mlp("SGD and SGDm", _fig2a), MLP
    ),
    "apo-fig2b": Experiment(f"{PAPER}, Fig. 2b", "RMSprop on the MLP", mlp("RMSprop", _fig2b), MLP),
    "apo-fig7a": Experiment(
        f"{PAPER}, Fig. 7a and 8",
        "Several hyperparameters of RMSprop together",
        mlp("RMSprop", _fig7a),
        MLP,
        rows={**ROWS, "rho": "ρ", "eps": "ε"},
    ),
    "apo-fig7b": Experiment(
        f"{PAPER}, Fig. 7b",
        "Learning rates by layer, SGD",
        mlp("SGD", _by_layer("sgd", 0.1, 1e-3)),
        MLP,
        rows=ROWS | LAYERS,
    ),
    "apo-fig7c": Experiment(
        f"{PAPER}, Fig. 7c",
        "Learning rates by layer, RMSprop",
        mlp("RMSprop", _by_layer("rmsprop", 1e-4, 1e-5)),
        MLP,
        rows=ROWS | LAYERS,
    ),
    "apo-fig7d": Experiment(
        f"{PAPER}, Fig. 7d", "K-FAC with tuned damping on the CNN", _fig7d, CNN, rows={**ROWS, "damping": "damping"}
    ),
    "apo-fig11": Experiment(f"{PAPER}, Fig. 11", "From any initial learning rate", mlp("RMSprop-APO", _fig11), MLP),
}
