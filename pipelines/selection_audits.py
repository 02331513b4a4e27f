"""What is counted of a selection from its files, and what is checked of it before it is published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.candidates import query
from pipelines.manifests import Check, Json, Manifest
from pipelines.store import advisory

ROLE_FILES = "*.parquet"
"""The files of all roles."""
ROWS_AT_ONCE = 8_192
TIGHT = 0.95
"""Share of the upper bound from which on a certificate says that little is left to be gained."""


def order_sha256(table: pa.Table) -> str:
    """Return a hash of ids and passage numbers in the order of the rows."""
    digest = hashlib.sha256()
    for batch in table.select(["id", "passage"]).to_batches(max_chunksize=ROWS_AT_ONCE):
        rows = zip(batch["id"].to_pylist(), batch["passage"].to_pylist(), strict=True)
        digest.update("".join(f"{name}\t{number}\n" for name, number in rows).encode())
    return digest.hexdigest()


def document_counts(directory: Path, decisions: Manifest, roles: Mapping[str, str]) -> dict[str, int]:
    """Count documents from the files of all roles, after the fact; a document is kept when one of its passages is selected."""
    text = """
        WITH decided AS (
            SELECT id, kept AND split = 'train' AS train, kept AND split <> 'train' AS held_out,
                   domain IN (SELECT unnest($domains)) AS has_role
            FROM read_parquet($decisions)
        ),
        chosen AS (SELECT DISTINCT id FROM read_parquet($selection) WHERE selected)
        SELECT count(*) FILTER (train AND has_role),
               count(*) FILTER (train AND has_role AND id IN (SELECT id FROM chosen)),
               count(*) FILTER (held_out),
               count(*) FILTER (train AND NOT has_role),
               (SELECT count(*) FROM chosen WHERE id NOT IN (SELECT id FROM decided WHERE train AND has_role))
        FROM decided
    """
    values = {"decisions": str(decisions.file("decisions.parquet")), "selection": str(directory / ROLE_FILES), "domains": sorted(roles)}
    came, kept, held_out, ignored, foreign = query(text, **values).fetchall()[0]
    return {
        "documents_in": came,
        "kept": kept,
        "dropped": came - kept,
        "quarantined": 0,
        "held_out_documents": held_out,
        "documents_without_role": ignored,
        "selected_outside_train": foreign,
    }


def tokens_by_domain(directory: Path, roles: Mapping[str, str]) -> list[dict[str, Json]]:
    """Return passages, tokens and shares of the role's tokens per domain; a domain that gave no candidate has a row of zeros."""
    text = """
        SELECT domain, count(*), sum(tokens), count(*) FILTER (selected), coalesce(sum(tokens) FILTER (selected), 0)
        FROM read_parquet($selection) GROUP BY domain
    """
    found = {domain: [int(value) for value in values] for domain, *values in query(text, selection=str(directory / ROLE_FILES)).fetchall()}
    rows: list[dict[str, Json]] = []
    for domain, role in sorted(roles.items(), key=lambda item: (item[1], item[0])):
        members = [found[name] for name, given in roles.items() if given == role and name in found]
        before, after = sum(values[1] for values in members), sum(values[3] for values in members)
        passages, tokens, selected_passages, selected_tokens = found.get(domain, [0, 0, 0, 0])
        rows.append(
            {
                "role": role,
                "domain": domain,
                "passages": passages,
                "tokens": tokens,
                "selected_passages": selected_passages,
                "selected_tokens": selected_tokens,
                "share_before": round(tokens / max(1, before), 6),
                "share_after": round(selected_tokens / max(1, after), 6),
            }
        )
    return rows


def tokens_by_snapshot(directory: Path) -> list[dict[str, Json]]:
    """Return passages and tokens per role and snapshot."""
    text = """
        SELECT role, snapshot, count(*) AS passages, sum(tokens)::BIGINT AS tokens, count(*) FILTER (selected) AS selected_passages,
            coalesce(sum(tokens) FILTER (selected), 0)::BIGINT AS selected_tokens
        FROM read_parquet($selection) GROUP BY role, snapshot ORDER BY role, snapshot
    """
    return query(text, selection=str(directory / ROLE_FILES)).to_arrow_table().to_pylist()


def candidates_conserved(draft: Manifest) -> Check:
    """Every candidate has one row, whether selected or not, and every document is counted."""
    counts = draft.counts
    rows = _asked(draft, "role, count(*)", "GROUP BY role")
    off = sum(abs(dict(rows).get(role, 0) - counts[f"{role}_passages"]) for role in draft.settings["budget"])
    lost = counts["documents_in"] - counts["kept"] - counts["dropped"]
    return Check(
        name="candidates_conserved",
        passed=off == lost == 0,
        description="every candidate passage has a row; documents in = kept + dropped",
        metadata={"rows_off": off, "documents_lost": lost},
    )


def passages_unique(draft: Manifest) -> Check:
    """No passage has two rows in one role, and no rank is given twice."""
    ((repeated, ranks),) = _asked(draft, "count(*) - count(DISTINCT (role, id, passage)), count(*) - count(DISTINCT (role, rank))")
    return Check(
        name="passages_unique",
        passed=repeated == ranks == 0,
        description="one row and one rank per passage and role",
        metadata={"repeated_passages": repeated, "repeated_ranks": ranks},
    )


SPENT = {"tokens": "sum(tokens)", "bytes": "sum(bytes)", "documents": "count(DISTINCT id)"}
"""How the files say what was selected, by the unit of a budget."""


def within_budget(draft: Manifest) -> Check:
    """What is selected of each role stays within its budget, in the budget's unit; with arrival by_snapshot that of each snapshot too."""
    spent: dict[str, int | float | str] = {}
    over = []
    for role, budget in draft.settings["budget"].items():
        unit = next((name for name in SPENT if budget.get(name) is not None), "tokens")
        ((amount,),) = _asked(draft, f"coalesce({SPENT[unit]}, 0)::BIGINT", "WHERE selected AND role = $role", role=role)
        limit = draft.counts[f"{role}_budget_{unit}"]
        spent |= {f"{role}_{unit}": amount, f"{role}_budget": limit}
        over += [] if 0 < amount <= limit else [f"{role}: {amount} of {limit} {unit}"]
    over += _over_in_snapshots(draft) if draft.settings["arrival"] == "by_snapshot" else []
    return Check(
        name="within_budget",
        passed=not over,
        description=f"beyond the budget, or nothing selected: {'; '.join(over) or 'none'}",
        metadata=spent,
    )


def _over_in_snapshots(draft: Manifest) -> list[str]:
    """Return a line for each role and snapshot of which more is selected than its share."""
    found = []
    for row in draft.outcome.tables["by_snapshot"]:
        role, limit = row["role"], int(draft.settings["budget"][row["role"]]["fraction"] * row["tokens"])
        found += [] if row["selected_tokens"] <= limit else [f"{role} in {row['snapshot']}: {row['selected_tokens']} of {limit} tokens"]
    return found


def selected_is_prefix(draft: Manifest) -> Check:
    """What is selected are the first ranks."""
    ((outside,),) = _asked(
        draft,
        "count(*) FILTER (selected <> (rank < chosen))",
        "JOIN (SELECT role, count(*) FILTER (selected) AS chosen FROM read_parquet($selection) GROUP BY role) USING (role)",
    )
    return Check(
        name="selected_is_prefix", passed=outside == 0, description="the selection is a prefix of the order", metadata={"outside": outside}
    )


def nothing_held_out(draft: Manifest) -> Check:
    """Every selected passage belongs to a document that is kept, in split train, and of a domain with a role."""
    outside = draft.counts["selected_outside_train"]
    return Check(
        name="nothing_held_out", passed=outside == 0, description="only training documents are selected", metadata={"outside": outside}
    )


def order_is_recorded(draft: Manifest) -> Check:
    """The recorded hash is that of the ids in the order of the ranks."""
    hashes: dict[str, int | float | str] = {}
    for role in draft.settings["budget"]:
        table = pq.read_table(draft.directory / f"{role}.parquet", columns=["id", "passage", "rank"]).sort_by("rank")
        hashes[f"{role}_order_sha256"] = order_sha256(table.slice(0, table.num_rows - draft.counts[f"{role}_zero_gain_passages"]))
    recorded = {name: draft.outcome.details.get(name) for name in hashes}
    return Check(
        name="order_is_recorded", passed=recorded == hashes, description="the hash in the manifest is that of the files", metadata=hashes
    )


def covers_more_than_random(draft: Manifest) -> Check:
    """Facility location covers at least what random passages with as many tokens cover; other functions and aims seek something else."""
    metrics = draft.outcome.metrics
    gaps = {role: metrics[f"{role}_coverage"] - metrics[f"{role}_coverage_random"] for role in draft.settings["budget"]}
    return Check(
        name="covers_more_than_random",
        passed=not _seeks_coverage(draft) or all(gap >= -1e-9 for gap in gaps.values()),
        description="coverage is at least that of random passages" if _seeks_coverage(draft) else MEASURED_ONLY,
        metadata=gaps,
    )


@advisory
def certificate_is_tight(draft: Manifest) -> Check:
    """Facility location covers at least 95% of what no equally large set exceeds; less means that the order or the bound is loose."""
    ratios = {role: draft.outcome.metrics[f"{role}_certified_ratio"] for role in draft.settings["budget"]}
    return Check(
        name="certificate_is_tight",
        passed=not _seeks_coverage(draft) or all(ratio >= TIGHT for ratio in ratios.values()),
        description=f"coverage is at least {TIGHT:.0%} of the upper bound" if _seeks_coverage(draft) else MEASURED_ONLY,
        metadata=ratios,
    )


MEASURED_ONLY = "measured only: the selection does not seek coverage of all passages alike"


def _seeks_coverage(draft: Manifest) -> bool:
    """Return whether the aim is the coverage that the certificate measures: plain facility location."""
    weights = draft.settings["settings"].get("weights", "equal")
    return draft.settings["function"] == "facility_location" and not draft.settings["towards"] and weights == "equal"


def _asked(draft: Manifest, what: str, rest: str = "", **values: str) -> list[tuple[int, ...]]:
    """Return what `what` selects of the rows of all roles."""
    return query(f"SELECT {what} FROM read_parquet($selection) {rest}", selection=str(draft.directory / ROLE_FILES), **values).fetchall()


SELECTION_AUDITS = (
    candidates_conserved,
    passages_unique,
    within_budget,
    selected_is_prefix,
    nothing_held_out,
    order_is_recorded,
    covers_more_than_random,
    certificate_is_tight,
)
