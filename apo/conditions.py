"""Under which conditions a forward ran, so that an evaluation can enter them again: random numbers, autocast."""

import random
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Conditions(NamedTuple):
    """Random number generators by device, autocast by device type, the generators of Python and NumPy."""

    rng: dict[torch.device, Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]
    host: tuple[Any, Any]

    @property
    def float16(self) -> bool:
        """Whether autocast was on in float16."""
        return (True, torch.float16) in self.autocast.values()


def now(devices: Collection[torch.device]) -> Conditions:
    """The conditions at this moment, on some devices."""
    types = {device.type for device in devices}
    return Conditions(
        {device: _rng(device).get_rng_state(*_at(device)) for device in devices},
        {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types},
        (random.getstate(), numpy.get_state() if (numpy := _numpy()) else None),
    )


@contextmanager
def under(conditions: Conditions) -> Iterator[None]:
    """Enter the conditions of an earlier forward; the generators are left where the body leaves them.

    The weights that autocast has cast and kept are forgotten before and after: they may be those of other weights.
    """
    restore_rng(conditions)
    with ExitStack() as stack:
        for kind, (enabled, dtype) in conditions.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype if enabled else None, enabled=enabled))
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def restore_rng(conditions: Conditions) -> None:
    """Put the random number generators back to where they were."""
    for device, state in conditions.rng.items():
        _rng(device).set_rng_state(state, *_at(device))
    own, numpys = conditions.host
    random.setstate(own)
    if numpys is not None:
        _numpy().set_state(numpys)


def seed_rng(devices: Iterable[torch.device], seed: int) -> None:
    """Seed the random number generators of some devices, and of no others."""
    for device in devices:
        _rng(device).set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), *_at(device))


def _rng(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _numpy() -> Any:
    """NumPy's global generator, if anybody has imported it: dropping whole layers or spans is often drawn there."""
    return sys.modules.get("numpy.random")


def _at(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "cpu" else (device,)
