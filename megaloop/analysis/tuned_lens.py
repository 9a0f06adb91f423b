"""The tuned lens: an affine map for each place, trained so that norm and head predict from it what the model predicts at the end.

arXiv 2303.08112. The maps begin as the identity, so that an untrained tuned lens is the logit lens; the last residual stream has none, which is the
identity too. Each map's gradient is its own, so that all are trained in one pass over the data, the model frozen.

A lens is kept as safetensors, with the checksums of the checkpoint that it is of and of the data that it learns from; with optimizer state and the step,
so that training goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from megaloop.analysis.lens import log_distribution
from megaloop.analysis.prompts import PromptBatch, Prompts
from megaloop.analysis.trace import trace
from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.model import Decoder

__all__ = ["LensSource", "TunedLens", "check_lens", "load_lens", "save_lens", "train_lens"]

_ROWS = 512
"""Positions whose distributions are in memory at once."""
_SAVE_EVERY = 50
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of Adam, with the parameters; its count of steps stays on the CPU."""


@dataclass(frozen=True)
class LensSource:
    """What a lens is of.

    Attributes:
        checkpoint: checksum of the checkpoint that it is trained for.
        data: of the training samples that it learns from: what tells them apart from others', their length aside.
        samples: the first so many of them.
        tokens: of each.
        seed: of the order in which they are read.
    """

    checkpoint: str
    data: str
    samples: int
    tokens: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.samples} samples of {self.tokens} tokens of data {self.data[:12]}, seed {self.seed}"


class TunedLens(nn.Module):
    """One affine map of the residual stream for each place.

    Args:
        places: executions of layers.
        size: of the residual stream.
        source: what it is trained for, and on.

    Attributes:
        step: of its training.
    """

    def __init__(self, places: int, size: int, source: LensSource):
        super().__init__()
        self.source, self.step = source, 0
        self.weight_LDD = nn.Parameter(torch.zeros(places, size, size))
        self.bias_LD = nn.Parameter(torch.zeros(places, size))

    def forward(self, place: int, h_MD: Tensor) -> Tensor:
        """What norm and head are to read instead of the residual stream that enters a place; [M, D]."""
        return h_MD + h_MD @ self.weight_LDD[place].to(h_MD.dtype).T + self.bias_LD[place].to(h_MD.dtype)


def train_lens(
    model: Decoder,
    tuned: TunedLens,
    prompts: Prompts,
    *,
    steps: int,
    file: Path | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-3,
    batch_tokens: int = 2048,
    on_step: Callable[[int, float], None] | None = None,
) -> torch.optim.Optimizer:
    """Train the maps on KL(p_L || p_l), summed over places, from ``tuned.step`` to ``steps``; Adam, the rate falling to 0 in a straight line.

    What a step reads follows from the source's seed and its number alone, so that a training that was interrupted goes on as if it had not been.

    Args:
        file: where to keep it on the way.
        optimizer: of the training so far.
        on_step: called with the step and the loss per place.
    """
    optimizer = optimizer or torch.optim.Adam(tuned.parameters(), lr=lr)
    places = tuned.weight_LDD.shape[0]
    with _frozen(model):
        while tuned.step < steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - tuned.step / steps)
            batch = _batch(prompts, tuned.step, batch_tokens, tuned.source.seed, model.device)
            traced = trace(model, batch.tokens_BS, batch.documents_BS)
            row_M, position_M = batch.valid_BS.nonzero(as_tuple=True)
            loss = 0.0
            for row, position in zip(row_M.split(_ROWS), position_M.split(_ROWS), strict=True):
                with torch.no_grad():
                    final_MV = log_distribution(model, traced.final_BSD[row, position])
                for place in range(places):
                    found_MV = log_distribution(model, tuned(place, traced.layers[place].h_BSD[row, position]))
                    divergence = (final_MV.exp() * (final_MV - found_MV)).sum() / len(row_M)
                    divergence.backward()
                    loss += float(divergence.detach())
            optimizer.step()
            optimizer.zero_grad()
            tuned.step += 1
            if on_step is not None:
                on_step(tuned.step, loss / places)
            if file is not None and (tuned.step % _SAVE_EVERY == 0 or tuned.step == steps):
                save_lens(file, tuned, optimizer, steps)
    return optimizer


@contextmanager
def _frozen(model: Decoder) -> Iterator[None]:
    """The model's parameters take no gradient, and are afterwards as they were."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _batch(prompts: Prompts, step: int, tokens: int, seed: int, device: torch.device) -> PromptBatch:
    """Prompts at random, as many as make so many tokens (at least one)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen: list[int] = []
    for number in torch.randperm(len(prompts), generator=generator).tolist():
        if chosen and (len(chosen) + 1) * max(len(prompts.prompts[one]) for one in (*chosen, number)) > tokens:
            break
        chosen.append(number)
    return prompts.batch(chosen, device)


def save_lens(file: Path, tuned: TunedLens, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Write a lens, or what there is of it."""
    tensors = {"weight": tuned.weight_LDD.detach().cpu(), "bias": tuned.bias_LD.detach().cpu()}
    for name, parameter in (("weight", tuned.weight_LDD), ("bias", tuned.bias_LD)):
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{name}.{moment}"] = value.cpu()
    about = asdict(tuned.source) | {"step": str(tuned.step), "steps": str(steps)}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(tensors, {"megaloop": json.dumps(about)}))


def load_lens(
    file: Path, places: int, size: int, source: LensSource, device: torch.device = torch.device("cpu")
) -> tuple[TunedLens, torch.optim.Optimizer, int]:
    """A lens that was kept, its optimizer, and how many steps it was to have.

    Raises:
        MegaloopError: it cannot be read, or is of another checkpoint or of other data.
    """
    tuned = TunedLens(places, size, source).to(device)
    optimizer = torch.optim.Adam(tuned.parameters())
    with _opened(file) as (opened, about):
        _check_source(file, about, source)
        tuned.step = int(about["step"])
        with torch.no_grad():
            for name, parameter in (("weight", tuned.weight_LDD), ("bias", tuned.bias_LD)):
                parameter.copy_(opened.get_tensor(name))
                moments = {moment: opened.get_tensor(f"{name}.{moment}").to(device) for moment in _MOMENTS}
                optimizer.state[parameter] = {"step": opened.get_tensor(f"{name}.step"), **moments}
        return tuned, optimizer, int(about["steps"])


def check_lens(file: Path, source: LensSource) -> None:
    """Raise MegaloopError if a lens that was kept is of another checkpoint or of other data, or cannot be read."""
    with _opened(file) as (_, about):
        _check_source(file, about, source)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file of a lens, and what it says of it; what is wrong with it in there is told in one line."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened, json.loads((opened.metadata() or {}).get("megaloop", "{}"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise MegaloopError(f"lens {file}: cannot be read ({error}); remove the file to train another") from None


def _check_source(file: Path, about: dict[str, Any], source: LensSource) -> None:
    found: dict[str, Any] = {name: about.get(name) for name in asdict(source)}
    if found["checkpoint"] != source.checkpoint:
        raise MegaloopError(
            f"lens {file} is of checkpoint {str(found['checkpoint'])[:12]}, this is {source.checkpoint[:12]}; "
            "remove the file to train another"
        )
    if found != asdict(source):
        learnt = "data that it does not name" if found["data"] is None else str(LensSource(**found))
        raise MegaloopError(
            f"lens {file} was trained on {learnt}, this one is to learn from {source}; remove the file to train another"
        )
