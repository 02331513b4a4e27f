"""Optimizers: AdamW against torch, Muon against its published step in NumPy and against torch's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipelines.batch import SpecialTokens
from pipelines.models import ModelSettings, new_model
from pipelines.optimizers import hidden_matrices
from pipelines.optimizers._muon import COEFFICIENTS, orthogonalize
from pipelines.optimizers.adamw import AdamW
from pipelines.optimizers.muon import Muon

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = SpecialTokens(end_of_text=0, mask=1, vocabulary_size=60)
ARCHITECTURES = ("llama", "gpt2", "bert", "modernbert")


def model_of(architecture: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 40}
    return new_model(ModelSettings(architecture=architecture, **sizes), TOKENS, 12)


def with_gradients(model, seed: int):
    """Give every parameter of `model` a drawn gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def published_step(weight, gradient, momentum, *, rate, decay, mu, nesterov, steps):
    """Return weight and momentum after one step of Muon as its papers write it, in float64.

    Jordan 2024: momentum by sums, Nesterov, five quintic iterations on the wide side of the matrix; Moonlight (2502.16982):
    decoupled decay, and the scale 0.2 sqrt(max(m, n)).
    """
    momentum = mu * momentum + gradient
    update = gradient + mu * momentum if nesterov else momentum
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / np.linalg.norm(x)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if update.shape[0] > update.shape[1] else x
    return weight - rate * decay * weight - rate * 0.2 * math.sqrt(max(weight.shape)) * x, momentum


@pytest.mark.parametrize("num_steps", [1, 10])
@pytest.mark.parametrize(
    ("architecture", "values"),
    [*((name, {}) for name in ARCHITECTURES), ("llama", {"nesterov": False, "momentum": 0.8, "ns_steps": 3, "weight_decay": 0.0})],
)
def test_hidden_matrices_take_the_published_step(architecture: str, values: dict[str, float], num_steps: int) -> None:
    settings, model = Muon(**values), model_of(architecture)
    optimizer = settings.build(model, 0.02)
    matrices = list(hidden_matrices(model))
    expected = [(p.detach().double().numpy().copy(), np.zeros(p.shape)) for p in matrices]
    for step in range(num_steps):
        with_gradients(model, step)
        expected = [
            published_step(
                weight,
                p.grad.double().numpy(),
                momentum,
                **{"rate": 0.02, "decay": settings.weight_decay, "mu": settings.momentum},
                **{"nesterov": settings.nesterov, "steps": settings.ns_steps},
            )
            for p, (weight, momentum) in zip(matrices, expected, strict=True)
        ]
        optimizer.step()
    assert len(matrices) >= 8
    for parameter, (weight, _) in zip(matrices, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=0, atol=2e-5 * num_steps)


def test_hidden_matrices_follow_torchs_muon_as_near_as_bfloat16_allows() -> None:
    """torch orthogonalises in bfloat16: a relative error of 2^-8 in each product."""
    model, twin = model_of("llama"), model_of("llama")
    mine = Muon().build(model, 0.02)
    settings = {"weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(list(hidden_matrices(twin)), lr=0.02, **settings)
    before = [p.detach().clone() for p in hidden_matrices(model)]
    for step in range(10):
        with_gradients(model, step), with_gradients(twin, step)
        mine.step(), theirs.step()
    for old, one, other in zip(before, hidden_matrices(model), hidden_matrices(twin), strict=True):
        assert (one - other).norm() < 0.02 * (one - old).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_moves_by_torchs_adamw(architecture: str) -> None:
    model, twin = model_of(architecture), model_of(architecture)
    mine = Muon(rest_rate=3.0, betas=(0.8, 0.99), weight_decay=0.3).build(model, 0.01)
    rest = [p for p in twin.parameters() if not any(p is matrix for matrix in hidden_matrices(twin))]
    decayed = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(decayed, lr=0.03, betas=(0.8, 0.99), eps=1e-8, foreach=False)
    for step in range(5):
        with_gradients(model, step), with_gradients(twin, step)
        mine.step(), theirs.step()
    hidden = {id(p) for p in hidden_matrices(model)}
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if id(one) not in hidden:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


def test_which_parameters_are_hidden_matrices() -> None:
    names = {}
    for architecture in ARCHITECTURES:
        model = model_of(architecture)
        hidden = {id(p) for p in hidden_matrices(model)}
        names[architecture] = [name for name, p in model.named_parameters() if id(p) in hidden]
        groups = Muon().build(model, 0.1).param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted({id(p) for p in model.parameters()})
        assert not [name for name in names[architecture] if "embed" in name or "norm" in name or "head" in name or "bias" in name]
    assert (
        len(names["llama"]) == 2 * 7 and len(names["gpt2"]) == 2 * 4 and len(names["bert"]) == 2 * 6 and len(names["modernbert"]) == 2 * 4
    )


def test_an_orthogonalised_matrix_is_nearly_orthogonal() -> None:
    """Every singular value, from 1 down to 0.02 of the norm, comes to between 0.65 and 1.25; the vectors stay."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(3, 8, 8, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(3, 20, 8, generator=generator))
    values = torch.linspace(0.02, 1.0, 8)
    found = orthogonalize(left * values @ right.mT, steps=5)
    inner = left.mT @ found @ right
    assert inner.diagonal(dim1=-2, dim2=-1).min() > 0.65 and inner.diagonal(dim1=-2, dim2=-1).max() < 1.25
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert COEFFICIENTS == (3.4445, -4.7750, 2.0315)


def test_state_is_tensors_by_parameter_and_can_be_carried_over() -> None:
    """Another optimizer with this state goes on to the same bits."""
    model, twin = model_of("llama"), model_of("llama")
    one, other = Muon().build(model, 0.01), Muon().build(twin, 0.01)
    with_gradients(model, 0)
    one.step()
    twin.load_state_dict(model.state_dict())
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        state = one.state[mine]
        assert set(state) in ({"momentum"}, {"step", "exp_avg", "exp_avg_sq"})
        other.state[theirs].update({name: value.clone() for name, value in state.items()})
    with_gradients(model, 1), with_gradients(twin, 1)
    one.step(), other.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("settings", [AdamW(), AdamW(rest_rate=2.0), Muon(rest_rate=2.0)])
def test_every_group_carries_the_rate_that_a_schedule_multiplies(settings: AdamW | Muon) -> None:
    groups = settings.build(model_of("bert"), 0.04).param_groups
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in groups]
    assert {group["initial_lr"] for group in groups} == {0.04, 0.04 * settings.rest_rate}


def test_a_parameter_without_gradient_stays() -> None:
    model = model_of("llama")
    optimizer = Muon().build(model, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)) and not optimizer.state


def test_adamw_is_torchs_with_decay_on_matrices_only() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    twin = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    twin.load_state_dict(model.state_dict())
    mine = AdamW(weight_decay=0.5).build(model, 0.01)
    groups = [{"params": [twin[0].weight], "weight_decay": 0.5}, {"params": [twin[0].bias, *twin[1].parameters()], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(5):
        data = torch.full((2, 4), float(step + 1))
        for network, optimizer in ((model, mine), (twin, reference)):
            optimizer.zero_grad()
            network(data).square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert [group["initial_lr"] for group in mine.param_groups] == [0.01, 0.01]


def test_every_parameter_is_in_one_group() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.RMSNorm(4))
    model[1].bias.requires_grad_(False)
    groups = AdamW().build(model, 0.1).param_groups
    held = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
