"""The configuration of a run that starts from a checkpoint: its model, its depth, its loop, and places to fill in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from megaloop.checkpoint.manifest import Manifest, read_manifest
from megaloop.checkpoint.resolve import is_step_name, resolve_checkpoint
from megaloop.depth import DepthSpec
from megaloop.text import printable

__all__ = ["starting_config"]

_LENGTH = 2048
"""Tokens per sample at most, if the checkpoint was made for longer texts: attention costs the square of them."""


def starting_config(checkpoint: Path) -> str:
    """YAML of a run that starts from a checkpoint's weights (``init``), which ``load_config`` reads.

    Only the data are missing: the path says so, and the comments say how to make them.

    Args:
        checkpoint: a checkpoint, or a run (its newest).

    Raises:
        MegaloopError: no complete checkpoint there, or its manifest is damaged.
    """
    path = resolve_checkpoint(checkpoint).absolute()
    manifest = read_manifest(path)
    length = min(manifest.data.sequence_length or _LENGTH, _LENGTH)
    style = manifest.plan.style
    parts = [
        _comment(f"A run that starts from the weights of {printable(path, 1000)}."),
        _comment("Fill in data.sources, look through the rest, then: megaloop plan FILE; megaloop train FILE"),
        _yaml({"name": _name(path), "init": str(path), "depth": DepthSpec.of(manifest.plan).text}),
        "\n# The checkpoint's; a run from its weights cannot have another.\n",
        _yaml({"model": manifest.model.to_json()}),
    ]
    if manifest.plan.is_looped:
        loop: dict[str, Any] = {
            "injection": style.injection,
            "residual_scale": style.residual_scale,
            "norm": style.norm,
        }
        comment = "\n# How its loop goes on, as it was trained.\n"
        if style.gate:
            loop["gate"] = {"train": "joint"}
            comment += "# Its gate learns with the model (joint), or alone (frozen).\n"
        parts += [comment, _yaml({"loop": loop})]
    parts += [
        "\n",
        _comment(
            f"Made by: megaloop prep TEXT --out DIR --sequence-length {length} --tokenizer {_tokenizer(path, manifest)}"
        ),
        _yaml({"data": {"sources": [{"path": "FILL-IN/shards"}], "sequence_length": length}}),
        "\n# Ranks: pipeline stages x tensor parallelism x replicas. Steps and batch are a beginning, not advice.\n",
        _yaml({"parallel": {"pp": 1, "tp": 1, "dp": 1}}),
        _yaml({"train": {"steps": 1000, "global_batch": 32, "micro_batch": 1, "precision": manifest.precision}}),
        "\n# Warm-up, stable, cooldown. The peak is a third of what a fresh model takes: Adam's moments begin anew.\n",
        _yaml({"optimizer": {"lr": 1e-4}}),
        _yaml({"schedule": {"kind": "trapezoid", "warmup_steps": 50, "cooldown": 0.15}}),
        _yaml({"validation": {"every": 100}, "checkpoint": {"every": 250}}),
        "\n# To grow it: a larger depth, and growth: {operator: lidas, block: 4, start: "
        f"{manifest.plan.layers}}}; to loop it late: depth_events.\n",
    ]
    return "".join(parts)


def _tokenizer(path: Path, manifest: Manifest) -> str:
    """What ``megaloop prep --tokenizer`` takes: the checkpoint, which has its tokenizer, if it has one."""
    return "TOKENIZER, that of the model" if manifest.tokenizer is None else shlex.quote(printable(path, 1000))


def _comment(text: str) -> str:
    return f"# {text}\n"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def _name(path: Path) -> str:
    """What the run may be called: after the checkpoint, or after the run that saved it."""
    base = path.parent.parent.name if is_step_name(path.name) and path.parent.name == "checkpoints" else path.name
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', base)[:100] or 'run'}-continued"
