"""Schedules against torch's and transformers' own and against closed forms, at every step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pipelines import plugins
from pipelines.errors import GristmillError
from pipelines.schedules import Schedule
from pipelines.schedules.constant import Constant
from pipelines.schedules.cosine import Cosine
from pipelines.schedules.infinite import Infinite
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


@pytest.mark.parametrize(("decay", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt")])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_wsd_is_transformers(decay: str, theirs: str, floor: float) -> None:
    """Theirs starts its warm-up at 0, so that is left out."""
    from transformers import get_wsd_schedule

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LambdaLR:
        return get_wsd_schedule(optimizer, 0, 50, num_training_steps=STEPS, decay_type=theirs, min_lr_ratio=floor)

    ours = WarmupStableDecay(decay_fraction=0.25, decay=decay, floor=floor)
    assert multipliers(ours) == pytest.approx(torch_multipliers(make), abs=1e-9)


def infinite_by_formula(step: int, warmup: int, cooldown: int, until: int, end: int, constant: float, floor: float) -> float:
    """2503.02844: linear to 1, half a cosine to `constant`, that, and an exponential to `floor` at `end`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step < cooldown:
        return constant + (1 - constant) / 2 * (1 + math.cos(math.pi * (step - warmup) / (cooldown - warmup)))
    if step < until:
        return constant
    return constant * math.exp(math.log(floor / constant) * (step - until) / (end - until))


def test_infinite_is_its_formula_at_every_step() -> None:
    schedule = Infinite(warmup_fraction=0.1, cooldown_fraction=0.25, anneal_fraction=0.2, constant=0.55, floor=0.1)
    expected = [infinite_by_formula(step, 20, 65, 164, STEPS, 0.55, 0.1) for step in range(STEPS)]
    assert multipliers(schedule) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 40), st.integers(0, 40))
def test_infinite_in_steps_does_not_depend_on_the_end(one: int, other: int, warmup: int, cooldown: int) -> None:
    schedule = Infinite(warmup_steps=warmup, cooldown_steps=cooldown, constant=0.5)
    shorter = min(one, other)
    assert multipliers(schedule, one)[:shorter] == multipliers(schedule, other)[:shorter]
    assert [schedule.multiplier(step, 10_000) for step in range(warmup + cooldown, warmup + cooldown + 3)] == [0.5] * 3


def test_infinite_as_phases_is_infinite_as_one() -> None:
    """Warm-up and cool-down, then a constant phase, then an anneal: peak rates 1, c and c."""
    whole = Infinite(warmup_steps=10, cooldown_steps=30, constant=0.5, floor=0.05, anneal_fraction=50 / 190)
    anneal = Infinite(constant=1.0, cooldown_steps=0, anneal_fraction=1.0, floor=0.1)
    parts = multipliers(Infinite(warmup_steps=10, cooldown_steps=30, constant=0.5), 100)
    parts += [0.5 * rate for rate in multipliers(Constant(), 50) + multipliers(anneal, 50)]
    assert multipliers(whole, 200) == pytest.approx(parts, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cosine", {}),
        ("linear", {}),
        *(("wsd", {"decay": decay, "decay_fraction": 0.5}) for decay in ("linear", "cosine")),
        ("infinite", {"anneal_fraction": 0.3}),
        ("infinite", {"cooldown_steps": 900, "anneal_fraction": 0.3}),
    ],
)
def test_no_schedule_jumps(name: str, values: dict[str, object]) -> None:
    """Over n steps the rate changes by no more than a few n-ths at once; a cool-down that the anneal cuts short included."""
    rates = multipliers(plugins.build("schedules", name, {"warmup_fraction": 0.1, **values}), 1000)
    assert max(abs(later - earlier) for earlier, later in pairwise(rates)) < 0.011


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"constant": 0.1, "floor": 0.2}, "floor 0.2 lies above constant 0.1"),
        ({"cooldown_fraction": 0.7, "anneal_fraction": 0.7}, "more than the phase"),
        ({"constant": 0.0}, "greater than 0"),
    ],
)
def test_an_infinite_schedule_that_cannot_be_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        plugins.build("schedules", "infinite", values)


def test_warmup_steps_take_precedence() -> None:
    assert multipliers(Constant(warmup_steps=2, warmup_fraction=0.9), 10) == pytest.approx([1 / 3, 2 / 3] + [1] * 8)


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
    assert rates[min(peak, steps - 1)] == pytest.approx(1.0) or peak >= steps or (name == "infinite" and steps - peak < 3)
