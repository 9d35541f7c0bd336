"""How long a pack takes: linear in its tokens, and in its attention pairs.

Every layer does the same work for each token, and one multiplication of query and key for each pair of a token and
one that it sees. So packs with as many tokens differ only where their sequences differ in length, and

    seconds = per_pack + per_token * tokens + per_pair * pairs

predicts a step well enough to give every rank its share. :meth:`CostModel.fit` takes the three from measurements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..batch import PackedBatch
from .pool import Work

__all__ = ["CostModel", "work_of"]


def work_of(batch: PackedBatch) -> Work:
    """Tokens and attention pairs of a pack, padding aside."""
    return Work(batch.num_tokens, int((batch.position_ids[0, : batch.num_tokens] + 1).sum()))


@dataclass(frozen=True)
class CostModel:
    """Predicts how long a pack takes.

    The defaults are in tokens: one pair costs what arithmetic says for a hidden size of 2048 (a layer does
    ``24 * hidden ** 2`` operations a token and ``4 * hidden`` a pair). They are good for comparing packs; fitted
    numbers also predict seconds.

    Attributes:
        per_pack: cost of a pack besides its tokens.
        per_token: cost of a token.
        per_pair: cost of a token and one that it sees.
    """

    per_pack: float = 0.0
    per_token: float = 1.0
    per_pair: float = 1 / (6 * 2048)

    def __post_init__(self) -> None:
        if not all(np.isfinite(part) and part >= 0 for part in (self.per_pack, self.per_token, self.per_pair)):
            raise ValueError(f"the parts of a cost must be finite and not negative, got {self}")

    @classmethod
    def for_hidden_size(cls, hidden_size: int) -> CostModel:
        """In tokens, by counting operations of a decoder layer with this hidden size."""
        return cls(per_pair=1 / (6 * hidden_size))

    @classmethod
    def fit(cls, measured: Iterable[tuple[PackedBatch | Work, float]]) -> CostModel:
        """The non-negative least-squares fit to packs and the seconds that they took.

        Errors count relative to what was measured, so that short packs matter as much as long ones.

        Args:
            measured: packs (or their :class:`Work`) and seconds; at least three that differ in tokens and pairs.

        Raises:
            ValueError: fewer than three, seconds that are not positive, or packs too alike to tell the parts apart.
        """
        pairs = list(measured)
        if len(pairs) < 3:
            raise ValueError(f"fit() needs at least three measurements, got {len(pairs)}")
        works = [work_of(what) if isinstance(what, PackedBatch) else what for what, _ in pairs]
        seconds = np.array([taken for _, taken in pairs], dtype=np.float64)
        if not (np.isfinite(seconds).all() and (seconds > 0).all()):
            raise ValueError(f"fit() needs positive, finite seconds, got {seconds.tolist()}")
        features = np.array([(1, *work) for work in works], dtype=np.float64)
        scale = features.max(axis=0)
        rows = features / scale / seconds[:, None]
        if np.linalg.matrix_rank(rows) < 3:
            raise ValueError(
                "fit() cannot tell the parts apart: the packs have the same tokens and pairs, or both in one "
                "proportion. Try: measure packs of different budgets, of short and of long sequences"
            )
        return cls(*(_non_negative_least_squares(rows, np.ones(len(rows))) / scale).tolist())

    def predict(self, work: Work | PackedBatch) -> float:
        """Cost of a pack: seconds for a fitted model, tokens for the default one."""
        tokens, pairs = work_of(work) if isinstance(work, PackedBatch) else work
        return self.per_pack + self.per_token * tokens + self.per_pair * pairs


def _non_negative_least_squares(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The exact solution for a few columns: the best of all subsets of them whose own solution is not negative."""
    columns = rows.shape[1]
    best, least = np.zeros(columns), np.inf
    for size in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), size):
            part, *_ = np.linalg.lstsq(rows[:, chosen], target, rcond=None)
            error = float(((rows[:, chosen] @ part - target) ** 2).sum())
            if (part >= 0).all() and error < least:
                best, least = np.zeros(columns), error
                best[list(chosen)] = part
    return best
