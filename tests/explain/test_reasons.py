"""Reason codes and figures."""

import numpy as np
import pytest

from pymeta.data import Panel, Ragged
from pymeta.explain import Attributions, plot_attributions, plot_influence, reason_codes


def of(values):
    values = np.asarray(values, float)
    return Attributions(values, np.zeros(values.shape[:2], int), values.sum(-1))


def test_features_of_one_column_are_added_up_and_ordered_by_size():
    found = reason_codes(of([[[0.5, -0.2, 0.1, -0.4]]]), ["a", "b", "c", "b"], most=3)
    assert found.names == ("a", "b", "c")
    assert found.columns.tolist() == [[[1, 0, 2]]]
    assert np.allclose(found.amounts, [[[-0.6, 0.5, 0.1]]], atol=1e-12, rtol=0)
    assert [name for name, _ in found.of(0, 0)] == ["b", "a", "c"]
    assert found.texts(0, 0)[0] == "b: -0.6"


def test_a_sign_keeps_one_direction_and_nothing_is_no_reason():
    values = of([[[0.5, -0.2, 0.0, np.nan], [0.0, 0.0, 0.0, 0.0]]])
    up, down = (reason_codes(values, sign=sign, most=9) for sign in ("up", "down"))
    assert up.of(0, 0) == [("x0", 0.5)] and down.of(0, 0) == [("x1", -0.2)]
    assert up.of(0, 1) == [] and reason_codes(values).of(0, 1) == []
    assert up.columns.shape == (1, 2, 9) and up.columns[0, 1].tolist() == [-1] * 9


def test_ragged_rows_keep_their_form():
    values = Ragged(np.arange(12.0).reshape(4, 3), [1, 3])
    found = reason_codes(Attributions(values, None, None), most=2)
    assert [c.shape for c in found.columns] == [(1, 2), (3, 2)]
    assert found.of(1, 2) == [("x2", 11.0), ("x1", 10.0)]


def test_a_preprocessors_features_go_back_to_their_columns():
    pytest.importorskip("sklearn")
    data = {
        "shop": ["a", "a", "b", "b"],
        "x": [1.0, None, 3.0, 2.0],
        "y": [1.0, 2.0, 3.0, 4.0],
        "kind": ["u", "v", "u", "w"],
        "bought": [0.0, 1.0, 0.0, 1.0],
    }
    panel = Panel(data, entity="shop", target="bought")
    prep = panel.preprocessor(min_rows=1, encode_entity=True).fit(panel)
    assert len(prep.sources) == len(prep.features) == prep(panel).x.shape[1]
    assert dict(zip(prep.features, prep.sources, strict=True)) == {
        "x": "x", "x missing": "x", "y": "y", "kind=u": "kind", "kind=v": "kind",
        "kind=w": "kind", "mean shop": "shop",
    }  # fmt: skip
    values = np.arange(1.0, 8.0)[None, None]  # in the features' order
    by_feature = dict(zip(prep.features, values[0, 0], strict=True))
    found = reason_codes(of(values), prep, most=5)
    assert found.names == ("x", "y", "kind", "shop")
    assert dict(found.of(0, 0)) == {
        "x": by_feature["x"] + by_feature["x missing"],
        "y": by_feature["y"],
        "kind": sum(by_feature[f"kind={k}"] for k in "uvw"),
        "shop": by_feature["mean shop"],
    }


def test_rare_categories_have_a_source_too():
    pytest.importorskip("sklearn")
    data = {"shop": list("aaaabbbb"), "kind": list("uuuvwuuu")}
    panel = Panel(data, entity="shop")
    prep = panel.preprocessor(min_rows=3).fit(panel)
    assert prep.sources == ("kind",) * len(prep.features) and len(prep.features) == 2


def test_wrong_arguments_are_refused_by_name():
    good = of([[[0.5, -0.2]]])
    for kind, message, options in [
        (ValueError, "most", {"most": 0}),
        (ValueError, "sign", {"sign": "left"}),
        (ValueError, "names: expected 2", {"names": ["a"]}),
        (TypeError, "names", {"names": "ab"}),
        (TypeError, "names", {"names": 3}),
    ]:
        with pytest.raises(kind, match=message):
            reason_codes(good, **options)
    with pytest.raises(TypeError, match="attributions"):
        reason_codes(np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match="one axis of features"):
        reason_codes(of(np.zeros((1, 1, 2, 2))))


def test_figures_show_the_strongest_on_top():
    pytest.importorskip("matplotlib")
    found = of([[[0.5, -0.2, 0.1, -0.4]]])
    figure = plot_attributions(found, 0, 0, ["a", "b", "c", "b"], most=2)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "a"]
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [-0.6, 0.5]
    assert axes.yaxis_inverted() and "output 0: 0" in axes.get_title()
    axes = plot_influence([0.1, -0.5, 0.3], labels="abc", most=2).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "c"]
    assert [bar.get_width() for bar in axes.patches] == [-0.5, 0.3]
    with pytest.raises(ValueError, match="one prediction"):
        plot_influence(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="labels"):
        plot_influence([0.1], labels="ab")
