"""The swarm: the mixtures that are trained on, what was measured of them, and the laws fitted to it.

Mixtures are drawn from Dirichlet distributions around the natural shares, at strengths spread over two orders of magnitude, so
that some lie near one corpus and some between all (RegMix, 2407.01492, section 3.1); 3 * (m + 1) of them for m corpora (Olmix,
2602.12237). As the question is how much target text the guarded corpora bear, the target's share is not left to chance: it
is spread evenly, and the draws are made within the roles.

Shapes: N probes, K corpora that shares are of, W held-out windows of a corpus, B draws of a bootstrap, M distinct mixtures.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Manifest
from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations

UNITS = 10_000
"""Shares are drawn in units of 1e-4."""
TEMPERATURE = 0.5
"""Natural shares are taken to this power, so that small corpora are seen (RegMix' released configuration)."""
STRENGTHS = (0.1, 5.0)
"""Of the Dirichlet distributions: multiples of the natural shares (RegMix, section 3.1)."""


def default_count(num_domains: int) -> int:
    """Return how many mixtures a swarm over `num_domains` corpora has: Olmix' least, 3 * (m + 1)."""
    return 3 * (num_domains + 1)


def draw_mixtures(
    natural: Mapping[str, float],
    *,
    count: int | None = None,
    seed: int = 0,
    targets: Collection[str] = (),
    target_range: tuple[float, float] = (0.1, 0.8),
    min_share: float = 0.02,
) -> list[dict[str, float]]:
    """Return mixtures over the domains of `natural`, their shares with four decimals that sum to 1, by the targets' share.

    Args:
        natural: Tokens, or shares, that the domains naturally have.
        count: Number of mixtures; 3 * (m + 1) where not given.
        seed: Of the draws.
        targets: The domains whose share in sum is spread evenly over `target_range`; none where all are alike.
        target_range: Lowest and highest share of the targets.
        min_share: Least share of every domain: a corpus without replay follows another regime.

    Raises:
        GristmillError: the floors leave no room, or a natural share is not positive.
    """
    if wrong := [name for name, share in natural.items() if not share > 0]:
        raise GristmillError(f"natural share {natural[wrong[0]]} of {wrong[0]}; every domain of a swarm needs a positive one")
    domains = sorted(natural)
    if unknown := sorted(set(targets) - set(domains)):
        raise UnknownName("target domain", unknown[0], domains)
    groups = [group for group in ([d for d in domains if d not in targets], [d for d in domains if d in targets]) if group]
    low, high = target_range if len(groups) == 2 else (0.0, 0.0)
    least = [min_share * len(group) for group in groups]
    if sum(least) > 1 or (len(groups) == 2 and not (least[1] <= low <= high <= 1.0 - least[0])):
        raise GristmillError(
            f"target shares from {low} to {high} with at least {min_share} of each of {len(domains)} domains: there is no room; "
            "lower `min_share` or narrow `target_range`"
        )
    number = default_count(len(domains)) if count is None else count
    generator = np.random.Generator(np.random.Philox(key=seed))
    totals = np.linspace(low, high, number) if number > 1 else np.asarray([(low + high) / 2])
    units_NK = _draw_units(generator, natural, domains, groups, totals, min_share)
    return [{domain: int(units) / UNITS for domain, units in zip(domains, row, strict=True)} for row in units_NK]


def _draw_units(
    generator: np.random.Generator,
    natural: Mapping[str, float],
    domains: Sequence[str],
    groups: Sequence[Sequence[str]],
    totals: np.ndarray,
    min_share: float,
) -> np.ndarray:
    """Return the shares in units, int64 of shape (count, m)."""
    found = np.zeros((len(totals), len(domains)))
    for place, group in enumerate(groups):
        prior = np.asarray([natural[name] for name in group]) ** TEMPERATURE
        strengths = generator.permutation(np.geomspace(*STRENGTHS, len(totals)))
        columns = [domains.index(name) for name in group]
        for row, (strength, target) in enumerate(zip(strengths, totals, strict=True)):
            total = target if place == 1 else 1.0 - target
            drawn = generator.dirichlet(strength * prior / prior.sum())
            found[row, columns] = min_share + (total - min_share * len(group)) * drawn
    return np.stack([_in_units(row) for row in found])


def _in_units(shares: np.ndarray, units: int = UNITS) -> np.ndarray:
    """Return `shares` in whole units that sum to `units`, by largest remainders."""
    exact = shares * units
    # an exact number of units may lie a rounding error below it
    whole = np.floor(exact + 1e-6).astype(np.int64)
    missing = units - int(whole.sum())
    order = np.argsort(-(exact - whole), kind="stable") if missing > 0 else np.argsort(exact - whole, kind="stable")
    whole[order[: abs(missing)]] += np.sign(missing)
    return whole


def rounded_shares(domains: Sequence[str], shares: np.ndarray) -> dict[str, float]:
    """Return `shares` with six decimals that sum to 1, without the domains of which nothing is left."""
    units = _in_units(np.asarray(shares), 1_000_000)
    return {name: int(part) / 1_000_000 for name, part in zip(domains, units, strict=True) if part > 0}


# What was measured


@dataclass(frozen=True)
class Swarm:
    """Probes measured on the same windows after the same tokens."""

    domains: tuple[str, ...]
    """The K corpora that shares are of."""
    shares_NK: np.ndarray
    probes: tuple[str, ...]
    seeds_N: np.ndarray
    mixture_N: np.ndarray
    """Number of each probe's mixture: probes of other seeds share it."""
    tokens: int
    """Of training, after which the losses were measured."""
    deltas: Mapping[str, np.ndarray]
    """By domain with windows, float64 (N, W): change of loss from the base, nats per token."""

    @property
    def num_mixtures(self) -> int:
        """Distinct mixtures, M."""
        return len(np.unique(self.mixture_N))

    def means(self, domain: str) -> np.ndarray:
        """Return the change of loss of `domain` by probe, shape (N,)."""
        return self.deltas[domain].mean(axis=1)

    def standard_errors(self, domain: str) -> np.ndarray:
        """Return the standard error over windows of `means`, shape (N,); NaN of a single window."""
        deltas = self.deltas[domain]
        if deltas.shape[1] < 2:
            return np.full(len(deltas), np.nan)
        return deltas.std(axis=1, ddof=1) / np.sqrt(deltas.shape[1])

    def over_seeds(self, values_N: np.ndarray) -> np.ndarray:
        """Return the mean of `values_N` by mixture, shape (M,)."""
        return np.asarray([values_N[self.mixture_N == number].mean() for number in range(self.num_mixtures)])

    def mixtures(self) -> np.ndarray:
        """Return the distinct mixtures, shape (M, K)."""
        return np.stack([self.shares_NK[self.mixture_N == number][0] for number in range(self.num_mixtures)])

    def observations(self, domain: str, chosen_N: np.ndarray) -> Observations:
        """Return what was measured of `domain` on the probes `chosen_N`, bool (N,)."""
        tokens = np.full(int(chosen_N.sum()), float(self.tokens))
        return Observations(self.shares_NK[chosen_N], tokens, self.means(domain)[chosen_N], self.domains.index(domain))


def read_swarm(probes: Sequence[Manifest], windows: Manifest, domains: Sequence[str]) -> Swarm:
    """Return what `probes` measured, by shares and seed; `domains` are those that shares are of.

    Raises:
        GristmillError: a probe has a share of another domain, or the probes were not measured alike.
    """
    base = pq.read_table(windows.file("windows.parquet"), columns=["domain", "window", "loss"]).sort_by("window")
    places = {domain: np.asarray([d == domain for d in base["domain"].to_pylist()]) for domain in domains}
    rows = sorted((_read_probe(probe, base, tuple(domains)) for probe in probes), key=lambda row: row[:3])
    lengths = sorted({tokens for *_, tokens, _ in rows})
    if len(lengths) != 1:
        raise GristmillError(
            f"probes were measured after {' and '.join(f'{n:,}' for n in lengths)} tokens; give all the same plan and points of measurement"
        )
    shares_NK = np.asarray([row[0] for row in rows])
    mixtures: dict[tuple[float, ...], int] = {}
    numbers = [mixtures.setdefault(tuple(np.round(row[0], 6)), len(mixtures)) for row in rows]
    changes = np.stack([row[-1] for row in rows])
    return Swarm(
        domains=tuple(domains),
        shares_NK=shares_NK,
        probes=tuple(row[2] for row in rows),
        seeds_N=np.asarray([row[1] for row in rows]),
        mixture_N=np.asarray(numbers),
        tokens=lengths[0],
        deltas={domain: changes[:, mine] for domain, mine in places.items() if mine.any()},
    )


def _read_probe(probe: Manifest, base: pa.Table, domains: tuple[str, ...]) -> tuple[tuple[float, ...], int, str, int, np.ndarray]:
    """Return shares, seed, name, tokens and the change of loss of every window of one probe."""
    about = json.loads(probe.file("probe.json").read_text())
    if unknown := sorted(set(about["shares"]) - set(domains)):
        raise GristmillError(
            f"{probe.label} was trained on {unknown[0]}, of which nothing is selected now; selected: {', '.join(domains)}; "
            "materialize the probes again"
        )
    table = pq.read_table(probe.file("losses.parquet"), columns=["tokens", "window", "loss"])
    tokens = int(table["tokens"].to_numpy().max())
    last = table.filter(table["tokens"].to_numpy() == tokens).sort_by("window")
    if not last["window"].equals(base["window"]):
        raise GristmillError(
            f"{probe.label} was measured on {len(last)} windows at its end, of {len(base)}; materialize the probe again with these windows"
        )
    total = sum(about["shares"].values())
    shares = tuple(about["shares"].get(domain, 0.0) / total for domain in domains)
    name = (probe.partition or "").partition("|")[2] or about["probe"]
    return shares, int(about["seed"]), name, tokens, last["loss"].to_numpy() - base["loss"].to_numpy()


# The laws fitted to it


@dataclass(frozen=True)
class DomainFit:
    """A law fitted to the change of loss of one corpus."""

    law: FittedLaw
    fitted_N: np.ndarray
    """bool: probes that it was fitted to."""
    left_out_N: np.ndarray
    """Predictions of each probe's mixture by the law fitted without it; NaN where the probe is not fitted."""
    measured_N: np.ndarray

    @property
    def loo_error(self) -> float:
        """Root mean squared error of the mixtures left out, nats per token."""
        return _root_mean_square((self.left_out_N - self.measured_N)[self.fitted_N])

    def rmse(self, shares_NK: np.ndarray, tokens: float) -> float:
        """Return the root mean squared error of the fit, nats per token."""
        return _root_mean_square(self.residuals(shares_NK, tokens))

    def residuals(self, shares_NK: np.ndarray, tokens: float) -> np.ndarray:
        """Return what the law leaves of the fitted probes."""
        mine = self.fitted_N
        return self.measured_N[mine] - self.law.predict(shares_NK[mine], np.full(int(mine.sum()), tokens))


def fit_domain(law: MixingLaw, swarm: Swarm, domain: str, *, with_own: bool) -> DomainFit:
    """Fit `law` to the change of loss of `domain`, and once more without each mixture.

    Probes without any of the corpus follow another regime: with `with_own` they are left out.
    """
    fitted_N = fitted_probes(swarm, domain, with_own=with_own)
    left_out_N = predict_left_out(law, swarm, domain, fitted_N, swarm.mixture_N)
    return DomainFit(law.fit(swarm.observations(domain, fitted_N)), fitted_N, left_out_N, swarm.means(domain))


def predict_left_out(law: MixingLaw, swarm: Swarm, domain: str, fitted_N: np.ndarray, fold_N: np.ndarray) -> np.ndarray:
    """Return predictions of each probe by the law fitted without its fold, shape (N,); NaN where `fitted_N` is False."""
    left_out_N = np.full(len(fitted_N), np.nan)
    for number in np.unique(fold_N[fitted_N]):
        mine = fitted_N & (fold_N == number)
        without = law.fit(swarm.observations(domain, fitted_N & ~mine))
        left_out_N[mine] = without.predict(swarm.shares_NK[mine], np.full(int(mine.sum()), float(swarm.tokens)))
    return left_out_N


def fold_error(law: MixingLaw, swarm: Swarm, domain: str, *, with_own: bool, folds: int) -> float:
    """Return the root mean squared error of `folds`-fold cross-validation over mixtures, nats per token."""
    fitted_N = fitted_probes(swarm, domain, with_own=with_own)
    left_out_N = predict_left_out(law, swarm, domain, fitted_N, swarm.mixture_N % folds)
    return _root_mean_square((left_out_N - swarm.means(domain))[fitted_N])


def fitted_probes(swarm: Swarm, domain: str, *, with_own: bool) -> np.ndarray:
    """Return which probes a law of `domain` is fitted to, bool (N,)."""
    own = swarm.shares_NK[:, swarm.domains.index(domain)]
    return own > 0 if with_own else np.ones(len(own), dtype=bool)


def bootstrap_fits(
    law: MixingLaw, swarm: Swarm, domain: str, fit: DomainFit, *, draws: int, generator: np.random.Generator
) -> list[FittedLaw]:
    """Return the law fitted to each of `draws` draws of windows and of the noise of runs.

    Every draw takes windows with replacement, the same for all probes, whose losses are paired. One run a mixture does not
    show how much another order of the data would change it; each draw adds to every probe a residual of the fit,
    drawn with replacement, at the size of ``r / sqrt(1 - h)``: the geometric mean of residual and left-out error.
    """
    mine, windows = fit.fitted_N, swarm.deltas[domain].shape[1]
    counts_BW = generator.multinomial(windows, np.full(windows, 1.0 / windows), size=draws) / windows
    means_BN = np.einsum("bw,nw->bn", counts_BW, swarm.deltas[domain][mine])
    residuals = fit.residuals(swarm.shares_NK, float(swarm.tokens))
    left_out = (fit.measured_N - fit.left_out_N)[mine]
    sizes = np.sqrt(np.abs(residuals * left_out)) * np.sign(residuals)
    noise_BN = (sizes - sizes.mean())[generator.integers(0, len(sizes), size=means_BN.shape)]
    return law.fit_many(swarm.observations(domain, mine), means_BN + noise_BN)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else float("nan")
