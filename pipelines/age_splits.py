"""Age splits: the documents of a recipe by when they were written, for studies that train on one period and evaluate on another.

    deduplicated_corpus + the scores of the filter `age` -> split_by_age -> periods/1.parquet, ..., undated.parquet

The train/held-out split stays as it is: what is held out of one period is held out of every study (A Pretrainer's Guide,
2305.13169, trains on one collection year of C4 at a time and evaluates on others). No text is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pipelines.documents import write_table
from pipelines.errors import GristmillError
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.store import advisory

YEAR, ORIGIN, PRECISION = "age.not_before", "age.origin", "age.precision"
"""Columns of the quality scores: the year with a fraction, where the date comes from, and how precise it is."""
PERIODS_FILE = "periods.json"
UNDATED, OUTSIDE = "undated", "outside"
"""The files of documents without a date, and with a date in no window."""
AGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("snapshot", pa.string()),
        ("split", pa.string()),
        ("characters", pa.int64()),
        ("year", pa.float64()),
        ("origin", pa.string()),
        ("precision", pa.string()),
    ]
)
COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#bbbbbb",
    "#222222",
    "#997700",
    "#004488",
    "#ee99aa",
    "#44bb99",
)


class AgeSplitSettings(Settings):
    """The periods that the documents are split into."""

    periods: int = Field(default=4, ge=1, le=100)
    """Periods with about equally many documents, where `windows` names none. Documents of one date are never parted, so that
    there may be fewer."""
    windows: tuple[tuple[float, float], ...] = ()
    """Periods as ``[from, to)`` in years with fractions, in time order: ``[[2013, 2016], [2016, 2019.5]]``."""

    @field_validator("windows")
    @classmethod
    def _in_order(cls, windows: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        bounds = [bound for window in windows for bound in window]
        if any(low >= high for low, high in windows) or bounds != sorted(bounds):
            raise ValueError(f"windows {[list(w) for w in windows]} are not in time order, or overlap; write [from, to) with from < to")
        return windows


def split_by_age(settings: AgeSplitSettings, out: Path, *, decisions: Manifest, scores: tuple[Manifest, ...]) -> Outcome:
    """Write a file of ids for each period, for undated documents and for those in no window, and ``periods.json``.

    Args:
        decisions: deduplicated_corpus, of which the kept documents come in.
        scores: quality_scores of the recipe's source partitions.

    Raises:
        GristmillError: the filter `age` was not scored, or a kept document has no scores.
    """
    documents = _documents(decisions, scores)
    years = documents["year"].to_numpy(zero_copy_only=False)
    windows = settings.windows or _equal_periods(years[~np.isnan(years)], settings.periods)
    names = np.full(len(years), OUTSIDE, dtype=object)
    names[np.isnan(years)] = UNDATED
    for number, (low, high) in enumerate(windows, start=1):
        names[(years >= low) & (years < high)] = str(number)
    (out / "periods").mkdir()
    for name in (*map(str, range(1, len(windows) + 1)), UNDATED, OUTSIDE):
        write_table(out / period_file(name), documents.filter(pa.array(names == name)))
    record = [{"period": number, "from": low, "to": high} for number, (low, high) in enumerate(windows, start=1)]
    (out / PERIODS_FILE).write_text(json.dumps({"periods": record}, indent=1) + "\n", encoding="utf-8")
    by_domain = _table(documents.append_column("period", pa.array(names, pa.string())), windows)
    for value in ("documents", "characters"):
        _plot(by_domain, value, out / f"{value}_by_period.png")
    in_period = int(np.isin(names, (UNDATED, OUTSIDE), invert=True).sum())
    counts = {"documents_in": decisions.counts["kept"], "in_periods": in_period, "periods": len(windows)}
    counts |= {"undated": int((names == UNDATED).sum()), "outside": int((names == OUTSIDE).sum())}
    return Outcome(
        counts=counts,
        metrics={"share_dated": 1 - counts["undated"] / max(1, len(years))},
        tables={"by_period": by_domain, "by_origin": _origins(documents)},
        plots=("documents_by_period.png", "characters_by_period.png"),
    )


def period_file(name: str) -> str:
    """Return the file of period ``1``, ``2``, ..., or of `UNDATED` or `OUTSIDE`."""
    return f"{name}.parquet" if name in (UNDATED, OUTSIDE) else f"periods/{name}.parquet"


def _documents(decisions: Manifest, scores: Sequence[Manifest]) -> pa.Table:
    """Return the kept documents with their ages, ordered by domain, snapshot and id."""
    files = [str(manifest.file("scores.parquet")) for manifest in scores]
    lacking = [m.label for m, path in zip(scores, files, strict=True) if not {YEAR, ORIGIN, PRECISION} <= set(pq.read_schema(path).names)]
    if lacking:
        raise GristmillError(f"{lacking[0]} has no scores of the filter 'age'; add `age: {{}}` under `quality` in project.yaml")
    query = f"""SELECT d.id, d.domain, d.snapshot, d.split, s.characters, CAST(s."{YEAR}" AS DOUBLE) AS year, s."{ORIGIN}" AS origin,
        s."{PRECISION}" AS precision, s.id IS NULL AS lost
        FROM (SELECT id, domain, snapshot, split FROM read_parquet($decisions) WHERE kept) d
        LEFT JOIN read_parquet($scores, union_by_name = true) s USING (id, domain, snapshot) ORDER BY d.domain, d.snapshot, d.id"""
    with duckdb.connect(config={"threads": 1}) as connection:
        parameters = {"decisions": str(decisions.file("decisions.parquet")), "scores": files}
        table = connection.sql(query, params=parameters).to_arrow_table()
    lost = table.filter(table["lost"])
    if lost.num_rows:
        row = lost.slice(0, 1).to_pylist()[0]
        raise GristmillError(f"document {row['id']!r} of {row['domain']}|{row['snapshot']} has no quality_scores; give its partition")
    return table.drop_columns(["lost"]).cast(AGE_SCHEMA)


def _equal_periods(years: np.ndarray, periods: int) -> tuple[tuple[float, float], ...]:
    """Return windows that hold about equally many of `years`: each bound is the date nearest to its quantile that parts no date.

    A bound lies on the first date of the later period; the last window ends after the last date.
    """
    dates, times = np.unique(years, return_counts=True)
    if not len(dates):
        return ()
    before = np.cumsum(times) - times
    wanted = np.arange(1, periods) * len(years) / periods
    starts = sorted({int(np.argmin(np.abs(before - goal))) for goal in wanted} | {0})
    bounds = [float(dates[start]) for start in starts] + [float(np.nextafter(dates[-1], np.inf))]
    return tuple(pairwise(bounds))


def _table(documents: pa.Table, windows: Sequence[tuple[float, float]]) -> list[dict[str, Json]]:
    """Return documents and characters by period, domain and split, and the periods' bounds."""
    query = """SELECT period, domain, count(*) AS documents, sum(characters)::BIGINT AS characters,
        count(*) FILTER (split = 'train') AS train, count(*) FILTER (split = 'held_out') AS held_out,
        min(year) AS first_year, max(year) AS last_year
        FROM documents GROUP BY period, domain"""
    null = pc.if_else(pc.is_nan(documents["year"]), pa.scalar(None, pa.float64()), documents["year"])  # to DuckDB, NaN is a largest number
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("documents", documents.set_column(documents.schema.get_field_index("year"), "year", null))
        rows = connection.sql(query).to_arrow_table().to_pylist()
    bounds = {str(number): window for number, window in enumerate(windows, start=1)}
    order = [*bounds, UNDATED, OUTSIDE]
    rows.sort(key=lambda row: (order.index(row["period"]), row["domain"]))
    return [{**row, "from": bounds.get(row["period"], (None, None))[0], "to": bounds.get(row["period"], (None, None))[1]} for row in rows]


def _origins(documents: pa.Table) -> list[dict[str, Json]]:
    query = "SELECT domain, origin, precision, count(*) AS documents FROM documents GROUP BY ALL ORDER BY domain, documents DESC, origin"
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("documents", documents)
        return connection.sql(f"{query}, precision").to_arrow_table().to_pylist()


def _plot(rows: Sequence[Mapping[str, Json]], value: str, path: Path) -> None:
    """Draw a bar for each period, stacked by domain; what is undated or in no window stands at the right."""
    from matplotlib.ticker import EngFormatter

    labels = {str(row["period"]): _label(row) for row in rows}
    domains = sorted({str(row["domain"]) for row in rows})
    figure, axes = new_figure(max(5.2, 1.5 + 0.9 * len(labels)), 3.2)
    bottom = np.zeros(len(labels))
    for number, domain in enumerate(domains):
        found = {str(row["period"]): cast(int, row[value]) for row in rows if row["domain"] == domain}
        heights = np.array([found.get(period, 0) for period in labels], dtype=np.float64)
        axes.bar(range(len(labels)), heights, bottom=bottom, label=domain, color=COLORS[number % len(COLORS)], width=0.7)
        bottom += heights
    axes.set_xticks(range(len(labels)), list(labels.values()), fontsize=8)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(ylabel=value)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _label(row: Mapping[str, Json]) -> str:
    return str(row["period"]) if row["from"] is None else f"{_year(row['from'])} to\n{_year(row['to'])}"


def _year(value: Json) -> str:
    return f"{cast(float, value):.2f}".rstrip("0").rstrip(".")


def _files(draft: Manifest) -> Iterator[tuple[str, pa.Table]]:
    for path in sorted(draft.directory.rglob("*.parquet")):
        yield path.stem, pq.read_table(path)


def documents_conserved(draft: Manifest) -> Check:
    """Documents that came in = documents of all periods + undated + in no window, by the rows of the files."""
    rows = {name: table.num_rows for name, table in _files(draft)}
    came, total = draft.counts["documents_in"], sum(rows.values())
    in_periods = total - rows[UNDATED] - rows[OUTSIDE]
    counted = in_periods == draft.counts["in_periods"] and rows[UNDATED] == draft.counts["undated"]
    return Check(
        name="documents_conserved",
        passed=came == total and counted,
        description=f"{came} came in, {in_periods} in periods, {rows[UNDATED]} undated, {rows[OUTSIDE]} in no window",
        metadata={"documents_in": came, "in_periods": in_periods, UNDATED: rows[UNDATED], OUTSIDE: rows[OUTSIDE]},
    )


def ids_unique(draft: Manifest) -> Check:
    """No document stands in two periods, or twice in one."""
    keys = pa.concat_tables(table.select(["domain", "snapshot", "id"]) for _, table in _files(draft))
    repeated = keys.num_rows - keys.group_by(["domain", "snapshot", "id"]).aggregate([]).num_rows
    return Check(name="ids_unique", passed=not repeated, description=f"{repeated} repeated", metadata={"repeated": repeated})


def years_in_their_period(draft: Manifest) -> Check:
    """Every document of a period has a date within its bounds, and no undated one has a date."""
    record = json.loads((draft.directory / PERIODS_FILE).read_text(encoding="utf-8"))["periods"]
    bounds = {str(period["period"]): (period["from"], period["to"]) for period in record}
    wrong = 0
    for name, table in _files(draft):
        years = table["year"].to_numpy()
        if name in bounds:
            low, high = bounds[name]
            wrong += int((~((years >= low) & (years < high))).sum())
        elif name == UNDATED:
            wrong += int((~np.isnan(years)).sum())
    return Check(
        name="years_in_their_period", passed=not wrong, description=f"{wrong} documents in a wrong file", metadata={"wrong": wrong}
    )


@advisory
def periods_have_both_splits(draft: Manifest) -> Check:
    """Every period has documents to train on and documents held out; one without is named."""
    lacking = []
    for name, table in _files(draft):
        if name not in (UNDATED, OUTSIDE):
            splits = set(table["split"].to_pylist())
            lacking += [f"period {name} has no {split} document" for split in ("train", "held_out") if split not in splits]
    return Check(
        name="periods_have_both_splits",
        passed=not lacking,
        description="; ".join(lacking) or "every period can be trained and evaluated on",
        metadata={"lacking": len(lacking)},
    )


AGE_SPLIT_AUDITS = (documents_conserved, ids_unique, years_in_their_period, periods_have_both_splits)
