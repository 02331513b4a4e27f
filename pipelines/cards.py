"""The model card and the data card of a recipe: the facts of its artifacts in the form that model hubs read (Mitchell et al. 2019,
1810.03993; Gebru et al. 2021, 1803.09010), Markdown with a YAML head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipelines.manifests import Json, Manifest
from pipelines.report_artifacts import Artifacts, Row, rows_of, total

MODEL_CARD, DATA_CARD = "model_card.md", "data_card.md"
MISSING = "not stated"
"""Of a licence or a source that no document names."""
Cell = Callable[[Json], str]


def write_cards(out: Path, recipe: str, description: str, made: Artifacts) -> None:
    """Write both cards into `out`."""
    (out / MODEL_CARD).write_text(model_card(recipe, description, made), encoding="utf-8")
    (out / DATA_CARD).write_text(data_card(recipe, description, made), encoding="utf-8")


def model_card(recipe: str, description: str, made: Artifacts) -> str:
    """Return what the checkpoint is, what it was trained on, and what was measured of it."""
    counts = made.checkpoint.counts
    head = [
        "---",
        "library_name: transformers",
        f"model_name: {_yaml(recipe)}",
        "tags: [gristmill, continued-pretraining]",
        "---",
    ]
    phases = rows_of(made.checkpoint, "phases")
    mixture = rows_of(made.mixture, "domains")
    parts = [
        "\n".join(head),
        f"# {_plain(recipe)}",
        _plain(description),
        "## The model",
        _table(
            [
                {"what": "parameters", "value": counts.get("parameters")},
                {"what": "tokens of continued pretraining", "value": counts.get("tokens")},
                {"what": "tokens of the general checkpoint before", "value": made.general.counts.get("tokens")},
            ],
            {"what": "", "value": ""},
        ),
        "The checkpoint is a Hugging Face directory with safetensors weights; `AutoModelForCausalLM.from_pretrained` or "
        "`AutoModelForMaskedLM.from_pretrained` opens it.",
        "## Training",
        _table(
            phases,
            {"phase": "phase", "objective": "objective", "schedule": "schedule", "learning_rate": "learning rate", "tokens": "tokens"},
        ),
        "## What it was trained on",
        f"The share of target text is {_number(made.mixture.outcome.metrics.get('target_share'))}; {_ratio(made)} See {DATA_CARD}.",
        _table(mixture, {"domain": "domain", "role": "role", "share": "share of tokens", "epochs": "epochs"}),
        "## Evaluation",
        "Held-out documents, before and after continued pretraining; changes with 95 % intervals of a paired bootstrap over documents.",
        _table(
            _evaluated(made.evaluation),
            {"domain": "domain", "role": "role", "before": "bits per byte before", "after": "after", "change": "change of loss, nats"},
        ),
        "## Limits",
        "A critical ratio, a loss and a selection are those of this model, this text and these tokens. Nothing here was measured of bias, "
        "safety or use in products.",
        "## Lineage",
        _lineage(made),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def data_card(recipe: str, description: str, made: Artifacts) -> str:
    """Return where the text came from, what was dropped of it and why, what was selected, and under which licences it stands."""
    funnel = [(name, found) for name, found in (("quality", made.quality), ("toxicity", made.toxicity)) if found]
    funnel += [(name, found) for name, found in (("decontamination", made.decontaminated), ("deduplication", made.deduplicated)) if found]
    steps = [{"step": name, **{key: found.counts.get(key) for key in ("documents_in", "kept", "dropped")}} for name, found in funnel]
    read = [{"domain": domain, **counts} for domain, counts in _read(made.cleaned).items()]
    parts = [
        f"---\npretty_name: {_yaml(recipe)}\n---",
        f"# Data of {_plain(recipe)}",
        _plain(description),
        "## What was read",
        f"{total(made.raw, 'documents_in') or 0:,} documents.",
        _table(
            read,
            {
                "domain": "domain",
                "documents_in": "documents",
                "kept": "kept by cleaning",
                "quarantined": "quarantined",
                "characters": "characters",
            },
        ),
        "## Sources and licences",
        _table(_licences(made.cleaned), {"domain": "domain", "source": "source", "license": "licence", "documents": "documents"}),
        "## What was dropped",
        _table(steps, {"step": "step", "documents_in": "documents in", "kept": "kept", "dropped": "dropped"}),
        "Every dropped document has its reasons, with score and threshold, in `decisions.parquet` of each step.",
        "## What was selected",
        _table(
            rows_of(made.mixture, "domains"),
            {"domain": "domain", "role": "role", "available_tokens": "selected tokens", "epochs": "epochs read"},
        ),
        "## Lineage",
        _lineage(made),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ratio(made: Artifacts) -> str:
    found = made.ratio.outcome.metrics
    if found.get("ratio") is None:
        return "it was given."
    ends = [found.get("interval_low"), found.get("interval_high")]
    between = f" (95 % interval {_number(ends[0])} to {_number(ends[1])})" if None not in ends else ""
    return f"the critical ratio was measured as {_number(found['ratio'])}{between}."


def _evaluated(evaluation: Manifest) -> list[Row]:
    rows = []
    for row in rows_of(evaluation, "held_out"):
        change, low, high = (row.get(f"loss_change{end}") for end in ("", "_low", "_high"))
        shown = f"{change:+.3f} [{low:+.3f}, {high:+.3f}]" if None not in (change, low, high) else None
        measured = {"before": row.get("bits_per_byte_before"), "after": row.get("bits_per_byte_after"), "change": shown}
        rows.append({"domain": row.get("domain"), "role": row.get("role"), **measured})
    return rows


def _read(cleaned: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for manifest in cleaned:
        mine = found.setdefault(str(manifest.partition or "").partition("|")[0], {})
        for key, value in manifest.counts.items():
            mine[key] = mine.get(key, 0) + value
    return dict(sorted(found.items()))


def _licences(cleaned: Sequence[Manifest]) -> list[Row]:
    """Return how many documents of each domain stand under which licence, by source without its part."""
    import duckdb

    paths = [str(path) for manifest in cleaned if (path := manifest.directory / "documents.parquet").exists()]
    if not paths:
        return []
    query = """
        select domain, coalesce(split_part(source, '/', 1), $missing), coalesce(license, $missing), count(*)
        from read_parquet($paths) group by all order by all
    """
    rows = duckdb.sql(query, params={"paths": paths, "missing": MISSING}).fetchall()
    return [dict(zip(("domain", "source", "license", "documents"), row, strict=True)) for row in rows]


def _lineage(made: Artifacts) -> str:
    rows: list[Row] = []
    for asset, manifests in made.assets():
        first, more = manifests[0], f" and {len(manifests) - 1} more" if len(manifests) > 1 else ""
        rows.append({"asset": asset, "fingerprint": f"`{first.fingerprint}`{more}", "code": f"`{first.code_version}`"})
    return _table(rows, {"asset": "asset", "fingerprint": "fingerprint", "code": "code version"})


def _table(rows: Sequence[Mapping[str, Json]], headings: Mapping[str, str]) -> str:
    """Return a Markdown table; nothing where there is no row."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(headings.values())} |", f"|{' --- |' * len(headings)}"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in headings)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Json) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _number(value) if isinstance(value, float) else _plain(str(value))


def _number(value: Json) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else MISSING


def _plain(value: str) -> str:
    """Return `value` as text that Markdown shows as it is, on one line."""
    for mark in "\\|*_<>[]#":
        value = value.replace(mark, f"\\{mark}")
    return " ".join(value.split())


def _yaml(value: str) -> str:
    return '"' + " ".join(value.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'
