"""Streams of windows against a reader that joins everything in memory; pools and held-out documents by hand counts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World, build_world, publish

from pipelines.batch import documents_of
from pipelines.documents import stable_fraction
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Member
from pipelines.shards import (
    HeldOutDocuments,
    PassagePool,
    TokenShard,
    WindowStream,
    held_out_documents,
    passage_pools,
    split_pool,
    windows_of,
)
from pipelines.store import Store

END = 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(Store(tmp_path_factory.mktemp("world")), documents=16)


def pool_of(lengths: list[int]) -> PassagePool:
    """Return a pool over two files whose every token is another number, 1 and up; the files hold gaps between passages."""
    files: list[list[int]] = [[], []]
    shard, offset, token = [], [], 1
    for number, length in enumerate(lengths):
        file = files[number % 2]
        file.extend([999_999] * (number % 3))
        shard.append(number % 2)
        offset.append(len(file))
        file.extend(range(token, token + length))
        token += length
    columns = (np.asarray(column, dtype=np.int64) for column in (shard, offset, lengths))
    return PassagePool([np.asarray(file, dtype=np.uint32) for file in files], *columns, end_of_text=END)


def passage(pool: PassagePool, number: int) -> list[int]:
    first = pool.offset[number]
    return pool.tokens[pool.shard[number]][first : first + pool.length[number]].tolist()


def joined(pool: PassagePool, seed: int, epoch: int) -> tuple[list[int], list[int]]:
    """Return one epoch's tokens and the passage that each belongs to, read in the plainest way."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(pool.length))
    tokens, owners = [], []
    for number in order:
        mine = [*passage(pool, number), END]
        tokens += mine
        owners += [int(number)] * len(mine)
    return tokens, owners


lengths_of_passages = st.lists(st.integers(1, 30), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_of_passages,
    sequence_length=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    places=st.lists(st.integers(0, 10_000), max_size=6),
)
def test_windows_are_those_of_the_plain_reader(lengths: list[int], sequence_length: int, seed: int, places: list[int]) -> None:
    pool = pool_of(lengths)
    if pool.num_tokens - 1 < sequence_length:
        with pytest.raises(EmptyInput, match="do not fill one window"):
            WindowStream(pool, sequence_length, seed)
        return
    stream = WindowStream(pool, sequence_length, seed)
    per_epoch = stream.windows_per_epoch
    for number in [*range(2 * per_epoch), *places]:
        epoch, place = divmod(number, per_epoch)
        tokens, owners = joined(pool, seed, epoch)
        stretch = slice(place * sequence_length, (place + 1) * sequence_length + 1)
        assert stream.window(number).tolist() == tokens[stretch]
        assert sorted(stream.passages_of(number).tolist()) == sorted(set(owners[stretch]))


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_passages, sequence_length=st.integers(1, 20), seed=st.integers(0, 1000))
def test_every_token_of_an_epoch_appears_once(lengths: list[int], sequence_length: int, seed: int) -> None:
    """Predicted tokens are all of the epoch but the first and the rest that fills no window; none comes twice."""
    pool = pool_of(lengths)
    if pool.num_tokens - 1 < sequence_length:
        return
    stream = WindowStream(pool, sequence_length, seed)
    for epoch in range(2):
        windows = [stream.window(epoch * stream.windows_per_epoch + n) for n in range(stream.windows_per_epoch)]
        predicted = np.concatenate([window[1:] for window in windows])
        content = predicted[predicted != END]
        assert len(set(content.tolist())) == len(content)
        assert pool.num_tokens - 1 - len(predicted) < sequence_length
        assert (predicted == END).sum() <= len(lengths)
        assert all(before[-1] == after[0] for before, after in pairwise(windows))


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.integers(0, 500), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_a_window_depends_on_its_number_alone(numbers: list[int], seed: int) -> None:
    """Read in any order, over epochs, from an old object or a new one."""
    pool = pool_of([7, 3, 12, 5, 9, 1, 22])
    old = WindowStream(pool, 8, seed)
    for number in numbers:
        assert old.window(number).tolist() == WindowStream(pool, 8, seed).window(number).tolist()


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=8, max_size=25),
    sequence_length=st.integers(1, 8),
    seed=st.integers(0, 1000),
    numbers=st.lists(st.integers(0, 500), max_size=24),
)
def test_windows_read_together_are_those_read_one_by_one(lengths: list[int], sequence_length: int, seed: int, numbers: list[int]) -> None:
    """In any order, with repetitions and over epochs."""
    stream = WindowStream(pool_of(lengths), sequence_length, seed)
    windows = stream.windows(numbers)
    assert windows.shape == (len(numbers), sequence_length + 1) and windows.dtype == np.int64
    per_epoch = stream.windows_per_epoch
    for number, window in zip(numbers, windows, strict=True):
        tokens, _ = joined(stream.pool, seed, number // per_epoch)
        place = number % per_epoch
        assert window.tolist() == tokens[place * sequence_length : (place + 1) * sequence_length + 1]


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 300), seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 40), min_size=6, max_size=30))
def test_any_number_of_processes_reads_the_same_global_batch(step: int, seed: int, lengths: list[int]) -> None:
    """Each process opens the stream cold, at any step, and reads its slice; the slices in order of rank are the batch."""
    pool, size = pool_of(lengths), 24
    numbers = np.arange(step * size, (step + 1) * size)
    whole = WindowStream(pool, 5, seed).windows(numbers)
    for world_size in (1, 2, 3, 4, 8):
        each = size // world_size
        slices = [WindowStream(pool, 5, seed).windows(numbers[rank * each : (rank + 1) * each]) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(slices), whole)
    warm = WindowStream(pool, 5, seed)
    warm.windows(np.arange(size))
    assert np.array_equal(warm.windows(numbers), whole)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_passages, seed=st.integers(0, 1000), epoch=st.integers(0, 5), sequence_length=st.integers(1, 6))
def test_an_epoch_shows_every_passage_once_but_for_the_rest(lengths: list[int], seed: int, epoch: int, sequence_length: int) -> None:
    pool = pool_of(lengths)
    if pool.num_tokens - 1 < sequence_length:
        return
    stream = WindowStream(pool, sequence_length, seed)
    assert sorted(stream.order(epoch).tolist()) == list(range(len(lengths)))
    first = epoch * stream.windows_per_epoch
    shown = np.concatenate([stream.passages_of(number) for number in range(first, first + stream.windows_per_epoch)])
    runs = shown[np.concatenate([[True], shown[1:] != shown[:-1]])]
    assert runs.tolist() == stream.order(epoch)[: len(runs)].tolist()  # each once, windows in a row continue the same passage
    left_out = pool.length[stream.order(epoch)[len(runs) :]] + 1
    assert left_out.sum() < sequence_length


def test_the_order_depends_on_the_seed_alone() -> None:
    """Not on the sequence length, nor on what the passages hold."""
    pool = pool_of([10] * 40)
    streams = [WindowStream(pool, length, 5) for length in (3, 16, 50)] + [WindowStream(pool_of([3] * 40), 3, 5)]
    for epoch in range(3):
        assert len({tuple(stream.order(epoch).tolist()) for stream in streams}) == 1
    read = [stream.windows(np.arange(stream.windows_per_epoch))[:, 1:].ravel() for stream in streams[:3]]
    shortest = min(map(len, read))
    assert all(np.array_equal(tokens[:shortest], read[0][:shortest]) for tokens in read)


@settings(max_examples=100, deadline=None)
@given(windows=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6))
def test_an_end_of_text_belongs_to_the_document_that_it_ends(windows: list[list[int]]) -> None:
    numbers = documents_of(np.asarray(windows), END)
    assert numbers.dtype == np.int64
    for window, found in zip(windows, numbers.tolist(), strict=True):
        assert found == [window[:position].count(END) for position in range(len(window))]


def test_seeds_and_epochs_are_other_orders() -> None:
    pool = pool_of([10] * 40)
    streams = [WindowStream(pool, 16, seed) for seed in range(6)]
    first = {tuple(stream.window(0).tolist()) for stream in streams}
    assert len(first) == 6
    per_epoch = streams[0].windows_per_epoch
    assert len({tuple(streams[0].window(epoch * per_epoch).tolist()) for epoch in range(6)}) == 6


def test_a_pool_too_small_says_what_to_do() -> None:
    with pytest.raises(EmptyInput, match="legal: 6 tokens do not fill one window of 6; raise its selection budget"):
        WindowStream(pool_of([5]), 6, 0, name="legal")
    assert WindowStream(pool_of([5]), 5, 0).windows_per_epoch == 1


def test_a_token_file_that_lost_its_end_is_an_error() -> None:
    pool = pool_of([7, 3, 12, 5])
    torn = PassagePool([file[:-1] for file in pool.tokens], pool.shard, pool.offset, pool.length, end_of_text=END)
    with pytest.raises(GristmillError, match=r"token file \d ends at \d+ tokens, but its index has a passage up to \d+; `gristmill verify"):
        WindowStream(torn, 5, 0).windows(range(5))


def test_pools_hold_the_selected_passages_of_each_domain(world: World) -> None:
    pools = passage_pools(world.selection, world.shards, END)
    assert sorted(pools) == ["book", "legal", "wiki"]
    for member in world.selection:
        rows = pq.read_table(member.path).to_pylist()
        for domain in {row["domain"] for row in rows}:
            mine = [row for row in rows if row["domain"] == domain and row["tokens"]]
            assert pools[domain].length.sum() == sum(row["tokens"] for row in mine) and len(pools[domain].length) == len(mine)
    for domain, pool in pools.items():
        index = list(world.corpora).index(domain)
        shard = TokenShard(world.shards[index])
        by_offset = {row["offset"]: row["id"] for row in shard.passages.to_pylist()}
        train = {row["id"] for member in world.selection for row in pq.read_table(member.path).to_pylist()}
        assert {by_offset[offset] for offset in pool.offset.tolist()} <= train
        assert np.all(pool.shard == index) and np.all(np.diff(pool.offset) > 0)


def test_a_window_is_traced_to_the_documents_it_shows(world: World) -> None:
    """Each span names a passage whose tokens, read from the shard's own index, are those of the window."""
    for domain, pool in passage_pools(world.selection, world.shards, END).items():
        shard = TokenShard(world.shards[list(world.corpora).index(domain)])
        index = {(row["id"], row["passage"]): row for row in shard.passages.to_pylist()}
        stream = WindowStream(pool, 50, 3)
        shown: dict[tuple[str, int], int] = {}
        for number in range(2 * stream.windows_per_epoch):
            window, spans = stream.window(number), stream.trace(number)
            assert sum(span.count for span in spans) == len(window) == 51
            assert [span.first for span in spans] == np.cumsum([0, *(span.count for span in spans[:-1])]).tolist()
            for span in spans:
                row = index[span.document, span.passage]
                tokens = [*shard.tokens[row["offset"] : row["offset"] + row["length"]].tolist(), END]
                piece = window[span.first : span.first + span.count].tolist()
                assert any(piece == tokens[start : start + span.count] for start in range(len(tokens)))
                shown[span.document, span.passage] = shown.get((span.document, span.passage), 0) + span.count
        assert len(shown) >= len(pool) - 1


def test_a_pool_names_its_passages(world: World) -> None:
    rows = {(r["id"], r["passage"]): r for member in world.selection for r in pq.read_table(member.path).to_pylist() if r["tokens"]}
    named = []
    for pool in passage_pools(world.selection, world.shards, END).values():
        backwards = np.arange(len(pool))[::-1]
        names = pool.names(backwards)
        assert [rows[name]["tokens"] for name in names] == pool.length[backwards].tolist()
        assert pool.subset(backwards[:3]).names(np.asarray([2, 0])) == [names[2], names[0]]
        batches = [(passages, rows.to_pylist()) for passages, rows in pool.name_batches()]
        assert sorted(np.concatenate([passages for passages, _ in batches]).tolist()) == list(range(len(pool)))
        for passages, listed in batches:
            assert [(row["id"], row["passage"]) for row in listed] == pool.names(passages)
        named += names
    assert sorted(named) == sorted(rows)
    with pytest.raises(GristmillError, match="have no names; use passage_pools"):
        pool_of([5, 5]).names(np.asarray([0]))


def test_a_split_keeps_whole_documents_from_training(world: World) -> None:
    for pool in passage_pools(world.selection, world.shards, END).values():
        training, validation = split_pool(pool, 0.3)
        sides = [{name for name, _ in side.names(np.arange(len(side)))} for side in (training, validation)]
        assert not sides[0] & sides[1] and len(training) + len(validation) == len(pool)
        assert sides[1] == {name for name, _ in pool.names(np.arange(len(pool))) if stable_fraction("validation", name) < 0.3}
        assert np.array_equal(split_pool(pool, 0.3)[1].offset, validation.offset)
        # a document stays where it is when half of the others go, and another salt draws others
        half = split_pool(pool.subset(np.arange(len(pool) // 2)), 0.3)[1]
        assert {name for name, _ in half.names(np.arange(len(half)))} <= sides[1]
    others = split_pool(pool, 0.3, salt="other")[1]
    assert {name for name, _ in others.names(np.arange(len(others)))} != sides[1]


def test_a_split_without_a_side_says_so(world: World) -> None:
    pool = passage_pools(world.selection, world.shards, END)["wiki"]
    with pytest.raises(EmptyInput, match="leaves no validation document"):
        split_pool(pool, 1e-9)
    with pytest.raises(EmptyInput, match="leaves no training document"):
        split_pool(pool, 1 - 1e-9)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(GristmillError, match=r"is not between 0 and 1; 0.01 keeps"):
            split_pool(pool, fraction)


def test_an_unselected_passage_is_not_read(world: World) -> None:
    rows = pq.read_table(world.selection[0].path).to_pylist()
    for number, row in enumerate(rows):
        row["selected"] = number % 2 == 0
    subset = publish(world.store, "selected_subset", {"general.parquet": rows})
    pools = passage_pools([Member(manifest=subset, name="general.parquet")], world.shards, END)
    kept = [row for row in rows if row["selected"] and row["tokens"]]
    assert sum(len(pool.length) for pool in pools.values()) == len(kept)
    assert sum(int(pool.length.sum()) for pool in pools.values()) == sum(row["tokens"] for row in kept)


def test_a_domains_stream_is_the_same_beside_any_others(world: World) -> None:
    """The pool of a domain, and so its windows, does not depend on which other domains are opened."""
    alone = passage_pools(world.selection[1:], world.shards[2:], END)["legal"]
    among = passage_pools(world.selection, world.shards, END)["legal"]
    for number in (0, 3, 50):
        assert WindowStream(alone, 32, 7).window(number).tolist() == WindowStream(among, 32, 7).window(number).tolist()


def test_held_out_documents_are_those_of_the_split(world: World) -> None:
    held = held_out_documents(world.decisions, world.shards)
    expected = {row["id"] for row in pq.read_table(world.decisions.file("decisions.parquet")).to_pylist() if row["split"] == "held_out"}
    assert {name for documents in held.values() for name in documents.ids} == expected
    pools = passage_pools(world.selection, world.shards, END)
    for number, domain in enumerate(world.corpora):
        shard, documents = TokenShard(world.shards[number]), held[domain]
        rows = {row["id"]: row for row in shard.documents.to_pylist()}
        for name, tokens, size in zip(documents.ids, documents.tokens, documents.bytes.tolist(), strict=True):
            row = rows[name]
            assert tokens.tolist() == shard.tokens[row["offset"] : row["offset"] + row["length"]].tolist() and size == row["bytes"]
            read = (pools[domain].offset < row["offset"] + row["length"]) & (pools[domain].offset + pools[domain].length > row["offset"])
            assert not read.any()


def test_a_dropped_held_out_document_is_left_out(world: World) -> None:
    rows = pq.read_table(world.decisions.file("decisions.parquet")).to_pylist()
    dropped = next(row for row in rows if row["split"] == "held_out")
    dropped["kept"] = False
    decisions = publish(world.store, "deduplicated_corpus", {"decisions.parquet": rows})
    held = held_out_documents(decisions, world.shards)
    assert dropped["id"] not in {name for documents in held.values() for name in documents.ids}


def test_a_token_limit_takes_a_prefix_of_a_fixed_order(world: World) -> None:
    whole = held_out_documents(world.decisions, world.shards)["wiki"]
    cut = held_out_documents(world.decisions, world.shards, max_tokens=len(whole.tokens[0]) + 1)["wiki"]
    assert cut.ids == whole.ids[:2] and cut.bytes.tolist() == whole.bytes[:2].tolist()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), sequence_length=st.integers(1, 10), wanted=st.integers(1, 30))
def test_held_out_windows_are_distinct_pieces_of_the_joined_text(lengths: list[int], sequence_length: int, wanted: int) -> None:
    ends = np.cumsum(lengths).tolist()
    tokens = [np.arange(end - length + 1, end + 1, dtype=np.uint16) for length, end in zip(lengths, ends, strict=True)]
    documents = HeldOutDocuments([str(n) for n in range(len(lengths))], tokens, np.asarray(lengths))
    windows = windows_of(documents, sequence_length, wanted, END)
    whole = list(range(ends[-1] + 1))
    available = (len(whole) - 1) // sequence_length
    assert windows.shape == (min(wanted, available), sequence_length + 1)
    starts = windows[:, 0].tolist()
    assert len(set(starts)) == len(starts) and all(start % sequence_length == 0 for start in starts)
    assert all(window.tolist() == whole[window[0] : window[0] + sequence_length + 1] for window in windows)
