"""Evaluation: losses against a loop over single tokens, bits per byte by hand, paired intervals on synthetic and trained models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import BATCH, ROLES, SEQUENCE_LENGTH, World, mixture_of, publish

from pipelines.batch import SpecialTokens
from pipelines.errors import EmptyInput, GristmillError
from pipelines.evaluation import EVALUATION_AUDITS, EvaluationSettings, _compare, evaluate, losses_finite, target_improved
from pipelines.evaluators.held_out_loss import HeldOutLoss, _windows
from pipelines.evaluators.masked_loss import MaskedLoss
from pipelines.manifests import Manifest, Outcome
from pipelines.shards import HeldOutDocuments, held_out_documents
from pipelines.store import Build, Store

END = 0


@pytest.fixture(scope="module")
def checkpoint(world: World, base: Manifest) -> Manifest:
    changes = {"phases": ({"tokens": 60 * BATCH * SEQUENCE_LENGTH, "learning_rate": 3e-3},)}
    return world.store.build(world.mixture(base, mixture_of(world, {"wiki": 0.3, "legal": 0.7}), **changes)).manifest


def request(world: World, base: Manifest, checkpoint: Manifest, **changes: object) -> Build:
    made = EvaluationSettings(**{"roles": ROLES, "threads": 1, "draws": 300, **changes})
    inputs = {"base": base, "checkpoint": checkpoint, "decisions": world.decisions, "shards": world.shards, "tokenizer": world.tokenizer}
    return Build(asset="evaluation", step=evaluate, settings=made, inputs=inputs, audits=EVALUATION_AUDITS)


@pytest.fixture(scope="module")
def evaluation(world: World, base: Manifest, checkpoint: Manifest) -> Manifest:
    return world.store.build(request(world, base, checkpoint)).manifest


def rows_of(manifest: Manifest) -> dict[str, dict]:
    return {row["domain"]: row for row in json.loads(manifest.file("evaluation.json").read_text())["domains"]}


def opened(manifest: Manifest):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(manifest.directory, local_files_only=True).eval()


# Losses


def token_by_token(model, tokens: list[int], length: int) -> float:
    """Return the negative log-likelihood of a document, one token and one forward pass at a time.

    A token sees at most the tokens of its own window of `length` and the one before it; before the document stands an end of text.
    """
    joined, total = [END, *tokens], 0.0
    for place in range(1, len(joined)):
        start = (place - 1) // length * length
        with torch.no_grad():
            logits = model(torch.tensor([joined[start:place]])).logits[0, -1].double()
        total -= torch.log_softmax(logits, 0)[joined[place]].item()
    return total


def documents_of(lengths: list[int], seed: int = 0) -> HeldOutDocuments:
    random = np.random.default_rng(seed)
    tokens = [np.append(random.integers(1, 512, length), END).astype(np.uint16) for length in lengths]
    return HeldOutDocuments([f"d{n}" for n in range(len(lengths))], tokens, np.asarray([3 * length + 1 for length in lengths]))


def test_document_losses_are_those_of_a_loop_over_tokens(base: Manifest) -> None:
    """Shorter than a window, exactly one, one token more, and several; empty but for its end of text."""
    model, held = opened(base), documents_of([0, 5, 31, 32, 33, 100])
    for batch_windows in (1, 3, 64):
        table = HeldOutLoss(batch_windows=batch_windows).score(model, {"wiki": held}, SpecialTokens(END, None, 512))
        expected = [token_by_token(model, tokens.tolist(), SEQUENCE_LENGTH) for tokens in held.tokens]
        assert table["nll"].to_pylist() == pytest.approx(expected, rel=1e-5)
        assert table["tokens"].to_pylist() == [1, 6, 32, 33, 34, 101]


def test_masked_losses_are_those_of_a_loop_over_tokens(base: Manifest) -> None:
    """With as many passes as positions each token is hidden alone: the pseudo-log-likelihood, one forward pass a token."""
    model, held, mask = opened(base), documents_of([0, 5, 31, 33]), 7
    model.config.is_causal = False
    expected = []
    for tokens in held.tokens:
        total = 0.0
        for start in range(0, len(tokens), SEQUENCE_LENGTH):
            window = torch.from_numpy(tokens[start : start + SEQUENCE_LENGTH].astype(np.int64))
            for place in range(len(window)):
                hidden = window.clone()
                hidden[place] = mask
                with torch.no_grad():
                    logits = model(hidden[None]).logits[0, place].double()
                total -= torch.log_softmax(logits, 0)[window[place]].item()
        expected.append(total)
    for batch_windows in (1, 64):
        evaluator = MaskedLoss(passes=SEQUENCE_LENGTH, batch_windows=batch_windows)
        table = evaluator.score(model, {"wiki": held}, SpecialTokens(END, mask, 512))
        assert table["nll"].to_pylist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(GristmillError, match="sees both sides; set evaluator: masked_loss"):
        HeldOutLoss().score(model, {"wiki": held}, SpecialTokens(END, mask, 512))
    with pytest.raises(GristmillError, match="masked_loss needs a mask token"):
        MaskedLoss().score(model, {"wiki": held}, SpecialTokens(END, None, 512))


def test_a_real_document_has_that_loss_in_the_artifact(world: World, base: Manifest, evaluation: Manifest) -> None:
    table = pq.read_table(evaluation.file("documents.parquet")).to_pylist()
    held, model = held_out_documents(world.decisions, world.shards), opened(base)
    for domain in ROLES:
        name, tokens = held[domain].ids[0], held[domain].tokens[0].tolist()
        row = next(row for row in table if row["id"] == name)
        assert row["nll_before"] == pytest.approx(token_by_token(model, tokens, SEQUENCE_LENGTH), rel=1e-5)
        assert (row["domain"], row["tokens"]) == (domain, len(tokens))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), length=st.integers(1, 20))
def test_windows_predict_every_token_once(lengths: list[int], length: int) -> None:
    held = documents_of(lengths)
    owners, windows = _windows(held, length, END)
    for number, tokens in enumerate(held.tokens):
        mine = [window for owner, window in zip(owners, windows, strict=True) if owner == number]
        assert np.concatenate([window[1:] for window in mine]).tolist() == tokens.tolist()
        assert np.concatenate([window[:-1] for window in mine]).tolist() == [END, *tokens.tolist()[:-1]]
        assert all(2 <= len(window) <= length + 1 for window in mine)


# Numbers


def table_of(tokens: list[int], size: list[int], before: list[float], after: list[float]) -> pa.Table:
    return pa.table({"tokens": tokens, "bytes": size, "nll_before": before, "nll_after": after})


def compared(table: pa.Table, **changes: object) -> dict:
    return _compare(EvaluationSettings(roles={}, **{"draws": 400, **changes}), "wiki", "general", table)


def test_loss_and_bits_per_byte_by_hand() -> None:
    """Two documents, 10 and 30 tokens, 40 and 80 bytes: 100 nats over 40 tokens is 2.5; 100 / ln 2 / 120 bytes is 1.2022 bits."""
    row = compared(table_of([10, 30], [40, 80], [25.0, 75.0], [20.0, 60.0]))
    assert (row["loss_before"], row["loss_after"], row["loss_change"]) == pytest.approx((2.5, 2.0, -0.5))
    assert row["bits_per_byte_before"] == pytest.approx(1.2022, abs=1e-4)
    assert row["bits_per_byte_change"] == pytest.approx(-20 / math.log(2) / 120)
    assert (row["documents"], row["tokens"]) == (2, 40)


def synthetic(seed: int, *, change: float = -0.05, documents: int = 60) -> pa.Table:
    """Documents whose loss per token differs by 0.5 nats among themselves, and changes by `change` with a spread of 0.03."""
    random = np.random.default_rng(seed)
    tokens = random.integers(50, 2000, documents)
    before = random.normal(4.0, 0.5, documents)
    after = before + change + random.normal(0, 0.03, documents)
    return table_of(tokens.tolist(), (tokens * 3).tolist(), (before * tokens).tolist(), (after * tokens).tolist())


def test_the_paired_interval_covers_the_true_change() -> None:
    rows = [compared(synthetic(seed), seed=seed, draws=200) for seed in range(40)]
    covered = sum(row["loss_change_low"] <= -0.05 <= row["loss_change_high"] for row in rows)
    assert 34 <= covered <= 40
    assert all(row["loss_change_low"] <= row["loss_change"] <= row["loss_change_high"] for row in rows)
    in_bits = -0.05 / 3 / math.log(2)
    assert sum(row["bits_per_byte_change_low"] <= in_bits <= row["bits_per_byte_change_high"] for row in rows) == covered


def test_pairing_narrows_the_interval() -> None:
    """Against a bootstrap that draws the documents of the two checkpoints apart."""
    table, random = synthetic(3), np.random.default_rng(0)
    tokens, before, after = (table[key].to_numpy() for key in ("tokens", "nll_before", "nll_after"))

    def drawn(values: np.ndarray) -> float:
        rows = random.integers(0, len(values), len(values))
        return values[rows].sum() / tokens[rows].sum()

    low, high = np.quantile([drawn(after) - drawn(before) for _ in range(1000)], [0.025, 0.975])
    row = compared(table)
    assert (row["loss_change_high"] - row["loss_change_low"]) * 5 < high - low


def test_one_document_and_no_change() -> None:
    row = compared(table_of([7], [21], [14.0], [14.0]))
    assert row["loss_change"] == row["loss_change_low"] == row["loss_change_high"] == 0.0


# The step


def test_training_on_target_text_lowers_its_loss(evaluation: Manifest) -> None:
    rows = rows_of(evaluation)
    assert rows["legal"]["loss_change_high"] < 0
    assert set(rows) == {"wiki", "book", "legal", "all general"}
    checks = {check.name: check for check in evaluation.checks}
    assert checks["losses_finite"].passed and checks["target_improved"].passed
    assert not checks["enough_held_out_tokens"].passed and "wiki" in checks["enough_held_out_tokens"].description


def test_the_report_follows_from_the_documents(evaluation: Manifest) -> None:
    table, rows = pq.read_table(evaluation.file("documents.parquet")).to_pylist(), rows_of(evaluation)
    groups = {domain: [domain] for domain in ROLES} | {"all general": ["wiki", "book"]}
    for name, domains in groups.items():
        mine = [row for row in table if row["domain"] in domains]
        for when in ("before", "after"):
            nats = sum(row[f"nll_{when}"] for row in mine)
            assert rows[name][f"loss_{when}"] == pytest.approx(nats / sum(row["tokens"] for row in mine))
            assert rows[name][f"bits_per_byte_{when}"] == pytest.approx(nats / math.log(2) / sum(row["bytes"] for row in mine))
        assert rows[name]["documents"] == len(mine)
    assert evaluation.counts["tokens"] == sum(row["tokens"] for row in table)
    assert evaluation.outcome.metrics["all_general_bits_per_byte_after"] == rows["all general"]["bits_per_byte_after"]


def test_bytes_are_those_of_the_text(world: World, evaluation: Manifest) -> None:
    table = {row["id"]: row["bytes"] for row in pq.read_table(evaluation.file("documents.parquet")).to_pylist()}
    for cleaned in world.corpora.values():
        for row in pq.read_table(cleaned.file("documents.parquet"), columns=["id", "text"]).to_pylist():
            assert table.get(row["id"], len(row["text"].encode())) == len(row["text"].encode())


def test_a_checkpoint_against_itself_has_not_changed(world: World, base: Manifest) -> None:
    rows = rows_of(world.store.build(request(world, base, base)).manifest)
    for row in rows.values():
        assert row["loss_change"] == row["loss_change_low"] == row["loss_change_high"] == row["bits_per_byte_change"] == 0.0


def test_the_same_input_gives_the_same_bytes(
    world: World, base: Manifest, checkpoint: Manifest, evaluation: Manifest, tmp_path: Path
) -> None:
    again = Store(tmp_path / "again").build(request(world, base, checkpoint)).manifest
    assert again.content_sha256 == evaluation.content_sha256


def test_a_token_limit_reads_fewer_documents(world: World, base: Manifest, evaluation: Manifest) -> None:
    rows = rows_of(world.store.build(request(world, base, base, max_tokens_per_domain=500)).manifest)
    whole = rows_of(evaluation)
    assert all(0 < rows[domain]["documents"] < whole[domain]["documents"] for domain in ROLES)
    assert all(rows[domain]["tokens"] >= 500 for domain in ROLES)


def test_a_domain_without_held_out_text_is_named(world: World, base: Manifest) -> None:
    with pytest.raises(EmptyInput, match="no held-out document of news, patents; raise `held_out`"):
        world.store.build(request(world, base, base, roles={**ROLES, "patents": "target", "news": "evaluation"}))
    rows = pq.read_table(world.decisions.file("decisions.parquet")).to_pylist()
    dropped = publish(
        world.store, "deduplicated_corpus", {"decisions.parquet": [{**row, "kept": row["domain"] != "legal"} for row in rows]}
    )
    emptied = request(world, base, base)
    with pytest.raises(EmptyInput, match="no held-out document of legal"):
        world.store.build(replace(emptied, inputs={**emptied.inputs, "decisions": dropped}))


def test_an_unknown_evaluator_suggests_the_nearest(world: World, base: Manifest) -> None:
    with pytest.raises(GristmillError, match="did you mean 'held_out_loss'"):
        world.store.build(request(world, base, base, evaluator="heldout_loss"))


def test_a_loss_that_is_not_finite_fails_its_audit(tmp_path: Path, evaluation: Manifest) -> None:
    table = pq.read_table(evaluation.file("documents.parquet"))
    broken = table.set_column(5, "nll_after", pa.array([float("nan"), *table["nll_after"].to_pylist()[1:]]))
    pq.write_table(broken, tmp_path / "documents.parquet")
    draft = evaluation.at(tmp_path)
    assert losses_finite(evaluation).passed and not losses_finite(draft).passed


def test_without_a_target_there_is_nothing_to_improve(tmp_path: Path, evaluation: Manifest) -> None:
    """An evaluation of general domains alone is published; the audit says so instead of failing on nothing."""
    rows = [row for row in rows_of(evaluation).values() if row["role"] != "target"]
    (tmp_path / "evaluation.json").write_text(json.dumps({"domains": rows}))
    check = target_improved(evaluation.model_copy(update={"outcome": Outcome()}).at(tmp_path))
    assert not check.passed and "no target domain" in check.description
