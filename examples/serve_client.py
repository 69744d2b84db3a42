"""A client of `pymeta serve`: rows arrive, the entity's model follows, predictions come back.

    pymeta serve adapter.safetensors &
    python examples/serve_client.py http://127.0.0.1:8000 new_rows.csv --entity shop --target sales

Each row is predicted before its outcome is sent, so that the printed error is an honest one. Only
the standard library is used. Columns other than the two are the model's inputs, in their order.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any


def call(url: str, method: str, path: str, body: Any) -> Any:
    """One request; urllib.error.HTTPError where the service refuses it, with its reason."""
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("PYMETA_TOKEN"):  # what `pymeta token` printed
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def main(argv: Sequence[str] | None = None) -> float:
    """The mean squared error of predictions made before the outcome was known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("table", help="a CSV file")
    parser.add_argument("--entity", required=True)
    parser.add_argument("--target", required=True)
    options = parser.parse_args(argv)
    squares = []
    with open(options.table, newline="") as file:
        for row in csv.DictReader(file):
            entity, outcome = row.pop(options.entity), float(row.pop(options.target))
            path = f"/v1/entities/{urllib.parse.quote(entity, safe='')}"
            x = [float(value) for value in row.values()]
            try:
                answer = call(options.url, "POST", f"{path}/predict", {"xq": [x]})
                squares.append((answer["predictions"][0][0][0] - outcome) ** 2)
            except urllib.error.HTTPError as error:
                if error.code != 404:  # its first row: nothing is known of the entity yet
                    raise
            call(options.url, "PUT", f"{path}/rows", {"xs": [x], "ys": [outcome]})
    mean = sum(squares) / len(squares)
    print(f"{len(squares)} rows, each predicted before it was learned: squared error {mean:.4g}")
    return mean


if __name__ == "__main__":
    main()
