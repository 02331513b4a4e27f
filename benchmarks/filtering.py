"""The quality rules against datatrove's, on the same documents in one run: speed of each family and of the chain, and every verdict.

    python -m benchmarks.filtering [--quick] [--corpus data/sample] [--megabytes N]

The corpus is a folder of Parquet files with a column `text`. Documents are drawn from each file by a seeded order, and a few odd
ones are added. Both sides see each text for the first time: ours keeps no vocabulary, only its compiled code is loaded before.
Speed is megabytes of UTF-8 by CPU second of one thread. datatrove's chain leaves at the first rule that fails (FineWeb's order:
Gopher repetition, Gopher quality, C4 without terminal punctuation, FineWeb); ours computes every score of every document.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.filters import Filter
from pipelines.plugins import build

TOP = {f"top_{n}_gram_character_fraction": f"top_{n}_gram" for n in (2, 3, 4)}
DUPLICATED = {f"duplicate_{n}_gram_character_fraction": f"duplicated_{n}_n_grams" for n in range(5, 11)}
REASONS: dict[str, dict[str, str]] = {
    "gopher_repetition": {
        "duplicate_paragraph_fraction": "dup_para_frac",
        "duplicate_paragraph_character_fraction": "dup_para_char_frac",
        "duplicate_line_fraction": "dup_line_frac",
        "duplicate_line_character_fraction": "dup_line_char_frac",
        **TOP,
        **DUPLICATED,
    },
    "gopher_quality": {
        "num_words": "gopher_short_doc",
        "num_words_max": "gopher_long_doc",
        "mean_word_length": "gopher_below_avg_threshold",
        "mean_word_length_max": "gopher_above_avg_threshold",
        "hash_to_word_ratio": "gopher_too_many_hashes",
        "ellipsis_to_word_ratio": "gopher_too_many_ellipsis",
        "bullet_line_fraction": "gopher_too_many_bullets",
        "ellipsis_line_fraction": "gopher_too_many_end_ellipsis",
        "alphabetic_word_fraction": "gopher_below_alpha_threshold",
        "num_stop_words": "gopher_enough_stop_words",
    },
    "c4_quality": {
        "num_lorem_ipsum_lines": "lorem_ipsum",
        "num_curly_bracket_lines": "curly_bracket",
        "num_sentences": "too_few_sentences",
    },
    "fineweb_quality": {
        "punctuated_line_fraction": "line_punct_ratio",
        "short_line_fraction": "short_line_ratio",
        "duplicate_line_character_fraction": "char_dup_ratio",
        "line_break_to_word_ratio": "list_ratio",
    },
}
"""Family, in FineWeb's order: our rule, and the reason that datatrove gives."""
DIALECTS = ("spacy_en", "whitespace", "uax29")
DIALECT_FAMILIES = ("gopher_repetition", "gopher_quality")
BATCH = 500
FAILED = "error"
"""In place of a reason where datatrove divides by zero."""

PROSE = "The miller said that he would have to wait for the wind, and with it came the rain of the north. "
ODD = {
    "empty": "",
    "white space": " \n\t \r\n ",
    "one character": "x",
    "no spaces": "abcdefghij" * 20_000,
    "one line": PROSE * 2_000,
    "NUL bytes": (PROSE + "\x00" * 7) * 20,
    "carriage returns": PROSE.replace(". ", ".\r\n") * 20,
    "Unicode breaks": PROSE.replace(", ", "\u2028").replace(". ", "\x85") * 20,
    "bullets": "".join(f"- {PROSE}\n" for _ in range(30)),
    "ellipses": "".join(f"{PROSE} ...\n" for _ in range(30)) + "wait… " * 90,
    "hashes": "# the of and to " * 40,
    "citations": (PROSE + "[1][citation needed] [edit] [] ") * 20,
    "notices": "We use cooKies here, and more.\nSee the Terms of Use of it.\nJAVASCRIPT is off here.\n" + PROSE * 9,
    "lorem": PROSE * 9 + "\nLorem ipsum dolor sit amet.",
    "emoticons": "well :) that ): is :-( of ^_^ and (8) it :D be 8) to xD :'( have " * 40,
    "no word for spaCy": f"{PROSE} IS_ALPHA {PROSE} (IS_ALPHA) {PROSE}" * 5,
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 40,
    "accents": "L'été à Zürich coûte 10km² à 5€, señor… «œuvre» — naïve! " * 40,
    "addresses": "mail a.b@c-d.com or see http://a.b-c.org:80/x-y?z=1, 8.8.8.8/x-y and 10.0.0.1/x-y to be of it. " * 30,
}
"""Documents that rules written for prose stumble over."""


@dataclass(frozen=True)
class Document:
    """One text and the file that it is from."""

    domain: str
    text: str


@dataclass(frozen=True)
class Verdicts:
    """Reasons by document, None where it is kept, and the CPU seconds they took."""

    reasons: list[str | None]
    seconds: float


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample"))
    parser.add_argument("--quick", action="store_true", help="6 MB instead of 40")
    parser.add_argument("--megabytes", type=float, help="text to draw, over all files")
    arguments = parser.parse_args()
    result = measure(read_documents(arguments.corpus, 1e6 * (arguments.megabytes or (6 if arguments.quick else 40))))
    _print(result)
    print(json.dumps({key: value for key, value in result.items() if key not in ("rules", "dropped", "flips")}))


def read_documents(corpus: Path, num_bytes: float) -> list[Document]:
    """Return `ODD` and documents of the Parquet files of `corpus`: by domain, in a seeded order, equal shares of `num_bytes`."""
    tables = {}
    for path in sorted(corpus.glob("*.parquet")):
        columns = pq.read_schema(path).names
        if "text" in columns:
            tables[path.stem] = pq.read_table(path, columns=[name for name in ("text", "domain") if name in columns]).to_pylist()
    by_domain: defaultdict[str, list[str]] = defaultdict(list)
    for stem, rows in tables.items():
        for row in rows:
            by_domain[row.get("domain") or stem].append(row["text"])
    documents = [Document("odd", text) for text in ODD.values()]
    left = num_bytes
    for place, (domain, texts) in enumerate(sorted(by_domain.items(), key=lambda item: sum(map(len, item[1])))):
        random.Random(domain).shuffle(texts)
        share, used = left / (len(by_domain) - place), 0
        for text in texts:
            if used >= share:
                break
            documents.append(Document(domain, text))
            used += len(text.encode("utf-8", "surrogatepass"))
        left -= used
    return documents


def measure(documents: Sequence[Document]) -> dict[str, object]:
    """Return speeds, ratios, shares of identical verdicts, drops by domain and flips between dialects."""
    texts = [document.text for document in documents]
    megabytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    peers = _peers()
    ours = {name: _ours(build("filters", name), name, texts) for name in REASONS}
    ours_c4 = _ours(build("filters", "fineweb_quality", {"lines": "c4"}), "fineweb_quality", texts)
    theirs = {name: _theirs(peers[name], texts) for name in REASONS}
    chain = _their_chain(peers, texts)
    our_chain_seconds = sum(ours[name].seconds for name in REASONS if name != "fineweb_quality") + ours_c4.seconds
    our_chain = [
        next((reason for reason in reasons if reason), None)
        for reasons in zip(*(ours[name].reasons for name in REASONS if name != "fineweb_quality"), ours_c4.reasons, strict=True)
    ]
    speed = {name: {"ours": megabytes / ours[name].seconds, "datatrove": megabytes / theirs[name].seconds} for name in REASONS}
    rules = {name: _by_rule(name, ours[name].reasons, theirs[name].reasons) for name in REASONS}
    same = {name: _share_same(ours[name].reasons, theirs[name].reasons) for name in REASONS}
    same["chain"] = _share_same(our_chain, chain.reasons)
    different = [row for name in REASONS for row in _different(name, documents, ours[name].reasons, theirs[name].reasons)]
    return {
        "chain_speedup": round(chain.seconds / our_chain_seconds, 1),
        "verdict_parity": min(same.values()),
        "parity": same,
        "chain_mb_per_second": {"ours": round(megabytes / our_chain_seconds, 2), "datatrove": round(megabytes / chain.seconds, 3)},
        "speed": {name: {side: round(value, 3) for side, value in sides.items()} for name, sides in speed.items()},
        "datatrove_errors": sum(reason == FAILED for verdicts in (*theirs.values(), chain) for reason in verdicts.reasons),
        "disagreements": different + _different("chain", documents, our_chain, chain.reasons),
        "documents": len(documents),
        "megabytes": round(megabytes, 2),
        "rules": rules,
        "dropped": _dropped(documents, {**{name: ours[name].reasons for name in REASONS}, "chain": our_chain}),
        "flips": _flips(documents, {name: ours[name].reasons for name in DIALECT_FAMILIES}),
    }


def _ours(plugin: Filter, name: str, texts: Sequence[str]) -> Verdicts:
    plugin.score([PROSE])  # loads the compiled code
    started = time.process_time()
    parts = [plugin.score(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    seconds = time.process_time() - started
    reasons: list[str | None] = [None] * len(texts)
    for rule in reversed(plugin.rules):
        scores = np.concatenate([part[rule.name] for part in parts])
        fails = scores < rule.threshold if rule.keep == "at_least" else scores > rule.threshold
        for row in np.flatnonzero(fails):
            reasons[row] = REASONS[name][rule.name]
    return Verdicts(reasons, seconds)


def _peers() -> dict[str, Callable[[object], object]]:
    """Return datatrove's filters as FineWeb sets them."""
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

    return {
        "gopher_repetition": GopherRepetitionFilter().filter,
        "gopher_quality": GopherQualityFilter().filter,
        "c4_quality": C4QualityFilter(filter_no_terminal_punct=False).filter,
        "fineweb_quality": FineWebQualityFilter().filter,
    }


def _theirs(judge: Callable[[object], object], texts: Sequence[str]) -> Verdicts:
    from datatrove.data import Document as Peer

    _judge(judge, Peer(text=PROSE, id=""))  # loads spaCy
    reasons, seconds = [], 0.0
    for text in texts:
        document = Peer(text=text, id="")
        started = time.process_time()
        reason = _judge(judge, document)
        seconds += time.process_time() - started
        reasons.append(reason)
    return Verdicts(reasons, seconds)


def _their_chain(peers: Mapping[str, Callable[[object], object]], texts: Sequence[str]) -> Verdicts:
    def judge(document: object) -> object:
        for filter_document in peers.values():
            verdict = filter_document(document)
            if verdict is not True:
                return verdict
        return True

    return _theirs(judge, texts)


def _judge(judge: Callable[[object], object], document: object) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of no words
        try:
            verdict = judge(document)
        except ZeroDivisionError:
            return FAILED
    return None if verdict is True else str(verdict[1])  # type: ignore[index]


def _is_same(ours: str | None, theirs: str | None) -> bool:
    """Return whether two verdicts agree; where there is nothing to judge datatrove says "empty" or fails, and our ratios do not apply."""
    return ours == theirs or theirs == "empty" or (ours is None and theirs == FAILED)


def _share_same(ours: Sequence[str | None], theirs: Sequence[str | None]) -> float:
    return sum(map(_is_same, ours, theirs)) / len(ours)


def _different(name: str, documents: Sequence[Document], ours: Sequence[str | None], theirs: Sequence[str | None]) -> list[dict[str, str]]:
    """Return where two sides disagree: family, domain, both reasons and how the document begins."""
    return [
        {"family": name, "domain": document.domain, "ours": str(mine), "datatrove": str(other), "text": document.text[:60]}
        for document, mine, other in zip(documents, ours, theirs, strict=True)
        if not _is_same(mine, other)
    ]


def _by_rule(name: str, ours: Sequence[str | None], theirs: Sequence[str | None]) -> dict[str, dict[str, float]]:
    found = {}
    for rule, reason in REASONS[name].items():
        differ = sum((mine == reason) != (other == reason) for mine, other in zip(ours, theirs, strict=True))
        found[rule] = {"dropped": sum(other == reason for other in theirs), "identical": 1 - differ / len(ours)}
    return found


def _dropped(documents: Sequence[Document], reasons: Mapping[str, Sequence[str | None]]) -> dict[str, dict[str, float]]:
    """Return the share of each domain's documents that each family drops at its default thresholds."""
    sizes = Counter(document.domain for document in documents)
    found: dict[str, dict[str, float]] = {domain: {} for domain in sorted(sizes)}
    for name, given in reasons.items():
        gone = Counter(document.domain for document, reason in zip(documents, given, strict=True) if reason)
        for domain, row in found.items():
            row[name] = gone[domain] / sizes[domain]
    return found


def _flips(documents: Sequence[Document], spacy: Mapping[str, Sequence[str | None]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return by dialect, family and domain how many documents pass with spaCy's words and fail with the dialect's, or the reverse."""
    texts = [document.text for document in documents]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for dialect in DIALECTS[1:]:
        found[dialect] = {}
        for name, reasons in spacy.items():
            other = _ours(build("filters", name, {"words": dialect}), name, texts).reasons
            flipped = [(a is None) != (b is None) for a, b in zip(reasons, other, strict=True)]
            found[dialect][name] = dict(Counter(document.domain for document, flip in zip(documents, flipped, strict=True) if flip))
    return found


def _print(result: Mapping[str, object]) -> None:
    console = Console(width=140)
    speeds = Table(title="MB of text per CPU second, one thread", title_justify="left")
    _columns(speeds, ["family", "ours, all scores", "datatrove", "ratio", "identical verdicts"])
    parity: dict[str, float] = result["parity"]  # type: ignore[assignment]
    rows = {**result["speed"], "chain": result["chain_mb_per_second"]}  # type: ignore[dict-item]
    for name, sides in rows.items():
        ratio = sides["ours"] / sides["datatrove"]
        speeds.add_row(name, f"{sides['ours']:.1f}", f"{sides['datatrove']:.2f}", f"{ratio:.0f}", f"{parity[name]:.4%}")
    console.print(speeds)
    verdicts = Table(title="by rule: documents that datatrove drops first by it, identical verdicts", title_justify="left")
    _columns(verdicts, ["family", "rule", "dropped", "identical"])
    for name, found in result["rules"].items():  # type: ignore[attr-defined]
        for rule, row in found.items():
            verdicts.add_row(name, rule, str(row["dropped"]), f"{row['identical']:.4%}")
    console.print(verdicts)
    for row in result["disagreements"]:  # type: ignore[attr-defined]
        console.print(f"disagree on {row['family']}, {row['domain']}: {row['ours']} / {row['datatrove']}: {row['text']!r}", markup=False)
    if any({row["ours"], row["datatrove"]} == {"lorem_ipsum", "curly_bracket"} for row in result["disagreements"]):  # type: ignore[attr-defined]
        console.print("(with lines of both kinds datatrove names the one that comes first; both are counted here)")
    dropped = Table(title="share of documents dropped at the default thresholds", title_justify="left")
    families = [*REASONS, "chain"]
    _columns(dropped, ["domain", *families])
    for domain, row in result["dropped"].items():  # type: ignore[attr-defined]
        dropped.add_row(domain, *(f"{row[name]:.1%}" for name in families))
    console.print(dropped)
    flips = Table(title="documents whose verdict flips with other words than spaCy's", title_justify="left")
    domains = list(result["dropped"])  # type: ignore[call-overload]
    _columns(flips, ["words", "family", *domains, "all"])
    for dialect, found in result["flips"].items():  # type: ignore[attr-defined]
        for name, row in found.items():
            flips.add_row(dialect, name, *(str(row.get(domain, 0)) for domain in domains), str(sum(row.values())))
    console.print(flips)


def _columns(table: Table, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right")


if __name__ == "__main__":
    main()
