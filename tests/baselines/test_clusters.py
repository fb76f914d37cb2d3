"""A search on a Ray cluster, by its address."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baselines.cells import Store
from baselines.cli import main
from baselines.ray_session import SETTINGS
from tests.documents import ROOT

COMMAND = ["sweep", "--optimizer", "sgd", "--meta", "paper", "--steps", "8", "--hidden", "4", "--fsd", "0.1,0"]
# In a process of its own: Ray fails in one that has had another session before.
ON_A_CLUSTER = """
import sys, tempfile
from ray.cluster_utils import Cluster
from baselines.cli import main
from baselines.ray_session import STORE_BYTES
with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
    own = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=own)
    try:
        status = main([*sys.argv[1:], "--address", cluster.address])
    finally:
        cluster.shutdown()
sys.exit(status)
"""


def test_a_search_on_a_cluster_stores_its_cells_here(tmp_path: Path) -> None:
    """The cluster has one processor, of this machine."""
    where = ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **SETTINGS, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": path}
    script = [sys.executable, "-c", ON_A_CLUSTER, *COMMAND, *where]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2/2: fsd" in done.stdout
    cells = list(Store(tmp_path / "cells"))
    assert {cell.config.fsd for cell in cells} == {0.1, 0.0} and all(cell.finished for cell in cells)
    assert all(cell.about["commit"] for cell in cells)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--address", "127.0.0.1:1", "--cells", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
