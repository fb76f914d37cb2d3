"""The record: one row of floats a meta-step, to CSV and to a picture."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import apo
from tests.shell.helpers import batches, matrices, net, train, vectors

o = torch.optim
COLUMNS = [
    *("step", "objective", "loss", "fsd", "wsd", "slope", "curvature", "hypergradient_norm", "scale", "evaluations"),
    *("skipped", "without_other"),
]


def recorded(by: str = "global", steps: int = 7, **tune: str) -> apo.APO:
    model = net()
    objective = apo.Proximal(fsd=0.4, wsd=0.2)
    opt = apo.APO(
        model,
        apo.rmsprop(lr=1e-2, eps=1e-3),
        F.cross_entropy,
        tune={"lr": by, **tune},
        meta=apo.Newton(every=2),
        objective=objective,
    )
    train(model, opt, batches(steps))
    return opt


def test_columns_and_rows() -> None:
    opt = recorded(eps="global")
    assert len(opt.record) == 4
    assert opt.record.columns == [*COLUMNS, "lr", "eps"]
    assert all(type(value) is float for row in opt.record for value in row.values())
    last = opt.record[-1]
    assert last["objective"] == pytest.approx(last["loss"] + last["fsd"] + last["wsd"], rel=1e-12)
    assert {name: last[name] for name in ("lr", "eps")} == opt.hypers()
    assert opt.record.column("step") == [0.0, 2.0, 4.0, 6.0]
    assert [row["evaluations"] > 1.0 for row in opt.record] == [True, False, False, False]
    assert math.isnan(opt.record.column("nothing")[0])
    assert [row["step"] for row in opt.record] == opt.record.column("step")


@pytest.mark.parametrize("by", ["global", "group", "layer", "parameter"])
def test_through_csv(by: str, tmp_path: Path) -> None:
    opt = recorded(by)
    opt.record.to_csv(tmp_path / "record.csv")
    with open(tmp_path / "record.csv", newline="", encoding="utf-8") as file:
        table = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["effective_lr/0"] for row in table[:2]] == pytest.approx(list(opt.record.rates[0][:2]), nan_ok=True)
    rows = [{name: row[name] for name in row if "effective" not in name} for row in table if "objective" in row]
    assert len(rows) == len(opt.record)
    for read, row in zip(rows, opt.record, strict=True):
        assert list(read) == list(row)
        assert read == pytest.approx(row, rel=0.0, abs=0.0, nan_ok=True)


def test_columns_that_appear_later(tmp_path: Path) -> None:
    """Groups that are added bring columns of their own."""
    model = net()
    opt = apo.APO(model, o.SGD(matrices(model), lr=0.1), F.cross_entropy, tune={"lr": "group"}, meta="paper")
    train(model, opt, batches(1))
    opt.add_param_group({"params": vectors(model), "lr": 0.02})
    train(model, opt, batches(10))
    assert opt.record.columns[-2:] == ["lr/0", "lr/1"]
    assert math.isnan(opt.record.column("lr/1")[0])
    opt.record.to_csv(tmp_path / "record.csv")
    with open(tmp_path / "record.csv", newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert first["lr/0"] != first["lr/1"] == ""
    assert first["effective_lr/1"] == "nan"
    opt.record.plot(tmp_path / "record.png")


@pytest.mark.parametrize(
    ("by", "ending"), [("global", "png"), ("global", "svg"), ("global", "pdf"), ("parameter", "png")]
)
def test_a_plot(ending: str, by: str, tmp_path: Path) -> None:
    path = tmp_path / f"record.{ending}"
    recorded(by, eps="global").record.plot(path)
    assert path.stat().st_size > 3000
    assert path.read_bytes()[:4] == {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}[ending]


def test_no_plot_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the record is empty: no meta-step has been taken yet"):
        apo.Record().plot(tmp_path / "record.png")
    apo.Record().to_csv(tmp_path / "record.csv")
    assert (tmp_path / "record.csv").read_text().strip() == "step"


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib; install it, or apo with the extra plot"):
        recorded(steps=1).record.plot(tmp_path / "record.png")


def test_skips_are_counted_in_the_rows() -> None:
    model = net()
    loss = [1.0]
    opt = apo.APO(
        model, o.SGD(model.parameters(), lr=0.1), lambda z, y: loss[0] * F.cross_entropy(z, y), meta=apo.Newton(every=1)
    )
    train(model, opt, batches(2))
    loss[0] = math.nan
    with pytest.warns(UserWarning, match="the meta-step is skipped") as caught:
        train(model, opt, batches(3))
    assert len(caught) == 1, "said once"
    loss[0] = 1.0
    tuned = opt.hypers()
    assert opt.record.column("skipped") == [0.0, 0.0, 1.0, 2.0, 3.0]
    assert all(math.isnan(row["objective"]) and row["lr"] == tuned["lr"] for row in list(opt.record)[2:])
    train(model, opt, batches(1))
    assert opt.hypers() != tuned
    assert opt.record[-1]["skipped"] == 3.0


def test_a_linearised_loss_is_recorded_as_its_change() -> None:
    """Whatever is tuned, it is gᵀΔ."""
    model = net(dropout=0.0)
    objective = apo.Proximal(wsd=1.0, loss_model="linear")
    opt = apo.APO(model, apo.rmsprop(lr=1e-2, eps=1e-3), F.cross_entropy, tune={"eps": "global"}, objective=objective)
    (batch,) = batches(1)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(batch=batch)
    change = sum((p.grad * (p.detach() - q)).sum().item() for p, q in zip(model.parameters(), before, strict=True))
    assert change < 0.0
    assert opt.record[0]["loss"] == pytest.approx(change, rel=1e-5)
