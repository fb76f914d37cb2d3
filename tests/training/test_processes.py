"""Several processes: the hyperparameters are those of one process on the joint batch, and a few numbers are sent."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import spread_checks
from tests.training.spread import ALONE, CASES, SHARDED, train
from tests.training.spread_shards import SAVED, loaded

Found = dict[str, list[Any]]
KINDS = [f"ddp {case.name}" for case in CASES] + [f"fsdp {case.name}" for case in SHARDED]
MODEL = ("_allgather_base_", "_reduce_scatter_base_")
SECONDS = 600
"""After so long the processes are killed; they take about 20 where nothing else runs."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every check returned in every process."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-W", "error", "-m", "tests.training.spread_checks", str(folder)]
    root, alone = Path(__file__).parents[2], {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=root, env=alone, start_new_session=True)
    try:
        running.wait(SECONDS)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    results: Found = {}
    for world, checks in spread_checks.CHECKS.items():
        ranks = [torch.load(folder / f"found.{world}.{rank}", weights_only=False) for rank in range(world)]
        for name in checks:
            results[name] = [rank.get(name, "not run") for rank in ranks]
            assert not any(isinstance(result, str) for result in results[name]), results[name]
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Every case in one process, on the joint batches."""
    return {case.name: train(case) for case in CASES}


def close(one: list[dict[str, float]], other: list[dict[str, float]], rel: float = 1e-6) -> bool:
    """Whether rows of numbers agree."""
    pairs = zip(one, other, strict=True)
    return all(a.keys() == b.keys() and a == pytest.approx(b, rel, 1e-12, nan_ok=True) for a, b in pairs)


@pytest.mark.parametrize("kind", [*KINDS, "hsdp"])
def test_as_one_process_on_the_joint_batch(kind: str, found: Found, alone: dict[str, Any]) -> None:
    """Hyperparameters are bit for bit the same in all processes; with record and weights, they are one process's."""
    ranks, one = found[kind], alone[kind.rpartition(" ")[2] if " " in kind else "terms"]
    for other in ranks[1:]:
        assert other["hypers"] == ranks[0]["hypers"]
        assert other["numbers"] == ranks[0]["numbers"]
    assert close(ranks[0]["hypers"], one["hypers"])
    assert close(ranks[0]["record"], one["record"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=1e-6, atol=1e-7)


def test_data_parallel_on_one_device(alone: dict[str, Any]) -> None:
    """`torch.nn.DataParallel` is looked into; there is nothing to share."""
    wrapped = train(CASES[1], torch.nn.DataParallel)
    assert wrapped["hypers"] == alone[CASES[1].name]["hypers"]


def test_the_cases_are_cases(alone: dict[str, Any]) -> None:
    """The search shrinks a far-off start, the spike is shortened, and something moves in each."""
    assert alone["far-off"]["record"][0]["evaluations"] > 4 and alone["far-off"]["record"][0]["scale"] < 1e-2
    assert alone["spike"]["record"][4]["evaluations"] > 0 and alone["spike"]["record"][4]["scale"] < 1.0
    for trained in alone.values():
        first, last = trained["hypers"][0], trained["hypers"][-1]
        assert any(first[name] != last[name] for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_handful_of_numbers_is_sent(kind: str, found: Found) -> None:
    """Beside the model's own, a meta-step sends some reductions of a few numbers, and any other step nothing."""
    case = next(case for case in CASES if case.name == kind.split()[1])
    every = case.options["meta"].every
    coordinates = len([name for name in found[kind][0]["hypers"][0] if name != "effective"])
    for ranks in found[kind]:
        for number, (trained, stepped) in enumerate(ranks["sent"]):
            own = [(name, size) for name, size in stepped if not name.endswith(MODEL)]
            assert {name for name, _ in own} <= {"c10d::allreduce_"}
            evaluations = ranks["record"][number // every]["evaluations"] if number % every == 0 else 0.0
            if number % every:
                assert not stepped
            else:
                assert sum(size for _, size in own) <= 160 + 16 * len(own) + 2 * 8 * 2 * coordinates + 32 * evaluations
                assert max(size for _, size in own) <= max(80, 8 * 2 * coordinates)
            if kind.startswith("ddp"):
                assert len(own) == len(stepped) and sum(size for _, size in trained) > 10_000
            if kind.endswith("spike") and evaluations == 1.0:
                assert (len(own), sum(size for _, size in own)) == ((9, 152) if kind.startswith("ddp") else (7, 120))
                if kind.startswith("fsdp"):  # a forward and backward, and a forward
                    assert [sent for sent in stepped if sent not in own] == trained + trained[:3]


def test_kinds_of_ddp(found: Found) -> None:
    """The variants of DDP, a model wrapped later, a group and a copy in it all train alike; gradients are in place."""
    for kinds in found["ddp kinds"]:
        hypers, grads = kinds["plain"]
        assert len({row["lr"] for row in hypers}) == len(hypers)
        for name, (others, their) in kinds.items():
            assert others == hypers, name
            assert all(map(torch.equal, grads, their)), name
    assert found["ddp kinds"][0]["plain"][0] == found["ddp kinds"][1]["plain"][0]


def test_programs_of_the_page(found: Found) -> None:
    """They run, and every process prints the same learning rate, which has moved."""
    for first, second in zip(*found["programs"], strict=True):
        assert first.partition(" ")[2] == second.partition(" ")[2] != "{'lr': 0.001}"


def test_batchnorm_and_dropout(found: Found) -> None:
    """Each process's random numbers, buffers and gradients are as found; the hyperparameters are the same."""
    first, second = found["disturbed"]
    assert first["hypers"] == second["hypers"]
    assert first["kept"] and second["kept"]
    assert not torch.equal(first["rng"], second["rng"])


def test_kfac(found: Found) -> None:
    """The curvature is that of the joint batch; drawn targets differ between processes, the curvature does not."""
    one = spread_checks.kfac(ALONE)
    for kind, (hypers, params) in found["kfac"][0].items():
        others, their = found["kfac"][1][kind]
        assert hypers == others
        assert all(map(torch.equal, params, their))
        if kind != "mc":
            assert close(hypers, one[kind][0])
            assert all(torch.allclose(p, q, rtol=1e-9) for p, q in zip(params, one[kind][1], strict=True))


SAID = {
    "fed": ("RuntimeError: batches of B differ", "RuntimeError: batches of B differ"),
    "search": ("RuntimeError: the evaluation failed in another process", "ArithmeticError: a bad batch"),
    "judgement": ("RuntimeError: the evaluation failed in another process", "ArithmeticError: a bad batch"),
    "hypers": ("RuntimeError: hyperparameters differ", "RuntimeError: hyperparameters differ"),
    "local": ("RuntimeError: norms of the gradient differ", "RuntimeError: norms of the gradient differ"),
    "nonfinite": ("UserWarning: a gradient is not finite", "UserWarning: a gradient is not finite"),
    "nothing": ("UserWarning: lr is not being tuned", "UserWarning: lr is not being tuned"),
}


@pytest.mark.parametrize("kind", SAID)
def test_one_process_differs(kind: str, found: Found) -> None:
    """All processes say so, none waits; before the commit nothing has changed, after it the step is done."""
    for result, expected in zip(found["failures"], SAID[kind], strict=True):
        said, unchanged, stepped, hypers = result[kind]
        assert said.startswith(expected)
        assert (unchanged, stepped) == ((False, True) if kind in ("judgement", "nothing") else (True, False))
        assert hypers["lr"] in (0.01, 0.02)


def test_a_process_alone(found: Found) -> None:
    """With a group of its own, a process tunes for itself."""
    for result in found["failures"]:
        said, unchanged, stepped, hypers = result["alone"]
        assert said == "" and stepped and not unchanged
        assert hypers["lr"] != 0.01


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("case", SAVED, ids=lambda case: case.name)
def test_checkpoints(case: Any, found: Found) -> None:
    """A distributed checkpoint goes on bit for bit in as many processes, and as well as equal in one."""
    for rank in found["checkpoint"]:
        (hypers, weights), (again, loaded_weights) = rank[case.name][:2], rank[case.name][2]
        assert hypers == again
        assert all(torch.equal(weights[name], weight) for name, weight in loaded_weights.items())
    alone_hypers, alone_weights = loaded(lambda model: model, ALONE, rank["folder"] + "/" + case.name, case)
    assert close(hypers, alone_hypers)
    for name, weight in alone_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("tensor", "tensor parallelism is untested"),
        ("flat", "use torch.distributed.fsdp.fully_shard"),
        ("partly", "3.weight is not sharded"),
        ("quasi-adam", "the rule does not step every element alone"),
        ("clip", "the rule does not step every element alone"),
        ("kfac", "the rule does not step every element alone"),
    ],
)
def test_refused_by_name(kind: str, match: str, found: Found) -> None:
    """What has not been seen right, or would be silently wrong, is refused at construction."""
    for refused in found["refused"]:
        assert refused[kind].startswith("ValueError") and match in refused[kind]
