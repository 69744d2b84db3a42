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

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import Batch, accuracies
from numpy.typing import NDArray
from torch import nn

import pymeta

HIDDEN = (256, 128, 64, 64)
CHANNELS = 64
TEST_QUERIES = 15
EVALUATE_AT_ONCE = 50  # tasks; bounds the memory of an evaluation


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


def turned(images: NDArray[np.uint8], mirrored: bool = False) -> NDArray[np.uint8]:
    """[classes, drawings, 28, 28] -> [classes, 4, drawings, 784]: by 0, 90, 180, 270 degrees.

    ``mirrored`` adds the mirror image of each: [classes, 8, drawings, 784].
    """
    seen = [images, images[..., ::-1]] if mirrored else [images]
    turns = [np.rot90(one, quarter, axes=(-2, -1)) for one in seen for quarter in range(4)]
    return np.stack(turns, axis=1).reshape(len(images), len(turns), images.shape[1], -1)


def split(
    images: NDArray[np.uint8], train: int, validation: int, seed: int, mirrored: bool = False
) -> Split:
    """Shuffle the characters; the first ``train`` (turned) are for training, and so on."""
    if train + validation >= len(images):
        raise ValueError(f"{train} + {validation} of {len(images)} characters leave none to test")
    order = np.random.default_rng(seed).permutation(len(images))
    upright = images.reshape(len(images), 1, images.shape[1], -1)
    return Split(
        turned(images[order[:train]], mirrored),
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


@torch.no_grad()
def predictions(maml: pymeta.MAML, tasks: Batch, steps: int) -> torch.Tensor:
    """Logits of the query rows after ``steps`` inner steps, [T, Q, ways]."""
    parts = []
    for start in range(0, len(tasks.xs), EVALUATE_AT_ONCE):
        part = tasks.part(start, start + EVALUATE_AT_ONCE)
        parts.append(maml(*part, steps=steps).predictions)
    return torch.cat(parts)


def evaluate(maml: pymeta.MAML, tasks: Batch, steps: int) -> NDArray[np.float64]:
    """Accuracy of each task after ``steps`` inner steps, [T]."""
    return accuracies(predictions(maml, tasks, steps), tasks.yq)


def evaluate_together(
    maml: pymeta.MAML, states: list[dict[str, Any]], tasks: Batch, steps: int
) -> NDArray[np.float64]:
    """Accuracy of each task, [T], by the mean of the probabilities that ``states`` of it give."""
    mean = torch.zeros(())
    for state in states:
        maml.load_state_dict(state)
        mean = mean + predictions(maml, tasks, steps).softmax(-1) / len(states)
    return accuracies(mean, tasks.yq)


class Kept:
    """The states in which a module did best on validation tasks so far, ``most`` of them.

    ``found`` has (accuracy, iteration, state) of each, the best first.
    """

    keeps: tuple[str, ...] = ("found",)

    def __init__(self, module: nn.Module, most: int = 1) -> None:
        self.module, self.most = module, most
        self.found = [(-1.0, 0, copy.deepcopy(module.state_dict()))]  # until something is offered

    accuracy = property(lambda self: self.found[0][0])
    iteration = property(lambda self: self.found[0][1])
    state = property(lambda self: self.found[0][2])

    def offer(self, accuracy: float, iteration: int) -> bool:
        """Keep the module as it is now, if it is among the best; whether it is the very best."""
        known = [one for one in self.found if one[0] >= 0]
        known.append((accuracy, iteration, copy.deepcopy(self.module.state_dict())))
        self.found = sorted(known, key=lambda one: -one[0])[: self.most]
        return self.iteration == iteration

    def state_dict(self) -> dict[str, Any]:
        """What was best."""
        return {name: getattr(self, name) for name in self.keeps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in self.keeps:
            setattr(self, name, state[name])


class Best(Kept):
    """The learner and number of inner steps that did best on the validation tasks so far."""

    keeps = (*Kept.keeps, "steps")

    def __init__(self, maml: pymeta.MAML, tasks: Batch, choices: list[int], most: int = 1) -> None:
        super().__init__(maml, most)
        self.maml, self.tasks, self.choices, self.steps = maml, tasks, choices, choices[0]

    def look(self, iteration: int) -> float:
        """Evaluate the learner as it is now, keep it if it is the best; its accuracy."""
        scores = {k: float(evaluate(self.maml, self.tasks, k).mean()) for k in self.choices}
        steps = max(scores, key=scores.__getitem__)
        if self.offer(scores[steps], iteration):
            self.steps = steps
        return scores[steps]


def best_of_checkpoint(path: Path) -> dict[str, Any]:
    """The state of the learner that did best on validation in a run that kept its checkpoint."""
    return torch.load(path, weights_only=True)["parts"]["best"]["found"][0][2]
