"""What MLflow takes as parameters, names of metrics and times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime

from pipelines.manifests import Json

MAX_PARAMETER_CHARACTERS = 500


def milliseconds(started: Json) -> int:
    """Return an ISO time, or now where there is none, in milliseconds since 1970."""
    return int((datetime.fromisoformat(str(started)).timestamp() if started else time.time()) * 1000)


def flattened(values: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    """Return nested settings as text by dotted key."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{name}.")
        else:
            found[name] = json.dumps(value)[:MAX_PARAMETER_CHARACTERS]
    return found


def allowed(name: str) -> str:
    """Return `name` with the characters that MLflow allows in a key."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)[:250]
