"""Several processes train one model: torchrun's ranks, what they tell each other, the sum of their gradients.

Invariant: what the ranks do together, they all do, in the same order, whatever a rank's part of a batch holds; and
who waits for a rank that is gone gets an error, at once where its connection closed, else after `timeout_s`.
Exercised by `torchrun --nproc-per-node 2 -m stillhouse.cli train CONFIG`; pytest tests/train/run/test_ranks.py.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ...data.errors import StillhouseError, UsageError

T = TypeVar("T")
BUCKET_BYTES = 25 << 20


class RankError(StillhouseError):
    """Another rank stopped, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, everything here is free.

    rank, size          of this process, and how many there are
    local, local_size   the same on this machine
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank. Small Python values."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _listening():
            dist.all_gather_object(found, value)
        return found

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every rank's first `counts[rank]` rows of a tensor [M, …] of which all dimensions but the first agree."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        own = counts[self.rank]
        padded[:own] = rows[:own]
        found = [torch.empty_like(padded) for _ in counts]
        with _listening():
            dist.all_gather(found, padded)
        return [part[:n] for part, n in zip(found, counts, strict=True)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, everywhere; where it raises, rank 0 raises that and the others RankError."""
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]
        failure: StillhouseError | None = None
        if self.first:
            try:
                message = [make(), None]
            except StillhouseError as e:
                failure, message = e, [None, e.exit_code]
        with _listening():
            dist.broadcast_object_list(message, src=0)
        if failure is not None:
            raise failure
        if message[1] is not None:
            stopped = RankError(f"rank {self.rank} stops: rank 0 says why")
            stopped.exit_code = message[1]
            raise stopped
        return message[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, on the CPU, everywhere; the other ranks give None."""
        if self.size == 1:
            return dict(tensors or {})
        shapes = self.from_first(lambda: [(k, v.shape, v.dtype) for k, v in (tensors or {}).items()])
        found: dict[str, Tensor] = {}
        with _listening():
            for name, shape, dtype in shapes:
                own = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name].cpu().contiguous()
                dist.broadcast(own, src=0)
                found[name] = own
        return found

    def refuse_unlike(self, what: Mapping[str, Any]) -> None:
        """Raises RankError, on every rank, naming which of `what` differs between ranks."""
        theirs = self.gather(dict(what))
        for rank, other in enumerate(theirs):
            differ = [f"{k} ({theirs[0].get(k)} and {other.get(k)})" for k in theirs[0] if theirs[0][k] != other.get(k)]
            if differ:
                raise RankError(
                    f"ranks 0 and {rank} differ in {', '.join(differ)}",
                    expected="the same settings and the same files on every rank",
                    remedy="copy the corpus, the features, the units and the stores to every machine",
                )


ALONE = Ranks()


@contextmanager
def joined(backend: str = "auto", timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started; ALONE where it started none.

    backend     "gloo", "nccl" (gradients on CUDA; the rest goes over gloo) or "auto": nccl where there is CUDA
    """
    ranks = _from_environment(os.environ)
    if ranks.size == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if backend == "nccl" and not (cuda and dist.is_nccl_available()):
        raise UsageError("run.backend=nccl, but there is no CUDA here", remedy="set run.backend=gloo")
    backends = "gloo" if backend == "gloo" or not cuda else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backends, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as e:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"rank {ranks.rank} of {ranks.size} cannot meet the others: {_short(e)}",
            where=address,
            remedy="start all of them with torchrun, and see that this address can be reached",
        ) from None
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _told_to_stop) if ours else None
    try:
        yield ranks
    except BaseException as e:
        # The others wait for this rank and learn from its end that it is gone: nothing may hold that up
        atexit.register(_leave, 130 if isinstance(e, KeyboardInterrupt) else getattr(e, "exit_code", 1))
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _leave(code: int) -> None:
    """End at once: to take a process group apart whose other end is gone takes gloo seconds, or for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told_to_stop(_: int, __: FrameType | None) -> None:
    raise RankError(
        "stopped by the launcher, as it does where another rank has ended",
        remedy="see which ended first, and why; the same command again goes on from the last checkpoint",
    )


def _from_environment(environment: Mapping[str, str]) -> Ranks:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ALONE
    remedy = "start it with torchrun, which sets them, or unset RANK and WORLD_SIZE to train in one process"
    absent = [k for k in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(k)]
    named = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {k: environment[k] for k in named if k in environment}
    try:
        found = {k: int(v) for k, v in given.items()}
    except ValueError:
        raise UsageError(f"not all whole numbers: {given}", where="environment", remedy=remedy) from None
    rank, size = found["RANK"], found["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank}, WORLD_SIZE={size}", where="environment", remedy=remedy)
    if size == 1:
        return ALONE
    if absent:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(absent)}", where="environment", remedy=remedy
        )
    return Ranks(rank, size, found.get("LOCAL_RANK", rank), found.get("LOCAL_WORLD_SIZE", size))


class GradientSum:
    """Sums the gradients of `parameters` over all ranks while the backward pass still runs.

    Gradients live in flat buckets, which are summed in one fixed order, each as soon as it and those before it are
    whole. What a rank's batch does not use has a gradient of 0 there: no rank ever waits for it.
    """

    def __init__(self, parameters: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.buckets: list[Tensor] = []
        self.sizes: list[int] = []  # parameters in each bucket
        group: list[Tensor] = []
        last_first = list(reversed(parameters))  # about the order in which backward makes gradients
        for i, p in enumerate(last_first):
            group.append(p)
            after = last_first[i + 1] if i + 1 < len(last_first) else None
            full = sum(q.numel() * q.element_size() for q in group) >= bucket_bytes
            if after is None or full or (after.dtype, after.device) != (p.dtype, p.device):
                self._add(group)
                group = []
        self.zero()

    def _add(self, group: list[Tensor]) -> None:
        bucket = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device)
        number, at = len(self.buckets), 0
        for p in group:
            p.grad = bucket[at : at + p.numel()].view(p.shape)
            at += p.numel()
            p.register_post_accumulate_grad_hook(partial(self._ready, number))
        self.buckets.append(bucket)
        self.sizes.append(len(group))

    def zero(self) -> None:
        """Before each backward pass, instead of the optimiser's zero_grad."""
        for bucket in self.buckets:
            bucket.zero_()
        self.missing = list(self.sizes)
        self.works: list[Any] = []

    def _ready(self, number: int, _: Tensor) -> None:
        self.missing[number] -= 1
        while len(self.works) < len(self.buckets) and not self.missing[len(self.works)]:
            self._send()

    def _send(self) -> None:
        with _listening():
            self.works.append(dist.all_reduce(self.buckets[len(self.works)], async_op=True))

    def finish(self) -> None:
        """After the backward pass: on return every `grad` is the sum over the ranks."""
        while len(self.works) < len(self.buckets):
            self._send()
        with _listening():
            for work in self.works:
                work.wait()


@contextmanager
def _listening() -> Iterator[None]:
    """Turns what torch says of a lost peer into an error of ours."""
    try:
        yield
    except RuntimeError as e:
        raise RankError(
            f"another rank is gone or does not answer: {_short(e)}",
            remedy="see what it said; the same command again goes on from the last checkpoint",
        ) from None


def _short(e: Exception) -> str:
    return str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
