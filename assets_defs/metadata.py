"""What the UI shows of an artifact: counts to be plotted, tables, one inline plot, its path and its MLflow run."""

import base64

import dagster as dg

from assets_defs.columns import column_schema
from pipelines.manifests import Json, Manifest
from pipelines.store import Built

MAX_ROWS = 60
MAX_PLOT_BYTES = 60_000
MAX_METRICS = 24


def describe(built: Built, mlflow_url: str | None) -> dict[str, dg.MetadataValue]:
    """Return the metadata of a materialization."""
    manifest = built.manifest
    metadata: dict[str, dg.MetadataValue] = {"path": dg.MetadataValue.path(str(manifest.directory))}
    if mlflow_url:
        metadata["mlflow_run"] = dg.MetadataValue.url(mlflow_url)
    metadata["cache"] = dg.MetadataValue.text("hit" if built.hit else "computed")
    metadata |= {name.removesuffix(".png"): plot for name in manifest.outcome.plots if (plot := inline_plot(manifest, name))}
    if schema := column_schema(manifest):
        metadata["dagster/column_schema"] = dg.MetadataValue.table_schema(schema)
    if "documents_in" in manifest.counts:
        metadata["dagster/row_count"] = dg.MetadataValue.int(manifest.counts.get("kept", 0))
    metadata |= {key: dg.MetadataValue.int(value) for key, value in manifest.counts.items()}
    metadata |= {key: dg.MetadataValue.float(float(f"{value:.6g}")) for key, value in list(manifest.outcome.metrics.items())[:MAX_METRICS]}
    metadata |= {name: table(rows) for name, rows in manifest.outcome.tables.items() if rows}
    metadata["artifact_bytes"] = dg.MetadataValue.int(manifest.bytes)
    metadata["seconds"] = dg.MetadataValue.float(round(float(manifest.provenance.get("seconds") or 0.0), 2))
    metadata["inputs"] = dg.MetadataValue.text(", ".join(f"{name}: {len(refs)}" for name, refs in manifest.inputs.items()) or "none")
    return metadata


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
