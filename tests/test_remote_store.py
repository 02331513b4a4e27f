"""Artifacts and sources in object storage, against a real S3 server: second machines, kills, damage, and what errors say."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import BUCKET, Cable, ObjectStorage, object_storage
from test_store import WordSettings, few_words, join_words, words, write_and_wait, write_words

from pipelines import corpus
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest, Outcome, sealed
from pipelines.plugins import Settings
from pipelines.remote_files import attempt
from pipelines.remote_store import RemoteStore
from pipelines.store import Build, Store

ROOT = Path(__file__).parents[1]
MANY = 1000
"""Files of an artifact whose upload takes long enough to be killed."""


class ManySettings(Settings):
    """How many files are written."""

    files: int = MANY


def write_many(settings: ManySettings, out: Path) -> Outcome:
    (out / "empty").touch()
    for number in range(settings.files):
        (out / f"{number // 100}").mkdir(exist_ok=True)
        (out / f"{number // 100}" / f"{number}.bin").write_bytes(number.to_bytes(4, "little") * 5_000)
    return Outcome(counts={"files": settings.files})


def write_own_bytes(settings: WordSettings, out: Path) -> Outcome:
    """Write what differs between processes, as steps on unlike machines may."""
    while not Path(settings.gate).exists():
        time.sleep(0.02)
    for name in ("a", "b"):
        (out / f"{name}.txt").write_text(f"{name} of {os.getpid()}")
    return Outcome()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorage]:
    with object_storage(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def remote(server: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """A folder of the bucket for this test alone."""
    forget_clients()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return RemoteStore(f"s3://{BUCKET}/{tmp_path.name}")


def forget_clients() -> None:
    """Let the next use read credentials and endpoint from the environment: a client keeps those it was made with."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def machine(tmp_path: Path, name: str, remote: RemoteStore) -> Store:
    return Store(tmp_path / name, remote)


def objects(server: ObjectStorage, remote: RemoteStore) -> list[str]:
    folder = remote.url.removeprefix("s3://")
    return sorted(name.removeprefix(f"{folder}/") for name in server.client().find(folder))


def child(store: Store, request: Build) -> subprocess.Popen[str]:
    """Build `request` in a process of its own."""
    carried = pickle.dumps((store, request))
    code = f"import pickle, test_remote_store\nstore, request = pickle.loads({carried!r})\nprint(store.build(request).hit)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition: Callable[[], Any], *, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def content(manifest: Manifest) -> dict[str, bytes]:
    return {path.relative_to(manifest.directory).as_posix(): path.read_bytes() for path in manifest.directory.rglob("*") if path.is_file()}


# A second machine


def test_a_second_machine_has_hits_with_the_same_fingerprints_and_bytes(tmp_path: Path, remote: RemoteStore, server: ObjectStorage) -> None:
    log = tmp_path / "log"
    here, there = machine(tmp_path, "here", remote), machine(tmp_path, "there", remote)
    parts = replace(words(log=str(log)), partition="wiki|2026-01-01")
    joined = Build("joined", join_words, WordSettings(log=str(log)), inputs={"parts": (parts,)})
    made = here.build(joined)
    assert log.read_text().split() == ["words", "join"]
    found = there.build(joined)
    assert found.hit and not made.hit and log.read_text().split() == ["words", "join"]
    assert content(found.manifest) == content(made.manifest)
    assert there.current("words", "wiki|2026-01-01").fingerprint == here.current("words", "wiki|2026-01-01").fingerprint
    assert there.partitions("words") == ["wiki|2026-01-01"] and there.is_current("joined") and not there.is_current("words")
    kinds = ["/".join(name.split("/")[:2]) for name in objects(server, remote) if name.endswith(".json")]
    assert kinds == ["artifacts/joined", "artifacts/words", "current/joined", "current/words"]


def test_a_partition_stands_where_the_last_machine_put_it(tmp_path: Path, remote: RemoteStore) -> None:
    here, there = machine(tmp_path, "here", remote), machine(tmp_path, "there", remote)
    here.build(words(words=("old",)))
    there.build(words(words=("new",)))
    assert here.current("words").file("0.txt").read_text() == "new"


def test_what_was_published_before_there_was_a_remote_is_sent_when_it_is_asked_for(tmp_path: Path, remote: RemoteStore) -> None:
    Store(tmp_path / "here").build(words())
    assert machine(tmp_path, "here", remote).build(words()).hit
    assert machine(tmp_path, "there", remote).current("words").counts == {"words": 2}


def test_an_artifact_that_fails_its_audit_is_not_sent(tmp_path: Path, remote: RemoteStore, server: ObjectStorage) -> None:
    failing = Build("words", write_words, WordSettings(words=("a", "b", "c")), audits=(few_words,))
    with pytest.raises(GristmillError, match="failed its audit"):
        machine(tmp_path, "here", remote).build(failing)
    assert objects(server, remote) == []


def test_a_directory_can_stand_for_a_bucket(tmp_path: Path) -> None:
    remote = RemoteStore((tmp_path / "share").as_uri())
    made = machine(tmp_path, "here", remote).build(words()).manifest
    found = machine(tmp_path, "there", remote).current("words")
    assert content(found) == content(made) and not list((tmp_path / "share").rglob("*.part"))


# Kills, and several at once


def test_an_upload_that_is_killed_is_completed_later_and_unseen_until_then(
    tmp_path: Path, remote: RemoteStore, server: ObjectStorage
) -> None:
    here, request = machine(tmp_path, "here", remote), Build("many", write_many, ManySettings())
    process = child(here, request)
    wait_for(lambda: len(objects(server, remote)) > 20)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    sent = objects(server, remote)
    assert 20 < len(sent) < MANY and not [name for name in sent if name.endswith("manifest.json")]
    assert machine(tmp_path, "there", remote).find("many", request.fingerprint()) is None
    before = {name: server.client().info(f"{remote.url}/{name}")["LastModified"] for name in sent[:5]}
    assert here.build(request).hit
    assert len(objects(server, remote)) == MANY + 3
    assert before == {name: server.client().info(f"{remote.url}/{name}")["LastModified"] for name in sent[:5]}
    fetched = machine(tmp_path, "there", remote).build(request)
    assert fetched.hit and content(fetched.manifest) == content(here.current("many"))


def test_a_download_that_is_killed_is_completed_later(tmp_path: Path, remote: RemoteStore) -> None:
    request = Build("many", write_many, ManySettings())
    made = machine(tmp_path, "here", remote).build(request).manifest
    there = machine(tmp_path, "there", remote)
    process = child(there, request)
    wait_for(lambda: len(list((there.root / "staging").rglob("*.bin"))) > 20)
    process.kill()
    process.wait(20)
    assert not (there.root / "artifacts").exists()
    assert there.build(request).hit and content(there.current("many")) == content(made)
    assert not any((there.root / "staging").iterdir())


def test_two_machines_whose_bytes_differ_leave_one_whole_artifact(tmp_path: Path, remote: RemoteStore) -> None:
    request = Build("own", write_own_bytes, WordSettings(gate=str(tmp_path / "gate")))
    processes = [child(machine(tmp_path, name, remote), request) for name in ("here", "there")]
    wait_for(lambda: len(list(tmp_path.glob("*/staging/own-*"))) == 2)
    (tmp_path / "gate").touch()
    for process in processes:
        assert process.communicate(timeout=60)[0].strip() == "False" and process.returncode == 0
    third = machine(tmp_path, "third", remote).build(request)
    assert third.hit and len({text.split()[-1] for text in map(bytes.decode, content(third.manifest).values()) if " of " in text[:5]}) == 1


@pytest.fixture
def cable(remote: RemoteStore, server: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    """What lies between this test's client and the server."""
    cable = Cable(server.ports[0])
    cable.join()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{cable.port}")
    forget_clients()
    yield cable
    cable.cut()


@pytest.mark.parametrize("seconds", [1.0, None])
def test_a_connection_that_is_cut_costs_nothing_that_was_made(
    seconds: float | None, tmp_path: Path, remote: RemoteStore, cable: Cable
) -> None:
    """Cut while the step computes: for a second the upload waits; for longer it fails, and the next build sends what is there."""
    here, log = machine(tmp_path, "here", remote), tmp_path / "log"
    request = Build("half", write_and_wait, WordSettings(gate=str(tmp_path / "gate"), log=str(log)))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(here.build, request)
        wait_for(log.exists)
        cable.cut()
        (tmp_path / "gate").touch()
        if seconds:
            time.sleep(seconds)
            cable.join()
            assert not building.result(60).hit
        else:
            with pytest.raises(GristmillError, match=rf"^{remote.url}.*: no answer in 4 attempts .*AWS_ENDPOINT_URL, and run again"):
                building.result(60)
            cable.join()
    assert here.build(request).hit and log.read_text() == "half\n"
    assert machine(tmp_path, "there", remote).build(request).hit


# Damage


def test_a_flipped_byte_in_the_bucket_is_found_and_mended(tmp_path: Path, remote: RemoteStore, server: ObjectStorage) -> None:
    here, there = machine(tmp_path, "here", remote), machine(tmp_path, "there", remote)
    here.build(words())
    (damaged,) = [name for name in objects(server, remote) if name.endswith("0.txt")]
    server.client().pipe_file(f"{remote.url}/{damaged}", b"onf")
    with pytest.raises(GristmillError, match=rf"{damaged} differs from its recorded SHA-256; remove {remote.url}/artifacts/words"):
        there.current("words")
    assert not (there.root / "artifacts").exists()
    server.client().rm(f"{remote.url}/artifacts/words", recursive=True)
    assert here.build(words()).hit and there.build(words()).hit
    assert there.current("words").file("0.txt").read_text() == "one"


def test_a_file_that_is_missing_in_the_bucket_is_named(tmp_path: Path, remote: RemoteStore, server: ObjectStorage) -> None:
    machine(tmp_path, "here", remote).build(words())
    (lost,) = [name for name in objects(server, remote) if name.endswith("1.txt")]
    server.client().rm_file(f"{remote.url}/{lost}")
    with pytest.raises(GristmillError, match=rf"{lost} is missing; remove"):
        machine(tmp_path, "there", remote).build(words())


def test_a_manifest_cannot_write_outside_its_artifact(tmp_path: Path, remote: RemoteStore, server: ObjectStorage) -> None:
    made = machine(tmp_path, "here", remote).build(words()).manifest
    (name,) = [name for name in objects(server, remote) if name.endswith("manifest.json")]
    altered = json.loads(server.client().cat_file(f"{remote.url}/{name}"))
    altered["files"][0]["path"] = "../../../escaped"
    server.client().pipe_file(f"{remote.url}/{name}", json.dumps(altered).encode())
    with pytest.raises(GristmillError, match="its seal is broken"):
        machine(tmp_path, "there", remote).find(made.asset, made.fingerprint)
    _, resealed = sealed(Manifest.model_validate(altered).at(tmp_path))
    server.client().pipe_file(f"{remote.url}/{name}", resealed)
    with pytest.raises(GristmillError, match="leaves the artifact"):
        machine(tmp_path, "there", remote).find("words", made.fingerprint)
    assert not list(tmp_path.rglob("escaped"))


# What errors say


@pytest.mark.parametrize(
    ("changed", "url", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, f"s3://{BUCKET}/x", "no credentials .*set them and run again"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{BUCKET}/x", "access refused .*credentials in the environment"),
        ({}, "s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'; make it, or correct GRISTMILL_REMOTE"),
        ({}, "s4://bucket/x", "Protocol not known: s4; a URL begins with"),
        ({}, "gs://bucket/x", "storage of kind 'gs' needs a package that is not installed"),
    ],
)
def test_what_is_wrong_is_said_with_the_url_and_the_remedy(
    changed: dict[str, str], url: str, says: str, tmp_path: Path, remote: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    forget_clients()
    with pytest.raises(GristmillError, match=rf"^{url}.*{says}"):
        Store(tmp_path / "here", RemoteStore(url)).build(words())


def test_a_path_is_no_url() -> None:
    with pytest.raises(GristmillError, match="'bucket/folder' is no URL; object storage is named as in s3://bucket/folder"):
        RemoteStore("bucket/folder")


def test_what_fails_in_passing_is_tried_again() -> None:
    faults: list[Exception] = [ConnectionResetError("reset"), TimeoutError("slow")]

    def action() -> str:
        if faults:
            raise faults.pop()
        return "done"

    assert attempt("s3://x", action) == "done" and not faults


# Sources


def test_sources_in_a_bucket_are_read_alike_on_every_machine(
    tmp_path: Path, remote: RemoteStore, server: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    folder = f"{remote.url}/texts"
    for number in range(2):
        lines = "".join(json.dumps({"text": f"text {number} {n}"}) + "\n" for n in range(3))
        server.client().pipe_file(f"{folder}/wiki/2026-01/a {number}.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
    paths = {"paths": [f"{folder}/{{domain}}/{{snapshot:%Y-%m}}/*.jsonl.gz"]}

    def ingested(name: str) -> Manifest:
        monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / name))
        settings = corpus.corpus_settings("wiki", "2026-01-01", "jsonl", paths, tmp_path / name)
        request = Build("raw_corpus", corpus.ingest, settings, "wiki|2026-01-01", audits=corpus.CORPUS_AUDITS)
        return Store(tmp_path / name).build(request).manifest

    here, there = ingested("here"), ingested("there")
    assert list(here.settings["files"]) == [f"{folder}/wiki/2026-01/a {n}.jsonl.gz" for n in range(2)]
    assert here.counts["kept"] == 6 and here.fingerprint == there.fingerprint and here.content_sha256 == there.content_sha256
    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*.jsonl.gz")}
    assert ingested("here").fingerprint == here.fingerprint
    assert copies == {path: path.stat().st_mtime_ns for path in copies}, "copied again without need"
    server.client().pipe_file(f"{folder}/wiki/2026-01/a 0.jsonl.gz", gzip.compress(b'{"text": "another"}\n', mtime=0))
    changed = ingested("here")
    assert changed.fingerprint != here.fingerprint and changed.counts["kept"] == 4


def test_a_url_that_names_nothing_is_said(tmp_path: Path, remote: RemoteStore) -> None:
    with pytest.raises(GristmillError, match=rf"no file matches '{remote.url}/none/\*.jsonl'; put the file there or correct the URL"):
        corpus.corpus_settings("wiki", "2026-01-01", "jsonl", {"paths": [f"{remote.url}/none/*.jsonl"]}, tmp_path)


def test_the_mill_takes_its_remote_from_the_environment(remote: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from assets_defs.resources import MillResource

    assert MillResource().open().store.remote is None
    monkeypatch.setenv("GRISTMILL_REMOTE", remote.url)
    assert MillResource().open().store.remote == remote
