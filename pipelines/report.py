"""The report: one page that says what was kept, at which ratio the text was mixed, and what it did to the losses.

Everything on it comes from the manifests of the recipe's artifacts. It shows what each of them cost, and seconds and memory
are no part of an artifact's identity: of two stores that hold the same artifacts, the reports differ in the cost and training
sections. This asset alone has other bytes from run to run; from the same manifests the page is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from pipelines.cards import write_cards
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.page_reader import PageReader, stands_alone
from pipelines.pages import Column, Html, bar, count, decimals, number, page, paragraph, percent, section, table, text
from pipelines.plugins import Settings
from pipelines.report_artifacts import CHANGE, Artifacts, Row, total
from pipelines.report_sections import SECTIONS, interval

PAGE = "report.html"


class ReportSettings(Settings):
    """What the page is about."""

    recipe: str
    """Name of the recipe."""
    description: str
    """What the recipe is for."""
    fingerprint: str = ""
    """Of the recipe's settings."""
    extends: tuple[str, ...] = ()
    """The recipes that it extends, the nearest first."""
    overrides: dict[str, dict[str, Json]] = Field(default_factory=dict)
    """Label of an artifact to the settings of it that a run overrode, by dotted key: the page is then not of the recipe as it stands."""


def write_report(
    settings: ReportSettings,
    out: Path,
    *,
    raw: tuple[Manifest, ...],
    cleaned: tuple[Manifest, ...],
    quality: Manifest,
    toxicity: Manifest,
    deduplicated: Manifest,
    selection: Manifest,
    general: Manifest,
    probes: tuple[Manifest, ...],
    ratio: Manifest,
    mixture: Manifest,
    checkpoint: Manifest,
    evaluation: Manifest,
    sweep: Manifest | None = None,
    decontaminated: Manifest | None = None,
    windows: Manifest | None = None,
    estimate: Manifest | None = None,
    verification: Manifest | None = None,
    tasks: Manifest | None = None,
    classification: Manifest | None = None,
    comparison: Manifest | None = None,
    shards: tuple[Manifest, ...] = (),
) -> Outcome:
    """Write ``report.html``, which fetches nothing and runs no script, ``model_card.md`` and ``data_card.md``.

    A table or plot that a manifest lacks is left out.
    """
    corpus = (raw, cleaned, quality, toxicity, deduplicated, selection)
    measured = (windows, estimate, verification, tasks, classification, comparison)
    made = Artifacts(*corpus, general, probes, ratio, mixture, checkpoint, evaluation, sweep, decontaminated, *measured, shards)
    placed = [(name, f"{place} {heading}", write(made)) for place, (name, heading, write) in enumerate(SECTIONS, 1)]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in placed)
    head = (
        f"<header>\n<h1>{text(settings.recipe)}</h1>\n{paragraph(settings.description, kind='quiet')}{_about_recipe(settings)}</header>\n"
    )
    answer = paragraph(" ".join(_answer(made)), kind="answer") + paragraph(_about_checks(made))
    navigation = f'<nav aria-label="Sections">{links}</nav>\n'
    parts = "".join(section(*part) for part in placed)
    html = page(f"{settings.recipe}: report", f"{head}{answer}{_funnel(made)}{navigation}{parts}")
    (out / PAGE).write_text(html, encoding="utf-8")
    write_cards(out, settings.recipe, settings.description, made)
    return Outcome(counts={"sections": len(placed), "tables": html.count("<table"), "plots": html.count("<img")})


def _about_recipe(settings: ReportSettings) -> Html:
    """Return which settings the page is of, and which of them are not the recipe's."""
    extends = f"; extends {', which extends '.join(settings.extends)}" if settings.extends else ""
    said = paragraph(f"Recipe fingerprint {settings.fingerprint}{extends}.", kind="quiet") if settings.fingerprint else Html("")
    rows = [{"of": label, "key": key, "value": str(value)} for label, own in settings.overrides.items() for key, value in own.items()]
    columns = [Column("of", "Artifact"), Column("key", "Setting"), Column("value", "Value in this run")]
    return Html(said + table(rows, columns, caption="Overridden by a run: what follows is not of the recipe as it stands"))


def _answer(made: Artifacts) -> Iterator[str]:
    """Yield the findings as sentences; one whose numbers are missing is left out."""
    read, kept = total(made.raw, "documents_in"), made.deduplicated.counts.get("kept")
    if read and kept is not None:
        yield f"Of {count(read)} documents, {count(kept)} ({percent(kept / read)}) are left after the filters and deduplication."
    tokens, selected = _tokens(made.selection, "tokens"), _tokens(made.selection, "selected_tokens")
    if tokens and selected is not None:
        yield f"{count(selected)} of their {count(tokens)} training tokens ({percent(selected / tokens)}) were selected."
    yield from _about_ratio(made)
    yield from _about_losses(made)


def _about_ratio(made: Artifacts) -> Iterator[str]:
    found, decision = made.ratio.outcome.metrics, str(made.ratio.outcome.details.get("decision"))
    ratio, tolerance = found.get("ratio"), number(found.get("tolerance_nats"))
    if ratio is None:
        return
    between = _between(found.get("interval_low"), found.get("interval_high"))
    meaning = f"the largest share of target text at which the general loss rises by no more than {tolerance} nats per token"
    if decision == "estimate":
        yield f"The critical ratio, {meaning}, is {ratio:.3f}{between}.{_about_verification(made)}"
    else:
        seen = "; ".join(str(row.get("seen")) for row in made.ratio.outcome.tables.get("refusals", []))
        taken = {"lower_bound": "the highest measured share that held the tolerance", "manual": "the share that the recipe names"}
        yield f"The critical ratio, {meaning}, is taken to be {ratio:.3f}, {taken.get(decision, decision.replace('_', ' '))}."
        yield f"Its estimate{between} was refused{f' because {seen}' if seen else ''}."
    share = made.mixture.outcome.metrics.get("target_share")
    if share is not None and abs(share - ratio) > 5e-4:
        yield f"The mixture has a target share of {share:.3f}."


def _about_verification(made: Artifacts) -> str:
    """Return what the run at the ratio said, as a sentence; nothing where there was none."""
    row = next(iter(made.ratio.outcome.tables.get("verification", [])), None)
    if row is None or row.get("measured_general_delta") is None:
        return ""
    held = "which holds" if row.get("held") else "which does not hold"
    return f" A run at {row['ratio']:.3f} changed the general loss by {row['measured_general_delta']:+.4f}, {held}."


def _about_losses(made: Artifacts) -> Iterator[str]:
    """Say how the held-out losses changed; a change is called a rise or fall only where its interval leaves out zero."""
    tolerance = made.ratio.outcome.metrics.get("tolerance_nats")
    for role in ("target", "general"):
        row = _of_role(made.evaluation, role)
        if row is None:
            continue
        change, low, high = (row.get(key) for key in ("loss_change", "loss_change_low", "loss_change_high"))
        sure = low is not None and high is not None and low * high > 0
        verb = ("rose" if change > 0 else "fell") if sure else "changed"
        ends = interval(row, "loss_change", " (95 % interval {} to {})")
        beside = ""
        if role == "general" and tolerance is not None:
            beside = f", which is {'within' if change <= tolerance else 'above'} the tolerance"
        yield f"On held-out {role} text the loss {verb}: {CHANGE(change)} nats per token{ends}{beside}."


def _about_checks(made: Artifacts) -> str:
    checks = made.checks()
    failed = [f"{check.name} of {manifest.label}" for _, manifest, check in checks if not check.passed]
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    if failed:
        return f"{count(len(failed))} of {count(len(checks))} checks failed: {', '.join(failed[:3])}{more}."
    return f"All {count(len(checks))} checks passed." if checks else ""


def _of_role(evaluation: Manifest, role: str) -> Row | None:
    """Return the row of all domains of `role`, or of its only one."""
    rows = [row for row in evaluation.outcome.tables.get("held_out", []) if row.get("role") == role]
    rows = [row for row in rows if row.get("loss_change") is not None]
    return next((row for row in rows if row.get("domain") == f"all {role}"), rows[0] if len(rows) == 1 else None)


def _between(low: Json, high: Json) -> str:
    form = decimals(3)
    return "" if low is None or high is None else f" (95 % interval {form(low)} to {form(high)})"


def _funnel(made: Artifacts) -> Html:
    """Return what each step left, from the documents that were read to the tokens that were selected."""
    counts, selection = made.deduplicated.counts, made.selection.counts
    aside = {"held_out_documents": "held out", "documents_without_role": "without a role"}
    steps = [
        ("Read", total(made.raw, "documents_in"), total(made.raw, "characters"), None, _lost(made.raw, "quarantined")),
        ("Cleaned", total(made.cleaned, "kept"), total(made.cleaned, "characters"), None, _lost(made.cleaned, "dropped")),
        ("Quality filter", made.quality.counts.get("kept"), None, None, _lost((made.quality,), "dropped")),
        ("Toxicity filter", made.toxicity.counts.get("kept"), None, None, _lost((made.toxicity,), "dropped")),
        *_decontamination(made.decontaminated),
        ("Deduplication", counts.get("kept"), counts.get("kept_characters"), None, _lost((made.deduplicated,), "dropped")),
        (
            "For training",
            selection.get("documents_in"),
            None,
            _tokens(made.selection, "tokens"),
            ", ".join(f"{count(selection[key])} {words}" for key, words in aside.items() if selection.get(key)),
        ),
        ("Selection", selection.get("kept"), None, _tokens(made.selection, "selected_tokens"), _lost((made.selection,), "dropped")),
    ]
    first = steps[0][1]
    rows = [
        {
            "step": bar(step, documents / first if first and documents is not None else None),
            "documents": documents,
            "characters": characters,
            "tokens": tokens,
            "lost": lost or None,
        }
        for step, documents, characters, tokens, lost in steps
    ]
    numbers = [Column(key, key.capitalize(), count) for key in ("documents", "characters", "tokens")]
    return table(rows, [Column("step", "Step"), *numbers, Column("lost", "Left out", count)], wide=True)


def _decontamination(decided: Manifest | None) -> list[tuple[str, int | None, None, None, str]]:
    """Return the step's row, where the recipe has one."""
    return [("Decontamination", decided.counts.get("kept"), None, None, _lost((decided,), "dropped"))] if decided else []


def _lost(manifests: Sequence[Manifest], key: str) -> str:
    lost = total(manifests, key)
    return f"{count(lost)} {key}" if lost is not None else ""


def _tokens(selection: Manifest, key: str) -> int | None:
    found = [selection.counts[f"{role}_{key}"] for role in ("general", "target") if f"{role}_{key}" in selection.counts]
    return sum(found) if found else None


def self_contained(draft: Manifest) -> Check:
    """The page asks for nothing outside itself, runs no script, and is smaller than 5 MB."""
    return stands_alone(draft.directory / PAGE)


def every_section_present(draft: Manifest) -> Check:
    """The page has every section, in order, and each says something below its heading."""
    texts, wanted = PageReader(draft.directory / PAGE).texts, [name for name, *_ in SECTIONS]
    missing = [name for name in wanted if texts.get(name, 0) < 2]
    return Check(
        name="every_section_present",
        passed=not missing and list(texts) == wanted,
        description=f"{len(texts)} sections; missing or empty: {', '.join(missing) or 'none'}",
        metadata={"sections": len(texts)},
    )


REPORT_AUDITS = (self_contained, every_section_present)
