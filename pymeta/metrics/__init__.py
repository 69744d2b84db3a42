"""Metrics of predictions for many entities, with intervals, and an honest comparison of models."""

from pymeta.metrics.base import Metric
from pymeta.metrics.bootstrap import Bootstrap, Interval, Resampled, time_blocks
from pymeta.metrics.compare import Split, compare, split
from pymeta.metrics.finance import (
    Cross,
    drawdown,
    information_coefficient,
    psi,
    r2_out_of_sample,
    sharpe,
    turnover,
)
from pymeta.metrics.models import FromEstimator, FromLearner, Model
from pymeta.metrics.repeats import mean_report
from pymeta.metrics.report import Line, Pair, Part, Report
from pymeta.metrics.scores import (
    METRICS,
    accuracy,
    auc,
    average_precision,
    brier,
    calibration_error,
    gini,
    ic,
    ks,
    log_loss,
    mae,
    mse,
    precision_at,
    qlike,
    r2,
    rmse,
)
from pymeta.metrics.tables import Score, evaluate

__all__ = [
    "METRICS",
    "Bootstrap",
    "Cross",
    "FromEstimator",
    "FromLearner",
    "Interval",
    "Line",
    "Metric",
    "Model",
    "Pair",
    "Part",
    "Report",
    "Resampled",
    "Score",
    "Split",
    "accuracy",
    "auc",
    "average_precision",
    "brier",
    "calibration_error",
    "compare",
    "drawdown",
    "evaluate",
    "gini",
    "ic",
    "information_coefficient",
    "ks",
    "log_loss",
    "mae",
    "mean_report",
    "mse",
    "precision_at",
    "psi",
    "qlike",
    "r2",
    "r2_out_of_sample",
    "rmse",
    "sharpe",
    "split",
    "time_blocks",
    "turnover",
]
