"""The encoder against `tokenizers`, and the whole step against datatrove's, on the same documents in one run.

    python -m benchmarks.tokenization [--quick] [--corpus data/sample ...] [--megabytes N]

The corpus is Parquet files with a column `text`, or folders of them; equal texts are taken once, in a seeded order. Where they have
less than 100 MB they are taken again and again, two in a hundred words of each copy replaced by new ones (two words of the corpus
joined), so that no two texts are equal; such copies repeat most words, which favours caches, and the run says so. Byte-level BPEs
of 8,192 and 32,768 tokens are trained on 4 MB of it.

Encoding: texts to ids, beside `tokenizers.encode_batch` (and `encode_batch_fast`, which knows no offsets), its ids taken as lists. The
cold pass is the first in a process of its own over all of the text; trying the backend on a sample and verifying one text in 200 are
counted, loading tokenizer.json is not, for neither. Every id of every document is compared (with 32,768 tokens, `--quick` compares a
part), and those of 20,000 odd texts.

Step: Parquet in; token ids, document index, passage index, vocabulary, SHA-256 of all files, fsync and audits out, beside datatrove's
ParquetReader and DocumentTokenizer (documents not shuffled, no loss mask, an end of text per document): its fastest setting, which
leaves ids without their documents. Both read the same file; the ids they write are compared byte for byte.

Speed is megabytes of UTF-8 by CPU second of one thread. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines import tokenization
from pipelines.documents import DOCUMENT_SCHEMA, TableWriter, read_batches
from pipelines.encoders import BACKENDS, TOKENIZER, load_tokenizer, open_encoder
from pipelines.manifests import Manifest, Member, Outcome, read_manifest
from pipelines.odd_texts import odd_texts
from pipelines.plugins import Settings
from pipelines.store import Build, Store

VOCABULARIES = (8_192, 32_768)
QUICK_COMPARED_MB = 10
"""Megabytes whose ids are compared with 32,768 tokens, and on which `tokenizers` is timed, with `--quick`."""
LEAST_MB, MOST_MB = 100, 200
TRAINED_ON_BYTES = 4_000_000
EDITED = 0.02
ODD_TEXTS = 20_000
KEY = "text|2026-01-01"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {"TOKENIZERS_PARALLELISM": "false"}


class FileSettings(Settings):
    """A Parquet file to be published as it is."""

    source: str
    name: str


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[Path("data/sample")], help="Parquet files with a column text, or folders"
    )
    parser.add_argument("--quick", action="store_true", help=f"{LEAST_MB} MB, and fewer ids compared with 32,768 tokens")
    parser.add_argument("--megabytes", type=float, help=f"text to take, instead of {LEAST_MB} to {MOST_MB}")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](*arguments.child[1:])))
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-tokenization-") as directory:
        result = measure(arguments, Path(directory))
    show(result)
    print(json.dumps(result))


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, object]:
    """Build the inputs in `directory`, and run every measurement in a process of its own."""
    started = time.monotonic()
    texts = unique_texts(arguments.corpus)
    own = sum(len(text.encode()) for text in texts) / 1e6
    wanted = arguments.megabytes or (LEAST_MB if arguments.quick else min(MOST_MB, max(LEAST_MB, own)))
    store = Store(directory / "store")
    cleaned = publish_documents(store, directory, taken(texts, wanted * 1e6))
    say(f"{own:.0f} MB of different texts; {cleaned.counts['bytes'] / 1e6:.0f} MB are read")
    repeated = own < wanted
    tokenizers = {size: train(store, cleaned, directory, size) for size in VOCABULARIES}
    encoded = {}
    for size, tokenizer in tokenizers.items():
        compared = QUICK_COMPARED_MB if arguments.quick and size != VOCABULARIES[0] else wanted + 1
        timed = QUICK_COMPARED_MB if arguments.quick else compared
        encoded[size] = child("encode", cleaned.directory, tokenizer.directory, compared, timed)
        say(f"{size} tokens: {encoded[size]}")
    ours = child("step", store.root, cleaned.directory, tokenizers[VOCABULARIES[0]].directory)
    say(f"step: {ours}")
    theirs = child("datatrove", cleaned.directory, tokenizers[VOCABULARIES[0]].directory, directory / "datatrove")
    say(f"datatrove: {theirs}")
    same = Path(str(ours["tokens"])).read_bytes() == Path(str(theirs["tokens"])).read_bytes()
    counts = [(found[f"{kind}_identical"], found[f"{kind}_compared"]) for found in encoded.values() for kind in ("texts", "odd")]
    return {
        "speedup": min(found["speedup"] for found in encoded.values()),
        "parity": sum(identical for identical, _ in counts) / sum(compared for _, compared in counts),
        "step_speedup_vs_datatrove": round(ours["mb_per_second"] / theirs["mb_per_second"], 1),
        "step_ids_identical": same,
        "megabytes": round(cleaned.counts["bytes"] / 1e6, 1),
        "documents": cleaned.counts["documents"],
        "of_different_texts_mb": round(own, 1),
        "copies_with_edits": repeated,
        "encode": {str(size): found for size, found in encoded.items()},
        "step_mb_per_second": ours["mb_per_second"],
        "step_without_audits_mb_per_second": ours["without_audits_mb_per_second"],
        "datatrove_mb_per_second": theirs["mb_per_second"],
        "seconds": round(time.monotonic() - started, 1),
    }


def say(line: str) -> None:
    """Say on stderr how far it is."""
    print(line, file=sys.stderr, flush=True)


def unique_texts(corpus: Sequence[Path]) -> list[str]:
    """Return the different texts of `corpus`, in a seeded order."""
    paths = [found for path in corpus for found in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    columns = (pq.read_table(path, columns=["text"])["text"] for path in paths if "text" in pq.read_schema(path).names)
    texts = list(dict.fromkeys(text for column in columns for text in column.to_pylist() if text))
    random.Random(0).shuffle(texts)
    return texts


def taken(texts: list[str], num_bytes: float) -> Iterator[str]:
    """Yield `texts`, then copies with words replaced, until they have `num_bytes`."""
    draw, left, edited = random.Random(0), num_bytes, False
    words = sorted({word for text in texts[:2_000] for word in text.split(" ") if word.isalpha()})
    while left > 0:
        for text in texts:
            parts = text.split(" ")
            for _ in range(max(1, int(EDITED * len(parts))) if edited else 0):
                parts[draw.randrange(len(parts))] = draw.choice(words) + draw.choice(words)
            copy = " ".join(parts)
            left -= len(copy.encode())
            yield copy
            if left <= 0:
                return
        edited = True


def publish_file(settings: FileSettings, out: Path) -> Outcome:
    """Publish the file that `settings` names, with what it holds."""
    os.link(settings.source, out / settings.name)
    column = pq.ParquetFile(settings.source).schema_arrow.names
    if "text" not in column:
        return Outcome()
    sizes = [
        sum(map(len, (text.encode() for text in batch.column(0).to_pylist()))) for batch in read_batches(out / settings.name, ["text"])
    ]
    return Outcome(counts={"documents": pq.read_metadata(settings.source).num_rows, "bytes": sum(sizes)})


def publish_documents(store: Store, directory: Path, texts: Iterator[str]) -> Manifest:
    """Publish `texts` as a cleaned corpus."""
    path = directory / "input.parquet"
    with TableWriter(path, DOCUMENT_SCHEMA) as writer:
        for number, text in enumerate(texts):
            writer.write({"id": f"text-{number}", "text": text, "domain": "text", "source": "benchmark"})
    settings = FileSettings(source=str(path), name="documents.parquet")
    return store.build(Build("cleaned_corpus", publish_file, settings, KEY)).manifest


def train(store: Store, cleaned: Manifest, directory: Path, size: int) -> Manifest:
    """Train a byte-level BPE of `size` tokens, on documents that are all of the training split."""
    path = directory / "split.parquet"
    ids = pq.read_table(cleaned.file("documents.parquet"), columns=["id"])
    pq.write_table(ids.append_column("split", pa.array(["train"] * len(ids))), path)
    splits = store.build(Build("duplicate_clusters", publish_file, FileSettings(source=str(path), name=path.name))).manifest
    path.unlink()
    inputs = {"sample": (cleaned,), "splits": (Member(manifest=splits, name=path.name),)}
    settings = tokenization.TokenizerSettings(vocabulary_size=size, sample_bytes=TRAINED_ON_BYTES)
    say(f"training {size} tokens")
    return store.build(Build("tokenizer", tokenization.train_tokenizer, settings, inputs=inputs)).manifest


def child(*arguments: object) -> dict[str, float]:
    """Run one measurement in a fresh process, one thread each, and return what it found."""
    command = [sys.executable, "-m", "benchmarks.tokenization", "--child", *map(str, arguments)]
    found = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def encode(cleaned: str, tokenizer: str, compared_mb: str, timed_mb: str) -> dict[str, object]:
    """Encode every document twice, then compare with `tokenizers`, timing it on the first of them."""
    path, directory = Path(cleaned) / "documents.parquet", Path(tokenizer)
    columns = [batch.column(0) for batch in read_batches(path, ["text"], rows=tokenization.DOCUMENTS_PER_BATCH)]
    batches = [column.to_pylist() for column in columns]
    sizes = [pc.binary_length(column).to_numpy(zero_copy_only=False).astype(np.int64) for column in columns]
    megabytes = [size.sum() / 1e6 for size in sizes]
    passes: dict[str, float] = {}
    clock = time.process_time()
    encoder = open_encoder(directory, tokenization.backend_sample(path))
    opened = time.process_time() - clock
    clock = time.process_time()
    reference = load_tokenizer(directory)
    BACKENDS[encoder.backend]((directory / TOKENIZER).read_text(encoding="utf-8"))
    loading = time.process_time() - clock
    for name in ("cold", "warm"):
        clock = time.process_time()
        ids = [(encoded.ids, encoded.bounds) for encoded in map(encoder.encode, batches, sizes)]
        passes[name] = time.process_time() - clock
    done = timed = 0.0
    spent = {"encode_batch": 0.0, "encode_batch_fast": 0.0}
    same = documents = 0
    for batch, (found, bounds), size in zip(batches, ids, megabytes, strict=True):
        if done >= float(compared_mb):
            break
        once = timed >= float(timed_mb)
        for name in list(spent)[int(once) :]:
            clock = time.process_time()
            expected = [encoding.ids for encoding in getattr(reference, name)(batch, add_special_tokens=False)]
            spent[name] += 0.0 if once else time.process_time() - clock
        same += sum(map(np.array_equal, np.split(found, bounds[1:-1]), expected))
        documents, done, timed = documents + len(batch), done + size, timed + (0.0 if once else size)
    odd = odd_texts([tokenization.END_OF_TEXT, tokenization.MASK], count=ODD_TEXTS, seed=1)
    found = encoder.encode(odd)
    expected = reference.encode_batch_fast(odd, add_special_tokens=False)
    odd_ids = np.split(found.ids, found.bounds[1:-1])
    ours, theirs = sum(megabytes) / (opened - loading + passes["cold"]), {name: timed / seconds for name, seconds in spent.items()}
    return {
        "backend": encoder.backend,
        "reason": encoder.reason,
        "cold_mb_per_second": round(ours, 1),
        "warm_mb_per_second": round(sum(megabytes) / passes["warm"], 1),
        "trial_seconds": round(opened - loading, 2),
        "loading_seconds": round(loading, 2),
        "tokenizers_mb_per_second": round(theirs["encode_batch"], 2),
        "tokenizers_fast_mb_per_second": round(theirs["encode_batch_fast"], 2),
        "tokenizers_timed_mb": round(timed, 1),
        "speedup": round(ours / theirs["encode_batch"], 1),
        "texts_identical": int(same),
        "texts_compared": documents,
        "odd_identical": sum(map(np.array_equal, odd_ids, (encoding.ids for encoding in expected))),
        "odd_compared": len(odd),
    }


def step(root: str, cleaned: str, tokenizer: str) -> dict[str, object]:
    """Run the whole step, with and without its audits."""
    store, corpus, fitted = Store(Path(root)), read_manifest(Path(cleaned)), read_manifest(Path(tokenizer))
    audits = (*tokenization.TOKENIZATION_AUDITS, tokenization.DecodesBack(corpus, fitted))
    inputs = {"cleaned": corpus, "tokenizer": fitted}
    rates = {}
    for name, wanted in (("mb_per_second", audits), ("without_audits_mb_per_second", ())):
        settings = tokenization.PassageSettings(max_characters=1_500 if wanted else 1_499)  # another artifact: the store has this one
        clock = time.process_time()
        made = store.build(Build("tokenized_shards", tokenization.tokenize_documents, settings, KEY, inputs, wanted)).manifest
        rates[name] = round(made.counts["bytes"] / 1e6 / (time.process_time() - clock), 1)
        if name == "mb_per_second":
            tokens = str(made.directory / "tokens.bin")
    return {**rates, "tokens": tokens}


def datatrove(cleaned: str, tokenizer: str, out: str) -> dict[str, object]:
    """Run datatrove's reader and tokenizer over the same file."""
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    size = read_manifest(Path(cleaned)).counts["bytes"] / 1e6
    clock = time.process_time()
    reader = ParquetReader(cleaned, glob_pattern="documents.parquet", file_progress=False)
    writer = DocumentTokenizer(
        out, str(Path(tokenizer) / "tokenizer.json"), eos_token=tokenization.END_OF_TEXT, shuffle_documents=False, batch_size=1_000
    )
    writer.run(reader.run())
    rate = size / (time.process_time() - clock)
    return {"mb_per_second": round(rate, 2), "tokens": str(next(Path(out).glob("*.ds")))}


CHILDREN = {"encode": encode, "step": step, "datatrove": datatrove}


def show(result: dict[str, object]) -> None:
    """Print what was measured."""
    console = Console(width=140)
    copies = ", after them copies with edits" if result["copies_with_edits"] else ""
    held = f"from {result['of_different_texts_mb']} MB of different texts{copies}"
    console.print(f"{result['megabytes']} MB in {result['documents']:,} documents, {held}")
    table = Table(title="encoding, MB per CPU second, one thread", title_justify="left")
    columns = ("tokens", "backend", "cold", "warm", "encode_batch", "its fast one", "timed, MB", "ratio", "same texts", "same odd texts")
    for column in columns:
        table.add_column(column, justify="right")
    for size, found in result["encode"].items():  # type: ignore[attr-defined]
        table.add_row(
            f"{int(size):,}",
            found["backend"],
            f"{found['cold_mb_per_second']:.1f}",
            f"{found['warm_mb_per_second']:.1f}",
            f"{found['tokenizers_mb_per_second']:.2f}",
            f"{found['tokenizers_fast_mb_per_second']:.2f}",
            f"{found['tokenizers_timed_mb']:.0f}",
            f"{found['speedup']:.1f}",
            f"{found['texts_identical']:,} of {found['texts_compared']:,}",
            f"{found['odd_identical']:,} of {found['odd_compared']:,}",
        )
    console.print(table)
    table = Table(title="whole step, 8,192 tokens, MB per CPU second, one thread", title_justify="left")
    for column in ("ours, audits included", "ours, without audits", "datatrove", "ratio", "same ids, byte for byte"):
        table.add_column(column, justify="right")
    rates = [f"{result[key]:.2f}" for key in ("step_mb_per_second", "step_without_audits_mb_per_second", "datatrove_mb_per_second")]
    table.add_row(*rates, f"{result['step_speedup_vs_datatrove']:.1f}", "yes" if result["step_ids_identical"] else "no")
    console.print(table)


if __name__ == "__main__":
    main()
