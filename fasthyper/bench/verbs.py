"""``fasthyper bench`` and ``fasthyper compare``."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasthyper.bench.peers import OTHERS, PEERS, missing
from fasthyper.bench.workloads import WHATS, WORKLOADS, Workload, mlp
from fasthyper.environment import environment
from fasthyper.errors import FasthyperError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = (2, 10, 100, 1000)


def add_verbs(verbs: Any) -> None:
    """Adds both commands to the parser's ``add_subparsers``."""
    verb = verbs.add_parser("bench", help="how fast it is on this machine, beside its peers", allow_abbrev=False)
    names = _names("workload", [*WORKLOADS, "all"])
    verb.add_argument("--workload", type=names, default=["p10"], metavar="NAME,...", help=f"{', '.join(WORKLOADS)}; or all")
    verb.add_argument("--tasks", type=_counts, metavar="INT,...", help="past tasks (default: the workload's own)")
    verb.add_argument("--what", type=_names("what", WHATS), default=list(WHATS), metavar="NAME,...", help=", ".join(WHATS))
    verb.add_argument("--layout", choices=("flat", "aligned"), default="flat", help="of our weights (default: flat)")
    peers = f"{', '.join(OTHERS)} (default: {', '.join(PEERS)})"
    verb.add_argument("--against", type=_names("peer", OTHERS), metavar="NAME,...", help=peers)
    _common(verb, "runs/bench", 10.0)
    verb.set_defaults(command=_bench)

    verb = verbs.add_parser("compare", help="what a configuration would cost with more and more tasks", allow_abbrev=False)
    verb.add_argument(
        "--workload", type=_names("workload", WORKLOADS), metavar="NAME", help=f"one of {', '.join(WORKLOADS)}"
    )
    verb.add_argument(
        "--target-layers", type=_counts, metavar="INT,...", help="of a fully connected target: 1024,1000,1000,10"
    )
    verb.add_argument("--hidden", type=_counts, default=(25, 25), metavar="INT,...", help="of the trunk (default: 25,25)")
    verb.add_argument("--chunk-size", type=int, metavar="INT", help="weights per chunk (default: all)")
    verb.add_argument("--task-dim", type=int, default=24, metavar="INT", help="task embedding (default: 24)")
    verb.add_argument("--chunk-dim", type=int, default=8, metavar="INT", help="chunk embedding (default: 8)")
    verb.add_argument("--activation", choices=("relu", "elu"), default="elu", help="of the trunk (default: elu)")
    verb.add_argument(
        "--tasks", type=_counts, default=COMPARED, metavar="INT,...", help="past tasks (default: 2,10,100,1000)"
    )
    verb.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True, help="what takes a few seconds")
    _common(verb, "runs/compare", 5.0)
    verb.set_defaults(command=_compare)


def _common(verb: argparse.ArgumentParser, out: str, seconds: float) -> None:
    verb.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"of figure and JSON (default: {out})")
    verb.add_argument("--json", action="store_true", help="no table; the results as one JSON object at the end")
    verb.add_argument("--threads", type=int, metavar="INT", help="of torch (default: its own choice)")
    verb.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="S",
        help=f"about how long each row is timed (default: {seconds:.0f})",
    )


def _bench(args: argparse.Namespace) -> int:
    from fasthyper.bench.machine import Machine
    from fasthyper.bench.measure import ParityError, measure
    from fasthyper.bench.show import Board, bench_cells, bench_columns

    for name in args.against or ():
        if missing(name):
            raise FasthyperError(missing(name))
    against = args.against or list(PEERS)
    workloads = [WORKLOADS[name] for name in (WORKLOADS if "all" in args.workload else args.workload)]
    cases = [(w, past, what) for w in workloads for what in args.what for past in args.tasks or w.tasks_for(what)]
    rows, failed = [], False
    with _threads(args.threads):
        facts = environment()
        machine = Machine.measure()
        title = f"{_title(facts)}: {machine.gemm / 1e9:.0f} GFLOP/s, {machine.copy / 1e9:.1f} GB/s copied"
        with Board(bench_columns(against), enabled=not args.json, title=title) as board:
            for workload, past, what in cases:
                say = _saying(board.say, f"{workload.name} {what}, {past} past tasks: ")
                try:
                    row = measure(
                        workload,
                        past,
                        what,
                        against=against,
                        seconds=args.seconds,
                        machine=machine,
                        layout=args.layout,
                        say=say,
                    )
                except ParityError as error:
                    row, failed = {"what": what, "workload": workload.name, "past": past, "error": str(error)}, True
                    print(f"fasthyper: {error}", file=sys.stderr)
                rows.append(row)
                board.add(bench_cells(row, against))
        record = {"environment": facts, "machine": machine.to_json(), "rows": rows}
        good = [row for row in rows if "error" not in row]
        _keep(args, "bench", record, _drawing("times_figure", good, _title(facts)) if good else None)
    return int(failed)


def _compare(args: argparse.Namespace) -> None:
    from fasthyper.bench.compare import COLUMNS, cells, compare_all
    from fasthyper.bench.show import Board

    workload = _configuration(args)
    with _threads(args.threads):
        facts = environment()
        title = f"{workload.name} on {_title(facts)}"
        with Board(COLUMNS, enabled=not args.json, title=title) as board:
            rows = compare_all(
                workload,
                sorted(set(args.tasks)),
                seconds=args.seconds if args.measure else None,
                say=board.say,
                add=lambda row: board.add(cells(row)),
            )
        record = {"environment": facts, "workload": json.loads(workload.to_json()), "rows": rows}
        _keep(args, "compare", record, _drawing("costs_figure", rows, workload.name, _title(facts)))


def _configuration(args: argparse.Namespace) -> Workload:
    """The workload that was named, or one of the shapes that were given."""
    if args.workload:
        if args.target_layers or len(args.workload) > 1:
            raise FasthyperError("compare takes one --workload, or --target-layers and the rest, not more")
        return WORKLOADS[args.workload[0]]
    if not args.target_layers or len(args.target_layers) < 2:
        raise FasthyperError("compare needs --workload NAME, or --target-layers IN,...,OUT with --hidden, --chunk-size, ...")
    num_inputs, *hidden, num_outputs = args.target_layers
    hnet = {key: getattr(args, key) for key in ("chunk_size", "hidden", "task_dim", "chunk_dim", "activation")}
    workload = Workload("configuration", mlp(num_inputs, tuple(hidden), num_outputs), hnet, tasks=COMPARED)
    workload.build(0)  # raises where the shapes cannot be
    return workload


class _threads:
    """torch's number of threads, for a while."""

    def __init__(self, count: int | None):
        if count is not None and count < 1:
            raise FasthyperError(f"--threads must be at least 1, got {count}")
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count or self.before)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def _title(facts: dict[str, str]) -> str:
    return f"{facts['machine']}, {facts['threads']} threads"


def _saying(say: Callable[[str], None], start: str) -> Callable[[str], None]:
    return lambda text: say(f"{start}{text}")


def _drawing(name: str, *arguments: Any) -> Callable[[], Figure]:
    from fasthyper.bench import figure

    return lambda: getattr(figure, name)(*arguments)


def _keep(args: argparse.Namespace, name: str, record: dict[str, Any], draw: Callable[[], Figure] | None) -> None:
    """Writes NAME.json and, with matplotlib, NAME.png and NAME.svg; prints where, or with --json the record."""
    import importlib.util

    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    (args.out / f"{name}.json").write_text(f"{text}\n")
    written, hint = [f"{name}.json"], ""
    if draw is not None and importlib.util.find_spec("matplotlib") is None:
        hint = "; for a figure: pip install 'fasthyper[plot]'"
    elif draw is not None:
        figure = draw()
        for kind in ("png", "svg"):
            figure.savefig(args.out / f"{name}.{kind}", dpi=150, facecolor="white")
            written.append(f"{name}.{kind}")
    print(text if args.json else f"{args.out}: {', '.join(written)}{hint}")


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        counts = ()
    if min(counts, default=0) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not int,int,... from 1")
    return counts


def _names(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """A converter of comma-separated names, which answers an unknown one with near matches."""
    names = list(known)

    def convert(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        for name in found:
            if name not in names:
                close: Sequence[str] = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
                hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names)}"
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}; {hint}")
        return found

    return convert
