"""evaluation_index, over the evaluation sets; contamination by source; decontaminated_corpus by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill, in_time_order
from pipelines import contamination as step
from pipelines import decisions
from pipelines.documents import split_partition
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest, Member
from pipelines.store import Build


@mill_asset(
    step=step.index_evaluation_sets,
    audits=step.INDEX_AUDITS,
    deps=[dg.AssetDep("cleaned_corpus", partition_mapping=ALL)],
    kinds={"parquet"},
)
def evaluation_index(mill: Mill, partition: None) -> Build:
    """The texts of every evaluation set of the project, from files and from whole domains.

    Input: the files of `evaluation_sets` in project.yaml, cleaned_corpus of the domains that they name. Cost: about 2 s for BLiMP
    and WikiText-2.
    """
    sets = mill.project.evaluation_sets
    domains = {chosen.domain for chosen in sets.values() if chosen.domain}
    keys = in_time_order([key for key in mill.store.partitions("cleaned_corpus") if split_partition(key)[0] in domains])
    if missing := sorted(domains - {split_partition(key)[0] for key in keys}):
        raise GristmillError(f"evaluation set of domain {missing[0]!r}: cleaned_corpus holds none of it; ingest it first (job `ingest`)")
    return Build(
        asset="evaluation_index",
        step=step.index_evaluation_sets,
        settings=step.index_settings(sets, mill.project.contamination, mill.root),
        inputs={"corpora": tuple(mill.store.current("cleaned_corpus", key) for key in keys)},
        audits=step.INDEX_AUDITS,
    )


@mill_asset(
    step=step.measure_contamination,
    audits=step.CONTAMINATION_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus", "evaluation_index"],
    kinds={"parquet"},
)
def contamination(mill: Mill, partition: str) -> Build:
    """For every document, the word n-grams that it shares with an evaluation set, and the stretches of text where they stand.

    Input: cleaned_corpus, evaluation_index. Cost: about 25 MB of text per CPU-second.
    """
    domain, snapshot = split_partition(partition)
    return Build(
        asset="contamination",
        partition=partition,
        step=step.measure_contamination,
        settings=step.ContaminationSettings(domain=domain, snapshot=snapshot, **mill.project.contamination.model_dump()),
        inputs={"cleaned": mill.store.current("cleaned_corpus", partition), "items": _items(mill)},
        audits=step.CONTAMINATION_AUDITS,
    )


@mill_asset(
    step=decisions.filter_corpus,
    audits=decisions.FILTER_AUDITS,
    partitions=RECIPE,
    deps=["toxicity_filtered_corpus", dg.AssetDep("contamination", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def decontaminated_corpus(mill: Mill, partition: str) -> Build:
    """Which of the documents that passed the filters hold no text of an evaluation set, by the recipe's limits.

    Input: contamination and toxicity_filtered_corpus. Domains that are evaluated on stay as they are. Rule: a document goes where
    it shares more n-grams with an evaluation set than the limits of `decontamination` allow. Cost: about 0.2 s for 10,000
    documents; no text is read.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="decontaminated_corpus",
        partition=partition,
        step=decisions.filter_corpus,
        settings=recipe.decontamination_settings(mill.project),
        inputs={
            "scores": _of_one_index(mill, mill.sources("contamination", recipe)),
            "previous": mill.store.current("toxicity_filtered_corpus", partition),
        },
        audits=decisions.FILTER_AUDITS,
    )


def _items(mill: Mill) -> Member:
    """Return the evaluation texts: an index of the same texts leaves what was measured valid."""
    return Member(manifest=mill.store.current("evaluation_index"), name=step.ITEMS)


def _of_one_index(mill: Mill, measured: tuple[Manifest, ...]) -> tuple[Manifest, ...]:
    """Return `measured`, all of the evaluation texts that stand today.

    Raises:
        GristmillError: a partition was measured against others.
    """
    wanted = _items(mill).reference().identity
    for manifest in measured:
        if [reference.identity for reference in manifest.inputs["items"]] != [wanted]:
            raise GristmillError(f"{manifest.label} was measured against other evaluation sets; materialize it again (job `measure`)")
    return measured
