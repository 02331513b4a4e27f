"""The searched mixture as an artifact: what it says, its determinism, what a refusal takes, and its verification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mixture_worlds import (
    AVAILABLE,
    DOMAINS,
    ROLES,
    TARGETS,
    TOKENS,
    WORLD,
    codes,
    drawn,
    swarm_of,
    with_deltas,
)
from small_world import FilesSettings, publish

from pipelines.errors import GristmillError
from pipelines.manifests import Json, Manifest, Member, Outcome
from pipelines.mixture_search import (
    SEARCH_AUDITS,
    VERIFICATION_AUDITS,
    estimate_consistent,
    estimate_not_refused,
    search_mixture,
    search_plugins,
    verification_held,
    verify_mixture,
)
from pipelines.mixture_study import SearchSettings, VerifiedSearchSettings
from pipelines.store import Build, Store
from pipelines.swarm import Swarm

# From artifacts to artifacts


class ProbeFiles(FilesSettings):
    """The files of a probe."""

    about: dict[str, Json]


def write_probe(made: ProbeFiles, out: Path) -> Outcome:
    """Write losses and mixture as a probe leaves them."""
    for name, rows in made.files.items():
        pq.write_table(pa.Table.from_pylist(list(rows)), out / name)
    (out / "probe.json").write_text(json.dumps(made.about))
    return Outcome()


BASE = 4.0


def publish_swarm(store: Store, swarm: Swarm) -> tuple[Manifest, tuple[Manifest, ...], tuple[Member, ...]]:
    """Publish windows, probes and a selection that hold what `swarm` measured."""
    keys = keys_of(swarm.deltas["book"].shape[1])
    rows = [{"corpus": c, "domain": d, "window": n, "tokens": 32, "bytes": 100.0, "loss": BASE + n / 100} for n, (c, d) in enumerate(keys)]
    windows = publish(store, "probe_windows", {"windows.parquet": rows}, partition="tiny")
    probes = tuple(publish_probe(store, swarm, place, keys) for place in range(len(swarm.probes)))
    tables: dict[str, list[dict[str, Json]]] = {"general.parquet": [], "target.parquet": []}
    for domain, role in ROLES.items():
        row = {"id": domain, "passage": 0, "domain": domain, "role": role, "tokens": AVAILABLE[domain]}
        tables[f"{role}.parquet"] += [{**row, "selected": True}, {**row, "passage": 1, "selected": False}]
    subset = publish(store, "selected_subset", tables)
    return windows, probes, tuple(Member(manifest=subset, name=name) for name in tables)


def keys_of(windows: int) -> list[tuple[str, str]]:
    """Return role and domain of each window, `windows` of every domain."""
    return [(ROLES[domain], domain) for domain in DOMAINS for _ in range(windows)]


def publish_probe(
    store: Store, swarm: Swarm, place: int, keys: Sequence[tuple[str, str]], *, name: str | None = None, tokens: int = TOKENS
) -> Manifest:
    """Publish probe `place` of `swarm`, measured on a part of the windows early on and on all at its end."""
    shares = {domain: float(share) for domain, share in zip(swarm.domains, swarm.shares_NK[place], strict=True) if share > 0}
    about = {
        "probe": name or swarm.probes[place],
        "ratio": sum(shares.get(domain, 0.0) for domain in TARGETS),
        "seed": int(swarm.seeds_N[place]),
    }
    changes = np.concatenate([swarm.deltas[domain][place] for domain in swarm.deltas])
    rows = []
    for measured_at, stride in ((tokens // 8, 4), (tokens, 1)):
        for number in range(0, len(keys), stride):
            corpus, domain = keys[number]
            loss = BASE + number / 100 + float(changes[number]) * measured_at / tokens
            rows.append({**about, "tokens": measured_at, "corpus": corpus, "domain": domain, "window": number, "loss": loss})
    made = ProbeFiles(files={"losses.parquet": tuple(rows)}, about={**about, "shares": shares, "tokens": tokens, "stopped": None})
    asset, partition = ("verification_probe", "tiny") if name else ("mixture_probe", f"tiny|{swarm.probes[place]}")
    return store.build(Build(asset=asset, partition=partition, step=write_probe, settings=made)).manifest


def searched(store: Store, artifacts: tuple[Manifest, tuple[Manifest, ...], tuple[Member, ...]], **changes: object) -> Manifest:
    windows, probes, selection = artifacts
    request = Build(
        asset="critical_ratio",
        partition="tiny",
        step=search_mixture,
        settings=SearchSettings(**{"draws": 20, **changes}),
        inputs={"probes": probes, "windows": windows, "selection": selection},
        audits=SEARCH_AUDITS,
    )
    return store.build(request).manifest


def read(manifest: Manifest, name: str = "critical_ratio.json") -> dict:
    return json.loads(manifest.file(name).read_text())


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Store, tuple[Manifest, tuple[Manifest, ...], tuple[Member, ...]], Manifest]:
    """A store with a healthy swarm of four domains, and the mixture that was found."""
    store = Store(tmp_path_factory.mktemp("search"))
    artifacts = publish_swarm(store, swarm_of(WORLD, drawn(), windows=48, noise=0.01, common=0.03))
    return store, artifacts, searched(store, artifacts)


def test_the_artifact_says_what_was_found_and_on_what_it_rests(published: tuple) -> None:
    _, _, manifest = published
    result = read(manifest)
    assert (result["decision"], result["refusals"]) == ("estimate", [])
    assert sum(result["shares"].values()) == pytest.approx(1.0, abs=1e-9)
    assert result["ratio"] == pytest.approx(result["shares"]["code"] + result["shares"].get("law", 0.0), abs=1e-9)
    assert result["interval_95"][0] <= result["ratio"] <= result["interval_95"][1]
    assert 0 < result["safe"] < result["ratio"]
    guards = {row["domain"]: row for row in result["guards"]}
    assert set(guards) == {"book", "wiki"}
    assert all(
        row["binding"] and row["predicted"] == pytest.approx(0.05, abs=1e-4) and row["low"] < 0.05 < row["high"] for row in guards.values()
    )
    assert all(row["gain_per_0.01_nats"] == pytest.approx(0.01 * row["multiplier"]) and row["multiplier"] > 0 for row in guards.values())
    weights = {row["domain"]: row["weight"] for row in result["targets"]}
    assert weights == {"code": 0.75, "law": 0.25}, "by selected tokens: unselected passages do not count"
    assert result["target_prediction"] == pytest.approx(sum(row["weight"] * row["predicted"] for row in result["targets"]))
    for row in result["caps"]:
        assert row["available_tokens"] == AVAILABLE[row["domain"]]
        assert row["epochs"] == pytest.approx(row["share"] * TOKENS / row["available_tokens"])
        assert row["planned_tokens"] == round(row["share"] * TOKENS)
    assert [row["domain"] for row in result["laws"]] == list(DOMAINS)
    assert all(
        row["loo_error"] == pytest.approx(row["loo_error_nats"] / 0.05) and row["rmse"] <= row["loo_error"] for row in result["laws"]
    )
    assert len(result["points"]) == 15 and set(result["points"][0]["deltas"]) == set(DOMAINS)
    assert result["solution"]["convex"] and result["solution"]["kkt_residual"] < 1e-3
    assert (result["tokens"], result["budget_tokens"]) == (TOKENS, TOKENS)
    assert manifest.outcome.plots == ("mixture_search.png", "guards.png")
    assert {"guards", "caps", "targets", "laws", "probes", "refusals", "warnings"} == set(manifest.outcome.tables)
    assert manifest.outcome.counts == {"probes": 15, "mixtures": 15, "domains": 4, "windows": 192}
    assert all(check.passed for check in manifest.checks)


def test_deltas_are_read_back_as_they_were_measured(published: tuple) -> None:
    swarm = swarm_of(WORLD, drawn(), windows=48, noise=0.01, common=0.03)
    points = {row["probe"]: row for row in read(published[2])["points"]}
    for place, name in enumerate(swarm.probes):
        assert points[name]["deltas"] == pytest.approx({domain: float(swarm.means(domain)[place]) for domain in DOMAINS}, abs=1e-12)


def test_a_cap_that_binds_is_shown(published: tuple) -> None:
    store, artifacts, _ = published
    manifest = searched(store, artifacts, tokens=30_000_000, draws=0)
    caps = {row["domain"]: row for row in manifest.outcome.tables["caps"]}
    assert caps["code"]["binding"] and caps["code"]["epochs"] == pytest.approx(4.0, abs=1e-3) and caps["code"]["gain_per_epoch"] > 0
    assert not caps["book"]["binding"] and caps["book"]["gain_per_epoch"] is None


def test_the_same_inputs_give_the_same_bytes_in_any_order_of_probes(published: tuple, tmp_path: Path) -> None:
    _, (windows, probes, selection), manifest = published
    search_mixture(SearchSettings(draws=20), tmp_path, probes=probes[::-1], windows=windows, selection=selection)
    for entry in manifest.files:
        assert (tmp_path / entry.path).read_bytes() == manifest.file(entry.path).read_bytes(), entry.path


def test_a_refusal_takes_the_best_measured_mixture_a_given_one_or_stops(published: tuple) -> None:
    store, artifacts, manifest = published
    few = (artifacts[0], artifacts[1][:5], artifacts[2])
    taken = searched(store, few)
    result = read(taken)
    assert (result["decision"], codes(result["refusals"])) == ("lower_bound", {"too_few_mixtures"})
    held = [row for row in result["points"] if row["holds"]]
    assert held and result["shares"] == min(held, key=lambda row: row["objective"])["shares"]
    assert result["guards"][0]["predicted"] is None and result["guards"][0]["measured"] <= 0.05
    assert estimate_consistent(taken).passed and not estimate_not_refused(taken).passed
    given_shares = {"book": 0.4, "code": 0.3, "wiki": 0.3}
    assert read(searched(store, few, on_refusal="manual", shares=given_shares))["shares"] == given_shares
    with pytest.raises(GristmillError, match="too_few_mixtures: 5 distinct mixtures"):
        searched(store, few, on_refusal="error")
    strict = {"book": 1e-4, "wiki": 1e-4}
    with pytest.raises(GristmillError, match="no measured mixture holds every guard either"):
        searched(store, (artifacts[0], artifacts[1][-5:], artifacts[2]), guards=strict)
    assert read(manifest)["decision"] == "estimate"


def test_probes_of_other_windows_or_lengths_are_an_error(published: tuple, tmp_path: Path) -> None:
    store, (windows, probes, selection), _ = published
    other = publish_swarm(Store(tmp_path / "other"), swarm_of(WORLD, drawn(6), windows=47))
    with pytest.raises(GristmillError, match="was measured on 188 windows at its end, of 192"):
        searched(store, (windows, (*probes[:5], other[1][5]), selection))
    short = publish_probe(store, swarm_of(WORLD, drawn(1), windows=48), 0, keys_of(48), tokens=TOKENS // 2)
    with pytest.raises(GristmillError, match="measured after 250,000 and 500,000 tokens"):
        searched(store, (windows, (*probes, short), selection))
    general = (selection[0],)
    with pytest.raises(GristmillError, match="was trained on code, of which nothing is selected"):
        searched(store, (windows, probes, general))


def test_plugins_of_a_search() -> None:
    assert search_plugins(SearchSettings()) == ("pipelines.mixing_laws.exponential", "pipelines.mixing_laws.trees")
    assert search_plugins(SearchSettings(cross_check=None)) == ("pipelines.mixing_laws.exponential",)
    assert search_plugins(SearchSettings(law="auto", cross_check=None)) == search_plugins(SearchSettings())


# Verification


def verified(published: tuple, *, extra: float = 0.0, moved: float = 0.0, **changes: object) -> Manifest:
    """Run a verification in the world, `extra` nats worse for wiki, at the mixture found, `moved` from code to law."""
    store, (windows, probes, selection), found = published
    shares = {**dict.fromkeys(DOMAINS, 0.0), **read(found)["shares"]}
    shares |= {"code": shares["code"] - moved, "law": shares["law"] + moved}
    run = swarm_of(WORLD, [shares], windows=48, noise=0.01, common=0.03)
    run = with_deltas(run, "wiki", lambda deltas: deltas + extra)
    verification = publish_probe(store, run, 0, keys_of(48), name="verification")
    request = Build(
        asset="verified_ratio",
        partition="tiny",
        step=verify_mixture,
        settings=VerifiedSearchSettings(**{"draws": 0, **changes}),
        inputs={"critical_ratio": found, "probes": probes, "windows": windows, "verification": verification, "selection": selection},
        audits=VERIFICATION_AUDITS,
    )
    return store.build(request).manifest


def test_a_run_at_the_mixture_verifies_it_and_joins_the_fit(published: tuple) -> None:
    manifest = verified(published)
    result, before = read(manifest, "verified_ratio.json"), read(published[2])
    checked = result["verification"]
    assert checked["held"] and verification_held(manifest).passed
    assert (checked["before"], checked["before_shares"]) == (before["ratio"], before["shares"])
    for row in checked["guards"]:
        assert row["predicted"] == pytest.approx(0.05, abs=1e-4)
        assert row["measured"] == pytest.approx(
            float(WORLD[row["domain"]].predict(np.asarray([list(_by_domain(before))]), np.ones(1))[0]), abs=0.02
        )
        assert row["standard_error"] < 0.02
    assert len(result["points"]) == 16 and "verification" in {row["probe"] for row in result["points"]}
    assert result["ratio"] == pytest.approx(before["ratio"], abs=0.03)
    assert result["decision"] == "estimate"


def _by_domain(result: dict) -> list[float]:
    return [result["shares"].get(domain, 0.0) for domain in DOMAINS]


def test_a_run_that_does_not_hold_is_told_and_what_follows_is_a_setting(published: tuple) -> None:
    refit = verified(published, extra=0.06)
    result = read(refit, "verified_ratio.json")
    rows = {row["domain"]: row for row in result["verification"]["guards"]}
    assert rows["book"]["held"] and not rows["wiki"]["held"]
    assert not verification_held(refit).passed and "not_verified" in codes(result["warnings"])
    lower = read(verified(published, extra=0.06, on_unverified="lower"), "verified_ratio.json")
    assert lower["decision"] == "lower_bound" and "not_verified" in codes(lower["refusals"])
    assert any(row["holds"] and row["shares"] == lower["shares"] for row in lower["points"])
    with pytest.raises(GristmillError, match="not verified: a run at the mixture: wiki changed by"):
        verified(published, extra=0.06, on_unverified="error")


def test_a_run_at_another_mixture_verifies_nothing(published: tuple) -> None:
    with pytest.raises(GristmillError, match=r"has a share 0\.0500 away"):
        verified(published, moved=0.05)
