"""Residual blocks (He et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """f(x) + x, or f(x) + shortcut(x).

    Any module whose forward torch.fx shows to be such a sum is native too; this one needs no
    forward of your own. `f` and `shortcut` may be whatever else is native, residual blocks among
    them.
    """

    def __init__(self, f: nn.Module, shortcut: nn.Module | None = None) -> None:
        """Make the block.

        Args:
            f: the branch.
            shortcut: what projects x to the shape of f(x), where the two differ (a linear layer,
                a convolution of kernel 1 with a batch normalisation); None: x itself is added.

        Raises:
            TypeError: one of them is no module.
        """
        super().__init__()
        if not isinstance(f, nn.Module):
            raise TypeError(f"f: expected a torch.nn.Module, got {type(f).__name__}")
        if shortcut is not None and not isinstance(shortcut, nn.Module):
            raise TypeError(
                f"shortcut: expected a torch.nn.Module or None, got {type(shortcut).__name__}"
            )
        self.f = f
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The sum, in the shape of f(x)."""
        total: Tensor = self.f(x) + (x if self.shortcut is None else self.shortcut(x))
        return total
