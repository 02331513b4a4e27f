"""Ages: every form a date is written in is read back, what can be read in two ways is not, and prose about a date is undated."""

from __future__ import annotations

import json
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_world import SAMPLE

from pipelines import plugins
from pipelines.filters._dates import Dated, date_of_field, date_of_text, date_of_title, date_of_url
from pipelines.filters.age import Age

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
DAYS = st.dates(date(1800, 1, 1), date(2030, 12, 31))
PROSE = "It was a long day, and nothing of what was said that evening is left in anyone's memory. " * 30


def forms(day: date) -> list[str]:
    month = MONTHS[day.month - 1]
    return [
        day.isoformat(),
        f"{day.year}/{day.month}/{day.day}",
        f"{month} {day.day}, {day.year}",
        f"{month[:3]} {day.day}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"{day.day}-{month[:3]}-{day.year}",
        f"{day:%a}, {day.day:2d} {month[:3]} {day.year} 10:45:39 +0100",
        f"{day.isoformat()}T03:56:59Z",
    ]


def score(**columns: str | None) -> dict[str, object]:
    filter_ = plugins.build("filters", "age", {})
    assert isinstance(filter_, Age)
    return {name: values[0] for name, values in filter_.score(*([columns.get(name)] for name in Age.columns)).items()}


@given(DAYS)
def test_every_written_form_is_read_back(day: date) -> None:
    wanted = Dated(day.year, day.month, day.day)
    for form in forms(day):
        assert date_of_field(form) == wanted, form
        assert date_of_text(f"A heading\nPublished: {form}\n\n{PROSE}") == wanted, form
        assert date_of_text(f"{PROSE}\nLast updated on {form}\n") == wanted, form
        assert date_of_text(f"A heading\nBy Jane Q. Doe, {form}\n{PROSE}") == wanted, form


@given(DAYS, st.integers(1, 400))
def test_two_dates_of_one_kind_are_no_date(day: date, apart: int) -> None:
    other = day + timedelta(days=apart)
    assert date_of_text(f"{day.isoformat()}\n{PROSE}\n{other.isoformat()}\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "The album was released on August 25, 1988, through Elektra Records.",
        "On 7 December 1941 the harbour was attacked.",
        "= Action of 13 September 1810 =\n\nThe action was inconclusive.",
        "03/04/2019",
        "A passage.\n\nCopyright 2019. All rights reserved. Share this page",
        "2019-02-30",
        "Version 3.10.2\n\nNothing but a version.",
        "Call 2019-555-0100.",
        PROSE + "\n2019-04-12\n" + PROSE,
        "",
    ],
)
def test_what_states_no_date_of_its_own_is_undated(text: str) -> None:
    assert date_of_text(text) is None


@pytest.mark.parametrize(
    ("text", "year", "precision"),
    [
        ("SQLite Release 3.8.5 On 2014-06-04\n\nAdded support", 2014, "day"),
        ("dpkg (1.4.1.14) unstable\n\n  * release.\n\n -- A. Person <a@b.c>  Tue,  5 Oct 1999 19:19:05 +0200", 1999, "day"),
        ("Title\n\nMarch 2007\n\nText.", 2007, "month"),
        ("# Copyright (c) 2006-2008, R Oudkerk\nimport os", 2008, "year"),
        ("Copyright (C) 1994, 1995,\n2003, 2009 Somebody", 2009, "year"),
        ("© 2021 by A. Author. All rights reserved.", 2021, "year"),
    ],
)
def test_texts_that_state_their_date(text: str, year: int, precision: str) -> None:
    found = date_of_text(text)
    assert found and (found.year, found.precision) == (year, precision)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("https://example.org/2019/04/12/a-title.html", Dated(2019, 4, 12)),
        ("https://example.org/news/2019/4/a-title", Dated(2019, 4)),
        ("https://example.org/a-title-2019-04-12", Dated(2019, 4, 12)),
        ("https://example.org/20190412/a-title", Dated(2019, 4, 12)),
        ("usr/share/news/2019/04/12.txt", Dated(2019, 4, 12)),
        ("https://example.org/2019/a-title", None),
        ("https://example.org/2019/13/a-title", None),
        ("https://example.org/2019/04/31/a-title", None),
        ("https://2019-04-12.example.org/a-title", None),
        ("https://example.org/2019/04/12/and/2018/04/12", None),
        ("https://example.org/doi/10.1093/20190412345", None),
        ("https://example.org/1815/06/18/", None),
    ],
)
def test_urls(url: str, wanted: Dated | None) -> None:
    assert date_of_url(url) == wanted


def test_titles() -> None:
    assert date_of_title("Minutes of 2014-06-04") == Dated(2014, 6, 4)
    assert date_of_title("Action of 13 September 1810") is None


def test_the_surest_place_wins() -> None:
    text, url = "Published: 4 May 2010\n", "https://example.org/2011/05/04/"
    metadata = json.dumps({"crawled": "2026-01-01", "Date-Published": "2012-05-04", "created": 1_300_000_000})
    row = {"date": "2013-05-04", "metadata": metadata, "url": url, "text": text}
    for column, year, origin in (("date", 2013, "metadata"), ("metadata", 2012, "metadata"), ("url", 2011, "url"), ("text", 2010, "text")):
        found = score(**row)
        assert (int(found["not_before"]), found["origin"], found["precision"], found["dated"]) == (year, origin, "day", 1.0)
        del row[column]
    found = score()
    assert np.isnan(found["not_before"]) and np.isnan(found["not_after"])
    assert (found["dated"], found["origin"], found["precision"]) == (0.0, "none", None)


@pytest.mark.parametrize("metadata", ["not json", "[1]", '{"date": null}', '{"date": "soon"}', '{"added": "2019-04-12"}'])
def test_metadata_without_a_date(metadata: str) -> None:
    assert score(metadata=metadata)["origin"] == "none"


def test_seconds_since_1970_are_dates() -> None:
    assert date_of_field(1_555_027_200) == date_of_field("1555027200000") == Dated(2019, 4, 12)
    assert date_of_field("155502720") is None


@given(DAYS)
def test_decimals_grow_with_the_date_and_stay_in_their_year(day: date) -> None:
    decimal = Dated(day.year, day.month, day.day).decimal
    after = day + timedelta(days=1)
    assert int(decimal) == day.year and decimal < Dated(after.year, after.month, after.day).decimal
    assert Dated(day.year).decimal == day.year + 0.5
    assert abs(Dated(day.year, day.month).decimal - decimal) < 16 / 365


def test_a_window_keeps_what_lies_in_it_and_what_is_undated() -> None:
    rules = {rule.name: rule for rule in Age.rules}
    assert (rules["not_before"].keep, rules["not_after"].keep) == ("at_least", "at_most")
    assert all(rule.threshold <= 0 for rule in Age.rules if rule.keep == "at_least")
    assert 2019 <= score(date="2019")["not_before"] <= 2020
    assert 2019 <= score(date="2019-12-31")["not_after"] <= 2020 < score(date="2020-01-01")["not_after"]


def test_text_of_the_sample_is_dated_rightly_or_not_at_all() -> None:
    """The date column is not given: speeches, novels, theorems and gene terms do not state their date, release notes do."""
    import pyarrow.parquet as pq

    table = pq.read_table(SAMPLE, columns=["domain", "text", "title", "date"]).to_pylist()
    filter_ = plugins.build("filters", "age", {})
    assert isinstance(filter_, Age)
    for domain in ("speech", "book", "biomed", "math", "wiki"):
        rows = [row for row in table if row["domain"] == domain][:500]
        nothing = [None] * len(rows)
        found = filter_.score(nothing, nothing, nothing, [row["title"] for row in rows], [row["text"] for row in rows])
        wrong = [row for row, year in zip(rows, found["not_before"], strict=True) if not np.isnan(year)]
        assert not wrong, wrong[0]["text"][:200]
    notes = [row["text"] for row in table if row["text"].startswith("SQLite Release")]
    years = [score(text=text)["not_before"] for text in notes]
    assert len(notes) > 30
    assert [int(year) for year in years] == [int(text.split("\n")[0].split(" On ")[1][:4]) for text in notes]
