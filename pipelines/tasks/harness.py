"""Tasks of lm-evaluation-harness (Gao et al., EleutherAI): by their names, or by YAML files of one's own.

Runs the harness itself on the loaded checkpoint, so its numbers are the harness's. Needs the extra `eval`. No hub is asked unless
`allow_network` says so: data sets that were downloaded before are taken from their cache, and the data files of a local YAML
(`dataset_kwargs: {data_files: ...}`) are paths of the project. A YAML may name functions of a Python file beside it, which is run.

Rows are those of the harness's samples. Its perplexities have no score per item but a likelihood with a number of bytes or words:
they become ``nats_per_byte`` and ``nats_per_word``, weighted by that number, so that the mean is the logarithm of the harness's
perplexity. Metrics of whole tasks alone (F1, BLEU) are left out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from pydantic import Field

from pipelines.errors import GristmillError, UnknownName
from pipelines.files import matching_files
from pipelines.model_files import local_path
from pipelines.models import sees_both_sides
from pipelines.tasks import Task, item_table
from pipelines.tasks._likelihoods import open_tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    Samples = Mapping[str, Sequence[Mapping[str, Any]]]

ROLLING = {"byte_perplexity": "nats_per_byte", "word_perplexity": "nats_per_word", "bits_per_byte": "bits_per_byte"}
"""Metrics whose value for an item is ``(log-likelihood, units)``, and what they are called here."""
YAML = (".yaml", ".yml")
BESIDE = (".py", *YAML)
"""Files beside a YAML that may be part of the task: included, or Python that it names."""
DATA_FILE = re.compile(r"[\w./*\-\[\]]+\.(?:parquet|jsonl|json|csv|tsv|txt|arrow)(?:\.gz|\.zst)?")
Row = dict[str, object]


class Harness(Task):
    """Any tasks of lm-evaluation-harness; groups are its tasks."""

    packages: ClassVar[tuple[str, ...]] = ("lm-eval", "datasets")

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags of the harness, and YAML files of local tasks (``.yaml``), relative to the project."""
    metrics: tuple[str, ...] = ()
    """The metrics that are taken; all that have a score per item where empty."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many items of each task, the first."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each item; None leaves it to the task."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences per forward pass."""
    allow_network: bool = False
    """Whether data sets may be downloaded from the hub."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks of the harness."""
        return tuple(task for task in self.tasks if not task.endswith(YAML))

    @property
    def paths(self) -> tuple[str, ...]:
        """The local tasks."""
        return tuple(task for task in self.tasks if task.endswith(YAML))

    def files(self) -> Sequence[Path]:
        """Return the YAML files, the code and YAML beside them, and the data files that they name."""
        folders = {local_path(path, self.root, key="task").parent for path in self.paths}
        written = [path for folder in folders for path in folder.iterdir() if path.suffix in BESIDE]
        named = {name for path in written for name in DATA_FILE.findall(path.read_text(encoding="utf-8"))}
        found = set(written)
        for name in named:
            with contextlib.suppress(GristmillError):  # a word that looks like a file; one that the task needs is missed when it is read
                found |= set(matching_files(name, self.root))
        return tuple(sorted(found))

    def score(self, model: PreTrainedModel, tokenizer: Path) -> pa.Table:
        if sees_both_sides(model):
            raise GristmillError("lm-evaluation-harness scores from left to right, and this checkpoint sees both sides; take this task out")
        samples = self._samples(model, tokenizer)
        rows = [row for name in sorted(samples) for sample in samples[name] for row in _rows(name, sample)]
        kept = [row for row in rows if not self.metrics or str(row["metric"]).partition(",")[0] in self.metrics]
        if not kept:
            found = ", ".join(sorted({str(row["metric"]) for row in rows})) or "none"
            wanted = ", ".join(self.metrics) or "any"
            raise GristmillError(f"{', '.join(samples)}: no score per item of {wanted}; metrics with one: {found}")
        return item_table({key: [row[key] for row in kept] for key in kept[0]})

    def _samples(self, model: PreTrainedModel, tokenizer: Path) -> Samples:
        """Return what the harness logs of every item, by task."""
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise GristmillError(f"the task `harness` needs lm-evaluation-harness ({error}); install the extra `eval`") from error
        with tempfile.TemporaryDirectory() as cache, _hub(allowed=self.allow_network), _quiet():
            manager = _manager(everything=bool(self.names))
            wanted = [*self._known(manager.all_tasks), *(self._local(path, Path(cache)) for path in self.paths)]
            languages = HFLM(pretrained=model, tokenizer=open_tokenizer(tokenizer), batch_size=self.batch_size)
            options = {"limit": self.limit, "num_fewshot": self.num_fewshot, "bootstrap_iters": 0, "log_samples": True}
            try:
                found = lm_eval.simple_evaluate(languages, tasks=wanted, task_manager=manager, **options)
            except OSError as error:
                raise GristmillError(self._unreachable(error)) from error
        assert found is not None  # None is for ranks above 0
        return found["samples"]

    def _known(self, names: Sequence[str]) -> list[str]:
        for name in self.names:
            if name not in names:  # there are thousands of them: the nearest alone are shown
                raise UnknownName("task of lm-evaluation-harness", name, get_close_matches(name, names, n=8))
        return list(self.names)

    def _unreachable(self, error: Exception) -> str:
        hint = "check your access to the hub" if self.allow_network else "set allow_network: true, or download its data set before"
        return f"{', '.join(self.tasks)}: the data cannot be had ({type(error).__name__}: {error}); {hint}"

    def _local(self, path: str, cache: Path) -> dict[str, Any]:
        """Return the task in a YAML file, its data files located and its cache a folder that is removed afterwards."""
        from lm_eval.tasks._yaml_loader import load_yaml

        file = local_path(path, self.root, key="task")
        config = load_yaml(file)
        if not isinstance(config.get("task"), str):
            raise GristmillError(f"{file.name} has no `task: name`; a local task is one YAML file with its name")
        arguments = dict(config.get("dataset_kwargs") or {})
        if "data_files" in arguments:
            arguments |= {"data_files": self._located(arguments["data_files"]), "cache_dir": str(cache)}
        return {**config, "dataset_kwargs": arguments}

    def _located(self, files: Any) -> Any:  # noqa: ANN401  as datasets takes them: a path, a list, or either by split
        if isinstance(files, Mapping):
            return {split: self._located(value) for split, value in files.items()}
        patterns = files if isinstance(files, list) else [files]
        return [str(path) for pattern in patterns for path in sorted(matching_files(str(pattern), self.root))]


@cache
def _manager(*, everything: bool) -> TaskManager:
    """Return the harness's index of tasks; reading its thousands of YAML files takes seconds, and local tasks do without."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)


def _rows(task: str, sample: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a row for each metric of an item that has a score."""
    by = "" if sample["filter"] == "none" else f",{sample['filter']}"
    for metric in sample["metrics"]:
        score, weight = _score(metric, sample[metric])
        if score is not None:
            name = ROLLING.get(metric, metric) + by
            yield {"group": task, "item": str(sample["doc_id"]), "metric": name, "score": score, "weight": weight}


def _score(metric: str, value: object) -> tuple[float | None, float]:
    """Return the score of an item and its weight; None where the metric has none for an item alone."""
    if metric in ROLLING and isinstance(value, tuple) and len(value) == 2:
        nats, units = map(float, value)
        return -nats / units / (math.log(2) if metric == "bits_per_byte" else 1.0), units
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return None, 1.0
    return float(value), 1.0  # type: ignore[arg-type]


@contextlib.contextmanager
def _hub(*, allowed: bool) -> Iterator[None]:
    """Keep the hub's clients offline inside, unless `allowed`; their switches are read when they are imported, so they are set here."""
    import datasets.config
    import huggingface_hub.constants

    switches = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in switches]
    try:
        for module, name in switches:
            setattr(module, name, getattr(module, name) or not allowed)
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and notes of the harness from the terminal; its errors are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
