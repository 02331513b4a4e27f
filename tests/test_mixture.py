"""The mixture by hand counts: shares, epochs, what runs out and what follows, caps, phases with shares of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import publish

from pipelines.data_order import DomainMixture
from pipelines.errors import EmptyInput
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.mixture import MIXTURE_AUDITS, MixtureSettings, _filled, mix_domains
from pipelines.plugins import Settings
from pipelines.store import Build, Store


def selection(store: Store, tokens: Mapping[str, tuple[str, int]]) -> tuple[Member, ...]:
    """Publish a selection of `tokens` by domain, ten passages each, and an unselected one that is not to count."""
    files = {"general.parquet": [], "target.parquet": []}
    for domain, (role, total) in tokens.items():
        rows = [{"role": role, "domain": domain, "tokens": total // 10, "selected": True}] * 10
        files[f"{role}.parquet"] += [*rows, {**rows[0], "tokens": 10**9, "selected": False}]
    files = {name: rows for name, rows in files.items() if rows}
    subset = publish(store, "selected_subset", files)
    return tuple(Member(manifest=subset, name=name) for name in files)


class MeasuredSettings(Settings):
    """What a test lets the probes say, by file."""

    files: dict[str, dict[str, Json]]


def write_ratio(made: MeasuredSettings, out: Path) -> Outcome:
    for name, content in made.files.items():
        (out / name).write_text(json.dumps(content))
    return Outcome()


def measured(store: Store, ratio: float = 0.6, safe: float = 0.55, **more: Json) -> Manifest:
    """Publish a critical ratio."""
    return with_files(store, {"critical_ratio.json": {"ratio": ratio, "safe": safe, **more}})


def with_files(store: Store, files: dict[str, dict[str, Json]]) -> Manifest:
    return store.build(Build(asset="critical_ratio", step=write_ratio, settings=MeasuredSettings(files=files))).manifest


def mixed(store: Store, chosen: tuple[Member, ...], found: Manifest | None = None, **changes: object) -> tuple[dict, Manifest]:
    """Return mixture.json and the manifest."""
    made = MixtureSettings(**{"tokens": 1_000_000, **changes})
    inputs = {"critical_ratio": found or measured(store), "selection": chosen}
    manifest = store.build(Build(asset="domain_mixture", step=mix_domains, settings=made, inputs=inputs, audits=MIXTURE_AUDITS)).manifest
    return json.loads(manifest.file("mixture.json").read_text()), manifest


def column(mixture: dict, name: str) -> dict[str, Json]:
    return {row["domain"]: row[name] for row in mixture["domains"]}


def epochs_check(manifest: Manifest) -> Check:
    return next(check for check in manifest.checks if check.name == "within_max_epochs")


DOMAINS = {"wiki": ("general", 300_000), "book": ("general", 100_000), "legal": ("target", 200_000)}


def test_shares_by_hand(store: Store) -> None:
    mixture, manifest = mixed(store, selection(store, DOMAINS), ratio=0.4)
    assert mixture["shares"] == pytest.approx({"book": 0.15, "wiki": 0.45, "legal": 0.4})
    rows = {row["domain"]: row for row in mixture["domains"]}
    assert {domain: row["planned_tokens"] for domain, row in rows.items()} == {"book": 150_000, "wiki": 450_000, "legal": 400_000}
    assert {domain: row["epochs"] for domain, row in rows.items()} == pytest.approx({"book": 1.5, "wiki": 1.5, "legal": 2.0})
    assert {domain: row["available_tokens"] for domain, row in rows.items()} == {"book": 100_000, "wiki": 300_000, "legal": 200_000}
    assert mixture["repeated"] == [] and manifest.outcome.metrics["max_epochs"] == pytest.approx(2.0)


def test_the_measured_ratio_or_its_lower_end_is_used(store: Store) -> None:
    chosen = selection(store, DOMAINS)
    assert mixed(store, chosen)[0]["shares"]["legal"] == pytest.approx(0.6)
    assert mixed(store, chosen, use="safe")[0]["shares"]["legal"] == pytest.approx(0.55)
    assert mixed(store, chosen, use="safe", ratio=0.2)[0]["shares"]["legal"] == pytest.approx(0.2)


@pytest.mark.parametrize(("ratio", "domains"), [(0.0, {"book", "wiki"}), (1.0, {"legal"})])
def test_a_ratio_at_the_end_leaves_the_other_role_out(store: Store, ratio: float, domains: set[str]) -> None:
    mixture, manifest = mixed(store, selection(store, DOMAINS), ratio=ratio, tokens=600_000)
    assert set(mixture["shares"]) == domains and sum(mixture["shares"].values()) == pytest.approx(1.0)
    assert all(check.passed for check in manifest.checks)


def test_many_epochs_warn_and_publish(store: Store) -> None:
    few = selection(store, {**DOMAINS, "legal": ("target", 50_000)})
    mixture, manifest = mixed(store, few, ratio=0.4)
    assert mixture["repeated"] == ["legal"] and column(mixture, "limited") == {"book": False, "wiki": False, "legal": True}
    assert not epochs_check(manifest).passed and not epochs_check(manifest).blocking and "legal" in epochs_check(manifest).description
    assert mixed(store, few, ratio=0.4, max_epochs=9.0)[0]["repeated"] == []


def test_the_verified_ratio_is_taken_where_there_is_one(store: Store) -> None:
    files = {"critical_ratio.json": {"ratio": 0.6, "safe": 0.5}, "verified_ratio.json": {"ratio": 0.45, "safe": 0.4}}
    chosen = selection(store, DOMAINS)
    assert mixed(store, chosen, with_files(store, files))[0]["ratio"] == 0.45
    assert mixed(store, chosen, with_files(store, files), use="safe")[0]["shares"]["legal"] == pytest.approx(0.4)


def test_searched_shares_replace_those_by_tokens(store: Store) -> None:
    chosen = selection(store, {**DOMAINS, "tax": ("target", 100_000)})
    searched = {"ratio": 0.5, "safe": 0.3, "shares": {"wiki": 0.2, "book": 0.3, "legal": 0.5, "tax": 0.0}}
    mixture, _ = mixed(store, chosen, measured(store, **searched))
    assert mixture["shares"] == pytest.approx({"wiki": 0.2, "book": 0.3, "legal": 0.5}) and mixture["ratio"] == 0.5
    assert mixture["role_shares"]["general"] == pytest.approx({"book": 0.6, "wiki": 0.4})
    safe, _ = mixed(store, chosen, measured(store, **searched), use="safe")
    assert safe["shares"] == pytest.approx({"wiki": 0.28, "book": 0.42, "legal": 0.3})
    own = {**searched, "safe_shares": {"wiki": 0.7, "tax": 0.3}}
    assert mixed(store, chosen, measured(store, **own), use="safe")[0]["shares"] == pytest.approx({"wiki": 0.7, "tax": 0.3})
    fixed, _ = mixed(store, chosen, measured(store, **searched), ratio=0.4)
    assert fixed["shares"] == pytest.approx({"wiki": 0.45, "book": 0.15, "legal": 0.4 * 2 / 3, "tax": 0.4 / 3})
    with pytest.raises(EmptyInput, match="no selected passage of tax, which the search gave a share"):
        mixed(store, selection(store, DOMAINS), measured(store, shares={"wiki": 0.5, "tax": 0.5}))


def test_upsampling_and_the_budget_that_a_role_lasts_for(store: Store) -> None:
    """Legal is a third of 600,000 selected tokens and has 0.4: 1.2 times as much. 4 * 200,000 / 0.4 = 2,000,000 tokens."""
    mixture, manifest = mixed(store, selection(store, DOMAINS), ratio=0.4)
    assert column(mixture, "upsampling") == pytest.approx({"book": 0.9, "wiki": 0.9, "legal": 1.2})
    assert mixture["limited_at_tokens"] == {"general": round(4 * 400_000 / 0.6), "target": 2_000_000}
    assert (mixture["exhausted"], mixture["ends_at_tokens"], mixture["target_share"]) == ({}, None, pytest.approx(0.4))
    assert mixture["limits"] == {"max_epochs": 4.0, "on_exhausted": "repeat"} and epochs_check(manifest).passed
    assert mixed(store, selection(store, DOMAINS), ratio=0.4, tokens=2_000_000)[0]["exhausted"] == {}
    assert mixed(store, selection(store, DOMAINS), ratio=0.4, tokens=2_000_100)[0]["exhausted"] == {"legal": 2_000_000}
    assert mixed(store, selection(store, DOMAINS), ratio=0.0)[0]["limited_at_tokens"]["target"] is None


# When a domain runs out

SHORT = {"wiki": ("general", 300_000), "book": ("general", 100_000), "legal": ("target", 40_000), "tax": ("target", 60_000)}
"""At a ratio of 0.4 and two epochs, legal (0.16) and tax (0.24) last for half a million tokens."""


def test_repeat_says_where_the_epochs_are_over(store: Store) -> None:
    mixture, manifest = mixed(store, selection(store, SHORT), ratio=0.4, max_epochs=2)
    assert mixture["exhausted"] == {"legal": 500_000, "tax": 500_000} and mixture["repeated"] == ["legal", "tax"]
    assert column(mixture, "planned_tokens") == {"book": 150_000, "wiki": 450_000, "legal": 160_000, "tax": 240_000}
    assert epochs_check(manifest).description == "read too often: legal, tax" and mixture["ends_at_tokens"] is None
    assert manifest.outcome.details["exhausted"] == mixture["exhausted"]


def test_stop_ends_there(store: Store) -> None:
    mixture, manifest = mixed(store, selection(store, SHORT), ratio=0.4, max_epochs=2, on_exhausted="stop")
    assert mixture["ends_at_tokens"] == 500_000 and mixture["repeated"] == []
    assert column(mixture, "planned_tokens") == {"book": 75_000, "wiki": 225_000, "legal": 80_000, "tax": 120_000}
    assert not epochs_check(manifest).passed and "the run ends at 500,000 of 1,000,000 tokens" in epochs_check(manifest).description


def test_renormalise_hands_shares_on(store: Store) -> None:
    """Both target domains end at half of the budget; the rest is general, book to wiki as 1 to 3. A larger tax takes it over first."""
    mixture, manifest = mixed(store, selection(store, SHORT), ratio=0.4, max_epochs=2, on_exhausted="renormalise")
    assert column(mixture, "planned_tokens") == {"book": 200_000, "wiki": 600_000, "legal": 80_000, "tax": 120_000}
    assert mixture["exhausted"] == {"legal": 500_000, "tax": 500_000} and mixture["target_share"] == pytest.approx(0.2)
    assert epochs_check(manifest).passed and "limited to 2 epochs: legal, tax" in epochs_check(manifest).description
    shares = {"wiki": 0.45, "book": 0.15, "legal": 0.2, "tax": 0.2}
    taken, _ = mixed(
        store,
        selection(store, {**SHORT, "tax": ("target", 900_000)}),
        measured(store, shares=shares),
        max_epochs=2,
        on_exhausted="renormalise",
    )
    assert taken["exhausted"] == {"legal": 400_000} and taken["target_share"] == pytest.approx(0.4)
    assert column(taken, "planned_tokens") == {"book": 150_000, "wiki": 450_000, "legal": 80_000, "tax": 320_000}


def test_cap_foresees_it(store: Store) -> None:
    """No domain is planned beyond two epochs: legal and tax get 0.08 and 0.12 from the start, and general the rest."""
    mixture, manifest = mixed(store, selection(store, SHORT), ratio=0.4, max_epochs=2, on_exhausted="cap")
    assert mixture["shares"] == pytest.approx({"book": 0.2, "wiki": 0.6, "legal": 0.08, "tax": 0.12})
    assert (mixture["exhausted"], mixture["ends_at_tokens"], mixture["ratio"]) == ({}, None, 0.4)
    assert column(mixture, "epochs") == pytest.approx({"book": 2.0, "wiki": 2.0, "legal": 2.0, "tax": 2.0})
    assert column(mixture, "limited") == {"book": False, "wiki": False, "legal": True, "tax": True}
    assert mixture["target_share"] == manifest.outcome.metrics["target_share"] == pytest.approx(0.2)
    shares = {"wiki": 0.4, "book": 0.2, "legal": 0.3, "tax": 0.1}
    within, _ = mixed(
        store, selection(store, {**SHORT, "tax": ("target", 900_000)}), measured(store, shares=shares), max_epochs=2, on_exhausted="cap"
    )
    assert within["shares"] == pytest.approx({"wiki": 0.4, "book": 0.2, "legal": 0.08, "tax": 0.32}) and within[
        "target_share"
    ] == pytest.approx(0.4)


@pytest.mark.parametrize("what", ["renormalise", "cap"])
def test_a_selection_that_does_not_last_ends_the_run(store: Store, what: str) -> None:
    """All 500,000 tokens twice are a million; the budget is two."""
    mixture, manifest = mixed(store, selection(store, SHORT), ratio=0.4, max_epochs=2, on_exhausted=what, tokens=2_000_000)
    assert mixture["ends_at_tokens"] == 1_000_000 and not epochs_check(manifest).passed
    assert column(mixture, "epochs") == pytest.approx(dict.fromkeys(SHORT, 2.0)) and sum(mixture["shares"].values()) == pytest.approx(1.0)
    alone, _ = mixed(store, selection(store, SHORT), ratio=1.0, max_epochs=2, on_exhausted=what)
    assert set(alone["shares"]) == {"legal", "tax"} and alone["ends_at_tokens"] == 200_000  # a role without a share does not step in


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.floats(0, 1) | st.just(0.0), st.floats(0.001, 2)), min_size=1, max_size=8))
def test_water_filling_keeps_caps_sum_and_proportions(rows: list[tuple[float, float]]) -> None:
    wanted, caps = ({str(n): row[place] for n, row in enumerate(rows)} for place in (0, 1))
    filled = _filled(wanted, caps)
    reach = sum(caps[name] for name, weight in wanted.items() if weight > 0)
    assert sum(filled.values()) == pytest.approx(min(sum(wanted.values()), reach))
    assert all(filled[name] <= caps[name] * (1 + 1e-9) for name in caps)
    levels = [filled[name] / weight for name, weight in wanted.items() if weight > 1e-6 and filled[name] < caps[name] * (1 - 1e-6)]
    assert not levels or max(levels) == pytest.approx(min(levels))
    assert not levels or all(filled[n] <= wanted[n] * max(levels) * (1 + 1e-6) for n in wanted if wanted[n] > 1e-6)


# Phases with shares of their own


def test_epochs_are_counted_along_the_phases(store: Store) -> None:
    """A third of the budget at 0.1, a third in a ramp from there to the ratio, and a third at it: 0.1, 0.35 and 0.6 of the tokens."""
    phases = (
        {"tokens": 300_000, "target_share": 0.1},
        {"tokens": 300_000, "target_share": {"start": 0.1, "end": "critical"}},
        {"tokens": 300_000},
    )
    mixture, manifest = mixed(store, selection(store, DOMAINS), tokens=900_000, phases=phases, max_epochs=1.0)
    assert mixture["shares"]["legal"] == pytest.approx(0.6) and mixture["target_share"] == pytest.approx(0.35)
    assert column(mixture, "planned_tokens") == {"book": 146_250, "wiki": 438_750, "legal": 315_000}
    assert manifest.outcome.metrics["target_share"] == pytest.approx(0.35)
    # 30,000 and 105,000 tokens of legal are read before the last phase, in which it has 0.6
    assert mixture["exhausted"]["legal"] == 600_000 + round(65_000 / 0.6)
    assert mixture["exhausted"]["book"] == mixture["exhausted"]["wiki"] == round(ramp_end(400_000 - 270_000))
    with pytest.raises(ValueError, match="phases of 900000 tokens for a mixture of 1000000"):
        MixtureSettings(tokens=1_000_000, phases=phases)


def ramp_end(general: float) -> float:
    """Return when `general` tokens are read in a ramp whose general share falls from 0.9 to 0.4 over 300,000 tokens, after as many."""
    slope = -0.5 / 300_000
    return 300_000 + (-0.9 + math.sqrt(0.81 + 2 * slope * general)) / slope


def test_a_phase_with_a_mixture_of_its_own_counts(store: Store) -> None:
    phases = ({"tokens": 250_000, "mixture": {"legal": 3, "book": 1}}, {"tokens": 750_000})
    mixture, _ = mixed(store, selection(store, DOMAINS), ratio=0.4, phases=phases, on_exhausted="renormalise", max_epochs=1.0)
    assert mixture["exhausted"] == {
        "legal": 250_000 + 31_250,  # 187,500 of its 200,000 tokens are gone, the rest goes at 0.4
        "book": 281_250 + 131_250,  # 62,500 and 4,687.5 are gone; then it has a quarter
        "wiki": 600_000,
    }
    assert mixture["ends_at_tokens"] == 600_000 and column(mixture, "epochs") == pytest.approx(dict.fromkeys(DOMAINS, 1.0))
    phases = ({"tokens": 400_000, "mixture": {"legal": 3, "book": 1}}, {"tokens": 600_000})
    mixture, _ = mixed(store, selection(store, DOMAINS), ratio=0.4, phases=phases, on_exhausted="renormalise", max_epochs=1.0)
    assert mixture["ends_at_tokens"] == 300_000 and column(mixture, "planned_tokens")["wiki"] == 0  # the phase has nothing left to read
    with pytest.raises(EmptyInput, match="no selected passage of patents"):
        mixed(store, selection(store, DOMAINS), phases=({"tokens": 1_000_000, "mixture": {"patents": 1}},))


def test_training_reads_what_is_written(store: Store) -> None:
    chosen, limits = selection(store, DOMAINS), {"max_epochs": 3.0, "on_exhausted": "cap"}
    mixture, manifest = mixed(store, chosen, ratio=0.4, **limits)
    read = DomainMixture.read(manifest)
    assert (read.shares, read.role_shares, read.ratio) == (mixture["shares"], mixture["role_shares"], 0.4)
    assert (read.max_epochs, read.on_exhausted) == (3.0, "cap")
    again = Store(store.root.parent / "again")
    assert mixed(again, selection(again, DOMAINS), measured(again), ratio=0.4, **limits)[1].content_sha256 == manifest.content_sha256


def test_a_role_without_text_is_an_error(store: Store) -> None:
    general = selection(store, {"wiki": ("general", 1000)})
    with pytest.raises(EmptyInput, match=r"no selected target passage for a mixture with target share 0.400"):
        mixed(store, general, ratio=0.4)
    assert mixed(store, general, ratio=0.0)[0]["shares"] == {"wiki": 1.0}


@settings(max_examples=12, deadline=None)
@given(
    general=st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
    target=st.lists(st.integers(1, 10**9), min_size=1, max_size=3),
    ratio=st.floats(0.001, 0.999),
    tokens=st.integers(1000, 10**12),
)
def test_shares_sum_to_one_and_epochs_are_planned_over_available(
    tmp_path_factory: pytest.TempPathFactory, general: list[int], target: list[int], ratio: float, tokens: int
) -> None:
    store = Store(tmp_path_factory.mktemp("mixture"))
    domains = {f"g{n}": ("general", 10 * size) for n, size in enumerate(general)} | {
        f"t{n}": ("target", 10 * size) for n, size in enumerate(target)
    }
    out = tmp_path_factory.mktemp("out")
    mix_domains(MixtureSettings(tokens=tokens), out, critical_ratio=measured(store, ratio), selection=selection(store, domains))
    mixture = json.loads((out / "mixture.json").read_text())
    assert sum(mixture["shares"].values()) == pytest.approx(1.0, abs=1e-9)
    assert sum(share for domain, share in mixture["shares"].items() if domain[0] == "t") == pytest.approx(ratio)
    for row in mixture["domains"]:
        assert row["epochs"] == pytest.approx(row["share"] * tokens / row["available_tokens"])
        assert row["available_tokens"] == domains[row["domain"]][1]
