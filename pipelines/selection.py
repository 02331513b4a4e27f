"""Selection: rank the passages of the kept training documents, and take a prefix of the ranking within a budget.

Per role (general, target) one global order over all snapshots and domains of the role. The whole order is stored, so that every
budget is a prefix of it. Passages that add nothing are ranked last and never selected; a budget they leave unfilled is reported.
A certificate says how good the prefix is: its coverage, that of random passages with as many tokens, and a value that the coverage
of no equally large set exceeds.

With `arrival: by_snapshot` each snapshot has its own share of the budget and is ordered given what earlier ones gave: a new snapshot
extends the selection, and what was selected before stays, as long as the documents of the earlier snapshots are decided alike. That
order is of one fraction: with another, later snapshots are ordered given other picks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from pipelines import plugins
from pipelines.candidates import Candidates, Sources, Unit
from pipelines.documents import write_table
from pipelines.embedders._grid import UNIT
from pipelines.errors import EmptyInput, UnknownName
from pipelines.manifests import Json, Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.selection_audits import document_counts, order_sha256, tokens_by_domain, tokens_by_snapshot
from pipelines.selection_plots import RolePicture, draw
from pipelines.set_functions import Order, SetFunction
from pipelines.set_functions._certificate import Certificate, Represented, certify, num_within, represent
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
        ("bytes", pa.int64()),
        ("selected", pa.bool_()),
        ("representative_id", pa.string()),
        ("representative_passage", pa.int32()),
        ("similarity", pa.float32()),
    ]
)
"""`rank` counts from 0 within the role; the representative is the nearest selected passage, null where no cosine is above 0."""

ABSORBED = 10
"""Rows of the tables of absorbed passages, by role."""
ROWS_AT_ONCE = 8_192


class Budget(Settings):
    """How much of a role's text is selected: one of the four fields."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the candidates' tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens."""
    documents: int | None = Field(default=None, ge=1)
    """Documents of which a passage is selected."""
    bytes: int | None = Field(default=None, ge=1)
    """UTF-8 bytes of the passages."""

    @model_validator(mode="after")
    def _one_of_four(self) -> Budget:
        given = [name for name in Budget.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget gives one of {', '.join(Budget.model_fields)}; given: {', '.join(given) or 'none'}")
        return self

    @property
    def unit(self) -> Unit:
        """What is counted; a fraction is one of tokens."""
        return "documents" if self.documents is not None else "bytes" if self.bytes is not None else "tokens"

    def of(self, tokens: int) -> int:
        """Return the budget in its unit, when the candidates hold `tokens`."""
        return int(self.fraction * tokens) if self.fraction is not None else getattr(self, self.unit)


class SelectionChoices(Settings):
    """What a recipe says of the selection."""

    function: str = "facility_location"
    """A plugin of `set_functions/`."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the set function."""
    budget: dict[Role, Budget]
    """How much of each role is selected."""
    score: str | None = None
    """``<filter>.<rule>``: a score of the documents that the set function may read, such as ``perplexity.log_perplexity``."""
    towards: dict[Role, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Domains whose kept training passages the selection of a role is to be near to."""
    max_queries: int = Field(default=4_000, ge=1)
    """Passages of these domains that are looked at, by a stable hash."""
    shares: Literal["corpus", "free"] = "corpus"
    """Whether every domain keeps its share of the role's tokens, or gets what the order gives it: domains of short or varied passages
    then grow, and with them what the model is good at."""
    arrival: Literal["joint", "by_snapshot"] = "joint"
    """Whether all snapshots are ordered together, or one after the other, each with its own share of the budget."""
    seed: int = 0
    """Seed of the random draws that the certificate compares with."""

    @field_validator("score")
    @classmethod
    def _known_rule(cls, score: str | None) -> str | None:
        if score is None:
            return None
        name = score.partition(".")[0]
        if name not in plugins.names("filters"):
            raise UnknownName("filter", name, plugins.names("filters"))
        known = [f"{name}.{rule.name}" for rule in plugins.load("filters", name).rules]  # type: ignore[attr-defined]
        if score not in known:
            raise UnknownName("rule", score, known)
        return score

    @model_validator(mode="after")
    def _budgets_fit_arrival(self) -> SelectionChoices:
        others = [f"{role}: {budget.unit}" for role, budget in self.budget.items() if budget.fraction is None]
        if self.arrival == "by_snapshot" and others:
            raise ValueError(
                f"arrival 'by_snapshot' gives every snapshot its share and needs budgets as a fraction, not {', '.join(others)}; "
                "give fractions, or set arrival to joint"
            )
        return self


class SelectionSettings(SelectionChoices):
    """What is ranked, by what, and how much is taken."""

    roles: dict[str, Role]
    """Role of each domain that takes part; other domains are left aside."""

    @model_validator(mode="after")
    def _roles_have_budgets(self) -> SelectionSettings:
        self._function_reads(cast(SetFunction, plugins.build("set_functions", self.function, self.settings)))
        named, budgeted = sorted(set(self.roles.values())), sorted(self.budget)
        if named != budgeted:
            raise ValueError(f"roles {named} need exactly one budget each; budgets are given for {budgeted}")
        if without := sorted(set(self.towards) - set(self.roles.values())):
            raise ValueError(f"towards names role {without[0]!r}, to which no domain belongs; roles: {', '.join(named)}")
        return self

    def _function_reads(self, function: SetFunction) -> None:
        """Refuse what the recipe gives and the set function does not look at."""
        given = {"towards": self.towards and "queries", "score": self.score and "scores"}
        if self.arrival == "by_snapshot" and not function.is_independent:
            given["arrival: by_snapshot"] = "earlier"
        for name, field in given.items():
            if field and field not in function.reads:
                able = [other for other in plugins.names("set_functions") if field in plugins.load("set_functions", other).reads]  # type: ignore[attr-defined]
                raise ValueError(
                    f"set function {self.function!r} does not look at selection.{name}; leave that out, or take {' or '.join(able)}"
                )

    def domains(self, role: Role) -> list[str]:
        """Return the domains of `role`, sorted."""
        return sorted(domain for domain, given in self.roles.items() if given == role)


@dataclass(frozen=True)
class Chosen:
    """What was selected for one role."""

    role: Role
    candidates: Candidates
    order: Order
    num_selected: int
    budget: int
    unit: Unit
    """What the budget counts."""
    represented: Represented
    queries: np.ndarray | None = None
    """int16, shape ``(m, d)``: the target set, where the role has one."""

    @property
    def picks(self) -> np.ndarray:
        """The selected candidates, in order."""
        return self.order.picks[: self.num_selected]

    @property
    def is_selected(self) -> np.ndarray:
        """bool, shape ``(n,)``."""
        selected = np.zeros(len(self.candidates), dtype=bool)
        selected[self.picks] = True
        return selected

    @cached_property
    def cosine(self) -> np.ndarray:
        """float64, shape ``(n,)``: cosine of each candidate to its representative; 1 for the selected, 0 where there is none."""
        norms, place = _norms(self.candidates.embeddings), self.represented.place
        cosine = self.represented.similarity / np.maximum(norms * norms[self.picks[place]], 1.0)
        cosine[place < 0] = 0.0
        cosine[self.picks] = 1.0
        return cosine

    def certificate(self, seed: int) -> Certificate:
        """Return how good the selection is."""
        candidates = self.candidates
        return certify(candidates.embeddings, candidates.costs, self.order, self.num_selected, represented=self.represented, seed=seed)


def select_subset(
    settings: SelectionSettings,
    out: Path,
    *,
    decisions: Manifest,
    embeddings: tuple[Manifest, ...],
    shards: tuple[Manifest, ...],
    scores: tuple[Manifest, ...] = (),
) -> Outcome:
    """Write ``<role>.parquet`` for each role (`SELECTION_SCHEMA`, by rank) and pictures of the selection.

    A file a role: what reads one role does not depend on the other.

    Args:
        decisions: deduplicated_corpus of the recipe; candidates are its documents that are kept and in split train.
        embeddings: document_embeddings of every source partition that holds candidates.
        shards: tokenized_shards of the same partitions, cut into the same passages.
        scores: quality_scores or toxicity_scores of the same partitions, where the settings name a score.

    Raises:
        EmptyInput: a role or a target set has no passage, or a budget is smaller than its role's first passage.
        MissingArtifact: a partition with candidates has no embeddings, shards or scores.
        UnknownName: the score that the settings name is not among `scores`.
        GristmillError: embeddings and shards are cut into different passages, or the embeddings lie in different spaces.
    """
    by_partition = ({str(manifest.partition): manifest for manifest in manifests} for manifests in (embeddings, shards, scores))
    sources = Sources(decisions, *by_partition, settings.score)
    counts, metrics, details, pictures = {}, {}, {}, {}
    tables: dict[str, list[dict[str, Json]]] = {"certificate": [], "most_absorbed": [], "near_duplicates": []}
    for role in (role for role in ROLES if role in settings.budget):
        chosen = choose(settings, role, sources)
        table = ranked(chosen)
        write_table(out / f"{role}.parquet", table)
        certificate = chosen.certificate(settings.seed)
        measured = certificate.metrics() | measure(chosen, settings.seed)
        metrics |= {f"{role}_{name}": value for name, value in measured.items()}
        counts |= {f"{role}_{name}": value for name, value in count(chosen).items()}
        tables["certificate"].append({"role": role, **{name: round(value, 6) for name, value in measured.items()}})
        for name, rows in _absorbed(chosen).items():
            tables[name] += rows
        details[f"{role}_order_sha256"] = order_sha256(table.slice(0, len(chosen.order.picks)))
        pictures[role] = _picture(chosen, certificate)
    counts |= document_counts(out, decisions, settings.roles)
    tables |= {"by_domain": tokens_by_domain(out, settings.roles), "by_snapshot": tokens_by_snapshot(out)}
    return Outcome(counts=counts, metrics=metrics, tables=tables, plots=draw(out, pictures), details=details)


def in_step(order: Order, groups: np.ndarray, costs: np.ndarray) -> Order:
    """Return `order` with the groups in step: a prefix holds about the same share of the costs of every group.

    The picks of a group stay in their order; they are merged by the share of the group's costs that they reach, ties as they came.

    Args:
        groups, costs: int64, shape ``(n,)``.
    """
    reached = np.empty(len(order.picks))
    for group in np.unique(groups):
        mine = groups[order.picks] == group
        reached[mine] = np.cumsum(costs[order.picks[mine]]) / costs[groups == group].sum()
    merged = np.argsort(reached, kind="stable")
    return Order(picks=order.picks[merged], gains=order.gains[merged], graph=order.graph)


def choose(settings: SelectionSettings, role: Role, sources: Sources) -> Chosen:
    """Order the candidates of `role`, all together or snapshot by snapshot, and take what the budget holds.

    Raises:
        As `select_subset`.
    """
    candidates = sources.candidates(role, settings.domains(role))
    queries = sources.queries(role, settings.towards[role], settings.max_queries) if role in settings.towards else None
    function = cast(SetFunction, plugins.build("set_functions", settings.function, settings.settings))
    budget = settings.budget[role]
    stages = [rows for _, rows in candidates.snapshots()] if settings.arrival == "by_snapshot" else [slice(0, len(candidates))]
    taken, rest, limits = [], [], 0
    for rows in stages:
        before = np.concatenate([part.picks for part in taken]) if taken else np.zeros(0, dtype=np.int64)
        earlier = candidates.embeddings[before] if len(before) else None
        order = function.order(candidates.points(rows, queries=queries, earlier=earlier))
        if settings.shares == "corpus":
            order = in_step(order, candidates.groups[rows], candidates.costs[rows])
        picks = order.picks + rows.start
        limit = budget.of(int(candidates.tokens[rows].sum()))
        within = num_within(candidates.amounts(picks, budget.unit), limit)
        taken.append(Order(picks[:within], order.gains[:within], order.graph))
        rest.append(Order(picks[within:], order.gains[within:]))
        limits += limit
    num_selected = sum(len(part.picks) for part in taken)
    if num_selected == 0:
        raise EmptyInput(f"role {role!r}: a budget of {limits} {budget.unit} holds not one ranked passage; raise budget.{role}")
    order = Order(
        picks=np.concatenate([part.picks for part in (*taken, *rest)]),
        gains=np.concatenate([part.gains for part in (*taken, *rest)]),
        graph=taken[0].graph if len(taken) == 1 else None,
    )
    represented = represent(candidates.embeddings, order, num_selected)
    return Chosen(role, candidates, order, num_selected, limits, budget.unit, represented, queries)


def measure(chosen: Chosen, seed: int) -> dict[str, float]:
    """Return what is measured beside the certificate: how near the target set is, and the mean score before and after."""
    candidates, queries, found = chosen.candidates, chosen.queries, {}
    if queries is not None:
        tokens = candidates.tokens
        draw_all = np.random.default_rng([seed, 0]).permutation(len(candidates))
        random = draw_all[: num_within(tokens[draw_all], int(tokens[chosen.picks].sum()))]
        for name, picks in (("query_coverage", chosen.picks), ("query_coverage_random", random)):
            found[name] = float(nearest_pick(queries, candidates.embeddings[picks])[1].mean()) / UNIT
    if candidates.scores is not None:
        for name, scores in (("score_mean", candidates.scores), ("score_mean_selected", candidates.scores[chosen.picks])):
            scored = scores[~np.isnan(scores)]
            found |= {name: float(scored.mean())} if len(scored) else {}
    return found


def ranked(chosen: Chosen) -> pa.Table:
    """Return the rows of one role: picks in order, then what the order leaves out, by index."""
    candidates, picks = chosen.candidates, chosen.order.picks
    is_left_out = np.ones(len(candidates), dtype=bool)
    is_left_out[picks] = False
    left_out = np.flatnonzero(is_left_out)
    points = np.concatenate([picks, left_out])
    representative = chosen.picks[chosen.represented.place]
    representative[chosen.picks] = chosen.picks
    index = pa.array(representative[points], mask=chosen.cosine[points] <= 0)
    table = candidates.table.take(pa.array(points))
    columns = {
        "role": pa.repeat(chosen.role, len(points)),
        "rank": pa.array(np.arange(len(points))),
        "gain": pa.array(np.concatenate([chosen.order.gains, np.zeros(len(left_out))])),
        "selected": pa.array(np.arange(len(points)) < chosen.num_selected),
        "representative_id": candidates.table["id"].take(index),
        "representative_passage": candidates.table["passage"].take(index),
        "similarity": pa.array(chosen.cosine[points].astype(np.float32)),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table.select(SELECTION_SCHEMA.names).cast(SELECTION_SCHEMA)


def _norms(embeddings: np.ndarray) -> np.ndarray:
    """Return the norm of each row, float64; a block of rows at a time, because float32 takes twice the room of int16."""
    blocks = (embeddings[start : start + ROWS_AT_ONCE].astype(np.float32) for start in range(0, len(embeddings), ROWS_AT_ONCE))
    return np.sqrt(np.concatenate([np.einsum("ij,ij->i", block, block) for block in blocks]).astype(np.float64))


def count(chosen: Chosen) -> dict[str, int]:
    """Return how much there was and how much was taken, in every unit, and what of the budget passages of no gain leave unfilled."""
    candidates, unit, num_ordered = chosen.candidates, chosen.unit, len(chosen.order.picks)
    every = np.arange(len(candidates))
    spent = {name: int(candidates.amounts(chosen.picks, name).sum()) for name in get_args(Unit)}
    found = {name: int(candidates.amounts(every, name).sum()) for name in get_args(Unit)}
    counts = {
        "passages": len(candidates),
        "selected_passages": chosen.num_selected,
        "zero_gain_passages": len(candidates) - num_ordered,
        **found,
        **{f"selected_{name}": amount for name, amount in spent.items()},
        f"budget_{unit}": chosen.budget,
        f"unfilled_{unit}": max(0, chosen.budget - spent[unit]) if chosen.num_selected == num_ordered else 0,
    }
    if chosen.queries is not None:
        counts["queries"] = len(chosen.queries)
    if candidates.scores is not None:
        counts["passages_without_score"] = int(np.isnan(candidates.scores).sum())
    return counts


def _absorbed(chosen: Chosen) -> dict[str, list[dict[str, Json]]]:
    """Return which selected passages represent most others, and which the most similar one; each with the one nearest to it."""
    place, similarity = chosen.represented.place, chosen.represented.similarity
    others = np.flatnonzero(~chosen.is_selected & (place >= 0))
    num_others = np.bincount(place[others], minlength=chosen.num_selected)
    sums = np.bincount(place[others], weights=similarity[others], minlength=chosen.num_selected)
    by_pick = others[np.lexsort((-similarity[others], place[others]))]
    picks, first = np.unique(place[by_pick], return_index=True)
    nearest = by_pick[first]
    named = chosen.candidates.table.select(["domain", "id", "passage"])

    def row(at: int) -> dict[str, Json]:
        pick, other = int(picks[at]), int(nearest[at])
        itself, absorbed = named.take(pa.array([chosen.picks[pick], other])).to_pylist()
        return {
            "role": chosen.role,
            **itself,
            "represented": int(num_others[pick]),
            "mean_similarity": round(float(sums[pick] / num_others[pick]) / UNIT, 4),
            **{f"absorbed_{name}": value for name, value in absorbed.items()},
            "absorbed_similarity": round(float(chosen.cosine[other]), 4),
        }

    orders = {"most_absorbed": num_others[picks], "near_duplicates": similarity[nearest]}
    return {name: [row(at) for at in np.argsort(-values, kind="stable")[:ABSORBED]] for name, values in orders.items()}


def _picture(chosen: Chosen, certificate: Certificate) -> RolePicture:
    """Return what the pictures of one role show."""
    candidates, picks = chosen.candidates, chosen.picks
    before, after = (
        np.bincount(candidates.groups[rows], weights=candidates.costs[rows], minlength=len(candidates.domains))
        for rows in (slice(None), picks)
    )
    shares = zip(candidates.domains, (before / before.sum()).tolist(), (after / after.sum()).tolist(), strict=True)
    return RolePicture(
        certificate=certificate,
        gains=chosen.order.gains,
        similarity=chosen.cosine,
        shares=tuple(shares),
        embeddings=candidates.embeddings,
        picks=picks,
        domains=candidates.groups,
        domain_names=candidates.domains,
    )
