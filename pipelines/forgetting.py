"""Forgetting: one model trained on domains one after the other, and what it loses of each by the end.

    evaluation of the checkpoint after each domain -> forgetting.json, matrix.png

``R[i, j]`` is the held-out loss of domain j after training on the first i domains; row 0 is the model before the first. Of domain j:
forgetting is ``R[T, j] - min(R[1, j], ..., R[T - 1, j])`` (Chaudhry et al. 2018, 1801.10112, section 3.2, with losses for accuracies); the
backward change is ``R[T, j] - R[j, j]``, what was learned ``R[j, j] - R[j - 1, j]``, and the forward change, of domains not yet trained
on, ``R[j - 1, j] - R[0, j]`` (Lopez-Paz and Ranzato 2017, 1706.08840, section 3). Differences of two rows are paired over documents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.paired_bootstrap import Change, PairedLosses, paired_change
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings

BASE = "before"
"""Stands for the model before the first domain."""


class ForgettingSettings(Settings):
    """The sequence that was trained on."""

    sequence: tuple[str, ...] = Field(min_length=2)
    """Domains in the order of training."""
    draws: int = Field(default=2000, ge=100)
    """Bootstrap draws over documents."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""


def forgetting_matrix(settings: ForgettingSettings, out: Path, *, evaluations: tuple[Manifest, ...]) -> Outcome:
    """Write ``forgetting.json`` and ``matrix.png``.

    Args:
        evaluations: of the checkpoint after each domain of `settings.sequence`, in its order, all on the same documents.

    Raises:
        GristmillError: there is not one evaluation for each domain, or they were measured on different documents.
        EmptyInput: a domain of the sequence has no held-out document.
    """
    domains = {name: _documents(settings, evaluations, name) for name in settings.sequence}
    matrix = [[_loss(table, stage) for table in domains.values()] for stage in range(len(evaluations) + 1)]
    rows, backward = [], []
    for place, (name, table) in enumerate(domains.items()):
        changes = {key: _change(settings, table, *stages) for key, stages in _stages(place, len(evaluations)).items()}
        earlier = [matrix[stage][place] for stage in range(1, len(evaluations))]
        row: dict[str, Json] = {"domain": name, "documents": table.num_rows, "tokens": int(pc.sum(table["tokens"]).as_py())}
        for key, found in changes.items():
            row |= {f"{key}_change": found.change, f"{key}_change_low": found.low, f"{key}_change_high": found.high}
        if place < len(evaluations) - 1:
            row["forgetting"] = matrix[-1][place] - min(earlier)
            backward.append(changes["backward"])
        rows.append(row)
    mean = float(np.mean([row["forgetting"] for row in rows[:-1]]))
    means = {"forgetting": mean, **_mean(backward)}
    record = {"sequence": list(settings.sequence), "loss": matrix, "domains": rows, "mean": means}
    (out / "forgetting.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(out / "matrix.png", settings.sequence, np.asarray(matrix))
    names = [BASE, *settings.sequence]
    shown = [
        {"after": names[i], **dict(zip(settings.sequence, np.round(losses, 4).tolist(), strict=True))} for i, losses in enumerate(matrix)
    ]
    return Outcome(
        counts={"documents": sum(table.num_rows for table in domains.values()), "domains": len(domains)},
        metrics={f"mean_{key}_nats": value for key, value in means.items()},
        tables={"loss": shown, "domains": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]},
        plots=("matrix.png",),
    )


def _documents(settings: ForgettingSettings, evaluations: Sequence[Manifest], domain: str) -> pa.Table:
    """Return the documents of `domain` with their nats after each stage: ``nll_0`` before the first, ``nll_1`` after it, ..."""
    if len(evaluations) != len(settings.sequence):
        raise GristmillError(
            f"{len(evaluations)} evaluations of a sequence of {len(settings.sequence)} domains; give one after each of "
            f"{', '.join(settings.sequence)}"
        )
    found: pa.Table | None = None
    for stage, manifest in enumerate(evaluations, start=1):
        table = pq.read_table(manifest.file("documents.parquet"))
        table = table.filter(pc.equal(table["domain"], domain)).sort_by([("id", "ascending"), ("bytes", "ascending")])
        if found is None:
            found = table.select(["id", "tokens", "bytes"]).append_column("nll_0", table["nll_before"])
        if not found.select(["id", "tokens"]).equals(table.select(["id", "tokens"])):
            raise GristmillError(
                f"{manifest.label} was measured on other documents of {domain} than {evaluations[0].label}; give all the same "
                "`evaluation.reference` and `evaluation.max_tokens_per_domain`"
            )
        found = found.append_column(f"nll_{stage}", table["nll_after"])
    if found is None or not found.num_rows:
        raise EmptyInput(f"no held-out document of {domain} in {evaluations[0].label}; give the domain a role in the recipe")
    return found


def _stages(place: int, last: int) -> dict[str, tuple[int, int]]:
    """Return which two rows of the matrix each change of the domain at `place` lies between."""
    return {"learned": (place, place + 1), "backward": (place + 1, last), "forward": (0, place)}


def _loss(table: pa.Table, stage: int) -> float:
    return float(pc.sum(table[f"nll_{stage}"]).as_py() / pc.sum(table["tokens"]).as_py())


def _change(settings: ForgettingSettings, table: pa.Table, first: int, last: int) -> Change:
    losses = PairedLosses.of(table, before=f"nll_{first}", after=f"nll_{last}")
    return paired_change(losses, draws=settings.draws, seed=settings.seed).loss


def _mean(changes: Sequence[Change]) -> dict[str, float]:
    """Return the mean of changes of different documents; their arms add up in squares (Zou and Donner 2008, Stat. Med. 27(10))."""
    num, mean = len(changes), float(np.mean([found.change for found in changes]))
    below = math.sqrt(sum((found.change - found.low) ** 2 for found in changes)) / num
    above = math.sqrt(sum((found.high - found.change) ** 2 for found in changes)) / num
    return {"backward_change": mean, "backward_change_low": mean - below, "backward_change_high": mean + above}


def _plot(path: Path, sequence: Sequence[str], matrix: np.ndarray) -> None:
    """Draw the losses, coloured by how far each lies above the lowest of its domain."""
    figure, axes = new_figure(1.8 + 0.9 * len(sequence), 1.4 + 0.5 * len(matrix))
    axes.grid(visible=False)
    above = matrix - matrix.min(axis=0)
    axes.imshow(above, cmap="Oranges", aspect="auto", vmin=0.0, vmax=max(1e-9, float(above.max())) * 1.4)
    for (row, column), loss in np.ndenumerate(matrix):
        axes.text(column, row, f"{loss:.3f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(sequence)), list(sequence))
    axes.set_yticks(range(len(matrix)), [BASE, *(f"after {name}" for name in sequence)])
    axes.set(title="held-out loss, nats per token")
    save_figure(figure, path)


def losses_finite(draft: Manifest) -> Check:
    """Every domain has a finite loss after every stage."""
    matrix = np.asarray(json.loads((draft.directory / "forgetting.json").read_text(encoding="utf-8"))["loss"], dtype=float)
    wrong = int((~np.isfinite(matrix)).sum())
    return Check(name="losses_finite", passed=not wrong, description=f"{matrix.size} losses, {wrong} not finite")


FORGETTING_AUDITS = (losses_finite,)
