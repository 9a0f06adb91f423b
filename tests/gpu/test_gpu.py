"""What only shows on a GPU; deselected where there is none. ``tools/gpu_check.sh`` runs these."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.model import Decoder, choose_kernels, vocab_parallel_cross_entropy

pytestmark = pytest.mark.gpu
SHAPE = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 512}


def _decoder(document_masking: bool = False) -> Decoder:
    model = Decoder(ModelConfig(**SHAPE, document_masking=document_masking), 1024, DepthPlan.plain(4))  # type: ignore[arg-type]
    model.initialise(0)
    return model


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 1024, (4, 257), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _loss_and_gradient(model: Decoder, documents: torch.Tensor | None = None) -> tuple[float, torch.Tensor]:
    inputs, targets = (x.to(model.device) for x in _batch())
    loss = vocab_parallel_cross_entropy(model(inputs, documents), targets, model.tp)
    loss.backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    return float(loss.detach()), gradient.float().cpu()


@pytest.mark.parametrize("masking", [False, True])
def test_fp32_on_the_gpu_is_fp32_on_the_cpu(masking: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    documents = (torch.arange(256, dtype=torch.int32) // 50).expand(4, 256).contiguous() if masking else None
    cpu = _loss_and_gradient(_decoder(masking), documents)
    gpu = _loss_and_gradient(_decoder(masking).cuda(), documents.cuda() if documents is not None else None)
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-5)
    assert torch.allclose(gpu[1], cpu[1], atol=1e-6, rtol=1e-3)


def test_bf16_with_the_chosen_kernels_is_close_to_fp32() -> None:
    kernels = choose_kernels(torch.device("cuda"), torch.bfloat16)
    fp32 = _decoder()
    bf16 = Decoder(fp32.config, 1024, fp32.plan, kernels=kernels)
    bf16.load_state_dict(fp32.state_dict())
    assert _loss_and_gradient(bf16.cuda().bfloat16())[0] == pytest.approx(_loss_and_gradient(fp32.cuda())[0], rel=1e-2)


def test_compiled_layers_give_the_same_loss() -> None:
    eager = _decoder().cuda()
    compiled = copy.deepcopy(eager)
    compiled.compile_layers()
    assert _loss_and_gradient(compiled)[0] == pytest.approx(_loss_and_gradient(eager)[0], rel=1e-5)


def test_one_rank_trains_on_the_gpu() -> None:
    from megaloop.bench.step import bench_step

    result = bench_step("tiny", precision="bf16", batch=4, sequence_length=256, steps=2, rounds=1)
    assert result.ours_loss < 8.5
    assert result.ours > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_growth_in_flight_keeps_every_bit(precision: str) -> None:
    code = (
        "from launchers.local import single_rank\n"
        "from launchers.rank import open_store\n"
        "from tests.parallel.layouts import configuration\n"
        "from tests.parallel.morphing import compare_bits\n"
        "with single_rank():\n"
        "    store = open_store()\n"
        f"    values = configuration(train__precision={precision!r})\n"
        "    compared, differing = compare_bits(values, (1, 1, 1), (1, 1, 1))\n"
        "assert sum(compared.values()) > 0 and differing == [], differing\n"
        "import os; os._exit(0)\n"  # the process group is left as it is
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
