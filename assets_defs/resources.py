"""The mill: where artifacts live, what the project and its recipes say, how shards are mapped, where runs are tracked."""

import os
from functools import cache
from pathlib import Path

import dagster as dg

from assets_defs.gates import demand_whole
from pipelines.configuration import RecipeBook, open_recipes, read_project
from pipelines.documents import partition_file, split_partition
from pipelines.engine import Engine
from pipelines.errors import GristmillError
from pipelines.lineage import Lineage
from pipelines.manifests import Manifest, Member
from pipelines.recipes import Project, Recipe
from pipelines.remote_store import RemoteStore
from pipelines.store import Store
from pipelines.tracking import Tracker, tracking_uri

PROJECT_FILE = "project.yaml"


def root_directory() -> Path:
    """Return the project's directory: GRISTMILL_PROJECT, or the working directory."""
    return Path(os.environ.get("GRISTMILL_PROJECT") or ".").absolute()


def home_directory() -> Path:
    """Return where artifacts and tracking live: GRISTMILL_HOME, or ``.gristmill`` in the project's directory."""
    return Path(os.environ.get("GRISTMILL_HOME") or root_directory() / ".gristmill").absolute()


@cache
def load_project() -> Project:
    """Read the project file once per process."""
    return read_project(root_directory() / PROJECT_FILE)


@cache
def load_recipes() -> RecipeBook:
    """Read the recipes once per process. One file with a mistake takes no other recipe away: whoever asks for its recipe is told."""
    return open_recipes(root_directory() / "recipes", load_project())


@cache
def _tracker(home: Path, experiment: str, _uri: str) -> Tracker:
    """Return the tracker of this process: to find its experiment and its parent runs anew for every step would cost as much as a hit."""
    return Tracker(home, experiment)


class Mill:
    """Everything an asset needs to say what it wants."""

    def __init__(self, home: Path, engine: Engine, remote: str = "") -> None:
        self.home = home
        self.engine = engine
        self.store = Store(home, RemoteStore(remote) if remote else None)

    @property
    def root(self) -> Path:
        return root_directory()

    @property
    def project(self) -> Project:
        return load_project()

    @property
    def lineage(self) -> Lineage:
        """The graph of the store's artifacts as it stands now."""
        return Lineage(self.store.root, self.store.remote)

    @property
    def tracker(self) -> Tracker:
        return _tracker(self.home, self.project.name, tracking_uri(self.home))

    def recipe(self, name: str) -> Recipe:
        """Return recipe `name`; a probe's partition ``recipe|probe`` names its recipe too.

        Raises:
            GristmillError: its file has problems, which are listed.
        """
        return load_recipes()[name.partition("|")[0]]

    def source_partitions(self, recipe: Recipe, asset: str = "cleaned_corpus") -> list[str]:
        """Return the materialized source partitions of `asset` that `recipe` takes, snapshots in time order, then domains.

        Raises:
            GristmillError: a domain of the recipe has none, or a partition that it takes was refused by its audit.
        """

        def wanted(domain: str, snapshot: str) -> bool:
            return domain in recipe.domains and (recipe.snapshots == "all" or snapshot in recipe.snapshots)

        found = [key for key in self.store.partitions(asset) if wanted(*split_partition(key))]
        demand_whole(self.store, asset, found, wanted)
        missing = sorted(set(recipe.domains) - {split_partition(key)[0] for key in found})
        if missing:
            raise GristmillError(
                f"{asset} holds no snapshot of {', '.join(missing)}; materialize its source partitions first (job `ingest`)"
            )
        return in_time_order(found)

    def sources(self, asset: str, recipe: Recipe) -> tuple[Manifest, ...]:
        """Return the artifacts of `asset` over the recipe's source partitions."""
        return tuple(self.store.current(asset, key) for key in self.source_partitions(recipe, asset))

    def fit_sample(self) -> tuple[Manifest, ...]:
        """Return the cleaned corpora of the pinned sample."""
        keys = [key for key in self.store.partitions("cleaned_corpus") if split_partition(key)[1] in self.project.fit_on]
        demand_whole(self.store, "cleaned_corpus", keys, lambda _, snapshot: snapshot in self.project.fit_on)
        if not keys:
            raise GristmillError(
                f"no cleaned_corpus of {', '.join(self.project.fit_on)}; `fit_on` in project.yaml names the snapshots to ingest first"
            )
        return tuple(self.store.current("cleaned_corpus", key) for key in in_time_order(keys))

    def splits(self, partitions: list[str]) -> tuple[Member, ...]:
        """Return the split files of `partitions`: only their bytes enter the reader's identity."""
        register = self.store.current("duplicate_clusters")
        known = {entry.path for entry in register.files}
        missing = [key for key in partitions if f"splits/{partition_file(key)}" not in known]
        if missing:
            raise GristmillError(f"{', '.join(missing[:3])}: no split yet; materialize duplicate_clusters (job `fit`)")
        return tuple(Member(manifest=register, name=f"splits/{partition_file(key)}") for key in partitions)


class MillResource(dg.ConfigurableResource):
    """Opens the mill; every setting has a default and an environment variable."""

    home: str = ""
    """Directory of artifacts and tracking; GRISTMILL_HOME or ``.gristmill`` where empty."""
    workers: int = 0
    """Processes per step; GRISTMILL_WORKERS, or one per core where 0."""
    remote: str = ""
    """URL of object storage that the home is then a cache of, as in ``s3://bucket/folder``; GRISTMILL_REMOTE, or none where empty."""

    def open(self) -> Mill:
        workers = self.workers or int(os.environ.get("GRISTMILL_WORKERS") or 0)
        home = Path(self.home).absolute() if self.home else home_directory()
        return Mill(home, Engine(workers=workers), self.remote or os.environ.get("GRISTMILL_REMOTE", ""))


def in_time_order(partitions: list[str]) -> list[str]:
    """Sort source partitions by snapshot, then domain."""
    return sorted(partitions, key=lambda key: tuple(reversed(split_partition(key))))
