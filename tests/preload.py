"""What the server of :mod:`tests.processes` imports once, so that no rank and no command has to."""

from __future__ import annotations

import importlib
import logging

from megaloop.data.streaming_base import mds_reader, mds_writer

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

_MODULES = (
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed asks for it when an engine is built; it imports torch's compiler
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.module_inject.auto_ep_layer",
    "launchers.local",
    "megaloop.bench.checkpoint",
    "megaloop.bench.contenders",
    "megaloop.bench.reshard",
    "megaloop.bench.rounds",
    "megaloop.bench.savings",
    "megaloop.bench.tied",
    "megaloop.cli.main",
    "megaloop.evaluation.evaluate",
    "megaloop.evaluation.harness",
    "megaloop.inference",
    "megaloop.parallel.pipeline",
    "megaloop.report",
    "megaloop.runs.doctor",
    "megaloop.train.loop",
    "megaloop.plan.preview",
    "megaloop.runs.status",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "sentencepiece",
    "tests.distributed",
    "torch.utils.tensorboard",
)

for _module in _MODULES:
    importlib.import_module(_module)
mds_reader()
mds_writer()
