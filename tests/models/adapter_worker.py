"""A process that uses an adapter's file, and must not come to import torch: see test_adapter.py."""

import copy
import os
import pickle
import sys
from pathlib import Path

import numpy as np

import pymeta

folder = Path(sys.argv[1])
with np.load(folder / "data.npz") as data:
    xs, ys, xq = data["xs"], data["ys"], data["xq"]

adapter = pymeta.Adapter.load(folder / "a.safetensors")
models = adapter.adapt(xs, ys)
one = adapter.adapt_predict(xs[0], ys[0], xq[0], np.empty_like(xq[0], shape=(xq.shape[1], 3)))
many = adapter.adapt_predict(xs, ys, xq)
models.predict_proba(xq)
models.save(folder / "models.safetensors")
joined = pymeta.AdaptedArrays.concatenate([models[:1], models[[1, 2]]])
assert np.array_equal(joined(xq), many)
assert np.array_equal(pymeta.AdaptedArrays.load(folder / "models.safetensors")(xq), many)
twin = pickle.loads(pickle.dumps(copy.deepcopy(adapter)))
twin.save(folder / "again.safetensors")
assert (folder / "again.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()
repr(adapter), repr(models), models.status, models.state_dict(0)

# what was made before a fork works after it
child = os.fork()
if child == 0:
    forked = adapter.adapt_predict(xs[0], ys[0], xq[0])
    same = np.array_equal(adapter.adapt_predict(xs, ys, xq), many)
    np.savez(folder / "results.npz", one=one, many=many, forked=forked)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0

heavy = {"torch", "scipy", "sklearn", "pandas", "jax"} & set(sys.modules)
assert not heavy, f"imported: {heavy}"
