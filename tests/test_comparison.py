"""Comparison of two recipes: coverage of the intervals, Holm's correction by hand, the gate, the refusals, and promotion through MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from pipelines.comparison import COMPARISON_AUDITS, ComparisonSettings, compare_recipes
from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Json, Manifest, Outcome
from pipelines.paired_bootstrap import PairedLosses, holm, paired_change
from pipelines.plugins import Settings
from pipelines.store import Build, Store
from pipelines.tracking import RunTags, Tracker

ROLES = {"wiki": "general", "book": "general", "code": "target"}
SPREAD = 0.03
"""Nats per token by which the change differs from document to document."""


# Intervals


def losses(seed: int, *, documents: int, change: float, strata: int = 3, spread: float = SPREAD) -> PairedLosses:
    """Return documents of lognormal length whose loss per token changes by `change` on average."""
    random = np.random.Generator(np.random.Philox(key=[seed, 1]))
    tokens = np.maximum(20.0, random.lognormal(6.0, 0.8, documents)).round()
    before = random.normal(4.0, 0.5, documents)
    after = before + random.normal(change, spread, documents)
    return PairedLosses(tokens, 3 * tokens, before * tokens, after * tokens, np.arange(documents) % strata)


@pytest.mark.parametrize("documents", [25, 80])
def test_intervals_cover_the_true_change_in_95_of_100_worlds(documents: int) -> None:
    """1,500 worlds: the share that is covered has a standard error of 0.6 points."""
    covered = agree = 0
    for seed in range(1500):
        found = paired_change(losses(seed, documents=documents, change=-0.02), draws=1000, seed=seed)
        covered += found.loss.low <= -0.02 <= found.loss.high
        agree += (found.p_value < 0.05) == (found.loss.high < 0 or found.loss.low > 0)
    assert 0.93 <= covered / 1500 <= 0.97
    assert agree == 1500  # the p-value says what the interval says


def test_p_values_are_uniform_where_nothing_differs() -> None:
    found = [paired_change(losses(seed, documents=60, change=0.0), draws=400, seed=seed).p_value for seed in range(800)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.asarray(found) < level) == pytest.approx(level, abs=3.5 * np.sqrt(level * (1 - level) / 800))


def test_a_change_by_hand() -> None:
    """Nats 25 -> 20 and 75 -> 60 over 10 and 30 tokens: 2.5 to 2.0 a token. The draws give both, or either twice: -0.5 each time."""
    pair = PairedLosses(*(np.asarray(values, dtype=float) for values in ([10, 30], [40, 80], [25, 75], [20, 60])), np.zeros(2, dtype=int))
    found = paired_change(pair, draws=200, seed=0)
    assert (found.loss_before, found.loss_after, found.loss.change) == (2.5, 2.0, -0.5)
    assert (found.loss.low, found.loss.high) == (-0.5, -0.5)
    assert found.bits.change == pytest.approx(-20 / np.log(2) / 120)


def test_a_document_alone_in_its_stratum_says_nothing_of_chance() -> None:
    found = paired_change(losses(0, documents=3, change=-1.0, strata=3), draws=200, seed=0)
    assert found.loss.low == pytest.approx(found.loss.high) and found.p_value == 1.0


def test_one_document_that_outweighs_the_others_leaves_a_wide_interval_with_bounds() -> None:
    weights, change = np.array([10_000.0, 20.0, 30.0]), np.array([-0.1, 0.4, -0.3])
    pair = PairedLosses(weights, 4 * weights, 4 * weights, (4 + change) * weights, np.zeros(3, dtype=int))
    found = paired_change(pair, draws=500, seed=0)
    assert found.loss.low < found.loss.change < found.loss.high
    assert found.loss.low > -1000 and found.loss.high < 1000, "with the freedom that was computed, 0.00006, it was 10^50"
    assert found.p_value > 0.05


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04, and no later one may be smaller."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([]) == []


# The step


class DocumentSettings(Settings):
    """The documents of an evaluation that a test publishes."""

    evaluator: str = "held_out_loss"
    evaluator_settings: dict[str, Json] = Field(default_factory=dict)
    rows: tuple[dict[str, Json], ...]


def write_documents(settings: DocumentSettings, out: Path, **_: object) -> Outcome:
    """Write the documents of `settings`."""
    pq.write_table(pa.Table.from_pylist(list(settings.rows)), out / "documents.parquet")
    return Outcome()


class NoSettings(Settings):
    """Of an artifact that holds one file."""

    name: str


def write_config(settings: NoSettings, out: Path) -> Outcome:
    """Write what marks a checkpoint."""
    (out / "config.json").write_text(json.dumps({"name": settings.name}))
    return Outcome()


def documents(changes: Mapping[str, float], *, count: int = 40, seed: int = 0) -> list[dict[str, Json]]:
    """Return documents by domain whose loss changes by `changes` nats per token after training; the first half are older and English."""
    rows: list[dict[str, Json]] = []
    for place, (domain, change) in enumerate(changes.items()):
        random = np.random.Generator(np.random.Philox(key=[7, place]))
        noise = np.random.Generator(np.random.Philox(key=[seed, place + 100])).normal(0, SPREAD, count)
        for number in range(count):
            tokens, before = int(random.integers(50, 500)), float(random.normal(4, 0.4))
            snapshot, language = ("2026-01-01", "en") if number < count // 2 else ("2026-02-01", "de")
            facts = {"id": f"{domain}-{number}", "domain": domain, "tokens": tokens, "bytes": 4 * tokens}
            nats = {"nll_before": before * tokens, "nll_after": (before + change + float(noise[number])) * tokens}
            rows.append({**facts, **nats, "snapshot": snapshot, "language": language})
    return rows


def checkpoint_of(store: Store, name: str) -> Manifest:
    return store.build(Build(asset="pretrained_checkpoint", partition=name, step=write_config, settings=NoSettings(name=name))).manifest


def evaluated(store: Store, name: str, rows: Sequence[dict[str, Json]], *, decided_by: str = "", **changes: object) -> Manifest:
    """Publish the evaluation of recipe `name`."""
    decisions = store.build(
        Build(asset="deduplicated_corpus", partition=decided_by or name, step=write_config, settings=NoSettings(name=decided_by or name))
    )
    inputs = {"checkpoint": checkpoint_of(store, name), "decisions": decisions.manifest}
    settings = DocumentSettings(rows=tuple(rows), **changes)
    return store.build(Build(asset="evaluation", partition=name, step=write_documents, settings=settings, inputs=inputs)).manifest


def compared(store: Store, candidate: Manifest, baseline: Manifest | None = None, **changes: object) -> Manifest:
    settings = ComparisonSettings(**{"roles": ROLES, "draws": 2000, **changes})
    inputs = {"candidate": candidate, **({"baseline": baseline} if baseline else {})}
    request = Build(asset="comparison", partition="new", step=compare_recipes, settings=settings, inputs=inputs, audits=COMPARISON_AUDITS)
    return store.build(request).manifest


def rows_of(comparison: Manifest) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(comparison.file("comparison.json").read_text())["rows"]}


def gate(comparison: Manifest) -> tuple[bool, str]:
    check = next(check for check in comparison.checks if check.name == "not_worse_than_baseline")
    assert not check.blocking
    return check.passed, check.description


@pytest.fixture
def old(store: Store) -> Manifest:
    return evaluated(store, "old", documents({"wiki": 0.0, "book": 0.0, "code": -0.5}, seed=1))


@pytest.fixture
def new(store: Store) -> Manifest:
    """Better than `old` on code by 0.2 nats, worse on books by 0.05, the same on wiki."""
    return evaluated(store, "new", documents({"wiki": 0.0, "book": 0.05, "code": -0.7}, seed=2))


def test_rows_follow_from_the_documents(store: Store, old: Manifest, new: Manifest) -> None:
    rows = rows_of(compared(store, new, old))
    tables = {name: pq.read_table(m.file("documents.parquet")).to_pylist() for name, m in (("old", old), ("new", new))}
    groups = {
        "book": lambda row: row["domain"] == "book",
        "general": lambda row: row["domain"] in ("wiki", "book"),
        "general 2026-01-01": lambda row: row["domain"] != "code" and row["snapshot"] == "2026-01-01",
        "target de": lambda row: row["domain"] == "code" and row["language"] == "de",
    }
    for name, belongs in groups.items():
        nats, tokens, size = (
            [sum(row[key] for row in tables[which] if belongs(row)) for which in ("old", "new")] for key in ("nll_after", "tokens", "bytes")
        )
        assert rows[name]["loss_baseline"] == pytest.approx(nats[0] / tokens[0])
        assert rows[name]["loss_change"] == pytest.approx((nats[1] - nats[0]) / tokens[0])
        assert rows[name]["bits_per_byte_change"] == pytest.approx((nats[1] - nats[0]) / np.log(2) / size[0])
        assert rows[name]["loss_change_low"] < rows[name]["loss_change"] < rows[name]["loss_change_high"]
    assert set(rows) == {
        *("wiki", "book", "code", "general"),
        *(f"{role} {value}" for role in ("general", "target") for value in ("2026-01-01", "2026-02-01", "en", "de")),
    }


def test_verdicts_are_those_of_the_corrected_p_values(store: Store, old: Manifest, new: Manifest) -> None:
    rows = rows_of(compared(store, new, old))
    assert [rows[name]["verdict"] for name in ("wiki", "book", "code")] == ["no difference", "worse", "better"]
    assert [row["p_adjusted"] for row in rows.values()] == pytest.approx(holm([row["p_value"] for row in rows.values()]))
    assert all(row["p_value"] <= row["p_adjusted"] <= 1 for row in rows.values())


def test_the_gate_fails_beyond_the_interval_alone(store: Store, old: Manifest, new: Manifest) -> None:
    passed, said = gate(compared(store, new, old, guards={"book": 0.0, "wiki": 0.0}))
    assert not passed and "book: +0.0" in said and "allowed +0.0000" in said and "wiki" not in said
    assert gate(compared(store, new, old, guards={"book": 0.08, "target": 0.0}))[0]  # more is allowed; the target role is one domain
    assert not gate(compared(store, new, old, guards={"bits_per_byte/book": 0.0}))[0]
    assert gate(compared(store, new, old, guards={"percent/book": 2.0}))[0]  # 0.05 of 4 nats is 1.25 percent
    assert not gate(compared(store, new, old, guards={"percent/book": 0.5}))[0]
    assert gate(compared(store, old, old, guards={"general": 0.0}))[0]
    passed, said = gate(compared(store, new, old, guards={}))
    assert not passed and "no guard" in said


def test_a_better_candidate_passes_a_guard_that_asks_for_a_gain(store: Store, old: Manifest, new: Manifest) -> None:
    assert gate(compared(store, new, old, guards={"code": -0.1}))[0]
    assert not gate(compared(store, new, old, guards={"code": -0.3}))[0]


def test_without_a_baseline_training_itself_is_judged(store: Store, new: Manifest) -> None:
    comparison = compared(store, new, guards={"general": 0.06})
    rows = rows_of(comparison)
    assert rows["code"]["loss_change"] == pytest.approx(-0.7, abs=0.02) and rows["code"]["verdict"] == "better"
    assert gate(comparison)[0] and comparison.outcome.details["baseline"] == "before training"
    assert not gate(compared(store, new, guards={"general": 0.0}))[0]


def test_different_documents_are_refused(store: Store, old: Manifest, new: Manifest) -> None:
    rows = documents({"wiki": 0.0, "book": 0.0, "code": 0.0})
    fewer = evaluated(store, "inverse", rows[:-7])
    with pytest.raises(GristmillError, match="7 are in one of them alone .113 and 120 in all.; set `evaluation.reference: old`"):
        compared(store, fewer, old)
    swapped = evaluated(store, "swapped", [{**row, "id": f"x{row['id']}"} if n < 3 else row for n, row in enumerate(rows)])
    with pytest.raises(GristmillError, match="6 are in one of them alone"):
        compared(store, swapped, old)
    retokenized = evaluated(store, "cut", [{**row, "tokens": row["tokens"] + 1} for row in rows])
    with pytest.raises(GristmillError, match="one tokenizer"):
        compared(store, retokenized, old)
    with pytest.raises(GristmillError, match=r"'masked_loss'.*set `evaluation.evaluator` alike"):
        compared(store, evaluated(store, "masked", rows, evaluator="masked_loss"), old)


def test_a_domain_of_one_alone_is_left_out_and_named(store: Store, old: Manifest) -> None:
    candidate = evaluated(store, "less", documents({"wiki": 0.0, "book": 0.0}, seed=3))
    record = json.loads(compared(store, candidate, old).file("comparison.json").read_text())
    assert record["left_out"] == ["code"] and {row["name"] for row in record["rows"] if row["group"] == "domain"} == {"wiki", "book"}
    with pytest.raises(GristmillError, match="no domain in common"):
        compared(store, evaluated(store, "web", documents({"web": 0.0})), old)


def test_an_unknown_guard_suggests_the_nearest(store: Store, old: Manifest, new: Manifest) -> None:
    with pytest.raises(UnknownName, match="did you mean 'general'"):
        compared(store, new, old, guards={"genral": 0.0})
    with pytest.raises(UnknownName, match="did you mean 'bits_per_byte'"):
        compared(store, new, old, guards={"bits_per_bite/wiki": 0.0})


def test_the_same_input_gives_the_same_bytes(store: Store, old: Manifest, new: Manifest, tmp_path: Path) -> None:
    """Also where the documents stand in another order."""
    first = compared(store, new, old)
    again = Store(tmp_path / "again")
    shuffled = evaluated(again, "new", pq.read_table(new.file("documents.parquet")).to_pylist()[::-1])
    assert compared(again, shuffled, old).content_sha256 == first.content_sha256


# Promotion


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MLflow's database lies: to make one takes seconds."""
    return tmp_path_factory.mktemp("home")


def test_promotion_goes_through_the_gate(store: Store, old: Manifest, new: Manifest, home: Path) -> None:
    """The version is made from the checkpoint's run; its alias leads to the files; refused and repeated promotions change nothing."""
    from mlflow import MlflowClient

    tracker = Tracker(home, "mill")
    assert tracker.promoted() == {} and not (home / "mlflow.db").exists()
    checkpoint, comparison = checkpoint_of(store, "new"), compared(store, new, old, guards={"book": 0.08})
    with pytest.raises(GristmillError, match="has no run on sqlite"):
        tracker.promote(checkpoint, comparison)
    tags = RunTags("dagster-run", checkpoint.asset, "new", checkpoint.fingerprint)
    run_id = tracker.finish(tracker.start(checkpoint, parent="new", tags=tags), checkpoint)
    with pytest.raises(GristmillError, match=r"is not promoted: book: \+0\.0.* allowed \+0\.0000"):
        tracker.promote(checkpoint, compared(store, new, old, guards={"book": 0.0}))
    with pytest.raises(GristmillError, match="does not compare"):
        tracker.promote(checkpoint_of(store, "old"), comparison)
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    assert client.search_registered_models("name = 'mill'") == []
    for _ in range(2):
        assert Tracker(home, "mill").promote(checkpoint, comparison) == "1"  # as the command does, which has not written the run itself
    (version,) = client.search_model_versions("name = 'mill'")
    champion = client.get_model_version_by_alias("mill", "champion")
    assert (champion.version, champion.run_id) == (version.version, run_id)
    assert champion.tags["gristmill.comparison"] == comparison.fingerprint and champion.tags["recipe"] == "new"
    assert Path(champion.source.removeprefix("file://"), "config.json").exists()
    assert tracker.promoted() == {checkpoint.fingerprint: "version 1 of mill, champion"}


def test_another_checkpoint_takes_the_alias(store: Store, old: Manifest, new: Manifest, home: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(home, "another-mill")
    versions = []
    for name, evaluation in (("new", new), ("old", old), ("new", new)):
        checkpoint = checkpoint_of(store, name)
        if not tracker.recorded(checkpoint):
            tracker.finish(
                tracker.start(checkpoint, parent=name, tags=RunTags("run", checkpoint.asset, name, checkpoint.fingerprint)), checkpoint
            )
        versions.append(tracker.promote(checkpoint, compared(store, evaluation, evaluation)))
        client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
        assert client.get_model_version_by_alias("another-mill", "champion").tags["recipe"] == name
    assert versions == ["1", "2", "1"]
    promoted = tracker.promoted()
    assert "version 1 of another-mill, champion" in promoted[checkpoint_of(store, "new").fingerprint]
    assert promoted[checkpoint_of(store, "old").fingerprint] == "version 2 of another-mill"
