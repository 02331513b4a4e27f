"""The raw corpus: the documents of one domain and one snapshot, as they came from their source.

`ingest` reads a source (`pipelines/sources`) into ``documents.parquet`` and ``quarantine.parquet``; `export_corpus` writes
corpora as a folder that ``datasets.load_from_disk`` opens. The corpus is addressed by the content of its source's files.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from pipelines import plugins
from pipelines.documents import (
    DOCUMENT_SCHEMA,
    QUARANTINE_SCHEMA,
    Document,
    Quarantined,
    TableWriter,
    document_id,
    read_batches,
    repeated_ids,
    row_count,
)
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.manifests import Check, Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.sources import Source
from pipelines.store import advisory

FULL_ID = re.compile(r"@\d{4}-\d{2}$")
MAX_ID_CHARACTERS = 200
EXCERPT_CHARACTERS = 200
SAMPLE_DOCUMENTS = 3
SAMPLE_CHARACTERS = 120
MAX_TEXT_BYTES = 1024**3
"""Half of what one Arrow string array holds (2**31 - 1 bytes)."""


class CorpusSettings(Settings):
    """What a raw corpus is made from; built by `corpus_settings`, which hashes the files."""

    domain: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    snapshot: str
    """The month the documents were collected, ``YYYY-MM-01``."""
    source: str
    """A plugin of `pipelines/sources`."""
    source_settings: dict[str, object] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of every local file the source reads for this partition."""
    revision: str = ""
    """What a remote source stands at (a commit); empty for local files."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read no more than this many documents, quarantined ones included; null reads all."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity: the same project elsewhere makes the same corpus."""

    @field_validator("snapshot")
    @classmethod
    def _first_of_a_month(cls, snapshot: str) -> str:
        try:
            first = date.fromisoformat(snapshot).strftime("%Y-%m-01") == snapshot
        except ValueError:
            first = False
        if not first:
            raise GristmillError("a snapshot is a month, written YYYY-MM-01, as in 2026-03-01")
        return snapshot


def corpus_settings(
    domain: str, snapshot: str, source: str, source_settings: dict[str, object], root: Path, *, max_documents: int | None = None
) -> CorpusSettings:
    """Return the settings of one raw corpus, with the hashes of the files it is read from.

    Raises:
        GristmillError: an unknown source or setting, a file that is not there, or a hub that cannot be reached.
    """
    plugin = _source(source, source_settings)
    values = {
        "domain": domain,
        "snapshot": snapshot,
        "source": source,
        "source_settings": plugin.model_dump(mode="json"),
        "max_documents": max_documents,
        "root": root,
    }
    checked = plugins.validate(CorpusSettings, values, where=f"corpus {domain}|{snapshot}")
    content = {"files": _hashes(plugin, checked), "revision": plugin.revision(domain, snapshot, root=root)}
    return checked.model_copy(update=content)


def source_plugins(settings: CorpusSettings) -> tuple[str, ...]:
    """Return the plugin modules that `settings` names, for the code version."""
    return plugin_modules(settings.source, settings.source_settings)


def plugin_modules(source: str, settings: dict[str, object]) -> tuple[str, ...]:
    """Return the modules of `source` with `settings`: its own, and those of the plugins that it uses."""
    return (f"pipelines.sources.{source}", *_source(source, settings).modules())


def ingest(settings: CorpusSettings, out: Path) -> Outcome:
    """Read the partition's documents from its source.

    A document keeps its source's id where that is usable (not empty, at most `MAX_ID_CHARACTERS` printable characters,
    not seen before in the partition), else it gets one made from its locator: the same in every run. Text that is empty
    or cannot be written as UTF-8 is quarantined; anything else is kept as it came. Holds 8 bytes for each id in memory,
    and a row group.

    Raises:
        GristmillError: the source cannot be read, or its files are not those that `settings` names.
    """
    source = _source(settings.source, settings.source_settings)
    writer = _CorpusWriter(settings)
    with ExitStack() as stack:
        documents = stack.enter_context(TableWriter(out / "documents.parquet", DOCUMENT_SCHEMA))
        quarantine = stack.enter_context(TableWriter(out / "quarantine.parquet", QUARANTINE_SCHEMA))
        for item in islice(source.read(settings.domain, settings.snapshot, root=settings.root), settings.max_documents):
            row = writer.row(item)
            (quarantine if "reason" in row else documents).write(row)
    _same_content(source, settings)
    return writer.outcome(documents.rows, quarantine.rows)


class _CorpusWriter:
    """Turns what a source yields into rows, and counts them."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._settings = settings
        self._ids = SeenIds()
        self._reasons: Counter[str] = Counter()
        self._sample: list[dict[str, str | None]] = []
        self._characters = 0
        self._bytes = 0
        self._ids_replaced = 0

    def row(self, item: Document | Quarantined) -> dict[str, str | None]:
        """Return a row of `DOCUMENT_SCHEMA`, or of `QUARANTINE_SCHEMA` where `item` is no usable document."""
        unusable = item if isinstance(item, Quarantined) else _unusable(item)
        if unusable:
            self._reasons[unusable.reason] += 1
            return {"locator": _escaped(unusable.locator), "reason": unusable.reason, "excerpt": _escaped(unusable.excerpt)}
        self._characters += len(item.text)
        self._bytes += len(item.text.encode())
        row = {name: getattr(item, name) for name in ("text", "license", "date", "url", "lang", "title", "metadata")}
        row |= {
            "id": self._id(item),
            "domain": self._settings.domain,
            "source": item.source or f"{self._settings.source}:{item.locator}",
        }
        if len(self._sample) < SAMPLE_DOCUMENTS:
            self._sample.append({"id": row["id"], "title": row["title"], "text": item.text[:SAMPLE_CHARACTERS]})
        return row

    def _id(self, document: Document) -> str:
        """Return ``<domain>-<given id>@<month>``: unique over domains and snapshots, whatever the source's ids are.

        An id of that form already (an exported corpus) is kept.
        """
        domain, given = self._settings.domain, document.id or ""
        usable = 0 < len(given) <= MAX_ID_CHARACTERS and given.isprintable()
        first = self._full_id(given if usable else document_id(domain, self._settings.source, document.locator))
        attempt, name = 0, first
        while not self._ids.add(name):
            name = self._full_id(document_id(domain, given, document.locator, *([str(attempt)] if attempt else [])))
            attempt += 1
        self._ids_replaced += bool(given) and (name != first or not usable)
        return name

    def _full_id(self, name: str) -> str:
        prefix = "" if name.startswith(f"{self._settings.domain}-") else f"{self._settings.domain}-"
        suffix = "" if not prefix and FULL_ID.search(name) else f"@{self._settings.snapshot[:7]}"
        return f"{prefix}{name}{suffix}"

    def outcome(self, kept: int, quarantined: int) -> Outcome:
        """Return the counts, the reasons of quarantine and the first documents."""
        settings = self._settings
        note = {"note": f"no documents for {settings.domain} in {settings.snapshot}"}
        reasons = sorted(self._reasons.items(), key=lambda item: (-item[1], item[0]))
        return Outcome(
            counts={
                "documents_in": kept + quarantined,
                "kept": kept,
                "dropped": 0,
                "quarantined": quarantined,
                "characters": self._characters,
                "bytes": self._bytes,
                "ids_replaced": self._ids_replaced,
            },
            tables={
                "quarantine": [{"reason": reason, "documents": documents} for reason, documents in reasons],
                "sample": [dict(row) for row in self._sample],
            },
            details={} if kept + quarantined else note,
        )


class SeenIds:
    """The ids met so far, as 64-bit hashes (BLAKE2b): sorted arrays that at least double in size, and a set of the latest.

    Two ids with one hash make the second get another id, the same in every run: one in 400,000 for ten million documents.
    """

    def __init__(self, recent: int = 1 << 17) -> None:
        self._limit = recent
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, name: str) -> bool:
        """Take `name` in; return False where it was there already."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        if key in self._recent or any(_holds(keys, np.uint64(key)) for keys in self._sorted):
            return False
        self._recent.add(key)
        if len(self._recent) >= self._limit:
            self._sorted.append(np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))))
            self._recent.clear()
            while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
                self._sorted[-2:] = [np.sort(np.concatenate(self._sorted[-2:]))]
        return True


def _holds(keys: np.ndarray, key: np.uint64) -> bool:
    place = int(np.searchsorted(keys, key))
    return place < len(keys) and keys[place] == key


def _unusable(document: Document) -> Quarantined | None:
    """Return `document` as quarantined where it has no text or a field that is not Unicode, else None."""
    if not document.text.strip():
        return Quarantined(document.locator, "empty text", document.title or document.id or "")
    for name in ("text", "id", "source", "license", "date", "url", "lang", "title", "metadata"):
        if not _is_unicode(getattr(document, name)):
            return Quarantined(document.locator, "undecodable" if name == "text" else f"undecodable {name}", document.text)
    if len(document.text.encode()) > MAX_TEXT_BYTES:
        return Quarantined(document.locator, f"text longer than {MAX_TEXT_BYTES} bytes", document.text)
    return None


def _is_unicode(value: str | None) -> bool:
    """Return False for a string with a lone surrogate: no UTF-8 stands for it."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(value: str) -> str:
    """Return the first characters of `value` on one line, control characters and lone surrogates escaped."""
    return json.dumps(value[:EXCERPT_CHARACTERS], ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace").decode()


def _source(name: str, settings: dict[str, object]) -> Source:
    plugin = plugins.build("sources", name, settings)
    if not isinstance(plugin, Source):
        raise GristmillError(f"pipelines.sources.{name} defines {type(plugin).__name__}, which does not derive from Source")
    return plugin


def _hashes(source: Source, settings: CorpusSettings) -> dict[str, str]:
    files = source.files(settings.domain, settings.snapshot, root=settings.root)
    return file_hashes(files, settings.root)


def _same_content(source: Source, settings: CorpusSettings) -> None:
    """Raise if the source is not, after reading, what `settings` was built from: the address would name other content."""
    found = _hashes(source, settings)
    changed = sorted(name for name in found.keys() | settings.files.keys() if found.get(name) != settings.files.get(name))
    revision = source.revision(settings.domain, settings.snapshot, root=settings.root)
    if changed or revision != settings.revision:
        what = ", ".join(changed) or f"revision {settings.revision} (now {revision})"
        raise GristmillError(f"{settings.domain}|{settings.snapshot}: the source changed while it was read: {what}; materialize again")


def documents_conserved(draft: Manifest) -> Check:
    """Pass where documents in = kept + dropped + quarantined, and the tables hold as many rows as were counted."""
    counts = draft.counts
    rows = {name: _rows(draft, f"{name}.parquet") for name in ("documents", "quarantine")}
    passed = (
        counts["documents_in"] == counts["kept"] + counts["dropped"] + counts["quarantined"]
        and rows["documents"] == counts["kept"]
        and rows["quarantine"] == counts["quarantined"]
    )
    described = f"{counts['documents_in']} in = {counts['kept']} kept + {counts['dropped']} dropped + {counts['quarantined']} quarantined"
    return Check(name="documents_conserved", passed=passed, description=described, metadata={f"{n}_rows": r for n, r in rows.items()})


def ids_unique(draft: Manifest) -> Check:
    """Pass where every document has an id of its own."""
    path = draft.directory / "documents.parquet"
    repeated, null = repeated_ids(path) if path.exists() else (0, 0)
    total = max(0, _rows(draft, "documents.parquet"))
    return Check(name="ids_unique", passed=not repeated and not null, description=f"{total - repeated - null} ids for {total} documents")


def text_present(draft: Manifest) -> Check:
    """Pass where every document has text."""
    lengths = (pc.fill_null(pc.binary_length(batch.column(0)), 0).to_numpy(zero_copy_only=False) for batch in _batches(draft, "text"))
    empty = sum(int((length == 0).sum()) for length in lengths)
    return Check(name="text_present", passed=empty == 0, description=f"{empty} documents without text")


DAMAGE = re.compile("damaged|ends early")
"""What the sources say of a file or stream that could not be read to its end: more may be lost than the quarantine holds."""


@advisory
def input_whole(draft: Manifest) -> Check:
    """Warn where a file or a stream is cut or damaged."""
    found = [row for row in draft.outcome.tables.get("quarantine", []) if DAMAGE.search(str(row["reason"]))]
    places = sum(int(row["documents"]) for row in found)
    named = "; ".join(f"{row['documents']} {row['reason']}" for row in found) or "none"
    remedy = "; see locators in quarantine.parquet, copy these files again and materialize again" if found else ""
    description = f"places where input ends early or is damaged: {named}{remedy}"
    return Check(name="input_whole", passed=not found, description=description, metadata={"places": places})


CORPUS_AUDITS = (documents_conserved, ids_unique, text_present, input_whole)


def _rows(draft: Manifest, name: str) -> int:
    path = draft.directory / name
    return row_count(path) if path.exists() else -1


def _batches(draft: Manifest, column: str) -> Iterator[pa.RecordBatch]:
    path = draft.directory / "documents.parquet"
    return read_batches(path, [column]) if path.exists() else iter(())


def export_corpus(corpora: Manifest | Sequence[Manifest], out: Path, *, keep: set[str] | None = None) -> None:
    """Write the documents of `corpora` (raw or cleaned) as a folder that ``datasets.load_from_disk(out)`` opens.

    Documents stand in the order of `corpora` and of their tables; `keep` limits them to these ids. Memory holds one batch;
    the disk of `out` holds the text twice while writing.

    Raises:
        GristmillError: `out` exists and is not an empty folder.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GristmillError(f"{out} exists; name a folder that does not exist, or remove it first")
    wanted = None if keep is None else pa.array(sorted(keep), pa.string())
    features = datasets.Features.from_arrow_schema(DOCUMENT_SCHEMA)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        arrow = Path(scratch) / "documents.arrow"
        with ArrowWriter(path=str(arrow), features=features) as writer:
            for corpus in [corpora] if isinstance(corpora, Manifest) else corpora:
                for batch in read_batches(corpus.file("documents.parquet"), DOCUMENT_SCHEMA.names):
                    kept = batch if wanted is None else batch.filter(pc.is_in(batch.column("id"), value_set=wanted))
                    writer.write_table(pa.Table.from_batches([kept]))
            writer.finalize()
        dataset = datasets.Dataset.from_file(str(arrow))
        # without a shard an empty dataset cannot be loaded again; None lets datasets cut at 500 MB
        dataset.save_to_disk(str(Path(scratch) / "dataset"), num_shards=None if len(dataset) else 1)
        (Path(scratch) / "dataset").rename(out)
