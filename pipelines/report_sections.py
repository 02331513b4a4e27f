"""The sections of the report: each is a function from the recipe's artifacts to HTML, empty where the manifests hold nothing for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from pipelines import filter_tables, vocabulary
from pipelines.documents import split_partition
from pipelines.manifests import Check, Json, Manifest
from pipelines.pages import Column, Html, code, count, decimals, figures, folded, mark, number, paragraph, percent, table
from pipelines.report_artifacts import CHANGE, Artifacts, Row, columns, counted, plots_of, rows_of, words

CORPUS_COUNTS = ("documents_in", "kept", "dropped", "quarantined", "characters", "bytes", "snapshots")
"""The counts of a cleaned corpus that are no kind of change."""
MAX_FINDING = 400
"""Characters of what the checks of one kind found, before every check is listed."""

FERTILITY = "domain tokens bytes_per_token tokens_per_word vocabulary_share own_tokens"


def corpus(made: Artifacts) -> str:
    """Write what was read, by domain, what cleaning changed, and what the tokenizer makes of it."""
    roles = made.evaluation.settings.get("roles")
    roles = roles if isinstance(roles, dict) else {}
    raw, cleaned = _by_domain(made.raw), _by_domain(made.cleaned)
    kinds = sorted({key for counts in cleaned.values() for key in counts if key not in CORPUS_COUNTS and counts[key]})
    rows, changes = [], []
    for domain in sorted(raw | cleaned):
        before, after = raw.get(domain, {}), cleaned.get(domain, {})
        came = {key: before.get(key) for key in ("snapshots", "documents_in", "quarantined")}
        rows.append({"domain": domain, "role": roles.get(domain), **came, "kept": after.get("kept"), "characters": after.get("characters")})
        changes.append({"domain": domain, **{kind: after.get(kind) for kind in kinds}})
    changed = [*columns("domain"), *counted({kind: words(kind) for kind in kinds})] if kinds else []
    return (
        table(rows, columns("domain role snapshots documents_in quarantined kept characters"))
        + table(changes if kinds else [], changed, caption="What cleaning changed")
        + table(_quarantine(made.raw), columns("reason documents"), caption="Why documents were quarantined")
        + table(vocabulary.by_domain(made.shards), columns(FERTILITY), caption="What the tokenizer makes of it")
    )


def _by_domain(manifests: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    """Return the counts of source partitions, summed by domain, and the number of snapshots."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for manifest in manifests:
        domain, _ = split_partition(manifest.partition or "")
        found[domain]["snapshots"] += 1
        for key, value in manifest.counts.items():
            found[domain][key] += value
    return {domain: dict(counts) for domain, counts in found.items()}


def _quarantine(raw: Sequence[Manifest]) -> list[Row]:
    reasons: dict[str, int] = defaultdict(int)
    for row in (row for manifest in raw for row in rows_of(manifest, "quarantine")):
        reasons[str(row.get("reason"))] += int(row.get("documents") or 0)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [{"reason": reason, "documents": documents} for reason, documents in ordered]


MODES = {"off": "The filter is off: every document is kept.", "inverse": "The filter is inverse: it keeps what it would drop."}


def filters(made: Artifacts) -> str:
    """Write what the two filters dropped, where and by which rule."""
    decontaminated = _filter("Decontamination", made.decontaminated) if made.decontaminated else ""
    costs = _costs(made.sweep) if made.sweep else ""
    return _filter("Quality", made.quality) + _filter("Toxicity", made.toxicity) + decontaminated + costs


MAX_COSTS = 20
"""Rules listed, those that cost most first."""


def _costs(sweep: Manifest) -> str:
    """Write which rules cost most where, and what each would cost at other thresholds."""
    ordered = sorted(rows_of(sweep, "costs"), key=lambda row: -int(row.get("lost_characters") or 0))
    rows = [{**row, "rule": code(row.get("rule")), "threshold": _threshold({**row, "value": row.get("threshold")})} for row in ordered]
    shown = "domain rule threshold lost_documents lost_characters lost_tokens share_characters_lost"
    costly = [row for row in rows if row.get("lost_documents")][:MAX_COSTS]
    caption = "What the recipe would keep more of without one rule, all others as they are"
    body = table(costly, columns(shown), caption=caption)
    note = "One rule moves, all others stay; a dot is the recipe's threshold. A line that is flat at its dot leaves the choice free."
    body += folded("Curves over every threshold, by rule and domain", paragraph(note, kind="quiet") + figures(plots_of(sweep)))
    return f"<h3>What each rule costs</h3>\n{body}" if costly or sweep.outcome.plots else ""


def _filter(name: str, decided: Manifest) -> str:
    body = (
        paragraph(MODES.get(str(decided.settings.get("mode")), ""))
        + table(rows_of(decided, "by_domain"), columns("domain documents_in kept dropped share_dropped"))
        + figures(plots_of(decided, f"{name} filter:"))
        + filter_tables.by_language(rows_of(decided, "by_language"))
        + _by_rule(rows_of(decided, "by_rule"), "Documents dropped, by the first rule that failed")
        + filter_tables.rule_costs(rows_of(decided, "by_rule"))
        + filter_tables.by_topic(rows_of(decided, "by_topic"))
        + _thresholds(decided)
    )
    return f"<h3>{name}</h3>\n{body}" if body else ""


def _by_rule(dropped: Sequence[Row], caption: str) -> Html:
    """Return a table of rule by domain, the rule that dropped most first."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in (row for row in dropped if row.get("dropped")):
        found[str(row.get("rule"))][str(row.get("domain"))] += int(row.get("dropped") or 0)
    ordered = sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    rows = [{"rule": code(rule), "all": sum(counts.values()), **_in(counts)} for rule, counts in ordered]
    domains = sorted({domain for counts in found.values() for domain in counts})
    return table(rows, [*columns("rule"), *counted({"all": "All", **{f"in {domain}": domain for domain in domains}})], caption=caption)


def _in(by_domain: Mapping[str, Json]) -> Row:
    """Return the values under keys that no other column has, whatever the domains are called."""
    return {f"in {domain}": value for domain, value in by_domain.items()}


def _thresholds(decided: Manifest) -> Html:
    given = decided.settings.get("thresholds")
    thresholds = {domain: rules for domain, rules in given.items() if isinstance(rules, dict)} if isinstance(given, dict) else {}
    names = sorted({rule for rules in thresholds.values() for rule in rules})
    rows = [{"rule": code(rule), **_in({domain: _threshold(rules.get(rule)) for domain, rules in thresholds.items()})} for rule in names]
    by_domain = [*columns("rule"), *(Column(f"in {domain}", domain, number) for domain in sorted(thresholds))]
    caption = "A document passes a rule with a score of at least (≥) or at most (≤) the value; where there is none, the rule is off"
    return folded("Thresholds in use, by domain", table(rows, by_domain, caption=caption))


def _threshold(value: Json) -> str | None:
    if not isinstance(value, dict):
        return None
    return f"{'≥' if value.get('keep') == 'at_least' else '≤'} {number(value.get('value'))}"


def deduplication(made: Artifacts) -> str:
    """Write how many duplicates went, and how what stayed is split."""
    return (
        table(rows_of(made.deduplicated, "by_domain"), columns("domain documents_in kept dropped share_dropped kept_train kept_held_out"))
        + _by_rule(rows_of(made.deduplicated, "by_rule"), "Documents dropped, by kind of duplicate")
        + figures(plots_of(made.deduplicated, "Deduplication:"))
    )


CERTIFICATE = {
    "coverage": ("Coverage: mean cosine to the nearest selected passage", decimals(4)),
    "coverage_random": ("Coverage of random passages with as many tokens", decimals(4)),
    "coverage_greedy": ("Coverage of greedy facility location with as many tokens", decimals(4)),
    "upper_bound": ("Coverage that no set of as many passages and tokens exceeds", decimals(4)),
    "upper_bound_of_tokens": ("The same of as many tokens, however short the passages", decimals(4)),
    "bound_is_certain": ("Both bounds are proven (1), or estimated on a sample (0)", count),
    "gap_share": ("Share of the way from random to greedy", percent),
    "gap_share_at_least": ("Share of the way from random to the bound", percent),
    "certified_ratio": ("Coverage as a share of the bound", percent),
    "selected_share": ("Share of tokens selected", percent),
    "random_share_for_same_coverage": ("Share of tokens that random choice needs for that coverage", percent),
    "neighbor_recall": ("Share of true nearest neighbours that the graph holds", percent),
    "zero_gain_passages": ("Passages that add nothing, and are never selected", count),
    "query_coverage": ("Mean cosine of the target set to the nearest selected passage", decimals(4)),
    "query_coverage_random": ("The same with random passages", decimals(4)),
}
COVERS = (
    "With {selected_share} of the {role} tokens the selection covers as much as {random_share_for_same_coverage} drawn at random would: "
    "{gap_share_at_least} of the way from random to the bound."
)
ABSORBED = {
    "most_absorbed": "Selected passages that represent most others, and the nearest of these",
    "near_duplicates": "Selected passages and the nearest duplicates that they stand for",
}
ABSORBED_COLUMNS = "role domain id passage represented mean_similarity absorbed_domain absorbed_id absorbed_passage absorbed_similarity"


def selection(made: Artifacts) -> str:
    """Write the certificate of each role, the shares of the domains before and after, and which passages stand for most others."""
    found = {**made.selection.counts, **made.selection.outcome.metrics}
    roles = [role for role in ("general", "target") if any(f"{role}_{key}" in found for key in CERTIFICATE)]
    shown = {role: {key: form(found.get(f"{role}_{key}")) for key, (_, form) in CERTIFICATE.items()} for role in roles}
    said = [COVERS.format(role=role, **shown[role]) for role in roles if f"{role}_gap_share_at_least" in found]
    measured = [key for key in CERTIFICATE if any(f"{role}_{key}" in found for role in roles)]
    certificate = [{"measure": CERTIFICATE[key][0], **{role: shown[role][key] for role in roles}} for key in measured]
    amounts = "passages selected_passages tokens selected_tokens"
    names = ("id", "absorbed_id")
    absorbed = {key: [row | {name: code(row.get(name)) for name in names} for row in rows_of(made.selection, key)] for key in ABSORBED}
    return (
        paragraph(" ".join(said))
        + table(certificate, [*columns("measure"), *(Column(role, words(role), number) for role in roles)])
        + figures(plots_of(made.selection, "Selection:"))
        + table(rows_of(made.selection, "by_domain"), columns(f"role domain {amounts} share_before share_after"))
        + folded("By snapshot", table(rows_of(made.selection, "by_snapshot"), columns(f"role snapshot {amounts}")))
        + "".join(folded(name, table(absorbed[key], columns(ABSORBED_COLUMNS))) for key, name in ABSORBED.items())
    )


def mixture(made: Artifacts) -> str:
    """Write the probes, what they say of the ratio, the run that verifies it, and the shares that follow."""
    tokens, windows = made.probes[0].counts.get("tokens") if made.probes else None, made.ratio.counts
    note = (
        f"Each probe continues the general checkpoint for {count(tokens)} tokens or less. Losses are in nats per token, "
        f"on {count(windows.get('general_windows'))} general and {count(windows.get('target_windows'))} target held-out windows."
    )
    probes = table(rows_of(made.ratio, "probes"), columns("ratio seed tokens general_delta general_standard_error target_delta"))
    return (
        (paragraph(note, kind="quiet") + probes if probes else "")
        + table(rows_of(made.ratio, "verification"), columns(VERIFICATION), caption="The run that verifies the ratio")
        + _reasons(made.ratio, "refusals", "Why the estimate was refused")
        + _reasons(made.ratio, "warnings", "What to know of it")
        + table(rows_of(made.ratio, "guards"), columns(GUARDS), caption="Guarded domains")
        + table(rows_of(made.ratio, "caps"), columns(CAPS), caption="How often the best mixture reads each domain")
        + figures([*plots_of(made.ratio), *plots_of(made.mixture, "Shares of tokens in the")])
        + table(rows_of(made.mixture, "domains"), columns("domain role share available_tokens planned_tokens epochs upsampling limited"))
        + folded("The law, beside others", table(rows_of(made.ratio, "laws"), columns(LAWS)))
        + folded("The ratio by the length of training", table(rows_of(made.ratio, "by_tokens"), columns("tokens ratios estimate low high")))
        + folded(
            "How far the general loss rose on the way, and when it was back", table(rows_of(made.ratio, "stability"), columns(STABILITY))
        )
    )


VERIFICATION = "ratio tokens predicted_general_delta measured_general_delta standard_error wanted held target_delta"
GUARDS = "domain tolerance_nats predicted low high measured binding multiplier"
CAPS = "domain share available_tokens planned_tokens epochs binding"
LAWS = "law rmse_nats left_out_nats left_out_in_tolerances estimate chosen"
STABILITY = "probe ratio seed tokens dip_depth tokens_at_peak tokens_back_at_base tokens_back_within_tolerance stopped"


def _reasons(found: Manifest, name: str, caption: str) -> Html:
    rows = [{**row, "code": code(row.get("code"))} for row in rows_of(found, name)]
    return table(rows, columns("code seen remedy"), caption=caption)


def training(made: Artifacts) -> str:
    """Write the two runs that left a checkpoint."""
    runs = (("General checkpoint", made.general), ("Pretrained checkpoint", made.checkpoint))
    done = [{**run.provenance, **run.counts, **run.outcome.metrics, "run": name} for name, run in runs if run.counts]
    plots = [plot for name, run in runs for plot in plots_of(run, f"{name}:")]
    shown = table(done, columns("run parameters tokens steps tokens_per_second model_flops_utilisation seconds"))
    read = [folded(f"{name}: what it read", table(rows_of(run, "domains"), columns("domain share epochs"))) for name, run in runs]
    return shown + figures(plots) + "".join(read)


def evaluation(made: Artifacts) -> str:
    """Write the held-out losses before and after."""
    changes = ("loss_change", "bits_per_byte_change")
    held_out = rows_of(made.evaluation, "held_out")
    rows = [{**row, **{key: f"{CHANGE(row.get(key))}{interval(row, key, ' [{}, {}]')}" for key in changes}} for row in held_out]
    loss = "domain role documents tokens loss_before loss_after loss_change"
    bits = "domain role bits_per_byte_before bits_per_byte_after bits_per_byte_change"
    note = paragraph("Before: the general checkpoint. After: the pretrained checkpoint, on the same held-out documents.", kind="quiet")
    return (
        (note if rows else "")
        + table(rows, columns(loss), caption="Loss, nats per token")
        + table(rows, columns(bits), caption="Bits per byte")
        + figures(plots_of(made.evaluation, "Change of"))
        + _beside(made)
        + folded("By snapshot, language and age", "".join(_of_group(made.evaluation, name) for name in ("snapshots", "languages", "ages")))
        + table(rows_of(made.evaluation, "contamination"), columns(SHARED), caption="Held-out text that the training text holds too")
    )


SHARED = "domain documents contaminated share_contaminated tokens shared_tokens share_tokens"
COMPARED = "name documents loss_baseline loss_candidate change p_adjusted verdict"


def _beside(made: Artifacts) -> Html:
    """Write the comparison with the baseline, the tasks and the labelled sets, where there are any."""
    parts = []
    if made.comparison:
        against = made.comparison.outcome.details.get("baseline")
        rows = [{**row, "change": _with_interval(row, "loss_change")} for row in rows_of(made.comparison, "comparison")]
        parts.append(table(rows, columns(COMPARED), caption=f"Compared with {against}, Holm's correction over the rows"))
        guards = [{**row, "change": _with_interval(row, "change")} for row in rows_of(made.comparison, "guards")]
        parts.append(table(guards, columns("guard metric change max_worse passed"), caption="Guards"))
        parts.append(figures(plots_of(made.comparison, "Comparison:")))
    if made.tasks:
        rows = [{**row, "change": _with_interval(row, "change")} for row in rows_of(made.tasks, "tasks")]
        parts.append(table(rows, columns("task items before after change"), caption="Tasks, before and after"))
        parts.append(figures(plots_of(made.tasks, "Task")))
    if made.classification:
        rows = [{**row, "accuracy": _with_interval(row, "accuracy", sign=False)} for row in rows_of(made.classification, "classification")]
        parts.append(table(rows, columns("set method accuracy macro_f1 train_documents test_documents"), caption="Labelled sets"))
        gaps = [{**row, "accuracy": _with_interval(row, "accuracy")} for row in rows_of(made.classification, "pretrained_minus_scratch")]
        parts.append(table(gaps, columns("set accuracy macro_f1"), caption="Pretrained minus fresh weights"))
        parts.append(figures(plots_of(made.classification, "Accuracy:")))
    return Html("".join(parts))


def _of_group(found: Manifest, name: str) -> Html:
    rows = [{**row, "change": _with_interval(row, "loss_change")} for row in rows_of(found, name)]
    return table(rows, columns(f"{name[:-1]} role documents tokens loss_before loss_after change"), caption=words(name))


def _with_interval(row: Mapping[str, Json], key: str, *, sign: bool = True) -> str:
    form = decimals(3, sign=sign)
    return f"{form(row.get(key))} [{form(row.get(f'{key}_low'))}, {form(row.get(f'{key}_high'))}]"


def interval(row: Mapping[str, Json], key: str, form: str) -> str:
    """Return the interval of a change in `form`, which has a place for each end; nothing where there is none."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if low is None or high is None else form.format(CHANGE(low), CHANGE(high))


def checks(made: Artifacts) -> str:
    """Write every check: by asset and name, with what failed; then, folded, each one by itself."""
    found = made.checks()
    grouped: dict[tuple[str, str], list[Check]] = defaultdict(list)
    for asset, _, check in found:
        grouped[asset, check.name].append(check)
    rows = [_check_row(asset, name, group) for (asset, name), group in grouped.items()]
    every = [
        {
            "asset": code(asset),
            "partition": code(audited.partition),
            "check": code(check.name),
            "result": mark(check),
            "finding": check.description,
        }
        for asset, audited, check in found
    ]
    note = "A blocking check that fails keeps its artifact from being published; an advisory one warns."
    each = folded("Every check of every artifact", table(every, columns("asset partition check result finding")))
    return paragraph(note, kind="quiet") + table(rows, columns("asset check result passed kind finding")) + each if found else ""


def _check_row(asset: str, name: str, group: Sequence[Check]) -> Row:
    shown = [check.description for check in group if check.description and (not check.passed or len(group) == 1)]
    return {
        "asset": code(asset),
        "check": code(name),
        "result": mark(*group),
        "passed": f"{sum(check.passed for check in group)} of {len(group)}",
        "kind": "blocking" if group[0].blocking else "advisory",
        "finding": "; ".join(shown)[:MAX_FINDING] or None,
    }


def cost(made: Artifacts) -> str:
    """Write what the artifacts took to make, and the room they take."""
    rows: list[Row] = []
    for asset, manifests in made.assets():
        spent = [manifest.provenance for manifest in manifests]
        rows.append(
            {
                "asset": code(asset),
                "artifacts": len(manifests),
                "seconds": _sum(spent, "seconds") or 0.0,
                "cpu_seconds": _sum(spent, "cpu_seconds"),
                "energy": _sum(spent, "energy_joules"),
                "bytes": sum(manifest.bytes for manifest in manifests),
                "peak_memory": max(int(item.get("peak_memory_bytes") or 0) for item in spent) or None,
            }
        )
    keys = ("artifacts", "seconds", "cpu_seconds", "energy", "bytes")
    rows.append({"asset": "all", **{key: _sum(rows, key) for key in keys}})
    note = (
        "Seconds are summed over artifacts, some made side by side. Memory is the peak of a process, which may have run other steps too. "
    )
    counted = any(row["energy"] is not None for row in rows)
    note += "Energy is that of the whole machine meanwhile." if counted else "Energy: this machine has no counter that may be read."
    shown = (
        "asset artifacts seconds cpu_seconds energy bytes peak_memory"
        if counted
        else "asset artifacts seconds cpu_seconds bytes peak_memory"
    )
    return paragraph(note, kind="quiet") + table(rows, columns(shown))


def _sum(rows: Sequence[Mapping[str, Json]], key: str) -> float | None:
    """Return the sum of what the rows have under `key`, None where none has it."""
    found = [float(row[key]) for row in rows if row.get(key) is not None]
    return sum(found) if found else None


def lineage(made: Artifacts) -> str:
    """Write which artifacts the page speaks of, by fingerprint and content."""
    rows = [
        {
            "asset": code(asset),
            "partition": code(manifest.partition),
            "fingerprint": code(manifest.fingerprint),
            "code_version": code(manifest.code_version),
            "content": code(manifest.content_sha256),
        }
        for asset, manifests in made.assets()
        for manifest in manifests
    ]
    parts = ", ".join(asset if len(manifests) == 1 else f"{asset} ({len(manifests)} partitions)" for asset, manifests in made.assets())
    listed = table(rows, columns("asset partition fingerprint code_version content"))
    return paragraph(f"This page was made from {len(rows)} artifacts: {parts}.") + folded("Fingerprints, code versions and content", listed)


SECTIONS: tuple[tuple[str, str, Callable[[Artifacts], str]], ...] = (
    ("corpus", "Corpus", corpus),
    ("filters", "Filters", filters),
    ("deduplication", "Deduplication", deduplication),
    ("selection", "Selection", selection),
    ("mixture", "Mixture", mixture),
    ("training", "Training", training),
    ("evaluation", "Evaluation", evaluation),
    ("checks", "Checks", checks),
    ("cost", "Cost", cost),
    ("lineage", "Lineage", lineage),
)
"""Anchor, heading and writer of each section, in order."""
