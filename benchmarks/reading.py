"""Reading token files: tokens per CPU-second and the time to a cold position, beside the readers of datatrove and Hugging Face.

    python -m benchmarks.reading [--tokens 50_000_000] [--quick]

One thread, the files in the page cache, windows of 1024 and one token. Ours reads shuffled passages, 32 windows at a time, with
and without the numbers of documents; datatrove's dataset a `.ds` file that our own export wrote, in order and at random, with and
without positions; `datasets` a table of cut windows, shuffled, 32 at a time and one by one, as a Trainer's loader does. The rounds of
all readers are interleaved and the median is taken. Needs the extra `bench`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines import plugins
from pipelines.batch import documents_of
from pipelines.shards import PassagePool, WindowStream
from pipelines.token_formats import Vocabulary

SEQUENCE_LENGTH, BATCH = 1024, 32
VOCABULARY = Vocabulary(4096, 0)
ROUNDS = 5
POSITIONS = "with document positions"

Reader = Callable[[np.ndarray], int]
"""Reads windows by their numbers and returns how many tokens it read."""


def main() -> None:
    """Measure, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens in the files")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), arguments.tokens // (10 if arguments.quick else 1))
    console = Console(width=140)
    table = Table("reader", "M tokens per CPU-second", title="reading, one thread")
    for name, rate in result["rates"].items():  # type: ignore[union-attr]
        table.add_row(name, f"{rate:.1f}")
    console.print(table)
    console.print(f"cold seek: {result['cold_seek_ms']:.2f} ms over {result['passages']:,} passages")
    print(json.dumps(result))


def measure(directory: Path, num_tokens: int) -> dict[str, object]:
    """Write the same passages for every reader under `directory`, and read them."""
    import torch

    torch.set_num_threads(1)
    pool = random_pool(directory, num_tokens)
    stream = WindowStream(pool, SEQUENCE_LENGTH, seed=1)
    write_peers(directory, stream)
    readers = {**our_readers(stream), **datatrove_readers(directory), **hugging_face_readers(directory)}
    rates: dict[str, list[float]] = {name: [] for name in readers}
    random = np.random.default_rng(2)
    windows = min(stream.windows_per_epoch, num_tokens // (SEQUENCE_LENGTH + 1)) - 1
    for turn in range(ROUNDS + 1):
        for name, read in readers.items():
            count = 100 if POSITIONS in name and "random" in name else min(1000, windows)
            numbers = random.integers(0, windows, count) if "order" not in name else (turn * 37 + np.arange(count)) % windows
            started = time.process_time()
            read_tokens = read(np.sort(numbers) if "order" in name else numbers)
            if turn:  # the first round opens files and loads compiled code
                rates[name].append(read_tokens / (time.process_time() - started) / 1e6)
    return {
        "rates": {name: float(np.median(found)) for name, found in rates.items()},
        "cold_seek_ms": cold_seek(pool, windows // 2),
        "passages": len(pool),
        "tokens": num_tokens,
    }


def cold_seek(pool: PassagePool, number: int) -> float:
    """Return the milliseconds of CPU from a stream just opened to one window of it, the median of five."""
    found = []
    for seed in range(5):
        started = time.process_time()
        WindowStream(pool, SEQUENCE_LENGTH, seed).window(number)
        found.append((time.process_time() - started) * 1e3)
    return float(np.median(found))


def random_pool(directory: Path, num_tokens: int) -> PassagePool:
    """Return passages of 50 to 700 tokens in one file, about as long as those of the sample."""
    random = np.random.default_rng(0)
    length = random.integers(50, 700, num_tokens // 375).astype(np.int32)
    offset = np.cumsum(length, dtype=np.int64) - length
    path = directory / "tokens.bin"
    random.integers(1, VOCABULARY.size, int(length.sum()), dtype=np.uint16).tofile(path)
    tokens = np.memmap(path, dtype="<u2", mode="r")
    return PassagePool([tokens], np.zeros(len(length), np.int32), offset, length, VOCABULARY.end_of_text)


def write_peers(directory: Path, stream: WindowStream) -> None:
    """Write the first epoch of `stream` as a `.ds` file, and its windows as a table of `datasets`."""
    import datasets

    pool = stream.pool
    documents = (pool.tokens[0][pool.offset[p] : pool.offset[p] + pool.length[p]] for p in stream.order(0).tolist())
    plugins.build("token_formats", "nanotron").write(documents, directory / "peer", vocabulary=VOCABULARY)  # type: ignore[attr-defined]

    def rows() -> Iterator[dict[str, list[int]]]:
        for number in range(stream.windows_per_epoch):
            yield {"input_ids": stream.window(number).tolist()}

    datasets.disable_progress_bars()
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    datasets.Dataset.from_generator(rows, features=features, cache_dir=str(directory / "cache")).save_to_disk(str(directory / "table"))


def our_readers(stream: WindowStream) -> dict[str, Reader]:
    """Return our readers: a batch at a time, as training asks."""

    def read(numbers: np.ndarray, *, documents: bool = False) -> int:
        total = 0
        for first in range(0, len(numbers), BATCH):
            windows = stream.windows(numbers[first : first + BATCH])
            total += windows.size
            if documents:
                documents_of(windows, VOCABULARY.end_of_text)
        return total

    return {"ours, shuffled": read, f"ours, shuffled, {POSITIONS}": lambda numbers: read(numbers, documents=True)}


def datatrove_readers(directory: Path) -> dict[str, Reader]:
    """Return the readers of datatrove."""
    from datatrove.utils.dataset import DatatroveFileDataset

    def reader(*, positions: bool) -> Reader:
        dataset = DatatroveFileDataset(str(directory / "peer.ds"), SEQUENCE_LENGTH, return_positions=positions)
        return lambda numbers: sum(len(dataset[number]["input_ids"]) for number in numbers.tolist())

    return {
        "datatrove, in order": reader(positions=False),
        "datatrove, random": reader(positions=False),
        f"datatrove, in order, {POSITIONS}": reader(positions=True),
        f"datatrove, random, {POSITIONS}": reader(positions=True),
    }


def hugging_face_readers(directory: Path) -> dict[str, Reader]:
    """Return the readers of `datasets`, which give torch tensors as a Trainer's collator does."""
    import datasets

    dataset = datasets.load_from_disk(str(directory / "table")).with_format("torch")

    def batches(numbers: np.ndarray) -> int:
        return sum(dataset[numbers[i : i + BATCH].tolist()]["input_ids"].numel() for i in range(0, len(numbers), BATCH))

    return {
        "datasets, random, 32 at a time": batches,
        "datasets, random, one by one": lambda numbers: sum(dataset[number]["input_ids"].numel() for number in numbers.tolist()),
    }


if __name__ == "__main__":
    main()
