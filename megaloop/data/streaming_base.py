"""The one place that imports MosaicML-Streaming: its MDS shard format, without its vision and text extras.

``import streaming`` runs ``streaming/__init__.py``, which imports torchvision; beside a CPU build of torch the
torchvision that pip resolves fails on import. ``streaming.base`` alone needs none of it, but Python runs a
package's ``__init__`` before its submodules. So where the real package will not import, an empty one of
its name stands in for it, with the real package's path, and ``streaming.base`` is imported below that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

__all__ = ["mds_reader", "mds_writer"]


def _base(module: str) -> Any:
    try:
        return importlib.import_module(f"streaming.base.{module}")
    except Exception:  # torchvision raises whatever its extension raises
        for name in [name for name in sys.modules if name.partition(".")[0] == "streaming"]:
            del sys.modules[name]
        spec = importlib.util.find_spec("streaming")
        if spec is None:
            raise
        package = types.ModuleType("streaming")
        package.__path__ = list(spec.submodule_search_locations or ())
        package.__spec__ = spec
        sys.modules["streaming"] = package
        return importlib.import_module(f"streaming.base.{module}")


def mds_writer() -> Any:
    """``streaming.base.format.mds.writer.MDSWriter``."""
    return _base("format.mds.writer").MDSWriter


def mds_reader() -> Any:
    """``streaming.base.format.mds.reader.MDSReader``."""
    return _base("format.mds.reader").MDSReader
