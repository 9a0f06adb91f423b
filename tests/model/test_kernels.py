"""Which kernels are chosen, and that the optimizer goes on where it was, whatever is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaloop.model import build_adamw, choose_kernels
from megaloop.parallel.state import prime_moments

APEX_ADAM = '''
import torch

class FusedAdam(torch.optim.Optimizer):
    """Counts as apex's does: in its groups, from the first step on."""

    def __init__(self, params, lr, betas, eps, adam_w_mode=True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
'''


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for NVIDIA's apex."""
    for name, text in (("optimizers", APEX_ADAM), ("normalization", "def fused_rms_norm_affine(*args): ...\n")):
        (tmp_path / "apex" / name).mkdir(parents=True)
        (tmp_path / "apex" / name / "__init__.py").write_text(text)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def _adam(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    return build_adamw([{"params": [parameter], "weight_decay": 0.1}], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def test_a_resumed_optimizer_counts_on_where_apex_is_installed(apex: None) -> None:
    """apex's Adam would begin at 1 again after a resume or a growth: with old moments, a first update 2.2 times too large."""
    assert choose_kernels(torch.device("cuda"), torch.float32).norm == "apex", "its norm is used"
    assert choose_kernels(torch.device("cuda"), torch.float32, compiled=True).norm == "torch"
    through, again = (torch.nn.Parameter(torch.ones(64)) for _ in range(2))
    gradients = torch.randn(11, 64, generator=torch.Generator().manual_seed(0))
    optimizer = _adam(through)
    for gradient in gradients[:10]:
        through.grad = gradient
        optimizer.step()
    with torch.no_grad():
        again.copy_(through)
    resumed = _adam(again)
    prime_moments(resumed, 10)
    for moment in ("exp_avg", "exp_avg_sq"):
        resumed.state[again][moment].copy_(optimizer.state[through][moment])
    for parameter, item in ((through, optimizer), (again, resumed)):
        parameter.grad = gradients[10]
        item.step()
    assert torch.equal(through, again)
