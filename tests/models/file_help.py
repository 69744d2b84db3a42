"""Adapters and models to be written, and files of them."""

import numpy as np

import pymeta
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss

try:
    import torch
except ImportError:  # the file format is torch's as little as the Adapter is
    torch = None


LAYERS = (
    ("linear", 2, 3, True),
    ("softplus", 1.0, 20.0),
    ("layer_norm", 3, 1e-5, True, True),
    ("linear", 3, 2, False),
)


NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight")


CHAIN = Architecture(LAYERS, NAMES, NAMES, False)


def random_adapter(dtype=np.float32, **options) -> pymeta.Adapter:
    """An adapter with learned step sizes, one for each layer of each of two steps."""
    random = np.random.default_rng(0)
    parameters = {n: random.normal(size=s).astype(dtype) for n, s in CHAIN.shapes().items()}
    return pymeta.Adapter(
        CHAIN,
        parameters,
        **{
            "adapted": ("2.weight", "2.bias", "3.weight"),
            "loss": Loss("cross_entropy", label_smoothing=0.1, weight=(1.0, 2.0)),
            "optimizer": pymeta.Adam(pymeta.LearnableLR(0.1, "layer", per_step=True), (0.0, 0.9)),
            "schedule": pymeta.Schedule(steps=2, batch_size=4, seed=7),
            "lr": np.array([[0.1, 0.2], [0.3, 0.4]], dtype),
            "anchor": 0.25,
            **options,
        },
    )


def random_models(tasks: int = 4) -> pymeta.AdaptedArrays:
    random = np.random.default_rng(1)
    shapes = CHAIN.shapes()
    own = {n: random.normal(size=(tasks, *shapes[n])) for n in NAMES[2:]}
    shared = {n: random.normal(size=shapes[n]) for n in NAMES[:2]}
    history = pymeta.History(random.random((tasks, 3)), None, None, np.full(tasks, 3))
    return pymeta.AdaptedArrays(CHAIN, Loss("mse"), own, shared, tasks, None, history)


def load(kind: str, path):
    """Load a file of a kind; of the two classes that read models, both."""
    if kind == "adapter":
        return pymeta.Adapter.load(path)
    if torch is not None:
        net = torch.nn.Sequential(
            torch.nn.Linear(2, 3),
            torch.nn.Softplus(),
            torch.nn.LayerNorm(3),
            torch.nn.Linear(3, 2, bias=False),
        ).double()
        try:
            pymeta.Adapted.load(path, net, verify=True)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
    return pymeta.AdaptedArrays.load(path, verify=True)


def same(a, b) -> bool:
    """Whether two adapters, or two sets of models, are equal to the last bit."""
    if isinstance(a, pymeta.Adapter):
        a, b = a._parts(), b._parts()
        arrays = [(a.pop("lr"), b.pop("lr"))]
        mine, its = a.pop("parameters"), b.pop("parameters")
        if a != b:
            return False
    else:
        if (a.architecture, a.loss, len(a)) != (b.architecture, b.loss, len(b)):
            return False
        mine, its = ({**m._stacked, **m._shared, **m.history.values()} for m in (a, b))
        arrays = [(a.status, b.status)]
    arrays += [(mine[name], its.get(name)) for name in mine]
    return mine.keys() == its.keys() and all(np.array_equal(x, y) for x, y in arrays)
