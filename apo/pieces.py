"""A model in pieces: some small tensors together, or some rows of a large one.

What is computed of a piece is small, so that it stays in a cache, and is never there for the whole model at once.
"""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from apo.types import Params

Cut = Mapping[str, slice | None]
"""What is in a piece: names, and which rows of each; None for a whole tensor."""
PIECE = {"cpu": 2**18}
"""Elements that are looked at together, by device."""
ELSEWHERE = 2**24
"""The same on devices where calls cost more, and memory is faster."""


def in_pieces(params: Params, whole: Collection[str] = ()) -> Iterator[Cut]:
    """The pieces of parameters, of which some are not to be cut."""
    cut: dict[str, slice | None] = {}
    size = 0
    for name, param in params.items():
        most, count = PIECE.get(param.device.type, ELSEWHERE), param.numel()
        if cut and size + count > most:
            yield cut
            cut, size = {}, 0
        if count > most and len(param) > 1 and name not in whole:
            height = max(1, most * len(param) // count)
            yield from ({name: slice(at, at + height)} for at in range(0, len(param), height))
        else:
            cut[name], size = None, size + count
    if cut:
        yield cut


def rows(tensor: Tensor, at: slice | None) -> Tensor:
    """Rows of a tensor, a view; a 0-d one has none, and is whole."""
    return tensor if at is None or not tensor.ndim else tensor[at]


def some(params: Params, cut: Cut) -> Params:
    """What there is of a piece."""
    return {name: rows(params[name], at) for name, at in cut.items() if name in params}
