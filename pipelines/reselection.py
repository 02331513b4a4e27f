"""Selection during training: the model being trained embeds what a phase may read, a set function chooses, and again some steps later.

The loop of INGENIOUS (2305.06677, section 3): a warm start on all passages, then rounds of embedding with the model as it stands,
selecting, and training on what was selected. Each round here embeds anew and orders the whole pool of each domain; the prefix of
the order that holds a share of the pool's tokens is read. (The released code of the paper embeds once, after the warm start, and
later rounds draw again from the same importance; `function: ingenious` has that importance.)

    <out>/selection/round-000.parquet    domain, id, passage, place, rank, gain, tokens

The file is the selection: whoever resumes in the middle of a round reads it, since the model has moved on. Resume points carry the
files, and the artifact keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import plugins
from pipelines.data_order import DataOrder
from pipelines.documents import write_table
from pipelines.embedders._grid import to_integer_rows
from pipelines.errors import EmptyInput, GristmillError
from pipelines.hidden_states import layer_of, mean_hidden_states
from pipelines.manifests import Json
from pipelines.models import sees_both_sides
from pipelines.objectives import Objective
from pipelines.plan import Plan, Reselection, TrainingSettings
from pipelines.progress import Progress, report_line, short
from pipelines.set_functions import Points, SetFunction
from pipelines.set_functions._certificate import num_within
from pipelines.set_functions._neighbors import coverage_along
from pipelines.shards import PassagePool

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SELECTION = "selection"
CPU_BATCH_TOKENS = 1_024
"""Tokens embedded at once on a CPU: with four times as many, models of width 128 and 384 embed a fifth fewer a second."""
TRIED_POINTS = 8

SELECTED = pa.schema(
    [
        ("domain", pa.string()),
        ("id", pa.string()),
        ("passage", pa.int32()),
        ("place", pa.int64()),
        ("rank", pa.int64()),
        ("gain", pa.float64()),
        ("tokens", pa.int64()),
    ]
)
"""`place` counts the passages of the domain in the order of the shards; `rank` is that of the set function's order."""


class Selecting(Protocol):
    """What is selected for: a run in progress."""

    settings: TrainingSettings
    plan: Plan
    step: int
    model: PreTrainedModel
    device: torch.device

    @property
    def tokens_per_step(self) -> int: ...
    @property
    def end_of_text(self) -> int: ...
    @property
    def order(self) -> DataOrder: ...
    def objective(self, step: int) -> Objective: ...
    def timed(self, kind: str) -> AbstractContextManager[None]: ...
    def autocast(self) -> AbstractContextManager[None]: ...


@dataclass
class Selector:
    """Selects for `run` where its plan says so.

    Raises:
        GristmillError: at once, and not after the warm start, where a layer does not exist, a set function cannot order what a run knows
            of passages, or a domain is so small that its share fills no window.
    """

    run: Selecting
    records: list[dict[str, Json]] = field(default_factory=list)
    """What each round found, a row for each of its domains."""

    def __post_init__(self) -> None:
        run = self.run
        for number, select in {one.phase: one.select for one in run.plan.rounds}.items():
            layer_of(run.model, select.layer)
            _try_function(select)
            for domain in run.order.shares_of(number):
                _check_budget(f"phase {number}, {domain}", select, run.order.pool(domain), run.settings.sequence_length)

    def restore(self, records: list[dict[str, Json]]) -> None:
        """Take over what `records` held at a resume point; what rounds read is read from their files again."""
        self.records = records
        self.run.order.forget_rounds()

    def enter(self, out: Path) -> None:
        """Have the step that `run` stands at read what is selected for its round; select it where `out` does not hold it yet."""
        run = self.run
        number = run.plan.round_at(run.step)
        if number is None or number in run.order.selected:
            return
        with run.timed("selection"):
            for known in range(number + 1):
                if known not in run.order.selected and (known < number or selection_file(out, known).exists()):
                    run.order.select(known, read_selection(out, known))
            if number not in run.order.selected:
                self._select(number, out)

    def _select(self, number: int, out: Path) -> None:
        """Choose what round `number` reads of each domain, and write it."""
        run = self.run
        one = run.plan.rounds[number]
        found = {domain: self._chosen(number, domain) for domain in run.order.shares_of(one.phase)}
        tables = [table for table, _ in found.values()]
        run.order.select(number, {domain: table["place"].to_numpy() for domain, (table, _) in found.items()})
        at = {"round": number, "phase": one.phase, "step": one.first, "tokens": one.first * run.tokens_per_step}
        epochs = run.order.round_epochs(number)
        rows = [{**at, "domain": domain, **row, "epochs": round(epochs[domain], 3)} for domain, (_, row) in found.items()]
        _write(selection_file(out, number), pa.concat_tables(tables))
        self.records = self.records + rows
        report_line(f"round {number}: " + "; ".join(_told(row) for row in rows))

    def _chosen(self, number: int, domain: str) -> tuple[pa.Table, dict[str, Json]]:
        """Return what round `number` reads of `domain`, and what is told of it."""
        started = time.perf_counter()
        select, pool = self.run.plan.rounds[number].select, self.run.order.pool(domain)
        embeddings = self._embeddings(pool, select, f"round {number}: embedding {domain}")
        points = Points(embeddings=embeddings, costs=_tokens(pool))
        order = _function(select, number).order(points)
        budget = _budget(select, pool)
        picks = order.picks[: num_within(points.costs[order.picks], budget)]
        if not len(picks):
            raise EmptyInput(
                f"round {number}, {domain}: {budget} tokens hold not one passage of the order of {select.function}; "
                f"raise select.fraction {select.fraction}"
            )
        row = _found(points, picks, order.gains, self._before(number, domain))
        return _table(domain, pool, picks, order.gains), {**row, "seconds": round(time.perf_counter() - started, 3)}

    def _before(self, number: int, domain: str) -> np.ndarray | None:
        """Return what round `number` - 1 read of `domain`."""
        return self.run.order.selected[number - 1].get(domain) if number else None

    def _embeddings(self, pool: PassagePool, select: Reselection, label: str) -> np.ndarray:
        """Return the passages of `pool` as integer rows of the model as it stands, int16 of shape (n, width)."""
        import torch

        run = self.run
        self._attend_as_trained()
        lengths = np.minimum(_tokens(pool), select.max_tokens_per_passage or run.settings.sequence_length)
        trained_at_once = (run.settings.micro_batch_sequences or run.settings.batch_sequences) * run.settings.sequence_length
        max_tokens = CPU_BATCH_TOKENS if run.device.type == "cpu" else trained_at_once
        layer, progress, done = layer_of(run.model, select.layer), Progress(label, int(lengths.sum()), "tokens"), 0
        embedded = np.empty((len(pool), run.model.config.hidden_size), dtype=np.int16)
        with torch.compiler.set_stance("force_eager"), run.autocast():
            for passages in batches_by_length(lengths, max_tokens):
                embedded[passages] = self._rows(_padded(pool, passages, lengths[passages]), lengths[passages], layer)
                done += int(lengths[passages].sum())
                progress.update(done)
        return embedded

    def _attend_as_trained(self) -> None:
        """Have the model look at what it looks at in its phase, whatever it did last: the phase's first batch sets the same."""
        run = self.run
        causal = run.objective(run.step).attention == "causal"
        if sees_both_sides(run.model) == causal:
            run.model.config.is_causal = causal

    def _rows(self, inputs_BT: np.ndarray, lengths_B: np.ndarray, layer: int) -> np.ndarray:
        import torch

        run = self.run
        inputs, lengths = (torch.from_numpy(array).to(run.device) for array in (inputs_BT, lengths_B))
        vectors_BD = mean_hidden_states(run.model, inputs, lengths, layer).cpu().numpy()
        if not np.isfinite(vectors_BD).all():
            raise GristmillError(f"step {run.step}: a hidden state is not a finite number; lower learning_rate, or set guards.on_nan: stop")
        return to_integer_rows(vectors_BD)


def selection_file(out: Path, number: int) -> Path:
    """Return where what round `number` reads is written."""
    return out / SELECTION / f"round-{number:03d}.parquet"


def read_selection(out: Path, number: int) -> dict[str, np.ndarray]:
    """Return, by domain, the passages that round `number` reads: places in its pool, int64 of shape (n,)."""
    table = pq.read_table(selection_file(out, number), columns=["domain", "place"])
    domains, places = table["domain"].to_numpy(zero_copy_only=False), table["place"].to_numpy()
    return {str(domain): places[domains == domain] for domain in np.unique(domains)}


def batches_by_length(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield the numbers of texts in batches of at most `max_tokens` positions, one text at least, the longest texts first.

    Texts of one length stay in their order, so that the same lengths give the same batches.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(lengths):
        size = max(1, max_tokens // max(1, int(lengths[longest_first[first]])))
        yield longest_first[first : first + size]
        first += size


def selection_plan(plan: Plan, order: DataOrder) -> list[dict[str, Json]]:
    """Return, for each selecting phase, its rounds and what each of them embeds and reads; nothing is embedded for it."""
    rows: list[dict[str, Json]] = []
    for number, phase in enumerate(plan.settings.phases):
        rounds = sum(one.phase == number for one in plan.rounds)
        if not phase.select or not rounds:
            continue
        limit = phase.select.max_tokens_per_passage or plan.settings.sequence_length
        pools = [order.pool(domain) for domain in order.shares_of(number)]
        rows.append(
            {
                "phase": number,
                "function": phase.select.function,
                "rounds": rounds,
                "passages": sum(len(pool) for pool in pools),
                "tokens_embedded_per_round": sum(int(np.minimum(_tokens(pool), limit).sum()) for pool in pools),
                "budget_tokens": sum(_budget(phase.select, pool) for pool in pools),
            }
        )
    return rows


def _function(select: Reselection, number: int) -> SetFunction:
    """Return the set function of round `number`; one that draws is told the number, by `draw` or else by its seed, to draw anew."""
    fields = plugins.load("set_functions", select.function).model_fields
    told: dict[str, Json] = {}
    if "draw" in fields:
        told = {"draw": number}
    elif "seed" in fields:
        told = {"seed": select.settings.get("seed", fields["seed"].default) + number}
    return cast(SetFunction, plugins.build("set_functions", select.function, {**select.settings, **told}))


def _try_function(select: Reselection) -> None:
    """Order a few points that are known as a run knows its passages: by their vectors and their tokens."""
    function = _function(select, 0)
    points = Points(embeddings=to_integer_rows(np.eye(TRIED_POINTS) + 0.5), costs=np.ones(TRIED_POINTS, dtype=np.int64))
    try:
        function.order(points)
    except GristmillError as error:
        rule = "all that a run knows of its passages are vectors of its own and their tokens"
        raise GristmillError(f"select.function {select.function}: {error} ({rule}; choose a function that needs no more)") from error


def _check_budget(where: str, select: Reselection, pool: PassagePool, sequence_length: int) -> None:
    if _budget(select, pool) < sequence_length:
        share = f"select.fraction {select.fraction} of {int(_tokens(pool).sum())} tokens"
        raise EmptyInput(f"{where}: {share} does not fill one window of {sequence_length}; raise it, or shorten sequence_length")


def _tokens(pool: PassagePool) -> np.ndarray:
    return pool.length.astype(np.int64)


def _budget(select: Reselection, pool: PassagePool) -> int:
    return int(select.fraction * int(_tokens(pool).sum()))


def _padded(pool: PassagePool, passages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the first `lengths` tokens of `passages`, int64 of shape (B, T), filled up with ends of text."""
    out = np.full((len(passages), int(lengths.max())), pool.end_of_text, dtype=np.int64)
    places = zip(pool.shard[passages].tolist(), pool.offset[passages].tolist(), lengths.tolist(), strict=True)
    for row, (shard, offset, length) in enumerate(places):
        out[row, :length] = pool.tokens[shard][offset : offset + length]
    return out


def _table(domain: str, pool: PassagePool, picks: np.ndarray, gains: np.ndarray) -> pa.Table:
    names = pool.names(picks)
    columns = [[domain] * len(picks), [name for name, _ in names], [passage for _, passage in names], picks]
    columns += [np.arange(len(picks)), gains[: len(picks)], _tokens(pool)[picks]]
    return pa.table(dict(zip(SELECTED.names, columns, strict=True)), schema=SELECTED)


def _write(path: Path, table: pa.Table) -> None:
    """Write `table` so that a kill leaves the whole file or none."""
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}")
    write_table(beside, table)
    beside.rename(path)


def _found(points: Points, picks: np.ndarray, gains: np.ndarray, before: np.ndarray | None) -> dict[str, Json]:
    """Return what is told of a selection.

    `coverage` is the mean cosine of a passage to the nearest selected one; `overlap` the passages shared with the round before over
    those of either (Jaccard).
    """
    tokens, together = int(points.costs[picks].sum()), 0 if before is None else len(np.intersect1d(before, picks))
    return {
        "candidates": len(points),
        "passages": len(picks),
        "selected_tokens": tokens,
        "share": round(tokens / int(points.costs.sum()), 4),
        "first_gain": round(float(gains[0]), 4),
        "last_gain": round(float(gains[len(picks) - 1]), 4),
        "coverage": round(float(coverage_along(points.embeddings, picks, np.asarray([len(picks)]))[0]), 4),
        "overlap": None if before is None else round(together / (len(before) + len(picks) - together), 4),
    }


def _told(row: Mapping[str, Json]) -> str:
    again = "" if row["overlap"] is None else f", overlap {row['overlap']:.2f}"
    words = f"{row['domain']} {row['passages']:,} of {row['candidates']:,} passages, {short(row['selected_tokens'])} tokens"
    return f"{words}, coverage {row['coverage']:.3f}{again}, {row['seconds']:.1f} s"
