"""Numbers of tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipelines.manifests import Json


def rounded(rows: Iterable[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Return `rows` with numbers of four decimals; what is no fraction stays as it is."""
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
