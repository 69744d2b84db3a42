"""Problems for the estimators."""

from __future__ import annotations

import pytest
from sklearn_help import PLAIN, opposites

from pymeta.sklearn import MetaClassifier


@pytest.fixture(scope="module")
def fitted():
    """A classifier meta-trained on `opposites`, not adapted."""
    X, y, g = opposites()
    return MetaClassifier(iterations=200, random_state=0, **PLAIN).fit(X, y, groups=g)
