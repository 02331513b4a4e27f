"""The page over all recipes: what each of them kept, at which ratio it mixed, what it did to the losses, and what it cost.

    the artifacts of every recipe that was evaluated -> recipes.html, recipes.json

Recipes that were measured on the same held-out documents form a family. Within it each one is compared with the family's baseline, in
pairs over documents (`compared_rows`), and Holm's correction goes over all rows of the family.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import Field

from pipelines.compared_rows import Row, compared_rows, paired_documents, verdict_of
from pipelines.errors import GristmillError
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.page_reader import stands_alone
from pipelines.pages import Column, Html, code, count, decimals, figures, folded, number, page, paragraph, section, table, text
from pipelines.paired_bootstrap import holm
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.report_artifacts import CHANGE, rows_of

PAGE, RECORD = "recipes.html", "recipes.json"
ROLES = ("target", "general", "evaluation")
CLASSES = {"better": "passed", "worse": "failed"}


class RecipeFacts(Settings):
    """What the recipe files say of one recipe."""

    name: str
    description: str
    baseline: str | None = None
    """The recipe that it names to be compared with."""


class RecipesReportSettings(Settings):
    """What the page is about."""

    recipes: tuple[RecipeFacts, ...]
    """Those that were evaluated, by name."""
    missing: tuple[str, ...] = ()
    """Those that were not."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Chance that any row of a family gets a verdict though nothing differs."""
    draws: int = Field(default=10_000, ge=100)
    """Bootstrap draws over documents."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""


@dataclass(frozen=True)
class Milled:
    """A recipe and its artifacts."""

    facts: RecipeFacts
    made: Mapping[str, Manifest]
    """By the name of the input: `evaluation`, `checkpoint` and so on."""


@dataclass(frozen=True)
class Family:
    """Recipes that were measured on the same held-out documents, and what the others gain and lose against the first."""

    baseline: Milled
    others: tuple[tuple[Milled, tuple[Row, ...]], ...]


def write_recipes_report(
    settings: RecipesReportSettings,
    out: Path,
    *,
    evaluations: tuple[Manifest, ...],
    general: tuple[Manifest, ...],
    checkpoints: tuple[Manifest, ...],
    deduplicated: tuple[Manifest, ...],
    selections: tuple[Manifest, ...],
    ratios: tuple[Manifest, ...],
    mixtures: tuple[Manifest, ...],
    tasks: tuple[Manifest, ...],
    comparisons: tuple[Manifest, ...],
) -> Outcome:
    """Write ``recipes.html``, which fetches nothing and runs no script, and ``recipes.json`` with the same numbers.

    Args:
        evaluations: of each recipe of `settings`, in their order, as all that follows.

    Raises:
        GristmillError: no recipe was evaluated.
    """
    if not settings.recipes:
        raise GristmillError("no recipe was evaluated; materialize one first (`gristmill run`)")
    inputs = {"evaluation": evaluations, "general": general, "checkpoint": checkpoints, "deduplicated": deduplicated}
    inputs |= {"selection": selections, "ratio": ratios, "mixture": mixtures, "tasks": tasks, "comparison": comparisons}
    milled = [Milled(facts, {name: many[place] for name, many in inputs.items()}) for place, facts in enumerate(settings.recipes)]
    rows = [_summary(one) for one in milled]
    families = [_compared(settings, members) for members in _families(milled) if len(members) > 1]
    plots = [_plot(out / f"family_{place}.png", family) for place, family in enumerate(families, 1)]
    plots.append(_trade_off(out / "trade_off.png", rows))
    sections = [("all", "All recipes", _all(rows, out / "trade_off.png"))]
    sections += [
        (f"family-{place}", f"Against {family.baseline.facts.name}", _family(family, out / f"family_{place}.png"))
        for place, family in enumerate(families, 1)
    ]
    sections += [("tasks", "Tasks", _tasks(milled)), ("lineage", "Lineage", _lineage(milled))]
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in sections)
    head = f"<header>\n<h1>Recipes</h1>\n{paragraph(_about(settings, families), kind='quiet')}</header>\n"
    body = head + f'<nav aria-label="Sections">{links}</nav>\n' + "".join(section(*one) for one in sections)
    (out / PAGE).write_text(page("Recipes", body), encoding="utf-8")
    found = [{"recipe": one.facts.name, **row} for family in families for one, mine in family.others for row in mine]
    record = {"recipes": rows, "families": [_named(family) for family in families], "rows": found}
    (out / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Outcome(
        counts={"recipes": len(milled), "families": len(families), "compared": len(found)},
        tables={"recipes": [{key: _short(value) for key, value in row.items()} for row in rows]},
        plots=tuple(plots),
    )


def _about(settings: RecipesReportSettings, families: Sequence[Family]) -> str:
    alone = len(settings.recipes) - sum(1 + len(family.others) for family in families)
    said = f"Recipes evaluated: {len(settings.recipes)}. Families that were measured on the same held-out documents: {len(families)}."
    said += f" {alone} of the recipes share{'s' * (alone == 1)} its documents with no other." if alone else ""
    return said + (f" Not evaluated: {', '.join(settings.missing)}." if settings.missing else "")


def _families(milled: Sequence[Milled]) -> Iterator[list[Milled]]:
    """Yield the recipes by what they were measured with and on, the baseline of each family first."""
    groups: dict[str, list[Milled]] = {}
    for one in milled:
        evaluation = one.made["evaluation"]
        measured = {key: evaluation.settings.get(key) for key in ("evaluator", "evaluator_settings", "max_tokens_per_domain")}
        inputs = {name: [reference.fingerprint for reference in evaluation.inputs.get(name, ())] for name in ("decisions", "tokenizer")}
        groups.setdefault(json.dumps([measured, inputs], sort_keys=True), []).append(one)
    for members in groups.values():
        named = Counter(one.facts.baseline for one in members)
        yield sorted(members, key=lambda one: (-named[one.facts.name], one.facts.name))


def _compared(settings: RecipesReportSettings, members: Sequence[Milled]) -> Family:
    """Compare the rest of `members` with the first; one that shares no domain with it has no rows."""
    baseline, *others = members
    found = [_rows(settings, one.made["evaluation"], baseline.made["evaluation"]) for one in others]
    adjusted = iter(holm([cast(float, row["p_value"]) for rows in found for row in rows]))
    judged = []
    for one, rows in zip(others, found, strict=True):
        corrected = [(row, next(adjusted)) for row in rows]
        mine = tuple({**row, "p_adjusted": p, "verdict": verdict_of(row, p, settings.alpha)} for row, p in corrected)
        judged.append((one, mine))
    return Family(baseline, tuple(judged))


def _rows(settings: RecipesReportSettings, candidate: Manifest, baseline: Manifest) -> list[Row]:
    roles = cast(Mapping[str, str], candidate.settings["roles"])
    shared = {*roles} & {*cast(Mapping[str, str], baseline.settings["roles"])}
    if not shared:
        return []
    paired, _ = paired_documents(roles, candidate, baseline)
    return compared_rows(paired, alpha=settings.alpha, draws=settings.draws, seed=settings.seed, groups=())


def _summary(one: Milled) -> dict[str, Json]:
    """Return the row of a recipe: counts, the target share, and the change of loss by role with its 95 % interval."""
    made = one.made
    row: dict[str, Json] = {"recipe": one.facts.name, "description": one.facts.description}
    row["documents_kept"] = made["deduplicated"].counts.get("kept")
    chosen = [made["selection"].counts.get(f"{role}_selected_tokens") for role in ("general", "target")]
    row["selected_tokens"] = sum(tokens or 0 for tokens in chosen)
    row["target_share"] = made["mixture"].outcome.metrics.get("target_share")
    row["decision"] = cast(Json, made["ratio"].outcome.details.get("decision"))
    row["tokens"] = made["checkpoint"].counts.get("tokens")
    for role, found in _by_role(rows_of(made["evaluation"], "held_out")).items():
        row |= {f"{role}_{key}": found.get(key) for key in ("loss_after", "loss_change", "loss_change_low", "loss_change_high")}
        row[f"{role}_bits_per_byte"] = found.get("bits_per_byte_after")
    row["guards"] = next((check.passed for check in made["comparison"].checks if check.name == "not_worse_than_baseline"), None)
    spent = [manifest.provenance for manifest in made.values()]
    row["seconds"] = round(sum(float(item.get("seconds") or 0.0) for item in spent), 1)
    return row


def _by_role(rows: Sequence[Mapping[str, Json]]) -> dict[str, Mapping[str, Json]]:
    """Return the row of each role: of all its domains, or of its only one."""
    found: dict[str, Mapping[str, Json]] = {}
    for row in rows:
        role = str(row.get("role"))
        if role not in found or str(row.get("domain", row.get("name"))) in (role, f"all {role}"):
            found[role] = row
    return {role: found[role] for role in ROLES if role in found}


def _all(rows: Sequence[Mapping[str, Json]], plot: Path) -> Html:
    shown = [{**row, **{f"{role}_loss_change": _interval(row, f"{role}_loss_change") for role in ROLES}} for row in rows]
    columns = [
        Column("recipe", "Recipe"),
        Column("documents_kept", "Documents kept", count),
        Column("selected_tokens", "Tokens selected", count),
        Column("target_share", "Target share", decimals(3)),
        Column("tokens", "Tokens read", count),
        Column("target_loss_change", "Target loss, change [95 %]", number),
        Column("general_loss_change", "General loss, change [95 %]", number),
        Column("guards", "Guards hold"),
        Column("seconds", "Seconds", count),
    ]
    losses = [Column("recipe", "Recipe")]
    for role in ROLES:
        if any(row.get(f"{role}_loss_after") is not None for row in rows):
            losses += [Column(f"{role}_loss_after", f"{role.capitalize()} loss", decimals(3))]
            losses += [Column(f"{role}_bits_per_byte", "bits per byte", decimals(3))]
    note = (
        "Changes are those of continued pretraining, each against the recipe's own general checkpoint. Seconds are those of the artifacts "
    )
    note += "under Lineage, of which recipes may share some."
    described = [{"recipe": row["recipe"], "description": row["description"]} for row in rows]
    return Html(
        table(shown, columns)
        + paragraph(note, kind="quiet")
        + table(rows, losses, caption="After training, on held-out documents")
        + figures([(plot, "What was learned of the target, and what it cost on general text")])
        + folded("What each recipe is", table(described, [Column("recipe", "Recipe"), Column("description", "Description")]))
    )


def _interval(row: Mapping[str, Json], key: str) -> str | None:
    change, low, high = (row.get(f"{key}{end}") for end in ("", "_low", "_high"))
    if change is None:
        return None
    return CHANGE(change) if low is None or high is None else f"{CHANGE(change)} [{CHANGE(low)}, {CHANGE(high)}]"


def _family(family: Family, plot: Path) -> Html:
    """Write the table of a family: a line per recipe, a column per role; and all rows by domain, folded."""
    by_role = {one.facts.name: _by_role(_with_domains(rows)) for one, rows in family.others}
    roles = [role for role in ROLES if any(role in found for found in by_role.values())]
    lines = [{"recipe": name, **{role: _judged(found.get(role)) for role in roles}} for name, found in by_role.items()]
    columns = [Column("recipe", "Recipe"), *(Column(role, f"{role.capitalize()} text, change of loss [95 %]") for role in roles)]
    rows = [{**row, "recipe": one.facts.name, "change": _judged(row)} for one, mine in family.others for row in mine]
    every = [Column("recipe", "Recipe"), Column("name", "Row"), Column("documents", "Documents", count)]
    every += [Column("loss_baseline", "Baseline", decimals(3)), Column("loss_candidate", "Recipe's", decimals(3))]
    every += [Column("change", "Change [95 %]"), Column("p_adjusted", "p, corrected", decimals(4))]
    note = f"Nats per token, on the same documents as {family.baseline.facts.name}. Colour: p below the level after Holm's correction over "
    note += f"the {len(rows)} rows of this section. Documents are drawn, training runs are not: another seed moves these differences too."
    return Html(
        table(lines, columns)
        + paragraph(note, kind="quiet")
        + figures([(plot, "Change of loss by role")])
        + folded("By domain", table(rows, every))
    )


def _with_domains(rows: Sequence[Row]) -> list[Mapping[str, Json]]:
    """Return domains after roles, so that a role of one domain is its domain."""
    return [*(row for row in rows if row["group"] == "role"), *(row for row in rows if row["group"] == "domain")]


def _judged(row: Mapping[str, Json] | None) -> Html | None:
    if row is None:
        return None
    shown = _interval(row, "loss_change")
    kind = CLASSES.get(str(row["verdict"]))
    return Html(f'<span class="{kind}">{text(shown)}</span>') if kind else Html(text(shown))


def _tasks(milled: Sequence[Milled]) -> Html:
    """Write every task and metric, a line per recipe."""
    rows = [{"recipe": one.facts.name, **row} for one in milled for row in rows_of(one.made["tasks"], "tasks")]
    shown = [{**row, "interval": _task_interval(row)} for row in rows]
    columns = [Column("task", "Task"), Column("metric", "Metric"), Column("recipe", "Recipe"), Column("items", "Items", count)]
    columns += [Column("before", "Before", decimals(3)), Column("after", "After", decimals(3)), Column("interval", "Change [95 %]", number)]
    return table(sorted(shown, key=lambda row: (str(row["task"]), str(row["metric"]), str(row["recipe"]))), columns)


def _task_interval(row: Mapping[str, Json]) -> str:
    return f"{CHANGE(row['change'])} [{CHANGE(row['change_low'])}, {CHANGE(row['change_high'])}]"


def _lineage(milled: Sequence[Milled]) -> Html:
    rows = [
        {"recipe": one.facts.name, "asset": code(found.asset), "fingerprint": code(found.fingerprint), "code": code(found.code_version)}
        for one in milled
        for found in one.made.values()
    ]
    columns = [Column("recipe", "Recipe"), Column("asset", "Asset"), Column("fingerprint", "Fingerprint"), Column("code", "Code version")]
    return folded(f"{len(rows)} artifacts, by fingerprint", table(rows, columns))


def _named(family: Family) -> dict[str, Json]:
    return {"baseline": family.baseline.facts.name, "recipes": [one.facts.name for one, _ in family.others]}


def _short(value: Json) -> Json:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ends(row: Mapping[str, Json], key: str) -> tuple[float, list[list[float]]] | None:
    """Return a change and how far its interval reaches below and above it, as matplotlib takes them; None where it was not measured."""
    change, low, high = (cast(float | None, row.get(f"{key}{end}")) for end in ("", "_low", "_high"))
    if change is None:
        return None
    return change, [[max(0.0, change - (change if low is None else low))], [max(0.0, (change if high is None else high) - change)]]


def _plot(path: Path, family: Family) -> str:
    """Draw the change of loss of each recipe and role against the family's baseline, with its interval."""
    names = [one.facts.name for one, _ in family.others]
    figure, axes = new_figure(6.4, 1.3 + 0.45 * len(names))
    for shift, (role, color) in enumerate(zip(ROLES, ("#cc6677", "#2f6690", "#888888"), strict=True)):
        found = [(place, _by_role(_with_domains(rows)).get(role)) for place, (_, rows) in enumerate(family.others)]
        kept = [(place, row) for place, row in found if row is not None]
        if not kept:
            continue
        for turn, (place, row) in enumerate(kept):
            change, errors = cast(tuple[float, list[list[float]]], _ends(row, "loss_change"))
            label = None if turn else role
            axes.errorbar(change, place + 0.2 * (shift - 1), xerr=errors, fmt="o", ms=4, capsize=2, color=color, label=label)
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xlabel=f"change of loss against {family.baseline.facts.name}, nats per token (95 % interval)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
    return path.name


def _trade_off(path: Path, rows: Sequence[Mapping[str, Json]]) -> str:
    """Draw the change of general loss against that of target loss, a point per recipe, numbered as in the legend."""
    figure, axes = new_figure(7.2, max(3.4, 0.6 + 0.2 * len(rows)))
    for place, row in enumerate(rows):
        points = {role: _ends(row, f"{role}_loss_change") for role in ("target", "general")}
        if None in points.values():
            continue
        (x, xerr), (y, yerr) = (cast(tuple[float, list[list[float]]], points[role]) for role in ("target", "general"))
        shape = {"fmt": "osD^v"[place // 10 % 5], "color": f"C{place % 10}", "label": row["recipe"]}
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, ms=4, capsize=2, **shape)
    axes.axhline(0.0, color="grey", linewidth=1)
    axes.set(xlabel="change of target loss, nats per token", ylabel="change of general loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
    return path.name


def page_self_contained(draft: Manifest) -> Check:
    """The page asks for nothing outside itself, runs no script, and is smaller than 5 MB."""
    return stands_alone(draft.directory / PAGE, "page_self_contained")


def every_recipe_shown(draft: Manifest) -> Check:
    """The page names every recipe that was evaluated."""
    shown = (draft.directory / PAGE).read_text(encoding="utf-8")
    names = [recipe["name"] for recipe in cast(list[dict[str, str]], draft.settings["recipes"])]
    missing = [name for name in names if text(name) not in shown]
    return Check(
        name="every_recipe_shown", passed=not missing, description=f"{len(names)} recipes, missing: {', '.join(missing) or 'none'}"
    )


RECIPES_REPORT_AUDITS = (page_self_contained, every_recipe_shown)
