"""An encoder or causal language model of package transformers as embedder: its hidden states, pooled over the tokens of a text.

    embedder: hf_encoder
    embedder_settings: {model: intfloat/e5-small-v2, revision: <the commit, 40 digits>, prefix: "passage: "}

A checkpoint of this project is such a model, too: ``{model: <its directory>, layer: 9}`` embeds with the model that is trained, as
INGENIOUS does (2305.06677, section 3.2). Weights are read from safetensors alone, code that comes with a model is never run, and
layers that a sentence encoder has behind its pooling are not applied.

A text of more than `max_tokens` is cut: prefix and text are tokenized as one, the text's tokens are dealt out in order to chunks that
each are as long as fits between the special tokens and a prefix of their own, and the vector of the text is the mean of the chunks'
pooled vectors, weighted by how many of the text's tokens each holds, and then scaled to norm 1. The mean of a chunk is over all its
tokens, special ones and prefix included, as sentence-transformers takes it.

Float sums end in other bits with other threads and other batches. MiniLM (6 layers, 384 dimensions) on 200 passages of the sample, on the
CPU, rounded to the integer grid: two threads instead of one change 3 rows by 1 in one number each, batches of 4,096 tokens instead of
single chunks 6. So on the CPU the model runs with one thread and reads one chunk at a time, by which a vector depends on its text
alone; that takes a tenth longer than ``batch_tokens: 1024`` for passages of 214 tokens, and 3 times as long for questions of a line. On a
GPU, and with `batch_tokens`, batches are made by length within a call, so that the same calls in the same order give the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.embedders import Embedder
from pipelines.errors import EmptyInput, GristmillError
from pipelines.files import file_hashes
from pipelines.hidden_states import layer_of, mean_hidden_states, one_thread, token_states
from pipelines.model_files import Commit, model_folder, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATE = "hf_encoder.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)
BATCH = 1_000
"""Texts that `fit` tokenizes together."""
GPU_BATCH = 32_768
SAME = 1e-5
"""Two vectors that differ by less, relative to the larger one, are the same but for rounding."""


class HfEncoder(Embedder):
    """Pooled hidden states of a model that the user has."""

    model: str
    """Folder with config.json, model.safetensors and tokenizer, relative to the project's directory or absolute; with `revision`,
    ``owner/name`` on the hub."""
    revision: Commit | None = None
    """Commit of the repository on the hub; none for a folder of yours."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """The mean over a chunk's tokens, its first token (encoders trained so), or its last one (causal models trained so)."""
    layer: int | None = None
    """Which layer's states: 1 is the first layer's, 0 the embeddings, negative ones count from the end; None is the last layer."""
    max_tokens: int = Field(default=512, ge=1)
    """Tokens of a chunk at most, special ones and prefix included; a model with fewer positions takes as many as it has."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one call of the model at most, padding included; None is a chunk at a time on the CPU, and `GPU_BATCH` on a GPU."""
    prefix: str = ""
    """Stands before every text, where a model was trained so."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs: auto is a GPU where there is one. On the CPU it runs with one thread."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    def files(self) -> Sequence[Path]:
        """Return the files of a local model that change its vectors; none for a commit on the hub, which says it all.

        Raises:
            GristmillError: the folder is not there.
        """
        return () if self.revision else _model_files(self._folder())

    def fit(self, texts: Iterable[str], state: Path) -> dict[str, float]:
        """Write `STATE`: the SHA-256 of the model's files, and what the settings come to with it. Nothing is learnt from `texts`.

        Raises:
            EmptyInput: there is no text.
            GristmillError: the model cannot be had, or not be used with these settings.
        """
        hashes = self._hashes()
        encoder = self._encoder(hashes)
        layer = layer_of(encoder.model, -1 if self.layer is None else self.layer)
        max_tokens = min(self.max_tokens, encoder.positions)
        dimensions = self._probed(encoder, layer)
        num_texts = tokens = cut = 0
        remaining = iter(texts)
        while batch := list(islice(remaining, BATCH)):
            chunks = self._chunks(encoder, batch, max_tokens)
            num_texts, tokens = num_texts + len(batch), tokens + sum(chunk.weight for chunk in chunks)
            cut += sum(count > 1 for count in np.bincount([chunk.text for chunk in chunks]).tolist())
        if tokens == 0:
            raise EmptyInput("embedder hf_encoder: the sample holds no text to fit on; check the filters, or raise sample_passages")
        record = {"files": hashes, "dimensions": dimensions, "layer": layer, "max_tokens": max_tokens}
        (state / STATE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        shares = {"tokens_per_text": round(tokens / num_texts, 2), "share_of_texts_cut": round(cut / num_texts, 6)}
        return {"dimensions": float(dimensions), "layer": float(layer), "max_tokens": float(max_tokens), **shares}

    def embed(self, texts: Sequence[str], state: Path) -> np.ndarray:
        """Return float32 unit vectors, shape ``(len(texts), dimensions)``; zeros for a text without tokens.

        Raises:
            GristmillError: the model is not the one that `fit` saw, or its vectors are not finite.
        """
        fitted = json.loads((state / STATE).read_text(encoding="utf-8"))
        hashes = self._hashes()
        if hashes != fitted["files"]:
            changed = sorted(name for name in {*hashes, *fitted["files"]} if hashes.get(name) != fitted["files"].get(name))
            raise GristmillError(f"model {self.model!r} changed since the embedder was fitted ({', '.join(changed)}); fit it again")
        encoder = self._encoder(hashes)
        chunks = self._chunks(encoder, texts, fitted["max_tokens"])
        sums = np.zeros((len(texts), fitted["dimensions"]))
        for chunk, vector in zip(chunks, self._pooled(encoder, chunks, fitted["layer"]), strict=True):
            sums[chunk.text] += chunk.weight * vector.astype(np.float64)
        norms = np.sqrt((sums * sums).sum(axis=1, keepdims=True))
        if not np.isfinite(norms).all():
            raise GristmillError(f"model {self.model!r} gives vectors that are not finite; are its weights whole?")
        return (sums / np.where(norms > 0, norms, 1.0)).astype(np.float32)

    def _folder(self) -> Path:
        return _folder(self.model, self.revision, self.root)

    def _hashes(self) -> dict[str, str]:
        return file_hashes(_model_files(self._folder()), self._folder())

    def _encoder(self, hashes: dict[str, str]) -> _Encoder:
        import torch

        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise GristmillError("embedder hf_encoder: device cuda, and torch sees no GPU; set device: auto, or cpu")
        return _load(self._folder(), "cuda" if found and self.device != "cpu" else "cpu", tuple(hashes.items()))

    def _probed(self, encoder: _Encoder, layer: int) -> int:
        """Return the size of a vector, having checked on two texts that differ in their last token that their vectors do."""
        one, other = self._pooled(encoder, [_Chunk(0, [0, 1], 2), _Chunk(1, [0, 2], 2)], layer)
        if self.pooling == "cls" and np.abs(one - other).max() <= SAME * np.abs(one).max():
            raise GristmillError(
                f"pooling 'cls': at layer {layer} of {self.model!r} the first token does not see those behind it; take mean or last"
            )
        return len(one)

    def _chunks(self, encoder: _Encoder, texts: Sequence[str], max_tokens: int) -> list[_Chunk]:
        """Return the chunks of `texts`, in their order."""
        num_lead = len(encoder.ids([self.prefix.rstrip()])[0]) if self.prefix else 0
        room = max_tokens - len(encoder.head) - len(encoder.tail) - num_lead
        if room < 1:
            raise GristmillError(
                f"max_tokens {max_tokens} leaves no room for text beside {max_tokens - room} special tokens and tokens of the prefix; "
                "raise it, or shorten the prefix"
            )
        chunks = []
        for number, ids in enumerate(encoder.ids([self.prefix + text for text in texts])):
            lead, own = ids[:num_lead], ids[num_lead:]
            for start in range(0, len(own), room):
                piece = own[start : start + room]
                chunks.append(_Chunk(number, [*encoder.head, *lead, *piece, *encoder.tail], len(piece)))
        return chunks

    def _pooled(self, encoder: _Encoder, chunks: Sequence[_Chunk], layer: int) -> np.ndarray:
        """Return the pooled vector of each chunk, float32 of shape ``(len(chunks), dimensions)``."""
        found: dict[int, np.ndarray] = {}
        with one_thread():
            for numbers in _batches(chunks, self.batch_tokens or (1 if encoder.model.device.type == "cpu" else GPU_BATCH)):
                inputs_BT, lengths_B = encoder.padded([chunks[number].tokens for number in numbers])
                found.update(zip(numbers, self._pool(encoder.model, inputs_BT, lengths_B, layer).cpu().numpy(), strict=True))
        return np.stack([found[number] for number in range(len(chunks))]) if chunks else np.zeros((0, 0), np.float32)

    def _pool(self, model: PreTrainedModel, inputs_BT: torch.Tensor, lengths_B: torch.Tensor, layer: int) -> torch.Tensor:
        if self.pooling == "mean":
            return mean_hidden_states(model, inputs_BT, lengths_B, layer)
        states_BTD = token_states(model, inputs_BT, lengths_B, layer)
        return states_BTD[range(len(states_BTD)), 0 if self.pooling == "cls" else lengths_B - 1]


@dataclass(frozen=True)
class _Chunk:
    """A stretch of one text's tokens, as the model reads it."""

    text: int
    tokens: list[int]
    weight: int
    """Tokens of the text itself: without special tokens and prefix."""


@dataclass(frozen=True)
class _Encoder:
    """A model in memory with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: list[int]
    """Special tokens that stand before a text."""
    tail: list[int]
    """Special tokens that stand behind it."""
    positions: int
    """Tokens of a chunk at most."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `rows` padded on the right, and their lengths."""
        import torch

        longest, padding = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        inputs_BT = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=self.model.device)
        return inputs_BT, torch.tensor([len(row) for row in rows], device=self.model.device)


def _batches(chunks: Sequence[_Chunk], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of the chunks that the model reads together: by length, then in their order."""
    batch: list[int] = []
    for number in sorted(range(len(chunks)), key=lambda number: len(chunks[number].tokens)):
        if batch and (len(batch) + 1) * len(chunks[number].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _model_files(folder: Path) -> tuple[Path, ...]:
    return (*weight_files(folder), *sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)))


@lru_cache(maxsize=8)
def _folder(model: str, revision: str | None, root: Path) -> Path:
    """Return the model's folder; the hub is asked once a process."""
    folder = model_folder(model, revision, root)
    if not folder.is_dir():
        raise GristmillError(f"model {model!r} is a file; give the folder that holds config.json and model.safetensors")
    return folder


@lru_cache(maxsize=1)
def _load(folder: Path, device: str, version: tuple[tuple[str, str], ...]) -> _Encoder:
    """Open the model in `folder`.

    Args:
        version: the hashes of its files, so that changed ones are read anew.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    how = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        with torch.random.fork_rng(devices=[]):  # a pooler that the weights lack is drawn at random, and not used
            model, told = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **how)
    except (OSError, ValueError, KeyError) as error:
        raise GristmillError(f"{folder} is no model with config.json, safetensors weights and a tokenizer ({error})") from error
    lacking = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if lacking or model.config.is_encoder_decoder:
        fault = f"its weights lack {lacking[0]} and {len(lacking) - 1} more" if lacking else "it is an encoder with a decoder"
        raise GristmillError(f"{folder} cannot embed: {fault}; give an encoder or a causal language model with all its weights")
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    if not starts:
        raise GristmillError(f"{folder}: its tokenizer puts special tokens into a text; only those before and behind it are supported")
    head, tail = whole[: starts[0]], whole[starts[0] + len(bare) :]
    return _Encoder(model.float().eval().to(device), tokenizer, head, tail, _positions(model, tokenizer))


def _positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the model can read at once; RoBERTa's kin begin to count behind their padding token."""
    places = int(getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return min(places - (0 if padding is None else padding + 1), tokenizer.model_max_length)
