"""A checkpoint on disk as teacher: knowledge distillation (Hinton et al. 2015, 1503.02531; for language models SALT, 2410.18779)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.batch import SpecialTokens
from pipelines.errors import GristmillError
from pipelines.models import load_checkpoint
from pipelines.teachers import OpenTeacher, Teacher

if TYPE_CHECKING:
    import torch


class Checkpoint(Teacher):
    """The model of a directory, frozen; it has to share the vocabulary of the model that it teaches."""

    path: Path
    """A Hugging Face directory, or one of this project's checkpoints; relative to the project. Nothing is downloaded."""

    def files(self) -> Sequence[Path]:
        return (self.path / "config.json", self.path / "model.safetensors")

    def open(self, device: torch.device | str, tokens: SpecialTokens, *, root: Path = Path()) -> OpenTeacher:
        for file in self.files():
            if not (root / file).is_file():
                raise GristmillError(
                    f"teacher {str(self.path)!r}: no file {root / file}; give a directory with config.json and model.safetensors"
                )
        model = load_checkpoint(root / self.path).to(device).eval().requires_grad_(False)
        theirs, ours = (model.config.vocab_size, model.config.eos_token_id), (tokens.vocabulary_size, tokens.end_of_text)
        if theirs[0] != ours[0] or theirs[1] not in (ours[1], None):
            raise GristmillError(
                f"teacher {str(self.path)!r} has {theirs[0]} tokens with end of text {theirs[1]}, the model it teaches {ours[0]} with "
                f"{ours[1]}; soft targets need one vocabulary: take a teacher trained with the same tokenizer"
            )
        return OpenTeacher(model, self.temperature, self.weight)
