"""The cost model: what a pack holds, and a fit that finds the numbers again."""

from __future__ import annotations

import numpy as np
import pytest

from ppcompile.runtime.batch import pack
from ppcompile.runtime.groups import Group
from ppcompile.runtime.packing.cost import CostModel, work_of
from ppcompile.runtime.packing.pool import Work


def test_work_of_a_pack():
    batch = pack([Group([1, 2], [[3], [4, 5]])], pad_to_multiple_of=16)
    assert work_of(batch) == Work(5, 1 + 2 + 3 + 3 + 4)


WORKS = [Work(1000 * t, 1000 * t * depth) for t in (1, 2, 5, 16) for depth in (100, 700, 3000)]


def test_a_fit_finds_the_numbers_again():
    true = CostModel(0.02, 3e-6, 2e-9)
    fitted = CostModel.fit((work, true.predict(work)) for work in WORKS)
    assert fitted.per_pack == pytest.approx(true.per_pack)
    assert fitted.per_token == pytest.approx(true.per_token)
    assert fitted.per_pair == pytest.approx(true.per_pair)


def test_a_fit_of_noisy_seconds_predicts_them():
    rng = np.random.default_rng(0)
    true = CostModel(0.01, 3e-6, 2e-9)
    measured = [(work, true.predict(work) * rng.uniform(0.95, 1.05)) for work in WORKS * 4]
    fitted = CostModel.fit(measured)
    for work, seconds in measured:
        assert fitted.predict(work) == pytest.approx(seconds, rel=0.12)


def test_a_part_that_would_be_negative_is_zero_and_the_others_fit_without_it():
    fitted = CostModel.fit((work, 1e-6 * work.tokens - 1e-12 * work.pairs) for work in WORKS)
    assert fitted.per_pair == 0
    assert fitted.per_token == pytest.approx(1e-6, rel=0.01)


def test_packs_may_be_measured_as_they_are():
    batches = [pack([Group([1] * p, [[2] * r] * 2)]) for p, r in ((5, 5), (50, 5), (5, 80), (200, 3))]
    true = CostModel(0.5, 0.1, 0.01)
    fitted = CostModel.fit([(batch, true.predict(batch)) for batch in batches])
    assert fitted.per_pair == pytest.approx(0.01)


def test_longer_sequences_cost_more_at_the_same_tokens():
    short = pack([Group([1] * 10, [[2] * 10])] * 10)
    long = pack([Group([1] * 100, [[2] * 100])])
    assert short.num_tokens == long.num_tokens
    assert CostModel().predict(long) > CostModel().predict(short)
    assert CostModel.for_hidden_size(64).per_pair > CostModel.for_hidden_size(4096).per_pair


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([(Work(1, 1), 1.0)] * 2, "at least three measurements, got 2"),
        ([(Work(1, 1), 1.0)] * 5, "cannot tell the parts apart"),
        ([(Work(t, 10 * t), 1.0 * t) for t in (1, 2, 3, 4)], "cannot tell the parts apart"),
        ([(work, 0.0) for work in WORKS], "positive, finite seconds"),
        ([(work, float("nan")) for work in WORKS], "positive, finite seconds"),
    ],
)
def test_what_cannot_be_fitted_is_refused(measured, message):
    with pytest.raises(ValueError, match=message):
        CostModel.fit(measured)


def test_costs_are_not_negative():
    with pytest.raises(ValueError, match="finite and not negative"):
        CostModel(per_token=-1.0)
