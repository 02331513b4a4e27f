"""Streams of windows against a reader that joins everything in memory; pools and held-out documents by hand counts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World, build_world, publish

from pipelines.errors import EmptyInput
from pipelines.manifests import Member
from pipelines.shards import HeldOutDocuments, PassagePool, TokenShard, WindowStream, held_out_documents, passage_pools, windows_of
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
