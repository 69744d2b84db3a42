"""scikit-learn estimators for many groups at once: `MetaClassifier` and `MetaRegressor`.

A *group* is a segment with its own few rows: a customer, a merchant, a region, a machine. `fit`
learns one shared start (a small fully connected network) from the groups it is given, `adapt`
fine-tunes that start to each group, known or new, and `predict` uses each group's own model for
the group's rows and the shared start for all other rows. Whatever is done to many groups is done
in one native call.

    model = MetaClassifier(method="maml").fit(X, y, groups=g)     # the shared start
    model.adapt(X_new, y_new, groups=g_new)                       # a model for each group
    model.predict_proba(X_later, groups=g_later)

Preprocessing is scikit-learn's own. `groups` reaches the estimator through the Pipeline:

    pipe = make_pipeline(SimpleImputer(), StandardScaler(), MetaClassifier())
    pipe.fit(X, y, metaclassifier__groups=g)
    pipe[-1].adapt(pipe[:-1].transform(X_new), y_new, groups=g_new)
    pipe.predict_proba(X_later, groups=g_later)

Inputs should be standardised: the networks start as PyTorch's layers do, and the step sizes are
meant for inputs of unit size. torch is imported by `fit` and `adapt`, pandas never.
"""

from pymeta.spec.optional import need

need("sklearn", "pymeta.sklearn", "sklearn")

from pymeta.sklearn.classifier import MetaClassifier
from pymeta.sklearn.methods import METHODS
from pymeta.sklearn.regressor import MetaRegressor
from pymeta.sklearn.scoring import AdaptScorer, adapt_score

__all__ = ["METHODS", "AdaptScorer", "MetaClassifier", "MetaRegressor", "adapt_score"]
