"""Selection: the greedy order against brute force and submodlib, budgets as prefixes, and who may be selected."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import plugins
from pipelines.documents import write_table
from pipelines.embedders._grid import UNIT, to_integer_rows
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact
from pipelines.manifests import Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.selection import SELECTION_AUDITS, SELECTION_SCHEMA, SelectionSettings, select_subset
from pipelines.set_functions._certificate import upper_bound
from pipelines.set_functions._neighbors import NeighborGraph, coverage_along, nearest_pick, neighbor_graph
from pipelines.set_functions.facility_location import FacilityLocation, greedy_order
from pipelines.store import Build, Store

ROOT = Path(__file__).parents[1]
needs_submodlib = pytest.mark.skipif(find_spec("submodlib") is None, reason="submodlib-py has no wheel for this Python")


def points(count: int, *, dimensions: int = 8, seed: int = 0, clusters: int = 6) -> np.ndarray:
    """Return `count` integer rows around a few centres; some rows are repeated."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, dimensions))
    rows = to_integer_rows(centres[random.integers(clusters, size=count)] + 0.4 * random.normal(size=(count, dimensions)))
    rows[count // 2 : count // 2 + count // 10] = rows[: count // 10]
    return rows


def kernel_of(graph: NeighborGraph) -> np.ndarray:
    """Return the graph as a dense int64 matrix; a pair that is no edge is 0."""
    kernel = np.zeros((graph.num_points, graph.num_points), dtype=np.int64)
    kernel[graph.rows, graph.columns] = graph.similarities
    return kernel


def brute_force_greedy(kernel: np.ndarray) -> list[tuple[int, int]]:
    """Return (pick, gain) by looking at every point at every step; ties to the lowest index; until no gain is left."""
    covered, picks = np.zeros(len(kernel), dtype=np.int64), []
    while True:
        gains = np.maximum(kernel - covered[:, None], 0).sum(axis=0)
        pick = int(gains.argmax())
        if gains[pick] == 0:
            return picks
        picks.append((pick, int(gains[pick])))
        covered = np.maximum(covered, kernel[:, pick])


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 70), neighbors=st.integers(1, 80), seed=st.integers(0, 10_000), dimensions=st.integers(1, 6))
def test_order_is_brute_force_greedy(count: int, neighbors: int, seed: int, dimensions: int) -> None:
    graph = neighbor_graph(points(count, dimensions=dimensions, seed=seed), neighbors)
    picks, gains = greedy_order(graph)
    assert list(zip(picks.tolist(), gains.tolist(), strict=True)) == brute_force_greedy(kernel_of(graph))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 120), neighbors=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_neighbors_are_the_nearest_with_lowest_index_first(count: int, neighbors: int, seed: int) -> None:
    rows = points(count, seed=seed, dimensions=3)
    rows[count // 3] = 0
    graph = neighbor_graph(rows, neighbors)
    dense = rows.astype(np.int64) @ rows.T.astype(np.int64)
    for point in range(count):
        nearest = [j for j in np.lexsort((np.arange(count), -dense[point])) if dense[point, j] > 0][:neighbors]
        mine = graph.rows == point
        assert graph.columns[mine].tolist() == nearest
        assert graph.similarities[mine].tolist() == dense[point, nearest].tolist()
        missing = np.setdiff1d(np.arange(count), nearest)
        assert max([0, *dense[point, missing]]) <= graph.floors[point]


@needs_submodlib
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("optimizer", ["NaiveGreedy", "LazyGreedy"])
def test_order_is_submodlibs_pick_by_pick(optimizer: str) -> None:
    from submodlib import FacilityLocationFunction

    rows = points(250, dimensions=16, seed=3)
    picks, gains = greedy_order(neighbor_graph(rows, len(rows)))
    reversed_rows = rows[::-1].astype(np.float32)  # submodlib gives ties to the highest id
    kernel = np.ascontiguousarray(np.maximum(reversed_rows @ reversed_rows.T, 0))
    function = FacilityLocationFunction(n=len(rows), mode="dense", separate_rep=False, sijs=kernel)
    theirs = function.maximize(budget=len(picks), optimizer=optimizer, stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False)
    assert [len(rows) - 1 - pick for pick, _ in theirs] == picks.tolist()
    assert [int(gain) for _, gain in theirs] == gains.tolist()


@needs_submodlib
def test_submodlib_plugin_on_one_partition_is_facility_location() -> None:
    rows = points(120, dimensions=16, seed=5)
    ours = FacilityLocation(neighbors=len(rows)).order(rows)
    theirs = plugins.build("set_functions", "submodlib", {"partition_size": 200}).order(rows)
    assert theirs.picks.tolist() == ours.picks.tolist()
    assert np.array_equal(theirs.gains, ours.gains)


@needs_submodlib
@pytest.mark.parametrize("function", ["facility_location", "graph_cut", "log_determinant"])
def test_submodlib_plugin_orders_partitions(function: str) -> None:
    rows = points(90, dimensions=16, seed=6)
    plugin = plugins.build("set_functions", "submodlib", {"function": function, "partition_size": 30, "seed": 1})
    order = plugin.order(rows)
    assert len(np.unique(order.picks)) == len(order.picks) <= len(rows) - 3
    assert (np.diff(order.gains) <= 1e-9).all() and (order.gains > 0).all()


def test_missing_submodlib_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugins.build("set_functions", "submodlib", {})
    monkeypatch.setitem(sys.modules, "submodlib", None)  # how Python marks a package that cannot be imported
    with pytest.raises(GristmillError, match="choose facility_location"):
        plugin.order(points(10))


def test_duplicates_have_no_gain() -> None:
    rows = points(40, seed=1)
    order = FacilityLocation().order(np.concatenate([rows, rows]))
    assert order.picks.max() < 40


def test_zero_vectors_are_never_picked_and_empty_input_gives_an_empty_order() -> None:
    rows = points(20)
    rows[4] = 0
    assert 4 not in FacilityLocation().order(rows).picks
    assert len(FacilityLocation().order(np.zeros((5, 8), dtype=np.int16)).picks) == 0
    assert len(FacilityLocation().order(np.zeros((0, 8), dtype=np.int16)).picks) == 0


def test_same_order_with_one_and_two_threads() -> None:
    script = (
        "import numpy as np, hashlib; from pipelines.embedders._grid import to_integer_rows; "
        "from pipelines.set_functions.facility_location import FacilityLocation; "
        "r = to_integer_rows(np.random.default_rng(0).normal(size=(3000, 96))); o = FacilityLocation().order(r); "
        "print(hashlib.sha256(o.picks.tobytes() + o.gains.tobytes()).hexdigest())"
    )
    outputs = set()
    for threads in ("1", "2"):
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        run = subprocess.run([sys.executable, "-c", script], env=os.environ | variables, cwd=ROOT, capture_output=True, check=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 11), size=st.integers(1, 4), neighbors=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_no_set_exceeds_the_upper_bound(count: int, size: int, neighbors: int, seed: int) -> None:
    rows, size = points(count, dimensions=4, seed=seed), min(size, count)
    similarity = nearest_pick(rows, FacilityLocation().order(rows).picks[:size])[1]
    bound = upper_bound(neighbor_graph(rows, neighbors), size, covered=similarity)
    best = max(nearest_pick(rows, np.array(chosen))[1].sum() for chosen in itertools.combinations(range(count), size))
    assert best / (count * UNIT) <= bound + 1e-12


def test_nearest_pick_and_curve_match_brute_force() -> None:
    rows, picks = points(60, seed=2), np.array([3, 50, 7, 21])
    dense = rows.astype(np.int64) @ rows[picks].T.astype(np.int64)
    place, similarity = nearest_pick(rows, picks)
    assert place.tolist() == dense.argmax(axis=1).tolist()
    assert similarity.tolist() == np.maximum(dense.max(axis=1), 0).tolist()
    curve = coverage_along(rows, picks, np.array([1, 3, 4]))
    assert curve == pytest.approx([np.maximum(dense[:, :size].max(axis=1), 0).mean() / UNIT for size in (1, 3, 4)])


class SourceSettings(Settings):
    """Numbers from which the artifacts of one source partition are written."""

    domain: str
    documents: int
    seed: int = 0
    passages_per_document: int = 3
    """Passages of each document in the shards; the embeddings always hold 3."""


def document_names(source: SourceSettings) -> list[str]:
    return [f"{source.domain}-{number:03d}" for number in range(source.documents)]


def write_embeddings(source: SourceSettings, out: Path) -> Outcome:
    """Write 3 passages per document."""
    names = document_names(source)
    ids, numbers = [name for name in names for _ in range(3)], [0, 1, 2] * len(names)
    zeros = pa.array([0] * len(ids), pa.int64())
    table = pa.table({"id": ids, "passage": pa.array(numbers, pa.int32()), "start": zeros, "end": zeros})
    write_table(out / "passages.parquet", table)
    np.save(out / "embeddings.npy", points(len(ids), seed=source.seed))
    return Outcome()


def write_shard(source: SourceSettings, out: Path) -> Outcome:
    """Write token counts between 20 and 119."""
    each = source.passages_per_document
    ids = [name for name in document_names(source) for _ in range(each)]
    lengths = np.random.default_rng(source.seed + 1).integers(20, 120, size=len(ids))
    table = {"id": ids, "passage": pa.array(list(range(each)) * source.documents, pa.int32()), "offset": np.cumsum(lengths) - lengths}
    write_table(out / "passages.parquet", pa.table(table | {"length": lengths}))
    return Outcome()


class DecisionSettings(Settings):
    """Rows of `decisions.parquet`."""

    rows: tuple[tuple[str, str, bool, str], ...]
    """id, domain, kept, split."""


def write_decisions(decided: DecisionSettings, out: Path) -> Outcome:
    """Write the columns that selection reads."""
    ids, domains, kept, split = zip(*decided.rows, strict=True)
    table = pa.table({"id": ids, "domain": domains, "snapshot": ["2026-01-01"] * len(ids), "kept": kept, "split": split})
    write_table(out / "decisions.parquet", table)
    return Outcome()


def inputs(store: Store, *sources: SourceSettings) -> dict[str, Manifest | tuple[Manifest, ...]]:
    """Publish sources and decisions: of each ten documents the fourth is dropped and the seventh is held out."""
    embeddings, shards, rows = [], [], []
    for source in sources:
        partition = f"{source.domain}|2026-01-01"
        for asset, step, found in (("document_embeddings", write_embeddings, embeddings), ("tokenized_shards", write_shard, shards)):
            found.append(store.build(Build(asset=asset, partition=partition, step=step, settings=source)).manifest)
        for number, name in enumerate(document_names(source)):
            rows.append((name, source.domain, number % 10 != 3, "held_out" if number % 10 == 6 else "train"))
    request = Build(asset="deduplicated_corpus", partition="r", step=write_decisions, settings=DecisionSettings(rows=tuple(rows)))
    return {"decisions": store.build(request).manifest, "embeddings": tuple(embeddings), "shards": tuple(shards)}


WIKI, BOOK, CODE = (SourceSettings(domain=domain, documents=40, seed=seed) for seed, domain in enumerate(("wiki", "book", "code")))
ROLES = {"wiki": "general", "book": "general", "code": "target"}


def subset(store: Store, given_inputs: dict, **changes: object) -> Manifest:
    """Publish a selection; `changes` override the settings."""
    values = {"roles": ROLES, "budget": {"general": {"fraction": 0.25}, "target": {"tokens": 1_000}}} | changes
    wanted = plugins.validate(SelectionSettings, values, where="selection")
    request = Build(
        asset="selected_subset", partition="r", step=select_subset, settings=wanted, inputs=given_inputs, audits=SELECTION_AUDITS
    )
    return store.build(request).manifest


def selection_table(manifest: Manifest) -> pa.Table:
    return pa.concat_tables(pq.read_table(manifest.file(f"{role}.parquet")) for role in ("general", "target"))


def test_selection_is_a_prefix_within_the_budget(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    table = selection_table(manifest)
    assert table.schema.equals(SELECTION_SCHEMA)
    rows = table.to_pylist()
    for role, share_limit in (("general", 0.25), ("target", None)):
        mine = [row for row in rows if row["role"] == role]
        assert [row["rank"] for row in mine] == list(range(len(mine)))
        chosen = [row for row in mine if row["selected"]]
        assert mine[: len(chosen)] == chosen
        budget = int(share_limit * sum(row["tokens"] for row in mine)) if share_limit else 1_000
        spent = sum(row["tokens"] for row in chosen)
        assert spent <= budget < spent + mine[len(chosen)]["tokens"]
        assert manifest.counts[f"{role}_selected_tokens"] == spent
        picked = {(row["id"], row["passage"]) for row in chosen}
        assert all((row["representative_id"], row["representative_passage"]) in picked for row in mine if row["similarity"] > 0)
        assert all(row["gain"] >= later["gain"] for row, later in itertools.pairwise(mine))
    assert all(check.passed for check in manifest.checks)


def test_a_larger_budget_continues_the_same_order(store: Store) -> None:
    given_inputs = inputs(store, WIKI, CODE)
    kept = []
    for tokens in (500, 2_000):
        budget = {"general": {"tokens": tokens}, "target": {"fraction": 0.5}}
        table = selection_table(subset(store, given_inputs, roles={"wiki": "general", "code": "target"}, budget=budget))
        kept.append([row for row in table.to_pylist() if row["role"] == "general"])
    assert [(row["id"], row["passage"]) for row in kept[0]] == [(row["id"], row["passage"]) for row in kept[1]]
    assert {row["rank"] for row in kept[0] if row["selected"]} < {row["rank"] for row in kept[1] if row["selected"]}


def test_candidates_are_the_kept_training_documents(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    table = selection_table(manifest)
    expected = {name for source in (WIKI, BOOK, CODE) for number, name in enumerate(document_names(source)) if number % 10 not in (3, 6)}
    assert set(table["id"].to_pylist()) == expected
    assert table.num_rows == 3 * len(expected)
    counts = manifest.counts
    assert counts["documents_in"] == counts["kept"] + counts["dropped"] == len(expected)
    assert counts["held_out_documents"] == 12 and counts["selected_outside_train"] == 0


def test_tokens_and_vectors_belong_to_their_passage(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    rows = selection_table(subset(store, given_inputs)).to_pylist()
    lengths, vectors = {}, {}
    for shard, embedded in zip(given_inputs["shards"], given_inputs["embeddings"], strict=True):
        table = pq.read_table(shard.file("passages.parquet")).to_pylist()
        lengths |= {(row["id"], row["passage"]): row["length"] for row in table}
        matrix = np.load(embedded.file("embeddings.npy")).astype(np.float64)
        keys = [(row["id"], row["passage"]) for row in pq.read_table(embedded.file("passages.parquet")).to_pylist()]
        vectors |= dict(zip(keys, matrix / np.maximum(np.linalg.norm(matrix, axis=1), 1)[:, None], strict=True))
    for row in rows:
        key, representative = (row["id"], row["passage"]), (row["representative_id"], row["representative_passage"])
        assert row["tokens"] == lengths[key]
        if row["similarity"] > 0:
            assert row["similarity"] == pytest.approx(vectors[key] @ vectors[representative], abs=1e-5)


def test_zero_gain_is_never_filled_in(store: Store) -> None:
    budget = {"general": {"fraction": 1.0}, "target": {"tokens": 10**9}}
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE), budget=budget)
    rows = selection_table(manifest).to_pylist()
    assert all(row["selected"] == (row["gain"] > 0) for row in rows)
    counts = manifest.counts
    assert counts["general_zero_gain_passages"] == sum(row["gain"] == 0 for row in rows if row["role"] == "general") > 0
    assert counts["general_unfilled_tokens"] == counts["general_budget_tokens"] - counts["general_selected_tokens"] > 0
    assert manifest.outcome.metrics["general_coverage"] == pytest.approx(manifest.outcome.metrics["general_upper_bound"], rel=1e-3)


def test_certificate_orders_random_selection_and_bound(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    metrics = subset(store, given_inputs).outcome.metrics
    assert metrics["general_coverage_random"] < metrics["general_coverage"] <= metrics["general_upper_bound"] <= 1.001
    assert 0.5 < metrics["general_gap_share_at_least"] <= 1
    assert metrics["general_random_share_for_same_coverage"] > metrics["general_selected_share"]
    baseline = subset(store, given_inputs, function="random_order", settings={"seed": 3}).outcome.metrics
    assert baseline["general_coverage"] < metrics["general_coverage"]


def test_bytes_do_not_depend_on_the_order_of_the_inputs(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    backward = given_inputs | {name: given_inputs[name][::-1] for name in ("embeddings", "shards")}
    first, second = subset(store, given_inputs), subset(store, backward)
    assert first.fingerprint != second.fingerprint
    assert first.content_sha256 == second.content_sha256
    assert first.outcome == second.outcome


def test_table_by_domain_adds_up(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE), roles=ROLES | {"legal": "general"})
    table = manifest.outcome.tables["by_domain"]
    assert [row["domain"] for row in table] == ["book", "legal", "wiki", "code"]
    assert table[1]["passages"] == table[1]["share_after"] == 0
    assert sum(row["share_after"] for row in table if row["role"] == "general") == pytest.approx(1, abs=1e-5)
    assert sum(row["selected_tokens"] for row in table) == sum(manifest.counts[f"{role}_selected_tokens"] for role in ("general", "target"))
    most = manifest.outcome.tables["most_absorbed"]
    assert most and all(row["represented"] > 0 for row in most)
    assert manifest.file("coverage.png").stat().st_size < 50_000


def test_errors_name_the_value_and_the_remedy(store: Store) -> None:
    given_inputs = inputs(store, WIKI, CODE)
    with pytest.raises(EmptyInput, match="role 'target': no kept training passage in legal"):
        subset(store, given_inputs, roles={"wiki": "general", "legal": "target"})
    with pytest.raises(EmptyInput, match="a budget of 1 tokens holds not one ranked passage"):
        subset(store, given_inputs, budget={"general": {"tokens": 1}, "target": {"tokens": 1}})
    with pytest.raises(MissingArtifact, match=r"materialize tokenized_shards\[wiki\|2026-01-01\]"):
        subset(store, given_inputs | {"shards": given_inputs["shards"][1:]})
    cut_differently = inputs(store, WIKI, SourceSettings(domain="code", documents=40, seed=2, passages_per_document=4))
    with pytest.raises(GristmillError, match="same max_characters"):
        subset(store, cut_differently)


def test_settings_are_checked_where_they_are_built() -> None:
    for values, message in (
        ({"budget": {"general": {"fraction": 0.2}}}, "need exactly one budget each"),
        ({"budget": {"general": {}, "target": {"tokens": 5}}}, "either fraction or tokens, not neither"),
        ({"budget": {"general": {"fraction": 0.2, "tokens": 3}, "target": {"tokens": 5}}}, "not both"),
        ({"function": "facility_locatoin"}, "did you mean 'facility_location'"),
        ({"settings": {"neighbours": 3}}, "did you mean 'neighbors'"),
    ):
        base = {"roles": ROLES, "budget": {"general": {"fraction": 0.2}, "target": {"tokens": 5}}}
        with pytest.raises(GristmillError, match=message):
            plugins.validate(SelectionSettings, base | values, where="selection")
