"""Housekeeping: what nothing needs goes, what anything needs stays, and builds that run meanwhile notice nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_store import WordSettings, child, few_words, join_words, published, wait_for, words, write_and_wait
from typer.testing import CliRunner, Result

from assets_defs.cli import app
from pipelines.errors import GristmillError
from pipelines.housekeeping import CHILD_MESSAGES, Keeper, Survey
from pipelines.leases import Address, is_free
from pipelines.lineage import Lineage
from pipelines.manifests import MANIFEST_NAME, Manifest, Outcome
from pipelines.pins import pin, pinned, unpin
from pipelines.store import AuditFailed, Build, Store
from pipelines.verification import verify

SOURCES = 4


def of(manifest: Manifest) -> Address:
    return Address(manifest.asset, manifest.fingerprint)


def keeper(store: Store, **values: object) -> Keeper:
    return Keeper(store.root, **{"promoted": {}, **values})


def going(survey: Survey) -> list[tuple[str, str]]:
    return [(item.kind, item.name) for item in survey.going]


def joined(*parts: object, asset: str = "joined", partition: str | None = None) -> Build:
    return Build(asset=asset, step=join_words, settings=WordSettings(), inputs={"parts": tuple(parts)}, partition=partition)


def read_slowly(settings: WordSettings, out: Path, *, parts: tuple[Manifest, ...]) -> Outcome:
    """Say that work began, wait at the gate, and only then read what was given."""
    Path(settings.log).touch()
    while not Path(settings.gate).exists():
        time.sleep(0.01)
    return join_words(WordSettings(), out, parts=parts)


def build_at_random(root: Path, seed: int, rounds: int) -> None:
    """Build graphs of three layers over and over; every request moves pointers that other processes read through."""
    store, draw = Store(root), random.Random(seed)
    for _ in range(rounds):
        number = draw.randrange(SOURCES)
        part = replace(words(words=(f"v{draw.randrange(6)}", "two")), partition=f"p{number}")
        store.build(part)
        with store.leases.taken(
            lambda: _requests(store), lambda found: {Address(b.asset, b.fingerprint()) for b in found} | _inputs(found)
        ) as builds:
            time.sleep(draw.random() * 0.004)
            for build in builds:
                manifest = store.build(build).manifest
                store.build(joined(manifest, asset="above", partition=f"q{number}"))


def _requests(store: Store) -> Sequence[Build]:
    keys = store.partitions("words")
    return [
        joined(*(store.current("words", key) for key in keys), partition="all"),
        joined(store.current("words", keys[0]), partition="one"),
    ]


def _inputs(builds: Sequence[Build]) -> set[Address]:
    return {of(part) for build in builds for part in build.inputs["parts"]}


# What stays and what goes


def test_what_nothing_reaches_goes_and_everything_else_is_a_hit_afterwards(store: Store) -> None:
    old, new, kept = (words(words=(word,)) for word in ("old", "new", "kept"))
    asked = [joined(kept, new), joined(kept, partition="a")]
    store.build(joined(old, kept, partition="a"))
    for request in asked:
        store.build(request)
    before = published(store)
    survey = keeper(store).survey()
    assert published(store) == before and not survey.removed, "a survey touches nothing"
    named = {(item.kind, item.name.split()[0]) for item in survey.going}
    assert named == {
        ("artifact", "joined[a]"),
        ("artifact", "words"),
        ("lock", f"words-{old.fingerprint()}"),
        ("lock", survey.going[-2].name),
    }
    assert survey.bytes == sum(path.stat().st_size for path in _files(store, [item.path for item in survey.going]))
    done = keeper(store).clean()
    assert done.removed and going(done) == going(survey) and not done.bytes - survey.bytes
    assert len(before) - len(published(store)) == 2 and not any((store.root / "trash").iterdir())
    lineage = Lineage(store.root)
    assert not verify([lineage.directory(address) for address in lineage.addresses()]).faults
    assert all(store.build(request).hit for request in asked)
    assert not going(keeper(store).survey())
    assert not store.build(old).hit


def _files(store: Store, paths: Sequence[Path]) -> list[Path]:
    return [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]


def test_pins_promoted_models_and_checkpoints_keep_themselves_and_what_they_were_made_from(store: Store) -> None:
    def superseded(asset: str) -> Manifest:
        made = store.build(joined(words(words=(asset,)), asset=asset)).manifest
        store.build(joined(words(words=("newer",)), asset=asset))
        store.build(words(words=("newer",)))
        return made

    made = {asset: superseded(asset) for asset in ("report", "evaluation", "pretrained_checkpoint", "embedder")}
    pin(store.root, of(made["report"]), label="report", name="of the paper")
    promoted = {made["evaluation"].fingerprint: "version 1 of gristmill, champion"}
    found = keeper(store, promoted=promoted).clean()
    assert {item.name.split()[0] for item in found.going if item.kind == "artifact"} == {"embedder", "words"}
    assert found.roots[of(made["report"])] == ("pinned: of the paper",)
    assert found.roots[of(made["evaluation"])] == ("version 1 of gristmill, champion",)
    assert found.roots[of(made["pretrained_checkpoint"])] == ("a checkpoint",)
    for asset in ("report", "evaluation", "pretrained_checkpoint"):
        assert store.find(asset, made[asset].fingerprint) and not store.verify(made[asset]), asset
    assert store.find("embedder", made["embedder"].fingerprint) is None
    unpin(store.root, of(made["report"]))
    with pytest.raises(GristmillError, match="is not pinned; pinned: nothing"):
        unpin(store.root, of(made["report"]))
    keeper(store, checkpoints=False).clean()
    assert [asset for asset in made if store.find(asset, made[asset].fingerprint)] == []


def test_what_is_young_stays_with_what_it_was_made_from_where_an_age_is_given(store: Store) -> None:
    old = store.build(joined(words(words=("old",)))).manifest
    store.build(joined(words(words=("new",))))
    store.build(words(words=("new",)))
    assert not [item for item in keeper(store, older_than=1.0).survey().items if item.kind == "artifact"]
    for path in old.directory.rglob("*"):
        os.utime(path, (0, 0))
    assert [item.name.split()[0] for item in keeper(store, older_than=1.0).survey().going if item.kind == "artifact"] == ["joined"]
    assert len([item for item in keeper(store).survey().going if item.kind == "artifact"]) == 2


@pytest.mark.parametrize("damaged", ["manifest", "pointer", "pin"])
def test_nothing_goes_while_it_is_not_known_what_is_needed(store: Store, damaged: str) -> None:
    store.build(words(words=("old",)))
    manifest = store.build(joined(words())).manifest
    pin(store.root, of(manifest), label="", name="")
    path = {
        "manifest": manifest.directory / MANIFEST_NAME,
        "pointer": store.root / "current" / "joined" / "_.json",
        "pin": store.root / "pins" / f"{of(manifest).name}.json",
    }[damaged]
    path.write_text("{")
    before = published(store)
    with pytest.raises(GristmillError, match="is damaged|is not a manifest"):
        keeper(store).clean()
    assert published(store) == before


def test_a_damaged_manifest_that_nothing_needs_goes(store: Store) -> None:
    old = store.build(words(words=("old",))).manifest
    store.build(words())
    (old.directory / MANIFEST_NAME).write_text("{")
    assert ("artifact", of(old).name) in going(keeper(store).clean())
    assert len(published(store)) == 1


# What is left behind


def test_all_that_a_killed_build_leaves_is_found(store: Store, tmp_path: Path) -> None:
    request = Build(asset="half", step=write_and_wait, settings=WordSettings(gate=str(tmp_path / "gate"), log=str(tmp_path / "log")))
    outer = joined(request, words())
    process = child(
        tmp_path, f"import pickle\nfrom test_housekeeping import *\nstore.build(pickle.loads({pickle.dumps(outer)!r}))", wait=False
    )
    wait_for((tmp_path / "log").exists)
    while_it_runs = keeper(store).clean()
    assert [(item.kind, item.kept) for item in while_it_runs.items] == [("staging", "in use")]
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    (store.root / "current" / "half").mkdir(parents=True)
    (store.root / "current" / "half" / f"_.{process.pid}.tmp").write_text("{")  # had it come to its pointer
    left = {path for path in store.root.rglob("*") if path.is_file()}
    found = keeper(store).clean()
    assert sorted({kind for kind, _ in going(found)}) == ["lease", "lock", "staging", "temporary file"]
    assert len([item for item in found.going if item.kind == "lease"]) == 2, "its own and that of the request that it was built for"
    remaining = {path.relative_to(store.root).as_posix() for path in left if path.exists()}
    assert remaining == {"locks/gate"}
    (tmp_path / "gate").touch()
    assert not store.build(outer).hit and not going(keeper(store).survey())


def test_resume_points_and_failed_attempts_stay_a_while(store: Store) -> None:
    refused = Build(asset="words", step=words().step, settings=WordSettings(words=("a", "b", "c")), audits=(few_words,))
    with pytest.raises(AuditFailed):
        store.build(refused)
    point = store.root / "staging" / f"general_checkpoint-{'0' * 32}" / "resume" / "step-1"
    point.mkdir(parents=True)
    (point / "state.json").write_text("{}")
    (store.root / "artifacts" / "words" / ("1" * 32)).mkdir(parents=True)
    found = {item.kind: item.kept for item in keeper(store).clean().items}
    assert found == {"half-removed artifact": "", "resume point": "younger than 7 days", "rejected": "younger than 7 days", "lock": ""}
    assert point.exists()
    assert {kind for kind, _ in going(keeper(store, older_than=0.0).clean())} == {"resume point", "rejected"}
    assert not point.exists()


def test_what_a_killed_removal_left_goes_with_the_next(store: Store) -> None:
    store.build(words())
    left = store.root / "trash" / "abc" / "0"
    left.mkdir(parents=True)
    (left / "0.txt").write_text("gone")
    assert going(keeper(store).clean()) == [("trash", "abc")]
    assert not left.exists() and not going(keeper(store).survey())


# Beside builds


def test_what_a_running_build_reads_stays_although_its_partition_moved_on(store: Store, tmp_path: Path) -> None:
    old = store.build(replace(words(words=("old",)), partition="a")).manifest
    values = WordSettings(gate=str(tmp_path / "gate"), log=str(tmp_path / "log"))
    request = Build(asset="slow", step=read_slowly, settings=values, inputs={"parts": (old,)})
    code = f"import pickle\nfrom test_housekeeping import *\nprint(store.build(pickle.loads({pickle.dumps(request)!r})).manifest.counts)"
    process = child(tmp_path, code, wait=False)
    wait_for((tmp_path / "log").exists)
    store.build(replace(words(words=("new",)), partition="a"))
    found = keeper(store).clean()
    assert found.roots[of(old)] == ("in use",) and not [item for item in found.going if item.kind == "artifact"]
    assert store.find("words", old.fingerprint)
    (tmp_path / "gate").touch()
    assert process.communicate(timeout=60)[0].strip() == "{'words': 1}"
    assert store.verify(store.current("slow")) == [] and store.find("words", old.fingerprint), "it is part of a lineage now"
    keeper(store).clean()
    assert store.verify(store.current("slow")) == []


def test_requests_hold_what_they_name_before_anything_is_built(store: Store) -> None:
    """A run over many partitions makes all its requests first; the last of them is built hours later."""
    store.build(replace(words(words=("old",)), partition="a"))
    with store.leases.taken(lambda: [joined(store.current("words", "a"))], lambda builds: _inputs(builds)) as builds:
        store.build(replace(words(words=("new",)), partition="a"))
        assert not [item for item in keeper(store).clean().going if item.kind == "artifact"]
        assert not store.build(builds[0]).hit
    assert not any((store.root / "leases").iterdir())


def test_removal_waits_for_who_looks_up_and_holds_nobody_up_for_long(store: Store, tmp_path: Path) -> None:
    store.build(words(words=("old",)))
    store.build(words())
    code = "with store.leases.looking():\n    (tmp_path / 'looking').touch()\n    while not (tmp_path / 'done').exists(): time.sleep(0.01)"
    process = child(tmp_path, code, wait=False)
    wait_for((tmp_path / "looking").exists)
    waited = []

    def waiting() -> None:
        waited.append(len(published(store)))
        assert store.build(words()).hit, "others look up meanwhile"
        (tmp_path / "done").touch()

    keeper(store, waiting=waiting).clean()
    assert waited == [2] and len(published(store)) == 1
    assert process.wait(30) == 0


def test_builds_and_removals_at_the_same_time(store: Store, tmp_path: Path) -> None:
    """Four processes move pointers and build over them while this one removes whatever it can, again and again."""
    code = "from test_housekeeping import *\nbuild_at_random(store.root, {seed}, 25)"
    processes = [child(tmp_path, code.format(seed=seed), wait=False) for seed in range(4)]
    removed, rounds = 0, 0
    while any(process.poll() is None for process in processes):
        removed += len([item for item in keeper(store).clean().going if item.kind == "artifact"])
        rounds += 1
    assert [(process.returncode, process.stderr.read()[-2000:]) for process in processes] == [(0, "")] * 4
    assert removed > 10 and rounds > 10
    lineage = Lineage(store.root)
    lost = verify([lineage.directory(address) for address in lineage.addresses()]).faults
    assert not lost, lost
    last = keeper(store).clean()
    assert lineage.addresses() and not list((store.root / "leases").iterdir()) and all(not item.kept for item in last.items)


def test_a_lease_is_held_by_the_process_and_not_by_its_file(store: Store) -> None:
    with store.leases.taken(lambda: None, lambda _: [Address("words", "0" * 32)]):
        (path,) = (store.root / "leases").iterdir()
        assert not is_free(path) and store.leases.live() == {Address("words", "0" * 32)} and not store.leases.stale()
        copy = path.with_name("other.json")
        shutil.copyfile(path, copy)
        assert store.leases.stale() == [copy]


# The commands


def command(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"GRISTMILL_HOME": str(home), "MLFLOW_TRACKING_URI": ""})


def test_the_commands(store: Store) -> None:
    old = store.build(joined(words(words=("old",)), partition="a")).manifest
    assert "is pinned" in command(store.root, "pin", "joined[a]", "--name", "the paper").stdout
    store.build(joined(words(words=("new",)), partition="a"))
    store.build(words(words=("new",)))
    assert "the paper" in command(store.root, "pin").stdout and of(old) in pinned(store.root)
    listed = command(store.root, "gc")
    assert listed.exit_code == 0 and "pinned: the paper" in listed.stdout and "0 things" in listed.stdout
    assert "not pinned any more" in command(store.root, "pin", "the paper", "--remove").stdout
    found = json.loads(command(store.root, "gc", "--json").stdout)
    assert not found["removed"] and found["bytes"] > 0 and len(published(store)) == 4
    assert {item["kind"] for item in found["items"]} == {"artifact", "lock"}
    done = command(store.root, "gc", "--delete")
    assert "removed" in done.stdout and len(published(store)) == 2
    assert command(store.root, "pin", "--remove").exit_code == 2
    assert isinstance(command(store.root, "pin", "joined[b]").exception, GristmillError)


def test_messages_of_processes_that_are_gone_are_found_and_those_of_living_ones_stay(store: Store) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True, text=True)
    for pid in (ended.stdout.strip(), str(os.getpid())):
        (store.root / CHILD_MESSAGES / f"general_checkpoint-abc.{pid}").mkdir(parents=True)
    (item,) = [item for item in keeper(store).survey().going if item.kind == "messages"]
    assert item.path.suffix == f".{ended.stdout.strip()}"
    keeper(store).clean()
    assert [path.suffix for path in (store.root / CHILD_MESSAGES).iterdir()] == [f".{os.getpid()}"]
