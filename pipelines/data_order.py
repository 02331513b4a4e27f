"""The order of the data: which window of which domain every sequence of a run is, as a pure function of (pools, shares, seed).

Step s reads the sequences from ``s * B`` to ``(s + 1) * B``; a process reads its slice of them. So a run resumes at any
step, on any number of processes, with nothing to restore. Behind the planned steps lie spare ones, which take the
place of batches that a rewind leaves out.

A round of a selecting phase reads some passages of each pool alone; what these are is given to the order before they are
read. It shuffles them by the number of the round, and begins with a whole epoch, so that none is read twice before all
were read once. A domain whose passages are all selected is read on as if there were no round.

What happens when a domain was read `max_epochs` times belongs to the order too, and so does a target share that moves: both are
laid out before the run, so a run that resumes knows of them what one without a break knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Json, Manifest
from pipelines.plan import PhaseMixture, Plan, Ramp, TargetShare
from pipelines.plugins import Settings
from pipelines.shards import PassagePool, WindowStream

Exhaustion = Literal["repeat", "stop", "renormalise", "cap"]


@dataclass(frozen=True)
class Course:
    """The shares of a phase: of roles, which may move linearly, and of n domains within their roles, which do not."""

    domains: tuple[str, ...]
    """Those with a share, sorted."""
    weights: np.ndarray
    """float64 (n,): share of each domain within its role, above 0."""
    of_target: np.ndarray
    """bool (n,): whether it is a target domain."""
    start: float
    """Target share at the beginning of the phase."""
    end: float
    """Target share at its end, and from there on."""
    length: float
    """Sequences of the phase, or its tokens, by what it is asked about."""

    @property
    def shares(self) -> dict[str, float]:
        """The share of each domain, on average over the phase; they sum to 1."""
        target = (self.start + self.end) / 2
        found = self.weights * np.where(self.of_target, target, 1.0 - target)
        return dict(zip(self.domains, found.tolist(), strict=True))

    def shares_from(self, time: float, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return shares at `time`, how fast they move, and until when they do so, where only the domains of the mask `alive` are read."""
        totals = [float(self.weights[alive & (self.of_target == role)].sum()) for role in (False, True)]
        within = np.where(alive, self.weights, 0.0) / np.where(self.of_target, totals[1] or 1.0, totals[0] or 1.0)
        moves = all(totals) and self.start != self.end and time < self.length
        slope = (self.end - self.start) / self.length if moves else 0.0
        target = self.start + slope * time if moves else self.end
        target = target if all(totals) else float(totals[1] > 0)
        shares = within * np.where(self.of_target, target, 1.0 - target)
        return shares, within * np.where(self.of_target, slope, -slope), self.length if moves else np.inf


class DomainMixture(Settings):
    """What a run reads of its domains."""

    shares: dict[str, float]
    """Of each domain, where a phase says nothing else; divided by their sum."""
    role_shares: dict[Literal["general", "target"], dict[str, float]] = Field(default_factory=dict)
    """By role, the share of each of its domains within it. A `target_share` of a phase is laid over these; limits need them too."""
    ratio: float | None = None
    """The measured target share, which plans call `critical`."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Times that a domain's windows are read before it is exhausted; None for no end. All its windows count, also where rounds select."""
    on_exhausted: Exhaustion = "repeat"
    """What then happens; `MixtureSettings` says it. `cap` is `renormalise`, foreseen in the shares."""

    @classmethod
    def read(cls, mixture: Manifest) -> DomainMixture:
        """Return what a domain_mixture artifact says."""
        found = json.loads(mixture.file("mixture.json").read_text(encoding="utf-8"))
        known = {name: found[name] for name in ("shares", "role_shares", "ratio") if name in found}
        return cls(**known, **found.get("limits", {}))

    @classmethod
    def of(cls, shares: Mapping[str, float] | DomainMixture) -> DomainMixture:
        """Return `shares` as a mixture without limits, or as it is."""
        return shares if isinstance(shares, DomainMixture) else cls(shares=dict(shares))

    def course(self, phase: PhaseMixture, length: float) -> Course:
        """Return the shares of `phase`, which has `length` sequences, or tokens.

        Raises:
            GristmillError: it has a target share, and the run no roles or no measured ratio.
            EmptyInput: a role that it reads has no domain.
        """
        wanted = phase.target_share
        if wanted is not None:
            ends = (wanted.start, wanted.end) if isinstance(wanted, Ramp) else (wanted, wanted)
            return self._course(self.role_shares, *(self._target_share(end) for end in ends), length)
        shares = self.shares if phase.mixture is None else phase.mixture
        of_target = self.role_shares.get("target", {})
        by_role = {
            "general": {d: s for d, s in shares.items() if d not in of_target},
            "target": {d: shares[d] for d in of_target if d in shares},
        }
        general, target = (sum(by_role[role].values()) for role in ("general", "target"))
        return self._course(by_role, *[target / ((general + target) or 1.0)] * 2, length)

    @staticmethod
    def _course(by_role: Mapping[str, Mapping[str, float]], start: float, end: float, length: float) -> Course:
        rows = []
        for role, read in (("general", min(start, end) < 1), ("target", max(start, end) > 0)):
            found = {domain: share for domain, share in by_role.get(role, {}).items() if share > 0}
            if read and not found:
                raise EmptyInput(f"no {role} domain for a target share from {start:g} to {end:g}; select passages of one")
            rows += [(domain, share / sum(found.values()), role == "target") for domain, share in found.items() if read]
        domains, weights, of_target = zip(*sorted(rows), strict=True)
        return Course(domains, np.asarray(weights), np.asarray(of_target), start, end, length)

    def _target_share(self, share: TargetShare) -> float:
        if not self.role_shares or (share == "critical" and self.ratio is None):
            raise GristmillError(
                f"target_share {share} belongs to the plan of a run on a domain mixture with a measured ratio, and this run has none; "
                "leave it out of this phase"
            )
        return float(self.ratio if share == "critical" else share)


class _Reading(NamedTuple):
    """How a domain is read: window `positions - first` of `stream`."""

    stream: WindowStream
    first: int = 0


class DataOrder:
    """The sequences of a run."""

    def __init__(self, plan: Plan, shares: Mapping[str, float] | DomainMixture, pools: Mapping[str, PassagePool]) -> None:
        """Lay the run out.

        Args:
            shares: of each domain, where a phase has no mixture of its own; or all that a domain mixture says.
            pools: the passages of each domain.

        Raises:
            EmptyInput: a domain with a share has no passage, or too few for one window.
            GristmillError: a phase has a target share, and `shares` know no roles.
        """
        settings = plan.settings
        self._plan, self.mixture = plan, DomainMixture.of(shares)
        lengths = [steps * settings.batch_sequences for steps in plan.phase_steps]
        self._courses = [self.mixture.course(*one) for one in zip(settings.phases, lengths, strict=True)]
        self.domains = sorted({domain for course in self._courses for domain in course.domains})
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
        """Return the share of each domain in `phase`, on average where they move; they sum to 1. Limits are not regarded."""
        return self._courses[phase].shares

    @cached_property
    def num_spares(self) -> int:
        """Batches behind the planned ones."""
        guards = self._plan.settings.guards
        return guards.max_events * guards.replaced_batches if guards.rewinds else 0

    @cached_property
    def limits(self) -> np.ndarray:
        """Windows of each domain that are `max_epochs` epochs, rounded down: float64 (n,), infinity where there is no limit."""
        per_epoch = np.asarray([stream.windows_per_epoch for stream in self.streams], dtype=np.float64)
        epochs = self.mixture.max_epochs
        return np.full(len(per_epoch), np.inf) if epochs is None else np.floor(epochs * per_epoch + 1e-9)

    @property
    def assignment(self) -> np.ndarray:
        """Domain (index into `domains`) of each sequence, int16 of shape (S,), spares included.

        Each phase begins anew: a domain without a share in it is not read in it.
        """
        return self._laid_out[0]

    @cached_property
    def _laid_out(self) -> tuple[np.ndarray, int]:
        """Return the domain of each sequence, and how many there are until nothing is left to read; behind them limits are passed."""
        size, left = self._plan.settings.batch_sequences, self._plan.num_steps
        parts: list[np.ndarray] = []
        read, ends = np.zeros(len(self.domains)), []
        for course, steps in zip(self._courses, self._plan.phase_steps, strict=True):
            taken = min(steps, left)
            left -= taken
            count = (taken + (0 if left else self.num_spares)) * size
            part, lasted = self._assigned(course, count, np.maximum(self._bounds - read, 0.0))
            ends += [sum(map(len, parts)) + lasted] if lasted < count else []
            parts.append(part)
            read += np.bincount(part, minlength=len(self.domains))
            if not left:
                break
        assignment = np.concatenate(parts)
        return assignment, min(ends, default=len(assignment))

    @property
    def _bounds(self) -> np.ndarray:
        """What the sampler does not pass: the limits, where a domain's share then goes to others."""
        return self.limits if self.mixture.on_exhausted in ("renormalise", "cap") else np.full(len(self.domains), np.inf)

    def _assigned(self, course: Course, count: int, left: np.ndarray) -> tuple[np.ndarray, int]:
        from pipelines.stream_kernels import assigned, flow

        places = np.asarray([self.domains.index(domain) for domain in course.domains], dtype=np.int16)
        limited = flow(course, left[places])
        lasted = int(min(count, limited.end))
        beyond = flow(course, np.full(len(places), np.inf))
        return places[np.concatenate([assigned(limited, lasted), assigned(beyond, count - lasted)])], lasted

    @cached_property
    def num_steps(self) -> int:
        """Steps that there is something to read for: those of the plan, or fewer where `on_exhausted` ends the run before.

        It ends before the step in which a domain would be read beyond its limit where that is to `stop` it; else before the step in
        which every domain of the phase is exhausted. (Spare batches, which take the place of others, may pass the limits.)

        Raises:
            EmptyInput: that is the first step.
        """
        assignment, ends = self._laid_out
        if self.mixture.on_exhausted == "stop":
            ends = min((int(p[int(n)]) for p, n in zip(self._places, self.limits, strict=True) if n < len(p)), default=len(assignment))
        if steps := min(self._plan.num_steps, ends // self._plan.settings.batch_sequences):
            return steps
        raise EmptyInput(f"max_epochs {self.mixture.max_epochs} of the selected passages do not fill one step; raise it, or select more")

    def ended_by(self) -> list[str]:
        """Return the domains whose limits end the run before its plan: those that the next step would read beyond them."""
        if self.num_steps == self._plan.num_steps:
            return []
        after = self.assignment[: (self.num_steps + 1) * self._plan.settings.batch_sequences]
        return [d for d, n, limit in zip(self.domains, self._counts(after), self.limits, strict=True) if n > limit]

    @property
    def _places(self) -> list[np.ndarray]:
        """The sequences of each domain, rising."""
        return [np.flatnonzero(self.assignment == domain) for domain in range(len(self.domains))]

    @cached_property
    def positions(self) -> np.ndarray:
        """Window number of each sequence within its domain's stream, int64 of shape (S,); phases go on where the last one stopped."""
        out = np.empty(len(self.assignment), dtype=np.int64)
        for mine in self._places:
            out[mine] = np.arange(len(mine))
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
        counts = self._counts(self.assignment[one.first * size : one.stop * size])
        readings = zip(self.domains, counts, self._readings_of(number), strict=True)
        return {d: count / stream.windows_per_epoch for d, count, (stream, _) in readings if d in self.selected[number]}

    def epochs(self) -> dict[str, float]:
        """Return, by domain, how many times the planned steps read its passages."""
        counts = zip(self.domains, self._counts(self._planned), self.streams, strict=True)
        return {domain: count / stream.windows_per_epoch for domain, count, stream in counts}

    def token_shares(self) -> dict[str, float]:
        """Return the share of the planned tokens that each domain gets."""
        return {d: count / len(self._planned) for d, count in zip(self.domains, self._counts(self._planned), strict=True)}

    @property
    def _planned(self) -> np.ndarray:
        return self.assignment[: self._plan.num_steps * self._plan.settings.batch_sequences]

    def _counts(self, assignment: np.ndarray) -> list[int]:
        return np.bincount(assignment, minlength=len(self.domains)).tolist()

    def target_share(self) -> float | None:
        """Return the share of the planned tokens that target domains get; None where roles are not known."""
        target = self.mixture.role_shares.get("target", {})
        return sum(share for domain, share in self.token_shares().items() if domain in target) if self.mixture.role_shares else None

    def exhausted(self) -> dict[str, int]:
        """Return, by domain that the plan reads `max_epochs` times, after how many tokens of the run it has done so."""
        found = {}
        for domain, mine, limit in zip(self.domains, self._places, self.limits, strict=True):
            if limit <= np.searchsorted(mine, len(self._planned)):
                found[domain] = (int(mine[int(limit) - 1]) + 1 if limit else 0) * self._plan.settings.sequence_length
        return found

    def table(self) -> list[dict[str, Json]]:
        """Return, by domain, its share of the tokens, how often its passages are read, and after how many tokens it was exhausted."""
        epochs, shares, exhausted = self.epochs(), self.token_shares(), self.exhausted()
        found = {d: {"share": round(shares[d], 4), "epochs": round(epochs[d], 3)} for d in self.domains}
        at = {d: {"exhausted_at_tokens": exhausted.get(d)} for d in self.domains if self.mixture.max_epochs is not None}
        return [{"domain": d, **found[d], **at.get(d, {})} for d in self.domains]


def first_windows(pools: Mapping[str, PassagePool], sequence_length: int, num_windows: int) -> dict[str, np.ndarray]:
    """Return at most `num_windows` windows of each pool that fills one, int64 of shape (n, T + 1)."""
    found = {}
    for domain, pool in sorted(pools.items()):
        if pool.num_tokens > sequence_length:
            stream = WindowStream(pool, sequence_length, 0, name=domain)
            found[domain] = stream.windows(np.arange(min(num_windows, stream.windows_per_epoch)))
    return found


def assign_sequences(shares: Mapping[str, float], num_sequences: int) -> np.ndarray:
    """Return the domain (index into sorted `shares`) of each sequence, int16 of shape ``(num_sequences,)``; shares stand still."""
    from pipelines.stream_kernels import assigned, flow

    course = DomainMixture(shares=dict(shares)).course(PhaseMixture(tokens=1), num_sequences)
    places = np.asarray([sorted(shares).index(domain) for domain in course.domains], dtype=np.int16)
    return places[assigned(flow(course, np.full(len(places), np.inf)), num_sequences)]
