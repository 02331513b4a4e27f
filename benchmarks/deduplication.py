"""MinHash against its peers and against brute force; the register's speed, and the cost of a new snapshot.

    python -m benchmarks.deduplication [--quick] [--corpus data/sample]

Every Parquet file of the corpus with a column `text` is read. CPU seconds of one process are measured, with the loops compiled and on
text that was not signed before. The peers are called as functions, without their reading and writing of files: datatrove's MinHash
(stage 1, 14 bands of 8 rows, 5-grams) and Rensa's R-MinHash (Rust) on the n-grams of `str.split`. A pair is a near-duplicate where
the Jaccard similarity of the two sets of word 5-grams, counted by brute force, is 0.7 at least. A corpus without planted duplicates
(`labels.parquet`) gets some: one document in ten again, one word in fifty replaced.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from assets_defs.deduplication import register_links
from pipelines import deduplication
from pipelines.deduplication_audits import CLUSTER_AUDITS
from pipelines.documents import write_table
from pipelines.manifests import Manifest, Outcome
from pipelines.minhash import WORDS, Signer, WordDialect, agreement, band_keys, exact_hash
from pipelines.plugins import Settings
from pipelines.store import Build, Store

NGRAM, POSITIONS, SEED = 5, 112, 1
OURS, THEIRS = (22, 5), (14, 8)
THRESHOLD = 0.7
SNAPSHOTS = 10


@dataclass(frozen=True)
class Corpus:
    """Texts in a random order, and what is known of them."""

    texts: list[str]
    domains: list[str]
    twins: list[tuple[int, int]]
    """Planted near-duplicates and their originals."""


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample"))
    parser.add_argument("--quick", action="store_true", help="smaller samples")
    arguments = parser.parse_args()
    started = time.monotonic()
    corpus = read_corpus(arguments.corpus, max_documents=12_000 if arguments.quick else 30_000)
    speed = measure_speed(corpus.texts, megabytes=1.5 if arguments.quick else 10.0)
    found = {dialect: measure_pairs(corpus, dialect, bands) for dialect, bands in (("folded", OURS), ("datatrove", THEIRS))}
    register = measure_register(100_000 if arguments.quick else 500_000)
    _print(speed, found, register)
    ours = found["folded"]
    result = {
        "speedup": round(speed["ours, datatrove's words"] / speed["datatrove"], 1),
        "recall": round(ours["recall"], 4),
        "precision": round(ours["precision"], 4),
        "identical_signatures": speed["identical signatures"],
        "datatrove_recall": round(found["datatrove"]["recall"], 4),
        "datatrove_precision": round(found["datatrove"]["precision"], 4),
        "planted_recall": round(ours["planted recall"], 4),
        "megabytes_per_second": {name: round(value, 2) for name, value in speed.items() if name != "identical signatures"},
        "register": {name: round(value, 2) for name, value in register.items()},
        "documents": len(corpus.texts),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))


def read_corpus(directory: Path, *, max_documents: int) -> Corpus:
    """Return at most `max_documents` of the texts in `directory`, duplicates with their originals."""
    tables = [pq.read_table(path) for path in sorted(directory.glob("*.parquet")) if "text" in pq.read_schema(path).names]
    rows = [row for table in tables for row in table.select([c for c in ("id", "text", "domain") if c in table.column_names]).to_pylist()]
    labels = directory / "labels.parquet"
    known = pq.read_table(labels).to_pylist() if labels.exists() else []
    twin_of = {row["id"]: row["origin"] for row in known if row["noise"] == "near_duplicate"}
    chance = random.Random(SEED)
    chance.shuffle(rows)
    rows.sort(key=lambda row: row.get("id") not in twin_of and row.get("id") not in set(twin_of.values())) if twin_of else None
    rows = rows[:max_documents]
    chance.shuffle(rows)
    texts, domains = [row["text"] for row in rows], [str(row.get("domain") or "") for row in rows]
    if not known:
        chosen = range(0, len(texts), 10)
        twins = [(len(texts) + number, place) for number, place in enumerate(chosen)]
        return Corpus(texts + [_edited(texts[p], chance) for p in chosen], domains + [domains[p] for p in chosen], twins)
    place = {row["id"]: number for number, row in enumerate(rows)}
    return Corpus(texts, domains, [(place[one], place[other]) for one, other in twin_of.items() if one in place and other in place])


def _edited(text: str, chance: random.Random) -> str:
    words = text.split(" ")
    for place in chance.sample(range(len(words)), max(1, len(words) // 50)):
        words[place] = chance.choice(words)
    return " ".join(words)


def measure_speed(texts: Sequence[str], *, megabytes: float) -> dict[str, float]:
    """Return megabytes of text per CPU second of each signer, and the share of documents whose signature is datatrove's."""
    signers = {name: _signer(dialect) for name, dialect in (("ours, datatrove's words", "datatrove"), ("ours, folded words", "folded"))}
    for signer in signers.values():
        signer.sign(texts[:20])
    many, few = _up_to(texts[20:], 8 * megabytes), _up_to(texts[20:], megabytes)
    speed = {name: _rate(lambda signer=signer: signer.sign(many), many) for name, signer in signers.items()}
    speed["exact hash"] = _rate(lambda: [exact_hash(text) for text in many], many)
    peer = _Datatrove()
    peer.sign(texts[:5])
    theirs: list[np.ndarray | None] = []
    speed["datatrove"] = _rate(lambda: theirs.extend(peer.sign(few)), few)
    speed["Rensa"] = _rate(lambda: _rensa(few), few)
    mine = signers["ours, datatrove's words"].sign(few)[0]
    comparable = [(row, other) for row, other in zip(mine, theirs, strict=True) if other is not None]
    return speed | {"identical signatures": sum((row == other).all() for row, other in comparable) / len(comparable)}


def _signer(dialect: WordDialect) -> Signer:
    return Signer(num_permutations=POSITIONS, ngram=NGRAM, seed=SEED, words=dialect)


class _Datatrove:
    """datatrove's first stage; its 64-bit hash takes strings, which xxhash 4 refuses, so bytes are given where it does."""

    def __init__(self) -> None:
        import xxhash
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

        bands, rows = THEIRS
        config = MinhashConfig(n_grams=NGRAM, num_buckets=bands, hashes_per_bucket=rows, seed=SEED)
        self._stage = MinhashDedupSignature(tempfile.gettempdir(), config)
        self._stage._hash_func = lambda words: xxhash.xxh64_intdigest(words.encode())

    def sign(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Return the signatures, None for a text with too few words."""
        shingles = (self._stage.get_shingles(text) for text in texts)
        return [np.array(self._stage.get_signature(each), dtype=np.uint64).ravel() if each.size else None for each in shingles]


def _rensa(texts: Sequence[str]) -> list[list[int]]:
    from rensa import RMinHash

    digests = []
    for text in texts:
        words = text.lower().split()
        sketch = RMinHash(num_perm=POSITIONS, seed=SEED)
        sketch.update([" ".join(words[place : place + NGRAM]) for place in range(max(1, len(words) - NGRAM + 1))])
        digests.append(sketch.digest())
    return digests


def _up_to(texts: Sequence[str], megabytes: float) -> list[str]:
    sizes = np.cumsum([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    return list(texts[: max(1, int(np.searchsorted(sizes, 1e6 * megabytes)))])


def _rate(run: Callable[[], object], texts: Sequence[str]) -> float:
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6 / seconds


def measure_pairs(corpus: Corpus, dialect: WordDialect, bands: tuple[int, int]) -> dict[str, float]:
    """Compare the pairs found with all pairs: recall and precision at `THRESHOLD`, with agreement checked (ours) or not (datatrove's)."""
    total = len(corpus.texts)
    signatures, _ = _signer(dialect).sign(corpus.texts)
    short = signatures.astype(np.uint32)
    words = (signatures != np.uint64(2**64 - 1)).any(axis=1)
    proposed = _pairs_in_buckets(band_keys(short, bands=bands[0], rows=bands[1]), words)
    agreed = agreement(short[proposed // total], short[proposed % total])
    found = proposed[agreed >= THRESHOLD] if bands == OURS else proposed
    codes, similar = all_pairs(corpus.texts, dialect, at_least=0.4)
    true = codes[similar >= THRESHOLD]
    hits = np.isin(found, true)
    result = {"pairs": len(true), "found": len(found), "recall": hits.sum() / len(true), "precision": hits.sum() / max(1, len(found))}
    close = codes[similar >= THRESHOLD - 0.1]
    result["precision at 0.6"] = np.isin(found, close).sum() / max(1, len(found))
    for low, high in ((0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        within = codes[(similar >= low) & (similar < high)]
        result[f"recall {low} to {min(high, 1)}"] = np.isin(within, found).sum() / max(1, len(within))
    twins = np.array([min(pair) * total + max(pair) for pair in corpus.twins])
    caught = np.isin(twins, found)
    result["planted recall"] = caught.sum() / max(1, len(twins))
    every = Counter(corpus.domains[one] for one, _ in corpus.twins)
    missed = Counter(corpus.domains[one] for (one, _), ok in zip(corpus.twins, caught, strict=True) if not ok)
    return result | {f"planted, missed in {domain or 'all'} of {every[domain]}": missed[domain] for domain in sorted(missed)}


def _pairs_in_buckets(keys: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return ``first * n + second`` for every pair of documents that share a band key, sorted."""
    total, found = len(keys), [np.empty(0, np.int64)]
    rows = np.flatnonzero(usable)
    for band in range(keys.shape[1]):
        order = rows[np.argsort(keys[rows, band], kind="stable")]
        breaks = np.flatnonzero(np.diff(keys[order, band])) + 1
        for group in np.split(order, breaks):
            if len(group) > 1:
                one, other = np.triu_indices(len(group), 1)
                found.append(group[one] * total + group[other])
        found = [np.unique(np.concatenate(found))]
    return found[0]


def all_pairs(texts: Sequence[str], dialect: WordDialect, *, at_least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return every pair with a Jaccard similarity of `at_least`, as ``first * n + second``, and its similarity."""
    from scipy.sparse import csr_matrix

    from pipelines.minhash_kernels import xxhash64

    words = WORDS[dialect](texts)
    sets = []
    for first, stop in zip(words.offsets[:-1].tolist(), words.offsets[1:].tolist(), strict=True):
        width = min(NGRAM, stop - first)
        places = range(first, stop - width + 1) if width else ()
        sets.append(
            np.unique(np.array([xxhash64(words.data, words.starts[p], words.ends[p + width - 1]) for p in places], dtype=np.uint64))
        )
    sizes = np.array([len(each) for each in sets])
    _, columns = np.unique(np.concatenate(sets), return_inverse=True)
    matrix = csr_matrix((np.ones(len(columns), np.int32), columns, np.append(0, np.cumsum(sizes))))
    codes, similar = [], []
    for start in range(0, len(texts), 1000):
        common = (matrix[start : start + 1000] @ matrix.T).tocoo()
        one, other = common.row.astype(np.int64) + start, common.col.astype(np.int64)
        value = common.data / (sizes[one] + sizes[other] - common.data)
        chosen = (other > one) & (value >= at_least)
        codes.append(one[chosen] * len(texts) + other[chosen])
        similar.append(value[chosen])
    codes, similar = np.concatenate(codes), np.concatenate(similar)
    order = np.argsort(codes)
    return codes[order], similar[order]


class _Part(Settings):
    """One snapshot of the register's benchmark."""

    documents: int
    number: int


def _write_signatures(settings: _Part, out: Path) -> Outcome:
    """Write signatures of which one in five is an edited copy, and one in fifty of one template."""
    chance = np.random.default_rng(settings.number)
    count = settings.documents
    base = np.random.default_rng(0).integers(0, 2**32, (1000, POSITIONS), dtype=np.uint32)
    signatures = chance.integers(0, 2**32, (count, POSITIONS), dtype=np.uint32)
    kind = chance.random(count)
    copies = np.flatnonzero(kind < 0.2)
    source = np.where(kind[copies] < 0.02, 0, chance.integers(0, len(base), len(copies)))
    edited = chance.random((len(copies), POSITIONS)) < chance.choice([0.05, 0.1, 0.2, 0.25, 0.3], (len(copies), 1))
    signatures[copies] = np.where(edited, signatures[copies], base[source])
    first = settings.number * count
    columns = {
        "id": [f"document-{first + row:09}" for row in range(count)],
        "exact_hash": pa.array([chance.bytes(16) for _ in range(count)], pa.binary(16)),
        "signature": pa.array([row.tobytes() for row in signatures], pa.binary(4 * POSITIONS)),
        "shingles": pa.array(np.full(count, 500), pa.int32()),
        "characters": pa.array(np.full(count, 3000), pa.int32()),
    }
    write_table(out / "signatures.parquet", pa.table(columns, schema=deduplication.signature_schema(POSITIONS)))
    return Outcome(counts={"documents": count})


def measure_register(documents: int) -> dict[str, float]:
    """Cluster `documents` signatures in snapshots: documents per CPU second, and a new snapshot against all of them anew."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        keys = [f"wiki|2026-{number + 1:02}-01" for number in range(SNAPSHOTS)]
        parts = [_Part(documents=documents // SNAPSHOTS, number=number) for number in range(SNAPSHOTS)]
        signed = {
            key: store.build(Build("duplicate_signatures", _write_signatures, part, key)).manifest
            for key, part in zip(keys, parts, strict=True)
        }
        _cluster(store, {keys[0]: signed[keys[0]]})
        _cluster(store, {key: signed[key] for key in keys[:-1]})
        appended, append_seconds = _cluster(store, signed)
        rebuilt, rebuild_seconds = _cluster(store, signed, links=False)
    return {
        "documents": documents,
        "documents_per_second": documents / rebuild_seconds,
        "append_seconds": append_seconds,
        "rebuild_seconds": rebuild_seconds,
        "identical_splits": float(appended.content_sha256 == rebuilt.content_sha256),
    }


def _cluster(store: Store, signed: dict[str, Manifest], *, links: bool = True) -> tuple[Manifest, float]:
    def settings(order: Sequence[str]) -> deduplication.ClusterSettings:
        return deduplication.ClusterSettings(order=tuple(order), held_out={"wiki": 0.1})

    whole = settings(tuple(signed))
    one = Build("duplicate_clusters.link", deduplication.cluster_documents, whole, "all", {"signatures": tuple(signed.values())})
    inputs = {"links": register_links(settings, signed) if links else (one,)}
    started = time.process_time()
    request = Build("duplicate_clusters", deduplication.gather_clusters, whole, inputs=inputs, audits=CLUSTER_AUDITS)
    manifest = store.build(request).manifest
    return manifest, time.process_time() - started


def _print(speed: dict[str, float], found: dict[str, dict[str, float]], register: dict[str, float]) -> None:
    console = Console(width=140)
    table = Table("signer", "MB/s per core", title="MinHash, 112 hash functions, word 5-grams", title_justify="left")
    for name, value in speed.items():
        table.add_row(name, f"{value:.2f}" if name != "identical signatures" else f"{value:.1%}")
    console.print(table)
    table = Table(
        "", "folded words, 22 x 5, agreement 0.7", "datatrove's words, 14 x 8", title="pairs against brute force", title_justify="left"
    )
    for name in dict.fromkeys([*found["folded"], *found["datatrove"]]):
        cells = [found[dialect].get(name) for dialect in ("folded", "datatrove")]
        table.add_row(name, *("" if c is None else f"{c:,}" if isinstance(c, int) else f"{c:.4f}" for c in cells))
    console.print(table)
    table = Table("register", "", title_justify="left")
    for name, value in register.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
