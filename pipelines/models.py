"""Checkpoints as models: Hugging Face directories, opened from disk alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_checkpoint(directory: Path) -> PreTrainedModel:
    """Open the causal language model in `directory`; no hub is asked and no code of the checkpoint is run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)


def set_up_torch(threads: int) -> None:
    """Set the number of threads, and flush denormals: confident logits underflow to them, which costs 3x on CPU."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
