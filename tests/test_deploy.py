"""The files of deploy/: they name what is there, bind to 127.0.0.1, and hold no secret."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SECRET = re.compile(r"password|secret|token|key_id", re.IGNORECASE)


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def asked_of_the_environment(node: object) -> set[str]:
    """Return the names under every `env` of an instance file."""
    if not isinstance(node, dict):
        return set()
    return {node["env"]} if set(node) == {"env"} else {name for value in node.values() for name in asked_of_the_environment(value)}


def test_every_port_of_the_containers_is_bound_to_this_machine_alone() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_come_from_the_environment() -> None:
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name) or "://" in value:
                assert "${" in value, f"{name}={value}"


def test_the_containers_set_what_the_instance_file_asks_for() -> None:
    asked = asked_of_the_environment(yaml.safe_load((DEPLOY / "postgres" / "dagster.yaml").read_text()))
    assert len(asked) == 5
    for name in ("code", "dagster", "daemon"):
        assert asked <= set(compose()["services"][name]["environment"])
    assert all(name in (ROOT / "docs" / "services.md").read_text() for name in asked)


def test_the_workspace_names_the_container_and_port_of_the_code() -> None:
    (server,) = (entry["grpc_server"] for entry in yaml.safe_load((DEPLOY / "workspace.yaml").read_text())["load_from"])
    assert server["host"] in compose()["services"] and f'"{server["port"]}"' in (DEPLOY / "Dockerfile").read_text()


def test_the_image_copies_what_is_there_and_installs_extras_that_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"pipelines", "assets_defs", "recipes", "project.yaml"} <= set(copied)
    assert not [name for name in copied if not (ROOT / name).exists()]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r'--editable "\.\[([\w,]+)\]"', text)
    assert set(installed.split(",")) <= set(extras)
    (home,) = re.findall(r"DAGSTER_HOME=\S*?/gristmill/(\S+)", text)
    assert (ROOT / home / "dagster.yaml").is_file()
