"""The one place that imports MosaicML-Streaming: its MDS shard format, without its vision and text extras.

``import streaming`` runs ``streaming/__init__.py``, which imports torchvision: beside a CPU build of torch the torchvision that
pip resolves fails on import. ``streaming/base/__init__.py`` imports transformers, which takes two seconds of every rank's
start. The format alone needs neither, but Python runs a package's ``__init__`` before its submodules. So empty packages of
their names stand in for both, with the real packages' paths. Where somebody has imported the real one before, it stays.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

__all__ = ["mds_reader", "mds_writer"]


def _base(module: str) -> Any:
    if "streaming" not in sys.modules:
        for name in ("streaming", "streaming.base"):
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            package = types.ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations or ())
            package.__spec__ = spec
            sys.modules[name] = package
    return importlib.import_module(f"streaming.base.{module}")


def mds_writer() -> Any:
    """``streaming.base.format.mds.writer.MDSWriter``."""
    return _base("format.mds.writer").MDSWriter


def mds_reader() -> Any:
    """``streaming.base.format.mds.reader.MDSReader``."""
    return _base("format.mds.reader").MDSReader
