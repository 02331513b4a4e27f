"""duplicate_signatures by source; duplicate_clusters over all sources, with the held-out split; deduplicated_corpus by recipe."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill
from pipelines import deduplication, deduplication_audits
from pipelines.deduplication import ClusterSettings
from pipelines.documents import split_partition
from pipelines.manifests import Manifest
from pipelines.progress import warn
from pipelines.store import Build


@mill_asset(
    step=deduplication.sign_documents,
    audits=deduplication_audits.SIGNATURE_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus"],
    kinds={"parquet"},
)
def duplicate_signatures(mill: Mill, partition: str) -> Build:
    """An exact hash and a MinHash signature of every document.

    Input: cleaned_corpus. Cost: about 25 MB of text per CPU-second.
    """
    return Build(
        asset="duplicate_signatures",
        partition=partition,
        step=deduplication.sign_documents,
        settings=mill.project.signatures,
        inputs={"cleaned": mill.store.current("cleaned_corpus", partition)},
        audits=deduplication_audits.SIGNATURE_AUDITS,
    )


@mill_asset(
    step=deduplication.gather_clusters,
    audits=(*deduplication_audits.CLUSTER_AUDITS, deduplication_audits.SplitsUnchanged),
    deps=[dg.AssetDep("duplicate_signatures", partition_mapping=ALL)],
    kinds={"parquet"},
)
def duplicate_clusters(mill: Mill, partition: None) -> Build:
    """Near-duplicate clusters over all domains and snapshots, and with them the held-out split, given before anything is fitted.

    Input: duplicate_signatures, in an order that is only appended to: a split once given never changes. One link per snapshot, each
    stored on its own and made from the index of those before, so a new snapshot reads nothing of the old ones but what it matches.
    Rule: two documents are near-duplicates where their MinHash signatures agree in a band and in enough places. Cost: about 4 s for
    23,000 documents.
    """
    order = _order(mill)
    signatures = {key: mill.store.current("duplicate_signatures", key) for key in order}
    return Build(
        asset="duplicate_clusters",
        step=deduplication.gather_clusters,
        settings=mill.project.cluster_settings(order),
        inputs={"links": register_links(mill.project.cluster_settings, signatures)},
        audits=(*deduplication_audits.CLUSTER_AUDITS, deduplication_audits.SplitsUnchanged(mill.store.standing("duplicate_clusters"))),
    )


@mill_asset(
    step=deduplication.deduplicate,
    audits=deduplication_audits.DEDUPLICATION_AUDITS,
    partitions=RECIPE,
    deps=["decontaminated_corpus", "duplicate_clusters", dg.AssetDep("duplicate_signatures", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def deduplicated_corpus(mill: Mill, partition: str) -> Build:
    """One document per near-duplicate cluster, by the recipe's rule, and the split of each.

    Input: decontaminated_corpus, duplicate_clusters, duplicate_signatures. Cost: about 0.2 s for 10,000 documents.
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
        audits=deduplication_audits.DEDUPLICATION_AUDITS,
    )


def register_links(settings: Callable[[Sequence[str]], ClusterSettings], signatures: Mapping[str, Manifest]) -> tuple[Build, ...]:
    """Return the links over `signatures`, by partition in the register's order: one per run of partitions of one snapshot.

    `settings` makes the settings of partitions in order. A link holds the shares of its own domains alone, so that a new domain leaves
    the links before it as they are.
    """
    links: list[Build] = []
    for _, run in groupby(signatures, key=lambda key: split_partition(key)[1]):
        keys = tuple(run)
        whole = settings(keys)
        shares = {domain: whole.held_out[domain] for domain in sorted({split_partition(k)[0] for k in keys}) if domain in whole.held_out}
        links.append(
            Build(
                asset="duplicate_clusters.link",
                partition=keys[0],
                step=deduplication.cluster_documents,
                settings=whole.model_copy(update={"held_out": shares}),
                inputs={"signatures": tuple(signatures[key] for key in keys), "earlier": tuple(links)},
                audits=deduplication_audits.LINK_AUDITS,
            )
        )
    return tuple(links)


def _order(mill: Mill) -> list[str]:
    """Return the source partitions in the register's order: those of the last register first, new ones after them.

    Within a snapshot, domains that are held out whole come first: what resembles them is then held out with them.
    """
    held_out = mill.project.held_out

    def place(key: str) -> tuple[str, bool, str]:
        domain, snapshot = split_partition(key)
        return snapshot, held_out.get(domain, 0.0) < 1.0, domain

    present = sorted(mill.store.partitions("duplicate_signatures"), key=place)
    previous = mill.store.standing("duplicate_clusters")
    if previous is None and mill.store.is_current("duplicate_clusters"):
        warn("the last duplicate_clusters is gone from the store: splits are given anew, in the order of the snapshots")
    known = [key for key in (previous.settings["order"] if previous else []) if key in present]
    return known + [key for key in present if key not in known]
