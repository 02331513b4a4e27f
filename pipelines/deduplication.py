"""Deduplication: sign every document, cluster near-duplicates in an append-only register, keep one document per cluster.

    cleaned_corpus[source]  -> sign_documents    -> duplicate_signatures[source]
    all signatures          -> cluster_documents -> duplicate_clusters: cluster and split of every document
    decisions + clusters    -> deduplicate       -> deduplicated_corpus[recipe]

The register is read in a stated order of partitions, oldest snapshot first. A document is compared with earlier ones
only, so what it says about a document never changes when later snapshots are appended: their rows come out byte-identical.
The split hangs on the cluster's founder, so a near-duplicate of a held-out document is held out with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pipelines.documents import DECISION_SCHEMA, TableWriter, partition_file, read_batches, row_count, split_partition, write_table
from pipelines.duplicate_register import (
    HELD_OUT,
    TRAIN,
    Clusters,
    Register,
    find_clusters,
    held_out_as_founder,
    read_register,
    split_tables,
)
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact
from pipelines.manifests import Check, Manifest, Member, Outcome
from pipelines.minhash import Signer, exact_hash
from pipelines.plugins import Settings

SIGNATURES = "signatures.parquet"
DECISIONS = "decisions.parquet"
SPLITS = "splits"
MIN_DOCUMENTS_TO_HOLD_OUT = 50
"""A domain with fewer documents may have an empty held-out split."""
DOCUMENTS_PER_BATCH = 500


class SignatureSettings(Settings):
    """MinHash over word n-grams. Words are lower-cased runs of letters, digits and `_`; in scripts written without spaces, characters.

    The exact hash is over the text with runs of white space folded, case kept. Defaults: datatrove's 5-grams and 112 hashes,
    as used for FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.4).
    """

    num_permutations: int = Field(112, ge=1, le=4096)
    """Positions of a signature; the similarity's standard error is at most ``0.5 / sqrt(num_permutations)``."""
    ngram: int = Field(5, ge=1, le=100)
    """Words per shingle."""
    seed: int = Field(1, ge=0)
    """Chooses the hash functions."""


class ClusterSettings(Settings):
    """Which documents are near-duplicates, and which share of each domain's clusters is held out."""

    bands: int = Field(22, ge=1)
    """Bands that may bring two documents together. 22 bands of 5 rows find 99.9% of the sample's pairs with Jaccard 0.7 to 0.8,
    datatrove's 14 of 8 find 74%: a missed pair is a leak from the held-out split."""
    rows: int = Field(5, ge=1)
    """Positions of the signature per band."""
    threshold: float = Field(0.7, gt=0, le=1)
    """Documents whose signatures agree on at least this share are near-duplicates."""
    held_out: dict[str, float] = Field(default_factory=dict)
    """Domain to the share of its clusters that is held out, 1 for all; a domain that is not named holds nothing out. Domains without
    a partition in `order` may be named."""
    split_epoch: int = 1
    """Enters the split's hash: another epoch is another draw of the held-out clusters."""
    order: tuple[str, ...]
    """Every source partition, in the order of reading: snapshots in time order, then domains. New ones are appended."""

    @field_validator("held_out")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        for domain, share in value.items():
            if not 0 <= share <= 1:
                raise ValueError(f"share {share} of domain {domain!r} is not in [0, 1]")
        return value

    @field_validator("order")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := [partition for partition, times in Counter(value).items() if times > 1]:
            raise ValueError(f"order names {repeated[0]!r} more than once")
        return value


class DeduplicationSettings(Settings):
    """Which duplicates a recipe drops and which one stays."""

    mode: Literal["near", "exact", "off"] = "near"
    """`near`: one document per cluster; `exact`: one per exact hash; `off`: all. In every mode a document that matched clusters
    of both splits is dropped, since it would carry held-out text into training."""
    keep: Literal["earliest", "longest"] = "earliest"
    """The survivor: the founder, then the earliest by snapshot, domain and id; or the one with most characters, then the earliest."""


def sign_documents(settings: SignatureSettings, out: Path, *, cleaned: Manifest) -> Outcome:
    """Write `signatures.parquet`: exact hash, MinHash signature, shingles and characters of every document, in its order."""
    signer = Signer(num_permutations=settings.num_permutations, ngram=settings.ngram, seed=settings.seed)
    counts: Counter[str] = Counter(documents_in=row_count(cleaned.file("documents.parquet")), documents=0, without_words=0, characters=0)
    with TableWriter(out / SIGNATURES, signature_schema(settings.num_permutations)) as writer:
        for batch in read_batches(cleaned.file("documents.parquet"), ["id", "text"], rows=DOCUMENTS_PER_BATCH):
            texts = batch["text"].to_pylist()
            signatures, shingles = signer.sign(texts)
            for row, (name, text) in enumerate(zip(batch["id"].to_pylist(), texts, strict=True)):
                writer.write(
                    {
                        "id": name,
                        "exact_hash": exact_hash(text),
                        "signature": signatures[row].astype("<u4").tobytes(),
                        "shingles": min(int(shingles[row]), 2**31 - 1),
                        "characters": min(len(text), 2**31 - 1),
                    }
                )
                counts.update(documents=1, characters=len(text), without_words=int(shingles[row] == 0))
    return Outcome(counts=dict(counts))


def signature_schema(num_permutations: int) -> pa.Schema:
    """Return the schema of `signatures.parquet`; a signature is `num_permutations` little-endian uint32."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("exact_hash", pa.binary(16)),
            ("signature", pa.binary(4 * num_permutations)),
            ("shingles", pa.int32()),
            ("characters", pa.int32()),
        ]
    )


def cluster_documents(settings: ClusterSettings, out: Path, *, signatures: tuple[Manifest, ...]) -> Outcome:
    """Write ``splits/<domain>@<snapshot>.parquet``: cluster and split of every document, rows sorted by id.

    Memory: 4 bytes per position of the signature and 8 per band, for every document.

    Raises:
        GristmillError: `settings.order` and the partitions of `signatures` differ, or the signatures do not fit the bands.
        EmptyInput: no partition holds a document.
    """
    register = read_register(_files_in_order(settings, signatures))
    if settings.bands * settings.rows > register.signatures.shape[1]:
        raise GristmillError(
            f"{settings.bands} bands of {settings.rows} rows need {settings.bands * settings.rows} positions, the signatures have "
            f"{register.signatures.shape[1]}; use fewer bands or rows, or sign with a larger num_permutations"
        )
    held = held_out_as_founder(register, settings.held_out, settings.split_epoch)
    clusters = find_clusters(register, held, bands=settings.bands, rows=settings.rows, threshold=settings.threshold)
    (out / SPLITS).mkdir()
    for partition, table in split_tables(register, clusters, held, threshold=settings.threshold):
        write_table(out / SPLITS / partition_file(partition), table)
    return _cluster_outcome(register, clusters, held)


def _files_in_order(settings: ClusterSettings, signatures: tuple[Manifest, ...]) -> dict[str, Path]:
    manifests = {manifest.partition or "": manifest for manifest in signatures}
    if difference := sorted(set(manifests) ^ set(settings.order)):
        where = "order" if difference[0] in settings.order else "signatures"
        raise GristmillError(f"partition {difference[0]!r} stands in {where} alone; give the signatures of exactly the partitions in order")
    return {partition: manifests[partition].file(SIGNATURES) for partition in settings.order}


def _cluster_outcome(register: Register, clusters: Clusters, held: np.ndarray) -> Outcome:
    own = np.arange(len(register.ids))
    joined, exact, out = clusters.founder != own, clusters.original < own, held[clusters.founder]
    domains: dict[str, list[slice]] = {}
    for partition, rows in register.rows():
        domains.setdefault(split_partition(partition)[0], []).append(rows)
    table = []
    for domain in sorted(domains):
        rows = np.concatenate([own[part] for part in domains[domain]])
        characters = register.characters[rows]
        row = {"domain": domain, "documents": len(rows), "duplicates": int(joined[rows].sum()), "held_out": int(out[rows].sum())}
        table.append(row | {"held_out_characters_share": float(characters[out[rows]].sum() / max(1, characters.sum()))})
    counts = {
        "documents": len(own),
        "clusters": int((~joined).sum()),
        "exact_duplicates": int(exact.sum()),
        "near_duplicates": int((joined & ~exact).sum()),
        "held_out": int(out.sum()),
        "straddling": int(clusters.straddles.sum()),
    }
    documents = {partition_file(partition): rows.stop - rows.start for partition, rows in register.rows()}
    return Outcome(counts=counts, tables={"by_domain": table}, details={"documents": documents})


def split_changes(previous: Manifest, draft: Manifest) -> int:
    """Return how many documents of `previous` have another split in `draft`; partitions and documents that are gone do not count."""
    files = {entry.path for entry in draft.files}
    query = "SELECT count(*) FROM before JOIN after USING (id) WHERE before.split <> after.split"
    changes = 0
    for entry in previous.files:
        if entry.path.startswith(f"{SPLITS}/") and entry.path in files:
            before, after = (pq.read_table(m.directory / entry.path, columns=["id", "split"]) for m in (previous, draft))
            changes += _count(query, before=before, after=after)
    return changes


def deduplicate(
    settings: DeduplicationSettings, out: Path, *, decisions: Manifest, clusters: tuple[Member, ...], signatures: tuple[Manifest, ...]
) -> Outcome:
    """Write `decisions.parquet` for the documents that `decisions` keeps, in its order.

    Per group of duplicates one document stays. The others carry the rule `exact_duplicate` (the same exact hash as a document
    before them in the order of keeping) or `near_duplicate`, with the estimated similarity to the cluster's founder as score: it
    may lie below the threshold where a document joined through another member. `joins_two_clusters` has `joins` as score.

    Raises:
        MissingArtifact: `clusters` or `signatures` lack a kept document.
    """
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("splits", _with_partition(((m.path, Path(m.name).stem.replace("@", "|")) for m in clusters), _SPLIT_COLUMNS))
        connection.register("signed", _with_partition(((m.file(SIGNATURES), m.partition or "") for m in signatures), _SIGNED_COLUMNS))
        connection.execute(_JOINED, [str(decisions.file(DECISIONS))])
        _require_all_joined(connection)
        connection.execute(_RANKED.format(first="characters DESC, " if settings.keep == "longest" else ""))
        connection.execute(_RULED, {"mode": settings.mode, "threshold": _threshold(clusters)})
        table = connection.sql(_DECIDED).to_arrow_table()
        write_table(out / DECISIONS, pa.Table.from_batches(table.cast(DEDUPLICATED_SCHEMA).to_batches(), DEDUPLICATED_SCHEMA))
        return _deduplication_outcome(connection)


DEDUPLICATED_SCHEMA = DECISION_SCHEMA.append(pa.field("split", pa.string())).append(pa.field("cluster", pa.string()))
"""A decision, and the split and the cluster of the document."""

_SPLIT_COLUMNS = ["id", "cluster", "split", "founder", "straddles", "joins", "similarity"]
_SIGNED_COLUMNS = ["id", "exact_hash", "characters"]
_JOINED = """
CREATE TEMP TABLE joined AS
SELECT d.position, d.id, d.domain, d.snapshot, d.lang, s.cluster, s.split, s.founder, s.straddles, s.joins,
       s.similarity::DOUBLE AS similarity, g.exact_hash, g.characters
FROM (SELECT id, domain, snapshot, lang, file_row_number AS position FROM read_parquet($1, file_row_number = true) WHERE kept) d
LEFT JOIN splits s ON s.id = d.id AND s.domain = d.domain AND s.snapshot = d.snapshot
LEFT JOIN signed g ON g.id = d.id AND g.domain = d.domain AND g.snapshot = d.snapshot
"""
_RANKED = """
CREATE TEMP TABLE ranked AS
SELECT *, row_number() OVER (PARTITION BY cluster, straddles ORDER BY {first}founder DESC, snapshot, domain, id) AS near_rank,
       row_number() OVER (PARTITION BY cluster, straddles, exact_hash ORDER BY {first}founder DESC, snapshot, domain, id) AS exact_rank
FROM joined
"""
_RULED = """
CREATE TEMP TABLE ruled AS
SELECT *, CASE WHEN straddles THEN 'joins_two_clusters'
               WHEN $mode <> 'off' AND exact_rank > 1 THEN 'exact_duplicate'
               WHEN $mode = 'near' AND near_rank > 1 THEN 'near_duplicate' END AS rule,
       CASE rule WHEN 'joins_two_clusters' THEN joins::DOUBLE WHEN 'exact_duplicate' THEN 1.0
                 WHEN 'near_duplicate' THEN similarity END AS score,
       CASE rule WHEN 'near_duplicate' THEN $threshold::DOUBLE ELSE if(rule IS NULL, NULL, 1.0::DOUBLE) END AS threshold
FROM ranked
"""
_DECIDED = """
SELECT id, domain, snapshot, lang, rule IS NULL AS kept, rule, score, threshold,
       CASE WHEN rule IS NULL THEN [] ELSE [{'rule': rule, 'score': score, 'threshold': threshold}] END AS reasons, split, cluster
FROM ruled ORDER BY position
"""
_BY_DOMAIN = """
SELECT domain, count(*) AS documents_in, count(*) FILTER (rule IS NULL) AS kept, count(rule) AS dropped,
       count(rule) / count(*) AS share_dropped, count(*) FILTER (rule IS NULL AND split = 'train') AS kept_train,
       count(*) FILTER (rule IS NULL AND split = 'held_out') AS kept_held_out,
       coalesce(sum(characters) FILTER (rule IS NULL), 0)::BIGINT AS kept_characters
FROM ruled GROUP BY domain ORDER BY domain
"""
_BY_RULE = "SELECT domain, rule, count(*) AS dropped FROM ruled WHERE rule IS NOT NULL GROUP BY ALL ORDER BY ALL"


def _with_partition(files: Iterable[tuple[Path, str]], columns: list[str]) -> pa.Table:
    """Return `columns` of all `files` (path, partition) with the partition's domain and snapshot."""
    tables = []
    for path, partition in files:
        table = pq.read_table(path, columns=columns).replace_schema_metadata()
        for name, value in zip(("domain", "snapshot"), split_partition(partition), strict=True):
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), table.num_rows))
        tables.append(table)
    if not tables:
        raise EmptyInput("no source partition to deduplicate; name at least one in the recipe")
    return pa.concat_tables(tables)


def _threshold(clusters: tuple[Member, ...]) -> float:
    return float((pq.read_schema(clusters[0].path).metadata or {})[b"threshold"])


def _require_all_joined(connection: duckdb.DuckDBPyConnection) -> None:
    """Raise where a kept document has no cluster or no signature."""
    lost = connection.sql(
        "SELECT id, domain, snapshot, CASE WHEN cluster IS NULL THEN 'duplicate_clusters' ELSE 'duplicate_signatures' END "
        "FROM joined WHERE cluster IS NULL OR exact_hash IS NULL ORDER BY position LIMIT 1"
    ).fetchall()
    if lost:
        name, domain, snapshot, asset = lost[0]
        raise MissingArtifact(f"document {name!r} of {domain}|{snapshot} is not in {asset}; give its partition, or materialize it again")


def _deduplication_outcome(connection: duckdb.DuckDBPyConnection) -> Outcome:
    by_domain = connection.sql(_BY_DOMAIN).to_arrow_table().to_pylist()
    by_rule = connection.sql(_BY_RULE).to_arrow_table().to_pylist()
    keys = ("documents_in", "kept", "dropped", "kept_train", "kept_held_out", "kept_characters")
    totals = {key: sum(row[key] for row in by_domain) for key in keys}
    rules = Counter(exact_duplicate=0, near_duplicate=0, joins_two_clusters=0)
    for row in by_rule:
        rules[row["rule"]] += row["dropped"]
    return Outcome(counts=totals | {"quarantined": 0, **rules}, tables={"by_domain": by_domain, "by_rule": by_rule})


def documents_signed(draft: Manifest) -> Check:
    """Every document that came in has a signature."""
    rows, expected = row_count(draft.directory / SIGNATURES), draft.counts["documents_in"]
    return Check(name="documents_signed", passed=rows == expected, description=f"{rows} signatures for {expected} documents")


def every_document_has_one_split(draft: Manifest) -> Check:
    """Every partition has a file of splits, with as many rows as signatures and `train` or `held_out` in each."""
    expected: dict[str, int] = dict(draft.outcome.details["documents"])  # type: ignore[arg-type]
    found = {path.name: row_count(path) for path in _split_files(draft)}
    other = _count(f"SELECT count(*) FROM splits WHERE split IS NULL OR split NOT IN ('{TRAIN}', '{HELD_OUT}')", splits=_all_splits(draft))
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    description = f"{other} rows without a split; files whose rows differ from the signatures': {', '.join(wrong) or 'none'}"
    return Check(name="every_document_has_one_split", passed=not wrong and not other, description=description)


def ids_unique(draft: Manifest) -> Check:
    """No id stands twice in one source partition."""
    repeated: dict[str, int] = {}
    for path in sorted(draft.directory.rglob("*.parquet")):
        names = pq.read_table(path, columns=["id"])["id"]
        repeated[path.name] = len(names) - len(names.unique())
    description = f"repeated ids: {', '.join(f'{extra} in {name}' for name, extra in repeated.items() if extra) or 'none'}"
    return Check(name="ids_unique", passed=not any(repeated.values()), description=description)


def clusters_do_not_straddle_splits(draft: Manifest) -> Check:
    """All documents of a cluster have one split."""
    query = "SELECT count(*) FROM (SELECT cluster FROM splits GROUP BY cluster HAVING count(DISTINCT split) > 1)"
    found = _count(query, splits=_all_splits(draft))
    return Check(name="clusters_do_not_straddle_splits", passed=not found, description=f"{found} clusters with documents in both splits")


def held_out_not_empty(draft: Manifest) -> Check:
    """Every domain with a held-out share and at least `MIN_DOCUMENTS_TO_HOLD_OUT` documents holds something out."""
    shares: dict[str, float] = dict(draft.settings["held_out"])  # type: ignore[arg-type]
    rows = draft.outcome.tables["by_domain"]
    due = [row for row in rows if shares.get(str(row["domain"]), 0) > 0 and int(row["documents"]) >= MIN_DOCUMENTS_TO_HOLD_OUT]
    empty = [f"{row['domain']} (share {shares[str(row['domain'])]} of {row['documents']} documents)" for row in due if not row["held_out"]]
    description = f"nothing held out of: {', '.join(empty)}; raise the share" if empty else f"{len(due)} domains hold documents out"
    return Check(name="held_out_not_empty", passed=not empty, description=description)


def documents_conserved(draft: Manifest) -> Check:
    """Documents in = kept + dropped + quarantined, and as many rows."""
    counts, rows = draft.counts, row_count(draft.directory / DECISIONS)
    accounted = counts["kept"] + counts["dropped"] + counts["quarantined"]
    description = f"{counts['documents_in']} in, {counts['kept']} kept, {counts['dropped']} dropped, {rows} rows"
    return Check(name="documents_conserved", passed=counts["documents_in"] == accounted == rows, description=description)


def decided_ids_unique(draft: Manifest) -> Check:
    """No document of a partition is decided twice. An id may recur in another snapshot; the metadata say how many are kept twice."""
    table = pq.read_table(draft.directory / DECISIONS, columns=["id", "domain", "snapshot", "kept"])
    query = "SELECT count(*) FROM (SELECT {} GROUP BY ALL HAVING count(*) > 1)"
    rows = _count(query.format("id, domain, snapshot FROM decided"), decided=table)
    kept = _count(query.format("id FROM decided WHERE kept"), decided=table)
    return Check(name="ids_unique", passed=not rows, description=f"{rows} documents decided twice", metadata={"ids_kept_twice": kept})


def one_survivor_per_cluster(draft: Manifest) -> Check:
    """Of each cluster one document is kept (mode near), at least one (exact) or all (off), but for those that join two clusters."""
    table = pq.read_table(draft.directory / DECISIONS, columns=["cluster", "kept", "rule"])
    wrong = {"near": "kept <> least(1, candidates)", "exact": "kept < least(1, candidates)", "off": "kept <> candidates"}
    clusters = "SELECT count(*) FILTER (kept) AS kept, count(*) FILTER (rule IS DISTINCT FROM 'joins_two_clusters') AS candidates"
    query = f"SELECT count(*) FROM ({clusters} FROM decided GROUP BY cluster) WHERE {wrong[str(draft.settings['mode'])]}"
    found = _count(query, decided=table)
    return Check(name="one_survivor_per_cluster", passed=not found, description=f"{found} clusters with too few or too many survivors")


def _split_files(manifest: Manifest) -> list[Path]:
    return sorted((manifest.directory / SPLITS).glob("*.parquet"))


def _all_splits(manifest: Manifest) -> pa.Table:
    return pa.concat_tables(pq.read_table(path, columns=["id", "cluster", "split"]) for path in _split_files(manifest))


def _count(query: str, **tables: pa.Table) -> int:
    with duckdb.connect(config={"threads": 1}) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        return connection.sql(query).fetchall()[0][0]


SIGNATURE_AUDITS = (documents_signed, ids_unique)
CLUSTER_AUDITS = (every_document_has_one_split, ids_unique, clusters_do_not_straddle_splits, held_out_not_empty)
DEDUPLICATION_AUDITS = (documents_conserved, decided_ids_unique, one_survivor_per_cluster)


@dataclass(frozen=True)
class SplitsUnchanged:
    """A document keeps the split it was once given, unless `split_epoch` was raised."""

    previous: Manifest | None
    check_name = "splits_unchanged"

    def __call__(self, draft: Manifest) -> Check:
        if self.previous is None or self.previous.settings["split_epoch"] != draft.settings["split_epoch"]:
            return Check(name="splits_unchanged", passed=True, description="no earlier register to compare with")
        changed = split_changes(self.previous, draft)
        description = (
            f"{changed} documents changed their split; raise `split_epoch` under `clusters` in project.yaml to give all splits anew"
        )
        return Check(name="splits_unchanged", passed=changed == 0, description=description if changed else "no document changed its split")
