"""What is known of held-out documents beside their losses: snapshot, language, age, and what training text they share."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.manifests import Manifest, Member
from pipelines.shards import HeldOutDocuments, passage_pools
from pipelines.shared_spans import tokens_in_training

MONTHS = 12
DATE = re.compile(r"(\d{4})(?:-(\d{2}))?")
"""The year and month that an ISO 8601 date begins with."""


def add_facts(
    table: pa.Table,
    held: dict[str, HeldOutDocuments],
    *,
    decisions: Manifest,
    cleaned: Sequence[Manifest] = (),
    selection: Sequence[Member] = (),
    shards: Sequence[Manifest] = (),
    end_of_text: int = 0,
) -> pa.Table:
    """Return `table` (one row per document of `held`, in their order) with what is known of each; null where it is not.

    Columns:
        snapshot: string, the collection month, of `decisions`.
        language: string: as a filter identified it (`decisions`), else as the source said (`cleaned`).
        date: string, when the document was written, of `cleaned`.
        age_months: int64, months from the date, else from the snapshot, to the newest snapshot that `selection` trains on; below 0 for
            a document that is newer. A date without a month counts from the middle of its year.
        shared_tokens: int64, tokens in a span that a selected passage holds too (`tokens_in_training`); null without `selection`.
    """
    ids = table["id"].to_pylist()
    snapshots, languages = (_values(decisions, name, ids) for name in ("snapshot", "lang"))
    dates: list[str | None] = [None] * len(ids)
    for corpus in cleaned:
        found = {name: _values(corpus, name, ids) for name in ("lang", "date")}
        languages = _filled(languages, found["lang"])
        dates = _filled(dates, found["date"])
    newest = newest_snapshot(selection)
    ages = [_months(date or snapshot, newest) for date, snapshot in zip(dates, snapshots, strict=True)]
    shared: np.ndarray | list[None] = [None] * len(ids)
    if selection:
        tokens = [tokens for documents in held.values() for tokens in documents.tokens]
        shared = tokens_in_training(tokens, passage_pools(selection, shards, end_of_text).values())
    columns = {
        "snapshot": pa.array(snapshots, pa.string()),
        "language": pa.array(languages, pa.string()),
        "date": pa.array(dates, pa.string()),
        "age_months": pa.array(ages, pa.int64()),
        "shared_tokens": pa.array(shared, pa.int64()),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def newest_snapshot(selection: Sequence[Member]) -> str | None:
    """Return the newest snapshot of the selected passages, None where the selection does not say."""
    newest = []
    for member in selection:
        if "snapshot" in pq.read_schema(member.path).names:
            table = pq.read_table(member.path, columns=["snapshot", "selected"])
            newest.append(pc.max(table["snapshot"].filter(table["selected"])).as_py())
    return max((snapshot for snapshot in newest if snapshot), default=None)


def _values(manifest: Manifest, column: str, ids: Sequence[str]) -> list[str | None]:
    """Return `column` of the documents `ids` in the one Parquet file of `manifest`; of decisions, those that are kept."""
    names = {entry.path for entry in manifest.files}
    path = manifest.file("decisions.parquet" if "decisions.parquet" in names else "documents.parquet")
    there = pq.read_schema(path).names
    if column not in there:
        return [None] * len(ids)
    table = pq.read_table(path, columns=["id", column, *(["kept"] if "kept" in there else [])])
    wanted = pc.is_in(table["id"], value_set=pa.array(ids, pa.string()))
    table = table.filter(pc.and_(wanted, table["kept"]) if "kept" in there else wanted)
    found = dict(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))
    return [found.get(name) for name in ids]


def _filled(values: Sequence[str | None], others: Sequence[str | None]) -> list[str | None]:
    return [other if value is None else value for value, other in zip(values, others, strict=True)]


def _months(date: str | None, newest: str | None) -> int | None:
    """Return the months from `date` to the snapshot `newest`."""
    then, now = (DATE.match(text) if text else None for text in (date, newest))
    if not then or not now:
        return None
    first, last = (int(found[1]) * MONTHS + int(found[2] or MONTHS // 2 + 1) for found in (then, now))
    return last - first


def years_of_age(months: int | None) -> str | None:
    """Return the group of an age: ``newer`` than the training text, ``0 years``, ``1 year``, ``2-4 years``, ... ``20 years or more``."""
    if months is None:
        return None
    if months < 0:
        return "newer"
    years = months // MONTHS
    if years < 2:
        return f"{years} year{'' if years == 1 else 's'}"
    return next((f"{low}-{high} years" for low, high in ((2, 4), (5, 9), (10, 19)) if years <= high), "20 years or more")
