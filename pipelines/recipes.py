"""The project file and the recipes: read, checked in full, and turned into the settings of every step.

`project.yaml` says what is measured: domains, their sources, how text is cleaned, which scores are taken. A recipe says
what is decided: roles, thresholds, selection, model, mixture, training. Every problem in a file is listed at once.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from pipelines import plugins
from pipelines.cleaning import CleaningSettings
from pipelines.deduplication import ClusterSettings, DeduplicationSettings, SignatureSettings
from pipelines.embedding import EmbedderSettings, EmbeddingSettings
from pipelines.errors import GristmillError, UnknownName, suggestion
from pipelines.evaluation import EvaluationSettings
from pipelines.filtering import FilterSettings, ScoreSettings, Threshold, default_thresholds
from pipelines.manifests import Json
from pipelines.mixture import MixtureSettings, RatioSettings
from pipelines.plugins import Settings
from pipelines.selection import Budget, SelectionSettings
from pipelines.tokenization import PassageSettings, TokenizerSettings
from pipelines.training import GeneralSettings, ModelSettings, Phase, ProbeSettings, TrainingSettings

Role = Literal["general", "target", "evaluation"]
Stage = Literal["quality", "toxicity"]
Switch = Literal["off"] | bool
Filters = dict[str, dict[str, Json] | Switch | None]
"""Filter name to its settings and thresholds, or ``off``."""

COMPILE_PAYS_FLOPS = 6e14
"""torch.compile costs about 25 CPU-seconds once and saves a seventh of the time: above about 200 s at 60 GFLOP/s times 6."""


class DomainSettings(Settings):
    """One domain of the project."""

    source: str | None = None
    """A plugin of `sources/`; the project's source where absent."""
    source_settings: dict[str, Json] = Field(default_factory=dict)
    """Laid over the project's."""
    held_out: float = Field(default=0.1, ge=0, le=1)
    """Share of near-duplicate clusters held out before anything is fitted."""
    cleaning: dict[str, Json] = Field(default_factory=dict)
    """Laid over the project's."""
    quality: Filters = Field(default_factory=dict)
    """Thresholds for this domain, laid over the project's; a filter or a rule can be ``off``."""
    toxicity: Filters = Field(default_factory=dict)
    """As `quality`."""


class Project(Settings):
    """What is measured, for every recipe alike."""

    name: str
    """Name of the project: the MLflow experiment."""
    first_snapshot: str = Field(pattern=r"^\d{4}-\d{2}-01$")
    """The first collection month."""
    snapshots: tuple[str, ...] = Field(min_length=1)
    """The collection months that hold documents: what a recipe means by ``all``, unless newer ones were ingested."""
    fit_on: tuple[str, ...]
    """Snapshots of the pinned sample that tokenizer and embedder are fitted on."""
    source: str
    """The default source plugin."""
    source_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the default source; ``{domain}`` and ``{snapshot}`` stand for the partition."""
    max_documents: int | None = None
    """At most this many documents per partition."""
    cleaning: dict[str, Json] = Field(default_factory=dict)
    """Settings of `cleaned_corpus`."""
    quality: Filters
    """Filters scored for quality."""
    toxicity: Filters
    """Filters scored for toxicity."""
    signatures: SignatureSettings = SignatureSettings()
    """MinHash signatures."""
    clusters: dict[str, Json] = Field(default_factory=dict)
    """Settings of the near-duplicate clusters, but `held_out` and the order."""
    passages: PassageSettings = PassageSettings()
    """The unit of selection."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """The tokenizer."""
    embedder: str = "static_words"
    """A plugin of `embedders/`."""
    embedder_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the embedder."""
    domains: dict[str, DomainSettings]
    """The domains."""

    def domain(self, name: str) -> DomainSettings:
        """Return domain `name`.

        Raises:
            UnknownName: the message names the nearest domain.
        """
        if name not in self.domains:
            raise UnknownName("domain", name, self.domains)
        return self.domains[name]

    def source_of(self, name: str) -> tuple[str, dict[str, Json]]:
        """Return the source plugin of domain `name` and its settings."""
        domain = self.domain(name)
        if domain.source and domain.source != self.source:
            return domain.source, dict(domain.source_settings)
        return self.source, {**self.source_settings, **domain.source_settings}

    def cleaning_of(self, name: str) -> CleaningSettings:
        """Return how text of domain `name` is cleaned."""
        return plugins.validate(
            CleaningSettings, {**self.cleaning, **self.domain(name).cleaning}, where=f"project.yaml: cleaning of {name}"
        )

    def scored(self, stage: Stage) -> tuple[str, ...]:
        """Return the filters of `stage` that are scored: those that the project or a domain has switched on."""
        layers = [getattr(self, stage), *(getattr(domain, stage) for domain in self.domains.values())]
        return tuple(dict.fromkeys(name for layer in layers for name, values in layer.items() if not _is_off(values)))

    def score_settings(self, stage: Stage) -> list[ScoreSettings]:
        """Return the settings of each filter of `stage`, thresholds left out: they belong to the recipes."""
        found = []
        for name in self.scored(stage):
            fields = plugins.load("filters", name).model_fields
            values = _mapping(getattr(self, stage).get(name))
            found.append(ScoreSettings(filter=name, settings={k: v for k, v in values.items() if k in fields}))
        return found

    @cached_property
    def held_out(self) -> dict[str, float]:
        return {name: domain.held_out for name, domain in sorted(self.domains.items())}

    def cluster_settings(self, order: Iterable[str]) -> ClusterSettings:
        """Return the settings of the near-duplicate clusters over partitions in `order`."""
        return plugins.validate(
            ClusterSettings, {**self.clusters, "held_out": self.held_out, "order": tuple(order)}, where="project.yaml: clusters"
        )

    def embedder_fit(self) -> EmbedderSettings:
        """Return what the embedder is fitted with."""
        return EmbedderSettings(embedder=self.embedder, settings=self.embedder_settings, max_characters=self.passages.max_characters)

    def embedding(self) -> EmbeddingSettings:
        """Return how passages are embedded."""
        return EmbeddingSettings(max_characters=self.passages.max_characters)


class StageSettings(Settings):
    """A filter stage of a recipe."""

    mode: Literal["keep", "off", "inverse"] = "keep"
    """`inverse` keeps what would be dropped, for the studies of A Pretrainer's Guide (2305.13169)."""
    filters: Filters = Field(default_factory=dict)
    """Thresholds laid over the project's, for every domain."""
    domains: dict[str, Filters] = Field(default_factory=dict)
    """Thresholds by domain, laid over all others."""


class Roles(Settings):
    """What each domain is there for; the others are ignored."""

    general: tuple[str, ...] = Field(min_length=1)
    """What the model should not forget."""
    target: tuple[str, ...] = Field(min_length=1)
    """What it should learn."""
    evaluation: tuple[str, ...] = ()
    """Only measured on."""


class Selection(Settings):
    """Which passages are trained on."""

    function: str = "facility_location"
    """A plugin of `set_functions/`."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the set function."""
    budget: dict[Literal["general", "target"], Budget]
    """Share of the tokens of the role, or a number of tokens."""
    seed: int = 0
    """Of the random baseline and of random set functions."""


class Training(Settings):
    """What all runs of the recipe share."""

    sequence_length: int = 128
    """Positions per window."""
    batch_sequences: int = 16
    """Windows per step."""
    optimizer: str = "adamw"
    """A plugin of `optimizers/`."""
    optimizer_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the optimizer."""
    threads: int = 2
    """Torch threads of a checkpoint's run; probes use one each and run side by side."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles where a C++ compiler is installed and the run is long enough to repay it."""
    seed: int = 0
    """Of weights and data order."""


class Mixture(Settings):
    """How the critical ratio is measured and used."""

    ratios: tuple[float, ...] = Field(min_length=1)
    """Target shares that are probed."""
    seeds: tuple[int, ...] = (0,)
    """Data-order seeds of the probes."""
    phase: Phase
    """The plan of a probe."""
    measure_at: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of a probe after which it is measured."""
    windows: dict[Literal["general", "target"], int] = Field(default_factory=lambda: {"general": 640, "target": 240})
    """Held-out windows per corpus."""
    estimate: RatioSettings = RatioSettings()
    """The law, the tolerance and what to do on refusal."""
    use: Literal["estimate", "safe"] = "estimate"
    """`safe` takes the lower end of the interval."""
    ratio: float | None = None
    """A fixed target share instead of the measured one."""
    max_epochs: float = 4.0
    """A domain read more often is reported."""


class Evaluation(Settings):
    """What is measured at the end."""

    evaluator: str = "held_out_loss"
    """A plugin of `evaluators/`."""
    evaluator_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the evaluator."""
    max_tokens_per_domain: int = 120_000
    """Held-out tokens read per domain."""


class Recipe(Settings):
    """One experiment: every decision from filters to evaluation."""

    description: str
    """What the recipe is for, in a sentence."""
    roles: Roles
    """Domains by role."""
    snapshots: Literal["all"] | tuple[str, ...] = "all"
    """Collection months taken, as ``YYYY-MM-01``."""
    quality: StageSettings = StageSettings()
    """The quality filter."""
    toxicity: StageSettings = StageSettings()
    """The toxicity filter."""
    deduplication: DeduplicationSettings = DeduplicationSettings()
    """Which copy survives."""
    selection: Selection
    """Which passages are trained on."""
    model: ModelSettings
    """The model."""
    training: Training = Training()
    """Shared by all runs."""
    general: Phase
    """The plan of the general checkpoint."""
    mixture: Mixture
    """Probes and critical ratio."""
    pretraining: tuple[Phase, ...] = Field(min_length=1)
    """The plan of the pretrained checkpoint, on the domain mixture."""
    evaluation: Evaluation = Evaluation()
    """What is measured at the end."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains with a role, sorted."""
        return tuple(sorted(self.role_of))

    @property
    def role_of(self) -> dict[str, Role]:
        """Domain to role."""
        return {domain: role for role in ("general", "target", "evaluation") for domain in getattr(self.roles, role)}

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the probes: ``r0.50-s0``."""
        return tuple(f"r{ratio:.2f}-s{seed}" for ratio in self.mixture.ratios for seed in self.mixture.seeds)

    def filter_settings(self, project: Project, stage: Stage) -> FilterSettings:
        """Return the thresholds of `stage` for every domain of the recipe."""
        mine: StageSettings = getattr(self, stage)
        thresholds = {}
        for domain in self.domains:
            layers = (getattr(project, stage), getattr(project.domain(domain), stage), mine.filters, mine.domains.get(domain, {}))
            thresholds[domain] = resolve_thresholds(layers)
        return FilterSettings(mode=mine.mode, thresholds=thresholds)

    def selection_settings(self) -> SelectionSettings:
        """Return the settings of the subset selection."""
        roles = {domain: role for domain, role in self.role_of.items() if role != "evaluation"}
        return SelectionSettings(
            function=self.selection.function,
            settings=self.selection.settings,
            roles=roles,
            budget=self.selection.budget,
            seed=self.selection.seed,
        )

    def general_settings(self) -> GeneralSettings:
        """Return the run of the general checkpoint."""
        return GeneralSettings(model=self.model, phases=(self.general,), **self._run((self.general,), self.training.threads))

    def probe_settings(self, probe: str) -> ProbeSettings:
        """Return the run of probe `probe`.

        Raises:
            UnknownName: the recipe has no such probe.
        """
        if probe not in self.probes:
            raise UnknownName("probe", probe, self.probes)
        ratio, seed = probe[1:].split("-s")
        run = self._run((self.mixture.phase,), threads=1) | {"seed": int(seed)}
        return ProbeSettings(
            phases=(self.mixture.phase,), ratio=float(ratio), measure_at=self.mixture.measure_at, windows=dict(self.mixture.windows), **run
        )

    def pretraining_settings(self) -> TrainingSettings:
        """Return the run of the pretrained checkpoint."""
        return TrainingSettings(phases=self.pretraining, **self._run(self.pretraining, self.training.threads))

    def mixture_settings(self) -> MixtureSettings:
        """Return how the mixture is put together."""
        tokens = sum(phase.tokens for phase in self.pretraining)
        return MixtureSettings(use=self.mixture.use, ratio=self.mixture.ratio, tokens=tokens, max_epochs=self.mixture.max_epochs)

    def evaluation_settings(self) -> EvaluationSettings:
        """Return what is measured at the end."""
        return EvaluationSettings(roles=dict(self.role_of), threads=self.training.threads, **self.evaluation.model_dump())

    def _run(self, phases: tuple[Phase, ...], threads: int) -> dict[str, Json]:
        shared = self.training.model_dump(exclude={"threads", "compile"})
        return {**shared, "threads": threads, "compile": self._compiles(phases)}

    def _compiles(self, phases: tuple[Phase, ...]) -> bool:
        if self.training.compile != "auto":
            return self.training.compile == "on"
        width, layers = self.model.hidden_size, self.model.num_layers
        parameters = layers * (4 * width**2 + 3 * width * self.model.intermediate_size)
        flops = 6 * parameters * sum(phase.tokens for phase in phases)
        return flops > COMPILE_PAYS_FLOPS and shutil.which("c++") is not None


def resolve_thresholds(layers: Iterable[Filters]) -> dict[str, Threshold]:
    """Lay filter settings over each other, the last on top, and return the thresholds that remain, in rule order."""
    filters: dict[str, dict[str, Json]] = {}
    off: set[str] = set()
    for layer in layers:
        for name, values in layer.items():
            if _is_off(values):
                off.add(name)
                continue
            off.discard(name)
            filters[name] = {**filters.get(name, {}), **_mapping(values)}
    found: dict[str, Threshold] = {}
    for name in filters:
        if name in off:
            continue
        for rule, threshold in default_thresholds(name).items():
            value = filters[name].get(rule.partition(".")[2], threshold.value)
            if not _is_off(value):
                found[rule] = threshold.model_copy(update={"value": float(value)})
    return found


def read_project(path: Path) -> Project:
    """Read and check the project file.

    Raises:
        GristmillError: one line per problem.
    """
    project = plugins.validate(Project, _read_yaml(path), where=path.name)
    problems = []
    for stage in ("quality", "toxicity"):
        problems += _filter_problems(f"{path.name}: {stage}", getattr(project, stage), fields=True)
        for name, domain in project.domains.items():
            problems += _filter_problems(f"{path.name}: domains.{name}.{stage}", getattr(domain, stage), fields=False)
    problems += _plugin_problems(path.name, [("embedders", project.embedder, project.embedder_settings)])
    for name in project.domains:
        problems += _attempt(lambda name=name: project.cleaning_of(name))
        problems += _plugin_problems(f"{path.name}: domains.{name}", [("sources", *project.source_of(name))])
    problems += _attempt(lambda: project.cluster_settings(()))
    _raise(problems)
    return project


def read_recipe(path: Path, project: Project) -> Recipe:
    """Read one recipe file and check it against `project`.

    Raises:
        GristmillError: one line per problem.
    """
    where = path.name
    recipe, problems = _read_recipe_settings(path)
    for domain in recipe.domains:
        if domain not in project.domains:
            problems.append(f"{where}: roles: unknown domain {domain!r}{suggestion(domain, project.domains)}")
    names = [domain for role in ("general", "target", "evaluation") for domain in getattr(recipe.roles, role)]
    problems += [f"{where}: roles: {name} has two roles; give it one" for name in sorted({n for n in names if names.count(n) > 1})]
    for stage in ("quality", "toxicity"):
        mine: StageSettings = getattr(recipe, stage)
        problems += _filter_problems(f"{where}: {stage}.filters", mine.filters, fields=False)
        unscored = sorted(
            {n for layer in (mine.filters, *mine.domains.values()) for n in layer}
            & set(plugins.names("filters")) - set(project.scored(stage))
        )
        problems += [f"{where}: {stage}: {name} is not scored; add it under `{stage}` in project.yaml" for name in unscored]
        for domain, filters in mine.domains.items():
            if domain not in recipe.domains:
                problems.append(f"{where}: {stage}.domains: unknown domain {domain!r}{suggestion(domain, recipe.domains)}")
            problems += _filter_problems(f"{where}: {stage}.domains.{domain}", filters, fields=False)
    phases = (recipe.general, recipe.mixture.phase, *recipe.pretraining)
    wanted = [("set_functions", recipe.selection.function, recipe.selection.settings)]
    wanted += [("optimizers", recipe.training.optimizer, recipe.training.optimizer_settings)]
    wanted += [("objectives", phase.objective, {}) for phase in phases]
    wanted += [("schedules", phase.schedule, phase.schedule_settings) for phase in phases]
    wanted += [("mixing_laws", name, {}) for name in (recipe.mixture.estimate.law, recipe.mixture.estimate.cross_check)]
    wanted += [("evaluators", recipe.evaluation.evaluator, recipe.evaluation.evaluator_settings)]
    problems += _plugin_problems(where, wanted)
    problems += [f"{where}: mixture.ratios: {r} is not in [0, 1]" for r in recipe.mixture.ratios if not 0 <= r <= 1]
    problems += [
        f"{where}: mixture.ratios: {r} has more than the two decimals that name a probe" for r in recipe.mixture.ratios if round(r, 2) != r
    ]
    problems += [f"{where}: mixture: probe {p} is asked for twice" for p in recipe.probes if recipe.probes.count(p) > 1]
    problems += [
        f"{where}: selection.budget: no budget for role {role!r}" for role in ("general", "target") if role not in recipe.selection.budget
    ]
    _raise(list(dict.fromkeys(problems)))
    return recipe


def _read_recipe_settings(path: Path) -> tuple[Recipe, list[str]]:
    """Return the recipe in `path` without the keys that are wrong in it, and a line for each of them.

    Raises:
        GristmillError: one line per problem, where nothing can be read without these keys.
    """
    values = _read_yaml(path)
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        problems = plugins.problems(error, Recipe, where=path.name)
        values = copy.deepcopy(values)
        for item in error.errors():
            _remove(values, item["loc"])
    try:
        return Recipe.model_validate(values), problems
    except ValidationError:
        raise GristmillError("\n".join(problems)) from None


def _remove(values: Json, location: tuple[int | str, ...]) -> None:
    """Take the key at `location` out of `values`, where there is such a key."""
    for part in location[:-1]:
        values = values[part] if isinstance(values, dict) and part in values else None
    if isinstance(values, dict):
        values.pop(location[-1], None)


def read_recipes(directory: Path, project: Project) -> dict[str, Recipe]:
    """Read every ``*.yaml`` in `directory`; the file's name is the recipe's.

    Raises:
        GristmillError: the problems of all files, one line each.
    """
    recipes, problems = {}, []
    for path in sorted(directory.glob("*.yaml")):
        try:
            recipes[path.stem] = read_recipe(path, project)
        except GristmillError as error:
            problems.append(str(error))
    _raise(problems)
    if not recipes:
        raise GristmillError(f"no recipe in {directory}; a recipe is a file recipes/NAME.yaml")
    return recipes


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of YAML 1.2, where ``off`` is a word, and with dates as text."""


_BOOL, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _read_yaml(path: Path) -> Mapping[str, Json]:
    if not path.exists():
        raise GristmillError(f"{path} does not exist; run from the directory that holds project.yaml, or set GRISTMILL_PROJECT")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GristmillError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise GristmillError(f"{path.name} holds no mapping of keys to values")
    return content


def _is_off(value: object) -> bool:
    return value is False or value == "off"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(values: object) -> dict[str, Json]:
    return dict(values) if isinstance(values, Mapping) else {}


def _filter_problems(where: str, filters: Filters, *, fields: bool) -> list[str]:
    """Return what is wrong with `filters`; `fields` says whether a filter's own settings may stand beside thresholds."""
    problems = []
    for name, values in filters.items():
        if name not in plugins.names("filters"):
            problems.append(f"{where}: unknown filter {name!r}{suggestion(name, plugins.names('filters'))}")
            continue
        plugin = plugins.load("filters", name)
        rules = {rule.partition(".")[2] for rule in default_thresholds(name)}
        known = rules | set(plugin.model_fields) if fields else rules
        for key, value in _mapping(values).items():
            if key not in known:
                problems.append(f"{where}.{name}: unknown rule {key!r}{suggestion(key, known)}")
            elif key in rules and not _is_off(value) and not _is_number(value):
                problems.append(f"{where}.{name}.{key}: {value!r} is not a number or off")
        if fields:
            own = {k: v for k, v in _mapping(values).items() if k in plugin.model_fields}
            problems += _attempt(lambda plugin=plugin, own=own, name=name: plugins.validate(plugin, own, where=f"{where}.{name}"))
    return problems


def _plugin_problems(where: str, wanted: Iterable[tuple[str, str, Mapping[str, Json]]]) -> list[str]:
    return [
        f"{where}: {line}"
        for kind, name, settings in wanted
        for line in _attempt(lambda k=kind, n=name, s=settings: plugins.build(k, n, s))
    ]


def _attempt(check: object) -> list[str]:
    try:
        check()  # type: ignore[operator]
    except GristmillError as error:
        return str(error).splitlines()
    return []


def _raise(problems: list[str]) -> None:
    if problems:
        raise GristmillError("\n".join(problems))
