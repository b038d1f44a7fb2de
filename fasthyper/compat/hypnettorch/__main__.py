"""``python -m fasthyper.compat.hypnettorch SCRIPT [ARGS]``: runs a script written for hypnettorch, accelerated.

The exit status is the script's; 2 for bad usage, 1 without hypnettorch, 130 when interrupted. What was called, which way it
went and the time in it are written to stderr at the end.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from types import TracebackType

from fasthyper.compat.hypnettorch.acceleration import accelerate
from fasthyper.compat.hypnettorch.calls import FAST, GENERAL, Count, summary
from fasthyper.errors import FasthyperError

PROG = "python -m fasthyper.compat.hypnettorch"


def main(argv: Sequence[str]) -> int:
    """Runs the script that ``argv`` begins with and returns the exit status; the script's own SystemExit passes through."""
    if not argv or argv[0].startswith("-"):
        print(f"{PROG}: give a script to run: {PROG} SCRIPT [ARGS]", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    script = argv[0]
    if not os.path.isfile(script):
        print(f"{PROG}: no such file: {script}", file=sys.stderr)
        return 2
    try:
        undo = accelerate()
    except FasthyperError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    sys.argv = list(argv)
    if not getattr(sys.flags, "safe_path", False):  # python -m has put the current directory there, python SCRIPT puts:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    try:
        with undo:
            runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error.with_traceback(_of_script(error, script)), error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        print(report(summary()), file=sys.stderr)
    return 0


def report(counts: dict[tuple[str, str], Count]) -> str:
    """A table: per function, calls and seconds of either way."""
    if not counts:
        return "fasthyper: the script called nothing of hypnettorch that could be accelerated"
    functions = list(dict.fromkeys(function for function, _ in counts))
    total = {path: sum(count.calls for (_, way), count in counts.items() if way == path) for path in (FAST, GENERAL)}
    width = max(map(len, functions))
    lines = [f"fasthyper: {total[FAST]} calls went the fast way, {total[GENERAL]} the general one"]
    lines.append(f"  {'':<{width}}  {'fast':>8}  {'seconds':>9}  {'general':>8}  {'seconds':>9}")
    for function in functions:
        fast, general = (counts.get((function, path), Count()) for path in (FAST, GENERAL))
        cells = "  ".join(f"{count.calls:>8}  {count.seconds:>9.3f}" for count in (fast, general))
        lines.append(f"  {function:<{width}}  {cells}")
    return "\n".join([*lines, "  (seconds of a call include those of the calls within it)"])


def _of_script(error: BaseException, script: str) -> TracebackType | None:
    """The part of its traceback that python itself would show: from the script on."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != script:
        found = found.tb_next
    return found if found is not None or isinstance(error, SyntaxError) else error.__traceback__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
