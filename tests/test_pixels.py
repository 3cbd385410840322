"""Patches against sums over the pixels of each window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import influence
import truth


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(45, 4)).double().eval()


X = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (2, 1), ((1, 3, 5), 2), (9, 1), ((4, 20), 3)])
def test_patches_against_windows(size, stride: int, per_channel: bool) -> None:
    model = network()
    patches = influence.Patches(size, per_channel=per_channel, stride=stride)
    metric = influence.metric_tensor(model, X, wrt=patches, chunk_size=2)
    assert metric.gram.shape[1] == len(metric.blocks) == len(metric.dims)
    for n, x in enumerate(X):
        logits, jacobian = truth.input_jacobian(model, x)
        jacobian = (jacobian - jacobian[logits.argmax()]).view(4, *x.shape)
        b = 0
        for k in patches.sizes:
            for channel in [slice(c, c + 1) for c in range(2)] if per_channel else [slice(None)]:
                for r in range(0, 5, stride):
                    for c in range(0, 7, stride):
                        rows = slice(max(0, r - (k - 1) // 2), r + k // 2 + 1)
                        columns = slice(max(0, c - (k - 1) // 2), c + k // 2 + 1)
                        window = jacobian[:, channel, rows, columns].flatten(1)
                        torch.testing.assert_close(metric.gram[n, b], window @ window.T, rtol=1e-10, atol=1e-14)
                        assert metric.dims[b] == window.shape[1]
                        where = f"channel {channel.start}" if per_channel else "all channels"
                        assert metric.blocks[b] == f"{k}x{k} patch, {where}, row {r}, column {c}"
                        b += 1
        assert b == len(metric.blocks)


def test_single_pixels_have_one_direction_and_keep_it_in_single_precision() -> None:
    metric = influence.metric_tensor(network().float(), X.float(), wrt=influence.Patches(1))
    assert (metric.rank() == 1).all()
    over = influence.metric_tensor(network().float(), X.float(), wrt=influence.Patches(1, per_channel=False))
    assert (over.rank() <= 2).all()
    result = influence.first_order_influence(metric)
    assert ((result.alignment >= 0) & (result.alignment <= 1)).all()


def test_a_patch_over_everything_is_the_input() -> None:
    whole = influence.metric_tensor(network(), X)
    patch = influence.metric_tensor(network(), X, wrt=influence.Patches(99, per_channel=False, stride=9))
    torch.testing.assert_close(patch.gram, whole.gram, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("size", lambda: influence.Patches(0)),
        ("size", lambda: influence.Patches([])),
        ("each size once", lambda: influence.Patches([3, 3])),
        ("size", lambda: influence.Patches(1.5)),  # type: ignore[arg-type]
        ("stride", lambda: influence.Patches(3, stride=0)),
        (
            r"\(N, C, H, W\)",
            lambda: influence.metric_tensor(nn.Linear(4, 3), torch.zeros(2, 4), wrt=influence.Patches()),
        ),
    ],
)
def test_errors(words: str, call) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_sizes_of_numpy_are_whole_numbers() -> None:
    blocks = influence.Patches(np.int64(3), stride=np.int32(2)).blocks((1, 5, 5))  # type: ignore[arg-type]
    assert blocks == influence.Patches(3, stride=2).blocks((1, 5, 5))
