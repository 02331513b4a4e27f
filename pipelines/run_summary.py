"""What a training run found, for its manifest; and what one would take, before it is started."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

from pipelines.manifests import Json, Outcome
from pipelines.reselection import selection_plan
from pipelines.throughput import peak_flops
from pipelines.trainer import Run

DRY_STEPS = 3


def run_outcome(
    run: Run, *, metrics: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None, plots: tuple[str, ...] = ()
) -> Outcome:
    """Return what `run` found: sizes, speed of this process's part of it, and the domains as they were read."""
    return Outcome(
        counts={
            "tokens": run.step * run.tokens_per_step,
            "steps": run.step,
            "parameters": num_parameters(run),
            "events": len(run.guard.events),
            **_last_round(run),
            **(counts or {}),
        },
        metrics={**_speed(run), **_rounds_on_average(run), **(metrics or {})},
        tables={"domains": domain_table(run), "phases": phase_table(run), **_rounds(run), **_events(run)},
        details={
            "device": str(run.device),
            "precision": "bfloat16" if run.half else "float32",
            "processes": run.world.size,
            "stopped_early": run.stopped_early,
        },
        plots=plots,
    )


def num_parameters(run: Run) -> int:
    """Return the number of weights, tied ones once."""
    return sum(p.numel() for p in run.model.parameters())


def domain_table(run: Run) -> list[dict[str, Json]]:
    """Return, by domain, its share of the tokens and how often its passages are read."""
    epochs, shares = run.order.epochs(), run.order.token_shares()
    return [{"domain": d, "share": round(shares[d], 4), "epochs": round(epochs[d], 3)} for d in run.order.domains]


def phase_table(run: Run) -> list[dict[str, Json]]:
    """Return the phases of the plan."""
    return [
        {
            "phase": number,
            "steps": steps,
            "tokens": steps * run.tokens_per_step,
            "objective": phase.objective,
            "schedule": phase.schedule,
            "learning_rate": phase.learning_rate,
        }
        for number, (phase, steps) in enumerate(zip(run.settings.phases, run.plan.phase_steps, strict=True))
    ]


def _events(run: Run) -> dict[str, list[dict[str, Json]]]:
    rows = [{k: e[k] for k in ("step", "action", "reason", "num_documents")} for e in run.guard.events[:20]]
    return {"events": rows} if rows else {}


def _rounds(run: Run) -> dict[str, list[dict[str, Json]]]:
    return {"rounds": run.selector.records} if run.selector.records else {}


def _last_round(run: Run) -> dict[str, int]:
    rows = run.selector.records
    if not rows:
        return {}
    last = [row for row in rows if row["round"] == rows[-1]["round"]]
    sums = {f"last_round_{key}": sum(row[key] for row in last) for key in ("candidates", "passages", "selected_tokens")}
    return {"selection_rounds": len({row["round"] for row in rows}), **sums}


def _rounds_on_average(run: Run) -> dict[str, float]:
    rows = run.selector.records
    found = {f"selection_{key}": [row[key] for row in rows if row[key] is not None] for key in ("coverage", "overlap")}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _speed(run: Run) -> dict[str, float]:
    if not run.seconds["all"]:
        return {}
    rate = run.trained * run.tokens_per_step / run.seconds["all"]
    peak, _ = peak_flops(run.device, half=run.half)
    kinds = {f"{kind.replace(' ', '_')}_seconds": seconds for kind, seconds in run.seconds.items() if kind != "all"}
    return {
        "tokens_per_second": rate,
        "model_flops_utilisation": rate * run.flops_per_token() / (peak * run.world.size),
        **kinds,
    }


def dry_run(run: Run) -> dict[str, Json]:
    """Return what `run` would take: sizes by count, memory and time from a few real steps that are then forgotten.

    Nothing is selected: a selecting phase is told by its rounds and by the tokens that each would embed, and reads all passages here.
    The estimated time leaves selection out.
    """
    for number in range(len(run.plan.rounds)):
        run.order.select(number, {})
    parameters = num_parameters(run)
    run.model.train()
    seconds = []
    for step in range(min(DRY_STEPS, run.num_steps)):
        run.step = step
        started = time.perf_counter()
        run.enter_phase()
        run.gradients()
        run.optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    per_step = min(seconds)
    tokens = run.num_steps * run.tokens_per_step
    peak, source = peak_flops(run.device, half=run.half)
    flops = run.flops_per_token()
    run.step = 0
    return {
        "architecture": type(run.model).__name__,
        "parameters": parameters,
        "steps": run.num_steps,
        "tokens": tokens,
        "tokens_per_step": run.tokens_per_step,
        "device": str(run.device),
        "precision": "bfloat16" if run.half else "float32",
        "memory_bytes": memory_bytes(run),
        "seconds_per_step": per_step,
        "estimated_seconds": per_step * run.num_steps,
        "tokens_per_second": run.tokens_per_step / per_step,
        "model_flops_utilisation": flops * run.tokens_per_step / per_step / peak,
        "peak": f"{peak / 1e9:,.0f} GFLOP/s ({source})",
        "flops": flops * tokens,
        "phases": phase_table(run),
        "selection": selection_plan(run.plan, run.order),
        "domains": domain_table(run),
    }


def memory_bytes(run: Run) -> int:
    """Return the most memory that training took so far, the optimizer's state of a first update included."""
    import torch

    states = sum(p.numel() for p in run.model.parameters()) * 8  # two moments in float32
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) + states
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + states
