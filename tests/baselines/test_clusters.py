"""A search on a Ray cluster, by its address."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from baselines.cells import Store
from baselines.cli import main
from baselines.ray_session import SETTINGS, STORE_BYTES

COMMAND = ["sweep", "--optimizer", "sgd", "--meta", "paper", "--steps", "8", "--hidden", "4", "--fsd", "0.1,0"]


@pytest.fixture
def address() -> Iterator[str]:
    """Of a cluster of one processor on this machine."""
    folder = tempfile.mkdtemp(prefix="ray-")
    with mock.patch.dict(os.environ, {**SETTINGS, "RAY_AUTH_MODE": "disabled"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        own = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=own)
        try:
            yield cluster.address
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def test_a_search_on_a_cluster_stores_its_cells_here(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    assert main([*COMMAND, "--address", address, *where]) == 0
    assert "2/2: fsd" in capsys.readouterr().out
    cells = list(Store(tmp_path / "cells"))
    assert {cell.config.fsd for cell in cells} == {0.1, 0.0} and all(cell.finished for cell in cells)
    assert all(cell.about["commit"] for cell in cells)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--address", "127.0.0.1:1", "--cells", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
