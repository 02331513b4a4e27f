"""Probes: pairing over windows and data order, the course of a run, the run that verifies a ratio, what a probe needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from small_world import BATCH, SEQUENCE_LENGTH, World, publish

from pipelines import probing
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.shares import domain_tokens, mixed_shares, role_shares
from pipelines.store import Build
from pipelines.swarm import draw_mixtures
from pipelines.trainer import Run

STEP = BATCH * SEQUENCE_LENGTH


@pytest.fixture(scope="module")
def probes(world: World, base: Manifest) -> dict[float, Manifest]:
    return {ratio: world.store.build(world.probe(base, ratio)).manifest for ratio in (0.0, 0.25, 0.75)}


@pytest.fixture(scope="module")
def windows(world: World, base: Manifest) -> Manifest:
    return world.store.build(world.windows(base)).manifest


def losses(manifest: Manifest) -> dict[tuple[int, str], np.ndarray]:
    """Return the window losses by (tokens, corpus)."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in pq.read_table(manifest.file("losses.parquet")).sort_by("window").to_pylist():
        found.setdefault((row["tokens"], row["corpus"]), []).append(row["loss"])
    return {key: np.asarray(values) for key, values in found.items()}


def test_all_probes_measure_the_same_windows(probes: dict[float, Manifest], windows: Manifest) -> None:
    """A quarter of them at each point along the run, the next ones each time; all of them at the last."""
    numbers = pq.read_table(windows.file("windows.parquet"))["window"].to_pylist()
    assert numbers == list(range(36))
    for probe in probes.values():
        rows = pq.read_table(probe.file("losses.parquet")).to_pylist()
        points = sorted({row["tokens"] for row in rows})
        assert points == [n * STEP for n in (2, 5, 8, 10, 12, 15, 18, 20)]
        found = [[row["window"] for row in rows if row["tokens"] == tokens] for tokens in points]
        assert found == [*(numbers[n % 4 :: 4] for n in range(7)), numbers]


def test_more_target_text_teaches_more_of_the_target(probes: dict[float, Manifest]) -> None:
    last = {ratio: losses(probe)[20 * STEP, "target"].mean() for ratio, probe in probes.items()}
    assert last[0.75] < last[0.25] < last[0.0]


def test_probes_read_each_domain_in_the_same_order(world: World, base: Manifest) -> None:
    """The n-th window of a domain is the same at every ratio; only how many are read differs."""
    read: dict[float, dict[str, list[bytes]]] = {}
    for ratio in (0.25, 0.75):
        request = world.probe(base, ratio)
        state = Run(
            request.settings, mixed_shares(role_shares(world.selection), ratio), world.selection, world.shards, world.tokenizer, base
        )
        order = state.order
        mine = read.setdefault(ratio, {domain: [] for domain in order.domains})
        for step in range(state.num_steps):
            for row, domain in zip(state.batch(step).inputs_BT, order.assignment[step * BATCH :], strict=False):
                mine[order.domains[domain]].append(row.numpy().tobytes())
        assert len(mine["legal"]) == pytest.approx(ratio * 80, abs=1)
    for domain in ("wiki", "book", "legal"):
        one, other = read[0.25][domain], read[0.75][domain]
        shorter = min(len(one), len(other))
        assert shorter > 3 and one[:shorter] == other[:shorter]


def test_the_loss_of_the_base_is_that_of_transformers(base: Manifest, windows: Manifest) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.directory, local_files_only=True).eval()
    ids = torch.from_numpy(np.load(windows.file("windows.npy")).astype(np.int64))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
    assert pq.read_table(windows.file("windows.parquet"))["loss"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-4)


def test_windows_are_of_held_out_text_by_share_of_role(world: World, base: Manifest, windows: Manifest) -> None:
    rows = pq.read_table(windows.file("windows.parquet")).to_pylist()
    counts = {domain: sum(row["domain"] == domain for row in rows) for domain in ("wiki", "book", "legal")}
    shares = role_shares(world.selection)
    assert counts["legal"] == 12 and counts["wiki"] == pytest.approx(24 * shares["general"]["wiki"], abs=1)
    each = world.store.build(world.windows(base, windows_per_domain=7)).manifest
    rows = pq.read_table(each.file("windows.parquet")).to_pylist()
    assert {domain: sum(row["domain"] == domain for row in rows) for domain in counts} == dict.fromkeys(counts, 7)
    sizes = {row["domain"]: row["bytes"] / row["tokens"] for row in rows}
    assert all(1.0 < size < 6.0 for size in sizes.values()), sizes


def test_no_held_out_text_names_the_domains(world: World, base: Manifest) -> None:
    rows = pq.read_table(world.decisions.file("decisions.parquet")).to_pylist()
    rows = [{**row, "split": "train" if row["domain"] == "legal" else row["split"]} for row in rows]
    decisions = publish(world.store, "deduplicated_corpus", {"decisions.parquet": rows})
    request = world.windows(base)
    with pytest.raises(EmptyInput, match="no held-out window of the target domains; raise `held_out` of legal"):
        world.store.build(replace(request, inputs={**request.inputs, "decisions": decisions}))


def verification(world: World, base: Manifest, found: dict[str, object]) -> Manifest:
    """Train the run that verifies what `found` says."""
    publish_ratio = Build(asset="critical_ratio", step=write_found, settings=Found(found=json.dumps(found)))
    probe = world.probe(base, None)
    inputs = {**probe.inputs, "critical_ratio": world.store.build(publish_ratio).manifest}
    return world.store.build(replace(probe, asset="verification_probe", step=probing.train_verification, inputs=inputs)).manifest


class Found(Settings):
    """What a test lets the estimate say, as JSON."""

    found: str


def write_found(settings: Found, out: Path) -> Outcome:
    (out / "critical_ratio.json").write_text(settings.found)
    return Outcome()


def test_the_run_at_the_estimate_is_the_probe_at_that_ratio(world: World, base: Manifest, probes: dict[float, Manifest]) -> None:
    made = verification(world, base, {"ratio": 0.25})
    assert all(np.array_equal(found, losses(probes[0.25])[key]) for key, found in losses(made).items())
    assert json.loads(made.file("probe.json").read_text())["probe"] == "verification"


def test_a_mixture_of_domains_is_verified_as_it_is(world: World, base: Manifest) -> None:
    shares = {"wiki": 0.2, "book": 0.3, "legal": 0.5}
    written = json.loads(verification(world, base, {"ratio": 0.5, "shares": shares}).file("probe.json").read_text())
    assert written["shares"] == shares and written["ratio"] == pytest.approx(0.5)


def test_a_probe_far_from_the_tolerance_ends_early(world: World, base: Manifest, probes: dict[float, Manifest]) -> None:
    """At a tolerance of a ten-thousandth of a nat any change is far off; the points until then are those of the whole run."""
    request = world.probe(base, 0.0, tolerance={"nats": 1e-4}, stop_beyond=3.0)
    made = world.store.build(request).manifest
    written = json.loads(made.file("probe.json").read_text())
    assert "beyond 3 tolerances" in written["stopped"] and written["tokens"] < 20 * STEP
    found, whole = losses(made), losses(probes[0.0])
    assert max(tokens for tokens, _ in found) == written["tokens"] >= 10 * STEP
    assert all(np.array_equal(values, whole[key]) for key, values in found.items() if key[0] < written["tokens"])
    assert len(found[written["tokens"], "general"]) == 24  # the last point measures all windows
    assert json.loads(probes[0.0].file("probe.json").read_text())["stopped"] is None
    near = world.store.build(world.probe(base, 0.0, tolerance={"percent": 90.0}, stop_beyond=3.0)).manifest
    assert json.loads(near.file("probe.json").read_text())["stopped"] is None


def test_a_mixture_of_a_swarm_is_drawn_around_the_selected_tokens(world: World, base: Manifest) -> None:
    drawn = {"count": 5, "seed": 3, "targets": ("legal",), "target_range": (0.2, 0.6)}
    made = world.store.build(world.probe(base, None, swarm={"number": 1, **drawn})).manifest
    written = json.loads(made.file("probe.json").read_text())
    assert written["probe"] == "m01-s0" and written["shares"] == draw_mixtures(domain_tokens(world.selection), **drawn)[1]
    assert written["ratio"] == pytest.approx(0.3) and sum(written["shares"].values()) == pytest.approx(1.0)


def test_a_probe_needs_one_mixture(world: World, base: Manifest) -> None:
    with pytest.raises(GristmillError, match="needs `ratio`, `shares` or `swarm`"):
        world.store.build(world.probe(base, None))
    with pytest.raises(ValidationError, match="one mixture, and got ratio and shares"):
        world.probe(base, 0.5, shares={"wiki": 1.0})
