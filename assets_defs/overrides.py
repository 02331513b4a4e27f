"""Settings that are other for one run: from the Launchpad, or by `gristmill run --set`, in the words of recipes and project.yaml.

An asset's function makes its request from the recipe and the project. An override is laid over these before it is asked, for this asset
and this run alone; so what is derived from a setting (plugins, hashes of the files that it names) follows it, and the artifact has the
address of what was asked for. The recipe's partition then stands at it, and says so, until the asset is materialized without overrides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from assets_defs.config_fields import config_field, shape
from assets_defs.resources import Mill, load_project
from pipelines import plugins
from pipelines.cleaning import CleaningSettings
from pipelines.configuration import check_project, check_recipe
from pipelines.deduplication import ClusterSettings
from pipelines.errors import GristmillError, Location, UnknownName, dotted
from pipelines.manifests import Json, Manifest
from pipelines.overrides import note, standing
from pipelines.plugins import Settings
from pipelines.progress import report_line
from pipelines.recipes import Project, Recipe
from pipelines.settings_files import SettingsFile, parse_value
from pipelines.store import Build

OF_RECIPE = {
    "quality_filtered_corpus": ("quality",),
    "toxicity_filtered_corpus": ("toxicity",),
    "decontaminated_corpus": ("decontamination",),
    "deduplicated_corpus": ("deduplication",),
    "age_splits": ("age_splits",),
    "selected_subset": ("selection",),
    "general_checkpoint": ("model", "training", "general"),
    "probe_windows": ("training", "mixture"),
    "mixture_probe": ("training", "mixture"),
    "critical_ratio": ("mixture",),
    "verification_probe": ("training", "mixture"),
    "verified_ratio": ("mixture",),
    "domain_mixture": ("mixture", "pretraining"),
    "pretrained_checkpoint": ("training", "pretraining"),
    "evaluation": ("evaluation",),
    "task_evaluation": ("evaluation",),
    "classification": ("evaluation",),
    "comparison": ("evaluation",),
}
"""The keys of a recipe that each asset's settings are made from."""
OF_PROJECT = {
    "raw_corpus": ("source_settings", "max_documents"),
    "cleaned_corpus": ("cleaning",),
    "duplicate_signatures": ("signatures",),
    "duplicate_clusters": ("clusters",),
    "filter_models": ("quality", "toxicity"),
    "quality_scores": ("quality",),
    "toxicity_scores": ("toxicity",),
    "evaluation_index": ("contamination",),
    "contamination": ("contamination",),
    "tokenizer": ("tokenizer",),
    "tokenized_shards": ("passages",),
    "embedder": ("embedder_settings", "passages"),
    "document_embeddings": ("passages",),
}
"""The keys of project.yaml that each asset's settings are made from."""
OF_DOMAINS = ("cleaning", "source_settings")
"""Keys that a domain lays over the project's: an override is laid over both."""
ABOUT = (
    "Settings of this asset that are other for this run alone, with the keys of {file}. A mapping is merged into what stands there, a list "
    "replaces it, null in the settings of a plugin takes a key away. The artifact has a fingerprint of its own; the partition stands at it "
    "until the asset is materialized without overrides."
)

Request = Callable[[Mill, Any], Build]


def overridable(asset: str) -> dict[str, dg.Field] | None:
    """Return the run config of `asset`; None where it has no settings to be overridden."""
    if asset in OF_RECIPE:
        fields = {key: config_field(Recipe, key, Recipe.model_fields[key]) for key in OF_RECIPE[asset]}
        return {"overrides": dg.Field(dg.Shape(fields), is_required=False, description=ABOUT.format(file="recipes/NAME.yaml"))}
    if asset in OF_PROJECT:
        fields = {key: _project_field(key) for key in OF_PROJECT[asset]}
        return {"overrides": dg.Field(dg.Shape(fields), is_required=False, description=ABOUT.format(file="project.yaml"))}
    return None


def _project_field(key: str) -> dg.Field:
    """Return a key of project.yaml; what is a free mapping there is typed by the settings that it becomes."""
    field, project = Project.model_fields[key], load_project()
    typed: dg.Shape | None = None
    if key == "cleaning":
        typed = shape(CleaningSettings)
    elif key == "clusters":
        typed = shape(ClusterSettings, frozenset({"held_out", "order"}))
    elif key == "embedder_settings":
        typed = shape(plugins.load("embedders", project.embedder))
    elif key in ("quality", "toxicity"):
        names = project.scored(key)  # type: ignore[arg-type]
        typed = dg.Shape({name: dg.Field(shape(plugins.load("filters", name)), is_required=False) for name in names})
    return dg.Field(typed, is_required=False, description=field.description) if typed else config_field(Project, key, field)


def overriding(asset: str, request: Request, config: Mapping[str, Any] | None) -> Request:
    """Return `request` with the overrides of run config `config`, which also remembers what they were."""
    overrides = (config or {}).get("overrides") or {}

    def asked(mill: Mill, partition: str | None) -> Build:
        build = overridden(mill, asset, request, partition, overrides) if overrides else request(mill, partition)
        note(mill.store, build, build.overrides)
        return build

    return asked


def overridden(mill: Mill, asset: str, request: Request, partition: str | None, overrides: Mapping[str, Json]) -> Build:
    """Return what `request` asks for with `overrides`; without a mark of them where they change nothing.

    Raises:
        GristmillError: an override is wrong; one line per problem.
    """
    build = request(OverriddenMill(mill, asset, partition, overrides), partition)
    if build.fingerprint() == request(mill, partition).fingerprint():
        report_line(f"{build.label}: the overrides change nothing; this is the recipe's own")
        return build
    return replace(build, overrides={dotted(at): value for at, value in _leaves(overrides)})


def check_overrides(mill: Mill, asset: str, partition: str | None, overrides: Mapping[str, Json]) -> None:
    """Refuse overrides that are no settings of `asset`, or wrong ones, before anything is started.

    Raises:
        GristmillError: one line per problem, with the nearest valid name.
    """
    known = OF_RECIPE.get(asset, OF_PROJECT.get(asset, ()))
    for key in overrides:
        if key not in known:
            raise UnknownName(f"setting of {asset}", key, known)
    seen = OverriddenMill(mill, asset, partition, overrides)
    seen.recipe(str(partition)) if asset in OF_RECIPE else seen.project  # to make them is to check them


class OverriddenMill(Mill):
    """The mill as an overridden asset sees it: another recipe, another project."""

    def __init__(self, mill: Mill, asset: str, partition: str | None, overrides: Mapping[str, Json]) -> None:
        super().__init__(mill.home, mill.engine)
        self.store = mill.store
        self._mill = mill
        self._where = f"overrides of {asset}{f'[{partition}]' if partition else ''}"
        self._of_recipe, self._of_project = (overrides, {}) if asset in OF_RECIPE else ({}, overrides)

    @property
    def project(self) -> Project:
        """The project, with what is overridden."""
        own = self._mill.project
        if not self._of_project:
            return own
        values = _laid_over(own, self._of_project)
        for domain in values["domains"].values():
            domain |= {key: _merged(domain[key], self._of_project[key]) for key in OF_DOMAINS if key in self._of_project}
        return check_project(SettingsFile(self._where, values, {}))

    def recipe(self, name: str) -> Recipe:
        """Return recipe `name`, with what is overridden."""
        own = self._mill.recipe(name)
        if not self._of_recipe:
            return own
        return check_recipe(SettingsFile(self._where, _laid_over(own, self._of_recipe), {}), self._mill.project)


def _leaves(values: Mapping[str, Json], at: Location = ()) -> Iterator[tuple[Location, Json]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _laid_over(settings: Settings, overrides: Mapping[str, Json]) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    return values | {key: _merged(values[key], value, key) for key, value in overrides.items()}


def _merged(under: Json, over: Json, key: str = "") -> Json:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    result = dict(under)
    for name, value in over.items():
        if value is None and key.endswith("settings"):
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value, name)
    return result


def override_metadata(manifest: Manifest) -> dict[str, dg.MetadataValue]:
    """Return what is shown of the overrides that an artifact, as its partition stands at it, was made with or made from."""
    found = standing(manifest)
    if not found:
        return {}
    own = manifest.label in found
    others = sorted(set(found) - {manifest.label})
    said = (
        "This run overrode settings: the partition stands at an artifact that is not its recipe's own, until it is materialized without."
        if own
        else f"Made from {', '.join(others)}, whose settings a run overrode; materialize these without overrides, then this."
    )
    return {
        "overridden": dg.MetadataValue.text(said),
        "overrides": dg.MetadataValue.json({label: dict(one) for label, one in found.items()}),
    }


def parsed(settings: list[str]) -> dict[str, dict[str, Json]]:
    """Return ``ASSET.KEY.KEY=VALUE`` as overrides by asset; values are YAML.

    Raises:
        GristmillError: one of them is not of that form, or names no asset that has settings.
    """
    found: dict[str, dict[str, Json]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        asset, *keys = path.split(".")
        if not equals or not keys or "" in keys:
            raise GristmillError(f"--set {setting}: give ASSET.KEY=VALUE, as in selected_subset.selection.budget.target.fraction=0.4")
        if asset not in OF_RECIPE and asset not in OF_PROJECT:
            raise UnknownName("asset with settings", asset, [*OF_RECIPE, *OF_PROJECT])
        within = found.setdefault(asset, {})
        for key in keys[:-1]:
            within = within.setdefault(key, {})
        within[keys[-1]] = parse_value(text)
    return found
