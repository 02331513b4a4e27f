"""Selection during training: what rounds read, embeddings against transformers, and resuming in the middle of a round to the same bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_world import BATCH, MODEL, SEQUENCE_LENGTH, World, in_pieces

from pipelines import plugins
from pipelines.embedders._grid import NORM
from pipelines.errors import EmptyInput, GristmillError, UnknownName
from pipelines.manifests import Json, Manifest
from pipelines.plan import Phase, Plan, TrainingSettings, training_plugins
from pipelines.reselection import _function, batches_by_length, read_selection
from pipelines.run_limits import BudgetReached
from pipelines.run_summary import dry_run
from pipelines.shares import role_shares
from pipelines.store import Build, Store
from pipelines.trainer import Run
from pipelines.training import GeneralSettings

STEP = BATCH * SEQUENCE_LENGTH
SELECT: dict[str, Json] = {"fraction": 0.25, "every_tokens": 8 * STEP}
WARM = {"tokens": 10 * STEP, "learning_rate": 3e-3}
"""10 steps on everything, then rounds of 8, 8 and 4 steps."""


def loop(**select: Json) -> tuple[Mapping[str, object], ...]:
    return (WARM, {"tokens": 20 * STEP, "learning_rate": 3e-3, "select": {**SELECT, **select}})


def asked(world: World, **changes: object) -> Build:
    """Return the request for a general checkpoint with a warm start and three rounds."""
    request = world.general()
    settings = {name: getattr(request.settings, name) for name in GeneralSettings.model_fields}
    made = GeneralSettings.model_validate({**settings, "phases": loop(), "samples": {"max_new_tokens": 0}, **changes})
    return replace(request, settings=made, plugins=training_plugins(made))


def opened(world: World, **changes: object) -> Run:
    settings = asked(world, **changes).settings
    return Run(settings, role_shares(world.selection)["general"], world.selection[:1], world.shards, world.tokenizer, None)


@pytest.fixture(scope="module")
def whole(world: World) -> Manifest:
    """The checkpoint of an undisturbed run."""
    return world.store.build(asked(world)).manifest


def with_its_rounds(world: World, manifest: Manifest, **changes: object) -> Run:
    """Return the run of `manifest`, opened anew, with the rounds that it wrote."""
    run = opened(world, **changes)
    for number in range(len(run.plan.rounds)):
        run.order.select(number, read_selection(manifest.directory, number))
    return run


def ids_of(manifest: Manifest, number: int) -> set[tuple[str, str]]:
    rows = pq.read_table(manifest.directory / "selection" / f"round-{number:03d}.parquet").to_pylist()
    return {(row["domain"], row["id"]) for row in rows}


# The plan


def test_rounds_by_hand() -> None:
    """Windows of 4 tokens, two a step: rounds begin at the last step border before every 20 tokens, and end with the plan."""
    phases = (
        {"tokens": 40, "learning_rate": 1.0},
        {"tokens": 64, "learning_rate": 1.0, "select": {"every_tokens": 20}},
        {"tokens": 8, "learning_rate": 1.0},
    )
    plan = Plan(TrainingSettings(phases=phases, sequence_length=4, batch_sequences=2))
    assert plan.phase_steps == [5, 8, 1]
    assert [(one.phase, one.first, one.stop) for one in plan.rounds] == [(1, 5, 7), (1, 7, 10), (1, 10, 12), (1, 12, 13)]
    assert [plan.round_at(step) for step in (0, 4, 5, 6, 7, 9, 10, 12, 13)] == [None, None, 0, 0, 1, 1, 2, 3, None]
    ended = Plan(plan.settings.model_copy(update={"max_tokens": 9 * 8}))
    assert [(one.first, one.stop) for one in ended.rounds] == [(5, 7), (7, 9)]
    assert not Plan(plan.settings.model_copy(update={"max_tokens": 5 * 8})).rounds


def test_the_code_of_the_set_function_is_part_of_the_training(world: World) -> None:
    assert "pipelines.set_functions.graph_cut" in training_plugins(asked(world, phases=loop(function="graph_cut")).settings)
    assert not [name for name in training_plugins(world.general().settings) if "set_functions" in name]


def test_settings_that_cannot_work_are_refused(world: World) -> None:
    for changes, words in (
        ({"phases": loop(every_tokens=STEP - 1)}, f"phase 1: select.every_tokens {STEP - 1} is less than the {STEP} tokens of a step"),
        ({"processes": 2}, "phase 1: processes 2: a phase with `select` runs in one process"),
        ({"phases": loop(max_tokens_per_passage=33)}, "max_tokens_per_passage 33 is more than sequence_length 32"),
    ):
        with pytest.raises(ValueError, match=words):
            asked(world, **changes)
    for select, error, words in (
        ({"layer": 3}, GristmillError, "layer 3 does not exist: the model has layers 1 to 2"),
        ({"function": "by_score"}, GristmillError, "select.function by_score: .*needs a score.*choose a function that needs no more"),
        ({"settings": {"neighbours": 3}}, GristmillError, "unknown key 'neighbours'; did you mean 'neighbors'"),
        ({"fraction": 0.001}, EmptyInput, r"phase 1, book: select.fraction 0.001 of \d+ tokens does not fill one window of 32"),
        ({"function": "facility_locatio"}, UnknownName, "did you mean 'facility_location'"),
    ):
        with pytest.raises(error, match=words):
            opened(world, phases=loop(**select))


# What rounds read


def test_every_document_of_a_round_is_selected_and_the_warm_start_reads_all(world: World, whole: Manifest) -> None:
    run = with_its_rounds(world, whole)
    for number, one in enumerate(run.plan.rounds):
        read = {found for step in range(one.first, one.stop) for found in run.order.documents(run.order.sequences(step))}
        assert len(read) > 2 and read <= ids_of(whole, number)
    warm = set(run.order.documents(range(10 * BATCH)))
    run.order.forget_rounds()
    assert warm == set(run.order.documents(range(10 * BATCH)))
    shown = np.asarray([run.order.assignment[run.order.sequences(step)] for step in range(30)]).ravel()
    assert np.bincount(shown).tolist() == np.bincount(opened(world, phases=(WARM, {**WARM, "tokens": 20 * STEP})).order.assignment).tolist()


def test_the_tokens_of_each_pool_respect_the_fraction(world: World, whole: Manifest) -> None:
    run = opened(world)
    rows = whole.outcome.tables["rounds"]
    assert [(row["round"], row["domain"]) for row in rows] == [(number, domain) for number in range(3) for domain in ("book", "wiki")]
    for row in rows:
        pool, places = run.order.pool(row["domain"]), read_selection(whole.directory, row["round"])[row["domain"]]
        tokens, budget = int(pool.length[places].sum()), int(pool.length.sum()) // 4
        assert len(set(places.tolist())) == len(places) == row["passages"] and row["candidates"] == len(pool)
        assert budget - int(pool.length.max()) < tokens == row["selected_tokens"] <= budget
        assert pool.names(places) == [
            (found["id"], found["passage"])
            for found in pq.read_table(whole.directory / "selection" / f"round-{row['round']:03d}.parquet").to_pylist()
            if found["domain"] == row["domain"]
        ]
    assert [row["tokens"] for row in rows[::2]] == [10 * STEP, 18 * STEP, 26 * STEP] and whole.counts["selection_rounds"] == 3


def test_selecting_everything_is_as_if_there_were_no_selection(world: World) -> None:
    """A share of 1 with the set function that keeps all: the same losses and the same weights, to the bit."""
    everything = world.store.build(asked(world, phases=loop(function="full", fraction=1.0))).manifest
    plain = world.store.build(asked(world, phases=(WARM, {**WARM, "tokens": 20 * STEP}))).manifest
    for name in ("metrics.jsonl", "model.safetensors", "config.json", "trainer/optimizer.safetensors"):
        assert everything.file(name).read_bytes() == plain.file(name).read_bytes()
    assert {row["overlap"] for row in everything.outcome.tables["rounds"]} == {None, 1.0}


def test_rounds_shuffle_by_their_number_and_begin_with_a_whole_epoch(world: World) -> None:
    run = opened(world)
    places = {domain: np.arange(0, len(run.order.pool(domain)), 3) for domain in run.order.domains}
    for number in range(3):
        run.order.select(number, places)
    first, second = (run.order.windows(range(step * BATCH, (step + 2) * BATCH)) for step in (10, 18))
    assert not np.array_equal(first, second)
    for number, one in enumerate(run.plan.rounds[:2]):
        mine = np.arange(one.first * BATCH, one.stop * BATCH)
        for place, domain in enumerate(run.order.domains):
            stream, before = run.order._readings[number][place]
            numbers = run.order.positions[mine[run.order.assignment[mine] == place]] - before
            assert numbers.tolist() == list(range(len(numbers)))
            epochs = len(numbers) / stream.windows_per_epoch
            assert run.order.round_epochs(number)[domain] == epochs and 0 < epochs < 1
    again = opened(world)
    again.order.select(1, {domain: rows[::-1] for domain, rows in places.items()})
    assert np.array_equal(again.order.windows(range(18 * BATCH, 20 * BATCH)), second)


def test_a_round_is_not_read_before_it_is_selected(world: World) -> None:
    with pytest.raises(GristmillError, match="round 0 has no selection yet"):
        opened(world).batch(10)


# What is selected


def test_a_model_that_changed_selects_differently(world: World, whole: Manifest, tmp_path: Path) -> None:
    """By the same function of the same passages: the model alone is another."""
    run = opened(world)
    run.advance(10, tmp_path, resumable=False)
    early, _ = run.selector._chosen(0, "book")
    assert early["place"].to_pylist() == read_selection(whole.directory, 0)["book"].tolist()
    run.advance(26, tmp_path, resumable=False)
    late, row = run.selector._chosen(0, "book")
    assert set(late["place"].to_pylist()) != set(early["place"].to_pylist())
    assert len(set(late["place"].to_pylist())) == row["passages"]
    for row in whole.outcome.tables["rounds"][2:]:
        one, other = (set(read_selection(whole.directory, number)[row["domain"]].tolist()) for number in (row["round"] - 1, row["round"]))
        assert row["overlap"] == pytest.approx(len(one & other) / len(one | other), abs=1e-4) and 0 < row["overlap"] < 1


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [("llama", "causal"), ("llama", "masked"), ("gpt2", "causal"), ("bert", "masked"), ("modernbert", "masked")],
)
def test_passages_are_embedded_as_transformers_does_alone(world: World, architecture: str, objective: str) -> None:
    """Passage by passage without padding, in the attention that the phase trains with, at the middle layer of two."""
    import torch

    phases = ({"tokens": 10 * STEP, "learning_rate": 1e-3, "objective": objective, "select": {**SELECT, "max_tokens_per_passage": 20}},)
    run = opened(world, model=MODEL.model_copy(update={"architecture": architecture, "dropout": 0.1}), phases=phases)
    pool, select = run.order.pool("wiki"), run.plan.rounds[0].select
    run.model.train()
    found = run.selector._embeddings(pool, select, "")
    assert run.model.training and found.shape == (len(pool), 32) and found.dtype == np.int16
    assert np.linalg.norm(found.astype(float), axis=1) == pytest.approx(np.full(len(pool), NORM), abs=4)
    twin = opened(world, model=run.settings.model, phases=phases).model
    twin.load_state_dict(run.model.state_dict())
    twin.config.is_causal = objective == "causal"
    twin.eval()
    for passage in (0, 7, int(pool.length.argmin())):
        ids = pool.tokens[pool.shard[passage]][pool.offset[passage] :][: min(20, int(pool.length[passage]))].astype(np.int64)
        with torch.no_grad():
            states = twin.base_model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[2]
        vector = states[0].mean(dim=0).double().numpy()
        assert found[passage] == pytest.approx(vector / np.linalg.norm(vector) * NORM, abs=1.0)


def test_batches_hold_each_text_once_and_no_more_than_fits() -> None:
    lengths = np.asarray([3, 9, 1, 9, 4, 4, 20, 1])
    batches = [batch.tolist() for batch in batches_by_length(lengths, 10)]
    assert batches == [[6], [1], [3], [4, 5], [0, 2, 7]]
    assert not list(batches_by_length(np.empty(0, dtype=np.int64), 10))


def test_a_function_that_draws_draws_anew_in_each_round(world: World) -> None:
    def select(**values: Json) -> object:
        return Phase.model_validate({"tokens": 1, "learning_rate": 1, "select": {**SELECT, **values}}).select

    assert [_function(select(function="ingenious"), number).draw for number in range(3)] == [0, 1, 2]
    assert [_function(select(function="random_order", settings={"seed": 5}), number).seed for number in range(3)] == [5, 6, 7]
    assert _function(select(function="full"), 4) == plugins.build("set_functions", "full")
    rows = world.store.build(asked(world, phases=loop(function="random_order"))).manifest.outcome.tables["rounds"]
    assert all(0 < row["overlap"] < 0.5 for row in rows[2:])


# Interruption


def test_a_run_that_is_interrupted_again_and_again_ends_in_the_same_bytes(world: World, tmp_path: Path) -> None:
    """With dropout, and rounds that look at both sides after a warm start that looked at one: nothing depends on where it was stopped."""
    select = {"fraction": 0.5, "every_tokens": 3 * STEP, "function": "ingenious"}
    phases = (
        {"tokens": 4 * STEP, "learning_rate": 3e-3},
        {"tokens": 8 * STEP, "learning_rate": 3e-3, "objective": "masked", "select": select},
    )
    request = asked(world, phases=phases, model=MODEL.model_copy(update={"dropout": 0.1}), checkpoint_seconds=0.0)
    undisturbed = world.store.build(request).manifest
    pieces, times = in_pieces(request, Store(tmp_path / "pieces"), seconds=1e-9)
    assert times == 12  # a step a time: within rounds and at their borders
    assert [entry.path for entry in pieces.files] == [entry.path for entry in undisturbed.files]
    assert pieces.content_sha256 == undisturbed.content_sha256
    assert [entry.path for entry in pieces.files if "selection" in entry.path] == [f"selection/round-{n:03d}.parquet" for n in range(3)]
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in m.outcome.tables["rounds"]] for m in (pieces, undisturbed)]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_a_resume_in_the_middle_of_a_round_reads_what_was_selected(world: World, whole: Manifest, tmp_path: Path) -> None:
    """The model is later than the selection: embedded again, it would select otherwise."""
    with pytest.raises(BudgetReached):
        opened(world, max_seconds=1e-9).advance(30, tmp_path)  # step 1
    run = opened(world, max_seconds=1e9, checkpoint_seconds=0.0)
    run.advance(24, tmp_path)
    left = tmp_path / "selection" / "round-001.parquet"
    chosen = left.read_bytes()
    left.write_bytes(b"torn")  # as a kill may leave it: the resume point holds it whole
    (tmp_path / "selection" / "round-002.parquet").write_bytes(b"of a step that is gone")
    resumed = opened(world)
    resumed.advance(26, tmp_path, resumable=False)
    assert left.read_bytes() == chosen and not (tmp_path / "selection" / "round-002.parquet").exists()
    assert resumed.order.selected.keys() == {0, 1} and [row["round"] for row in resumed.selector.records] == [0, 0, 1, 1]
    again, _ = resumed.selector._chosen(1, "book")
    assert again["place"].to_pylist() != read_selection(tmp_path, 1)["book"].tolist() == read_selection(whole.directory, 1)["book"].tolist()
    resumed.advance(30, tmp_path, resumable=False)
    assert (tmp_path / "selection" / "round-002.parquet").read_bytes() == whole.file("selection/round-002.parquet").read_bytes()


GUARDS = {"on_spike": "rewind", "spike_sigmas": 2.5, "spike_steps": 28, "max_events": 20, "rewind_every": 3, "replaced_batches": 6}
"""The first step that is judged is number 14, in the second of rounds of three steps: whatever goes back six batches leaves its round."""


def rewinding(world: World) -> tuple[Build, Manifest]:
    """Return the first run, by its seed, in which a step was a spike."""
    phases = ({**WARM, "learning_rate": 1e-3}, {**WARM, "learning_rate": 1e-3, "select": {"every_tokens": 3 * STEP}})
    for seed in range(1, 9):
        with contextlib.suppress(GristmillError):  # too many of them
            request = asked(world, guards=GUARDS, seed=seed, phases=phases)
            manifest = world.store.build(request).manifest
            if manifest.counts["events"]:
                return request, manifest
    raise AssertionError("no run rewinds")


def test_rewinds_over_the_border_of_a_round(world: World, tmp_path: Path) -> None:
    """Batches of two rounds are replaced; spare ones are read from the round they stand in, and a border passed again selects anew."""
    request, manifest = rewinding(world)
    pieces, times = in_pieces(request, Store(tmp_path / "pieces"), seconds=0.02)
    assert times > 2 and pieces.content_sha256 == manifest.content_sha256
    run = with_its_rounds(world, manifest, guards=GUARDS, seed=request.settings.seed, phases=request.settings.phases)
    for number, one in enumerate(run.plan.rounds):
        for spare in (run.num_steps, run.num_steps + 5):
            read = set(run.order.documents(run.order.sequences(spare), one.first))
            assert read <= ids_of(manifest, number)
            shown = run.order.windows(run.order.sequences(spare), one.first)
            planned = run.order.windows(range(one.first * BATCH, one.stop * BATCH))
            assert not {row.tobytes() for row in shown} & {row.tobytes() for row in planned}


# Before it is started


def test_a_dry_run_tells_the_rounds_and_embeds_nothing(world: World) -> None:
    run = opened(world)
    found = dry_run(run)
    pools = [run.order.pool(domain) for domain in ("book", "wiki")]
    assert found["selection"] == [
        {
            "phase": 1,
            "function": "facility_location",
            "rounds": 3,
            "passages": sum(len(pool) for pool in pools),
            "tokens_embedded_per_round": sum(int(np.minimum(pool.length, 32).sum()) for pool in pools),
            "budget_tokens": sum(int(pool.length.sum()) // 4 for pool in pools),
        }
    ]
    assert not run.selector.records and run.seconds["selection"] == 0.0
    assert dry_run(opened(world, phases=(WARM,)))["selection"] == []
    first = dry_run(opened(world, phases=loop()[1:]))  # it begins with a round
    assert first["steps"] == 20 and first["selection"][0]["rounds"] == 3
