"""The knob of `benchmarks.threshold_sweep`: 1 is the recipe, more fails more, and never more documents fail than asked."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import copies, taken
from benchmarks.threshold_sweep import moved, shares
from pipelines.sweeping import Bound

SCORES = st.lists(st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0, float("nan")]), st.floats(0, 1)), min_size=1, max_size=40)


@given(SCORES, st.sampled_from(["at_least", "at_most"]), st.floats(0, 1), st.integers(0, 45))
def test_moved_bounds_fail_as_many_as_asked(values: list[float], keep: str, value: float, asked: int) -> None:
    scores, bound = np.array(values), Bound(keep, value)
    own = bound.fails(scores)
    same = moved(scores, bound, int(own.sum()))
    assert (same.fails(scores) == own).all()
    fails = moved(scores, bound, asked).fails(scores)
    assert fails.sum() <= asked
    assert (fails <= moved(scores, bound, asked + 1).fails(scores)).all()
    assert moved(scores, bound, len(values)).fails(scores).sum() == np.isfinite(scores).sum()


def test_shares_are_sums_over_cells() -> None:
    cells = {
        ("log", "web"): np.array([3, 4]),
        ("log", "code"): np.array([0, 1]),
        ("", "web"): np.array([1, 10]),
        ("", "code"): np.array([1, 5]),
    }
    found = shares(cells)
    assert found["recall"] == {"log": 3 / 5, "all": 3 / 5}
    assert found["loss"] == {"web": 0.1, "code": 0.2, "all": 2 / 15}


def test_inputs_have_the_size_asked_and_no_two_equal_documents() -> None:
    texts = list(taken(copies(["one two three four five six", "a b c d e f g"], list("uvwxyz")), 300))
    assert 300 <= sum(map(len, texts)) < 340
    assert len(set(texts)) > 0.9 * len(texts)
