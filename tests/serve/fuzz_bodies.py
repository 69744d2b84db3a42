"""Malformed bodies for every path, made from the OpenAPI page: none may be answered 5xx.

python tests/serve/fuzz_bodies.py [COUNT] [SEED]     starts a service, sends so many, 10,000
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1e308, -1e39, 2**63, 10**400, 0.1, float("inf")),
    *("", "x", "1", "\x00", "é" * 50, "2026-01-01", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z"),
    *([], {}, [[]], [[[]]], [None], {"a": []}, [1, "a"], [[1, 2, 3], [1, 2]], [[float("nan")] * 3]),
]
KINDS = (
    "application/json",
    "application/x-npz",
    "application/vnd.apache.arrow.stream",
    "application/vnd.apache.parquet",
    "text/plain",
    "application/json; charset=utf-16",
)


class Source:
    """Draws requests."""

    def __init__(self, page: dict[str, Any], seed: int) -> None:
        self.random, self.page = random.Random(seed), page
        self.paths = [(m.upper(), p) for p, methods in page["paths"].items() for m in methods]
        self.paths = [each for each in self.paths if "retrain" not in each[1]]
        self.bodies = [
            said["requestBody"]["content"]["application/json"]["schema"]
            for methods in page["paths"].values()
            for said in methods.values()
            if "application/json" in said.get("requestBody", {}).get("content", {})
        ]
        self.samples = binary_samples()

    def request(self) -> tuple[str, str, bytes, dict[str, str]]:
        """(method, path, body, headers)."""
        r = self.random
        method, path = r.choice(self.paths)
        name = r.choice(["a", "b", "..", "%2e%2e%2f", "a%00b", "x" * 300, "%ff", "a'--", "v0001"])
        path = path.replace("{id}", name).replace("{version}", name)
        path += r.choice(
            ["", "", "?explain=true", "?explain=%00", "?probabilities=1&explain=1", "?x"]
        )
        kind = r.choice(KINDS) if r.random() < 0.3 else KINDS[0]
        headers = {"Content-Type": kind}
        if r.random() < 0.1:
            odd = ["k", "x" * 201, "a b", "\xff", ""]
            headers[r.choice(["Idempotency-Key", "Authorization", "X-Request-ID"])] = r.choice(odd)
        return method, path, self.body(kind), headers

    def body(self, kind: str) -> bytes:
        r = self.random
        if r.random() < 0.1:
            return r.randbytes(r.randrange(200))
        if kind == KINDS[0] or r.random() < 0.2:
            data = json.dumps(self.value(r.choice(self.bodies))).encode()
        else:
            data = r.choice(self.samples)
        return self.damaged(data) if r.random() < 0.4 else data

    def damaged(self, data: bytes) -> bytes:
        """Bytes cut, changed, or put in twice."""
        r, found = self.random, bytearray(data)
        for _ in range(r.randrange(1, 5)):
            if not found:
                break
            i, j = sorted((r.randrange(len(found)), r.randrange(len(found))))
            action = r.randrange(4)
            if action == 0:
                del found[i : i + r.randrange(1, 9)]
            elif action == 1:
                found[i] = r.randrange(256)
            elif action == 2:
                found[i:i] = found[i : min(j, i + 50)]
            else:
                del found[j:]
        return bytes(found)

    def value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value that is nearly of a schema."""
        r = self.random
        if r.random() < 0.06:
            return r.choice(ODD)
        if "$ref" in schema:
            named = schema["$ref"].rpartition("/")[2]
            return self.value(self.page["components"]["schemas"][named], depth)
        if "anyOf" in schema:
            return self.value(r.choice(schema["anyOf"]), depth)
        kind = schema.get("type")
        if kind == "object":
            made = {n: self.value(s, depth + 1) for n, s in schema.get("properties", {}).items()}
            if r.random() < 0.1:
                made.pop(r.choice(sorted(made)))
            if r.random() < 0.05:
                made["more"] = r.choice(ODD)
            return made
        if kind == "array":
            count = r.choice([3, 3, 3, 3, 3, 0, 1, 2, 4, 40])
            return [self.value(schema["items"], depth + 1) for _ in range(count)]
        if schema.get("format") == "date-time":
            return r.choice(["2026-01-01T00:00:00Z", "2026-01-01", "1600-02-30T00:00:00Z"])
        return r.choice([0, 1, 0.5, -2.5, 3])


def binary_samples() -> list[bytes]:
    """Good bodies of the binary kinds, to damage."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = np.arange(9.0).reshape(3, 3)
    found = []
    for dtype in (np.float32, np.int8, np.complex64, "U3", "datetime64[us]"):
        into = io.BytesIO()
        np.savez(into, xs=x.astype(dtype), ys=x[:, 0].astype(dtype), xq=x.astype(dtype))
        found.append(into.getvalue())
    into = io.BytesIO()
    np.savez_compressed(into, xs=x, ys=x[:, 0], xq=x, support_sizes=[2, 1], query_sizes=[1, 2])
    found.append(into.getvalue())
    columns = {"xs": [x.tolist()], "ys": [[1, 2, 3]], "xq": [x.tolist()]}
    for made in (columns, {**columns, "ys": [["a", "b", "c"]]}, {**columns, "xq": [None]}):
        sink, table = pa.BufferOutputStream(), pa.table(made)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        found.append(sink.getvalue().to_pybytes())
    for entity in (["a", "b", "c"], [1, 2, 3], ["a", None, "c"]):
        into = io.BytesIO()
        pq.write_table(pa.table({"entity": entity, "x": x.tolist(), "y": [0.0, 1, 2]}), into)
        found.append(into.getvalue())
    return found


def send(port: int, count: int, seed: int) -> Counter:
    """How often each status was answered; AssertionError at the first of 5xx."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/openapi.json")
    source = Source(json.loads(connection.getresponse().read()), seed)
    statuses: Counter = Counter()
    for i in range(count):
        request = source.request()
        method, path, body, headers = request
        try:
            connection.request(
                method, path, body, {k: v.encode("latin-1") for k, v in headers.items()}
            )
            answer = connection.getresponse()
            answer.read()
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            statuses[type(error).__name__] += 1
            continue
        statuses[answer.status] += 1
        assert answer.status < 500, f"request {i} of seed {seed}: {answer.status} to {request}"
    connection.close()
    return statuses


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from serve_help import served

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder), "--log-level", "error") as service,
    ):
        print(f"seed {seed}", dict(send(service.port, count, seed)))


if __name__ == "__main__":
    main()
