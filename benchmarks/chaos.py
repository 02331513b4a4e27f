"""A training run is killed again and again, and once its newest resume point is damaged: it ends in the bytes of an undisturbed run.

    python -m benchmarks.chaos [--quick] [--kills 25] [--seed 0] [--corpus data/sample/corpus.parquet]

The run is the project's own step, built through the store in a process of its own, on the sample: causal, then masked language
modelling, validation on documents set aside, a checkpoint kept every 50 steps and the best one kept. SIGKILL comes at random
(seeded) steps and moments; every fifth waits until a resume point is being written. The time between resume points changes from
process to process, so some lose a step and some dozens, checkpoints of the artifact among them. `--quick` kills eight times.

What is compared is the SHA-256 of the final weights, and the hash over all files of the artifact: records of the run, kept
checkpoints, optimizer state.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.token_corpus import reopened, token_corpus
from pipelines import training
from pipelines.manifests import Manifest, sha256_file
from pipelines.models import ModelSettings
from pipelines.plan import training_plugins
from pipelines.store import Build, Store

KILLS, QUICK_KILLS = 25, 8
STEPS, QUICK_STEPS = 2_000, 1_000
LENGTH, WINDOWS = 64, 8
MODEL = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 176}
VOCABULARY, CORPUS_BYTES = 1024, 400_000
KEPT_EVERY = 50
SECONDS = (0.0, 0.1, 0.3)
"""Between resume points, by turns."""
MAX_DELAY = 0.3
"""Seconds from the resume point that is waited for to the kill, at most."""
END = 0.85
"""Share of the run in which it is killed: the rest is left to the last process."""
PATIENCE = 180
CORPUS = "corpus.json"


@dataclass(frozen=True)
class Job:
    """A run in a store of its own."""

    store: Path
    steps: int
    fingerprint: str

    @property
    def log(self) -> Path:
        """What its processes say."""
        return self.store.with_suffix(".log")

    @property
    def staging(self) -> Path:
        """Where it works."""
        return self.store / "staging" / f"general_checkpoint-{self.fingerprint}"

    def last_words(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(encoding="utf-8")[-2000:]


@dataclass(frozen=True)
class Kill:
    """A process that was killed."""

    resumed: int
    """Step of the newest resume point when it began; 0 where there is none."""
    reached: int
    """Step of the newest resume point when it ended."""
    seconds: float
    """Between its resume points."""
    in_write: bool
    """A resume point was half written."""
    kept_ahead: int
    """Checkpoints of the artifact beyond the newest resume point, which the next process has to write again."""
    damaged: str
    """The file in which a byte was changed after it."""


def main() -> None:
    """Run undisturbed and disturbed, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample/corpus.parquet"), help="a Parquet file with a column text")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_KILLS} kills in {QUICK_STEPS} steps instead of {KILLS} in {STEPS}")
    parser.add_argument("--kills", type=int, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the steps and moments")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--fingerprint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    if arguments.store:
        wanted = request(arguments.store.parent, steps, arguments.seconds)
        if wanted.fingerprint() != arguments.fingerprint:
            parser.error("the project's code changed while the benchmark ran, so this would be another run; start it again")
        Store(arguments.store).build(wanted)
        return
    kills = arguments.kills or (QUICK_KILLS if arguments.quick else KILLS)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gristmill-chaos-") as name:
        directory = Path(name)
        token_corpus([arguments.corpus], directory / "corpus", vocabulary_size=VOCABULARY, max_bytes=CORPUS_BYTES).save(directory / CORPUS)
        fingerprint = request(directory, steps, 0.0).fingerprint()
        whole = finish(Job(directory / "whole", steps, fingerprint), seconds=1e9)
        job = Job(directory / "killed", steps, fingerprint)
        found, said = disturb(job, kills, random.Random(arguments.seed))
        last = finish(job, seconds=SECONDS[0])
        result = compare(whole, last, found)
        result["faults"] = Store(directory / "killed").verify(last) + [f"{path} is left" for path in left_over(directory / "killed")]
    show(found)
    named = [line for line in said.splitlines() if "passed over" in line]
    Console(width=140).print(*named, f"weights {result['weights_sha256']}", f"all files {result['content_sha256']}", sep="\n")
    print(json.dumps({**result, "seconds": round(time.monotonic() - started, 1)}))


def request(directory: Path, steps: int, seconds: float) -> Build:
    """Return the request for the checkpoint; `seconds` between resume points are no part of what it is."""
    corpus = reopened(directory / CORPUS)
    tokens = steps // 2 * LENGTH * WINDOWS
    phases = (
        {"tokens": tokens, "learning_rate": 3e-3, "schedule": "cosine"},
        {"tokens": tokens, "learning_rate": 1e-3, "objective": "masked"},
    )
    settings = training.GeneralSettings(
        model=ModelSettings(**MODEL),
        phases=phases,
        sequence_length=LENGTH,
        batch_sequences=WINDOWS,
        device="cpu",
        validation={"fraction": 0.1, "every_steps": KEPT_EVERY // 2, "windows_per_domain": 4},
        retention={"every_steps": KEPT_EVERY, "best": True},
        checkpoint_seconds=seconds,
    )
    return Build(
        asset="general_checkpoint",
        step=training.train_general,
        settings=settings,
        inputs={"selection": corpus.selection, "shards": corpus.shards, "tokenizer": corpus.tokenizer},
        audits=training.CHECKPOINT_AUDITS,
        plugins=training_plugins(settings),
        resumable=True,
    )


def start(job: Job, seconds: float) -> subprocess.Popen[str]:
    """Build the checkpoint in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--store", str(job.store), "--steps", str(job.steps)]
    command += ["--seconds", str(seconds), "--fingerprint", job.fingerprint]
    with job.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, text=True)


def finish(job: Job, seconds: float) -> Manifest:
    """Let the run go on to its end; return what it published.

    Raises:
        RuntimeError: it failed.
    """
    child = start(job, seconds)
    if child.wait(PATIENCE * 10):
        raise RuntimeError(f"the run ended with {child.returncode}: {job.last_words()}")
    return Store(job.store).current("general_checkpoint")


def disturb(job: Job, kills: int, draw: random.Random) -> tuple[list[Kill], str]:
    """Kill the run `kills` times, and damage its newest resume point once; return what happened and what the processes said."""
    staging = job.staging
    damaged_after = draw.randrange(kills // 3, max(kills // 3 + 1, kills * 2 // 3))
    found: list[Kill] = []
    for number in range(kills):
        seconds = SECONDS[number % len(SECONDS)]
        first = newest(staging, behind=bool(found and found[-1].damaged))
        gap = max(1, int(2 * (END * job.steps - first) / (kills - number + 1)))
        target = newest(staging) + draw.randint(1, gap)
        kill_one(job, seconds, target, in_write=number % 5 == 0, delay=draw.random() * MAX_DELAY)
        reached = newest(staging)
        ahead = [path for path in staging.glob("checkpoints/step-*") if step_of(path) > reached]
        damaged = damage(staging, draw) if number == damaged_after else ""
        in_write = bool(list(staging.glob("resume/.step-*")))
        found.append(Kill(first, reached, seconds, in_write, len(ahead), damaged))
        print(f"kill {number + 1} of {kills}: at step {reached} of {job.steps}", file=sys.stderr, flush=True)
    return found, job.log.read_text(encoding="utf-8")


def kill_one(job: Job, seconds: float, target: int, *, in_write: bool, delay: float) -> None:
    """Start the run, and kill it when a resume point at or beyond `target` is there: after `delay`, or while the next one is being written.

    Raises:
        RuntimeError: it ended by itself, or nothing came.
    """
    child, staging, deadline = start(job, seconds), job.staging, time.monotonic() + PATIENCE
    while child.poll() is None and time.monotonic() < deadline and newest(staging) < target:
        time.sleep(0.001)
    if in_write:
        while child.poll() is None and time.monotonic() < deadline and not list(staging.glob("resume/.step-*/model.safetensors")):
            pass
    else:
        time.sleep(delay)
    if child.poll() is not None:
        raise RuntimeError(f"the run ended with {child.returncode} before it was killed at step {target}: {job.last_words()}")
    child.send_signal(signal.SIGKILL)
    child.wait()
    if newest(staging) < target:
        raise RuntimeError(f"no resume point at step {target} within {PATIENCE} s")


def damage(staging: Path, draw: random.Random) -> str:
    """Change a byte of the newest resume point; return where."""
    point = max(staging.glob("resume/step-*"), key=step_of)
    path = draw.choice(sorted(path for path in point.iterdir() if path.is_file()))
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"{point.name}/{path.name}, byte {place:,}"


def newest(staging: Path, *, behind: bool = False) -> int:
    """Return the step of the newest resume point, or of the one `behind` it; 0 where there is none."""
    return ([0, 0, *sorted(map(step_of, staging.glob("resume/step-*")))])[-2 if behind else -1]


def step_of(path: Path) -> int:
    """Return the step that a directory is of."""
    return int(path.name.partition("-")[2])


def left_over(store: Path) -> list[str]:
    """Return what the run left behind besides its artifact: resume points, and anything half written."""
    found = [*(store / "staging").glob("*"), *store.glob("artifacts/**/.*"), *store.glob("artifacts/**/resume")]
    return sorted(path.relative_to(store).as_posix() for path in found)


def compare(whole: Manifest, last: Manifest, found: list[Kill]) -> dict[str, object]:
    """Return how often the run was disturbed, and whether it ended in the bytes of the whole one."""
    weights = [sha256_file(manifest.file("model.safetensors")) for manifest in (whole, last)]
    return {
        "kills": len(found),
        "during_write": sum(kill.in_write for kill in found),
        "corrupted": sum(bool(kill.damaged) for kill in found),
        "kept_written_again": sum(kill.kept_ahead for kill in found),
        "identical": weights[0] == weights[1] and whole.content_sha256 == last.content_sha256,
        "weights_sha256": weights[1],
        "content_sha256": last.content_sha256,
        "differing": [ours.path for ours, theirs in zip(last.files, whole.files, strict=False) if ours != theirs],
        "files": len(last.files),
    }


def show(found: list[Kill]) -> None:
    """Print what happened to each process."""
    table = Table(title="killed processes", title_justify="left")
    for column in ("kill", "resumed at", "last point", "seconds between", "in a write", "kept beyond", "then damaged"):
        table.add_column(column, justify="left" if column == "then damaged" else "right")
    for number, kill in enumerate(found, start=1):
        in_write, ahead = "yes" if kill.in_write else "", str(kill.kept_ahead or "")
        table.add_row(str(number), f"{kill.resumed}", f"{kill.reached}", f"{kill.seconds:g}", in_write, ahead, kill.damaged)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
