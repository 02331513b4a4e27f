"""Build the embedded data sample in ``data/sample``.

Inputs
------
``--source DIR``
    A directory with ``corpus.parquet``, ``dirty.parquet`` and ``heldout.parquet``.
``--web-pages DIR_OR_DEB``
    The Debian package ``rust-doc``, either the ``.deb`` file or the directory into
    which ``dpkg -x`` unpacked it. For a directory, ``--web-version`` names the version.

Outputs
-------
``corpus.parquet``   the input corpus plus the domain ``web`` (raw HTML pages).
``dirty.parquet``    the input dirty documents, with dirt planted in code and math.
``labels.parquet``   what is wrong with each dirty document. For evaluation only.
``heldout.parquet``  WikiText-2, domain ``wikitext``.

Rules
-----
* ``collected`` is the month ``int(blake2b(id, 8 bytes)) % 3`` after 2026-01.
* A dirty document has the id ``domain-`` + 16 hex digits of blake2b(its old id). It has
  no title. A dirty ``web`` document has the language ``en``, since the input states the
  kind of dirt there.
* Altered copies of texts under the licence ``verbatim-redistributable`` are left out.
* A page of ``rust-doc`` is a candidate if its book is in ``WEB_BOOKS``, its HTML has at
  most ``WEB_MAX_BYTES`` bytes, its text (without head, script, style and nav) has at
  least ``WEB_MIN_TEXT`` bytes and no earlier path has the same text. Candidates are
  taken in the order of blake2b(path) until the text taken reaches ``--web-text-mb``.
* The dirt in ``code`` and ``math`` is planted by ``plant``: the clean documents of the
  domain are shuffled with a fixed seed, and each kind takes the next ``--per-kind``
  documents that are long enough for it. No origin is used twice within a domain.

The same inputs, arguments and pyarrow version give the same bytes. Of ``random`` only
``Random.random`` is used, as its sequence is the same in every Python version.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import random
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, str | None]
T = TypeVar("T")

COLUMNS = (
    "id",
    "text",
    "domain",
    "source",
    "license",
    "date",
    "url",
    "lang",
    "title",
    "collected",
)
LABEL_COLUMNS = ("id", "noise", "origin", "planted")
DICTIONARY_COLUMNS = ("domain", "collected", "source", "license", "lang", "noise")
MONTHS = ("2026-01-01", "2026-02-01", "2026-03-01")
SEED = "gristmill-sample-1"
MAX_SAMPLE_BYTES = 11_000_000
VERBATIM = "verbatim-redistributable"

WEB_BOOKS = (
    "book",
    "edition-guide",
    "nomicon",
    "reference",
    "rust-by-example",
    "rustc",
    "rustdoc",
)
WEB_PREFIX = "usr/share/doc/rust-doc/"
WEB_LICENSE = "MIT OR Apache-2.0"
WEB_MAX_BYTES = 120_000
WEB_MIN_TEXT = 600

CODE_CUT = 6_000
CODE_TWIN_MAX = 14_000


def blake(text: str) -> str:
    """Return 16 hex digits of the BLAKE2b digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def month_of(doc_id: str) -> str:
    """Return the collection month of a document id."""
    return MONTHS[int(blake(doc_id), 16) % 3]


def read_rows(path: Path) -> list[Row]:
    """Read a Parquet file as a list of rows."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def field(row: Row, name: str) -> str:
    """Return a column that must not be null."""
    value = row[name]
    if value is None:
        raise ValueError(f"{row['id']}: {name} is null")
    return value


# --- web pages ---------------------------------------------------------------------


class TextParser(HTMLParser):
    """Collect the text of a page without head, script, style and nav."""

    SKIPPED = frozenset({"head", "script", "style", "nav"})

    def __init__(self) -> None:
        """Start with no text."""
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Enter a skipped element."""
        self.depth += tag in self.SKIPPED

    def handle_endtag(self, tag: str) -> None:
        """Leave a skipped element."""
        self.depth -= tag in self.SKIPPED

    def handle_data(self, data: str) -> None:
        """Keep text outside the skipped elements."""
        if self.depth <= 0:
            self.parts.append(data)


def page_text(html: str) -> str:
    """Return the text of a page with runs of white space made one space."""
    parser = TextParser()
    parser.feed(html)
    parser.close()
    return " ".join("".join(parser.parts).split())


def page_title(html: str) -> str | None:
    """Return the content of the title element."""
    found = re.search(r"<title>(.*?)</title>", html, re.DOTALL | re.IGNORECASE)
    return " ".join(unescape(found.group(1)).split()) if found else None


def deb_members(path: Path) -> dict[str, bytes]:
    """Return the members of a .deb file, which is an ar archive."""
    data = path.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise ValueError(f"{path.name}: not a Debian package")
    members: dict[str, bytes] = {}
    at = 8
    while at < len(data):
        name = data[at : at + 16].decode("ascii").strip().rstrip("/")
        size = int(data[at + 48 : at + 58])
        members[name] = data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    return members


def tar_files(data: bytes, wanted: Callable[[str, int], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted regular files of a tar archive as (path, content)."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|*") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name, member.size):
                handle = archive.extractfile(member)
                if handle is not None:
                    yield name, handle.read()


def web_wanted(name: str, size: int) -> bool:
    """Tell whether a file of rust-doc is the copyright file or a candidate page."""
    if name == WEB_PREFIX + "copyright":
        return True
    parts = name.removeprefix(WEB_PREFIX).split("/")
    return (
        name.startswith(WEB_PREFIX)
        and len(parts) > 2
        and parts[0] == "html"
        and parts[1] in WEB_BOOKS
        and name.endswith(".html")
        and size <= WEB_MAX_BYTES
    )


def read_package(path: Path, version: str | None) -> tuple[dict[str, bytes], str]:
    """Return the wanted files of rust-doc by path, and the package version."""
    if path.is_dir():
        if version is None:
            raise SystemExit("--web-version is needed when --web-pages is a directory")
        files = {
            name: file.read_bytes()
            for file in sorted((path / WEB_PREFIX).rglob("*"))
            if file.is_file() and not file.is_symlink() and web_wanted(name := file.relative_to(path).as_posix(), file.stat().st_size)
        }
        return files, version
    members = deb_members(path)
    control = next(v for k, v in members.items() if k.startswith("control.tar"))
    payload = next(v for k, v in members.items() if k.startswith("data.tar"))
    (_, about), *_ = tar_files(control, lambda name, size: name == "control")
    found = re.search(r"^Version: (\S+)$", about.decode(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path.name}: no version in the control file")
    return dict(tar_files(payload, web_wanted)), found.group(1)


def check_license(copyright_file: str) -> None:
    """Raise unless the copyright file puts src/doc under MIT or Apache-2.0."""
    for stanza in re.split(r"\n\s*\n", copyright_file):
        if re.search(
            r"^\s+src/doc/\*$.*^License: MIT or Apache-2\.0$",
            stanza,
            re.MULTILINE | re.DOTALL,
        ):
            return
    raise ValueError("rust-doc: src/doc is not under MIT or Apache-2.0")


def web_rows(path: Path, version: str | None, text_bytes: int) -> list[Row]:
    """Return the picked pages of rust-doc as rows of the domain web."""
    files, found_version = read_package(path, version)
    check_license(files.pop(WEB_PREFIX + "copyright").decode())
    candidates: list[tuple[str, str, str, int]] = []
    seen: set[str] = set()
    for name in sorted(files):
        html = files[name].decode()
        text = page_text(html)
        size = len(text.encode())
        if size >= WEB_MIN_TEXT and text not in seen:
            seen.add(text)
            url = name.removeprefix(WEB_PREFIX + "html/")
            candidates.append((blake(url), url, html, size))
    rows: list[Row] = []
    taken = 0
    for _, url, html, size in sorted(candidates):
        if taken >= text_bytes:
            break
        taken += size
        rows.append(
            {
                "id": f"web-{blake(html)}",
                "text": html,
                "domain": "web",
                "source": f"deb:rust-doc={found_version}",
                "license": WEB_LICENSE,
                "date": None,
                "url": url,
                "lang": "en",
                "title": page_title(html),
            }
        )
    if taken < text_bytes:
        raise ValueError(f"rust-doc: only {taken} bytes of text")
    print(f"web: {len(rows)} of {len(candidates)} pages, {taken / 1e6:.3f} MB of text")
    return rows


# --- planted dirt ------------------------------------------------------------------


class Draw:
    """Seeded choices that use nothing but ``Random.random``."""

    def __init__(self, *key: str) -> None:
        """Seed the choices with the parts of a key."""
        self._random = random.Random("|".join((SEED, *key))).random

    def below(self, n: int) -> int:
        """Return an integer from 0 to n - 1."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """Return the items in a new order."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


def head_lines(text: str, limit: int) -> str:
    """Return the first whole lines of a text, at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    cut = text.rfind("\n", 0, limit)
    return text[: cut if cut > 0 else limit]


def split_statement(text: str) -> tuple[str, str]:
    """Split a math document into its prose and its formal statement."""
    prose, mark, statement = text.partition("\nStatement:")
    return prose, mark + statement


CHROME = (
    "Home | Theorems | Help | Search",
    "Previous | Next | Up | Contents",
    "Share this page | Print | Cite",
)
LICENSE_COMMENTS = (
    "# Licensed under the PSF License Version 2. See LICENSE for details.",
    "# This file is distributed under the terms of the PSF License Version 2.",
    "# See the file LICENSE for the PSF License under which this file is distributed.",
)
AUTHORS = (
    "André Müller",
    "René Dvořák",
    "Zoë Håkansson",
    "Łukasz Gómez",
    "Søren Benoît",
)
AREA_CODES = ("202", "312", "415", "617")
LEFT, RIGHT, APOSTROPHE, DASH = "\u201c", "\u201d", "\u2019", "\u2013"
FIRST = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
LAST = ("smith", "jones", "muller", "garcia", "brown", "novak")


def exact_duplicate(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Keep the text."""
    return text, []


def near_duplicate(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Edit 1.6 % of the words (at least two) and add a line on top."""
    parts = re.split(r"(\s+)", text)
    words = [i for i, part in enumerate(parts) if part and not part.isspace()]
    for _ in range(max(2, round(0.016 * len(words)))):
        at = draw.below(len(words) - 1)
        i, j = words[at], words[at + 1]
        edit = draw.below(3)
        if edit == 0:
            parts[i] = parts[words[draw.below(len(words))]]
        elif edit == 1:
            parts[i], parts[j] = parts[j], parts[i]
        else:
            parts[i] = ""
    top = draw.pick(LICENSE_COMMENTS if domain == "code" else CHROME)
    return top + ("\n" if domain == "code" else "\n\n") + "".join(parts), []


def misread(text: str) -> str:
    """Read the UTF-8 bytes of a text as Windows-1252."""
    out: list[str] = []
    for byte in text.encode():
        try:
            out.append(bytes((byte,)).decode("cp1252"))
        except UnicodeDecodeError:
            out.append(chr(byte))
    return "".join(out)


def typographic(text: str) -> str:
    """Put typographic quotes and dashes in place of the typewriter ones."""
    text = re.sub(r"\"([^\"\n]*)\"", LEFT + r"\1" + RIGHT, text)
    text = re.sub(r"(?<=\w)'(?=\w)", APOSTROPHE, text)
    text = re.sub(r" --? ", f" {DASH} ", text)
    return re.sub(r"(?<=[a-z])-(?=[a-z])", DASH, text)


def mojibake(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Insert non-ASCII characters in prose or comments, then misread once or twice."""
    author = draw.pick(AUTHORS)
    if domain == "code":
        lines = head_lines(text, CODE_CUT).split("\n")
        lines = [line[: line.index("#")] + typographic(line[line.index("#") :]) if "#" in line else line for line in lines]
        text = f"# Author: {author} {DASH} {LEFT}reviewed{RIGHT}\n" + "\n".join(lines)
    else:
        prose, statement = split_statement(text)
        remark = f" (Contributed by {author} {DASH} {LEFT}revised{RIGHT}.)"
        text = typographic(prose) + remark + statement
    for _ in range(draw.between(1, 2)):
        text = misread(text)
    return text, []


def shuffled_words(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Shuffle the words of the text, or for code the words of each line."""
    if domain != "code":
        return " ".join(draw.shuffled(text.split())), []
    out = []
    for line in head_lines(text, CODE_CUT).split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        out.append(indent + " ".join(draw.shuffled(line.split())))
    return "\n".join(out), []


def repetition(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Repeat the first 100 to 200 characters 15 to 45 times."""
    unit = text[: draw.between(100, 200)]
    return "\n".join([unit] * draw.between(15, 45)), []


def fragment(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Keep 10 to 70 characters that start at a random word."""
    starts = [m.start() for m in re.finditer(r"\S+", text) if m.start() < len(text) - 80]
    start = draw.pick(starts)
    return text[start : start + draw.between(10, 70)], []


def personal(draw: Draw) -> list[tuple[str, str, str]]:
    """Return one to three (kind, name, value) triples with reserved values."""
    out = []
    for kind in draw.shuffled(("mail", "phone", "address"))[: draw.between(1, 3)]:
        first, last = draw.pick(FIRST), draw.pick(LAST)
        area = draw.pick(AREA_CODES)
        value = {
            "mail": f"{first}.{last}{draw.between(1, 99)}@example.com",
            "phone": f"({area}) 555-01{draw.below(100):02d}",
            "address": f"192.0.2.{draw.between(1, 254)}",
        }[kind]
        out.append((kind, f"{first.title()} {last.title()}", value))
    return out


def pii(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Insert personal data: comment lines in code, sentences in prose."""
    found = personal(draw)
    if domain == "code":
        lines = head_lines(text, CODE_CUT).split("\n")
        for kind, name, value in found:
            comment = {
                "mail": f"# Maintainer: {name} <{value}>",
                "phone": f"# Ask {name}, phone {value}",
                "address": f"# Tested on the machine of {name} at {value}",
            }[kind]
            lines.insert(draw.below(len(lines) + 1), comment)
        return "\n".join(lines), [value for _, _, value in found]
    prose, statement = split_statement(text)
    for kind, name, value in found:
        prose += {
            "mail": f" (Contributed by {name}, {value}.)",
            "phone": f" Questions to {name}, phone {value}.",
            "address": f" Verified by {name} from {value}.",
        }[kind]
    return prose + statement, [value for _, _, value in found]


def minified_code(text: str, domain: str, draw: Draw) -> tuple[str, list[str]]:
    """Put the code on one line, or turn its start into a base64 literal."""
    if draw.below(2):
        return " ".join(head_lines(text, CODE_CUT).split()), []
    blob = base64.b64encode(text.encode()[: draw.between(900, 2400)]).decode()
    return f'{draw.pick(("DATA", "_blob", "payload"))} = "{blob}"', []


Maker = Callable[[str, str, Draw], tuple[str, list[str]]]
KINDS: tuple[tuple[str, Maker, tuple[str, ...], int, int], ...] = (
    # kind, maker, domains, least words, greatest number of characters
    ("exact_duplicate", exact_duplicate, ("code", "math"), 20, CODE_TWIN_MAX),
    ("near_duplicate", near_duplicate, ("code", "math"), 30, CODE_TWIN_MAX),
    ("minified_code", minified_code, ("code",), 100, 10**9),
    ("mojibake", mojibake, ("code", "math"), 20, 10**9),
    ("shuffled_words", shuffled_words, ("code", "math"), 20, 10**9),
    ("repetition", repetition, ("code", "math"), 30, 10**9),
    ("fragment", fragment, ("code", "math"), 30, 10**9),
    ("pii", pii, ("code", "math"), 20, 10**9),
)


def plant(corpus: Sequence[Row], domain: str, per_kind: int) -> Iterator[tuple[Row, Row]]:
    """Yield (dirty row, label row) pairs made from clean documents of a domain."""
    clean = {field(row, "id"): row for row in corpus if row["domain"] == domain}
    order = Draw(domain).shuffled(sorted(clean))
    for kind, maker, domains, least_words, most_chars in KINDS:
        if domain not in domains:
            continue
        chosen = []
        for origin in order:
            text = field(clean[origin], "text")
            if len(text.split()) >= least_words and len(text) <= most_chars:
                chosen.append(origin)
                if len(chosen) == per_kind:
                    break
        if len(chosen) < per_kind:
            raise ValueError(f"{domain}: too few documents for {kind}")
        order = [origin for origin in order if origin not in set(chosen)]
        for origin in chosen:
            old = clean[origin]
            before = field(old, "text")
            text, values = maker(before, domain, Draw(domain, kind, origin))
            if (text == before) != (kind == "exact_duplicate"):
                raise ValueError(f"{origin}: {kind} has no effect")
            if not all(value in text for value in values):
                raise ValueError(f"{origin}: a planted value is missing")
            row = {**old, "id": f"{kind}-0-{origin}", "text": text}
            label: Row = {
                "noise": kind,
                "origin": origin,
                "planted": json.dumps(values) if values else None,
            }
            yield row, label


def dirty_rows(corpus: Sequence[Row], dirty: Sequence[Row], per_kind: int) -> tuple[list[Row], list[Row]]:
    """Return the dirty rows and their labels."""
    pairs: list[tuple[Row, Row]] = []
    for row in dirty:
        if row["license"] == VERBATIM and row["noise"] != "exact_duplicate":
            continue
        planted = row["title"] if row["noise"] == "pii" else None
        label = {"noise": row["noise"], "origin": row["origin"], "planted": planted}
        lang = "en" if row["domain"] == "web" else row["lang"]
        pairs.append(({**row, "lang": lang}, label))
    for domain in ("code", "math"):
        pairs += plant(corpus, domain, per_kind)
    rows: list[Row] = []
    labels: list[Row] = []
    for row, label in pairs:
        new_id = f"{row['domain']}-{blake(field(row, 'id'))}"
        rows.append({**row, "id": new_id, "title": None})
        labels.append({"id": new_id, **label})
    return rows, labels


def heldout_rows(rows: Sequence[Row]) -> list[Row]:
    """Return WikiText-2 as the domain wikitext, with its title marks undone."""
    return [
        {
            **row,
            "domain": "wikitext",
            "title": re.sub(r" @(.)@ ", r"\1", row["title"]) if row["title"] else None,
        }
        for row in rows
    ]


# --- output ------------------------------------------------------------------------


def write(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write rows as Parquet, one row group for each domain and month."""
    rows = sorted(
        rows,
        key=lambda r: (r.get("domain") or "", r.get("collected") or "", r["id"] or ""),
    )
    groups: dict[tuple[str | None, str | None], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get("domain"), row.get("collected")].append(row)
    schema = pa.schema([(name, pa.string()) for name in columns])
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in columns if name in DICTIONARY_COLUMNS],
        write_statistics=[name for name in columns if name != "text"],
        data_page_size=64 << 20,
    ) as writer:
        for group in groups.values():
            table = pa.table({name: [row.get(name) for row in group] for name in columns}, schema)
            writer.write_table(table, row_group_size=len(group))


def print_table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("\n| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(str(cell) for cell in line) + " |")


def megabytes(rows: Iterable[Row]) -> str:
    """Return the size of the texts in MB."""
    return f"{sum(len(field(row, 'text').encode()) for row in rows) / 1e6:.3f}"


def report(tables: dict[str, list[Row]], labels: Sequence[Row]) -> None:
    """Print the counts of the sample as Markdown tables."""
    for name, rows in tables.items():
        lines = []
        for domain in sorted({field(row, "domain") for row in rows}):
            part = [row for row in rows if row["domain"] == domain]
            months = Counter(row["collected"] for row in part)
            if set(months) != set(MONTHS):
                raise ValueError(f"{name}: {domain} misses a month")
            lines.append((domain, len(part), megabytes(part), *(months[m] for m in MONTHS)))
        print_table((name, "documents", "MB", *(m[:7] for m in MONTHS)), lines)
    domain_of = {row["id"]: field(row, "domain") for row in tables["dirty"]}
    domains = sorted(set(domain_of.values()))
    cells = Counter((label["noise"], domain_of[label["id"]]) for label in labels)
    kinds = sorted({field(label, "noise") for label in labels})
    print_table(
        ("noise", *domains, "total"),
        (
            (
                kind,
                *(cells[kind, d] for d in domains),
                sum(cells[kind, d] for d in domains),
            )
            for kind in kinds
        ),
    )
    sources: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for name, rows in tables.items():
        for row in rows:
            sources[name, field(row, "source"), field(row, "license")].append(row)
    print_table(
        ("file", "source", "licence", "documents", "MB"),
        ((*key, len(rows), megabytes(rows)) for key, rows in sorted(sources.items())),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Build the sample and print its counts."""
    parser = argparse.ArgumentParser(description="Build the embedded data sample.")
    parser.add_argument("--source", type=Path, required=True, help="the three input files")
    parser.add_argument("--web-pages", type=Path, required=True, help="rust-doc, .deb or unpacked")
    parser.add_argument("--web-version", help="version of rust-doc, if it is unpacked")
    parser.add_argument("--web-text-mb", type=float, default=1.8, help="text inside the pages")
    parser.add_argument("--per-kind", type=int, default=20, help="planted of each kind and domain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample")
    args = parser.parse_args(argv)

    corpus = read_rows(args.source / "corpus.parquet")
    web = web_rows(args.web_pages, args.web_version, round(args.web_text_mb * 1e6))
    dirty, labels = dirty_rows(corpus, read_rows(args.source / "dirty.parquet"), args.per_kind)
    tables = {
        "corpus": corpus + web,
        "dirty": dirty,
        "heldout": heldout_rows(read_rows(args.source / "heldout.parquet")),
    }
    ids = [field(row, "id") for rows in tables.values() for row in rows]
    if len(ids) != len(set(ids)):
        raise ValueError("an id occurs twice")

    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        for row in rows:
            row["collected"] = month_of(field(row, "id"))
        write(args.out / f"{name}.parquet", rows, COLUMNS)
    write(args.out / "labels.parquet", labels, LABEL_COLUMNS)
    report(tables, labels)

    sizes = {path.name: path.stat().st_size for path in sorted(args.out.glob("*.parquet"))}
    print_table(("file", "bytes"), sizes.items())
    if sum(sizes.values()) >= MAX_SAMPLE_BYTES:
        raise SystemExit(f"the sample has {sum(sizes.values())} bytes")


if __name__ == "__main__":
    main()
