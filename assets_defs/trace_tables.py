"""What `gristmill trace` prints: the answers of `assets_defs.tracing` as tables."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.documents import split_partition
from pipelines.explanation import written

MAX_ROWS = 40
"""Rows of a table on the terminal; JSON has them all."""


def show(answer: Mapping[str, Any], console: Console, *, every: bool = False) -> None:
    """Print an answer; `every` row of long tables where asked."""
    limit = 10**9 if every else MAX_ROWS
    {"document": _document, "artifact": _artifact, "downstream": _downstream}[answer["kind"]](answer, console, limit)


def _document(answer: Mapping[str, Any], console: Console, limit: int) -> None:
    domain, snapshot = split_partition(answer["partition"])
    console.print(f"{answer['id']}  ({domain}, {snapshot[:7]})", style="bold", markup=False)
    origin = answer["origin"]
    console.print(f"came in as row {origin['row']:,} of {origin['file']} in raw_corpus {origin['artifact'][:12]}", markup=False)
    for key in ("source", "url", "title", "license", "date", "lang", "locator", "reason"):
        if origin.get(key):
            console.print(f"  {key}: {written(origin[key])}", markup=False)
    console.print(f"  read by {origin['read_by']} from {', '.join(origin['source_files']) or 'elsewhere'}", markup=False)
    for decision in answer["decisions"]:
        _decision(decision, console)
    for checkpoint in answer["checkpoints"]:
        _seen(checkpoint, console, domain, limit)
    if not answer["checkpoints"]:
        console.print("no recipe that was asked about has a checkpoint yet")


def _decision(decision: Mapping[str, Any], console: Console) -> None:
    made = f" (selection {decision['made_from'][:12]})" if decision["made_from"] else " (as it stands; no checkpoint was trained on it)"
    console.print(f"\n{', '.join(decision['recipes'])}{made}", style="bold", markup=False)
    rows = _table("stage", "verdict", "reason", "scores", "failed")
    for stage in decision["stages"]:
        scores = [score for score in stage["scores"] if score["verdict"] in ("passes", "fails")]
        failed = ", ".join(score["rule"] for score in scores if score["verdict"] == "fails")
        facts = {key: stage["facts"][key] for key in ("cluster", "documents_in_cluster", "split") if key in stage["facts"]}
        reason = "; ".join(filter(None, [stage["reason"], *(f"{key.replace('_', ' ')} {written(value)}" for key, value in facts.items())]))
        rows.add_row(stage["stage"], stage["verdict"], escape(reason), str(len(scores) or ""), escape(failed))
    console.print(rows)
    for passage in (one for stage in decision["stages"] for one in stage["facts"].get("listed", ())):
        by = "itself" if passage["representative_id"] == decision.get("id") else passage["representative_id"]
        taken = "selected" if passage["selected"] else "not selected"
        words = f"  passage {passage['passage']}: {taken}, rank {written(passage['rank'])}, gain {written(passage['gain'])}"
        console.print(f"{words}, represented by {by} (similarity {written(passage['similarity'])})", markup=False)


def _seen(one: Mapping[str, Any], console: Console, domain: str, limit: int) -> None:
    console.print(f"\n{one['asset']}[{', '.join(one['recipes'])}]  {one['fingerprint'][:12]}", style="bold", markup=False)
    if not one["known"]:
        console.print("  taken as it is, not trained here: what it has read is not known")
        return
    if tokens := one["tokens"]:
        words = (
            f"  {tokens['length']:,} tokens from {tokens['offset']:,} on in tokenized_shards[{tokens['shard']}] {tokens['artifact'][:12]}"
        )
        console.print(f"{words}, {len(tokens['passages'])} passages", markup=False)
    readings = one["readings"]
    if not readings:
        console.print(f"  none of its {one['steps_in_all']:,} steps read it")
        return
    epochs = max(reading["epoch"] for reading in readings) + 1
    words = f"  {len(one['steps']):,} of {one['steps_in_all']:,} steps read it, over {epochs} epochs: {one['tokens_read']:,} tokens"
    console.print(words)
    steps = _by_step(readings)
    rows = _table("step", "epoch", "round", "passages", "tokens", right=("step", "epoch", "round", "tokens"))
    for (step, epoch, round_number), (passages, tokens) in list(steps.items())[:limit]:
        shown = ", ".join(map(str, sorted(passages)))
        rows.add_row(f"{step:,}", str(epoch), "" if round_number is None else str(round_number), shown, f"{tokens:,}")
    console.print(rows)
    _more(len(steps), limit, console)
    _evaluations(one["evaluations"], console, prefix=f"{domain}_")


def _by_step(readings: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int, int | None], tuple[set[int], int]]:
    """Return, by step, epoch and round, the passages that were read and how many tokens of them."""
    found: dict[tuple[int, int, int | None], tuple[set[int], int]] = {}
    for one in readings:
        key = (one["step"], one["epoch"], one["round"])
        passages, tokens = found.get(key, (set(), 0))
        found[key] = (passages | {one["passage"]}, tokens + one["tokens"])
    return found


def _artifact(answer: Mapping[str, Any], console: Console, limit: int) -> None:
    _head(answer, console)
    console.print("settings", style="bold")
    for key, value in answer["settings"].items():
        if value not in (None, {}, [], ""):
            console.print(f"  {key}: {json.dumps(value, ensure_ascii=False)[:300]}", markup=False)
    results = {**answer["counts"], **answer["metrics"]}
    console.print("results", style="bold")
    for key, value in list(results.items())[:limit]:
        console.print(f"  {key}: {written(value)}", markup=False)
    _more(len(results), limit, console)
    if "documents" in answer:
        _documents(answer["documents"], console)
    _evaluations(answer.get("evaluations", ()), console, prefix="")
    _ancestors(answer["ancestors"], console, limit, every=limit > MAX_ROWS)


def _head(answer: Mapping[str, Any], console: Console) -> None:
    label = f"{answer['asset']}[{answer['partition']}]" if answer["partition"] else answer["asset"]
    console.print(f"{label}  {answer['fingerprint']}", style="bold", markup=False)
    stands = ", ".join(key or answer["asset"] for key in answer["stands_at"]) or "no partition: it is superseded"
    console.print(f"  stands at: {stands}", markup=False)
    if answer["recipe"]:
        console.print(f"  recipe: {answer['recipe']}", markup=False)
    console.print(f"  code version {answer['code_version']}, computed {answer['computed']} in {answer['seconds']} s", markup=False)
    console.print(f"  {answer['bytes']:,} bytes in {answer['directory']}", markup=False)


def _documents(runs: Sequence[Mapping[str, Any]], console: Console) -> None:
    console.print("documents that it has seen", style="bold")
    rows = _table(
        "run", "domain", "documents", "tokens", "tokens read", "times read", right=("documents", "tokens", "tokens read", "times read")
    )
    for run in runs:
        for row in run["domains"]:
            counts = (f"{row[key]:,}" for key in ("documents", "tokens", "tokens_read"))
            rows.add_row(f"{run['asset']} {run['fingerprint'][:12]}", row["domain"], *counts, f"{row['times_read']:.3f}")
        if "note" in run:
            rows.add_row(f"{run['asset']} {run['fingerprint'][:12]}", run["note"], "", "", "", "")
    console.print(rows)


def _evaluations(found: Sequence[Mapping[str, Any]], console: Console, *, prefix: str) -> None:
    if not found:
        return
    console.print("evaluations", style="bold")
    for one in found:
        now = "" if one["stands_at"] else ", superseded"
        console.print(f"  {one['asset']}[{one['partition']}] {one['fingerprint'][:12]}, {one['computed']}{now}", markup=False)
        shown = {key: value for key, value in one["metrics"].items() if key.startswith(prefix)}
        if shown:
            console.print("    " + ", ".join(f"{key} {written(value)}" for key, value in list(shown.items())[:6]), markup=False)


def _ancestors(ancestors: Sequence[Mapping[str, Any]], console: Console, limit: int, *, every: bool) -> None:
    console.print(f"made from {len(ancestors)} artifacts", style="bold")
    rows = _table("asset", "artifacts", "fingerprint", "code version", "computed", "seconds", "read by", right=("artifacts", "seconds"))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in ancestors:
        key = f"{one['asset']}[{one['partition']}]" if every and one.get("partition") else one["asset"]
        groups.setdefault(key if not every else f"{key} {one['fingerprint']}", []).append(one)
    for key, found in list(groups.items())[:limit]:
        there = [one for one in found if not one["gone"]]
        readers = dict.fromkeys(one["read_by"]["asset"] for one in found)
        rows.add_row(
            escape(key.rpartition(" ")[0] if every else key),
            str(len(found)),
            found[0]["fingerprint"][:12] if len(found) == 1 else f"{len(found)} of them",
            ", ".join(sorted({one["code_version"] for one in there})) or "gone",
            _minute(min((one["computed"] for one in there), default="")),
            f"{sum(one['seconds'] for one in there):.1f}",
            ", ".join(readers),
        )
    console.print(rows)
    _more(len(groups), limit, console)
    if gone := [one for one in ancestors if one["gone"]]:
        console.print(f"  {len(gone)} of them are gone from the store", style="bold red")


def _downstream(answer: Mapping[str, Any], console: Console, limit: int) -> None:
    _head(answer, console)
    found = answer["descendants"]
    console.print(
        f"made from it and standing at a partition: {len(found)} artifacts; {answer['superseded']} more are superseded", style="bold"
    )
    rows = _table("artifact", "stands at", "fingerprint", "code version", "computed", right=())
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        groups.setdefault(one["asset"], []).append(one)
    for asset, ones in groups.items():
        keys = [key or "" for one in ones for key in one["stands_at"]]
        shown = ", ".join(keys if limit > MAX_ROWS else keys[:4]) + (
            f" and {len(keys) - 4} more" if len(keys) > 4 and limit <= MAX_ROWS else ""
        )
        which = ones[0]["fingerprint"][:12] if len(ones) == 1 else f"{len(ones)} of them"
        versions = ", ".join(sorted({one["code_version"] for one in ones}))
        rows.add_row(asset, escape(shown), which, versions, _minute(min(one["computed"] for one in ones)))
    console.print(rows)


def _minute(when: str) -> str:
    return when[:16].replace("T", " ")


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    rows = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in columns:
        rows.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return rows


def _more(count: int, limit: int, console: Console) -> None:
    if count > limit:
        console.print(f"  and {count - limit:,} more; --all or --json lists them")
