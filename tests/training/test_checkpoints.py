"""A run of a real model goes on from a checkpoint as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documents import ROOT, programs
from tests.shell.helpers import state, weights
from tests.training.checkpointing import CASES, Case, Run, data, run, through_a_file

o = torch.optim
ADAMW = CASES[2]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def end(finished: Run) -> list[Any]:
    return [finished.opt.hypers(), weights(finished.model), state(finished.model, [finished.opt])]


@every_case
def test_a_resumed_run_is_the_run(case: Case) -> None:
    """Losses, hyperparameters, rows and all state, with λ > 0, a scheduler and noise; every number from the file."""
    batches = data(case, 14)
    first = run(case)
    first.train(batches[:6])
    saved, tuned, rows = through_a_file(first.checkpoint()), first.opt.hypers(), len(first.opt.record)
    expected = [first.train(batches[6:]), end(first)]
    second = run(case, seed=5)
    for group in second.opt.param_groups:
        group["lr"] *= 3.0
    second.resume(saved)
    assert second.opt.hypers() == tuned
    assert [second.train(batches[6:]), end(second)] == expected
    assert list(first.opt.record)[rows:] == list(second.opt.record), "what follows is the same"
    assert len(second.opt.record) == 2
    assert all(row["fsd"] > 0.0 for row in second.opt.record)


def test_between_two_calls_that_share_a_batch_one_term_is_missing() -> None:
    batches = data(ADAMW, 14)
    first, second = run(ADAMW), run(ADAMW, seed=5)
    first.train(batches[:8])
    second.resume(through_a_file(first.checkpoint()))
    for each in (first, second):
        each.train(batches[8:])
    assert [row["fsd"] > 0.0 for row in first.opt.record] == [False, True, True, True]
    assert [row["fsd"] > 0.0 for row in second.opt.record] == [False, True]
    assert first.opt.record.column("without_other") == [1, 1, 1, 1], "that of the very first step"
    assert second.opt.record.column("without_other") == [2, 2], "and the record says so"


DRIVER = """
import sys
from tests.documents import programs

def patient(*values, **options):
    print(*values, **options)
    if values[0] == 9:
        sys.stdin.read()  # until it is killed

namespace = {"print": patient}
exec(programs("docs/training/checkpoints.md")[0], namespace)
namespace["train"](sys.argv[1], 16)
"""


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's program in a process of its own; then, here, what is left of it and the whole, uninterrupted."""
    path, other = str(tmp_path / "last.pt"), str(tmp_path / "other.pt")
    command, environment = [sys.executable, "-c", DRIVER, path], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as killed:
        before = [killed.stdout.readline() for _ in range(10)]
        os.kill(killed.pid, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    Path(path + ".new").write_bytes(b"a checkpoint that was being written")
    namespace: dict[str, Any] = {}
    exec(programs("docs/training/checkpoints.md")[0], namespace)
    for start in (path, other):
        namespace["train"](start, 16)
    lines = capsys.readouterr().out.splitlines(keepends=True)
    resumed, whole = lines[:-16], lines[-16:]
    assert whole[:10] == before
    assert [line.split()[0] for line in resumed] == [str(step) for step in range(7, 16)]
    assert resumed == whole[7:]
    assert len({line.split()[2] for line in whole}) > 1, "the learning rate has been tuned"
