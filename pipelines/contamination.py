"""Contamination: which documents hold text of an evaluation set, measured once by word n-grams, decided by recipes.

    files and domains of project.yaml   -> index_evaluation_sets -> items.parquet (one row per evaluation text)
    cleaned_corpus[source] + the items  -> measure_contamination -> scores.parquet, matches.parquet (every span)

Defaults follow GPT-3 (2005.14165, appendix C): words in lower case without punctuation, 13 of them to an n-gram; an evaluation
text with fewer words is looked for whole, down to 8. Other projects differ: Dolma (2402.00159) matches whole paragraphs of more
than 13 tokens, Tulu 3 (2411.15124) 8-grams that cover half of an evaluation text. All can be told from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines.documents import TableWriter, read_batches, row_count, split_partition
from pipelines.errors import GristmillError, UnknownName
from pipelines.files import file_hashes, matching_files
from pipelines.filters import Rule
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.ngrams import Matches, NgramIndex, Words, find_words
from pipelines.plugins import Settings

ITEMS = "items.parquet"
ITEM_SCHEMA = pa.schema([(name, pa.string()) for name in ("evaluation_set", "item", "domain", "text")])
"""`domain` is the domain whose documents the items are; null for items of a file."""
MATCH_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("evaluation_set", pa.string()),
        ("item", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("ngrams", pa.int32()),
        ("item_share", pa.float64()),
        ("span", pa.string()),
    ]
)
"""A row per stretch of a document that is also in an item: character offsets, the n-grams in it, the share of the item's n-grams
that the whole document holds, and the stretch itself, cut at `MAX_SPAN_CHARACTERS`."""
MAX_SPAN_CHARACTERS = 2_000
BATCH_CHARACTERS = 1_000_000
"""Documents are searched in batches of about this size: memory is 60 bytes per character of a batch, or of one longer document."""
GPT_3 = "Language Models are Few-Shot Learners, 2005.14165, appendix C: one common 13-gram is a collision"
OFF_BY_DEFAULT = "off where a recipe names no value"
RULES = (
    Rule("contamination.ngrams", "at_most", 0.0, GPT_3),
    Rule("contamination.document_share", "at_most", 1.0, OFF_BY_DEFAULT),
    Rule("contamination.item_share", "at_most", 1.0, OFF_BY_DEFAULT),
    Rule("contamination.items", "at_most", np.finfo(np.float32).max.item(), OFF_BY_DEFAULT),
)
"""N-grams of the document that are in an item; share of its words that they cover; the largest share of an item's n-grams that
it holds; items it has an n-gram of."""
SCORE_SCHEMA = pa.schema(
    [("id", pa.string()), ("domain", pa.string()), ("snapshot", pa.string()), ("characters", pa.int64())]
    + [(rule.name, pa.float64()) for rule in RULES]
)


class EvaluationSet(Settings):
    """Texts that no training document may hold: a file, or the documents of a domain."""

    path: str | None = None
    """A Parquet or JSON Lines (``.jsonl``) file, or a pattern for several, relative to the project."""
    columns: tuple[str, ...] = ("text",)
    """Columns of the file; each value is a text of its own."""
    domain: str | None = None
    """A domain instead of a file: all of its documents."""

    @model_validator(mode="after")
    def _one_place(self) -> EvaluationSet:
        if (self.path is None) == (self.domain is None):
            raise ValueError("an evaluation set names a path or a domain, one of the two")
        if self.path and not self.path.endswith((".parquet", ".jsonl")):
            raise ValueError(f"{self.path!r} is neither .parquet nor .jsonl")
        return self


class NgramSettings(Settings):
    """What counts as the same text."""

    ngram: int = Field(default=13, ge=2, le=100)
    """Words of an n-gram."""
    min_words: int = Field(default=8, ge=1)
    """An evaluation text with fewer words than an n-gram is looked for whole; with fewer than this it is not looked for."""


class IndexSettings(NgramSettings):
    """Which evaluation sets there are."""

    sets: dict[str, EvaluationSet] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    """Path -> SHA-256 of every file that `sets` names: its content is the identity."""
    root: Path = Field(default=Path(), exclude=True)
    """Where the paths start; not part of the identity."""


class ContaminationSettings(NgramSettings):
    """The partition that is measured."""

    domain: str
    snapshot: str


class DecontaminationSettings(Settings):
    """Which contaminated documents a recipe drops."""

    mode: Literal["keep", "off", "inverse"] = "keep"
    """``off`` keeps every document; ``inverse`` keeps the contaminated ones, to see what they are worth."""
    rules: dict[str, float | Literal["off"]] = Field(default_factory=dict)
    """`ngrams`, `document_share`, `item_share` or `items`: a document with a larger score is dropped. `ngrams` is 0 unless it is
    named here, the others are off."""

    @model_validator(mode="after")
    def _known(self) -> DecontaminationSettings:
        self.limits()
        return self

    def limits(self) -> dict[str, float]:
        """Return the largest score that passes, by the scores' columns.

        Raises:
            UnknownName: there is no such rule.
        """
        columns = {rule.name.partition(".")[2]: rule.name for rule in RULES}
        if unknown := next((name for name in self.rules if name not in columns), None):
            raise UnknownName("rule of decontamination", unknown, columns)
        values: dict[str, float | Literal["off"]] = {"ngrams": RULES[0].threshold, **self.rules}
        return {columns[name]: float(value) for name, value in values.items() if value != "off"}


def index_settings(sets: Mapping[str, EvaluationSet], ngrams: NgramSettings, root: Path) -> IndexSettings:
    """Return the settings of the index, with the hashes of the files it is made from.

    Raises:
        GristmillError: a file is not there.
    """
    paths = {path for chosen in sets.values() if chosen.path for path in matching_files(chosen.path, root)}
    return IndexSettings(sets=dict(sets), files=file_hashes(sorted(paths), root), root=root, **ngrams.model_dump())


def index_evaluation_sets(settings: IndexSettings, out: Path, *, corpora: tuple[Manifest, ...]) -> Outcome:
    """Write ``items.parquet``: the texts of every evaluation set, sets by name, texts in the order of their files.

    Args:
        corpora: cleaned_corpus of every partition of the domains that are evaluation sets.

    Raises:
        GristmillError: a file lacks a column, or is not what its suffix says.
    """
    names, texts = [], []
    with TableWriter(out / ITEMS, ITEM_SCHEMA) as writer:
        for name, chosen in sorted(settings.sets.items()):
            for item, text in _items(chosen, settings.root, corpora):
                writer.write({"evaluation_set": name, "item": item, "domain": chosen.domain, "text": text})
                names.append(name)
                texts.append(text)
    index = NgramIndex(texts, ngram=settings.ngram, min_words=settings.min_words)
    sets = np.array(names, dtype=object)
    table: list[dict[str, Json]] = []
    for name, chosen in sorted(settings.sets.items()):
        mine = sets == name
        ngrams = index.item_ngrams[mine]
        row: dict[str, Json] = {"evaluation_set": name, "from": chosen.path or f"domain {chosen.domain}", "items": int(mine.sum())}
        row |= {"words": int(index.item_words[mine].sum()), "ngrams": int(ngrams.sum()), "items_too_short": int((ngrams == 0).sum())}
        table.append(row)
    counts = {key: sum(int(row[key]) for row in table) for key in ("items", "words", "ngrams", "items_too_short")}  # type: ignore[arg-type]
    return Outcome(counts={"evaluation_sets": len(table), **counts}, tables={"by_set": table})


def _items(chosen: EvaluationSet, root: Path, corpora: Sequence[Manifest]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each item."""
    if chosen.domain is not None:
        for corpus in corpora:
            if split_partition(corpus.partition or "")[0] == chosen.domain:
                for batch in read_batches(corpus.file("documents.parquet"), ["id", "text"]):
                    yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
        return
    rows = (row for path in sorted(matching_files(str(chosen.path), root)) for row in _rows(path, chosen.columns))
    for number, row in enumerate(rows):
        for column in chosen.columns:
            if column not in row:
                raise GristmillError(f"{chosen.path}: row {number} has no column {column!r}; it has: {', '.join(row)}")
            if row[column]:
                yield (f"{number}.{column}" if len(chosen.columns) > 1 else str(number)), str(row[column])


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Json]]:
    if path.suffix == ".parquet":
        present = pq.read_schema(path).names
        for batch in read_batches(path, [column for column in columns if column in present] or None):
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise GristmillError(f"{path.name}:{number} is not JSON ({error}); a .jsonl file holds one object a line") from error
            if isinstance(row, dict):
                yield row


def measure_contamination(settings: ContaminationSettings, out: Path, *, cleaned: Manifest, items: Member) -> Outcome:
    """Write ``scores.parquet`` (the rules' columns, in the order of the documents) and ``matches.parquet`` (`MATCH_SCHEMA`).

    Items that are documents of the same domain are left out: an evaluation set is not contaminated by itself.
    """
    evaluation, index = _load(items.path, settings.domain, settings.ngram, settings.min_words)
    counts = dict.fromkeys(("documents_in", "documents", "contaminated", "spans", "characters"), 0)
    counts["documents_in"] = row_count(cleaned.file("documents.parquet"))
    hit: dict[str, set[str]] = {}
    with TableWriter(out / "scores.parquet", SCORE_SCHEMA) as scores, TableWriter(out / "matches.parquet", MATCH_SCHEMA) as matches:
        for names, texts in _batches(cleaned.file("documents.parquet")):
            words = find_words(texts)
            found = _Found(words, index, index.find(words))
            columns = {name: values.tolist() for name, values in found.scores().items()}
            for row, (name, text) in enumerate(zip(names, texts, strict=True)):
                place = {"id": name, "domain": settings.domain, "snapshot": settings.snapshot, "characters": len(text)}
                scores.write({**place, **{column: values[row] for column, values in columns.items()}})
                counts["characters"] += len(text)
                counts["contaminated"] += columns["contamination.ngrams"][row] > 0
            for text, item, start, end, ngrams, share in found.spans():
                span = texts[text][start:end][:MAX_SPAN_CHARACTERS]
                row = {"id": names[text], "start": start, "end": end, "ngrams": ngrams, "item_share": share, "span": span}
                matches.write(row | {key: evaluation[key][item] for key in ("evaluation_set", "item")})
                hit.setdefault(evaluation["evaluation_set"][item], set()).add(evaluation["item"][item])
            counts["documents"] += len(names)
    counts["spans"] = matches.rows
    table: list[dict[str, Json]] = [{"evaluation_set": name, "items_hit": len(found)} for name, found in sorted(hit.items())]
    share = counts["contaminated"] / counts["documents"] if counts["documents"] else 0.0
    return Outcome(counts=counts, metrics={"share_contaminated": share}, tables={"by_set": table})


@lru_cache(maxsize=2)
def _load(path: Path, domain: str, ngram: int, min_words: int) -> tuple[dict[str, list[str]], NgramIndex]:
    """Return set and name of each item that is not of `domain`, and the index of their texts."""
    table = pq.read_table(path).to_pydict()
    mine = [row for row, of in enumerate(table["domain"]) if of != domain]
    index = NgramIndex([table["text"][row] for row in mine], ngram=ngram, min_words=min_words)
    return {key: [table[key][row] for row in mine] for key in ("evaluation_set", "item")}, index


def _batches(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ids and texts, in batches of about `BATCH_CHARACTERS`."""
    names: list[str] = []
    texts: list[str] = []
    characters = 0
    for batch in read_batches(path, ["id", "text"]):
        for name, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True):
            if names and characters + len(text) > BATCH_CHARACTERS:
                yield names, texts
                names, texts, characters = [], [], 0
            names.append(name)
            texts.append(text)
            characters += len(text)
    if names:
        yield names, texts


class _Found:
    """What was found in a batch of texts, by text and item."""

    def __init__(self, words: Words, index: NgramIndex, matches: Matches) -> None:
        self._words, self._index, self._matches = words, index, matches
        self._texts = len(words.offsets) - 1
        self._text = words.text_of()[matches.word]
        place, self._item = index.items_of(matches.entry)
        self._place = place
        triples = np.unique(np.stack([self._text[place], self._item, matches.entry[place]], axis=1), axis=0)
        self._pairs, ngrams = np.unique(triples[:, :2], axis=0, return_counts=True)
        self._share = ngrams / index.item_ngrams[self._pairs[:, 1]]

    def scores(self) -> dict[str, np.ndarray]:
        """Return each rule's score of every text."""
        words = np.diff(self._words.offsets)
        starting = np.unique(self._matches.word)
        share = np.zeros(self._texts)
        np.maximum.at(share, self._pairs[:, 0], self._share)
        columns = (
            np.bincount(self._words.text_of()[starting], minlength=self._texts),
            self._covered() / np.maximum(words, 1),
            share,
            np.bincount(self._pairs[:, 0], minlength=self._texts),
        )
        return {rule.name: values.astype(np.float64) for rule, values in zip(RULES, columns, strict=True)}

    def _covered(self) -> np.ndarray:
        """Return how many words of each text an n-gram covers."""
        change = np.zeros(len(self._words.starts) + 1, dtype=np.int64)
        np.add.at(change, self._matches.word, 1)
        np.add.at(change, self._matches.word + self._matches.length, -1)
        covered = np.cumsum(change)[:-1] > 0
        return np.bincount(self._words.text_of()[covered], minlength=self._texts)

    def spans(self) -> Iterator[tuple[int, int, int, int, int, float]]:
        """Yield text, item, first and last character, n-grams and the item's share of every unbroken stretch, in that order."""
        word, length = self._matches.word[self._place], self._matches.length[self._place]
        text = self._text[self._place]
        order = np.lexsort((word, self._item, text))
        word, length, text, item = word[order], length[order], text[order], self._item[order]
        breaks = np.ones(len(word), dtype=bool)
        breaks[1:] = (text[1:] != text[:-1]) | (item[1:] != item[:-1]) | (word[1:] != word[:-1] + 1)
        firsts = np.flatnonzero(breaks)
        lasts = np.append(firsts[1:], len(word)) - 1 if len(firsts) else firsts
        shares = {(int(t), int(i)): float(share) for (t, i), share in zip(self._pairs, self._share, strict=True)}
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            at = int(text[first])
            begin = self._words.text_starts[at]
            start = int(self._words.starts[word[first]] - begin)
            end = int(self._words.ends[word[last] + length[last] - 1] - begin)
            yield at, int(item[first]), start, end, last - first + 1, shares[at, int(item[first])]


def sets_have_items(draft: Manifest) -> Check:
    """Every evaluation set has texts that are long enough to be looked for."""
    rows = draft.outcome.tables["by_set"]
    empty = [str(row["evaluation_set"]) for row in rows if not row["ngrams"]]
    short = sum(int(row["items_too_short"]) for row in rows)  # type: ignore[arg-type]
    remedy = "; lower `min_words` under `contamination` in project.yaml, or name other columns" if empty else ""
    return Check(
        name="sets_have_items",
        passed=not empty,
        description=f"{len(rows)} sets, {short} texts too short; sets without a text to look for: {', '.join(empty) or 'none'}{remedy}",
        metadata={"evaluation_sets": len(rows), "empty": len(empty), "items_too_short": short},
    )


def documents_measured(draft: Manifest) -> Check:
    """There is one row of finite scores for each document that came in."""
    table = pq.read_table(draft.directory / "scores.parquet")
    wrong = sum(int((~np.isfinite(table[rule.name].to_numpy())).sum()) for rule in RULES)
    expected = draft.counts["documents_in"]
    return Check(
        name="documents_measured",
        passed=table.num_rows == expected == draft.counts["documents"] and not wrong,
        description=f"{expected} documents, {table.num_rows} rows, {wrong} scores missing or infinite",
        metadata={"documents": expected, "rows": table.num_rows, "wrong": wrong},
    )


def matches_explain_scores(draft: Manifest) -> Check:
    """A document has spans where it has a matching n-gram, and only there, and as many items in them as its score says."""
    scores = pq.read_table(draft.directory / "scores.parquet", columns=["id", "contamination.items"])
    expected = {name: int(items) for name, items in zip(*(scores[key].to_pylist() for key in scores.column_names), strict=True) if items}
    found: dict[str, set[tuple[str, str]]] = {}
    for batch in read_batches(draft.directory / "matches.parquet", ["id", "evaluation_set", "item"]):
        for name, chosen, item in zip(*(batch[key].to_pylist() for key in batch.schema.names), strict=True):
            found.setdefault(name, set()).add((chosen, item))
    wrong = sum(len(found.get(name, ())) != expected.get(name, 0) for name in found.keys() | expected.keys())
    return Check(name="matches_explain_scores", passed=not wrong, description=f"{wrong} documents differ", metadata={"documents": wrong})


INDEX_AUDITS = (sets_have_items,)
CONTAMINATION_AUDITS = (documents_measured, matches_explain_scores)
