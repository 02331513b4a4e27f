"""The graph of a store: names, ancestors, descendants, gaps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_store import WordSettings, join_words, read_member, words

from pipelines.errors import GristmillError, MissingArtifact, UnknownName
from pipelines.housekeeping import Keeper
from pipelines.leases import Address
from pipelines.lineage import Lineage, by_asset
from pipelines.manifests import MANIFEST_NAME, Manifest, Member
from pipelines.remote_store import RemoteStore
from pipelines.store import Build, Store
from pipelines.verification import verify


def joined(store: Store, *parts: Manifest, partition: str | None = None) -> Manifest:
    request = Build(asset="joined", step=join_words, settings=WordSettings(), inputs={"parts": parts}, partition=partition)
    return store.build(request).manifest


def copied(store: Store, manifest: Manifest, name: str) -> Manifest:
    request = Build(asset="copy", step=read_member, settings=WordSettings(), inputs={"member": Member(manifest=manifest, name=name)})
    return store.build(request).manifest


def of(manifest: Manifest) -> Address:
    return Address(manifest.asset, manifest.fingerprint)


def test_ancestors_are_named_once_the_nearest_first(store: Store) -> None:
    one, two = (store.build(words(words=(first,))).manifest for first in ("one", "two"))
    inner = joined(store, one, two, partition="a")
    outer = store.build(Build("outer", join_words, WordSettings(), inputs={"parts": (inner, one), "first": inner})).manifest
    found = Lineage(store.root).ancestors(of(outer))
    assert [(one.address, one.depth) for one in found] == [(of(outer), 0), (of(inner), 1), (of(one), 1), (of(two), 2)]
    assert [(one.role, one.reader and one.reader.asset) for one in found[1:]] == [
        ("parts", "outer"),
        ("parts", "outer"),
        ("parts", "joined"),
    ]
    rows = by_asset(found)
    assert [(row["asset"], row["artifacts"], row["not_here"]) for row in rows] == [("outer", 1, 0), ("joined", 1, 0), ("words", 2, 0)]
    assert rows[1]["fingerprint"] == inner.fingerprint and rows[2]["fingerprint"].endswith(" over 2")
    assert rows[2]["read_by"] == "outer, joined" and rows[2]["code_version"] == one.code_version


def test_what_is_gone_is_a_gap_and_nothing_behind_it_is_known(store: Store) -> None:
    one = store.build(words()).manifest
    inner = joined(store, one)
    outer = store.build(Build("outer", join_words, WordSettings(), inputs={"parts": (inner,)})).manifest
    shutil.rmtree(inner.directory)
    found = Lineage(store.root).ancestors(of(outer))
    assert [(one.address.asset, one.node is None) for one in found] == [("outer", False), ("joined", True)]
    assert by_asset(found)[1]["not_here"] == 1


def test_descendants_and_those_of_the_same_bytes(store: Store) -> None:
    """What reads one file would have been the same for any artifact with that file."""
    one, two = (store.build(words(words=("same", other))).manifest for other in ("left", "right"))
    copy = copied(store, one, "0.txt")
    above = joined(store, copy)
    lineage = Lineage(store.root)
    assert [node.address for node in lineage.descendants(of(one))] == [of(copy), of(above)]
    assert [node.address for node in lineage.descendants(of(two))] == [of(copy), of(above)]
    left = copied(store, one, "1.txt")
    assert of(left) not in [node.address for node in Lineage(store.root).descendants(of(two))]
    assert Lineage(store.root).descendants(of(above)) == []


def test_partitions_that_share_an_artifact_stand_at_one_node(store: Store) -> None:
    for partition in ("a|b", "c"):
        store.build(replace(words(), partition=partition))
    lineage = Lineage(store.root)
    (address,) = lineage.addresses()
    assert lineage.standing[address] == ["a|b", "c"]
    assert lineage.label(address) == "words[a|b] and 1 more"


def test_names(store: Store, tmp_path: Path) -> None:
    manifest = store.build(words()).manifest
    parted = joined(store, manifest, partition="a|2026-01-01")
    lineage = Lineage(store.root)
    for name in ("words", manifest.fingerprint, manifest.fingerprint[:6], str(manifest.directory)):
        assert lineage.resolve(name) == of(manifest)
    assert lineage.resolve("joined[a|2026-01-01]") == lineage.resolve("joined", "a|2026-01-01") == of(parted)
    assert lineage.resolve("wiki-00030e7c86a7b78f") is None and lineage.resolve("abcdef0") is None and lineage.resolve("no/where") is None
    with pytest.raises(GristmillError, match=r"joined has 1 partitions; name one: joined\[a\|2026-01-01\]"):
        lineage.resolve("joined")
    with pytest.raises(UnknownName, match="did you mean 'joined'"):
        lineage.resolve("joind[a]")
    with pytest.raises(MissingArtifact, match=r"joined\[b\] has not been materialized"):
        lineage.resolve("joined[b]")
    with pytest.raises(GristmillError, match="is no artifact of"):
        lineage.resolve(str(tmp_path))
    outside = tmp_path / "elsewhere" / "words" / manifest.fingerprint
    shutil.copytree(manifest.directory, outside)
    with pytest.raises(GristmillError, match="is no artifact of"):
        lineage.resolve(str(outside))


def test_of_what_lies_in_object_storage_the_manifests_are_enough(tmp_path: Path) -> None:
    """A machine that fetched an artifact alone knows its ancestors, verifies what is here, and removes only what it can fetch again."""
    remote = RemoteStore((tmp_path / "remote").as_uri())
    here, there = (Store(tmp_path / name, remote) for name in ("here", "there"))
    one, two = (there.build(words(words=(first,))).manifest for first in ("one", "two"))
    inner = joined(there, one, two, partition="a")
    outer = there.build(Build("outer", join_words, WordSettings(), "b", {"parts": (inner,)})).manifest
    fetched = here.current("outer", "b")
    assert fetched.content_sha256 == outer.content_sha256
    lineage = Lineage(here.root, remote)
    assert lineage.resolve("outer[b]") == of(outer) and lineage.resolve("joined[a]") == of(inner)
    found = lineage.ancestors(of(outer))
    assert [one.address for one in found] == [of(outer), of(inner), of(one), of(two)] and all(one.node for one in found)
    assert [lineage.is_here(one.address) for one in found] == [True, False, False, False]
    with pytest.raises(UnknownName):
        lineage.resolve("..[b]")
    directory = lineage.directory(of(outer))
    assert [fault.what for fault in verify([directory]).faults] == [f"was made from joined[a], whose artifact {inner.fingerprint} is gone"]
    assert not verify([directory], elsewhere=lambda *address: remote.find(*address) is not None).faults
    gone = Keeper(here.root, promoted={}).clean()
    assert sorted(item.kind for item in gone.going) == ["artifact", "lock"] and not any((here.root / "artifacts" / "outer").iterdir())
    assert here.current("outer", "b").content_sha256 == outer.content_sha256


def test_damage_is_told_with_its_remedy(store: Store) -> None:
    manifest = store.build(words()).manifest
    (manifest.directory / MANIFEST_NAME).write_text("{")
    with pytest.raises(GristmillError, match="is not a manifest .* materialize again"):
        Lineage(store.root).node(of(manifest))
    (store.root / "current" / "words" / "_.json").write_text(json.dumps({}))
    with pytest.raises(GristmillError, match="is damaged .* materialize words again"):
        _ = Lineage(store.root).pointers
