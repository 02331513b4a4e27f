"""The order of the data: which window of which domain every sequence of a run is, as a pure function of (pools, shares, seed).

Step s reads the sequences from ``s * B`` to ``(s + 1) * B``; a process reads its slice of them. So a run resumes at any
step, on any number of processes, with nothing to restore. Behind the planned steps lie spare ones, which take the
place of batches that a rewind leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from pipelines.errors import EmptyInput
from pipelines.plan import Plan
from pipelines.shards import PassagePool, WindowStream


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

    def windows(self, sequences: Sequence[int]) -> np.ndarray:
        """Return `sequences` as int64 of shape (B, T + 1)."""
        chosen = np.asarray(sequences, dtype=np.int64)
        out = np.empty((len(chosen), self._plan.settings.sequence_length + 1), dtype=np.int64)
        for domain in np.unique(self.assignment[chosen]):
            mine = self.assignment[chosen] == domain
            out[mine] = self.streams[domain].windows(self.positions[chosen[mine]])
        return out

    def documents(self, sequences: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Yield the domain and the id of each document that `sequences` show, each once."""
        seen = set()
        for number in sequences:
            domain = int(self.assignment[number])
            for name, *_ in self.streams[domain].trace(int(self.positions[number])):
                if name not in seen:
                    seen.add(name)
                    yield self.domains[domain], name

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
