"""torch as some other machine computes it: every result off by a rounding, and never by the same.

torch promises no bits. Its products, sums and elementary functions are rounded in another way on
another processor, with another BLAS, for another batch, for memory that begins elsewhere. On one
machine little of that shows, so a test that asks torch for the same bits twice may pass for years.
With PYMETA_TEST_ROUNDING=1 each such result is moved by up to one machine epsilon at random, in
every test; one that then fails has asked torch for what it does not promise.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64)
# Sums, products and elementary functions.
_ROUNDED = """
mm bmm addmm baddbmm mv addmv dot vdot addr linear matmul convolution convolution_backward
sum mean prod cumsum var std var_mean norm linalg_vector_norm logsumexp
exp exp2 expm1 log log1p log2 pow rsqrt sin cos tanh sigmoid erf erfc softplus elu silu gelu
log_sigmoid_forward mish _softmax _log_softmax
tanh_backward sigmoid_backward softplus_backward elu_backward silu_backward gelu_backward
log_sigmoid_backward _softmax_backward_data _log_softmax_backward_data
avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
mse_loss mse_loss_backward huber_loss huber_loss_backward nll_loss_forward nll_loss_backward
binary_cross_entropy_with_logits native_layer_norm native_layer_norm_backward
native_batch_norm native_batch_norm_backward _native_batch_norm_legit
"""
ROUNDED = frozenset(_ROUNDED.split())
# What IEEE 754 rounds correctly, and so alike on every machine.
_ALIKE = "add sub rsub mul div sqrt reciprocal square addcmul addcdiv"
ALIKE = frozenset(_ALIKE.split())


MOVES = 1 << 20


@functools.cache
def _factors(dtype: torch.dtype) -> Tensor:
    """1, or 1 plus or minus an epsilon, at random: [MOVES]."""
    generator = torch.Generator().manual_seed(0)  # torch's own is the tests'
    signs = torch.randint(-1, 2, (MOVES,), generator=generator, device="cpu")
    return (1 + torch.finfo(dtype).eps * signs.double()).to(dtype)


class OtherRounding(TorchDispatchMode):
    """Moves the results of some operations in its block, those that autograd and vmap call as well.

    Args:
        names: of the operations.
        seed: of the moves.
    """

    def __init__(self, names: frozenset[str] = ROUNDED, seed: int = 0) -> None:
        super().__init__()
        self.names, self.chance = names, random.Random(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        found, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in self.names or func._schema.is_mutable:
            return found
        if name in ("sum", "mean", "prod") and found.numel() == args[0].numel():
            return found  # of one number each, which is exact
        return tuple(map(self.move, found)) if isinstance(found, tuple) else self.move(found)

    def move(self, value: Any) -> Any:
        """A result with other roundings; whole numbers stay, for sums of few are exact."""
        if type(value) is not Tensor or value.dtype not in DTYPES or value.device.type != "cpu":
            return value
        if not 0 < value.numel() <= MOVES:
            return value
        at = self.chance.randrange(MOVES - value.numel() + 1)
        factors = _factors(value.dtype)[at : at + value.numel()].view(value.shape)
        return torch.where(value == value.round(), value, value * factors)
