"""Make the data files of the examples and of `pymeta.finance` from their public sources.

    python examples/prepare.py omniglot images_background.zip images_evaluation.zip omniglot28.npz
    python examples/prepare.py lending-club LoanStats3a.csv lendingclub.csv.gz
    python examples/prepare.py taiwan UCI_Credit_Card.csv taiwan.csv.gz
    python examples/prepare.py fraud creditcard.csv creditcard.npz
    python examples/prepare.py prices all_stocks_5yr.csv prices.npz
    python examples/prepare.py banking77 train.csv test.csv banking77.csv.gz

Where the sources are: Omniglot, github.com/brendenlake/omniglot (python/). LendingClub, its public
loan file of 2007 to 2011. Taiwan, UCI's "default of credit card clients". Fraud, the ULB set of
European card transactions. Prices, the S&P 500's daily prices of five years (date, open, high, low,
close, volume, Name). Banking77, github.com/PolyAI-LDN/task-specific-datasets (banking_data/).
Read their terms first. Nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd


def omniglot(background: Path, evaluation: Path, out: Path) -> None:
    """`images_nearest_bits` uint8 [characters, 20, 98], and where each character is from."""
    from PIL import Image

    drawings: dict[tuple[bool, str, str], list[np.ndarray]] = {}
    for is_evaluation, path in ((False, background), (True, evaluation)):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
                alphabet, character = name.split("/")[-3:-1]
                image = Image.open(io.BytesIO(archive.read(name))).convert("1")
                small = np.asarray(image.resize((28, 28), Image.Resampling.NEAREST))
                key = (is_evaluation, alphabet, character)
                drawings.setdefault(key, []).append(~small)
    counts = {len(found) for found in drawings.values()}
    if len(counts) != 1:
        raise ValueError(f"expected equally many drawings of each character, got {counts}")
    bits = [[np.packbits(d.ravel()) for d in found] for found in drawings.values()]
    evaluated, alphabets, characters = zip(*drawings, strict=True)
    np.savez_compressed(
        out,
        images_nearest_bits=np.array(bits),
        alphabet=np.array(alphabets),
        character=np.array(characters),
        is_evaluation=np.array(evaluated),
    )


def lending_club(source: Path, out: Path) -> None:
    """One row a loan, as `credit_data.py` reads it: months as 2011-12, rates as fractions."""
    raw = pd.read_csv(source, low_memory=False, skiprows=_lines_before(source, "loan_amnt"))
    loans = raw[raw["loan_status"].isin(_OUTCOMES)].copy()
    loans["default"] = loans["loan_status"].map(_OUTCOMES)
    for name in ("issue_d", "earliest_cr_line", "last_pymnt_d"):
        if name in loans:
            loans[name] = pd.to_datetime(loans[name], format="%b-%Y").dt.strftime("%Y-%m")
    for name in ("int_rate", "revol_util"):
        text = loans[name].astype(str).str.rstrip("% ")
        loans[name] = pd.to_numeric(text, errors="coerce") / 100
    loans["term"] = loans["term"].astype(str).str.extract(r"(\d+)")[0].astype(int)
    loans.sort_values("issue_d", kind="stable").to_csv(out, index=False)


_POLICY = "Does not meet the credit policy. Status:"
_OUTCOMES = {
    f"{prefix}{status}": outcome
    for prefix in ("", _POLICY)
    for status, outcome in (("Fully Paid", 0), ("Charged Off", 1), ("Default", 1))
}


def _lines_before(source: Path, name: str) -> int:
    """Lines of notes before the one with the columns' names."""
    with open(source, encoding="utf-8", errors="replace") as file:
        for number, line in zip(range(10), file, strict=False):
            if re.search(rf'(^|,)"?{name}"?(,|$)', line.rstrip()):
                return number
    raise ValueError(f"{source}: no column {name}")


def taiwan(source: Path, out: Path) -> None:
    """The same columns; the outcome is called `default`."""
    table = pd.read_csv(source)
    named = table.rename(columns=lambda n: "default" if n.startswith("default") else n)
    if "default" not in named:
        raise ValueError(f"{source}: no column default.payment.next.month")
    named.to_csv(out, index=False)


def fraud(source: Path, out: Path) -> None:
    """`X` float32 [rows, columns], `y` uint8 [rows] and the names of the columns."""
    table = pd.read_csv(source)
    x = table.drop(columns="Class")
    y = table["Class"].astype(np.uint8).to_numpy()
    np.savez_compressed(out, X=x.to_numpy(np.float32), y=y, columns=np.array(list(x.columns)))


def prices(source: Path, out: Path) -> None:
    """`open`, `high`, `low`, `close` float32 and `volume` uint32 [tickers, days]; their names."""
    table = pd.read_csv(source)
    wide = table.pivot(index="Name", columns="date")
    arrays = {n: wide[n].to_numpy(np.float32) for n in ("open", "high", "low", "close")}
    volume = wide["volume"].fillna(0).to_numpy(np.uint32)
    tickers, dates = np.array(list(wide.index)), np.array(list(wide["close"].columns))
    np.savez_compressed(out, **arrays, volume=volume, tickers=tickers, dates=dates)


def banking77(train: Path, test: Path, out: Path) -> None:
    """Columns split, category and text."""
    parts = [
        pd.read_csv(path).assign(split=name) for path, name in ((train, "train"), (test, "test"))
    ]
    pd.concat(parts)[["split", "category", "text"]].to_csv(out, index=False)


JOBS: dict[str, tuple[Callable[..., None], int]] = {
    "omniglot": (omniglot, 3),
    "lending-club": (lending_club, 2),
    "taiwan": (taiwan, 2),
    "fraud": (fraud, 2),
    "prices": (prices, 2),
    "banking77": (banking77, 3),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make one file; 1 where the source is not what it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=JOBS)
    parser.add_argument("files", nargs="+", type=Path, help="the sources, and last what to make")
    options = parser.parse_args(argv)
    make, count = JOBS[options.data]
    if len(options.files) != count:
        parser.error(f"{options.data}: expected {count} files, got {len(options.files)}")
    try:
        make(*options.files)
    except (OSError, KeyError, ValueError) as error:
        print(f"{options.data}: {error}", file=sys.stderr)
        return 1
    print(f"{options.files[-1]}: {options.files[-1].stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
