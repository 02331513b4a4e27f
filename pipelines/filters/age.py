"""Age: when a document was written, for windows of time (A Pretrainer's Guide, 2305.13169, section 3.1 splits C4 by year).

The date is the first of: the `date` column, the metadata, the URL's path, the title, the text. A document of which nothing
states a date is undated; its year is NaN, which passes every window, and `dated` drops it where a recipe asks for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipelines.filters import Filter, Rule, Scores
from pipelines.filters._dates import Dated, date_of_field, date_of_text, date_of_title, date_of_url

METADATA_KEYS = (
    "published",
    "publishedat",
    "publishedon",
    "publisheddate",
    "datepublished",
    "publicationdate",
    "pubdate",
    "articlepublishedtime",
    "issued",
    "dateissued",
    "dcdate",
    "dcdateissued",
    "date",
    "created",
    "createdat",
    "createdon",
    "creationdate",
    "datecreated",
    "timestamp",
    "year",
    "publicationyear",
)
"""Keys of the metadata, in lower case and without marks, that say when a document was written, the surest first. When it was
fetched or added says nothing of that."""
ORIGINS: tuple[tuple[str, Callable[[str], Dated | None]], ...] = (
    ("metadata", date_of_field),
    ("metadata", lambda value: _date_of_metadata(value)),
    ("url", date_of_url),
    ("text", date_of_title),
    ("text", date_of_text),
)
"""For each column, what a date found there is called, and how it is looked for."""
UNDATED = "none"
WINDOW = "A window is the recipe's choice: the default keeps all. The years of A Pretrainer's Guide, 2305.13169, are 2013 to 2022."


class Age(Filter):
    """The year a document was written in, with a fraction (2019.28), where the date comes from, and how precise it is."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("not_before", "at_least", 0.0, WINDOW),
        Rule("not_after", "at_most", 9999.0, WINDOW),
        Rule("dated", "at_least", 0.0, "1 drops what is undated; the default keeps it"),
    )
    labels: ClassVar[tuple[str, ...]] = ("origin", "precision")
    columns: ClassVar[tuple[str, ...]] = ("date", "metadata", "url", "title", "text")

    year_min: int = Field(default=1000, ge=1)
    """A date before this year is taken for a mistake, and the next place is looked at."""
    year_max: int = Field(default=2030, le=9998)
    """As `year_min`, for later years."""
    trust_text: bool = True
    """Whether title and text may date a document; where not, only its date, metadata and URL do."""

    def score(self, *columns: Sequence[str | None]) -> Scores:
        found = [self._find(row) for row in zip(*columns, strict=True)]
        years = np.array([dated.decimal if dated else np.nan for dated, _ in found], dtype=np.float64)
        return {
            "not_before": years,
            "not_after": years.copy(),
            "dated": (~np.isnan(years)).astype(np.float64),
            "origin": [origin for _, origin in found],
            "precision": [dated.precision if dated else None for dated, _ in found],
        }

    def _find(self, row: Sequence[str | None]) -> tuple[Dated | None, str]:
        for (origin, read), value in zip(ORIGINS, row, strict=True):
            if value and (origin != "text" or self.trust_text):
                dated = read(value)
                if dated and self.year_min <= dated.year <= self.year_max:
                    return dated, origin
        return None, UNDATED


def _date_of_metadata(value: str) -> Dated | None:
    """Return the date under the first of `METADATA_KEYS` that holds one, in the JSON object `value`."""
    try:
        content = json.loads(value)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    by_key = {re.sub(r"[\W_]", "", str(key).lower()): found for key, found in content.items()}
    dates = (date_of_field(by_key[key]) for key in METADATA_KEYS if by_key.get(key) not in (None, ""))
    return next((dated for dated in dates if dated), None)
