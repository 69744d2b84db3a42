"""Tasks with rows that do not count, full of what must not matter."""

import torch
from torch import nn

KEPT = torch.tensor([0, 2, 3, 5, 6, 8])


LEFT_OUT = torch.tensor([1, 4, 7])


ROWS, TASKS, INPUTS = 9, 5, 3


IGNORED = -7


def make_loss(name: str) -> nn.Module:
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5]), ignore_index=IGNORED)
    return {"mse": nn.MSELoss, "huber": nn.HuberLoss, "bce_with_logits": nn.BCEWithLogitsLoss}[
        name
    ]()


def network(batch_norm: bool, inputs: int = INPUTS) -> nn.Module:
    torch.manual_seed(3)
    norm = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(nn.Linear(inputs, 8), *norm, nn.Tanh(), nn.Linear(8, 2))


def rows(loss: str, seed: int, inputs: int = INPUTS, by_label: bool = False):
    """(x, y, weights) with every third row left out and full of what must not matter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, ROWS, inputs, generator=generator)
    weights = torch.rand(TASKS, ROWS, generator=generator) + 0.1
    if loss == "cross_entropy":
        y = torch.randint(0, 2, (TASKS, ROWS), generator=generator)
        y[:, LEFT_OUT] = IGNORED if by_label else 12
    else:
        y = (torch.randn(TASKS, ROWS, 2, generator=generator) > 0).float()
        y[:, LEFT_OUT] = torch.tensor([float("nan"), -3.0])
    x[:, LEFT_OUT[0]], x[:, LEFT_OUT[1]] = float("nan"), float("inf")
    x[:, LEFT_OUT[2]] = x[:, KEPT[0]]
    if not by_label:
        weights[:, LEFT_OUT] = 0.0
    return x, y, weights


def without(side):
    x, y, weights = side
    return tuple(v[:, KEPT].contiguous() for v in (x, y, weights))


CASES = [
    ("mse", False, False),
    ("huber", False, False),
    ("bce_with_logits", True, False),
    ("cross_entropy", False, False),
    ("cross_entropy", True, True),
    ("mse", True, False),
]
