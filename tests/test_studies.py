"""The studies of data decisions: parts that make up the whole, one set of windows, and figures by hand."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import studies
from benchmarks.selection_pool import LENGTH
from benchmarks.study_pool import StudyPool, Thresholds, study_pool
from benchmarks.study_runs import MAX_EPOCHS, Plan, Sampling, Variant, capped_shares, compared, jobs_of, slope_over_distance, work
from benchmarks.study_toxicity import neutral_prompts
from pipelines.configuration import read_project, read_recipe
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.recipes import Recipe
from pipelines.tasks._continuations import maximum_toxicity, sampled_continuations

ROOT = Path(__file__).parents[1]
PROJECT = """
name: studies
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01"]
fit_on: ["2026-01-01"]
source: parquet
source_settings: {paths: [all.parquet], where: {domain: "{domain}"}}
quality: {gopher_quality: {words: whitespace}, age: {}}
toxicity: {toxicity: {}, topics: {}}
tokenizer: {vocabulary_size: 512}
domains:
  wiki: {}
  math: {quality: {gopher_quality: {num_words: 20, mean_word_length: off, alphabetic_word_fraction: off, num_stop_words: off}}}
  url: {quality: {gopher_quality: off, age: off}, toxicity: {toxicity: off}}
"""
RECIPE = """
description: Thresholds of a toxicity study
roles: {general: [wiki, url], target: [math]}
toxicity: {filters: {toxicity: {document_probability: 0.03, sentence_probability_max: off}}, domains: {math: {toxicity: off}}}
selection: {budget: {general: {fraction: 0.25}, target: {fraction: 0.5}}}
model: {hidden_size: 48, num_layers: 2, num_heads: 2, intermediate_size: 128}
general: {tokens: 1000, learning_rate: 1.0e-3}
mixture: {ratios: [0.2, 0.5], phase: {tokens: 1000, learning_rate: 1.0e-3}}
pretraining: [{tokens: 1000, learning_rate: 1.0e-3}]
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> StudyPool:
    """A small pool of clean and dirty documents of three domains; `prose` stands for one that the project does not know."""
    directory = tmp_path_factory.mktemp("studies")
    query = """copy (select text, if(domain = 'wiki' and file like '%dirty%', 'prose', domain) as domain, date from
        (select *, row_number() over (partition by domain, file order by id) as place from
            (select *, filename as file from read_parquet($paths, filename = true)))
        where place <= case domain when 'wiki' then 500 when 'math' then 400 when 'url' then 6 else 0 end) to '{}'"""
    paths = [str(ROOT / "data" / "sample" / name) for name in ("corpus.parquet", "dirty.parquet")]
    duckdb.sql(query.format(directory / "all.parquet"), params={"paths": paths})
    for name, text in (("project.yaml", PROJECT), ("recipe.yaml", RECIPE)):
        (directory / name).write_text(text, encoding="utf-8")
    thresholds = Thresholds.read(directory / "project.yaml", directory / "recipe.yaml", {"prose": "wiki"})
    return study_pool([directory / "all.parquet"], directory / "store", thresholds, max_bytes=10**9)


def kept(part: Manifest, split: str) -> set[str]:
    table = pq.read_table(part.file("decisions.parquet")).to_pylist()
    return {row["id"] for row in table if row["kept"] and row["split"] == split}


def trained_on(pool: StudyPool, part: Manifest) -> set[str]:
    return set(pq.read_table(pool.selection(part).file("general.parquet"))["id"].to_pylist())


# Parts


@pytest.mark.parametrize("stage", ["quality", "toxicity"])
def test_what_a_filter_keeps_and_what_it_drops_make_up_the_whole(pool: StudyPool, stage: str) -> None:
    parts = {mode: pool.filtered(stage, mode, pool.documents) for mode in ("keep", "off", "inverse")}  # type: ignore[arg-type]
    unruled = {"quality": ["url"], "toxicity": ["math", "url"]}[stage]  # domains without rules are whole in every mode
    ruled = [domain for domain in pool.domains if domain not in unruled]
    for split in ("train", "held_out"):
        keep, inverse = (kept(pool.of_domains(parts[mode], ruled), split) for mode in ("keep", "inverse"))
        assert keep and inverse and not keep & inverse
        assert keep | inverse == kept(pool.of_domains(pool.documents, ruled), split)
        assert kept(parts["off"], split) == kept(pool.documents, split)
        assert len({frozenset(kept(pool.of_domains(part, unruled), split)) for part in parts.values()}) == 1
    dropped = pool.without(pool.documents, parts["keep"])
    assert kept(dropped, "held_out") == kept(pool.of_domains(parts["inverse"], ruled), "held_out")


def test_a_domain_that_the_project_does_not_know_takes_the_thresholds_of_another(pool: StudyPool) -> None:
    found = pool.thresholds.of("quality", ["prose", "wiki", "math", "stranger"])
    assert found["prose"] == found["wiki"] == found["stranger"] != found["math"]
    assert "gopher_quality.num_stop_words" in found["prose"] and "gopher_quality.num_stop_words" not in found["math"]
    with pytest.raises(GristmillError, match="wikki"):
        Thresholds.read(ROOT / "project.yaml", ROOT / "recipes" / "toxicity-filtered.yaml", {"prose": "wikki"})


def test_a_fitted_filter_learns_from_the_domains_that_are_like_its_own() -> None:
    project = read_project(ROOT / "project.yaml")
    recipe = read_recipe(ROOT / "recipes" / "toxicity-filtered.yaml", project)
    thresholds = Thresholds(project, recipe, {"manual": "techdoc"})
    fitted = thresholds.fitted(["manual", "wiki", "stranger"])
    assert fitted["perplexity"].settings["good"] == ["manual", "wiki"]
    assert thresholds.fitted(["stranger"]) == {}


def test_a_selection_is_the_training_split_of_its_part(pool: StudyPool) -> None:
    part = pool.filtered("quality", "keep", pool.documents)
    assert trained_on(pool, part) == kept(part, "train")
    tokens = pool.selection(part).outcome.details["tokens"]
    without = pool.selection(pool.of_domains(part, ["wiki", "prose", "url"])).outcome.details["tokens"]
    assert without == {domain: count for domain, count in tokens.items() if domain != "math"}  # type: ignore[union-attr]


def test_periods_are_in_time_order_and_share_no_document(pool: StudyPool) -> None:
    whole = pool.of_domains(pool.documents, ["math"])
    periods = pool.by_age(whole, 3)
    assert len(periods) == 3
    assert [period.year for period in periods] == sorted(period.year for period in periods)
    named = [kept(period.documents, split) for period in periods for split in ("train", "held_out")]
    assert set.union(*named) == kept(whole, "train") | kept(whole, "held_out")
    assert sum(map(len, named)) == len(set.union(*named))
    assert pool.by_age(pool.of_domains(pool.documents, ["wiki"]), 3) == []


# Windows


def test_all_variants_are_measured_on_the_same_windows_and_train_on_none_of_them(pool: StudyPool, tmp_path: Path) -> None:
    on, inverse = (pool.filtered("quality", mode, pool.documents) for mode in ("keep", "inverse"))  # type: ignore[arg-type]
    windows = studies.filter_windows(pool, pool.documents, on, 10)
    assert set(windows) >= {"wiki", "math", studies.DROPPED}
    variants = [Variant(name, pool.selection(part), {"wiki": 1.0}) for name, part in (("on", on), ("off", pool.documents))]
    variants.append(Variant("inverse", pool.selection(inverse), {"prose": 1.0}))
    jobs = jobs_of(pool, tmp_path / "runs", variants, windows, Plan(1_000, (0, 1), 10, 1), None)
    assert [(job["variant"], job["seed"]) for job in jobs] == [(v, s) for v in ("on", "off", "inverse") for s in (0, 1)]
    assert len({job["held_out"] for job in jobs}) == 1
    with np.load(jobs[0]["held_out"]) as written:
        assert all(np.array_equal(written[group], found) for group, found in windows.items())
    held = {name for found in pool.held_out(pool.documents).values() for name in found.ids}
    assert held == kept(pool.documents, "held_out")
    assert not held & set.union(*(trained_on(pool, part) for part in (on, inverse, pool.documents)))


def test_windows_of_what_the_filter_drops_hold_no_document_that_it_keeps(pool: StudyPool) -> None:
    on = pool.filtered("quality", "keep", pool.documents)
    dropped = pool.held_out(pool.without(pool.documents, on))
    assert {name for found in dropped.values() for name in found.ids} == kept(pool.documents, "held_out") - kept(on, "held_out")
    tokens = sum(found.num_tokens for found in dropped.values())
    assert len(pool.windows(list(dropped.values()), 10**6)) == tokens // LENGTH


# Runs


def test_a_run_depends_on_its_job_alone(pool: StudyPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the process trained before it; so that a child may train several."""
    windows = {"wiki": studies.domain_windows(pool, pool.documents, 8)["wiki"]}
    everything = pool.selection(pool.documents)
    variants = [Variant("all", everything, everything.outcome.details["tokens"]), Variant("math", everything, {"math": 1.0})]  # type: ignore[arg-type]
    sampling = Sampling({"neutral": neutral_prompts(pool.held_out(pool.documents), 3)}, samples=2, new_tokens=6)
    found = []
    for name, order in (("one", (0, 1)), ("other", (1, 0))):
        jobs = jobs_of(pool, tmp_path / name, variants, windows, Plan(2 * 16 * LENGTH, (0,), 4, 1), sampling)
        (tmp_path / "jobs.json").write_text(json.dumps([jobs[number] for number in order]), encoding="utf-8")
        work(tmp_path / "jobs.json")
        runs = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        found.append({run["variant"]: {key: run[key] for key in ("losses", "epochs", "continuations")} for run in runs})
    assert found[0] == found[1]
    assert found[0]["all"]["losses"] != found[0]["math"]["losses"]
    assert [len(texts) for texts in found[0]["all"]["continuations"]["neutral"]] == [2, 2, 2]


def test_prompts_are_openings_of_the_domains_in_turn(pool: StudyPool) -> None:
    held_out = pool.held_out(pool.documents)
    prompts = neutral_prompts(held_out, 4)
    long = {domain: next((t for t in found.tokens if len(t) >= 48), None) for domain, found in sorted(held_out.items())}
    first = [tokens[:24].tolist() for tokens in long.values() if tokens is not None]
    assert prompts[: len(first)] == first[:4]
    assert {len(prompt) for prompt in prompts} == {24}


def test_continuations_of_a_prompt_do_not_depend_on_prompts_of_other_lengths(pool: StudyPool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))
    asked = {"tokenizer": pool.tokenizer.directory, "samples": 3, "new_tokens": 5, "end_of_text": 0}
    both = sampled_continuations(model, prompts=[[5, 6, 7], [8, 9]], seed=1, **asked)
    assert [len(texts) for texts in both] == [3, 3]
    assert both[1:] == sampled_continuations(model, prompts=[[8, 9]], seed=1, **asked)
    assert both != sampled_continuations(model, prompts=[[5, 6, 7], [8, 9]], seed=2, **asked)


# Figures


@given(
    wanted=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 1), min_size=1),
    available=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 100_000)),
    tokens=st.integers(1_000, 100_000),
)
def test_capped_shares_sum_to_one_and_read_no_domain_too_often(wanted: dict, available: dict, tokens: int) -> None:
    there = {domain: count for domain, count in available.items() if count > 2 * LENGTH and domain in wanted}
    if MAX_EPOCHS * sum(there.values()) < tokens:
        with pytest.raises(GristmillError, match="fewer --tokens"):
            capped_shares(wanted, available, tokens)
        return
    shares = capped_shares(wanted, available, tokens)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share * tokens <= MAX_EPOCHS * there[domain] * (1 + 1e-6) for domain, share in shares.items())
    free = [domain for domain in shares if shares[domain] * tokens < MAX_EPOCHS * there[domain] * (1 - 1e-6)]
    assert len({round(shares[domain] / wanted[domain], 6) for domain in free}) <= 1


def test_capped_shares_by_hand() -> None:
    available = {"a": 100_000, "b": 100_000, "c": 500, "d": 256}
    assert capped_shares({"a": 3, "b": 1}, available, 10_000) == {"a": 0.75, "b": 0.25}
    found = capped_shares({"a": 2, "b": 1, "c": 1, "d": 1}, available, 10_000)  # c has 4 * 500 tokens, d less than two windows
    assert found == pytest.approx({"a": 2 / 3 * 0.8, "b": 1 / 3 * 0.8, "c": 0.2})


def test_maximum_toxicity_by_hand() -> None:
    found = maximum_toxicity(np.array([[0.1, 0.7, 0.2], [0.3, 0.4, 0.2], [0.5, 0.0, 0.0]]))
    assert found["expected_maximum"].tolist() == [0.7, 0.4, 0.5]
    assert found["any_toxic"].tolist() == [1.0, 0.0, 1.0]
    runs = [
        {"variant": variant, "seed": 0, "continuations": {"neutral": [["you are an idiot", "hello"], [second, "hello"]]}}
        for variant, second in (("off", "a fine day"), ("on", "you stupid idiot"))
    ]
    rows = studies.toxicity_of(runs)
    assert rows["neutral: probability of a toxic one"]["off"][0] == 0.5
    assert rows["neutral: probability of a toxic one"]["on"][0] == 0.5  # a difference: 1 - 0.5
    assert rows["neutral: expected maximum toxicity"]["on"][0] > 0.2


YEARS = {"early": 1990.0, "middle": 2000.0, "late": 2015.0}


def test_slope_over_distance_by_hand() -> None:
    """0.3 nats per decade, beside what each period teaches and how hard it is."""
    taught, hard = {"early": 0.5, "middle": 0.0, "late": 0.2}, {"early": 4.0, "middle": 3.0, "late": 5.0}
    losses = {
        one: {other: np.full((2, 5), taught[one] + hard[other] + 0.03 * abs(YEARS[one] - YEARS[other])) for other in YEARS} for one in YEARS
    }
    assert slope_over_distance(losses, YEARS) == pytest.approx([0.3, 0.3, 0.3])


def test_slope_over_distance_is_that_of_least_squares() -> None:
    draw = np.random.Generator(np.random.Philox(key=5))
    losses = {one: {other: draw.normal(size=(3, 7)) for other in YEARS} for one in YEARS}
    names = list(YEARS)
    rows, values = [], []
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            rows.append([abs(YEARS[one] - YEARS[other]) / 10, *np.eye(3)[i], *np.eye(3)[j]])
            values.append(losses[one][other].mean())
    slope = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0][0]
    found = slope_over_distance(losses, YEARS)
    assert found[0] == pytest.approx(slope, abs=1e-5)
    assert found[1] < found[0] < found[2]


def test_differences_are_to_the_baseline_in_the_mean_of_groups() -> None:
    base = {"a": np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), "b": np.array([[5.0, 6.0], [5.0, 6.0]])}
    losses = {"off": base, "on": {"a": base["a"] - 0.2, "b": base["b"] - 0.4}}
    assert compared(losses, "on", "off", ["a", "b"]) == pytest.approx([-0.3, -0.3, -0.3])
    row = studies.row_of(losses, ["a", "b"], "off")
    assert row["off"][0] == 3.75 and row["on"][0] == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("interval", "above", "says"),
    [
        ([0.2, 0.1, 0.3], True, "appears"),
        ([-0.2, -0.3, -0.1], True, "the opposite"),
        ([0.1, -0.1, 0.3], True, "not seen"),
        ([-0.2, -0.3, -0.1], False, "appears"),
        ([0.2, 0.1, 0.3], False, "the opposite"),
        (None, True, "not measured"),
    ],
)
def test_a_finding_is_what_the_interval_says(interval: list[float] | None, above: bool, says: str) -> None:
    assert str(studies.verdict("a finding", interval, above=above)["here"]).startswith(says)


def test_findings_of_domains_count_the_intervals() -> None:
    itself = {"a": [0.5, 0.4, 0.6], "b": [0.1, -0.1, 0.3]}
    others = {"a": [-0.2, -0.3, -0.1], "b": [0.0, -0.1, 0.1]}
    found = studies.domain_findings(itself, others, {"a": [0.3, 0.2, 0.4], "b": [0.1, 0.0, 0.2]})
    assert [str(line["here"]) for line in found[:2]] == [
        "rises for 1 of 2 (a), falls for 0 (none)",
        "rises for 0 of 2 (none), falls for 1 (a)",
    ]
    assert str(found[3]["here"]).startswith("a +0.3000")


# Recipes


STUDIES = {
    ("quality-on", "quality-off", "quality-inverse"): "quality",
    ("toxicity-filtered", "toxicity-off", "toxicity-inverse"): "toxicity",
    ("age-until-1900", "age-since-1900"): "quality",
    ("domains-all", "domains-without-wiki"): "roles",
}


@pytest.mark.parametrize("names", STUDIES, ids=lambda names: names[0])
def test_the_recipes_of_a_study_differ_in_what_it_studies_alone(names: tuple[str, ...]) -> None:
    """So that what a comparison of them finds is due to that; and all are measured on documents that it does not touch."""
    project = read_project(ROOT / "project.yaml")
    baseline, *others = (read_recipe(ROOT / "recipes" / f"{name}.yaml", project) for name in names)
    for other in others:
        compared = baseline.evaluation.model_copy(update={key: getattr(other.evaluation, key) for key in ("reference", "baseline")})
        whole = baseline.model_copy(update={"evaluation": compared})
        changed = {key for key in Recipe.model_fields if getattr(whole, key) != getattr(other, key)}
        assert changed == {"description", STUDIES[names]}
        assert "wikitext" in other.roles.evaluation
        if STUDIES[names] != "roles":
            assert other.filter_settings(project, STUDIES[names]).thresholds["wikitext"] == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [names for names in STUDIES if len(names) == 3], ids=lambda names: names[0])
def test_the_recipes_of_a_filter_have_its_three_modes_and_the_same_thresholds(names: tuple[str, ...]) -> None:
    project, stage = read_project(ROOT / "project.yaml"), STUDIES[names]
    found = [read_recipe(ROOT / "recipes" / f"{name}.yaml", project).filter_settings(project, stage) for name in names]  # type: ignore[arg-type]
    assert [settings.mode for settings in found] == ["keep", "off", "inverse"]
    assert found[0].thresholds == found[1].thresholds == found[2].thresholds
    assert found[0].thresholds["wiki"] and not found[0].thresholds["code"]  # inverse keeps a domain without rules whole


def test_the_recipes_of_age_part_the_dated_documents() -> None:
    project = read_project(ROOT / "project.yaml")
    early, late = (read_recipe(ROOT / "recipes" / f"age-{name}-1900.yaml", project) for name in ("until", "since"))
    rules = [recipe.filter_settings(project, "quality").thresholds["speech"] for recipe in (early, late)]
    assert rules[0]["age.not_after"].value == rules[1]["age.not_before"].value == 1900
    assert all(found["age.dated"].value == 1 for found in rules)
