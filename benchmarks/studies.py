"""The studies of A Pretrainer's Guide to Training Data (2305.13169) with small models: quality, toxicity, age, and domains left out.

    python -m benchmarks.studies [--quick] [--corpus FILE ...] [--studies quality toxicity age domains] [--seeds 0 1 2] [--tokens N]

Parquet files with columns text and domain (and date) are cleaned, deduplicated, held out in part, tokenized and scored by the project's
own steps. Each study trains the same model on as many tokens of every variant and measures all on the same held-out windows:

quality    what the rules of the project file keep, everything (off, the baseline), what they drop (inverse). The paper filters by a
           classifier. Windows: of the held-out documents that the rules keep, by domain, and of those that they drop.
toxicity   likewise with the toxicity classifier, at the thresholds of recipes/toxicity-filtered.yaml, after the quality filter.
age        one domain at a time, parted into periods: trained on each, measured on each. Domains of fewer than `DATES` dates are left out,
           and those with too little text in a period.
domains    everything, and all but one domain; the shares of the others stay among themselves.

In both studies of filters the shares of domains are those of everything: a domain of which a variant lacks text is read at most four
times, and the others take its share. Both also sample continuations of openings of held-out clean documents, and of the texts of
`--prompts` if given, and score them by the toxicity classifier. A difference is over the same windows and seeds; its 95 % interval adds
the variances over seeds and over windows. Windows are cut from joined documents, so that neighbours may share one. Each of many
intervals has its own 5 %. The lines below a table say which of the paper's findings the intervals show; the paper measures tasks where
these measure loss, with models of 1.5 billion parameters. `--store` keeps what was prepared for the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.selection_pays import difference, shown
from benchmarks.study_pool import Period, StudyPool, Thresholds, study_pool
from benchmarks.study_runs import (
    MAX_EPOCHS,
    Losses,
    Plan,
    Sampling,
    Variant,
    compared,
    equal_tokens,
    losses_of,
    run_all,
    slope_over_distance,
    work,
)
from benchmarks.study_toxicity import neutral_prompts, prompts_of
from pipelines.manifests import Manifest
from pipelines.recipes import Stage
from pipelines.tasks._continuations import maximum_toxicity, toxicity_scores

SAMPLE = (Path("data/sample/corpus.parquet"), Path("data/sample/dirty.parquet"))
TOKENS = {"quality": 400_000, "toxicity": 400_000, "age": 200_000, "domains": 160_000}
"""Tokens of a run, by study; a fifth with `--quick`."""
DROPPED = "(dropped by the filter)"
MIN_WINDOWS = 8
"""A group of fewer is not measured."""
PERIODS, DATES = 4, 20
LEFT_OUT = 8
"""Domains that are left out in turn, the largest."""
Interval = list[float]
"""A mean and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Setting:
    """What all studies are done with."""

    pool: StudyPool
    plan: Plan
    directory: Path
    prompts: int
    toxic: Path | None
    console: Console


def main() -> None:
    """Train, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", default=list(SAMPLE), help="Parquet files, see above")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--quick", action="store_true", help="a fifth of the text and of the training, two seeds")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of training")
    parser.add_argument("--tokens", type=int, help="tokens of a run, for all studies")
    parser.add_argument("--pool-bytes", type=int, default=60_000_000, help="text that is taken of the corpus, about")
    parser.add_argument("--prompts", type=Path, help="Parquet file with toxic prompts in the column `text`")
    parser.add_argument("--like", nargs="*", default=[], metavar="A=B", help="domain A takes the thresholds of B of the project file")
    parser.add_argument("--project", type=Path, default=Path("project.yaml"), help="thresholds and cleaning")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/toxicity-filtered.yaml"), help="thresholds of the toxicity study")
    parser.add_argument("--store", type=Path, help="where artifacts stay for the next time; a temporary directory where absent")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    started = time.monotonic()
    thresholds = Thresholds.read(arguments.project, arguments.recipe, dict(pair.split("=", 1) for pair in arguments.like))
    quick = arguments.quick
    plan = Plan(0, tuple(arguments.seeds or ([0, 1] if quick else [0, 1, 2])), 40 if quick else 100, arguments.parallel)
    with tempfile.TemporaryDirectory(prefix="gristmill-studies-") as name:
        size = arguments.pool_bytes // (5 if quick else 1)
        pool = study_pool(arguments.corpus, arguments.store or Path(name) / "store", thresholds, max_bytes=size)
        console = Console(width=None if sys.stdout.isatty() else 170)
        setting = Setting(pool, plan, Path(name), 20 if quick else 60, arguments.prompts, console)
        print(f"documents and tokens after {time.monotonic() - started:.0f} s", file=sys.stderr)
        found: dict[str, object] = {}
        for study in arguments.studies:
            tokens = arguments.tokens or TOKENS[study] // (5 if quick else 1)
            found[study] = STUDIES[study](replace(setting, plan=replace(plan, tokens=tokens), directory=Path(name) / study))
            print(f"{study} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(json.dumps({"seeds": list(plan.seeds), **found, "seconds": round(time.monotonic() - started, 1)}))


# Filters


def filter_study(setting: Setting, stage: Stage) -> dict[str, object]:
    """Compare filter on and inverse with off; print and return what was found."""
    pool = setting.pool
    whole = pool.documents if stage == "quality" else pool.filtered("quality", "keep", pool.documents)
    parts = {"off": whole, "on": pool.filtered(stage, "keep", whole), "inverse": pool.filtered(stage, "inverse", whole)}
    windows = filter_windows(pool, whole, parts["on"], setting.plan.windows)
    everything = pool.selection(whole).outcome.details["tokens"]
    variants = [Variant(name, pool.selection(part), everything) for name, part in parts.items()]  # type: ignore[arg-type]
    plan = replace(setting.plan, tokens=equal_tokens(variants, setting.plan.tokens))
    sampling = Sampling(prompts_for(setting))
    runs = run_all(pool, setting.directory, variants, windows, plan, sampling)
    losses, toxicity = losses_of(runs), toxicity_of(runs)
    shared = [group for group in windows if group != DROPPED and all(group in run["epochs"] for run in runs)]
    groups = {"mean of domains read by all": shared, **{group: [group] for group in windows}}
    rows = {name: row_of(losses, members, "off") for name, members in groups.items()}
    title = f"{stage}: held-out loss with the filter off, and differences to it; {plan.tokens:,} tokens, {len(plan.seeds)} seeds"
    setting.console.print(table_of(title, "off", rows))
    setting.console.print(table_of(f"{stage}: toxicity of continuations with the filter off, and differences to it", "off", toxicity))
    print_reading(setting.console, variants, runs)
    findings = FINDINGS[stage](rows, toxicity)
    print_lines(setting.console, findings)
    return {"tokens": plan.tokens, "loss": rows, "toxicity": toxicity, "reads": reading_of(variants, runs), "findings": findings}


def filter_windows(pool: StudyPool, whole: Manifest, kept: Manifest, count: int) -> dict[str, np.ndarray]:
    """Return windows of the held-out documents that the filter keeps, by domain, and of those that it drops."""
    found = domain_windows(pool, kept, count)
    dropped = pool.windows(list(pool.held_out(pool.without(whole, kept)).values()), count)
    return {**found, DROPPED: dropped} if len(dropped) >= MIN_WINDOWS else found


def domain_windows(pool: StudyPool, part: Manifest, count: int) -> dict[str, np.ndarray]:
    """Return windows of the held-out documents of `part`, by domain; domains of too few windows are left out."""
    windows = {domain: pool.windows([documents], count) for domain, documents in pool.held_out(part).items()}
    return {domain: found for domain, found in windows.items() if len(found) >= MIN_WINDOWS}


def prompts_for(setting: Setting) -> dict[str, list[list[int]]]:
    """Return the prompts by set: openings of held-out documents that no filter drops, and toxic ones where a file has them."""
    pool = setting.pool
    clean = pool.filtered("toxicity", "keep", pool.filtered("quality", "keep", pool.documents))
    judged = [domain for domain, rules in pool.thresholds.of("toxicity", pool.domains).items() if rules]
    found = {"neutral": neutral_prompts(pool.held_out(pool.of_domains(clean, judged)), setting.prompts)}
    if setting.toxic:
        found["toxic"] = prompts_of(setting.toxic, pool.tokenizer.directory, setting.prompts)
    return found


def toxicity_of(runs: Sequence[Mapping[str, object]]) -> dict[str, dict[str, Interval]]:
    """Return rows for each set of prompts: the figures with the filter off, and differences to it, over prompts and seeds."""
    rows: dict[str, dict[str, Interval]] = {}
    for name in runs[0]["continuations"]:  # type: ignore[attr-defined]
        scored = [(run["variant"], maximum_toxicity(toxicity_scores(run["continuations"][name]))) for run in runs]  # type: ignore[index]
        for figure in scored[0][1]:
            values: Losses = {}
            for variant in dict.fromkeys(str(variant) for variant, _ in scored):
                values[variant] = {figure: np.array([found[figure] for one, found in scored if one == variant])}
            label = {"expected_maximum": "expected maximum toxicity", "any_toxic": "probability of a toxic one"}[figure]
            rows[f"{name}: {label}"] = row_of(values, [figure], "off")
    return rows


# Age


def age_study(setting: Setting) -> dict[str, object]:
    """Train on each period of each dated domain and evaluate on each; print and return what was found."""
    pool = setting.pool
    whole = pool.filtered("quality", "keep", pool.documents)
    found: dict[str, object] = {}
    for domain in sorted(domain for domain, dates in pool.dates().items() if dates >= DATES):
        periods = pool.by_age(pool.of_domains(whole, [domain]), PERIODS)
        variants = [Variant(period.name, pool.selection(period.documents), {domain: 1.0}) for period in periods]
        windows = {period.name: pool.windows(list(pool.held_out(period.documents).values()), setting.plan.windows) for period in periods}
        short = equal_tokens(variants, setting.plan.tokens) < setting.plan.tokens
        if problem := unfit(periods, windows, short=short):
            setting.console.print(f"{domain} is left out: {problem}", highlight=False)
            continue
        found[domain] = age_of(setting, domain, variants, {period.name: period.year for period in periods}, windows)
    findings = age_findings({domain: row["slope"] for domain, row in found.items()})  # type: ignore[index]
    print_lines(setting.console, findings)
    return {"domains": found, "findings": findings}


def unfit(periods: Sequence[Period], windows: Mapping[str, np.ndarray], *, short: bool) -> str | None:
    """Return why a domain is not studied, if so."""
    if len(periods) < 3:
        return f"{len(periods)} periods are too few to tell distance from the periods' own effects"
    if short:
        return f"a period has too little text for a run of {MAX_EPOCHS:g} epochs; give fewer --tokens or more text"
    least = min(windows, key=lambda name: len(windows[name]))
    return f"{len(windows[least])} held-out windows in {least}" if len(windows[least]) < MIN_WINDOWS else None


def age_of(
    setting: Setting, domain: str, variants: Sequence[Variant], years: Mapping[str, float], windows: Mapping[str, np.ndarray]
) -> dict[str, object]:
    """Train on each period and evaluate on each; print the table of `domain` and return its figures."""
    plan = setting.plan
    runs = run_all(setting.pool, setting.directory / domain, variants, windows, plan, None)
    losses = losses_of(runs)
    slope = slope_over_distance(losses, years)
    seeds = len(plan.seeds)
    title = f"age, {domain}: loss on each period, and above that of the model trained on it; {plan.tokens:,} tokens, {seeds} seeds"
    table = Table("evaluated on", *(f"trained on {name}" for name in losses), title=title, title_justify="left")
    rows: dict[str, dict[str, Interval]] = {}
    for name in losses:
        rows[name] = row_of(losses, [name], name)
        table.add_row(name, *(f"{rows[name][one][0]:.4f}" if one == name else shown(rows[name][one]) for one in losses))
    setting.console.print(table)
    setting.console.print(f"{domain}: loss per 10 years between training and evaluation: {shown(slope)} nats", highlight=False)
    print_reading(setting.console, variants, runs)
    return {"tokens": plan.tokens, "years": dict(years), "loss": rows, "slope": slope, "reads": reading_of(variants, runs)}


# Domains


def domain_study(setting: Setting) -> dict[str, object]:
    """Compare everything with everything but one domain; print and return what was found."""
    pool = setting.pool
    whole = pool.filtered("quality", "keep", pool.documents)
    windows = domain_windows(pool, whole, setting.plan.windows)
    everything = dict(pool.selection(whole).outcome.details["tokens"])  # type: ignore[arg-type]
    largest = sorted(sorted(everything, key=everything.__getitem__)[-LEFT_OUT:])
    variants = [Variant("all", pool.selection(whole), everything)]
    for left in largest:
        others = {domain: tokens for domain, tokens in everything.items() if domain != left}
        variants.append(Variant(f"no {left}", pool.selection(pool.of_domains(whole, list(others))), others))
    plan = replace(setting.plan, tokens=equal_tokens(variants, setting.plan.tokens))
    runs = run_all(pool, setting.directory, variants, windows, plan, None)
    losses = losses_of(runs)
    rows = {domain: row_of(losses, [domain], "all") for domain in windows}
    heads = {left: rows[left][f"no {left}"] for left in largest if left in rows}
    others = {left: compared(losses, f"no {left}", "all", [domain for domain in windows if domain != left]) for left in largest}
    every = {left: compared(losses, f"no {left}", "all", list(windows)) for left in largest}
    title = f"domains: what leaving one out does to the held-out loss; {plan.tokens:,} tokens, {len(plan.seeds)} seeds"
    table = Table("left out", "share of tokens", "on itself", "mean of the others", "mean of all", title=title, title_justify="left")
    for left in largest:
        share = f"{everything[left] / sum(everything.values()):.1%}"
        table.add_row(left, share, *(shown(row[left]) if left in row else "no windows" for row in (heads, others, every)))
    setting.console.print(table, matrix_of(rows, "all"))
    print_reading(setting.console, variants, runs)
    findings = domain_findings(heads, others, every)
    print_lines(setting.console, findings)
    tables = {"loss": rows, "itself": heads, "others": others, "all": every}
    return {"tokens": plan.tokens, **tables, "reads": reading_of(variants, runs), "findings": findings}


def matrix_of(rows: Mapping[str, Mapping[str, Interval]], baseline: str) -> Table:
    """Return the losses of the baseline and every difference to it, with half of the 95 % interval; a star where it leaves out 0."""
    title = "the same by domain: loss of all, difference ± half of the interval"
    table = Table("evaluated on", *next(iter(rows.values())), title=title, title_justify="left")
    for name, row in rows.items():
        cells = [
            f"{mean:.3f}" if variant == baseline else f"{mean:+.3f}\n±{high - mean:.3f}{'' if low <= 0 <= high else '*'}"
            for variant, (mean, low, high) in row.items()
        ]
        table.add_row(name, *cells)
    return table


# Tables


def row_of(losses: Losses, groups: Sequence[str], baseline: str) -> dict[str, Interval]:
    """Return the mean over `groups` of the baseline, and the difference to it of every other variant, each with its interval."""
    own = difference([losses[baseline][group] for group in groups], np.full(len(groups), 1 / len(groups)))
    return {variant: own if variant == baseline else compared(losses, variant, baseline, groups) for variant in losses}


def table_of(title: str, baseline: str, rows: Mapping[str, Mapping[str, Interval]]) -> Table:
    """Return rows of `row_of` as a table; a star where the interval of a difference leaves out 0."""
    table = Table("", *next(iter(rows.values())), title=title, title_justify="left")
    for name, row in rows.items():
        table.add_row(name, *(f"{found[0]:.4f}" if one == baseline else shown(found) for one, found in row.items()))
    return table


def reading_of(variants: Sequence[Variant], runs: Sequence[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Return what each variant has and how often it reads its domains."""
    found: dict[str, dict[str, object]] = {}
    for variant in variants:
        run = next(run for run in runs if run["variant"] == variant.name)
        counts = {"documents": variant.selection.counts["documents"], "tokens": sum(variant.tokens.values())}
        found[variant.name] = {**counts, "epochs": run["epochs"], "shares": run["shares"]}
    return found


def print_reading(console: Console, variants: Sequence[Variant], runs: Sequence[Mapping[str, object]]) -> None:
    """Print a line for each variant: its size, and the shares of its tokens."""
    for name, row in reading_of(variants, runs).items():
        shares, epochs = row["shares"], row["epochs"].values()  # type: ignore[attr-defined]
        parts = ", ".join(f"{domain} {share:.0%}" for domain, share in sorted(shares.items(), key=lambda item: -item[1]))  # type: ignore[attr-defined]
        size = f"{row['documents']:,} documents, {row['tokens']:,} tokens, read {min(epochs):.2f} to {max(epochs):.2f} times"
        console.print(f"  {name}: {size}: {parts}", highlight=False, soft_wrap=True)


def print_lines(console: Console, findings: Sequence[Mapping[str, object]]) -> None:
    """Print which findings appear."""
    for finding in findings:
        console.print(f"  {finding['finding']}: {finding['here']}", highlight=False, soft_wrap=True)
    console.print()


# What the intervals say of the paper's findings


def verdict(finding: str, interval: Interval | None, *, above: bool) -> dict[str, object]:
    """Return whether `interval` lies on the side of 0 that `finding` says, on the other, or holds 0."""
    if interval is None:
        return {"finding": finding, "here": "not measured"}
    _, low, high = interval
    if low <= 0 <= high:
        return {"finding": finding, "here": f"not seen, {shown(interval)}"}
    return {"finding": finding, "here": f"{'appears' if (low > 0) == above else 'the opposite'}, {shown(interval)}"}


def quality_findings(rows: Mapping[str, Mapping[str, Interval]], toxicity: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, object]]:
    """Return what the paper finds of quality filters (section 5), and whether it appears."""
    mean, (_, generated) = next(iter(rows.values())), next(iter(toxicity.items()))
    return [
        verdict("a quality filter makes the model better (loss falls)", mean["on"], above=False),
        verdict("what it drops alone makes a worse model (loss rises)", mean["inverse"], above=True),
        verdict("a quality filter makes continuations more toxic", generated["on"], above=True),
        verdict("also: the filter costs on what it drops", rows.get(DROPPED, {}).get("on"), above=True),
    ]


def toxicity_findings(
    rows: Mapping[str, Mapping[str, Interval]], toxicity: Mapping[str, Mapping[str, Interval]]
) -> list[dict[str, object]]:
    """Return what the paper finds of toxicity filters (section 5), and whether it appears."""
    mean, dropped = next(iter(rows.values())), rows.get(DROPPED, {})
    found = [verdict("a toxicity filter makes the model worse in general (loss rises)", mean["on"], above=True)]
    found += [
        verdict(f"a toxicity filter makes continuations less toxic, {name}", row["on"], above=False)
        for name, row in toxicity.items()
        if "expected" in name
    ]
    found += [
        verdict(f"also: the inverse filter makes continuations more toxic, {name}", row["inverse"], above=True)
        for name, row in toxicity.items()
        if "expected" in name
    ]
    return [
        *found,
        verdict("a toxicity filter makes the model know toxic text less (loss on what it drops rises)", dropped.get("on"), above=True),
        verdict("the inverse filter makes the model know toxic text better", dropped.get("inverse"), above=False),
    ]


def age_findings(slopes: Mapping[str, Interval]) -> list[dict[str, object]]:
    """Return what the paper finds of age (section 4), and whether it appears."""
    claim = "loss rises with the time between training and evaluation"
    return [verdict(f"{claim}, {domain}, nats per 10 years", slope, above=True) for domain, slope in slopes.items()]


def domain_findings(
    itself: Mapping[str, Interval], others: Mapping[str, Interval], every: Mapping[str, Interval]
) -> list[dict[str, object]]:
    """Return what the paper finds of domains left out (section 6), and how many of the intervals say so."""

    def counted(finding: str, rows: Mapping[str, Interval]) -> dict[str, object]:
        worse, better = (sorted(d for d, (_, low, high) in rows.items() if side(low, high)) for side in (_above, _below))
        there = (
            f"rises for {len(worse)} of {len(rows)} ({', '.join(worse) or 'none'}), falls for {len(better)} ({', '.join(better) or 'none'})"
        )
        return {"finding": finding, "here": there}

    ordered = sorted(every, key=lambda domain: every[domain][0], reverse=True)
    worst = ", ".join(f"{domain} {shown(every[domain])}" for domain in ordered[:2])
    return [
        counted("text of a domain helps on that domain: its loss without it", itself),
        counted("text of a domain helps on other domains: their mean loss without it", others),
        counted("as many sources as possible: mean loss of all domains without one", every),
        {"finding": "in the paper web text and books matter most; here", "here": worst},
    ]


def _above(low: float, high: float) -> bool:
    return low > 0


def _below(low: float, high: float) -> bool:
    return high < 0


FINDINGS = {"quality": quality_findings, "toxicity": toxicity_findings}
STUDIES: dict[str, Callable[[Setting], dict[str, object]]] = {
    "quality": lambda setting: filter_study(setting, "quality"),
    "toxicity": lambda setting: filter_study(setting, "toxicity"),
    "age": age_study,
    "domains": domain_study,
}


if __name__ == "__main__":
    main()
