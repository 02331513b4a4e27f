"""The project file and the recipes: read, checked in full, and turned into the settings of every step.

`project.yaml` says what is measured: domains, their sources, how text is cleaned, which scores are taken. A recipe says
what is decided: roles, thresholds, selection, model, mixture, training. Every problem in a file is listed at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from pipelines import plugins
from pipelines.age_splits import AgeSplitSettings
from pipelines.classification import ClassificationSettings
from pipelines.cleaning import CleaningSettings
from pipelines.comparison import ComparisonSettings
from pipelines.contamination import DecontaminationSettings, EvaluationSet, NgramSettings
from pipelines.decisions import FilterSettings, Threshold, default_thresholds
from pipelines.deduplication import ClusterSettings, DeduplicationSettings, SignatureSettings
from pipelines.embedding import EmbedderSettings, EmbeddingSettings
from pipelines.errors import GristmillError, UnknownName
from pipelines.evaluation import EvaluationSettings
from pipelines.filter_models import FitSettings
from pipelines.filtering import ScoreSettings
from pipelines.filters import FittedFilter
from pipelines.manifests import Json, settings_fingerprint
from pipelines.mixture import MixtureSettings
from pipelines.models import ModelSettings
from pipelines.plan import Phase, PhaseMixture, RunSettings, SampleSettings, TrainingSettings, ValidationSettings
from pipelines.plugins import Settings
from pipelines.probing import ProbeSettings, WindowSettings
from pipelines.recipe_evaluation import Evaluation
from pipelines.recipe_mixture import Mixture
from pipelines.selection import SelectionChoices, SelectionSettings
from pipelines.task_evaluation import TaskEvaluationSettings
from pipelines.tokenization import PassageSettings, TokenizerSettings
from pipelines.training import AdoptionSettings, GeneralSettings

Role = Literal["general", "target", "evaluation"]
Stage = Literal["quality", "toxicity"]
Switch = Literal["off"] | bool
Filters = dict[str, dict[str, Json] | Switch | None]
"""Filter name to its settings and thresholds, or ``off``."""

COMPILE_PAYS_FLOPS = 2e13
"""torch.compile costs about 25 CPU seconds once and saves a tenth of the time: it pays above some 300 s at 60 GFLOP/s."""


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
    evaluation_sets: dict[str, EvaluationSet] = Field(default_factory=dict)
    """Texts that no training document may hold."""
    contamination: NgramSettings = NgramSettings()
    """How they are looked for."""
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
        return tuple(dict.fromkeys(name for layer in layers for name, values in layer.items() if not is_off(values)))

    def score_settings(self, stage: Stage) -> list[ScoreSettings]:
        """Return the settings of each filter of `stage`, thresholds left out: they belong to the recipes."""
        found = []
        for name in self.scored(stage):
            fields = plugins.load("filters", name).model_fields
            values = mapping(getattr(self, stage).get(name))
            found.append(ScoreSettings(filter=name, settings={k: v for k, v in values.items() if k in fields}))
        return found

    def fitted(self) -> tuple[FitSettings, ...]:
        """Return the settings of each filter that is fitted before it scores."""
        wanted = {stage: self.score_settings(stage) for stage in ("quality", "toxicity")}
        every = [FitSettings(filter=s.filter, settings=s.settings) for found in wanted.values() for s in found]
        fitted = [s for s in every if issubclass(plugins.load("filters", s.filter), FittedFilter)]
        found = {s.filter: s for s in fitted}
        if twice := [s.filter for s in fitted if s != found[s.filter]]:
            raise GristmillError(f"project.yaml: {twice[0]} has other settings for quality than for toxicity; it is fitted once, give one")
        return tuple(found.values())

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


class Selection(SelectionChoices):
    """Which passages are trained on."""


class Training(RunSettings):
    """What all runs of the recipe share."""

    threads: int = Field(default=2, ge=1)
    """Torch threads of a checkpoint's run; probes use one each and run side by side."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles where a C++ compiler is installed and the run is long enough to repay it."""


class Recipe(Settings):
    """One experiment: every decision from filters to evaluation."""

    description: str
    """What the recipe is for, in a sentence."""
    roles: Roles
    """Domains by role."""
    snapshots: Literal["all"] | tuple[Annotated[str, Field(pattern=r"^\d{4}-\d{2}-01$")], ...] = "all"
    """Collection months taken, as ``YYYY-MM-01``."""
    quality: StageSettings = StageSettings()
    """The quality filter."""
    toxicity: StageSettings = StageSettings()
    """The toxicity filter."""
    decontamination: DecontaminationSettings = DecontaminationSettings()
    """Which documents are dropped for holding text of an evaluation set."""
    deduplication: DeduplicationSettings = DeduplicationSettings()
    """Which copy survives."""
    age_splits: AgeSplitSettings = AgeSplitSettings()
    """The periods of studies in time."""
    selection: Selection
    """Which passages are trained on."""
    model: ModelSettings
    """The model."""
    training: Training = Training()
    """Shared by all runs."""
    general: Phase | None = Field(default=None, validate_default=True)
    """The plan of the general checkpoint; None takes `model.checkpoint` as it is."""
    mixture: Mixture
    """Probes and critical ratio."""
    pretraining: tuple[Phase, ...] = Field(min_length=1)
    """The plan of the pretrained checkpoint, on the domain mixture."""
    evaluation: Evaluation = Evaluation()
    """What is measured at the end."""

    @field_validator("general")
    @classmethod
    def _there_is_a_base(cls, general: Phase | None, info: ValidationInfo) -> Phase | None:
        model = info.data.get("model")
        if general is None and model is not None and model.checkpoint is None:
            raise ValueError(
                "there is no `general` phase and no `model.checkpoint`; probes start from a model that one of them gives, so add a phase "
                "to train it, or name a checkpoint to be taken as it is"
            )
        return general

    @property
    def fingerprint(self) -> str:
        """12 hex digits of its settings, defaults filled in: not of its name, its description or how its files are laid out."""
        return settings_fingerprint(self.model_dump(mode="json", exclude={"description"}))

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
        return self.mixture.probes(len(self._trained))

    def filter_settings(self, project: Project, stage: Stage) -> FilterSettings:
        """Return the thresholds of `stage` for every domain of the recipe."""
        mine: StageSettings = getattr(self, stage)
        thresholds = {}
        for domain in self.domains:
            layers = (getattr(project, stage), getattr(project.domain(domain), stage), mine.filters, mine.domains.get(domain, {}))
            thresholds[domain] = resolve_thresholds(layers)
        return FilterSettings(mode=mine.mode, thresholds=thresholds)

    def decontamination_settings(self, project: Project) -> FilterSettings:
        """Return the limits of contamination for every domain but those that are evaluated on."""
        spared = {*self.roles.evaluation, *(chosen.domain for chosen in project.evaluation_sets.values())}
        limits = {rule: Threshold(keep="at_most", value=value) for rule, value in self.decontamination.limits().items()}
        thresholds = {domain: {} if domain in spared else limits for domain in self.domains}
        return FilterSettings(mode=self.decontamination.mode, thresholds=thresholds)

    def selection_settings(self) -> SelectionSettings:
        """Return the settings of the subset selection."""
        return SelectionSettings(roles=self._trained, **dict(self.selection))

    def general_settings(self) -> GeneralSettings:
        """Return the run of the general checkpoint.

        Raises:
            GristmillError: the recipe trains none.
        """
        if self.general is None:
            raise GristmillError(f"the recipe takes {self.model.checkpoint} as it is; add a `general` phase to train a general checkpoint")
        return GeneralSettings(model=self.model, phases=(self.general,), **self._run((self.general,), self.training.threads))

    def adoption_settings(self) -> AdoptionSettings:
        """Return the checkpoint that is taken as it is.

        Raises:
            GristmillError: the recipe names none.
        """
        if self.model.checkpoint is None:
            raise GristmillError("the recipe has no `model.checkpoint` to be taken as it is; name one")
        where = {"checkpoint": self.model.checkpoint, "revision": self.model.revision}
        return AdoptionSettings(sequence_length=self.training.sequence_length, **where)

    def probe_settings(self, probe: str) -> ProbeSettings:
        """Return the run of probe `probe`.

        Raises:
            UnknownName: the recipe has no such probe.
        """
        return self._probe_settings(self.mixture.phase).model_copy(update=self.mixture.probe(probe, self._trained))

    def verification_settings(self) -> ProbeSettings:
        """Return the run at the critical ratio, which is not known before it is measured."""
        phase = self.mixture.phase.model_copy(update={"tokens": self.mixture.length_of_verification(self.pretraining_tokens)})
        return self._probe_settings(phase).model_copy(update={"seed": self.mixture.seeds[0]})

    def _probe_settings(self, phase: Phase) -> ProbeSettings:
        return ProbeSettings(phases=(phase,), measure_at=self.mixture.measure_at, **self._quiet_run((phase,)))

    @property
    def _trained(self) -> dict[str, Role]:
        """The role of each domain that is trained on."""
        return {domain: role for domain, role in self.role_of.items() if role != "evaluation"}

    @property
    def pretraining_tokens(self) -> int:
        """Tokens of the pretraining on the domain mixture."""
        return sum(phase.tokens for phase in self.pretraining)

    def window_settings(self) -> WindowSettings:
        """Return the held-out windows that probes are measured on."""
        phase = Phase(
            tokens=1,
            learning_rate=1.0,
            **{name: getattr(self.mixture.phase, name) for name in ("objective", "objective_settings", "attention")},
        )
        each = self.mixture.windows["general"] if self.mixture.search else None
        windows = dict(self.mixture.windows)
        return WindowSettings(phases=(phase,), windows=windows, windows_per_domain=each, **self._quiet_run((phase,)))

    def _quiet_run(self, phases: tuple[Phase, ...]) -> dict[str, object]:
        """Return a run of one thread that measures on its windows alone."""
        quiet = {"validation": ValidationSettings(), "samples": SampleSettings(max_new_tokens=0), "processes": 1}
        return self._run(phases, threads=1) | quiet

    def pretraining_settings(self) -> TrainingSettings:
        """Return the run of the pretrained checkpoint."""
        return TrainingSettings(phases=self.pretraining, **self._run(self.pretraining, self.training.threads))

    def mixture_settings(self) -> MixtureSettings:
        """Return how the mixture is put together."""
        chosen = {name: getattr(self.mixture, name) for name in ("use", "ratio", "max_epochs", "on_exhausted")}
        phases = tuple(PhaseMixture(**{name: getattr(phase, name) for name in PhaseMixture.model_fields}) for phase in self.pretraining)
        return MixtureSettings(tokens=self.pretraining_tokens, phases=phases, **chosen)

    def evaluation_settings(self) -> EvaluationSettings:
        """Return what is measured at the end."""
        return self.evaluation.measured(self.role_of, self.training.threads)

    def comparison_settings(self) -> ComparisonSettings:
        """Return what is compared with the baseline, and what must not get worse."""
        return self.evaluation.compared(self.role_of, self.mixture.estimate.tolerance.nats)

    def task_settings(self) -> TaskEvaluationSettings:
        """Return the tasks that the checkpoint is scored on."""
        return self.evaluation.asked(self.training.threads)

    def classification_settings(self) -> ClassificationSettings:
        """Return the labelled sets that the checkpoint is fine-tuned on."""
        return self.evaluation.classified(threads=1)

    def _run(self, phases: tuple[Phase, ...], threads: int) -> dict[str, object]:
        shared = {name: getattr(self.training, name) for name in RunSettings.model_fields}
        return {**shared, "threads": threads, "compile": self._compiles(phases)}

    def _compiles(self, phases: tuple[Phase, ...]) -> bool:
        if self.training.compile != "auto":
            return self.training.compile == "on"
        return compile_pays(self.model, sum(phase.tokens for phase in phases)) and shutil.which("c++") is not None


def compile_pays(model: ModelSettings, tokens: int) -> bool:
    """Return whether a run of `tokens` is long enough to repay torch.compile."""
    width = model.hidden_size
    parameters = model.num_layers * (4 * width**2 + 3 * width * model.intermediate_size)
    return 6.0 * parameters * tokens > COMPILE_PAYS_FLOPS


def resolve_thresholds(layers: Iterable[Filters]) -> dict[str, Threshold]:
    """Lay filter settings over each other, the last on top, and return the thresholds that remain, in rule order."""
    filters: dict[str, dict[str, Json]] = {}
    off: set[str] = set()
    for layer in layers:
        for name, values in layer.items():
            if is_off(values):
                off.add(name)
                continue
            off.discard(name)
            filters[name] = {**filters.get(name, {}), **mapping(values)}
    found: dict[str, Threshold] = {}
    for name in filters:
        if name in off:
            continue
        for rule, threshold in default_thresholds(name).items():
            value = filters[name].get(rule.partition(".")[2], threshold.value)
            if not is_off(value):
                found[rule] = threshold.model_copy(update={"value": float(value)})
    return found


def is_off(value: object) -> bool:
    """Return whether `value` switches a filter or a rule off."""
    return value is False or value == "off"


def mapping(values: object) -> dict[str, Json]:
    """Return `values` where they are a mapping, else an empty one."""
    return dict(values) if isinstance(values, Mapping) else {}
