"""torch as some other machine computes it: every result off by a rounding, and never by the same.

torch promises no bits. Its products, sums and elementary functions are rounded in another way on
another processor, with another BLAS, for another batch, for memory that begins elsewhere. On one
machine little of that shows, so a test that asks torch for the same bits twice may pass for years.
With PYMETA_TEST_ROUNDING=1 each such result is moved by up to one machine epsilon at random, in
every test; one that then fails has asked torch for what it does not promise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Sums, products and elementary functions. What IEEE 754 rounds correctly (+, -, *, /, sqrt of two
# numbers) is the same everywhere and is left alone.
_ROUNDED = """
mm bmm addmm baddbmm mv addmv dot vdot addr linear matmul convolution convolution_backward
sum mean prod cumsum var std var_mean norm linalg_vector_norm logsumexp
exp exp2 expm1 log log1p log2 pow rsqrt sin cos tanh sigmoid erf erfc softplus elu silu gelu
log_sigmoid_forward mish _softmax _log_softmax
tanh_backward sigmoid_backward softplus_backward elu_backward silu_backward gelu_backward
log_sigmoid_backward _softmax_backward_data _log_softmax_backward_data
mse_loss mse_loss_backward huber_loss huber_loss_backward nll_loss_forward nll_loss_backward
binary_cross_entropy_with_logits native_layer_norm native_layer_norm_backward
native_batch_norm native_batch_norm_backward _native_batch_norm_legit
"""
ROUNDED = frozenset(_ROUNDED.split())


class OtherRounding(TorchDispatchMode):
    """Moves the results of `ROUNDED` in its block; it sees what autograd and vmap call as well."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)  # torch's own is the tests'
        self.moved = 0  # how many results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in ROUNDED or func._schema.is_mutable:
            return found
        return tuple(map(self.move, found)) if isinstance(found, tuple) else self.move(found)

    def move(self, value: Any) -> Any:
        """A result with other roundings; whole numbers stay, for sums of few are exact."""
        plain = type(value) is Tensor and value.device.type == "cpu" and value.is_floating_point()
        if not plain or not value.numel() or value.numel() > 1 << 20:
            return value
        self.moved += 1
        signs = torch.randint(-1, 2, value.shape, generator=self.generator, dtype=torch.float64)
        moved = value * (1 + torch.finfo(value.dtype).eps * signs).to(value.dtype)
        return torch.where(value == value.round(), value, moved)
