"""Two trainings in two threads: an evaluation in one leaves the other's model alone."""

import threading

import torch
import torch.nn.functional as F
from torch import nn

import apo


def test_an_evaluation_does_not_put_back_the_model_of_another_thread() -> None:
    """While one thread evaluates, the other trains; nothing that it has done is undone."""
    inside, trained = threading.Event(), threading.Event()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def waiting(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        outputs: torch.Tensor = model(batch[0])
        inside.set()
        assert trained.wait(60)
        return outputs

    first, second = model(), model()
    batch = torch.randn(16, 6), torch.randint(3, (16,))
    slow = apo.APO(first, torch.optim.SGD(first.parameters(), lr=0.1), F.cross_entropy, forward=waiting)
    other = apo.APO(second, torch.optim.SGD(second.parameters(), lr=0.1), F.cross_entropy)

    def train() -> None:
        try:
            assert inside.wait(60)
            for _ in range(3):
                other.zero_grad()
                F.cross_entropy(second(batch[0]), batch[1]).backward()
                other.step(batch=batch)
        finally:
            trained.set()

    F.cross_entropy(first(batch[0]), batch[1]).backward()
    thread = threading.Thread(target=train)
    thread.start()
    slow.step(batch=batch)
    thread.join()
    assert int(second[1].num_batches_tracked) == 3
    assert int(first[1].num_batches_tracked) == 1
    assert len(other.record) == 1
