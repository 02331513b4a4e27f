"""Corpora as folders that `datasets` opens, and checkpoints as folders that `transformers` opens, with their cards."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from assets_defs.resources import Mill
from pipelines.cards import DATA_CARD, MODEL_CARD
from pipelines.corpus import export_corpus
from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Manifest

CORPORA = ("raw_corpus", "cleaned_corpus")
CHECKPOINTS = ("pretrained_checkpoint", "general_checkpoint")
MODEL_FILES = (".safetensors", ".json", ".txt", ".model")
"""Endings of what a model is loaded from; records of the training stay in the store."""
DECISIONS = ("quality_filtered_corpus", "toxicity_filtered_corpus", "decontaminated_corpus", "deduplicated_corpus")


def export_partition(mill: Mill, asset: str, partition: str, directory: Path) -> str:
    """Write a corpus, what a recipe's decisions keep of it, or a checkpoint to `directory`; return what was written, as a sentence.

    Raises:
        UnknownName: the asset is neither.
        GristmillError: the directory exists.
    """
    if directory.exists():
        raise GristmillError(f"{directory} exists; name a directory that does not")
    if asset in CHECKPOINTS:
        return _export_checkpoint(mill, asset, partition, directory)
    if asset not in CORPORA + DECISIONS:
        raise UnknownName("corpus or checkpoint", asset, CORPORA + DECISIONS + CHECKPOINTS)
    count = _export_corpus(mill, asset, partition, directory)
    return f"{count:,} documents in {directory}; open with datasets.load_from_disk({str(directory)!r})"


def _export_corpus(mill: Mill, asset: str, partition: str, directory: Path) -> int:
    if asset in CORPORA:
        manifest = mill.store.current(asset, partition)
        export_corpus(manifest, directory)
        return manifest.counts["kept"]
    table = pq.read_table(mill.store.current(asset, partition).file("decisions.parquet"), columns=["id", "kept"])
    kept = set(table.filter(table["kept"])["id"].to_pylist())
    export_corpus(mill.sources("cleaned_corpus", mill.recipe(partition)), directory, keep=kept)
    return len(kept)


def _export_checkpoint(mill: Mill, asset: str, partition: str, directory: Path) -> str:
    """Copy the model of a checkpoint, with the cards that its recipe's report wrote from the same facts.

    The cards speak of the evaluation, which comes after the checkpoint: they stand beside it in the store and with it in a copy.
    """
    manifest = mill.store.current(asset, partition)
    names = [entry.path for entry in manifest.files if entry.path.endswith(MODEL_FILES) and "/" not in entry.path]
    cards = _cards(mill, manifest, partition) if asset == "pretrained_checkpoint" else {}
    directory.mkdir(parents=True)
    for name in names:
        shutil.copy2(manifest.file(name), directory / name)
    for name, card in cards.items():
        shutil.copy2(card, directory / name)
    said = (
        f"{len(names)} files and {len(cards)} cards in {directory}"
        if cards
        else f"{len(names)} files in {directory}, no report yet: no card"
    )
    return f"{said}; open with transformers' from_pretrained({str(directory)!r})"


def _cards(mill: Mill, checkpoint: Manifest, recipe: str) -> dict[str, Path]:
    """Return the cards of the report of `recipe` by the names that model hubs look for; none where it is of another checkpoint."""
    if not mill.store.is_current("report", recipe):
        return {}
    report = mill.store.current("report", recipe)
    if [reference.fingerprint for reference in report.inputs["checkpoint"]] != [checkpoint.fingerprint]:
        return {}
    return {"README.md": report.file(MODEL_CARD), "data_card.md": report.file(DATA_CARD)}
