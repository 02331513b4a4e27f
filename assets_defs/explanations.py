"""`gristmill explain`: the artifacts that speak of a document, and what they say as text or JSON."""

import json
import math
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assets_defs.exports import DECISIONS
from assets_defs.resources import Mill, load_recipes
from pipelines.documents import split_partition
from pipelines.errors import MissingArtifact
from pipelines.explanation import Decided, Evidence, Explanation, Finding, Place, explain, find, written
from pipelines.manifests import Json, Manifest

SIGNS = {"at_least": "≥", "at_most": "≤"}
STYLES = {"fails": "bold red", "off": "dim", "does not apply": "dim", "label": "dim"}


def explain_document(mill: Mill, name: str, recipe: str) -> Explanation:
    """Return every stage of the document that `name` stands for, as recipe `recipe` decided.

    Raises:
        UnknownName: there is no such recipe.
        MissingArtifact: nothing was ingested.
        GristmillError: the name stands for no document, or for several.
    """
    load_recipes()[recipe]
    raw = [mill.store.current("raw_corpus", key) for key in mill.store.partitions("raw_corpus")]
    if not raw:
        raise MissingArtifact("nothing was ingested; materialize raw_corpus first (`gristmill run`, or job `ingest`)")
    place = find(name, raw)
    return explain(place, _evidence(mill, place, recipe, raw))


def _evidence(mill: Mill, place: Place, recipe: str, raw: list[Manifest]) -> Evidence:
    decided = {asset: _decided(mill, asset, recipe, place) for asset in DECISIONS}
    last = decided["deduplicated_corpus"]
    return Evidence(
        recipe=recipe,
        raw=next(manifest for manifest in raw if manifest.partition == place.partition),
        cleaned=_current(mill, "cleaned_corpus", place.partition),
        decided=decided,
        clusters=_read_by(mill, last.decisions, "clusters") if last else _current(mill, "duplicate_clusters", None),
        selection=_current(mill, "selected_subset", recipe),
    )


def _decided(mill: Mill, asset: str, recipe: str, place: Place) -> Decided | None:
    decisions = _current(mill, asset, recipe)
    return decisions and Decided(decisions, _read_by(mill, decisions, "scores", place.partition))


def _current(mill: Mill, asset: str, partition: str | None) -> Manifest | None:
    return mill.store.current(asset, partition) if mill.store.is_current(asset, partition) else None


def _read_by(mill: Mill, manifest: Manifest, name: str, partition: str | None = None) -> Manifest | None:
    """Return the artifact that `manifest` was made from, which need not be the current one; for decisions over scores, of `partition`."""
    references = [r for r in manifest.inputs.get(name, ()) if partition is None or r.partition == partition]
    return mill.store.find(references[0].asset, references[0].fingerprint) if references else None


def as_json(explanation: Explanation) -> str:
    """Return the explanation as one JSON object; a score that does not apply is null."""
    end = explanation.end
    verdict = {"verdict": end.verdict, "ended_at": end.stage, "reason": end.reason}
    head = {"id": explanation.id, "partition": explanation.partition, "recipe": explanation.recipe, **verdict}
    return json.dumps(head | {"stages": [finite(asdict(stage)) for stage in explanation.stages]}, ensure_ascii=False, default=str)


def finite(value: Json) -> Json:
    """Return `value` with numbers that are none, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(explanation: Explanation, console: Console) -> None:
    """Print the explanation: one line where it ended, then every stage with its facts and scores."""
    domain, snapshot = split_partition(explanation.partition)
    end = explanation.end
    console.print(f"{explanation.id}  ({domain}, {snapshot[:7]}; recipe {explanation.recipe})", style="bold", markup=False)
    console.print(f"{end.verdict} at {end.stage}{f': {end.reason}' if end.reason else ''}\n", markup=False)
    for stage in explanation.stages:
        _show_stage(stage, console)


def _show_stage(stage: Finding, console: Console) -> None:
    style = {"dropped": "bold red", "quarantined": "bold red", "kept": "green", "selected": "green"}.get(stage.verdict, "dim")
    console.print(f"{stage.stage}: {stage.verdict}{f' ({stage.reason})' if stage.reason else ''}", style=style, markup=False)
    for key, value in stage.facts.items():
        if key != "listed":
            console.print(f"  {key.replace('_', ' ')}: {written(value)}", markup=False)
    if passages := stage.facts.get("listed"):
        console.print(_table(passages))
    if stage.scores:
        rows = Table(box=None, pad_edge=False, padding=(0, 2))
        for column in ("  rule", "score", "threshold", "verdict"):
            rows.add_column(column, justify="right" if column in ("score", "threshold") else "left")
        for found in stage.scores:
            bound = f"{SIGNS.get(found.keep or '', '')} {written(found.threshold)}" if found.keep else ""
            rows.add_row(f"  {found.rule}", escape(written(found.score)), bound, found.verdict, style=STYLES.get(found.verdict))
        console.print(rows)


def _table(passages: Json) -> Table:
    rows = Table(box=None, pad_edge=False, padding=(0, 2))
    listed = passages if isinstance(passages, list) else []
    for column in listed[0]:
        rows.add_column(column.replace("_", " "), justify="right")
    for row in listed:
        rows.add_row(*(escape(written(value)) for value in row.values()))
    return rows
