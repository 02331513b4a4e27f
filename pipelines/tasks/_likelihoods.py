"""Likelihoods of continuations, as lm-evaluation-harness 0.4.13 defines them (`models/huggingface.py`, `api/model.py`), and faster.

A request is a context and a continuation, both text. An empty context stands for the tokenizer's beginning-of-text token, or its
end-of-text token where it has none; that token is not scored, the first token of the text is, and no end of text is appended. Any
other context is encoded alone and together with the continuation, and what the joint encoding has beyond the context's length is
the continuation; white space at the end of the context goes to the continuation. Where both are too long for the model, tokens fall
off the left of the context.

Faster: what sequences have in common is computed once (`_trees`); rows of about one length are batched, so that next to nothing is
padding; the head runs at scored positions alone, in chunks.

A model that sees both sides has no likelihood from left to right: it gets the pseudo-log-likelihood (Salazar et al. 2020, 1910.14659,
section 2.1), each token of the continuation hidden in turn, between a token that begins a text and one that ends it.

Shapes: B sequences, T positions, D hidden size, V vocabulary, N scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.batch import IGNORED, Batch
from pipelines.errors import GristmillError
from pipelines.linear_cross_entropy import linear_cross_entropy
from pipelines.models import PredictionHead, check_head, hidden_states, prediction_head, sees_both_sides
from pipelines.progress import Progress
from pipelines.tasks._trees import Packed, Tree, grown, packed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TREES = ("llama", "gpt2")
"""Architectures that share what sequences have in common: every token sees all before it, by a mask and positions that are given."""
PADDING = 1.1
"""A batch takes sequences up to so many times its shortest."""
Pair = tuple[str, str]
"""Context and continuation."""


@dataclass(frozen=True)
class Scored:
    """Log-likelihoods of continuations, one of each request."""

    nats: np.ndarray
    """float64, shape (requests,): the summed log-likelihood."""
    tokens: np.ndarray
    """int64, shape (requests,): tokens that were scored."""


@dataclass(frozen=True)
class _Sequence:
    context: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.context + self.scored


def score_pairs(model: PreTrainedModel, tokenizer: Path, pairs: Sequence[Pair], *, batch_tokens: int, label: str) -> Scored:
    """Return the log-likelihood of each continuation after its context.

    Args:
        tokenizer: a Hugging Face directory; no hub is asked.
        batch_tokens: tokens of a forward pass; results differ by rounding alone.
        label: what the progress is called.

    Raises:
        GristmillError: a continuation has no token or more than the model has positions, or the tokenizer no token to begin with.
    """
    encoder = open_tokenizer(tokenizer)
    both = sees_both_sides(model)
    sequences = _encoded(encoder, pairs, special=not both)
    if both:
        nats = _pseudo_log_likelihoods(model, encoder, sequences, batch_tokens, label)
    else:
        nats = _log_likelihoods(model, sequences, batch_tokens, label)
    return Scored(nats, np.asarray([len(sequence.scored) for sequence in sequences], dtype=np.int64))


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer in `directory` as the harness does; no hub is asked, no code is run.

    Raises:
        GristmillError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise GristmillError(f"{directory} holds no tokenizer ({error}); name a directory with tokenizer.json") from error


# Encoding


def _encoded(encoder: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, special: bool) -> list[_Sequence]:
    """Return the tokens of `pairs`; without `special`, a context gets no token of the tokenizer's own but the first."""
    first = _first_token(encoder)
    alone = [number for number, (context, _) in enumerate(pairs) if not context]
    joint = [number for number, (context, _) in enumerate(pairs) if context]
    found: dict[int, _Sequence] = {}
    ids = encoder([pairs[number][1] for number in alone], add_special_tokens=False)["input_ids"] if alone else []
    for number, tokens in zip(alone, ids, strict=True):
        begun = tokens[:1] == [first]
        found[number] = _Sequence(tuple(tokens[:1]) if begun else (first,), tuple(tokens[1:] if begun else tokens))
    found |= dict(zip(joint, _encoded_jointly(encoder, [pairs[number] for number in joint], first, special=special), strict=True))
    for number, sequence in found.items():
        if not sequence.scored:
            context, continuation = pairs[number]
            raise GristmillError(
                f"the continuation {continuation!r} after {context[-40:]!r} has no token of its own, so it has no likelihood; "
                "give every choice some text"
            )
    return [found[number] for number in range(len(pairs))]


def _encoded_jointly(encoder: PreTrainedTokenizerBase, pairs: Sequence[Pair], first: int, *, special: bool) -> Iterator[_Sequence]:
    contexts = [context.rstrip() or context for context, _ in pairs]
    texts = list(dict.fromkeys([*contexts, *(context + continuation for context, continuation in pairs)]))
    beginning = encoder.decode(first)
    ids: dict[str, list[int]] = {}
    for begun in (False, True):  # a text that begins with the token itself does not get it twice
        mine = [text for text in texts if text.startswith(beginning) == begun]
        ids |= dict(zip(mine, encoder(mine, add_special_tokens=special and not begun)["input_ids"], strict=True)) if mine else {}
    begin = () if special else (first,)
    for context, (whole, continuation) in zip(contexts, pairs, strict=True):
        tokens, begins = ids[whole + continuation], len(ids[context])
        yield _Sequence((*begin, *tokens[:begins]), tuple(tokens[begins:]))


def _first_token(encoder: PreTrainedTokenizerBase) -> int:
    for name in ("bos_token_id", "eos_token_id", "cls_token_id"):
        if (found := getattr(encoder, name, None)) is not None:
            return int(found)
    raise GristmillError(
        f"the tokenizer {encoder.name_or_path} has no token that begins a text; name a bos_token or eos_token in tokenizer_config.json"
    )


# Likelihoods from left to right


def _log_likelihoods(model: PreTrainedModel, sequences: Sequence[_Sequence], batch_tokens: int, label: str) -> np.ndarray:
    """Return the log-likelihood of each sequence's scored part, in nats; float64."""
    import torch

    longest = model.config.max_position_embeddings
    _check_lengths(sequences, longest)
    check_head(model)
    # One more token than the model reads: the last is predicted, and not read.
    keys = [(sequence.tokens[-(longest + 1) :], len(sequence.scored)) for sequence in sequences]
    trees = grown(set(keys)) if model.config.model_type in TREES else (tree for key in sorted(set(keys)) for tree in grown([key]))
    rows = sorted(trees, key=lambda pair: len(pair[1].tokens))
    progress, done, nats = Progress(label, len(keys), "sequences"), 0, {}
    with torch.no_grad():
        for batch in _batches(rows, [len(tree.tokens) for _, tree in rows], batch_tokens):
            losses = _tree_losses(model, [tree for _, tree in batch])
            for (held, tree), mine in zip(batch, losses, strict=True):
                nats |= dict(zip(held, tree.sums(-mine), strict=True))
                done += len(held)
            progress.update(done)
    return np.asarray([nats[key] for key in keys])


def _check_lengths(sequences: Sequence[_Sequence], longest: int) -> None:
    worst = max(len(sequence.scored) for sequence in sequences) if sequences else 0
    if worst > longest:
        raise GristmillError(
            f"a continuation of {worst} tokens is longer than the {longest} positions of the model; leave such items out, "
            "or train with a longer sequence_length"
        )


def _batches(rows: Sequence, lengths: Sequence[int], batch_tokens: int) -> Iterator[Sequence]:
    """Yield stretches of `rows`, which are sorted by length, of about one length and at most `batch_tokens`, one row at least."""
    begin = 0
    for end in range(1, len(rows) + 1):
        full = end < len(rows) and ((end + 1 - begin) * lengths[end] > batch_tokens or lengths[end] > PADDING * lengths[begin])
        if full or end == len(rows):
            yield rows[begin:end]
            begin = end


def _tree_losses(model: PreTrainedModel, trees: Sequence[Tree]) -> list[np.ndarray]:
    """Return the losses of the scored nodes of each tree."""
    import torch

    batch = packed(trees)
    inputs_BT, positions_BT, mask_BTT, rows_N, places_N, targets_N = (
        torch.from_numpy(getattr(batch, name)).to(model.device) for name in Packed.__dataclass_fields__
    )
    # Rows of one sequence each need no mask but the model's own: what stands behind a position is not seen.
    arguments = {"attention_mask": mask_BTT[:, None], "position_ids": positions_BT} if model.config.model_type in TREES else {}
    cache = {} if type(model).__name__.endswith("ForMaskedLM") else {"use_cache": False}
    hidden_BTD = model.base_model(input_ids=inputs_BT, **cache, **arguments).last_hidden_state
    losses = _losses(prediction_head(model), hidden_BTD[rows_N, places_N], targets_N)
    return np.split(losses, np.flatnonzero(np.diff(batch.rows_N)) + 1)


def _losses(head: PredictionHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> np.ndarray:
    _, losses_N = linear_cross_entropy(head.transform(hidden_ND), head.weight_VD, targets_N=targets_N, bias_V=head.bias_V)
    return losses_N.double().cpu().numpy()


# Pseudo-likelihoods


def _pseudo_log_likelihoods(
    model: PreTrainedModel, encoder: PreTrainedTokenizerBase, sequences: Sequence[_Sequence], batch_tokens: int, label: str
) -> np.ndarray:
    """Return the sum of each scored token's log-likelihood given all others, in nats; float64."""
    import torch

    if encoder.mask_token_id is None:
        raise GristmillError("a model that sees both sides is scored by hiding tokens, and the tokenizer has no mask_token; name one")
    last = next((found for name in ("sep_token_id", "eos_token_id") if (found := getattr(encoder, name, None)) is not None), None)
    longest = model.config.max_position_embeddings - (last is not None)
    _check_lengths(sequences, longest)
    keys = [(s.tokens[-longest:] + (() if last is None else (last,)), len(s.scored)) for s in sequences]
    rows = sorted(set(keys), key=lambda key: (len(key[0]), key))
    end = 0 if last is None else 1
    hidden = [(tokens, len(tokens) - end - count + place) for tokens, count in rows for place in range(count)]
    head, progress, done, nats = prediction_head(model), Progress(label, len(hidden), "tokens"), 0, dict.fromkeys(rows, 0.0)
    owners = [row for row in rows for _ in range(row[1])]
    with torch.no_grad():
        for batch in _batches(range(len(hidden)), [len(tokens) for tokens, _ in hidden], batch_tokens):
            for number, loss in zip(batch, _hidden_losses(model, head, [hidden[n] for n in batch], encoder.mask_token_id), strict=True):
                nats[owners[number]] -= loss
            done += len(batch)
            progress.update(done)
    return np.asarray([nats[key] for key in keys])


def _hidden_losses(model: PreTrainedModel, head: PredictionHead, rows: Sequence[tuple[tuple[int, ...], int]], mask: int) -> list[float]:
    import torch

    width = max(len(tokens) for tokens, _ in rows)
    inputs_BT = np.full((len(rows), width), mask, dtype=np.int64)
    targets_BT = np.full((len(rows), width), IGNORED, dtype=np.int64)
    padding_BT = np.zeros((len(rows), width), dtype=np.int64)
    for row, (tokens, place) in enumerate(rows):
        inputs_BT[row, : len(tokens)] = tokens
        inputs_BT[row, place], targets_BT[row, place] = mask, tokens[place]
        padding_BT[row, len(tokens) :] = 1  # a document of its own: no position of the text attends to it
    documents = torch.from_numpy(padding_BT) if padding_BT.any() else None
    batch = Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), documents).to(model.device)
    places = batch.targets_BT != IGNORED
    return _losses(head, hidden_states(model, batch, "bidirectional")[places], batch.targets_BT[places]).tolist()
