"""Tasks before and after: rows that follow from the items, paired intervals that cover, audits, and what the identity holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_world import BATCH, SEQUENCE_LENGTH, World, mixture_of

from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Manifest
from pipelines.models import load_checkpoint
from pipelines.store import AuditFailed, Build, Store
from pipelines.task_evaluation import (
    ALL_GROUPS,
    TASK_AUDITS,
    TaskChoice,
    TaskEvaluationSettings,
    _compare,
    _differences,
    abilities_held,
    evaluate_tasks,
    every_item_in_both,
    located,
    scores_finite,
    task_packages,
    task_plugins,
)
from pipelines.tasks import ITEM_SCHEMA
from pipelines.tasks.blimp import Blimp

WORDS = ("man", "dog", "queen", "king", "house", "city", "law", "part", "time", "work")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 40 minimal pairs in three groups and ten questions."""
    root = tmp_path_factory.mktemp("project")
    pairs = [{"paradigm": "order", "good": f"The {word} is here", "bad": f"{word} the here is"} for word in WORDS]
    pairs += [{"paradigm": "number", "good": f"This {word} is", "bad": f"This {word} are"} for word in WORDS]
    pairs += [{"paradigm": "number", "good": f"These {word}s are", "bad": f"These {word}s is"} for word in WORDS]
    pairs += [{"paradigm": "case", "good": f"He sees the {word}", "bad": f"Him sees the {word}"} for word in WORDS]
    questions = [{"question": f"The {word} is", "choices": ["here", "of", "not"], "answer": 0} for word in WORDS]
    pq.write_table(pa.Table.from_pylist(pairs), root / "pairs.parquet")
    pq.write_table(pa.Table.from_pylist(questions), root / "questions.parquet")
    return root


@pytest.fixture(scope="module")
def checkpoint(world: World, base: Manifest) -> Manifest:
    changes = {"phases": ({"tokens": 60 * BATCH * SEQUENCE_LENGTH, "learning_rate": 3e-3},)}
    return world.store.build(world.mixture(base, mixture_of(world, {"wiki": 0.3, "legal": 0.7}), **changes)).manifest


def chosen(root: Path, **changes: object) -> TaskEvaluationSettings:
    tasks = {
        "pairs": TaskChoice(task="blimp", settings={"path": "pairs.parquet"}),
        "multiple_choice": TaskChoice(settings={"path": "questions.parquet"}),
    }
    return located(TaskEvaluationSettings(**{"tasks": tasks, "draws": 300, "threads": 1, **changes}), root)


def request(world: World, settings: TaskEvaluationSettings, base: Manifest, checkpoint: Manifest) -> Build:
    return Build(
        asset="task_evaluation",
        step=evaluate_tasks,
        settings=settings,
        inputs={"base": base, "checkpoint": checkpoint, "tokenizer": world.tokenizer},
        audits=TASK_AUDITS,
        plugins=task_plugins(settings),
        packages=task_packages(settings),
    )


@pytest.fixture(scope="module")
def evaluation(world: World, base: Manifest, checkpoint: Manifest, project: Path) -> Manifest:
    return world.store.build(request(world, chosen(project), base, checkpoint)).manifest


def rows_of(manifest: Manifest) -> dict[tuple[str, str, str], dict]:
    rows = json.loads(manifest.file("tasks.json").read_text())["tasks"]
    return {(row["task"], row["metric"], row["group"]): row for row in rows}


# The step


def test_items_are_the_scores_of_both_checkpoints(
    world: World, base: Manifest, checkpoint: Manifest, evaluation: Manifest, project: Path
) -> None:
    items = [row for row in pq.read_table(evaluation.file("items.parquet")).to_pylist() if row["task"] == "pairs"]
    for manifest, when in ((base, "before"), (checkpoint, "after")):
        model = load_checkpoint(manifest.directory).eval()
        alone = Blimp(path=project / "pairs.parquet").score(model, world.tokenizer.directory).to_pylist()
        expected = {(row["group"], row["item"]): row["score"] for row in alone}
        assert {(row["group"], row["item"]): row[when] for row in items} == expected
    assert any(row["before"] != row["after"] for row in items)


def test_rows_follow_from_the_items(evaluation: Manifest) -> None:
    items, rows = pq.read_table(evaluation.file("items.parquet")).to_pylist(), rows_of(evaluation)
    groups = [("pairs", "acc", name) for name in ("case", "number", "order")]
    groups += [("multiple_choice", metric, "all") for metric in ("acc", "acc_norm")]
    assert set(rows) == {*groups, ("pairs", "acc", ALL_GROUPS)}
    for key in groups:
        mine = [row for row in items if (row["task"], row["metric"], row["group"]) == key]
        row = rows[key]
        assert row["items"] == len(mine) == {"number": 20}.get(key[2], 10)
        for when in ("before", "after"):
            assert row[when] == pytest.approx(np.mean([item[when] for item in mine]))
        assert row["change"] == pytest.approx(row["after"] - row["before"])
        assert row["higher"] == sum(item["after"] > item["before"] for item in mine)
        assert row["lower"] == sum(item["after"] < item["before"] for item in mine)
        assert row["change_low"] <= row["change"] <= row["change_high"]
    whole = rows["pairs", "acc", ALL_GROUPS]
    assert whole["items"] == 40
    assert whole["after"] == pytest.approx(np.mean([rows[key]["after"] for key in groups[:3]]))
    assert evaluation.outcome.metrics["pairs_acc_after"] == whole["after"]
    assert evaluation.counts == {"items": 50, "groups": 4}
    assert set(evaluation.outcome.plots) == {"pairs.png", "multiple_choice.png"}


def test_a_checkpoint_against_itself_has_not_changed(world: World, base: Manifest, project: Path) -> None:
    for row in rows_of(world.store.build(request(world, chosen(project), base, base)).manifest).values():
        assert row["change"] == row["change_low"] == row["change_high"] == row["higher"] == row["lower"] == 0


def test_the_same_input_gives_the_same_bytes(
    world: World, base: Manifest, checkpoint: Manifest, evaluation: Manifest, project: Path, tmp_path: Path
) -> None:
    again = Store(tmp_path / "again").build(request(world, chosen(project), base, checkpoint)).manifest
    assert again.content_sha256 == evaluation.content_sha256


def test_no_task_is_an_evaluation_of_nothing(world: World, base: Manifest, checkpoint: Manifest, project: Path) -> None:
    manifest = world.store.build(request(world, chosen(project, tasks={}), base, checkpoint)).manifest
    assert rows_of(manifest) == {} and manifest.counts == {"items": 0, "groups": 0}


# Settings and identity


def test_blimp_is_the_default(world: World) -> None:
    root = Path(__file__).parents[1]
    settings = located(TaskEvaluationSettings(), root)
    assert list(settings.tasks) == ["blimp"] and list(settings.files) == ["data/eval/blimp.parquet"]
    assert task_plugins(settings) == ("pipelines.tasks.blimp",)
    assert task_packages(settings) == ("torch", "transformers")
    assert "lm-eval" in task_packages(TaskEvaluationSettings(tasks={"harness": TaskChoice(settings={"tasks": ["arc_easy"]})}))


def test_other_items_are_another_evaluation(world: World, base: Manifest, checkpoint: Manifest, project: Path, tmp_path: Path) -> None:
    """The content of the files is the identity, not the place where they lie."""
    for name in ("pairs.parquet", "questions.parquet"):
        (tmp_path / name).write_bytes((project / name).read_bytes())
    here, there = (request(world, chosen(root), base, checkpoint) for root in (project, tmp_path))
    assert here.fingerprint() == there.fingerprint()
    pq.write_table(pq.read_table(tmp_path / "pairs.parquet").slice(1), tmp_path / "pairs.parquet")
    assert request(world, chosen(tmp_path), base, checkpoint).fingerprint() != here.fingerprint()
    with pytest.raises(GristmillError, match="changed since they were hashed"):
        Store(tmp_path / "store").build(there)


def test_what_is_no_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'blimp'"):
        located(TaskEvaluationSettings(tasks={"blimb": TaskChoice()}), tmp_path)
    with pytest.raises(GristmillError, match="tasks.blimp: unknown key 'pth'; did you mean 'path'"):
        located(TaskEvaluationSettings(tasks={"mine": TaskChoice(task="blimp", settings={"pth": "x"})}), tmp_path)
    with pytest.raises(GristmillError, match="no path 'data/eval/blimp.parquet'"):
        located(TaskEvaluationSettings(), tmp_path)


def test_an_item_that_is_named_twice_is_refused(
    world: World, base: Manifest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tasks.blimp.numbered", lambda groups: ["0"] * len(groups))
    with pytest.raises(GristmillError, match="a task gives each item a name of its own"):
        Store(tmp_path / "store").build(request(world, chosen(project), base, base))


# Intervals


def items_of(before: Sequence[float], after: Sequence[float], groups: Sequence[str], weight: Sequence[float] | None = None) -> pa.Table:
    rows = len(before)
    columns = {"task": ["t"] * rows, "group": list(groups), "metric": ["acc"] * rows, "item": [str(n) for n in range(rows)]}
    return pa.table({**columns, "before": before, "after": after, "weight": weight or [1.0] * rows})


def compared(items: pa.Table, **changes: object) -> list[dict]:
    return _compare(TaskEvaluationSettings(**{"draws": 400, **changes}), items)


@pytest.mark.parametrize("weighted", [False, True])
def test_drawing_counts_is_drawing_items(weighted: bool) -> None:
    """The multinomial counts of distinct scores against items drawn one by one: the same distribution."""
    random = np.random.default_rng(0)
    before, after = random.integers(0, 2, (2, 50)).astype(float)
    weight = random.integers(1, 9, 50).astype(float) if weighted else np.ones(50)
    found = np.sort(_differences(np.stack([before, after, weight], axis=1), 20_000, random))
    picks = random.integers(0, 50, (20_000, 50))
    expected = np.sort(((after - before) * weight)[picks].sum(axis=1) / weight[picks].sum(axis=1))
    assert np.abs(found - expected).mean() < 0.01
    assert found.std() == pytest.approx(expected.std(), rel=0.03)


def test_chunks_of_draws_are_all_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.task_evaluation.COUNTS_AT_A_TIME", 100)
    values = np.stack([np.arange(30.0), np.arange(30.0) + 1, np.ones(30)], axis=1)
    assert _differences(values, 50, np.random.default_rng(0)).tolist() == pytest.approx([1.0] * 50)


def simulated(random: np.random.Generator, groups: int, each: int) -> tuple[pa.Table, float]:
    """Items of which 25 % are right in one checkpoint alone; return them and the true change, 0.05."""
    kinds = random.choice(4, size=groups * each, p=[0.45, 0.15, 0.1, 0.3])  # right in both, after, before, neither
    before, after = np.isin(kinds, [0, 2]).astype(float), np.isin(kinds, [0, 1]).astype(float)
    return items_of(before.tolist(), after.tolist(), np.repeat([f"g{n:02d}" for n in range(groups)], each).tolist()), 0.05


@pytest.mark.parametrize(("groups", "each"), [(1, 200), (20, 30)])
def test_intervals_cover_the_true_change(groups: int, each: int) -> None:
    """The interval of the mean of groups, or of the only group; of 400 simulations 93 to 97 % hold it."""
    random, held = np.random.default_rng(0), 0
    for seed in range(400):
        items, truth = simulated(random, groups, each)
        row = compared(items, seed=seed)[-1]
        held += row["change_low"] <= truth <= row["change_high"]
    assert 0.93 <= held / 400 <= 0.97


def test_pairing_narrows_the_interval() -> None:
    random = np.random.default_rng(1)
    before = (random.random(400) < 0.6).astype(float)
    after = np.where(random.random(400) < 0.05, 1 - before, before)
    row = compared(items_of(before.tolist(), after.tolist(), ["g"] * 400))[0]
    alone = 2 * 1.96 * np.sqrt(before.var() / 400 + after.var() / 400)
    assert (row["change_high"] - row["change_low"]) * 2 < alone


def test_the_interval_of_a_group_knows_nothing_of_the_others() -> None:
    items, _ = simulated(np.random.default_rng(2), 3, 40)
    alone = compared(items.filter(pa.compute.equal(items["group"], "g01")))
    assert alone[0] == next(row for row in compared(items) if row["group"] == "g01")
    assert [row["group"] for row in alone] == ["g01"]


def test_weights_count() -> None:
    """Losses per byte: 10 bytes at 2 nats and 30 at 1 are 50 / 40."""
    row = compared(items_of([2.0, 1.0], [1.0, 1.0], ["g", "g"], [10.0, 30.0]))[0]
    assert (row["before"], row["after"]) == pytest.approx((1.25, 1.0))


# Audits


def broken(tmp_path: Path, evaluation: Manifest, column: str, value: float | None) -> Manifest:
    table = pq.read_table(evaluation.file("items.parquet"))
    place = table.schema.get_field_index(column)
    values = [value, *table[column].to_pylist()[1:]]
    pq.write_table(table.set_column(place, column, pa.array(values, pa.float64())), tmp_path / "items.parquet")
    return evaluation.at(tmp_path)


def test_audits_find_what_is_missing_or_not_finite(tmp_path: Path, evaluation: Manifest) -> None:
    assert all(check.passed for check in evaluation.checks if check.blocking)
    draft = broken(tmp_path, evaluation, "after", None)
    assert not every_item_in_both(draft).passed and scores_finite(draft).passed
    draft = broken(tmp_path, evaluation, "before", float("nan"))
    assert every_item_in_both(draft).passed and not scores_finite(draft).passed


def test_an_item_that_one_checkpoint_lacks_is_not_published(
    world: World, base: Manifest, checkpoint: Manifest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Blimp.score, []

    def forgetful(self: Blimp, model: object, tokenizer: Path) -> pa.Table:
        calls.append(1)
        return original(self, model, tokenizer).slice(len(calls) - 1)

    monkeypatch.setattr(Blimp, "score", forgetful)
    with pytest.raises(AuditFailed, match="1 without one of the checkpoint"):
        Store(tmp_path / "store").build(request(world, chosen(project), base, checkpoint))


def test_a_task_that_got_worse_is_told(tmp_path: Path, evaluation: Manifest) -> None:
    def check(metric: str, low: float, high: float) -> bool:
        row = {"task": "t", "metric": metric, "group": "g", "change": (low + high) / 2, "change_low": low, "change_high": high}
        (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [row]}))
        return abilities_held(evaluation.at(tmp_path)).passed

    assert check("acc", -0.2, 0.1) and check("acc", 0.1, 0.2) and not check("acc", -0.2, -0.1)
    assert check("nats_per_byte", -0.2, -0.1) and not check("nats_per_byte", 0.1, 0.2)


def test_the_rows_of_a_task_are_those_of_the_schema(evaluation: Manifest) -> None:
    names = pq.read_schema(evaluation.file("items.parquet")).names
    assert names == ["task", "group", "metric", "item", "before", "after", "weight", "tokens", "bytes"]
    assert {*ITEM_SCHEMA.names, "task"} - {"score"} <= set(names)
