"""Cosines of the MLP weights of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megaloop.analysis.symmetry import mean_symmetry, weight_symmetry
from megaloop.errors import MegaloopError
from megaloop.model import Decoder
from tests.analysis.tiny import tiny_model


def mlp(model: Decoder, layer_id: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    found = model.state_dict()
    return [found[f"layers.{layer_id}.mlp.{name}.weight"].double().numpy() for name in ("w_gate", "w_up", "w_down")]


@pytest.mark.parametrize(("depth", "block"), [("6", 1), ("6", 2), ("5", 2), ("1-3x2-2", 2)])
def test_symmetry_is_the_cosine_of_concatenated_weights_of_unique_layers(
    depth: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaloop.analysis.symmetry._ELEMENTS", 1000)
    model = tiny_model(depth)
    ids = model.plan.ids
    vectors = [
        np.concatenate([matrix.ravel() for one in ids[start : start + block] for matrix in mlp(model, one)])
        for start in range(0, len(ids) - block + 1, block)
    ]
    lengths = [np.sqrt(vector @ vector) for vector in vectors]
    expected = np.array([[a @ b for b in vectors] for a in vectors]) / np.outer(lengths, lengths)
    found = weight_symmetry(model, block).numpy()
    assert found.shape == (len(ids) // block,) * 2
    # both fp64 sums of 9,216 products; measured: 3.4e-16
    assert np.abs(found - expected).max() < 7e-16
    off_diagonal = expected[~np.eye(len(expected), dtype=bool)]
    assert mean_symmetry(weight_symmetry(model, block)) == pytest.approx(off_diagonal.mean(), abs=1e-15)
    assert np.abs(off_diagonal).max() < 0.1, "random blocks are not alike"


def test_a_copied_block_is_found_to_be_the_same() -> None:
    model = tiny_model("6")
    for parent, copy in ((2, 4), (3, 5)):
        model.layers[str(copy)].load_state_dict(model.layers[str(parent)].state_dict())
    found = weight_symmetry(model, 2)
    assert float(found[1, 2]) == pytest.approx(1, abs=1e-15)
    assert float(found[0, 1]) == pytest.approx(float(found[0, 2]), abs=1e-15)
    assert abs(float(found[0, 1])) < 0.1
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("block", [-1, 0, 3, 9])
def test_a_block_that_does_not_fit_twice_is_refused(block: int) -> None:
    with pytest.raises(
        MegaloopError, match=f"blocks of {block} layers in a model of 5; at least two must fit, so 1 to 2"
    ):
        weight_symmetry(tiny_model("5"), block)
