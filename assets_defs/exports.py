"""Corpora as folders that `datasets` opens."""

from pathlib import Path

import pyarrow.parquet as pq

from assets_defs.resources import Mill
from pipelines.corpus import export_corpus
from pipelines.errors import GristmillError, UnknownName

CORPORA = ("raw_corpus", "cleaned_corpus")
DECISIONS = ("quality_filtered_corpus", "toxicity_filtered_corpus", "decontaminated_corpus", "deduplicated_corpus")


def export_partition(mill: Mill, asset: str, partition: str, directory: Path) -> int:
    """Write the documents of a corpus, or those that a recipe's decisions keep, to `directory`; return how many.

    Raises:
        UnknownName: the asset is no corpus.
        GristmillError: the directory exists.
    """
    if directory.exists():
        raise GristmillError(f"{directory} exists; name a directory that does not")
    if asset in CORPORA:
        manifest = mill.store.current(asset, partition)
        export_corpus(manifest, directory)
        return manifest.counts["kept"]
    if asset not in DECISIONS:
        raise UnknownName("corpus", asset, CORPORA + DECISIONS)
    table = pq.read_table(mill.store.current(asset, partition).file("decisions.parquet"), columns=["id", "kept"])
    kept = set(table.filter(table["kept"])["id"].to_pylist())
    export_corpus(mill.sources("cleaned_corpus", mill.recipe(partition)), directory, keep=kept)
    return len(kept)
