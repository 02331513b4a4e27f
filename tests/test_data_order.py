"""The order of the data: shares that move, limits and what follows them by hand counts, the bound at every sequence, traces, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import BATCH, MODEL, SEQUENCE_LENGTH, World, in_pieces, run

from pipelines.data_order import Course, DataOrder, DomainMixture
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Json, Manifest, Outcome
from pipelines.plan import PhaseMixture, Plan, TrainingSettings
from pipelines.plugins import Settings
from pipelines.shards import PassagePool, TokenShard, passage_pools
from pipelines.store import Build, Store
from pipelines.stream_kernels import assigned, flow

STEP = BATCH * SEQUENCE_LENGTH
LENGTH = 4
"""Positions of a window of the pools made here."""
ROLE_SHARES = {"general": {"book": 0.25, "wiki": 0.75}, "target": {"legal": 0.5, "tax": 0.5}}


def pool_of(windows: int, first: int = 0) -> PassagePool:
    """Return a pool of exactly `windows` windows of `LENGTH` per epoch, whose every token is another number from `first` on."""
    count = windows + 1
    tokens = np.arange(first, first + count * (LENGTH - 1), dtype=np.uint32)
    places = np.arange(count, dtype=np.int64)
    return PassagePool([tokens], 0 * places, places * (LENGTH - 1), np.full(count, LENGTH - 1), end_of_text=10**9)


def order_of(
    mixture: DomainMixture, pools: dict[str, int], *phases: dict[str, Json], batch: int = 2, max_steps: int | None = None, **more: Json
) -> DataOrder:
    """Return the order over pools of so many windows; a phase is given by its `steps`."""
    step = batch * LENGTH
    made = tuple(
        {"learning_rate": 1.0, "tokens": phase["steps"] * step, **{k: v for k, v in phase.items() if k != "steps"}} for phase in phases
    )
    limit = None if max_steps is None else max_steps * step
    plan = Plan(TrainingSettings(phases=made, sequence_length=LENGTH, batch_sequences=batch, max_tokens=limit, **more))
    return DataOrder(plan, mixture, {name: pool_of(windows, 10_000 * n) for n, (name, windows) in enumerate(pools.items())})


def mixture(ratio: float = 0.5, **limits: Json) -> DomainMixture:
    """Return a mixture of two general and two target domains."""
    of_roles = {"general": 1 - ratio, "target": ratio}
    shares = {domain: of_roles[role] * share for role, found in ROLE_SHARES.items() for domain, share in found.items()}
    return DomainMixture(shares=shares, role_shares=ROLE_SHARES, ratio=ratio, **limits)


def counts(order: DataOrder, first: int = 0, stop: int | None = None) -> dict[str, int]:
    found = np.bincount(order.assignment[first:stop], minlength=len(order.domains)).tolist()
    return dict(zip(order.domains, found, strict=True))


def bound(num_domains: int) -> float:
    """Return Tijdeman's bound, and what rounding may add to it."""
    return 1 - 1 / max(2 * num_domains - 2, 1) + 1e-6 if num_domains > 1 else 1e-6


# The bound


weights = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6)
ends = st.floats(1e-3, 1) | st.sampled_from([0.0, 0.5, 1.0])


def course(general: list[float], target: list[float], start: float, end: float, length: int) -> Course:
    within = {
        role: {f"{role}{n}": w / sum(found) for n, w in enumerate(found)} for role, found in (("general", general), ("target", target))
    }
    made = DomainMixture(shares={"general0": 1.0}, role_shares=within, ratio=0.3)
    return made.course(PhaseMixture(tokens=1, target_share={"start": start, "end": end}), length)


@settings(max_examples=120, deadline=None)
@given(general=weights, target=weights, start=ends, end=ends, length=st.integers(1, 300))
def test_in_a_ramp_every_prefix_is_within_one_sequence_of_its_shares(
    general: list[float], target: list[float], start: float, end: float, length: int
) -> None:
    """The exact share is the integral of the ramp, by hand; behind the phase the last share stays."""
    made = course(general, target, start, end, length)
    chosen = assigned(flow(made, np.full(len(made.domains), np.inf)), length + 40)
    given = np.cumsum(np.eye(len(made.domains))[chosen], axis=0)
    time = np.arange(1, length + 41)
    inside = np.minimum(time, length)
    exact_target = start * inside + (end - start) * inside**2 / (2 * length) + end * (time - inside)
    of_roles = np.where(made.of_target, exact_target[:, None], (time - exact_target)[:, None])
    assert np.abs(given - made.weights * of_roles).max() <= bound(len(made.domains))
    shorter = assigned(flow(made, np.full(len(made.domains), np.inf)), length // 2)
    assert shorter.tolist() == chosen[: length // 2].tolist()


limits = st.lists(st.integers(0, 60) | st.just(np.inf), min_size=12, max_size=12)


@settings(max_examples=120, deadline=None)
@given(general=weights, target=weights, start=ends, end=ends, length=st.integers(1, 200), room=limits)
def test_limits_are_reached_and_never_passed(
    general: list[float], target: list[float], start: float, end: float, length: int, room: list[float]
) -> None:
    made = course(general, target, start, end, length)
    left = np.asarray(room[: len(made.domains)], dtype=np.float64)
    moves = flow(made, left)
    chosen = assigned(moves, int(min(length + 200, moves.end)))
    given = np.cumsum(np.eye(len(made.domains))[chosen], axis=0)
    exact = np.asarray([moves.at(time) for time in range(1, len(chosen) + 1)]).reshape(given.shape)
    assert len(chosen) == 0 or np.abs(given - exact).max() <= bound(len(made.domains))
    assert np.allclose(exact.sum(axis=1), np.arange(1, len(chosen) + 1))
    assert (given <= left).all() and moves.end in (np.inf, left.sum())
    if moves.end <= length + 200:
        assert np.bincount(chosen, minlength=len(left)).tolist() == left.tolist()


@settings(max_examples=15, deadline=None)
@given(general=weights, target=weights, start=ends, end=ends, length=st.integers(10, 50), room=limits)
def test_the_flow_is_that_of_many_small_steps(
    general: list[float], target: list[float], start: float, end: float, length: int, room: list[float]
) -> None:
    """Reference: shares by the rule, asked for at every hundredth of a sequence."""
    made = course(general, target, start, end, length)
    left, fine = np.asarray(room[: len(made.domains)], dtype=np.float64), 100
    moves, read = flow(made, left), np.zeros(len(made.domains))
    for number in range(int(min(length, moves.end)) * fine):
        share = start + (end - start) * (number + 0.5) / (fine * length)
        alive = [made.weights * (made.of_target == role) * (read < left) for role in (False, True)]
        present = [found.sum() > 0 for found in alive]
        shares = [1 - share, share] if all(present) else [float(found) for found in present]
        read += sum(s * found / (found.sum() or 1) for s, found in zip(shares, alive, strict=True)) / fine
        if (number + 1) % fine == 0:
            assert np.abs(read - moves.at((number + 1) / fine)).max() < 0.02 * len(read)


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    epochs=st.floats(0.3, 5),
    what=st.sampled_from(["repeat", "stop", "renormalise", "cap"]),
    ratio=st.floats(0.05, 0.95),
    steps=st.lists(st.integers(1, 25), min_size=1, max_size=3),
)
def test_the_steps_that_are_read_keep_the_limits_and_read_without_replacement(
    windows: list[int], epochs: float, what: str, ratio: float, steps: list[int]
) -> None:
    pools = dict(zip(("book", "legal", "tax", "wiki"), windows, strict=True))
    phases = [{"steps": n, "target_share": share} for n, share in zip(steps, ({"start": 0.9, "end": "critical"}, 0.5, None), strict=False)]
    made = mixture(ratio, max_epochs=epochs, on_exhausted=what)
    order = order_of(made, pools, *phases)
    try:
        num_steps = order.num_steps
    except EmptyInput:
        return
    whole = order.assignment
    for domain, number in counts(order, stop=num_steps * 2).items():
        assert what == "repeat" or number <= np.floor(epochs * pools[domain] + 1e-9)
        mine = order.positions[: num_steps * 2][whole[: num_steps * 2] == order.domains.index(domain)]
        assert mine.tolist() == list(range(number))  # windows are numbered over epochs, each of which shows every window once
    assert num_steps == sum(steps) or what != "repeat"
    ended = order_of(made, pools, *phases, max_steps=num_steps)
    assert ended.assignment.tolist() == whole[: num_steps * 2].tolist() and ended.num_steps == num_steps
    late = order_of(made, pools, *phases)
    for step in range(num_steps - 1, -1, -1):  # asked from the end: nothing of the order is kept between steps
        assert late.windows(late.sequences(step)).tolist() == order.windows(order.sequences(step)).tolist()


# What follows a limit, by hand


POOLS = {"book": 1000, "wiki": 1000, "legal": 10, "tax": 1000}


def test_repeat_reads_on_and_says_when() -> None:
    order = order_of(mixture(0.4, max_epochs=2), POOLS, {"steps": 100})
    assert counts(order) == {"book": 30, "wiki": 90, "legal": 40, "tax": 40}
    assert order.num_steps == 100 and order.ended_by() == []
    assert order.epochs()["legal"] == 4.0 and list(order.exhausted()) == ["legal"]
    assert order.exhausted()["legal"] == pytest.approx(100 * LENGTH, abs=3 * LENGTH)  # 20 windows at a share of 0.2
    assert order.table()[1] == {
        "domain": "legal",
        "share": 0.2,
        "epochs": 4.0,
        "exhausted_at_tokens": order.exhausted()["legal"],
    }
    assert "exhausted_at_tokens" not in order_of(mixture(0.4), POOLS, {"steps": 100}).table()[1]


def test_stop_ends_before_the_step_that_would_read_too_much() -> None:
    order = order_of(mixture(0.4, max_epochs=2, on_exhausted="stop"), POOLS, {"steps": 100})
    assert order.num_steps in (49, 50, 51) and order.ended_by() == ["legal"]
    assert counts(order, stop=order.num_steps * 2)["legal"] <= 20 < counts(order, stop=order.num_steps * 2 + 2)["legal"]
    halves = DomainMixture(shares={"a": 1, "b": 1}, max_epochs=1.64, on_exhausted="stop")  # 8.2 windows: 8 in 16 sequences
    order = order_of(halves, {"a": 5, "b": 99}, {"steps": 50}, batch=4)
    assert (order.limits[0], order.num_steps, order.ended_by()) == (8, 4, ["a"])


def test_renormalise_gives_the_share_to_the_role_first() -> None:
    """Legal (0.2) has 20 windows: 100 sequences. From then on tax has the whole target share of 0.4, and general stays."""
    order = order_of(mixture(0.4, max_epochs=2, on_exhausted="renormalise"), POOLS, {"steps": 100})
    assert counts(order) == {"book": 30, "wiki": 90, "legal": 20, "tax": 60}
    assert counts(order, 104, 200)["legal"] == 0 and counts(order, 104, 204)["tax"] == pytest.approx(0.4 * 96, abs=2)
    assert order.num_steps == 100 and order.exhausted()["legal"] == pytest.approx(100 * LENGTH, abs=3 * LENGTH)
    assert order.target_share() == pytest.approx(0.4)


def test_renormalise_gives_the_share_to_the_other_role_when_a_role_is_exhausted() -> None:
    """Both target domains have 20 windows at 0.2; behind sequence 100 general text alone is read, book to wiki as 1 to 3."""
    order = order_of(mixture(0.4, max_epochs=2, on_exhausted="renormalise"), {**POOLS, "tax": 10}, {"steps": 100})
    assert counts(order) == {"book": 40, "wiki": 120, "legal": 20, "tax": 20}
    after = counts(order, 104, 200)
    assert (after["legal"], after["tax"]) == (0, 0) and after["book"] == pytest.approx(24, abs=2)
    assert order.target_share() == pytest.approx(0.2) and order.num_steps == 100


def test_a_run_ends_when_everything_is_exhausted() -> None:
    few = {"book": 6, "wiki": 9, "legal": 10, "tax": 8}
    for what in ("renormalise", "cap"):
        order = order_of(mixture(0.4, max_epochs=3, on_exhausted=what), few, {"steps": 100})
        assert order.num_steps == (18 + 27 + 30 + 24) // 2 == 49
        assert counts(order, stop=99) == {"book": 18, "wiki": 27, "legal": 30, "tax": 24}
        assert order.ended_by() and set(order.ended_by()) <= set(few)
    with pytest.raises(EmptyInput, match="max_epochs 0.01 of the selected passages do not fill one step"):
        _ = order_of(mixture(0.4, max_epochs=0.01, on_exhausted="renormalise"), few, {"steps": 9}).num_steps


def test_limits_hold_over_phases_and_a_mixture_of_a_phase() -> None:
    """Legal is read by 20 of its 30 windows in the first phase; the last 10 go in the second, of which it is the half."""
    phases = ({"steps": 20, "mixture": {"wiki": 1, "legal": 1}}, {"steps": 30, "mixture": {"wiki": 2, "legal": 2}})
    order = order_of(mixture(max_epochs=3, on_exhausted="renormalise"), {"wiki": 99, "legal": 10}, *phases)
    assert counts(order, 0, 40) == {"wiki": 20, "legal": 20} and counts(order, 40, 60)["legal"] == pytest.approx(10, abs=1)
    assert counts(order) == {"wiki": 70, "legal": 30} and counts(order, 64)["legal"] == 0
    only = ({"steps": 20, "mixture": {"legal": 1}}, {"steps": 5, "mixture": {"wiki": 1}})
    order = order_of(mixture(max_epochs=3, on_exhausted="renormalise"), {"wiki": 99, "legal": 10}, *only)
    assert order.num_steps == 15 and order.ended_by() == ["legal"]  # a domain without a share in a phase is not read in it


def test_spare_batches_follow_the_limits_while_something_is_left() -> None:
    guards = {"on_nan": "rewind", "max_events": 2, "replaced_batches": 5}
    order = order_of(mixture(0.4, max_epochs=2, on_exhausted="renormalise"), POOLS, {"steps": 60}, guards=guards)
    assert len(order.assignment) == 2 * (60 + 10) and order.num_steps == 60
    assert counts(order)["legal"] == 20 and counts(order, 104)["legal"] == 0
    order = order_of(mixture(0.4, max_epochs=1, on_exhausted="renormalise"), dict.fromkeys(POOLS, 10), {"steps": 20}, guards=guards)
    assert order.num_steps == 20 and counts(order, 0, 40) == dict.fromkeys(sorted(POOLS), 10)
    assert len(order.windows(order.sequences(29))) == 2  # the last spare: nothing was left, so windows are read again


# Target shares of phases


def test_target_shares_of_phases_by_hand() -> None:
    """400 sequences each: a fifth, a ramp from a tenth to the measured 0.6, and the mixture's own share."""
    ramp = {"start": 0.1, "end": "critical"}
    phases = ({"steps": 200, "target_share": 0.2}, {"steps": 200, "target_share": ramp}, {"steps": 200})
    order = order_of(mixture(0.6), dict.fromkeys(POOLS, 50), *phases)
    assert counts(order, 0, 400) == {"book": 80, "wiki": 240, "legal": 40, "tax": 40}
    in_ramp = counts(order, 400, 800)
    assert in_ramp["legal"] == pytest.approx(70, abs=1) and in_ramp["tax"] == pytest.approx(70, abs=1)
    assert in_ramp["book"] == pytest.approx(65, abs=1) and in_ramp["wiki"] == pytest.approx(195, abs=1)
    first, last = counts(order, 400, 440), counts(order, 760, 800)
    assert first["legal"] + first["tax"] == pytest.approx(0.125 * 40, abs=2) and last["legal"] + last["tax"] == pytest.approx(
        0.575 * 40, abs=2
    )
    assert counts(order, 800) == {"book": 40, "wiki": 120, "legal": 120, "tax": 120}
    assert order.shares_of(1) == pytest.approx({"book": 0.1625, "wiki": 0.4875, "legal": 0.175, "tax": 0.175})
    assert order.target_share() == pytest.approx((80 + 140 + 240) / 1200, abs=1e-3)


def test_a_run_that_ends_in_a_ramp_stays_on_it() -> None:
    phase = {"steps": 100, "target_share": {"start": 0.0, "end": 1.0}}
    whole, cut = (order_of(mixture(), POOLS, phase, max_steps=steps) for steps in (None, 40))
    assert cut.assignment.tolist() == whole.assignment[:80].tolist()
    assert cut.target_share() == pytest.approx(0.2, abs=0.02)  # the mean of a ramp from 0 to 0.4


def test_a_role_without_a_share_in_a_phase_is_not_read_in_it() -> None:
    order = order_of(
        mixture(max_epochs=1, on_exhausted="renormalise"), POOLS, {"steps": 20, "target_share": 0}, {"steps": 20, "target_share": 1}
    )
    assert set(order.shares_of(0)) == {"book", "wiki"} and counts(order, 0, 40) == {"book": 10, "wiki": 30, "legal": 0, "tax": 0}
    assert counts(order, 40) == {"book": 0, "wiki": 0, "legal": 10, "tax": 30}


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"target_share": 1.5}, "target share 1.5 is neither a share from 0 to 1 nor `critical`"),
        ({"target_share": "critcal"}, "target share 'critcal' is neither"),
        ({"target_share": {"start": 0.1, "end": -0.1}}, "target share -0.1 is neither"),
        ({"target_share": {"start": 0.1}}, "Field required"),
        ({"target_share": 0.5, "mixture": {"wiki": 1.0}}, "says all shares, so target_share says nothing; leave one of them out"),
    ],
)
def test_phases_that_cannot_be_meant_are_refused(phase: dict[str, Json], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        order_of(mixture(), POOLS, {"steps": 3, **phase})


def test_a_target_share_needs_roles_and_a_measured_ratio() -> None:
    for made, share in (({"wiki": 1.0}, 0.5), (mixture().model_copy(update={"ratio": None}), "critical")):
        with pytest.raises(GristmillError, match=f"target_share {share} belongs to the plan of a run on a domain mixture.*leave it out"):
            order_of(made, {"wiki": 9, "book": 9, "legal": 9, "tax": 9}, {"steps": 3, "target_share": share})
    lonely = DomainMixture(shares={"wiki": 1.0}, role_shares={"general": {"wiki": 1.0}}, ratio=0.0)
    with pytest.raises(EmptyInput, match="no target domain for a target share from 0.3 to 0.3"):
        order_of(lonely, {"wiki": 9}, {"steps": 3, "target_share": 0.3})


# In a run


class MixtureContent(Settings):
    """A mixture.json that a test publishes."""

    content: dict[str, Json]


def write_content(made: MixtureContent, out: Path) -> Outcome:
    (out / "mixture.json").write_text(json.dumps(made.content))
    return Outcome()


def published(world: World, ratio: float = 0.5, **limits: Json) -> Manifest:
    """Publish a mixture over the domains of `world`."""
    within = {"general": {"book": 0.5, "wiki": 0.5}, "target": {"legal": 1.0}}
    shares = {"book": (1 - ratio) / 2, "wiki": (1 - ratio) / 2, "legal": ratio}
    content = {"shares": shares, "role_shares": within, "ratio": ratio, "limits": limits, "domains": []}
    return world.store.build(Build(asset="domain_mixture", step=write_content, settings=MixtureContent(content=content))).manifest


def test_every_position_is_traced_after_exhaustion_and_in_a_ramp(world: World) -> None:
    pools = passage_pools(world.selection, world.shards, 0)
    phases = ({"tokens": 60 * STEP, "learning_rate": 1.0, "target_share": {"start": 0.9, "end": 0.1}},)
    plan = Plan(TrainingSettings(**{**run(), "phases": phases}))
    made = DomainMixture.read(published(world, max_epochs=0.1, on_exhausted="renormalise"))
    order = DataOrder(plan, made, pools)
    exhausted = order.exhausted()["legal"] // STEP
    assert 3 < exhausted < order.num_steps - 3
    for step in (1, exhausted - 1, exhausted, exhausted + 2, order.num_steps - 1):
        sequences = order.sequences(step)
        named = set(order.documents(sequences))
        assert step <= exhausted or "legal" not in {domain for domain, _ in named}
        for sequence, window in zip(sequences, order.windows(sequences), strict=True):
            domain = order.domains[order.assignment[sequence]]
            shard = TokenShard(world.shards[list(world.corpora).index(domain)])
            index = {(row["id"], row["passage"]): row for row in shard.passages.to_pylist()}
            for span in order.streams[order.domains.index(domain)].trace(int(order.positions[sequence])):
                row = index[span.document, span.passage]
                tokens = [*shard.tokens[row["offset"] : row["offset"] + row["length"]].tolist(), 0]
                piece = window[span.first : span.first + span.count].tolist()
                assert (domain, span.document) in named and any(piece == tokens[at : at + span.count] for at in range(len(tokens)))


def asked(world: World, base: Manifest, made: Manifest, **changes: object) -> Build:
    return world.mixture(base, made, samples={"max_new_tokens": 0}, **changes)


def test_a_run_stops_where_the_mixture_says_so_and_tells(world: World, base: Manifest) -> None:
    made = published(world, max_epochs=0.04, on_exhausted="stop")
    manifest = world.store.build(asked(world, base, made)).manifest
    pools = passage_pools(world.selection, world.shards, 0)
    limit = int(0.04 * ((pools["legal"].num_tokens - 1) // SEQUENCE_LENGTH))
    assert 4 < limit < 36 and manifest.counts["steps"] == 2 * limit // BATCH < 20
    assert manifest.outcome.details["ended_by"] == ["legal"] and manifest.outcome.metrics["target_share"] == pytest.approx(0.5, abs=0.1)
    aside = world.store.build(asked(world, base, made, validation={"fraction": 0.3, "every_steps": 50})).manifest
    assert aside.counts["steps"] < manifest.counts["steps"]  # documents that are set aside are not there to be read
    reads_on = world.store.build(asked(world, base, published(world, max_epochs=0.04))).manifest
    row = next(row for row in reads_on.outcome.tables["domains"] if row["domain"] == "legal")
    assert reads_on.counts["steps"] == 20 and "ended_by" not in reads_on.outcome.details
    assert row["exhausted_at_tokens"] == pytest.approx(2 * limit * SEQUENCE_LENGTH, abs=2 * SEQUENCE_LENGTH)


def test_a_run_in_pieces_over_a_ramp_and_a_limit_is_the_run_in_one(world: World, base: Manifest, tmp_path: Path) -> None:
    phases = (
        {"tokens": 8 * STEP, "learning_rate": 1e-3, "target_share": 0.7},
        {"tokens": 12 * STEP, "learning_rate": 1e-3, "target_share": {"start": 0.7, "end": "critical"}},
    )
    request = asked(world, base, published(world, 0.9, max_epochs=0.08, on_exhausted="renormalise"), phases=phases)
    whole = world.store.build(request).manifest
    pieces, asked_for = in_pieces(request, Store(tmp_path / "other"), seconds=0.02)
    assert asked_for > 2 and pieces.content_sha256 == whole.content_sha256
    rows = {row["domain"]: row for row in whole.outcome.tables["domains"]}
    assert rows["legal"]["exhausted_at_tokens"] and rows["book"]["exhausted_at_tokens"] is None
    assert whole.outcome.metrics["target_share"] == pytest.approx(rows["legal"]["share"], abs=1e-4)


def test_a_selecting_phase_reads_along_a_ramp(world: World, base: Manifest) -> None:
    """Rounds choose of each domain; how much of it is read is the ramp's."""
    select = {"fraction": 0.5, "every_tokens": 5 * STEP}
    phases = ({"tokens": 10 * STEP, "learning_rate": 1e-3, "target_share": {"start": 0.0, "end": 1.0}, "select": select},)
    manifest = world.store.build(asked(world, base, published(world), phases=phases)).manifest
    assert manifest.outcome.metrics["target_share"] == pytest.approx(0.5, abs=0.05)
    epochs = {(row["round"], row["domain"]): row["epochs"] for row in manifest.outcome.tables["rounds"]}
    assert epochs[0, "legal"] < epochs[1, "legal"] and epochs[0, "wiki"] > epochs[1, "wiki"]


def test_a_general_run_has_no_target_share(world: World) -> None:
    request = world.general()
    phases = ({"tokens": 4 * STEP, "learning_rate": 1e-3, "target_share": 0.5},)
    with pytest.raises(GristmillError, match="leave it out of this phase"):
        world.store.build(replace(request, settings=request.settings.model_validate({"model": MODEL, **run(), "phases": phases})))
