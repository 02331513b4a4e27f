"""Where a trained model lies: a file or folder of the user's, or a commit of a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pipelines.errors import GristmillError


def _commit(revision: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError("give the full commit hash, 40 hexadecimal digits: a branch or tag can change what it names")
    return revision


Commit = Annotated[str, AfterValidator(_commit)]
"""A commit of a repository on the hub."""


def local_path(model: str, root: Path, *, key: str = "model") -> Path:
    """Return the file or folder `model`, relative to `root` unless absolute.

    Args:
        key: what the setting is called.

    Raises:
        GristmillError: it is not there, or leaves `root` by ``..``.
    """
    if not Path(model).is_absolute() and ".." in Path(model).parts:
        raise GristmillError(f"{key} {model!r} leaves the project's directory by '..'; give an absolute path for one outside it")
    if not (root / model).exists():
        hint = (
            "for a repository on the hub give `revision`, too"
            if key == "model" and model.count("/") == 1
            else f"put it there or correct `{key}`"
        )
        raise GristmillError(f"no {key} {model!r} (relative paths start at {root}); {hint}")
    return root / model


def downloaded(fetch: Callable[[], str], model: str, *, key: str = "model") -> Path:
    """Return what `fetch` has brought from the hub.

    Args:
        key: what the setting for a local path is called.

    Raises:
        GristmillError: the hub, or the file on it, cannot be reached.
    """
    try:
        return Path(fetch())
    except (OSError, ValueError) as error:  # the errors of huggingface_hub and of its connections are OSErrors
        raise GristmillError(
            f"{model!r} cannot be had from the hub ({type(error).__name__}: {error}); download it, and give its path as `{key}`"
        ) from error


WEIGHTS = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Files of a repository that are fetched: no code, no pickles."""


def model_folder(model: str, revision: str | None, root: Path) -> Path:
    """Return the folder `model` under `root`, or with `revision` that commit of a repository on the hub.

    Raises:
        GristmillError: it is not there, leaves `root`, or cannot be had from the hub.
    """
    if not revision:
        return local_path(model, root)
    import huggingface_hub

    return downloaded(lambda: huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(WEIGHTS)), model)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of `folder` that say what a model computes: its configuration and its weights."""
    return tuple(sorted([*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]))
