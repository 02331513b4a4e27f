"""Build data/eval: a part of each evaluation set that is small enough to be committed.

    python data/build_eval.py --blimp BLIMP

BLIMP is a folder with the 67 files ``*.jsonl`` of BLiMP (github.com/alexwarstadt/blimp, folder data), or one Parquet file with
the columns phenomenon, paradigm, good, bad. Of each paradigm the `PAIRS` pairs with the smallest BLAKE2b hash are taken, so that
the order of the input does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PAIRS = 30
COLUMNS = ("phenomenon", "paradigm", "good", "bad")
HERE = Path(__file__).parent


def read_blimp(path: Path) -> list[dict[str, str]]:
    """Return the pairs of BLiMP."""
    if path.suffix == ".parquet":
        return pq.read_table(path, columns=list(COLUMNS)).to_pylist()
    names = {"phenomenon": "linguistics_term", "paradigm": "UID", "good": "sentence_good", "bad": "sentence_bad"}
    lines = [line for file in sorted(path.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{column: row[name] for column, name in names.items()} for row in map(json.loads, lines)]


def chosen(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return `PAIRS` pairs of each paradigm, sorted by paradigm and hash."""

    def place(row: dict[str, str]) -> tuple[str, str]:
        return row["paradigm"], hashlib.blake2b(f"{row['good']}\0{row['bad']}".encode(), digest_size=8).hexdigest()

    found: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=place):
        found.setdefault(row["paradigm"], []).append(row)
    return [row for paradigm in sorted(found) for row in found[paradigm][:PAIRS]]


def main() -> None:
    """Write the files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blimp", type=Path, required=True)
    rows = chosen(read_blimp(parser.parse_args().blimp))
    (HERE / "eval").mkdir(exist_ok=True)
    path = HERE / "eval" / "blimp.parquet"
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", compression_level=19)
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
