"""Filter models: what the fitted filters of the project learn, once, from the training split of the pinned sample.

fit_filter          one fitted filter                 -> the files that its `fit` writes
collect_models      all fitted filters of the project -> models.json (filter -> fingerprint of its model), and their plots
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.documents import partition_file, read_batches, split_partition
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.filters import FittedFilter
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.plugins import Settings, build

MODELS_FILE = "models.json"
PROBE = ("The first words of a text.", "")


class FitSettings(Settings):
    """One fitted filter and its settings."""

    filter: str
    """A plugin in `filters/` that is fitted."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Its settings."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of every local file that it is fitted on."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity."""


class ModelsSettings(Settings):
    """The fitted filters of the project."""

    filters: tuple[str, ...] = ()
    """In the order of the project file."""


class TrainingSample:
    """The training documents of corpora, read anew each time: one batch and the ids of one partition are held."""

    def __init__(self, corpora: Sequence[Manifest], splits: Sequence[Member]) -> None:
        self._corpora = corpora
        self._splits = {Path(member.name).name: member for member in splits}

    def documents(self, domain: str) -> Iterator[tuple[str, str]]:
        """Yield ``(id, text)`` of the training documents of `domain`.

        Raises:
            GristmillError: a partition has no split file.
        """
        for corpus in self._corpora:
            if split_partition(corpus.partition or "")[0] != domain:
                continue
            train = self._train_ids(corpus)
            for batch in read_batches(corpus.file("documents.parquet"), ("id", "text")):
                rows = zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
                yield from ((name, text) for name, text in rows if name in train)

    def _train_ids(self, corpus: Manifest) -> set[str]:
        name = partition_file(corpus.partition or "")
        if name not in self._splits:
            raise GristmillError(
                f"{corpus.label} has no split file {name!r} among the inputs; materialize duplicate_clusters with this partition"
            )
        table = pq.read_table(self._splits[name].path, columns=["id", "split"], filters=[("split", "=", "train")])
        return set(table["id"].to_pylist())


def fit_filter(settings: FitSettings, out: Path, *, sample: tuple[Manifest, ...], splits: tuple[Member, ...]) -> Outcome:
    """Fit the filter on the training documents of `sample`; what it writes lies in `out`.

    Args:
        sample: cleaned_corpus artifacts of the domains that the filter asks for.
        splits: files ``splits/<domain>@<snapshot>.parquet`` of duplicate_clusters, one per artifact of `sample`.

    Raises:
        GristmillError: a file is not the one that `settings` names, or the filter cannot learn from this sample.
    """
    plugin = cast(FittedFilter, build("filters", settings.filter, settings.settings)).at(settings.root)
    if file_hashes(plugin.files(), settings.root) != settings.files:
        raise GristmillError(f"filter {settings.filter!r}: its files changed since they were hashed; materialize again")
    return plugin.fit(TrainingSample(sample, splits), out)


def collect_models(settings: ModelsSettings, out: Path, *, models: tuple[Manifest, ...]) -> Outcome:
    """Write `MODELS_FILE`, and the plots of all models as ``<filter>.<plot>``; what was measured is named alike."""
    found = {str(model.settings["filter"]): model for model in models}
    fingerprints = {name: model.fingerprint for name, model in found.items()}
    (out / MODELS_FILE).write_text(json.dumps(fingerprints, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    plots = {f"{name}.{plot}": model.file(plot) for name, model in found.items() for plot in model.outcome.plots}
    for name, path in plots.items():
        shutil.copyfile(path, out / name)
    return Outcome(
        counts={"models": len(found)},
        metrics={f"{name}.{key}": value for name, model in found.items() for key, value in model.outcome.metrics.items()},
        tables={f"{name}.{key}": rows for name, model in found.items() for key, rows in model.outcome.tables.items()},
        plots=tuple(plots),
    )


def model_scores(draft: Manifest) -> Check:
    """The written state scores a text, and an empty one, without an infinite score."""
    plugin = cast(FittedFilter, build("filters", str(draft.settings["filter"]), cast(dict, draft.settings["settings"])))
    scores = plugin.score(*[PROBE] * len(plugin.columns), state=draft.directory)
    found = {rule.name: np.asarray(scores[rule.name], dtype=np.float64) for rule in plugin.rules}
    shown = {f"{name}_of_text": float(values[0]) for name, values in found.items()}
    passed = all(values.shape == (len(PROBE),) and not np.isinf(values).any() for values in found.values())
    return Check(name="model_scores", passed=passed, description="the state on disk scores a text", metadata=shown)


def every_model_is_there(draft: Manifest) -> Check:
    """There is one model for each fitted filter that the project switches on."""
    asked = list(cast(list, draft.settings["filters"]))
    found = json.loads((draft.directory / MODELS_FILE).read_text(encoding="utf-8"))
    described = f"{len(found)} models: {', '.join(found) or 'the project switches no fitted filter on'}"
    return Check(name="every_model_is_there", passed=sorted(found) == sorted(asked), description=described)


MODEL_AUDITS = (model_scores,)
COLLECT_AUDITS = (every_model_is_there,)
