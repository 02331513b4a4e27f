"""What the sections of the report share: the artifacts of a recipe, and how the columns of their tables are headed and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pipelines.manifests import Check, Json, Manifest
from pipelines.pages import Column, Form, count, decimals, energy, percent, size

Row = dict[str, Json]

CHANGE = decimals(3, sign=True)
"""How a change of a loss is written."""

COUNTS = (
    "absorbed_passage artifacts available_tokens characters documents documents_in dropped kept kept_held_out kept_train lost_characters "
    "lost_documents lost_tokens own_tokens ratios tokens_at_peak tokens_back_at_base "
    "tokens_back_within_tolerance parameters passage passages passed planned_tokens quarantined represented seed "
    "selected_passages selected_tokens snapshots steps tokens tokens_per_second"
)
FORMS: dict[str, Form] = {
    **dict.fromkeys(COUNTS.split(), count),
    **dict.fromkeys(("share", "share_characters_lost", "share_before", "share_after", "share_dropped"), percent),
    **dict.fromkeys(("bits_per_byte_before", "bits_per_byte_after", "loss_before", "loss_after"), decimals(3)),
    **dict.fromkeys(("loss_baseline", "loss_candidate", "macro_f1", "before", "after", "max_worse"), decimals(3)),
    **dict.fromkeys(("shared_tokens", "contaminated", "items", "train_documents", "test_documents"), count),
    **dict.fromkeys(("share_contaminated", "share_tokens"), percent),
    "p_adjusted": decimals(4),
    **dict.fromkeys(("mean_similarity", "absorbed_similarity"), decimals(3)),
    **dict.fromkeys(("bits_per_byte_change", "loss_change"), CHANGE),
    **dict.fromkeys(
        ("general_delta", "target_delta", "predicted_general_delta", "measured_general_delta", "dip_depth", "predicted", "low", "high"),
        decimals(4, sign=True),
    ),
    **dict.fromkeys(("rmse_nats", "left_out_nats", "left_out_in_tolerances", "standard_error", "measured", "multiplier"), decimals(4)),
    **dict.fromkeys(("estimate", "tolerance_nats"), decimals(3)),
    "upsampling": decimals(2),
    **dict.fromkeys(("bytes", "peak_memory"), size),
    **dict.fromkeys(("epochs", "ratio"), decimals(2)),
    **dict.fromkeys(("bytes_per_token", "tokens_per_word"), decimals(2)),
    "vocabulary_share": percent,
    "general_standard_error": decimals(4),
    **dict.fromkeys(("seconds", "cpu_seconds"), decimals(1)),
    "energy": energy,
}
"""How the values of a column are written; those of any other are text."""
HEADINGS = {
    "absorbed_id": "Absorbed document",
    "available_tokens": "Tokens at hand",
    "bits_per_byte_after": "After",
    "bits_per_byte_before": "Before",
    "bits_per_byte_change": "Change [95 %]",
    "bytes": "Size",
    "code": "Code",
    "dip_depth": "Rose by",
    "estimate": "Critical ratio",
    "content": "SHA-256 of its files",
    "cpu_seconds": "CPU seconds",
    "general_delta": "Change of general loss",
    "general_standard_error": "Standard error",
    "left_out_in_tolerances": "In tolerances",
    "left_out_nats": "Left-out error, nats",
    "measured_general_delta": "Measured general change",
    "predicted_general_delta": "Predicted",
    "id": "Document",
    "kept_held_out": "Kept, held out",
    "kept_train": "Kept, train",
    "loss_after": "After",
    "loss_before": "Before",
    "lost_characters": "Characters",
    "lost_documents": "Documents",
    "lost_tokens": "Tokens",
    "loss_change": "Change [95 %]",
    "mean_similarity": "Mean cosine",
    "own_tokens": "Tokens of no other domain",
    "measure": "Certificate",
    "planned_tokens": "Tokens planned",
    "ratio": "Target share",
    "represented": "Passages it represents",
    "seen": "What was seen",
    "selected_passages": "Selected",
    "share": "Share of tokens",
    "share_characters_lost": "Of all",
    "target_delta": "Change of target loss",
    "tokens_per_second": "Tokens/s",
    "vocabulary_share": "Of the vocabulary",
}
"""How a column is headed where it is not by its name."""


@dataclass(frozen=True)
class Artifacts:
    """The manifests of one recipe, in the order of the graph."""

    raw: tuple[Manifest, ...]
    cleaned: tuple[Manifest, ...]
    quality: Manifest
    toxicity: Manifest
    deduplicated: Manifest
    selection: Manifest
    general: Manifest
    probes: tuple[Manifest, ...]
    ratio: Manifest
    mixture: Manifest
    checkpoint: Manifest
    evaluation: Manifest
    sweep: Manifest | None = None
    decontaminated: Manifest | None = None
    windows: Manifest | None = None
    estimate: Manifest | None = None
    verification: Manifest | None = None
    tasks: Manifest | None = None
    classification: Manifest | None = None
    comparison: Manifest | None = None
    shards: tuple[Manifest, ...] = ()

    def assets(self) -> Iterator[tuple[str, tuple[Manifest, ...]]]:
        """Yield each asset's name and its manifests."""
        for field in fields(self):
            value = getattr(self, field.name)
            manifests = value if isinstance(value, tuple) else (value,)
            if manifests and value is not None:
                yield manifests[0].asset, manifests

    def checks(self) -> list[tuple[str, Manifest, Check]]:
        """Return every check with the asset and the manifest it belongs to."""
        return [(asset, manifest, check) for asset, manifests in self.assets() for manifest in manifests for check in manifest.checks]


def total(manifests: Sequence[Manifest], key: str) -> int | None:
    """Return the sum of a count, None where no manifest has it."""
    found = [manifest.counts[key] for manifest in manifests if key in manifest.counts]
    return sum(found) if found else None


def columns(keys: str) -> list[Column]:
    """Return the columns of `keys`, separated by spaces, with their headings and forms."""
    return [Column(key, HEADINGS.get(key, words(key)), FORMS.get(key)) for key in keys.split()]


def counted(names: Mapping[str, str]) -> list[Column]:
    """Return columns of counts, by key and heading."""
    return [Column(key, heading, count) for key, heading in names.items()]


def rows_of(manifest: Manifest, name: str) -> list[Row]:
    """Return a table of an artifact, empty where it has none of that name."""
    return manifest.outcome.tables.get(name, [])


def plots_of(manifest: Manifest, prefix: str = "") -> list[tuple[Path, str]]:
    """Return the pictures of an artifact with their captions."""
    names = manifest.outcome.plots
    return [(manifest.directory / name, words(f"{prefix} {Path(name).stem}".strip())) for name in names]


def words(name: str) -> str:
    """Return a name as words, the first one capitalised."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
