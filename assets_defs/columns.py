"""The schema of an asset's main table, with what each column says: Dagster shows it beside the asset."""

import inspect

import dagster as dg

from pipelines.manifests import Manifest
from pipelines.plugins import load, names

_TEXTS = "documents.parquet"
_DECISIONS = "decisions.parquet"
MAIN_TABLES = {
    "raw_corpus": _TEXTS,
    "cleaned_corpus": _TEXTS,
    "duplicate_signatures": "signatures.parquet",
    "quality_scores": "scores.parquet",
    "toxicity_scores": "scores.parquet",
    "contamination": "scores.parquet",
    "document_embeddings": "passages.parquet",
    "tokenized_shards": _TEXTS,
    "quality_filtered_corpus": _DECISIONS,
    "toxicity_filtered_corpus": _DECISIONS,
    "decontaminated_corpus": _DECISIONS,
    "deduplicated_corpus": _DECISIONS,
    "threshold_sweep": "sweep.parquet",
    "selected_subset": "target.parquet",
    "probe_windows": "windows.parquet",
    "mixture_probe": "losses.parquet",
    "evaluation": _TEXTS,
}
"""The file of each asset that a reader opens first."""

COLUMNS = {
    "id": "The document: unique over domains and snapshots, the same in every run.",
    "text": "The text, UTF-8.",
    "domain": "The domain of the document.",
    "snapshot": "The month in which it was collected, YYYY-MM-01.",
    "source": "The source plugin and the place in it, or what the source says of itself.",
    "license": "The licence, as the source gives it.",
    "date": "When it was written, ISO 8601, where the source says so.",
    "url": "Where it was published.",
    "lang": "Its language, ISO 639.",
    "language": "Its language, ISO 639.",
    "title": "Its title.",
    "metadata": "What else the source says, JSON.",
    "characters": "Its length in characters.",
    "bytes": "Its length in bytes of UTF-8.",
    "tokens": "Its length in tokens.",
    "exact_hash": "A hash of the normalised text: equal for exact duplicates.",
    "signature": "The MinHash signature: equal places estimate the Jaccard similarity of two documents' shingles.",
    "shingles": "How many different shingles it has.",
    "kept": "Whether it stays.",
    "rule": "The rule that decided; of a sweep, the rule whose threshold is moved.",
    "score": "What the rule scored.",
    "threshold": "What the score was compared with.",
    "reasons": "Every rule that it failed, with score and threshold.",
    "split": "train or held_out; given once by near-duplicate cluster.",
    "cluster": "The near-duplicate cluster: the id of one of its documents.",
    "passage": "The number of the passage in its document, from 0.",
    "start": "First character of the passage.",
    "end": "Character after its last.",
    "offset": "Position of the first token in the file of tokens.",
    "length": "How many tokens.",
    "role": "general or target.",
    "rank": "Place in the order of selection, from 0: every budget is a prefix.",
    "gain": "What it added to the set function when it was chosen.",
    "selected": "Whether it is within the budget.",
    "representative_id": "The chosen document that stands for it.",
    "representative_passage": "The passage of that document.",
    "similarity": "How similar the two are, cosine.",
    "stage": "quality or toxicity.",
    "keep": "Whether scores of at least or at most the threshold stay.",
    "quantile": "The quantile of the domain's scores that the threshold is; null for the recipe's own.",
    "in_use": "Whether it is the recipe's own threshold.",
    "kept_documents": "Documents that would stay.",
    "kept_characters": "Characters that would stay.",
    "kept_tokens": "Tokens that would stay.",
    "corpus": "general or target.",
    "window": "The number of the held-out window.",
    "loss": "Mean of -ln p(token), nats per token.",
    "contaminated": "Whether training text holds a part of it.",
    "probe": "The probe, by ratio and seed.",
    "ratio": "Its share R of target text.",
    "seed": "Its seed.",
    "nll_before": "Sum of -ln p(token) before continued pretraining, nats.",
    "nll_after": "The same after it.",
    "age_months": "Months from its date, else from its snapshot, to the newest snapshot that is trained on.",
    "shared_tokens": "Tokens that it shares with training text.",
    "contamination.ngrams": "Word n-grams that it shares with evaluation sets.",
    "contamination.document_share": "Their share of the document's own n-grams.",
    "contamination.item_share": "The largest share of an evaluation item's n-grams that it holds.",
    "contamination.items": "Evaluation items that it shares an n-gram with.",
}


def column_schema(manifest: Manifest) -> dg.TableSchema | None:
    """Return the schema of the asset's main table, every column described; None where it has none."""
    import pyarrow.parquet as pq

    name = MAIN_TABLES.get(manifest.asset)
    if name is None or not (manifest.directory / name).exists():
        return None
    schema = pq.read_schema(manifest.directory / name)
    columns = [dg.TableColumn(field.name, type=str(field.type), description=described(field.name)) for field in schema]
    return dg.TableSchema(columns=columns)


def described(column: str) -> str | None:
    """Return what a column says: its entry in `COLUMNS`, or what the rule of a filter measures."""
    plugin, _, rule = column.partition(".")
    if column in COLUMNS or not rule or plugin not in names("filters"):
        return COLUMNS.get(column)
    kind = load("filters", plugin)
    field = kind.model_fields.get(rule)
    if field and field.description:
        return field.description
    first = (inspect.getdoc(kind) or "").partition("\n")[0]
    return f"{rule.replace('_', ' ')}, by the filter {plugin}: {first}"
