"""Objectives: transformers' own losses and gradients, what may see what, counts of what is hidden, and learning by heart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pipelines import plugins
from pipelines.batch import IGNORED, Batch, SpecialTokens, documents_of
from pipelines.errors import GristmillError
from pipelines.models import ModelSettings, hidden_states, new_model, prediction_head
from pipelines.objectives import Objective
from pipelines.objectives.causal import Causal
from pipelines.objectives.masked import Masked

pytestmark = pytest.mark.usefixtures("one_thread")

END, MASK, VOCABULARY, LENGTH = 0, 1, 80, 24
TOKENS = SpecialTokens(end_of_text=END, mask=MASK, vocabulary_size=VOCABULARY)
ARCHITECTURES = ("llama", "gpt2", "bert", "modernbert")
EVERY = [(objective, architecture) for objective in ("causal", "masked") for architecture in ARCHITECTURES]
MASKED_EVERYWHERE = {"mask_share": 1.0, "random_share": 0.0, "keep_share": 0.0}


def model_of(architecture: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    return new_model(ModelSettings(architecture=architecture, **sizes), TOKENS, LENGTH).eval()


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, number]) for number in range(count)]


def windows(count: int = 3, *, seed: int = 0, ends: Sequence[int] = ()) -> np.ndarray:
    """Return windows of ordinary tokens, with an end of text at each place of `ends`."""
    ids = np.random.default_rng(seed).integers(2, VOCABULARY, (count, LENGTH + 1))
    ids[:, list(ends)] = END
    return ids


def objective_of(name: str, **values: object) -> Objective:
    return plugins.build("objectives", name, values)  # type: ignore[return-value]


def naive_losses(model, batch: Batch, *, causal: bool) -> torch.Tensor:
    """Return the loss of each position, 0 where nothing is predicted, from transformers' own logits under an explicit mask."""
    B, T = batch.inputs_BT.shape
    allowed = torch.ones(B, T, T, dtype=torch.bool)
    if batch.documents_BT is not None:
        allowed &= batch.documents_BT[:, :, None] == batch.documents_BT[:, None, :]
    if causal:
        allowed &= torch.ones(T, T).tril().bool()
    arguments: dict[str, object] = {"attention_mask": allowed[:, None]}
    if batch.documents_BT is not None:
        starts = [[row.index(document) for document in row] for row in batch.documents_BT.tolist()]
        arguments["position_ids"] = torch.arange(T) - torch.tensor(starts)
    if model.config.model_type == "modernbert":
        near = (torch.arange(T)[:, None] - torch.arange(T)).abs() <= model.config.local_attention // 2
        arguments["attention_mask"] = {"full_attention": allowed[:, None], "sliding_attention": (allowed & near)[:, None]}
    logits = model(input_ids=batch.inputs_BT, **arguments).logits
    return functional.cross_entropy(logits.transpose(1, 2), batch.targets_BT, ignore_index=IGNORED, reduction="none")


# The loss is transformers'


@pytest.mark.parametrize("document_attention", [False, True])
@pytest.mark.parametrize(("name", "architecture"), EVERY)
def test_loss_and_every_gradient_are_those_of_the_plain_formula(name: str, architecture: str, document_attention: bool) -> None:
    objective = objective_of(name)
    batch = objective.batch(windows(ends=(5, 11, 12)), generators(3), TOKENS, document_attention=document_attention)
    model, twin = model_of(architecture), model_of(architecture)
    found = objective.losses(model, batch)
    found.total.backward()
    expected = naive_losses(twin, batch, causal=name == "causal")
    expected.sum().backward()
    torch.testing.assert_close(found.per_window_B, expected.sum(dim=1).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, expected.sum(), rtol=1e-5, atol=1e-5)
    assert found.counts_B.tolist() == (batch.targets_BT != IGNORED).sum(dim=1).tolist()
    assert batch.num_targets == found.counts_B.sum() > 0
    for (parameter_name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is None:  # what the loss does not reach, such as BERT's second segment
            assert ours.grad is None or not ours.grad.any()
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=2e-5, msg=parameter_name)


@pytest.mark.parametrize(("name", "architecture"), EVERY)
def test_a_directional_derivative_is_a_finite_difference(name: str, architecture: str) -> None:
    """In float64, along a random direction of all weights."""
    model = model_of(architecture).double()
    objective = objective_of(name)
    batch = objective.batch(windows(2), generators(2), TOKENS)
    objective.losses(model, batch).total.backward()
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.grad is not None]
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
    sides = []
    distance, tolerance = (1e-4, 1e-2) if architecture == "llama" else (1e-6, 1e-4)  # transformers' RMSNorm of Llama casts to float32
    with torch.no_grad():
        for step in (distance, -2 * distance):
            for parameter, d in zip(parameters, direction, strict=True):
                parameter += step * d
            sides.append(objective.losses(model, batch).total.item())
    assert (sides[0] - sides[1]) / (2 * distance) == pytest.approx(slope, rel=tolerance)


def test_a_batch_without_gradient_has_the_same_losses() -> None:
    model, objective = model_of("llama"), Causal()
    batch = objective.batch(windows(), generators(3), TOKENS)
    with torch.no_grad():
        measured = objective.losses(model, batch)
    trained = objective.losses(model, batch)
    assert torch.equal(measured.per_window_B, trained.per_window_B) and not measured.total.requires_grad
    assert not trained.per_window_B.requires_grad


def test_sums_add_up_over_micro_batches() -> None:
    model, objective = model_of("bert"), Masked()
    batch = objective.batch(windows(4), generators(4), TOKENS)
    whole = objective.losses(model, batch)
    parts = [objective.losses(model, batch.rows(first, first + 2)) for first in (0, 2)]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part.per_window_B for part in parts]), whole.per_window_B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_a_batch_that_predicts_nothing_has_loss_zero(name: str) -> None:
    """It can stand in a step beside others: its gradients are zeros."""
    objective, model = objective_of(name), model_of("bert")
    batch = objective.batch(np.full((2, LENGTH + 1), END), generators(2), TOKENS, document_attention=True)
    losses = objective.losses(model, batch)
    losses.total.backward()
    assert batch.num_targets == 0 and losses.total.item() == 0.0 and losses.per_window_B.tolist() == [0.0, 0.0]
    assert not model.get_output_embeddings().weight.grad.any()


# Learning by heart


@pytest.mark.parametrize(("name", "architecture"), EVERY)
def test_two_windows_are_learnt_by_heart(name: str, architecture: str) -> None:
    objective, model = objective_of(name), model_of(architecture).train()
    batch = objective.batch(windows(2), generators(2), TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective.losses(model, batch).total / batch.num_targets
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 < np.log(VOCABULARY) - 4


# Who may see what


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "modernbert"])
def test_a_later_token_does_not_change_an_earlier_causal_loss(architecture: str) -> None:
    model, ids = model_of(architecture), windows(1)
    before = position_losses(Causal(), model, ids)
    for place in (4, 17, LENGTH - 1):
        other = ids.copy()
        other[0, place] = 2 + (other[0, place] - 1) % (VOCABULARY - 2)
        after = position_losses(Causal(), model, other)
        np.testing.assert_allclose(before[: place - 1], after[: place - 1], rtol=0, atol=1e-5)
        assert np.abs(before[place:] - after[place:]).max() > 1e-4


@pytest.mark.parametrize(("name", "architecture"), EVERY)
def test_another_document_changes_nothing_under_document_attention(name: str, architecture: str) -> None:
    """Each of three documents of a window in turn; over the whole window the first one does reach the others."""
    model, objective = model_of(architecture), objective_of(name, **({"probability": 0.5} if name == "masked" else {}))
    ids = windows(1, ends=(7, 15))
    for place in (slice(0, 7), slice(8, 15), slice(16, LENGTH)):
        other = ids.copy()
        other[0, place] = windows(1, seed=9)[0, place]
        rest = np.ones(LENGTH, dtype=bool)
        rest[max(0, place.start - 1) : place.stop + 1] = False
        one, two = (position_losses(objective, model, each, document_attention=True)[rest] for each in (ids, other))
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
        one, two = (position_losses(objective, model, each)[rest] for each in (ids, other))
        assert place.start or np.abs(one - two).max() > 1e-5


def position_losses(objective: Objective, model, ids: np.ndarray, *, document_attention: bool = False) -> np.ndarray:
    """Return the loss of each position of one window, 0 where nothing is predicted."""
    batch = objective.batch(ids, generators(1), TOKENS, document_attention=document_attention)
    with torch.no_grad():
        head = prediction_head(model)
        hidden = head.transform(hidden_states(model, batch, objective.attention)[0])
        logits = functional.linear(hidden, head.weight_VD, head.bias_V)
        return functional.cross_entropy(logits, batch.targets_BT[0], ignore_index=IGNORED, reduction="none").numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_id_of_a_hidden_token_reaches_nothing_but_its_own_target(architecture: str) -> None:
    """The input stays the same to the last token, so no other prediction can change."""
    objective, model = Masked(probability=0.4, mask_share=0.8, random_share=0.2, keep_share=0.0), model_of(architecture)
    ids = windows(1)
    batch = objective.batch(ids, generators(1), TOKENS)
    for place in np.nonzero(batch.targets_BT[0].numpy() != IGNORED)[0]:
        other = ids.copy()
        other[0, place] = 2 + (other[0, place] - 1) % (VOCABULARY - 2)
        changed = objective.batch(other, generators(1), TOKENS)
        assert torch.equal(changed.inputs_BT, batch.inputs_BT)
        assert (changed.targets_BT != batch.targets_BT).nonzero().tolist() == [[0, place]]
    with torch.no_grad():
        assert objective.losses(model, batch).total.item() == objective.losses(model, batch).total.item()


def test_one_model_serves_both_objectives_in_turn() -> None:
    """Biphasic (2507.00994): a decoder sees left to right, then both sides, then left to right again."""
    model, ids = model_of("llama"), windows(1)
    causal, masked = Causal(), Masked()
    with torch.no_grad():
        first = causal.losses(model, causal.batch(ids, generators(1), TOKENS)).total
        batch = masked.batch(ids, generators(1), TOKENS)
        found = masked.losses(model, batch).total
        assert model.config.is_causal is False
        torch.testing.assert_close(found, naive_losses(model, batch, causal=False).sum(), rtol=1e-5, atol=1e-5)
        assert torch.equal(causal.losses(model, causal.batch(ids, generators(1), TOKENS)).total, first)
        assert model.config.is_causal is True


# What is hidden


def test_causal_batches_by_hand() -> None:
    ids = np.asarray([[5, 6, END, 7, 8, END, 9]])
    plain = Causal().batch(ids, [], TOKENS)
    assert plain.inputs_BT.tolist() == [[5, 6, END, 7, 8, END]] and plain.targets_BT.tolist() == [[6, END, 7, 8, END, 9]]
    assert plain.documents_BT is None
    apart = Causal().batch(ids, [], TOKENS, document_attention=True)
    assert apart.documents_BT.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert apart.targets_BT.tolist() == [[6, END, IGNORED, 8, END, IGNORED]]


@given(st.lists(st.lists(st.sampled_from([END, 2, 3]), min_size=6, max_size=6), min_size=1, max_size=3))
def test_an_end_of_text_belongs_to_the_document_it_ends(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        number, numbers = 0, []
        for token in row:
            numbers.append(number)
            number += token == END
        expected.append(numbers)
    assert documents_of(np.asarray(rows), TOKENS.end_of_text).tolist() == expected


@settings(max_examples=50)
@given(
    probability=st.floats(0.01, 1.0) | st.tuples(st.floats(0.0, 0.5), st.floats(0.5, 1.0)),
    ends=st.lists(st.integers(0, LENGTH), max_size=LENGTH),
    seed=st.integers(0, 99),
)
def test_what_a_masked_batch_may_hold(probability: float | tuple[float, float], ends: list[int], seed: int) -> None:
    ids = windows(2, seed=seed, ends=ends)
    batch = Masked(probability=probability).batch(ids, generators(2, seed), TOKENS)
    inputs, targets, original = batch.inputs_BT.numpy(), batch.targets_BT.numpy(), ids[:, :-1]
    hidden = targets != IGNORED
    assert np.array_equal(targets[hidden], original[hidden]) and np.array_equal(inputs[~hidden], original[~hidden])
    assert not (original[hidden] == END).any() and np.array_equal(inputs == END, original == END)
    low, high = probability if isinstance(probability, tuple) else (probability, probability)
    for row in range(2):
        eligible = (original[row] != END).sum()
        assert min(eligible, max(1, round(low * LENGTH))) <= hidden[row].sum() <= min(eligible, max(1, round(high * LENGTH)))
    again = Masked(probability=probability).batch(ids[::-1], generators(2, seed)[::-1], TOKENS)
    assert torch.equal(again.inputs_BT.flip(0), batch.inputs_BT)
    assert np.array_equal(ids, windows(2, seed=seed, ends=ends))


def test_shares_of_what_stands_for_hidden_tokens() -> None:
    """15 % predicted; of them 80 % masked, 10 % random, 10 % kept: within 4 standard deviations over 60,000 predictions."""
    length, count = 200, 2000
    ids = np.random.default_rng(1).integers(2, VOCABULARY, (count, length + 1))
    batch = Masked().batch(ids, generators(count), TOKENS)
    hidden = batch.targets_BT.numpy() != IGNORED
    assert hidden.sum(axis=1).tolist() == [30] * count
    seen, original = batch.inputs_BT.numpy()[hidden], ids[:, :-1][hidden]
    total = hidden.sum()

    def close(found: float, share: float) -> bool:
        return abs(found - share * total) < 4 * np.sqrt(total * share * (1 - share))

    ordinary = VOCABULARY - 2
    assert close((seen == MASK).sum(), 0.8)
    assert close((seen == original).sum(), 0.1 + 0.1 / ordinary)
    strange = (seen != MASK) & (seen != original)
    assert close(strange.sum(), 0.1 * (1 - 1 / ordinary))
    counts = np.bincount(seen[strange], minlength=VOCABULARY)
    assert counts[[END, MASK]].tolist() == [0, 0]
    assert np.abs(counts[2:] - strange.sum() / ordinary).max() < 5 * np.sqrt(strange.sum() / ordinary)
    places = hidden.sum(axis=0)
    assert np.abs(places - 0.15 * count).max() < 5 * np.sqrt(count * 0.15 * 0.85)


def test_a_range_draws_the_share_of_each_window_evenly() -> None:
    """MLM-U: shares from 0 to 1, one a window."""
    ids = np.random.default_rng(1).integers(2, VOCABULARY, (4000, 101))
    batch = Masked(probability=(0.0, 1.0), **MASKED_EVERYWHERE).batch(ids, generators(4000), TOKENS)
    shares = (batch.targets_BT != IGNORED).float().mean(dim=1).numpy()
    assert np.abs(np.histogram(shares, bins=10, range=(0, 1))[0] - 400).max() < 5 * np.sqrt(400)
    assert set(batch.inputs_BT[batch.targets_BT != IGNORED].tolist()) == {MASK}


def test_random_tokens_avoid_special_ids_wherever_they_stand() -> None:
    for end, mask, size in ((0, 1, 4), (3, 2, 4), (2, 0, 4), (1, None, 3)):
        drawn = Masked._random_tokens(np.random.default_rng(0), 200, SpecialTokens(end, mask, size))
        assert set(drawn.tolist()) == set(range(size)) - {end, mask}


def test_a_tokenizer_without_a_mask_token_is_refused_with_the_remedy() -> None:
    without = SpecialTokens(end_of_text=END, mask=None, vocabulary_size=VOCABULARY)
    with pytest.raises(GristmillError, match=r"no mask token; train one of this project.*mask_share: 0"):
        Masked().batch(windows(), generators(3), without)
    batch = Masked(mask_share=0.0, random_share=0.9).batch(windows(), generators(3), without)
    assert batch.num_targets == 3 * round(0.15 * LENGTH)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probability": 0.0}, "share above 0"),
        ({"probability": 1.5}, "share above 0"),
        ({"probability": [0.6, 0.2]}, "the lower one first"),
        ({"keep_share": 0.2}, "add up to 1.1; make them add up to 1"),
    ],
)
def test_shares_that_are_none_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        plugins.build("objectives", "masked", values)
