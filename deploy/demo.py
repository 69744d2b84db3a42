"""A small adapter for the demonstration: python deploy/demo.py FILE. Needs torch.

Customers of one bank: whether a payment is late depends on three features in a way that differs a
little from customer to customer. MAML learns a start from which four rows of a customer help.
"""

from __future__ import annotations

import sys

import torch

import pymeta


def draw(tasks: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and labels of customers: [tasks, rows, 3] and [tasks, rows]."""
    x = torch.randn(tasks, rows, 3)
    slopes = torch.tensor([1.5, -1.0, 0.5]) + torch.randn(tasks, 1, 3)
    return x, ((x * slopes).sum(-1) + 0.3 * torch.randn(tasks, rows) > 0).float()


def main() -> None:
    """Train for a few seconds, save, say how good it is."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    maml = pymeta.MAML(net, loss="bce_with_logits", lr=0.5, steps=5)
    outer = torch.optim.Adam(maml.parameters(), lr=0.01)
    for _ in range(300):
        x, y = draw(32, 24)
        outer.zero_grad()
        maml(x[:, :12], y[:, :12], x[:, 12:], y[:, 12:]).loss.backward()
        outer.step()
    x, y = draw(500, 24)
    right = (maml.adapt(x[:, :12], y[:, :12])(x[:, 12:]).squeeze(-1) > 0) == (y[:, 12:] > 0)
    print(f"trained: {100 * right.float().mean():.0f} % of new customers' payments are told right")
    maml.adapter().save(sys.argv[1])


if __name__ == "__main__":
    main()
