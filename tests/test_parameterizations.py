"""Parameterizations: masked weights, their gradients and moments are 0 to the bit through a phase, and free after it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines import plugins
from pipelines.batch import SpecialTokens
from pipelines.models import ModelSettings, new_model
from pipelines.objectives.causal import Causal
from pipelines.parameterizations.sparse import Sparse, linear_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = SpecialTokens(end_of_text=0, mask=1, vocabulary_size=60)
LENGTH = 12


def model_of(architecture: str = "llama"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 40}
    return new_model(ModelSettings(architecture=architecture, **sizes), TOKENS, LENGTH)


def train(model, optimizer, steps: int, *, held: Sparse | None = None, first: int = 0):
    """Take `steps` steps; return the gradients of the last."""
    gradients = {}
    for step in range(first, first + steps):
        ids = np.random.default_rng(step).integers(2, 60, (4, LENGTH + 1))
        optimizer.zero_grad()
        Causal().losses(model, Causal().batch(ids, [], TOKENS)).total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        if held:
            held.after_step(model)
    return gradients


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("choose", ["random", "magnitude"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_masked_weights_gradients_and_moments_are_zero_through_the_phase(architecture: str, choose: str, optimizer_name: str) -> None:
    """Also where the phase follows a dense one, whose moments are not 0."""
    model, sparse = model_of(architecture), Sparse(share=0.75, choose=choose)
    optimizer = plugins.build("optimizers", optimizer_name).build(model, 0.01)  # type: ignore[attr-defined]
    train(model, optimizer, 2)
    sparse.apply(model, optimizer=optimizer)
    zeros = {name: weight == 0 for name, weight in linear_weights(model)}
    assert len(zeros) >= 8
    for (name, weight), zero in zip(linear_weights(model), zeros.values(), strict=True):
        assert zero.sum() == round(0.75 * weight.numel()), name
    for steps in (1, 4):
        gradients = train(model, optimizer, steps, held=sparse)
        for name, weight in linear_weights(model):
            zero = zeros[name]
            assert not weight[zero].any() and not gradients[name][zero].any() and weight[~zero].all()
            assert not any(value[zero].any() for value in optimizer.state[weight].values() if value.shape == weight.shape)
    others = {name for name, p in model.named_parameters() if name not in zeros}
    assert others and not any((model.get_parameter(name) == 0).all() and name.endswith("weight") for name in others)
    sparse.finalize(model)
    train(model, optimizer, 1)
    assert all(weight[zeros[name]].any() for name, weight in linear_weights(model))


def test_a_mask_is_of_the_seed_and_the_matrix() -> None:
    def kept(sparse: Sparse) -> list[torch.Tensor]:
        model = model_of()
        sparse.apply(model)
        return [weight != 0 for _, weight in linear_weights(model)]

    one, same, other = kept(Sparse()), kept(Sparse()), kept(Sparse(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_magnitude_keeps_the_largest() -> None:
    model = model_of()
    before = [weight.detach().clone() for _, weight in linear_weights(model)]
    Sparse(share=0.6, choose="magnitude").apply(model)
    for old, (_, weight) in zip(before, linear_weights(model), strict=True):
        assert old[weight == 0].abs().max() <= old[weight != 0].abs().min()
        assert torch.equal(weight[weight != 0], old[weight != 0])


@pytest.mark.parametrize("choose", ["random", "magnitude"])
def test_a_resume_inside_the_phase_goes_on_to_the_same_bits(choose: str) -> None:
    def started(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparse = Sparse(choose=choose)
        sparse.apply(model, optimizer=optimizer)
        return optimizer, sparse

    whole, first = model_of(), model_of()
    optimizer, sparse = started(whole)
    train(whole, optimizer, 6, held=sparse)
    optimizer, sparse = started(first)
    train(first, optimizer, 3, held=sparse)
    resumed = model_of()
    resumed.load_state_dict(first.state_dict())
    again = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    sparse.apply(resumed, optimizer=again)
    train(resumed, again, 3, held=sparse, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert set(whole.state_dict()) == set(model_of().state_dict())


def test_applying_twice_and_lifting_twice_is_once() -> None:
    model, sparse = model_of(), Sparse()
    sparse.finalize(model)
    sparse.apply(model)
    sparse.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 1, held=sparse)
    sparse.finalize(model)
    sparse.finalize(model)
    gradients = train(model, optimizer, 1)
    assert all(gradients[name].all() for name, _ in linear_weights(model))
