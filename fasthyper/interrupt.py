"""Ctrl-C between steps: an interrupted step would leave half an update behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """While inside, Ctrl-C only sets a flag, which the yielded function reads; a second one interrupts at once.

    Where interrupts are ignored (a background job) they stay so; outside the main thread nothing is done.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield lambda: False
        return
    requested = False

    def handler(signum, frame):  # type: ignore[no-untyped-def]
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)
