"""Which steps read a document: against what a run really read, step by step, and against windows decoded token by token."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import BATCH, SEQUENCE_LENGTH, World, mixture_of, select_all
from test_data_order import published
from test_reselection import WARM, asked, rewinding

from pipelines.batch import Batch
from pipelines.data_order import DomainMixture
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.seen_documents import Replay, _pieces, _shown, document_table
from pipelines.shards import PassagePool, WindowStream
from pipelines.shares import role_shares
from pipelines.store import Build
from pipelines.trainer import Run
from pipelines.training import _while_it_lasts

STEP = BATCH * SEQUENCE_LENGTH
Seen = dict[tuple[int, str, int], int]
"""Step, document and passage to the tokens that were predicted of it."""


class Watched(Run):
    """A run that writes down what each step shows, window by window; a step that is done again is written down again."""

    def batch(self, step: int) -> Batch:
        self.__dict__.setdefault("seen", {})[step] = self._shown(step)
        return super().batch(step)

    def _shown(self, step: int) -> Seen:
        seen: Seen = defaultdict(int)
        number = self.plan.round_at(step)
        for sequence in self._sequences(step):
            domain = int(self.order.assignment[sequence])
            stream, first = self.order._readings_of(-1 if number is None else number)[domain]
            for document, passage, begin, count in stream.trace(int(self.order.positions[sequence]) - first):
                seen[step, document, passage] += count - (begin == 0)
        return seen


def watched(world: World, request: Build, tmp_path: Path) -> Seen:
    """Train as `request` does and return what the steps showed whose updates were made."""
    inputs = request.inputs
    shares = DomainMixture.read(inputs["mixture"]) if "mixture" in inputs else role_shares(inputs["selection"])["general"]
    selected = inputs["selection"], inputs["shards"], inputs["tokenizer"]
    lasting, _ = _while_it_lasts(request.settings, DomainMixture.of(shares), *selected)
    made = Watched(lasting, shares, inputs["selection"], inputs["shards"], inputs["tokenizer"], inputs.get("base"))
    made.advance(made.num_steps, tmp_path, resumable=False)
    skipped = {event["step"] for event in made.guard.events if event["action"] == "skip"}
    steps = [shown for step, shown in made.seen.items() if step not in skipped and step < made.step]
    return {key: tokens for shown in steps for key, tokens in shown.items()}


def replayed(world: World, manifest: Manifest) -> Replay:
    return Replay(manifest, lambda one: world.store.find(one.asset, one.fingerprint).for_partition(one.partition))


def answered(replay: Replay, documents: set[str]) -> Seen:
    """Return what the replay says of `documents`, one at a time."""
    seen: Seen = defaultdict(int)
    for document in documents:
        for one in replay.readings(document):
            seen[one.step, document, one.passage] += one.tokens
    return dict(seen)


def requests(world: World, base: Manifest, kind: str) -> Build:
    if kind == "epochs":
        request = world.mixture(base, mixture_of(world, {"legal": 1.0}), phases=({"tokens": 40 * STEP, "learning_rate": 1e-3},))
        few = {name for shard in world.shards for name in pq.read_table(shard.file("documents.parquet"))["id"].to_pylist()[:4]}
        return replace(request, inputs={**request.inputs, "selection": select_all(world.store, world.shards, few)})
    if kind == "phases":
        phases = (
            {"tokens": 8 * STEP, "learning_rate": 3e-3, "mixture": {"wiki": 0.3, "legal": 0.7}},
            {"tokens": 12 * STEP, "learning_rate": 1e-3},
        )
        mixture = mixture_of(world, {"book": 0.5, "legal": 0.5})
        return world.mixture(base, mixture, phases=phases, seed=3, validation={"fraction": 0.2, "every_steps": 50})
    if kind == "rewinds over rounds":
        return rewinding(world)[0]
    if kind == "a limit ends it":
        return world.mixture(base, published(world, max_epochs=0.04, on_exhausted="stop"))
    if kind == "skips":
        guards = {"on_spike": "skip", "spike_sigmas": 2.5, "spike_steps": 16, "max_events": 40}
        return asked(world, guards=guards, phases=({**WARM, "tokens": 60 * STEP},))
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["epochs", "phases", "rewinds over rounds", "skips", "a limit ends it"])
def test_the_steps_of_every_document_are_those_that_a_run_read_it_in(world: World, base: Manifest, tmp_path: Path, kind: str) -> None:
    request = requests(world, base, kind)
    manifest = world.store.build(request).manifest
    truth = watched(world, request, tmp_path)
    replay = replayed(world, manifest)
    documents = {name for shard in world.shards for name in pq.read_table(shard.file("documents.parquet"))["id"].to_pylist()}
    assert answered(replay, documents) == truth
    read = {name for _, name, _ in truth}
    assert read and documents - read, "some documents are read, those held out are not"

    path = tmp_path / "documents.parquet"
    summed = document_table(replay, path)
    rows = {row["id"]: row for row in pq.read_table(path).to_pylist()}
    assert rows.keys() == read
    for name, row in rows.items():
        mine = {key: tokens for key, tokens in truth.items() if key[1] == name}
        assert row["tokens_read"] == sum(mine.values())
        assert (row["first_step"], row["last_step"]) == (min(key[0] for key in mine), max(key[0] for key in mine))
        assert row["times_read"] == pytest.approx(row["tokens_read"] / row["tokens"], abs=1e-4)
    assert sum(row["tokens_read"] for row in summed) == len(replay.steps) * STEP
    assert sum(row["documents"] for row in summed) == len(read)
    if kind in ("rewinds over rounds", "skips"):
        assert manifest.counts["events"]
    if kind == "skips":
        assert len(replay.steps) < replay.num_steps
    if kind == "a limit ends it":
        assert manifest.outcome.details["ended_by"] == ["legal"]
    if kind == "epochs":
        assert max(one.epoch for name in read for one in replay.readings(name)) >= 1


@st.composite
def streams(draw: st.DrawFn) -> WindowStream:
    """A stream over passages whose every token is another number."""
    lengths = np.asarray(draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)), dtype=np.int64)
    length = draw(st.integers(1, 8))
    total = int(lengths.sum()) + len(lengths)
    if total <= length:
        length = max(1, total - 1)
    tokens = np.arange(int(lengths.sum()), dtype=np.uint32)
    pool = PassagePool([tokens], 0 * lengths, np.cumsum(lengths) - lengths, lengths, end_of_text=10**9)
    return WindowStream(pool, length, draw(st.integers(0, 5)))


@settings(max_examples=150, deadline=None)
@given(stream=streams(), data=st.data())
def test_what_windows_show_is_what_decoding_them_shows(stream: WindowStream, data: st.DataObject) -> None:
    count = 3 * stream.windows_per_epoch
    windows = np.asarray(data.draw(st.lists(st.integers(0, count - 1), max_size=12, unique=True)), dtype=np.int64)
    owner = np.repeat(np.arange(len(stream.pool)), stream.pool.length)
    shown, predicted = defaultdict(set), defaultdict(int)
    for step, number in enumerate(windows.tolist()):
        for place, token in enumerate(stream.window(number).tolist()):
            if token != 10**9:
                shown[int(owner[token])].add(step)
                predicted[step, int(owner[token])] += place > 0
    steps = np.arange(len(windows))
    ends_of_text = 0
    for row in range(len(stream.pool)):
        found = list(_shown(stream, row, windows, steps))
        assert shown[row] <= {step for step, _, _ in found}
        for step, epoch, tokens in found:
            assert epoch == windows[step] // stream.windows_per_epoch
            assert tokens - predicted[step, row] in (0, 1)  # the end of text, which decodes to no passage
            assert step in shown[row] or tokens - predicted[step, row] == 1 or stream.window(int(windows[step]))[0] == 10**9
            ends_of_text += tokens - predicted[step, row]
    assert ends_of_text == sum(int((stream.window(number)[1:] == 10**9).sum()) for number in windows.tolist())
    summed = defaultdict(int)
    for passages, tokens, when in _pieces(stream, windows, steps) if len(windows) else ():
        for passage, count_, step in zip(passages.tolist(), tokens.tolist(), when.tolist(), strict=True):
            summed[step, passage] += count_
    assert dict(summed) == {(step, row): t for row in range(len(stream.pool)) for step, _, t in _shown(stream, row, windows, steps)}


def test_a_run_that_would_be_laid_out_otherwise_today_is_refused(world: World, base: Manifest) -> None:
    tables = {**base.outcome.tables, "domains": [{**row, "one role": 9.0} for row in base.outcome.tables["domains"]]}
    other = base.model_copy(update={"outcome": base.outcome.model_copy(update={"tables": tables})}).at(base.directory)
    with pytest.raises(GristmillError, match="laid out again, its domains are .* trace it with the project as it was then"):
        replayed(world, other).readings("x")


def test_of_a_model_that_was_taken_as_it_is_nothing_is_known(world: World, base: Manifest) -> None:
    taken = base.model_copy(update={"settings": {"checkpoint": "somewhere"}}).at(base.directory)
    with pytest.raises(GristmillError, match="taken as it is, not trained here"):
        replayed(world, taken)
