"""Ray as a library: it starts quietly, and leaves no process, file or warning behind."""

import os
import random
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock
from urllib.parse import urlsplit

from baselines.fingerprint import ROOT

# Ray reads these when it is imported, so it is imported after they are set.
SETTINGS: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "OMP_NUM_THREADS": "1",
}
STORE_BYTES: Final = 80_000_000  # of shared memory: what passes between processes here is small
KNOCK_SECONDS: Final = 10.0
LEFT_OUT: Final = (".git", ".venv", "runs", "results", "docs", "tests", "tutorials")  # of what a cluster gets


def _knock(address: str) -> None:
    """Raise ValueError if nobody listens at HOST:PORT, which Ray takes minutes to find out."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        return  # "auto", and other names that Ray knows
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({error}); `ray start --head` starts one and prints its address"
        ) from error


@contextmanager
def session(workers: int | None = None, address: str | None = None) -> Iterator[None]:
    """Ray for the duration of the context: the one that runs in this process already, or one of its own.

    Args:
        workers: Processes that compute at once, of one thread each; None: one a core. Of a cluster, all it has.
        address: Of a cluster; None: this machine.

    Raises:
        ValueError: No cluster answers.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, SETTINGS | {"PYTHONPATH": path}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        if ray.is_initialized():
            yield
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is not None:
            _knock(address)
            try:
                ray.init(address, runtime_env={"working_dir": str(ROOT), "excludes": list(LEFT_OUT)}, **quiet)
            except (ConnectionError, ray.exceptions.AuthenticationError) as error:
                raise ValueError(
                    f"what listens at {address} is no Ray cluster, or refuses us ({error}); every machine needs the "
                    "same RAY_AUTH_MODE, and the same token where it asks for one"
                ) from error
            try:
                yield
            finally:
                ray.shutdown()
            return
        folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it, whose paths may have 107 characters
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_temp_dir": folder}
        try:
            ray.init("local", num_cpus=workers or os.cpu_count(), **own, **quiet)
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def tune_all(
    trainable: Any,
    space: dict[str, Any],
    report: Callable[[str, dict[str, Any]], None],
    *,
    stop: dict[str, Any] | None = None,
    seed: int = 0,
    **of_tune: Any,
) -> None:
    """Run trials of one processor each by Ray Tune, within a session.

    Args:
        trainable: As for `ray.tune.Tuner`.
        space: Likewise.
        report: Called with the trial's name and each of its results.
        stop: When a trial ends, if it does not by itself.
        seed: Of what Ray Tune draws.
        of_tune: Fields of `ray.tune.TuneConfig`.

    Raises:
        RuntimeError: A trial failed; the others have been given up.
    """
    from ray import tune

    class Report(tune.Callback):
        """Hands results over."""

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            report(trial.trial_id, result)

        def __reduce__(self) -> Any:
            """Ray Tune stores callbacks, to restore a search; what we restore is the cells."""
            return tune.Callback, ()

    folder, state = tempfile.mkdtemp(prefix="tune-"), random.getstate()
    random.seed(seed)
    try:
        found = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(reuse_actors=True, **of_tune),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=folder,
                stop=stop,
                verbose=0,
                callbacks=[Report()],
                failure_config=tune.FailureConfig(fail_fast=True),
            ),
        ).fit()
    finally:
        random.setstate(state)
        shutil.rmtree(Path(folder), ignore_errors=True)
    if found.errors:
        raise RuntimeError(f"a trial failed: {found.errors[0]}") from found.errors[0]
