"""Scoring of held-out documents, without a data set on disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaloop.data import MicroBatch
from megaloop.data.description import FloorEntry, TargetsEntry
from megaloop.evaluation.held_out import Scored, score_held_out, summary
from megaloop.model import TensorParallel, vocab_parallel_cross_entropy

SAMPLES, LENGTH, VOCAB = 2, 48, 11
DOCUMENT = 6
"""Tokens of each document."""


class _Fixed:
    """A model that gives the same logits whatever it reads."""

    config = SimpleNamespace(document_masking=False)
    device = torch.device("cpu")
    tp = TensorParallel()

    def __init__(self, logits_BSV: Tensor):
        self.logits_BSV = logits_BSV

    def __call__(self, *inputs: Tensor, calls: Any) -> Tensor:
        return self.logits_BSV


def test_a_document_costs_what_its_targets_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample may hold a hundred documents: a loss over all its places for each of them takes minutes."""
    generator = torch.Generator().manual_seed(0)
    logits_BSV = torch.randn(SAMPLES, LENGTH, VOCAB, generator=generator)
    targets_BS = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=generator)
    counts_BS = torch.rand(SAMPLES, LENGTH, generator=generator) < 0.5
    documents_BS = (torch.arange(LENGTH) // DOCUMENT).int().expand(SAMPLES, LENGTH)
    batch = MicroBatch(
        torch.zeros_like(targets_BS), targets_BS, documents_BS, [0, 1], 0, counts_BS.float() * 0.1, documents_BS
    )
    scored_places = []

    def watched(logits: Tensor, *rest: Any) -> Tensor:
        scored_places.append(logits.shape[1])
        return vocab_parallel_cross_entropy(logits, *rest)

    monkeypatch.setattr("megaloop.evaluation.held_out.vocab_parallel_cross_entropy", watched)
    model: Any = _Fixed(logits_BSV)
    scored, _ = score_held_out(model, batch, [], VOCAB)
    assert sum(scored_places) == int(counts_BS.sum())
    losses_BS = torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="none")
    expected = []
    for row in range(SAMPLES):
        for number in range(LENGTH // DOCUMENT):
            places = counts_BS[row] & (documents_BS[row] == number)
            if places.any():
                expected.append((number, int(places.sum()), float(losses_BS[row][places].sum())))
    assert [(entry.difficulty, entry.tokens) for entry in scored] == [(number, count) for number, count, _ in expected]
    assert [entry.loss for entry in scored] == pytest.approx([loss for *_, loss in expected], rel=1e-5)


def test_documents_without_a_difficulty_have_a_floor_that_is_not_that_of_all() -> None:
    floors = [
        FloorEntry(difficulty=level, accuracy=floor, last=floor, documents=9, guesser="vote", last_guesser="vote")
        for level, floor in ((-1, 1.0), (1, 0.5))
    ]
    dataset: Any = SimpleNamespace(description=SimpleNamespace(targets=TargetsEntry(counts={}, floors=floors)))
    easy, hard = Scored(-1, 2, 1.0, 2, True), Scored(1, 2, 1.0, 0, False)
    assert summary([easy, easy], dataset)["floor"] == 1.0
    assert summary([hard, hard], dataset, difficulty=1)["floor"] == 0.5
    assert "floor" not in summary([easy, hard], dataset), "half of them are not what that floor was measured on"
    assert "floor" not in summary([hard, hard], dataset)
