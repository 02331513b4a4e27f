"""The whole graph on the tiny recipe, through the command a newcomer uses, in a project directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from assets_defs.cli import app
from pipelines.housekeeping import Keeper
from pipelines.store import Store

ROOT = Path(__file__).parents[1]
RECIPE_ASSETS = (
    "quality_filtered_corpus",
    "toxicity_filtered_corpus",
    "threshold_sweep",
    "decontaminated_corpus",
    "deduplicated_corpus",
    "age_splits",
    "selected_subset",
    "general_checkpoint",
    "critical_ratio",
    "domain_mixture",
    "pretrained_checkpoint",
    "evaluation",
    "report",
)


ASKED_FOR_ANEW = """
import assets_defs.definitions
from assets_defs.materialization import REQUESTS
from assets_defs.resources import MillResource
mill = MillResource().open()
for asset, request in REQUESTS.items():
    key = (mill.store.partitions(asset) or [None])[-1]
    made = mill.store.current(asset, key)
    away = made.directory.with_name("away")
    made.directory.rename(away)
    try:
        print(asset, request(mill, key).fingerprint() == made.fingerprint)
    finally:
        away.rename(made.directory)
"""


class Project:
    """A copy of the project's files, with its own store and Dagster state."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        for name in ("project.yaml", "dagster.yaml", "workspace.yaml"):
            shutil.copy(ROOT / name, directory)
        shutil.copytree(ROOT / "recipes", directory / "recipes")
        (directory / "data").symlink_to(ROOT / "data")

    @property
    def store(self) -> Store:
        return Store(self.directory / ".gristmill")

    def start(self, *arguments: str, output: Path) -> subprocess.Popen[bytes]:
        """Start `gristmill` in the directory, as the leader of its own process group."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-m", "assets_defs.cli", *arguments]
        with output.open("wb") as file:
            return subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, *arguments: str, timeout: int = 600) -> str:
        """Run `gristmill` to its end and return what it printed."""
        output = self.directory / "output.txt"
        code = self.start(*arguments, output=output).wait(timeout)
        text = output.read_text()
        assert code == 0, text[-4000:]
        return text


@pytest.fixture(scope="module")
def milled(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `gristmill run --recipe tiny` has run once."""
    project = Project(tmp_path_factory.mktemp("end_to_end") / "project")
    project.first_output = project.run("run", "--recipe", "tiny")  # type: ignore[attr-defined]
    return project


def test_the_run_ends_with_results_and_the_way_to_the_ui(milled: Project) -> None:
    output = milled.first_output  # type: ignore[attr-defined]
    assert "critical ratio:" in output
    assert "report.html" in output
    assert "make ui" in output.splitlines()[-1]
    assert "Warning" not in output, [line for line in output.splitlines() if "Warning" in line]


def test_every_step_left_an_artifact_that_verifies(milled: Project) -> None:
    for asset in RECIPE_ASSETS:
        manifest = milled.store.current(asset, "tiny")
        assert milled.store.verify(manifest) == []
        assert all(check.passed for check in manifest.checks if check.blocking), manifest.checks
    for asset in ("duplicate_clusters", "tokenizer", "embedder"):
        assert milled.store.verify(milled.store.current(asset)) == []
    assert len(milled.store.partitions("mixture_probe")) == 3


def test_every_declared_check_was_made_and_recorded(milled: Project) -> None:
    """A check that no audit makes would be recorded as failed."""
    golden = json.loads((ROOT / "tests" / "golden_graph.json").read_text())["assets"]
    for asset, shape in golden.items():
        partitions = milled.store.partitions(asset)
        for manifest in (milled.store.current(asset, key) for key in partitions or [None]):
            assert sorted(check.name for check in manifest.checks) == shape["checks"], manifest.label


def test_documents_are_conserved_from_raw_text_to_selection(milled: Project) -> None:
    store = milled.store
    taken = [key for key in store.partitions("raw_corpus") if key.split("|")[0] in ("wiki", "techdoc", "code")]
    raw = [store.current("raw_corpus", key).counts for key in taken]
    cleaned = [store.current("cleaned_corpus", key).counts for key in taken]
    assert sum(c["kept"] for c in raw) == sum(c["documents_in"] for c in cleaned)
    incoming = sum(c["kept"] for c in cleaned)
    for asset in ("quality_filtered_corpus", "toxicity_filtered_corpus", "decontaminated_corpus", "deduplicated_corpus"):
        counts = store.current(asset, "tiny").counts
        assert counts["documents_in"] == incoming == counts["kept"] + counts["dropped"] + counts["quarantined"]
        incoming = counts["kept"]


def test_nothing_held_out_is_trained_on(milled: Project) -> None:
    store = milled.store
    decisions = pq.read_table(store.current("deduplicated_corpus", "tiny").file("decisions.parquet")).to_pylist()
    held_out = {row["id"] for row in decisions if row["split"] == "held_out"}
    selection = store.current("selected_subset", "tiny")
    selected = {row["id"] for role in ("general", "target") for row in pq.read_table(selection.file(f"{role}.parquet")).to_pylist()}
    evaluated = set(pq.read_table(store.current("evaluation", "tiny").file("documents.parquet"))["id"].to_pylist())
    assert held_out and selected and evaluated
    assert not held_out & selected
    assert evaluated <= held_out


def test_filters_remove_planted_dirt_and_keep_clean_text(milled: Project) -> None:
    decisions = pq.read_table(milled.store.current("deduplicated_corpus", "tiny").file("decisions.parquet")).to_pylist()
    before = pq.read_table(milled.store.current("quality_filtered_corpus", "tiny").file("decisions.parquet")).to_pylist()
    labels = {row["id"]: row["noise"] for row in pq.read_table(ROOT / "data/sample/labels.parquet").to_pylist()}
    must_go = {"boilerplate", "fragment", "log", "minified_code", "numeric_table", "repetition"}
    survivors = {row["id"].rpartition("@")[0] for row in decisions if row["kept"]}
    dirt = [name for row in before if labels.get(name := row["id"].rpartition("@")[0]) in must_go]
    clean = [row for row in before if row["id"].rpartition("@")[0] not in labels]
    assert len(dirt) > 100
    assert sum(name in survivors for name in dirt) < 0.1 * len(dirt)
    assert sum(not row["kept"] for row in clean) < 0.04 * len(clean)


def test_the_target_is_learned_and_forgetting_grows_with_its_share(milled: Project) -> None:
    result = json.loads(milled.store.current("critical_ratio", "tiny").file("critical_ratio.json").read_text())
    points = sorted(result["points"], key=lambda point: point["ratio"])
    assert points[0]["general_delta"] < points[-1]["general_delta"]
    assert points[0]["target_delta"] > points[-1]["target_delta"]
    rows = {
        row["domain"]: row for row in json.loads(milled.store.current("evaluation", "tiny").file("evaluation.json").read_text())["domains"]
    }
    assert rows["code"]["loss_change_high"] < 0


def test_a_second_run_is_a_cache_hit(milled: Project) -> None:
    assert "; 0 things" in asked(milled, "gc", "--delete")
    started = time.monotonic()
    output = milled.run("run", "--recipe", "tiny")
    assert time.monotonic() - started < 60
    lines = [line for line in output.splitlines() if line.startswith("  ") and "]: " in line]
    assert len(lines) > 50
    assert all("(cached)" in line for line in lines), [line for line in lines if "(cached)" not in line]


def test_an_artifact_whose_files_are_gone_can_be_made_anew(milled: Project) -> None:
    command, environment = [sys.executable, "-c", ASKED_FOR_ANEW], {**os.environ, "PYTHONPATH": str(ROOT), "GRISTMILL_HOME": ""}
    done = subprocess.run(command, cwd=milled.directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    asked = dict(line.split() for line in done.stdout.splitlines())
    golden = json.loads((ROOT / "tests" / "golden_graph.json").read_text())["assets"]
    assert asked == dict.fromkeys(golden, "True")


def test_a_plan_names_the_artifacts_that_the_run_made(milled: Project) -> None:
    found = json.loads(milled.run("recipes", "diff", "tiny", "tiny", "--json"))
    assert found["problems"] == {} and found["settings"] == []
    for asset, row in found["assets"].items():
        standing = {key.partition("|")[2]: milled.store.current(asset, key).fingerprint for key in milled.store.partitions(asset)}
        assert row["fingerprints"] == [standing, standing], asset


def test_the_checkpoint_opens_with_transformers_alone(milled: Project, tmp_path: Path) -> None:
    checkpoint = milled.store.current("pretrained_checkpoint", "tiny").directory
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}); t = AutoTokenizer.from_pretrained({str(checkpoint)!r})\n"
        "x = t('def main():', return_tensors='pt'); y = m.generate(**x, max_new_tokens=8, do_sample=False)\n"
        "assert y.shape[1] > x['input_ids'].shape[1]; assert 'pipelines' not in sys.modules; print(t.decode(y[0]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={**environment, "HF_HUB_OFFLINE": "1"}, check=True)


def test_mlflow_holds_a_run_for_every_artifact_that_was_computed(milled: Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{milled.directory / '.gristmill' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("gristmill")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    by_asset = {(run.data.tags.get("dagster.asset"), run.data.tags.get("dagster.partition")): run for run in runs}
    for asset in RECIPE_ASSETS:
        run = by_asset[(asset, "tiny")]
        assert run.data.tags["gristmill.fingerprint"] == milled.store.current(asset, "tiny").fingerprint
        assert run.data.tags["mlflow.parentRunId"] == by_asset_parent(runs, "tiny")
        assert run.inputs.dataset_inputs or asset == "report"
    curve = client.get_metric_history(by_asset[("pretrained_checkpoint", "tiny")].info.run_id, "train_loss")
    assert len(curve) > 2 and curve[-1].step > curve[0].step
    assert client.search_logged_models([experiment.experiment_id])


def by_asset_parent(runs: Sequence[object], group: str) -> str:
    """Return the id of the run that groups `group`."""
    return next(run.info.run_id for run in runs if run.data.tags.get("gristmill.group") == group)  # type: ignore[attr-defined]


def test_export_writes_a_folder_that_datasets_opens(milled: Project, tmp_path: Path) -> None:
    import datasets

    milled.run("export", "deduplicated_corpus", "tiny", str(tmp_path / "kept"))
    kept = datasets.load_from_disk(str(tmp_path / "kept"))
    assert kept.num_rows == milled.store.current("deduplicated_corpus", "tiny").counts["kept"]
    milled.run("verify", "cleaned_corpus")


def test_an_exported_checkpoint_has_its_cards_and_opens(milled: Project, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert "2 cards" in milled.run("export", "pretrained_checkpoint", "tiny", str(tmp_path / "model"))
    stored, exported = (
        AutoModelForCausalLM.from_pretrained(d)
        for d in (milled.store.current("pretrained_checkpoint", "tiny").directory, tmp_path / "model")
    )
    theirs = exported.state_dict()
    assert all(theirs[name].equal(tensor) for name, tensor in stored.state_dict().items())
    card, evaluation = (tmp_path / "model" / "README.md").read_text(), milled.store.current("evaluation", "tiny")
    assert evaluation.fingerprint in card and "## Evaluation" in card
    assert "## Sources and licences" in (tmp_path / "model" / "data_card.md").read_text()


def asked(milled: Project, *arguments: str) -> str:
    """Return what `gristmill` prints of the project's store, in this process."""
    done = CliRunner().invoke(app, list(arguments), env={"GRISTMILL_HOME": str(milled.directory / ".gristmill")}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_document_and_a_number_are_traced_both_ways(milled: Project, tmp_path: Path) -> None:
    """From the checkpoint to its documents, from one of them to the steps that read it, from an evaluation to what it was made from."""
    checkpoint, evaluation = (milled.store.current(asset, "tiny") for asset in ("pretrained_checkpoint", "evaluation"))
    seen = tmp_path / "seen.parquet"
    found = json.loads(asked(milled, "trace", "pretrained_checkpoint[tiny]", "--documents", str(seen), "--json"))
    runs = {run["asset"]: run for run in found["documents"]}
    for asset, run in runs.items():
        trained = milled.store.current(asset, "tiny").counts["tokens"]
        assert sum(row["tokens_read"] for row in run["domains"]) == trained
        rows = pq.read_table(seen, filters=[("asset", "=", asset)]).to_pylist()
        assert len(rows) == sum(row["documents"] for row in run["domains"]) and sum(row["tokens_read"] for row in rows) == trained
    assert evaluation.fingerprint in {one["fingerprint"] for one in found["evaluations"]}

    row = max(
        pq.read_table(seen, filters=[("asset", "=", "pretrained_checkpoint")]).to_pylist(), key=lambda row: (row["tokens_read"], row["id"])
    )
    traced = json.loads(asked(milled, "trace", row["id"], "--recipe", "tiny", "--json"))
    raw = milled.store.current("raw_corpus", traced["partition"])
    documents = pq.read_table(raw.file("documents.parquet"))
    assert documents["id"][traced["origin"]["row"]].as_py() == row["id"] and traced["origin"]["source_files"] == raw.settings["files"]
    (decision,) = traced["decisions"]
    assert decision["recipes"] == ["tiny"] and decision["verdict"] == "selected" and len(decision["stages"]) == 7
    by = {one["asset"]: one for one in traced["checkpoints"]}
    read = by["pretrained_checkpoint"]
    assert read["fingerprint"] == checkpoint.fingerprint and read["tokens_read"] == row["tokens_read"]
    assert (min(read["steps"]), max(read["steps"])) == (row["first_step"], row["last_step"])
    assert evaluation.fingerprint in {one["fingerprint"] for one in read["evaluations"]}
    shard = milled.store.find("tokenized_shards", read["tokens"]["artifact"])
    offsets = pq.read_table(shard.file("documents.parquet"), filters=[("id", "=", row["id"])])["offset"]
    assert offsets.to_pylist() == [read["tokens"]["offset"]]
    text = asked(milled, "trace", row["id"], "--recipe", "tiny")
    assert row["id"] in text and f"{len(read['steps']):,} of {read['steps_in_all']:,} steps read it" in text

    upwards = json.loads(asked(milled, "trace", "evaluation[tiny]", "--json"))
    ancestors = {(one["asset"], one["fingerprint"]): one for one in upwards["ancestors"]}
    assert ancestors["pretrained_checkpoint", checkpoint.fingerprint]["code_version"] == checkpoint.code_version
    assert ancestors["raw_corpus", raw.fingerprint]["computed"] == raw.provenance["started"]
    assert upwards["metrics"] == evaluation.outcome.metrics and not any(one["gone"] for one in upwards["ancestors"])
    downwards = json.loads(asked(milled, "trace", f"raw_corpus[{traced['partition']}]", "--downstream", "--json"))
    assert {checkpoint.fingerprint, evaluation.fingerprint} <= {one["fingerprint"] for one in downwards["descendants"]}


def test_housekeeping_has_nothing_to_do_after_a_run(milled: Project) -> None:
    assert "; 0 things" in asked(milled, "gc")
    assert ", 0 faults" in asked(milled, "verify", "--all").splitlines()[-1]


def test_the_page_over_all_recipes_names_the_recipe(milled: Project) -> None:
    page = milled.store.current("recipes_report").file("recipes.html")
    assert str(page) in milled.first_output  # type: ignore[attr-defined]
    assert "tiny" in page.read_text()


def test_a_run_killed_in_the_middle_of_the_checkpoint_ends_with_the_same_bytes(milled: Project, tmp_path: Path) -> None:
    expected = {asset: milled.store.current(asset, "tiny").content_sha256 for asset in ("general_checkpoint", "pretrained_checkpoint")}
    copy = Project(tmp_path / "project")
    shutil.copytree(milled.directory / ".gristmill", copy.directory / ".gristmill")
    for asset in (
        "general_checkpoint",
        "mixture_probe",
        "critical_ratio",
        "domain_mixture",
        "pretrained_checkpoint",
        "evaluation",
        "report",
    ):
        shutil.rmtree(copy.directory / ".gristmill" / "artifacts" / asset)
    output = copy.directory / "killed.txt"
    process = copy.start("run", "--recipe", "tiny", output=output)
    metrics = "staging/general_checkpoint-*/metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not list((copy.directory / ".gristmill").glob(metrics)):
        time.sleep(0.05)
    assert process.poll() is None, output.read_text()[-3000:]
    time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (copy.directory / ".gristmill" / "artifacts" / "general_checkpoint").exists()
    keeper, deadline = Keeper(copy.directory / ".gristmill", promoted={}), time.monotonic() + 30
    while "lease" not in (left := {item.kind for item in keeper.survey().items}) and time.monotonic() < deadline:
        time.sleep(0.2)  # until what it had started is gone, too
    assert "lease" in left and left & {"staging", "resume point"}
    copy.run("run", "--recipe", "tiny")
    assert {asset: copy.store.current(asset, "tiny").content_sha256 for asset in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--recipe", "tinny"), "did you mean 'tiny'?"),
        (("export", "raw_corpsu", "wiki|2026-01-01", "x"), "did you mean 'raw_corpus'?"),
        (("verify", "raw_corpus", "wiki|1999-01-01"), "has not been materialized"),
    ],
)
def test_a_wrong_name_is_one_clear_line(milled: Project, arguments: tuple[str, ...], message: str) -> None:
    output = milled.directory / "error.txt"
    assert milled.start(*arguments, output=output).wait(60) == 1
    assert message in output.read_text()
    assert "Traceback" not in output.read_text()
