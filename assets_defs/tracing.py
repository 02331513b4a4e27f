"""`gristmill trace`: from a document to the steps that read it, from an artifact to what it was made from and what was made from it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb

from assets_defs.exports import DECISIONS
from assets_defs.gates import SOURCE_KEY
from assets_defs.resources import Mill, load_recipes
from pipelines.errors import GristmillError, MissingArtifact
from pipelines.explanation import Decided, Evidence, Explanation, Place, explain, find
from pipelines.leases import Address
from pipelines.lineage import CHECKPOINTS, Ancestor, Lineage, Node
from pipelines.manifests import InputReference, Json, Manifest
from pipelines.seen_documents import Replay, document_table
from pipelines.shards import DOCUMENTS, PASSAGES

EVALUATIONS = ("evaluation", "task_evaluation", "classification", "comparison")


def trace(mill: Mill, name: str, recipe: str | None) -> dict[str, Any]:
    """Return what is known of the artifact or the document that a name stands for; `recipe` is that of `trace_document`."""
    address = mill.lineage.resolve(name)
    return trace_document(mill, name, recipe) if address is None else trace_artifact(mill, address)


def trace_artifact(mill: Mill, address: Address, *, documents: Path | None = None) -> dict[str, Any]:
    """Return what is known of an artifact: settings, result, ancestors, readers; of a checkpoint its documents and evaluations too.

    Args:
        documents: where a Parquet file of all documents of a checkpoint is written.

    Raises:
        GristmillError: `documents` is asked of what is no checkpoint, or exists.
    """
    lineage = mill.lineage
    manifest = opened(mill, address)
    ancestors = lineage.ancestors(address)
    found = {
        "kind": "artifact",
        **_head(lineage, manifest, address),
        "settings": manifest.settings,
        "counts": dict(manifest.counts),
        "metrics": manifest.outcome.metrics,
        "ancestors": [_ancestor(lineage, one) for one in ancestors[1:]],
    }
    models = [one for one in ancestors if one.address.asset in CHECKPOINTS and one.node]
    if address.asset not in CHECKPOINTS and documents:
        raise GristmillError(f"{manifest.label} is no checkpoint; --documents belongs to {' and '.join(CHECKPOINTS)}")
    if address.asset in CHECKPOINTS:
        found["evaluations"] = [_evaluation(mill, lineage, node) for node in _evaluations(lineage, address)]
        found["documents"] = _documents(mill, [one.address for one in models], documents)
    return found


def downstream(mill: Mill, address: Address) -> dict[str, Any]:
    """Return what was made from an artifact and stands at a partition now."""
    lineage = mill.lineage
    descendants = lineage.descendants(address)
    standing = [node for node in descendants if lineage.standing.get(node.address)]
    return {
        "kind": "downstream",
        **_head(lineage, opened(mill, address), address),
        "descendants": [_described(lineage, node) for node in standing],
        "superseded": len(descendants) - len(standing),
    }


def trace_document(mill: Mill, name: str, recipe: str | None) -> dict[str, Any]:
    """Return where a document came from, what recipes decided, where its tokens lie, and which steps of which checkpoints read them.

    Args:
        recipe: the one that is asked about; every recipe with a checkpoint where absent.

    Raises:
        UnknownName: there is no such recipe.
        MissingArtifact: nothing was ingested.
        GristmillError: the name stands for no document, or for several.
    """
    known = load_recipes()
    if recipe:
        known[recipe]
    raw = [mill.store.current("raw_corpus", key) for key in mill.store.partitions("raw_corpus")]
    if not raw:
        raise MissingArtifact("nothing was ingested; materialize raw_corpus first (`gristmill run`, or job `ingest`)")
    place = find(name, raw)
    lineage = mill.lineage
    checkpoints = _checkpoints(lineage, [recipe] if recipe else sorted(known))
    origin = next(manifest for manifest in raw if manifest.partition == place.partition)
    decided = _decisions(mill, lineage, place, checkpoints, [recipe] if recipe else sorted(known))
    return {
        "kind": "document",
        "id": place.name,
        "partition": place.partition,
        "origin": _origin(place, origin),
        "decisions": [{"recipes": names, "made_from": made, **_explained(found)} for names, made, found in decided],
        "checkpoints": [_read(mill, lineage, place, address, names) for address, names in checkpoints.items()],
    }


def opened(mill: Mill, address: Address) -> Manifest:
    """Return the manifest of an artifact.

    Raises:
        MissingArtifact: it is gone.
    """
    if found := mill.store.find(*address):
        return found
    raise MissingArtifact(f"{address.asset} {address.fingerprint} is gone from {mill.store.root}; materialize it again")


def _reference(mill: Mill, reference: InputReference) -> Manifest:
    """Open an input, by the partition that it was read for."""
    return opened(mill, Address(reference.asset, reference.fingerprint)).for_partition(reference.partition)


def _head(lineage: Lineage, manifest: Manifest, address: Address) -> dict[str, Any]:
    name = "" if SOURCE_KEY.search(str(manifest.partition)) else str(manifest.partition).partition("|")[0]
    recipe = known[name] if name in (known := load_recipes()) else None  # asked for a name that it lacks, it raises
    return {
        "asset": address.asset,
        "partition": manifest.partition,
        "fingerprint": address.fingerprint,
        "stands_at": lineage.standing.get(address, []),
        "recipe": recipe.description if recipe else None,
        "code_version": manifest.code_version,
        "computed": manifest.provenance.get("started"),
        "seconds": manifest.provenance.get("seconds"),
        "bytes": manifest.bytes,
        "directory": str(manifest.directory),
    }


def _ancestor(lineage: Lineage, one: Ancestor) -> dict[str, Any]:
    head = {**one.address._asdict(), "depth": one.depth, "role": one.role, "read_by": one.reader._asdict() if one.reader else None}
    return head | ({**_described(lineage, one.node), "gone": False} if one.node else {"gone": True})


def _described(lineage: Lineage, node: Node) -> dict[str, Any]:
    return {
        **node.address._asdict(),
        "partition": node.partition,
        "stands_at": lineage.standing.get(node.address, []),
        "code_version": node.code_version,
        "computed": node.started,
        "seconds": node.seconds,
    }


def _evaluations(lineage: Lineage, address: Address) -> list[Node]:
    """Return the evaluations of a checkpoint; a comparison reads these alone."""
    return [node for node in lineage.descendants(address) if node.address.asset in EVALUATIONS]


def _evaluation(mill: Mill, lineage: Lineage, node: Node) -> dict[str, Any]:
    manifest = opened(mill, node.address)
    return {**_described(lineage, node), "metrics": manifest.outcome.metrics}


def _documents(mill: Mill, models: list[Address], path: Path | None) -> list[dict[str, Any]]:
    """Return what a checkpoint and those that it continues have read, by run and domain; the runs' tables go to `path` and beside it."""
    import tempfile

    if path and path.exists():
        raise GristmillError(f"{path} exists; name a new file, or remove it")
    found, files = [], []
    with tempfile.TemporaryDirectory() as work:
        for number, address in enumerate(models):
            manifest = opened(mill, address)
            run = {"asset": address.asset, "fingerprint": address.fingerprint, "steps": manifest.counts.get("steps", 0)}
            if "phases" not in manifest.settings:
                found.append({**run, "domains": [], "note": "taken as it is: what it has read is not known"})
                continue
            files.append((Path(work) / f"{number}.parquet", run))
            found.append({**run, "domains": document_table(Replay(manifest, lambda one: _reference(mill, one)), files[-1][0])})
        if path:
            _write_documents(files, path)
    return found


def _write_documents(files: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    parts = [
        f"SELECT '{run['asset']}' AS asset, '{run['fingerprint']}' AS fingerprint, * FROM read_parquet('{file}')" for file, run in files
    ]
    if not parts:
        raise GristmillError(f"no run that is behind it was trained here, so {path} would be empty; leave --documents out")
    with duckdb.connect() as connection:
        connection.sql(" UNION ALL ".join(parts)).order("asset, domain, id").write_parquet(str(path), compression="zstd")


def _checkpoints(lineage: Lineage, recipes: list[str]) -> dict[Address, list[str]]:
    """Return the checkpoints that `recipes` stand at, each with its recipes, in the order of the graph."""
    found: dict[Address, list[str]] = {}
    for asset in CHECKPOINTS:
        for recipe in recipes:
            if (address := lineage.pointers.get((asset, recipe))) and lineage.node(address):
                found.setdefault(address, []).append(recipe)
    return found


def _origin(place: Place, raw: Manifest) -> dict[str, Any]:
    """Return where a document stands in the raw corpus, and which files that was read from; the row is 0-based."""
    table, column = ("quarantine.parquet", "locator") if place.quarantined else ("documents.parquet", "id")
    left_out = "excerpt" if place.quarantined else "text"
    query = f"SELECT file_row_number AS row, * EXCLUDE ({left_out}) FROM read_parquet($path, file_row_number = true)"
    with duckdb.connect() as connection:
        values = {"path": str(raw.file(table)), "name": place.name}
        (row,) = connection.sql(f'{query} WHERE "{column}" = $name LIMIT 1', params=values).to_arrow_table().to_pylist()
    row.pop("file_row_number", None)
    files = raw.settings.get("files") or {}
    return {
        "artifact": raw.fingerprint,
        "file": table,
        **{key: value for key, value in row.items() if value is not None},
        "read_by": raw.settings.get("source"),
        "source_files": files,
        "ingested": raw.provenance.get("started"),
    }


def _decisions(
    mill: Mill, lineage: Lineage, place: Place, checkpoints: dict[Address, list[str]], recipes: list[str]
) -> list[tuple[list[str], str, Explanation]]:
    """Return what recipes decided, those together that trained on one selection; of a recipe without a checkpoint, as it stands."""
    by_selection: dict[Address, list[str]] = {}
    for address, names in checkpoints.items():
        node = lineage.node(address)
        for read in node.inputs if node and address.asset == CHECKPOINTS[-1] else ():
            if read.address.asset == "selected_subset":
                by_selection.setdefault(read.address, []).extend(name for name in names if name not in by_selection[read.address])
    found = [
        (names, address.fingerprint, explain(place, _evidence(mill, lineage, place, names[0], address)))
        for address, names in by_selection.items()
    ]
    told = {name for names, *_ in found for name in names}
    from assets_defs.explanations import explain_document

    asked = recipes if len(recipes) == 1 else []
    return found + [([name], "", explain_document(mill, place.name, name)) for name in asked if name not in told]


def _evidence(mill: Mill, lineage: Lineage, place: Place, recipe: str, selection: Address) -> Evidence:
    """Return what `selection` was made from, which need not be what stands at the recipe now."""
    behind: dict[str, list[Ancestor]] = {}
    for one in lineage.ancestors(selection):
        behind.setdefault(one.address.asset, []).append(one)

    def of(asset: str, partition: str | None = None) -> Manifest | None:
        found = [one for one in behind.get(asset, ()) if one.node and partition in (None, one.node.partition)]
        return opened(mill, found[0].address) if found else None

    def decided(asset: str) -> Decided | None:
        manifest = of(asset)
        scores = [one for one in manifest.inputs.get("scores", ()) if one.partition == place.partition] if manifest else []
        return manifest and Decided(manifest, _reference(mill, scores[0]) if scores else None)

    raw = of("raw_corpus", place.partition) or mill.store.current("raw_corpus", place.partition)
    decisions = {asset: decided(asset) for asset in DECISIONS}
    last = decisions["deduplicated_corpus"]
    clusters = last.decisions.inputs.get("clusters", ()) if last else ()
    return Evidence(
        recipe=recipe,
        raw=raw,
        cleaned=of("cleaned_corpus", place.partition),
        decided=decisions,
        clusters=_reference(mill, clusters[0]) if clusters else None,
        selection=opened(mill, selection),
    )


def _explained(found: Explanation) -> dict[str, Any]:
    end = found.end
    return {"verdict": end.verdict, "ended_at": end.stage, "reason": end.reason, "stages": [asdict(stage) for stage in found.stages]}


def _read(mill: Mill, lineage: Lineage, place: Place, address: Address, recipes: list[str]) -> dict[str, Any]:
    """Return where a checkpoint's run found the document's tokens, and which of its steps read them."""
    manifest = opened(mill, address)
    shard = next((one for one in manifest.inputs.get("shards", ()) if one.partition == place.partition), None)
    tokens = _tokens(_reference(mill, shard), place.name) if shard else None
    trained = "phases" in manifest.settings
    readings = Replay(manifest, lambda one: _reference(mill, one)).readings(place.name) if tokens and trained else []
    return {
        **address._asdict(),
        "recipes": recipes,
        "steps_in_all": manifest.counts.get("steps", 0),
        "known": trained,
        "tokens": tokens,
        "steps": sorted({one.step for one in readings}),
        "tokens_read": sum(one.tokens for one in readings),
        "readings": [asdict(one) for one in readings],
        "evaluations": [_evaluation(mill, lineage, node) for node in _evaluations(lineage, address)]
        if address.asset == CHECKPOINTS[-1]
        else [],
    }


def _tokens(shard: Manifest, document: str) -> dict[str, Json] | None:
    """Return where the tokens of a document lie in its shard, its passages included; None where it was not tokenized."""
    query = 'SELECT * FROM read_parquet($path) WHERE id = $id ORDER BY "offset"'
    with duckdb.connect() as connection:
        parameters = [{"path": str(shard.file(name)), "id": document} for name in (DOCUMENTS, PASSAGES)]
        rows = [connection.sql(query, params=one).to_arrow_table().to_pylist() for one in parameters]
    if not rows[0]:
        return None
    (document_row,), passages = rows
    return {
        "shard": shard.partition,
        "artifact": shard.fingerprint,
        "offset": document_row["offset"],
        "length": document_row["length"],
        "passages": [{key: row[key] for key in ("passage", "offset", "length")} for row in passages],
    }
