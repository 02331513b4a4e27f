"""Schedules against torch's own and closed forms; optimizers by what they do to weights."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pipelines import plugins
from pipelines.optimizers.adamw import AdamW
from pipelines.schedules import Schedule
from pipelines.schedules.constant import Constant
from pipelines.schedules.cosine import Cosine
from pipelines.schedules.linear import Linear
from pipelines.schedules.wsd import WarmupStableDecay

STEPS = 200


def multipliers(schedule: Schedule, steps: int = STEPS) -> list[float]:
    return [schedule.multiplier(step, steps) for step in range(steps)]


def torch_multipliers(make, steps: int = STEPS) -> list[float]:
    """Return the rates that torch's scheduler gives to an optimizer whose peak rate is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_cosine_is_torchs(floor: float) -> None:
    expected = torch_multipliers(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=floor))
    assert multipliers(Cosine(floor=floor)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_linear_is_torchs(floor: float) -> None:
    expected = torch_multipliers(lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=floor, total_iters=STEPS))
    assert multipliers(Linear(floor=floor)) == pytest.approx(expected, abs=1e-9)


def test_warmup_then_cosine_is_torchs_sequence() -> None:
    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / 21, end_factor=1.0, total_iters=20)
        decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 20, eta_min=0.1)
        return lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[20])

    assert multipliers(Cosine(floor=0.1, warmup_fraction=0.1)) == pytest.approx(torch_multipliers(make), abs=1e-9)


def test_constant_is_one_after_the_warmup() -> None:
    rates = multipliers(Constant(warmup_fraction=0.25), 8)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])


def test_wsd_by_hand() -> None:
    rates = multipliers(WarmupStableDecay(decay_fraction=0.4, floor=0.0), 10)
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert multipliers(WarmupStableDecay(decay_fraction=0.4, floor=0.2), 10)[-1] == pytest.approx(0.2 + 0.8 * 0.25)
    assert multipliers(WarmupStableDecay(decay_fraction=0.0), 10) == [1.0] * 10


@given(
    name=st.sampled_from(plugins.names("schedules")),
    warmup=st.floats(0.0, 0.9),
    steps=st.integers(1, 400),
)
def test_every_schedule_rises_to_the_peak_then_never_rises_again(name: str, warmup: float, steps: int) -> None:
    rates = multipliers(plugins.build("schedules", name, {"warmup_fraction": warmup}), steps)
    peak = round(warmup * steps)
    assert all(0.0 <= rate <= 1.0 and math.isfinite(rate) for rate in rates)
    assert all(later > earlier for earlier, later in pairwise(rates[:peak]))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[peak:]))
    assert rates[min(peak, steps - 1)] == pytest.approx(1.0) or peak >= steps


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
