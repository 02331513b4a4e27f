"""Fixtures: a store in a temporary directory, and small corpora published into it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.documents import DOCUMENT_SCHEMA, TableWriter, document_id
from pipelines.manifests import Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.store import Build, Store

if TYPE_CHECKING:
    from small_world import World

signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background has it ignored, and its children would too


class CorpusSettings(Settings):
    """The texts of a corpus that a test publishes."""

    domain: str
    texts: tuple[str, ...]
    ids: tuple[str, ...] = ()


def write_corpus(settings: CorpusSettings, out: Path) -> Outcome:
    """Write `settings.texts` as documents."""
    with TableWriter(out / "documents.parquet", DOCUMENT_SCHEMA) as writer:
        for number, text in enumerate(settings.texts):
            name = settings.ids[number] if settings.ids else document_id(settings.domain, str(number), text)
            writer.write({"id": name, "text": text, "domain": settings.domain, "source": "test"})
    return Outcome(counts={"documents_in": len(settings.texts), "kept": len(settings.texts), "dropped": 0, "quarantined": 0})


def corpus(
    store: Store, domain: str, texts: Sequence[str], *, snapshot: str = "2026-01-01", ids: Sequence[str] = (), asset: str = "cleaned_corpus"
) -> Manifest:
    """Publish `texts` as a corpus artifact of one source partition."""
    settings = CorpusSettings(domain=domain, texts=tuple(texts), ids=tuple(ids))
    return store.build(Build(asset=asset, partition=f"{domain}|{snapshot}", step=write_corpus, settings=settings)).manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small project of real text, up to its selection."""
    from small_world import build_world

    return build_world(Store(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def base(world: World) -> Manifest:
    """The general checkpoint of `world`."""
    return world.store.build(world.general()).manifest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread: models as small as those of the tests are slower with several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def mounted_disk(path: Path, *, megabytes: int) -> Iterator[Path]:
    """Mount a file system of `megabytes` at `path` inside; the test is skipped where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "gristmill-test", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)
