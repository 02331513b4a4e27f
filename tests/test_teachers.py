"""Teachers: soft targets against the formula with all logits, for either objective; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipelines.batch import IGNORED, SpecialTokens
from pipelines.errors import GristmillError
from pipelines.models import ModelSettings, new_model
from pipelines.objectives import Objective
from pipelines.objectives.causal import Causal
from pipelines.objectives.masked import Masked
from pipelines.teachers.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = SpecialTokens(end_of_text=0, mask=1, vocabulary_size=60)
LENGTH = 12


def model_of(architecture: str = "llama", *, hidden_size: int = 16, seed: int = 0, vocabulary_size: int = 60, end: int = 0):
    torch.manual_seed(seed)
    settings = ModelSettings(architecture=architecture, hidden_size=hidden_size, num_layers=2, num_heads=2, intermediate_size=24)
    model = new_model(settings, SpecialTokens(end, 1, vocabulary_size), LENGTH)
    with torch.no_grad():  # far enough from uniform that temperatures matter
        model.get_output_embeddings().weight.mul_(20.0)
    return model


def windows(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 60, (count, LENGTH + 1))


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (2.5, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize(("objective", "architecture"), [(Causal(), "llama"), (Masked(probability=0.4), "bert"), (Masked(), "llama")])
def test_the_loss_of_a_taught_model_is_the_formulas(
    objective: Objective, architecture: str, temperature: float, weight: float, tmp_path: Path
) -> None:
    model_of(architecture, hidden_size=8, seed=1).save_pretrained(tmp_path / "teacher")
    teacher = Checkpoint(path=Path("teacher"), temperature=temperature, weight=weight).open("cpu", TOKENS, root=tmp_path)
    batch = objective.batch(windows(), [np.random.default_rng(n) for n in range(3)], TOKENS)
    student, twin = model_of(architecture).eval(), model_of(architecture).eval()
    found = objective.losses(student, batch, teacher=teacher)
    found.total.backward()

    for model in (twin, teacher.model):
        model.config.is_causal = objective.attention == "causal"
    logits, theirs = (model(input_ids=batch.inputs_BT).logits[batch.targets_BT != IGNORED] for model in (twin, teacher.model))
    hard = functional.cross_entropy(logits, batch.targets_BT[batch.targets_BT != IGNORED], reduction="sum")
    one, other = (torch.log_softmax(each / temperature, 1) for each in (logits, theirs))
    expected = (1 - weight) * hard + weight * temperature**2 * (other.exp() * (other - one)).sum()
    expected.backward()
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.per_window_B.sum(), hard.detach(), rtol=1e-4, atol=1e-4)
    for ours, same in zip(student.parameters(), twin.parameters(), strict=True):
        if same.grad is not None:
            torch.testing.assert_close(ours.grad, same.grad, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


def test_a_model_is_its_own_best_pupil(tmp_path: Path) -> None:
    """Its divergence from itself is 0, and so is the gradient."""
    model = model_of()
    model.save_pretrained(tmp_path)
    teacher = Checkpoint(path=tmp_path, weight=1.0, temperature=3.0).open("cpu", TOKENS)
    losses = Causal().losses(model, Causal().batch(windows(), [], TOKENS), teacher=teacher)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(0.0, abs=1e-4)
    assert max(p.grad.abs().max().item() for p in model.parameters()) < 1e-4
    assert losses.per_window_B.min() > 1.0


def test_a_pupil_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    model_of(hidden_size=8, seed=1).save_pretrained(tmp_path)
    teacher = Checkpoint(path=tmp_path, weight=1.0).open("cpu", TOKENS)
    student = model_of()
    batch = Causal().batch(windows(), [], TOKENS)
    optimizer, divergences = torch.optim.AdamW(student.parameters(), lr=0.01), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = Causal().losses(student, batch, teacher=teacher).total / batch.num_targets
        loss.backward()
        optimizer.step()
        divergences.append(loss.item())
    assert divergences[-1] < 0.3 * divergences[0]


@pytest.mark.parametrize("change", [{"vocabulary_size": 61}, {"end": 2}])
def test_a_teacher_of_another_vocabulary_is_refused(change: dict[str, int], tmp_path: Path) -> None:
    model_of(**change).save_pretrained(tmp_path)
    with pytest.raises(GristmillError, match=r"has 6[01] tokens with end of text [02], the model it teaches 60 with 0; .*same tokenizer"):
        Checkpoint(path=tmp_path).open("cpu", TOKENS)


def test_a_teacher_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"teacher 'nowhere': no file .*config.json; give a directory with config.json"):
        Checkpoint(path=Path("nowhere")).open("cpu", TOKENS, root=tmp_path)
    assert Checkpoint(path=Path("nowhere")).files() == (Path("nowhere/config.json"), Path("nowhere/model.safetensors"))
