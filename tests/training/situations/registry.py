"""Situations are functions from a peer to what went wrong, or None if it held; each is a row of docs/robustness.md."""

from collections.abc import Callable

from tests.training.peer import NotApplicable, Peer

Situation = Callable[[type[Peer]], str | None]
SITUATIONS: dict[str, Situation] = {}


def situation(function: Situation) -> Situation:
    """Enter a situation under the function's name."""
    SITUATIONS[function.__name__] = function
    return function


def outcome(name: str, peer: type[Peer]) -> str:
    """A verdict, "holds", "fails", "raises" or "n/a", and what was seen."""
    try:
        fault = SITUATIONS[name](peer)
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    return "holds" if fault is None else f"fails: {fault}"
