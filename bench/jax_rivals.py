"""The same meta-gradient by JAX: jit(vmap), and split over the host's cores by shard_map.

Gradients come from `jax.value_and_grad` of the vmapped inner loop, inner gradients from `jax.grad`;
weights lie as [in, out], so that a layer is `x @ w` without a transpose. Inputs are on the device
before the clock starts. The flags that set the number of devices and threads must be in the
environment before JAX is imported: `bench/worker.py` gives each configuration its own process.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.cases import Case, Data

jax.block_until_ready(jnp.zeros(1) + 1)  # starts the backend, which is no case's compile time

Layers = list[tuple[jax.Array, ...]]  # per linear layer: w [in, out], b, and batch norm's two


def _losses(kind: str) -> Callable:
    def mse(z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((z - y) ** 2)

    def cross_entropy(z: jax.Array, y: jax.Array) -> jax.Array:
        right = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)
        return -jnp.mean(right)

    def bce_with_logits(z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))))

    return {"mse": mse, "cross_entropy": cross_entropy, "bce_with_logits": bce_with_logits}[kind]


def _forward(layers: Layers, x: jax.Array) -> jax.Array:
    for w, b, *norm in layers[:-1]:
        x = x @ w + b
        if norm:
            centred = x - x.mean(0)
            x = centred * lax.rsqrt((centred**2).mean(0) + 1e-5) * norm[0] + norm[1]
        x = jax.nn.relu(x)
    w, b = layers[-1]
    return x @ w + b


def _mean_loss(case: Case, scan: bool) -> Callable:
    """f(layers, weights, xs, ys, xq, yq): the weighted sum of the tasks' query losses."""
    loss_of = _losses(case.loss)

    def loss(layers: Layers, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss_of(_forward(layers, x), y)

    def task(layers: Layers, xs: jax.Array, ys: jax.Array, xq: jax.Array, yq: jax.Array):
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

    def total(layers: Layers, weights: jax.Array, *sets: jax.Array) -> jax.Array:
        return weights @ jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(layers, *sets)

    return total


def _chunked(total: Callable, chunk: int) -> Callable:
    """f(layers, weights, *sets) -> (loss, gradients), the tasks taken so many at a time.

    A vmap over all tasks streams every task's weights through memory at each operation; some tasks
    at a time stay in the cache. On large networks this is JAX's fastest form.
    """
    gradient = jax.value_and_grad(total)

    def function(layers: Layers, *arrays: jax.Array):
        def body(sums, part):
            return jax.tree.map(jnp.add, sums, gradient(layers, *part)), None

        parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in arrays]
        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, layers))
        return lax.scan(body, start, parts)[0]

    return function


def _arguments(case: Case, data: Data, multiple: int) -> tuple[Layers, tuple[np.ndarray, ...]]:
    """Layers, and task weights 1/T with the sets; tasks of weight 0 fill up to a multiple."""
    per_layer = 4 if case.batch_norm else 2
    flat = list(data.parameters)
    layers = []
    while flat:
        w, *rest = flat[:per_layer] if len(flat) > 2 else flat
        layers.append((np.ascontiguousarray(w.T), *rest))
        flat = flat[1 + len(rest) :]
    extra = -case.tasks % multiple
    weights = np.full(case.tasks, 1.0 / case.tasks, np.float32)

    def fill(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a, a[:1].repeat(extra, 0)])

    ys, yq = (y.astype(np.int32) if y.dtype == np.int64 else y for y in (data.ys, data.yq))
    sets = tuple(fill(a) for a in (data.xs, ys, data.xq, yq))
    return layers, (np.concatenate([weights, np.zeros(extra, np.float32)]), *sets)


def _read(out: tuple) -> tuple[np.ndarray, list[np.ndarray]]:
    loss, layers = out
    gradients = []
    for w, *rest in layers:
        gradients += [np.asarray(w).T, *map(np.asarray, rest)]
    return np.asarray(loss), gradients


def forms(case: Case, shard: bool) -> dict[str, dict]:
    """The ways of writing it that are tried, as arguments of `make`; which wins varies."""
    found = {"vmap": {"scan": False, "chunk": None}}
    if case.steps > 1:
        found["vmap, scanned steps"] = {"scan": True, "chunk": None}
    each = case.tasks // (len(jax.devices()) if shard else 1)
    for chunk in (16, 1):
        if chunk < each:
            found[f"vmap of {chunk}, scanned"] = {"scan": False, "chunk": chunk}
    return found


def make(
    case: Case, data: Data, shard: bool, scan: bool, chunk: int | None
) -> tuple[Callable, Callable]:
    """(run, read): run() waits for the result on the device, read(result) gives numpy arrays."""
    devices = jax.devices() if shard else jax.devices()[:1]
    layers, sets = _arguments(case, data, len(devices) * (chunk or 1))
    total = _mean_loss(case, scan)
    gradient = _chunked(total, chunk) if chunk else jax.value_and_grad(total)
    if shard:
        mesh = Mesh(np.array(devices), ("tasks",))

        def part(*arguments):
            return jax.tree.map(lambda v: lax.psum(v, "tasks"), gradient(*arguments))

        function = jax.jit(
            jax.shard_map(
                part, mesh=mesh, in_specs=(P(), *[P("tasks")] * 5), out_specs=P(), check_vma=False
            )
        )
        layers = jax.device_put(layers, NamedSharding(mesh, P()))
        sets = jax.device_put(sets, NamedSharding(mesh, P("tasks")))
    else:
        function = jax.jit(gradient)
        layers, sets = jax.device_put((layers, sets), devices[0])

    def run():
        return jax.block_until_ready(function(layers, *sets))

    return run, _read
