"""Training against Hugging Face's Trainer: same model, data, batch and precision, each in a process of its own, in one run.

    python -m benchmarks.training [--quick] [--corpus data/sample/corpus.parquet] [--sizes 3 10 30] [--threads 1]

Speed: steps of 16 windows of 256 tokens with AdamW, in tokens by CPU second (so that other work on the machine counts for
little), after a warm-up that compiles; what compiling cost is shown apart. Both end with the same weights up to rounding
and order of data, so their losses on the same held-out windows are compared.

Time to loss: the Trainer with its own AdamW and linear decay, its learning rate the best of four; ours with the project's
defaults, in ever longer runs until one reaches the Trainer's final held-out loss. The ratio is of CPU seconds, compiling (where the
defaults compile) included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.token_corpus import reopened, token_corpus
from pipelines.batch import SpecialTokens
from pipelines.configuration import read_project, read_recipe
from pipelines.models import ModelSettings
from pipelines.plan import TrainingSettings
from pipelines.recipes import compile_pays
from pipelines.shards import held_out_documents, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipelines.trainer import Run

WINDOWS, LENGTH = 16, 256
VOCABULARY = 8192
SIZES = {
    3: {"hidden_size": 192, "num_layers": 4, "num_heads": 3, "intermediate_size": 512},
    10: {"hidden_size": 320, "num_layers": 6, "num_heads": 5, "intermediate_size": 864},
    30: {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 1376},
}
"""Millions of parameters, about, and the shape of the model."""
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
"""The Trainer's learning rates."""
SPEED_RATE = 1e-3
FRACTIONS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Our runs, as shares of the Trainer's steps."""
HELD_OUT_WINDOWS = 128
WARM_UP = 4
HELD_OUT, DATA, CORPUS = "held_out.npy", "windows.npy", "corpus.json"
CORPUS_BYTES = 30_000_000
SPEED_STEPS = {3: 40, 10: 24, 30: 16}
REPEATS = {3: 3, 10: 3, 30: 1}
"""Runs of each speed, whose median counts, by size."""


def main() -> None:
    """Measure both, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[Path("data/sample/corpus.parquet")], help="Parquet files with a column text"
    )
    parser.add_argument("--quick", action="store_true", help="3M alone, fewer steps")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, help="millions of parameters")
    parser.add_argument("--steps", type=int, help="steps of the runs to a loss")
    parser.add_argument("--repeat", type=int, help="runs of each speed, whose median counts (3, 3 and 1)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time in the runs to a loss")
    parser.add_argument("--no-time-to-loss", action="store_true", help="speed alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    sizes = arguments.sizes or ([3] if arguments.quick else list(SIZES))
    steps = arguments.steps or (100 if arguments.quick else 300)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory(prefix="gristmill-training-") as name:
        directory = Path(name)
        prepare(arguments.corpus, directory, num_windows=WINDOWS * max(steps, 100))
        common = {"directory": name, "threads": arguments.threads}
        speed = [compare(common, size, objective, arguments) for size in sizes for objective in ("causal", "masked")]
        console.print(speed_table(speed))
        found = {f"{row['objective']}_speedup": round(row["ratio"], 2) for row in speed if row["size"] == min(sizes)}
        found["speed"] = {f"{row['objective']} {row['size']}M": summary(row) for row in speed}
        if not arguments.no_time_to_loss:
            timed = time_to_loss(common, min(sizes), steps, arguments.parallel)
            console.print(loss_table(timed))
            found |= {"time_to_loss_speedup": timed["speedup"], "time_to_loss": timed}
    print(json.dumps(found))


def prepare(corpus: list[Path], directory: Path, *, num_windows: int) -> None:
    """Write windows for training and held-out windows, and what `open_run` opens."""
    made = token_corpus(corpus, directory / "store", vocabulary_size=VOCABULARY, max_bytes=CORPUS_BYTES)
    made.save(directory / CORPUS)
    run = open_run(directory, 3, "causal", num_windows // WINDOWS)
    np.save(directory / DATA, run.order.windows(range(num_windows)))
    held = held_out_documents(made.decisions, made.shards)["text"]
    np.save(directory / HELD_OUT, windows_of(held, LENGTH, HELD_OUT_WINDOWS, run.end_of_text))


def open_run(directory: Path, size: int, objective: str, steps: int, **changes: object) -> Run:
    """Return one of our runs over the corpus that `prepare` made."""
    from pipelines.trainer import Run

    made = reopened(directory / CORPUS)
    phase = {"tokens": steps * WINDOWS * LENGTH, "learning_rate": SPEED_RATE, "objective": objective, **changes.pop("phase", {})}
    shape = {"sequence_length": LENGTH, "batch_sequences": WINDOWS, "model": model_settings(size, objective), "phases": [phase]}
    quiet = {"samples": {"max_new_tokens": 0}, "guards": {"on_spike": "ignore"}}
    settings = TrainingSettings.model_validate({**shape, **quiet, **changes})
    return Run(settings, {"text": 1.0}, made.selection, made.shards, made.tokenizer, None)


def model_settings(size: int, objective: str) -> ModelSettings:
    """Return a Llama for causal models, a BERT of the same width and depth for masked ones."""
    shape = SIZES[size]
    if objective == "masked":
        return ModelSettings(architecture="bert", **{**shape, "intermediate_size": 4 * shape["hidden_size"]})
    return ModelSettings(**shape)


# A process of its own


def work(job: dict) -> dict:
    """Train as `job` says in this process; return what it took and the held-out loss."""
    import torch

    torch.set_num_threads(job["threads"])
    directory = Path(job["directory"])
    steps_cpu, model_loss = (train_ours if job["engine"] == "ours" else train_theirs)(job, directory)
    seconds = np.diff(steps_cpu)
    steady = float(np.median(seconds[WARM_UP:]))
    return {
        "parameters": model_loss[0],
        "loss": model_loss[1],
        "seconds_per_step": steady,
        "tokens_per_second": WINDOWS * LENGTH / steady,
        "start_seconds": float(seconds[:WARM_UP].sum() - steady * WARM_UP),
        "cpu_seconds": float(seconds.sum()),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "utilisation": utilisation(job, steady),
    }


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the compilers it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def train_ours(job: dict, directory: Path) -> tuple[list[float], tuple[int, float]]:
    """Train with the project's loop; return the CPU clock after each step, and parameters and loss."""
    run = open_run(directory, job["size"], job["objective"], job["steps"], threads=job["threads"], seed=job["seed"], **job["changes"])
    clock = [cpu_seconds()]
    for step in range(1, run.num_steps + 1):
        run.advance(step, directory_of(job), resumable=False)
        clock.append(cpu_seconds())
    return clock, (sum(p.numel() for p in run.model.parameters()), held_out_loss(run.model, job, directory))


def train_theirs(job: dict, directory: Path) -> tuple[list[float], tuple[int, float]]:
    """Train with transformers' Trainer; the windows come in the order in which ours come."""
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )

    from pipelines.encoders import special_tokens
    from pipelines.models import new_model

    made = reopened(directory / CORPUS)
    torch.manual_seed(job["seed"])
    model = new_model(model_settings(job["size"], job["objective"]), special_tokens(made.tokenizer.directory), LENGTH)
    windows = np.load(directory / DATA)[: job["steps"] * WINDOWS]
    rows = [{"input_ids": torch.from_numpy(window[:-1])} for window in windows]
    collator = default_data_collator
    if job["objective"] == "masked":
        collator = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(made.tokenizer.directory), mlm_probability=0.15)
    else:
        targets = [torch.from_numpy(window[1:]) for window in windows]  # of every position, the last one too, as in ours
        rows = [{**row, "labels": target, "shift_labels": target} for row, target in zip(rows, targets, strict=True)]
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            clock.append(cpu_seconds())

        def on_step_end(self, *_: object, **__: object) -> None:
            clock.append(cpu_seconds())

    arguments = TrainingArguments(
        output_dir=str(directory_of(job)),
        per_device_train_batch_size=WINDOWS,
        max_steps=job["steps"],
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,  # it would take shift_labels away
        max_grad_norm=1.0,
        seed=job["seed"],
        **job["changes"],
    )
    Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[Clock()]).train()
    return clock, (sum(p.numel() for p in model.parameters()), held_out_loss(model, job, directory))


def held_out_loss(model: PreTrainedModel, job: dict, directory: Path) -> float:
    """Return the mean loss of `model` on the held-out windows; hidden tokens are the same for every model."""
    import torch

    from pipelines.draws import Generators
    from pipelines.encoders import special_tokens
    from pipelines.plugins import build

    tokens: SpecialTokens = special_tokens(reopened(directory / CORPUS).tokenizer.directory)
    objective = build("objectives", job["objective"])
    windows = np.load(directory / HELD_OUT)
    model.eval()
    nats = count = 0.0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for first in range(0, len(windows), WINDOWS):
            rows = windows[first : first + WINDOWS]
            losses = objective.losses(model, objective.batch(rows, Generators(1, range(first, first + len(rows))), tokens))
            nats, count = nats + losses.per_window_B.double().sum().item(), count + losses.counts_B.sum().item()
    return nats / count


def utilisation(job: dict, seconds: float) -> float:
    """Return the share of the best matrix product of this process that a step reached, its floating-point operations by PaLM's count."""
    from pipelines.throughput import measured_matmul_flops

    run = open_run(Path(job["directory"]), job["size"], job["objective"], 1, threads=job["threads"])
    peak = measured_matmul_flops("cpu", None, half=False, threads=job["threads"]) / job["threads"]
    return run.flops_per_token() * WINDOWS * LENGTH / seconds / peak


def directory_of(job: dict) -> Path:
    """Return the scratch directory of a job."""
    path = Path(job["directory"]) / f"run-{os.getpid()}"
    path.mkdir(exist_ok=True)
    return path


# The processes


def measured(job: Mapping[str, object]) -> dict:
    """Run `job` in a process of its own, with an empty compiler cache, and return what it measured."""
    with tempfile.TemporaryDirectory(prefix="gristmill-inductor-") as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": str(job["threads"]), "GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--worker", json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{job['engine']} {job['objective']} {job['size']}M, {job['steps']} steps {job['changes']}: "
        f"{found['tokens_per_second']:,.0f} tokens/CPU-s, loss {found['loss']:.4f}, {found['cpu_seconds']:.0f} CPU-s",
        file=sys.stderr,
    )
    return found


def theirs(rate: float) -> dict[str, object]:
    """Return the Trainer's arguments of a run with the optimizer settings of ours."""
    return {"learning_rate": rate, "lr_scheduler_type": "constant", "weight_decay": 0.1, "adam_beta2": 0.95, "optim": "adamw_torch_fused"}


def compare(common: Mapping[str, object], size: int, objective: str, arguments: argparse.Namespace) -> dict:
    """Return the speed of both at one size and objective, their runs taking turns."""
    steps = SPEED_STEPS[size] // (2 if arguments.quick else 1)
    job = {**common, "size": size, "objective": objective, "steps": steps, "seed": 0}
    ours = {**job, "engine": "ours", "changes": {"optimizer": "adamw", "compile": True}}
    plain = {**job, "engine": "ours", "changes": {"optimizer": "adamw", "compile": False}}
    other = {**job, "engine": "trainer", "changes": theirs(SPEED_RATE)}
    runs: dict[str, list[dict]] = {"trainer": [], "ours": [], "eager": []}
    for _ in range(arguments.repeat or (1 if arguments.quick else REPEATS[size])):
        for name, one in (("trainer", other), ("ours", ours), ("eager", plain)):
            runs[name].append(measured(one))
    middle = {name: sorted(found, key=lambda run: run["seconds_per_step"])[len(found) // 2] for name, found in runs.items()}
    ratios = {name: middle["trainer"]["seconds_per_step"] / middle[name]["seconds_per_step"] for name in ("ours", "eager")}
    return {"size": size, "objective": objective, "steps": steps, **middle, "ratio": ratios["ours"], "eager_ratio": ratios["eager"]}


def time_to_loss(common: Mapping[str, object], size: int, steps: int, parallel: int) -> dict:
    """Return the CPU seconds that both take to the Trainer's final loss."""
    job = {**common, "size": size, "objective": "causal", "seed": 0}
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [
            {**job, "engine": "trainer", "steps": steps, "changes": {"learning_rate": rate, "optim": "adamw_torch_fused"}} for rate in RATES
        ]
        tried = dict(zip(RATES, pool.map(measured, jobs), strict=True))
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        lengths = [max(WARM_UP + 2, round(fraction * steps)) for fraction in FRACTIONS]
        ours = [{**job, "engine": "ours", "steps": length, "changes": default_run(size, length)} for length in lengths]
        reached = []
        for first in range(0, len(ours), parallel):
            reached += pool.map(measured, ours[first : first + parallel])
            if any(found["loss"] <= tried[best]["loss"] for found in reached):
                break
    winner = next((n for n, found in enumerate(reached) if found["loss"] <= tried[best]["loss"]), None)
    target = tried[best]
    return {
        "trainer": {str(rate): cost(found) for rate, found in tried.items()},
        "ours": {str(length): cost(found) for length, found in zip(lengths, reached, strict=False)},
        "best_rate": best,
        "target_loss": round(target["loss"], 4),
        "steps": steps,
        "compile_seconds": None if winner is None else round(reached[winner]["start_seconds"], 1),
        "speedup": None if winner is None else round(target["cpu_seconds"] / reached[winner]["cpu_seconds"], 2),
        "speedup_without_compiling": None
        if winner is None
        else round(target["cpu_seconds"] / (reached[winner]["cpu_seconds"] - reached[winner]["start_seconds"]), 2),
    }


def cost(found: Mapping[str, float]) -> dict[str, float]:
    """Return the loss of a run and what it took."""
    return {"loss": round(found["loss"], 4), "cpu_seconds": round(found["cpu_seconds"], 1)}


def default_run(size: int, steps: int) -> dict[str, object]:
    """Return the project's defaults: optimizer, rate and schedule of its default recipe, compiled where that pays."""
    recipe = read_recipe(Path("recipes/code-critical.yaml"), read_project(Path("project.yaml")))
    phase = recipe.general
    kept = {"learning_rate": phase.learning_rate, "schedule": phase.schedule, "schedule_settings": dict(phase.schedule_settings)}
    optimizer = {"optimizer": recipe.training.optimizer, "optimizer_settings": dict(recipe.training.optimizer_settings)}
    return {**optimizer, "phase": kept, "compile": compile_pays(model_settings(size, "causal"), steps * WINDOWS * LENGTH)}


# Tables


def summary(row: Mapping[str, dict]) -> dict[str, float]:
    """Return the figures of one comparison in short."""
    return {
        "speedup": round(row["ratio"], 2),
        "speedup_eager": round(row["eager_ratio"], 2),
        "tokens_per_cpu_second": round(row["ours"]["tokens_per_second"]),
        "trainer_tokens_per_cpu_second": round(row["trainer"]["tokens_per_second"]),
        "utilisation": round(row["ours"]["utilisation"], 3),
        "trainer_utilisation": round(row["trainer"]["utilisation"], 3),
        "compile_seconds": round(row["ours"]["start_seconds"], 1),
        "loss": round(row["ours"]["loss"], 4),
        "trainer_loss": round(row["trainer"]["loss"], 4),
        "peak_memory_mb": round(row["ours"]["peak_memory_mb"]),
        "trainer_peak_memory_mb": round(row["trainer"]["peak_memory_mb"]),
    }


def speed_table(rows: Sequence[Mapping[str, dict]]) -> Table:
    """Return the speeds as a table."""
    table = Table(
        "", "parameters", "tokens/CPU-s", "x Trainer", "of matmul peak", "start, CPU-s", "peak MB", "held-out loss", title="Speed"
    )
    for row in rows:
        for name, shown in (("trainer", "Trainer"), ("eager", "ours, eager"), ("ours", "ours, compiled")):
            found = row[name]
            ratio = row["trainer"]["seconds_per_step"] / found["seconds_per_step"]
            table.add_row(
                f"{row['objective']} {row['size']}M: {shown}",
                f"{found['parameters'] / 1e6:.2f}M",
                f"{found['tokens_per_second']:,.0f}",
                f"{ratio:.2f}",
                f"{found['utilisation']:.0%}",
                f"{found['start_seconds']:.1f}",
                f"{found['peak_memory_mb']:,.0f}",
                f"{found['loss']:.4f}",
            )
    return table


def loss_table(found: Mapping[str, dict]) -> Table:
    """Return the runs to a loss as a table."""
    table = Table("run", "held-out loss", "CPU-s", title=f"Time to the Trainer's final loss, {found['target_loss']}: {found['speedup']}x")
    for rate, row in found["trainer"].items():
        table.add_row(f"Trainer, learning rate {rate}, {found['steps']} steps", f"{row['loss']:.4f}", f"{row['cpu_seconds']:.0f}")
    for steps, row in found["ours"].items():
        table.add_row(f"ours, {steps} steps", f"{row['loss']:.4f}", f"{row['cpu_seconds']:.0f}")
    return table


if __name__ == "__main__":
    main()
