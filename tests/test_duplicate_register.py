"""The register against a plain reading of its rules, and links against the whole: whatever the cuts, the same decisions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import register_kernel
from pipelines.duplicate_index import INDEX, Index, Segment, open_segment, write_segment
from pipelines.duplicate_register import Clusters, Register, find_clusters

BANDS, ROWS, THRESHOLD = 4, 2, 0.6
POSITIONS = BANDS * ROWS


def documents(seed: int, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return signatures of few values, exact hashes with copies, shingles with zeros, and held-out flags."""
    chance = np.random.default_rng(seed)
    signatures = chance.integers(0, 4, (total, POSITIONS)).astype(np.uint32)
    exact = np.stack([chance.integers(0, 2, total), chance.integers(0, 3 * total, total)], axis=1).astype(np.uint64)
    for row in range(1, total):
        if chance.random() < 0.2:
            source = chance.integers(row)
            signatures[row], exact[row] = signatures[source], exact[source]
    shingles = np.where(chance.random(total) < 0.1, 0, 9)
    signatures[shingles == 0] = 2**32 - 1
    return signatures, exact, shingles, chance.random(total) < 0.5


def links(parts: tuple[np.ndarray, ...], cuts: Sequence[int], directory: Path) -> list[Clusters]:
    """Run the register over documents cut into links; each segment is written and mapped again."""
    signatures, exact, shingles, held = parts
    found, segments = [], []
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(held)], strict=True)):
        rows = slice(start, stop)
        register = Register(
            ids=[f"d{row % 7}" if row % 3 == 0 else f"id{row}" for row in range(start, stop)],
            partitions=(f"wiki|{number}",),
            bounds=np.array([0, stop - start]),
            exact=exact[rows],
            signatures=signatures[rows],
            shingles=shingles[rows],
            characters=shingles[rows],
        )
        clusters, segment = find_clusters(register, held[rows], Index(segments), bands=BANDS, rows=ROWS, threshold=THRESHOLD)
        write_segment(directory / f"{number}-{INDEX}", segment)
        segments.append(open_segment(directory / f"{number}-{INDEX}"))
        found.append(clusters)
    return found


def reference(parts: tuple[np.ndarray, ...]) -> dict[str, list]:
    """The rules, document by document, with dictionaries."""
    signatures, exact, shingles, held = parts
    first: dict[bytes, int] = {}
    buckets: dict[tuple, dict[int, list[int]]] = {}
    founder, out, joins, straddles, original = [], [], [], [], []
    for row, signature in enumerate(signatures):
        own = [(b, *signature[b * ROWS : (b + 1) * ROWS].tolist()) for b in range(BANDS)] if shingles[row] else []
        near = sorted({text for key in own for texts in buckets.get(key, {}).values() for text in texts})
        equal = {text: (signatures[text] == signature).sum() / POSITIONS for text in near}
        near = [text for text in near if equal[text] >= THRESHOLD]
        original.append(first.setdefault(exact[row].tobytes(), row))
        copied = original[row] != row
        cluster = founder[original[row]] if copied else founder[max(near, key=lambda text: (equal[text], -text))] if near else row
        matched = {founder[text] for text in near} | ({cluster} if copied else set())
        founder.append(cluster)
        out.append(bool(held[cluster]))
        joins.append(len(matched))
        straddles.append((copied and straddles[original[row]]) or len({bool(held[one]) for one in matched}) > 1)
        for key in own if not copied else ():
            bucket = buckets.setdefault(key, {})
            if cluster not in bucket and len(bucket) >= register_kernel.MAX_CLUSTERS:
                continue
            texts = bucket.setdefault(cluster, [])
            if len(texts) < register_kernel.MAX_PER_CLUSTER:
                texts.append(row)
    return {"founder": founder, "held": out, "joins": joins, "straddles": straddles, "original": original}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 120), max_size=4), st.integers(1, 120))
def test_every_cut_gives_what_the_rules_say(tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: list[int], total: int) -> None:
    parts = documents(seed, total)
    directory = tmp_path_factory.mktemp("links")
    expected = reference(parts)
    whole = links(parts, [], directory)[0]
    cut = links(parts, sorted(min(place, total) for place in cuts), directory)
    for name, values in expected.items():
        assert getattr(whole, name).tolist() == values
        assert np.concatenate([getattr(link, name) for link in cut]).tolist() == values
    assert np.concatenate([link.similarity for link in cut]).tobytes() == whole.similarity.tobytes()


def test_a_template_of_many_clusters_is_capped_alike_in_every_cut(tmp_path: Path) -> None:
    """300 documents share a band and little else: a bucket keeps 64 clusters, and 4 documents of each."""
    chance = np.random.default_rng(3)
    signatures = chance.integers(0, 50, (300, POSITIONS)).astype(np.uint32)
    signatures[:, :ROWS] = 7
    signatures[150:] = signatures[chance.integers(0, 3, 150)]
    signatures[150:, -1] = chance.integers(100, 200, 150)
    exact = np.stack([np.zeros(300), np.arange(300)], axis=1).astype(np.uint64)
    parts = signatures, exact, np.full(300, 9), np.zeros(300, dtype=bool)
    expected = reference(parts)["founder"]
    assert len(set(expected[:150])) > 64
    for cuts in ([], [10], [50, 100, 200], [149, 151]):
        found = np.concatenate([link.founder for link in links(parts, cuts, tmp_path)])
        assert found.tolist() == expected


def test_names_are_unique_and_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    parts = documents(11, 60)
    names = [name for link in links(parts, [20, 40], tmp_path) for name in link.names]
    own = [
        name for link in links(parts, [20, 40], tmp_path) for name, f, o in zip(link.names, link.founder, link.own, strict=True) if f == o
    ]
    assert len(own) == len(set(own)) and set(names) == set(own)
    assert any("@wiki|" in name for name in own)


def test_equal_halves_of_exact_hashes_are_told_apart(tmp_path: Path) -> None:
    exact = np.array([[5, 1], [5, 2], [5, 3], [6, 1]], dtype=np.uint64)
    signatures = np.arange(4 * POSITIONS, dtype=np.uint32).reshape(4, POSITIONS)
    links((signatures, exact, np.full(4, 9), np.zeros(4, dtype=bool)), [], tmp_path)
    index = Index([open_segment(tmp_path / f"0-{INDEX}")])
    wanted = np.array([[5, 3], [5, 4], [5, 1], [7, 1], [5, 2]], dtype=np.uint64)
    assert index.find_originals(wanted).tolist() == [2, -1, 0, -1, 1]


def test_a_segment_is_read_as_it_was_written(tmp_path: Path) -> None:
    parts = documents(random.Random(0).randrange(1000), 40)
    links(parts, [0, 40], tmp_path)
    segments = [open_segment(tmp_path / f"{number}-{INDEX}") for number in range(3)]
    assert [len(segment) for segment in segments] == [0, 40, 0] and [segment.base for segment in segments] == [0, 0, 40]
    write_segment(tmp_path / "again", segments[1])
    assert (tmp_path / "again").read_bytes() == (tmp_path / f"1-{INDEX}").read_bytes()
    assert isinstance(segments[1], Segment) and (np.diff(segments[1].keys.astype(object)) >= 0).all()
