"""The experiments of the Apollo paper on language: its tables 2, 3 and 6, and its figure 3."""

import dataclasses
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of

STEPS: Final = 800  # on the stand-in
LSTM_DECAY: Final[dict[str, Any]] = {"method": "step", "decay_at": (12 / 20, 18 / 20)}
TRANSFORMER_DECAY: Final[dict[str, Any]] = {"method": "step", "decay_at": (0.5, 0.9)}
SHORT_WARMUP: Final = 0.1  # of the run; the paper's fractions would be 2 and 6 of the stand-in's steps
# By label: what differs between the optimizers (App. C.2 and C.3); the warmup in steps of the paper's 500,000.
LSTM: Final[dict[str, dict[str, Any]]] = {
    "Adam": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, **LSTM_DECAY},
    "RAdam": {"optimizer": "radamw", "lr": 1e-3, "weight_decay": 0.0, **LSTM_DECAY},
    "Apollo": {"optimizer": "apollo", "lr": 10.0, **LSTM_DECAY},
}
TRANSFORMER: Final[dict[str, dict[str, Any]]] = {
    "SGDm": {"optimizer": "sgdm", "lr": 0.1, "weight_decay": 1e-6, "warmup": 1000, **TRANSFORMER_DECAY},
    "Adam": {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 1e-4, "warmup": 4000, "method": "inverse-sqrt"},
    "RAdam": {"optimizer": "radamw", "lr": 5e-4, "weight_decay": 1e-4, **TRANSFORMER_DECAY},
    "Apollo": {"optimizer": "apollo", "lr": 10.0, "weight_decay": 1e-8, "warmup": 1000, **TRANSFORMER_DECAY},
}
UPDATES: Final = 500_000  # of the Transformer, in the paper
BY_PARAMETER: Final = {"LSTM": 0.5, "Transformer": 0.1}  # the norm, App. D.4


def fields(budget: Budget, model: str, steps: int = STEPS) -> dict[str, Any]:
    """The fields of a task: the paper's lengths on a text of the user's at the budget full, the stand-in else.

    Args:
        budget: Of the experiment.
        model: The stand-in's.
        steps: Of the stand-in.
    """
    if budget == "smoke":
        own: dict[str, Any] = {"examples": 16, "steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 4}
        return {"data": "python-topics", "model": model, **own}
    if budget == "short":
        own = {"steps": steps, "batch_size": 64, "log_every": max(1, steps // 40), "eval_every": max(1, steps // 8)}
        return {"data": "python-topics", "model": model, **own}
    if model == "lstm":
        return {"data": "text", "model": "lstm-2048", "epochs": 20, "batch_size": 128, "log_every": 100}
    # 1,024 windows of 64 characters are as many places as the paper's 8 x 8,192 words.
    own = {"steps": UPDATES, "batch_size": 1024, "log_every": 1000, "eval_every": 10_000}
    return {"data": "text", "model": "transformer-base", **own}


def language(budget: Budget) -> Panels:
    """Both models, gradients clipped by their global norm; Apollo's by the norm of each parameter beside it."""
    panels: Panels = {}
    for panel, rows in (("LSTM", LSTM), ("Transformer", TRANSFORMER)):
        task = fields(budget, panel.lower())
        curves = []
        for label, row in rows.items():
            warmup = row.get("warmup", 0)
            fraction = warmup / UPDATES if budget == "full" or not warmup else SHORT_WARMUP
            config = Config(**task, **row | {"warmup": fraction}, clip=1.0)
            against = None if label == "Apollo" else "Apollo"
            curves.append(Curve(label, config, against=against, seeds=seeds_of(budget)))
        config = dataclasses.replace(curves[-1].config, clip=BY_PARAMETER[panel], clip_by="parameter")
        curves.append(Curve("Apollo, clipped by parameter", config, against="Apollo", seeds=seeds_of(budget)))
        panels[panel] = curves[-2:] if budget == "smoke" else curves
    return panels


SETTING: Final = (
    "The learning rates, the decays by 0.1 at fractions of the run, the dropout of 0.1 and the norms that gradients "
    "are clipped to (1; by parameter 0.5 for the LSTM and 0.1 for the Transformer) are the paper's, and so are the "
    "Transformer's weight decays; for the LSTM it names neither weight decay nor warm-up, and none is taken. Weight "
    "decay is decoupled for Adam and RAdam, and L2 for SGDm and Apollo. Adam's schedule for the Transformer is the "
    "inverse square root, and its second beta torch's 0.999 instead of 0.98; SGDm is our `sgdm`, with Nesterov "
    "momentum. Windows of 64 characters start from zero; the paper unrolls the LSTM over 20 words and carries its "
    "state along. There is no label smoothing and no average over checkpoints, and there are three seeds instead of "
    "five. The perplexity is that of a character, which compares with no number of the paper's. "
)
TRANSLATION: Final = (
    "The paper's Transformer translates (WMT 2014, judged by BLEU); here it is a language model as the LSTM is."
)
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "apollo-lm": Experiment(
        source="Apollo, Tables 2, 3 and 6, Fig. 3",
        title="Apollo on language: an LSTM and a Transformer, and clipping by parameter",
        panels=language,
        departs={
            "smoke": "Smoke: 16 windows, 4 steps and two curves a panel, to see that everything runs; the numbers mean "
            "nothing.",
            "short": "A stand-in, on a CPU: characters instead of words, of the topics of Python's own help (about "
            "460,000 of them, the last tenth for testing) instead of the One Billion Words; two LSTM layers of width "
            "128 instead of 2,048, and two Transformer layers of width 64 instead of six of 512; "
            f"{STEPS} steps of 64 windows (8 epochs) instead of 20 epochs and 500,000 updates. {SETTING}Warm-up, where "
            "the paper has one, is a tenth of the run; Adam's inverse square root therefore ends at a third of its "
            f"peak, where the paper's ends at a tenth. {TRANSLATION}",
            "full": "The paper's widths, epochs (LSTM) and updates (Transformer), on characters of a text of yours "
            "(`train.txt` and `test.txt` in `--data-dir`) instead of words of One Billion Words: no adaptive softmax. "
            f"{SETTING}{TRANSLATION}",
        },
        rows={"loss": "loss of the batches (nats a character)", "test_loss": "test loss (nats a character)"},
        test="perplexity",
    )
}
