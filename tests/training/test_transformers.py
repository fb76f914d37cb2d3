"""Under Hugging Face's `Trainer`, used as it is, a run is that of a plain loop, and its log shows the learning rate."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import apo
from tests.shell.helpers import state, weights
from tests.training.models import LENGTH, WORDS, sentences

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs the extra apo[transformers]")
pytest.importorskip("accelerate", reason="needs the extra apo[transformers]")
from apo.integrations.transformers import APOCallback  # noqa: E402

NEWTON = apo.Newton(every=3)
IGNORED = -100


class Sentences(list[dict[str, torch.Tensor]]):
    """Sentences, of some of which the first words are not to be predicted; it notes which are taken."""

    def __init__(self, seed: int = 1) -> None:
        self.taken: list[int] = []
        for words, _ in sentences(10, seed):
            labels = words.clone()
            for row, label in enumerate(labels):
                label[: row % 4] = IGNORED
            self += [{"input_ids": w, "labels": y} for w, y in zip(words, labels, strict=True)]

    def __getitem__(self, index: Any) -> Any:
        self.taken.append(index)
        return super().__getitem__(index)


def language_model(dropout: float = 0.1) -> Any:
    """A GPT-2 whose input and output embeddings are tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2}
    dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts, **ends))


def wrapped(model: nn.Module) -> apo.APO:
    return apo.APO(model, torch.optim.AdamW(model.parameters(), lr=1e-4), meta=NEWTON)


def trainer(folder: Path, model: nn.Module, opt: Any, **options: Any) -> Any:
    callbacks = options.pop("callbacks", [APOCallback()])
    kept: dict[str, Any] = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    quiet: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    args = transformers.TrainingArguments(str(folder), **{**quiet, **kept, **options})
    sets = {"train_dataset": Sentences(), "eval_dataset": Sentences(2)}
    return transformers.Trainer(model, args, optimizers=(opt, None), callbacks=callbacks, **sets)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_is_that_of_a_plain_loop_on_whole_batches(recompute: bool, tmp_path: Path) -> None:
    """The trainer accumulates (10 batches by 3, 3, 3, 1), clips and warms up from 0; the loop has each step's batch."""
    model, other = language_model(0.0).double(), language_model(0.0).double()
    options = {"gradient_accumulation_steps": 3, "warmup_steps": 3, "max_grad_norm": 0.5, "eval_strategy": "epoch"}
    run = trainer(tmp_path, model, wrapped(model), activation_checkpointing=recompute, **options)
    run.train()
    opt = wrapped(other)
    schedule = transformers.get_linear_schedule_with_warmup(opt, 3, 10)
    order = [run.train_dataset.taken[i : i + 8] for i in range(0, len(run.train_dataset.taken), 8)]
    for first, last in [(epoch + i, epoch + min(i + 3, 10)) for epoch in (0, 10, 20) for i in (0, 3, 6, 9)][:10]:
        rows = [run.train_dataset[i] for batch in order[first:last] for i in batch]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        batch["num_items_in_batch"] = (batch["labels"] != IGNORED).sum()
        opt.zero_grad()
        other(**batch).loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        opt.step(batch=batch)
        schedule.step()
    records = [apo_.record.rows for apo_ in (run.optimizer.optimizer, opt)]
    assert len(records[0]) == len(records[1]) == 3
    for mine, theirs in zip(*records, strict=True):
        # The model's losses are of float32; those of micro-batches are divided otherwise where they are evaluated.
        assert mine == pytest.approx({**theirs, "evaluations": mine["evaluations"]}, rel=1e-6, abs=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_untuned_it_is_the_bare_optimizer(tmp_path: Path) -> None:
    found = []
    for idle in (False, True):
        model = language_model()
        base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        opt, callbacks = (apo.APO(model, base, tune={}), [APOCallback()]) if idle else (base, [])
        trainer(tmp_path, model, opt, callbacks=callbacks, bf16=True).train()
        found.append(weights(model))
    assert found[0] == found[1]


class Reporter(transformers.TrainerCallback):
    """Keeps what it is given to report."""

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.reported = getattr(self, "reported", []) + ([dict(logs)] if "loss" in logs else [])


def test_the_log_shows_the_learning_rate(tmp_path: Path) -> None:
    model, reporter = language_model(), Reporter()
    opt = wrapped(model)
    run = trainer(
        tmp_path, model, opt, callbacks=[APOCallback(), reporter], warmup_steps=4, eval_strategy="steps", eval_steps=2
    )
    run.train()
    log = [entry for entry in run.state.log_history if "loss" in entry]
    scheduled, used, tuned = ([entry[key] for entry in log] for key in ("learning_rate", "apo/effective_lr", "apo/lr"))
    assert scheduled[:5] == pytest.approx([0.0, 2.5e-5, 5e-5, 7.5e-5, 1e-4]) and used[0] == 0.0
    assert [tuned[1], tuned[4], tuned[7]] == [row["lr"] for row in opt.record.rows] and tuned[1] != 1e-4
    assert used[2:] == pytest.approx([lr * s / 1e-4 for lr, s in zip(tuned[1:], scheduled[2:], strict=False)])
    assert tuned[-1] == opt.hypers()["lr"]
    assert [entry["apo/lr"] for entry in reporter.reported] == tuned
    assert len(model._forward_pre_hooks) == 1  # that of the optimizer; the callback has taken back its own


def test_a_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5, "warmup_steps": 2}
    runs = []
    for resumed in (None, str(tmp_path / "checkpoint-5")):
        model = language_model()
        run = trainer(tmp_path, model, wrapped(model), bf16=True, **options)
        run.train(resume_from_checkpoint=resumed)
        runs.append((run.state.log_history, model, run.optimizer.optimizer))
    (history, model, whole), (after, other, rest) = runs
    keys = ("loss", "learning_rate", "apo/lr", "apo/effective_lr", "step")
    assert [[e.get(k) for k in keys] for e in history[:10]] == [[e.get(k) for k in keys] for e in after[:10]]
    assert rest.record.rows and rest.record.rows == whole.record.rows[-len(rest.record.rows) :]
    assert weights(other) == weights(model) and state(other, [rest]) == state(model, [whole])
    assert rest.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    model = language_model()
    with pytest.raises(ValueError, match=r"the optimizer is AdamW: pass optimizers=\(apo\.APO"):
        trainer(tmp_path, model, torch.optim.AdamW(model.parameters())).train()
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 keeps the labels from the model"):
        trainer(tmp_path, model, wrapped(model), label_smoothing_factor=0.1).train()
