"""Models and their measures from transformers, made once for the tests that compare with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megaloop.analysis import diagnose
from megaloop.analysis.prompts import PromptBatch, Prompts
from megaloop.analysis.trace import Trace, trace
from megaloop.depth import LoopStyle
from megaloop.model import Decoder
from tests.analysis.models import CONFIG, decoder, exported, random_prompts, whole_batch
from tests.analysis.reference import HookedLlama

__all__ = ["Pair"]

UNTIED = CONFIG.model_copy(update={"tied_embeddings": False})
SCALED = CONFIG.model_copy(update={"norm_scaling": True})
KINDS = {
    "tied": ("4", LoopStyle(), CONFIG),
    "untied": ("4", LoopStyle(), UNTIED),
    "2-2x3-1": ("2-2x3-1", LoopStyle(), CONFIG),
    "0-2x3-0": ("0-2x3-0", LoopStyle(), UNTIED),
    "1/k": ("1-1x2-1", LoopStyle(residual_scale="1/k"), CONFIG),
    "LN-scaling": ("1-1x2-1", LoopStyle(), SCALED),
}


@dataclass(frozen=True)
class Pair:
    """A model, the same as transformers has it (unrolled), and prompts that both are given."""

    ours: Decoder
    theirs: HookedLlama
    prompts: Prompts
    batch: PromptBatch
    traced: Trace


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded: what is wrong is found before."""

    def load(path: Path, **_: Any) -> NoReturn:
        pytest.fail(f"{path} was loaded")

    monkeypatch.setattr(diagnose, "load_decoder", load)


@pytest.fixture(scope="session", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    depth, style, config = KINDS[request.param]
    model, prompts = decoder(depth, style, config), random_prompts()
    batch = whole_batch(prompts)
    theirs = exported(model, tmp_path_factory.mktemp("pair"))
    return Pair(model, theirs, prompts, batch, trace(model, batch.tokens_BS))
