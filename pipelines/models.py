"""Models: transformers models by settings or from disk, how they attend, and their prediction heads.

Shapes: B windows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipelines.batch import Attention, Batch, SpecialTokens
from pipelines.errors import GristmillError
from pipelines.manifests import Json
from pipelines.model_files import Commit, model_folder
from pipelines.plugins import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Architecture = Literal["llama", "gpt2", "bert", "modernbert"]
ENCODERS = ("bert", "modernbert")
"""Architectures that see both sides by themselves."""
LOGIT_TOLERANCE = 1e-3


class ModelSettings(Settings):
    """A transformer to initialise.

    `llama`: rotary positions, RMSNorm, SwiGLU (Touvron et al. 2023); `gpt2`: learned positions, LayerNorm, GELU (Radford et
    al. 2019); `bert` (Devlin et al. 2019) and `modernbert` (Warner et al. 2024) see both sides and have a masked-token head.
    """

    checkpoint: str | None = None
    """A Hugging Face directory (relative paths start at the project), or a repository on the hub, to start from instead of fresh
    weights; its own shape counts, and its tokenizer has to be the project's."""
    revision: Commit | None = None
    """The commit of the repository: where it is given, the hub is asked."""
    architecture: Architecture = "llama"
    """The transformers architecture."""
    hidden_size: int = Field(default=128, ge=2)
    """Width of the residual stream."""
    num_layers: int = Field(default=4, ge=1)
    """Layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values (grouped queries, llama only); None is one per attention head."""
    intermediate_size: int = Field(default=352, ge=1)
    """Width of the feed-forward layer."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of attention and residual stream, where the architecture has it."""
    config: dict[str, Json] = Field(default_factory=dict)
    """Further fields of the transformers config, laid over the rest."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSettings:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of twice num_heads {self.num_heads}; rotary positions need even heads"
            )
        if self.num_key_value_heads and (self.architecture != "llama" or self.num_heads % self.num_key_value_heads):
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} needs llama and a divisor of num_heads {self.num_heads}; leave it out"
            )
        return self


def new_model(settings: ModelSettings, tokens: SpecialTokens, sequence_length: int, root: Path = Path()) -> PreTrainedModel:
    """Return a model with fresh weights, drawn from torch's generator as it stands, or the checkpoint that `settings` names.

    Raises:
        GristmillError: the checkpoint cannot be opened, has fewer tokens than the tokenizer, or is shorter than a window.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if settings.checkpoint:
        model = load_checkpoint(model_folder(settings.checkpoint, settings.revision, root))
        _check_fits(model, settings.checkpoint, tokens, sequence_length)
        return model.float()
    opener = AutoModelForMaskedLM if settings.architecture in ENCODERS else AutoModelForCausalLM
    return opener.from_config(_config(settings, tokens, sequence_length))


def _check_fits(model: PreTrainedModel, name: str, tokens: SpecialTokens, sequence_length: int) -> None:
    if model.config.vocab_size < tokens.vocabulary_size:
        raise GristmillError(
            f"checkpoint {name} has {model.config.vocab_size} tokens and the tokenizer {tokens.vocabulary_size}; name the checkpoint's own "
            "tokenizer under `tokenizer` in project.yaml"
        )
    positions = getattr(model.config, "max_position_embeddings", sequence_length)
    if positions < sequence_length:
        raise GristmillError(f"checkpoint {name} has {positions} positions, fewer than sequence_length {sequence_length}; shorten it")


def _config(settings: ModelSettings, tokens: SpecialTokens, sequence_length: int) -> PretrainedConfig:
    from transformers import AutoConfig

    end = tokens.end_of_text
    shared = {
        "vocab_size": tokens.vocabulary_size,
        "initializer_range": 0.02,
        "tie_word_embeddings": settings.tie_word_embeddings,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    }
    wide = {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "intermediate_size": settings.intermediate_size,
        "max_position_embeddings": sequence_length,
    }
    drop = settings.dropout
    own: dict[str, dict[str, Json]] = {
        "llama": {**wide, "num_key_value_heads": settings.num_key_value_heads or settings.num_heads, "attention_dropout": drop},
        "gpt2": {
            **{"n_embd": settings.hidden_size, "n_layer": settings.num_layers, "n_head": settings.num_heads},
            **{"n_inner": settings.intermediate_size, "n_positions": sequence_length},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop),
        },
        "bert": {**wide, "hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop},
        "modernbert": {**wide, **dict.fromkeys(("mlp_dropout", "attention_dropout", "embedding_dropout"), drop)}
        | dict.fromkeys(("cls_token_id", "sep_token_id"), end),
    }
    return AutoConfig.for_model(settings.architecture, **{**shared, **own[settings.architecture], **settings.config})


def load_checkpoint(directory: Path) -> PreTrainedModel:
    """Open the language model in `directory`, causal or masked as its config says; no hub is asked, no code of the checkpoint is run.

    Raises:
        GristmillError: it is no Hugging Face directory, or not with safetensors weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    try:
        named = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError) as error:
        raise GristmillError(
            f"{directory} is no Hugging Face checkpoint ({error}); name a directory with config.json and model.safetensors"
        ) from error
    opener = AutoModelForMaskedLM if named[0].endswith("ForMaskedLM") else AutoModelForCausalLM
    return opener.from_pretrained(directory, local_files_only=True, use_safetensors=True)


def sees_both_sides(model: PreTrainedModel) -> bool:
    """Return whether `model`, as its config stands, lets a position attend to later ones."""
    return _is_encoder(model) or not getattr(model.config, "is_causal", True)


def _is_encoder(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForMaskedLM")


def hidden_states(model: PreTrainedModel, batch: Batch, attention: Attention) -> torch.Tensor:
    """Return the last hidden states of `batch`, shape (B, T, D).

    Attention over the whole window needs no mask tensor, so that flash kernels serve it; within documents it is a mask of
    shape (B, 1, T, T), and positions begin anew with each document.
    """
    if not _is_encoder(model) and getattr(model.config, "is_causal", True) != (attention == "causal"):
        model.config.is_causal = attention == "causal"  # transformers masks by it, and saves it with the model
    arguments: dict[str, object] = {} if _is_encoder(model) else {"use_cache": False}
    if batch.documents_BT is not None:
        arguments["position_ids"] = _positions(batch.documents_BT)
    if batch.documents_BT is not None or (_is_encoder(model) and attention == "causal"):
        arguments["attention_mask"] = _mask(model, batch, attention)
    return model.base_model(input_ids=batch.inputs_BT, **arguments).last_hidden_state


def _positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """Return the place of each position in its document, shape (B, T)."""
    import torch

    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places_T - torch.where(starts_BT, places_T, 0).cummax(dim=1).values


def _mask(model: PreTrainedModel, batch: Batch, attention: Attention) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return who may attend to whom, bool of shape (B, 1, T, T); one for each kind of layer where the model has several."""
    import torch

    B, T = batch.inputs_BT.shape
    places_T = torch.arange(T, device=batch.inputs_BT.device)
    allowed = torch.ones((B, 1, T, T), dtype=torch.bool, device=batch.inputs_BT.device)
    if batch.documents_BT is not None:
        allowed &= (batch.documents_BT[:, :, None] == batch.documents_BT[:, None, :])[:, None]
    distances_TT = places_T[:, None] - places_T[None, :]
    if attention == "causal":
        allowed &= distances_TT >= 0
    if getattr(model.config, "model_type", "") != "modernbert":
        return allowed
    near = distances_TT.abs() <= model.config.local_attention // 2
    return {"full_attention": allowed, "sliding_attention": allowed & near}


@dataclass(frozen=True)
class PredictionHead:
    """What turns hidden states into logits: ``transform(hidden) @ weight.T + bias``."""

    transform: Callable[[torch.Tensor], torch.Tensor]
    """Applied to the hidden states of predicted positions alone."""
    weight_VD: torch.Tensor
    """The output embedding."""
    bias_V: torch.Tensor | None
    """Its bias, if it has one."""


def prediction_head(model: PreTrainedModel) -> PredictionHead:
    """Return the head of `model`."""
    decoder = model.get_output_embeddings()
    for path in ("cls.predictions.transform", "head"):  # BERT; ModernBERT
        with contextlib.suppress(AttributeError):
            return PredictionHead(model.get_submodule(path), decoder.weight, decoder.bias)
    return PredictionHead(lambda hidden: hidden, decoder.weight, getattr(decoder, "bias", None))


def check_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that the head gives the model's own logits.

    Raises:
        GristmillError: the architecture computes its logits in another way (soft caps, scales).
    """
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        ids_BT = torch.arange(8, device=model.device)[None] % model.config.vocab_size
        head = prediction_head(model)
        hidden_BTD = model.base_model(input_ids=ids_BT).last_hidden_state
        ours = torch.nn.functional.linear(head.transform(hidden_BTD), head.weight_VD, head.bias_V)
        difference = (ours - model(input_ids=ids_BT).logits).abs().max().item()
    model.train(training)
    if not difference <= LOGIT_TOLERANCE:
        raise GristmillError(
            f"{type(model).__name__}: its logits differ by {difference:.2g} from transform(hidden) @ weight + bias, the head this trainer "
            "computes in chunks; models that scale or cap logits are not supported, take llama, gpt2, bert or modernbert"
        )


def flops_per_token(model: PreTrainedModel, sequence_length: int, *, predicted_share: float = 1.0) -> float:
    """Return the floating-point operations of one trained token, forward and backward: 6N + 12LDT (PaLM, 2204.02311, appendix B).

    Args:
        predicted_share: share of positions that go through the head (sparse prediction).
    """
    config = model.config
    head = prediction_head(model)
    transform = sum(p.numel() for p in head.transform.parameters()) if hasattr(head.transform, "parameters") else 0
    body = sum(p.numel() for p in model.base_model.parameters() if p.dim() >= 2)
    body -= sum(e.weight.numel() for e in model.base_model.modules() if type(e).__name__ == "Embedding")
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 6.0 * (body + predicted_share * (head.weight_VD.numel() + transform)) + attention


def set_up_torch(threads: int) -> None:
    """Set the number of threads.

    The progress bars of transformers are switched off: one checkpoint is one bar that flashes by.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the padding token is the end of text, and stands in every window
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
