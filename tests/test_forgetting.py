"""Forgetting over a sequence of domains, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from small_world import publish

from pipelines.errors import EmptyInput, GristmillError
from pipelines.forgetting import FORGETTING_AUDITS, ForgettingSettings, forgetting_matrix
from pipelines.manifests import Json, Manifest
from pipelines.store import Build, Store

SEQUENCE = ("wiki", "code", "math")
LOSSES = [[5.0, 6.0, 7.0], [4.0, 5.9, 6.8], [4.3, 3.0, 6.5], [4.2, 3.5, 4.0]]
"""Before, and after each domain: wiki is forgotten by 0.2 of what it was after its own training, code by 0.5."""


def evaluations(store: Store, losses: Sequence[Sequence[float]] = LOSSES, *, documents: int = 30) -> tuple[Manifest, ...]:
    """Publish an evaluation after each domain; documents differ in length and, around `losses`, in their changes."""
    found = []
    for stage in range(1, len(losses)):
        rows: list[dict[str, Json]] = []
        for place, domain in enumerate(SEQUENCE):
            tokens = np.random.default_rng(place).integers(10, 90, documents)
            noise = [_noise(place, number, tokens) for number in range(len(losses))]
            for number, size in enumerate(tokens.tolist()):
                before, after = ((losses[at][place] + noise[at][number]) * size for at in (0, stage))
                facts = {"id": f"{domain}-{number:02d}", "domain": domain, "tokens": size, "bytes": 4 * size}
                rows.append({**facts, "nll_before": float(before), "nll_after": float(after)})
        found.append(publish(store, "evaluation", {"documents.parquet": rows}, partition=f"after-{SEQUENCE[stage - 1]}"))
    return tuple(found)


def _noise(place: int, stage: int, tokens: np.ndarray) -> np.ndarray:
    """Return noise per document that leaves the loss of the domain as it is."""
    drawn = np.random.default_rng([place, stage]).normal(0, 0.05, len(tokens))
    return drawn - (drawn * tokens).sum() / tokens.sum()


def measured(store: Store, found: tuple[Manifest, ...], sequence: tuple[str, ...] = SEQUENCE) -> Manifest:
    settings = ForgettingSettings(sequence=sequence)
    return store.build(
        Build(asset="forgetting", step=forgetting_matrix, settings=settings, inputs={"evaluations": found}, audits=FORGETTING_AUDITS)
    ).manifest


def test_the_matrix_and_its_means_by_hand(store: Store) -> None:
    manifest = measured(store, evaluations(store))
    record = json.loads(manifest.file("forgetting.json").read_text())
    assert np.asarray(record["loss"]) == pytest.approx(np.asarray(LOSSES))
    rows = {row["domain"]: row for row in record["domains"]}
    assert [rows[name].get("forgetting") for name in SEQUENCE] == [pytest.approx(0.2), pytest.approx(0.5), None]
    assert [rows[name]["learned_change"] for name in SEQUENCE] == pytest.approx([-1.0, -2.9, -2.5])
    assert [rows[name]["backward_change"] for name in SEQUENCE] == pytest.approx([0.2, 0.5, 0.0])
    assert [rows[name]["forward_change"] for name in SEQUENCE] == pytest.approx([0.0, -0.1, -0.5])
    assert record["mean"]["forgetting"] == pytest.approx(0.35) == record["mean"]["backward_change"]
    arms = [rows[name]["backward_change"] - rows[name]["backward_change_low"] for name in ("wiki", "code")]
    assert all(0.005 < arm < 0.06 for arm in arms)
    assert record["mean"]["backward_change_low"] == pytest.approx(0.35 - np.hypot(*arms) / 2)
    assert manifest.checks[0].passed and manifest.outcome.metrics["mean_forgetting_nats"] == pytest.approx(0.35)


def test_forgetting_counts_from_the_lowest_loss_there_was(store: Store) -> None:
    """Wiki was at 3.9 after code, lower than after itself: it lost 0.3 since, though only 0.2 since its own training."""
    record = json.loads(
        measured(store, evaluations(store, [LOSSES[0], LOSSES[1], [3.9, 3.0, 6.5], LOSSES[3]])).file("forgetting.json").read_text()
    )
    assert (record["domains"][0]["forgetting"], record["domains"][0]["backward_change"]) == (pytest.approx(0.3), pytest.approx(0.2))


def test_what_does_not_fit_is_refused(store: Store) -> None:
    found = evaluations(store)
    with pytest.raises(GristmillError, match="2 evaluations of a sequence of 3 domains"):
        measured(store, found[:2])
    with pytest.raises(GristmillError, match="other documents of wiki"):
        measured(store, (*found[:2], evaluations(store, documents=29)[2]))
    with pytest.raises(EmptyInput, match="no held-out document of web"):
        measured(store, found, ("web", "code", "math"))
