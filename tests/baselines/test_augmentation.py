"""Training images are cropped and mirrored anew at every step, and no others are."""

import torch

from baselines.augmentation import crop_and_flip
from baselines.config import Config
from baselines.data import load
from baselines.run import Run

DIGITS = load("digits")


def test_every_window_and_its_mirror_image_occurs_and_nothing_else() -> None:
    image = torch.arange(1.0, 13.0).reshape(2, 2, 3)  # no two windows are equal but those outside the image
    outputs = crop_and_flip(image.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    padded = torch.zeros(2, 10, 11)
    padded[:, 4:6, 4:7] = image
    windows = [padded[:, top : top + 2, left : left + 3] for top in range(9) for left in range(9)]
    views = torch.stack([view for window in windows for view in (window, window.flip(2))])
    found, counts = outputs.flatten(1).unique(dim=0, return_counts=True)
    expected, shares = views.flatten(1).unique(dim=0, return_counts=True)
    assert torch.equal(found, expected)
    torch.testing.assert_close(counts / 20_000, shares / 162, rtol=0, atol=0.015)
    assert (counts / 20_000 * 162 / shares).std() < 0.12  # 1/√(20,000/162) = 0.09 expected


def test_the_model_trains_on_other_views_and_is_judged_on_the_images() -> None:
    run = Run(Config(method="fixed", steps=3, hidden=(4,), augment=True, batch_size=1438, eval_every=3), DIGITS)
    seen: list[torch.Tensor] = []
    run.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    run.advance()
    tests, batch = seen
    assert torch.equal(tests, DIGITS.test_inputs[:1000]) and batch.shape == DIGITS.train_inputs.shape
    order = Run(run.config, DIGITS).order.draw()
    assert 0 < (batch == DIGITS.train_inputs[order]).flatten(1).all(1).sum() < 40  # 1438/162 = 9 expected
    seen.clear()
    run.advance()
    assert not torch.equal(seen[0], batch)
