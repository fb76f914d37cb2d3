"""Language models: texts as windows of characters, models that see no later character, gradients that are clipped."""

import copy
import dataclasses
import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.cells import Store, compute
from baselines.cli import main
from baselines.config import Config
from baselines.data import TEXTS, load
from baselines.language_models import LSTM, Attention, Transformer, positions, sequence_cross_entropy
from baselines.models import MODELS
from baselines.run import Run
from baselines.texts import CLASSES, WINDOW, encode, read_text, windows

TOPICS = load("python-topics")
LANGUAGE = [name for name, model in MODELS.items() if model.reads == "text"]
SMALL = {"LSTM": lambda: LSTM(CLASSES, 6, 10), "Transformer": lambda: Transformer(8, CLASSES, 12, 2, 3)}
each_model = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)


def test_every_character_has_a_class() -> None:
    assert encode("\n\t ~a").tolist() == [0, 1, 2, 96, 67]
    assert set(encode("\x00\r\x7f\x80°“🙂").tolist()) == {97} and CLASSES == 98
    assert len(encode("🙂°")) == 2 and len(set(encode("".join(map(chr, range(32, 127)))).tolist())) == 95


def test_windows_are_the_text_and_the_text_one_further_on() -> None:
    text = "".join(chr(32 + place % 90) for place in range(3 * WINDOW))
    inputs, targets = windows(text, "it")
    assert inputs.shape == targets.shape == (2, WINDOW)  # the third lacks the character after its last
    assert torch.equal(inputs.flatten(), encode(text)[: 2 * WINDOW].long())
    assert torch.equal(targets.flatten(), encode(text)[1 : 2 * WINDOW + 1].long())
    assert windows(text + "!", "it")[0].shape == (3, WINDOW)


def test_pythons_topics_are_english_and_the_same_each_time() -> None:
    assert TOPICS.classes == CLASSES and TOPICS.train_inputs.dtype == TOPICS.train_targets.dtype == torch.int64
    characters = TOPICS.train_inputs.numel()
    assert characters > 300_000 and 0.09 < TOPICS.test_inputs.numel() / (characters + TOPICS.test_inputs.numel()) < 0.11
    assert (TOPICS.train_inputs == CLASSES - 1).float().mean() < 3e-3
    again = load("python-topics")
    assert all(torch.equal(one, two) for one, two in zip(TOPICS[:4], again[:4], strict=True))
    with pytest.raises(ValueError, match=r"python-topics comes with Python .* drop --data-dir"):
        load("python-topics", "somewhere")


@pytest.mark.parametrize("below", ["", "text"])
def test_texts_of_ones_own_are_read(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text("für immer und ewig\n" * 30, encoding="utf-8")
    (folder / "test.txt.gz").write_bytes(gzip.compress(b"0123456789" * 20))
    data = load("text", tmp_path)
    assert data.train_inputs.shape == (8, WINDOW) and data.train_inputs[0, :19].tolist() == [
        *encode("f").tolist(), 97, *encode("r immer und ewig\n").tolist()
    ]  # fmt: skip
    assert data.test_inputs.shape == (3, WINDOW) and data.test_targets[0, 0] == encode("1")


def test_texts_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)train.txt, test.txt.*as --data-dir.*--data python-topics"):
        load("text", tmp_path)
    (tmp_path / "test.txt").write_text("a" * 100)
    (tmp_path / "train.txt").write_bytes("für immer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train.txt is not UTF-8 .* convert it first"):
        load("text", tmp_path)
    (tmp_path / "train.txt").write_bytes(gzip.compress(b"a" * 100)[:-9])
    with pytest.raises(ValueError, match=r"train.txt is a damaged or truncated gzip file"):
        load("text", tmp_path)
    (tmp_path / "train.txt").write_text("a" * WINDOW)
    with pytest.raises(ValueError, match="text: the text to train on has 64 characters, and one window takes 65; use"):
        load("text", tmp_path)
    (tmp_path / "train.txt").write_text("Взвейтесь кострами, " * 10, encoding="utf-8")
    with pytest.raises(ValueError, match="train on: 85% of the characters are not ASCII, and the models see no diff"):
        load("text", tmp_path)


def test_the_marks_of_windows_are_not_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "text.txt") == "one\ntwo"


def test_another_text_of_the_same_name_makes_another_cell(tmp_path: Path) -> None:
    configs = []
    for letter in "ab":
        folder = tmp_path / letter
        folder.mkdir()
        for part in ("train", "test"):
            (folder / f"{part}.txt").write_text(letter * 200)
        config = configuration(data="text", data_dir=str(folder), examples=None, steps=1, eval_every=1)
        configs.append(config)
    store = Store(tmp_path / "cells", older=True)
    store.put(compute(configs[0]))
    assert store.get(configs[0]) is not None and store.get(configs[1]) is None
    assert store.get(dataclasses.replace(configs[0], data_dir=str(tmp_path))) is None  # no text, no cell
    store.put(compute(configs[1]))
    again = Store(tmp_path / "cells")
    first, second = (again.get(config) for config in configs)
    assert first is not None and second is not None and first.loss != second.loss


def test_a_run_is_not_resumed_on_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.txt").write_text("text " * 100)
    task = ["--data", "text", "--data-dir", str(tmp_path), "--model", "lstm", "--steps", "2", "--log-every", "1"]
    where = ["--out", str(tmp_path / "run")]
    assert main(["train", *task, *where]) == 0
    (tmp_path / "train.txt").write_text("text " * 200)
    assert main(["train", "--resume", *where]) == 2
    assert "the run to resume had 7 training examples, and there are 15 now" in capsys.readouterr().err


@each_model
def test_no_model_sees_a_later_character(make: Any) -> None:
    model = make().eval()
    x = torch.randint(CLASSES, (3, 8))
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % CLASSES
    before, after = model(x), model(other)
    assert before.shape == (3, 8, CLASSES)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-6  # and every one sees all earlier ones
    assert not torch.equal(model.train()(x), model(x))  # dropout


@each_model
def test_models_can_be_differentiated_twice(make: Any) -> None:
    """As AdaHessian does: a Hessian-vector product is the difference of gradients."""
    model = make().double().eval()
    x = torch.randint(CLASSES, (3, 8))
    params = list(model.parameters())

    def gradient(create_graph: bool = False) -> list[Tensor]:
        loss = sequence_cross_entropy(model(x), x.roll(-1, 1))
        return list(torch.autograd.grad(loss, params, create_graph=create_graph))

    directions = [torch.randn_like(param) for param in params]
    products = torch.autograd.grad(gradient(create_graph=True), params, directions, materialize_grads=True)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for param, direction in zip(params, directions, strict=True):
                param.add_(direction, alpha=sign * 1e-6)
        sides.append(gradient())
        with torch.no_grad():
            for param, direction in zip(params, directions, strict=True):
                param.sub_(direction, alpha=sign * 1e-6)
    for product, up, down in zip(products, *sides, strict=True):
        torch.testing.assert_close(product, (up - down) / 2e-6, rtol=1e-4, atol=1e-7)


def test_the_attention_is_torchs() -> None:
    own = Attention(12, 3).double().eval()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(own.project.weight)
        theirs.in_proj_bias.copy_(own.project.bias)
        theirs.out_proj.weight.copy_(own.merge.weight)
        theirs.out_proj.bias.copy_(own.merge.bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(own(x), theirs(x, x, x, attn_mask=later, need_weights=False)[0])


def test_positions_are_the_published_sines_and_cosines() -> None:
    table = positions(20, 6)
    for place, pair in ((0, 0), (3, 0), (7, 1), (19, 2)):
        angle = place / 10_000 ** (2 * pair / 6)
        assert table[place, 2 * pair : 2 * pair + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)])


def test_the_loss_is_a_mean_over_all_places() -> None:
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(5, (2, 3))
    each = [-logits[b, t].log_softmax(0)[targets[b, t]] for b in range(2) for t in range(3)]
    torch.testing.assert_close(sequence_cross_entropy(logits, targets), torch.stack(each).mean())
    torch.testing.assert_close(sequence_cross_entropy(logits, targets, reduction="sum"), torch.stack(each).sum())


def test_the_papers_widths_are_there() -> None:
    def parameters(name: str) -> int:
        return sum(p.numel() for p in MODELS[name].build((WINDOW,), CLASSES, None).parameters())

    # Vaswani et al. 2017, "base": six layers of 12 d² weights, 13 d biases and norms, d = 512; embedding and head.
    assert parameters("transformer-base") == 6 * (12 * 512**2 + 13 * 512) + 2 * CLASSES * 512 + CLASSES
    gates = 4 * 2048
    assert parameters("lstm-2048") == (
        gates * (300 + 2048 + 2) + gates * (2048 + 2048 + 2) + CLASSES * 300 + CLASSES * 2049
    )
    for name in ("lstm", "transformer"):
        with pytest.raises(ValueError, match=f"the {name} has no hidden widths"):
            MODELS[name].build((WINDOW,), CLASSES, (5,))


def configuration(**options: Any) -> Config:
    """A short run on the first windows of the topics."""
    task: dict[str, Any] = {"data": "python-topics", "model": "lstm", "examples": 32, "steps": 12, "batch_size": 8}
    method: dict[str, Any] = {"optimizer": "adam", "method": "fixed", "lr": 0.01, "log_every": 1, "eval_every": 12}
    return Config(**task | method | options)


SHORT = TOPICS._replace(
    train_inputs=TOPICS.train_inputs[:32],
    train_targets=TOPICS.train_targets[:32],
    test_inputs=TOPICS.test_inputs[:8],
    test_targets=TOPICS.test_targets[:8],
)


@pytest.mark.parametrize("model", ["lstm", "transformer"])
@pytest.mark.parametrize(
    "options",
    [
        {"clip": 1.0, "clip_by": "parameter"},
        {"method": "apo", "fsd": 0.01, "clip": 1.0},
        {"method": "apo", "optimizer": "apollo", "meta": "paper"},
        {"optimizer": "adahessian", "lr": 0.01},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_language_models_train_and_resume_to_the_bit(model: str, options: dict[str, Any]) -> None:
    config = configuration(model=model, **options)
    run, again = Run(config, SHORT), Run(config, SHORT)
    for _ in range(7):
        run.advance()
    again.load_state_dict(copy.deepcopy(run.state_dict()))
    state = torch.get_rng_state()
    list(run.rows())
    torch.set_rng_state(state)
    list(again.rows())
    first, last = run.history[1]["loss"], run.history[-1]["loss"]
    assert first is not None and last is not None and last < first
    assert [row["loss"] for row in again.history] == [row["loss"] for row in run.history]
    outcome = run.outcome()
    assert 0 <= outcome["test_accuracy"] <= 1 and outcome["train_loss"] < math.log(CLASSES) + 0.5


def test_the_accuracy_is_that_of_characters() -> None:
    run = Run(configuration(), SHORT)
    run.model.eval()
    with torch.no_grad():
        right = (run.model(SHORT.test_inputs).argmax(-1) == SHORT.test_targets).double().mean().item()
    assert run.evaluate(SHORT.test)[1] == pytest.approx(right)


@pytest.mark.parametrize("clip_by", ["global", "parameter"])
@pytest.mark.parametrize("method", ["fixed", "apo"])
def test_clipped_gradients_are_no_longer_than_the_norm(clip_by: str, method: str) -> None:
    """A step of SGD with lr 1 is the clipped gradient; of APO too, at the rate that it reports."""
    options: dict[str, Any] = {"data": "digits", "model": "mlp", "hidden": (16,), "optimizer": "sgd", "method": method}
    own = {"steps": 4, "every": 2} if method == "apo" else {"steps": 4}
    run = Run(Config(lr=0.1, clip=0.05, clip_by=clip_by, log_every=1, **options, **own))
    for _ in range(3):
        before = [param.detach().clone() for param in run.model.parameters()]
        coming = run.method.hypers()["lr"]
        searched = method == "apo" and run.step == 0
        run.advance()
        moves = [(old - new).detach() for old, new in zip(before, run.model.parameters(), strict=True)]
        norms = torch.stack([move.norm() for move in moves]) / (1.0 if searched else coming)
        if not searched:
            assert (norms.norm() if clip_by == "global" else norms.max()).item() == pytest.approx(0.05, rel=1e-3)
        assert clip_by == "global" or searched or norms.norm() > 0.051


REFUSED = {
    "a model of images": (
        {"model": "mlp"},
        "the mlp reads images, and python-topics has text; use --data digits, fash",
    ),
    "a model of texts": (
        {"data": "digits"},
        "the lstm reads text, and digits has images; use --data python-topics, text, or --model mlp, cnn",
    ),
    "no warmup": ({"method": "inverse-sqrt"}, "inverse-sqrt decays in units of the warmup; give --warmup too"),
    "noise": ({"label_noise": 0.1}, "label_noise=0.1 is for images, and python-topics is text; leave it out"),
    "augment": ({"augment": True}, "augment=True is for images"),
    "clip, a closure": ({"clip": 1.0, "optimizer": "adahessian"}, "adahessian takes its own gradients"),
    "clip, gdtuo": ({"clip": 1.0, "method": "gdtuo"}, "clip=1.0: --method gdtuo ignores it; leave out --clip"),
    "clip by nothing": ({"clip_by": "parameter"}, "clip_by='parameter' has no effect without --clip; give both"),
    "clip to nothing": ({"clip": 0.0}, "clip=0.0 is not allowed; it must be finite and above 0"),
    "clip by layer": ({"clip": 1.0, "clip_by": "layer"}, "clip_by='layer' is not allowed"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration(**options)


def test_texts_are_the_data_that_is_text() -> None:
    assert set(TEXTS) == {"python-topics", "text"}
    assert LANGUAGE == ["lstm", "lstm-2048", "transformer", "transformer-base"]
