"""POST /v1/adapt-predict: the adapter's bits in three formats; wrong bodies name the field."""

import io
import subprocess
import sys

import numpy as np
import pytest
from serve_help import adapter, alone, in_process, task

pytest.importorskip("fastapi")

from pymeta.explain import integrated_gradients, support_means
from pymeta.serve import Settings
from pymeta.spec.losses import Loss

PATH = "/v1/adapt-predict"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with in_process(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.mark.parametrize("sizes", [[(7, 2)], [(7, 2), (1, 1), (0, 3), (20, 0), (7, 2)]])
def test_predictions_are_bitwise_those_of_a_lone_call(service, sizes):
    tasks = [task(i, rows, queries) for i, (rows, queries) in enumerate(sizes)]
    got = service.call("POST", PATH, {"tasks": tasks})
    assert got.status == 200, got.body
    model = adapter()
    assert len(got.json["predictions"]) == len(tasks)
    for given, predicted in zip(tasks, got.json["predictions"], strict=True):
        wanted = alone(model, given)
        assert np.array_equal(np.array(predicted, np.float32).reshape(wanted.shape), wanted)
    assert got.json["status"] == [0] * len(tasks)
    assert got.json["model"].startswith("v0001-")


def test_weights_count_and_a_task_without_any_weighs_its_rows_by_one(service):
    weighted = {**task(0), "weights": [0, 1, 2, 0, 1, 0.5, 3]}
    got = service.call("POST", PATH, {"tasks": [weighted, task(1)]})
    for given, predicted in zip([weighted, task(1)], got.json["predictions"], strict=True):
        assert np.array_equal(np.array(predicted, np.float32), alone(adapter(), given))
    unweighted = service.call("POST", PATH, {"tasks": [task(0)]}).json["predictions"]
    assert got.json["predictions"][:1] != unweighted


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_probabilities(tmp_path, loss):
    layers = (("linear", 3, 5, True), ("tanh",), ("linear", 5, 3, True))
    with in_process(tmp_path, adapter(layers=layers, loss=loss), store=None) as service:
        ys = [0, 2, 1, 1, 0, 2, 1] if loss == "cross_entropy" else [[0, 1, 0.5]] * 7
        given = {**task(0), "ys": ys}
        got = service.call("POST", f"{PATH}?probabilities=true", {"tasks": [given]})
        assert got.status == 200, got.body
        z, p = np.array(got.json["predictions"][0]), np.array(got.json["probabilities"][0])
        if loss == "cross_entropy":
            assert np.allclose(p.sum(1), 1) and np.allclose(
                np.log(p[:, 0] / p[:, 1]), z[:, 0] - z[:, 1]
            )
        else:
            assert np.allclose(p, 1 / (1 + np.exp(-z)))


def test_a_loss_without_probabilities_says_so(service):
    got = service.call("POST", f"{PATH}?probabilities=true", {"tasks": [task()]})
    assert got.status == 422 and got.json["field"] == "probabilities"


def test_a_task_that_diverges_is_null_and_the_others_are_as_ever(service):
    wild = {**task(0), "ys": [3e38] * 7}
    got = service.call("POST", PATH, {"tasks": [wild, task(1)]})
    assert got.status == 200 and got.json["status"] == [1, 0]
    assert got.json["predictions"][0] == [[None], [None]]
    assert np.array_equal(
        np.array(got.json["predictions"][1], np.float32), alone(adapter(), task(1))
    )


# ---- soft labels, weights of targets, offsets ---------------------------------------------------


def classifier():
    return adapter(
        layers=(("linear", 3, 5, True), ("tanh",), ("linear", 5, 3, True)), loss="cross_entropy"
    )


def two_targets():
    return adapter(layers=(("linear", 3, 5, True), ("tanh",), ("linear", 5, 2, True)))


def rich(kind, seed, rows=7, queries=2):
    """A task with everything that a kind of model takes."""
    random = np.random.default_rng(seed)
    given, out = task(seed, rows, queries), 3 if kind == "soft" else 2
    if kind == "soft":
        p = random.dirichlet(np.ones(3), rows)
        given |= {"ys": p.tolist(), "weights": random.random(rows).tolist()}
    else:
        given |= {"ys": random.normal(size=(rows, 2)).tolist()}
        given |= {"weights": random.random((rows, 2)).tolist()}
    given["offset"] = random.normal(size=(rows, out)).tolist()
    given["query_offset"] = random.normal(size=(queries, out)).tolist()
    return given


def alone_with_all(model, given):
    arrays = {n: np.array(v, np.float32) for n, v in given.items()}
    return model.adapt_predict(arrays.pop("xs"), arrays.pop("ys"), arrays.pop("xq"), **arrays)


@pytest.mark.parametrize(("kind", "make"), [("soft", classifier), ("of targets", two_targets)])
@pytest.mark.parametrize("inline_us", [1e6, 0], ids=["on the loop", "in threads"])
def test_soft_labels_weights_of_targets_and_offsets(tmp_path, kind, make, inline_us):
    settings = Settings(inline_us=inline_us)
    tasks = [rich(kind, i, rows, queries) for i, (rows, queries) in enumerate([(7, 2), (4, 1)])]
    with in_process(tmp_path, make(), store=None, settings=settings) as service:
        got = service.call("POST", PATH, {"tasks": tasks})
        assert got.status == 200, got.body
        for given, predicted in zip(tasks, got.json["predictions"], strict=True):
            assert np.array_equal(np.float32(predicted), alone_with_all(make(), given))
        explained = service.call("POST", f"{PATH}?explain=true", {"tasks": tasks})
        assert explained.json["predictions"] == got.json["predictions"]
        cut = {n: np.concatenate([np.array(t[n], np.float32) for t in tasks]) for n in tasks[0]}
        into = io.BytesIO()
        np.savez(into, **cut, support_sizes=[7, 4], query_sizes=[2, 1])
        headers = {"content-type": "application/x-npz"}
        answer = service.call("POST", PATH, into.getvalue(), headers=headers)
        flat = np.concatenate([np.float32(p) for p in got.json["predictions"]])
        assert np.array_equal(np.load(io.BytesIO(answer.body))["predictions"], flat)
        pa = pytest.importorskip("pyarrow")
        table, sink = pa.table({n: [t[n] for t in tasks] for n in tasks[0]}), io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        headers = {"content-type": "application/vnd.apache.arrow.stream"}
        answer = service.call("POST", PATH, sink.getvalue(), headers=headers)
        found = pa.ipc.open_stream(answer.body).read_all().column("predictions").to_pylist()
        assert np.array_equal(np.concatenate([np.float32(p) for p in found]), flat)


def test_tasks_that_lack_what_others_have(tmp_path):
    with in_process(tmp_path, two_targets(), store=None) as service:
        full, plain = rich("of targets", 0), rich("of targets", 1)
        for name in ("weights", "offset", "query_offset"):
            del plain[name]
        got = service.call("POST", PATH, {"tasks": [full, plain]}).json["predictions"]
        ones = {**plain, "weights": np.ones((7, 2)).tolist()}
        zeros = {"offset": np.zeros((7, 2)).tolist(), "query_offset": np.zeros((2, 2)).tolist()}
        for given, predicted in ((full, got[0]), ({**ones, **zeros}, got[1])):
            assert np.array_equal(np.float32(predicted), alone_with_all(two_targets(), given))
    with in_process(tmp_path, classifier(), store=None) as service:
        nothing = {"xs": [], "ys": [], "xq": task()["xq"]}
        got = service.call("POST", PATH, {"tasks": [rich("soft", 0), nothing]})
        assert got.status == 200, got.body


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("soft", {"ys": [[0.5, 0.5]] * 7}, "tasks.0.ys"),
        ("soft", {"ys": [[1.5, -0.5, 0.0]] * 7}, "tasks.0.ys.0.0"),
        ("soft", {"weights": [[1.0] * 3] * 7}, "tasks.0.weights"),
        ("soft", {"ys": [0, 1, 2, 0, 1, 2, 0]}, "tasks.1.ys"),
        ("of targets", {"weights": [[1.0] * 3] * 7}, "tasks.0.weights"),
        ("of targets", {"weights": [1.0] * 7}, "tasks.1.weights"),
        ("of targets", {"offset": [[1.0]] * 7}, "tasks.0.offset"),
        ("of targets", {"offset": [[1.0, 1.0]] * 6}, "tasks.0.offset"),
        ("of targets", {"query_offset": [1.0] * 2}, "tasks.0.query_offset"),
        ("of targets", {"query_offset": [[1.0, 1e39]] * 2}, "tasks.0.query_offset.0.1"),
        ("of targets", {"query_offset": []}, "tasks.0.query_offset"),
    ],
)
def test_wrong_ones_name_their_field(tmp_path, kind, change, field):
    model = classifier() if kind == "soft" else two_targets()
    with in_process(tmp_path, model, store=None) as service:
        got = service.call("POST", PATH, {"tasks": [{**rich(kind, 0), **change}, rich(kind, 1)]})
        assert got.status == 422 and got.json["field"] == field, got.body


def test_stored_rows_have_one_label_and_one_weight(tmp_path):
    with in_process(tmp_path, classifier()) as service:
        soft = {"xs": task()["xs"], "ys": rich("soft", 0)["ys"]}
        got = service.call("PUT", "/v1/entities/a/rows", soft)
        assert got.status == 422 and got.json["field"] == "ys"


# ---- explanations -------------------------------------------------------------------------------


def test_attributions_are_those_of_pymeta_explain(service):
    given = task(3, 9, 2)
    got = service.call("POST", f"{PATH}?explain=true", {"tasks": [given, task(1)]})
    assert got.status == 200, got.body
    assert got.json["method"].startswith("integrated") and len(got.json["explanations"]) == 2
    x, y, q = (np.array(given[n], np.float32)[None] for n in ("xs", "ys", "xq"))
    wanted = integrated_gradients(adapter().adapt(x, y), q, baseline=support_means(x))
    for row, explained in zip(range(2), got.json["explanations"][0], strict=True):
        found = np.array(explained["attributions"], np.float32)
        assert np.allclose(found, wanted.values[0, row], rtol=1e-5, atol=1e-6)
        moved = got.json["predictions"][0][row][explained["output"]] - explained["baseline"]
        assert abs(found.sum() - moved) < 1e-4 * max(1, abs(moved))
        order = [abs(r["attribution"]) for r in explained["reasons"]]
        assert order == sorted(order, reverse=True) and len(order) == 3
        first = explained["reasons"][0]
        sign = "+" if first["attribution"] > 0 else "-"
        assert first["code"] == f"R{first['feature'] + 1}{sign}"
        assert first["name"] == f"x{first['feature']}"


def test_a_category_that_the_network_embeds_has_a_reason(tmp_path):
    layers = (("embedding", 3, 2, 4, 2), ("linear", 4, 1, True))  # two numbers and a category
    given = task()
    for name in ("xs", "xq"):
        given[name] = [[*row[:2], (i % 4) % 3] for i, row in enumerate(given[name])]
    with in_process(tmp_path, adapter(layers=layers), features=list("abc")) as service:
        got = service.call("POST", f"{PATH}?explain=true", {"tasks": [given]})
        assert got.status == 200, got.body
        x, y, q = (np.array(given[n], np.float32)[None] for n in ("xs", "ys", "xq"))
        usual = x[0].mean(0)
        usual[2] = 0.0  # rows 0, 3, 4 of 7
        wanted = integrated_gradients(adapter(layers=layers).adapt(x, y), q, baseline=usual[None])
        for row, explained in zip(range(2), got.json["explanations"][0], strict=True):
            found = np.array(explained["attributions"], np.float32)
            assert np.allclose(found, wanted.values[0, row], rtol=1e-5, atol=1e-6)
            moved = got.json["predictions"][0][row][0] - explained["baseline"]
            assert abs(found.sum() - moved) < 1e-4 * max(1, abs(moved))
        assert found[2] != 0 and {r["name"] for r in explained["reasons"]} == {"a", "b", "c"}
        stored = service.call("PUT", "/v1/entities/one/rows", {n: given[n] for n in ("xs", "ys")})
        assert stored.status < 300, stored.body
        path = "/v1/entities/one/predict?explain=true"
        again = service.call("POST", path, {"xq": given["xq"]})
        assert again.status == 200, again.body
        assert again.json["explanations"][0][1]["attributions"] == explained["attributions"]


def test_explanations_of_no_rows_and_of_batch_normalisation(service, tmp_path):
    got = service.call("POST", f"{PATH}?explain=true", {"tasks": [{**task(), "xq": []}]})
    assert got.status == 200 and got.json["explanations"] == [[]]
    layers = (("linear", 3, 4, True), ("batch_norm", 4, 1e-5, False, False), ("linear", 4, 1, True))
    with in_process(tmp_path, adapter(layers=layers), store=None) as other:
        assert other.call("POST", PATH, {"tasks": [task()]}).status == 200
        got = other.call("POST", f"{PATH}?explain=true", {"tasks": [task()]})
        assert got.status == 422 and got.json["field"] == "explain"


def test_reasons_have_the_features_names(tmp_path):
    with in_process(tmp_path, store=None, features=["age", "income", "debt"]) as service:
        got = service.call("POST", f"{PATH}?explain=true", {"tasks": [task()]})
        reasons = got.json["explanations"][0][0]["reasons"]
        assert {r["name"] for r in reasons} == {"age", "income", "debt"}


def test_features_of_one_name_are_one_reason(tmp_path):
    with in_process(tmp_path, store=None, features=["age", "kind", "kind"]) as service:
        got = service.call("POST", f"{PATH}?explain=true", {"tasks": [task()]})
    for row in got.json["explanations"][0]:
        age, *kinds = row["attributions"]
        wanted = {"age": age, "kind": np.float32(kinds).sum()}
        assert {r["name"]: pytest.approx(r["attribution"]) for r in row["reasons"]} == wanted
        assert {r["code"][:2] for r in row["reasons"]} == {"R1", "R2"}


@pytest.mark.parametrize(
    ("loss", "outputs", "explained"),
    [(Loss("gaussian_nll"), 2, 0), (Loss("quantile", levels=(0.05, 0.6, 0.9)), 3, 1)],
)
def test_losses_with_more_outputs_than_targets(tmp_path, loss, outputs, explained):
    layers = (("linear", 3, 5, True), ("tanh",), ("linear", 5, outputs, True))
    model = adapter(layers=layers, loss=loss)
    with in_process(tmp_path, model, store=None) as service:
        got = service.call("POST", f"{PATH}?explain=true", {"tasks": [task()]})
        assert got.status == 200, got.body
        assert np.array_equal(np.float32(got.json["predictions"][0]), alone(model, task()))
        assert [each["output"] for each in got.json["explanations"][0]] == [explained] * 2
        wide = {**task(), "ys": [[1.0] * outputs] * 7}
        assert service.call("POST", PATH, {"tasks": [wide]}).json["field"] == "tasks.0.ys"


def test_a_linear_models_attributions_are_exact(tmp_path):
    model = adapter(layers=(("linear", 3, 1, True),), dtype=np.float64)
    with in_process(tmp_path, model, store=None) as service:
        given = task(5)
        got = service.call("POST", f"{PATH}?explain=true", {"tasks": [given]}).json
    x, y, q = (np.array(given[n]) for n in ("xs", "ys", "xq"))
    weight = model.adapt(x[None], y[None]).parameters["0.weight"][0, 0]
    wanted = weight * (q - x.mean(0))
    found = np.array([e["attributions"] for e in got["explanations"][0]])
    assert np.allclose(found, wanted, rtol=1e-12, atol=1e-12)


# ---- other formats ------------------------------------------------------------------------------


def npz(**arrays) -> bytes:
    into = io.BytesIO()
    np.savez(into, **arrays)
    return into.getvalue()


TASKS = [task(0, 7, 2), task(1, 3, 1), task(2, 0, 2)]


def together(name: str, dtype=np.float32) -> np.ndarray:
    width = () if name == "ys" else (3,)
    return np.concatenate([np.array(t[name], dtype).reshape(-1, *width) for t in TASKS])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz(service, dtype):
    body = npz(
        **{name: together(name, dtype) for name in ("xs", "ys", "xq")},
        support_sizes=np.array([7, 3, 0]),
        query_sizes=np.array([2, 1, 2]),
    )
    got = service.call(
        "POST", f"{PATH}?explain=true", body, headers={"content-type": "application/x-npz"}
    )
    assert got.status == 200, got.body
    with np.load(io.BytesIO(got.body)) as file:
        wanted = np.concatenate([alone(adapter(), t) for t in TASKS])
        assert np.array_equal(file["predictions"], wanted)
        assert file["query_sizes"].tolist() == [2, 1, 2] and file["status"].tolist() == [0, 0, 0]
        assert file["attributions"].shape == (5, 3) and str(file["model"]).startswith("v0001-")


def test_one_task_as_npz_needs_no_sizes(service):
    body = npz(**{name: np.array(TASKS[0][name]) for name in ("xs", "ys", "xq")})
    got = service.call("POST", PATH, body, headers={"content-type": "application/x-npz"})
    with np.load(io.BytesIO(got.body)) as file:
        assert np.array_equal(file["predictions"], alone(adapter(), TASKS[0]))


def test_arrow(service):
    pa = pytest.importorskip("pyarrow")
    columns = {name: pa.array([t[name] for t in TASKS]) for name in ("xs", "ys", "xq")}
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    kind = "application/vnd.apache.arrow.stream"
    got = service.call("POST", PATH, sink.getvalue().to_pybytes(), headers={"content-type": kind})
    assert got.status == 200 and got.headers["content-type"] == kind, got.body
    answer = pa.ipc.open_stream(got.body).read_all()
    assert answer.schema.metadata[b"model"].startswith(b"v0001-")
    for given, found in zip(TASKS, answer.column("predictions").to_pylist(), strict=True):
        wanted = alone(adapter(), given)
        assert np.array_equal(np.array(found, np.float32).reshape(wanted.shape), wanted)


class Evil:
    def __reduce__(self):
        return (sys.exit, ("unpickled",))


def test_pickles_are_not_read(service):
    body = npz(xs=np.array([Evil()], object), ys=np.zeros(1), xq=np.zeros((1, 3)))
    got = service.call("POST", PATH, body, headers={"content-type": "application/x-npz"})
    assert got.status == 400 and "not application/x-npz" in got.json["detail"]


# ---- wrong bodies -------------------------------------------------------------------------------

GOOD = task()
WRONG = {
    "no tasks": ({"tasks": []}, "tasks"),
    "too many": ({"tasks": [GOOD] * 4097}, "tasks"),
    "another member": ({"tasks": [GOOD], "more": 1}, "more"),
    "no xs": ({"tasks": [{"ys": [1], "xq": []}]}, "tasks.0.xs"),
    "text": ({"tasks": [GOOD, {**GOOD, "xs": [["1", 2, 3]]}]}, "tasks.1.xs.0.0"),
    "true": ({"tasks": [{**GOOD, "xs": [[True, 2, 3]]}]}, "tasks.0.xs.0.0"),
    "null": ({"tasks": [{**GOOD, "xs": [[None, 2, 3]]}]}, "tasks.0.xs.0.0"),
    "ragged": ({"tasks": [{**GOOD, "xs": [[1, 2, 3], [1, 2]], "ys": [1, 2]}]}, "tasks.0.xs.1"),
    "narrow": ({"tasks": [{**GOOD, "xq": [[1, 2]]}]}, "tasks.0.xq"),
    "too few targets": ({"tasks": [{**GOOD, "ys": [1]}]}, "tasks.0.ys"),
    "targets too wide": ({"tasks": [{**GOOD, "ys": [[1, 2]] * 7}]}, "tasks.0.ys"),
    "a huge number": ({"tasks": [{**GOOD, "xs": [[1e39, 2, 3]], "ys": [1]}]}, "tasks.0.xs.0.0"),
    "weights below 0": ({"tasks": [{**GOOD, "weights": [1, -1] + [1] * 5}]}, "tasks.0.weights.1"),
    "too few weights": ({"tasks": [{**GOOD, "weights": [1]}]}, "tasks.0.weights"),
    "too many rows": ({"tasks": [{**GOOD, "xq": [[0, 0, 0]] * 10_001}]}, "tasks.0.xq"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_body_names_the_field(service, name):
    body, field = WRONG[name]
    got = service.call("POST", PATH, body)
    assert got.status == 422, got.body
    assert got.headers["content-type"] == "application/problem+json"
    problem = got.json
    assert problem["field"] == field and problem["status"] == 422
    assert problem["request_id"] == got.headers["x-request-id"]


@pytest.mark.parametrize(
    ("loss", "ys", "field"),
    [
        ("cross_entropy", [0, 1, 2, 3, 0, 0, 0], "tasks.0.ys.3"),
        ("cross_entropy", [0, 1, 2, 0.5, 0, 0, 0], "tasks.0.ys.3"),
        ("cross_entropy", [[0], [1], [0], [0], [0], [0], [0]], "tasks.0.ys"),
        ("bce_with_logits", [[0, 1, 0]] * 6 + [[0, 2, 0]], "tasks.0.ys.6.1"),
        ("poisson_nll", [[0, 1, 7]] * 6 + [[-1, 2, 0]], "tasks.0.ys.6.0"),
        ("qlike", [[0, 1, 7]] * 6 + [[0, 0, -1]], "tasks.0.ys.6.2"),
    ],
)
def test_labels_out_of_range(tmp_path, loss, ys, field):
    layers = (("linear", 3, 5, True), ("tanh",), ("linear", 5, 3, True))
    with in_process(tmp_path, adapter(layers=layers, loss=loss), store=None) as service:
        got = service.call("POST", PATH, {"tasks": [{**task(), "ys": ys}]})
        assert got.status == 422 and got.json["field"] == field, got.body


def test_true_is_no_number_beside_numbers_and_huge_integers_are_none(service):
    for odd in (True, False, 10**30, "1", None, {}):
        for name, place in (("xs", [[1, 2, odd]]), ("ys", [odd]), ("weights", [odd])):
            given = {"xs": [[1, 2, 3]], "ys": [1], "xq": [[1, 2, 3]], name: place}
            got = service.call("POST", PATH, {"tasks": [given]})
            assert got.status in ((200, 422) if odd == 10**30 else (422,)), (name, odd, got.body)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b'{"tasks": NaN}', b"\xff\xfe"])
def test_what_is_no_json_is_400_or_422(service, body):
    assert service.call("POST", PATH, body).status in (400, 422)


def test_json_has_no_infinity(service):
    body = b'{"tasks": [{"xs": [[1, 2, Infinity]], "ys": [1], "xq": []}]}'
    assert service.call("POST", PATH, body).status == 422


@pytest.mark.parametrize("kind", ["application/x-npz", "application/vnd.apache.arrow.stream"])
@pytest.mark.parametrize("body", [b"", b"PK\x03\x04 nothing", bytes(500), b"\xff" * 64])
def test_binary_bodies_that_are_none(service, kind, body):
    assert service.call("POST", PATH, body, headers={"content-type": kind}).status == 400


def test_another_content_type(service):
    got = service.call("POST", PATH, {"tasks": [GOOD]}, headers={"content-type": "text/plain"})
    assert got.status == 415 and "application/json" in got.json["detail"]


def test_wrong_flags(service):
    got = service.call("POST", f"{PATH}?explain=maybe", {"tasks": [GOOD]})
    assert got.status == 422 and got.json["field"] == "explain"


def test_paths_and_methods_that_are_not_there(service):
    assert service.call("GET", "/v1/nothing").status == 404
    got = service.call("GET", PATH)
    assert got.status == 405 and got.headers["allow"] == "POST"


# ---- without torch ------------------------------------------------------------------------------


def test_the_serving_process_imports_no_torch(tmp_path):
    adapter().save(tmp_path / "a.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import pymeta.serve.command, pymeta.serve.server, pymeta.serve.parquet\n"
        "from pymeta.serve import create_app\n"
        "import pymeta.serve.retrain\n"
        f"create_app({str(tmp_path / 'a.safetensors')!r}, store='sqlite:///{tmp_path / 'r.db'}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_missing_part_names_the_extra():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "import pymeta.serve\n"
        "try: pymeta.serve.create_app\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert 'pip install "pymeta-kernels[serve]"' in done.stdout, done.stderr
