"""The same jobs by JAX: jit(vmap), and split over the host's cores by shard_map.

Meta-gradients come from `jax.value_and_grad` of the vmapped inner loop, inner gradients from
`jax.grad`; Adam is written out by torch's formula, which XLA fuses. Weights lie as [in, out], so
that a layer is `x @ w` without a transpose. Inputs are on the device before the clock starts. The
flags that set the platform and the number of devices and threads must be in the environment before
JAX is imported: `contestants.py` says which, and each configuration has its own process.
Images have their channels last, and the convolutions' weights lie as [3, 3, in, out]; sequences
likewise, with one axis of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pymeta.bench.cases import Array, Case, Data

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
Function = Callable[..., Any]
psum: Function = lax.psum
wait: Function = jax.block_until_ready
Spec: Function = PartitionSpec
wait(jnp.zeros(1) + 1)  # starts the backend, which is no case's compile time
Layers = list[tuple[jax.Array, ...]]  # per linear layer: w [in, out], b, and batch norm's two


def _losses(kind: str) -> Function:
    def mse(z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((z - y) ** 2)

    def cross_entropy(z: jax.Array, y: jax.Array) -> jax.Array:
        right = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)
        return -jnp.mean(right)

    def bce_with_logits(z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))))

    return {"mse": mse, "cross_entropy": cross_entropy, "bce_with_logits": bce_with_logits}[kind]


def _pooled(x: jax.Array) -> jax.Array:
    """The largest of each window of width 2, [rows, positions..., channels]."""
    rows, *sizes, channels = x.shape
    whole = x[(slice(None), *(slice(n // 2 * 2) for n in sizes))]
    halves = [size for n in sizes for size in (n // 2, 2)]
    return whole.reshape(rows, *halves, channels).max(tuple(range(2, 2 * len(sizes) + 1, 2)))


def _forward(layers: Layers, x: jax.Array, activation: Function = jax.nn.relu) -> jax.Array:
    images = x.ndim > 2
    for w, b, *norm in layers[:-1]:
        if images:
            named = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NWC", "WIO", "NWC")
            strides = (1,) * (x.ndim - 2)
            x = lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=named) + b
        else:
            x = x @ w + b
        if norm:
            axes = tuple(range(x.ndim - 1))
            centred = x - x.mean(axes)
            x = centred * lax.rsqrt((centred**2).mean(axes) + 1e-5) * norm[0] + norm[1]
        x = activation(x)
        if images:
            x = _pooled(x)
    w, b = layers[-1]
    if images:  # in torch's order
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
    return x @ w + b


def _mean_loss(case: Case, scan: bool) -> Function:
    """f(layers, weights, xs, ys, xq, yq): the weighted sum of the tasks' query losses."""
    loss_of = _losses(case.loss)

    def loss(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
        return loss_of(_forward(layers, x), y)

    def task(layers: Layers, xs: jax.Array, ys: jax.Array, xq: jax.Array, yq: jax.Array) -> Any:
        def step(layers: Layers, _: None) -> tuple[Layers, None]:
            found = jax.grad(loss)(layers, xs, ys)
            if case.first_order:
                found = lax.stop_gradient(found)
            return jax.tree.map(lambda p, g: p - case.lr * g, layers, found), None

        if scan:
            layers, _ = lax.scan(step, layers, None, length=case.steps)
        else:
            for _ in range(case.steps):
                layers, _ = step(layers, None)
        return loss(layers, xq, yq)

    def total(layers: Layers, weights: jax.Array, *sets: jax.Array) -> Any:
        return weights @ jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(layers, *sets)

    return total


def _adaptation(case: Case, scan: bool, batched: bool = True) -> Function:
    """f(layers, xs, ys): the mean of the steps' losses, and the adapted layers, for each task."""
    loss_of = _losses(case.loss)
    activation = ACTIVATIONS[case.activation]
    b1, b2, eps = 0.9, 0.999, 1e-8

    def loss(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
        return loss_of(_forward(layers, x, activation), y)

    t = np.arange(1.0, case.steps + 1)  # in float64: 1 - b2**t cancels
    corrections = np.stack([case.lr / (1 - b1**t), (1 - b2**t) ** -0.5], 1).astype(np.float32)

    def sgd(
        layers: Layers, gradients: Layers, _state: tuple[Any, ...], _corrections: jax.Array
    ) -> tuple[Any, ...]:
        return jax.tree.map(lambda p, g: p - case.lr * g, layers, gradients), _state

    def adam(
        layers: Layers, gradients: Layers, state: tuple[Any, ...], corrections: jax.Array
    ) -> tuple[Any, ...]:
        rate, root = corrections
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[0], gradients)
        s = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * g * g, state[1], gradients)
        return jax.tree.map(
            lambda p, m, s: p - rate * m / (jnp.sqrt(s) * root + eps), layers, m, s
        ), (m, s)

    update = adam if case.optimizer == "adam" else sgd

    def task(layers: Layers, xs: jax.Array, ys: jax.Array) -> tuple[jax.Array, Layers]:
        zeros = jax.tree.map(jnp.zeros_like, layers)
        state: tuple[Any, ...] = (zeros, zeros) if case.optimizer == "adam" else ()

        def step(carry: tuple[Any, ...], now: Any) -> tuple[tuple[Any, ...], jax.Array]:
            value, gradients = jax.value_and_grad(loss)(carry[0], xs, ys)
            return update(carry[0], gradients, carry[1], now), value

        carry: tuple[Any, ...] = (layers, state)
        if scan:
            carry, values = lax.scan(step, carry, jnp.asarray(corrections))
            return values.mean(), carry[0]
        each: list[jax.Array] = []
        for now in corrections:
            carry, value = step(carry, now)
            each.append(value)
        return jnp.stack(each).mean(), carry[0]

    return jax.vmap(task, in_axes=(None, 0, 0)) if batched else task


def _reptile(case: Case, scan: bool) -> Function:
    """f(layers, weights, xs, ys): the mean loss, and theta minus the mean theta'."""
    adapt = _adaptation(case, scan)

    def function(
        layers: Layers, weights: jax.Array, xs: jax.Array, ys: jax.Array
    ) -> tuple[Any, ...]:
        values, ends = adapt(layers, xs, ys)
        moved = jax.tree.map(
            lambda p, e: weights.sum() * p - jnp.tensordot(weights, e, 1), layers, ends
        )
        return weights @ values, moved

    return function


def _finetune(case: Case, scan: bool) -> Function:
    """f(layers, weights, xs, ys): every task's adapted layers."""
    adapt = _adaptation(case, scan)
    return lambda layers, _, xs, ys: adapt(layers, xs, ys)[1]


def predictor(case: Case, data: Data) -> tuple[Function, Layers]:
    """f(layers, xs, ys, xq) of one task: its adapted model's outputs; and the layers."""
    adapt = _adaptation(case, scan=False, batched=False)
    activation = ACTIVATIONS[case.activation]

    def function(layers: Layers, xs: jax.Array, ys: jax.Array, xq: jax.Array) -> jax.Array:
        return _forward(adapt(layers, xs, ys)[1], xq, activation)

    return function, jax.device_put(_arguments(case, data, 1)[0])


def _stacked(function: Function, chunk: int) -> Function:
    """The same function, its tasks taken so many at a time (see `_chunked`)."""

    def outer(layers: Layers, *arrays: jax.Array) -> Any:
        parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in arrays]
        found = lax.map(lambda part: function(layers, *part), parts)
        return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found)

    return outer


def _chunked(gradient: Function, chunk: int) -> Function:
    """f(layers, weights, *sets) -> (loss, gradients), the tasks taken so many at a time.

    A vmap over all tasks streams every task's weights through memory at each operation; some tasks
    at a time stay in the cache. On large networks this is JAX's fastest form.
    """

    def function(layers: Layers, *arrays: jax.Array) -> Any:
        def body(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(layers, *part)), None

        parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in arrays]
        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, layers))
        return lax.scan(body, start, parts)[0]

    return function


def _arguments(case: Case, data: Data, multiple: int) -> tuple[Any, tuple[Array, ...]]:
    """Layers, and task weights 1/T with the sets; tasks of weight 0 fill up to a multiple."""
    per_layer = 4 if case.batch_norm else 2
    flat = list(data.parameters)
    layers = []
    while flat:
        w, *rest = flat[:per_layer] if len(flat) > 2 else flat
        turned = np.moveaxis(w, (0, 1), (-1, -2))  # [out, in, ...] to [..., in, out]
        layers.append((np.ascontiguousarray(turned), *rest))
        flat = flat[1 + len(rest) :]
    extra = -case.tasks % multiple
    weights = np.full(case.tasks, 1.0 / case.tasks, np.float32)

    def fill(a: Array) -> Array:
        return np.concatenate([a, a[:1].repeat(extra, 0)])

    ys, yq = (y.astype(np.int32) if y.dtype == np.int64 else y for y in (data.ys, data.yq))
    xs, xq = (np.moveaxis(x, 2, -1) for x in (data.xs, data.xq))  # of features: themselves
    query = (xq, yq) if case.query else ()
    sets = tuple(fill(a) for a in (xs, ys, *query))
    return layers, (np.concatenate([weights, np.zeros(extra, np.float32)]), *sets)


def _flat(layers: Layers) -> list[jax.Array]:
    """In the order and shapes of `Data.parameters`."""
    found: list[jax.Array] = []
    for w, *rest in layers:
        axes = w.ndim - rest[0].ndim - 1  # of positions; many tasks' results have an axis more
        found += [jnp.moveaxis(w, (-1, -2), (-2 - axes, -1 - axes)), *rest]
    return found


def forms(case: Case, shard: bool) -> dict[str, dict[str, Any]]:
    """The ways of writing it that are tried, as arguments of `make`; which wins varies."""
    found: dict[str, dict[str, Any]] = {"vmap": {"scan": False, "chunk": None}}
    if case.steps > 1:
        found["vmap, scanned steps"] = {"scan": True, "chunk": None}
    each = case.tasks // (len(jax.devices()) if shard else 1)
    for chunk in (16, 1):
        if chunk < each:
            found[f"vmap of {chunk}, scanned"] = {"scan": False, "chunk": chunk}
            if case.job != "maml":
                found[f"vmap of {chunk}, both scanned"] = {"scan": True, "chunk": chunk}
    return found


def make(
    case: Case, data: Data, shard: bool, scan: bool, chunk: int | None
) -> tuple[Function, Function]:
    """(run, read): run() asks for the result without waiting for it; read(it) says where it is."""
    devices = jax.devices() if shard else jax.devices()[:1]
    layers, sets = _arguments(case, data, len(devices) * (chunk or 1))
    summed = case.job != "finetune"  # over tasks; or each task has its own result
    if case.job == "maml":
        gradient = jax.value_and_grad(_mean_loss(case, scan))
    else:
        gradient = {"reptile": _reptile, "finetune": _finetune}[case.job](case, scan)
    if chunk:
        gradient = (_chunked if summed else _stacked)(gradient, chunk)
    if shard:
        mesh = Mesh(np.array(devices), ("tasks",))

        def part(*arguments: Any) -> Any:
            found = gradient(*arguments)
            return jax.tree.map(lambda v: psum(v, "tasks"), found) if summed else found

        function = jax.jit(
            jax.shard_map(
                part,
                mesh=mesh,
                in_specs=(Spec(), *[Spec("tasks")] * len(sets)),
                out_specs=Spec() if summed else Spec("tasks"),
                check_vma=False,
            )
        )
        layers = jax.device_put(layers, NamedSharding(mesh, Spec()))
        sets = jax.device_put(sets, NamedSharding(mesh, Spec("tasks")))
    else:
        function = jax.jit(gradient)
        layers, sets = jax.device_put((layers, sets), devices[0])

    def run() -> Any:
        return function(layers, *sets)

    def read(out: Any) -> tuple[Any, list[jax.Array]]:
        if summed:
            return out[0], _flat(out[1])
        return None, [a[: case.tasks] for a in _flat(out)]

    return run, read
