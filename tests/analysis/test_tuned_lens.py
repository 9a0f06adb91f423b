"""The tuned lens begins as the logit lens, learns, goes on where it was interrupted, and is of one checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaloop.analysis import tuned_lens
from megaloop.analysis.lens import lens, log_distribution, settling_layers
from megaloop.analysis.trace import trace
from megaloop.analysis.tuned_lens import LensSource, TunedLens, check_lens, load_lens, save_lens, train_lens
from megaloop.errors import MegaloopError
from tests.analysis.models import CONFIG, decoder, random_prompts, whole_batch

PROMPTS = random_prompts((13, 30, 21, 17))
SIZE = CONFIG.hidden_size
A = LensSource("a" * 64, "d" * 64, samples=4, tokens=30)


def test_untrained_it_is_the_logit_lens_and_the_end_has_none() -> None:
    model, batch = decoder("2-2x3-1"), whole_batch(PROMPTS)
    traced, tuned, asked = trace(model, batch.tokens_BS), TunedLens(9, SIZE, A), set()

    def translate(place: int, h_MD: Tensor) -> Tensor:
        asked.add(place)
        return tuned(place, h_MD)

    plain, found = lens(model, traced, batch), lens(model, traced, batch, translate=translate)
    assert torch.equal(found.tokens_BLK, plain.tokens_BLK)
    assert torch.equal(found.targets_BLK, plain.targets_BLK)
    assert asked == set(range(9))


def test_trained_it_is_nearer_to_the_end_at_every_place() -> None:
    model, batch = decoder("2-2x2-1"), whole_batch(PROMPTS)
    traced, tuned = trace(model, batch.tokens_BS), TunedLens(7, SIZE, A)
    weights, losses = {name: value.clone() for name, value in model.state_dict().items()}, dict[int, float]()
    train_lens(model, tuned, PROMPTS, steps=40, lr=1e-2, on_step=losses.__setitem__)
    assert list(losses) == list(range(1, 41))
    plain, found = (lens(model, traced, batch, translate=by).tokens_BLK[:, :, 0].sum(0) for by in (None, tuned))
    assert (found[:-1] < plain[:-1]).all()
    assert torch.equal(found[-1], plain[-1])
    # the loss is the mean KL(p_L || p_l) over tokens and places of the first batch, which holds all prompts
    final, *states = (
        log_distribution(model, state[batch.valid_BS])
        for state in (traced.final_BSD, *(one.h_BSD for one in traced.layers))
    )
    divergence = sum(float((final.exp() * (final - state)).sum().detach()) for state in states)
    assert losses[1] == pytest.approx(divergence / int(batch.valid_BS.sum()) / 7, rel=1e-5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_interrupted_and_gone_on_with_it_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_lens, "_SAVE_EVERY", 2)
    model, file = decoder("3"), tmp_path / "lens.safetensors"
    whole = TunedLens(3, SIZE, A)
    expected = train_lens(model, whole, PROMPTS, steps=6, batch_tokens=40)

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lens(model, TunedLens(3, SIZE, A), PROMPTS, steps=6, batch_tokens=40, file=file, on_step=stop)
    tuned, optimizer, steps = load_lens(file, 3, SIZE, A)
    assert (tuned.step, steps) == (4, 6)
    assert not torch.equal(tuned.weight_LDD, whole.weight_LDD)
    train_lens(model, tuned, PROMPTS, steps=6, batch_tokens=40, file=file, optimizer=optimizer)
    again, kept, steps = load_lens(file, 3, SIZE, A)
    assert (again.step, steps) == (6, 6)
    for found, moments in ((tuned, optimizer), (again, kept)):
        for one, other in zip(found.parameters(), whole.parameters(), strict=True):
            assert torch.equal(one, other)
            for name, value in expected.state[other].items():
                assert torch.equal(moments.state[one][name], value)


def test_a_lens_of_another_checkpoint_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, file = decoder("3"), tmp_path / "lens.safetensors"
    train_lens(model, TunedLens(3, SIZE, A), PROMPTS, steps=1, file=file)
    assert load_lens(file, 3, SIZE, A)[0].step == 1
    with pytest.raises(MegaloopError, match=f"is of checkpoint {'a' * 12}, this is {'b' * 12}; remove the file"):
        load_lens(file, 3, SIZE, replace(A, checkpoint="b" * 64))
    with pytest.raises(MegaloopError, match="cannot be read"):
        load_lens(file, 4, SIZE, A)
    data = file.read_bytes()
    for damaged in (b"", data[:-1], data[:20], b"no tensors at all", data[:8] + b"\0" * 100 + data[108:]):
        file.write_bytes(damaged)
        with pytest.raises(MegaloopError, match=r"lens .*cannot be read .*; remove the file to train another"):
            load_lens(file, 3, SIZE, A)
    with pytest.raises(MegaloopError, match="cannot be read"):
        load_lens(tmp_path / "none.safetensors", 3, SIZE, A)


@pytest.mark.parametrize("change", [{"data": "e" * 64}, {"samples": 3}, {"tokens": 29}, {"seed": 1}])
def test_a_lens_of_other_data_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file, other = tmp_path / "lens.safetensors", replace(A, **change)
    optimizer = train_lens(decoder("3"), TunedLens(3, SIZE, A), PROMPTS, steps=1, file=file)
    assert load_lens(file, 3, SIZE, A)[0].source == A
    check_lens(file, A)
    learnt = "was trained on 4 samples of 30 tokens of data dddddddddddd, seed 0, this one is to learn from "
    for read in (lambda: load_lens(file, 3, SIZE, other), lambda: check_lens(file, other)):
        with pytest.raises(MegaloopError, match=f"{learnt}{other}; remove the file to train another"):
            read()
    earlier = TunedLens(3, SIZE, replace(A, data=None))  # type: ignore[arg-type]
    save_lens(file, earlier, optimizer, 0)
    with pytest.raises(MegaloopError, match="was trained on data that it does not name, this one is"):
        check_lens(file, A)


def test_a_token_settles_at_the_first_layer_that_comes_near_enough_to_the_end() -> None:
    divergences_ML = [[0.6, 0.5, 0.4, 0.0], [0.6, 0.6, 0.6, 0.0], [0.1, 0.6, 0.6, 0.0], [0.69, 0.69, 0.51, 0.0]]
    assert settling_layers(torch.tensor(divergences_ML).T).tolist() == [2, 4, 1, 4]


def test_a_model_that_decides_in_its_last_layer_thinks_deep() -> None:
    batch = whole_batch(PROMPTS)
    shares = []
    for factor in (0.0, 100.0):
        model = decoder("4", config=CONFIG.model_copy(update={"tied_embeddings": False}))
        with torch.no_grad():
            model.get_parameter("head.weight").mul_(10)
            model.get_parameter("layers.3.mlp.w_down.weight").mul_(factor)
            model.get_parameter("layers.3.attention.wo.weight").mul_(factor)
        found = lens(model, trace(model, batch.tokens_BS), batch)
        shares.append(found.deep_B / found.token_count_B)
    assert not shares[0].any()
    assert (shares[1] > 0.6).all()
