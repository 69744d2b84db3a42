"""LendingClub's public loan file: which columns a lender knows when it decides, and a stand-in.

The file is a CSV (gzip or not) with one row for each loan: the columns of `NUMBERS`, `CHOICES` and
`DATES`, the groups `addr_state` (two letters) and `zip_code` (three digits and "xx"), and
`default` (0 or 1). Columns that are known only later (`loan_status`, `total_pymnt`,
`total_rec_*`, `recoveries`, `last_pymnt_d` and so on) may be there; they are never read.

`load` gives a table with the month of issue (`issued`), the groups, `default` and the features;
`generate` makes a file of the same form with invented loans, for tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

NUMBERS = [
    *("loan_amnt", "term", "int_rate", "installment", "annual_inc", "dti", "fico_range_low"),
    *("delinq_2yrs", "inq_last_6mths", "mths_since_last_delinq", "mths_since_last_record"),
    *("open_acc", "pub_rec", "pub_rec_bankruptcies", "revol_bal", "revol_util", "total_acc"),
]
CHOICES = ["grade", "purpose", "home_ownership", "verification_status"]
DATES = ["issue_d", "earliest_cr_line"]
OTHERS = ["emp_length", "addr_state", "zip_code", "default"]

LONG_TAILS = ["annual_inc", "revol_bal"]  # taken as logarithms
NUMERIC = [*NUMBERS, "employment_years", "credit_months"]
FEATURES = [*NUMERIC, *CHOICES]
GROUPS = {"state": "addr_state", "zip3": "zip_code"}


def months(dates: pd.Series) -> pd.Series:
    """Months since the year 0 of dates such as "2010-07"; NaN where there is none."""
    parts = dates.str.split("-", n=2, expand=True).astype(float)
    return 12 * parts[0] + parts[1] - 1


def load(path: str | Path) -> pd.DataFrame:
    """The loans in order of their month of issue: `issued`, groups, `default` and `FEATURES`.

    Raises:
        ValueError: a column is missing.
    """
    wanted = [*NUMBERS, *CHOICES, *DATES, *OTHERS]
    there = pd.read_csv(path, nrows=0).columns
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    raw = pd.read_csv(path, usecols=wanted)
    loans = raw[NUMBERS].astype(float)
    loans[LONG_TAILS] = np.log1p(loans[LONG_TAILS])
    # "< 1 year", "1 year" .. "10+ years"
    years = raw["emp_length"].str.extract(r"(\d+)")[0].astype(float)
    loans["employment_years"] = years.where(~raw["emp_length"].str.startswith("<", na=False), 0.0)
    loans["credit_months"] = months(raw["issue_d"]) - months(raw["earliest_cr_line"])
    for name in [*CHOICES, *GROUPS.values()]:
        loans[name] = raw[name].astype(str)
    loans["default"] = raw["default"].astype(int)
    loans["issued"] = raw["issue_d"].str[:7]
    return loans.sort_values("issued", kind="stable", ignore_index=True)


def generate(path: str | Path, loans: int, states: int = 12, seed: int = 0) -> None:
    """Write a file of invented loans, 2009-01 to 2011-12, three zip codes in each state.

    Interest and FICO score speak of the risk everywhere; what the income says differs from state
    to state. The columns known only later are there, and give the outcome away.
    """
    rng = np.random.default_rng(seed)

    def counts(mean: float) -> np.ndarray:
        return rng.poisson(mean, loans).astype(float)

    def some(values: np.ndarray, share: float) -> np.ndarray:
        return np.where(rng.random(loans) < share, values, np.nan)

    month = np.sort(rng.integers(36, size=loans))
    state = rng.integers(states, size=loans)
    risk, income = rng.normal(size=(2, loans))
    slope = rng.normal(0, 1.5, states)
    chance = 1 / (1 + np.exp(1.4 - risk - slope[state] * income))
    default = (rng.random(loans) < chance).astype(int)
    amount = rng.integers(4, 140, loans) * 250.0
    term = rng.choice([36, 60], loans)
    opened = 12 * 1995 + rng.integers(0, 120, loans)
    grades = np.clip(np.round(risk + 2), 0, 6).astype(int)
    letters = [f"{chr(65 + s // 26)}{chr(65 + s % 26)}" for s in range(states)]
    table = pd.DataFrame(
        {
            "issue_d": [f"{2009 + m // 12}-{m % 12 + 1:02d}" for m in month],
            "addr_state": np.array(letters)[state],
            "zip_code": [f"{z:03d}xx" for z in 3 * state + rng.integers(3, size=loans)],
            "purpose": rng.choice(["car", "debt_consolidation", "other"], loans),
            "grade": np.array(list("ABCDEFG"))[grades],
            "loan_amnt": amount,
            "term": term,
            "int_rate": 0.12 + 0.03 * risk + rng.normal(0, 0.01, loans),
            "installment": amount / term,
            "emp_length": rng.choice(["< 1 year", "1 year", "7 years", "10+ years"], loans),
            "home_ownership": rng.choice(["RENT", "OWN", "MORTGAGE"], loans),
            "annual_inc": np.exp(11 + 0.5 * income).round(),
            "verification_status": rng.choice(["Verified", "Not Verified"], loans),
            "dti": rng.uniform(0, 30, loans),
            "fico_range_low": 700 - 25 * risk + rng.normal(0, 10, loans),
            "earliest_cr_line": [f"{m // 12}-{m % 12 + 1:02d}" for m in opened],
            "delinq_2yrs": counts(0.2),
            "inq_last_6mths": counts(1.0),
            "mths_since_last_delinq": some(counts(35), 0.4),
            "mths_since_last_record": some(counts(60), 0.1),
            "open_acc": counts(9),
            "pub_rec": counts(0.1),
            "pub_rec_bankruptcies": some(counts(0.1), 0.97),
            "revol_bal": rng.exponential(14_000, loans).round(),
            "revol_util": rng.uniform(0, 1, loans),
            "total_acc": counts(22),
            "loan_status": np.where(default == 1, "Charged Off", "Fully Paid"),
            "total_pymnt": amount * (1 - 0.6 * default),
            "recoveries": 100.0 * default,
            "default": default,
        }
    )
    table.loc[rng.random(loans) < 0.03, "emp_length"] = None
    table.to_csv(path, index=False)
