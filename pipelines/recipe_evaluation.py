"""The part of a recipe on evaluation: what is measured at the end, on what, against whom, and what must not get worse."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from pipelines.classification import ClassificationChoices, ClassificationSettings
from pipelines.comparison import ComparisonSettings
from pipelines.evaluation import EvaluationSettings
from pipelines.labelled_sets import LabelledSet
from pipelines.manifests import Json
from pipelines.plugins import Settings
from pipelines.task_evaluation import TaskChoice, TaskEvaluationSettings, default_tasks


class Evaluation(Settings):
    """What is measured at the end."""

    evaluator: str = "held_out_loss"
    """A plugin of `evaluators/`."""
    evaluator_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the evaluator."""
    max_tokens_per_domain: int = 120_000
    """Held-out tokens read per domain."""
    reference: str | None = None
    """A recipe whose held-out documents are measured, in place of the recipe's own: a study with another filter is judged on the documents
    of its baseline."""
    baseline: str | None = None
    """A recipe that this one is compared with; before training against after where absent."""
    guards: dict[str, float] | None = None
    """What must not get worse, and by how much it may: see `ComparisonSettings`. Absent, the general loss may rise by the tolerance of the
    mixture where there is no baseline, and by nothing where there is one."""
    tasks: dict[str, TaskChoice] = Field(default_factory=default_tasks)
    """Name to task; BLiMP where absent, none where empty."""
    labelled: tuple[LabelledSet, ...] = ()
    """Labelled sets that the checkpoint is fine-tuned and probed on."""
    classification: ClassificationChoices = ClassificationChoices()
    """How they are classified."""

    def measured(self, roles: Mapping[str, str], threads: int) -> EvaluationSettings:
        """Return what is measured on held-out documents."""
        chosen = {name: getattr(self, name) for name in ("evaluator", "evaluator_settings", "max_tokens_per_domain")}
        return EvaluationSettings(roles=dict(roles), threads=threads, **chosen)

    def compared(self, roles: Mapping[str, str], tolerance_nats: float | None) -> ComparisonSettings:
        """Return what is compared; `tolerance_nats` is that of the mixture, where it is in nats."""
        rise = tolerance_nats if self.baseline is None and tolerance_nats is not None else 0.0
        return ComparisonSettings(roles=dict(roles), guards={"general": rise} if self.guards is None else self.guards)

    def asked(self, threads: int) -> TaskEvaluationSettings:
        """Return the tasks."""
        return TaskEvaluationSettings(tasks=self.tasks, threads=threads)

    def classified(self, threads: int) -> ClassificationSettings:
        """Return the labelled sets, and how they are classified."""
        return ClassificationSettings(**dict(self.classification), sets=self.labelled, threads=threads)
