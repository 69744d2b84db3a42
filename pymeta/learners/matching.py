"""`MatchingNet`: a query row gets the labels of the support rows that are like it.

Vinyals et al. 2016, "Matching networks for one shot learning" (arXiv:1606.04080):

    p(k) = sum over support rows i of class k of a_i,    a = softmax_i cos(f, g_i) / t

with f and g a network's features of query and support. With full context embeddings (section 2.1)
g_i has seen all of the support set, by a bidirectional LSTM in the rows' order, and f reads it by
attention in `reads` steps:

    g_i = g'_i + forward_i + backward_i
    h_k, c_k = LSTM([f', r_(k-1)], h_(k-1), c_(k-1)),  h_k += f'
    r_k = sum_i softmax_i(h_k g_i) g_i

A row of weight w counts as w rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymeta.learners.base import State
from pymeta.learners.classes import ClassLearner, class_sums
from pymeta.learners.protonet import check_temperature
from pymeta.learners.rows import Flat, grouped
from pymeta.spec.show import counted


class MatchingNet(ClassLearner):
    """Matching networks; `out.predictions` are logarithms of probabilities.

    Args:
        encoder: maps rows [N, ...] to features [N, d].
        ways: how many classes there are; None for one more than the largest label of a call.
        temperature: what cosines are divided by (the paper has 1).
        learn_temperature: whether it is learned.
        context: d, the number of features, for full context embeddings; None for none.
        reads: steps of the query's reading LSTM.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ways: int | None = None,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        context: int | None = None,
        reads: int = 5,
    ) -> None:
        """Check the arguments and make the LSTMs."""
        super().__init__(encoder, ways)
        for name, value in (("context", 1 if context is None else context), ("reads", reads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        log = torch.tensor(math.log(check_temperature(temperature)))
        self.log_temperature = nn.Parameter(log, bool(learn_temperature))
        self.context, self.reads = context, reads
        if context is not None:
            self.writer = nn.LSTM(context, context, batch_first=True, bidirectional=True)
            self.reader = nn.LSTMCell(2 * context, context)

    def _fit(self, features: Tensor, support: Flat) -> State:
        classes = self._classes(support)
        rows = grouped(support.task, support.tasks)  # without gaps where rows do not count
        g = rows.padded(features)
        if self.context is not None:
            g = self._in_context(g, rows)
        assert support.y is not None
        labels = nn.functional.one_hot(support.y, classes).to(features.dtype)
        w = support.row_weights(features)
        _, weights = class_sums(features, support, classes)
        return {
            "support": g,
            "labels": rows.padded(labels * w.unsqueeze(-1)),  # [T, S, C], zeros where none is
            "present": weights > 0,
        }

    def _in_context(self, g: Tensor, rows: Flat) -> Tensor:
        """Support features [T, S, d] that have seen one another."""
        if g.shape[-1] != self.context:
            raise ValueError(
                f"encoder: expected {counted(self.context, 'feature')}, got {g.shape[-1]}"
            )
        if rows.tasks == 0:
            return g
        sizes = torch.bincount(rows.task, minlength=rows.tasks).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(g, sizes, batch_first=True, enforce_sorted=False)
        found, _ = self.writer(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(found, batch_first=True, total_length=g.shape[1])
        forward, backward = out.chunk(2, dim=-1)
        seen: Tensor = g + forward + backward
        return seen

    def _predict(self, state: State, features: Tensor, task: Tensor) -> tuple[Tensor, None]:
        g, labels, present = state["support"], state["labels"], state["present"]
        rows = grouped(task, len(g))
        f = rows.padded(features)
        counted = labels.sum(-1)  # [T, S]
        if self.context is not None:
            f = self._read(f, g, counted)
        unit_f, unit_g = (nn.functional.normalize(v, dim=-1) for v in (f, g))
        alike = unit_f @ unit_g.mT * (-self.log_temperature).exp()  # [T, R, S]
        largest = alike.amax(-1, keepdim=True).detach() if alike.shape[-1] else alike.new_zeros(())
        shares = (alike - largest).exp() @ labels  # [T, R, C]
        kept = present.unsqueeze(1)
        logs = torch.where(kept, shares, 1.0).log() - shares.sum(-1, keepdim=True).log()
        return rows.own(logs.masked_fill(~kept, -math.inf)), None

    def _read(self, f: Tensor, g: Tensor, counted: Tensor) -> Tensor:
        """Query features [T, R, d] after reading the support [T, S, d] of these weights [T, S]."""
        flat = f.reshape(-1, f.shape[-1])
        h, c, read = torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat)
        there = counted > 0
        extra = torch.where(there, counted, 1.0).log().masked_fill(~there, -math.inf).unsqueeze(1)
        for _ in range(self.reads):
            h, c = self.reader(torch.cat([flat, read], dim=-1), (h, c))
            h = h + flat
            attention = (h.view(f.shape) @ g.mT + extra).softmax(-1)
            read = (attention @ g).reshape(flat.shape)
        return h.view(f.shape)
