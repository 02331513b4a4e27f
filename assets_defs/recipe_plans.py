"""What a recipe asks of each asset, without making any of it, and where two recipes part.

Every asset's own function says what its artifact is made from. Here it is called with a store in which each artifact of a recipe stands
as it is planned: its true manifest where it was made already, else one that has its fingerprint and no file. So the addresses are those
that a run would ask for; two recipes share an artifact where they are equal. Where one file of an artifact that was not made yet is an
input, its bytes are not known, and readers are taken to differ with the artifact.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from assets_defs.automation import STAGES
from assets_defs.definitions import defs
from assets_defs.materialization import REQUESTS
from assets_defs.partitions import PROBE, PROBES, RECIPE
from assets_defs.resources import Mill
from pipelines import contamination
from pipelines.documents import partition_file
from pipelines.errors import GristmillError, dotted
from pipelines.manifests import InputReference, Json, Manifest, Member
from pipelines.recipes import Project, Recipe
from pipelines.settings_files import differences
from pipelines.store import Store

MAX_SHOWN = 160
"""Characters of a value; all of it stands in the JSON."""


class PlannedManifest(Manifest):
    """The manifest of an artifact that may not be there: any file may be named, none can be read."""

    def file(self, name: str) -> Path:
        return Path("planned") / name

    def reference(self, member: str | None = None) -> InputReference:
        """Return a reference; the identity of a file is that of the artifact and its name."""
        sha256 = hashlib.sha256(f"{self.fingerprint}/{member}".encode()).hexdigest() if member else None
        return InputReference(asset=self.asset, partition=self.partition, fingerprint=self.fingerprint, member=member, sha256=sha256)


class PlannedStore(Store):
    """A store in which every artifact stands as it is planned; nothing is written to it."""

    def __init__(self, mill: Mill) -> None:
        super().__init__(mill.store.root, mill.store.remote)
        self._mill = PlannedMill(mill, self)
        self._current = cache(self._planned)

    def current(self, asset: str, partition: str | None = None) -> Manifest:
        """Return the manifest of what `partition` of `asset` would stand at."""
        return self._current(asset, partition)

    def partitions(self, asset: str) -> list[str]:
        """Return the source partitions that are there; of a domain that has none, those that the project lists."""
        found = super().partitions(asset)
        there = {key.partition("|")[0] for key in found}
        project = self._mill.project
        return sorted([*found, *(f"{domain}|{month}" for domain in project.domains if domain not in there for month in project.snapshots)])

    def _planned(self, asset: str, partition: str | None) -> Manifest:
        if asset in by_recipe():
            build = REQUESTS[asset](self._mill, partition)
            found = self.find(asset, build.fingerprint())
            made = (build.fingerprint(), build.code_version(), build.references())
            return found.for_partition(partition) if found else _planned_manifest(asset, partition, *made)
        if self.is_current(asset, partition):
            return super().current(asset, partition)
        address = hashlib.sha256(f"{asset}[{partition}]".encode()).hexdigest()[:32]
        items = {}
        if asset == "contamination":  # its reader looks at which evaluation texts it was measured against
            items = {"items": (Member(manifest=self.current("evaluation_index"), name=contamination.ITEMS).reference(),)}
        return _planned_manifest(asset, partition, address, "", items)


class PlannedMill(Mill):
    """The mill around a planned store."""

    def __init__(self, mill: Mill, store: PlannedStore) -> None:
        super().__init__(mill.home, mill.engine)
        self.store = store
        self._mill = mill

    @property
    def project(self) -> Project:
        return self._mill.project

    def recipe(self, name: str) -> Recipe:
        """Return recipe `name` of the mill that is planned for."""
        return self._mill.recipe(name)

    def splits(self, partitions: list[str]) -> tuple[Member, ...]:
        """Return the split files of `partitions`, whether or not there is a split yet."""
        try:
            return super().splits(partitions)
        except GristmillError:
            register = _planned_manifest("duplicate_clusters", None, "0" * 32, "", {})
            return tuple(Member(manifest=register, name=f"splits/{partition_file(key)}") for key in partitions)


def _planned_manifest(
    asset: str, partition: str | None, address: str, version: str, inputs: Mapping[str, tuple[InputReference, ...]]
) -> Manifest:
    return PlannedManifest(asset=asset, partition=partition, fingerprint=address, code_version=version, settings={}, inputs=dict(inputs))


@cache
def by_recipe() -> tuple[str, ...]:
    """Return the assets that recipes decide, in the order in which a run makes them."""
    decided = {node.key.to_user_string() for node in defs.resolve_asset_graph().asset_nodes if node.partitions_def in (RECIPE, PROBE)}
    return tuple(asset for _, assets in STAGES for asset in assets if asset in decided)


@dataclass(frozen=True)
class PlannedAsset:
    """What a recipe asks of one asset."""

    addresses: Mapping[str, str]
    """By probe, or by an empty name where the asset has one artifact per recipe."""
    inputs: frozenset[str]
    """The assets that it reads."""
    problem: str = ""
    """Why it cannot be asked for."""


def plan(mill: Mill, recipe: str) -> dict[str, PlannedAsset]:
    """Return what `recipe` asks of each asset, by asset in the order of a run.

    Raises:
        GristmillError: there is no such recipe, or its file has problems.
    """
    mill.recipe(recipe)
    store, found = PlannedStore(mill), {}
    for asset in by_recipe():
        probes = {key.partition("|")[2]: key for key in PROBES[recipe]} if asset == "mixture_probe" else {"": recipe}
        try:
            manifests = {name: store.current(asset, key) for name, key in probes.items()}
        except GristmillError as error:
            found[asset] = PlannedAsset({}, frozenset(), str(error))
            continue
        read = {reference.asset for manifest in manifests.values() for many in manifest.inputs.values() for reference in many}
        found[asset] = PlannedAsset({name: manifest.fingerprint for name, manifest in manifests.items()}, frozenset(read))
    return found


@dataclass(frozen=True)
class Comparison:
    """Where two recipes differ."""

    names: tuple[str, str]
    settings: tuple[tuple[str, Json, Json], ...]
    """Key and both values."""
    shared: Mapping[str, tuple[int, int]]
    """By asset how many artifacts are the same, and how many are asked for."""
    addresses: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]]
    """By asset the fingerprints that each recipe asks for, by probe, or by an empty name of one artifact per recipe."""
    part_at: tuple[str, ...]
    """The assets that differ although everything that they read is the same."""
    problems: Mapping[str, str]
    """By asset why it cannot be said."""

    def as_json(self) -> dict[str, Json]:
        """Return it as JSON."""
        return {
            "recipes": list(self.names),
            "settings": [dict(zip(("key", *self.names), row, strict=True)) for row in self.settings],
            "assets": {
                asset: {"shared": shared, "asked": asked, "fingerprints": [dict(one) for one in self.addresses[asset]]}
                for asset, (shared, asked) in self.shared.items()
            },
            "part_at": list(self.part_at),
            "problems": dict(self.problems),
        }

    def lines(self) -> Iterator[str]:
        """Yield it as text."""
        width = max((len(key) for key, *_ in self.settings), default=0)
        for key, first, second in self.settings:
            yield f"{key.ljust(width)}  {_shown(first)}  ->  {_shown(second)}"
        if not self.settings:
            yield f"{self.names[0]} and {self.names[1]} have the same settings"
        same = [asset for asset, (shared, asked) in self.shared.items() if shared == asked]
        partly = [f"{asset} ({shared} of {asked} shared)" for asset, (shared, asked) in self.shared.items() if 0 < shared < asked]
        other = [asset for asset, (shared, _) in self.shared.items() if not shared]
        for title, assets in (("shared", same), ("shared in part", partly), ("part at", self.part_at), ("differ", other)):
            yield f"{title}: {', '.join(assets) or 'none'}"
        for asset, problem in self.problems.items():
            yield f"not known: {asset}: {problem}"


def compare_plans(mill: Mill, first: str, second: str) -> Comparison:
    """Return where recipes `first` and `second` differ, and which artifacts of theirs are the same.

    Raises:
        GristmillError: there is no such recipe, or its file has problems.
    """
    one, two = plan(mill, first), plan(mill, second)
    values = (mill.recipe(name).model_dump(mode="json") for name in (first, second))
    shared, problems = {}, {}
    for asset in by_recipe():
        if problem := one[asset].problem or two[asset].problem:
            problems[asset] = problem
            continue
        mine, theirs = one[asset].addresses, two[asset].addresses
        shared[asset] = (len(set(mine.values()) & set(theirs.values())), len({*mine, *theirs}))
    apart = {asset for asset, (same, asked) in shared.items() if same < asked}
    part_at = tuple(asset for asset in shared if asset in apart and not (one[asset].inputs | two[asset].inputs) & apart)
    settings = tuple((dotted(at), a, b) for at, a, b in differences(*values))
    addresses = {asset: (one[asset].addresses, two[asset].addresses) for asset in shared}
    return Comparison((first, second), settings, shared, addresses, part_at, problems)


def _shown(value: Json) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
