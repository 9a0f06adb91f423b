"""State to save: tensors of known values, cut into boxes and flat fragments as ranks would hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from megaloop.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    DataState,
    DepthState,
    Manifest,
    RunState,
    SaveResult,
    SourceState,
    save_checkpoint,
)
from megaloop.checkpoint.manifest import MANIFEST, encode_manifest
from megaloop.checkpoint.reader import file_checksum
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.layout.pieces import STATE_NAMES, Box, Piece, StatePiece
from megaloop.layout.topology import Topology

SHAPES = {
    "embedding.weight": (24, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.attention.wo.weight": (8, 8),
    "norm.weight": (8,),
}
SPLIT_DIMENSION = {"embedding.weight": 0, "layers.0.attention.wq.weight": 0, "layers.0.attention.wo.weight": 1}


def tensor(state_name: str, name: str, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """Values that tell where they belong: another number for each place of each tensor."""
    number = sorted(SHAPES).index(name) if name in SHAPES else 0
    values = torch.arange(prod(shape), dtype=torch.float32).view(shape) + salt
    if state_name == "model":
        return ((values + 37 * number) % 256).to(torch.bfloat16)  # what bfloat16 holds exactly
    return values + 1000 * number + 10_000 * STATE_NAMES.index(state_name)


def box_of(name: str, shape: tuple[int, ...], part: int, parts: int) -> Box:
    """The box of one of ``parts`` tensor-parallel ranks."""
    dimension = SPLIT_DIMENSION.get(name)
    if dimension is None or parts == 1:
        return Box.whole(shape)
    offset, size = [0] * len(shape), list(shape)
    size[dimension] //= parts
    offset[dimension] = part * size[dimension]
    return Box(tuple(offset), tuple(size))


def state(tp: tuple[int, int], dp: tuple[int, int], salt: int = 0) -> Iterator[StatePiece]:
    """What rank (index, size) along tp and dp holds: its boxes of weights, its fragments of masters and moments."""
    for name, shape in SHAPES.items():
        box = box_of(name, shape, *tp)
        first_of_alike = box != Box.whole(shape) or tp[0] == 0
        whole = tensor("model", name, shape, salt)
        values = whole[box.within(Box.whole(shape))]
        yield StatePiece("model", Piece(name, shape, box), values, first_of_alike and dp[0] == 0)
        cuts = [box.numel * 3 * n // (3 * dp[1] + 1) for n in range(dp[1])] + [box.numel]  # in the middle of rows
        start, stop = cuts[dp[0]], cuts[dp[0] + 1]
        for state_name in STATE_NAMES[1:]:
            values = tensor(state_name, name, shape, salt)[box.within(Box.whole(shape))].reshape(-1)[start:stop]
            yield StatePiece(state_name, Piece(name, shape, box, (start, stop)), values, first_of_alike)


def run_state(step: int = 1) -> RunState:
    """A state in which no field is at its default."""
    source = SourceState(train="12" * 32, validation="34" * 32, stable=1.0, cooldown=0.5)
    return RunState(
        step=step,
        samples=10 * step,
        tokens=640 * step,
        flops=12345 * step,
        skipped=step // 2,
        seed=7,
        batch=10,
        steps=1000,
        lr=0.25,
        order_version=3,
        data=DataState(sequence_length=64, cooldown_sample=9000, sources=(source,)),
        depths=(DepthState(step=0, layers=1, depth="1", grown=True),),
    )


def info(step: int = 1, **changes: Any) -> CheckpointInfo:
    fields: dict[str, Any] = {
        "run": run_state(step),
        "plan": DepthPlan.plain(1),
        "model": ModelConfig(hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=16, vocab_size=24),
        "topology": Topology(),
        "precision": "bf16",
        "config": {"name": "test"},
        "growth": None,
    }
    return CheckpointInfo(**{**fields, **changes})


def save(run: Path, step: int, pieces: Iterable[StatePiece] | None = None, salt: int = 0) -> SaveResult:
    """Save a step of a run, by default all state as one rank holds it, with a tokenizer."""
    tokenizer = run / "tokenizer.source"
    if not dist.is_initialized() or dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.write_bytes(b"as if sentencepiece had written it")
    directory = run / "checkpoints" / f"step-{step:08d}"
    return save_checkpoint(directory, pieces or state((0, 1), (0, 1), salt), info(step), tokenizer)


def reseal(checkpoint: Path, manifest: Manifest | None = None) -> None:
    """Make a manifest fit files that were tampered with: their sizes and checksums, and its own."""
    manifest = manifest or Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes())
    files = [
        entry.model_copy(update={"bytes": path.stat().st_size, "checksum": file_checksum(path)})
        for entry in manifest.files
        if (path := checkpoint / entry.path)
    ]
    (checkpoint / MANIFEST).write_bytes(encode_manifest(manifest.model_copy(update={"files": files})))


def read_all(path: Path, verify: Any = "checksums") -> None:
    """Open a checkpoint and read every tensor."""
    with Checkpoint.open(path, verify) as opened:
        for state_name, named in opened.manifest.tensors.items():
            for name in named:
                opened.read(state_name, name)


def reseal_bytes(checkpoint: Path) -> None:
    """As :func:`reseal`, for a manifest of any version."""
    text = (checkpoint / MANIFEST).read_text()
    value = json.loads(text)
    for entry in value["files"]:
        path = checkpoint / entry["path"]
        entry |= {"bytes": path.stat().st_size, "checksum": file_checksum(path)}
    blank = json.dumps({**value, "checksum": "0" * 32}, indent=1)
    (checkpoint / MANIFEST).write_text(blank.replace("0" * 32, xxhash.xxh3_128_hexdigest(blank.encode()), 1))
