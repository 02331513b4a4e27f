"""`gristmill run --dry-run`: what the trainings of a recipe would take, from a few steps of each that are then forgotten."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from assets_defs.resources import Mill
from assets_defs.training import both_roles, role_shards, selected
from pipelines.data_order import DomainMixture
from pipelines.manifests import Json, Manifest
from pipelines.plan import located
from pipelines.probing import probe_shares
from pipelines.shares import mixed_shares, role_shares
from pipelines.training import dry_run_checkpoint

ASSUMED_RATIO = 0.5


def show_dry_run(mill: Mill, name: str) -> None:
    """Print parameters, memory, tokens, epochs by domain and estimated time of the checkpoints and the probes of recipe `name`.

    Raises:
        MissingArtifact: the recipe's selection is not there yet.
    """
    recipe = mill.recipe(name)
    tokenizer = mill.store.current("tokenizer")
    both = both_roles(mill, name)
    first = {} if recipe.general is None else {"general checkpoint": _general(mill, name, tokenizer)}
    shares, note = _mixture_shares(mill, name, both)
    shards = role_shards(mill, recipe, ("general", "target"))
    fresh = {"model": recipe.model}  # as large as the base that it will continue
    whole = located(recipe.pretraining_settings().model_copy(update=fresh), mill.root)
    second = dry_run_checkpoint(whole, shares, selection=both, shards=shards, tokenizer=tokenizer)
    probe = located(recipe.probe_settings(recipe.probes[0]).model_copy(update=fresh), mill.root)
    third = dry_run_checkpoint(probe, probe_shares(probe, both), selection=both, shards=shards, tokenizer=tokenizer)
    console = Console()
    columns = {**first, f"probe (one of {len(recipe.probes)})": third, "pretrained checkpoint": second}
    console.print(_sizes(columns))
    console.print(_epochs(columns))
    console.print(f"The peak is {second['peak']}; memory is that of the whole process on a CPU.")
    if not first:
        console.print(f"The general checkpoint is {recipe.model.checkpoint} as it is; nothing is trained for it.")
    if note:
        console.print(note)


def _general(mill: Mill, name: str, tokenizer: Manifest) -> dict[str, Json]:
    """Return what the general checkpoint would take."""
    recipe, general = mill.recipe(name), (selected(mill, name, "general"),)
    settings, shards = located(recipe.general_settings(), mill.root), role_shards(mill, recipe, ("general",))
    return dry_run_checkpoint(settings, role_shares(general)["general"], selection=general, shards=shards, tokenizer=tokenizer)


def _mixture_shares(mill: Mill, name: str, both: tuple) -> tuple[DomainMixture, str]:
    if mill.store.is_current("domain_mixture", name):
        return DomainMixture.read(mill.store.current("domain_mixture", name)), ""
    ratio = mill.recipe(name).mixture.ratio
    found = ASSUMED_RATIO if ratio is None else ratio
    note = (
        "" if ratio is not None else f"The critical ratio is not measured yet; the pretrained checkpoint is shown at target share {found}."
    )
    roles = role_shares(both)
    return DomainMixture(shares=mixed_shares(roles, found), role_shares=roles, ratio=found), note


def _sizes(columns: Mapping[str, Mapping[str, Json]]) -> Table:
    rows = {
        "model": lambda d: d["architecture"],
        "parameters": lambda d: f"{d['parameters']:,}",
        "tokens": lambda d: f"{d['tokens']:,} in {d['steps']:,} steps of {d['tokens_per_step']:,}",
        "phases": lambda d: ", ".join(f"{p['objective']} {p['tokens']:,}" for p in d["phases"]),
        "selection on the way": lambda d: _selection(d["selection"]),
        "device, precision": lambda d: f"{d['device']}, {d['precision']}",
        "memory": lambda d: f"{d['memory_bytes'] / 1e6:,.0f} MB",
        "tokens per second": lambda d: f"{d['tokens_per_second']:,.0f}",
        "of the peak": lambda d: f"{d['model_flops_utilisation']:.0%}",
        "operations": lambda d: f"{d['flops']:.3g}",
        "estimated time": lambda d: _duration(d["estimated_seconds"]),
    }
    table = Table("", *columns, title="What training would take")
    for label, shown in rows.items():
        table.add_row(label, *(shown(found) for found in columns.values()))
    return table


def _selection(planned: Sequence[Mapping[str, Json]]) -> str:
    return ", ".join(f"{one['rounds']} rounds, {one['tokens_embedded_per_round']:,} tokens embedded in each" for one in planned) or "none"


def _epochs(columns: Mapping[str, Mapping[str, Json]]) -> Table:
    by_domain: dict[str, dict[str, str]] = {}
    for name, found in columns.items():
        for row in found["domains"]:
            by_domain.setdefault(row["domain"], {})[name] = f"{row['share']:.1%}, {row['epochs']:.2f} epochs"
    table = Table("domain", *columns, title="Share of the tokens, and how often its selected passages are read")
    for domain in sorted(by_domain):
        table.add_row(domain, *(by_domain[domain].get(name, "") for name in columns))
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
