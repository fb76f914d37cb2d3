"""The experiments of the Quasi-Adam paper (§VI.D): Quasi-Adam against Adam, at the paper's learning rates."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import SMOKE, task
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of

PAPER: Final = "Quasi-Adam, §VI.D"
OPTIMIZERS: Final = {
    "adam": "Adam",
    "adam-eps-inside": "Adam, ε inside",
    "quasi-adam": "Quasi-Adam",
    "quasi-adam-switch": "Quasi-Adam, switch",
}
CLASSIFICATION: Final = {"loss": "loss of the batches", "test_accuracy": "test accuracy (%)"}
RECONSTRUCTION: Final = {"loss": "loss of the batches", "test_loss": "loss on the test set"}
EXAMPLES: Final = {"mnist": 60_000, "fashion-mnist": 60_000, "svhn": 73_257}
EPOCHS: Final[Mapping[Budget, int]] = {"smoke": 1, "short": 6, "full": 40}


def panels(
    lr: float, sizes: tuple[int, ...], full: Mapping[str, Any], short: Mapping[str, Any]
) -> Callable[[Budget], Panels]:
    """The panels of an experiment, one a batch size, from the fields of its task at the budgets full and short."""

    def make(budget: Budget) -> Panels:
        made: Panels = {}
        for size in sizes:
            own = full if budget == "full" else short
            steps = EPOCHS[budget] * -(-(own.get("examples") or EXAMPLES[own["data"]]) // size)
            fields = task(budget, **own, batch_size=size, steps=steps)
            if budget == "smoke":  # the images of digits are too small for these models
                fields |= {"model": "cnn"}
            made[f"batch {size}"] = [
                Curve(
                    label,
                    Config(optimizer=optimizer, method="fixed", lr=lr, **fields),
                    against=None if optimizer == "adam" else "Adam",
                    seeds=seeds_of(budget),
                )
                for optimizer, label in OPTIMIZERS.items()
            ]
        return made

    return make


def departs(what: str, stand_in: str) -> Mapping[Budget, str]:
    """What is different at each budget, of a task."""
    note = (
        "The learning rate is the paper's for all. Adam is `torch.optim.Adam`; with ε inside the root it is Adam as "
        "the paper writes it, from which Quasi-Adam differs in the second direction only; the switch is what the "
        "authors' released code does."
    )
    return {
        "smoke": SMOKE,
        "short": f"{what}, {EPOCHS['short']} epochs{stand_in}. {note}",
        "full": f"{what}, {EPOCHS['full']} epochs (the paper does not say how many). {note}",
    }


LENET: Final = {"data": "fashion-mnist", "model": "lenet"}
RESNET: Final = {"data": "fashion-mnist", "model": "resnet8", "examples": 10_000}
CONVOLUTIONS: Final = {"data": "fashion-mnist", "model": "autoencoder"}
CLASSIFIER: Final = "A LeNet (the paper gives no widths)"
AUTOENCODER: Final = "A convolutional autoencoder of 87,125 parameters, squared error"
INSTEAD: Final = ", Fashion-MNIST in the place of MNIST"
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "quasi-adam-exp1": Experiment(
        f"{PAPER}, Experiment I (Fig. 1)",
        "Quasi-Adam: classification of MNIST",
        panels(1e-2, (256, 512), {"data": "mnist", "model": "lenet"}, LENET),
        departs(CLASSIFIER, f"{INSTEAD}, so the runs are those of Experiment II"),
        rows=CLASSIFICATION,
    ),
    "quasi-adam-exp2": Experiment(
        f"{PAPER}, Experiment II (Fig. 2)",
        "Quasi-Adam: classification of Fashion-MNIST",
        panels(1e-2, (256, 512), LENET, LENET),
        departs(CLASSIFIER, ""),
        rows=CLASSIFICATION,
    ),
    "quasi-adam-exp3": Experiment(
        f"{PAPER}, Experiment III (Fig. 3)",
        "Quasi-Adam: classification of SVHN",
        panels(1e-2, (256, 128), {"data": "svhn", "model": "resnet34"}, RESNET),
        departs("A ResNet-34", " of a ResNet-8 on 10,000 images of Fashion-MNIST in the place of SVHN"),
        rows=CLASSIFICATION,
    ),
    "quasi-adam-exp4": Experiment(
        f"{PAPER}, Experiment IV (Fig. 4)",
        "Quasi-Adam: reconstruction of MNIST",
        panels(1e-2, (256,), {"data": "mnist", "model": "autoencoder"}, CONVOLUTIONS),
        departs(AUTOENCODER, INSTEAD),
        rows=RECONSTRUCTION,
        test="loss",
    ),
    "quasi-adam-exp5": Experiment(
        f"{PAPER}, Experiment V (Fig. 5)",
        "Quasi-Adam: reconstruction of Fashion-MNIST",
        panels(1e-3, (256,), CONVOLUTIONS, CONVOLUTIONS),
        departs(AUTOENCODER, ""),
        rows=RECONSTRUCTION,
        test="loss",
    ),
}
