"""Checkpoints: whole or absent, checked when read, never unpickled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.data.errors import CheckpointError
from stillhouse.train import checkpoint


def save(folder: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, {"step": step}, {"model": {"w": torch.full((3,), float(step))}})


def test_round_trip_and_newest(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save(tmp_path, step)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 100
    assert torch.equal(found.tensors("model")["w"], torch.full((3,), 100.0))


def test_what_a_killed_writer_left_is_swept_and_not_read(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / ".step-00000009.123").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5
    checkpoint.sweep(tmp_path, 5)
    assert not list(tmp_path.glob(".step-*")) and checkpoint.checkpoints(tmp_path) == [found.path]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2, best=3)
    assert [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path)] == [3, 5, 6]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, damage: str) -> None:
    found = save(tmp_path, 1)
    path = found.path / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(raw if damage == "flip" else raw[:20])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(damaged|cannot be read)"):
        checkpoint.load(found.path).tensors("model")


@pytest.mark.parametrize("state", ["", "[]", '{"format": 99}', "{"])
def test_a_foreign_state_is_refused(tmp_path: Path, state: str) -> None:
    found = save(tmp_path, 1)
    (found.path / "state.json").write_text(state)
    with pytest.raises(CheckpointError):
        checkpoint.load(found.path)


def test_weights_of_another_model_are_named() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"bias missing.*other unknown.*weight is"):
        checkpoint.load_weights(net, {"weight": torch.zeros(2, 4), "other": torch.zeros(1)}, Path("x"))


def test_optimiser_state_round_trip() -> None:
    torch.manual_seed(0)
    net, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(net.state_dict())
    optimisers = [torch.optim.AdamW(n.parameters(), lr=0.1) for n in (net, twin)]
    x = torch.randn(8, 4)

    def step(n: nn.Module, o: torch.optim.Optimizer) -> None:
        o.zero_grad()
        n(x).square().sum().backward()
        o.step()

    step(net, optimisers[0])
    names = {p: n for n, p in net.named_parameters()}
    saved = {k: v.clone() for k, v in checkpoint.optimiser_tensors(optimisers[0], names).items()}
    twin.load_state_dict(net.state_dict())
    checkpoint.restore_optimiser(optimisers[1], {p: n for n, p in twin.named_parameters()}, saved)
    for n, o in zip((net, twin), optimisers):
        step(n, o)
    assert torch.equal(net.weight, twin.weight)
    with pytest.raises(CheckpointError, match="unknown parameter"):
        checkpoint.restore_optimiser(optimisers[1], {}, saved)
