"""filter_models, fitted once; quality_scores and toxicity_scores by source; the two filtered corpora by recipe."""

from collections.abc import Iterable

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill, load_project
from pipelines import decisions, filtering, plugins
from pipelines import filter_models as models
from pipelines.documents import split_partition
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.filters import FittedFilter
from pipelines.manifests import Manifest
from pipelines.recipes import Stage
from pipelines.store import Build


def _modules(names: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of filters: the code version of an asset is that of the filters that the project has it run."""
    return tuple(f"pipelines.filters.{name}" for name in names)


@mill_asset(
    step=models.collect_models,
    audits=models.COLLECT_AUDITS,
    deps=[dg.AssetDep("cleaned_corpus", partition_mapping=ALL), "duplicate_clusters"],
    kinds={"numpy"},
    plugins=_modules(settings.filter for settings in load_project().fitted()),
)
def filter_models(mill: Mill, partition: None) -> Build:
    """What the fitted filters of the project have learned; nothing where no such filter is switched on.

    Input: the training split of the pinned sample (`fit_on` in project.yaml), of the domains that each filter names, and the files
    that it names. Cost: about 5 s for perplexity on 6,000 documents; it grows with the sample.
    """
    wanted = mill.project.fitted()
    return Build(
        asset="filter_models",
        step=models.collect_models,
        settings=models.ModelsSettings(filters=tuple(settings.filter for settings in wanted)),
        inputs={"models": tuple(_model(mill, settings) for settings in wanted)},
        audits=models.COLLECT_AUDITS,
    )


@mill_asset(
    step=filtering.collect_scores,
    audits=filtering.SCORE_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus", "filter_models"],
    kinds={"parquet"},
    plugins=_modules(load_project().scored("quality")),
)
def quality_scores(mill: Mill, partition: str) -> Build:
    """The score of every quality rule for every document, kept or not: thresholds belong to recipes.

    Input: cleaned_corpus, filter_models. Each filter is scored and stored on its own, so a changed rule or model re-scores that
    filter alone. Cost: about 400 documents per second and core with all filters of the sample's project.
    """
    return _scores(mill, "quality", partition)


@mill_asset(
    step=filtering.collect_scores,
    audits=filtering.SCORE_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus", "filter_models"],
    kinds={"parquet", "scikitlearn"},
    plugins=_modules(load_project().scored("toxicity")),
)
def toxicity_scores(mill: Mill, partition: str) -> Build:
    """Toxicity of every document: a classifier's probability (document and worst sentence), a word list's share; and its topics.

    Input: cleaned_corpus, filter_models. Each filter is scored and stored on its own. Cost: about 700 documents per second and
    core.
    """
    return _scores(mill, "toxicity", partition)


@mill_asset(
    step=decisions.filter_corpus,
    audits=decisions.FILTER_AUDITS,
    partitions=RECIPE,
    deps=[dg.AssetDep("quality_scores", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def quality_filtered_corpus(mill: Mill, partition: str) -> Build:
    """Which documents pass the recipe's quality thresholds, and for every other one all rules it failed, with score and threshold.

    Input: quality_scores of the recipe's domains and snapshots; no text is read. Rule: score >= or <= threshold, by domain. Cost:
    about 0.3 s for 11,000 documents.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="quality_filtered_corpus",
        partition=partition,
        step=decisions.filter_corpus,
        settings=recipe.filter_settings(mill.project, "quality"),
        inputs={"scores": mill.sources("quality_scores", recipe)},
        audits=decisions.FILTER_AUDITS,
    )


@mill_asset(
    step=decisions.filter_corpus,
    audits=decisions.FILTER_AUDITS,
    partitions=RECIPE,
    deps=["quality_filtered_corpus", dg.AssetDep("toxicity_scores", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def toxicity_filtered_corpus(mill: Mill, partition: str) -> Build:
    """Which of the documents that passed the quality filter pass the recipe's toxicity thresholds.

    Input: toxicity_scores and quality_filtered_corpus. Rule: score <= threshold, by domain. Cost: about 0.3 s for 11,000 documents;
    no text is read.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="toxicity_filtered_corpus",
        partition=partition,
        step=decisions.filter_corpus,
        settings=recipe.filter_settings(mill.project, "toxicity"),
        inputs={"scores": mill.sources("toxicity_scores", recipe), "previous": mill.store.current("quality_filtered_corpus", partition)},
        audits=decisions.FILTER_AUDITS,
    )


def _scores(mill: Mill, stage: Stage, partition: str) -> Build:
    domain, snapshot = split_partition(partition)
    cleaned = mill.store.current("cleaned_corpus", partition)
    families = tuple(
        Build(
            asset=f"{stage}_scores.{settings.filter}",
            partition=partition,
            step=filtering.score_documents,
            settings=filtering.located(settings, mill.root),
            inputs={"cleaned": cleaned, **_fitted(mill, settings)},
            **_identity(settings.filter),
        )
        for settings in mill.project.score_settings(stage)
    )
    return Build(
        asset=f"{stage}_scores",
        partition=partition,
        step=filtering.collect_scores,
        settings=filtering.CollectSettings(domain=domain, snapshot=snapshot),
        inputs={"cleaned": cleaned, "families": families},
        audits=filtering.SCORE_AUDITS,
    )


def _model(mill: Mill, settings: models.FitSettings) -> Build:
    """Return the request for the model of one filter: only the domains that it names are among its inputs."""
    plugin: FittedFilter = plugins.build("filters", settings.filter, settings.settings).at(mill.root)  # type: ignore[attr-defined]
    sample = tuple(manifest for manifest in mill.fit_sample() if split_partition(str(manifest.partition))[0] in plugin.domains())
    return Build(
        asset=f"filter_models.{settings.filter}",
        step=models.fit_filter,
        settings=settings.model_copy(update={"files": file_hashes(plugin.files(), mill.root), "root": mill.root}),
        inputs={"sample": sample, "splits": mill.splits([str(manifest.partition) for manifest in sample])},
        audits=models.MODEL_AUDITS,
        **_identity(settings.filter),
    )


def _fitted(mill: Mill, settings: filtering.ScoreSettings) -> dict[str, Manifest]:
    """Return the model of a fitted filter, as filter_models stands: scores follow what was materialized there.

    Raises:
        GristmillError: filter_models has no model of this filter, or one that was fitted with other settings.
    """
    if not issubclass(plugins.load("filters", settings.filter), FittedFilter):
        return {}
    references = mill.store.current("filter_models").inputs["models"]
    address = next((r.fingerprint for r in references if r.asset == f"filter_models.{settings.filter}"), None)
    model = mill.store.find(f"filter_models.{settings.filter}", address) if address else None
    if model is None or model.settings["settings"] != settings.model_dump(mode="json")["settings"]:
        raise GristmillError(f"filter_models holds no {settings.filter} fitted with these settings; materialize filter_models (job `fit`)")
    return {"model": model}


def _identity(name: str) -> dict[str, tuple[str, ...]]:
    return {"plugins": (f"pipelines.filters.{name}",), "packages": plugins.load("filters", name).packages}  # type: ignore[attr-defined]
