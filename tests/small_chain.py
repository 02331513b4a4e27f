"""The steps from a source to decisions over texts that a test gives: raw, cleaned, scores, signatures, decisions, duplicates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import cleaning, corpus, decisions, deduplication, filtering
from pipelines.documents import partition_file
from pipelines.manifests import Json, Manifest, Member
from pipelines.plugins import load
from pipelines.store import Build, Store

SNAPSHOT = "2026-01-01"
QUALITY = ("gopher_repetition", "encoding", "markup")
TOXICITY = ("toxic_words",)
PROSE = (
    "The mill stood by the river, and the miller lived in the house beside it with his wife and three children. Every "
    "morning he opened the gate to let the water run. The stones began to turn, and dust rose over number {}. Farmers came with "
    "carts of wheat and rye from the villages that lay behind the hill, and they waited until their {} sacks were filled with flour."
)
REPEATED = "Buy our cheap watches today.\n" * 30


@dataclass(frozen=True)
class Chain:
    """The artifacts of one domain, as its recipe sees them."""

    raw: Manifest
    cleaned: Manifest
    quality_scores: Manifest
    toxicity_scores: Manifest
    signatures: Manifest
    clusters: Manifest
    quality: Manifest
    toxicity: Manifest
    deduplicated: Manifest


def mill(
    store: Store,
    root: Path,
    lines: Sequence[Mapping[str, Json] | str],
    *,
    domain: str = "wiki",
    recipe: str = "tiny",
    max_words: float = 0.0,
) -> Chain:
    """Write `lines` as JSON Lines (a string as it is) under `root` and run every step up to the deduplicated corpus."""
    root.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (root / "a.jsonl").write_text(text, encoding="utf-8")
    key = f"{domain}|{SNAPSHOT}"
    made = corpus.corpus_settings(domain, SNAPSHOT, "jsonl", {"paths": ["a.jsonl"]}, root)
    raw = store.build(Build("raw_corpus", corpus.ingest, made, key, audits=corpus.CORPUS_AUDITS)).manifest
    return decide(store, raw, key, recipe=recipe, max_words=max_words)


def decide(store: Store, raw: Manifest, key: str, *, recipe: str = "tiny", max_words: float = 0.0) -> Chain:
    """Run every step after ingestion."""
    domain, snapshot = key.split("|")
    cleaned = store.build(
        Build("cleaned_corpus", cleaning.clean_corpus, cleaning.CleaningSettings(), key, {"raw": raw}, cleaning.CLEANING_AUDITS)
    ).manifest
    collected, thresholds = {}, {}
    for stage, names in (("quality", QUALITY), ("toxicity", TOXICITY)):
        families = tuple(_scored(store, stage, name, cleaned, key) for name in names)
        settings = filtering.CollectSettings(domain=domain, snapshot=snapshot)
        inputs = {"cleaned": cleaned, "families": families}
        build = Build(f"{stage}_scores", filtering.collect_scores, settings, key, inputs, filtering.COLLECT_AUDITS)
        collected[stage] = store.build(build).manifest
        thresholds[stage] = {rule: bound for name in names for rule, bound in decisions.default_thresholds(name).items()}
    thresholds["quality"].pop("markup.digit_fraction")
    thresholds["toxicity"]["toxic_words.listed_word_fraction"] = decisions.Threshold(keep="at_most", value=max_words)
    signing = Build("duplicate_signatures", deduplication.sign_documents, deduplication.SignatureSettings(), key, {"cleaned": cleaned})
    signatures = store.build(signing).manifest
    clustering = deduplication.ClusterSettings(order=(key,), held_out={domain: 0.2})
    clusters = store.build(
        Build("duplicate_clusters", deduplication.cluster_documents, clustering, inputs={"signatures": (signatures,)})
    ).manifest
    quality = _filtered(store, "quality", recipe, collected["quality"], {domain: thresholds["quality"]})
    toxicity = _filtered(store, "toxicity", recipe, collected["toxicity"], {domain: thresholds["toxicity"]}, previous=quality)
    inputs = {
        "decisions": toxicity,
        "clusters": (Member(manifest=clusters, name=f"splits/{partition_file(key)}"),),
        "signatures": (signatures,),
    }
    settings = deduplication.DeduplicationSettings()
    deduplicated = store.build(Build("deduplicated_corpus", deduplication.deduplicate, settings, recipe, inputs)).manifest
    return Chain(raw, cleaned, collected["quality"], collected["toxicity"], signatures, clusters, quality, toxicity, deduplicated)


def _scored(store: Store, stage: str, name: str, cleaned: Manifest, key: str) -> Manifest:
    settings = filtering.ScoreSettings(filter=name)
    plugins, packages = (f"pipelines.filters.{name}",), load("filters", name).packages  # type: ignore[attr-defined]
    inputs = {"cleaned": cleaned}
    return store.build(
        Build(f"{stage}_scores.{name}", filtering.score_documents, settings, key, inputs, filtering.SCORE_AUDITS, plugins, packages)
    ).manifest


def _filtered(
    store: Store,
    stage: str,
    recipe: str,
    scores: Manifest,
    thresholds: Mapping[str, Mapping[str, decisions.Threshold]],
    *,
    previous: Manifest | None = None,
) -> Manifest:
    settings = decisions.FilterSettings.model_validate({"thresholds": thresholds})
    inputs = {"scores": (scores,), **({"previous": previous} if previous else {})}
    audits = tuple(audit for audit in decisions.FILTER_AUDITS if audit is not decisions.something_left)
    return store.build(Build(f"{stage}_filtered_corpus", decisions.filter_corpus, settings, recipe, inputs, audits)).manifest
