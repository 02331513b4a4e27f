"""Shards mapped by Ray: the results, errors and bytes of the other engines, on a cluster of this machine that ends with its process."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from small_world import sample_texts
from test_engine import fail_on_odd, is_alive, kill_on_two, nested, square, square_late, threads, wait_until

from assets_defs.materialization import _Building
from pipelines import cleaning, corpus
from pipelines.engine import Engine, map_shards
from pipelines.errors import MissingArtifact, UnknownName
from pipelines.store import Build, Store

ROOT = Path(__file__).parents[1]
RAY = Engine(kind="ray", workers=2)
DOMAINS = ("wiki", "book")


def need_ray() -> None:
    """Skip the test where Ray is not installed. It is not imported: a cluster takes its settings when it is."""
    if find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two cores, ended with this module's tests."""
    need_ray()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    assert [m.result for m in map_shards(square, [3], RAY)] == [9]
    yield
    import ray

    ray.shutdown()


def test_the_engine_is_chosen_by_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_ENGINE", raising=False)
    assert Engine().kind == "processes"
    monkeypatch.setenv("GRISTMILL_ENGINE", "ray")
    assert Engine().kind == "ray" and Engine(kind="serial").kind == "serial"
    monkeypatch.setenv("GRISTMILL_ENGINE", "rai")
    with pytest.raises(UnknownName, match="unknown engine .GRISTMILL_ENGINE. 'rai'; did you mean 'ray'"):
        Engine()


def test_nothing_imports_ray_until_it_is_chosen() -> None:
    code = (
        "import sys\nfrom test_engine import square\nfrom pipelines.engine import *\n"
        "assert [m.result for m in map_shards(square, [2, 3], Engine(kind='serial'))] == [4, 9]\nprint('ray' in sys.modules)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_without_ray_the_remedy_is_named() -> None:
    code = (
        "import sys\nsys.path = [p for p in sys.path if 'ray' not in p.rpartition('/')[2]]\nsys.modules['ray'] = None\n"
        "from pipelines.ray_shards import map_with_ray\nlist(map_with_ray(abs, [1], workers=1, ahead=0, environment={}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "make setup EXTRAS=ray, or set GRISTMILL_ENGINE=processes" in run.stderr


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    need_ray()
    code = (
        "from pipelines.engine import *\nfrom pipelines.errors import GristmillError\n"
        "try:\n    list(map_shards(abs, [1], Engine(kind='ray')))\nexcept GristmillError as error:\n    print(error)"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert "the Ray cluster 127.0.0.1:1 does not answer" in run.stdout and "correct RAY_ADDRESS" in run.stdout


def test_results_come_in_order_with_the_errors_of_their_items(cluster: None) -> None:
    assert [m.result for m in map_shards(square_late, range(7), RAY, ahead=2)] == [n * n for n in range(7)]
    mapped = list(map_shards(fail_on_odd, range(6), RAY))
    assert [m.result for m in mapped] == [0, None, 4, None, 16, None]
    assert type(mapped[1].error) is MissingArtifact and type(mapped[3].error) is UnknownName and "no answer" in str(mapped[5].error)
    assert list(map_shards(square, [], RAY)) == []


def test_workers_use_one_thread_and_map_by_themselves(cluster: None) -> None:
    assert {m.result for m in map_shards(threads, range(4), RAY)} == {"1"}
    assert [m.result for m in map_shards(nested, [1, 5], RAY)] == [[1, 4], [25, 36]]


def test_a_killed_worker_ends_in_a_message_and_the_next_call_works(cluster: None) -> None:
    with pytest.raises(RuntimeError, match="a Ray worker was killed, most often for lack of memory"):
        list(map_shards(kill_on_two, range(4), RAY))
    assert [m.result for m in map_shards(square, range(4), RAY)] == [0, 1, 4, 9]


def test_the_cluster_listens_to_this_machine_alone(cluster: None) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {c.laddr.ip for process in family for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening and all((ipaddress.ip_address(ip.removeprefix("::ffff:"))).is_loopback for ip in listening)


def test_the_cluster_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    need_ray()
    code = (
        "import time\nfrom test_engine import square\nfrom pipelines.engine import *\n"
        "if __name__ == '__main__':\n    print(next(map_shards(square, [2], Engine(kind='ray', workers=1))).result, flush=True)\n"
        "    time.sleep(60)"
    )
    (tmp_path / "driver.py").write_text(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "driver.py")]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline().strip() == "4"
    family = [process for process in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in "".join(process.cmdline())]
    assert len(family) >= 3  # Ray's agents, which hold no work, notice only after a minute
    driver.kill()
    driver.wait(20)
    wait_until(lambda: not any(is_alive(process.pid) for process in family))


def build_all(store: Store, root: Path, engine: Engine) -> dict[str, tuple[str, str]]:
    """Ingest and clean a month of each domain with `engine`; return fingerprint and content of every artifact."""
    made: dict[str, tuple[str, str]] = {}
    requests: list[Build] = []
    for domain in DOMAINS:
        settings = corpus.corpus_settings(domain, "2026-01-01", "jsonl", {"paths": ["{domain}.jsonl"]}, root)
        requests.append(Build("raw_corpus", corpus.ingest, settings, f"{domain}|2026-01-01", audits=corpus.CORPUS_AUDITS))
    requests = [
        Build("cleaned_corpus", cleaning.clean_corpus, cleaning.CleaningSettings(), raw.partition, {"raw": raw}, cleaning.CLEANING_AUDITS)
        for raw in requests
    ]
    for mapped in map_shards(_Building(store), requests, engine):
        assert mapped.error is None, mapped.error
    for asset in ("raw_corpus", "cleaned_corpus"):
        for key in store.partitions(asset):
            found = store.current(asset, key)
            made[found.label] = (found.fingerprint, found.content_sha256)
    return made


@pytest.mark.slow
def test_artifacts_have_the_same_fingerprints_and_bytes_whatever_maps_them(cluster: None, tmp_path: Path) -> None:
    for domain in DOMAINS:
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_texts(domain, 60, 2000)))
    engines = (Engine(kind="serial"), Engine(kind="processes", workers=2), RAY)
    serial, processes, ray = (build_all(Store(tmp_path / engine.kind), tmp_path, engine) for engine in engines)
    assert len(serial) == 4 and serial == processes == ray
