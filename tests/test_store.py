"""The store: hits, audits, failed and killed builds, concurrent writers, a full disk, damage."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import mounted_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import DOCUMENT_SCHEMA, TableWriter
from pipelines.errors import GristmillError, MissingArtifact, OutOfSpace
from pipelines.manifests import MANIFEST_NAME, Check, Manifest, Member, Outcome
from pipelines.plugins import Settings
from pipelines.store import AuditFailed, Build, Store, advisory

ROOT = Path(__file__).parents[1]


class WordSettings(Settings):
    """What a build of these tests writes, and where it leaves a trace of having run."""

    words: tuple[str, ...] = ("one", "two")
    log: str = ""
    gate: str = ""


class BulkSettings(Settings):
    """How much is written, and by which library."""

    by: str
    bytes: int = 3_000_000


def write_words(settings: WordSettings, out: Path) -> Outcome:
    _log(settings, "words")
    for number, word in enumerate(settings.words):
        (out / f"{number}.txt").write_text(word, encoding="utf-8")
    return Outcome(counts={"words": len(settings.words)})


def join_words(settings: WordSettings, out: Path, *, parts: tuple[Manifest, ...], first: Manifest | Member | None = None) -> Outcome:
    _log(settings, "join")
    texts = [path.read_text(encoding="utf-8") for part in parts for path in sorted(part.directory.glob("*.txt"))]
    (out / "joined.txt").write_text(" ".join(texts), encoding="utf-8")
    return Outcome(counts={"words": len(texts)})


def read_member(settings: WordSettings, out: Path, *, member: Member) -> Outcome:
    (out / "copy.txt").write_text(member.path.read_text(encoding="utf-8"), encoding="utf-8")
    return Outcome()


def write_and_wait(settings: WordSettings, out: Path) -> Outcome:
    """Write half, say so, and go on when the gate is a file."""
    (out / "half.txt").write_text("half", encoding="utf-8")
    _log(settings, "half")
    while not Path(settings.gate).exists():
        time.sleep(0.02)
    (out / "whole.txt").write_text("whole", encoding="utf-8")
    return Outcome()


def continue_counting(settings: WordSettings, out: Path) -> Outcome:
    """Write a file per word, those that are there left alone; wait at the gate after each."""
    for number, word in enumerate(settings.words):
        path = out / f"{number}.txt"
        if path.exists():
            continue
        path.write_text(word, encoding="utf-8")
        _log(settings, word)
        while not Path(settings.gate).exists():
            time.sleep(0.02)
    return Outcome(counts={"words": len(settings.words)})


def fail_without_gate(settings: WordSettings, out: Path) -> Outcome:
    (out / "half.txt").write_text("half", encoding="utf-8")
    if not Path(settings.gate).exists():
        raise KeyError("no gate")
    return Outcome(counts={"files_at_start": len(list(out.iterdir())) - 1})


def resume_when_there_is_room(settings: BulkSettings, out: Path) -> Outcome:
    """Go on from the folder `resume`; write what goes there first, then something else, then what may not fit."""
    started = list(out.rglob("*.txt"))
    (out / "resume" / "step-1").mkdir(parents=True, exist_ok=True)
    (out / "resume" / "step-1" / "state.txt").write_text("one", encoding="utf-8")
    (out / "records.txt").write_text("one", encoding="utf-8")
    (out / "kept").mkdir(exist_ok=True)
    (out / "kept" / "weights.txt").write_text("one", encoding="utf-8")
    WRITERS[settings.by](np.zeros(settings.bytes, dtype=np.uint8), out)
    shutil.rmtree(out / "resume")
    return Outcome(details={"started": sorted(path.relative_to(out).as_posix() for path in started)})


def not_a_number(settings: WordSettings, out: Path) -> Outcome:
    return Outcome(metrics={"loss": float("nan"), "bound": float("inf")}, details={"losses": [float("nan"), 1.0]})


def write_bulk(settings: BulkSettings, out: Path) -> Outcome:
    data = np.random.default_rng(0).integers(0, 255, settings.bytes, dtype=np.uint8)
    WRITERS[settings.by](data, out)
    return Outcome()


def _write_safetensors(data: np.ndarray, out: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"data": data}, out / "data.safetensors")


def _write_tokenizer(data: np.ndarray, out: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"{n:020d}": n for n in range(len(data) // 25)}, unk_token=None)).save(str(out / "tokenizer.json"))


def _write_table(data: np.ndarray, out: Path) -> None:
    with TableWriter(out / "documents.parquet", DOCUMENT_SCHEMA, rows_per_group=10) as writer:
        for start in range(0, len(data), 10_000):
            writer.write({"id": str(start), "text": data[start : start + 10_000].tobytes().hex()})


WRITERS = {
    "python": lambda data, out: (out / "data.bin").write_bytes(data.tobytes()),
    "numpy": lambda data, out: np.save(out / "data.npy", data),
    "table": _write_table,
    "safetensors": _write_safetensors,
    "tokenizer": _write_tokenizer,
}


def _log(settings: WordSettings, line: str) -> None:
    if settings.log:
        with Path(settings.log).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def few_words(draft: Manifest) -> Check:
    count = len(list(draft.directory.glob("*.txt")))
    return Check(name="few_words", passed=count < 3, description=f"{count} words, fewer than 3 expected", metadata={"words": count})


def warn_of_words(draft: Manifest) -> Check:
    return few_words(draft).model_copy(update={"name": "warn_of_words"})


advisory(warn_of_words)


def raise_in_audit(draft: Manifest) -> Check:
    raise KeyError(draft.asset)


def words(**values: object) -> Build:
    return Build(asset="words", step=write_words, settings=WordSettings(**values))


def child(tmp_path: Path, code: str, *, wait: bool = True) -> subprocess.Popen[str]:
    """Run `code` in a Python process that sees the steps of this file, the store as `store` and `tmp_path`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    prelude = f"from pathlib import Path\nfrom test_store import *\ntmp_path = Path({str(tmp_path)!r})\nstore = Store(tmp_path / 'store')\n"
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        assert process.wait(60) == 0, process.stderr.read()
    return process


def wait_for(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def published(store: Store) -> list[str]:
    """Return every directory under artifacts/, with or without a manifest."""
    return sorted(path.relative_to(store.root).as_posix() for path in store.root.glob("artifacts/*/*"))


# Hits and identity


def test_the_second_request_is_a_hit(store: Store, tmp_path: Path) -> None:
    request = words(log=str(tmp_path / "log"))
    first, second = store.build(request), store.build(request)
    assert (first.hit, second.hit) == (False, True)
    assert first.manifest == second.manifest
    assert (tmp_path / "log").read_text() == "words\n"
    assert first.manifest.directory == store.directory("words", request.fingerprint())
    assert [e.path for e in first.manifest.files] == ["0.txt", "1.txt"]
    assert first.manifest.counts == {"words": 2} and first.manifest.bytes == 6


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=8), min_size=1, max_size=4))
def test_equal_requests_give_equal_directories_and_bytes(tmp_path_factory: pytest.TempPathFactory, drawn: list[str]) -> None:
    request = words(words=tuple(drawn))
    stores = [Store(tmp_path_factory.mktemp("store")) for _ in range(2)]
    one, two = (store.build(request).manifest for store in stores)
    assert one.directory.relative_to(stores[0].root) == two.directory.relative_to(stores[1].root)
    assert one.content_sha256 == two.content_sha256
    assert one.fingerprint == request.fingerprint()
    assert stores[0].verify(one) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=3), st.lists(st.text(max_size=5), min_size=1, max_size=3))
def test_fingerprints_are_equal_exactly_where_settings_are(one: list[str], two: list[str]) -> None:
    assert (words(words=tuple(one)).fingerprint() == words(words=tuple(two)).fingerprint()) == (one == two)


def test_partition_is_no_part_of_the_identity_and_pointers_are_per_partition(store: Store) -> None:
    for partition in ("a|2026-01-01", "b|2026-01-01", "r0.50-s0", "with/slash", "ü"):
        request = Build(asset="words", partition=partition, step=write_words, settings=WordSettings())
        assert store.build(request).manifest.partition == partition
    assert len(published(store)) == 1
    store.build(Build(asset="words", partition="b|2026-01-01", step=write_words, settings=WordSettings(words=("new",))))
    assert store.partitions("words") == ["a|2026-01-01", "b|2026-01-01", "r0.50-s0", "with/slash", "ü"]
    assert [store.current("words", p).counts["words"] for p in ("a|2026-01-01", "b|2026-01-01")] == [2, 1]
    assert store.current("words", "a|2026-01-01").label == "words[a|2026-01-01]"
    assert not store.is_current("words") and not store.is_current("words", "c") and store.is_current("words", "ü")


def test_going_back_to_old_settings_moves_the_pointer_without_computing(store: Store) -> None:
    old, new = words(), words(words=("three",))
    store.build(old)
    store.build(new)
    assert store.build(old).hit
    assert store.current("words").fingerprint == old.fingerprint()


def test_what_is_not_there_says_what_to_do(store: Store) -> None:
    with pytest.raises(MissingArtifact, match=r"words\[a\] has not been materialized; materialize it first"):
        store.current("words", "a")
    manifest = store.build(words()).manifest
    (manifest.directory / MANIFEST_NAME).unlink()
    with pytest.raises(MissingArtifact, match="its artifact is gone .*; materialize it again"):
        store.current("words")
    assert not store.build(words()).hit  # a directory without its manifest does not exist


# Inputs


def test_nested_requests_are_built_first_and_once(store: Store, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    part = words(log=log)
    request = Build(asset="joined", step=join_words, settings=WordSettings(log=log), inputs={"parts": (part, part), "first": part})
    built = store.build(request)
    assert (tmp_path / "log").read_text().split() == ["words", "join"]
    assert (built.manifest.directory / "joined.txt").read_text() == "one two one two"
    there = replace(request, inputs={"parts": (store.current("words"),) * 2, "first": part})
    assert there.fingerprint() == request.fingerprint() and store.build(there).hit
    (store.directory("words", part.fingerprint()) / MANIFEST_NAME).unlink()
    assert store.build(request).hit  # what a hit was made from is not built again
    assert built.manifest.inputs["first"][0].fingerprint == part.fingerprint()


def test_only_the_bytes_of_a_member_are_part_of_the_identity(store: Store) -> None:
    one, two = (store.build(words(words=("same", other))).manifest for other in ("left", "right"))

    def reads(manifest: Manifest, name: str) -> Build:
        return Build(asset="copy", step=read_member, settings=WordSettings(), inputs={"member": Member(manifest=manifest, name=name)})

    assert not store.build(reads(one, "0.txt")).hit
    assert store.build(reads(two, "0.txt")).hit
    assert reads(one, "1.txt").fingerprint() != reads(two, "1.txt").fingerprint()
    with pytest.raises(GristmillError, match=r"words has no file '2.txt'; it has: 0.txt, 1.txt"):
        reads(one, "2.txt").fingerprint()


# Audits


def test_a_failed_audit_publishes_nothing(store: Store) -> None:
    request = Build(asset="words", step=write_words, settings=WordSettings(words=("a", "b", "c")), audits=(few_words,))
    for _ in range(2):  # the second attempt replaces the first under rejected/
        with pytest.raises(AuditFailed, match="words failed its audit and was not published: few_words: 3 words") as caught:
            store.build(request)
    rejected = caught.value.manifest.directory
    assert rejected == store.root / "rejected" / f"words-{request.fingerprint()}"
    assert sorted(p.name for p in rejected.iterdir()) == ["0.txt", "1.txt", "2.txt"]
    assert published(store) == [] and not store.is_current("words") and not any((store.root / "staging").iterdir())
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.manifest.directory == rejected


def test_an_advisory_audit_warns_and_publishes(store: Store) -> None:
    request = Build(asset="words", step=write_words, settings=WordSettings(words=("a", "b", "c")), audits=(warn_of_words,))
    check = store.build(request).manifest.checks[0]
    assert (check.passed, check.blocking, check.metadata) == (False, False, {"words": 3})
    assert store.current("words").checks == (check,)


def test_an_audit_that_raises_publishes_nothing(store: Store) -> None:
    with pytest.raises(KeyError):
        store.build(Build(asset="words", step=write_words, settings=WordSettings(), audits=(raise_in_audit,)))
    assert published(store) == []
    assert not store.build(words()).hit


# Failed and killed builds


def test_a_step_that_raises_leaves_no_artifact_and_can_run_again(store: Store, tmp_path: Path) -> None:
    request = Build(asset="half", step=fail_without_gate, settings=WordSettings(gate=str(tmp_path / "gate")))
    with pytest.raises(KeyError, match="no gate"):
        store.build(request)
    assert published(store) == [] and not store.is_current("half")
    (tmp_path / "gate").touch()
    built = store.build(request)
    assert not built.hit and built.manifest.counts == {"files_at_start": 0}


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(store: Store, tmp_path: Path) -> None:
    request = Build(asset="half", step=write_and_wait, settings=WordSettings(gate=str(tmp_path / "gate"), log=str(tmp_path / "log")))
    pickled = pickle.dumps(request)
    process = child(tmp_path, f"import pickle\nstore.build(pickle.loads({pickled!r}))", wait=False)
    wait_for((tmp_path / "log").exists)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert published(store) == [] and not store.is_current("half") and store.find("half", request.fingerprint()) is None
    (tmp_path / "gate").touch()
    built = store.build(request)
    assert not built.hit and [e.path for e in built.manifest.files] == ["half.txt", "whole.txt"]
    assert not any((store.root / "staging").iterdir())


def test_a_resumable_build_goes_on_where_it_was_killed(store: Store, tmp_path: Path) -> None:
    values = WordSettings(words=("x", "y", "z"), gate=str(tmp_path / "gate"), log=str(tmp_path / "log"))
    request = Build(asset="counted", step=continue_counting, settings=values, resumable=True)
    process = child(tmp_path, f"import pickle\nstore.build(pickle.loads({pickle.dumps(request)!r}))", wait=False)
    wait_for((tmp_path / "log").exists)
    process.kill()
    process.wait(10)
    assert published(store) == []
    (tmp_path / "gate").touch()
    resumed = store.build(request).manifest
    assert (tmp_path / "log").read_text().split() == ["x", "y", "z"]
    assert resumed.content_sha256 == Store(tmp_path / "other").build(request).manifest.content_sha256


def test_of_two_processes_one_computes_and_the_other_hits(store: Store, tmp_path: Path) -> None:
    values = WordSettings(gate=str(tmp_path / "gate"), log=str(tmp_path / "log"))
    request = Build(asset="half", step=write_and_wait, settings=values)
    code = (
        f"import pickle\nrequest = pickle.loads({pickle.dumps(request)!r})\n"
        "(tmp_path / f'ready-{os.getpid()}').touch()\nprint(store.build(request).hit)"
    )
    processes = [child(tmp_path, code, wait=False) for _ in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2 and (tmp_path / "log").exists())
    (tmp_path / "gate").touch()
    assert sorted(process.communicate(timeout=60)[0].strip() for process in processes) == ["False", "True"]
    assert (tmp_path / "log").read_text() == "half\n"


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with mounted_disk(tmp_path / "disk", megabytes=1) as path:
        yield path


@pytest.mark.parametrize("by", sorted(WRITERS))
def test_a_full_disk_ends_in_one_message_whatever_library_wrote(small_disk: Path, by: str) -> None:
    store = Store(small_disk)
    with pytest.raises(OutOfSpace, match=r"^bulk: no room left under .* \(\d+ MB free\).*point GRISTMILL_HOME at a larger disk") as caught:
        store.build(Build(asset="bulk", step=write_bulk, settings=BulkSettings(by=by)))
    assert "\n" not in str(caught.value)
    assert published(store) == [] and not any((store.root / "staging").iterdir())
    assert not store.build(words()).hit  # what was written is removed, so there is room again


@pytest.mark.parametrize("resumable", [True, False])
def test_a_full_disk_leaves_resume_points_and_nothing_else(small_disk: Path, resumable: bool) -> None:
    store, ballast = Store(small_disk), small_disk / "ballast"
    ballast.write_bytes(bytes(800_000))
    settings = BulkSettings(by="python", bytes=400_000)
    request = Build(asset="bulk", step=resume_when_there_is_room, settings=settings, resumable=resumable)
    with pytest.raises(OutOfSpace):
        store.build(request)
    left = [path.relative_to(store.root / "staging").as_posix() for path in (store.root / "staging").rglob("*") if path.is_file()]
    expected = ["resume/step-1/state.txt"] if resumable else []
    assert left == [f"bulk-{request.fingerprint()}/{name}" for name in expected]
    ballast.unlink()
    made = store.build(request).manifest
    assert made.outcome.details == {"started": expected}
    assert [entry.path for entry in made.files] == ["data.bin", "kept/weights.txt", "records.txt"]


@pytest.mark.parametrize("pages_left", range(7))
def test_a_disk_that_is_full_at_the_last_file_ends_in_the_same_message(small_disk: Path, pages_left: int) -> None:
    """The manifest and the pointer need room too; whatever is missing at the end, a later run makes it whole."""
    store = Store(small_disk / "store")
    ballast = small_disk / "ballast"
    store.build(words(words=("before",)))
    status = os.statvfs(small_disk)
    ballast.write_bytes(bytes((status.f_bavail - pages_left) * status.f_bsize))
    request = Build(asset="words", partition="late", step=write_words, settings=WordSettings())
    with contextlib.suppress(OutOfSpace):
        store.build(request)
    ballast.unlink()
    assert store.verify(store.build(request).manifest) == []
    assert store.current("words", "late").counts == {"words": 2}


def test_a_limit_on_file_size_ends_in_the_same_message(store: Store, tmp_path: Path) -> None:
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try:\n    store.build(Build(asset='bulk', step=write_bulk, settings=BulkSettings(by='python')))\n"
        "except OutOfSpace as error:\n    print(error)\n"
    )
    assert "no room left" in child(tmp_path, code).stdout.read()
    assert published(store) == []


# Damage


def test_verify_finds_a_flipped_byte_and_a_missing_file(store: Store) -> None:
    manifest = store.build(words()).manifest
    assert store.verify(manifest) == []
    path = manifest.file("0.txt")
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert store.verify(manifest) == ["words: 0.txt differs from its recorded SHA-256"]
    manifest.file("1.txt").unlink()
    assert store.verify(manifest)[1:] == ["words: 1.txt is missing"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 2}', b"\xff\xfe"])
def test_a_damaged_manifest_gives_one_error_with_its_remedy(store: Store, damage: bytes) -> None:
    manifest = store.build(words()).manifest
    (manifest.directory / MANIFEST_NAME).write_bytes(damage)
    for read in (lambda: store.current("words"), lambda: store.build(words())):
        with pytest.raises(GristmillError, match="manifest.json is not a manifest") as caught:
            read()
        assert f"remove {manifest.directory} and materialize again" in str(caught.value)


def test_a_damaged_pointer_is_mended_by_the_next_build(store: Store) -> None:
    store.build(words())
    (store.root / "current" / "words" / "_.json").write_text("")
    with pytest.raises(GristmillError, match="materialize it again"):
        store.current("words")
    assert store.build(words()).hit
    assert store.current("words").counts == {"words": 2}


def test_values_that_are_no_numbers_survive_in_the_manifest(store: Store) -> None:
    request = Build(asset="loss", step=not_a_number, settings=WordSettings())
    store.build(request)
    again = store.build(request)
    assert again.hit and np.isnan(again.manifest.outcome.metrics["loss"]) and again.manifest.outcome.metrics["bound"] == float("inf")
    assert np.isnan(json.loads((again.manifest.directory / MANIFEST_NAME).read_text())["outcome"]["details"]["losses"][0])
