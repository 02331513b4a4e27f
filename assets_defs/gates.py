"""Gates between runs: nothing is built of an artifact whose successor failed its audit.

Dagster's blocking checks gate within one run. Between runs the pointer of a refused partition still names the artifact of before, so
each request is compared with the refusals that the store remembers: along the lineage of what it reads, and, where a first attempt
left nothing behind, by the partitions that it would silently do without.
"""

import re
from collections.abc import Callable, Collection, Iterator

from pipelines.documents import split_partition
from pipelines.manifests import InputReference, Manifest, Member
from pipelines.refusals import Refusal, RefusedInput, refusals
from pipelines.store import Build, Input, Store

SOURCE_KEY = re.compile(r"\|\d{4}-\d{2}-\d{2}$")
"""What ends the key of a source partition, and of no recipe or probe."""


class Gate:
    """The refusals of `store` as they stand now."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refused = refusals(store.root)
        self._lineage: dict[tuple[str, str], tuple[InputReference, ...]] = {}

    def check(self, build: Build) -> None:
        """Let `build` pass if nothing that it is made from was to be replaced by an attempt that failed its audit.

        The lineage is followed through partitions. It ends at what is fitted once: a tokenizer whose sample was to change stays
        the tokenizer of a new month.

        Raises:
            RefusedInput: something was.
        """
        if not self._refused:
            return
        for owner, reference in self._ancestors(build):
            for refused in self._refused:
                if _stands_at(reference, refused, owner) and (refused.asset, refused.partition) != (build.asset, build.partition):
                    raise RefusedInput(f"{build.label} is not built: {refused.remedy()}")

    def _ancestors(self, build: Build) -> Iterator[tuple[str | None, InputReference]]:
        """Yield every reference that `build` reaches, each with the partition of the input that it was reached by."""
        pending = [(direct.partition, direct) for direct in _references(build)]
        seen: set[tuple[str, str]] = set()
        while pending:
            owner, reference = pending.pop()
            yield owner, reference
            key = (reference.asset, reference.fingerprint)
            if reference.partition is not None and key not in seen:
                seen.add(key)
                pending += [(owner, further) for further in self._inputs(reference)]

    def _inputs(self, reference: InputReference) -> tuple[InputReference, ...]:
        key = (reference.asset, reference.fingerprint)
        if key not in self._lineage:
            found = self._store.find(*key)
            self._lineage[key] = tuple(one for many in found.inputs.values() for one in many) if found else ()
        return self._lineage[key]


def demand_whole(store: Store, asset: str, there: Collection[str], wanted: Callable[[str, str], bool]) -> None:
    """Let pass if no source partition that is `wanted` (domain, snapshot) is missing from `there` because it was refused.

    Raises:
        RefusedInput: a first attempt failed its audit, so `asset` would be read without that partition.
    """
    for refused in refusals(store.root):
        key = refused.partition or ""
        if refused.standing is None and SOURCE_KEY.search(key) and key not in there and wanted(*split_partition(key)):
            raise RefusedInput(f"{asset} lacks {key}: {refused.remedy()}")


def _references(build: Build) -> Iterator[InputReference]:
    for value in build.inputs.values():
        for one in value if isinstance(value, tuple) else (value,):
            yield from _reached(one)


def _reached(value: Input) -> Iterator[InputReference]:
    """Yield the reference to an input, and to what it is made from where it is a request that is built first."""
    if isinstance(value, Build):
        yield value.reference()
        yield from _references(value)
    elif isinstance(value, Member):
        yield value.manifest.reference()
    elif isinstance(value, Manifest):
        yield value.reference()


def _stands_at(reference: InputReference, refused: Refusal, owner: str | None) -> bool:
    """Return whether `reference` is the artifact that `refused` was to replace.

    Recipes share artifacts, and a shared one names the recipe that was first: there the partition of the direct input says whose it is.
    """
    if (reference.asset, reference.fingerprint) != (refused.asset, refused.standing):
        return False
    if refused.partition is None or SOURCE_KEY.search(refused.partition):
        return reference.partition == refused.partition
    return refused.partition in (owner, (owner or "").partition("|")[0])
