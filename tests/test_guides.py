"""The programs of the pages that come first run, and lead to what the pages say."""

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.documents import ROOT, example, programs


def run(page: str, *shorter: tuple[str, str], given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names that the programs of a page leave behind, each run after those before it, with some text replaced."""
    names: dict[str, Any] = dict(given or {})
    for program in programs(f"docs/{page}.md"):
        for old, new in shorter:
            program = program.replace(old, new)
        exec(program, names)
    return names


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("quick_start", ("range(600)", "range(100)"))
    assert float(capsys.readouterr().out.split()[1].rstrip("}")) > 1e-3  # from 1e-5
    assert (tmp_path / "record.csv").read_text().startswith("step,")
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")
    together, apart = names["together"].hypers(), names["apart"].hypers()
    assert together["lr/1"] == pytest.approx(10 * together["lr/0"])
    assert apart["lr/1"] != pytest.approx(10 * apart["lr/0"], rel=0.01)
    assert names["scheduler"].get_last_lr() == [0.0]
    assert names["opt"].hypers()["delta"] != 1e-3


def test_questions(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("faq", ("range(400)", "range(100)"))
    assert 0.0 < float(capsys.readouterr().out.split()[0]) < 0.1
    low, high = (names[name].hypers()["lr"] for name in ("low", "high"))
    assert 1 / 2 < low / high < 2


def test_choosing_lambda(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("choosing_lambda", ("range(300)", "range(150)"), ("steps = 300", "steps = 30"))
    plain, as_much, little, half, the_same = map(float, capsys.readouterr().out.partition("[")[0].split())
    assert as_much == pytest.approx(plain, rel=1e-6)
    assert little > 1.1 * plain
    assert the_same == pytest.approx(half, rel=1e-6)
    assert [names["rising"].weights(step)[0] for step in (0, 30)] == pytest.approx([1e-3, 0.1])


@pytest.mark.parametrize("page", sorted(path.stem for path in ROOT.glob("docs/rules/*.md")))
def test_rules(page: str) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    model, other = torch.nn.Sequential(*layers), torch.nn.Sequential(*copy.deepcopy(layers))
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = [*params.values()]
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    given = {"torch": torch, "model": model, "other": other, "loader": [(x, y)] * 3, "x": x}
    names = run(f"rules/{page}", given={**given, "params": params, "grads": grads})
    for name, tuned in (("opt", model), ("both", other)):
        if name in names:
            F.cross_entropy(tuned(x), y).backward()
            names[name].step(batch=(x, y))
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("choosing_lambda", monkeypatch)


def test_the_tables_of_choosing_lambda_are_those_of_its_results(choosing: ModuleType) -> None:
    results = json.loads((ROOT / "docs/results/choosing_lambda/results.json").read_text(encoding="utf-8"))
    assert choosing.tables(results["runs"]) in (ROOT / "docs/choosing_lambda.md").read_text(encoding="utf-8")


def test_the_runs_of_choosing_lambda(choosing: ModuleType) -> None:
    threads = torch.get_num_threads()
    configs = [c for c in choosing.configurations(["digits"], 1) if c["base"] == "SGD" and c["meta"] != "paper"]
    free, charged, fixed = (choosing.train(config, 40) for config in (configs[0], configs[4], configs[-1]))
    torch.set_num_threads(threads)
    assert (free["fsd"], charged["fsd"], fixed["fsd"]) == (0.0, 1.0, None)
    assert charged["lr"] < free["lr"] / 4 and fixed["lr"] == 1.0
    assert 0.0 < free["loss"] < charged["loss"] < 2.3
    assert f"{free['lr']:.1e}, {free['loss']:.2g}" == choosing.entry([free])


def test_the_table_of_one_step_is_that_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "docs/results/one_step"
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
    assert example("what_one_step_tells", monkeypatch).table(runs) in (folder / "README.md").read_text(encoding="utf-8")


def test_a_run_of_what_one_step_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that is far too short the loss is least far along, on the batch it is of and on others."""
    threads, one_step = torch.get_num_threads(), example("what_one_step_tells", monkeypatch)
    run = one_step.train({"task": "autoencoder", "base": "SGDm", "lr": 1e-4, "seed": 0}, 30)
    torch.set_num_threads(threads)
    assert run["own"] > 10.0 and run["fresh"] > 10.0
    assert 0.1 < run["loss"] < 2.0
