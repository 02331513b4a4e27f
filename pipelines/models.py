"""Checkpoints as models: Hugging Face directories, opened from disk alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_checkpoint(directory: Path) -> PreTrainedModel:
    """Open the causal language model in `directory`; no hub is asked and no code of the checkpoint is run."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)


def set_up_torch(threads: int) -> None:
    """Set the number of threads.

    The progress bars of transformers are switched off: one checkpoint is one bar that flashes by.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()

    torch.set_num_threads(threads)


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """Flush denormals to zero inside; as a decorator, during each call. Confident logits underflow to them, which costs 3x on CPU.

    The switch is the thread's: left on, it would change the arithmetic of whatever runs next in the process.
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
