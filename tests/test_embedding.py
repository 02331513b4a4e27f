"""Embedding: passages cover documents, the space is fitted on training text alone, the bytes depend on nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import corpus

from pipelines import plugins
from pipelines.documents import partition_file, write_table
from pipelines.embedders._grid import NORM, UNIT, to_integer_rows
from pipelines.embedding import (
    EMBEDDER_AUDITS,
    EMBEDDING_AUDITS,
    EmbedderSettings,
    EmbeddingSettings,
    embed_documents,
    fit_embedder,
)
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.plugins import Settings
from pipelines.store import Build, Store

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data" / "sample" / "corpus.parquet"
TOPICS = {
    "astronomy": "The telescope observed a distant galaxy, its stars and the orbit of a planet around the sun.",
    "cooking": "Bake the bread with butter and sugar, then add salt and onions to the soup in the kitchen.",
    "law": "The court held that the contract was void and the defendant owed damages to the plaintiff.",
}
EMBEDDERS = [("static_words", {}), ("hashed_tfidf", {"dimensions": 64, "features": 4096})]


class SplitSettings(Settings):
    """The split of each document, per partition."""

    splits: dict[str, dict[str, str]]


def write_splits(settings: SplitSettings, out: Path) -> Outcome:
    """Write the split files of `duplicate_clusters` with the columns that the embedder reads."""
    (out / "splits").mkdir()
    for partition, splits in settings.splits.items():
        write_table(out / "splits" / partition_file(partition), pa.table({"id": list(splits), "split": list(splits.values())}))
    return Outcome()


def members(store: Store, *corpora: Manifest, held_out: tuple[str, ...] = ()) -> tuple[Member, ...]:
    """Publish splits of `corpora`; documents are in train unless named."""
    splits = {}
    for manifest in corpora:
        ids = pq.read_table(manifest.file("documents.parquet"), columns=["id"])["id"].to_pylist()
        splits[manifest.partition] = {name: "held_out" if name in held_out else "train" for name in ids}
    clusters = store.build(Build(asset="duplicate_clusters", step=write_splits, settings=SplitSettings(splits=splits))).manifest
    return tuple(Member(manifest=clusters, name=f"splits/{partition_file(partition)}") for partition in splits)


def fitted(store: Store, *corpora: Manifest, name: str = "static_words", settings: dict | None = None, **more: object) -> Manifest:
    """Publish the embedder fitted on `corpora`."""
    held_out = more.pop("held_out", ())
    inputs = {"sample": corpora, "splits": members(store, *corpora, held_out=held_out)}
    request = EmbedderSettings(embedder=name, settings=settings or {}, **more)
    return store.build(Build(asset="embedder", step=fit_embedder, settings=request, inputs=inputs, audits=EMBEDDER_AUDITS)).manifest


def embedded(store: Store, cleaned: Manifest, embedder: Manifest, max_characters: int = 1_500) -> Manifest:
    """Publish the embeddings of `cleaned`."""
    request = Build(
        asset="document_embeddings",
        partition=cleaned.partition,
        step=embed_documents,
        settings=EmbeddingSettings(max_characters=max_characters),
        inputs={"cleaned": cleaned, "embedder": embedder},
        audits=EMBEDDING_AUDITS,
    )
    return store.build(request).manifest


def real_texts(domain: str, count: int) -> list[str]:
    """Return the first `count` texts of `domain` in the embedded sample."""
    table = pq.read_table(SAMPLE, columns=["domain", "text"], filters=[("domain", "==", domain)])
    return table["text"].to_pylist()[:count]


@pytest.mark.parametrize(("name", "settings"), EMBEDDERS)
def test_passages_cover_real_documents(store: Store, name: str, settings: dict) -> None:
    cleaned = corpus(store, "wiki", real_texts("wiki", 60))
    embeddings = embedded(store, cleaned, fitted(store, cleaned, name=name, settings=settings, max_characters=300), max_characters=300)
    texts = dict(zip(*pq.read_table(cleaned.file("documents.parquet"), columns=["id", "text"]).to_pydict().values(), strict=True))
    passages = pq.read_table(embeddings.file("passages.parquet")).to_pylist()
    joined = dict.fromkeys(texts, "")
    for row in passages:
        joined[row["id"]] += texts[row["id"]][row["start"] : row["end"]]
    rows = np.load(embeddings.file("embeddings.npy"))
    assert joined == texts
    assert rows.shape == (len(passages), embeddings.counts["dimensions"]) and rows.dtype == np.int16
    assert embeddings.counts["zero_vectors"] == int((~rows.any(axis=1)).sum())
    assert all(check.passed for check in embeddings.checks)


@pytest.mark.parametrize(("name", "settings"), EMBEDDERS)
def test_nearest_text_has_the_same_topic(store: Store, name: str, settings: dict) -> None:
    texts = [*TOPICS.values(), "Planets and stars were observed from the galaxy's edge by telescope.", "Salt the soup, butter the bread."]
    cleaned = corpus(store, "wiki", texts)
    embedder = fitted(store, cleaned, corpus(store, "book", real_texts("wiki", 200)), name=name, settings=settings)
    rows = np.load(embedded(store, cleaned, embedder).file("embeddings.npy")).astype(np.int64)
    similarity = rows @ rows[:3].T
    assert similarity[3].argmax() == 0 and similarity[4].argmax() == 1
    assert np.abs(rows @ rows.T).max() < 2**24


@pytest.mark.parametrize(("name", "settings"), EMBEDDERS)
def test_vector_depends_on_text_alone(tmp_path: Path, name: str, settings: dict) -> None:
    embedder = plugins.build("embedders", name, settings)
    texts = real_texts("wiki", 40)
    embedder.fit(texts, tmp_path)
    together = embedder.embed(texts, tmp_path)
    alone = np.concatenate([embedder.embed([text], tmp_path) for text in texts])
    assert np.array_equal(together, alone)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_held_out_text_does_not_change_the_space(store: Store) -> None:
    names = ("wiki-1", "wiki-2", "wiki-3")
    first = corpus(store, "wiki", [TOPICS["law"], TOPICS["cooking"], "one secret"], ids=names)
    second = corpus(store, "wiki", [TOPICS["law"], TOPICS["cooking"], "another, longer secret"], ids=names)
    states = [fitted(store, cleaned, held_out=("wiki-3",)) for cleaned in (first, second)]
    assert states[0].fingerprint != states[1].fingerprint
    assert states[0].content_sha256 == states[1].content_sha256
    assert states[0].counts["train_documents"] == 2
    assert fitted(store, first).content_sha256 != states[0].content_sha256


def test_sample_is_bounded_and_independent_of_corpus_order(store: Store) -> None:
    corpora = [corpus(store, domain, real_texts(domain, 20)) for domain in ("wiki", "legal")]
    forward = fitted(store, *corpora, sample_passages=30, max_characters=400)
    backward = fitted(store, *reversed(corpora), sample_passages=30, max_characters=400)
    assert forward.counts["sample_passages"] == 30
    assert forward.content_sha256 == backward.content_sha256


def test_empty_documents_are_counted(store: Store) -> None:
    cleaned = corpus(store, "wiki", ["", TOPICS["law"], ""])
    embeddings = embedded(store, cleaned, fitted(store, cleaned))
    assert (embeddings.counts["documents"], embeddings.counts["documents_without_text"], embeddings.counts["passages"]) == (3, 2, 1)
    nothing = corpus(store, "legal", [])
    assert np.load(embedded(store, nothing, fitted(store, cleaned)).file("embeddings.npy")).shape == (0, 256)


def test_nothing_to_fit_on_is_an_error(store: Store) -> None:
    cleaned = corpus(store, "wiki", [TOPICS["law"]], ids=["wiki-1"])
    with pytest.raises(EmptyInput, match="no training text in cleaned_corpus"):
        fitted(store, cleaned, held_out=("wiki-1",))
    with pytest.raises(GristmillError, match="no split file 'legal@2026-01-01.parquet'"):
        fit_embedder(EmbedderSettings(), store.root, sample=(corpus(store, "legal", ["x"]),), splits=members(store, cleaned))
    with pytest.raises(GristmillError, match="did you mean 'static_words'"):
        plugins.validate(EmbedderSettings, {"embedder": "static_word"}, where="embedder")
    with pytest.raises(GristmillError, match="did you mean 'smoothing'"):
        plugins.validate(EmbedderSettings, {"settings": {"smooting": 1}}, where="embedder")


def test_sif_matches_the_paper_on_a_small_case(tmp_path: Path) -> None:
    """Weighted mean and removed component, recomputed pair by pair from section 3 of the paper."""
    from pipelines.embedders.static_words import StaticWords, _table, _tokenizer

    texts = [*TOPICS.values(), *real_texts("wiki", 10)]
    embedder = StaticWords(smoothing=0.01)
    embedder.fit(texts, tmp_path)
    ids = [_tokenizer().encode(text, add_special_tokens=False).ids for text in texts]
    flat = [token for row in ids for token in row]
    means = [sum(0.01 / (0.01 + flat.count(token) / len(flat)) * _table()[token] for token in row) / len(row) for row in ids]
    units = np.array([mean / np.linalg.norm(mean) for mean in means])
    common = np.linalg.svd(units)[2][0]
    expected = units - np.outer(units @ common, common)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(embedder.embed(texts, tmp_path), expected, atol=2e-4)


@pytest.mark.parametrize(("name", "settings"), EMBEDDERS)
def test_same_bytes_with_one_and_two_threads(tmp_path: Path, name: str, settings: dict) -> None:
    script = (
        "import sys, hashlib, pyarrow.parquet as pq; from pathlib import Path; from pipelines import plugins; "
        "from pipelines.embedders._grid import to_integer_rows; "
        f"t = pq.read_table({str(SAMPLE)!r}, columns=['text'])['text'].to_pylist()[:300]; "
        f"e = plugins.build('embedders', {name!r}, {settings!r}); s = Path(sys.argv[1]); e.fit(t, s); "
        "state = b''.join(p.read_bytes() for p in sorted(s.iterdir())); "
        "print(hashlib.sha256(state + to_integer_rows(e.embed(t, s)).tobytes()).hexdigest())"
    )
    digests = set()
    for threads in ("1", "2"):
        state = tmp_path / threads
        state.mkdir()
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), threads)
        run = subprocess.run(
            [sys.executable, "-c", script, str(state)], env=os.environ | variables, cwd=ROOT, capture_output=True, check=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1


def test_integer_rows_have_the_norm() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 64))
    rows = to_integer_rows(np.vstack([vectors, np.zeros(64)])).astype(np.int64)
    assert np.abs(np.linalg.norm(rows[:-1], axis=1) - NORM).max() < 4
    assert not rows[-1].any()
    cosines = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert np.abs((rows @ rows.T)[:-1, :-1] / UNIT - cosines).max() < 2e-3
