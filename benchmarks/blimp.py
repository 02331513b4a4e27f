"""BLiMP by this project and by lm-evaluation-harness: the same accuracy of every paradigm, from the same checkpoint and sentences.

    python -m benchmarks.blimp [--quick] [--checkpoint DIR] [--items data/eval/blimp.parquet]

The checkpoint is a Hugging Face directory with a tokenizer; without one a model of 0.7 M parameters is trained on the sample first. The
harness gets a YAML per paradigm that includes its own `tasks/blimp/_template_yaml` and differs from its tasks in the data set alone:
a local Parquet file with the columns of the original. Its model is its `HFLM` around the model loaded here, in batches of 64
sequences (its default of 1 takes longer).

CPU seconds of one thread, the model loaded, both having scored a few pairs before. Whole: from the names of files to accuracies; the
harness reads its index of tasks once, before. Scoring: tokenizing and forward passes alone. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.models import load_checkpoint, set_up_torch
from pipelines.tasks._likelihoods import open_tokenizer, score_pairs
from pipelines.tasks.blimp import DELIMITER, Blimp

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

HARNESS_BATCH = 64
WARM_UP_PAIRS = 20
QUICK_PAIRS = 10
"""Pairs of a paradigm with `--quick`."""
TRAINED_TOKENS, QUICK_TOKENS = 1_000_000, 200_000
TEXT_BYTES = 6_000_000
DOMAINS = ("wiki", "book", "speech")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """What one of the two found, and what it cost."""

    right: dict[str, list[bool]]
    """Paradigm to one verdict per pair."""
    nats: np.ndarray
    """float64, shape (pairs, 2): log-likelihood of the good and the bad sentence, paradigms in the order of their names."""
    whole_seconds: float
    scoring_seconds: float

    @property
    def accuracy(self) -> dict[str, float]:
        return {paradigm: float(np.mean(verdicts)) for paradigm, verdicts in self.right.items()}


def main() -> None:
    """Measure, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs of a paradigm, and a shorter training")
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory; a small model is trained where it is left out")
    parser.add_argument("--items", type=Path, default=Path("data/eval/blimp.parquet"), help="columns paradigm, good, bad")
    parser.add_argument("--pairs", type=int, help="pairs of a paradigm; all where it is left out")
    arguments = parser.parse_args()
    set_up_torch(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoint = arguments.checkpoint or trained(directory / "training", QUICK_TOKENS if arguments.quick else TRAINED_TOKENS)
        pairs = read_pairs(arguments.items, arguments.pairs or (QUICK_PAIRS if arguments.quick else None))
        model = load_checkpoint(checkpoint).eval()
        ours = run_here(model, checkpoint, pairs, directory)
        theirs = run_harness(model, checkpoint, pairs, directory)
    report(ours, theirs, pairs.num_rows)


def trained(directory: Path, tokens: int) -> Path:
    """Train a small model on prose of the sample; return its directory."""
    from benchmarks.mixture_world import trained_base
    from benchmarks.selection_pool import prepare

    Console(stderr=True).print(f"training a model on {tokens:,} tokens of {', '.join(DOMAINS)}")
    pool = prepare([Path("data/sample/corpus.parquet")], directory, max_bytes=TEXT_BYTES, duplicates="near")
    return trained_base(pool.store, pool, DOMAINS, tokens).directory


def read_pairs(path: Path, most: int | None) -> pa.Table:
    """Return paradigm, good and bad, sorted by paradigm, at most `most` pairs of each."""
    table = pq.read_table(path, columns=["paradigm", "good", "bad"]).sort_by("paradigm")
    if most is None:
        return table
    paradigms = np.asarray(table["paradigm"].to_pylist())
    _, first = np.unique(paradigms, return_index=True)
    number = np.arange(len(paradigms)) - np.repeat(first, np.diff([*first, len(paradigms)]))
    return table.filter(pa.array(number < most))


def run_here(model: PreTrainedModel, checkpoint: Path, pairs: pa.Table, directory: Path) -> Run:
    """Score `pairs` by this project."""
    path = directory / "pairs.parquet"
    pq.write_table(pairs, path)
    pq.write_table(pairs.slice(0, WARM_UP_PAIRS), directory / "few.parquet")
    Blimp(path=directory / "few.parquet").score(model, checkpoint)
    table, whole = timed(lambda: Blimp(path=path).score(model, checkpoint))
    sentences = [("", DELIMITER + row[side]) for row in pairs.to_pylist() for side in ("good", "bad")]
    scored, scoring = timed(lambda: score_pairs(model, checkpoint, sentences, batch_tokens=Blimp().batch_tokens, label="blimp"))
    right: dict[str, list[bool]] = {}
    for paradigm, score in zip(table["group"].to_pylist(), table["score"].to_pylist(), strict=True):
        right.setdefault(paradigm, []).append(score == 1.0)
    return Run(right, scored.nats.reshape(-1, 2), whole, scoring)


def run_harness(model: PreTrainedModel, checkpoint: Path, pairs: pa.Table, directory: Path) -> Run:
    """Score `pairs` by lm-evaluation-harness."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        languages = HFLM(pretrained=model, tokenizer=open_tokenizer(checkpoint), batch_size=HARNESS_BATCH)
        manager, scoring = TaskManager(), [0.0]
        evaluate(languages, manager, write_tasks(pairs.slice(0, WARM_UP_PAIRS), directory / "few"))
        files = write_tasks(pairs, directory / "tasks")
        original = languages.loglikelihood

        def measured(*arguments: object, **options: object) -> object:
            result, seconds = timed(lambda: original(*arguments, **options))
            scoring[0] += seconds
            return result

        languages.loglikelihood = measured
        samples, whole = timed(lambda: evaluate(languages, manager, files))
    rows = {name: sorted(samples[name], key=lambda sample: sample["doc_id"]) for name in sorted(samples)}
    right = {name: [sample["acc"] == 1.0 for sample in mine] for name, mine in rows.items()}
    nats = [[response[0] for response in sample["filtered_resps"]] for mine in rows.values() for sample in mine]
    return Run(right, np.asarray(nats), whole, scoring[0])


def evaluate(languages: object, manager: TaskManager, files: Sequence[Path]) -> Mapping[str, list[dict]]:
    """Return what the harness logs of every pair, by paradigm."""
    import lm_eval

    tasks = [str(path) for path in files]
    found = lm_eval.simple_evaluate(languages, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
    return found["samples"]


def write_tasks(pairs: pa.Table, directory: Path) -> list[Path]:
    """Write a YAML and a Parquet file for each paradigm; return the YAML files."""
    import lm_eval.tasks

    directory.mkdir()
    template = Path(lm_eval.tasks.__file__).parent / "blimp" / "_template_yaml"
    paths = []
    for paradigm in sorted(set(pairs["paradigm"].to_pylist())):
        mine = pairs.filter(pc.equal(pairs["paradigm"], paradigm)).select(["good", "bad"])
        data = directory / f"{paradigm}.parquet"
        pq.write_table(mine.rename_columns(["sentence_good", "sentence_bad"]), data)
        local = {"data_files": {"train": str(data)}, "cache_dir": str(directory / "cache")}
        content = {"include": str(template), "task": paradigm, "dataset_path": "parquet", "dataset_kwargs": local}
        paths.append(directory / f"{paradigm}.yaml")
        paths[-1].write_text(yaml.safe_dump(content), encoding="utf-8")
    return paths


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return what `work` returns, and the CPU seconds of this process."""
    started = time.process_time()
    return work(), time.process_time() - started


def report(ours: Run, theirs: Run, pairs: int) -> None:
    """Print accuracies by paradigm and the JSON line."""
    mine, other = ours.accuracy, theirs.accuracy
    table = Table("paradigm", "pairs", "here", "harness", "equal")
    for name in sorted(other):
        table.add_row(
            name, str(len(ours.right[name])), f"{mine[name]:.4f}", f"{other[name]:.4f}", "yes" if mine[name] == other[name] else "NO"
        )
    Console(width=110).print(table)
    summary = {
        "pairs": pairs,
        "paradigms": len(other),
        "equal_paradigms": sum(mine[name] == other[name] for name in other),
        "equal_pairs": sum(a == b for name in other for a, b in zip(ours.right[name], theirs.right[name], strict=True)),
        "mean_of_paradigms": round(float(np.mean(list(mine.values()))), 4),
        "largest_difference_nats": float(f"{np.abs(ours.nats - theirs.nats).max():.2g}"),
        "harness_cpu_seconds": round(theirs.whole_seconds, 2),
        "cpu_seconds": round(ours.whole_seconds, 2),
        "speedup": round(theirs.whole_seconds / ours.whole_seconds, 1),
        "scoring_speedup": round(theirs.scoring_seconds / ours.scoring_seconds, 1),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
