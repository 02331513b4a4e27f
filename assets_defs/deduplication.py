"""duplicate_signatures by source; duplicate_clusters over all sources, with the held-out split; deduplicated_corpus by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill
from pipelines import deduplication
from pipelines.documents import split_partition
from pipelines.manifests import Manifest
from pipelines.store import Build


@mill_asset(
    step=deduplication.sign_documents, audits=deduplication.SIGNATURE_AUDITS, partitions=SOURCE, deps=["cleaned_corpus"], kinds={"parquet"}
)
def duplicate_signatures(mill: Mill, partition: str) -> Build:
    """An exact hash and a MinHash signature of every document.

    Input: cleaned_corpus. Cost: about 5 MB of text per CPU-second.
    """
    return Build(
        asset="duplicate_signatures",
        partition=partition,
        step=deduplication.sign_documents,
        settings=mill.project.signatures,
        inputs={"cleaned": mill.store.current("cleaned_corpus", partition)},
        audits=deduplication.SIGNATURE_AUDITS,
    )


@mill_asset(
    step=deduplication.cluster_documents,
    audits=(*deduplication.CLUSTER_AUDITS, deduplication.SplitsUnchanged),
    deps=[dg.AssetDep("duplicate_signatures", partition_mapping=ALL)],
    kinds={"parquet"},
)
def duplicate_clusters(mill: Mill, partition: None) -> Build:
    """Near-duplicate clusters over all domains and snapshots, and with them the held-out split, given before anything is fitted.

    Input: duplicate_signatures, in an order that is only appended to: a split once given never changes.
    """
    order = _order(mill)
    return Build(
        asset="duplicate_clusters",
        step=deduplication.cluster_documents,
        settings=mill.project.cluster_settings(order),
        inputs={"signatures": tuple(mill.store.current("duplicate_signatures", key) for key in order)},
        audits=(*deduplication.CLUSTER_AUDITS, deduplication.SplitsUnchanged(_previous(mill))),
    )


@mill_asset(
    step=deduplication.deduplicate,
    audits=deduplication.DEDUPLICATION_AUDITS,
    partitions=RECIPE,
    deps=["decontaminated_corpus", "duplicate_clusters", dg.AssetDep("duplicate_signatures", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def deduplicated_corpus(mill: Mill, partition: str) -> Build:
    """One document per near-duplicate cluster, by the recipe's rule, and the split of each.

    Input: decontaminated_corpus, duplicate_clusters, duplicate_signatures.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="deduplicated_corpus",
        partition=partition,
        step=deduplication.deduplicate,
        settings=recipe.deduplication,
        inputs={
            "decisions": mill.store.current("decontaminated_corpus", partition),
            "clusters": mill.splits(mill.source_partitions(recipe, "duplicate_signatures")),
            "signatures": mill.sources("duplicate_signatures", recipe),
        },
        audits=deduplication.DEDUPLICATION_AUDITS,
    )


def _order(mill: Mill) -> list[str]:
    """Return the source partitions in the register's order: those of the last register first, new ones after them.

    Within a snapshot, domains that are held out whole come first: what resembles them is then held out with them.
    """
    held_out = mill.project.held_out

    def place(key: str) -> tuple[str, bool, str]:
        domain, snapshot = split_partition(key)
        return snapshot, held_out.get(domain, 0.0) < 1.0, domain

    present = sorted(mill.store.partitions("duplicate_signatures"), key=place)
    previous = _previous(mill)
    known = [key for key in (previous.settings["order"] if previous else []) if key in present]
    return known + [key for key in present if key not in known]


def _previous(mill: Mill) -> Manifest | None:
    return mill.store.current("duplicate_clusters") if mill.store.is_current("duplicate_clusters") else None
