"""What is checked of signatures, register and deduplicated corpus before they are published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import row_count
from pipelines.duplicate_register import HELD_OUT, TRAIN
from pipelines.manifests import Check, Manifest

SIGNATURES = "signatures.parquet"
DECISIONS = "decisions.parquet"
SPLITS = "splits"
MIN_DOCUMENTS_TO_HOLD_OUT = 50
"""A domain with fewer documents may have an empty held-out split."""


def split_changes(previous: Manifest, draft: Manifest) -> int:
    """Return how many documents of `previous` have another split in `draft`; partitions and documents that are gone do not count."""
    files = {entry.path: entry.sha256 for entry in draft.files}
    query = "SELECT count(*) FROM before JOIN after USING (id) WHERE before.split <> after.split"
    changes = 0
    for entry in previous.files:
        if entry.path.startswith(f"{SPLITS}/") and files.get(entry.path, entry.sha256) != entry.sha256:
            before, after = (pq.read_table(m.directory / entry.path, columns=["id", "split"]) for m in (previous, draft))
            changes += _count(query, before=before, after=after)
    return changes


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
LINK_AUDITS = (every_document_has_one_split, ids_unique)
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
