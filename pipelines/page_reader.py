"""What a browser would make of a written page: what it asks for from elsewhere, and what its sections say."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from pipelines.manifests import Check

MAX_PAGE_BYTES = 5_000_000
FETCHING_TAGS = ("script", "link", "iframe", "object", "embed", "base", "form")
FETCHING_ATTRIBUTES = ("src", "href", "xlink:href", "srcset", "action", "formaction", "poster", "background")


class PageReader(HTMLParser):
    """Collects what a page asks for from elsewhere, and how many texts each section holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.texts: dict[str, int] = {}
        self._section: str | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.outside += [f"<{tag}>"] if tag in FETCHING_TAGS or "http-equiv" in values else []
        self.outside += [f"{name}={value[:60]}" for name, value in values.items() if _fetches(name, value)]
        if tag == "section":
            self._section = values.get("id", "")
            self.texts[self._section] = 0

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._section = None

    def handle_data(self, data: str) -> None:
        if self._section is not None and data.strip():
            self.texts[self._section] += 1
        if self.lasttag == "style":
            self.outside += [word for word in ("@import", "url(") if word in data]


def _fetches(name: str, value: str) -> bool:
    """Return whether an attribute makes a browser ask for something that is not in the page."""
    return (name in FETCHING_ATTRIBUTES and not value.startswith(("#", "data:image/"))) or (name == "style" and "url(" in value)


def stands_alone(path: Path, name: str = "self_contained") -> Check:
    """Return the check `name`: the page asks for nothing outside itself, runs no script, and is smaller than `MAX_PAGE_BYTES`."""
    outside, length = PageReader(path).outside, path.stat().st_size
    return Check(
        name=name,
        passed=not outside and length < MAX_PAGE_BYTES,
        description=f"{length:,} bytes; asked for outside the page: {', '.join(outside[:3]) or 'nothing'}",
        metadata={"bytes": length, "outside": len(outside)},
    )
