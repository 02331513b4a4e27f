"""The part of a recipe on the mixture: which probes are trained, how the ratio or the mixture is found, verified and used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.critical_ratio import RatioSettings, VerificationSettings
from pipelines.data_order import Exhaustion
from pipelines.errors import UnknownName
from pipelines.mixture_study import SearchSettings, VerifiedSearchSettings
from pipelines.plan import Phase
from pipelines.plugins import Settings
from pipelines.probing import SwarmSettings
from pipelines.swarm import default_count


class Search(SearchSettings):
    """A search over the shares of all domains, each guarded domain with its tolerance, in place of one ratio."""

    mixtures: int | None = Field(default=None, ge=1)
    """Mixtures that are probed; 3 * (m + 1) of m domains where absent (Olmix, 2602.12237)."""
    draw_seed: int = Field(default=0, ge=0)
    """Of the draws of the mixtures."""
    target_range: tuple[float, float] = (0.1, 0.8)
    """Lowest and highest target share that is probed."""


class Mixture(Settings):
    """How the critical ratio is measured and used."""

    ratios: tuple[float, ...] = ()
    """Target shares that are probed."""
    search: Search | None = None
    """Probe mixtures of all domains instead, and search for the best that holds every guard."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Data-order seeds of the probes."""
    phase: Phase
    """The plan of a probe; 0.3 of the pretraining's tokens are enough for three ratios."""
    measure_at: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0), min_length=1
    )
    """Shares of a probe after which it is measured, on a part of the windows each; at the last one on all."""
    windows: dict[Literal["general", "target"], Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: {"general": 640, "target": 160}
    )
    """Held-out windows per corpus; in a search, of each of its domains."""
    estimate: RatioSettings = RatioSettings()
    """The law, the tolerance and what to do on refusal; `tokens` is the length of the pretraining where absent."""
    stop_beyond: float | None = Field(default=3.0, gt=0)
    """A probe whose general loss lies this many tolerances off ends early; None trains all to the end."""
    verification_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the run that verifies the estimate. Where absent, those of the pretraining, so that nothing is extrapolated any more; for
    a search those of a probe, as its laws know no tokens."""
    on_unverified: Literal["refit", "lower", "error"] = "refit"
    """What a run at the estimate means that does not hold it: see `VerificationSettings`."""
    use: Literal["estimate", "safe"] = "estimate"
    """`safe` takes the lower end of the interval."""
    ratio: float | None = Field(default=None, ge=0, le=1)
    """A fixed target share instead of the measured one."""
    max_epochs: float = Field(default=4.0, gt=0)
    """Times that a domain is read before it counts as exhausted."""
    on_exhausted: Exhaustion = "repeat"
    """What happens then: see `MixtureSettings`."""

    @model_validator(mode="after")
    def _one_question(self) -> Mixture:
        if bool(self.ratios) == (self.search is not None):
            given = f"ratios {list(self.ratios)} and a search" if self.search else "neither ratios nor a search"
            raise ValueError(f"got {given}; give `ratios` to find one target share, or `search` to find the share of every domain")
        return self

    def probes(self, num_domains: int) -> tuple[str, ...]:
        """Return the names of the probes: ``r0.50-s0``, or ``m03-s0`` of a search over `num_domains`."""
        if self.search:
            mixtures = [f"m{number:02d}" for number in range(self.search.mixtures or default_count(num_domains))]
        else:
            mixtures = [f"r{ratio:.2f}" for ratio in self.ratios]
        return tuple(f"{mixture}-s{seed}" for mixture in mixtures for seed in self.seeds)

    def probe(self, name: str, roles: Mapping[str, str]) -> dict[str, object]:
        """Return what sets probe `name` apart: its seed, its mixture and where it may end; `roles` are those of the domains.

        Raises:
            UnknownName: the recipe has no such probe.
        """
        names = self.probes(len(roles))
        if name not in names:
            raise UnknownName("probe", name, names)
        mixture, seed = name[1:].split("-s")
        if self.search is None:
            return {"seed": int(seed), "ratio": float(mixture), "tolerance": self.estimate.tolerance, "stop_beyond": self.stop_beyond}
        targets = tuple(sorted(domain for domain, role in roles.items() if role == "target"))
        shape = {
            "seed": self.search.draw_seed,
            "targets": targets,
            "target_range": self.search.target_range,
            "min_share": self.search.min_share,
        }
        return {"seed": int(seed), "swarm": SwarmSettings(number=int(mixture), count=len(names) // len(self.seeds), **shape)}

    def length_of_verification(self, tokens: int) -> int:
        """Return the tokens of the run that verifies, for a pretraining of `tokens`."""
        return self.verification_tokens or (self.phase.tokens if self.search else tokens)

    @property
    def laws(self) -> tuple[str, ...]:
        """The plugins of `mixing_laws/` that are read."""
        if self.search is None:
            return self.estimate.laws
        return tuple(sorted({law for law in (self.search.law, self.search.cross_check) if law and law != "auto"}))

    def ratio_settings(self, tokens: int) -> RatioSettings:
        """Return how the critical ratio is estimated, for a pretraining of `tokens` where nothing else is asked for."""
        return self.estimate if self.estimate.tokens else self.estimate.model_copy(update={"tokens": tokens})

    def verified_settings(self, tokens: int) -> VerificationSettings:
        """Return how the estimate is verified."""
        return VerificationSettings(on_unverified=self.on_unverified, **dict(self.ratio_settings(tokens)))

    def search_settings(self, search: Search, tokens: int) -> SearchSettings:
        """Return how the mixture is searched for, for a pretraining of `tokens` where nothing else is asked for."""
        chosen = {name: getattr(search, name) for name in SearchSettings.model_fields}
        return SearchSettings(**chosen | {"tokens": search.tokens or tokens, "max_epochs": self.max_epochs})

    def verified_search(self, search: Search, tokens: int) -> VerifiedSearchSettings:
        """Return how the mixture that was found is verified."""
        return VerifiedSearchSettings(on_unverified=self.on_unverified, **dict(self.search_settings(search, tokens)))
