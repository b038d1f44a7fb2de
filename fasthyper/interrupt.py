"""Ctrl-C and SIGTERM between steps: an interrupted step would leave half an update behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_at_once = False  # a second signal ends the process, which is the command line's
_asked = 0  # the signal that was to end that process: what it raises is lost in the middle of an import


def stopped_by(signum: int) -> BaseException:
    """What ends a process as the signal would: of Ctrl-C a ``KeyboardInterrupt``, of SIGTERM ``SystemExit(143)``."""
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(128 + signum)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """While inside, Ctrl-C and SIGTERM only set a flag: the yielded function returns the signal, 0 before; a second one ends
    at once.

    Where signals are ignored (a background job) or SIGTERM has a handler of somebody's own they stay so; outside the main
    thread nothing is done.
    """
    requested = _asked

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            _end(signum)
        requested = _ask(signum)

    ours = (signal.SIG_DFL, signal.default_int_handler, _terminate)
    with _handling(
        handler, lambda signum, now: now not in (signal.SIG_IGN, None) if signum == signal.SIGINT else now in ours
    ):
        yield lambda: requested


@contextmanager
def whole_process() -> Iterator[None]:
    """For a command line: SIGTERM raises as Ctrl-C does, a second signal in ``deferred_interrupt`` ends the process, and one
    that an import swallowed is found there, or in the ``ImportError`` that was made of it."""
    global _at_once, _asked
    with _handling(_terminate, lambda signum, now: now in (signal.SIG_DFL, signal.default_int_handler)):
        _at_once, _asked = True, 0
        try:
            yield
        except Exception as error:
            if _asked and (isinstance(error, ImportError) or isinstance(error.__cause__, ImportError)):
                raise stopped_by(_asked) from error
            raise
        finally:
            _at_once, _asked = False, 0


def _ask(signum: int) -> int:
    global _asked
    _asked = signum if _at_once else 0
    return signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise stopped_by(_ask(signum))


def _end(signum: int) -> None:
    if _at_once:
        os.write(2, b"fasthyper: ended at once; what was saved last is whole\n")
        os._exit(128 + signum)
    raise stopped_by(signum)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], takes: Callable[[int, Any], bool]) -> Iterator[None]:
    """Sets the handler of those of both signals that it takes; in the main thread, where Python handles signals."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    taken = {signum: now for signum, now in before.items() if takes(signum, now)}
    for signum in taken:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, now in taken.items():
            signal.signal(signum, now)
