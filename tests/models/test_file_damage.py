"""Damaged and foreign files: nothing broken gets past pymeta's own reader."""

import json
import re
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from file_help import load, random_adapter, random_models, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymeta.models import file
from pymeta.models.arrays import raw_of

SLOW = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# ---- damage -------------------------------------------------------------------------------------


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def refused(kind: str, path, message: str = "") -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        load(kind, path)


def test_truncation_anywhere(kind, path):
    content = path.read_bytes()
    ends = [*range(0, header_end(content) + 1, 3), *range(header_end(content), len(content), 7)]
    for end in ends:
        path.write_bytes(content[:end])
        refused(kind, path)
    path.write_bytes(content + b"\0")
    refused(kind, path, "no valid safetensors file")


@SLOW
@given(data=st.data())
def test_flipped_bytes(kind, path, data):
    """Every flip is seen, wherever it is: or it is none, as one blank for another."""
    whole = load(kind, path)
    content = bytearray(path.read_bytes())
    flips = st.dictionaries(
        st.integers(0, len(content) - 1), st.integers(1, 255), min_size=1, max_size=3
    )
    for place, bits in data.draw(flips).items():
        content[place] ^= bits
    broken = path.with_name("broken")
    broken.write_bytes(content)
    try:
        assert same(load(kind, broken), whole)
    except ValueError as error:
        assert str(error).startswith(str(broken))


def test_a_flip_in_the_weights_is_seen(kind, path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(kind, path, "the tensors do not have their checksum")


@SLOW
@given(content=st.binary(max_size=200))
def test_any_bytes(kind, tmp_path, content):
    path = tmp_path / "any"
    path.write_bytes(content)
    refused(kind, path)
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    refused(kind, path)


def test_no_file_and_folders(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load("adapter", tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load(kind, tmp_path)


def rewritten(path, metadata=None, tensors=None, header=None) -> None:
    """Change a file's metadata, tensors' entries or header, with checksums that are right."""
    content = path.read_bytes()
    end = header_end(content)
    old = json.loads(content[8:end])
    new = {**old, **(tensors or {}), "__metadata__": {**old["__metadata__"], **(metadata or {})}}
    new["__metadata__"] = {k: v for k, v in new["__metadata__"].items() if v is not None}
    new = {k: v for k, v in new.items() if v is not None}
    new["__metadata__"]["checksum"] = file._header_checksum(new)
    text = json.dumps(new).encode() if header is None else header
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "its format is 'pt', not 'pymeta'; pymeta did not write it"),
        ({"format": None}, "its format is None"),
        ({"kind": "something"}, "holds 'something', expected"),
        ({"version": "2"}, "written by a newer pymeta: version 2, this one reads 1"),
        ({"version": "9" * 5000}, "written by a newer pymeta"),
        ({"version": "0"}, "its version is 0, this pymeta reads 1"),
        ({"version": "1.0"}, "its version is '1.0', which is not a number"),
        ({"version": "²"}, "which is not a number"),
        ({"version": None}, "its version is None"),
        ({"data_checksum": None}, "the tensors do not have their checksum"),
        ({"architecture": None}, "architecture is missing"),
        ({"loss": "{"}, "loss cannot be read"),
        ({"loss": "[" * 100_000}, "loss cannot be read"),
        ({"loss": "1" * 10_000}, "loss cannot be read"),
        ({"loss": '{"kind": NaN}'}, "loss cannot be read .*NaN"),
        ({"loss": '{"kind": "mse", "kind": "mse"}'}, "loss cannot be read .*twice"),
        ({"loss": "7"}, "loss: expected an object, got 7"),
        ({"more": "{}"}, "unknown entry 'more'"),
    ],
)
def test_metadata_that_make_no_sense(kind, path, metadata, message):
    rewritten(path, metadata)
    refused(kind, path, message)


def test_a_file_of_the_other_kind(tmp_path):
    random_adapter().save(tmp_path / "a")
    random_models().save(tmp_path / "m")
    refused("models", tmp_path / "a", "holds 'adapter', expected 'models'")
    refused("adapter", tmp_path / "m", "holds 'models', expected 'adapter'")
    safetensors.numpy.save_file({"0.weight": np.zeros(3)}, tmp_path / "s")
    refused("adapter", tmp_path / "s", "pymeta did not write it")
    safetensors.numpy.save_file({"0.weight": np.zeros(3)}, tmp_path / "s", {"format": "pt"})
    refused("models", tmp_path / "s", "its format is 'pt'")


def test_headers_that_lie(kind, path):
    content = path.read_bytes()
    header = json.loads(content[8 : header_end(content)])
    weight = header["3.weight"]
    begin, end = weight["data_offsets"]
    for entry in (
        {**weight, "data_offsets": [begin, end + 8]},
        {**weight, "data_offsets": [begin, 2**63]},
        {**weight, "data_offsets": [-8, end]},
        {**weight, "data_offsets": [end, begin]},
        {**weight, "data_offsets": [begin]},
        {**weight, "shape": [2**40, 2**40]},
        {**weight, "shape": [-2, -3]},
        {**weight, "shape": [1.5]},
        {**weight, "dtype": "F99"},
        {**weight, "dtype": "U8"},
        {"dtype": "F32"},
        [],
        None,
    ):
        path.write_bytes(content)
        rewritten(path, tensors={"3.weight": entry})
        refused(kind, path)
    for size in (2**63, len(content) - 7, len(content), 100_000_001, 4):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        refused(kind, path)


def test_tensors_that_lie_askew(tmp_path):
    """Numbers at an address that is no multiple of their size: no file of pymeta's has that."""
    path = tmp_path / "m"
    random_models(tasks=3).save(path)
    content = path.read_bytes()
    end = header_end(content)
    header = json.loads(content[8:end])
    data = content[-3:] + content[end:-3]  # the statuses, one byte each, to the front
    tensors = {
        name: {**entry, "data_offsets": [at + 3 for at in entry["data_offsets"]]}
        for name, entry in header.items()
        if name != "__metadata__"
    }
    tensors[".status"]["data_offsets"] = [0, 3]
    path.write_bytes(content[:end] + data)
    rewritten(path, {"data_checksum": f"{zlib.crc32(data):08x}"}, tensors)
    refused("models", path, "cannot be the bytes")


def test_headers_that_are_no_objects(kind, path):
    content = path.read_bytes()
    for header in (b"[]", b"3", b"{}", b'{"__metadata__": 3}', b"[" * 60_000, b"\xff\xfe"):
        path.write_bytes(content)
        rewritten(path, header=header)
        refused(kind, path)


# ---- contents that do not fit -------------------------------------------------------------------


def contents(kind: str) -> tuple[dict, dict]:
    """What the file of a kind is made of: its described metadata and its tensors."""
    caught = {}

    def write(path, kind, described, tensors):
        caught.update(described=json.loads(json.dumps(described)), tensors=dict(tensors))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("adapter", "stacked"):
            patch.setattr(f"pymeta.models.{module}.write", write)
        (random_adapter() if kind == "adapter" else random_models()).save("")
    return caught["described"], caught["tensors"]


def changed(value, where, new):
    """A copy of JSON with the value at a path of keys replaced."""
    if not where:
        return new
    first, *rest = where
    if isinstance(value, list):
        return [changed(v, rest, new) if i == first else v for i, v in enumerate(value)]
    return {**value, first: changed(value.get(first), rest, new)}


def places(value, where=()):
    """The paths of everything in some JSON."""
    yield where
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in inside:
        yield from places(part, (*where, key))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, 3, -1, 2**24, 2**31, 2**63, 10**400, 1e300, 0.5, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        ["relu", "linear", "network", "parameter", "mse", "0.weight", "adam", "\ud800"]
    ),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@SLOW
@given(data=st.data())
def test_any_json_in_the_place_of_any_other(kind, tmp_path, data):
    described, tensors = contents(kind)
    where = data.draw(st.sampled_from(list(places(described))[1:]))
    path = tmp_path / "odd"
    file.write(path, kind, changed(described, where, data.draw(ODD)), tensors)
    try:
        load(kind, path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@SLOW
@given(data=st.data())
def test_any_tensor_in_the_place_of_any_other(kind, tmp_path, data):
    described, tensors = contents(kind)
    name = data.draw(st.sampled_from([*tensors, ".status", ".lr", ".history.train", "more"]))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = data.draw(st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int8]))
    tensors[name] = raw_of(np.ones(shape, dtype))
    if data.draw(st.booleans()):
        del tensors[name]
    path = tmp_path / "odd"
    file.write(path, kind, described, tensors)
    try:
        load(kind, path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("architecture", "layers", 0, 1), 5, "do not fit|expected shape"),
        (("architecture", "layers", 0, 2), 4, "layer 1 takes 3 features"),
        (("architecture", "layers", 0, 0), "conv", "layer 0: unknown kind of layer 'conv'"),
        (("architecture", "layers", 1), ["relu", 1], "layer 1: relu has 0 values, got 1"),
        (("architecture", "layers", 0, 1), 0, r"layer 0: 1: 0 is not in 1\.\."),
        (("architecture", "layers", 0, 3), 1, "layer 0: 3: expected true or false, got 1"),
        (("architecture", "layers", 1, 1), -1.0, "softplus: beta must be > 0"),
        (("architecture", "names", 0), "1.weight", "names and chain are not the same names"),
        (("architecture", "chain"), ["0.weight"], "5 parameters in the layers, 1 in chain"),
        (("architecture", "flattens"), 0, "flattens: expected true or false, got 0"),
        (("loss", "kind"), "mae", "loss: expected one of mse, .* got 'mae'"),
        (("loss", "delta"), 0.0, "delta 0.0 is not > 0"),
        (("loss", "weight"), [1, 2, 3], "weight has 3 entries.*|mse has no such weights"),
        (("loss", "pos_weight"), [1.0], "(cross_entropy|mse) has no such weights"),
        (("loss", "ignore_index"), 2**63, "ignore_index: .* is not in"),
    ],
)
def test_descriptions_that_do_not_fit(kind, tmp_path, where, value, message):
    described, tensors = contents(kind)
    file.write(tmp_path / "x", kind, changed(described, where, value), tensors)
    refused(kind, tmp_path / "x", f"({message})")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("optimizer", "kind"), "sdg", "optimizer: unknown kind 'sdg'"),
        (("optimizer", "eps"), 10**400, "eps: .* is not a finite number"),
        (("optimizer", "eps"), -1.0, "Adam.eps: expected a finite number >= 0"),
        (("optimizer", "betas"), [0.9], "Adam.betas: expected two numbers"),
        (("optimizer", "lr", "per"), "row", "LearnableLR.per: expected one of"),
        (("optimizer", "lr"), 0.1, "lr: expected values exactly where"),
        (("optimizer", "clip_norm"), 0, "Adam.clip_norm: expected a finite number > 0"),
        (("schedule", "epochs"), 2, "steps, epochs: expected exactly one of them, got both"),
        (("schedule", "steps"), 1.5, "steps: expected a whole number, got 1.5"),
        (("schedule", "steps"), True, "steps: expected a whole number, got True"),
        (("schedule", "batch_size"), 0, "batch_size: 0 is not in 1"),
        (("schedule", "seed"), -1, "seed: -1 is not in 0"),
        (("anchor",), -1.0, "anchor"),
        (("adapted",), ["3.weight", "2.weight"], "adapted: expected some of .* in their order"),
        (("adapted",), ["5.weight"], "adapted: expected some of"),
        (("class_weights",), "equal", 'class_weights: expected "balanced"'),
        (("class_weights",), [1.0], "class_weights: expected 2"),
        (("class_weights",), [1.0, -1.0], "class_weights"),
    ],
)
def test_recipes_that_make_no_sense(tmp_path, where, value, message):
    described, tensors = contents("adapter")
    path = tmp_path / "x"
    file.write(path, "adapter", changed(described, ("recipe", *where), value), tensors)
    refused("adapter", path, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (".lr", np.array([[0.1, np.nan]], np.float32), "lr: expected finite values"),
        (".lr", np.array([0.1, 0.1]), "lr: expected finite values of float32"),
        (".lr", np.zeros((0, 2), np.float32), "lr: expected shape"),
        (".lr", np.zeros((2, 2, 2), np.float32), "lr: expected shape"),
        (".lr", None, "lr: expected values exactly where"),
        ("2.bias", None, "parameters: expected 0.weight"),
        ("2.bias", np.zeros(3), "2.bias is float64; expected float32 or float64 as the first is"),
        ("2.bias", np.zeros(4, np.float32), r"2.bias: expected shape \[3\], got \[4\]"),
        ("2.bias", np.zeros(3, np.float16), "tensor 2.bias is F16"),
        ("more", np.zeros(3, np.float32), "parameters: expected 0.weight"),
    ],
)
def test_an_adapters_tensors_that_do_not_fit(tmp_path, name, value, message):
    described, tensors = contents("adapter")
    tensors = {n: raw for n, raw in tensors.items() if n != name}
    if value is not None:
        tensors[name] = raw_of(value)
    file.write(tmp_path / "x", "adapter", described, tensors)
    refused("adapter", tmp_path / "x", message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("2.bias", None, "the tensors are not those it says it has .see '2.bias'"),
        ("more", np.zeros(3), "see 'more'"),
        ("2.bias", np.zeros((3, 3)), "2.bias has the shape .3, 3., expected 4 tasks"),
        ("2.bias", np.zeros((4, 4)), "do not fit the architecture .see 2.bias"),
        ("2.bias", np.zeros((4, 3), np.int64), "2.bias is not of a floating point dtype"),
        ("0.bias", np.zeros((4, 3)), "do not fit the architecture .see 0.bias"),
        (".status", np.zeros(3, np.int8), ".status is I8 of shape .3., expected"),
        (".status", np.zeros(4), ".status is F64"),
        (".history.train", np.zeros((3, 3)), ".history.train is F64 of shape .3, 3."),
        (".history.epochs", np.zeros(4), ".history.epochs is F64"),
    ],
)
def test_models_tensors_that_do_not_fit(tmp_path, name, value, message):
    described, tensors = contents("models")
    tensors = {n: raw for n, raw in tensors.items() if n != name}
    if value is not None:
        tensors[name] = raw_of(value)
    file.write(tmp_path / "x", "models", described, tensors)
    refused("models", tmp_path / "x", message)


def test_checksums_are_what_the_head_of_the_module_says(path):
    content = path.read_bytes()
    end = header_end(content)
    header = json.loads(content[8:end])
    metadata = header["__metadata__"]
    assert metadata["data_checksum"] == f"{zlib.crc32(content[end:]):08x}"
    stated = metadata.pop("checksum")
    assert stated == f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"
