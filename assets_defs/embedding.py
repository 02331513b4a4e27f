"""embedder, fitted once on the pinned sample; document_embeddings by source."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, SOURCE
from assets_defs.resources import Mill, load_project
from pipelines import embedding, plugins
from pipelines.store import Build


@mill_asset(
    step=embedding.fit_embedder,
    audits=embedding.EMBEDDER_AUDITS,
    deps=[dg.AssetDep("cleaned_corpus", partition_mapping=ALL), "duplicate_clusters"],
    kinds={"numpy"},
    plugins=(f"pipelines.embedders.{load_project().embedder}",),
)
def embedder(mill: Mill, partition: None) -> Build:
    """The fitted state of the embedder: all partitions share one space.

    Input: passages of the training split of the pinned sample (`fit_on` in project.yaml). Cost: seconds with the static default.
    """
    sample = mill.fit_sample()
    return Build(
        asset="embedder",
        step=embedding.fit_embedder,
        settings=embedding.located(mill.project.embedder_fit(), mill.root),
        inputs={"sample": sample, "splits": mill.splits([str(manifest.partition) for manifest in sample])},
        audits=embedding.EMBEDDER_AUDITS,
        **_identity(mill),
    )


@mill_asset(
    step=embedding.embed_documents,
    audits=embedding.EMBEDDING_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus", "embedder"],
    kinds={"numpy"},
    plugins=(f"pipelines.embedders.{load_project().embedder}",),
)
def document_embeddings(mill: Mill, partition: str) -> Build:
    """An integer unit vector for every passage: the same bits whatever the machine's linear algebra.

    Input: cleaned_corpus, embedder. Cost: about 3 MB of text per CPU-second with the static default.
    """
    return Build(
        asset="document_embeddings",
        partition=partition,
        step=embedding.embed_documents,
        settings=mill.project.embedding().model_copy(update={"root": mill.root}),
        inputs={"cleaned": mill.store.current("cleaned_corpus", partition), "embedder": mill.store.current("embedder")},
        audits=embedding.EMBEDDING_AUDITS,
        **_identity(mill),
    )


def _identity(mill: Mill) -> dict[str, tuple[str, ...]]:
    name = mill.project.embedder
    return {"plugins": (f"pipelines.embedders.{name}",), "packages": plugins.load("embedders", name).packages}  # type: ignore[attr-defined]
