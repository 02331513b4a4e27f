"""Dates as documents write them: a whole field, a place in a path, a line of a text that says when it was written.

A form that can be read in two ways (03/04/2019) is no date. What is asked of a text is that it states its own date, not that
it names one: "released on August 25, 1988" in a sentence is about something else.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

HEAD_CHARACTERS, TAIL_CHARACTERS = 1_000, 600
"""Where a text's own date is looked for: its start and its end."""
MAX_LINE_CHARACTERS = 120
"""A longer line is prose, and a date in it is about something else."""
EPOCH_SECONDS = re.compile(r"\s*(\d{10})(\d{3})?(?:\.0)?\s*")
FIRST_WEB_YEAR = 1991
"""A path of the web with an earlier year names something else."""
FIRST_COPYRIGHT_YEAR = 1710
"""Of the Statute of Anne; a smaller number on a copyright line is no year."""

MONTHS = dict(zip(("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), range(1, 13), strict=True))
_MONTH = (
    "(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    "sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_ISO = r"(?P<y{0}>\d{{4}})(?P<s{0}>[-/.])(?P<m{0}>\d{{1,2}})(?P=s{0})(?P<d{0}>\d{{1,2}})"
_DAY_FIRST = r"(?P<d{0}>\d{{1,2}})(?:st|nd|rd|th)?(?:\s+of)?[-\s]+(?P<n{0}>" + _MONTH + r")\.?,?[-\s]+(?P<y{0}>\d{{4}})"
_MONTH_FIRST = r"(?P<n{0}>" + _MONTH + r")\.?\s+(?P<d{0}>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y{0}>\d{{4}})"
_MONTH_ONLY = r"(?P<n{0}>" + _MONTH + r")\.?,?\s+(?P<y{0}>\d{{4}})"
_FORMS = (_ISO, _DAY_FIRST, _MONTH_FIRST, _MONTH_ONLY)
_DATE = "|".join(form.format(number) for number, form in enumerate(_FORMS))
_STAMP = re.compile(rf"(?<![\w./-])(?:{_ISO.format(0)})(?![\w/-]|\.\d)")
_CLOCK = r"(?:[T,\s]+(?:at\s+)?\d{1,2}:\d\d(?::\d\d)?(?:\.\d+)?\s*(?:[ap]\.?m\.?)?\s*(?:Z|[A-Z]{2,4}|[+-]\d\d:?\d\d)?)?"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s+)?"
_FIELD = re.compile(rf"\s*{_WEEKDAY}(?:{_DATE}|(?P<y8>\d{{4}})-(?P<m8>\d\d)|(?P<y9>\d{{4}})){_CLOCK}\s*", re.IGNORECASE)
_LABEL = (
    r"(?:first\s+|originally\s+|date\s+)?(?:published|posted|written|dated|released|created|issued|submitted|updated|revised|modified|"
    r"last\s+(?:updated|modified|revised|changed)|(?:publication|release|issue|posting|effective)\s+date|date)(?:\s+(?:on|at|in))?\s*:?\s*"
)
_OWN_LINE = re.compile(rf"[\W_]*(?:{_LABEL})?{_WEEKDAY}(?:{_DATE}){_CLOCK}[\W_]*", re.IGNORECASE)
_SIGNED = re.compile(rf"\s*(?:by\s|--|—|–)[^\n]*?\W{_WEEKDAY}(?:{_DATE}){_CLOCK}[\W_]*", re.IGNORECASE)
_COPYRIGHT = re.compile(
    r"(?:copyright\s*(?:\(c\)|©|&copy;)?|©|&copy;|\(c\)\s*(?:copyright)?)[\s:]*(?P<holder>[^\n\d]{0,60})"
    r"(?P<years>(?:\d{4}\s*(?:[-–,&/]|and|to)?\s*){1,20})(?:by\s)?\s*(?P<after>[^\n]{0,10})",
    re.IGNORECASE,
)
_PATH = re.compile(
    r"/(?P<y0>(?:19|20)\d\d)/(?P<m0>0?[1-9]|1[0-2])(?:/(?P<d0>0?[1-9]|[12]\d|3[01]))?(?=/|$|[-?#.])"
    r"|(?<![\w.])(?P<y1>(?:19|20)\d\d)(?P<s1>[-_])(?P<m1>\d\d)(?P=s1)(?P<d1>\d\d)(?![\w.]\d)"
    r"|/(?P<y2>(?:19|20)\d\d)(?P<m2>0[1-9]|1[0-2])(?P<d2>0[1-9]|[12]\d|3[01])(?=/|$|[-_.?#])"
)


@dataclass(frozen=True)
class Dated:
    """A date as precise as it was stated."""

    year: int
    month: int | None = None
    day: int | None = None

    @property
    def precision(self) -> Literal["day", "month", "year"]:
        """What the date leaves open is below this."""
        return "day" if self.day else "month" if self.month else "year"

    @property
    def decimal(self) -> float:
        """Return the middle of the stated day, month or year, as a year with a fraction: 2019 is 2019.5."""
        days = 366 if calendar.isleap(self.year) else 365
        if self.month is None:
            return self.year + 0.5
        last = calendar.monthrange(self.year, self.month)[1]
        first = date(self.year, self.month, self.day or 1).timetuple().tm_yday - 1
        return round(self.year + (first + (1 if self.day else last) / 2) / days, 6)


def _dated(match: re.Match[str]) -> Dated | None:
    """Return the date in the groups of `match`; None where there is no such day."""
    found: dict[str, int] = {}
    for key, value in match.groupdict().items():
        if value and key[0] in "ymdn":
            found["m" if key[0] == "n" else key[0]] = MONTHS[value[:3].lower()] if key[0] == "n" else int(value)
    try:
        date(found["y"], found.get("m", 1), found.get("d", 1))
    except (ValueError, KeyError):
        return None
    return Dated(found["y"], found.get("m"), found.get("d"))


def date_of_field(value: object) -> Dated | None:
    """Return the date that `value` is: ISO 8601, a written date, a year, or seconds or milliseconds since 1970."""
    text = str(value)
    if match := EPOCH_SECONDS.fullmatch(text):
        moment = datetime.fromtimestamp(int(match[1]), UTC)
        return Dated(moment.year, moment.month, moment.day)
    match = _FIELD.fullmatch(text)
    return _dated(match) if match else None


def date_of_url(url: str) -> Dated | None:
    """Return the date in the path of `url`: ``/2019/04/12/``, ``/2019/04/``, ``2019-04-12`` or ``/20190412``; a year alone is none."""
    path = url.partition("://")[2].partition("/")[2] if "://" in url else url
    found = {dated for match in _PATH.finditer(f"/{path}") if (dated := _dated(match)) and dated.year >= FIRST_WEB_YEAR}
    return found.pop() if len(found) == 1 else None


def date_of_text(text: str) -> Dated | None:
    """Return the date that `text` gives itself near its start or end, else None.

    In order: lines that are a date, with or without a label such as "Published"; a signature line ("By A. Author, 3 May 2019",
    "-- Name  Sun, 25 Jan 1998"); a heading with one date in digits, year first; the latest year of the copyright lines at the start.
    Where two lines of the same kind state different dates, none of them is taken, and none of the kinds after it is tried.
    """
    if len(text) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        lines = text.split("\n")
    else:
        lines = [*text[:HEAD_CHARACTERS].split("\n")[:-1], *text[-TAIL_CHARACTERS:].split("\n")[1:]]
    short = [line for line in lines if len(line) <= MAX_LINE_CHARACTERS and any(c.isdigit() for c in line)]
    first = next((line for line in lines if line.strip()), "")
    kinds = (
        {dated for line in short if (match := _OWN_LINE.fullmatch(line)) and (dated := _dated(match))},
        {dated for line in short if (match := _SIGNED.fullmatch(line)) and (dated := _dated(match))},
        set(_heading(first)),
    )
    for found in kinds:
        if found:
            return found.pop() if len(found) == 1 else None
    return _of_copyright("\n".join(line for line in text[:HEAD_CHARACTERS].split("\n") if len(line) <= MAX_LINE_CHARACTERS))


def _of_copyright(text: str) -> Dated | None:
    """Return the latest year of the copyright lines of `text` that name a holder.

    Those without one, and those at the end of a text, are page footers: on the sample's passages with a known date every one of
    them stated another year.
    """
    years: list[int] = []
    for match in _COPYRIGHT.finditer(text):
        after = match["after"].lower()
        if any(c.isalpha() for c in match["holder"]) or (after[:1].isalpha() and not after.startswith("all rights")):
            years += map(int, re.findall(r"\d{4}", match["years"]))
    return Dated(max(years)) if years and min(years) >= FIRST_COPYRIGHT_YEAR else None


def _heading(line: str) -> Iterator[Dated]:
    """Yield the dates in digits of a first line that is a heading. In words they name events: "Action of 13 September 1810"."""
    if len(line) <= MAX_LINE_CHARACTERS and not line.rstrip().endswith((".", "!", "?", ";", ",")):
        yield from (dated for match in _STAMP.finditer(line) if (dated := _dated(match)))


def date_of_title(title: str) -> Dated | None:
    """Return the date in digits, year first, in `title`, where there is exactly one."""
    found = {dated for match in _STAMP.finditer(title) if (dated := _dated(match))}
    return found.pop() if len(found) == 1 else None
