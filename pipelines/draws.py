"""What a run draws: by the number of the sequence or of the step, so that a restart or another number of processes draws the same."""

from __future__ import annotations

import numpy as np


class Generators:
    """The generators of sequences, each keyed by (seed, number of the sequence) and made when it is asked for."""

    def __init__(self, seed: int, numbers: range) -> None:
        """Key by `seed` and `numbers`."""
        self._seed, self._numbers = seed, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, self._numbers[place]]))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return torch's seed for what layers draw at a step (dropout), 63 bits."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
