"""Personal data: what is found of what was planted, what is masked in clean text, and how fast.

    python -m benchmarks.personal_data [--quick] [--corpus data/sample] [--more other.parquet ...]

Recall: the sample's planted strings (`labels.parquet`) that are gone after masking. Precision, to be judged by eye: per domain,
what is masked by kind, with examples, and e-mail addresses beside a count by the simplest pattern (characters, @, characters, a
point, letters), with what that pattern still finds afterwards. `--more` names Parquet files with a column `text`. Speed: CPU
time, of datatrove's PIIFormatter (e-mail and public IPv4 addresses alone) too where it is installed. `--quick` takes a tenth of
the documents. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.personal_data import KINDS, PersonalData, find, mask

SIMPLE = re.compile(r"[^\s<>()\[\],;:\"']+@[^\s<>()\[\],;:\"']+\.[A-Za-z]{2,}")
AROUND = 12
"""Characters of context of an example."""


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample"), help="directory with corpus, dirty and labels.parquet")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="more Parquet files with a column `text`")
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents")
    arguments = parser.parse_args()
    every = 10 if arguments.quick else 1
    domains: defaultdict[str, list[str]] = defaultdict(list)
    for row in pq.read_table(arguments.corpus / "corpus.parquet", columns=["domain", "text"]).to_pylist()[::every]:
        domains[row["domain"]].append(row["text"])
    for path in arguments.more:
        domains[path.stem] = pq.read_table(path, columns=["text"])["text"].to_pylist()[::every]
    console, planted = Console(width=160), recall(arguments.corpus)
    rows = {domain: precision(texts) for domain, texts in sorted(domains.items())}
    _print(console, rows)
    texts = [text for domain in sorted(domains) for text in domains[domain]]
    result = {**planted, "mb_per_second": speed(texts), "domains": {domain: row["counts"] for domain, row in rows.items()}}
    result["simple"], result["simple_left"] = (sum(row[key] for row in rows.values()) for key in ("simple", "left"))
    print(json.dumps(result))


def recall(corpus: Path) -> dict[str, int]:
    """Return the number of planted strings, and of those that masking leaves."""
    labels = pq.read_table(corpus / "labels.parquet").to_pylist()
    planted = {row["id"]: json.loads(row["planted"]) for row in labels if row["noise"] == "pii"}
    documents = [row for row in pq.read_table(corpus / "dirty.parquet", columns=["id", "text"]).to_pylist() if row["id"] in planted]
    left = [value for row in documents for value in planted[row["id"]] if value in mask(row["text"], PersonalData())[0]]
    return {"planted": sum(map(len, planted.values())), "planted_left": len(left)}


def precision(texts: Sequence[str]) -> dict:
    """Return what is found in `texts` by kind, an example of each, and the counts by `SIMPLE` before and after masking."""
    counts, examples, simple, left = Counter[str](), {}, 0, Counter[str]()
    for text in texts:
        for found in find(text):
            counts[found.kind] += 1
            shown = text[max(0, found.start - AROUND) : found.end + AROUND // 2]
            examples.setdefault(found.kind, " ".join(shown.split()))
        addresses = len(SIMPLE.findall(text))
        simple += addresses
        if addresses:
            left.update(SIMPLE.findall(mask(text, PersonalData())[0]))
    return {
        "documents": len(texts),
        "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
        "examples": {kind: example for kind, example in examples.items() if kind != "email"},
        "simple": simple,
        "left": sum(left.values()),
        "left_most": [address for address, _ in left.most_common(2)],
    }


def speed(texts: Sequence[str]) -> dict[str, float]:
    """Return MB of text per second of CPU, for each way to mask."""
    ways = {"gristmill": lambda text: mask(text, PersonalData())}
    try:
        from datatrove.pipeline.formatters.pii import PIIFormatter

        ways["datatrove"] = PIIFormatter().format
    except ImportError:
        pass
    size, found = sum(len(text.encode()) for text in texts) / 1e6, {}
    for name, way in ways.items():
        way(texts[0])
        started = time.process_time()
        for text in texts:
            way(text)
        found[name] = round(size / (time.process_time() - started), 1)
    return found


def _print(console: Console, rows: dict[str, dict]) -> None:
    table = Table(title="found in clean text", title_justify="left")
    for column in ("domain", "documents", *KINDS, "addresses by the simplest pattern", "left by masking", "examples"):
        table.add_column(column, justify="left" if column in ("domain", "examples") else "right")
    for domain, row in rows.items():
        kinds = [str(row["counts"].get(kind, "")) for kind in KINDS]
        left = f"{row['left']} {' '.join(row['left_most'])}" if row["left"] else "0"
        table.add_row(domain, f"{row['documents']:,}", *kinds, str(row["simple"]), left, "\n".join(row["examples"].values()))
    console.print(table)


if __name__ == "__main__":
    main()
