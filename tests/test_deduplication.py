"""Deduplication against brute-force Jaccard, and the promises of the register: append-only, one split per cluster, nothing lost."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from assets_defs.deduplication import register_links
from pipelines.deduplication import (
    ClusterSettings,
    DeduplicationSettings,
    SignatureSettings,
    cluster_documents,
    deduplicate,
    gather_clusters,
    sign_documents,
)
from pipelines.deduplication_audits import CLUSTER_AUDITS, DEDUPLICATION_AUDITS, SIGNATURE_AUDITS, split_changes
from pipelines.documents import DECISION_SCHEMA, partition_file, split_partition
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.minhash import PIECE_CHARACTERS, Signer, agreement, exact_hash, pieces
from pipelines.plugins import Settings
from pipelines.store import AuditFailed, Build, Store

SAMPLE = Path(__file__).parent.parent / "data" / "sample" / "corpus.parquet"
JANUARY, FEBRUARY, MARCH = "2026-01-01", "2026-02-01", "2026-03-01"


@pytest.fixture(scope="module")
def prose() -> list[str]:
    """300 passages of English prose, each of 800 to 4,000 characters."""
    table = pq.read_table(SAMPLE, columns=["text", "domain"]).to_pylist()
    texts = [row["text"] for row in table if row["domain"] == "wiki" and 800 <= len(row["text"]) <= 4000]
    return list(dict.fromkeys(texts))[:300]


def edited(text: str, number: int, share: float = 0.02) -> str:
    """Return `text` with a header line and `share` of its words replaced."""
    chance = random.Random(number)
    words = text.split(" ")
    for place in chance.sample(range(len(words)), max(1, int(share * len(words)))):
        words[place] = f"word{number}"
    return f"Home | Articles | Page {number}\n" + " ".join(words)


def shingles(text: str, ngram: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + ngram]) for start in range(max(1, len(words) - ngram + 1))}


def jaccard(one: str, other: str) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def sign(store: Store, cleaned: Manifest, **values: int) -> Manifest:
    inputs = {"cleaned": cleaned}
    request = Build("duplicate_signatures", sign_documents, SignatureSettings(**values), cleaned.partition, inputs, SIGNATURE_AUDITS)
    return store.build(request).manifest


def cluster(store: Store, signed: Sequence[Manifest], **values: object) -> Manifest:
    def settings_of(order: Sequence[str]) -> ClusterSettings:
        return ClusterSettings(order=tuple(order), **values)

    signatures = {manifest.partition: manifest for manifest in signed}
    links = register_links(settings_of, signatures)
    request = Build("duplicate_clusters", gather_clusters, settings_of(tuple(signatures)), inputs={"links": links}, audits=CLUSTER_AUDITS)
    return store.build(request).manifest


def splits(clusters: Manifest) -> dict[str, dict]:
    """Return every document's row by id; ids must be unique over the partitions."""
    rows = [row for entry in clusters.files for row in pq.read_table(clusters.file(entry.path)).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def register(store: Store, parts: Sequence[tuple[str, str, Sequence[str]]], **values: object) -> tuple[list[Manifest], Manifest]:
    """Publish (domain, snapshot, texts) in that order; return signatures and clusters. Ids are ``<domain>-<snapshot>-<number>``."""
    signed = []
    for domain, snapshot, texts in parts:
        names = [f"{domain}-{snapshot[5:7]}-{number:04}" for number in range(len(texts))]
        signed.append(sign(store, corpus(store, domain, texts, snapshot=snapshot, ids=names)))
    return signed, cluster(store, signed, **values)


class Keep(Settings):
    """Decisions that keep everything but `dropped`."""

    files: tuple[str, ...]
    partitions: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def write_decisions(settings: Keep, out: Path) -> Outcome:
    rows = []
    for file, partition in zip(settings.files, settings.partitions, strict=True):
        domain, snapshot = split_partition(partition)
        names = pq.read_table(file, columns=["id"])["id"].to_pylist()
        rows += [{"id": n, "domain": domain, "snapshot": snapshot, "kept": n not in settings.dropped, "reasons": []} for n in names]
    schema = pa.schema([field for field in DECISION_SCHEMA if field.name not in ("split", "cluster")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out / "decisions.parquet")
    return Outcome()


def decide(store: Store, signed: Sequence[Manifest], clusters: Manifest, *, dropped: Sequence[str] = (), **values: str) -> Manifest:
    partitions = tuple(manifest.partition for manifest in signed)
    kept = Keep(files=tuple(str(m.file("signatures.parquet")) for m in signed), partitions=partitions, dropped=tuple(dropped))
    members = tuple(Member(manifest=clusters, name=f"splits/{partition_file(partition)}") for partition in partitions)
    before = store.build(Build("toxicity_filtered_corpus", write_decisions, kept)).manifest
    inputs = {"decisions": before, "clusters": members, "signatures": tuple(signed)}
    request = Build("deduplicated_corpus", deduplicate, DeduplicationSettings(**values), "r", inputs, DEDUPLICATION_AUDITS)
    return store.build(request).manifest


def decisions(manifest: Manifest) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(manifest.file("decisions.parquet")).to_pylist()}


def test_agreement_estimates_jaccard(prose: list[str]) -> None:
    signer = Signer(num_permutations=112, ngram=5, seed=1)
    pairs = [(text, edited(text, number, share)) for number, text in enumerate(prose[:100]) for share in (0.005, 0.02, 0.05)]
    first, second = (signer.sign(texts)[0] for texts in zip(*pairs, strict=True))
    error = agreement(first, second) - np.array([jaccard(*pair) for pair in pairs])
    assert abs(error.mean()) < 0.015  # the pairs share their header, so their errors are not independent
    assert error.std() < 1.2 * 0.5 / np.sqrt(112)
    unrelated = agreement(signer.sign(prose[:150])[0], signer.sign(prose[150:])[0])
    assert unrelated.mean() < 0.02


@given(st.text(alphabet=st.sampled_from("ab \n.é漢字"), max_size=60), st.integers(1, 6))
def test_equal_shingles_give_equal_signatures(text: str, ngram: int) -> None:
    signer = Signer(num_permutations=16, ngram=ngram, seed=3)
    signatures, counts = signer.sign([text, text.upper() + " ...", "other words", text])
    assert (signatures[0] == signatures[1]).all() and (signatures[0] == signatures[3]).all()
    assert (counts[0] == 0) == (re.search(r"\w", text) is None)
    assert (signer.sign([text])[0] == signatures[:1]).all()


@given(st.text(alphabet=st.sampled_from("ab \n\t\u00a0"), max_size=40), st.integers(1, 7))
def test_pieces_change_nothing(text: str, size: int) -> None:
    size = max(size, *(len(run) for run in text.split()), 1)
    assert "".join(pieces(text, size)) == text
    whole = Signer(num_permutations=8, ngram=3, seed=1).sign([text])
    cut = Signer(num_permutations=8, ngram=3, seed=1, piece_characters=size).sign([text])
    assert (whole[0] == cut[0]).all() and (whole[1] == cut[1]).all()
    assert exact_hash(text, size) == exact_hash(" ".join(text.split()))


def test_exact_hash_folds_space_and_keeps_case() -> None:
    assert exact_hash(" A  line\n\nand another\t") == exact_hash("A line and another")
    assert exact_hash("A line") != exact_hash("a line")
    assert exact_hash("A line") != exact_hash("Aline")


def test_long_text_is_signed_by_pieces(prose: list[str]) -> None:
    text = "\n".join(prose * 8).encode("ascii", "ignore").decode()
    assert len(text) > 20 * PIECE_CHARACTERS
    signatures, counts = Signer(num_permutations=32, ngram=5, seed=1).sign([text, "x" * 10 * PIECE_CHARACTERS])
    assert counts[0] == len(re.findall(r"\w+", text)) - 4
    once = Signer(num_permutations=32, ngram=5, seed=1).sign([text[: len(text) // 8]])[0]
    assert agreement(signatures[:1], once)[0] > 0.9


def test_near_duplicates_are_found_and_others_are_not(store: Store, prose: list[str]) -> None:
    texts = prose[:150] + [edited(text, number) for number, text in enumerate(prose[:100])] + prose[100:120]
    _, clusters = register(store, [("wiki", JANUARY, texts)])
    rows = list(splits(clusters).values())
    twins = [(number, 150 + number) for number in range(100)]
    found = sum(rows[one]["cluster"] == rows[other]["cluster"] for one, other in twins)
    assert found >= 90
    for number in range(20):
        assert rows[250 + number]["exact"] and rows[250 + number]["cluster"] == rows[100 + number]["cluster"]
    similar = {pair for pair in combinations(range(len(texts)), 2) if rows[pair[0]]["cluster"] == rows[pair[1]]["cluster"]}
    assert all(jaccard(texts[one], texts[other]) > 0.5 for one, other in similar)
    assert clusters.counts["exact_duplicates"] == 20
    counts = clusters.counts
    assert counts["documents"] == counts["clusters"] + counts["exact_duplicates"] + counts["near_duplicates"]


def test_bands_find_what_brute_force_over_signatures_finds(store: Store, prose: list[str]) -> None:
    texts = prose[:80] + [edited(text, number, 0.03) for number, text in enumerate(prose[:80])]
    signed, clusters = register(store, [("wiki", JANUARY, texts)])
    column = pq.read_table(signed[0].file("signatures.parquet"))["signature"].to_pylist()
    signatures = np.stack([np.frombuffer(value, "<u4") for value in column])
    rows = list(splits(clusters).values())
    close = [(i, j) for i, j in combinations(range(len(texts)), 2) if (signatures[i] == signatures[j]).mean() >= 0.7]
    together = sum(rows[i]["cluster"] == rows[j]["cluster"] for i, j in close)
    assert len(close) > 40 and together >= 0.98 * len(close)


def test_appending_a_snapshot_leaves_earlier_splits_byte_identical(store: Store, prose: list[str]) -> None:
    shares = {"held_out": {"wiki": 0.2}}
    parts = [
        ("wiki", JANUARY, prose[:60]),
        ("web", JANUARY, [edited(text, 1) for text in prose[:20]] + prose[60:80]),
        ("wiki", FEBRUARY, [edited(text, 2) for text in prose[10:40]] + prose[80:100]),
        ("web", FEBRUARY, [prose[5], *(edited(text, 3) for text in prose[50:90])]),
    ]
    whole = register(store, parts, **shares)[1]
    for length in range(1, len(parts)):
        prefix = register(store, parts[:length], **shares)[1]
        for entry in prefix.files:
            assert entry in whole.files
        assert split_changes(prefix, whole) == 0
    rows = splits(whole)
    assert rows["web-02-0000"]["cluster"] == "wiki-01-0005" and rows["web-02-0000"]["exact"]


def test_a_new_snapshot_reads_no_signatures_of_old_ones(store: Store, prose: list[str]) -> None:
    parts = [("wiki", JANUARY, prose[:40]), ("wiki", FEBRUARY, [edited(text, 2) for text in prose[10:30]] + prose[40:60])]
    signed, before = register(store, parts, held_out={"wiki": 0.3})
    signed.append(sign(store, corpus(store, "wiki", [edited(text, 3) for text in prose[20:50]] + prose[:3], snapshot=MARCH)))
    for manifest in signed[:2]:
        manifest.file("signatures.parquet").unlink()
    after = cluster(store, signed, held_out={"wiki": 0.3})
    assert after.counts["documents"] == 113 and after.counts["exact_duplicates"] == before.counts["exact_duplicates"] + 3
    assert after.counts["near_duplicates"] - before.counts["near_duplicates"] >= 25
    assert [reference.partition for reference in after.inputs["links"]] == [f"wiki|{month}" for month in (JANUARY, FEBRUARY, MARCH)]
    assert all(entry in after.files for entry in before.files) and split_changes(before, after) == 0


def test_rows_of_a_partition_may_come_in_any_order(store: Store, prose: list[str]) -> None:
    texts = prose[:40] + [edited(text, 4) for text in prose[:40]]
    names = [f"wiki-{number:04}" for number in range(80)]
    places = random.Random(0).sample(range(80), 80)
    first, second = (
        sign(store, corpus(store, "wiki", [texts[p] for p in order], ids=[names[p] for p in order])) for order in (range(80), places)
    )
    assert first.fingerprint != second.fingerprint
    assert cluster(store, [first]).content_sha256 == cluster(store, [second]).content_sha256


def test_held_out_share_per_domain_and_epoch(store: Store) -> None:
    texts = [f"alpha{number} beta{number} gamma{number} delta{number} epsilon{number} zeta{number}" for number in range(2000)]
    parts = [("math", JANUARY, texts[:1000]), ("code", JANUARY, texts[1000:])]
    signed, clusters = register(store, parts, held_out={"math": 0.1})
    held = {row["domain"]: row["held_out"] for row in clusters.outcome.tables["by_domain"]}
    assert 70 <= held["math"] <= 130 and held["code"] == 0
    other = cluster(store, signed, held_out={"math": 0.1}, split_epoch=2)
    assert split_changes(clusters, other) > 100
    larger = cluster(store, signed, held_out={"math": 0.2})
    before, after = splits(clusters), splits(larger)
    assert all(after[name]["split"] == "held_out" for name, row in before.items() if row["split"] == "held_out")


def test_audit_refuses_an_empty_held_out_split(store: Store, prose: list[str]) -> None:
    with pytest.raises(AuditFailed, match="nothing held out of: wiki .*raise the share"):
        register(store, [("wiki", JANUARY, prose[:60])], held_out={"wiki": 1e-9})
    assert register(store, [("wiki", JANUARY, prose[:20])], held_out={"wiki": 1e-9})[1].counts["held_out"] == 0


def test_a_document_that_matches_both_splits_is_dropped_in_every_mode(store: Store) -> None:
    words = [f"w{number}" for number in range(400)]
    left, right = " ".join(words[:300]), " ".join(words[100:])  # Jaccard 0.5; the bridge has 0.75 with each
    bridge = " ".join(words[50:350])
    filler = [" ".join(f"f{n}x{k}" for k in range(30)) for n in range(30)]
    for epoch in range(1, 60):
        held = {"wiki": 0.5}
        parts = [("wiki", JANUARY, [left, right, *filler]), ("wiki", FEBRUARY, [bridge, bridge, filler[0]])]
        signed, clusters = register(store, parts, held_out=held, split_epoch=epoch, threshold=0.6)
        rows = splits(clusters)
        assert rows["wiki-02-0000"]["joins"] == 2
        straddles = rows["wiki-01-0000"]["split"] != rows["wiki-01-0001"]["split"]
        assert rows["wiki-02-0000"]["straddles"] == rows["wiki-02-0001"]["straddles"] == straddles
        if straddles:
            break
    assert straddles
    for mode in ("near", "exact", "off"):
        decided = decide(store, signed, clusters, mode=mode)
        dropped = decisions(decided)["wiki-02-0000"]
        assert dropped["rule"] == "joins_two_clusters" and dropped["score"] == 2 and not dropped["kept"]
        assert decided.counts["joins_two_clusters"] == 2
        assert decisions(decided)["wiki-01-0000"]["kept"] and decisions(decided)["wiki-01-0001"]["kept"]


def test_one_document_stays_per_cluster(store: Store, prose: list[str]) -> None:
    long = prose[0] + "\n" + " ".join(prose[50].split()[:12])
    parts = [("wiki", JANUARY, prose[:10]), ("wiki", FEBRUARY, [long, prose[1] + "  ", prose[20]])]
    signed, clusters = register(store, parts, held_out={"wiki": 0.3})
    near = decisions(decide(store, signed, clusters))
    assert [name for name, row in near.items() if not row["kept"]] == ["wiki-02-0000", "wiki-02-0001"]
    assert near["wiki-02-0000"]["rule"] == "near_duplicate" and near["wiki-02-0000"]["threshold"] == 0.7
    assert 0.7 <= near["wiki-02-0000"]["score"] < 1
    assert near["wiki-02-0001"]["rule"] == "exact_duplicate"
    assert near["wiki-02-0001"]["reasons"] == [{"rule": "exact_duplicate", "score": 1.0, "threshold": 1.0}]
    assert near["wiki-01-0000"]["rule"] is None and near["wiki-01-0000"]["reasons"] == []
    longest = decisions(decide(store, signed, clusters, keep="longest"))
    assert longest["wiki-02-0000"]["kept"] and not longest["wiki-01-0000"]["kept"]
    exact = decisions(decide(store, signed, clusters, mode="exact"))
    assert [name for name, row in exact.items() if not row["kept"]] == ["wiki-02-0001"]
    off = decide(store, signed, clusters, mode="off")
    assert off.counts["dropped"] == 0 and off.counts["kept"] == 13


def test_a_survivor_is_chosen_among_the_documents_that_are_kept_so_far(store: Store, prose: list[str]) -> None:
    signed, clusters = register(store, [("wiki", JANUARY, prose[:5]), ("wiki", FEBRUARY, [prose[0], prose[0]])])
    decided = decide(store, signed, clusters, dropped=["wiki-01-0000"])
    rows = decisions(decided)
    assert "wiki-01-0000" not in rows and rows["wiki-02-0000"]["kept"] and rows["wiki-02-0001"]["rule"] == "exact_duplicate"
    counts = decided.counts
    assert counts["documents_in"] == 6 == counts["kept"] + counts["dropped"] + counts["quarantined"]
    assert counts["kept"] == counts["kept_train"] + counts["kept_held_out"]
    table = decided.outcome.tables["by_domain"][0]
    assert (table["documents_in"], table["kept"], table["dropped"]) == (6, 5, 1)
    assert decided.outcome.tables["by_rule"] == [{"domain": "wiki", "rule": "exact_duplicate", "dropped": 1}]


def test_documents_without_words_are_duplicates_only_when_equal(store: Store) -> None:
    _, clusters = register(store, [("web", JANUARY, ["...", "---", "...", "", "", "漢字。かな"])])
    rows = list(splits(clusters).values())
    assert [row["founder"] for row in rows] == [True, True, False, True, False, True]


def test_an_empty_partition_and_the_same_id_in_two_snapshots(store: Store, prose: list[str]) -> None:
    signed = [
        sign(store, corpus(store, "wiki", texts, snapshot=snapshot, ids=ids))
        for snapshot, texts, ids in ((JANUARY, prose[:1], ["a"]), (FEBRUARY, [], []), (MARCH, [prose[1]], ["a"]))
    ]
    clusters = cluster(store, signed)
    assert [pq.read_table(clusters.file(f"splits/wiki@{month}.parquet")).num_rows for month in (JANUARY, FEBRUARY, MARCH)] == [1, 0, 1]
    assert pq.read_table(clusters.file(f"splits/wiki@{MARCH}.parquet"))["cluster"].to_pylist() == [f"a@wiki|{MARCH}"]
    decided = decide(store, signed, clusters)
    assert decided.counts["kept"] == 2 and decided.checks[1].metadata == {"ids_kept_twice": 1}


def test_bad_requests_name_the_value_and_the_remedy(store: Store, prose: list[str]) -> None:
    with pytest.raises(ValidationError, match="more than once"):
        ClusterSettings(order=("wiki|2026-01-01", "wiki|2026-01-01"))
    with pytest.raises(ValidationError, match=r"share 1.1 of domain 'wiki' is not in \[0, 1\]"):
        ClusterSettings(order=("wiki|2026-01-01",), held_out={"wiki": 1.1})
    signed, clusters = register(store, [("wiki", JANUARY, prose[:3]), ("web", JANUARY, prose[3:5])])
    with pytest.raises(GristmillError, match="stands in order alone"):
        request = ClusterSettings(order=("wiki|2026-01-01", "web|2026-01-01"))
        store.build(Build("duplicate_clusters", cluster_documents, request, inputs={"signatures": (signed[0],)}))
    with pytest.raises(GristmillError, match="need 200 positions"):
        cluster(store, signed, bands=20, rows=10)
    with pytest.raises(EmptyInput):
        cluster(store, [sign(store, corpus(store, "wiki", []))])
    with pytest.raises(GristmillError, match="num_permutations"):
        cluster(store, [signed[0], sign(store, corpus(store, "code", prose[:2]), num_permutations=120)])
    with pytest.raises(MissingArtifact, match=r"document 'web-01-0000' of web\|2026-01-01 is not in duplicate_clusters"):
        members = (Member(manifest=clusters, name=f"splits/wiki@{JANUARY}.parquet"),)
        kept = Keep(files=tuple(str(m.file("signatures.parquet")) for m in signed), partitions=tuple(m.partition for m in signed))
        inputs = {"decisions": store.build(Build("d", write_decisions, kept)).manifest, "clusters": members, "signatures": tuple(signed)}
        store.build(Build("deduplicated_corpus", deduplicate, DeduplicationSettings(), inputs=inputs))


def test_audit_refuses_repeated_ids(store: Store, prose: list[str]) -> None:
    with pytest.raises(AuditFailed, match="ids_unique: repeated ids: 1 in signatures.parquet"):
        sign(store, corpus(store, "wiki", prose[:2], ids=["a", "a"]))


TEXTS = st.lists(st.sampled_from(["a b c", "a b c ", "A b c", "d e f g h i j k", "d e f g h i j l", "", "...", "m n"]), max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, TEXTS, st.sampled_from(["near", "exact", "off"]), st.sampled_from(["earliest", "longest"]), st.integers(1, 50))
def test_nothing_is_lost_and_no_cluster_has_two_splits(
    store: Store, one: list[str], two: list[str], mode: str, keep: str, epoch: int
) -> None:
    parts = [("wiki", JANUARY, ["always there", *one]), ("web", FEBRUARY, two)]
    signed, clusters = register(store, parts, held_out={"wiki": 0.4, "web": 0.4}, split_epoch=epoch, threshold=0.4)
    rows = splits(clusters)
    assert len(rows) == len(one) + len(two) + 1
    for row in rows.values():
        founder = rows[row["cluster"]]
        assert founder["founder"] and founder["split"] == row["split"] and founder["joins"] == 0
        assert row["founder"] == (row["id"] == row["cluster"]) == (row["joins"] == 0)
    decided = decide(store, signed, clusters, mode=mode, keep=keep)
    assert all(check.passed for check in decided.checks)
    assert {name: row["split"] for name, row in decisions(decided).items()} == {name: row["split"] for name, row in rows.items()}
    assert all((row["rule"] is None) == row["kept"] for row in decisions(decided).values())


def test_a_domain_may_be_held_out_whole(store: Store, prose: list[str]) -> None:
    _, clusters = register(store, [("wiki", JANUARY, prose[:60]), ("web", JANUARY, prose[60:80])], held_out={"wiki": 1.0})
    assert {row["domain"]: row["held_out"] for row in clusters.outcome.tables["by_domain"]} == {"wiki": 60, "web": 0}
