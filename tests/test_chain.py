"""The chain from a source to decisions: nothing is lost, rows in another order get the same verdicts, workers change no byte."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chain import PROSE, REPEATED, Chain, mill

from pipelines import row_groups
from pipelines.store import Store

TEXTS = st.one_of(
    st.sampled_from([PROSE, f"{PROSE} {PROSE}", REPEATED, "x", "", " ", "\x01", "You asshole.", "naÃ¯ve cafÃ©", "ann@example.com\r\nb"]),
    st.builds(PROSE.format, st.integers(0, 3), st.sampled_from(["oak", "ash"])),
    st.text(max_size=30),
)


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(TEXTS, max_size=14), broken=st.integers(0, 2), seed=st.randoms(use_true_random=False))
def test_documents_are_conserved_and_their_order_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], broken: int, seed: object
) -> None:
    root = tmp_path_factory.mktemp("chain")
    lines = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)] + ["{broken"] * broken
    shuffled = list(lines)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = (mill(Store(root / name), root / name, given_lines) for name, given_lines in (("one", lines), ("two", shuffled)))
    assert_conserved(one, len(lines))
    for name in ("quality", "toxicity", "deduplicated"):
        assert verdicts(one, name) == verdicts(two, name)
    assert rows(one.quality_scores.file("scores.parquet")) == rows(two.quality_scores.file("scores.parquet"))


def assert_conserved(chain: Chain, documents: int) -> None:
    """Every document that came in stands in exactly one place."""
    assert chain.raw.counts["documents_in"] == documents
    quarantined = chain.raw.counts["quarantined"]
    dropped = [name for name, _ in rows(chain.cleaned.file("dropped.parquet")).items()]
    for decided in (chain.quality, chain.toxicity, chain.deduplicated):
        dropped += [name for name, row in rows(decided.file("decisions.parquet")).items() if not row["kept"]]
    kept = [name for name, row in rows(chain.deduplicated.file("decisions.parquet")).items() if row["kept"]]
    everywhere = dropped + kept
    assert len(everywhere) == len(set(everywhere)) == documents - quarantined
    assert set(everywhere) == set(rows(chain.raw.file("documents.parquet")))


def verdicts(chain: Chain, name: str) -> dict[str, tuple[object, ...]]:
    """Return what was decided on each document, and why."""
    found = rows(getattr(chain, name).file("decisions.parquet"))
    return {key: (row["kept"], row["rule"], row["score"], str(row["reasons"])) for key, row in found.items()}


def rows(path: Path) -> dict[str, dict[str, object]]:
    """Return the rows of a table by id, with numbers that are not one written out so that they compare."""
    return {row["id"]: {k: str(v) if v != v else v for k, v in row.items()} for row in pq.read_table(path).to_pylist()}


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{PROSE.format(n % 700, 'oak')} {n % 900}." * (1 + n % 3) for n in range(2_600)]
    lines = [{"id": f"d{number}", "text": text} for number, text in enumerate([*texts, REPEATED, "\x01"])]
    monkeypatch.setattr(row_groups, "PARALLEL_BYTES", 0)
    found = []
    for workers in ("1", "2"):
        monkeypatch.setenv("GRISTMILL_WORKERS", workers)
        chain = mill(Store(tmp_path / workers), tmp_path / workers, lines)
        found.append({field.name: getattr(chain, field.name).content_sha256 for field in fields(chain)})
    assert found[0] == found[1]
    assert pq.read_metadata(tmp_path / "1" / "artifacts" / "raw_corpus" / chain.raw.fingerprint / "documents.parquet").num_row_groups > 1
