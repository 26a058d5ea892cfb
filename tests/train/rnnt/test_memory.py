"""The memory of a large gradient is used again, never while anything of the gradient lives."""

from __future__ import annotations

import os

import torch

from stillhouse.train.rnnt import rnnt_loss
from stillhouse.train.rnnt.cpu import memory


def gradient(seed: int, T: int = 40) -> torch.Tensor:
    x = torch.randn(2, T, 21, 1024, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    lengths = torch.tensor([T, T // 2]).int(), torch.tensor([20, 3]).int()
    rnnt_loss(x, torch.ones(2, 20).int(), *lengths, reduction="sum").backward()
    assert x.grad is not None
    return x.grad


def test_next_gradient_has_memory_of_the_last():
    memory.release()
    first = gradient(0)
    place, values = first.data_ptr(), first.clone()
    assert place % memory.HUGE == 0
    del first
    other = gradient(1, T=44)  # a little larger
    assert other.data_ptr() == place
    assert torch.all(other[1, 22:] == 0) and torch.all(other[1, :22, 4:] == 0)  # Padding is cleared.
    del other
    again = gradient(0)
    assert again.data_ptr() == place and torch.equal(again, values)


def test_memory_in_use_is_not_given_twice():
    memory.release()
    first = gradient(0)
    place, values = first.data_ptr(), first.clone()
    part = first[1, :2].numpy()
    del first
    other = gradient(1)
    assert other.data_ptr() != place
    assert torch.equal(torch.from_numpy(part), values[1, :2])
    del part
    assert gradient(2).data_ptr() == place


def test_larger_block_waits_and_smaller_gradient_takes_it():
    memory.release()
    large, small = gradient(0, T=120), gradient(1)
    place = large.data_ptr()
    del large, small
    assert len(memory._waiting) == 1
    assert gradient(1).data_ptr() == place


def test_forked_process_has_memory_of_its_own():
    memory.release()
    gradient(0)
    pid = os.fork()
    if pid == 0:
        os._exit(1 if memory._waiting else 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(memory._waiting) == 1


def test_small_gradient_is_left_to_torch():
    memory.release()
    x = torch.randn(1, 4, 3, 8).requires_grad_()
    rnnt_loss(x, torch.ones(1, 2).int(), torch.tensor([4]).int(), torch.tensor([2]).int()).backward()
    assert not memory._lent and not memory._waiting
