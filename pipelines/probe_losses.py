"""What the probes measured: the change of loss of every held-out window along training, paired with the base's loss of that window.

Windows differ among themselves by far more than a probe moves them, so every statistic is one of the differences.

Shapes: N runs, A points of training, W windows (Wg of the general corpus).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines.errors import GristmillError
from pipelines.manifests import Manifest, Member
from pipelines.plugins import Settings
from pipelines.shares import role_tokens

SAME_TOKENS = 1.02
"""Points of training no further apart than this factor are one: runs of other lengths end on other whole steps."""


class Tolerance(Settings):
    """How much the general loss may rise, in one of three units."""

    nats: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Nats per token (the CMR paper's epsilon, 2407.17467, section 5.1, is 0.05)."""
    percent: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Percent of the base's general loss (the D-CPT paper, 2406.01375, allows 3 in its first use of the law)."""
    bits_per_byte: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Bits per byte of text, which does not depend on the tokenizer."""

    @model_validator(mode="after")
    def _one_unit(self) -> Tolerance:
        given = {unit: value for unit, value in self.model_dump().items() if value is not None}
        if len(given) != 1:
            shown = ", ".join(f"{unit} {value:g}" for unit, value in given.items()) or "none"
            raise ValueError(f"a tolerance has exactly one of nats, percent and bits_per_byte (got {shown})")
        return self

    def in_nats(self, base_loss: float, bytes_per_token: float) -> float:
        """Return the tolerance in nats per token, where the base's general loss is `base_loss` nats per token."""
        if self.percent is not None:
            return self.percent / 100.0 * base_loss
        if self.bits_per_byte is not None:
            return self.bits_per_byte * math.log(2.0) * bytes_per_token
        return float(self.nats or 0.0)


@dataclass(frozen=True)
class Windows:
    """The held-out windows, as the base was measured on them; every array has one entry a window."""

    keys: tuple[tuple[str, str, int], ...]
    """Corpus, domain and number."""
    corpus: np.ndarray
    stratum: np.ndarray
    """int64: the number of its corpus and domain."""
    base: np.ndarray
    """float64: the base's loss, nats per token."""
    tokens: np.ndarray
    bytes: np.ndarray
    contaminated: np.ndarray | None
    """bool: it shares a long span with training text; None where nobody looked."""
    fingerprint: str
    base_fingerprint: str | None
    """Of the checkpoint that was measured."""

    def of(self, corpus: str) -> np.ndarray:
        """Return the places of the windows of `corpus`."""
        return np.nonzero(self.corpus == corpus)[0]

    def mean_loss(self, corpus: str) -> float:
        """Return the base's loss on `corpus`, nats per token."""
        return float(self.base[self.of(corpus)].mean())

    def bytes_per_token(self, corpus: str) -> float:
        """Return the bytes of text per token of `corpus`."""
        mine = self.of(corpus)
        return float(self.bytes[mine].sum() / self.tokens[mine].sum())


@dataclass(frozen=True)
class ProbeRun:
    """One probe."""

    name: str
    ratio: float
    seed: int
    stopped: str | None
    """Why it ended before its plan; its losses then end before the others'."""
    tokens: int
    """Tokens trained."""


@dataclass(frozen=True)
class ProbePoints:
    """The runs measured on all windows at one length of training."""

    tokens: int
    runs: tuple[ProbeRun, ...]
    general_NW: np.ndarray
    """Change of loss from the base, float64 (N, Wg)."""
    target_NW: np.ndarray
    stratum_W: np.ndarray
    """The domain of each general window."""

    @cached_property
    def ratios(self) -> np.ndarray:
        """Target share of each run, float64 (N,)."""
        return np.asarray([run.ratio for run in self.runs])

    @cached_property
    def general(self) -> np.ndarray:
        """Mean change of general loss of each run, float64 (N,)."""
        return self.general_NW.mean(axis=1)

    @cached_property
    def target(self) -> np.ndarray:
        """Mean change of target loss of each run, float64 (N,)."""
        return self.target_NW.mean(axis=1)

    @cached_property
    def errors(self) -> np.ndarray:
        """Standard error of `general`, float64 (N,); NaN of a single window."""
        return stratified_errors(self.general_NW, self.stratum_W)

    @cached_property
    def replayed(self) -> np.ndarray:
        """The distinct ratios below 1, sorted: without replay the general loss follows another regime."""
        return np.unique(self.ratios[self.ratios < 1.0])

    def levels(self) -> np.ndarray:
        """Return the change of general loss at each of `replayed`, over its seeds."""
        return np.asarray([self.general[self.ratios == ratio].mean() for ratio in self.replayed])


@dataclass(frozen=True)
class ProbeLosses:
    """All probes, by ratio, seed and name."""

    windows: Windows
    runs: tuple[ProbeRun, ...]
    tokens_A: np.ndarray
    """float64, increasing."""
    deltas_NAW: np.ndarray
    """Change of loss from the base, nats per token; NaN where a window was not measured."""

    @cached_property
    def ratios(self) -> np.ndarray:
        """Target share of each run, float64 (N,)."""
        return np.asarray([run.ratio for run in self.runs])

    @cached_property
    def full(self) -> np.ndarray:
        """Whether a run was measured on all windows, bool (N, A): only such points bear an estimate."""
        return np.isfinite(self.deltas_NAW).all(axis=2)

    def course(self, run: int, corpus: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and mean change of loss on `corpus` along one run, the points on part of the windows included."""
        mine = self.deltas_NAW[run][:, self.windows.of(corpus)]
        known = np.isfinite(mine)
        reached = known.any(axis=1)
        return self.tokens_A[reached], np.where(known, mine, 0.0)[reached].sum(axis=1) / known[reached].sum(axis=1)

    def has(self, tokens: float) -> bool:
        """Return whether there is a point at `tokens`."""
        return any(_same(point, tokens) for point in self.tokens_A)

    def place(self, tokens: float) -> int:
        """Return the number of the point at `tokens`.

        Raises:
            GristmillError: there is none.
        """
        if not self.has(tokens):
            raise GristmillError(f"no probe was measured at {tokens:,.0f} tokens, but at {', '.join(f'{t:,.0f}' for t in self.tokens_A)}")
        return int(np.argmin(np.abs(np.log(self.tokens_A / tokens))))

    def at(self, tokens: float) -> ProbePoints:
        """Return the runs that were measured on all windows at the point `tokens`."""
        place = self.place(tokens)
        here = np.nonzero(self.full[:, place])[0]
        general, target = self.windows.of("general"), self.windows.of("target")
        found = self.deltas_NAW[here, place]
        return ProbePoints(
            int(self.tokens_A[place]), tuple(self.runs[n] for n in here), found[:, general], found[:, target], self.windows.stratum[general]
        )

    def including(self, tokens: float) -> ProbeLosses:
        """Return these losses with a point at `tokens`: where a run has none there, between its two next ones, linear in log tokens."""
        if self.has(tokens):
            return self
        column_NW = np.full((len(self.runs), 1, len(self.windows.keys)), np.nan)
        for run, full in enumerate(self.full):
            before, after = np.nonzero(full & (self.tokens_A < tokens))[0], np.nonzero(full & (self.tokens_A > tokens))[0]
            if not len(before) or not len(after):
                continue
            near, far = before[-1], after[0]
            weight = math.log(tokens / self.tokens_A[near]) / math.log(self.tokens_A[far] / self.tokens_A[near])
            column_NW[run, 0] = (1.0 - weight) * self.deltas_NAW[run, near] + weight * self.deltas_NAW[run, far]
        at = int(np.searchsorted(self.tokens_A, tokens))
        return replace(
            self,
            tokens_A=np.insert(self.tokens_A, at, tokens),
            deltas_NAW=np.concatenate([self.deltas_NAW[:, :at], column_NW, self.deltas_NAW[:, at:]], axis=1),
        )


def read_probes(windows: Manifest, probes: tuple[Manifest, ...]) -> ProbeLosses:
    """Read the artifacts of the probes; their order does not matter.

    Raises:
        GristmillError: there is no probe, or one was measured on other windows or on no general or target window, or a loss is not finite.
    """
    if not probes:
        raise GristmillError("no probe to estimate the critical ratio from; give `mixture.ratios` three ratios below 1")
    held = _read_windows(windows)
    found = sorted(((read_run(probe), probe) for probe in probes), key=lambda pair: (pair[0].ratio, pair[0].seed, pair[0].name))
    rows = [_read_losses(probe, held) for _, probe in found]
    tokens_A = _points(np.concatenate([tokens for tokens, _, _ in rows]))
    deltas_NAW = np.full((len(found), len(tokens_A), len(held.keys)), np.nan)
    for run, (tokens, window, loss) in enumerate(rows):
        deltas_NAW[run, np.searchsorted(tokens_A, tokens), window] = loss - held.base[window]
    return ProbeLosses(held, tuple(run for run, _ in found), tokens_A, deltas_NAW)


def available_tokens(selection: tuple[Member, ...]) -> dict[str, int]:
    """Return the selected tokens of each role."""
    return {role: sum(tokens.values()) for role, tokens in role_tokens(selection).items()}


def stratified_errors(deltas_NW: np.ndarray, stratum_W: np.ndarray) -> np.ndarray:
    """Return the standard errors of the means of `deltas_NW` over windows drawn within their strata, shape (N,); NaN of one window.

    A stratum of a single window is taken to vary about the mean of all.
    """
    total = deltas_NW.shape[1]
    if total < 2:
        return np.full(len(deltas_NW), np.nan)
    squares = np.zeros(len(deltas_NW))
    for stratum in np.unique(stratum_W):
        mine = deltas_NW[:, stratum_W == stratum]
        count = mine.shape[1]
        if count > 1:
            squares += count * mine.var(axis=1, ddof=1)
        else:
            squares += (mine[:, 0] - deltas_NW.mean(axis=1)) ** 2
    return np.sqrt(squares) / total


def _read_windows(windows: Manifest) -> Windows:
    table = pq.read_table(windows.file("windows.parquet"))
    corpus, domain = (table[name].to_pylist() for name in ("corpus", "domain"))
    if missing := {"general", "target"} - set(corpus):
        raise GristmillError(f"{windows.label} has no {sorted(missing)[0]} window; raise `mixture.windows`")
    keys = tuple(zip(corpus, domain, table["window"].to_pylist(), strict=True))
    strata = {pair: number for number, pair in enumerate(sorted(set(zip(corpus, domain, strict=True))))}
    references = windows.inputs.get("base", ())
    held = Windows(
        keys,
        np.asarray(corpus),
        np.asarray([strata[pair] for pair in zip(corpus, domain, strict=True)], dtype=np.int64),
        *(table[name].to_numpy().astype(np.float64) for name in ("loss", "tokens", "bytes")),
        np.asarray(table["contaminated"].to_pylist(), dtype=bool) if "contaminated" in table.column_names else None,
        windows.fingerprint,
        references[0].fingerprint if references else None,
    )
    if not np.isfinite(held.base).all():
        raise GristmillError(
            f"{windows.label} has {int((~np.isfinite(held.base)).sum())} windows without a finite loss; materialize it again"
        )
    return held


def read_run(probe: Manifest) -> ProbeRun:
    """Return which run a probe is, from its ``probe.json`` alone."""
    said: Mapping[str, object] = json.loads(probe.file("probe.json").read_text())
    stopped = said.get("stopped")
    return ProbeRun(
        str(said["probe"]),
        float(said["ratio"]),
        int(said["seed"]),
        str(stopped) if stopped else None,
        int(said["tokens"]),  # type: ignore[arg-type]
    )


def _read_losses(probe: Manifest, held: Windows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, places of windows and losses of a probe, one entry a measurement."""
    read = probe.inputs.get("windows", ())
    table = pq.read_table(probe.file("losses.parquet"), columns=["tokens", "corpus", "domain", "window", "loss"])
    places = {key: place for place, key in enumerate(held.keys)}
    keys = zip(*(table[name].to_pylist() for name in ("corpus", "domain", "window")), strict=True)
    window = np.asarray([places.get(key, -1) for key in keys], dtype=np.int64)
    if (window < 0).any() or (read and read[0].fingerprint != held.fingerprint):
        raise GristmillError(f"{probe.label} was not measured on the same windows as the base; materialize mixture_probe again for all")
    loss = table["loss"].to_numpy()
    if not len(loss) or not np.isfinite(loss).all():
        wrong = int((~np.isfinite(loss)).sum())
        raise GristmillError(f"{probe.label} has {wrong} losses of {len(loss)} that are not finite; materialize it again")
    return table["tokens"].to_numpy().astype(np.float64), window, loss


def _points(tokens: np.ndarray) -> np.ndarray:
    """Return the points of training, increasing: of those that are one, the last."""
    found: list[float] = []
    first = 0.0
    for value in np.unique(tokens).tolist():
        if found and _same(value, first):
            found[-1] = value
            continue
        found.append(value)
        first = value
    return np.asarray(found)


def _same(tokens: float, others: float) -> bool:
    return bool(max(tokens, others) <= SAME_TOKENS * min(tokens, others))
