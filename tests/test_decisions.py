"""Decisions over made-up scores: by brute force, conserved, and the same bytes whatever the order or the number of threads."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.decisions import ALL_DOMAINS, LANGUAGE, PASSED, TOPICS, FilterSettings, Rows, Threshold, decide
from pipelines.intervals import wilson

RULES = ("a.low", "a.high", "b.share")
KEEP = {"a.low": "at_least", "a.high": "at_most", "b.share": "at_most"}
Row = dict[str, object]


def write(path: Path, rows: Sequence[Row], columns: Sequence[str] = RULES) -> Path:
    """Write `rows` as collected scores."""
    kinds = [("id", pa.string()), ("domain", pa.string()), ("snapshot", pa.string()), ("characters", pa.int64())]
    kinds += [(name, pa.string() if name in (LANGUAGE, TOPICS) else pa.float64()) for name in columns]
    pq.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(kinds)), path)
    return path


def run(
    chosen: FilterSettings, out: Path, files: Sequence[Path], previous: Path | None = None, threads: int = 2
) -> tuple[list[Row], dict[str, Rows]]:
    with duckdb.connect(config={"threads": threads}) as connection:
        tables = decide(connection, chosen, out, files, previous)
    return pq.read_table(out).to_pylist(), tables


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fails(row: Mapping[str, object], thresholds: Mapping[str, Threshold]) -> list[str]:
    """Return the rules that `row` fails, in the order of the columns."""
    found = []
    for rule in (rule for rule in RULES if rule in thresholds):
        value, bound = float(str(row[rule])), thresholds[rule]
        if not math.isnan(value) and (value < bound.value if bound.keep == "at_least" else value > bound.value):
            found.append(rule)
    return found


SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 7.0, math.nan])
DOMAINS = ("wiki", "it's", "code")


@st.composite
def corpora(draw: st.DrawFn) -> list[list[Row]]:
    """Return the scores of up to three partitions."""
    partitions = draw(st.lists(st.tuples(st.sampled_from(DOMAINS), st.sampled_from(["2026-01-01", "2026-02-01"])), min_size=1, unique=True))
    found = []
    for domain, snapshot in partitions[:3]:
        scores = draw(st.lists(st.tuples(SCORES, SCORES, SCORES), max_size=6))
        languages = draw(st.lists(st.sampled_from(["en", "de", None]), min_size=6, max_size=6))
        found.append(
            [
                {"id": f"d{n}", "domain": domain, "snapshot": snapshot, "characters": 10 + n, LANGUAGE: languages[n]}
                | dict(zip(RULES, values, strict=True))
                for n, values in enumerate(scores)
            ]
        )
    return found


@st.composite
def thresholds(draw: st.DrawFn) -> dict[str, dict[str, Threshold]]:
    rules = st.dictionaries(st.sampled_from(RULES), st.sampled_from([0.0, 0.25, 0.6]))
    chosen = draw(st.dictionaries(st.sampled_from(DOMAINS), rules))
    return {domain: {rule: Threshold(keep=KEEP[rule], value=v) for rule, v in values.items()} for domain, values in chosen.items()}


MODES = st.sampled_from(["keep", "off", "inverse"])


@settings(max_examples=40, deadline=None)
@given(corpora(), thresholds(), MODES)
def test_decisions_by_brute_force(partitions: list[list[Row]], given_thresholds: dict[str, dict[str, Threshold]], mode: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = [write(Path(directory) / f"{n}.parquet", rows, (*RULES, LANGUAGE)) for n, rows in enumerate(partitions)]
        decided, tables = run(FilterSettings(mode=mode, thresholds=given_thresholds), Path(directory) / "out.parquet", files)
    rows = sorted((row for rows in partitions for row in rows), key=lambda row: (row["domain"], row["snapshot"], row["id"]))
    failing = [fails(row, given_thresholds.get(str(row["domain"]), {})) if mode != "off" else [] for row in rows]
    judged = [mode == "inverse" and bool(given_thresholds.get(str(row["domain"]))) for row in rows]
    kept = [bool(found) if inverted else not found for found, inverted in zip(failing, judged, strict=True)]
    keys = ("domain", "snapshot", "id")
    assert [tuple(row[key] for key in keys) for row in decided] == [tuple(row[key] for key in keys) for row in rows]
    assert [row["kept"] for row in decided] == kept
    assert [row["lang"] for row in decided] == [row[LANGUAGE] for row in rows]
    wanted = [found if found or stays else [PASSED] for found, stays in zip(failing, kept, strict=True)]
    assert [[reason["rule"] for reason in row["reasons"]] for row in decided] == wanted
    assert [row["rule"] for row in decided] == [None if stays else found[0] for found, stays in zip(wanted, kept, strict=True)]
    add_up(tables, rows, kept, failing)


def add_up(tables: dict[str, Rows], rows: Sequence[Row], kept: Sequence[bool], failing: Sequence[list[str]]) -> None:
    """Assert that every table counts the same documents."""
    for name in ("by_domain", "by_language"):
        assert sum(row["documents_in"] for row in tables[name]) == len(rows)
        assert sum(row["kept"] for row in tables[name]) == sum(kept)
        assert sum(row["dropped"] for row in tables[name]) == len(rows) - sum(kept)
    assert sum(row["characters"] for row in tables["by_domain"]) == sum(int(str(row["characters"])) for row in rows)
    assert sum(row["dropped"] for row in tables["by_rule"]) == len(rows) - sum(kept)
    for cost in (cost for cost in tables["by_rule"] if cost["rule"] != PASSED):
        here = [(row, found) for row, found in zip(rows, failing, strict=True) if row["domain"] == cost["domain"] and cost["rule"] in found]
        alone = [row for row, found in here if found == [cost["rule"]]]
        assert (cost["failed"], cost["alone"]) == (len(here), len(alone))
        assert cost["characters"] == sum(int(str(row["characters"])) for row, _ in here)
        assert cost["alone_characters"] == sum(int(str(row["characters"])) for row in alone)


@settings(max_examples=25, deadline=None)
@given(corpora(), thresholds(), MODES, st.randoms(use_true_random=False))
def test_neither_the_order_of_files_nor_of_rows_matters(
    partitions: list[list[Row]], chosen: dict[str, dict[str, Threshold]], mode: str, random: object
) -> None:
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(2):
            files = [write(Path(directory) / f"{n}.parquet", rows, (*RULES, LANGUAGE)) for n, rows in enumerate(partitions)]
            out = Path(directory) / f"out{number}.parquet"
            found.append((run(FilterSettings(mode=mode, thresholds=chosen), out, files)[1], digest(out)))
            for rows in partitions:
                random.shuffle(rows)  # type: ignore[attr-defined]
            random.shuffle(partitions)  # type: ignore[attr-defined]
            chosen = {domain: dict(reversed(rules.items())) for domain, rules in reversed(chosen.items())}
    assert found[0] == found[1]


@settings(max_examples=25, deadline=None)
@given(corpora(), thresholds(), st.sampled_from(["keep", "inverse"]))
def test_filtering_again_drops_nothing(partitions: list[list[Row]], chosen: dict[str, dict[str, Threshold]], mode: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = [write(Path(directory) / f"{n}.parquet", rows, (*RULES, LANGUAGE)) for n, rows in enumerate(partitions)]
        settings = FilterSettings(mode=mode, thresholds=chosen)
        once, _ = run(settings, Path(directory) / "once.parquet", files)
        twice, _ = run(settings, Path(directory) / "twice.parquet", files, Path(directory) / "once.parquet")
    assert twice == [row for row in once if row["kept"]]


@settings(max_examples=25, deadline=None)
@given(corpora(), thresholds())
def test_keep_and_inverse_part_the_documents_that_are_judged(partitions: list[list[Row]], chosen: dict[str, dict[str, Threshold]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = [write(Path(directory) / f"{n}.parquet", rows) for n, rows in enumerate(partitions)]
        kept = [
            [row["kept"] for row in run(FilterSettings(mode=mode, thresholds=chosen), Path(directory) / "out.parquet", files)[0]]
            for mode in ("keep", "inverse")
        ]
        domains = [row["domain"] for row in pq.read_table(Path(directory) / "out.parquet").to_pylist()]
    for domain, one, other in zip(domains, *kept, strict=True):
        assert one != other if chosen.get(str(domain)) else one and other


def test_the_number_of_threads_does_not_show(tmp_path: Path) -> None:
    random, rows = np.random.default_rng(0), 300_000
    columns = {rule: np.where(random.random(rows) < 0.1, np.nan, random.random(rows)) for rule in RULES}
    languages, topics = random.choice(["en", "de", "fr"], rows), random.choice(["", "identity", "identity,religion"], rows)
    table = {"id": [f"d{n}" for n in random.permutation(rows)], "domain": random.choice(DOMAINS, rows), "snapshot": ["2026-01-01"] * rows}
    table |= {"characters": random.integers(1, 99, rows), **columns, LANGUAGE: languages, TOPICS: topics}
    pq.write_table(pa.table(table), tmp_path / "s")
    rules = {rule: Threshold(keep=KEEP[rule], value=0.3) for rule in RULES}
    settings = FilterSettings(thresholds=dict.fromkeys(DOMAINS, rules))
    found = []
    for threads in (1, 4):
        with duckdb.connect(config={"threads": threads, "memory_limit": "200MB", "temp_directory": str(tmp_path / "spill")}) as connection:
            found.append((decide(connection, settings, tmp_path / "out", [tmp_path / "s"]), digest(tmp_path / "out")))
    assert found[0] == found[1]


def test_a_language_is_carried_over_from_the_decisions_before(tmp_path: Path) -> None:
    row = {"id": "x", "domain": "wiki", "snapshot": "s", "characters": 1} | dict.fromkeys(RULES, 0.0)
    first = write(tmp_path / "first", [{**row, LANGUAGE: "de"}, {**row, "id": "y", LANGUAGE: None}], (*RULES, LANGUAGE))
    second = write(tmp_path / "second", [row, {**row, "id": "y"}])
    run(FilterSettings(), tmp_path / "one", [first])
    decided, tables = run(FilterSettings(), tmp_path / "two", [second], tmp_path / "one")
    assert [row["lang"] for row in decided] == ["de", None]
    assert [(row["lang"], row["documents_in"]) for row in tables["by_language"]] == [("de", 1), (None, 1)]


def test_flags_by_topic_by_hand(tmp_path: Path) -> None:
    def row(name: int, domain: str, topics: str, score: float) -> Row:
        return {"id": str(name), "domain": domain, "snapshot": "s", "characters": 1, TOPICS: topics, "a.high": score}

    rows = [row(n, "wiki", "identity,religion" if n < 2 else "", float(n in (0, 5))) for n in range(8)]
    rows += [row(n, "book", "religion" if n < 3 else "", float(n == 3)) for n in range(4)]
    rows += [row(n, "code", "religion", 1.0) for n in range(4)]
    limit = {"a.high": Threshold(keep="at_most", value=0.5)}
    settings = FilterSettings(thresholds={"wiki": limit, "book": limit, "code": {}})
    _, tables = run(settings, tmp_path / "out", [write(tmp_path / "s", rows, ("a.high", TOPICS))])
    found = {(row["domain"], row["topic"]): row for row in tables["by_topic"]}
    assert set(found) == {(d, t) for d in ("wiki", ALL_DOMAINS) for t in ("identity", "religion")} | {("book", "religion")}
    wiki, every = found[("wiki", "identity")], found[(ALL_DOMAINS, "religion")]
    assert (wiki["documents"], wiki["flagged"], wiki["share_flagged"], wiki["base"], wiki["ratio"]) == (2, 1, 0.5, 0.25, 2.0)
    assert (every["documents"], every["flagged"], every["base"], every["ratio"]) == (5, 1, 0.25, 0.8)  # (2 + 3) of a quarter each
    assert wiki["share_flagged_low"] == pytest.approx(wilson(1, 2)[0], abs=1e-6)


def test_wilson_against_published_values() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)  # Newcombe 1998, Statistics in Medicine 17:857, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
