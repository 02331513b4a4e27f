"""The order of the data: which window of which domain every sequence of a run is, as a pure function of (pools, shares, seed).

Step s reads the sequences from ``s * B`` to ``(s + 1) * B``; a process reads its slice of them. So a run resumes at any
step, on any number of processes, with nothing to restore. Behind the planned steps lie spare ones, which take the
place of batches that a rewind leaves out.

A round of a selecting phase reads some passages of each pool alone; what these are is given to the order before they are
read. It shuffles them by the number of the round, and begins with a whole epoch, so that none is read twice before all
were read once. A domain whose passages are all selected is read on as if there were no round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipelines.errors import EmptyInput, GristmillError
from pipelines.plan import Plan
from pipelines.shards import PassagePool, WindowStream


class _Reading(NamedTuple):
    """How a domain is read: window `positions - first` of `stream`."""

    stream: WindowStream
    first: int = 0


class DataOrder:
    """The sequences of a run."""

    def __init__(self, plan: Plan, shares: Mapping[str, float], pools: Mapping[str, PassagePool]) -> None:
        """Lay the run out.

        Args:
            shares: of each domain, where a phase has no mixture of its own.
            pools: the passages of each domain.

        Raises:
            EmptyInput: a domain with a share has no passage, or too few for one window.
        """
        settings = plan.settings
        self._plan, self._shares = plan, dict(shares)
        self.domains = sorted({d for number in range(len(settings.phases)) for d in self.shares_of(number)})
        if missing := [domain for domain in self.domains if domain not in pools]:
            raise EmptyInput(f"no selected passage of {', '.join(missing)}; loosen its filters or raise its budget")
        self.streams = [WindowStream(pools[d], settings.sequence_length, settings.seed, name=d) for d in self.domains]
        self.selected: dict[int, dict[str, np.ndarray]] = {}
        """The passages of each round that `select` was told: their places in the pools of its domains, rising, int64."""
        self._readings: dict[int, list[_Reading]] = {}

    def pool(self, domain: str) -> PassagePool:
        """Return all passages of `domain`."""
        return self.streams[self.domains.index(domain)].pool

    def select(self, number: int, passages: Mapping[str, np.ndarray]) -> None:
        """Have round `number` read of each domain among `passages` these alone: places in its pool, in any order.

        Raises:
            EmptyInput: those of a domain do not fill a window.
        """
        selected = {domain: np.unique(np.asarray(places, dtype=np.int64)) for domain, places in passages.items()}
        self._readings[number] = [self._reading(number, domain, selected) for domain in self.domains]
        self.selected[number] = selected

    def _reading(self, number: int, domain: str, selected: Mapping[str, np.ndarray]) -> _Reading:
        place = self.domains.index(domain)
        whole = self.streams[place]
        if len(selected.get(domain, whole.pool)) == len(whole.pool):
            return _Reading(whole)
        seed = int(np.random.SeedSequence([whole.seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        stream = WindowStream(whole.pool.subset(selected[domain]), whole.sequence_length, seed, name=f"round {number} of {domain}")
        before = self._plan.rounds[number].first * self._plan.settings.batch_sequences
        return _Reading(stream, int(np.count_nonzero(self.assignment[:before] == place)))

    def forget_rounds(self) -> None:
        """Forget what rounds read: the run goes back to where it may select anew."""
        self.selected.clear()
        self._readings.clear()

    def shares_of(self, phase: int) -> dict[str, float]:
        """Return the share of each domain in `phase`; they sum to 1."""
        mixture = self._plan.settings.phases[phase].mixture
        shares = self._shares if mixture is None else mixture
        total = sum(shares.values())
        return {domain: share / total for domain, share in sorted(shares.items()) if share > 0}

    @cached_property
    def num_spares(self) -> int:
        """Batches behind the planned ones."""
        guards = self._plan.settings.guards
        return guards.max_events * guards.replaced_batches if guards.rewinds else 0

    @cached_property
    def assignment(self) -> np.ndarray:
        """Domain (index into `domains`) of each sequence, int16 of shape (S,), spares included."""
        size = self._plan.settings.batch_sequences
        parts = []
        left = self._plan.num_steps
        for number, steps in enumerate(self._plan.phase_steps):
            taken = min(steps, left)
            left -= taken
            spares = self.num_spares if not left else 0
            parts.append(self._assigned(number, (taken + spares) * size))
            if not left:
                break
        return np.concatenate(parts)

    def _assigned(self, phase: int, num_sequences: int) -> np.ndarray:
        shares = self.shares_of(phase)
        places = np.asarray([self.domains.index(domain) for domain in shares], dtype=np.int16)
        return places[assign_sequences(shares, num_sequences)]

    @cached_property
    def positions(self) -> np.ndarray:
        """Window number of each sequence within its domain's stream, int64 of shape (S,); phases go on where the last one stopped."""
        out = np.empty(len(self.assignment), dtype=np.int64)
        for domain in range(len(self.domains)):
            mine = self.assignment == domain
            out[mine] = np.arange(np.count_nonzero(mine))
        return out

    def sequences(self, batch: int) -> range:
        """Return the numbers of the sequences of `batch` (0-based; spares follow the planned ones)."""
        size = self._plan.settings.batch_sequences
        return range(batch * size, (batch + 1) * size)

    def windows(self, sequences: Sequence[int], step: int | None = None) -> np.ndarray:
        """Return `sequences` as int64 of shape (B, T + 1).

        Args:
            step: the step that reads them, where it is not their own: a spare batch is read from the round that it is read in.

        Raises:
            GristmillError: what their round reads was not selected yet.
        """
        chosen = np.asarray(sequences, dtype=np.int64)
        out = np.empty((len(chosen), self._plan.settings.sequence_length + 1), dtype=np.int64)
        rounds = self._rounds_of(chosen, step)
        for number in np.unique(rounds):
            for domain in np.unique(self.assignment[chosen[rounds == number]]):
                mine = (rounds == number) & (self.assignment[chosen] == domain)
                stream, first = self._readings_of(number)[domain]
                out[mine] = stream.windows(self.positions[chosen[mine]] - first)
        return out

    def documents(self, sequences: Sequence[int], step: int | None = None) -> Iterator[tuple[str, str]]:
        """Yield the domain and the id of each document that `sequences` show, each once; `step` is that of `windows`."""
        seen = set()
        rounds = self._rounds_of(np.asarray(sequences, dtype=np.int64), step).tolist()
        for number, round_number in zip(sequences, rounds, strict=True):
            domain = int(self.assignment[number])
            stream, first = self._readings_of(round_number)[domain]
            for name, *_ in stream.trace(int(self.positions[number]) - first):
                if name not in seen:
                    seen.add(name)
                    yield self.domains[domain], name

    def _rounds_of(self, sequences: np.ndarray, step: int | None) -> np.ndarray:
        """Return the round that each of `sequences` is read in, -1 where it is none."""
        last = self._plan.num_steps - 1
        own = np.minimum(sequences // self._plan.settings.batch_sequences, last) if step is None else np.full(len(sequences), step)
        rounds = {one: self._plan.round_at(one) for one in np.unique(own).tolist()}
        return np.asarray([-1 if (number := rounds[one]) is None else number for one in own.tolist()], dtype=np.int64)

    def _readings_of(self, number: int) -> list[_Reading]:
        if number < 0:
            return [_Reading(stream) for stream in self.streams]
        if number not in self._readings:
            raise GristmillError(f"round {number} has no selection yet: it is made when training gets there")
        return self._readings[number]

    def round_epochs(self, number: int) -> dict[str, float]:
        """Return, by domain of round `number`, how many times the round reads the passages that are selected for it."""
        size, one = self._plan.settings.batch_sequences, self._plan.rounds[number]
        counts = np.bincount(self.assignment[one.first * size : one.stop * size], minlength=len(self.domains))
        readings = zip(self.domains, counts.tolist(), self._readings_of(number), strict=True)
        return {d: count / stream.windows_per_epoch for d, count, (stream, _) in readings if d in self.selected[number]}

    def epochs(self) -> dict[str, float]:
        """Return, by domain, how many times the planned steps read its passages."""
        planned = self.assignment[: self._plan.num_steps * self._plan.settings.batch_sequences]
        counts = np.bincount(planned, minlength=len(self.domains))
        return {domain: float(counts[i] / self.streams[i].windows_per_epoch) for i, domain in enumerate(self.domains)}

    def token_shares(self) -> dict[str, float]:
        """Return the share of the planned tokens that each domain gets."""
        planned = self.assignment[: self._plan.num_steps * self._plan.settings.batch_sequences]
        counts = np.bincount(planned, minlength=len(self.domains))
        return {domain: float(counts[i] / len(planned)) for i, domain in enumerate(self.domains)}


def first_windows(pools: Mapping[str, PassagePool], sequence_length: int, num_windows: int) -> dict[str, np.ndarray]:
    """Return at most `num_windows` windows of each pool that fills one, int64 of shape (n, T + 1)."""
    found = {}
    for domain, pool in sorted(pools.items()):
        if pool.num_tokens > sequence_length:
            stream = WindowStream(pool, sequence_length, 0, name=domain)
            found[domain] = stream.windows(np.arange(min(num_windows, stream.windows_per_epoch)))
    return found


def assign_sequences(shares: Mapping[str, float], num_sequences: int) -> np.ndarray:
    """Return the domain (index into sorted `shares`) of each sequence, int16 of shape ``(num_sequences,)``.

    After any number of sequences every one of the n domains is within ``1 - 1 / (2n - 2)`` sequences of its exact share:
    of the domains that are behind by ``1 / (2n - 2)`` or more, the next is the one that would reach the bound first
    (Tijdeman 1980, The chairman assignment problem). Taking the one furthest behind keeps no such bound beyond two.
    """
    from pipelines.stream_kernels import assign

    wanted = np.asarray([shares[name] for name in sorted(shares)], dtype=np.float64)
    wanted /= wanted.sum()
    out = np.empty(num_sequences, dtype=np.int16)
    assign(wanted, np.zeros(len(wanted)), 1.0 / max(2 * len(wanted) - 2, 1), out)
    return out
