"""The chunked loss of a linear head against autograd on the plain formula: values, gradients, soft targets, half precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pipelines.linear_cross_entropy import MIN_POSITIONS, SoftTargets, chunk_positions, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 60
CHUNK = chunk_positions(2**14)


def naive(hidden, weight, targets, bias=None, soft: SoftTargets | None = None):
    """Return the loss as the papers write it, with all logits."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    hard = functional.cross_entropy(logits, targets, reduction="sum")
    if soft is None:
        return hard
    theirs = soft.hidden_ND @ soft.weight_VD.T + (0 if soft.bias_V is None else soft.bias_V)
    T = soft.temperature
    divergence = functional.kl_div((logits / T).log_softmax(1), (theirs / T).log_softmax(1), log_target=True, reduction="sum")
    return (1 - soft.weight) * hard + soft.weight * T * T * divergence


def drawn(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.sampled_from([0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]),
    hidden=st.integers(1, 12),
    vocabulary=st.sampled_from([2, 5, VOCABULARY]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    biased=st.booleans(),
    soft=st.none() | st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.3, 1.0]), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_autograds(positions, hidden, vocabulary, scale, biased, soft, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = [drawn(positions, hidden, generator=generator), drawn(vocabulary, hidden, generator=generator)]
    leaves += [drawn(vocabulary, generator=generator)] if biased else []
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    teacher = None
    if soft:
        temperature, weight, with_bias = soft
        parts = drawn(positions, 3, generator=generator), drawn(vocabulary, 3, generator=generator)
        teacher = SoftTargets(*parts, drawn(vocabulary, generator=generator) if with_bias else None, temperature, weight)
    found = []
    for ours in (True, False):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        bias = mine[2] if biased else None
        if ours:
            value, per_position = linear_cross_entropy(mine[0] * scale, mine[1], targets_N=targets, bias_V=bias, teacher=teacher)
            assert not per_position.requires_grad and per_position.shape == targets.shape
        else:
            value = naive(mine[0] * scale, mine[1], targets, bias, teacher)
            per_position = functional.cross_entropy(
                (mine[0] * scale) @ mine[1].T + (0 if bias is None else bias), targets, reduction="none"
            ).detach()
        (value * 3.0).backward()
        found.append((value.detach(), per_position, *(leaf.grad for leaf in mine)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_chunks_of_a_real_vocabulary_agree_with_autograd() -> None:
    """Several chunks, the last of them short."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, positions = 2**15, 2 * MIN_POSITIONS + 5
    hidden, weight = torch.randn(positions, 8, generator=generator), torch.randn(vocabulary, 8, generator=generator)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    assert chunk_positions(vocabulary) < positions
    found = []
    for loss in (lambda h, w: linear_cross_entropy(h, w, targets_N=targets)[0], lambda h, w: naive(h, w, targets)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(*leaves)
        value.backward()
        found.append((value.detach(), leaves[0].grad, leaves[1].grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_confident_wrong_prediction_has_a_finite_loss() -> None:
    """A probability below the smallest number is a loss of its logits' distance, not infinity."""
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total, per_position = linear_cross_entropy(hidden, weight, targets_N=torch.tensor([1]))
    total.backward()
    assert total.item() == per_position.item() == 600.0
    assert weight.grad.tolist() == [[300.0], [-300.0]]


def test_without_gradients_nothing_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 4, generator=generator), torch.randn(9, 4, generator=generator, requires_grad=True)
    targets = torch.randint(9, (50,), generator=generator)
    with torch.no_grad():
        total, per_position = linear_cross_entropy(hidden, weight, targets_N=targets)
    assert not total.requires_grad and total.item() == pytest.approx(per_position.sum().item())
    trained, same = linear_cross_entropy(hidden, weight, targets_N=targets)
    assert torch.equal(per_position, same) and trained.requires_grad


def test_bfloat16_products_have_float32_losses_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (40, 70))
    targets = torch.randint(70, (40,), generator=generator)
    exact = naive(hidden, weight, targets)
    exact.backward()
    wanted = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, per_position = linear_cross_entropy(hidden, weight, targets_N=targets)
    total.backward()
    assert total.dtype == per_position.dtype == weight.grad.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=1e-2, atol=0)
    for ours, theirs in zip((hidden.grad, weight.grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


def test_gradients_are_spent_once() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    total, _ = linear_cross_entropy(torch.randn(4, 3), weight, targets_N=torch.tensor([0, 1, 2, 3]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="spent"):
        total.backward()
