"""Two processes with different batches, under DistributedDataParallel: one spawn for all peers."""

import functools
import pickle
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.training.models import TASKS, made, sentences
from tests.training.peer import Peer
from tests.training.peers import PEERS
from tests.training.situations.registry import situation

_, _, LSTM = TASKS
RANKS = 2


def gathered(peer: type[Peer], rank: int) -> str | None:
    """What differs between the ranks after a few steps."""
    model = DistributedDataParallel(made(LSTM, dropout=0.0))
    trained = peer(model)
    for batch in sentences(12, seed=rank):
        trained.step(batch)
    lr = torch.tensor([trained.lr], dtype=torch.float64)
    mine = torch.cat([lr, *(p.detach().flatten().double() for p in model.parameters())])
    ranks = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(ranks, mine)
    if torch.equal(*ranks):
        return None
    apart = (ranks[0] - ranks[1])[1:].abs().max()
    return f"learning rates {ranks[0][0]:.4g} and {ranks[1][0]:.4g}, weights up to {apart:.2g} apart"


def worker(rank: int, folder: str) -> None:
    """One process: every peer in turn, and what went wrong or was raised there."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found: dict[str, str | Exception | None] = {}
    for name, peer in PEERS.items():
        try:
            found[name] = gathered(peer, rank)
        except Exception as error:
            found[name] = error
    Path(folder, f"found.{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


@functools.cache
def spawned() -> dict[str, str | Exception | None]:
    """What went wrong or was raised under each peer, on the first rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=RANKS)
        return pickle.loads(Path(folder, "found.0").read_bytes())


@situation
def data_parallel(peer: type[Peer]) -> str | None:
    """Learning rates and weights are identical on both ranks."""
    (found,) = (spawned()[name] for name, known in PEERS.items() if known is peer)
    if isinstance(found, Exception):
        raise found
    return found
