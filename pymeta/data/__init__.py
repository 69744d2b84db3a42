"""From a table to tasks: rows with an entity and a time become meta-batches in native form.

    panel = Panel(loans, entity="state", time="issue_d", target="default")
    past, future = panel.split_time("2011-01-01")
    train, test = past.split_entities(0.25, seed=0)
    prep = train.preprocessor().fit(train)
    for batch in prep(train).episodes(tasks=32, support=(10, 60), query=40, batches=500, seed=0):
        maml(*batch).loss.backward()

Needs the extra `data` for tables of pandas, Arrow and files, and to fit a preprocessor; what is
deployed (a loaded preprocessor, a `Panel` of a dict of arrays) needs numpy alone.
"""

from pymeta.data.augment import Bootstrap, Jitter, MixUp
from pymeta.data.batch import Batch, Tasks
from pymeta.data.episodes import Episodes
from pymeta.data.panel import Panel
from pymeta.data.preprocess import Preprocessor
from pymeta.data.windows import Windows
from pymeta.tasks.ragged import Ragged

__all__ = [
    "Batch",
    "Bootstrap",
    "Episodes",
    "Jitter",
    "MixUp",
    "Panel",
    "Preprocessor",
    "Ragged",
    "Tasks",
    "Windows",
]
