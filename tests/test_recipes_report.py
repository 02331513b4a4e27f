"""The page over all recipes: families are those of the same documents, its numbers are those of the losses, and it stands alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from pipelines.errors import GristmillError
from pipelines.manifests import Json, Manifest, Outcome
from pipelines.paired_bootstrap import holm
from pipelines.plugins import Settings
from pipelines.recipes_report import RECIPES_REPORT_AUDITS, RecipeFacts, RecipesReportSettings, write_recipes_report
from pipelines.store import Build, Store

ROLES = {"wiki": "general", "book": "general", "code": "target"}
RECIPES = ("better", "base", "same", "lonely")
CHANGES = {"better": -0.3, "base": 0.0, "same": 0.0, "lonely": 0.0}
"""Of the loss of code, against `base`."""


class Stub(Settings):
    """An artifact as another step would write it."""

    recipe: str
    rows: tuple[dict[str, Json], ...] = ()
    roles: dict[str, str] = Field(default_factory=lambda: dict(ROLES))
    evaluator: str = "held_out_loss"
    evaluator_settings: dict[str, Json] = Field(default_factory=dict)
    max_tokens_per_domain: int = 1000
    outcome: dict[str, Json] = Field(default_factory=dict)


def publish(settings: Stub, out: Path, **_: object) -> Outcome:
    """Write the documents of `settings`, where it has some."""
    if settings.rows:
        pq.write_table(pa.Table.from_pylist(list(settings.rows)), out / "documents.parquet")
    else:
        (out / "recipe.txt").write_text(settings.recipe)
    return Outcome.model_validate(settings.outcome)


def stub(store: Store, asset: str, recipe: str, inputs: dict[str, Manifest] | None = None, **settings: object) -> Manifest:
    build = Build(asset=asset, partition=recipe, step=publish, settings=Stub(recipe=recipe, **settings), inputs=inputs or {})
    return store.build(build).manifest


def documents(recipe: str) -> list[dict[str, Json]]:
    """Return 40 documents a domain; the losses of a recipe differ from those of `base` by noise, and on code by `CHANGES`."""
    rows: list[dict[str, Json]] = []
    for place, domain in enumerate(ROLES):
        common = np.random.Generator(np.random.Philox(key=[5, place]))
        own = np.random.Generator(np.random.Philox(key=[RECIPES.index(recipe), place + 50]))
        for number in range(40):
            tokens, before = int(common.integers(50, 500)), float(common.normal(4.0, 0.3))
            after = before - 0.5 + float(own.normal(CHANGES[recipe] * (domain == "code"), 0.02))
            row = {"id": f"{domain}-{number}", "domain": domain, "tokens": tokens, "bytes": 4 * tokens}
            rows.append({**row, "nll_before": before * tokens, "nll_after": after * tokens})
    return rows


def artifacts(store: Store, recipe: str) -> dict[str, Manifest]:
    """Publish what the page reads of `recipe`; `lonely` was measured on documents of its own."""
    decisions = stub(store, "deduplicated_corpus", "lonely" if recipe == "lonely" else "shared", outcome={"counts": {"kept": 90}})
    held_out = [{"domain": "all general", "role": "general", "loss_after": 3.5, "loss_change": 0.01, "bits_per_byte_after": 1.3}]
    held_out += [
        {"domain": "code", "role": "target", "loss_after": 3.2, "loss_change": -0.5, "loss_change_low": -0.6, "loss_change_high": -0.4}
    ]
    tables = {"tables": {"held_out": held_out}}
    task = {
        "task": "blimp",
        "metric": "acc",
        "items": 10,
        "before": 0.5,
        "after": 0.6,
        "change": 0.1,
        "change_low": 0.0,
        "change_high": 0.2,
    }
    return {
        "evaluations": stub(store, "evaluation", recipe, {"decisions": decisions}, rows=tuple(documents(recipe)), outcome=tables),
        "general": stub(store, "general_checkpoint", recipe),
        "checkpoints": stub(store, "pretrained_checkpoint", recipe, outcome={"counts": {"tokens": 1234}}),
        "deduplicated": decisions,
        "selections": stub(
            store, "selected_subset", recipe, outcome={"counts": {"general_selected_tokens": 7, "target_selected_tokens": 5}}
        ),
        "ratios": stub(store, "verified_ratio", recipe, outcome={"details": {"decision": "estimate"}}),
        "mixtures": stub(store, "domain_mixture", recipe, outcome={"metrics": {"target_share": 0.4321}}),
        "tasks": stub(store, "task_evaluation", recipe, outcome={"tables": {"tasks": [task]}}),
        "comparisons": stub(store, "comparison", recipe),
    }


def written(store: Store, recipes: tuple[str, ...], *, description: str = "d", missing: tuple[str, ...] = ()) -> Manifest:
    made = [artifacts(store, recipe) for recipe in recipes]
    facts = tuple(RecipeFacts(name=recipe, description=description, baseline="base" if recipe == "better" else None) for recipe in recipes)
    settings = RecipesReportSettings(recipes=facts, missing=missing, draws=1000)
    names = list(artifacts(store, "base"))
    inputs = {name: tuple(one[name] for one in made) for name in names}
    build = Build(asset="recipes_report", step=write_recipes_report, settings=settings, inputs=inputs, audits=RECIPES_REPORT_AUDITS)
    return store.build(build).manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_recipes_of_the_same_documents_are_compared_and_others_are_not(store: Store) -> None:
    record = json.loads(written(store, RECIPES, missing=("never",)).file("recipes.json").read_text())
    (family,) = record["families"]
    assert family == {"baseline": "base", "recipes": ["better", "same"]}, "the one that others name is the baseline"
    rows = {(row["recipe"], row["name"]): row for row in record["rows"]}
    assert set(rows) == {(recipe, name) for recipe in ("better", "same") for name in ("wiki", "book", "code", "general")}
    assert rows["better", "code"]["verdict"] == "better"
    assert rows["better", "code"]["loss_change_low"] < -0.3 < rows["better", "code"]["loss_change_high"]
    assert all(row["verdict"] == "no difference" for key, row in rows.items() if key != ("better", "code"))


def test_the_correction_goes_over_all_rows_of_the_family(store: Store) -> None:
    rows = json.loads(written(store, RECIPES).file("recipes.json").read_text())["rows"]
    assert len(rows) == 8
    assert [row["p_adjusted"] for row in rows] == pytest.approx(holm([row["p_value"] for row in rows]))


def test_a_difference_is_that_of_the_documents(store: Store) -> None:
    rows = json.loads(written(store, RECIPES).file("recipes.json").read_text())["rows"]
    found = next(row for row in rows if (row["recipe"], row["name"]) == ("better", "code"))
    nats = [sum(row["nll_after"] for row in documents(name) if row["domain"] == "code") for name in ("base", "better")]
    tokens = sum(row["tokens"] for row in documents("base") if row["domain"] == "code")
    assert found["loss_change"] == pytest.approx((nats[1] - nats[0]) / tokens)


def test_the_page_says_what_was_read_and_names_what_is_missing(store: Store) -> None:
    manifest = written(store, RECIPES, missing=("never",))
    html = manifest.file("recipes.html").read_text()
    assert all(check.passed for check in manifest.checks), manifest.checks
    for shown in ("0.432", "1,234", "never", "Against base", "blimp", "−0.500 [−0.600, −0.400]"):
        assert shown in html, shown
    assert set(manifest.outcome.plots) == {"family_1.png", "trade_off.png"}
    assert manifest.outcome.counts == {"recipes": 4, "families": 1, "compared": 8}


def test_one_recipe_makes_a_page_without_a_family(store: Store) -> None:
    manifest = written(store, ("base",))
    assert manifest.outcome.counts["families"] == 0 and all(check.passed for check in manifest.checks)


def test_a_description_is_never_markup(store: Store) -> None:
    manifest = written(store, ("base",), description='<script src="http://example.invalid/x.js"></script>')
    assert "<script" not in manifest.file("recipes.html").read_text()


def test_without_a_recipe_it_is_refused(store: Store) -> None:
    with pytest.raises(GristmillError, match="no recipe was evaluated"):
        written(store, ())


def test_the_same_manifests_give_the_same_bytes(tmp_path: Path, store: Store) -> None:
    first, second = (written(Store(tmp_path / name), ("base", "same")) for name in "ab")
    assert first.file("recipes.json").read_bytes() == second.file("recipes.json").read_bytes()
    assert first.file("family_1.png").read_bytes() == second.file("family_1.png").read_bytes()
