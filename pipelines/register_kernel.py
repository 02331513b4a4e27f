"""The compiled loop of `duplicate_register`: every document in its order, compared with earlier ones of its buckets."""

from __future__ import annotations

import numpy as np

from pipelines.native import ARRAYS, KERNEL

MAX_PER_CLUSTER = 4
MAX_CLUSTERS = 64
"""A bucket keeps at most `MAX_PER_CLUSTER` documents of a cluster and of at most `MAX_CLUSTERS` clusters, the earliest ones, so that a
template shared by a million pages costs a constant number of comparisons a page, not a million."""


@ARRAYS
def place_documents(
    signatures: np.ndarray,
    buckets: np.ndarray,
    original: np.ndarray,
    bounds: np.ndarray,
    entries: np.ndarray,
    founder: np.ndarray,
    held: np.ndarray,
    straddles: np.ndarray,
    joins: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """Place the new documents, the last ``len(buckets)`` of n, in clusters, in order; those before them stand already.

    Args:
        signatures: uint32 ``(n, P)``.
        buckets: int64 ``(new, bands)``, -1 for a bucket of which the document is the only member.
        original: int64 ``(n,)``: the first document with the same exact hash.
        bounds: int64 ``(buckets + 1,)``: bucket b holds the earlier documents ``entries[bounds[b]:bounds[b + 1]]``, in order.
        founder: int64 ``(n,)``: the name of each document's cluster, any number; on entry, for a new document, that of the one it founds.
        held: bool ``(n,)``: whether the cluster is held out; on entry as `founder`.
        straddles: bool ``(n,)``: whether the document matched clusters of both splits, or its original did.
        joins: int32 ``(n,)``: the clusters the document matched.

    Returns:
        bool ``(new, bands)``: the buckets that keep the document to be compared with later ones.
    """
    new, bands = buckets.shape
    known = len(founder) - new
    first = np.full(len(bounds) - 1, -1, dtype=np.int64)  # of the bucket's new members, a linked list
    last = np.full(len(bounds) - 1, -1, dtype=np.int64)
    num_clusters = _clusters_of_buckets(bounds, entries, founder)
    size = 0
    for row in range(new):
        for band in range(bands):
            size += buckets[row, band] >= 0
    members = np.empty(size, dtype=np.int64)
    following = np.full(size, -1, dtype=np.int64)
    size = 0
    kept = np.zeros((new, bands), dtype=np.bool_)
    seen = np.full(known + new, -1, dtype=np.int64)
    matched = np.empty(bands * MAX_CLUSTERS + 1, dtype=np.int64)
    positions = signatures.shape[1]
    for row in range(new):
        me = known + row
        best, most, clusters, any_held, any_train = -1, -1, 0, False, False
        for band in range(bands):
            bucket = buckets[row, band]
            if bucket < 0:
                continue
            place, stop, link = bounds[bucket], bounds[bucket + 1], first[bucket]
            while place < stop or link >= 0:
                if place < stop:
                    other = entries[place]
                    place += 1
                else:
                    other = members[link]
                    link = following[link]
                if seen[other] == me:
                    continue
                seen[other] = me
                equal = 0
                for position in range(positions):
                    equal += signatures[other, position] == signatures[me, position]
                if equal / positions < threshold:
                    continue
                if equal > most or (equal == most and other < best):
                    best, most = other, equal
                clusters = _add(matched, clusters, founder[other])
                any_held |= held[other]
                any_train |= not held[other]
        copied = original[me] != me
        if copied:
            best = original[me]
            clusters = _add(matched, clusters, founder[best])
            any_held |= held[best]
            any_train |= not held[best]
            straddles[me] = straddles[best]
        if best >= 0:
            founder[me], held[me] = founder[best], held[best]
        joins[me] = clusters
        straddles[me] |= any_held and any_train
        if copied:
            continue
        for band in range(bands):
            bucket = buckets[row, band]
            if bucket < 0:
                kept[row, band] = True
                continue
            same = 0
            for place in range(bounds[bucket], bounds[bucket + 1]):
                same += founder[entries[place]] == founder[me]
            link = first[bucket]
            while link >= 0:
                same += founder[members[link]] == founder[me]
                link = following[link]
            if same >= MAX_PER_CLUSTER or (same == 0 and num_clusters[bucket] >= MAX_CLUSTERS):
                continue
            num_clusters[bucket] += same == 0
            members[size] = me
            if last[bucket] >= 0:
                following[last[bucket]] = size
            else:
                first[bucket] = size
            last[bucket] = size
            size += 1
            kept[row, band] = True
    return kept


@KERNEL
def _add(matched: np.ndarray, count: int, cluster: int) -> int:
    """Add `cluster` to the first `count` of `matched` unless it is there; return the new count."""
    for place in range(count):
        if matched[place] == cluster:
            return count
    matched[count] = cluster
    return count + 1


@ARRAYS
def _clusters_of_buckets(bounds: np.ndarray, entries: np.ndarray, founder: np.ndarray) -> np.ndarray:
    """Return of how many clusters each bucket holds earlier documents."""
    found = np.zeros(len(bounds) - 1, dtype=np.int64)
    matched = np.empty(MAX_CLUSTERS + 1, dtype=np.int64)
    for bucket in range(len(bounds) - 1):
        for place in range(bounds[bucket], bounds[bucket + 1]):
            found[bucket] = _add(matched, found[bucket], founder[entries[place]])
    return found
