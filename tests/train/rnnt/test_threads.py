"""Threads and processes: the same bits for any number of threads, forked workers, what a thread raises, start time."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading as python_threads

import pytest
import torch

from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint
from stillhouse.train.rnnt.cpu import threads


def problem():
    g = torch.Generator().manual_seed(0)
    B, T, U, V, H = 3, 40, 12, 300, 24
    parts = [torch.randn(*s, generator=g) for s in ((B, T, H), (B, U + 1, H), (V, H), (V,))]
    targets = torch.randint(0, V - 1, (B, U), generator=g)
    return parts, (targets, torch.tensor([40, 31, 17]), torch.tensor([12, 3, 9]))


def both_losses():
    parts, rest = problem()
    parts = [v.clone().requires_grad_() for v in parts]
    logits = (torch.tanh(parts[0][:, :, None] + parts[1][:, None]) @ parts[2].t()).detach().requires_grad_()
    rnnt_loss(logits, *rest).backward()
    rnnt_loss_joint(*parts, *rest).backward()
    return [logits.grad] + [v.grad for v in parts]


@pytest.fixture
def thread_setting():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "plain threads"])
def way(request, monkeypatch):
    """Use each of the two kinds of threads, however busy the machine is."""
    monkeypatch.setattr(threads, "LATE", float("inf"))
    monkeypatch.setattr(threads, "_away", 0)
    if request.param == "plain threads":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch is not linked with an OpenMP library that can be called")
    return request.param


def test_bits_repeat(thread_setting, way):
    for count in (1, 2, 5):
        thread_setting(count)
        runs = [both_losses() for _ in range(3)]
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_rows_do_not_depend_on_the_number_of_threads(thread_setting, way):
    logits = torch.randn(3, 60, 13, 300, generator=torch.Generator().manual_seed(1))
    _, rest = problem()
    results = []
    for count in (1, 2, 7):
        thread_setting(count)
        x = logits.clone().requires_grad_()
        loss = rnnt_loss(x, *rest, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_late_threads_are_left_alone_for_a_while(thread_setting, monkeypatch):
    if threads._openmp() is None:
        pytest.skip("torch is not linked with an OpenMP library that can be called")
    monkeypatch.setattr(threads, "_away", 0)
    monkeypatch.setattr(threads, "_times_late", 0)
    monkeypatch.setattr(threads, "LATE", -1.0)  # Every thread is always late.

    def calls_until_openmp():
        count = 0
        while not threads._with_openmp(threads._Job(int, 2, ())):
            count += 1
        return count

    assert [calls_until_openmp() for _ in range(4)] == [0, 32, 64, 128]
    monkeypatch.setattr(threads, "LATE", float("inf"))
    assert [calls_until_openmp() for _ in range(3)] == [256, 0, 0]


def test_thread_settings_survive(thread_setting, way):
    thread_setting(3)
    both_losses()
    assert torch.get_num_threads() == 3


def _child(queue):
    assert threads.thread_count() == 1
    queue.put([v.numpy() for v in both_losses()])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_worker():
    both_losses()  # the parent has its threads by now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,), daemon=True)
    process.start()
    found = queue.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0
    for a, b in zip(found, both_losses()):
        torch.testing.assert_close(torch.from_numpy(a), b)


def test_two_callers_at_once(way):
    expected = both_losses()
    results = []
    callers = [python_threads.Thread(target=lambda: results.append(both_losses())) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 3
    for result in results:
        for a, b in zip(result, expected):
            torch.testing.assert_close(a, b)


def test_an_error_in_a_thread_is_raised(way):
    def fail(index):
        if index == 1:
            raise ValueError("from thread 1")

    with pytest.raises(ValueError, match="from thread 1"):
        threads.run(fail, 2)
    done = []
    threads.run(done.append, 3)
    assert sorted(done) == [0, 1, 2]


SCRIPT = """
import time, sys, torch, numpy
begin = time.process_time()
from stillhouse.train.rnnt import precompile
imported = time.process_time() - begin
assert "numba" not in sys.modules and "transformers" not in sys.modules
precompile()
print(imported, time.process_time() - begin - imported)
others = [m for m in sys.modules if m.startswith("stillhouse") and not m.startswith("stillhouse.train.rnnt")]
shared = {"stillhouse", "stillhouse.train", "stillhouse.extract", "stillhouse.extract.cpu_matmul"}
assert set(others) <= shared, others
"""


def test_import_and_cached_start_are_fast():
    """Import < 0.5 s, start from the cache < 1 s; of CPU, since other tests may keep the machine busy."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_DISABLE")}
    best = [9.0, 99.0]
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True, timeout=120
        )
        best = [min(a, float(b)) for a, b in zip(best, run.stdout.split())]
        if best[0] < 0.5 and best[1] < 1.0:
            break
    assert best[0] < 0.5
    assert best[1] < 1.0
