"""What probes measured: read from files in any order, paired, at points in common; units of the tolerance; errors of means."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from ratio_world import held_out, judged, window_file, world, write

from pipelines.errors import GristmillError
from pipelines.probe_losses import Tolerance, read_probes, stratified_errors
from pipelines.ratio_estimate import RatioSettings


def test_a_tolerance_has_one_unit() -> None:
    """A base of 4 nats and 4 bytes a token: 2 % are 0.08 nats; 0.02 bits a byte are 0.08 bits a token, times ln 2."""
    assert Tolerance(nats=0.03).in_nats(4.0, 4.0) == 0.03
    assert Tolerance(percent=2).in_nats(4.0, 4.0) == pytest.approx(0.08)
    assert Tolerance(bits_per_byte=0.02).in_nats(4.0, 4.0) == pytest.approx(0.08 * math.log(2))
    assert RatioSettings().tolerance == Tolerance(nats=0.05)
    for wrong, said in (({}, "got none"), ({"nats": 0.05, "percent": 3}, "got nats 0.05, percent 3"), ({"nats": 0}, "greater than 0")):
        with pytest.raises(ValidationError, match=said):
            Tolerance(**wrong)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    losses = world(seeds=(0, 1), ends={0.85: 2000}, windows=held_out(contaminated=3))
    files = write(tmp_path, losses)
    read = read_probes(files.windows, files.probes[::-1])
    assert read.runs == losses.runs and read.tokens_A.tolist() == [250, 500, 1000, 2000, 4000]
    np.testing.assert_allclose(read.deltas_NAW, losses.deltas_NAW, atol=1e-12)
    assert read.full.sum(axis=1).tolist() == [3, 3, 3, 3, 3, 3, 2, 2]
    assert read.windows.contaminated.sum() == 3 and read.windows.base_fingerprint == "b" * 32
    assert read.windows.bytes_per_token("general") == 4.0 and read.windows.mean_loss("target") == pytest.approx(
        losses.windows.base[400:].mean()
    )


def test_other_windows_are_an_error(tmp_path: Path) -> None:
    files = write(tmp_path / "a", world())
    fewer = held_out(300)
    for other in (
        world(windows=fewer),
        world(windows=replace(fewer, fingerprint=files.windows.fingerprint, keys=tuple(("general", "x", n) for n in range(360)))),
    ):
        made = write(tmp_path / str(len(other.windows.keys[0][1])), other)
        with pytest.raises(GristmillError, match=r"not measured on the same windows.*materialize mixture_probe again"):
            read_probes(files.windows, (*files.probes, made.probes[0]))


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    files = write(tmp_path, world())
    table = pq.read_table(files.probes[1].file("losses.parquet"))
    values = table["loss"].to_numpy().copy()
    values[0] = math.nan
    pq.write_table(table.set_column(table.column_names.index("loss"), "loss", pa.array(values)), files.probes[1].file("losses.parquet"))
    with pytest.raises(GristmillError, match=r"mixture_probe\[r0.50-s0\] has 1 losses of \d+ that are not finite"):
        read_probes(files.windows, files.probes)


def test_no_probe_and_a_role_without_windows_are_errors(tmp_path: Path) -> None:
    files = write(tmp_path / "a", world())
    with pytest.raises(GristmillError, match="three ratios below 1"):
        read_probes(files.windows, ())
    with pytest.raises(GristmillError, match="no target window"):
        read_probes(window_file(tmp_path / "b", held_out(40, 0)), files.probes)


def test_points_that_differ_by_a_step_are_one(tmp_path: Path) -> None:
    """A run of other length ends on another whole step: 3968 tokens are 4000, and 3900 are not."""
    losses = world((0.25, 0.5))
    folders = (tmp_path / "a", tmp_path / "b")
    near, far = (
        write(folder, replace(losses, tokens_A=np.asarray([250, 500, 1000, 2000, last])))
        for folder, last in zip(folders, (3968, 3900), strict=True)
    )
    files = write(tmp_path / "c", world((0.7, 0.85)))
    assert read_probes(files.windows, (*files.probes, *near.probes)).tokens_A.tolist() == [250, 500, 1000, 2000, 4000]
    assert read_probes(files.windows, (*files.probes, *far.probes)).tokens_A.tolist() == [250, 500, 1000, 2000, 3900, 4000]


def test_between_two_points_losses_are_linear_in_log_tokens() -> None:
    losses = world(general=lambda r, t: r * math.log2(t), target=lambda r, t: -math.log2(t), ends={0.85: 2000}, noise=0.0)
    found = losses.including(2828)
    points = found.at(2828)
    assert [run.ratio for run in points.runs] == [0.25, 0.5, 0.7]  # the last did not reach the point after
    assert points.general == pytest.approx([r * math.log2(2828) for r in (0.25, 0.5, 0.7)])
    assert points.target == pytest.approx([-math.log2(2828)] * 3)
    assert losses.including(4030) is losses
    with pytest.raises(GristmillError, match="no probe was measured at 2,828 tokens, but at 250"):
        losses.at(2828)


def test_standard_errors_are_those_of_paired_differences() -> None:
    """Windows differ by 0.8 nats among themselves and by 0.02 in their change: the error is 0.02 / sqrt(400)."""
    points = judged(world()).points
    assert points.errors == pytest.approx([0.02 / 20] * 4, rel=0.15)


def test_stratified_errors_are_those_of_draws_within_domains() -> None:
    """Two domains whose losses rise by 0 and by 1 nat: the difference between them is no noise of the mean."""
    random = np.random.default_rng(1)
    stratum = np.repeat([0, 1], [100, 300])
    deltas = stratum + random.normal(0, 0.1, 400)
    draws = [np.concatenate([random.choice(deltas[stratum == s], (stratum == s).sum()) for s in (0, 1)]).mean() for _ in range(3000)]
    assert stratified_errors(deltas[None], stratum)[0] == pytest.approx(np.std(draws), rel=0.06)
    assert math.isnan(stratified_errors(np.ones((1, 1)), np.zeros(1))[0])
    assert stratified_errors(np.asarray([[0.0, 2.0]]), np.asarray([0, 1]))[0] == pytest.approx(math.sqrt(2) / 2)
