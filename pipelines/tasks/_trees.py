"""Sequences that begin alike, as trees: what they share is computed once.

Sequences in the order of their tokens are put into one row while they fit; a token is read once for all that have the same tokens
before it, sees these alone, and stands at its place in the sequence. So the choices of a question share the question, and the
sentences of a minimal pair what stands before they part.

Shapes: B trees, T tokens that are read, N tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Key = tuple[tuple[int, ...], int]
"""Tokens of a sequence, and how many of its last ones are scored."""
ROOM = 96
"""Tokens of a tree at least: with more, more is shared and attention costs more."""


@dataclass
class Tree:
    """Sequences of one row; node 0 and up, each with the token that leads to it."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """-1 for a first token."""
    depths: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    """The nodes of each sequence."""
    counts: list[int] = field(default_factory=list)
    """How many of the last nodes of each sequence are scored."""

    def add(self, tokens: tuple[int, ...], count: int, shared: int) -> None:
        """Add a sequence whose first `shared` tokens are those of the last one."""
        path = self.paths[-1][:shared] if shared else []
        for token in tokens[shared:]:
            self.parents.append(path[-1] if path else -1)
            self.depths.append(len(path))
            path.append(len(self.tokens))
            self.tokens.append(token)
        self.paths.append(path)
        self.counts.append(count)

    @property
    def read(self) -> np.ndarray:
        """The nodes that others follow, sorted: the last token of a sequence is predicted, and not read."""
        return np.unique([parent for parent in self.parents if parent >= 0])

    @property
    def scored(self) -> np.ndarray:
        """The nodes that a sequence scores, sorted."""
        return np.unique(np.concatenate([path[-count:] for path, count in zip(self.paths, self.counts, strict=True)]))

    def sums(self, losses: np.ndarray) -> list[float]:
        """Return the summed losses of each sequence, from those of the `scored` nodes."""
        by_node = np.zeros(len(self.tokens))
        by_node[self.scored] = losses
        return [float(by_node[path[-count:]].sum()) for path, count in zip(self.paths, self.counts, strict=True)]


@dataclass(frozen=True)
class Packed:
    """A batch of trees: what a model reads, and where it predicts what."""

    inputs_BT: np.ndarray
    """Token ids, int64."""
    positions_BT: np.ndarray
    """The place of each in its sequence, int64."""
    mask_BTT: np.ndarray
    """Who sees whom, bool."""
    rows_N: np.ndarray
    """The tree of each scored token."""
    places_N: np.ndarray
    """The position that predicts it."""
    targets_N: np.ndarray
    """The token, int64."""


def grown(keys: Sequence[Key]) -> Iterator[tuple[list[Key], Tree]]:
    """Yield trees of distinct `keys`, with the keys of each in its order."""
    held, tree = [], Tree()
    for tokens, count in sorted(keys):
        shared = _common(held[-1][0], tokens) if held else 0
        if held and len(tree.tokens) + len(tokens) - shared > max(ROOM, 2 * len(tokens)):
            yield held, tree
            held, tree, shared = [], Tree(), 0
        tree.add(tokens, count, shared)
        held.append((tokens, count))
    if held:
        yield held, tree


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many first tokens are the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def packed(trees: Sequence[Tree]) -> Packed:
    """Return `trees` side by side; padding sees itself alone, and is seen by nothing."""
    reads = [tree.read for tree in trees]
    width = max(map(len, reads))
    inputs, positions = np.zeros((2, len(trees), width), dtype=np.int64)
    mask = np.broadcast_to(np.eye(width, dtype=bool), (len(trees), width, width)).copy()
    rows, places, targets = [], [], []
    for row, (tree, nodes) in enumerate(zip(trees, reads, strict=True)):
        tokens, parents, depths = (np.asarray(values) for values in (tree.tokens, tree.parents, tree.depths))
        inputs[row, : len(nodes)], positions[row, : len(nodes)] = tokens[nodes], depths[nodes]
        for place, above in enumerate(np.searchsorted(nodes, parents[nodes]).tolist()):
            if parents[nodes[place]] >= 0:  # a node comes after its parent
                mask[row, place] |= mask[row, above]
        scored = tree.scored
        rows.append(np.full(len(scored), row))
        places.append(np.searchsorted(nodes, parents[scored]))
        targets.append(tokens[scored])
    return Packed(inputs, positions, mask, *map(np.concatenate, (rows, places, targets)))
