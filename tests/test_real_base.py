"""A model that another trained as the base: adopted as it is, known by its bytes, measured as transformers alone measures it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_world import BATCH, ROLES, SEQUENCE_LENGTH, World, publish, run
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from assets_defs import dry_run
from assets_defs import training as assets
from assets_defs.resources import Mill
from benchmarks import real_base
from pipelines import probing, training
from pipelines.configuration import read_project, read_recipe, read_recipes
from pipelines.engine import Engine
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.recipes import Recipe
from pipelines.store import Build

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

pytestmark = pytest.mark.usefixtures("one_thread")


def save_checkpoint(directory: Path, tokenizer: Manifest, **changes: object) -> Path:
    """Save a llama of two layers with fresh weights and the files of `tokenizer`."""
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True}
    sizes = {"vocab_size": tokenizer.counts["vocabulary_size"], "max_position_embeddings": 64}
    dtype = changes.pop("dtype", torch.float32)
    LlamaForCausalLM(LlamaConfig(**{**shape, **sizes, **changes})).to(dtype).save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer.file(name), directory / name)
    return directory


@pytest.fixture(scope="module")
def checkpoint(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory that the project has not made."""
    return save_checkpoint(tmp_path_factory.mktemp("project") / "brought", world.tokenizer)


@pytest.fixture(scope="module")
def adopted(world: World, checkpoint: Path) -> Manifest:
    """The general checkpoint that is `checkpoint`."""
    return world.store.build(adoption(world, checkpoint)).manifest


def adoption(world: World, checkpoint: Path, **changes: object) -> Build:
    """Return the request for the general checkpoint, of a project in the directory above `checkpoint`."""
    settings = training.AdoptionSettings(**{"checkpoint": checkpoint.name, "sequence_length": SEQUENCE_LENGTH, **changes})
    return Build(
        asset="general_checkpoint",
        step=training.adopt_checkpoint,
        settings=training.located_checkpoint(settings, checkpoint.parent),
        inputs={"tokenizer": world.tokenizer},
        audits=training.CHECKPOINT_AUDITS,
    )


# The checkpoint


def test_the_weights_are_those_of_the_checkpoint_and_the_tokenizer_is_the_projects(
    world: World, checkpoint: Path, adopted: Manifest
) -> None:
    ours, theirs = load_file(adopted.file(WEIGHTS)), load_file(checkpoint / WEIGHTS)
    assert sorted(ours) == sorted(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(adopted.file(name).read_bytes() == world.tokenizer.file(name).read_bytes() for name in TOKENIZER)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert (adopted.counts["parameters"], adopted.counts["steps"], adopted.counts["tokens"]) == (parameters, 0, 0)
    assert adopted.outcome.details["adopted"] == "brought"
    assert [(check.name, check.passed) for check in adopted.checks] == [("weights_finite", True), ("loss_fell", True)]


def test_weights_in_half_precision_are_widened_and_not_changed(world: World, tmp_path: Path) -> None:
    half = save_checkpoint(tmp_path / "half", world.tokenizer, dtype=torch.bfloat16)
    found = load_file(world.store.build(adoption(world, half)).manifest.file(WEIGHTS))
    expected = load_file(half / WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32} and {t.dtype for t in expected.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


def test_windows_are_measured_as_transformers_measures_the_checkpoint(world: World, checkpoint: Path, adopted: Manifest) -> None:
    settings = probing.WindowSettings(windows={"general": 6, "target": 3}, **run())
    inputs = {**world.training_inputs(), "base": adopted, "decisions": world.decisions}
    measured = world.store.build(Build("probe_windows", probing.measure_base, settings, inputs=inputs)).manifest
    windows = torch.from_numpy(np.load(measured.file("windows.npy")).astype(np.int64))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint)(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    losses = pq.read_table(measured.file("windows.parquet"))["loss"].to_numpy()
    np.testing.assert_allclose(losses, expected.view(len(windows), -1).mean(dim=1).numpy(), rtol=1e-5)


def test_training_goes_on_from_it(world: World, adopted: Manifest) -> None:
    settings = training.TrainingSettings(**run(tokens=10 * BATCH * SEQUENCE_LENGTH))
    from pipelines.trainer import Run

    shares = {"wiki": 0.5, "legal": 0.5}
    started = Run(settings, shares, world.selection, world.shards, world.tokenizer, adopted)
    expected = load_file(adopted.file(WEIGHTS))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in started.model.state_dict().items() if name in expected)
    first, *_ = started.gradients()
    assert abs(first - np.log(world.tokenizer.counts["vocabulary_size"])) < 0.5  # fresh weights: about as many nats as a guess


# Its identity


def test_a_changed_byte_of_the_weights_is_another_checkpoint(world: World, checkpoint: Path, adopted: Manifest, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "brought"))
    assert adoption(world, copy).fingerprint() == adopted.fingerprint  # the same project elsewhere
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    changed = adoption(world, copy)
    assert changed.fingerprint() != adopted.fingerprint
    assert changed.settings.files["brought/model.safetensors"] != adopted.settings["files"]["brought/model.safetensors"]
    assert set(adopted.settings["files"]) == {f"brought/{name}" for name in (*TOKENIZER, "config.json", WEIGHTS)}


def test_another_tokenizer_file_is_another_checkpoint(world: World, checkpoint: Path, adopted: Manifest, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "brought"))
    (copy / "tokenizer_config.json").write_text("{}")
    assert adoption(world, copy).fingerprint() != adopted.fingerprint


def test_files_that_change_between_hash_and_reading_are_found(world: World, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "moving"))
    request = adoption(world, copy)
    weights = load_file(copy / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(GristmillError, match="moving was changed while it was read; materialize general_checkpoint again"):
        world.store.build(request)
    assert world.store.find("general_checkpoint", request.fingerprint()) is None


# What is refused


def other_words(directory: Path) -> None:
    """Swap the meaning of two ids."""
    content = json.loads((directory / TOKENIZER[0]).read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word, number in sorted(vocabulary.items(), key=lambda item: item[1]) if number in (100, 101)]
    vocabulary[words[0]], vocabulary[words[1]] = 101, 100
    (directory / TOKENIZER[0]).write_text(json.dumps(content))


def nothing(directory: Path) -> None:
    """Leave `directory` as it is."""


@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({}, other_words, r"token 100 is .* in checkpoint .*; a model that is taken as it is needs its own: name its directory"),
        ({"vocab_size": 300}, nothing, r"has 300 tokens and the tokenizer 512; name the checkpoint's own tokenizer"),
        ({"max_position_embeddings": 16}, nothing, r"has 16 positions, fewer than sequence_length 32; shorten it"),
        ({}, lambda directory: (directory / "config.json").unlink(), "is no Hugging Face checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    world: World, tmp_path: Path, changes: dict[str, object], spoil: Callable[[Path], None], message: str
) -> None:
    directory = save_checkpoint(tmp_path / "bad", world.tokenizer, **changes)
    spoil(directory)
    with pytest.raises(GristmillError, match=message):
        world.store.build(adoption(world, directory))


def test_a_checkpoint_that_is_not_there_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"no model.checkpoint 'absent' .*put it there or correct `model.checkpoint`"):
        adoption(world, tmp_path / "absent")


# Recipes


def recipe_file(directory: Path, **changes: object) -> Path:
    """Write the tiny recipe with `changes`; a key whose value is ``...`` is left out."""
    values = {**yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text()), **changes}
    path = directory / "adopting.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not ...}))
    return path


@pytest.mark.parametrize("general", [..., None])
def test_a_recipe_without_a_general_phase_takes_its_checkpoint(tmp_path: Path, general: object) -> None:
    found = read_recipe(recipe_file(tmp_path, general=general, model={"checkpoint": "brought"}), read_project(ROOT / "project.yaml"))
    assert found.general is None
    assert found.adoption_settings() == training.AdoptionSettings(checkpoint="brought", sequence_length=64)
    with pytest.raises(GristmillError, match="takes brought as it is; add a `general` phase"):
        found.general_settings()


@pytest.mark.parametrize("general", [..., None])
def test_a_recipe_with_neither_is_refused_in_one_line(tmp_path: Path, general: object) -> None:
    with pytest.raises(GristmillError) as caught:
        read_recipe(recipe_file(tmp_path, general=general), read_project(ROOT / "project.yaml"))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("adopting.yaml:") and ": general: " in line and "there is no `general` phase and no `model.checkpoint`" in line
    assert "add a phase to train it, or name a checkpoint to be taken as it is (got None)" in line


def test_a_checkpoint_beside_a_general_phase_is_trained_on(tmp_path: Path) -> None:
    found = read_recipe(recipe_file(tmp_path, model={"checkpoint": "brought"}), read_project(ROOT / "project.yaml"))
    assert found.general is not None and found.general_settings().model.checkpoint == "brought"


class OneRecipe(Mill):
    """The mill of a project with one recipe, named ``adopting``."""

    def __init__(self, world: World, root: Path, recipe: Recipe) -> None:
        super().__init__(world.store.root, Engine(kind="serial"))
        self._root, self._recipe = root, recipe

    @property
    def root(self) -> Path:
        return self._root

    def recipe(self, name: str) -> Recipe:
        return self._recipe


@pytest.fixture
def mill(world: World, checkpoint: Path, tmp_path: Path) -> OneRecipe:
    """A project around `checkpoint`, up to its selection."""
    phase = {"tokens": 8 * BATCH * SEQUENCE_LENGTH, "learning_rate": 1e-3}
    path = recipe_file(
        tmp_path,
        general=None,
        model={"checkpoint": "brought"},
        roles={role: [domain for domain in ROLES if ROLES[domain] == role] for role in ("general", "target")},
        training={"sequence_length": SEQUENCE_LENGTH, "batch_sequences": BATCH, "threads": 1},
        mixture={"ratios": [0.5], "phase": phase},
        pretraining=[phase],
    )
    publish(
        world.store,
        "selected_subset",
        {member.name: pq.read_table(member.path).to_pylist() for member in world.selection},
        partition="adopting",
    )
    return OneRecipe(world, checkpoint.parent, read_recipe(path, read_project(ROOT / "project.yaml")))


def test_the_asset_is_the_checkpoint(mill: OneRecipe, adopted: Manifest) -> None:
    request = assets.adopted(mill, "adopting")
    assert request.step is training.adopt_checkpoint and request.asset == "general_checkpoint"
    built = mill.store.build(replace(request, packages=()))
    assert built.hit and built.manifest.fingerprint == adopted.fingerprint


def test_a_dry_run_says_that_nothing_is_trained_for_the_base(mill: OneRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.show_dry_run(mill, "adopting")
    said = " ".join(capsys.readouterr().out.split())
    assert "The general checkpoint is brought as it is; nothing is trained for it." in said
    assert "pretrained checkpoint" in said and "LlamaForCausalLM" in said


# The benchmark


@pytest.mark.parametrize("size", [real_base.FULL, real_base.QUICK])
def test_the_benchmarks_project_is_one(tmp_path: Path, size: real_base.Size) -> None:
    real_base.write_project(tmp_path, tmp_path / "base", tmp_path / "corpus.parquet", size, general=["wiki"], target=["math"])
    project = read_project(tmp_path / "project.yaml")
    recipe = read_recipes(tmp_path / "recipes", project)[real_base.RECIPE]
    assert recipe.general is None and recipe.probes == tuple(f"r{ratio:.2f}-s0" for ratio in size.ratios)
    assert recipe.adoption_settings().checkpoint == project.tokenizer.path == str(tmp_path / "base")
    assert recipe.pretraining_settings().phases[0].tokens == size.probe_tokens  # the length that the ratio is estimated for
