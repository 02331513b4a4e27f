"""Age splits: every kept document stands in one period, undated or outside; periods have equal shares and part no date."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.age_splits import AGE_SPLIT_AUDITS, UNDATED, AgeSplitSettings, _equal_periods, period_file, split_by_age
from pipelines.errors import GristmillError
from pipelines.manifests import Json, Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.store import Build, Store

NAN = float("nan")
YEARS = st.one_of(st.just(NAN), st.floats(1900, 2030), st.sampled_from([1999.5, 2000.5, 2001.5]))


class Ages(Settings):
    """The documents of a domain by year; None stands for no date."""

    domain: str
    years: tuple[float | None, ...]
    labels: bool = True

    def keys(self) -> list[dict[str, Json]]:
        """Return what names each document."""
        return [{"id": f"{self.domain}-{n}", "domain": self.domain, "snapshot": "2026-01-01"} for n in range(len(self.years))]


def write_scores(settings: Ages, out: Path) -> Outcome:
    """Write scores of the filter `age`."""
    rows = []
    for number, (keys, year) in enumerate(zip(settings.keys(), settings.years, strict=True)):
        labels = {"age.origin": "none" if year is None else "metadata", "age.precision": None if year is None else "day"}
        rows.append(
            {**keys, "characters": 10 + number, "age.not_before": NAN if year is None else year, **(labels if settings.labels else {})}
        )
    pq.write_table(pa.Table.from_pylist(rows), out / "scores.parquet")
    return Outcome()


class Decided(Settings):
    """The documents of all domains."""

    domains: tuple[Ages, ...]


def write_decisions(settings: Decided, out: Path) -> Outcome:
    """Write decisions that drop the last document of each domain and hold out every third."""
    rows = [
        {**keys, "kept": number < len(domain.years) - 1, "split": "held_out" if number % 3 == 0 else "train"}
        for domain in settings.domains
        for number, keys in enumerate(domain.keys())
    ]
    pq.write_table(pa.Table.from_pylist(rows), out / "decisions.parquet")
    return Outcome(counts={"kept": sum(row["kept"] is True for row in rows)})


def inputs(store: Store, years: dict[str, Sequence[float]], *, labels: bool = True) -> dict[str, Manifest | tuple[Manifest, ...]]:
    """Publish scores of one document per year, and decisions."""
    ages = [
        Ages(domain=domain, years=tuple(None if np.isnan(year) else year for year in values), labels=labels)
        for domain, values in years.items()
    ]
    scores = [Build(asset="quality_scores", partition=f"{age.domain}|2026-01-01", step=write_scores, settings=age) for age in ages]
    decided = Build(asset="deduplicated_corpus", partition="tiny", step=write_decisions, settings=Decided(domains=tuple(ages)))
    return {"decisions": store.build(decided).manifest, "scores": tuple(store.build(request).manifest for request in scores)}


def split(store: Store, years: dict[str, Sequence[float]], **values: object) -> Manifest:
    request = Build(
        asset="age_splits",
        partition="tiny",
        step=split_by_age,
        settings=AgeSplitSettings.model_validate(values),
        inputs=inputs(store, years),
        audits=AGE_SPLIT_AUDITS,
    )
    return store.build(request).manifest


def ids(manifest: Manifest, period: str) -> list[str]:
    return pq.read_table(manifest.file(period_file(period)))["id"].to_pylist()


def test_windows_by_hand(store: Store) -> None:
    years = {"wiki": [1999.9, 2000.0, 2001.5, NAN, 2005.0, 1.0], "code": [2000.2, 2003.0, 0.0]}
    result = split(store, years, windows=[[1999, 2000], [2000, 2004]])
    assert ids(result, "1") == ["wiki-0"]
    assert ids(result, "2") == ["code-0", "code-1", "wiki-1", "wiki-2"]
    assert ids(result, UNDATED) == ["wiki-3"]
    assert ids(result, "outside") == ["wiki-4"]
    assert dict(result.counts) == {"documents_in": 7, "in_periods": 5, "periods": 2, "undated": 1, "outside": 1}
    table = {(row["period"], row["domain"]): row for row in result.outcome.tables["by_period"]}
    assert list(table) == [("1", "wiki"), ("2", "code"), ("2", "wiki"), ("undated", "wiki"), ("outside", "wiki")]
    second = table["2", "wiki"]
    assert (second["documents"], second["characters"], second["train"], second["held_out"]) == (2, 11 + 12, 2, 0)
    assert (second["from"], second["to"], second["first_year"], second["last_year"]) == (2000, 2004, 2000.0, 2001.5)
    assert table["undated", "wiki"]["first_year"] is None
    record = json.loads(result.file("periods.json").read_text())["periods"]
    assert record == [{"period": 1, "from": 1999.0, "to": 2000.0}, {"period": 2, "from": 2000.0, "to": 2004.0}]
    check = next(check for check in result.checks if check.name == "periods_have_both_splits")
    assert not check.passed and check.description == "period 1 has no train document"
    for plot in result.outcome.plots:
        assert result.file(plot).stat().st_size < 40_000


@given(st.lists(st.floats(1900, 2030) | st.sampled_from([1999.5, 2000.5]), min_size=1, max_size=60), st.integers(1, 8))
def test_periods_are_equal_as_far_as_dates_allow(years: list[float], periods: int) -> None:
    windows = _equal_periods(np.array(years), periods)
    assert 1 <= len(windows) <= periods
    assert all(before[1] == after[0] for before, after in pairwise(windows))
    assert windows[0][0] == min(years) and windows[-1][1] > max(years)
    sizes = [sum(low <= year < high for year in years) for low, high in windows]
    assert sum(sizes) == len(years) and min(sizes) > 0
    if len(set(years)) == len(years):
        assert len(windows) == min(periods, len(years))
        assert max(sizes) - min(sizes) <= 2


@settings(max_examples=15, deadline=None)
@given(wiki=st.lists(YEARS, min_size=2, max_size=20), code=st.lists(YEARS, min_size=2, max_size=20), periods=st.integers(1, 6))
def test_documents_are_conserved(tmp_path_factory: pytest.TempPathFactory, wiki: list[float], code: list[float], periods: int) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    result = split(store, {"wiki": wiki, "code": code}, periods=periods)
    names = [str(number) for number in range(1, result.counts["periods"] + 1)]
    found = [name for period in (*names, UNDATED, "outside") for name in ids(result, period)]
    assert sorted(found) == sorted(f"{domain}-{n}" for domain, years in (("wiki", wiki), ("code", code)) for n in range(len(years) - 1))
    assert not ids(result, "outside")


def test_nothing_dated_is_one_file_of_undated_documents(store: Store) -> None:
    result = split(store, {"wiki": [NAN, NAN, NAN]})
    assert dict(result.counts) == {"documents_in": 2, "in_periods": 0, "periods": 0, "undated": 2, "outside": 0}
    assert ids(result, UNDATED) == ["wiki-0", "wiki-1"]


def test_the_order_of_partitions_does_not_matter(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    years = {"wiki": [1999.5, 2001.5, NAN, 0.0], "code": [2000.5, 2003.5, 0.0]}
    one = split(store, years)
    two = split(Store(tmp_path_factory.mktemp("other")), dict(reversed(years.items())))
    assert one.content_sha256 == two.content_sha256


def test_ages_that_were_not_scored_are_named(store: Store) -> None:
    unlabelled = inputs(store, {"wiki": [1.0, 2.0]}, labels=False)
    with pytest.raises(GristmillError, match=r"quality_scores\[wiki\|2026-01-01\] has no scores of the filter 'age'; add `age: \{\}`"):
        store.build(Build(asset="age_splits", step=split_by_age, settings=AgeSplitSettings(), inputs=unlabelled))


@pytest.mark.parametrize("windows", [[[2001, 2000]], [[2000, 2002], [2001, 2003]], [[2002, 2003], [2000, 2001]], [[2000, 2000]]])
def test_windows_in_disorder_are_refused(windows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="not in time order, or overlap"):
        AgeSplitSettings(windows=windows)
