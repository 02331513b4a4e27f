"""The report's tables of a filter: what it drops by language, what every rule costs, and what it flags by topic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipelines.documents import ALL_DOMAINS
from pipelines.manifests import Json
from pipelines.pages import Column, Html, code, count, decimals, folded, paragraph, percent, table

Rows = Sequence[Mapping[str, Json]]

FLOW = (
    Column("documents_in", "Documents in", count),
    Column("kept", "Kept", count),
    Column("dropped", "Dropped", count),
    Column("share_dropped", "Share dropped", percent),
)
COSTS = (
    Column("failed", "Fail it", count),
    Column("dropped", "Fail it first", count),
    Column("alone", "Fail it alone", count),
    Column("characters", "Characters of all that fail", count),
    Column("alone_characters", "Of those that fail it alone", count),
)
FLAGS = (
    Column("documents", "Mention it", count),
    Column("flagged", "Flagged", count),
    Column("share", "Share [95 %]"),
    Column("base", "Share of all in their domains", percent),
    Column("ratio_between", "Ratio [95 %]"),
)
NOT_IDENTIFIED = "not identified"
MAX_LANGUAGES = 20
"""Languages in the open table, those with most documents; the folded one has every domain and language."""


def by_language(rows: Rows) -> Html:
    """Return what came in and what was dropped by language, all domains together, and folded by domain; nothing where none is known."""
    if not any(row.get("lang") for row in rows):
        return Html("")
    named = [{**row, "lang": row.get("lang") or NOT_IDENTIFIED} for row in rows]
    sums = _summed(named, "lang", ("documents_in", "kept", "dropped"))
    shares = [{**row, "share_dropped": row["dropped"] / row["documents_in"]} for row in sums if row["documents_in"]]
    ordered = sorted(shares, key=lambda row: (-row["documents_in"], str(row["lang"])))
    columns = [Column("lang", "Language"), *FLOW]
    caption = "By identified language" + (f", the {MAX_LANGUAGES} with most documents" if len(ordered) > MAX_LANGUAGES else "")
    every = table(named, [Column("domain", "Domain"), *columns])
    return Html(table(ordered[:MAX_LANGUAGES], columns, caption=caption) + folded("Every domain and language", every))


def rule_costs(rows: Rows) -> Html:
    """Return what each rule drops and what it alone drops, folded; rules that drop nothing are there too."""
    if not any("failed" in row for row in rows):
        return Html("")
    keys = tuple(column.key for column in COSTS)
    every = [{**row, "rule": code(row["rule"])} for row in _summed(rows, "rule", keys)]
    by_domain = [{**row, "rule": code(row.get("rule"))} for row in rows if row.get("failed")]
    note = "Documents that fail a rule alone would be kept without it."
    over_all = table(every, [Column("rule", "Rule"), *COSTS], caption="Every rule, all domains together")
    columns = [Column("domain", "Domain"), Column("rule", "Rule"), *COSTS]
    in_each = table(by_domain, columns, caption="By domain, rules that some document fails")
    return folded("What every rule drops, and what it alone drops", paragraph(note, kind="quiet") + over_all + in_each)


def by_topic(rows: Rows) -> Html:
    """Return how often documents that mention a topic are flagged, beside all documents; folded by domain."""
    shown = [{**row, "share": _between(row, "share_flagged"), "ratio_between": _between(row, "ratio")} for row in rows]
    note = (
        "A ratio above 1 says that documents that mention a topic are flagged more often than the others: by what they say, or by the "
        "topic itself. Topics are found by a list of words. Intervals are Wilson's; the ratio takes the share of all as given."
    )
    over_all = [row for row in shown if row.get("domain") == ALL_DOMAINS]
    domains, columns = [row for row in shown if row.get("domain") != ALL_DOMAINS], [Column("topic", "Topic"), *FLAGS]
    body = table(over_all, columns, caption="Documents flagged, by topic")
    body += folded("By domain and topic", table(domains, [Column("domain", "Domain"), *columns]))
    return Html(body + paragraph(note, kind="quiet") if rows else "")


def _summed(rows: Rows, key: str, values: Sequence[str]) -> list[dict[str, Json]]:
    """Return the sums of `values` over the rows of each `key`, the largest of the first of them first."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(values, 0))
    for row in rows:
        for value in values:
            found[str(row.get(key))][value] += int(row.get(value) or 0)
    return sorted(({key: name, **sums} for name, sums in found.items()), key=lambda row: (-row[values[0]], row[key]))


def _between(row: Mapping[str, Json], key: str) -> str | None:
    """Return a value and its interval; None where there is no value."""
    form = percent if key == "share_flagged" else decimals(2)
    value, low, high = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    return None if value is None else f"{form(value)} [{form(low)}, {form(high)}]"
