"""Tables that grow while they are measured: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fasthyper.bench.peers import OURS

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


class Board:
    """A table to which rows of cells are added; ``say`` shows what is being done meanwhile.

    On a terminal with rich it is redrawn in place; elsewhere a row is printed as it comes, one line for each line of its
    longest cell. ``enabled=False``: nothing is shown.
    """

    def __init__(self, columns: Sequence[str], *, enabled: bool = True, title: str = ""):
        self.columns, self.title, self.status = list(columns), title, ""
        self.rows: list[list[str]] = []
        self._enabled = enabled
        self._live = self._start() if enabled else None
        if enabled and self._live is None:
            print(title, flush=True)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self.say("")
            self._live.stop()

    def say(self, status: str) -> None:
        self.status = status
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def add(self, cells: Sequence[str]) -> None:
        self.rows.append(list(cells))
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif self._enabled:
            first, *others = (cell.replace("\n", ", ") for cell in cells)
            named = (f"    {name}: {cell}" for name, cell in zip(self.columns[1:], others, strict=True) if cell)
            print("\n".join([first, *named]), flush=True)

    def _start(self) -> Live | None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            return None
        console = Console()
        if not console.is_terminal:
            return None
        live = Live(self._table(), console=console, auto_refresh=False)
        live.start()
        return live

    def _table(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, title=escape(self.title), title_justify="left", caption=escape(self.status))
        for column in self.columns:
            table.add_column(column)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def bench_columns(against: Sequence[str]) -> list[str]:
    """Heads of the columns of ``bench_cells``."""
    return ["workload", OURS, "against the machine", *against]


def bench_cells(row: dict[str, Any], against: Sequence[str]) -> list[str]:
    """A row of ``fasthyper bench``."""
    head = f"{row['workload']} {row['what']}\n{row['past']} past tasks"
    if "error" in row:
        return [head, "not timed", row["error"], *("" for _ in against)]
    machine = f"{row['gflops']:.1f} GFLOP/s\n{100 * row['ceiling_share']:.0f} % of its ceiling"
    return [head, _side(row["ours"], row.get("memory")), machine, *(_peer(row["peers"][name]) for name in against)]


def _side(times: dict[str, float], memory: dict[str, int] | None) -> str:
    return f"{span(times)}{_memory(memory)}"


def _peer(entry: dict[str, Any]) -> str:
    if "skipped" in entry:
        return f"not run: {entry['skipped']}"
    low, high = entry["ratio_quartiles"]
    return f"{entry['ratio']:.1f}× ({low:.1f} to {high:.1f})\n{_side(entry, entry.get('memory'))}"


def _memory(memory: dict[str, int] | None) -> str:
    return f"\n{megabytes(memory['kept'])} kept, {megabytes(memory['step'])} a call" if memory else ""


def span(times: dict[str, float]) -> str:
    """Median and quartiles in ms."""
    return f"{milliseconds(times['median'])} ({milliseconds(times['low'], '')} to {milliseconds(times['high'], '')})"


def milliseconds(seconds: float, unit: str = " ms") -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"


def megabytes(num_bytes: float) -> str:
    """Three digits."""
    value = num_bytes / 1e6
    return f"{value:.{1 if value < 100 else 0}f} MB"
