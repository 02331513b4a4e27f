"""Embedding: passages cover documents, the space is fitted on training text alone, the bytes depend on nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import corpus
from test_hf_classifier import build_model

from pipelines import plugins
from pipelines.batch import SpecialTokens
from pipelines.documents import partition_file, write_table
from pipelines.embedders import Embedder
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
from pipelines.models import ModelSettings, new_model
from pipelines.plugins import Settings
from pipelines.store import Build, Store
from pipelines.tokenization import TokenizerSettings, train_tokenizer

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data" / "sample" / "corpus.parquet"
TOPICS = {
    "astronomy": "The telescope observed a distant galaxy, its stars and the orbit of a planet around the sun.",
    "cooking": "Bake the bread with butter and sugar, then add salt and onions to the soup in the kitchen.",
    "law": "The court held that the contract was void and the defendant owed damages to the plaintiff.",
}
FITTED = [("static_words", {}), ("hashed_tfidf", {"dimensions": 64, "features": 4096})]
EMBEDDERS = [*FITTED, ("hf_encoder", {"model": "bert", "max_tokens": 32})]


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with tiny models of random weights."""
    root = tmp_path_factory.mktemp("models")
    build_model(root / "bert", {0: "LABEL_0"})
    store = Store(root / "store")
    cleaned = corpus(store, "wiki", real_texts("wiki", 40))
    (root / "tokenizer").mkdir()
    train_tokenizer(TokenizerSettings(vocabulary_size=512), root / "tokenizer", sample=(cleaned,), splits=members(store, cleaned))
    tokens = SpecialTokens(end_of_text=0, mask=1, vocabulary_size=512)
    for architecture in ("llama", "gpt2", "modernbert"):  # the directory of a checkpoint, as training writes it
        torch.manual_seed(0)
        settings = ModelSettings(architecture=architecture, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48)
        new_model(settings, tokens, 64).save_pretrained(root / architecture)
        shutil.copytree(root / "tokenizer", root / architecture, dirs_exist_ok=True)
    return root


@pytest.fixture
def project(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory with `models`, entered: relative paths start there."""
    monkeypatch.chdir(models)
    return models


def encoder(**values: object) -> Embedder:
    plugin = plugins.build("embedders", "hf_encoder", values)
    assert isinstance(plugin, Embedder)
    return plugin


def real_texts(domain: str, count: int) -> list[str]:
    """Return the first `count` texts of `domain` in the embedded sample."""
    table = pq.read_table(SAMPLE, columns=["domain", "text"], filters=[("domain", "==", domain)])
    return table["text"].to_pylist()[:count]


@pytest.mark.usefixtures("project")
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


@pytest.mark.parametrize(("name", "settings"), FITTED)
def test_nearest_text_has_the_same_topic(store: Store, name: str, settings: dict) -> None:
    texts = [*TOPICS.values(), "Planets and stars were observed from the galaxy's edge by telescope.", "Salt the soup, butter the bread."]
    cleaned = corpus(store, "wiki", texts)
    embedder = fitted(store, cleaned, corpus(store, "book", real_texts("wiki", 200)), name=name, settings=settings)
    rows = np.load(embedded(store, cleaned, embedder).file("embeddings.npy")).astype(np.int64)
    similarity = rows @ rows[:3].T
    assert similarity[3].argmax() == 0 and similarity[4].argmax() == 1
    assert np.abs(rows @ rows.T).max() < 2**24


@pytest.mark.usefixtures("project")
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


@pytest.mark.parametrize(("name", "settings"), FITTED)
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


def tokens_and_states(folder: Path, text: str, layer: int) -> tuple[list[int], np.ndarray]:
    """Return the tokens of `text` with their hidden states, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
    return ids, states[0].numpy().astype(np.float64)


@pytest.mark.parametrize(
    ("model", "pooling", "layer"),
    [
        ("bert", "mean", None),
        ("bert", "cls", -1),
        ("bert", "mean", 1),
        ("llama", "mean", 2),
        ("gpt2", "last", None),
        ("modernbert", "mean", 0),
    ],
)
def test_encoder_pools_the_states_that_transformers_gives(
    models: Path, tmp_path: Path, model: str, pooling: str, layer: int | None
) -> None:
    texts = [text[:60] for text in real_texts("wiki", 6)]
    plugin = encoder(model=str(models / model), pooling=pooling, layer=layer, prefix="passage: ")
    measured = plugin.fit(texts, tmp_path)
    found = plugin.embed(texts, tmp_path)
    for text, vector in zip(texts, found, strict=True):
        ids, states = tokens_and_states(models / model, f"passage: {text}", -1 if layer is None else layer)
        assert len(ids) < 64
        pooled = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[pooling]
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-5)
    assert measured["dimensions"] == 32 and measured["share_of_texts_cut"] == 0


@pytest.mark.parametrize("prefix", ["", "the text: "])
def test_chunks_of_a_long_text_are_averaged_by_their_tokens(models: Path, tmp_path: Path, prefix: str) -> None:
    """BERT puts [CLS] and [SEP] around a text: with 16 tokens 14 are left, less the prefix, which stands before every chunk."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(models / "bert"), AutoModel.from_pretrained(models / "bert").eval()
    text = real_texts("wiki", 1)[0][:150]
    lead, ids = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (prefix, text))
    room = 14 - len(lead)
    assert len(ids) > 2 * room and len(ids) % room
    total = np.zeros(32)
    for start in range(0, len(ids), room):
        chunk = [2, *lead, *ids[start : start + room], 3]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([chunk])).last_hidden_state[0]
        total += states.mean(dim=0).numpy() * len(ids[start : start + room])
    plugin = encoder(model=str(models / "bert"), max_tokens=16, prefix=prefix)
    assert plugin.fit([text, "short"], tmp_path)["share_of_texts_cut"] == 0.5
    np.testing.assert_allclose(plugin.embed(["short", text], tmp_path)[1], total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "modernbert"])
def test_batches_change_the_last_bits_at_most(models: Path, tmp_path: Path, model: str) -> None:
    texts = real_texts("wiki", 12)
    alone = encoder(model=str(models / model))
    assert alone.fit(texts, tmp_path)["max_tokens"] == {"bert": 128}.get(model, 64), "as many as the model has positions"
    expected = alone.embed(texts, tmp_path)
    for batch_tokens in (200, 4096):
        batched = encoder(model=str(models / model), batch_tokens=batch_tokens)
        np.testing.assert_allclose(batched.embed(texts[::-1], tmp_path)[::-1], expected, atol=1e-5)


def test_encoder_runs_in_one_thread(models: Path, tmp_path: Path) -> None:
    """The last bits of a state depend on how many threads add it up."""
    plugin, seen = encoder(model=str(models / "bert")), []
    plugin.fit(["a text"], tmp_path)
    hook = plugin._encoder(plugin._hashes()).model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    plugin.embed(["a text", "another text"], tmp_path)
    assert seen == [1, 1] and torch.get_num_threads() == 2
    torch.set_num_threads(before)
    hook.remove()


def test_encoder_stays_the_model_that_it_was_fitted_with(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "model")
    plugin = encoder(model="model").at(tmp_path)
    names = {path.name for path in plugin.files()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert encoder(model="owner/name", revision="0" * 40).files() == ()
    (tmp_path / "state").mkdir()
    plugin.fit(["a text"], tmp_path / "state")
    before = plugin.embed(["a text"], tmp_path / "state")
    (folder / "notes.json").write_text("{}")
    assert np.array_equal(plugin.embed(["a text"], tmp_path / "state"), before)
    shutil.copyfile(models / "gpt2" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(GristmillError, match=r"changed since the embedder was fitted \(model.safetensors\); fit it again"):
        plugin.embed(["a text"], tmp_path / "state")


def test_texts_without_tokens_are_zeros(models: Path, tmp_path: Path) -> None:
    plugin = encoder(model=str(models / "bert"), prefix="passage: ")
    plugin.fit(["a text"], tmp_path)
    found = plugin.embed(["", "a text", " \n"], tmp_path)
    assert found.shape == (3, 32) and found.any(axis=1).tolist() == [False, True, False]
    assert plugin.embed([], tmp_path).shape == (0, 32)
    with pytest.raises(EmptyInput, match="hf_encoder: the sample holds no text"):
        plugin.fit([" ", ""], tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "nowhere"}, "no model 'nowhere'"),
        ({"model": "../bert"}, "leaves the project's directory"),
        ({"model": "bert/config.json"}, "is a file; give the folder"),
        ({"model": "empty"}, "is no model with config.json, safetensors weights and a tokenizer"),
        ({"model": "pickled"}, "is no model with config.json, safetensors weights"),
        ({"model": "partial"}, "its weights lack"),
        ({"model": "bert", "revision": "main"}, "full commit hash"),
        ({"model": "bert", "layer": 3}, "layer 3 does not exist: the model has layers 1 to 2"),
        ({"model": "llama", "pooling": "cls"}, "the first token does not see those behind it; take mean or last"),
        ({"model": "bert", "layer": 0, "pooling": "cls"}, "at layer 0 of 'bert' the first token does not see"),
        ({"model": "bert", "max_tokens": 6, "prefix": "one two three four"}, "max_tokens 6 leaves no room for text"),
        ({"model": "infinite"}, "vectors that are not finite"),
    ],
)
def test_a_model_that_cannot_embed_is_refused(models: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    from safetensors.torch import load_file, save_file

    folder, name = tmp_path / str(values["model"]), values["model"]
    if name in ("bert", "llama", "pickled", "partial", "infinite"):
        shutil.copytree(models / ("bert" if name != "llama" else "llama"), folder)
    elif name == "empty":
        folder.mkdir()
    elif name == "bert/config.json":
        shutil.copytree(models / "bert", tmp_path / "bert")
    if name in ("pickled", "partial", "infinite"):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if name == "pickled":
            torch.save(weights, folder / "pytorch_model.bin")
        elif name == "partial":
            save_file({key: value for key, value in weights.items() if "layer.1." not in key}, folder / "model.safetensors")
        else:
            save_file({key: value * torch.inf for key, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(GristmillError, match=message):
        plugin = encoder(**values).at(tmp_path)
        plugin.fit(["a text"], tmp_path)
        plugin.embed(["a text"], tmp_path)


def test_positions_that_padding_takes_are_not_used(models: Path, tmp_path: Path) -> None:
    """RoBERTa gives the first token the position behind that of its padding token, so two of its positions are never free."""
    from transformers import RobertaConfig, RobertaModel

    folder, sizes = tmp_path / "roberta", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(vocab_size=512, max_position_embeddings=34, pad_token_id=1, **sizes)).save_pretrained(folder)
    shutil.copytree(models / "tokenizer", folder, dirs_exist_ok=True)
    plugin = encoder(model="roberta").at(tmp_path)
    assert plugin.fit(["a text"], tmp_path)["max_tokens"] == 32
    assert plugin.embed(real_texts("wiki", 2), tmp_path).any(axis=1).all()


def test_a_model_with_a_decoder_of_its_own_is_refused(models: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(tmp_path / "t5")
    shutil.copytree(models / "tokenizer", tmp_path / "t5", dirs_exist_ok=True)
    with pytest.raises(GristmillError, match="cannot embed: it is an encoder with a decoder"):
        encoder(model="t5").at(tmp_path).fit(["a text"], tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(models: Path, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="torch sees no GPU; set device: auto, or cpu"):
        encoder(model=str(models / "bert"), device="cuda").fit(["a text"], tmp_path)


def test_integer_rows_have_the_norm() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 64))
    rows = to_integer_rows(np.vstack([vectors, np.zeros(64)])).astype(np.int64)
    assert np.abs(np.linalg.norm(rows[:-1], axis=1) - NORM).max() < 4
    assert not rows[-1].any()
    cosines = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert np.abs((rows @ rows.T)[:-1, :-1] / UNIT - cosines).max() < 2e-3
