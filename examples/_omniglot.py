"""Omniglot, for the examples: the data file, the split of its characters, the field's networks.

The data file is an ``.npz`` with at least one of

    images               uint8 [classes, 20, 28, 28]  grey, ink high (255), paper 0
    images_nearest_bits  uint8 [classes, 20, 98]      black and white, 784 bits a row, 1 = ink

To make it from the original (github.com/brendenlake/omniglot, python/images_background.zip and
images_evaluation.zip), walk alphabet/character/drawing.png in any fixed order and store, for each
105 x 105 drawing (ink is black there),

    image = PIL.Image.open(path)
    grey = 255 - np.asarray(image.convert("L").resize((28, 28), PIL.Image.LANCZOS))
    bits = np.packbits(np.asarray(image.resize((28, 28), PIL.Image.NEAREST)).ravel() == 0)

The published experiments used the second form: their script asks for LANCZOS, but the drawings
are 1-bit images, which PIL always resizes by taking the nearest pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

HIDDEN = (256, 128, 64, 64)
CHANNELS = 64
TEST_QUERIES = 15


class Split(NamedTuple):
    """Three disjoint sets of characters, uint8 [classes, variants, drawings, 784]."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    test: NDArray[np.uint8]


def load(path: str | Path, form: str = "bits") -> NDArray[np.uint8]:
    """All drawings as uint8 [classes, drawings, 28, 28], ink high: 0/1 for bits, 0..255 for grey.

    Raises:
        ValueError: the file does not hold that form, or not in the shape described above.
    """
    key = {"bits": "images_nearest_bits", "grey": "images"}[form]
    with np.load(path, allow_pickle=False) as file:
        if key not in file.files:
            raise ValueError(f"{path}: no array {key!r} in it, only {', '.join(file.files)}")
        images = file[key]
    if form == "bits":
        images = np.unpackbits(images, axis=-1)
    if images.dtype != np.uint8 or images.size % 784 or images.ndim < 3:
        raise ValueError(
            f"{path}: {key} is {images.dtype} {images.shape}, see the head of _omniglot.py"
        )
    return images.reshape(*images.shape[:2], 28, 28)


def turned(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[classes, drawings, 28, 28] -> [classes, 4, drawings, 784]: by 0, 90, 180, 270 degrees."""
    turns = [np.rot90(images, quarter, axes=(-2, -1)) for quarter in range(4)]
    return np.stack(turns, axis=1).reshape(len(images), 4, images.shape[1], -1)


def split(images: NDArray[np.uint8], train: int, validation: int, seed: int) -> Split:
    """Shuffle the characters; the first ``train`` (turned) are for training, and so on."""
    if train + validation >= len(images):
        raise ValueError(f"{train} + {validation} of {len(images)} characters leave none to test")
    order = np.random.default_rng(seed).permutation(len(images))
    upright = images.reshape(len(images), 1, images.shape[1], -1)
    return Split(
        turned(images[order[:train]]),
        upright[order[train : train + validation]],
        upright[order[train + validation :]],
    )


def convolutional(ways: int) -> nn.Sequential:
    """Four blocks, after which an image of 28 x 28 pixels is 64 numbers."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for channels in (1, CHANNELS, CHANNELS, CHANNELS):
        layers += [
            nn.Conv2d(channels, CHANNELS, 3, padding=1),
            nn.BatchNorm2d(CHANNELS, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS, ways))


def network(ways: int, kind: str = "mlp") -> nn.Sequential:
    """The paper's networks; batch normalisation keeps no running statistics."""
    if kind == "conv4":
        return convolutional(ways)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip((784, *HIDDEN), HIDDEN, strict=False):
        layers += [
            nn.Linear(fan_in, fan_out),
            nn.BatchNorm1d(fan_out, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], ways))
