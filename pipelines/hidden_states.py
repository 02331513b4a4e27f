"""Hidden states of a model at a chosen layer, and their mean over a row's tokens.

INGENIOUS (2305.06677, section 3.2 and its released code) embeds with the model that is being trained, at layer 9 of 12.
Shapes: B rows, T positions, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.errors import GristmillError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def layer_of(model: PreTrainedModel, layer: int | None) -> int:
    """Return which hidden state `layer` means: 0 are the embeddings, 1 the output of the first layer; None is three quarters of the depth.

    Negative numbers count from the last layer, which is -1.

    Raises:
        GristmillError: the model has no such layer.
    """
    depth = int(model.config.num_hidden_layers)
    if layer is None:
        return max(1, round(0.75 * depth))
    if not -depth - 1 <= layer <= depth:
        raise GristmillError(
            f"layer {layer} does not exist: the model has layers 1 to {depth}, its embeddings as 0, and -1 for the last layer; choose one"
        )
    return layer % (depth + 1)


def token_states(model: PreTrainedModel, inputs_BT: torch.Tensor, lengths_B: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the hidden states at `layer`, float32 of shape (B, T, D), without gradient and without dropout.

    A row's tokens are its first `lengths_B`; what stands behind them is masked, and its own states mean nothing. The last layer's
    states are those that the model hands to its head, after the final norm where it has one. A layer further down costs the memory
    of all of them.
    """
    import torch

    body, training = model.base_model, model.training
    mask_BT = (torch.arange(inputs_BT.shape[1], device=inputs_BT.device) < lengths_B[:, None]).long()
    mask_BT[:, 0] = 1  # a row has to attend to something
    arguments: dict[str, object] = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    is_last = layer == int(model.config.num_hidden_layers)
    model.eval()
    try:
        with torch.no_grad():
            found = body(input_ids=inputs_BT, attention_mask=mask_BT, output_hidden_states=not is_last, **arguments)
    finally:
        model.train(training)
    return (found.last_hidden_state if is_last else found.hidden_states[layer]).float()


def mean_hidden_states(model: PreTrainedModel, inputs_BT: torch.Tensor, lengths_B: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the mean of each row's hidden states over its first `lengths_B` tokens, float32 of shape (B, D); zeros for length 0."""
    import torch

    own_BT = torch.arange(inputs_BT.shape[1], device=inputs_BT.device) < lengths_B[:, None]
    states_BTD = token_states(model, inputs_BT, lengths_B, layer)
    return (states_BTD * own_BT[:, :, None]).sum(dim=1) / lengths_B[:, None].clamp(min=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside: the last bits of its sums depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
