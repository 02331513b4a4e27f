"""Facility location against submodlib and apricot on the same embeddings of real text, each in a process of its own; then ours alone.

    python -m benchmarks.selection [--quick] [--corpus data/sample/corpus.parquet] [--sizes 2000 5000 10000 20000] [--large 100000 1000000]

Texts are cut into passages, each kept once, and embedded by the project's default embedder. A quarter is selected. The comparison is in
CPU seconds of one thread, from embeddings to picks, with the similarities (the peers' by one float32 product and not by sklearn, which
takes longer) or the graph of neighbours. Every method is first run on a few rows: what loading and compiling cost and hold is shown
apart (`start`, `before`). f is the objective over all pairs, divided by n, by one function for every method; negative cosines count 0.
Exact greedy looks at all pairs.

The large sizes are of short passages, since they need many, with `--threads` threads; f is estimated on 2,000 rows, and the share of
true neighbours in the graph on 500.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines import plugins
from pipelines.documents import passages, read_batches, stable_fraction
from pipelines.embedders._grid import UNIT, to_integer_rows

SIZES, QUICK_SIZES = (2_000, 5_000, 10_000, 20_000), (2_000, 5_000, 10_000)
OURS_ALONE = 20_000
"""Also measured in a quick run, without the peers."""
LARGE = (100_000, 300_000, 1_000_000)
BUDGET = 0.25
EMBEDDER = "static_words"
SAMPLE = 20_000
"""Passages that the embedder is fitted on."""
METHODS = {
    "ours": "ours",
    "lazy": "submodlib LazyGreedy",
    "stochastic": "submodlib StochasticGreedy",
    "apricot": "apricot lazy",
    "exact": "exact greedy, all pairs",
    "random": "random",
}
REPEATS = {"ours": 3}
"""Runs whose median counts: ours take fractions of a second."""
WARM_UP = 400
"""Rows of the first run."""
EXACT_UP_TO = 100_000
"""Points up to which the default graph is exact: beyond, the first run is of tables, too."""
HASHED_SIZE, HASHED_THREADS = 5_000, (1, 2, 4)
ESTIMATED_ROWS, RECALLED_ROWS = 2_000, 500


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[Path("data/sample/corpus.parquet")], help="Parquet files with a column text"
    )
    parser.add_argument("--quick", action="store_true", help="peers up to 10,000 points, no large sizes")
    parser.add_argument("--sizes", type=int, nargs="*", help="points of the comparison")
    parser.add_argument("--large", type=int, nargs="*", help="points for ours alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared")
    parser.add_argument("--characters", type=int, default=1_500, help="characters of a passage at most, in the comparison")
    parser.add_argument("--large-characters", type=int, default=120, help="characters of a passage at most, of the large sizes")
    parser.add_argument("--threads", type=int, default=2, help="threads of the large sizes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    started = time.monotonic()
    sizes = arguments.sizes if arguments.sizes is not None else QUICK_SIZES if arguments.quick else SIZES
    large = arguments.large if arguments.large is not None else () if arguments.quick else LARGE
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-selection-") as name:
        alone = [OURS_ALONE] if arguments.quick and arguments.sizes is None else []
        grown: list[dict] = []
        if sizes:
            rows = embedded(arguments, name, max(*sizes, *alone, HASHED_SIZE), arguments.characters)
            compared = comparison(rows, [*sizes, *alone], arguments.methods, alone)
            console.print(comparison_table(compared, arguments.characters))
            found |= summary(compared) | thread_independence(rows)
            console.print(f"The same order with {HASHED_THREADS} threads: {found['same_order_with_1_2_4_threads']}")
            grown += compared["ours"]
        if large:
            rows = embedded(arguments, name, max(large), arguments.large_characters)
            alone_rows = [measured({"method": "ours", "size": size, **rows}, arguments.threads) for size in fitting(large, rows)]
            console.print(large_table(alone_rows, arguments.large_characters))
            grown, found = [*grown, *alone_rows], {**found, "large": alone_rows}
    found["growth_exponent"] = growth_exponents(grown)
    print(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}))


def embedded(arguments: argparse.Namespace, directory: str, count: int, characters: int) -> dict[str, object]:
    """Embed passages of the corpus in a process of its own; return where the rows are and how many there are."""
    path = str(Path(directory) / f"{characters}.int16")
    job = {"method": "embed", "corpus": list(map(str, arguments.corpus)), "characters": characters, "count": count, "path": path}
    made = measured(job, arguments.threads)
    return {"path": path, "rows": made["rows"], "dimensions": made["dimensions"]}


def fitting(sizes: Sequence[int], rows: Mapping[str, object]) -> list[int]:
    """Return the `sizes` that the corpus has passages for, and say which it has not."""
    available = int(str(rows["rows"]))
    for size in sizes:
        if size > available:
            print(f"{size:,} points are left out: the corpus has {available:,} distinct passages", file=sys.stderr)
    return [size for size in sizes if size <= available]


def comparison(
    rows: Mapping[str, object], sizes: Sequence[int], methods: Sequence[str], alone: Sequence[int]
) -> dict[str, list[dict[str, float]]]:
    """Return, by method, what each size took; in sizes of `alone` the peers are left out."""
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for size in fitting(sizes, rows):
        for method in methods:
            if size in alone and method in ("lazy", "stochastic", "apricot"):
                continue
            runs = [measured({"method": method, "size": size, **rows}, 1) for _ in range(REPEATS.get(method, 1))]
            found[method].append(sorted(runs, key=lambda run: run["cpu_seconds"])[len(runs) // 2])
    return found


def thread_independence(rows: Mapping[str, object]) -> dict[str, object]:
    """Return the hashes of the order with 1, 2 and 4 threads by kind of graph, and whether they are the same."""
    size = min(HASHED_SIZE, int(str(rows["rows"])))
    hashes: dict[str, list[str]] = {}
    for name, settings in (("exact", {}), ("tables", {"exact_up_to": 0})):
        job = {"method": "ours", "size": size, "settings": settings, **rows}
        hashes[name] = [measured(job, threads)["order_sha256"] for threads in HASHED_THREADS]
    return {"order_sha256": hashes, "same_order_with_1_2_4_threads": all(len(set(found)) == 1 for found in hashes.values())}


# The processes


def measured(job: Mapping[str, object], threads: int) -> dict:
    """Run `job` in a process of its own with so many threads, and return what it measured."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    environment = {**os.environ, **limits, "GRISTMILL_WORKERS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.selection", "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{name} {found[name]:,.3f}" for name in ("cpu_seconds", "wall_seconds", "coverage") if name in found)
    print(f"{job['method']} {job.get('size', job.get('count')):,}: {shown}", file=sys.stderr)
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()} | {"threads": threads}


def work(job: dict) -> dict:
    """Do in this process what `job` says; return figures."""
    if job["method"] == "embed":
        return embed(job)
    embeddings = np.fromfile(job["path"], np.int16, count=job["size"] * job["dimensions"]).reshape(job["size"], -1)
    budget = int(BUDGET * job["size"])
    method: Method = {"ours": ours, "lazy": submodlib, "stochastic": submodlib, "apricot": apricot, "exact": exact, "random": random}[
        job["method"]
    ]
    began = cpu_seconds()
    first = {"settings": {"exact_up_to": 0}} if job["size"] > EXACT_UP_TO else {}
    method(embeddings[:WARM_UP], int(BUDGET * WARM_UP), {**job, **first})
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    warm, wall = cpu_seconds(), time.perf_counter()
    picks, parts, details = method(embeddings, budget, job)
    seconds = {"cpu_seconds": cpu_seconds() - warm, "wall_seconds": time.perf_counter() - wall, "start_seconds": warm - began}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    places = np.linspace(0, len(embeddings) - 1, ESTIMATED_ROWS).astype(np.int64) if len(embeddings) > max(SIZES) else slice(None)
    found = {"size": job["size"], "picks": len(picks), **seconds, **parts, "peak_memory_mb": peak, "start_memory_mb": start}
    found["coverage"] = coverage(embeddings[places], embeddings[picks])
    if job["method"] == "ours":
        found |= details()
        chosen = np.random.default_rng(0).permutation(len(embeddings))[:budget]
        found["coverage_random"] = coverage(embeddings[places], embeddings[chosen])
    return found


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those it started."""
    times = os.times()  # which counts hundredths; the process's own clock is finer
    return time.process_time() + times.children_user + times.children_system


Details = Callable[[], dict[str, object]]
Picked = tuple[np.ndarray, dict[str, float], Details]
"""Picks, CPU seconds of the parts, and what is found out after the clock has stopped."""
Method = Callable[[np.ndarray, int, Mapping[str, object]], Picked]
"""From embeddings, a budget and the job."""


def coverage(points: np.ndarray, picks: np.ndarray) -> float:
    """Return the mean over `points` of the cosine to the nearest of `picks` (int16 rows), at least 0: f over n, all pairs counted."""
    others, total = np.ascontiguousarray(picks.astype(np.float32).T), 0.0
    for start in range(0, len(points), 512):
        nearest = (points[start : start + 512].astype(np.float32) @ others).max(axis=1)
        total += float(np.maximum(nearest, 0).sum(dtype=np.float64))
    return total / (len(points) * UNIT)


def nothing() -> dict[str, object]:
    """Return no details."""
    return {}


def ours(embeddings: np.ndarray, budget: int, job: Mapping[str, object]) -> Picked:
    """Order all points as a recipe with the default settings does."""
    from pipelines.set_functions import Points
    from pipelines.set_functions.facility_location import FacilityLocation

    order = FacilityLocation(**job.get("settings", {})).order(Points(embeddings))

    def details() -> dict[str, object]:
        graph = order.graph
        digest = hashlib.sha256(order.picks.tobytes() + order.gains.tobytes()).hexdigest()
        return {
            "order_sha256": digest,
            "ordered": len(order.picks),
            "neighbors": graph.columns.shape[1],
            "exact_graph": graph.is_exact,
            "recall": recall(embeddings, graph.columns),
            "select": select_seconds(graph),
        }

    return order.picks[:budget], {}, details


def recall(embeddings: np.ndarray, columns: np.ndarray) -> float:
    """Return the share of the true nearest neighbours of `RECALLED_ROWS` rows that their lists hold."""
    from pipelines.set_functions._neighbors import nearest_candidates

    rows = np.unique(np.linspace(0, len(embeddings) - 1, RECALLED_ROWS).astype(np.int64))
    true = nearest_candidates(embeddings[rows], embeddings, columns.shape[1]).columns
    hits = sum(len(np.intersect1d(mine[mine >= 0], best[best >= 0])) for mine, best in zip(columns[rows], true, strict=True))
    return hits / int((true >= 0).sum())


def select_seconds(graph: object) -> float:
    """Return the CPU seconds of the greedy order on a graph that is there."""
    from pipelines.set_functions._greedy import coverage_order

    started = cpu_seconds()
    coverage_order(graph)
    return cpu_seconds() - started


def dense_kernel(embeddings: np.ndarray) -> np.ndarray:
    """Return the integer similarities of all pairs, at least 0, as contiguous float32."""
    rows = embeddings.astype(np.float32)
    kernel = rows @ rows.T
    return np.maximum(kernel, 0, out=kernel)


def submodlib(embeddings: np.ndarray, budget: int, job: Mapping[str, object]) -> Picked:
    """Maximize with submodlib's dense function: it wants contiguous rows, and its stop switches compare gains with 1.0, so are off."""
    from submodlib import FacilityLocationFunction

    clock = [cpu_seconds()]
    kernel = dense_kernel(embeddings)
    kernel /= UNIT
    clock.append(cpu_seconds())
    function = FacilityLocationFunction(n=len(kernel), mode="dense", separate_rep=False, sijs=kernel, pybind_mode="array")
    clock.append(cpu_seconds())
    optimizer = {"lazy": "LazyGreedy", "stochastic": "StochasticGreedy"}[str(job["method"])]
    quiet = {"stopIfZeroGain": False, "stopIfNegativeGain": False, "verbose": False, "show_progress": False}
    found = function.maximize(budget=budget, optimizer=optimizer, **quiet)
    clock.append(cpu_seconds())
    parts = dict(zip(("kernel", "construct", "select"), np.diff(clock).tolist(), strict=True))
    return np.array([pick for pick, _ in found]), parts, nothing


def apricot(embeddings: np.ndarray, budget: int, job: Mapping[str, object]) -> Picked:
    """Fit apricot's selector on the kernel, which it takes as float64; it compiles anew for every fit, which counts."""
    from apricot import FacilityLocationSelection

    clock = [cpu_seconds()]
    kernel = dense_kernel(embeddings).astype(np.float64)
    kernel /= UNIT
    clock.append(cpu_seconds())
    selector = FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy").fit(kernel)
    clock.append(cpu_seconds())
    return np.asarray(selector.ranking), dict(zip(("kernel", "select"), np.diff(clock).tolist(), strict=True)), nothing


def exact(embeddings: np.ndarray, budget: int, job: Mapping[str, object]) -> Picked:
    """Greedy by all pairs in exact integers, gains recomputed where they are looked at (Minoux 1978); ties to the lowest index."""
    kernel = dense_kernel(embeddings)
    covered = np.zeros(len(kernel), dtype=np.float32)
    heap = [(-float(row.sum(dtype=np.float64)), point, 0) for point, row in enumerate(kernel)]
    heapq.heapify(heap)
    picks: list[int] = []
    while heap and len(picks) < budget:
        _, point, seen = heap[0]
        if seen == len(picks):
            heapq.heappop(heap)
            picks.append(point)
            covered = np.maximum(covered, kernel[point])
            continue
        gain = float(np.maximum(kernel[point] - covered, 0).sum(dtype=np.float64))
        heapq.heapreplace(heap, (-gain, point, len(picks)))
    return np.array(picks), {}, nothing


def random(embeddings: np.ndarray, budget: int, job: Mapping[str, object]) -> Picked:
    """Draw points."""
    return np.random.default_rng(0).permutation(len(embeddings))[:budget], {}, nothing


def embed(job: Mapping[str, object]) -> dict[str, object]:
    """Write the integer rows of distinct passages of the corpus, in the order of a hash of their text; rows of zeros are left out."""
    texts = sorted(set(pieces(job["corpus"], job["characters"])), key=lambda text: (stable_fraction("benchmark", text), text))
    embedder = plugins.build("embedders", EMBEDDER)
    count, filled, parts = min(job["count"], len(texts)), 0, []
    with tempfile.TemporaryDirectory() as state:
        embedder.fit(texts[:SAMPLE], Path(state))
        started, wall = cpu_seconds(), time.perf_counter()
        for start in range(0, len(texts), 1_000):
            if filled >= count:
                break
            rows = to_integer_rows(embedder.embed(texts[start : start + 1_000], Path(state)))
            parts.append(rows[rows.any(axis=1)])
            filled += len(parts[-1])
    rows = np.concatenate(parts)[:count]
    rows.tofile(job["path"])
    seconds = {"cpu_seconds": cpu_seconds() - started, "wall_seconds": time.perf_counter() - wall}
    return {"rows": len(rows), "dimensions": rows.shape[1], "texts": len(texts), **seconds}


def pieces(corpus: Sequence[str], characters: int) -> Iterator[str]:
    """Yield the passages of all texts of the Parquet files `corpus`."""
    for path in corpus:
        for batch in read_batches(Path(path), ["text"]):
            for text in batch["text"].to_pylist():
                yield from (text[start:end] for start, end in passages(text or "", characters))


# Tables


def summary(compared: Mapping[str, list[dict[str, float]]]) -> dict[str, object]:
    """Return the figures of the comparison, ratios first."""
    by_size = {method: {int(row["size"]): row for row in rows} for method, rows in compared.items()}
    found: dict[str, object] = {}
    for size, row in by_size["ours"].items():
        label = f"{size // 1000}k" if size % 1000 == 0 else str(size)
        for method in ("lazy", "stochastic", "apricot"):
            if size in by_size[method]:
                peer = f"submodlib_{method}" if method != "apricot" else "apricot_lazy"
                found[f"speedup_vs_{peer}_{label}"] = round(by_size[method][size]["cpu_seconds"] / row["cpu_seconds"], 1)
        if size in by_size["exact"]:
            best, chance = by_size["exact"][size]["coverage"], row["coverage_random"]
            found[f"objective_ratio_{label}"] = round(row["coverage"] / best, 5)
            found[f"gap_share_{label}"] = round((row["coverage"] - chance) / (best - chance), 4)
    return found | {"comparison": compared}


def growth_exponents(rows: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Return b of CPU seconds ~ n^b, by least squares over logarithms, for the exact graph and for the one from tables."""
    found: dict[str, float | None] = {}
    for name, is_exact in (("exact", True), ("tables", False)):
        points = [(row["size"], row["cpu_seconds"]) for row in rows if row["exact_graph"] == is_exact]
        sizes, seconds = np.log(np.array(points, dtype=float).reshape(-1, 2)).T
        found[name] = round(float(np.polyfit(sizes, seconds, 1)[0]), 2) if len(set(sizes.tolist())) > 1 else None
    return found


def comparison_table(compared: Mapping[str, list[dict[str, float]]], characters: int) -> Table:
    """Return the comparison as a table."""
    title = f"A quarter of n passages of at most {characters:,} characters, one thread, CPU seconds"
    heads = ("n", "method", "all", "x ours", "kernel or graph", "select", "wall", "start", "peak MB", "before", "f / n", "of exact greedy")
    table = Table(*heads, title=title)
    ours_at = {row["size"]: row for row in compared["ours"]}
    exact_at = {row["size"]: row for row in compared["exact"]}
    for size in sorted(ours_at):
        for method, rows in compared.items():
            for row in (row for row in rows if row["size"] == size):
                select = row.get("select")
                best = exact_at.get(size)
                table.add_row(
                    f"{size:,.0f}",
                    METHODS[method],
                    f"{row['cpu_seconds']:.3f}",
                    f"{row['cpu_seconds'] / ours_at[size]['cpu_seconds']:.1f}" if method in ("lazy", "stochastic", "apricot") else "",
                    f"{row['cpu_seconds'] - select:.3f}" if select is not None else "",
                    f"{select:.3f}" if select is not None else "",
                    f"{row['wall_seconds']:.2f}",
                    f"{row['start_seconds']:.1f}",
                    f"{row['peak_memory_mb']:,.0f}",
                    f"{row['start_memory_mb']:,.0f}",
                    f"{row['coverage']:.4f}",
                    f"{row['coverage'] / best['coverage']:.4%}" if best else "",
                )
    return table


def large_table(rows: Sequence[Mapping[str, float]], characters: int) -> Table:
    """Return ours alone as a table."""
    threads = rows[0]["threads"] if rows else 0
    title = f"A quarter of n passages of at most {characters:,} characters, {threads} threads"
    table = Table(
        "n", "graph", "wall, s", "CPU, s", "select, CPU-s", "start, CPU-s", "peak MB", "before", "f / n", "random", "recall", title=title
    )
    for row in rows:
        table.add_row(
            f"{row['size']:,}",
            f"{'exact' if row['exact_graph'] else 'tables'}, {row['neighbors']} edges",
            f"{row['wall_seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['select']:.2f}",
            f"{row['start_seconds']:.1f}",
            f"{row['peak_memory_mb']:,.0f}",
            f"{row['start_memory_mb']:,.0f}",
            f"{row['coverage']:.4f}",
            f"{row['coverage_random']:.4f}",
            f"{row['recall']:.3f}",
        )
    return table


if __name__ == "__main__":
    main()
