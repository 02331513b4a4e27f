"""Pretrained minus scratch on labelled sets, at three numbers of pretraining tokens: what is a longer pretraining worth?

    python -m benchmarks.classification [--quick] [--labelled FILE ...] [--corpus data/sample/corpus.parquet] [--tokens 200000 3200000]

One architecture (0.7 M parameters) is pretrained once for each number of tokens, each run with a schedule of its own, on the English
prose of the corpus. Documents that share 13 words in a row with a labelled text are left out first. Each checkpoint is then fine-tuned
and probed on each labelled set, with the settings of `classification`; fresh weights of the same architecture are trained likewise, with
the same validation parts, orders and heads, and TF-IDF with a linear SVM stands beside them.

A labelled file has the columns `text` and `label`, and `split` where it has its own split. Intervals are over seeds of fine-tuning and
test texts; each pretraining is one run, so what another one of the same length would give is not in them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.mixture_world import trained_base
from benchmarks.selection_pool import Pool, domains_of, prepare
from pipelines.classification import CLASSIFICATION_AUDITS, METHODS, ClassificationSettings, classify, correct_of, interval, located_sets
from pipelines.engine import Engine, map_shards
from pipelines.labelled_sets import LabelledSet
from pipelines.manifests import Manifest
from pipelines.store import Build

GENERAL = ("biomed", "book", "legal", "speech", "techdoc", "web", "wiki")
"""English prose; of another corpus all of its domains, where it has none of these."""
NGRAM = 13
OF_CHECKPOINTS = ("fine_tune", "linear_probe")
"""What differs between checkpoints; the other methods are measured once."""
MAX_BYTES = 60_000_000


def main() -> None:
    """Pretrain, classify, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", default=[Path("data/sample/corpus.parquet")], help="texts by domain")
    parser.add_argument("--labelled", type=Path, nargs="+", default=[Path("data/eval/works.parquet")], help="Parquet: text, label, split")
    parser.add_argument("--quick", action="store_true", help="half the tokens and documents, three seeds")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of pretraining")
    parser.add_argument("--seeds", type=int, help="seeds of fine-tuning")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--store", type=Path, help="where artifacts stay for the next time; a temporary directory where absent")
    arguments = parser.parse_args()
    tokens = sorted(set(arguments.tokens or ([100_000, 400_000, 1_600_000] if arguments.quick else [200_000, 800_000, 3_200_000])))
    size = {"max_documents": 300} if arguments.quick else {}
    seeds = arguments.seeds or (3 if arguments.quick else 5)
    settings = located_sets(ClassificationSettings(sets=tuple(map(labelled, arguments.labelled)), seeds=seeds, **size), Path())
    console, started = Console(width=None if sys.stdout.isatty() else 150), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gristmill-classification-") as name:
        directory = arguments.store or Path(name)
        corpus, dropped = unlabelled(arguments.corpus, arguments.labelled, directory)
        pool = prepare([corpus], directory, max_bytes=MAX_BYTES, duplicates="near")
        print(f"pool after {time.monotonic() - started:.0f} s, {dropped} documents with labelled texts left out", file=sys.stderr)
        results = measured(jobs_of(pool, tokens, settings), arguments.parallel)
        found = {one.name: compared(results, one.name) for one in settings.sets}
    for one, rows in found.items():
        console.print(gap_table(one, rows))
    known = {"tokens": tokens, "seeds": seeds, "documents_left_out": dropped, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps({"pretrained_minus_scratch": next(iter(found.values()))["largest"], **known, "sets": found}))


def labelled(path: Path) -> LabelledSet:
    """Return the labelled set in a file."""
    split = "split" if "split" in pq.read_schema(path).names else None
    return LabelledSet(name=path.stem, path=str(path.absolute()), split=split)


# What the checkpoints are trained on


def unlabelled(corpora: Sequence[Path], sets: Sequence[Path], directory: Path) -> tuple[Path, int]:
    """Write the documents of `corpora` that share no n-gram with a labelled text, and return the file and how many were left out.

    Its name is a hash of its content: artifacts in a store are told apart by the path they were read from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    held = {gram for one in sets for text in pq.read_table(one, columns=["text"])["text"].to_pylist() for gram in ngrams(text)}
    rows, dropped = [], 0
    for domain, (source, has_column) in domains_of(corpora).items():
        table = pq.read_table(source, columns=["text", "domain"] if has_column else ["text"])
        own = table.filter(pa.compute.field("domain") == domain) if has_column else table
        texts = [text for text in own["text"].to_pylist() if text]
        kept = [text for text in texts if held.isdisjoint(ngrams(text))]
        rows += [{"text": text, "domain": domain} for text in kept]
        dropped += len(texts) - len(kept)
    content = hashlib.sha256("".join(f"{row['domain']}\0{row['text']}\0" for row in rows).encode()).hexdigest()
    path = directory / f"corpus-{content[:12]}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path, dropped


def ngrams(text: str) -> set[str]:
    """Return the runs of `NGRAM` words of `text`."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}


# Measuring


@dataclass(frozen=True)
class Job:
    """A checkpoint, and what is classified with it."""

    pool: Pool
    general: tuple[str, ...]
    tokens: int
    settings: ClassificationSettings


def jobs_of(pool: Pool, tokens: Sequence[int], settings: ClassificationSettings) -> list[Job]:
    """Return a job for each size, the longest first; the shortest one measures what is the same for all."""
    domains = tuple(sorted(pool.tokens_by_domain))
    general = tuple(domain for domain in domains if domain in GENERAL) or domains
    own = {size: METHODS if size == min(tokens) else OF_CHECKPOINTS for size in tokens}
    return [Job(pool, general, size, settings.model_copy(update={"methods": own[size]})) for size in sorted(tokens, reverse=True)]


def pretrained_and_classified(job: Job) -> Manifest:
    """Return the classification of the checkpoint that `job` trains."""
    store = job.pool.store
    checkpoint = trained_base(store, job.pool, job.general, job.tokens)
    inputs = {"checkpoint": checkpoint, "tokenizer": job.pool.tokenizer}
    build = Build("classification", classify, job.settings, str(job.tokens), inputs, audits=CLASSIFICATION_AUDITS)
    return store.build(build).manifest


def measured(jobs: Sequence[Job], processes: int) -> dict[int, Manifest]:
    """Return the classification by tokens of pretraining, fewest first."""
    found = {}
    for mapped in map_shards(pretrained_and_classified, jobs, Engine(kind="processes", workers=processes), isolate=True):
        if mapped.error:
            raise mapped.error
        found[mapped.item.tokens] = mapped.result
    return dict(sorted(found.items()))


def compared(results: Mapping[int, Manifest], name: str) -> dict[str, object]:
    """Return what is known of one labelled set: scratch, TF-IDF, and each checkpoint beside them."""
    scores = {tokens: pq.read_table(result.file("scores.parquet")) for tokens, result in results.items()}
    of_all = scores[min(scores)]
    correct = {method: correct_of(of_all, name, method).astype(float) for method in ("scratch", "tfidf_svm")}
    sizes, gaps = {}, {}
    for tokens, table in scores.items():
        tuned, probe = (correct_of(table, name, method).astype(float) for method in OF_CHECKPOINTS)
        gaps[tokens] = tuned - correct["scratch"]
        sizes[tokens] = {
            "fine_tune": share(tuned),
            "linear_probe": share(probe),
            "pretrained_minus_scratch": interval(gaps[tokens]),
            "pretrained_minus_tfidf_svm": interval(tuned - correct["tfidf_svm"]),
        }
    row = next(one for one in facts(results[min(results)]) if one["name"] == name)
    return {
        **{key: row[key] for key in ("train_documents", "test_documents", "test_documents_in_training", "majority")},
        **{method: share(values) for method, values in correct.items()},
        "checkpoints": sizes,
        "largest": interval(gaps[max(gaps)]),
        "largest_minus_smallest": interval(gaps[max(gaps)] - gaps[min(gaps)]),
    }


def facts(result: Manifest) -> list[dict]:
    """Return what a classification says of its sets."""
    return json.loads(result.file("classification.json").read_text(encoding="utf-8"))["sets"]


def share(correct_SI: object) -> dict[str, float]:
    """Return an accuracy with its interval."""
    return interval(correct_SI, within=(0.0, 1.0))  # type: ignore[arg-type]


def gap_table(name: str, found: Mapping[str, object]) -> Table:
    """Return the accuracies by tokens of pretraining; a star where the interval of a difference leaves out 0."""
    sizes = f"{found['train_documents']} training and {found['test_documents']} test texts, most frequent class {found['majority']:.3f}"
    table = Table("pretraining tokens", title=f"{name}: accuracy, 95 % intervals ({sizes})", title_justify="left")
    for head in ("fine-tuned", "minus scratch", "minus TF-IDF + SVM", "linear probe"):
        table.add_column(head, justify="right")
    table.add_row("0 (scratch)", accuracy(found["scratch"]), "", "", "")
    for tokens, row in found["checkpoints"].items():  # type: ignore[attr-defined]
        gaps = [difference(row[f"pretrained_minus_{other}"]) for other in ("scratch", "tfidf_svm")]
        table.add_row(f"{tokens:,}", accuracy(row["fine_tune"]), *gaps, accuracy(row["linear_probe"]))
    table.add_section()
    table.add_row("largest - smallest", "", difference(found["largest_minus_smallest"]), "", "")
    table.add_row("TF-IDF + SVM", accuracy(found["tfidf_svm"]), "", "", "")
    return table


def accuracy(values: Mapping[str, float]) -> str:
    """Return an accuracy and its interval as text."""
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def difference(values: Mapping[str, float]) -> str:
    """Return a difference and its interval as text."""
    return f"{values['mean']:+.3f} [{values['low']:+.3f}, {values['high']:+.3f}]{'' if values['low'] <= 0 <= values['high'] else ' *'}"


if __name__ == "__main__":
    main()
