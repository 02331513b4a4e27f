"""Between runs: what failed its audit is not built on, one partition's fault is not its neighbours', and what is done is kept."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from small_world import sample_texts
from typer.testing import CliRunner

from assets_defs.corpus import cleaned_corpus
from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill, MillResource
from pipelines import corpus
from pipelines.documents import row_count, split_partition
from pipelines.manifests import Check, Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.refusals import refusals
from pipelines.store import Build, Store

DOMAINS = ("code", "techdoc", "wiki")  # those of recipes/tiny.yaml
MONTH = "2026-01-01"
KEYS = [f"{domain}|{MONTH}" for domain in DOMAINS]
MONTHS = [f"techdoc|2026-0{month}-01" for month in (1, 2, 3)]
"""A range of partitions, for one run."""
ENOUGH = 4


def enough_documents(draft: Manifest) -> Check:
    """Pass where a partition holds what the test calls a corpus."""
    kept = draft.counts["kept"]
    return Check(name="enough_documents", passed=kept >= ENOUGH, description=f"{kept} documents, at least {ENOUGH} wanted")


def ingest_past_a_fault(settings: corpus.CorpusSettings, out: Path) -> Outcome:
    """Read as `ingest` does; where a file FAULT lies beside the source, take it away and fail as a disk does."""
    for name in settings.files:
        fault = Path(name).with_suffix(".fault")
        if fault.exists():
            fault.unlink()
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
    return corpus.ingest(settings, out)


AUDITS = (*corpus.CORPUS_AUDITS, enough_documents)


@mill_asset(step=ingest_past_a_fault, audits=AUDITS, partitions=SOURCE, kinds={"parquet"})
def raw_corpus(mill: Mill, partition: str) -> Build:
    """Documents of a file per partition, of the directory that the test names."""
    domain, snapshot = split_partition(partition)
    paths = {"paths": [f"{os.environ['TEXTS']}/{domain}-{snapshot}.jsonl"]}
    settings = corpus.corpus_settings(domain, snapshot, "jsonl", paths, mill.root)
    return Build(asset="raw_corpus", partition=partition, step=ingest_past_a_fault, settings=settings, audits=AUDITS)


class NoSettings(Settings):
    """Nothing to set."""


def count_documents(settings: NoSettings, out: Path, *, cleaned: tuple[Manifest, ...]) -> Outcome:
    """Write how many documents there are."""
    count = sum(row_count(one.file("documents.parquet")) for one in cleaned)
    (out / "count.json").write_text(json.dumps(count))
    return Outcome(counts={"documents": count})


@mill_asset(step=count_documents, partitions=RECIPE, deps=[dg.AssetDep("cleaned_corpus", partition_mapping=ALL)], kinds={"json"})
def counted(mill: Mill, partition: str) -> Build:
    """How many documents a recipe takes."""
    cleaned = mill.sources("cleaned_corpus", mill.recipe(partition))
    return Build(asset="counted", partition=partition, step=count_documents, settings=NoSettings(), inputs={"cleaned": cleaned})


class World:
    """A store, an instance of Dagster, and a file of real text per partition."""

    def __init__(self, directory: Path, instance: dg.DagsterInstance) -> None:
        self.home, self.texts, self.instance = directory / "home", directory / "texts", instance
        self.texts.mkdir()
        for key in {*KEYS, *MONTHS}:
            self.write(key, ENOUGH)

    @property
    def store(self) -> Store:
        return Store(self.home)

    def file(self, key: str) -> Path:
        return self.texts / f"{key.replace('|', '-')}.jsonl"

    def write(self, key: str, documents: int) -> None:
        self.file(key).write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_texts(key.split("|")[0], documents, 500)))

    def run(self, asset: str, *keys: str) -> dg.ExecuteInProcessResult:
        """Materialize partitions of one asset, several in one run."""
        first, last = keys[0], keys[-1]
        tags = {} if first == last else {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        return dg.materialize(
            [raw_corpus, cleaned_corpus, counted],
            selection=[asset],
            partition_key=first if first == last else None,
            tags=tags,
            instance=self.instance,
            resources={"mill": MillResource(home=str(self.home), workers=1)},
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )

    def build(self, asset: str, *keys: str) -> None:
        """Materialize partitions of one asset, which has to succeed, each in its run."""
        for key in keys:
            result = self.run(asset, key)
            assert result.success, [e.event_specific_data for e in result.all_events if e.is_failure or e.is_step_up_for_retry]

    def recorded(self, asset: str) -> set[str]:
        return self.instance.get_materialized_partitions(dg.AssetKey(asset))


def reason(result: dg.ExecuteInProcessResult) -> str:
    """Return what the failed run says."""
    assert not result.success
    event = next(event for event in result.all_events if event.is_step_failure)
    return event.step_failure_data.user_failure_data.description


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database of MLflow for all: it takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: str) -> Iterator[World]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    monkeypatch.setenv("TEXTS", str(tmp_path / "texts"))
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides={"telemetry": {"enabled": False}}) as instance:
        yield World(tmp_path, instance)


def test_nothing_is_built_of_an_artifact_whose_successor_was_refused(world: World) -> None:
    code, _, wiki = KEYS
    world.build("raw_corpus", *KEYS)
    world.build("cleaned_corpus", *KEYS)
    world.build("counted", "tiny")
    before = {asset: world.store.current(asset, code).fingerprint for asset in ("raw_corpus", "cleaned_corpus")}

    world.write(code, ENOUGH - 1)
    assert "enough_documents: 3 documents, at least 4 wanted" in reason(world.run("raw_corpus", code))
    assert {asset: world.store.current(asset, code).fingerprint for asset in before} == before, "the pointer stands"
    (refused,) = refusals(world.store.root)
    assert (refused.asset, refused.partition, refused.standing) == ("raw_corpus", code, before["raw_corpus"])
    message = reason(world.run("cleaned_corpus", code))
    assert f"cleaned_corpus[{code}] is not built: the last attempt at raw_corpus[{code}] failed" in message
    message = reason(world.run("counted", "tiny"))
    assert "counted[tiny] is not built" in message and f"gristmill refusals --dismiss raw_corpus '{code}'" in message
    world.build("cleaned_corpus", wiki)  # another partition is another matter

    world.write(code, ENOUGH + 1)
    world.build("raw_corpus", code)
    assert not refusals(world.store.root)
    world.build("cleaned_corpus", code)
    world.build("counted", "tiny")
    assert world.store.current("counted", "tiny").counts["documents"] == 3 * ENOUGH + 1


def test_a_refused_first_attempt_is_not_silently_left_out_and_can_be_dismissed(world: World) -> None:
    code, techdoc, wiki = KEYS
    world.write(techdoc, 1)
    message = reason(world.run("raw_corpus", *MONTHS))
    assert "1 of 3 partitions failed; the others are kept" in message and "1 documents, at least 4 wanted" in message
    assert world.recorded("raw_corpus") == set(MONTHS) - {techdoc}
    world.build("raw_corpus", code, wiki)
    world.build("cleaned_corpus", code, wiki)
    assert f"cleaned_corpus lacks {techdoc}: the last attempt at raw_corpus[{techdoc}] failed" in reason(world.run("counted", "tiny"))

    command = CliRunner()
    from assets_defs.cli import app

    listed = command.invoke(app, ["refusals"])
    assert listed.exit_code == 1 and "enough_documents: 1 documents" in listed.output
    assert command.invoke(app, ["refusals", "--dismiss", "raw_corpus", techdoc]).exit_code == 0
    assert command.invoke(app, ["refusals"]).exit_code == 0
    assert "cleaned_corpus holds no snapshot of techdoc" in reason(world.run("counted", "tiny"))


def test_a_missing_file_and_a_passing_fault_cost_the_other_partitions_nothing(world: World) -> None:
    january, february, march = MONTHS
    world.file(february).rename(world.texts / "away")
    message = reason(world.run("raw_corpus", *MONTHS))
    assert f"raw_corpus[{february}]: no file matches" in message and world.recorded("raw_corpus") == {january, march}
    first = {key: world.store.current("raw_corpus", key).provenance for key in (january, march)}

    (world.texts / "away").rename(world.file(february))
    world.file(february).with_suffix(".fault").touch()
    result = world.run("raw_corpus", *MONTHS)
    assert result.success and [event.event_type_value for event in result.all_events].count("STEP_RESTARTED") == 1
    assert world.recorded("raw_corpus") == set(MONTHS)
    assert {key: world.store.current("raw_corpus", key).provenance for key in first} == first, "computed once"
    described = [event.partition for event in result.asset_materializations_for_node("raw_corpus") if event.metadata]
    assert sorted(described) == MONTHS, "the attempt that is repeated records nothing: each partition once, by the last"
