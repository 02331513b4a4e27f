"""The critical mixture ratio and the domain mixture.

The critical ratio is the largest share R of target tokens at which the general loss, after T tokens of continued
pretraining, has risen by no more than the tolerance (2407.17467, definition 1). It is the root of a law fitted to the
losses of a few probes; its interval is a bootstrap over held-out windows and a jackknife over ratios. Where the probes
do not support an estimate the step refuses, with a code and a remedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import plugins
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Check, Manifest, Member, Outcome
from pipelines.mixing_laws import FittedLaw, MixingLaw
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.store import advisory

SHARE_GRID = 1001
MAX_DISAGREEMENT = 0.05
"""Two laws whose roots lie further apart than this are reported."""


class RatioSettings(Settings):
    """How the critical ratio is estimated."""

    tolerance_nats: float = 0.05
    """How much the general loss may rise, in nats per token (the CMR paper's epsilon, section 5.1)."""
    law: str = "own_share"
    """A plugin of `mixing_laws/`."""
    cross_check: str = "power"
    """A second law, fitted to the same points and reported beside the first."""
    draws: int = 500
    """Bootstrap draws over held-out windows."""
    seed: int = 0
    """Of the bootstrap."""
    max_interval: float = 0.3
    """A 95 % interval wider than this is refused."""
    on_refusal: Literal["error", "lower_bound", "manual"] = "lower_bound"
    """`error` stops; `lower_bound` takes the highest measured ratio that held the tolerance; `manual` takes `ratio`."""
    ratio: float | None = None
    """The ratio taken when `on_refusal` is `manual`."""


class MixtureSettings(Settings):
    """How the mixture is put together."""

    use: Literal["estimate", "safe"] = "estimate"
    """`safe` takes the lower end of the interval."""
    ratio: float | None = None
    """A fixed target share instead of the measured one."""
    tokens: int
    """Tokens of continued pretraining that the mixture is made for."""
    max_epochs: float = 4.0
    """A domain read more often than this is reported (Muennighoff et al. 2023, 2305.16264)."""


@dataclass(frozen=True)
class _Losses:
    """Final losses per window, paired over probes: ``general[probe]`` minus its base."""

    ratios: np.ndarray
    seeds: np.ndarray
    tokens: int
    general: np.ndarray
    """float64, shape (probes, windows): change of loss from the base."""
    target: np.ndarray
    trajectory: list[dict[str, float]]


def estimate_critical_ratio(settings: RatioSettings, out: Path, *, probes: tuple[Manifest, ...]) -> Outcome:
    """Fit the law to `probes` and write ``critical_ratio.json``: the ratio, its interval, the evidence, the refusals.

    Raises:
        GristmillError: the estimate is refused and `on_refusal` is ``error``, or no probe replays general text.
    """
    losses = _read_losses(probes)
    law: MixingLaw = plugins.build("mixing_laws", settings.law)  # type: ignore[assignment]
    general, target = losses.general.mean(axis=1), losses.target.mean(axis=1)
    estimate = _root(law, losses.ratios, general, settings.tolerance_nats)
    draws = _bootstrap(settings, law, losses)
    held = draws[np.isfinite(draws)]
    interval = (float(np.quantile(held, 0.025)), float(np.quantile(held, 0.975))) if len(held) >= settings.draws // 2 else None
    jackknife = _jackknife(settings, law, losses.ratios, general)
    check = _root(plugins.build("mixing_laws", settings.cross_check), losses.ratios, general, settings.tolerance_nats)  # type: ignore[arg-type]
    errors = _standard_errors(losses.general)
    refusals = _refusals(settings, losses.ratios, general, target, errors, estimate, interval)
    warnings = _warnings(settings, losses.ratios, general, estimate, check)
    ratio, decision = _decide(settings, losses.ratios, general, estimate, refusals)
    result = {
        "ratio": ratio,
        "decision": decision,
        "estimate": _number(estimate),
        "interval_95": list(interval) if interval else None,
        "safe": interval[0] if interval else ratio,
        "jackknife": jackknife,
        "cross_check": {"law": settings.cross_check, "estimate": _number(check)},
        "tolerance_nats": settings.tolerance_nats,
        "tokens": losses.tokens,
        "law": {"name": settings.law, **_fit(law, losses.ratios, general).parameters},
        "refusals": refusals,
        "warnings": warnings,
        "points": [
            {"ratio": float(r), "seed": int(s), "general_delta": float(g), "general_standard_error": _number(e), "target_delta": float(t)}
            for r, s, g, e, t in zip(losses.ratios, losses.seeds, general, errors, target, strict=True)
        ],
    }
    (out / "critical_ratio.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    _plot_ratio(out / "critical_ratio.png", settings, losses, general, errors, _fit(law, losses.ratios, general), ratio, interval)
    _plot_trajectories(out / "trajectories.png", losses.trajectory)
    metrics = {"ratio": ratio, "tolerance_nats": settings.tolerance_nats}
    if interval:
        metrics |= {"interval_low": interval[0], "interval_high": interval[1]}
    return Outcome(
        counts={"probes": len(losses.ratios), "general_windows": losses.general.shape[1], "target_windows": losses.target.shape[1]},
        metrics=metrics,
        tables={"probes": _rounded(result["points"]), "refusals": refusals, "warnings": warnings},
        plots=("critical_ratio.png", "trajectories.png"),
        details={"decision": decision},
    )


def mix_domains(settings: MixtureSettings, out: Path, *, critical_ratio: Manifest, selection: tuple[Member, ...]) -> Outcome:
    """Write ``mixture.json``: the share of tokens of each domain, and how many epochs of it the budget reads."""
    measured = json.loads(critical_ratio.file("critical_ratio.json").read_text())
    ratio = settings.ratio if settings.ratio is not None else measured["safe" if settings.use == "safe" else "ratio"]
    table = pa.concat_tables([pq.read_table(member.path, columns=["role", "domain", "tokens", "selected"]) for member in selection])
    chosen = table.filter(table["selected"]).group_by(["role", "domain"]).aggregate([("tokens", "sum")]).to_pylist()
    totals = {role: sum(row["tokens_sum"] for row in chosen if row["role"] == role) for role in ("general", "target")}
    weights = {"general": 1.0 - ratio, "target": ratio}
    empty = [role for role, weight in weights.items() if weight > 0 and not totals[role]]
    if empty:
        raise EmptyInput(
            f"no selected {empty[0]} passage for a mixture with target share {ratio:.3f}; loosen its filters or raise its budget"
        )
    rows = []
    for row in sorted(chosen, key=lambda r: (r["role"], r["domain"])):
        share = weights[row["role"]] * row["tokens_sum"] / totals[row["role"]]
        epochs = share * settings.tokens / row["tokens_sum"]
        rows.append(
            {
                "domain": row["domain"],
                "role": row["role"],
                "share": share,
                "available_tokens": row["tokens_sum"],
                "planned_tokens": round(share * settings.tokens),
                "epochs": epochs,
            }
        )
    repeated = [row["domain"] for row in rows if row["epochs"] > settings.max_epochs]
    shares = {row["domain"]: row["share"] for row in rows if row["share"] > 0}
    mixture = {"ratio": ratio, "shares": shares, "tokens": settings.tokens, "domains": rows, "repeated": repeated}
    (out / "mixture.json").write_text(json.dumps(mixture, indent=1, sort_keys=True) + "\n")
    _plot_shares(out / "mixture.png", rows)
    return Outcome(
        counts={"domains": len(rows), "tokens": settings.tokens},
        metrics={"target_share": ratio, "max_epochs": max(row["epochs"] for row in rows)},
        tables={"domains": _rounded(rows)},
        plots=("mixture.png",),
        details={"repeated": repeated},
    )


def _read_losses(probes: tuple[Manifest, ...]) -> _Losses:
    table = pa.concat_tables([pq.read_table(m.file("losses.parquet")) for m in probes])
    rows = table.sort_by(
        [("ratio", "ascending"), ("seed", "ascending"), ("corpus", "ascending"), ("tokens", "ascending"), ("window", "ascending")]
    )
    frame = {name: rows[name].to_numpy() for name in ("ratio", "seed", "tokens", "loss")}
    corpus = np.asarray(rows["corpus"].to_pylist())
    last = int(frame["tokens"].max())
    runs = sorted(set(zip(frame["ratio"].tolist(), frame["seed"].tolist(), strict=True)))
    if all(ratio >= 1.0 for ratio, _ in runs):
        raise GristmillError(
            "no probe has a target share below 1; the law is fitted over replay, so add three ratios below 1 to `mixture.ratios`"
        )
    deltas: dict[str, list[np.ndarray]] = {"general": [], "target": []}
    trajectory = []
    for ratio, seed in runs:
        mine = (frame["ratio"] == ratio) & (frame["seed"] == seed)
        for name, found in deltas.items():
            base = frame["loss"][mine & (corpus == name) & (frame["tokens"] == 0)]
            for tokens in np.unique(frame["tokens"][mine]):
                delta = frame["loss"][mine & (corpus == name) & (frame["tokens"] == tokens)] - base
                trajectory.append({"ratio": ratio, "seed": seed, "tokens": int(tokens), "corpus": name, "delta": float(delta.mean())})
                if tokens == last:
                    found.append(delta)
    if any(len(found) != len(runs) or len({len(delta) for delta in found}) != 1 for found in deltas.values()):
        raise GristmillError(
            "the probes were not measured on the same windows or at the same tokens; materialize mixture_probe for all of them again"
        )
    return _Losses(
        np.asarray([r for r, _ in runs]),
        np.asarray([s for _, s in runs]),
        last,
        np.stack(deltas["general"]),
        np.stack(deltas["target"]),
        trajectory,
    )


def _fit(law: MixingLaw, ratios: np.ndarray, deltas: np.ndarray) -> FittedLaw:
    """Fit over the general share; a run without replay (R = 1) follows another regime and is left out by construction."""
    mask = ratios < 1.0
    return law.fit(1.0 - ratios[mask], deltas[mask])


def _root(law: MixingLaw, ratios: np.ndarray, deltas: np.ndarray, tolerance: float) -> float:
    """Return the largest R in [0, 1] whose fitted general loss rises by at most `tolerance`; NaN where it never does."""
    from scipy.optimize import brentq

    fitted = _fit(law, ratios, deltas)
    grid = np.linspace(0.0, 1.0, SHARE_GRID)
    held = fitted.predict(1.0 - grid) <= tolerance
    if held.all():
        return 1.0
    if not held.any():
        return float("nan")
    last = int(np.nonzero(held)[0][-1])
    if last == SHARE_GRID - 1:
        return 1.0
    return float(brentq(lambda r: float(fitted.predict(np.asarray(1.0 - r))) - tolerance, grid[last], grid[last + 1]))


def _bootstrap(settings: RatioSettings, law: MixingLaw, losses: _Losses) -> np.ndarray:
    """Return the estimate for each draw of held-out windows (the same windows for every probe: losses are paired)."""
    generator = np.random.Generator(np.random.Philox(key=settings.seed))
    windows = losses.general.shape[1]
    out = np.empty(settings.draws)
    for draw in range(settings.draws):
        chosen = generator.integers(0, windows, windows)
        out[draw] = _root(law, losses.ratios, losses.general[:, chosen].mean(axis=1), settings.tolerance_nats)
    return out


def _jackknife(settings: RatioSettings, law: MixingLaw, ratios: np.ndarray, deltas: np.ndarray) -> list[dict[str, float | None]]:
    """Return the estimate with each ratio left out, where enough others remain."""
    distinct = np.unique(ratios[ratios < 1.0])
    if len(distinct) < 4:
        return []
    return [
        {"without": float(r), "estimate": _number(_root(law, ratios[ratios != r], deltas[ratios != r], settings.tolerance_nats))}
        for r in distinct
    ]


def _standard_errors(deltas: np.ndarray) -> np.ndarray:
    if deltas.shape[1] < 2:
        return np.full(len(deltas), np.nan)
    return deltas.std(axis=1, ddof=1) / np.sqrt(deltas.shape[1])


def _refusals(
    settings: RatioSettings,
    ratios: np.ndarray,
    general: np.ndarray,
    target: np.ndarray,
    errors: np.ndarray,
    estimate: float,
    interval: tuple[float, float] | None,
) -> list[dict[str, str]]:
    """Return why the estimate is not to be trusted: a code, what was seen, and what would cure it."""
    tolerance, found = settings.tolerance_nats, []

    def refuse(code: str, seen: str, remedy: str) -> None:
        found.append({"code": code, "seen": seen, "remedy": remedy})

    inside = ratios < 1.0
    if len(np.unique(ratios[inside])) < 3:
        refuse(
            "too_few_ratios",
            f"{len(np.unique(ratios[inside]))} distinct ratios below 1",
            "add ratios to `mixture.ratios`; three is the least",
        )
    if (general[inside] <= tolerance).all():
        refuse(
            "not_bracketed",
            f"every ratio up to {ratios[inside].max():.2f} holds the tolerance",
            "add a higher ratio, or lower the tolerance",
        )
    if (general[inside] > tolerance).all() or not np.isfinite(estimate):
        refuse(
            "not_bracketed",
            f"no ratio down to {ratios[inside].min():.2f} holds the tolerance",
            "add a lower ratio, or train the base longer",
        )
    nearest = int(np.argmin(np.abs(ratios - (estimate if np.isfinite(estimate) else ratios.mean()))))
    if not errors[nearest] <= tolerance / 5:
        wanted = f"{np.ceil((errors[nearest] / (tolerance / 5)) ** 2):.0f}x as many" if np.isfinite(errors[nearest]) else "two or more"
        refuse(
            "noisy_evaluation",
            f"standard error {errors[nearest]:.4f} nats at R = {ratios[nearest]:.2f}",
            f"measure {wanted} held-out windows",
        )
    levels = [general[ratios == ratio].mean() for ratio in np.unique(ratios[inside])]  # over seeds, which differ by data order
    spread = [np.sqrt((errors[ratios == ratio] ** 2).sum()) / (ratios == ratio).sum() for ratio in np.unique(ratios[inside])]
    if (np.diff(levels) < -2 * np.hypot(spread[1:], spread[:-1])).any():
        refuse(
            "non_monotone", "the general loss falls with the target share beyond two standard errors", "measure more windows, or more seeds"
        )
    if (target[ratios > 0] >= 0).any():
        refuse(
            "target_not_learned",
            "the target loss did not fall at every ratio above 0",
            "train the probes longer, or raise their learning rate",
        )
    if interval is None or interval[1] - interval[0] > settings.max_interval:
        width = "not bounded" if interval is None else f"{interval[1] - interval[0]:.2f} wide"
        refuse("wide_interval", f"the 95 % interval is {width}", "measure more held-out windows, or add ratios near the estimate")
    return found


def _warnings(settings: RatioSettings, ratios: np.ndarray, general: np.ndarray, estimate: float, check: float) -> list[dict[str, str]]:
    """Return what a reader of the estimate is to know, in the form of a refusal; the estimate stands."""
    found = []
    lowest = general[ratios == ratios.min()].mean()
    if lowest < -settings.tolerance_nats:
        found.append(
            {
                "code": "base_unconverged",
                "seen": f"general loss {lowest:+.3f} nats at R = {ratios.min():.2f}: the base still improves on general text",
                "remedy": "the ratio depends on its spare learning; train the base longer",
            }
        )
    if np.isfinite(estimate) != np.isfinite(check) or abs(estimate - check) > MAX_DISAGREEMENT:
        found.append(
            {
                "code": "cross_check_disagrees",
                "seen": f"{settings.law} says {estimate:.3f}, {settings.cross_check} says {check:.3f}",
                "remedy": "add ratios near the estimate, where the laws differ",
            }
        )
    return found


def _decide(
    settings: RatioSettings, ratios: np.ndarray, general: np.ndarray, estimate: float, refusals: list[dict[str, str]]
) -> tuple[float, str]:
    if not refusals:
        return float(estimate), "estimate"
    reasons = "; ".join(f"{r['code']}: {r['seen']} ({r['remedy']})" for r in refusals)
    if settings.on_refusal == "manual" and settings.ratio is not None:
        return settings.ratio, "manual"
    held = ratios[(general <= settings.tolerance_nats) & (ratios < 1.0)]
    if settings.on_refusal == "lower_bound" and len(held):
        return float(held.max()), "lower_bound"
    raise GristmillError(f"the critical ratio is refused: {reasons}; or set `mixture.on_refusal: manual` with a `ratio`")


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rounded(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def _plot_ratio(
    path: Path,
    settings: RatioSettings,
    losses: _Losses,
    general: np.ndarray,
    errors: np.ndarray,
    fitted: FittedLaw,
    ratio: float,
    interval: tuple[float, float] | None,
) -> None:
    figure, axes = new_figure()
    grid = np.linspace(0.0, min(1.0, losses.ratios.max() + 0.1), 200)
    axes.plot(grid, fitted.predict(1.0 - grid), color="tab:blue", label="law")
    axes.errorbar(losses.ratios, general, yerr=1.96 * errors, fmt="o", color="tab:blue", markersize=4, label="probes")
    axes.axhline(settings.tolerance_nats, color="tab:red", linewidth=1, linestyle="--", label="tolerance")
    axes.axvline(ratio, color="tab:green", linewidth=1.2, label=f"critical ratio {ratio:.3f}")
    if interval:
        axes.axvspan(*interval, color="tab:green", alpha=0.15)
    axes.set(xlabel="share of target tokens R", ylabel="change of general loss, nats", title=f"after {losses.tokens:,} tokens")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _plot_trajectories(path: Path, trajectory: list[dict[str, float]]) -> None:
    figure, axes = new_figure()
    for ratio, seed in sorted({(row["ratio"], row["seed"]) for row in trajectory}):
        points: Mapping[str, list[float]] = {
            corpus: [row["delta"] for row in trajectory if (row["ratio"], row["seed"], row["corpus"]) == (ratio, seed, corpus)]
            for corpus in ("target", "general")
        }
        axes.plot(points["target"], points["general"], marker="o", markersize=3, label=f"R = {ratio:.2f}")
    axes.set(xlabel="change of target loss, nats", ylabel="change of general loss, nats")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _plot_shares(path: Path, rows: list[dict[str, object]]) -> None:
    figure, axes = new_figure(height=0.8 + 0.3 * len(rows))
    colours = {"general": "tab:blue", "target": "tab:orange"}
    axes.barh([str(r["domain"]) for r in rows], [r["share"] for r in rows], color=[colours[str(r["role"])] for r in rows])
    axes.set(xlabel="share of tokens (general blue, target orange)")
    save_figure(figure, path)


def ratio_inside_interval(draft: Manifest) -> Check:
    """The ratio lies inside its interval, or a refusal with its reason stands beside it."""
    result = json.loads((draft.directory / "critical_ratio.json").read_text())
    interval = result["interval_95"]
    inside = bool(interval) and interval[0] <= result["ratio"] <= interval[1]
    codes = ", ".join(refusal["code"] for refusal in result["refusals"])
    bounds = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
    description = f"{result['decision']} {result['ratio']:.3f}, {bounds}" + (f", refused: {codes}" if codes else "")
    return Check(name="ratio_inside_interval", passed=(result["decision"] == "estimate" and inside) or bool(codes), description=description)


@advisory
def estimate_not_refused(draft: Manifest) -> Check:
    """The ratio is the law's estimate, not a fallback."""
    result = json.loads((draft.directory / "critical_ratio.json").read_text())
    reasons = "; ".join(f"{r['code']}: {r['seen']}; {r['remedy']}" for r in result["refusals"])
    return Check(name="estimate_not_refused", passed=not result["refusals"], description=reasons or "no refusal")


def shares_sum_to_one(draft: Manifest) -> Check:
    """The shares are positive and sum to 1 within 1e-9."""
    shares = json.loads((draft.directory / "mixture.json").read_text())["shares"].values()
    return Check(
        name="shares_sum_to_one",
        passed=abs(sum(shares) - 1.0) < 1e-9 and min(shares) > 0,
        description=f"{len(shares)} shares sum to {sum(shares):.9f}",
    )


@advisory
def within_max_epochs(draft: Manifest) -> Check:
    """No domain is read more often than `max_epochs`."""
    repeated = json.loads((draft.directory / "mixture.json").read_text())["repeated"]
    return Check(name="within_max_epochs", passed=not repeated, description=f"read too often: {', '.join(repeated) or 'none'}")


RATIO_AUDITS = (ratio_inside_interval, estimate_not_refused)
MIXTURE_AUDITS = (shares_sum_to_one, within_max_epochs)
