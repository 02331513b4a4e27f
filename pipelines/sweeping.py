"""Sweeping: what every rule costs, and what it would cost at other thresholds, from the scores alone.

For each domain and rule the threshold runs over quantiles of the domain's scores while every other rule stays as the recipe has
it. What is kept is counted in documents, characters and tokens: one pass over numbers, no text is read and nothing is decided.
A rule that the recipe has switched off in a domain is swept too: the curve says what switching it on would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import row_count, split_partition, write_table
from pipelines.errors import EmptyInput, GristmillError
from pipelines.filters import Filter
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings, load

SWEEP = "sweep.parquet"
PLOT = "threshold_sweep.png"
SWEEP_SCHEMA = pa.schema(
    [
        ("domain", pa.string()),
        ("stage", pa.string()),
        ("rule", pa.string()),
        ("keep", pa.string()),
        ("threshold", pa.float64()),
        ("quantile", pa.float64()),
        ("in_use", pa.bool_()),
        ("kept_documents", pa.int64()),
        ("kept_characters", pa.int64()),
        ("kept_tokens", pa.int64()),
    ]
)
"""A row per domain, rule and threshold. `quantile` is null for the recipe's own threshold, where `in_use` is true, and for the rule
switched off, where `threshold` is null too; tokens are null where the domain's text was not tokenized."""
TAIL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
STAGES = ("quality", "toxicity")
PANELS_A_ROW = 5
COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"),
    *("#bbbbbb", "#222255", "#997700", "#225522", "#663333", "#99ddff"),
)
"""One for each domain, in alphabetical order, then again from the first (Paul Tol's palettes)."""


class SweepSettings(Settings):
    """Where thresholds are tried."""

    quantiles: tuple[float, ...] = (0.0, *TAIL, 0.4, 0.5, 0.6, *(1 - q for q in reversed(TAIL)), 1.0)
    """Shares of a domain's scores below the threshold: denser at both ends, where rules cut."""


@dataclass(frozen=True)
class Bound:
    """The side and the value of a threshold."""

    keep: str
    value: float

    def fails(self, scores: np.ndarray) -> np.ndarray:
        """Return which `scores` fail, bool of their shape; NaN passes."""
        return scores < self.value if self.keep == "at_least" else scores > self.value


@dataclass(frozen=True)
class Scored:
    """The scores of one domain: `n` documents over its snapshots."""

    domain: str
    scores: Mapping[str, Mapping[str, np.ndarray]]
    """By stage, then by ``<filter>.<rule>``: float64 of shape ``(n,)``."""
    characters: np.ndarray
    tokens: np.ndarray | None = None

    def weights(self) -> dict[str, np.ndarray]:
        """Return what is counted, int64 ``(n,)`` each, by column of `SWEEP_SCHEMA`."""
        found = {"kept_documents": np.ones(len(self.characters), dtype=np.int64), "kept_characters": self.characters}
        return found if self.tokens is None else {**found, "kept_tokens": self.tokens}

    def amounts(self, kept: np.ndarray) -> dict[str, int]:
        """Return the documents, characters and tokens of the documents `kept`, bool ``(n,)``."""
        return {name: int(weight[kept].sum()) for name, weight in self.weights().items()}


@dataclass(frozen=True)
class Stage:
    """What one stage of the recipe does in one domain."""

    mode: str
    bounds: Mapping[str, Bound]

    def kept(self, fails: np.ndarray) -> np.ndarray:
        """Return which documents the stage keeps, where `fails` says which fail one of its rules."""
        return fails if self.mode == "inverse" else ~fails

    @property
    def active(self) -> Mapping[str, Bound]:
        """The rules in force."""
        return {} if self.mode == "off" else self.bounds


def sweep_thresholds(
    settings: SweepSettings,
    out: Path,
    *,
    quality: Manifest,
    toxicity: Manifest,
    quality_scores: tuple[Manifest, ...],
    toxicity_scores: tuple[Manifest, ...],
    shards: tuple[Manifest, ...] = (),
) -> Outcome:
    """Write ``sweep.parquet`` (`SWEEP_SCHEMA`) and ``threshold_sweep.png``.

    Args:
        quality: the recipe's decisions over `quality_scores`; its settings hold the thresholds. So for `toxicity`.
        shards: tokenized_shards of the same partitions, for counts of tokens; without them characters are counted alone.

    Raises:
        GristmillError: the scores of a partition are of different documents.
        EmptyInput: there is no partition.
    """
    given = dict(zip(STAGES, (quality_scores, toxicity_scores), strict=True))
    partitions = [str(manifest.partition) for manifest in quality_scores]
    if not partitions:
        raise EmptyInput("no scores to sweep over; a recipe needs at least one source partition")
    rows: list[dict[str, Json]] = []
    costs: list[dict[str, Json]] = []
    documents = 0
    for domain in sorted({split_partition(partition)[0] for partition in partitions}):
        scored = read_domain(domain, given, shards)
        stages = {name: stage_of(manifest, domain) for name, manifest in (("quality", quality), ("toxicity", toxicity))}
        found = sweep(scored, stages, settings.quantiles)
        costs += _costs(found, scored)
        rows += found
        documents += len(scored.characters)
    table = pa.Table.from_pylist(rows, SWEEP_SCHEMA)
    write_table(out / SWEEP, table)
    _plot(table, out / PLOT)
    counted = "tokens" if table["kept_tokens"].null_count == 0 else "characters"
    modes: dict[str, Json] = {
        name: str(manifest.settings.get("mode", "keep")) for name, manifest in (("quality", quality), ("toxicity", toxicity))
    }
    return Outcome(
        counts={"documents": documents, "rules": len({row["rule"] for row in rows}), "thresholds": len(rows)},
        tables={"costs": costs},
        plots=(PLOT,),
        details={"kept": _kept(quality, toxicity), "counted": counted, "modes": modes},
    )


def stage_of(decided: Manifest, domain: str) -> Stage:
    """Return the mode and the thresholds by which `decided` was decided in `domain`."""
    given = cast(dict[str, dict[str, dict[str, Json]]], decided.settings.get("thresholds") or {}).get(domain, {})
    bounds = {rule: Bound(str(bound["keep"]), float(cast(float, bound["value"]))) for rule, bound in given.items()}
    return Stage(str(decided.settings.get("mode", "keep")), bounds)


def read_domain(domain: str, scores: Mapping[str, Sequence[Manifest]], shards: Sequence[Manifest] = ()) -> Scored:
    """Read the scores of `domain`, by stage, over the partitions of `scores`, and its tokens where `shards` has every partition.

    Raises:
        GristmillError: two stages hold the scores of different documents.
    """
    tokenized = {manifest.partition: manifest for manifest in shards}
    by_stage = {stage: of_domain(found, domain) for stage, found in scores.items()}
    characters, tokens = [], []
    for manifests in zip(*by_stage.values(), strict=True):
        tables = [pq.read_table(manifest.file("scores.parquet"), columns=["id", "characters"]) for manifest in manifests]
        if any(table["id"] != tables[0]["id"] for table in tables):
            labels = " and ".join(manifest.label for manifest in manifests)
            raise GristmillError(f"{labels} score different documents; materialize both again")
        characters.append(tables[0]["characters"].to_numpy())
        if found := tokenized.get(manifests[0].partition):
            tokens.append(_tokens(found, tables[0]["id"]))
    columns = {stage: Columns(tuple(manifest.file("scores.parquet") for manifest in found)) for stage, found in by_stage.items()}
    return Scored(domain, columns, np.concatenate(characters), np.concatenate(tokens) if len(tokens) == len(characters) else None)


class Columns(Mapping[str, np.ndarray]):
    """The scores of one stage by rule, over the files of one domain; a column is read when it is asked for, and not kept."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        schemas = [pq.read_schema(path) for path in paths]
        self._rules = list(dict.fromkeys(field.name for schema in schemas for field in schema if pa.types.is_float64(field.type)))

    def __getitem__(self, rule: str) -> np.ndarray:
        return np.concatenate([_column(path, rule) for path in self._paths])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


def _column(path: Path, rule: str) -> np.ndarray:
    """Return one column; NaN where a partition was scored before its filter was added, as nothing is decided by it there."""
    if rule not in pq.read_schema(path).names:
        return np.full(row_count(path), np.nan)
    return pq.read_table(path, columns=[rule])[rule].to_numpy()


def of_domain(manifests: Sequence[Manifest], domain: str) -> list[Manifest]:
    """Return the manifests of the partitions of `domain`, by partition."""
    found = [manifest for manifest in manifests if split_partition(str(manifest.partition))[0] == domain]
    return sorted(found, key=lambda manifest: str(manifest.partition))


def _tokens(shard: Manifest, ids: pa.ChunkedArray) -> np.ndarray:
    """Return the tokens of the documents `ids`, in their order."""
    query = """SELECT coalesce(t.length, 0)::BIGINT AS tokens FROM (SELECT id, row_number() OVER () AS row FROM ids) i
        LEFT JOIN read_parquet($path) t USING (id) ORDER BY row"""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("ids", pa.table({"id": ids}))
        return connection.sql(query, params={"path": str(shard.file("documents.parquet"))}).fetchnumpy()["tokens"]


def sweep(scored: Scored, stages: Mapping[str, Stage], quantiles: Sequence[float]) -> list[dict[str, Json]]:
    """Return rows of `SWEEP_SCHEMA` for every rule that was scored in one domain."""
    failing = {name: _num_failed(scored, name, stage.active) for name, stage in stages.items()}
    rows = []
    for name, stage in stages.items():
        elsewhere = np.ones(len(scored.characters), dtype=bool)
        for other in stages:
            if other != name:
                elsewhere &= stages[other].kept(failing[other] > 0) if stages[other].active else True
        for rule, values in scored.scores[name].items():
            bound = stage.active.get(rule)
            own = bound.fails(values) if bound else np.zeros(len(values), dtype=bool)
            others = failing[name] - own > 0
            open_to_it = elsewhere & ~others
            settled = elsewhere & others if stage.mode == "inverse" else np.zeros_like(others)
            keep = bound.keep if bound else _side(rule)
            curve = _Curve(scored, values, open_to_it, settled, keep, inverse=stage.mode == "inverse")
            row = {"domain": scored.domain, "stage": name, "rule": rule, "keep": keep}
            without = stage.kept(others) if stage.active.keys() - {rule} else np.ones_like(others)
            rows.append({**row, "threshold": None, "quantile": None, "in_use": False, **scored.amounts(elsewhere & without)})
            for quantile, threshold in _thresholds(values, quantiles):
                rows.append({**row, "threshold": threshold, "quantile": quantile, "in_use": False, **curve.at(threshold)})
            if bound:
                rows.append({**row, "threshold": bound.value, "quantile": None, "in_use": True, **curve.at(bound.value)})
    return rows


def _num_failed(scored: Scored, stage: str, bounds: Mapping[str, Bound]) -> np.ndarray:
    """Return how many of the rules `bounds` each document fails, int32 ``(n,)``."""
    failed = np.zeros(len(scored.characters), dtype=np.int32)
    for rule, bound in bounds.items():
        failed += bound.fails(scored.scores[stage][rule])
    return failed


def _side(rule: str) -> str:
    """Return the side that ``<filter>.<rule>`` keeps."""
    name, _, own = rule.partition(".")
    rules = cast(type[Filter], load("filters", name)).rules
    return next(found.keep for found in rules if found.name == own)


def _thresholds(values: np.ndarray, quantiles: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield ``(quantile, threshold)`` at scores that occur, each threshold once, in rising order; none where no rule applies."""
    applying = values[~np.isnan(values)]
    if not len(applying):
        return
    found = np.quantile(applying, quantiles, method="inverted_cdf")
    _, first = np.unique(found, return_index=True)
    yield from ((float(quantiles[place]), float(found[place])) for place in first.tolist())


class _Curve:
    """What is kept as one rule's threshold moves, by prefix sums over its sorted scores."""

    def __init__(
        self, scored: Scored, values: np.ndarray, open_to_it: np.ndarray, settled: np.ndarray, keep: str, *, inverse: bool
    ) -> None:
        weights = scored.weights()
        judged = np.flatnonzero(open_to_it & ~np.isnan(values))
        order = judged[np.argsort(values[judged], kind="stable")]
        self._values, self._at_least, self._inverse = values[order], keep == "at_least", inverse
        free = settled if inverse else settled | (open_to_it & np.isnan(values))
        self._below = {name: np.concatenate([[0], np.cumsum(weight[order], dtype=np.int64)]) for name, weight in weights.items()}
        self._free = scored.amounts(free)

    def at(self, threshold: float) -> dict[str, int]:
        """Return what is kept at `threshold`."""
        place = int(np.searchsorted(self._values, threshold, side="left" if self._at_least else "right"))
        kept = {}
        for name, below in self._below.items():
            under, over = int(below[place]), int(below[-1] - below[place])
            passing, failing = (over, under) if self._at_least else (under, over)
            kept[name] = self._free[name] + (failing if self._inverse else passing)
        return kept


def _costs(rows: Sequence[Mapping[str, Json]], scored: Scored) -> list[dict[str, Json]]:
    """Return, for each rule in use in one domain, what the recipe would keep more of without it."""
    without = {row["rule"]: row for row in rows if row["threshold"] is None}
    most = {"documents": len(scored.characters), "characters": int(scored.characters.sum())}
    if scored.tokens is not None:
        most["tokens"] = int(scored.tokens.sum())
    found = []
    for row in (row for row in rows if row["in_use"]):
        lost = {name: cast(int, without[row["rule"]][f"kept_{name}"]) - cast(int, row[f"kept_{name}"]) for name in most}
        head = {key: row[key] for key in ("domain", "stage", "rule", "keep", "threshold")}
        shares = {f"share_{name}_lost": lost[name] / max(1, number) for name, number in most.items() if name != "documents"}
        found.append({**head, **{f"lost_{name}": number for name, number in lost.items()}, **shares})
    return found


def _kept(quality: Manifest, toxicity: Manifest) -> dict[str, Json]:
    """Return the documents that the recipe's two filters keep, by domain, as their own tables count them."""
    domains = {str(row["domain"]): 0 for row in quality.outcome.tables.get("by_domain", [])}
    return domains | {str(row["domain"]): row["kept"] for row in toxicity.outcome.tables.get("by_domain", [])}


def _plot(table: pa.Table, path: Path) -> None:
    """Draw one panel per rule in use: the share of each domain's text that is kept over the threshold; a dot is the recipe's."""
    rows = table.to_pylist()
    amount = "kept_tokens" if table["kept_tokens"].null_count == 0 else "kept_characters"
    in_use = {row["rule"] for row in rows if row["in_use"]}
    rules = [rule for rule in dict.fromkeys(row["rule"] for row in rows) if rule in in_use]
    domains = sorted({row["domain"] for row in rows})
    most = {domain: max([1, *(row[amount] for row in rows if row["domain"] == domain)]) for domain in domains}
    height = -(-max(1, len(rules)) // PANELS_A_ROW)
    figure, first = new_figure(2.6 * PANELS_A_ROW, 0.6 + 1.75 * height)
    first.remove()
    for place, rule in enumerate(rules, start=1):
        axes = figure.add_subplot(height, PANELS_A_ROW, place)
        for number, domain in enumerate(domains):
            mine = [row for row in rows if row["rule"] == rule and row["domain"] == domain and row["threshold"] is not None]
            found = sorted(mine, key=lambda row: row["threshold"])
            shares = [100 * row[amount] / most[domain] for row in found]
            used = [(row["threshold"], share) for row, share in zip(found, shares, strict=True) if row["in_use"]]
            if used:
                colour = COLOURS[number % len(COLOURS)]
                axes.plot([row["threshold"] for row in found], shares, color=colour, linewidth=1, label=domain)
                axes.plot(*zip(*used, strict=True), "o", color=colour, markersize=3.5)
        _frame(axes, rule, [row for row in rows if row["rule"] == rule])
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    named = [domain for domain in domains if domain in handles]
    figure.legend(
        [handles[domain] for domain in named], named, loc="outside upper center", ncols=max(1, len(named)), fontsize=8, frameon=False
    )
    what = "tokens" if amount == "kept_tokens" else "characters"
    figure.supylabel(f"{what} kept, % of the most that any threshold keeps", fontsize=8)
    save_figure(figure, path)


def _frame(axes: object, rule: str, rows: Sequence[Mapping[str, Json]]) -> None:
    """Title a panel and, where scores span several powers of ten, make its axis logarithmic beyond the median."""
    scores = np.array([row["threshold"] for row in rows if row["quantile"] is not None], dtype=float)
    used = np.array([row["threshold"] for row in rows if row["in_use"]], dtype=float)
    if len(scores) and scores.max() > 50 * max(np.median(scores), 1e-9) and scores.max() > 10:
        axes.set_xscale("symlog", linthresh=max(1.0, float(np.median(np.abs(scores)))))  # type: ignore[attr-defined]
    elif len(scores) and len(used):
        low, high = min(np.quantile(scores, 0.05), used.min()), max(np.quantile(scores, 0.95), used.max())
        axes.set_xlim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))  # type: ignore[attr-defined]
    axes.set_ylim(0, 104)  # type: ignore[attr-defined]
    axes.set_title(rule.replace(".", "\n", 1).replace("_", " "), fontsize=7)  # type: ignore[attr-defined]
    axes.tick_params(labelsize=6)  # type: ignore[attr-defined]
    axes.grid(alpha=0.25)  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]


def agrees_with_decisions(draft: Manifest) -> Check:
    """At the recipe's threshold of every rule, the sweep keeps as many documents as the recipe's filters keep."""
    table = pq.read_table(draft.directory / SWEEP, columns=["domain", "rule", "in_use", "kept_documents"])
    kept = cast(dict[str, int], draft.outcome.details["kept"])
    used = [row for row in table.to_pylist() if row["in_use"]]
    wrong = [f"{row['rule']} in {row['domain']}: {row['kept_documents']}" for row in used if row["kept_documents"] != kept[row["domain"]]]
    described = f"{len(used)} thresholds in use, {len(wrong)} differ{': ' if wrong else ''}{', '.join(wrong[:3])}"
    return Check(name="agrees_with_decisions", passed=not wrong, description=described, metadata={"thresholds": len(used)})


def curves_monotone(draft: Manifest) -> Check:
    """A stricter threshold never keeps more (less, where the filter is inverse)."""
    query = """SELECT count(*) FROM (SELECT kept_documents - lag(kept_documents) OVER (
        PARTITION BY domain, rule ORDER BY threshold * if(keep = 'at_least', 1, -1)) AS step, stage FROM read_parquet($path)
        WHERE threshold IS NOT NULL)
        WHERE step > 0 AND NOT list_contains($inverse, stage) OR step < 0 AND list_contains($inverse, stage)"""
    modes = cast(dict[str, str], draft.outcome.details.get("modes", {}))
    inverse = [stage for stage, mode in modes.items() if mode == "inverse"]
    with duckdb.connect() as connection:
        ((found,),) = connection.execute(query, {"path": str(draft.directory / SWEEP), "inverse": inverse}).fetchall()
    return Check(name="curves_monotone", passed=not found, description=f"{found} steps in the wrong direction")


SWEEP_AUDITS = (agrees_with_decisions, curves_monotone)
