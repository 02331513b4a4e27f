"""Manifests: what they say survives the file, and what is identity enters the fingerprint."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import GristmillError
from pipelines.manifests import MANIFEST_NAME, FileEntry, InputReference, Manifest, Member, Outcome, fingerprint, read_manifest, sha256_file

NUMBERS = st.floats(width=32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def manifest(**values: object) -> Manifest:
    identity = {"asset": "a", "partition": None, "fingerprint": "f" * 32, "code_version": "c", "settings": {}, "inputs": {}}
    return Manifest(**identity | values)


@given(st.dictionaries(st.text(max_size=5), NUMBERS, max_size=4), st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_a_manifest_reads_back_as_written(tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, float], details: dict) -> None:
    directory = tmp_path_factory.mktemp("artifact")
    written = manifest(settings=details, outcome=Outcome(metrics=metrics, details=details))
    (directory / MANIFEST_NAME).write_text(written.model_dump_json(indent=1), encoding="utf-8")
    read = read_manifest(directory)
    assert repr(read) == repr(written)  # by its words: NaN is not equal to itself
    assert read.directory == directory
    assert repr(pickle.loads(pickle.dumps(read)).directory) == repr(directory)


REFERENCES = {"raw": (InputReference(asset="raw_corpus", partition="wiki|2026-01-01", fingerprint="0" * 32),)}


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_the_order_of_settings_is_no_part_of_the_fingerprint(settings: dict) -> None:
    backwards = dict(reversed(settings.items()))
    assert fingerprint("a", "c", settings, REFERENCES) == fingerprint("a", "c", backwards, REFERENCES)


def test_every_part_of_the_identity_changes_the_fingerprint() -> None:
    other = {"raw": (REFERENCES["raw"][0].model_copy(update={"fingerprint": "1" * 32}),)}
    variants = [
        ("a", "c", {}, REFERENCES),
        ("b", "c", {}, REFERENCES),
        ("a", "d", {}, REFERENCES),
        ("a", "c", {"x": None}, REFERENCES),
        ("a", "c", {}, other),
        ("a", "c", {}, {"raw": (*REFERENCES["raw"], *other["raw"])}),
        ("a", "c", {}, {"raw": (*other["raw"], *REFERENCES["raw"])}),
        ("a", "c", {}, {"cleaned": REFERENCES["raw"]}),
    ]
    assert len({fingerprint(*variant) for variant in variants}) == len(variants)
    assert all(len(fingerprint(*variant)) == 32 for variant in variants)


def test_the_partition_of_an_input_is_no_part_of_the_fingerprint() -> None:
    moved = {"raw": (REFERENCES["raw"][0].model_copy(update={"partition": "book|2026-01-01"}),)}
    assert fingerprint("a", "c", {}, moved) == fingerprint("a", "c", {}, REFERENCES)


def test_a_number_that_json_has_not_is_refused_as_identity() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint("a", "c", {"x": float("nan")}, {})


def test_content_hash_is_over_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    digest = sha256_file(tmp_path / "x")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    one, two = (manifest(files=(FileEntry(path=name, bytes=3, sha256=digest),)) for name in ("x", "y"))
    assert one.content_sha256 != two.content_sha256
    assert one.content_sha256 == manifest(asset="b", files=one.files).content_sha256


def test_a_reference_to_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    whole = manifest(partition="p", files=(FileEntry(path="x", bytes=3, sha256="9" * 64),)).at(tmp_path)
    assert whole.reference().identity == f"a:{'f' * 32}"
    member = Member(manifest=whole, name="x")
    assert member.path == tmp_path / "x" and member.reference().identity == f"a:x:{'9' * 64}"
    with pytest.raises(GristmillError, match=r"a\[p\] has no file 'y'; it has: x"):
        Member(manifest=whole, name="y").reference()


def test_a_manifest_without_a_directory_says_so() -> None:
    with pytest.raises(GristmillError, match=r"manifest of a\[p\] was not read from a directory"):
        manifest(partition="p").directory  # noqa: B018


def test_copies_keep_their_directory(tmp_path: Path) -> None:
    placed = manifest().at(tmp_path)
    assert placed.for_partition("p").directory == tmp_path and placed.for_partition("p").label == "a[p]"
    assert placed.label == "a" and placed.partition is None
