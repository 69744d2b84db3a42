"""Credit by segment, on made loans."""

from __future__ import annotations

import finance_help
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("lightgbm")

from pymeta.commands import finance as command
from pymeta.finance import Deployed, credit, loans_panel
from pymeta.finance.blend import Blend
from pymeta.finance.loans import KNOWN, schema_of

COLUMNS = {"segment": "region", "target": "bad", "time": "issued"}


def test_credit_runs_and_is_deployed(tmp_path):
    table = finance_help.loans()
    found = credit(table, columns=COLUMNS, base="linear", quick=True, share=0.3)
    verdicts = found.report.verdicts
    assert verdicts["adapted, unadapted", "log loss"] == "win"
    again = next(p for p in found.report.pairs if p.theirs == "linear, fitted again")
    assert again.metric == "log loss" and again.values[0] < again.values[1]
    names = [line.name for line in found.report.lines]
    assert "linear, fitted again, unadapted" not in names  # it adapts nothing
    assert found.settings["form"] != "pooled" and found.settings["segment"] == "region"
    found.save(tmp_path)
    model = Deployed.load(tmp_path)
    late = table["issued"] >= np.datetime64("2021-06-01")
    history = {k: v[~late] for k, v in table.items()}
    query = {k: v[late] for k, v in table.items() if k != "bad"}
    p = model.predict(history, query)
    y = table["bad"][late]
    assert p[y == 1].mean() > p[y == 0].mean() + 0.05


def test_segments_without_times_and_all_of_them(capsys, tmp_path):
    table = finance_help.loans(regions=12)
    del table["issued"]
    np.savez(tmp_path / "unused.npz")
    import pandas as pd

    pd.DataFrame(table).to_csv(tmp_path / "loans.csv", index=False)
    words = ["credit", "--data", str(tmp_path / "loans.csv"), "--column", "segment=region"]
    words += ["--column", "target=bad", "--base", "linear", "--quick", "--quiet"]
    assert command.finance(words) == 0
    assert "Who wins" in capsys.readouterr().out


def test_a_refitted_pooled_model_knows_the_history():
    from pymeta.finance import Remainder

    panel = loans_panel(finance_help.loans(), COLUMNS)
    past, future = panel.split_time("2021-06-01")
    train, test = past.of(past.entities[:4]), past.of(past.entities[4:])
    query = future.of(future.entities[4:])
    options = {"forms": ("pooled",), "steps": 1}
    alone = Remainder(**options).fit(train).predict(test, query)
    again = Remainder(refit=True, **options).fit(train)
    known = again.predict(test, query)
    whole = Remainder(**options).fit(past).predict(test, query)
    np.testing.assert_array_equal(again.predict(None, query), alone)
    assert np.abs(known - whole).mean() < 0.5 * np.abs(alone - whole).mean()


def test_a_refitted_model_of_numbers_is_that_of_all_rows():
    from pymeta.finance import Remainder, volatility_panel

    panel = volatility_panel(finance_help.prices(stocks=10, days=300))
    past, future = panel.split_time(panel.times.max() - np.timedelta64(20, "D"))
    train, test = past.of(past.entities[:5]), past.of(past.entities[5:])
    query = future.of(future.entities[5:])
    options = {"forms": ("pooled",), "steps": 1, "link": "log", "prep": {"clip": None}}
    alone = Remainder(**options).fit(train).predict(test, query)
    known = Remainder(refit=True, **options).fit(train).predict(test, query)
    whole = Remainder(**options).fit(past).predict(test, query)
    assert np.abs(known / whole - 1).max() < 0.02 < np.abs(alone / whole - 1).max()


def test_a_schema_is_known_by_its_columns():
    schema = KNOWN[0]
    names = {*schema.segment, schema.target, schema.time, *schema.numeric, *schema.categorical}
    table = {name: np.zeros(4) for name in names | {"earliest_cr_line"}}
    assert schema_of(table) is schema
    table["issue_d"] = np.array(["2010-03"] * 4)
    table["earliest_cr_line"] = np.array(["2000-03", None, "2005-03", "2010-03"], dtype=object)
    table["default"] = np.array([0, 1, 0, 1])
    table["annual_inc"] = np.array([0.0, np.e - 1, 10, 10])
    table["addr_state"] = np.array(["A", "B", "B", "A"])
    panel = loans_panel(table)
    assert panel.entity == "addr_state" and "credit age" in panel.numeric
    age = dict(zip(panel.rows.tolist(), panel["credit age"], strict=True))
    assert age[0] == pytest.approx(121.7, abs=0.2) and np.isnan(age[1]) and age[3] == 0
    assert panel["annual_inc"][panel.rows == 1] == pytest.approx(1.0)
    assert "total_pymnt" not in panel.features


def test_columns_that_are_not_there_are_named():
    table = finance_help.loans()
    with pytest.raises(ValueError, match="columns: expected segment and target"):
        loans_panel(table)
    with pytest.raises(ValueError, match="columns: no column is called 'state'"):
        loans_panel(table, {**COLUMNS, "segment": "state"})
    with pytest.raises(ValueError, match="columns: expected segment, target and time, got"):
        loans_panel(table, {**COLUMNS, "x": "y"})
    two = loans_panel(table, {**COLUMNS, "segment": "region,kind"}, numeric="income,amount")
    assert two.features == ("income", "amount") and "R00|a" in two.entities


def test_a_blend_is_the_better_or_between():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 3))
    for signal, weight in ((2 * x[:, 0], (0.0, 0.25)), (6 * (x[:, 0] * x[:, 1] > 0), (0.75, 1.0))):
        y = (rng.random(1500) < 1 / (1 + np.exp(signal.mean() - signal))).astype(int)
        model = Blend().fit(x, y)
        assert model.weight_ in weight
        fixed = Blend(model.weight_).fit(x, y)
        np.testing.assert_allclose(fixed.decision_function(x), model.decision_function(x))
