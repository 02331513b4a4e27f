"""Deduplication: sign every document, cluster near-duplicates in an append-only register, keep one document per cluster.

    cleaned_corpus[source]           -> sign_documents    -> duplicate_signatures[source]
    a snapshot's signatures, links   -> cluster_documents -> duplicate_clusters.link: cluster and split of its documents, their index
    all links                        -> gather_clusters   -> duplicate_clusters: cluster and split of every document
    decisions + clusters             -> deduplicate       -> deduplicated_corpus[recipe]

The register is read in a stated order of partitions, oldest snapshot first. A document is compared with earlier ones
only, so what it says about a document never changes when later snapshots are appended: their rows come out byte-identical.
A new snapshot is a new link: it is checked against the index of the links before, whose documents and signatures are not read again.
The split hangs on the cluster's founder, so a near-duplicate of a held-out document is held out with it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pipelines.deduplication_audits import DECISIONS, SIGNATURES, SPLITS
from pipelines.documents import DECISION_SCHEMA, partition_file, row_count, split_partition, write_table
from pipelines.duplicate_index import INDEX, Index, open_segment, write_segment
from pipelines.duplicate_register import Clusters, Register, find_clusters, held_out_as_founder, read_register, split_tables
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact
from pipelines.manifests import Json, Manifest, Member, Outcome
from pipelines.minhash import Signer, WordDialect, exact_hash
from pipelines.plugins import Settings
from pipelines.row_groups import RowGroup, map_row_groups

MAX_INT32 = 2**31 - 1


class SignatureSettings(Settings):
    """MinHash over word n-grams, by datatrove's hash functions: with its words, its signatures (the low 32 bits of each minimum).

    The exact hash is over the text with runs of white space folded, case kept. Defaults: datatrove's 5-grams and 112 hashes,
    as used for FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.4).
    """

    words: WordDialect = "folded"
    """`folded`: runs of letters and digits, lower-cased, without accents; characters in scripts written without spaces.
    `datatrove`: its simplification (numbers are 0) and spaCy's English tokens; a Chinese sentence is one word there."""

    num_permutations: int = Field(112, ge=1, le=4096)
    """Positions of a signature; the similarity's standard error is at most ``0.5 / sqrt(num_permutations)``."""
    ngram: int = Field(5, ge=1, le=100)
    """Words per shingle."""
    seed: int = Field(1, ge=0)
    """Chooses the hash functions."""


class ClusterSettings(Settings):
    """Which documents are near-duplicates, and which share of each domain's clusters is held out."""

    bands: int = Field(22, ge=1)
    """Bands that may bring two documents together. 22 bands of 5 rows find 99.7% of the sample's pairs with Jaccard 0.7 to 0.8,
    datatrove's 14 of 8 find 81%: a missed pair is a leak from the held-out split."""
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
    """Source partitions in the order of reading, a link's or all: snapshots in time order, then domains. New ones are appended."""

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
    path = cleaned.file("documents.parquet")
    counts: Counter[str] = Counter(documents_in=row_count(path), documents=0, without_words=0, characters=0)
    with pq.ParquetWriter(out / SIGNATURES, signature_schema(settings.num_permutations), compression="zstd") as writer:
        for table in map_row_groups(_SignRowGroup(settings), path):
            writer.write_table(table)
            characters, shingles = table["characters"].to_numpy(), table["shingles"].to_numpy()
            counts.update(documents=len(table), without_words=int((shingles == 0).sum()), characters=int(characters.sum(dtype=np.int64)))
    return Outcome(counts=dict(counts))


@dataclass(frozen=True)
class _SignRowGroup:
    """Signs one row group; picklable."""

    settings: SignatureSettings

    def __call__(self, group: RowGroup) -> pa.Table:
        settings = self.settings
        signer = Signer(num_permutations=settings.num_permutations, ngram=settings.ngram, seed=settings.seed, words=settings.words)
        schema = signature_schema(settings.num_permutations)
        return pa.Table.from_batches([_signed(signer, batch, schema) for batch in group.batches(["id", "text"])], schema)


def _signed(signer: Signer, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    texts = batch["text"].to_pylist()
    minima, shingles = signer.sign(texts)
    columns = [
        batch["id"],
        pa.array([exact_hash(text) for text in texts], schema.field("exact_hash").type),
        # The low half of each minimum.
        pa.Array.from_buffers(schema.field("signature").type, len(texts), [None, pa.py_buffer(minima.astype("<u4"))]),
        pa.array(np.minimum(shingles, MAX_INT32), pa.int32()),
        pa.array([min(len(text), MAX_INT32) for text in texts], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


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


def cluster_documents(
    settings: ClusterSettings, out: Path, *, signatures: tuple[Manifest, ...], earlier: tuple[Manifest, ...] = ()
) -> Outcome:
    """Write one link of the register: ``splits/<domain>@<snapshot>.parquet``, rows sorted by id, and the index for later links.

    Args:
        signatures: of the partitions in `settings.order`.
        earlier: all links before, in order. Without any, this link is the whole register.

    Memory: 4 kB for every document of `signatures`, measured with 112 positions and 22 bands, and the signature of every earlier one that
    shares a band with one of them.

    Raises:
        GristmillError: `settings.order` and the partitions of `signatures` differ, or the signatures do not fit the bands or each other.
    """
    register = read_register(_files_in_order(settings, signatures))
    index = Index([open_segment(link.file(INDEX)) for link in earlier])
    _require_fitting(settings, register, index)
    held = held_out_as_founder(register, settings.held_out, settings.split_epoch)
    clusters, segment = find_clusters(register, held, index, bands=settings.bands, rows=settings.rows, threshold=settings.threshold)
    (out / SPLITS).mkdir()
    for partition, table in split_tables(register, clusters, threshold=settings.threshold):
        write_table(out / SPLITS / partition_file(partition), table)
    write_segment(out / INDEX, segment)
    return _cluster_outcome(register, clusters)


def gather_clusters(settings: ClusterSettings, out: Path, *, links: tuple[Manifest, ...]) -> Outcome:
    """Write the split files of all `links` and the sum of what they found.

    Raises:
        EmptyInput: no link holds a document.
    """
    (out / SPLITS).mkdir()
    for link in links:
        for entry in link.files:
            if entry.path.startswith(f"{SPLITS}/"):
                shutil.copyfile(link.file(entry.path), out / entry.path)
    counts: Counter[str] = Counter()
    domains: dict[str, Counter[str]] = {}
    documents: dict[str, int] = {}
    for link in links:
        counts.update(link.counts)
        documents |= link.outcome.details["documents"]  # type: ignore[operator]
        for row in link.outcome.tables["by_domain"]:
            numbers = {key: value for key, value in row.items() if isinstance(value, int)}
            domains.setdefault(str(row["domain"]), Counter()).update(numbers)
    if not counts["documents"]:
        raise EmptyInput("no document to cluster: every partition is empty; ingest a source that holds documents")
    table = [_with_share(domain, domains[domain]) for domain in sorted(domains)]
    return Outcome(counts=dict(counts), tables={"by_domain": table}, details={"documents": documents})


def _require_fitting(settings: ClusterSettings, register: Register, index: Index) -> None:
    positions = register.signatures.shape[1]
    if settings.bands * settings.rows > positions:
        raise GristmillError(
            f"{settings.bands} bands of {settings.rows} rows need {settings.bands * settings.rows} positions, the signatures have "
            f"{positions}; use fewer bands or rows, or sign with a larger num_permutations"
        )
    if other := sorted(index.positions - {positions}):
        raise GristmillError(
            f"signatures of {[*other, positions]} positions cannot be compared; sign all partitions with the same num_permutations"
        )


def _files_in_order(settings: ClusterSettings, signatures: tuple[Manifest, ...]) -> dict[str, Path]:
    manifests = {manifest.partition or "": manifest for manifest in signatures}
    if difference := sorted(set(manifests) ^ set(settings.order)):
        where = "order" if difference[0] in settings.order else "signatures"
        raise GristmillError(f"partition {difference[0]!r} stands in {where} alone; give the signatures of exactly the partitions in order")
    return {partition: manifests[partition].file(SIGNATURES) for partition in settings.order}


def _cluster_outcome(register: Register, clusters: Clusters) -> Outcome:
    joined, exact = clusters.founder != clusters.own, clusters.original < clusters.own
    domains: dict[str, Counter[str]] = {}
    for partition, rows in register.rows():
        characters, out = register.characters[rows], clusters.held[rows]
        found = {"documents": len(out), "duplicates": int(joined[rows].sum()), "held_out": int(out.sum())}
        found |= {"characters": int(characters.sum()), "held_out_characters": int(characters[out].sum())}
        domains.setdefault(split_partition(partition)[0], Counter()).update(found)
    counts = {
        "documents": len(joined),
        "clusters": int((~joined).sum()),
        "exact_duplicates": int(exact.sum()),
        "near_duplicates": int((joined & ~exact).sum()),
        "held_out": int(clusters.held.sum()),
        "straddling": int(clusters.straddles.sum()),
    }
    documents = {partition_file(partition): rows.stop - rows.start for partition, rows in register.rows()}
    table = [_with_share(domain, domains[domain]) for domain in sorted(domains)]
    return Outcome(counts=counts, tables={"by_domain": table}, details={"documents": documents})


def _with_share(domain: str, counted: Mapping[str, int]) -> dict[str, Json]:
    share = counted["held_out_characters"] / max(1, counted["characters"])
    return {"domain": domain, **counted, "held_out_characters_share": share}


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
