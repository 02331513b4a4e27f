"""`gristmill explain`: every document that ever came in has an end and a reason, and the scores shown are those stored."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from small_chain import PROSE, REPEATED, mill
from small_world import publish

from assets_defs import trace_tables
from assets_defs.explanations import as_json, explain_document, show
from assets_defs.resources import Mill
from assets_defs.tracing import trace_document
from pipelines.engine import Engine
from pipelines.errors import GristmillError, UnknownName
from pipelines.explanation import Explanation
from pipelines.store import Store

ROOT = Path(__file__).parents[1]
MONTH = "@2026-01"
LINES = (
    {"id": "prose", "text": PROSE.format(1, "oak")},
    {"id": "twin", "text": PROSE.format(1, "oak")},
    {"id": "other", "text": PROSE[::-1]},
    {"id": "[odd] id", "text": REPEATED, "title": "[/red] watches"},
    {"id": "rude", "text": "You asshole, leave. " + PROSE.format(2, "linen")[:150]},
    {"id": "controls", "text": "\x01\x02\n"},
    {"id": "blank", "text": "  "},
    "{broken",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which recipe tiny has decided over `LINES`."""
    directory = tmp_path_factory.mktemp("explain")
    chain = mill(Store(directory / "home"), directory, LINES)
    kept = pq.read_table(chain.deduplicated.file("decisions.parquet"), filters=[("kept", "=", True), ("split", "=", "train")])["id"]
    rank = {"rank": 0, "gain": 1.5, "tokens": 9, "selected": True, "representative_passage": 0, "similarity": 1.0}
    rows = [{"id": n, "passage": 0, "domain": "wiki", "role": "general", **rank, "representative_id": n} for n in kept.to_pylist()]
    publish(Store(directory / "home"), "selected_subset", {"general.parquet": rows}, partition="tiny")
    return directory / "home"


def explained(home: Path, name: str, recipe: str = "tiny") -> Explanation:
    return explain_document(Mill(home, Engine(kind="serial")), name, recipe)


@pytest.mark.parametrize(
    ("name", "verdict", "stage", "reason"),
    [
        ("wiki-[odd] id", "dropped", "quality_filtered_corpus", "gopher_repetition.duplicate_line_fraction: 0.9"),
        ("wiki-rude", "dropped", "toxicity_filtered_corpus", "toxic_words.listed_word_fraction: "),
        ("wiki-twin", "dropped", "deduplicated_corpus", "exact_duplicate: 1, threshold 1"),
        ("wiki-controls", "dropped", "cleaned_corpus", "fewer than 1 characters"),
        ("a.jsonl:7", "quarantined", "raw_corpus", "empty text"),
        ("a.jsonl:8", "quarantined", "raw_corpus", "not JSON: "),
    ],
)
def test_it_says_where_a_document_ended_and_why(home: Path, name: str, verdict: str, stage: str, reason: str) -> None:
    end = explained(home, name).end
    assert (end.verdict, end.stage) == (verdict, stage)
    assert end.reason.startswith(reason)


def test_a_kept_document_is_followed_to_its_passages(home: Path) -> None:
    found = explained(home, f"wiki-prose{MONTH}")
    assert found.end.verdict in ("selected", "held out")
    by_stage = {stage.stage: stage for stage in found.stages}
    assert list(by_stage)[:2] == ["raw_corpus", "cleaned_corpus"] and list(by_stage)[-1] == "selected_subset"
    assert by_stage["deduplicated_corpus"].facts["documents_in_cluster"] == 2
    assert by_stage["deduplicated_corpus"].facts["kept_of_cluster"] == f"wiki-prose{MONTH}"


def test_every_score_stands_beside_its_threshold(home: Path) -> None:
    found = explained(home, "wiki-[odd]")
    shown = {score.rule: score for stage in found.stages for score in stage.scores}
    store = Store(home)
    for stage in ("quality", "toxicity"):
        rows = pq.read_table(store.current(f"{stage}_scores", "wiki|2026-01-01").file("scores.parquet"), filters=[("id", "=", found.id)])
        thresholds = store.current(f"{stage}_filtered_corpus", "tiny").settings["thresholds"]["wiki"]  # type: ignore[index, call-overload]
        for rule in rows.column_names[4:]:
            value, bound = rows[rule][0].as_py(), thresholds.get(rule)
            assert shown[rule].score == (value if value == value else None)
            assert (shown[rule].keep, shown[rule].threshold) == ((bound["keep"], bound["value"]) if bound else (None, None))
    assert shown["markup.digit_fraction"].verdict == "off"
    assert shown["gopher_repetition.duplicate_line_fraction"].verdict == "fails"
    assert shown["encoding.mojibake_fraction"].verdict == "passes"
    fails = {rule for rule, score in shown.items() if score.verdict == "fails"}
    (row,) = pq.read_table(
        store.current("quality_filtered_corpus", "tiny").file("decisions.parquet"), filters=[("id", "=", found.id)]
    ).to_pylist()
    assert fails == {reason["rule"] for reason in row["reasons"]}


def test_what_was_dropped_early_has_scores_but_was_not_reached(home: Path) -> None:
    later = {stage.stage: stage for stage in explained(home, "wiki-[odd]").stages}
    assert later["toxicity_filtered_corpus"].verdict == later["deduplicated_corpus"].verdict == "not reached"
    assert later["toxicity_filtered_corpus"].scores


def test_a_recipe_that_has_not_decided_says_so(home: Path) -> None:
    found = explained(home, "wiki-prose", recipe="code-critical")
    assert found.end.stage == "cleaned_corpus"
    assert {stage.verdict for stage in found.stages[2:]} == {"not decided"}


def test_a_name_that_stands_for_none_or_several_is_refused_with_the_nearest(home: Path, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"unknown document 'wiki-pross@2026-01'.*did you mean 'wiki-prose@2026-01'"):
        explained(home, f"wiki-pross{MONTH}")
    with pytest.raises(GristmillError, match=r"'wiki-' is the start of several documents: .* and more"):
        explained(home, "wiki-")
    with pytest.raises(GristmillError, match="did you mean 'tiny'"):
        explained(home, "wiki-prose", recipe="tinny")
    with pytest.raises(GristmillError, match="nothing was ingested"):
        explained(tmp_path, "x")
    assert issubclass(UnknownName, GristmillError)


def test_text_and_json_say_the_same(home: Path) -> None:
    for name in ("wiki-[odd]", "wiki-prose", "a.jsonl:8"):
        found = explained(home, name)
        console = Console(width=140, record=True, file=io.StringIO())
        show(found, console)
        text, data = console.export_text(), json.loads(as_json(found))
        assert data["id"] == found.id and data["id"] in text
        assert f"{data['verdict']} at {data['ended_at']}" in text
        assert [stage["stage"] for stage in data["stages"]] == [stage.stage for stage in found.stages]
        assert all(score["rule"] in text for stage in data["stages"] for score in stage["scores"])
    assert "[/red] watches" in text or name == "a.jsonl:8"


@pytest.mark.parametrize(("name", "row"), [("wiki-[odd]", 3), ("wiki-prose", 0), ("a.jsonl:8", 1)])
def test_a_trace_explains_the_same_and_says_where_it_came_from(home: Path, name: str, row: int) -> None:
    """Without a checkpoint there are no steps to tell; what came in is told all the same, also of what was quarantined."""
    mill = Mill(home, Engine(kind="serial"))
    traced, found = trace_document(mill, name, "tiny"), explained(home, name)
    assert (traced["id"], traced["partition"], traced["origin"]["row"]) == (found.id, found.partition, row)
    assert list(traced["origin"]["source_files"]) == ["a.jsonl"] and traced["origin"]["read_by"] == "jsonl"
    (decision,) = traced["decisions"]
    assert (decision["verdict"], decision["ended_at"], decision["reason"]) == (found.end.verdict, found.end.stage, found.end.reason)
    assert traced["checkpoints"] == []
    console = Console(width=140, record=True, file=io.StringIO())
    trace_tables.show(traced, console)
    text = console.export_text()
    assert (
        found.id in text
        and all(stage.stage in text for stage in found.stages)
        and "no recipe that was asked about has a checkpoint" in text
    )


@pytest.mark.parametrize(("arguments", "code"), [(("a.jsonl:8", "--json"), 0), (("nothing-like-it",), 1), ((), 2)])
def test_exit_codes(home: Path, arguments: tuple[str, ...], code: int) -> None:
    command = [sys.executable, "-m", "assets_defs.cli", "explain", *arguments, "--recipe", "tiny"]
    environment = {**os.environ, "GRISTMILL_HOME": str(home), "DAGSTER_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert code or json.loads(done.stdout)["verdict"] == "quarantined"
