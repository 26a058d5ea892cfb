"""SIGTERM and SIGUSR1, by which a scheduler asks a command to stop: it saves what is done and ends with exit code 143.

Guarantees: the first signal never interrupts what is `deferred`, such as a training step or a commit. A later one ends
the process at once, which loses what is not saved and nothing else.
Try: `stillhouse train CONFIG --out RUN`, and `kill -USR1` its process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ..errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler may signal the launcher and its processes, and the launcher passes its own signal on.
SAME_REQUEST_S = 1.0
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
LAUNCHER_ENDS_S = 0.2


class StopNow(BaseException):
    """A signal asked to stop while nothing was going on that must not be interrupted.

    It is no Exception, because libraries catch those.
    """

    exit_code = STOPPED


class StopRequest:
    """A context manager in which the first signal is a request to stop. In threads it changes nothing.

    Outside of `deferred`, the request raises StopNow at once. `signal` is its name, or None. A signal more than a
    second after the first ends the process, with the text `after` on standard error. With `follow_launcher`, the end of
    the process that started this one is a request too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.after = "Repeat the command to resume."
        self.pass_on: Callable[[], None] = lambda: None  # is called at the first signal
        self._asked_s = 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}
        self._launcher: int | None = None  # the process id of the launcher, while it lives

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._before = self.listen()
        return self

    def listen(self) -> dict[int, Any]:
        """Take the signals, also from a library that has taken them since, and return the handlers before."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def follow_launcher(self) -> None:
        """Have Linux send SIGTERM when the launcher ends, for example by a signal that it does not pass on.

        Other systems leave this process running then.
        """
        if sys.platform == "linux":
            self._launcher = os.getppid()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = getattr(error, "exit_code", None) == STOPPED
        for number, handler in self._before.items():
            # A process that ends with a request behind it ends by its own code, whatever the launcher sends now.
            signal.signal(number, signal.SIG_IGN if stopped else handler)

    def _has_lost_launcher(self) -> bool:
        """Whether the launcher has ended. Its threads end one by one, and Linux signals at the first of them."""
        deadline = time.monotonic() + LAUNCHER_ENDS_S
        while self._launcher is not None and time.monotonic() < deadline:
            if os.getppid() != self._launcher:
                return True
            time.sleep(0.001)
        return False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        orphaned = number == signal.SIGTERM and self._has_lost_launcher()
        if orphaned:
            self._launcher = None
        if self.signal is None:
            self.signal = "the end of its launcher" if orphaned else signal.Signals(number).name
            self._asked_s = now
            self.pass_on()
            if not self._deferred:
                raise StopNow
        elif now - self._asked_s > SAME_REQUEST_S and not orphaned:
            os.write(2, f"stopped at once by {signal.Signals(number).name}. {self.after}\n".encode())
            os._exit(STOPPED)

    @contextmanager
    def deferred(self, yes: bool = True) -> Iterator[None]:
        """Only note a request, or with False raise StopNow for one, which may have come before."""
        before, self._deferred = self._deferred, yes
        try:
            if self.requested and not yes:
                raise StopNow
            yield
        finally:
            self._deferred = before
