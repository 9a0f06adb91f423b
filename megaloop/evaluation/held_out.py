"""Held-out samples through a model: the loss, and where samples carry targets of their own, accuracy by difficulty.

Accuracy is over all places with a target, and on the last of each document: where hops or sums end. Its standard error counts
each document as one cluster, as the places of a document share their tokens.

Where tokens may leave a loop early, those whose predictions count do, each seeing what the tokens before it left behind, as if it were
generated; the others run all iterations. (Scope ``sequence``: a sample leaves as a prompt does, whose iterations all keep keys and
values, whatever ``--cache`` says.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaloop.checkpoint import Checkpoint
from megaloop.data import DataSet, MicroBatch
from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.evaluation.records import clustered, ratio
from megaloop.inference.caches import CachePolicy
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder, vocab_parallel_cross_entropy

__all__ = ["Scored", "difficulties", "open_as_trained", "score_held_out", "summary"]


@dataclass(frozen=True)
class Scored:
    """What a model makes of one document with targets, or of a sample of which every token counts.

    Attributes:
        difficulty: -1: not given.
        tokens: that count.
        loss: of all of them together, in nats.
        right: how many of them the likeliest token is right of; None: not asked.
        last: whether the last of them is.
        loops: of each of them what was to be predicted, and in how many iterations it was; nothing where all ran.
    """

    difficulty: int
    tokens: int
    loss: float
    right: int | None = None
    last: bool | None = None
    loops: tuple[tuple[int, int], ...] = ()


def open_as_trained(checkpoint: Checkpoint, path: Path) -> DataSet:
    """A data set in samples as long as those of a checkpoint's training, where they allow it.

    Raises:
        MegaloopError: no data set, or one of another tokenizer, or with more tokens than the model knows.
    """
    dataset = DataSet.open(path)
    length = checkpoint.manifest.data.sequence_length
    whole = dataset.description.targets is not None  # such samples are read at their own length alone
    if length is not None and dataset.sequence_length % length == 0 and not whole:
        dataset = DataSet.open(path, length)
    checkpoint.check_tokenizer(path, dataset.tokenizer_sha256)
    if dataset.vocab_size > (rows := checkpoint.manifest.vocab_size):
        raise MegaloopError(
            f"data {path}: its tokenizer has {dataset.vocab_size:,} tokens, the model {rows:,}; prepare it with the model's tokenizer"
        )
    return dataset


@torch.inference_mode()
def score_held_out(
    model: Decoder,
    batch: MicroBatch,
    calls: Sequence[LayerCall],
    vocab_size: int,
    thinking: Thinking = Thinking(),
) -> tuple[list[Scored], Tensor | None]:
    """The samples of a micro-batch, or the documents of those that carry targets; by what training's own loss is made of.

    Args:
        vocab_size: the tokenizer's tokens; others are never the likeliest.
        thinking: when tokens leave the loop, and which caches they see.

    Returns:
        What was scored, and the iterations of all tokens, [B, S]; None where nothing leaves early.

    Raises:
        MegaloopError: a ``thinking`` that the model cannot do.
    """
    logits_BSV, loops_BS = _predictions(model, batch, calls, vocab_size, thinking)
    targets_BS = batch.targets.to(model.device)
    rows = [slice(row, row + 1) for row in range(len(targets_BS))]
    if batch.loss_weights is None:
        length = targets_BS.shape[1]
        losses = [float(vocab_parallel_cross_entropy(logits_BSV[row], targets_BS[row], model.tp)) for row in rows]
        found = [
            Scored(-1, length, loss * length, loops=_loops(batch.targets[row], loops_BS, row))
            for row, loss in zip(rows, losses, strict=True)
        ]
        return found, loops_BS
    counts_BS = batch.loss_weights > 0
    right_BS = (logits_BSV[..., :vocab_size].argmax(-1) == targets_BS).cpu()
    found = []
    for row in rows:
        for document in batch.documents[row][counts_BS[row]].unique().tolist():
            mask_1S = counts_BS[row] & (batch.documents[row] == document)
            places = mask_1S[0].nonzero().flatten().to(model.device)  # of a document alone: a sample may hold many
            weights_1N = torch.ones(1, len(places), device=model.device)
            of_document = logits_BSV[row][:, places], targets_BS[row][:, places]
            loss = float(vocab_parallel_cross_entropy(*of_document, model.tp, weights_1N))
            right = right_BS[row][mask_1S]
            difficulty = -1 if batch.difficulties is None else int(batch.difficulties[row][mask_1S][0])
            loops = _loops(batch.targets[row], loops_BS, row, mask_1S)
            found.append(Scored(difficulty, len(right), loss, int(right.sum()), bool(right[-1]), loops))
    return found, loops_BS


def _predictions(
    model: Decoder, batch: MicroBatch, calls: Sequence[LayerCall], vocab_size: int, thinking: Thinking
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, S, V], and the iterations of all tokens."""
    if thinking.is_plain:
        inputs, _ = batch.for_model(model.config.document_masking)
        x = inputs if isinstance(inputs, tuple) else (inputs,)
        return model(*(tensor.to(model.device) for tensor in x), calls=calls), None
    passes = thinking.passes(model, calls, vocab_size)
    tokens_BS, device = batch.inputs.to(model.device), model.device
    length = tokens_BS.shape[1]
    sees_BSS = None
    if model.config.document_masking:
        same_BSS = batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)
        sees_BSS = (same_BSS & torch.ones(length, length, dtype=torch.bool).tril()).to(device)
    place = passes.place(torch.arange(length, device=device).expand_as(tokens_BS), length, mask_BST=sees_BSS)
    asked_BS = None if batch.loss_weights is None else (batch.loss_weights > 0).to(device)
    limits_1S = None
    if thinking.halting is not None and thinking.halting.decay is not None:
        limits_1S = torch.tensor([thinking.thresholds((at, length) for at in range(length))], device=device)
    as_prompt = thinking.halting is not None and thinking.halting.scope == "sequence"
    caches = passes.caches(len(tokens_BS), length, CachePolicy() if as_prompt else None)
    thought = passes.think(tokens_BS, place, caches, asked_BS, limits_1S)
    loops_BS = None if thinking.halting is None else thought.loops_BS.cpu()
    return model.logits(thought.hidden_BSD), loops_BS


def _loops(
    targets_1S: Tensor, loops_BS: Tensor | None, row: slice, mask_1S: Tensor | None = None
) -> tuple[tuple[int, int], ...]:
    if loops_BS is None:
        return ()
    mask_1S = torch.ones_like(targets_1S, dtype=torch.bool) if mask_1S is None else mask_1S
    return tuple(zip(targets_1S[mask_1S].tolist(), loops_BS[row][mask_1S].tolist(), strict=True))


def difficulties(dataset: DataSet, samples: int) -> list[int]:
    """Those of the first held-out samples; nothing: they have none."""
    if dataset.description.targets is None:
        return []
    split = dataset.split("validation")
    found: set[int] = set()
    for index in range(min(samples, len(split))):
        given = split.sample(index).difficulties
        found |= set() if given is None else set(given.tolist())
    return sorted(found - {-1})


def summary(scored: Sequence[Scored], dataset: DataSet, difficulty: int | None = None) -> dict[str, Any]:
    """What a record says of documents: loss in nats per token that counts, and accuracy where there are targets.

    Args:
        difficulty: of all of them; None: the whole data set, whose text has bits per byte.
    """
    tokens = sum(entry.tokens for entry in scored)
    loss = ratio([entry.loss for entry in scored], [entry.tokens for entry in scored])
    values: dict[str, Any] = {"loss": loss.mean, "loss_stderr": loss.known_error, "tokens": tokens}
    if any(entry.right is None for entry in scored):
        return values
    accuracy = ratio([entry.right or 0 for entry in scored], [entry.tokens for entry in scored])
    last = clustered([float(entry.last or 0) for entry in scored], range(len(scored)))
    values |= {"accuracy": accuracy.mean, "accuracy_stderr": accuracy.known_error}
    values |= {"last_accuracy": last.mean, "last_accuracy_stderr": last.known_error}
    targets = dataset.description.targets
    if difficulty is None and all(entry.difficulty < 0 for entry in scored):
        difficulty = -1  # that floor is of documents without one alone; of a data set that has others too there is none
    floor = None if targets is None or difficulty is None else targets.floor(difficulty)
    if floor is not None:
        values |= {"floor": floor.accuracy, "last_floor": floor.last}
    return values
