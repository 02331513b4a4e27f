"""What the UI shows of an artifact: counts to be plotted, tables, one inline plot, its path and its MLflow run."""

import base64
from pathlib import Path

import dagster as dg

from assets_defs.columns import column_schema
from pipelines.leases import Address
from pipelines.lineage import Lineage, by_asset
from pipelines.manifests import Json, Manifest
from pipelines.store import Built

MAX_ROWS = 60
MAX_PLOT_BYTES = 60_000
MAX_CARD_BYTES = 30_000
MAX_METRICS = 24
WITH_LINEAGE = ("pretrained_checkpoint", "evaluation", "report")
"""Assets whose ancestors are shown: where a number is looked at."""


def describe(built: Built, mlflow_url: str | None) -> dict[str, dg.MetadataValue]:
    """Return the metadata of a materialization."""
    manifest = built.manifest
    metadata: dict[str, dg.MetadataValue] = {"path": dg.MetadataValue.path(str(manifest.directory))}
    if mlflow_url:
        metadata["mlflow_run"] = dg.MetadataValue.url(mlflow_url)
    metadata["cache"] = dg.MetadataValue.text("hit" if built.hit else "computed")
    metadata |= {name.removesuffix(".png"): plot for name in manifest.outcome.plots if (plot := inline_plot(manifest, name))}
    metadata |= {card.stem: dg.MetadataValue.md(card.read_text(encoding="utf-8")) for card in _cards(manifest)}
    if schema := column_schema(manifest):
        metadata["dagster/column_schema"] = dg.MetadataValue.table_schema(schema)
    if "documents_in" in manifest.counts:
        metadata["dagster/row_count"] = dg.MetadataValue.int(manifest.counts.get("kept", 0))
        metadata["keep_rate"] = dg.MetadataValue.float(round(manifest.counts.get("kept", 0) / max(1, manifest.counts["documents_in"]), 6))
    metadata |= {key: dg.MetadataValue.int(value) for key, value in manifest.counts.items()}
    metadata |= {key: dg.MetadataValue.float(float(f"{value:.6g}")) for key, value in list(manifest.outcome.metrics.items())[:MAX_METRICS]}
    metadata |= {name: table(rows) for name, rows in manifest.outcome.tables.items() if rows}
    if manifest.asset in WITH_LINEAGE:
        metadata["lineage"] = _lineage(manifest)
    metadata["artifact_bytes"] = dg.MetadataValue.int(manifest.bytes)
    metadata["seconds"] = dg.MetadataValue.float(round(float(manifest.provenance.get("seconds") or 0.0), 2))
    metadata["inputs"] = dg.MetadataValue.text(", ".join(f"{name}: {len(refs)}" for name, refs in manifest.inputs.items()) or "none")
    return metadata


def _lineage(manifest: Manifest) -> dg.MetadataValue:
    """Return what an artifact was made from, a row an asset; `gristmill trace` lists every one."""
    found = Lineage(manifest.directory.parents[2]).ancestors(Address(manifest.asset, manifest.fingerprint))
    return table(by_asset(found))


def _cards(manifest: Manifest) -> list[Path]:
    """Return the Markdown files of an artifact that the event log has room for."""
    return [manifest.file(entry.path) for entry in manifest.files if entry.path.endswith(".md") and entry.bytes <= MAX_CARD_BYTES]


def table(rows: list[dict[str, Json]]) -> dg.MetadataValue:
    """Return `rows` as a table; nested values are shown as text."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    records = [dg.TableRecord({key: _cell(row.get(key)) for key in keys}) for row in rows[:MAX_ROWS]]
    schema = dg.TableSchema(columns=[dg.TableColumn(key, type=_column_type(rows, key)) for key in keys])
    return dg.MetadataValue.table(records=records, schema=schema)


def inline_plot(manifest: Manifest, name: str) -> dg.MetadataValue | None:
    """Return a plot as Markdown with the image inline; None where it is too large for the event log."""
    content = (manifest.directory / name).read_bytes()
    if len(content) > MAX_PLOT_BYTES:
        return None
    return dg.MetadataValue.md(f"![{name}](data:image/png;base64,{base64.b64encode(content).decode()})")


def _cell(value: Json) -> bool | int | float | str | None:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _column_type(rows: list[dict[str, Json]], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    if values and all(isinstance(v, bool) for v in values):
        return "bool"
    if values and all(isinstance(v, int) for v in values):
        return "int"
    return "float" if values and all(isinstance(v, int | float) for v in values) else "string"
