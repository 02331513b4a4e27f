"""Verification: one flipped byte anywhere in any file of any ancestor, files too few and too many, edited manifests, lost inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_store import WordSettings, join_words, read_member, words
from typer.testing import CliRunner, Result

from assets_defs.cli import app
from pipelines.errors import UnknownName
from pipelines.lineage import Lineage
from pipelines.manifests import MANIFEST_NAME, Manifest, Member, read_manifest, sealed
from pipelines.store import Build, Store
from pipelines.verification import Fault, verify


def build_family(store: Store) -> Manifest:
    """Publish words, what joins two of them, and a copy of one file of that."""
    parts = tuple(store.build(words(words=(first, "two", "three"))).manifest for first in ("one", "eins"))
    joined = store.build(Build(asset="joined", step=join_words, settings=WordSettings(), inputs={"parts": parts})).manifest
    member = Member(manifest=joined, name="joined.txt")
    return store.build(Build(asset="copy", step=read_member, settings=WordSettings(), inputs={"member": member}, partition="a")).manifest


def faults(store: Store, manifest: Manifest) -> list[Fault]:
    """Return the faults of an artifact and of all its ancestors that are there."""
    lineage = Lineage(store.root)
    found = [one.address for one in lineage.ancestors(lineage.resolve(manifest.fingerprint)) if one.node]
    return list(verify([lineage.directory(address) for address in found]).faults)


@pytest.fixture
def family(store: Store) -> Manifest:
    return build_family(store)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("family"))
    build_family(store)
    return store.root


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_byte_anywhere_in_any_file_is_found(shared: Path, data: st.DataObject) -> None:
    directories = sorted(path.parent for path in shared.glob(f"artifacts/*/*/{MANIFEST_NAME}"))
    files = sorted(path for path in shared.glob("artifacts/*/*/**/*") if path.is_file())
    assert len(directories) == 4 and len(files) == 4 + 6 + 2
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place, flip = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    try:
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        assert [fault.fingerprint for fault in verify(directories).faults if fault.fingerprint == path.parent.name]
    finally:
        path.write_bytes(content)


def test_an_undamaged_family_has_no_fault(shared: Path) -> None:
    found = verify(sorted(path.parent for path in shared.glob(f"artifacts/*/*/{MANIFEST_NAME}")), threads=2)
    assert (found.artifacts, found.files, found.unsealed, found.faults) == (4, 12, 0, ())
    assert found.bytes == sum(path.stat().st_size for path in shared.glob("artifacts/*/*/*.txt"))


def test_a_file_that_is_missing_shorter_or_one_too_many(store: Store, family: Manifest) -> None:
    first = store.directory("words", words(words=("one", "two", "three")).fingerprint())
    (first / "0.txt").unlink()
    (first / "1.txt").write_text("tw")
    (first / "2.txt").unlink()
    (first / "2.txt").symlink_to(first / "1.txt")
    (first / "extra").mkdir()
    (first / "extra" / "notes.txt").write_text("mine")
    assert [str(fault).removeprefix("words: ") for fault in faults(store, family)] == [
        "0.txt is missing",
        "1.txt has 2 bytes, 3 are recorded",
        "2.txt is missing",
        "extra/notes.txt is not in the manifest",
    ]


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("settings", {"words": ["other"], "log": "", "gate": ""}, "but its settings, inputs and code version give"),
        ("code_version", "0" * 12, "but its settings, inputs and code version give"),
        ("fingerprint", "0" * 32, "but its settings, inputs and code version give"),
        ("asset", "sentences", "and lies at words/"),
        ("provenance", {"started": "1999-01-01T00:00:00+00:00"}, "its bytes differ from its seal"),
        ("outcome", {"counts": {"words": 1_000_000}}, "its bytes differ from its seal"),
        ("seal", "0" * 64, "its bytes differ from its seal"),
    ],
)
@pytest.mark.parametrize("resealed", [False, True])
def test_an_edited_manifest_is_found(store: Store, family: Manifest, field: str, value: object, found: str, resealed: bool) -> None:
    """Sealed again by whoever edits it, what it is made from still does not give its fingerprint; its results then cannot be told."""
    path = store.directory("words", words(words=("one", "two", "three")).fingerprint()) / MANIFEST_NAME
    edited = json.loads(path.read_bytes()) | {field: value}
    path.write_text(json.dumps(edited, indent=1))
    if resealed and field not in ("seal", "fingerprint"):
        path.write_bytes(sealed(read_manifest(path.parent))[1])
    told = [fault.what for fault in faults(store, family) if fault.file == MANIFEST_NAME]
    if resealed and found.endswith("seal") and field != "seal":
        assert not told
    else:
        assert any(found in what for what in told), told


def test_an_input_that_is_gone_or_of_other_bytes(store: Store, family: Manifest) -> None:
    first = store.directory("words", words(words=("one", "two", "three")).fingerprint())
    shutil.rmtree(first)
    assert [str(fault) for fault in faults(store, family)] == [f"joined: was made from words, whose artifact {first.name} is gone"]
    joined = store.directory("joined", family.inputs["member"][0].fingerprint)
    manifest = read_manifest(joined)
    files = (manifest.files[0].model_copy(update={"sha256": "0" * 64}),)
    (joined / MANIFEST_NAME).write_bytes(sealed(manifest.model_copy(update={"files": files}).at(joined))[1])
    told = [str(fault) for fault in faults(store, family)]
    assert "copy[a]: was made from joined.txt of joined as it was with other bytes" in told
    assert "joined: joined.txt differs from its recorded SHA-256" in told


def test_a_manifest_without_a_seal_is_counted_and_no_fault(store: Store, family: Manifest) -> None:
    path = family.directory / MANIFEST_NAME
    path.write_text(family.model_copy(update={"seal": ""}).model_dump_json(indent=1))
    found = verify([family.directory])
    assert (found.unsealed, found.faults) == (1, ())


def command(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"GRISTMILL_HOME": str(home)})


def test_the_command_looks_at_ancestors_and_says_so_by_its_exit_code(store: Store, family: Manifest) -> None:
    assert command(store.root, "verify", "copy", "a").stdout.splitlines()[-1].startswith("4 artifacts, 12 files, ")
    whole = command(store.root, "verify", "--all")
    assert whole.exit_code == 0 and ", 0 faults" in whole.stdout
    first = store.directory("words", words(words=("one", "two", "three")).fingerprint())
    (first / "1.txt").write_text("tw0")
    found = command(store.root, "verify", "copy[a]")
    assert found.exit_code == 1 and found.stdout.splitlines()[0] == "words: 1.txt differs from its recorded SHA-256"
    assert command(store.root, "verify", "copy[a]", "--no-ancestors").exit_code == 0
    shutil.rmtree(family.directory)
    gone = command(store.root, "verify", "--all")
    assert gone.exit_code == 1 and f"copy[a]: stands at {family.fingerprint}, which is gone" in gone.stdout
    assert isinstance(command(store.root, "verify", "cpoy").exception, UnknownName)
    assert command(store.root, "verify").exit_code == command(store.root, "verify", "copy", "--all").exit_code == 2
