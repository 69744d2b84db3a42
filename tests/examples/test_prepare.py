"""examples/prepare.py: each data file from a tiny source in its public form."""

from __future__ import annotations

import io
import sys
import zipfile

import numpy as np
import pytest
import source_tree

sys.path.insert(0, str(source_tree.need("examples") / "examples"))
pytest.importorskip("torch")
pytest.importorskip("pandas")

import _omniglot
import credit_data
import pandas as pd
import prepare


def test_omniglot(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    ink = random.random((2, 3, 20, 28, 28)) < 0.2  # set, character, drawing
    for part, name in enumerate(("background", "evaluation")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for c in range(3):
                for d in range(20):
                    data = io.BytesIO()
                    image_module.fromarray(~ink[part, c, d]).save(data, "png")
                    where = f"images_{name}/Greek/character{c:02d}/{c:04d}_{d:02d}.png"
                    archive.writestr(where, data.getvalue())
    out = tmp_path / "omniglot.npz"
    sources = [str(tmp_path / f"{name}.zip") for name in ("background", "evaluation")]
    assert prepare.main(["omniglot", *sources, str(out)]) == 0
    assert np.array_equal(_omniglot.load(out, "bits"), ink.reshape(6, 20, 28, 28))
    assert np.load(out)["is_evaluation"].tolist() == [False] * 3 + [True] * 3


def test_lending_club(tmp_path):
    credit_data.generate(tmp_path / "made.csv", 200)
    made = pd.read_csv(tmp_path / "made.csv")
    raw = made.drop(columns="default")
    for name in ("issue_d", "earliest_cr_line"):
        raw[name] = pd.to_datetime(raw[name]).dt.strftime("%b-%Y")
    for name in ("int_rate", "revol_util"):
        raw[name] = (100 * raw[name]).map("{:.6f}%".format)
    raw["term"] = raw["term"].map(" {} months".format)
    raw.loc[0, "loan_status"] = "Current"  # its outcome is not known
    text = "Notes offered by Prospectus\n" + raw.to_csv(index=False)
    (tmp_path / "LoanStats3a.csv").write_text(text)
    out = tmp_path / "loans.csv.gz"
    assert prepare.main(["lending-club", str(tmp_path / "LoanStats3a.csv"), str(out)]) == 0
    got, wanted = credit_data.load(out), credit_data.load(tmp_path / "made.csv")
    assert len(got) == 199
    pd.testing.assert_frame_equal(got, wanted.drop(index=0).reset_index(drop=True), rtol=1e-6)


def test_tables(tmp_path):
    taiwan = pd.DataFrame({"ID": [1, 2], "default.payment.next.month": [0, 1]})
    taiwan.to_csv(tmp_path / "t.csv", index=False)
    assert prepare.main(["taiwan", str(tmp_path / "t.csv"), str(tmp_path / "t.csv.gz")]) == 0
    assert pd.read_csv(tmp_path / "t.csv.gz")["default"].tolist() == [0, 1]

    pd.DataFrame({"Time": [0.0, 1.0], "V1": [2.0, 3.0], "Class": [1, 0]}).to_csv(
        tmp_path / "f.csv", index=False
    )
    assert prepare.main(["fraud", str(tmp_path / "f.csv"), str(tmp_path / "f.npz")]) == 0
    made = np.load(tmp_path / "f.npz")
    assert made["X"].tolist() == [[0, 2], [1, 3]] and made["y"].tolist() == [1, 0]
    assert made["columns"].tolist() == ["Time", "V1"]

    days = pd.DataFrame(
        {
            "date": ["2013-02-08", "2013-02-11", "2013-02-11"],
            "open": [1.0, 2, 3],
            "high": [1.5, 2.5, 3.5],
            "low": [0.5, 1.5, 2.5],
            "close": [1.25, 2.25, 3.25],
            "volume": [10, 20, 30],
            "Name": ["B", "B", "A"],
        }
    )
    days.to_csv(tmp_path / "p.csv", index=False)
    assert prepare.main(["prices", str(tmp_path / "p.csv"), str(tmp_path / "p.npz")]) == 0
    made = np.load(tmp_path / "p.npz")
    assert made["tickers"].tolist() == ["A", "B"]
    assert made["dates"].tolist() == ["2013-02-08", "2013-02-11"]
    assert np.isnan(made["close"][0, 0]) and made["close"][1].tolist() == [1.25, 2.25]
    assert made["volume"].tolist() == [[0, 30], [10, 20]]

    for name in ("train", "test"):
        pd.DataFrame({"text": [f"{name}?"], "category": ["card"]}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    words = [str(tmp_path / n) for n in ("train.csv", "test.csv", "b.csv.gz")]
    assert prepare.main(["banking77", *words]) == 0
    assert pd.read_csv(tmp_path / "b.csv.gz")["split"].tolist() == ["train", "test"]


def test_wrong_sources_are_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    out = str(tmp_path / "o")
    for data in ("lending-club", "taiwan", "fraud", "prices"):
        assert prepare.main([data, str(tmp_path / "a.csv"), out]) == 1
        assert capsys.readouterr().err.startswith(f"{data}: ")
    assert prepare.main(["taiwan", str(tmp_path / "none.csv"), out]) == 1
    assert "none.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["taiwan", "one"])
