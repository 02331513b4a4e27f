"""What a change of code or of thresholds makes Dagster and the store do again: exactly what depends on it, in a copy of the project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_world import sample_texts

ROOT = Path(__file__).parents[1]
CHANGE = "\n\nCHANGED = 1\n"
PROJECT = """\
name: small
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01"]
fit_on: ["2026-01-01"]
source: jsonl
source_settings: {paths: ["texts/{domain}.jsonl"]}
quality: {encoding: {}, markup: {code_punctuation_fraction: 0.5}}
toxicity: {toxic_words: {}}
tokenizer: {vocabulary_size: 512}
domains: {code: {}, techdoc: {}, wiki: {}}
"""
VERSIONS = "{node.key.to_user_string(): node.code_version for node in defs.resolve_asset_graph().asset_nodes}"
# Runs assets for every domain, for the recipe, or once; then says which partitions Dagster calls stale, and why.
RUN = """
import logging
import dagster as dg
from assets_defs.driver import QUIET, RANGE_TAGS
from assets_defs.partitions import RECIPE, SOURCE
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

MONTH = "2026-01-01"
KEYS = {None: [None], SOURCE: [f"{domain}|{MONTH}" for domain in ("code", "techdoc", "wiki")], RECIPE: ["tiny"]}
graph = defs.resolve_asset_graph()


def run(instance, asset):
    job = defs.get_implicit_global_asset_job_def().get_subset(asset_selection={dg.AssetKey(asset)})
    keys = KEYS[graph.get(dg.AssetKey(asset)).partitions_def]
    tags = dict(zip(RANGE_TAGS, (keys[0], keys[-1]))) if len(keys) > 1 else {}
    key = keys[0] if len(keys) == 1 else None
    result = job.execute_in_process(instance=instance, partition_key=key, tags=tags, run_config=QUIET)
    assert result.success
    assert not [event.user_message for event in instance.all_logs(result.run_id) if event.level >= logging.WARNING]
    return [event.metadata["cache"].value for event in result.asset_materializations_for_node(asset) if event.metadata]


def stale(instance, assets):
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    found = {}
    for asset in assets:
        keys = KEYS[graph.get(dg.AssetKey(asset)).partitions_def]
        causes = {cause.reason for key in keys for cause in resolver.get_stale_causes(dg.AssetKey(asset), key)}
        found[asset] = sorted(causes)
    return found


with dg.DagsterInstance.get() as instance:
    before = stale(instance, STALE)
    ran = {asset: run(instance, asset) for asset in RUN}
    answer = {"before": before, "ran": ran, "stale": stale(instance, STALE)}
"""


class Copy:
    """A private copy of the project, in which modules are changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for folder in ("pipelines", "assets_defs"):
            shutil.copytree(ROOT / folder, directory / folder)  # with what is compiled
        (directory / "recipes").mkdir()
        shutil.copy(ROOT / "recipes" / "tiny.yaml", directory / "recipes")
        shutil.copy(ROOT / "dagster.yaml", directory)
        (directory / "project.yaml").write_text(PROJECT)
        (directory / "texts").mkdir()
        for domain in ("code", "techdoc", "wiki"):
            rows = (json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(sample_texts(domain, 30, 600)))
            (directory / "texts" / f"{domain}.jsonl").write_text("".join(rows))

    def ask(self, expression: str, program: str = "") -> Any:
        """Return the value of `expression` after `program`, in a process that imports the copy."""
        head = "import json, warnings\nwarnings.simplefilter('ignore')\nfrom assets_defs.definitions import defs\n"
        code = f"{head}{program}\nprint(json.dumps({expression}))"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
        environment |= {"PYTHONPATH": str(self.directory), "DAGSTER_HOME": str(self.directory), "GRISTMILL_WORKERS": "1"}
        command = [sys.executable, "-B", "-c", code]
        done = subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def run(self, *assets: str, stale: tuple[str, ...]) -> dict[str, Any]:
        """Materialize `assets`; say of each partition whether it was computed, and why Dagster calls `stale` stale, before and after."""
        return self.ask("answer", f"RUN, STALE = {assets!r}, {stale!r}\n{RUN}")

    def change(self, module: str) -> None:
        """Change what the code of a module says."""
        path = self.directory / f"{module}.py"
        path.write_text(path.read_text() + CHANGE)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def versions(copy: Copy) -> dict[str, str]:
    """Return the code version of each asset before any change."""
    return copy.ask(VERSIONS)


@pytest.mark.parametrize(
    "edits",
    [
        {
            "pipelines/filters/encoding": {"quality_scores"},
            "pipelines/filters/c4_quality": set(),  # not switched on here
            "pipelines/tokenization": {"tokenizer", "tokenized_shards"},
        },
        {"pipelines/filters/toxic_words": {"toxicity_scores"}, "pipelines/report": {"report"}, "pipelines/sources/jsonl": {"raw_corpus"}},
    ],
    ids=["measured", "around"],
)
def test_changed_modules_change_the_code_versions_of_their_own_assets_alone(
    copy: Copy, versions: dict[str, str], edits: dict[str, set[str]]
) -> None:
    before = {module: (copy.directory / f"{module}.py").read_text() for module in edits}
    try:
        for module in edits:
            copy.change(module)
        after = copy.ask(VERSIONS)
    finally:
        for module, text in before.items():
            (copy.directory / f"{module}.py").write_text(text)
    assert {asset for asset, version in after.items() if version != versions[asset]} == set().union(*edits.values())


MEASURED = ("raw_corpus", "cleaned_corpus", "filter_models", "quality_scores", "toxicity_scores")
DECIDED = ("quality_filtered_corpus", "toxicity_filtered_corpus")


@pytest.mark.slow
def test_what_is_done_again_is_what_the_change_reaches(copy: Copy) -> None:
    fresh = {asset: [] for asset in (*MEASURED, *DECIDED)}
    first = copy.run(*MEASURED, *DECIDED, stale=(*MEASURED, *DECIDED))
    assert first["stale"] == fresh
    assert {state for states in first["ran"].values() for state in states} == {"computed"}

    def scored() -> dict[str, set[str]]:
        """Return the fingerprints of what each filter scored."""
        return {path.name: {one.name for one in path.iterdir()} for path in copy.directory.glob(".gristmill/artifacts/*_scores.*")}

    # a threshold: nothing is scored, and the recipe is decided anew
    before = scored()
    (copy.directory / "project.yaml").write_text(PROJECT.replace("code_punctuation_fraction: 0.5", "code_punctuation_fraction: 0.1"))
    again = copy.run("quality_scores", "toxicity_scores", *DECIDED, stale=(*MEASURED, *DECIDED))
    assert again["ran"] == {"quality_scores": ["hit"] * 3, "toxicity_scores": ["hit"] * 3} | {asset: ["computed"] for asset in DECIDED}
    assert scored() == before and again["stale"] == fresh

    # the code of one rule: its own asset is stale and nothing else; that filter alone is scored, for every partition
    copy.change("pipelines/filters/markup")
    again = copy.run("toxicity_scores", "quality_scores", stale=(*MEASURED, *DECIDED))
    assert again["before"] == fresh | {"quality_scores": ["has a new code version"]}
    assert again["ran"] == {"toxicity_scores": ["hit"] * 3, "quality_scores": ["computed"] * 3}
    added = {name: len(found - before[name]) for name, found in scored().items()}
    assert added == {"quality_scores.encoding": 0, "quality_scores.markup": 3, "toxicity_scores.toxic_words": 0}
    assert again["stale"] == fresh | {"quality_filtered_corpus": ["has a new dependency data version"]}
