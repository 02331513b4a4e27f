"""Selection: rank the passages of the kept training documents, and take a prefix of the ranking within a token budget.

Per role (general, target) one global order over all snapshots and domains of the role. The whole order is stored, so that every
budget is a prefix of it. Passages that add nothing are ranked last and never selected; a budget they leave unfilled is reported.
A certificate says how good the prefix is: its coverage, that of random passages with as many tokens, and a value that the coverage
of no equally large set exceeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines import plugins
from pipelines.documents import split_partition, write_table
from pipelines.embedders._grid import UNIT
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.set_functions import Order
from pipelines.set_functions._certificate import Certificate, certify, num_within
from pipelines.set_functions._neighbors import nearest_pick

Role = Literal["general", "target"]
ROLES: tuple[Role, ...] = get_args(Role)

SELECTION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("passage", pa.int32()),
        ("domain", pa.string()),
        ("snapshot", pa.string()),
        ("role", pa.string()),
        ("rank", pa.int64()),
        ("gain", pa.float64()),
        ("tokens", pa.int64()),
        ("selected", pa.bool_()),
        ("representative_id", pa.string()),
        ("representative_passage", pa.int32()),
        ("similarity", pa.float32()),
    ]
)
"""`rank` counts from 0 within the role; the representative is the nearest selected passage, null where no cosine is above 0."""

MOST_ABSORBED = 10

CANDIDATES = """
    WITH train AS (
        SELECT id FROM read_parquet($decisions)
        WHERE kept AND split = 'train' AND domain = $domain AND CAST(snapshot AS VARCHAR) = $snapshot
    ),
    embedded AS (SELECT * FROM read_parquet($passages, file_row_number = true) SEMI JOIN train USING (id)),
    tokenized AS (SELECT id, passage, length FROM read_parquet($shard) SEMI JOIN train USING (id))
    SELECT e.file_row_number AS row, id, passage, t.length AS tokens
    FROM embedded e FULL JOIN tokenized t USING (id, passage) ORDER BY row
"""


class Budget(Settings):
    """How much of a role's text is selected: one of the two fields."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the candidates' tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Budget:
        if (self.fraction is None) == (self.tokens is None):
            raise ValueError(f"a budget gives either fraction or tokens, not {'neither' if self.tokens is None else 'both'}")
        return self

    def of(self, tokens: int) -> int:
        """Return the budget in tokens when the candidates hold `tokens`."""
        return self.tokens if self.tokens is not None else int(self.fraction * tokens)


class SelectionSettings(Settings):
    """What is ranked, by what, and how much is taken."""

    function: str = "facility_location"
    """Module of `set_functions/`."""
    settings: dict[str, int | float | str | bool | None] = Field(default_factory=dict)
    """Settings of the set function."""
    roles: dict[str, Role]
    """Role of each domain that takes part; other domains are left aside."""
    budget: dict[Role, Budget]
    """Budget of each role."""
    seed: int = 0
    """Seed of the random draws that the certificate compares with."""

    @model_validator(mode="after")
    def _roles_have_budgets(self) -> SelectionSettings:
        plugins.build("set_functions", self.function, self.settings)
        named, budgeted = sorted(set(self.roles.values())), sorted(self.budget)
        if named != budgeted:
            raise ValueError(f"roles {named} need exactly one budget each; budgets are given for {budgeted}")
        return self


@dataclass(frozen=True)
class Candidates:
    """The passages of one role, ordered by domain, snapshot and place in the corpus."""

    table: pa.Table
    """Columns id, passage, domain, snapshot, tokens."""
    embeddings: np.ndarray
    """int16, shape ``(n, d)``."""

    @property
    def tokens(self) -> np.ndarray:
        return self.table["tokens"].to_numpy()


ROLE_FILES = "*.parquet"
"""The files of all roles."""


def select_subset(
    settings: SelectionSettings, out: Path, *, decisions: Manifest, embeddings: tuple[Manifest, ...], shards: tuple[Manifest, ...]
) -> Outcome:
    """Write ``<role>.parquet`` for each role (`SELECTION_SCHEMA`, by rank) and ``coverage.png``.

    A file a role: what reads one role does not depend on the other.

    Args:
        decisions: deduplicated_corpus of the recipe; candidates are its documents that are kept and in split train.
        embeddings: document_embeddings of every source partition that holds candidates.
        shards: tokenized_shards of the same partitions, cut into the same passages.

    Raises:
        EmptyInput: a role has no candidate, or its budget is smaller than its first passage.
        MissingArtifact: a partition with candidates has no embeddings or no shards.
        GristmillError: embeddings and shards are cut into different passages.
    """
    by_partition = [{manifest.partition: manifest for manifest in manifests} for manifests in (embeddings, shards)]
    certificates, counts, metrics, details, absorbed = {}, {}, {}, {}, []
    for role in (role for role in ROLES if role in settings.budget):
        domains = sorted(domain for domain, given in settings.roles.items() if given == role)
        candidates = _candidates(role, domains, decisions, *by_partition)
        order = plugins.build("set_functions", settings.function, settings.settings).order(candidates.embeddings)
        budget = settings.budget[role].of(int(candidates.tokens.sum()))
        num_selected = num_within(candidates.tokens[order.picks], budget)
        if num_selected == 0:
            raise EmptyInput(f"role {role!r}: a budget of {budget} tokens holds not one ranked passage; raise budget.{role}")
        place, similarity = nearest_pick(candidates.embeddings, order.picks[:num_selected])
        table = _rank(role, candidates, order, num_selected, place, similarity)
        write_table(out / f"{role}.parquet", table)
        certificates[role] = certify(
            candidates.embeddings, candidates.tokens, order, num_selected, similarity=similarity, seed=settings.seed
        )
        metrics |= {f"{role}_{name}": value for name, value in certificates[role].metrics().items()}
        counts |= {f"{role}_{name}": value for name, value in _counts(table, budget, len(order.picks)).items()}
        absorbed += _most_absorbed(role, candidates, order.picks[:num_selected], place, similarity)
        details[f"{role}_order_sha256"] = _order_sha256(table, len(order.picks))
    _plot(out / "coverage.png", certificates)
    counts |= _document_counts(settings, decisions, out / ROLE_FILES)
    by_domain = _by_domain(settings, out / ROLE_FILES)
    return Outcome(
        counts=counts, metrics=metrics, tables={"by_domain": by_domain, "most_absorbed": absorbed}, plots=("coverage.png",), details=details
    )


def _candidates(
    role: str, domains: list[str], decisions: Manifest, embeddings: Mapping[str, Manifest], shards: Mapping[str, Manifest]
) -> Candidates:
    tables, rows = [], []
    for partition in _partitions(decisions, domains):
        for asset, manifests in (("document_embeddings", embeddings), ("tokenized_shards", shards)):
            if partition not in manifests:
                raise MissingArtifact(
                    f"{decisions.label} keeps documents of {partition}, but {asset} lacks it; materialize {asset}[{partition}]"
                )
        table = _join(partition, decisions, embeddings[partition], shards[partition])
        if table.num_rows:
            rows.append(np.load(embeddings[partition].file("embeddings.npy"), mmap_mode="r")[table["row"].to_numpy()])
            tables.append(table.drop_columns("row"))
    if not tables:
        raise EmptyInput(
            f"role {role!r}: no kept training passage in {', '.join(domains)}; loosen the filters of these domains, "
            "materialize snapshots that hold them, or give the role to other domains"
        )
    return Candidates(pa.concat_tables(tables), np.concatenate(rows))


def _partitions(decisions: Manifest, domains: list[str]) -> list[str]:
    query = """
        SELECT DISTINCT domain || '|' || CAST(snapshot AS VARCHAR) FROM read_parquet($decisions)
        WHERE kept AND split = 'train' AND domain IN (SELECT unnest($domains)) ORDER BY 1
    """
    return [row[0] for row in _query(query, decisions=str(decisions.file("decisions.parquet")), domains=domains).fetchall()]


def _join(partition: str, decisions: Manifest, embedded: Manifest, shard: Manifest) -> pa.Table:
    """Return columns row (in the embeddings), id, passage, domain, snapshot, tokens of one partition's candidates."""
    domain, snapshot = split_partition(partition)
    table = _query(
        CANDIDATES,
        decisions=str(decisions.file("decisions.parquet")),
        domain=domain,
        snapshot=snapshot,
        passages=str(embedded.file("passages.parquet")),
        shard=str(shard.file("passages.parquet")),
    ).to_arrow_table()
    if unmatched := max(table["row"].null_count, table["tokens"].null_count):
        raise GristmillError(
            f"{embedded.label} and {shard.label} differ in {unmatched} passages; "
            "set the same max_characters for both and materialize them again"
        )
    table = table.append_column("domain", pa.array([domain] * table.num_rows, pa.string()))
    table = table.append_column("snapshot", pa.array([snapshot] * table.num_rows, pa.string()))
    return table.set_column(0, "row", table["row"].cast(pa.int64()))


def _query(query: str, **values: object) -> duckdb.DuckDBPyRelation:
    return duckdb.connect().sql(query, params=values)


def _rank(role: str, candidates: Candidates, order: Order, num_selected: int, place: np.ndarray, similarity: np.ndarray) -> pa.Table:
    """Return the rows of one role: picks in order, then what the order leaves out, by index."""
    num_points = len(candidates.embeddings)
    left_out = np.setdiff1d(np.arange(num_points), order.picks)
    points = np.concatenate([order.picks, left_out])
    norms = np.linalg.norm(candidates.embeddings.astype(np.float64), axis=1)
    representative = order.picks[place]
    cosine = similarity / np.maximum(norms * norms[representative], 1.0)
    chosen = order.picks[:num_selected]
    representative[chosen], cosine[chosen] = chosen, 1.0
    index = pa.array(representative[points], mask=cosine[points] <= 0)
    ranked = candidates.table.take(pa.array(points))
    columns = {
        "role": pa.array([role] * num_points, pa.string()),
        "rank": np.arange(num_points),
        "gain": np.concatenate([order.gains, np.zeros(len(left_out))]),
        "selected": np.arange(num_points) < num_selected,
        "representative_id": candidates.table["id"].take(index),
        "representative_passage": candidates.table["passage"].take(index),
        "similarity": cosine[points].astype(np.float32),
    }
    for name, values in columns.items():
        ranked = ranked.append_column(name, values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values))
    return ranked.select(SELECTION_SCHEMA.names).cast(SELECTION_SCHEMA)


def _counts(table: pa.Table, budget: int, num_ordered: int) -> dict[str, int]:
    tokens, selected = table["tokens"].to_numpy(), table["selected"].to_numpy()
    spent = int(tokens[selected].sum())
    return {
        "passages": table.num_rows,
        "selected_passages": int(selected.sum()),
        "zero_gain_passages": table.num_rows - num_ordered,
        "tokens": int(tokens.sum()),
        "budget_tokens": budget,
        "selected_tokens": spent,
        "unfilled_tokens": max(0, budget - spent) if int(selected.sum()) == num_ordered else 0,
    }


def _most_absorbed(
    role: str, candidates: Candidates, chosen: np.ndarray, place: np.ndarray, similarity: np.ndarray
) -> list[dict[str, Json]]:
    """Return the selected passages that are the representative of most others."""
    others = np.ones(len(place), dtype=bool)
    others[chosen] = False
    others &= similarity > 0
    num_others = np.bincount(place[others], minlength=len(chosen))
    sums = np.bincount(place[others], weights=similarity[others], minlength=len(chosen))
    top = [pick for pick in np.argsort(-num_others, kind="stable")[:MOST_ABSORBED] if num_others[pick]]
    rows = candidates.table.select(["domain", "id", "passage"]).take(pa.array(chosen[top], pa.int64())).to_pylist()
    measured = [{"represented": int(num_others[pick]), "mean_similarity": round(sums[pick] / num_others[pick] / UNIT, 4)} for pick in top]
    return [{"role": role, **row, **extra} for row, extra in zip(rows, measured, strict=True)]


def _order_sha256(table: pa.Table, num_ordered: int) -> str:
    ids, numbers = table["id"].to_pylist()[:num_ordered], table["passage"].to_pylist()[:num_ordered]
    return hashlib.sha256("".join(f"{name}\t{number}\n" for name, number in zip(ids, numbers, strict=True)).encode()).hexdigest()


def _document_counts(settings: SelectionSettings, decisions: Manifest, selection: Path) -> dict[str, int]:
    """Count documents from the two files, after the fact; a document is kept when one of its passages is selected."""
    query = """
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
    values = {"decisions": str(decisions.file("decisions.parquet")), "selection": str(selection), "domains": sorted(settings.roles)}
    came, kept, held_out, ignored, foreign = _query(query, **values).fetchall()[0]
    return {
        "documents_in": came,
        "kept": kept,
        "dropped": came - kept,
        "quarantined": 0,
        "held_out_documents": held_out,
        "documents_without_role": ignored,
        "selected_outside_train": foreign,
    }


def _by_domain(settings: SelectionSettings, selection: Path) -> list[dict[str, Json]]:
    """Return passages, tokens and shares of the role's tokens per domain; a domain that gave no candidate has a row of zeros."""
    query = """
        SELECT domain, count(*), sum(tokens), count(*) FILTER (selected), coalesce(sum(tokens) FILTER (selected), 0)
        FROM read_parquet($selection) GROUP BY domain
    """
    found = {domain: [int(value) for value in values] for domain, *values in _query(query, selection=str(selection)).fetchall()}
    rows: list[dict[str, Json]] = []
    for domain, role in sorted(settings.roles.items(), key=lambda item: (item[1], item[0])):
        members = [found[name] for name, given in settings.roles.items() if given == role and name in found]
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


def _plot(path: Path, certificates: Mapping[str, Certificate]) -> None:
    """Draw coverage against the share of tokens; one colour per role, with its budget and the bound there."""
    figure, axes = new_figure()
    for number, (role, certificate) in enumerate(certificates.items()):
        colour = f"C{number}"
        axes.plot(*certificate.curve, color=colour, label=f"{role}, ordered")
        axes.plot(*certificate.random_curve, color=colour, linestyle="--", label=f"{role}, random")
        axes.plot(certificate.selected_share, certificate.upper_bound, "_", color=colour, markersize=12, label=f"{role}, upper bound")
        axes.axvline(certificate.selected_share, color=colour, linewidth=0.6)
    axes.set(xlabel="share of tokens", ylabel="mean cosine to nearest selected")
    axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def _roles(draft: Manifest) -> Iterator[tuple[str, pa.Table]]:
    for role in sorted(draft.settings["budget"]):
        yield role, pq.read_table(draft.directory / f"{role}.parquet", columns=["rank", "tokens", "selected"])


def candidates_conserved(draft: Manifest) -> Check:
    """Every candidate has one row, whether selected or not, and every document is counted."""
    counts = draft.counts
    off = sum(abs(table.num_rows - counts[f"{role}_passages"]) for role, table in _roles(draft))
    lost = counts["documents_in"] - counts["kept"] - counts["dropped"]
    return Check(
        name="candidates_conserved",
        passed=off == lost == 0,
        description="every candidate passage has a row; documents in = kept + dropped",
        metadata={"rows_off": off, "documents_lost": lost},
    )


def passages_unique(draft: Manifest) -> Check:
    """No passage has two rows in one role, and no rank is given twice."""
    query = """
        SELECT count(*) - count(DISTINCT (role, id, passage)), count(*) - count(DISTINCT (role, rank)) FROM read_parquet($selection)
    """
    repeated, ranks = _query(query, selection=str(draft.directory / ROLE_FILES)).fetchall()[0]
    return Check(
        name="passages_unique",
        passed=repeated == ranks == 0,
        description="one row and one rank per passage and role",
        metadata={"repeated_passages": repeated, "repeated_ranks": ranks},
    )


def within_budget(draft: Manifest) -> Check:
    """The selected tokens of each role stay within its budget."""
    spent = {role: int(table["tokens"].to_numpy()[table["selected"].to_numpy()].sum()) for role, table in _roles(draft)}
    passed = all(0 < tokens <= draft.counts[f"{role}_budget_tokens"] for role, tokens in spent.items())
    return Check(name="within_budget", passed=passed, description="selected tokens are at most the budget, and not none", metadata=spent)


def selected_is_prefix(draft: Manifest) -> Check:
    """What is selected are the first ranks."""
    outside = 0
    for _, table in _roles(draft):
        rank, selected = table["rank"].to_numpy(), table["selected"].to_numpy()
        outside += int((selected != (rank < selected.sum())).sum())
    return Check(
        name="selected_is_prefix", passed=outside == 0, description="the selection is a prefix of the order", metadata={"outside": outside}
    )


def nothing_held_out(draft: Manifest) -> Check:
    """Every selected passage belongs to a document that is kept, in split train, and of a domain with a role."""
    outside = draft.counts["selected_outside_train"]
    return Check(
        name="nothing_held_out", passed=outside == 0, description="only training documents are selected", metadata={"outside": outside}
    )


def covers_more_than_random(draft: Manifest) -> Check:
    """Facility location covers at least what random passages with as many tokens cover; other functions seek something else."""
    gaps = {
        role: draft.outcome.metrics[f"{role}_coverage"] - draft.outcome.metrics[f"{role}_coverage_random"]
        for role in draft.settings["budget"]
    }
    applies = draft.settings["function"] == "facility_location"
    return Check(
        name="covers_more_than_random",
        passed=not applies or all(gap >= -1e-9 for gap in gaps.values()),
        description="coverage is at least that of random passages" if applies else "measured only: the function is not facility_location",
        metadata=gaps,
    )


SELECTION_AUDITS = (candidates_conserved, passages_unique, within_budget, selected_is_prefix, nothing_held_out, covers_more_than_random)
