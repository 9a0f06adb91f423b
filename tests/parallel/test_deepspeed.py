"""The contract with DeepSpeed: each private name that the seam uses, with its signature, and that nobody else uses any.

A version of DeepSpeed that renamed or changed one of them fails here, by name. docs/DEEPSPEED.md says what to do then.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology, ProcessTopology
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment
from packaging.requirements import Requirement

from megaloop.config import Config
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel import deepspeed as seam
from megaloop.parallel.engine import TrainingEngine, join_ranks
from tests.distributed import RankPool
from tests.parallel.layouts import LR, VOCAB, configuration, inner_engine, micro_batches

ROOT = Path(seam.__file__).parents[2]

SIGNATURES: dict[Callable[..., Any], str] = {
    # private methods that the seam calls
    PipelineEngine._exec_reduce_tied_grads: "(self)",
    PipelineEngine._exec_reduce_grads: "(self)",
    PipelineEngine._exec_optimizer_step: "(self, lr_kwargs=None)",
    PipelineModule._set_bounds: "(self, start=None, stop=None)",
    BF16_Optimizer._lazy_init_hp_params_optimizer_state: "(self)",
    DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state: "(self)",
    # private methods that the seam replaces
    PipelineModule._partition_layers: "(self, method='uniform')",
    PipelineModule._build: "(self)",
    # methods without an underscore that no documentation promises
    PipelineModule.get_tied_weights_and_groups: "(self)",
    PipelineEngine.get_global_grad_norm: "(self) -> Optional[float]",
    PipelineEngine.was_step_applied: "(self) -> bool",
    PipelineEngine.destroy: "(self)",
    BF16_Optimizer.clear_lp_grads: "(self, set_to_none=False)",
    BF16_Optimizer.update_hp_grads: "(self, clear_lp_grads=False)",
    PipelineParallelGrid.get_data_parallel_group: "(self)",
    PipelineParallelGrid.get_pipe_parallel_group: "(self)",
    PipelineParallelGrid.get_slice_parallel_group: "(self)",
    ProcessTopology.get_coord: "(self, rank)",
    tensor_fragment.get_hp_fragment: "(self, optim_state_key=None)",
    comm.destroy_process_group: "(group: Optional[Any] = None) -> None",
    p2p.send: "(tensor, dest_stage, async_op=False)",
}

PARAMETERS: dict[Callable[..., Any], set[str]] = {
    deepspeed.initialize: {"model", "optimizer", "config"},
    deepspeed.init_distributed: {"dist_backend", "auto_mpi_discovery", "verbose", "timeout"},
    PipelineModule.__init__: {"layers", "topology", "loss_fn"},
    PipelineEngine.train_batch: {"data_iter"},
    LayerSpec.__init__: {"typename", "module_args"},
    TiedLayerSpec.__init__: {"key", "typename", "module_args", "forward_fn", "tied_weight_attr"},
    PipeModelDataParallelTopology.__init__: {"num_pp", "num_mp", "num_dp"},
}
"""Public functions, and the parameters by which the seam calls them."""

ATTRIBUTES = {
    "engine": ["grid", "loss", "module", "optimizer", "pipe_buffers", "using_bf16_optimizer",
               "_running_engine_backward"],
    "module": ["forward_funcs", "global_rank", "num_stages", "parts", "tied_modules", "tied_weight_attrs", "_grid",
               "_local_start", "_local_stop", "_topo"],
    "optimizer": ["optimizer", "nccl_start_alignment_factor", "_hp_optimizer_states_linked"],
    "parameter": ["ds_pipe_replicated", "_hp_mapping"],
}  # fmt: skip
"""What instances have once an engine is built: the first three of DeepSpeed's, and what it hangs on parameters."""

OURS = {"_cuts", "_make", "_stage_number"}
"""Attributes with an underscore that the seam adds."""

UNMISTAKABLE = {
    *(function.__name__ for function in SIGNATURES), *(name for names in ATTRIBUTES.values() for name in names),
    "tensor_model_parallel", "lp_fragment_address", "optim_fragment", "__compatible_ops__",
} - {"_build", "send", "destroy", "destroy_process_group", "grid", "loss", "module", "optimizer", "parts"}  # fmt: skip
"""Names that only DeepSpeed can be meant by, wherever they stand."""


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@pytest.mark.parametrize(("function", "signature"), SIGNATURES.items(), ids=map(_name, SIGNATURES))
def test_a_function_has_the_signature_that_the_seam_counts_on(function: Callable[..., Any], signature: str) -> None:
    assert str(inspect.signature(function)) == signature


@pytest.mark.parametrize(("function", "names"), PARAMETERS.items(), ids=map(_name, PARAMETERS))
def test_a_function_has_the_parameters_that_the_seam_names(function: Callable[..., Any], names: set[str]) -> None:
    assert names <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("optimizer", [BF16_Optimizer, DeepSpeedZeroOptimizer])
def test_the_size_of_shares_is_set_in_the_constructor_and_read_afterwards(optimizer: type) -> None:
    """The seam makes it a property, which keeps its own value: there must be one place that sets it."""
    source = inspect.getsource(optimizer)
    assert source.count("nccl_start_alignment_factor = ") == 1
    assert "self.nccl_start_alignment_factor = 2" in inspect.getsource(optimizer.__init__)  # type: ignore[misc]


def test_the_ops_that_fit_this_machine_are_found_out_on_demand() -> None:
    """The seam says that none do; a version that finds out while it is imported would compile one for half a minute."""
    assert "__compatible_ops__" in inspect.getsource(deepspeed.ops.__getattr__)


def test_marks_on_parameters_are_read_by_these_names() -> None:
    assert PIPE_REPLICATED == "ds_pipe_replicated"
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert not is_model_parallel_parameter(parameter)
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    assert is_model_parallel_parameter(parameter)
    assert {"start", "numel"} <= set(fragment_address.__dataclass_fields__)
    assert {"lp_fragment_address", "optim_fragment"} <= set(tensor_fragment.__dataclass_fields__)


def missing_attributes(values: dict[str, Any]) -> list[str]:
    """Of an engine that has trained a step: what the seam counts on and does not find."""
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    engine.train_step(micro_batches(config, engine.coordinate.dp, topology.dp), LR)
    inner = inner_engine(engine)
    holders = {
        "engine": inner, "module": inner.module, "optimizer": inner.optimizer, "parameter": engine.parameters[0].parameter,
    }  # fmt: skip
    missing = [
        f"{what}.{name}" for what, names in ATTRIBUTES.items() for name in names if not hasattr(holders[what], name)
    ]
    if inner.using_bf16_optimizer != (config.train.precision == "bf16"):
        missing.append("BF16_Optimizer for bf16, ZeRO's for fp32")
    if not isinstance(inner.optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer):
        missing.append(f"{type(inner.optimizer).__name__} is neither of the optimizers that the seam knows")
    engine.close()
    return missing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_built_engine_has_the_attributes_that_the_seam_touches(ranks_2: RankPool, precision: str) -> None:
    assert ranks_2.run(missing_attributes, configuration(2, 1, 1, train__precision=precision)) == [[], []]


def test_this_file_names_all_that_is_private_in_the_seam() -> None:
    tree = ast.parse(Path(seam.__file__).read_text(encoding="utf-8"))
    defined = {item.name for item in ast.walk(tree) if isinstance(item, ast.FunctionDef | ast.ClassDef)}
    used = {item.attr for item in ast.walk(tree) if isinstance(item, ast.Attribute) and item.attr.startswith("_")}
    used = {name for name in used if not name.endswith("__")} - OURS - (defined - {"_partition_layers", "_build"})
    asserted = {function.__name__ for function in SIGNATURES} | {
        name for names in ATTRIBUTES.values() for name in names
    }
    assert used - asserted == set()


def _packages() -> Iterator[Path]:
    for package in ("megaloop", "launchers", "data_prep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path != Path(seam.__file__):
                yield path


def _offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case _:
                modules = []
        yield from (f"imports {module}" for module in modules if module.split(".")[0] == "deepspeed")
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.Constant(value=str(name)) if name in UNMISTAKABLE:
                yield f"mentions {name}"


def test_no_other_file_imports_deepspeed_or_touches_its_private_names() -> None:
    found = {
        str(path.relative_to(ROOT)): offences
        for path in _packages()
        if (offences := list(_offences(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("def f():\n    from deepspeed.pipe import LayerSpec", "imports deepspeed.pipe"),
        ("import deepspeed.ops as ops", "imports deepspeed.ops"),
        ("engine._exec_reduce_grads()", "mentions _exec_reduce_grads"),
        ("getattr(parameter, '_hp_mapping', None)", "mentions _hp_mapping"),
    ],
)
def test_an_offence_would_be_found(source: str, offence: str) -> None:
    assert list(_offences(ast.parse(source))) == [offence]
    assert list(_offences(ast.parse("from megaloop.parallel.deepspeed import open_engine"))) == []


def test_the_installed_version_is_within_the_bound_of_the_package() -> None:
    line = re.search(r'"(deepspeed[^"]*)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert line is not None
    bound = Requirement(line.group(1)).specifier
    installed = version("deepspeed").split("+")[0]
    assert installed in bound
    assert any(item.operator in ("<", "<=", "==", "~=") for item in bound), "no upper bound"
    major, minor, patch = (int(part) for part in installed.split(".")[:3])
    assert f"{major}.{minor}.{patch + 1}" not in bound, "private names may change with any release"
