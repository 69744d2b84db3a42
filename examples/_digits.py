"""Digits for demo.py: scikit-learn's drawings, turned by random angles, and their mixtures."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from _plots import WAYS
from _starts import pre_train
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from torch import nn

LARGEST_TURN = 60  # degrees


def digit_drawings() -> NDArray[np.float32]:
    """[10, drawings, 8, 8], as many drawings of each digit as there are of the rarest."""
    digits = load_digits()
    fewest = np.bincount(digits.target).min()
    return np.stack([digits.images[digits.target == d][:fewest] for d in range(10)]).astype("f4")


def mixtures(drawings: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """The classes themselves and their mixtures: n classes become n + 2 n (n - 1).

    [n, drawings, 8, 8]: a mixture has the upper half of one class over the lower half of another,
    or the left half of one beside the right half of another, of drawings paired at random.
    """
    rng = np.random.default_rng(seed)
    mixed = list(drawings)
    for one, other in itertools.permutations(drawings, 2):
        other = other[rng.permutation(len(other))]
        mixed.append(np.concatenate([one[:, :4], other[:, 4:]], axis=1))
        mixed.append(np.concatenate([one[:, :, :4], other[:, :, 4:]], axis=2))
    return np.stack(mixed)


def turned(drawings: NDArray[np.float32], copies: int, seed: int) -> NDArray[np.uint8]:
    """``copies`` of each drawing, each turned by its own random angle.

    [digits, drawings, 8, 8] -> image table [digits, 1, drawings * copies, 64], 0..255.
    """
    classes = len(drawings)
    images = np.repeat(drawings.reshape(-1, 8, 8), copies, axis=0)
    angle = np.random.default_rng(seed).uniform(-1, 1, (len(images), 1, 1)) * LARGEST_TURN
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    row, column = np.mgrid[:8, :8] - 3.5
    where = np.broadcast_arrays(
        np.arange(len(images)).reshape(-1, 1, 1),
        cos * row - sin * column + 3.5,
        sin * row + cos * column + 3.5,
    )
    pixels = map_coordinates(images, where, order=1, mode="constant") * (255 / 16)
    return pixels.round().astype(np.uint8).reshape(classes, 1, -1, 64)


def digits_network(outputs: int) -> nn.Sequential:
    """64-128-64-outputs."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)
    )


def pretrained_digits(table: NDArray[np.uint8], batches: int, what: str, quiet: bool) -> nn.Module:
    """A classifier of the training classes, its last layer replaced by zeros for three new ones."""
    network = digits_network(len(table))
    x = torch.from_numpy(table.reshape(-1, 64).astype(np.float32) / 255)
    y = torch.arange(len(table)).repeat_interleave(len(x) // len(table))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(x), (256,))
        return x[rows], y[rows]

    pre_train(network, nn.functional.cross_entropy, draw, batches, what, quiet)
    network[-1] = nn.Linear(64, WAYS)
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network
