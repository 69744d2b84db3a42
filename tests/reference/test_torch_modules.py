"""Modules of torch.nn that the fallback runs, against a plain eager loop of torch.autograd.

Each module stands in a network with a linear head; some tasks are meta-learned by two inner steps.
The loop gives each task a copy of the model, so that what a call changes (the vectors of
spectral_norm, the rows of an embedding with max_norm) is the task's own. The fallback must give the
loop's loss and meta-gradient, and leave the model as it was.
"""

import pytest
import torch
from helpers import assert_close, gradients
from torch import nn
from torch.nn.utils import parametrizations, prune

import pymeta

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*padding='same'.*"),
]


class First(nn.Module):
    """The first output of a recurrent layer, or its only one, in a row."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = self.layer(x)
        return (out[0] if isinstance(out, tuple) else out).flatten(1)


class Same(nn.Module):
    """A layer that takes its input more than once."""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        out = self.layer(*[x] * self.times)
        return (out[0] if isinstance(out, tuple) else out).flatten(1)


class Looked(nn.Module):
    """An embedding as a function, in a module of one's own."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(5, 3)), function

    def forward(self, x):
        return self.function(self.weight, x).flatten(1)


class Counting(nn.Module):
    """Buffers that calls change: one in place, one by assignment."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        out = self.layer(x)
        self.mean = 0.5 * self.mean + 0.5 * out.detach().mean(0)
        return out * self.calls.clone() + self.mean


def words(*shape):
    return torch.randint(0, 5, (*shape, 2))


def numbers(*features):
    return lambda *lead: torch.randn(*lead, *features, dtype=torch.float64)


def embedding(**options):
    return nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten())


def after_conv(kind, layer):
    """A layer over images behind a convolution, so that its input depends on parameters."""
    return nn.Sequential(kind(2, 2, 1), layer, nn.Flatten())


CASES = {
    "embedding": (embedding, words),
    "embedding padding_idx": (lambda: embedding(padding_idx=0), words),
    "embedding last padding_idx": (lambda: embedding(padding_idx=-1), words),
    "embedding max_norm": (lambda: embedding(max_norm=0.5), words),
    "embedding scale_grad_by_freq": (lambda: embedding(scale_grad_by_freq=True), words),
    "embedding sparse": (lambda: embedding(sparse=True), words),
    "embedding all": (
        lambda: embedding(padding_idx=1, max_norm=0.7, scale_grad_by_freq=True),
        words,
    ),
    "embedding by function": (
        lambda: Looked(lambda w, x: nn.functional.embedding(x, w, padding_idx=2)),
        words,
    ),
    "embedding by the core": (lambda: Looked(lambda w, x: torch.embedding(w, x, 2)), words),
    "embedding weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Embedding(5, 3)), nn.Flatten()),
        words,
    ),
    "multihead attention": (
        lambda: Same(nn.MultiheadAttention(4, 2, batch_first=True), 3),
        numbers(2, 4),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True),
            nn.Flatten(),
        ),
        numbers(2, 4),
    ),
    "bilinear": (lambda: Same(nn.Bilinear(3, 3, 4), 2), numbers(3)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), numbers(3)),
    "weight_norm by a hook": (lambda: nn.utils.weight_norm(nn.Linear(3, 4)), numbers(3)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), numbers(3)),
    "spectral_norm by a hook": (lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), numbers(3)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 4)), numbers(3)),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=3), numbers(3)),
    "buffers": (Counting, numbers(3)),
}
for cell in (nn.RNN, nn.LSTM, nn.GRU):
    CASES[cell.__name__] = (
        lambda cell=cell: First(cell(3, 2, 2, batch_first=True, bidirectional=True)),
        numbers(2, 3),
    )
for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    CASES[cell.__name__] = (lambda cell=cell: First(cell(3, 4)), numbers(3))
for axes, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
    for name, options in {
        "": {},
        "groups": {"groups": 2},
        "stride": {"stride": 2, "padding": 1, "bias": False},
        "circular": {"padding": "same", "padding_mode": "circular"},
    }.items():
        CASES[f"{conv.__name__} {name}"] = (
            lambda conv=conv, options=options: nn.Sequential(
                conv(2, 4, 3, **options), nn.Tanh(), nn.Flatten()
            ),
            numbers(2, *[4] * axes),
        )
for axes, conv in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), start=1):
    CASES[conv.__name__] = (
        lambda conv=conv: nn.Sequential(
            conv(2, 4, 3, stride=2, output_padding=1, groups=2), nn.Tanh(), nn.Flatten()
        ),
        numbers(2, *[2] * axes),
    )
for make in (
    lambda: nn.BatchNorm1d(4),
    lambda: nn.LayerNorm(4),
    lambda: nn.RMSNorm(4),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.PReLU(4),
    lambda: nn.GLU(),
    lambda: nn.Mish(),
    lambda: nn.Hardswish(),
    lambda: nn.CELU(0.7),
    lambda: nn.Softshrink(0.1),
    lambda: nn.LogSoftmax(-1),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.RReLU().eval(),
    lambda: nn.Dropout().eval(),
):
    CASES[str(make())] = (lambda make=make: nn.Sequential(nn.Linear(3, 4), make()), numbers(3))
for make in (
    lambda: nn.BatchNorm1d(2),
    lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    lambda: nn.LocalResponseNorm(2),
    lambda: nn.GroupNorm(1, 2),
    lambda: nn.LayerNorm((2, 4)),
    lambda: nn.MaxPool1d(2),
    lambda: nn.AdaptiveAvgPool1d(3),
    lambda: nn.LPPool1d(2, 2),
):
    CASES[f"{make()} 1d"] = (lambda make=make: after_conv(nn.Conv1d, make()), numbers(2, 4))
for make in (
    lambda: nn.BatchNorm2d(2),
    lambda: nn.InstanceNorm2d(2),
    lambda: nn.MaxPool2d(3, 1, 1, ceil_mode=True),
    lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    lambda: nn.AdaptiveMaxPool2d(2),
    lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    lambda: nn.ReflectionPad2d(1),
    lambda: nn.PixelUnshuffle(2),
    lambda: nn.Unfold(2),
):
    CASES[f"{make()} 2d"] = (lambda make=make: after_conv(nn.Conv2d, make()), numbers(2, 4, 4))

# torch has no second derivative of these; they are compared to first order
FIRST_ORDER = {
    "bag sum": (lambda: nn.EmbeddingBag(5, 3, mode="sum", padding_idx=0), words),
    "bag mean": (lambda: nn.EmbeddingBag(5, 3, mode="mean", max_norm=0.5), words),
    "bag max": (lambda: nn.EmbeddingBag(5, 3, mode="max"), words),
    "Hardsigmoid": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid()), numbers(3)),
}


def made(case):
    """A network with the module, and (xs, ys, xq, yq) for it."""
    build, inputs = (CASES | FIRST_ORDER)[case]
    x, twin = inputs(3, 4), build().double()  # which is called, and may change thereby
    net = nn.Sequential(build(), nn.Linear(twin(x[0]).shape[-1], 2)).double()
    targets = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    return net, (x, targets[0], inputs(3, 4), targets[1])


def eager_losses(net, lr, steps, xs, ys, xq, yq, first_order=False):
    """The query losses after some steps, task by task, each on a copy of the model.

    The task's parameters are in the copy as plain tensors, so that all that happens is what
    torch does by itself when a module is called.
    """
    losses, outputs = [], []
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    for x, y, qx, qy in zip(xs, ys, xq, yq, strict=True):
        theta = {n: p.clone() for n, p in net.named_parameters()}
        state = {n: b.clone() for n, b in buffers.items()}

        def call(inputs, theta=theta, state=state):
            values = {**theta, **state}
            out = torch.func.functional_call(net, values, (inputs,))
            state.update((n, values[n]) for n in state)
            return out

        for _ in range(steps):
            loss = nn.functional.mse_loss(call(x), y)
            found = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            for (name, p), g in zip(list(theta.items()), found, strict=True):
                theta[name] = p - lr * g
        outputs.append(call(qx))
        losses.append(nn.functional.mse_loss(outputs[-1], qy))
    return torch.stack(losses), torch.stack(outputs)


def state_of(net):
    held = [v for m in net.modules() for v in m.__dict__.values() if isinstance(v, torch.Tensor)]
    return [v.detach().clone() for v in (*net.state_dict().values(), *held)]


@pytest.mark.parametrize("case", [*CASES, *FIRST_ORDER])
def test_the_fallback_is_an_eager_loop(case):
    torch.set_default_dtype(torch.float64)
    net, data = made(case)
    for module in net.modules():  # running statistics move (test_norm_statistics.py)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module._buffers.update(dict.fromkeys(module._buffers))
    before, parameters = state_of(net), list(net.parameters())
    first_order = case in FIRST_ORDER
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, first_order=first_order, backend="torch")
    out = module(*data)
    adapted = module.adapt(*data[:2])
    predicted = adapted(data[2])
    assert all(map(torch.equal, state_of(net), before))
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        losses, outputs = eager_losses(net, 0.1, 2, *data, first_order=first_order)
    wanted = gradients(losses.mean(), *parameters)
    assert_close(out.task_losses, losses)
    assert_close(out.predictions, outputs)
    assert_close(
        [g.to_dense() for g in gradients(out.loss, *parameters)], [g.to_dense() for g in wanted]
    )
    assert any(g.to_dense().any() for g in wanted)
    if case not in ("spectral_norm", "spectral_norm by a hook", "buffers"):  # begin anew there
        assert_close(predicted, outputs)


def test_a_padding_row_has_no_gradient_in_any_task():
    net = nn.Sequential(nn.Embedding(3, 2, padding_idx=0), nn.Flatten(), nn.Linear(2, 1)).double()
    x, y = torch.tensor([[[0], [1]], [[0], [2]]]), torch.randn(2, 2, 1).double()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="torch")
    (found,) = gradients(module(x, y, x, y).loss, net[0].weight)
    assert not found[0].any() and found[1:].all()
    start = net[0].weight.detach()
    assert torch.equal(module.adapt(x, y).parameters["0.weight"][:, 0], start[0].expand(2, 2))
