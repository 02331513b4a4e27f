"""Parameterizations: what holds for the weights of a model during a phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.plugins import Plugin

if TYPE_CHECKING:
    import torch


class Parameterization(Plugin):
    """Base of every parameterization. Nothing of it is saved: `apply` on the weights of a resume point brings it back."""

    def apply(self, model: torch.nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put `model` under the parameterization, at the start of a phase and after a resume inside of it.

        Args:
            optimizer: what it has gathered is brought into line, too.
        """
        raise NotImplementedError

    def after_step(self, model: torch.nn.Module) -> None:
        """Restore what holds after the optimizer has moved the weights."""
        raise NotImplementedError

    def finalize(self, model: torch.nn.Module) -> None:
        """Give back an ordinary model; nothing happens to one that is not under the parameterization."""
        raise NotImplementedError
