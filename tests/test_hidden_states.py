"""Hidden states: a row's mean is over its own tokens, whatever stands behind them, for causal models and encoders alike."""

from __future__ import annotations

import pytest
import torch

from pipelines.batch import SpecialTokens
from pipelines.errors import GristmillError
from pipelines.hidden_states import layer_of, mean_hidden_states, one_thread, token_states
from pipelines.models import ModelSettings, new_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LENGTH, DEPTH = 80, 24, 3
ARCHITECTURES = ("llama", "gpt2", "bert", "modernbert")
LENGTHS = (24, 10, 1, 0)


def model_of(architecture: str, **changes: object):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": DEPTH, "num_heads": 2, "intermediate_size": 48, **changes}
    tokens = SpecialTokens(end_of_text=0, mask=1, vocabulary_size=VOCABULARY)
    return new_model(ModelSettings(architecture=architecture, **sizes), tokens, LENGTH)


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, 1, DEPTH])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mean_is_that_of_each_row_alone(architecture: str, layer: int) -> None:
    """Each row by itself, cut to its length, through transformers; the states are added token by token."""
    model = model_of(architecture).eval()
    found = mean_hidden_states(model, rows(), torch.tensor(LENGTHS), layer)
    expected = torch.zeros(len(LENGTHS), 32)
    for row, length in enumerate(LENGTHS[:-1]):
        with torch.no_grad():
            states = model(input_ids=rows()[row : row + 1, :length], output_hidden_states=True).hidden_states[layer][0]
        for state in states:
            expected[row] += state / length
    assert found.dtype == torch.float32 and not found[-1].any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.pdist(found).min() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stands_behind_a_row_does_not_matter(architecture: str) -> None:
    model, lengths = model_of(architecture), torch.tensor(LENGTHS)
    other = torch.where(torch.arange(LENGTH) < lengths[:, None], rows(), rows(seed=1))
    assert not torch.equal(other, rows())
    assert torch.equal(mean_hidden_states(model, rows(), lengths, 2), mean_hidden_states(model, other, lengths, 2))
    shorter = mean_hidden_states(model, rows()[1:, :15], lengths[1:], 2)
    torch.testing.assert_close(shorter, mean_hidden_states(model, rows(), lengths, 2)[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_in_training_embeds_without_dropout_and_goes_on_training(architecture: str) -> None:
    model = model_of(architecture, dropout=0.5).train()
    before = torch.get_rng_state()
    one, two = (token_states(model, rows(), torch.tensor(LENGTHS), 2) for _ in range(2))
    assert torch.equal(one, two) and not one.requires_grad and one.shape == (len(LENGTHS), LENGTH, 32)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())


def test_a_masked_language_model_of_a_decoder_sees_both_sides() -> None:
    model, lengths = model_of("llama"), torch.tensor(LENGTHS)
    other = rows().clone()
    other[0, -1] = 2 + (other[0, -1] - 1) % (VOCABULARY - 2)
    first = [token_states(model, ids, lengths, 2)[0, 0] for ids in (rows(), other)]
    model.config.is_causal = False  # as training with objective `masked` leaves it
    both = [token_states(model, ids, lengths, 2)[0, 0] for ids in (rows(), other)]
    assert torch.equal(*first) and not torch.allclose(*both)


def test_layers_by_number() -> None:
    """Layer 9 of 12 is what INGENIOUS takes: three quarters of the depth."""
    twelve = model_of("bert", num_layers=12)
    assert [layer_of(twelve, layer) for layer in (None, 0, 12, -1, -13)] == [9, 0, 12, 12, 0]
    assert layer_of(model_of("llama", num_layers=1), None) == 1
    for layer in (13, -14):
        with pytest.raises(GristmillError, match=f"layer {layer} does not exist: the model has layers 1 to 12"):
            layer_of(twelve, layer)


def test_threads_are_as_before_even_after_an_error() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2
