"""The ranks of torchrun, which train one model together: what they exchange, and the sum of their gradients.

Guarantees: all ranks do the same exchanges in the same order, whatever their parts of a batch hold. If a rank is lost,
the others get an error: at once if its connection closed, else after `timeout_s`.
Try: `torchrun --nproc-per-node 2 -m stillhouse.cli train CONFIG`.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ...data.errors import StillhouseError, UsageError

T = TypeVar("T")
BUCKET_BYTES = 25 << 20
RESUME = "repeat the command to resume from the last checkpoint"


class RankError(StillhouseError):
    """Another rank stopped, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among the `size` that train together, and the same on this machine (`local`).

    A single process exchanges nothing.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, by rank. It is a small Python value."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _rank_errors():
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return every rank's first `counts[rank]` rows of a tensor [M, …]. All dimensions but the first agree."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        own = counts[self.rank]
        padded[:own] = rows[:own]
        parts = [torch.empty_like(padded) for _ in counts]
        with _rank_errors():
            dist.all_gather(parts, padded)
        return [part[:n] for part, n in zip(parts, counts, strict=True)]

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0, and return its value on all ranks. If it raises, the other ranks raise RankError."""
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]  # the value, or the exit code of a failure
        failure: StillhouseError | None = None
        if self.first:
            try:
                message[0] = make()
            except StillhouseError as e:
                failure, message[1] = e, e.exit_code
        with _rank_errors():
            dist.broadcast_object_list(message, src=0)
        value, exit_code = message
        if exit_code is None:
            return value
        if failure is None:
            failure = RankError(f"rank {self.rank} stops, for the reason that rank 0 reports")
            failure.exit_code = exit_code
        raise failure

    def tensors_from_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return rank 0's tensors on the CPU of all ranks. The other ranks pass None."""
        tensors = dict(tensors or {})
        if self.size == 1:
            return tensors
        shapes = self.from_first(lambda: [(k, v.shape, v.dtype) for k, v in tensors.items()])
        with _rank_errors():
            for name, shape, dtype in shapes:
                tensors[name] = tensors[name].cpu().contiguous() if self.first else torch.empty(shape, dtype=dtype)
                dist.broadcast(tensors[name], src=0)
        return tensors

    def refuse_unlike(self, what: Mapping[str, Any]) -> None:
        """Raise RankError on every rank if some value differs between ranks. It names the values."""
        first, *others = self.gather(dict(what))
        for rank, other in enumerate(others, start=1):
            differ = [f"{k} ({value} and {other.get(k)})" for k, value in first.items() if value != other.get(k)]
            if differ:
                raise RankError(
                    f"ranks 0 and {rank} differ in {', '.join(differ)}",
                    expected="the same settings and the same files on every rank",
                    remedy="copy the corpus, the features, the units and the stores to every machine",
                )


ALONE = Ranks()


@contextmanager
def joined(backend: str = "auto", timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Connect with the other processes that torchrun started, or yield ALONE if it started none.

    With the backend "nccl", which "auto" chooses if there is CUDA, gradients on CUDA use nccl and the rest uses gloo.
    A rank waits `timeout_s` for the others. Raises RankError if they cannot be reached.
    """
    ranks = _from_environment(os.environ)
    if ranks.size == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if backend == "nccl" and not (cuda and dist.is_nccl_available()):
        raise UsageError("run.backend=nccl needs CUDA, which is not available", remedy="set run.backend=gloo")
    backends = "gloo" if backend == "gloo" or not cuda else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backends, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as e:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"rank {ranks.rank} of {ranks.size} cannot reach the others: {_short(e)}",
            where=address,
            remedy="start all ranks with torchrun, and check that this address can be reached",
        ) from None
    try:
        yield ranks
    except BaseException as e:
        # The others wait for this rank, and only its end shows them that it is lost, so it must end at once.
        atexit.register(_leave, 130 if isinstance(e, KeyboardInterrupt) else getattr(e, "exit_code", 1))
        raise
    dist.destroy_process_group()


def _leave(code: int) -> None:
    """End at once, because gloo may take seconds, or for ever, to close a process group without its other end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _from_environment(environment: Mapping[str, str]) -> Ranks:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ALONE

    def wrong(what: str) -> UsageError:
        remedy = "start it with torchrun, which sets them, or unset RANK and WORLD_SIZE to train in one process"
        return UsageError(what, where="environment", remedy=remedy)

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {k: environment[k] for k in names if k in environment}
    try:
        numbers = {k: int(v) for k, v in given.items()}
    except ValueError:
        raise wrong(f"these must be whole numbers: {given}") from None
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise wrong(f"RANK={rank} does not fit WORLD_SIZE={size}")
    if size == 1:
        return ALONE
    absent = [k for k in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(k)]
    if absent:
        raise wrong(f"RANK and WORLD_SIZE are set, but not {' and '.join(absent)}")
    return Ranks(rank, size, numbers.get("LOCAL_RANK", rank), numbers.get("LOCAL_WORLD_SIZE", size))


class GradientSum:
    """Sums the gradients of `parameters` over all ranks while the backward pass still runs.

    Gradients lie in flat buckets. The ranks sum the buckets in one fixed order, each as soon as it and those before it
    are complete. A parameter that a rank's batch does not use has a gradient of 0 there, so that no rank waits for it.
    """

    def __init__(self, parameters: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.buckets: list[Tensor] = []
        self.sizes: list[int] = []  # the number of parameters in each bucket
        group: list[Tensor] = []
        last_first = [*reversed(parameters)]  # roughly the order of the backward pass
        for p, after in zip_longest(last_first, last_first[1:]):
            group.append(p)
            full = sum(q.nbytes for q in group) >= bucket_bytes
            if after is None or full or (after.dtype, after.device) != (p.dtype, p.device):
                self._add(group)
                group = []
        self.zero()

    def _add(self, group: list[Tensor]) -> None:
        bucket = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device)
        for p, gradient in zip(group, bucket.split([p.numel() for p in group])):
            p.grad = gradient.view(p.shape)
            p.register_post_accumulate_grad_hook(partial(self._ready, len(self.buckets)))
        self.buckets.append(bucket)
        self.sizes.append(len(group))

    def zero(self) -> None:
        """Set all gradients to 0. Call it before each backward pass, instead of the optimiser's zero_grad."""
        for bucket in self.buckets:
            bucket.zero_()
        self.missing = list(self.sizes)
        self.works: list[Any] = []

    def _ready(self, number: int, _: Tensor) -> None:
        self.missing[number] -= 1
        while len(self.works) < len(self.buckets) and not self.missing[len(self.works)]:
            self._send()

    def _send(self) -> None:
        with _rank_errors():
            self.works.append(dist.all_reduce(self.buckets[len(self.works)], async_op=True))

    def finish(self) -> None:
        """Wait, after the backward pass, until every `grad` is the sum over the ranks."""
        while len(self.works) < len(self.buckets):
            self._send()
        with _rank_errors():
            for work in self.works:
                work.wait()


@contextmanager
def _rank_errors() -> Iterator[None]:
    """Raise RankError for torch's error about a lost rank."""
    try:
        yield
    except RuntimeError as e:
        raise RankError(
            f"another rank is lost or does not answer: {_short(e)}", remedy=f"look at its messages, then {RESUME}"
        ) from None


def _short(e: Exception) -> str:
    return str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
