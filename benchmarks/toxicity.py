"""Toxicity scores: how well they tell toxic prompts from clean sentences, and whom their default thresholds flag.

    python -m benchmarks.toxicity [--quick] [--prompts toxic.parquet] [--corpus data/sample]

With `--prompts`, a Parquet file with a column `text` of toxic prompts (RealToxicityPrompts, say): the area under the ROC curve
of each score against clean sentences of held-out text of the same lengths, with a bootstrap interval, and the share of prompts
above each default threshold. The prompts are web text and the sentences are edited prose, so a part of the area is register.
Always: the share of the corpus's clean documents that a default threshold flags, by domain and by topic, beside the share of
all; and the speed of the scores beside scikit-learn's, with the largest difference. `--quick` takes a tenth of the documents
and fewer resamples. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines import plugins
from pipelines.decisions import FilterSettings, decide, default_thresholds
from pipelines.documents import ALL_DOMAINS
from pipelines.filters import Filter

SCORES = ("toxicity.document_probability", "toxicity.sentence_probability_max", "toxic_words.listed_word_fraction")
FILTERS = ("toxicity", "toxic_words", "topics")
NO_LANGUAGE_OF_THE_CLASSIFIER = ("nonenglish", "url")
"""Domains that the project switches the classifier off for; they are measured, and left out of the base rate of topics."""
SENTENCE = re.compile(r"[A-Z][^.!?\n]{10,400}[.!?]")
SENTENCE_BREAK = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")
SEED = 20_260_101


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample"), help="directory with corpus.parquet and heldout.parquet")
    parser.add_argument("--prompts", type=Path, help="Parquet file with toxic prompts in column `text`")
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents, fewer resamples")
    arguments = parser.parse_args()
    console, started = Console(width=140), time.monotonic()
    result: dict[str, object] = {}
    if arguments.prompts:
        prompts = pq.read_table(arguments.prompts, columns=["text"])["text"].to_pylist()
        result |= separation(prompts, sentences(arguments.corpus / "heldout.parquet"), resamples=200 if arguments.quick else 2_000)
        _print_separation(console, result)
    flags = false_flags(arguments.corpus / "corpus.parquet", every=10 if arguments.quick else 1)
    _print_flags(console, flags)
    result |= flags["summary"] | speed(arguments.corpus / "corpus.parquet")
    print(json.dumps({**result, "seconds": round(time.monotonic() - started, 1)}))


def scores_of(texts: Sequence[str], filters: Sequence[str] = FILTERS) -> dict[str, list[str | None] | np.ndarray]:
    """Return the scores and labels of `texts` by ``<filter>.<name>``."""
    found: dict[str, list[str | None] | np.ndarray] = {}
    for name in filters:
        plugin = plugins.build("filters", name)
        assert isinstance(plugin, Filter)
        found |= {f"{name}.{column}": values for column, values in plugin.score(texts).items()}
    return found


def sentences(path: Path) -> list[str]:
    """Return the sentences of the held-out documents, each once, in order."""
    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    return list(dict.fromkeys(match[0] for text in texts for match in SENTENCE.finditer(text)))


def matched(wanted: Sequence[str], pool: Sequence[str]) -> list[str]:
    """Return for each of `wanted` an unused text of `pool` of the nearest length in characters, both taken in a seeded order."""
    random = np.random.default_rng(SEED)
    shuffled = [pool[index] for index in random.permutation(len(pool)).tolist()]
    free = sorted((len(text), number) for number, text in enumerate(shuffled))
    taken = []
    for index in random.permutation(len(wanted)).tolist():
        place = bisect_left(free, (len(wanted[index]), -1))
        near = [p for p in (place - 1, place) if 0 <= p < len(free)]
        best = min(near, key=lambda p: abs(free[p][0] - len(wanted[index])))
        taken.append(shuffled[free.pop(best)[1]])
    return taken


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive scores above a negative, ties by half."""
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + upto).mean() / (2 * len(negative)))


def separation(prompts: Sequence[str], pool: Sequence[str], *, resamples: int) -> dict[str, object]:
    """Return for each score its AUC with a bootstrap interval (95 %), and the shares above the default threshold."""
    clean = matched(prompts, pool)
    toxic, fine = scores_of(prompts, FILTERS[:2]), scores_of(clean, FILTERS[:2])
    thresholds = default_thresholds("toxicity") | default_thresholds("toxic_words")
    random, found = np.random.default_rng(SEED), {}
    for name in SCORES:
        positive, negative = (np.nan_to_num(np.asarray(scores[name], np.float64)) for scores in (toxic, fine))
        draws = [
            auc(positive[random.integers(len(positive), size=len(positive))], negative[random.integers(len(negative), size=len(negative))])
            for _ in range(resamples)
        ]
        low, high = np.quantile(draws, [0.025, 0.975])
        above = thresholds[name].value
        found[name] = {
            "auc": round(auc(positive, negative), 4),
            "auc_low": round(float(low), 4),
            "auc_high": round(float(high), 4),
            "prompts_flagged": round(float((positive > above).mean()), 4),
            "clean_flagged": round(float((negative > above).mean()), 4),
        }
    lengths = {"median_characters": [int(np.median([len(text) for text in texts])) for texts in (prompts, clean)]}
    return {"prompts": len(prompts), **lengths, "scores": found}


def false_flags(path: Path, *, every: int) -> dict[str, dict]:
    """Return the tables of the decisions over the corpus at default thresholds, and their summary."""
    rows = pq.read_table(path, columns=["text", "domain"]).to_pylist()[::every]
    thresholds = default_thresholds("toxicity") | default_thresholds("toxic_words")
    domains = sorted({row["domain"] for row in rows} - set(NO_LANGUAGE_OF_THE_CLASSIFIER))
    scores = scores_of([row["text"] for row in rows])
    columns = {
        "id": [str(number) for number in range(len(rows))],
        "domain": [row["domain"] for row in rows],
        "snapshot": [""] * len(rows),
        "characters": [len(row["text"]) for row in rows],
    }
    with tempfile.TemporaryDirectory() as directory, duckdb.connect() as connection:
        scored = Path(directory) / "scores.parquet"
        pq.write_table(pa.table({**columns, **scores}), scored)
        settings = FilterSettings(thresholds=dict.fromkeys(domains, thresholds))
        tables = decide(connection, settings, Path(directory) / "decisions.parquet", [scored])
    judged = [row for row in tables["by_domain"] if row["domain"] in domains]
    flagged, documents = (sum(row[key] for row in judged) for key in ("dropped", "documents_in"))
    topics = {row["topic"]: [row["share_flagged"], row["ratio"], row["ratio_low"], row["ratio_high"]] for row in _overall(tables)}
    return {
        "tables": tables,
        "summary": {"documents": documents, "share_flagged": round(flagged / documents, 5), "flagged_by_topic": topics},
    }


def speed(path: Path) -> dict[str, float]:
    """Return the MB/s of CPU time of the filter and of scikit-learn for documents and sentences, and how far they are apart."""
    from profanity_check import profanity_check

    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()[::30]
    size = sum(len(text.encode()) for text in texts) / 1e6
    scores_of(texts[:1], FILTERS[:1])
    started = time.process_time()
    ours = scores_of(texts, FILTERS[:1])
    middle = time.process_time()
    parts = [[part.lower()[:1_000] for part in SENTENCE_BREAK.split(text) if part and not part.isspace()] for text in texts]
    both = [*texts, *(part for found in parts for part in found)]
    theirs = profanity_check.model.predict_proba(profanity_check.vectorizer.transform(both))[:, 1]
    seconds = time.process_time() - middle
    ends = len(texts) + np.cumsum([len(found) for found in parts])
    worst = [found.max() if len(found) else np.nan for found in np.split(theirs, [len(texts), *ends[:-1]])[1:]]
    wanted = np.array([theirs[: len(texts)], worst])
    apart = np.nanmax(np.abs(np.array([ours[name] for name in SCORES[:2]]) - wanted))
    rates = {"mb_per_second": round(size / (middle - started), 1), "mb_per_second_scikit_learn": round(size / seconds, 1)}
    return {**rates, "largest_difference": float(apart)}


def _overall(tables: dict[str, list[dict]]) -> list[dict]:
    return [row for row in tables["by_topic"] if row["domain"] == ALL_DOMAINS]


def _print_separation(console: Console, found: dict) -> None:
    table = Table(title=f"{found['prompts']} toxic prompts against as many clean sentences of their lengths", title_justify="left")
    for column in ("score", "AUC", "95 %", "prompts above its threshold", "clean above"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, row in found["scores"].items():
        cells = (f"{row['auc']:.3f}", f"{row['auc_low']:.3f}–{row['auc_high']:.3f}", f"{row['prompts_flagged']:.1%}")
        table.add_row(name, *cells, f"{row['clean_flagged']:.2%}")
    console.print(table)


def _print_flags(console: Console, flags: dict) -> None:
    table = Table(title="clean documents flagged at the default thresholds, by rule", title_justify="left")
    for column in ("domain", "documents", "flagged", "share", *(name.partition(".")[2] for name in SCORES)):
        table.add_column(column, justify="left" if column == "domain" else "right")
    failed = {(row["domain"], row["rule"]): row["failed"] for row in flags["tables"]["by_rule"]}
    for row in flags["tables"]["by_domain"]:
        by_rule = [str(failed.get((row["domain"], name), "off")) for name in SCORES]
        table.add_row(row["domain"], f"{row['documents_in']:,}", str(row["dropped"]), f"{row['share_dropped']:.2%}", *by_rule)
    console.print(table)
    table = Table(title="by topic, all domains together", title_justify="left")
    for column in ("topic", "documents", "flagged", "share", "95 %", "ratio to all in their domains", "95 % "):
        table.add_column(column, justify="left" if column == "topic" else "right")
    for row in _overall(flags["tables"]):
        share = (f"{row['share_flagged']:.2%}", f"{row['share_flagged_low']:.2%}–{row['share_flagged_high']:.2%}")
        ratio = (f"{row['ratio']:.2f}", f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}") if row["ratio"] is not None else ("", "")
        table.add_row(row["topic"], f"{row['documents']:,}", str(row["flagged"]), *share, *ratio)
    console.print(table)


if __name__ == "__main__":
    main()
