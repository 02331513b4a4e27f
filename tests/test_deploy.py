"""The files of deploy/: they name what is there, bind to 127.0.0.1, and hold no secret."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
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


# Kubernetes


def values() -> dict:
    return yaml.safe_load((DEPLOY / "kubernetes-values.yaml").read_text())


def merged(over: object, under: object) -> object:
    """Return the values as Helm merges them: mappings key by key, anything else replaced."""
    if not (isinstance(over, dict) and isinstance(under, dict)):
        return over
    both = over.keys() & under.keys()
    return {**under, **over, **{key: merged(over[key], under[key]) for key in both}}


def without_links(schema: object) -> object:
    """Return `schema` without what it takes from Kubernetes' own schema, which lies on the network."""
    if isinstance(schema, list):
        return [without_links(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_links(value) for key, value in schema.items() if key != "$ref" or str(value).startswith("#")}


def test_the_values_hold_no_secret_and_name_those_that_are_needed() -> None:
    text = (DEPLOY / "kubernetes-values.yaml").read_text()
    assert not re.search(r"^[^#]*(password|secret_access_key|access_key_id):\s*\S", text, re.IGNORECASE | re.MULTILINE)
    found = values()
    assert found["generatePostgresqlPasswordSecret"] is False and found["global"]["postgresqlSecretName"] in text.split("global:")[0]
    (deployment,) = found["dagster-user-deployments"]["deployments"]
    assert deployment["envSecrets"] == [{"name": "gristmill"}] and deployment["includeConfigInLaunchedRuns"]["enabled"]


def test_the_values_keep_the_limits_of_the_instance_file_and_its_driver() -> None:
    instance = yaml.safe_load((DEPLOY / "postgres" / "dagster.yaml").read_text())
    found = values()
    assert found["additionalInstanceConfig"]["concurrency"] == instance["concurrency"]
    assert found["dagsterDaemon"]["runRetries"]["maxRetries"] == instance["run_retries"]["max_retries"]
    assert found["postgresql"]["postgresqlScheme"] == instance["storage"]["postgres"]["postgres_db"]["scheme"]


def test_every_pod_runs_the_same_image_and_the_code_that_the_image_holds() -> None:
    found = values()
    (deployment,) = found["dagster-user-deployments"]["deployments"]
    images = [deployment["image"], found["dagsterWebserver"]["image"], found["dagsterDaemon"]["image"]]
    assert images[0] == images[1] == images[2]
    assert deployment["dagsterApiGrpcArgs"][-1] in (DEPLOY / "Dockerfile").read_text()
    homes = {item["name"]: item["value"] for item in deployment["env"]}
    assert (
        deployment["volumeMounts"][0]["mountPath"] == homes["GRISTMILL_HOME"]
        and homes["GRISTMILL_PROJECT"] in (DEPLOY / "Dockerfile").read_text()
    )


def test_the_values_fit_the_schema_of_the_chart() -> None:
    """DAGSTER_CHART names the chart, unpacked (`helm pull dagster/dagster --untar`); it is not part of this project."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    chart = os.environ.get("DAGSTER_CHART") or pytest.skip("needs the chart: DAGSTER_CHART names its directory")
    schema = json.loads((Path(chart) / "values.schema.json").read_text())
    defaults = yaml.safe_load((Path(chart) / "values.yaml").read_text())
    validator = jsonschema.Draft7Validator(without_links(schema))
    assert sorted(set(values()) - set(schema["properties"])) == []
    assert [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(merged(values(), defaults))] == []
