"""Kernels of single calls: on the emulated device they give the bits of the kernel of all calls."""

import os
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from device_help import make
from helpers import batch, gradients, in_threads
from kernels import same_bits
from torch import nn

from pymeta import SGD, Adam, FineTune, Reptile, native, specialise

pytestmark = [
    pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def made(cache, monkeypatch):
    """What the calls' kernels were asked for as: path, or "" where there is none."""
    asked, original = [], specialise.compiled

    def spy(source, capability):
        asked.append(original(source, capability))
        return asked[-1]

    monkeypatch.setenv("PYMETA_CACHE", str(cache))
    monkeypatch.setattr(specialise, "compiled", spy)
    monkeypatch.setattr(specialise, "_warned", set())
    native.extension().forget_special_kernels()
    yield asked
    native.set_specialise(False)
    native.extension().forget_special_kernels()


def specialised(run):
    """What `run()` gives where calls have kernels of their own."""
    native.set_specialise(True)
    try:
        return run()
    finally:
        native.set_specialise(False)


def net_of(*sizes, act=nn.ReLU, dtype=torch.float32):
    torch.manual_seed(7)
    layers = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def meta(net, data, weights=(None, None), **options):
    module = make(net, **options)

    def run():
        out = module(*data, support_weights=weights[0], query_weights=weights[1])
        return [
            out.loss,
            out.task_losses,
            *out.predictions,
            *gradients(out.loss, *net.parameters()),
        ]

    return run


def rows_of(tasks, inputs, out, dtype=torch.float32, **options):
    torch.manual_seed(11)
    return batch(tasks=tasks, inputs=inputs, out=out, dtype=dtype, **options)


def ragged():
    torch.manual_seed(3)
    sizes = ((3, 1), (1, 4), (4, 2))
    xs, xq = ([torch.randn(pair[i], 2) for pair in sizes] for i in (0, 1))
    ys, yq = ([torch.randn(pair[i], 1) for pair in sizes] for i in (0, 1))
    return xs, ys, xq, yq


def labelled(net, loss="cross_entropy", steps=2, ignored=True):
    """Three classes; a task that ignores no row, one that ignores some, one that ignores all."""
    xs, _, xq, _ = rows_of(3, 2, 3)
    torch.manual_seed(2)
    ys, yq = (torch.randint(0, 3, x.shape[:2]) for x in (xs, xq))
    for y in (ys, yq) if ignored else ():
        y[1, ::2] = -100
        y[2] = -100
    return meta(net, (xs, ys, xq, yq), loss=loss, steps=steps)


def weighted():
    net, data = net_of(2, 6, 1), rows_of(3, 2, 1)
    torch.manual_seed(4)
    weights = [torch.rand(x.shape[:2]) for x in (data[0], data[2])]
    for each in weights:
        each[1, ::2] = 0
    return meta(net, data, weights, steps=2)


def fine_tuned():
    torch.manual_seed(5)
    x, y = torch.randn(3, 7, 2), torch.rand(3, 7, 1)
    tuner = FineTune(
        net_of(2, 5, 1), loss="bce_with_logits", optimizer=Adam(0.01), epochs=3, batch_size=3,
        seed=1, backend="native",
    )  # fmt: skip

    def run():
        models = tuner(x, y, curves=False)
        return [*models.parameters.values(), models(x)]

    return run


def reptile():
    net = net_of(2, 6, 4, 1, act=nn.GELU)
    learner = Reptile(net, loss="huber", lr=0.1, steps=4, backend="native")
    xs, ys, _, _ = rows_of(3, 2, 1)

    def run():
        out = learner(xs, ys)
        return [out.loss, out.task_losses, *gradients(out.loss, *net.parameters())]

    return run


CALLS = {
    # Fused ReLUs, a narrow last layer, and steps that share their code.
    "relu": lambda: meta(net_of(1, 12, 9, 1), rows_of(3, 1, 1), steps=3),
    "first order": lambda: meta(net_of(2, 9, 3), rows_of(2, 2, 3), steps=1, first_order=True),
    "float64": lambda: meta(
        net_of(2, 5, 4, 3, act=nn.Tanh, dtype=torch.float64),
        rows_of(2, 2, 3, torch.float64),
        steps=2,
    ),
    # A rate that steps multiply by beforehand.
    "a large rate": lambda: meta(
        net_of(2, 4, 1), [1e-6 * t for t in rows_of(2, 2, 1)], steps=2, lr=1e11
    ),
    # Tasks differ in their rows, which are no constants then.
    "ragged": lambda: meta(net_of(2, 6, 1), ragged(), steps=2),
    "minibatches": fine_tuned,
    "labels": lambda: labelled(net_of(2, 6, 5, 3), ignored=False),
    "labels to ignore": lambda: labelled(net_of(2, 6, 5, 3)),
    "labels, weights of classes": lambda: labelled(
        net_of(2, 6, 3),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.1),
    ),
    "weights of rows": weighted,
    "reptile": reptile,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name, made):
    run = CALLS[name]()
    general = run()
    assert not made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        special = specialised(run)
    assert len(made) == 1 and made[0]
    assert same_bits(general, special)
    asked = len(made)
    assert same_bits(general, specialised(run)) and len(made) == asked  # kept in this process


def test_what_a_kernel_is_made_for(made):
    """Other values, other tasks: the same kernel. Other sizes, another one."""
    net = net_of(2, 4, 1)
    for tasks in (2, 3):
        specialised(meta(net, rows_of(tasks, 2, 1), steps=1))
    assert len(made) == 1
    native.extension().forget_special_kernels()
    specialised(meta(net, rows_of(2, 2, 1), steps=1))
    assert made[0] == made[1]  # from the disk
    specialised(meta(net, rows_of(2, 2, 1, support=6), steps=1))
    assert len(set(made)) == 2


def test_other_calls_have_none(made):
    """What is not plain runs on the kernels that were built."""
    run = meta(
        net_of(2, 4, 1), rows_of(2, 2, 1), steps=1, optimizer=SGD(0.1, clip_norm=1.0), lr=None
    )
    assert same_bits(run(), specialised(run)) and not made


def test_threads_wait_for_one_compilation(made):
    net, data = net_of(2, 3, 1), rows_of(2, 2, 1)
    wanted = meta(net, data, steps=1)()
    got = specialised(
        lambda: in_threads(lambda _: meta(net, data, steps=1)(), [(i,) for i in range(3)])
    )
    assert len(made) == 1 and all(same_bits(one, wanted) for one in got)


@pytest.mark.parametrize("what", ["no compiler", "an error", "an empty file"])
def test_what_cannot_be_made(what, made, tmp_path, monkeypatch):
    """One warning, and the kernel of all calls."""
    run = meta(net_of(2, 4, 1), rows_of(2, 2, 1), steps=1)
    wanted = run()
    monkeypatch.setenv("PYMETA_CACHE", str(tmp_path))
    if what == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        words = r"CXX, or c\+\+ on the PATH"
    elif what == "an error":
        monkeypatch.setattr(
            specialise, "HOST_OPTIONS", (*specialise.HOST_OPTIONS, "-include", "nothing.h")
        )
        words = r"nothing\.h"
    else:
        monkeypatch.setattr(specialise, "_compile", lambda source, target: b"")
        words = "could not be loaded .* and was deleted"
    with pytest.warns(RuntimeWarning, match=words) as seen:
        got = specialised(lambda: [run(), run()])
    assert len(seen) == 1 and len(made) == 1
    assert same_bits(got[0], wanted) and same_bits(got[1], wanted)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_to(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYMETA_CACHE", str(tmp_path / "file" / "kernels"))
    monkeypatch.setattr(specialise, "_fallback", None)
    monkeypatch.setattr(specialise, "_compile", lambda source, target: b"")
    with pytest.warns(RuntimeWarning) as seen:
        specialised(meta(net_of(2, 4, 1), rows_of(2, 2, 1), steps=1))
    assert any("cannot be written to" in str(one.message) for one in seen)


def test_where_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PYMETA_CACHE", str(tmp_path))
    assert specialise.cache_folder() == tmp_path
    monkeypatch.delenv("PYMETA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert specialise.cache_folder() == tmp_path / "pymeta"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert specialise.cache_folder().parts[-2:] == (".cache", "pymeta")


def test_the_setting():
    with pytest.raises(TypeError, match="on: expected a bool, got int"):
        native.set_specialise(1)
    program = "from pymeta import native; print(native.extension().specialises())"
    for value, wanted in (("1", "True"), ("0", "False")):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYMETA_SPECIALISE": value},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == wanted


@pytest.mark.skipif(not specialise.finds_device_compiler(), reason="neither NVRTC nor nvcc")
def test_the_source_compiles_for_a_gpu(made, cache, monkeypatch):
    sources = []
    monkeypatch.setattr(
        specialise, "compiled", lambda source, capability: sources.append(source) or ""
    )
    # Many operations: compilers have limits.
    specialised(labelled(net_of(2, 5, 3), steps=14))
    monkeypatch.undo()
    monkeypatch.setenv("PYMETA_CACHE", str(cache))
    path = specialise.compiled(sources[0], 90)
    with open(path, "rb") as file:
        content = file.read()
    assert content[:4] == b"\x7fELF" and b"pymeta_special" in content
