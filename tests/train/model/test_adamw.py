"""The CPU's AdamW equals torch's to the bit, and does not import torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from stillhouse.train.model.adamw import CpuAdamW


def test_bits_of_torch() -> None:
    """Two groups with learning rates that change, and a parameter that has no gradient at first."""
    shapes = [(3, 5), (7,), (2, 2)]

    def made() -> tuple[list[torch.Tensor], list[dict]]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.randn(*s, generator=generator).requires_grad_() for s in shapes]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
        return parameters, groups

    found = []
    for kind, options in ((CpuAdamW, {}), (torch.optim.AdamW, {"fused": True})):
        parameters, groups = made()
        optimiser = kind(groups, lr=1e-2, betas=(0.9, 0.98), **options)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            optimiser.zero_grad()
            assert all(p.grad is None for p in parameters)
            for number, p in enumerate(parameters):
                grad = torch.randn(p.shape, generator=generator)
                if number < 2 or step > 2:
                    p.grad = grad
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimiser.step()
        found.append((parameters, [optimiser.state[p] for p in parameters]))
    (ours, our_states), (theirs, their_states) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(our_states, their_states, strict=True):
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_zeroed_gradients_stay() -> None:
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    CpuAdamW([{"params": [p], "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.98)).zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0.0, 0.0]


def test_a_run_does_not_load_torchs_compiler() -> None:
    code = """
import sys, torch
from stillhouse.train.config import Config
from stillhouse.train.loop.objective import gradient_norm
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model.build import build_model, build_optimiser
model = {"dim": 8, "layers": 1, "heads": 2, "inner": 8, "predictor_dim": 8, "joint_dim": 8}
config = Config.model_validate({"data": dict.fromkeys(["corpus", "features", "units"], "x"), "model": model})
network = build_model(config, 5)
optimiser = build_optimiser(network.parameters(), config, torch.device("cpu"))
optimiser.zero_grad(set_to_none=True)
network.encoder(torch.randn(1, 8, 80), torch.tensor([8]))[0].sum().backward()
given = [p for p in network.parameters() if p.grad is not None]
torch.nn.utils.clip_grads_with_norm_(given, 1.0, gradient_norm(given))
optimiser.step()
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
