"""The report's tables of a filter: sums over domains, nothing where nothing was measured, and names that are escaped."""

from __future__ import annotations

import re

from pipelines.documents import ALL_DOMAINS
from pipelines.filter_tables import MAX_LANGUAGES, by_language, by_topic, rule_costs


def cells(html: str) -> list[list[str]]:
    """Return the texts of the cells of every row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row)] for row in rows]


def test_languages_are_summed_over_domains_and_the_unknown_is_named() -> None:
    flow = {"documents_in": 10, "kept": 5, "dropped": 5, "share_dropped": 0.5}
    rows = [{"domain": d, "lang": lang, **flow} for d in ("wiki", "web") for lang in ("en", None)]
    found = cells(by_language([*rows, {"domain": "web", "lang": "d<", **flow, "kept": 10, "dropped": 0, "share_dropped": 0.0}]))
    assert ["en", "20", "10", "10", "50.0 %"] in found and ["not identified", "20", "10", "10", "50.0 %"] in found
    assert ["d&lt;", "10", "10", "0", "0.0 %"] in found
    assert ["web", "en", "10", "5", "5", "50.0 %"] in found


def test_many_languages_are_cut_in_the_open_table_alone() -> None:
    rows = [{"domain": "web", "lang": f"l{n}", "documents_in": n, "kept": n, "dropped": 0, "share_dropped": 0.0} for n in range(1, 31)]
    opened, folded = str(by_language(rows)).split("<details>")
    assert f"the {MAX_LANGUAGES} with most documents" in opened
    assert len([row for row in cells(opened) if row]) == MAX_LANGUAGES and len([row for row in cells(folded) if row]) == 30


def test_costs_of_rules_with_those_that_cost_nothing() -> None:
    cost = {"failed": 3, "dropped": 2, "alone": 1, "characters": 300, "alone_characters": 100}
    nothing = dict.fromkeys(cost, 0)
    rows = [
        {"domain": "wiki", "rule": "a.b", **cost},
        {"domain": "web", "rule": "a.b", **cost},
        {"domain": "web", "rule": "c.d", **nothing},
    ]
    found = cells(rule_costs(rows))
    assert ["a.b", "6", "4", "2", "600", "200"] in found and ["c.d", "0", "0", "0", "0", "0"] in found
    assert ["web", "a.b", "3", "2", "1", "300", "100"] in found and not [row for row in found if row[:2] == ["web", "c.d"]]


def test_topics_with_their_intervals() -> None:
    shares = {"share_flagged": 0.5, "share_flagged_low": 0.25, "share_flagged_high": 0.75, "base": 0.25}
    ratios = {"ratio": 2.0, "ratio_low": 1.0, "ratio_high": 3.0}
    row = {"domain": ALL_DOMAINS, "topic": "gender", "documents": 4, "flagged": 2, **shares, **ratios}
    found = cells(by_topic([row, {**row, "domain": "wiki", "ratio": None}]))
    assert ["gender", "4", "2", "50.0 % [25.0 %, 75.0 %]", "25.0 %", "2.00 [1.00, 3.00]"] in found
    assert ["wiki", "gender", "4", "2", "50.0 % [25.0 %, 75.0 %]", "25.0 %", "–"] in found


def test_what_was_not_measured_is_not_shown() -> None:
    assert by_language([{"domain": "wiki", "lang": None, "documents_in": 1}]) == ""
    assert rule_costs([{"domain": "wiki", "rule": "exact_duplicate", "dropped": 1}]) == ""
    assert by_topic([]) == ""
