"""The architecture: who may import whom, what loading costs, and what every module has to say of itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipelines import plugins
from pipelines.code_version import imported_modules

ROOT = Path(__file__).parents[1]

STEPS = (
    "corpus",
    "cleaning",
    "filter_models",
    "filtering",
    "decisions",
    "sweeping",
    "contamination",
    "deduplication",
    "age_splits",
    "embedding",
    "selection",
    "tokenization",
    "training",
    "probing",
    "critical_ratio",
    "mixture",
    "mixture_search",
    "evaluation",
    "task_evaluation",
    "classification",
    "comparison",
    "report",
    "recipes_report",
)
LAYERS = {
    # Each may import itself where it is a folder, and what stands in the layers below it; with exceptions under ALSO.
    "definitions": ("assets_defs",),
    "recipes": ("configuration", "recipe_checks", "recipe_evaluation", "recipe_mixture", "recipes", "settings_files"),
    "steps": STEPS,
    "parts": (
        *("deduplication_audits", "duplicate_index", "folding", "minhash_kernels", "register_kernel"),
        *(
            "cards",
            "checkpoints",
            "compared_rows",
            "duplicate_register",
            "explanation",
            "filter_tables",
            "minhash",
            "ngrams",
            "page_reader",
            "pages",
            "report_artifacts",
            "report_sections",
        ),
        *(
            "data_order",
            "distributed",
            "draws",
            "encoders",
            "generation",
            "guards",
            "model_state",
            "plan",
            "reselection",
            "run_limits",
            "run_records",
            "run_summary",
            "run_watch",
            "seen_documents",
            "shards",
            "shared_spans",
            "shares",
        ),
        *("classifiers", "crossed_means", "forgetting", "held_out_facts", "labelled_sets", "paired_bootstrap"),
        *("mixture_study", "search_evidence", "search_plots", "search_rows", "share_solver", "swarm"),
        *("probe_courses", "probe_losses", "ratio_estimate", "ratio_laws", "ratio_plots", "ratio_refusals"),
        *("candidates", "odd_texts", "selection_audits", "selection_plots", "throughput", "trainer", "vocabulary"),
    ),
    "plugins": plugins.KINDS,
    "store": (
        *(
            "housekeeping",
            "leases",
            "lineage",
            "overrides",
            "pins",
            "refusals",
            "remote_store",
            "store",
            "tracking",
            "tracking_database",
            "tracking_values",
            "verification",
        ),
    ),
    "shared": (
        "batch",
        "code_version",
        "documents",
        "engine",
        "errors",
        "files",
        "growing_records",
        "hidden_states",
        "interruption",
        "intervals",
        "linear_cross_entropy",
        "manifests",
        "model_files",
        "models",
        "native",
        "parsed_modules",
        "personal_data",
        "plots",
        "plugins",
        "progress",
        "ray_shards",
        "remote_files",
        "rounding",
        "row_groups",
        "spending",
        "stream_kernels",
        "token_bytes",
        "words",
    ),
}
"""From the top down. A part belongs to steps and is no step; the rest of the names are modules or folders of `pipelines`."""
ALSO = {
    ("evaluators", "shards"),  # an evaluator reads held-out documents as the shards lay them out
    ("sources", "token_formats"),  # token files of other trainers are decoded to text
    ("objectives", "teachers"),  # a teacher in memory gives the soft targets of a loss
    ("tasks", "filters"),  # what a model writes is judged by the toxicity filter
    ("set_functions", "embedders"),  # the integer grid of the embeddings
}
SIDEWAYS = {"recipes", "parts", "store", "shared"}
"""Layers whose modules may import each other, without a cycle."""
OF_THE_STORE = {"advisory"}
"""What a step may import of the store: the mark of an audit that warns."""

HEAVY = ("ray", "s3fs", "torch", "transformers", "datasets", "mlflow", "submodlib", "sklearn", "matplotlib")
MAX_LINES = 450
LONGER: dict[str, int] = {}
"""Files that are too long and not yet split; a bound of its own keeps each from growing."""

TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".json", ".sh", "Makefile", ".gitignore")
MACHINE_PATH = re.compile(r"(?<![\w.$}/*-])/(?:work|tmp|root|home)(?:/|\b)")
REGISTRY = re.compile(
    r"(index-url|find-links|trusted-host)[\s=]+[\w.:/-]*\w\.\w|artifactory|nexus/repository|devpi|pypi\.org/simple", re.IGNORECASE
)


def modules(folder: str) -> list[str]:
    """Return the dotted names of the modules under `folder`, packages without ``__init__``."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@cache
def tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, str | None]]:
    """Yield ``(module, name)`` of every import anywhere in `module`; the name is None where a module is imported whole."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def unit(module: str) -> str:
    """Return the entry of LAYERS that `module` belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] == "assets_defs" else parts[1]


LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
FILES = [path.relative_to(ROOT).as_posix() for folder in ("pipelines", "assets_defs") for path in sorted((ROOT / folder).rglob("*.py"))]
OURS = [name for name in modules("pipelines") if name != "pipelines"]


# Imports


def test_every_module_has_a_layer() -> None:
    assert sorted({unit(module) for module in OURS}) == sorted(set(LAYER_OF) - {"assets_defs"}), "add it to LAYERS, or remove it there"


@pytest.mark.parametrize("module", OURS)
def test_imports_point_downwards(module: str) -> None:
    order = list(LAYERS)
    mine = unit(module)
    for target in imported_modules(module):
        theirs = unit(target)
        if (mine == theirs and mine in plugins.KINDS) or (mine, theirs) in ALSO:
            continue
        above, below = order.index(LAYER_OF[mine]), order.index(LAYER_OF[theirs])
        sideways = above == below and LAYER_OF[mine] in SIDEWAYS
        assert above < below or sideways, f"{module} ({LAYER_OF[mine]}) imports {target} ({LAYER_OF[theirs]})"


def test_imports_have_no_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        for target in sorted(imported_modules(module) & set(OURS)):
            if not target.startswith(f"{module}."):  # a package may hand on what its own modules define
                visit(target, (*path, module))
        done.add(module)

    for module in OURS:
        visit(module, ())


@pytest.mark.parametrize("module", [name for name in OURS if LAYER_OF[unit(name)] in ("steps", "parts", "plugins")])
def test_a_step_knows_nothing_of_the_store_but_the_mark_of_a_warning(module: str) -> None:
    names = {name for target, name in imports(module) if target == "pipelines.store" or (target, name) == ("pipelines", "store")}
    assert names <= OF_THE_STORE


def test_a_package_imports_none_of_its_plugins() -> None:
    for kind in plugins.KINDS:
        inner = {target for target in imported_modules(f"pipelines.{kind}") if target.startswith(f"pipelines.{kind}.")}
        assert all(target.split(".")[-1].startswith("_") for target in inner), (kind, inner)


def test_orchestration_and_tracking_stay_in_their_places() -> None:
    for module in modules("pipelines"):
        roots = {target.split(".")[0] for target, _ in imports(module)}
        assert "dagster" not in roots and "assets_defs" not in roots, module
        assert "mlflow" not in roots or module == "pipelines.tracking", module
    assert not [module for module in modules("assets_defs") if "mlflow" in {target.split(".")[0] for target, _ in imports(module)}]


def test_imports_are_absolute() -> None:
    """The code version follows absolute imports alone."""
    for module in [*modules("pipelines"), *modules("assets_defs")]:
        assert not [node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and node.level], module


@pytest.mark.parametrize("module", ["assets_defs.definitions", "pipelines.recipes"])
def test_loading_does_not_import_what_is_heavy(module: str) -> None:
    code = f"import sys, {module}\nprint([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert found.splitlines()[-1] == "[]"


def test_no_plugin_imports_what_is_heavy() -> None:
    code = (
        "import sys\nfrom pipelines import plugins\n[plugins.load(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert found.splitlines()[-1] == "[]"


# What modules say of themselves


@pytest.mark.parametrize("module", [*modules("pipelines"), *modules("assets_defs")])
def test_modules_and_public_functions_have_docstrings(module: str) -> None:
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"
    if not module.startswith("pipelines"):
        return
    public = [node for node in tree(module).body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)])
def test_a_plugin_describes_itself_and_its_settings(kind: str, name: str) -> None:
    plugin = plugins.load(kind, name)
    node = next(n for n in tree(plugin.__module__).body if isinstance(n, ast.ClassDef) and n.name == plugin.__name__)
    assert ast.get_docstring(node)
    assert not [key for key, field in plugin.model_fields.items() if not field.description]


def test_every_setting_is_described() -> None:
    from pipelines import recipes

    pending, seen = [recipes.Project, recipes.Recipe], set()
    while pending:
        model = pending.pop()
        if model in seen:
            continue
        seen.add(model)
        assert not [f"{model.__name__}.{key}" for key, field in model.model_fields.items() if not field.description]
        inner = (plugins._inner_model(field.annotation) for field in model.model_fields.values())
        pending.extend(found for found in inner if found)
    assert len(seen) > 10


@pytest.mark.parametrize("name", FILES)
def test_files_fit_a_sitting(name: str) -> None:
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(name, MAX_LINES), f"{name} has {lines} lines; split off a noun"
    assert name not in LONGER or lines > MAX_LINES, f"{name} was split: take it out of LONGER"


# What a checkout must not know


def texts() -> list[Path]:
    """Return the text files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("the list of files comes from git, and this is no checkout")
    return [ROOT / name for name in found.stdout.splitlines() if name.endswith(TEXT) and (ROOT / name).is_file()]


def test_no_file_names_a_machines_directories_or_a_registry() -> None:
    faults = []
    for path in texts():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if (MACHINE_PATH.search(line) and "://" not in line) or REGISTRY.search(line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cd /tmp/x", True),
        ('"/work/main"', True),
        ("run in /root", True),
        ("pip install --index-url https://packages.example/simple", True),
        ("index-url = packages.example", True),
        ("a/tmp/b", False),
        ("tmp_path / 'x'", False),
        ("$HOME/home/x", False),
        ("--index-url $(TORCH_INDEX)", False),
    ],
)
def test_what_a_checkout_must_not_know_is_recognised(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line) or REGISTRY.search(line)) == found
