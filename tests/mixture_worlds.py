"""Worlds whose mixing laws are known, for tests of the search for a mixture: what a swarm of probes would measure in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipelines.mixing_laws import FittedLaw
from pipelines.mixture_study import SearchSettings, Study, ask, study_swarm
from pipelines.share_solver import Problem
from pipelines.swarm import Swarm, draw_mixtures

TOLERANCE = 0.05
TOKENS = 500_000
ROLES = {"book": "general", "code": "target", "law": "target", "wiki": "general"}
AVAILABLE = {"book": 4_000_000, "code": 3_000_000, "law": 1_000_000, "wiki": 2_000_000}
DOMAINS = tuple(ROLES)
TARGETS = ("code", "law")


def exponential(c: float, k: float, *t: float) -> FittedLaw:
    """Return ``c + k * exp(t . r)`` as the exponential law gives it."""
    slopes = np.asarray(t)
    parameters = {"c": c, "k": k, **{f"t_{j}": float(value) for j, value in enumerate(t)}}
    return FittedLaw(lambda shares, _tokens: c + k * np.exp(np.einsum("mk,k->m", shares, slopes)), parameters)


WORLD = {
    "book": exponential(-0.10, 0.07, -2.0, 1.6, 1.2, -0.3),
    "code": exponential(-2.4, 2.2, 0.1, -4.0, -0.5, 0.2),
    "law": exponential(-1.2, 1.1, 0.2, -0.3, -6.0, 0.1),
    "wiki": exponential(-0.11, 0.08, -0.2, 1.4, 1.8, -2.2),
}
"""Change of loss by shares of book, code, law, wiki: each general domain is forgotten where it and its like are not replayed."""


def swarm_of(
    world: Mapping[str, FittedLaw],
    mixtures: Sequence[Mapping[str, float]],
    *,
    seed: int = 0,
    windows: int = 160,
    noise: float = 0.02,
    run_noise: float = 0.0015,
    common: float = 0.05,
    seeds: Sequence[int] = (0,),
) -> Swarm:
    """Return what probes would measure in `world`: windows that differ in level alike for all probes, window noise, run noise."""
    random = np.random.default_rng(seed)
    domains = tuple(sorted(world))
    shares = np.repeat([[mixture.get(domain, 0.0) for domain in domains] for mixture in mixtures], len(seeds), axis=0)
    deltas = {}
    for domain, law in sorted(world.items()):
        means = law.predict(shares, np.full(len(shares), float(TOKENS))) + random.normal(0, run_noise, len(shares))
        levels = random.normal(0, common, windows)
        deltas[domain] = means[:, None] + levels * (1 + shares[:, :1]) + random.normal(0, noise, (len(shares), windows))
    names = tuple(f"m{number:02d}" for number in range(len(shares)))
    mixture_N = np.repeat(np.arange(len(mixtures)), len(seeds))
    return Swarm(domains, shares, names, np.asarray([*seeds] * len(mixtures)), mixture_N, TOKENS, deltas)


def drawn(count: int | None = None, seed: int = 0, **changes: object) -> list[dict[str, float]]:
    return draw_mixtures(AVAILABLE, **{"count": count, "seed": seed, "targets": TARGETS, **changes})


def studied(swarm: Swarm, roles: Mapping[str, str] = ROLES, available: Mapping[str, int] = AVAILABLE, **changes: object) -> Study:
    chosen = SearchSettings(**{"draws": 0, **changes})
    selected = {domain: (roles[domain], available[domain]) for domain in swarm.domains}
    return study_swarm(chosen, ask(chosen, selected, swarm), swarm)


def true_problem(study: Study, world: Mapping[str, FittedLaw] = WORLD) -> Problem:
    """Return what `study` asks, with the laws that the world follows."""
    return study.problem([world[domain] for domain in study.fits])


def codes(rows: Sequence[Mapping[str, str]]) -> set[str]:
    return {row["code"] for row in rows}


def own_share_world() -> dict[str, FittedLaw]:
    """Return losses that are no exponentials: Box-Cox in what is replayed (k -0.3), powers of 0.15 and 0.2 of what is learned."""

    def general(own: int, other: int) -> FittedLaw:
        def rise(shares: np.ndarray, _tokens: np.ndarray) -> np.ndarray:
            replayed = shares[:, own] + 0.5 * shares[:, other] + 0.01
            return TOLERANCE - 0.08 * (replayed**-0.3 - 0.37**-0.3) / -0.3

        return FittedLaw(rise, {})

    def target(own: int, other: int, gain: float, power: float) -> FittedLaw:
        return FittedLaw(lambda shares, _tokens: -gain * (shares[:, own] + 0.15 * shares[:, other] + 1e-3) ** power, {})

    return {"book": general(0, 3), "code": target(1, 2, 2.45, 0.15), "law": target(2, 1, 1.6, 0.2), "wiki": general(3, 0)}


def with_deltas(swarm: Swarm, domain: str, change: Callable[[np.ndarray], np.ndarray]) -> Swarm:
    return Swarm(**{**vars(swarm), "deltas": {**swarm.deltas, domain: change(swarm.deltas[domain])}})
