"""pymeta as the last step of a scikit-learn pipeline, on a table of your own.

    python examples/sklearn_pipeline.py loans.csv --group state --target default

Numbers are imputed and scaled, strings are one-hot encoded. The last third of each group's rows is
what both are judged by: the shared start, and the model of the row's group.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pandas as pd
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from pymeta.sklearn import MetaClassifier


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """The areas under the ROC curve of the shared start and of the groups' models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", help="a CSV file")
    parser.add_argument("--group", required=True, help="the column that says whose a row is")
    parser.add_argument("--target", required=True, help="the column to predict: two classes")
    parser.add_argument("--iterations", type=int, default=500, help="of meta-training")
    options = parser.parse_args(argv)
    table = pd.read_csv(options.table)
    by_group = table.groupby(options.group)[options.target]
    place = by_group.cumcount() / by_group.transform("size")
    past, later = table[place < 2 / 3], table[place >= 2 / 3]
    columns = table.columns.drop([options.group, options.target])
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    features = make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        remainder=OneHotEncoder(handle_unknown="ignore", sparse_output=False),
        sparse_threshold=0,
    )
    model = MetaClassifier(iterations=options.iterations, adapt_on_fit=True, random_state=0)
    pipe = make_pipeline(features, model)
    pipe.fit(past[columns], past[options.target], metaclassifier__groups=past[options.group])
    X, y, groups = later[columns], later[options.target], later[options.group]
    start = roc_auc_score(y, pipe.predict_proba(X)[:, 1])
    adapted = roc_auc_score(y, pipe.predict_proba(X, groups=groups)[:, 1])
    print(f"AUC on {len(later):,} later rows: {start:.3f} by the shared start, {adapted:.3f} by")
    print(f"the models of {groups.nunique()} groups")
    return start, adapted


if __name__ == "__main__":
    main()
