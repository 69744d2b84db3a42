"""Bodies of requests and answers as JSON, for pydantic and for OpenAPI."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

Value = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Values = list[Value]
Matrix = list[Values]
Targets = Annotated[Values | Matrix, Field(union_mode="left_to_right")]

_XS = Field(description="support rows [rows, in]")
_CLASSES = "targets of the support rows: classes [rows] for cross_entropy"
_VALUES = ", otherwise values [rows, out], or [rows] where out is 1"
_YS = Field(description=_CLASSES + _VALUES)
_WEIGHTS = Field(default=None, description="weights >= 0 of the rows' losses [rows]")
_XQ = Field(description="rows to predict [rows, in]")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(_Body):
    """One task: labelled rows to adapt to, and rows to predict."""

    xs: Matrix = _XS
    ys: Targets = Field(
        description=_CLASSES + ", or probabilities of the classes [rows, out]" + _VALUES
    )
    weights: Targets | None = Field(
        default=None,
        description="weights >= 0 of the rows' losses [rows], or of single targets [rows, out]",
    )
    offset: Targets | None = Field(
        default=None,
        description="added to the outputs on xs before the loss, a pooled model's say: "
        "[rows, out], or [rows] where out is 1",
    )
    xq: Matrix = _XQ
    query_offset: Targets | None = Field(
        default=None, description="likewise for xq, and part of the predictions"
    )


class AdaptPredict(_Body):
    """Tasks, each with its own number of rows."""

    tasks: list[Task]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"tasks": [{"xs": [[0.1, 1.2], [0.4, -0.3]], "ys": [1, 0], "xq": [[0.2, 0.8]]}]}
            ]
        }
    )


class Window(_Body):
    """Which of an entity's rows it is adapted to."""

    rows: int | None = Field(default=None, ge=1, le=10**9, strict=True, description="the newest")
    days: float | None = Field(
        default=None, gt=0, le=10**6, description="at most so long before the newest row"
    )


class Rows(_Body):
    """Labelled rows of an entity."""

    xs: Matrix = Field(description="rows [rows, in]")
    ys: Targets = _YS
    weights: Values | None = _WEIGHTS
    at: list[AwareDatetime] | None = Field(
        default=None, description="when each row was observed, with a time zone; now if left out"
    )
    window: Window | None = Field(default=None, description="replaces the entity's window")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"xs": [[0.1, 1.2]], "ys": [1], "at": ["2026-05-04T09:30:00Z"]},
            ]
        }
    )


class Queries(_Body):
    """Rows to predict."""

    xq: Matrix = _XQ

    model_config = ConfigDict(json_schema_extra={"examples": [{"xq": [[0.2, 0.8]]}]})


class Reason(BaseModel):
    """A feature that moved a prediction."""

    feature: int = Field(description="of the names, each counted once, from 0")
    name: str
    code: str = Field(description="R and the name's number, counted from 1; + raises, - lowers")
    attribution: float | None


class Explanation(BaseModel):
    """Why a row's prediction is what it is."""

    output: int = Field(description="the output that is explained")
    baseline: float | None = Field(description="that output at the mean of the support rows")
    attributions: list[float | None] = Field(
        description="of each feature; they add up to the output less that at the baseline"
    )
    reasons: list[Reason] = Field(description="the features that moved it most")


class Predictions(BaseModel):
    """Predictions of each task's rows; null where a number is not finite."""

    model: str = Field(description="the version of the model that answered")
    predictions: list[list[list[float | None]]] = Field(description="raw outputs [rows, out]")
    status: list[int] = Field(description="1 where a task's prediction is not finite, else 0")
    probabilities: list[list[list[float | None]]] | None = None
    method: str | None = Field(default=None, description="how the explanations were made")
    explanations: list[list[Explanation]] | None = None


class EntityPredictions(Predictions):
    """Predictions of one entity: lists of one task."""

    cached: bool = Field(description="whether the adapted weights were kept from before")
    revision: int = Field(description="of the entity's rows")
    rows: int = Field(description="how many rows it was adapted to")


class Appended(BaseModel):
    """What an append did."""

    appended: int
    revision: int
    replayed: bool = Field(description="whether this idempotency key had been answered before")


class EntityState(BaseModel):
    """What is stored of an entity."""

    id: str
    rows: int
    revision: int
    window: Window
    oldest: datetime | None
    newest: datetime | None


class Imported(BaseModel):
    """What an import did."""

    entities: int
    rows: int


class ModelVersion(BaseModel):
    """A version in the models' folder."""

    version: str
    created: datetime
    source: str
    sha256: str
    serving: bool
    report: dict[str, Any] | None = None


class Models(BaseModel):
    """All versions, newest first, and what the serving one asks for."""

    serving: str
    in_features: int
    out_features: int
    loss: str
    dtype: str
    versions: list[ModelVersion]


class Switched(BaseModel):
    """Which version serves now, and which did."""

    serving: str
    before: str


class ProblemBody(BaseModel):
    """RFC 9457, with the field that is wrong."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    request_id: str | None = None


ADAPT_PREDICT = TypeAdapter(AdaptPredict)
ROWS = TypeAdapter(Rows)
QUERIES = TypeAdapter(Queries)
