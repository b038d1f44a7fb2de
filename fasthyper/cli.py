"""The command line. Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted and 143 terminated with the state saved, 141
nobody reads what it prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import fasthyper
from fasthyper import vision
from fasthyper.bench.verbs import add_verbs
from fasthyper.checkpoint import SAVE_EVERY, holds_run, read_results
from fasthyper.distributed import Ranks, join
from fasthyper.environment import cpu_name
from fasthyper.errors import FasthyperError, RecipeError
from fasthyper.export import load
from fasthyper.inference import METHODS
from fasthyper.interrupt import whole_process
from fasthyper.loggers import KINDS, open_logger
from fasthyper.metrics import MEASURES, Results
from fasthyper.recipes import RECIPES, Recipe, Runner, evaluate, measured, nearest, read, run, with_error
from fasthyper.recipes.fields import FIELDS, converter
from fasthyper.streams import fetch
from fasthyper.sweep import JOURNAL, Parameter, Sweep
from fasthyper.trainer import ON_NONFINITE

_OPTIONAL = {  # package -> the extra that brings it
    **{"rich": "", "matplotlib": "plot", "sklearn": "digits", "torchvision": "vision", "hypnettorch": "bench"},
    **{"tensorboard": "tb", "wandb": "wandb", "avalanche": "avalanche", "optuna": "sweep", "ray": "ray"},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; a fault that a person can mend is one line on stderr."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with whole_process():
            status = args.command(args) or 0
            sys.stdout.flush()
            return status
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 143:
            raise
        out = args.out if getattr(args, "recipe", None) else None
        saved = out is not None and (holds_run(out) or (out / JOURNAL).exists())
        kept = f"; state saved in {args.out}, the same command goes on" if saved else ""
        what, status = ("interrupted", 130) if isinstance(stop, KeyboardInterrupt) else ("terminated", 143)
        print(f"fasthyper: {what}{kept}", file=sys.stderr)
        return status
    except BrokenPipeError:  # as of `fasthyper list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
    except (FasthyperError, ValueError, IndexError, OSError) as error:
        print(f"fasthyper: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> _Parser:
    parser = _Parser(prog="fasthyper", description="Fast training of hypernetworks for continual learning.")
    parser.add_argument("--version", action="version", version=f"fasthyper {fasthyper.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    verb = verbs.add_parser("run", help="train a recipe, or go on with it; writes a report", allow_abbrev=False)
    verb.add_argument("recipe", metavar="RECIPE", type=_recipe, help="a name that `fasthyper list` shows, or a TOML file")
    verb.add_argument("--out", type=Path, help="directory of the run (default: runs/RECIPE)")
    verb.add_argument(
        "--seeds", type=_count, default=1, metavar="N", help="as many runs, with seed, seed + 1, ..., in OUT/seed-*"
    )
    verb.add_argument("--json", action="store_true", help="no progress; the scores as one JSON object at the end, or a list")
    verb.add_argument("--log", type=_kinds, default=(), metavar=",".join(KINDS), help="also log to these, in that directory")
    verb.add_argument("--device", type=_device, help="where to train (default: on a GPU, if there is one)")
    verb.add_argument(
        "--save-every", type=float, default=SAVE_EVERY, metavar="SECONDS", help="between checkpoints (default: %(default)g)"
    )
    verb.add_argument(
        "--on-nonfinite", choices=tuple(ON_NONFINITE), default="stop", help="on NaN or infinity: stop, or skip that step"
    )
    verb.add_argument("--memory-budget", type=int, metavar="BYTES", help="for past tasks' features")
    _add_settings(verb)
    verb.set_defaults(command=_run)

    verb = verbs.add_parser("sweep", help="try settings of a recipe, or go on with it; several workers", allow_abbrev=False)
    verb.add_argument("recipe", metavar="RECIPE", type=_recipe, help="a name that `fasthyper list` shows")
    verb.add_argument(
        "--param",
        dest="parameters",
        action="append",
        required=True,
        metavar="KEY=RANGE",
        type=_reader(Parameter.parse),
        help="what to try: beta=log:1e-3:1, lr=1e-4:1e-2, steps=int:100:900, optimizer=choice:adam,sgd, "
        "hidden=choice:25,25/50,50; several times",
    )
    verb.add_argument("--trials", type=_count, default=50, metavar="N", help="in all, of all workers (default: %(default)s)")
    verb.add_argument("--workers", type=_count, metavar="K", help="processes (default: one per core; on a GPU, one)")
    verb.add_argument(
        "--prune",
        type=_share,
        default=25,
        metavar="PERCENT",
        help="give up the worst so many percent after a task (default: %(default)s; 0: none)",
    )
    verb.add_argument("--out", type=Path, help="directory of the sweep (default: sweeps/RECIPE)")
    verb.add_argument(
        "--json", action="store_true", help="no progress; all trials and the best as one JSON object at the end"
    )
    verb.add_argument("--device", type=_device, help="where to train (default: on a GPU, if there is one)")
    verb.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of the processes of another sweep
    _add_settings(verb)
    verb.set_defaults(command=_sweep)

    verb = verbs.add_parser("eval", help="what a run reaches now on the test data of its tasks so far")
    verb.add_argument("directory", type=Path, metavar="RUN_DIR", help="directory of a run")
    verb.add_argument(
        "--infer", choices=("no", *METHODS), help="how to find the tasks of examples (default: as the recipe has it)"
    )
    verb.add_argument("--temperature", type=float, help="that divides the outputs it is found by (default: the recipe's)")
    verb.add_argument("--json", action="store_true", help="as one JSON object")
    verb.set_defaults(command=_eval)

    verb = verbs.add_parser("report", help="HTML, PNG, CSV and JSON from finished or unfinished runs")
    verb.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="directory of a run; several are compared")
    verb.add_argument("--out", type=Path, help="where to write (default: the first DIR)")
    verb.add_argument(
        "--baseline", type=Path, metavar="DIR", help="a run whose tasks were each learned alone, to compare with"
    )
    verb.set_defaults(command=_report)

    verb = verbs.add_parser("export", help="one file: a run's hypernetwork, or the plain weights of one of its tasks")
    verb.add_argument("directory", type=Path, metavar="RUN_DIR", help="directory of a run")
    verb.add_argument("file", type=Path, metavar="FILE", help="the safetensors file to write")
    verb.add_argument("--task", type=int, metavar="N", help="the target's weights for task N, of use without fasthyper")
    verb.set_defaults(command=_export)

    add_verbs(verbs)

    verb = verbs.add_parser("list", help="the recipes")
    verb.add_argument("--json", action="store_true", help="as JSON, with every setting")
    verb.set_defaults(command=_list)

    verb = verbs.add_parser("doctor", help="what is installed, what serves which device, and what to do about it")
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(command=_doctor)

    verb = verbs.add_parser("data", help="data sets: which are here, and where the files of the others belong")
    verb.set_defaults(command=_data)
    data_verbs = verb.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    data_verbs.add_parser("list", help="the same as without a command").set_defaults(command=_data)
    verb = data_verbs.add_parser("fetch", help="download a data set, checked by SHA-256")
    verb.add_argument("name", metavar="NAME", help=f"one of: {', '.join(fetch.DATASETS)}")
    verb.add_argument("--data-dir", type=Path, help="keep it there instead of in the cache")
    verb.add_argument("--force", action="store_true", help="replace files that are damaged")
    verb.set_defaults(command=_fetch)
    return parser


def _add_settings(verb: argparse.ArgumentParser) -> None:
    for name in FIELDS:
        flags, read = {f"--{name}", f"--{name.replace('_', '-')}"}, _reader(converter(name))
        metavar = read.__name__.upper()
        verb.add_argument(*sorted(flags), dest=f"set_{name}", type=read, default=argparse.SUPPRESS, metavar=metavar)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that were given."""
    return {name[4:]: value for name, value in vars(args).items() if name.startswith("set_")}


def _run(args: argparse.Namespace) -> None:
    recipe = dataclasses.replace(args.recipe, **_settings(args))
    out = args.out or Path("runs") / recipe.name
    args.show = not args.json
    log: Callable[[str], None] = (lambda line: print(line, file=sys.stderr)) if args.json else print
    runs: dict[Path, Runner] = {}
    with join(args.device) as ranks:
        if not ranks.is_first:
            args.show, log = False, lambda line: None
        log(f"{recipe.name}: {recipe.about}")
        for seed in range(recipe.seed, recipe.seed + args.seeds):
            args.out = out if args.seeds == 1 else out / f"seed-{seed}"  # what an interrupt speaks of
            runs[args.out] = _run_one(dataclasses.replace(recipe, seed=seed), args, log, ranks)
    if not ranks.is_first:
        return
    scores = [trainer.results.scores() for trainer in runs.values()]
    if args.json:
        plain = [{key: None if value != value else value for key, value in entry.items()} for entry in scores]
        print(json.dumps(plain[0] if args.seeds == 1 else plain))
    elif args.seeds > 1:
        measure = next(iter(runs.values())).results.measure
        print(
            f"\n{args.seeds} seeds: {with_error([entry['acc'] for entry in scores], measure)}, mean and its standard error"
        )
    if importlib.util.find_spec("matplotlib") is None:
        where = " ".join(map(str, runs))
        log(f"results in {out}; for a report: pip install 'fasthyper[plot]', then fasthyper report {where}")
    else:
        log(f"report: {_write_report(list(runs), out)}")


def _run_one(recipe: Recipe, args: argparse.Namespace, log: Callable[[str], None], ranks: Ranks) -> Runner:
    """One seed, into ``args.out``."""
    if args.seeds > 1:
        log(f"seed {recipe.seed}")
    trainer = run(
        recipe,
        args.out,
        progress=args.show,
        log=log,
        loggers=lambda: [open_logger(kind, args.out, recipe.name, dataclasses.asdict(recipe)) for kind in args.log],
        device=args.device if ranks.device is None else str(ranks.device),
        ranks=ranks,
        save_every=args.save_every,
        on_nonfinite=args.on_nonfinite,
        memory_budget=args.memory_budget,
    )
    if args.show:
        print(f"\n{trainer.results.summary()}\n")
    return trainer


def _sweep(args: argparse.Namespace) -> int:
    args.out = args.out or Path("sweeps") / args.recipe.name
    sweep = Sweep(args.recipe, args.out, args.parameters, _settings(args), prune=args.prune)

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.worker:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            sweep.work(args.trials, say, args.device, parent=os.getppid())
        except KeyboardInterrupt:
            return 130  # of which the process that started it speaks
        return 0
    cores, on_gpu = len(os.sched_getaffinity(0)), torch.cuda.is_available() and args.device != "cpu"
    workers = min(args.workers or (1 if on_gpu else cores), args.trials)
    say(f"{args.recipe.name}: {sweep.done} of {args.trials} trials are done in {args.out}, {workers} at once")
    if workers == 1:
        sweep.work(args.trials, say, args.device)
    elif status := _work_together([*args.argv, "--worker"], workers, max(1, cores // workers)):
        return status
    print(json.dumps(sweep.to_json()) if args.json else sweep.summary())
    return 0


def _work_together(argv: list[str], workers: int, threads: int) -> int:
    """As many processes of this command; their exit status. An interrupt reaches each once, when it is ready."""
    command, env = [sys.executable, "-m", "fasthyper", *argv], {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running: list[subprocess.Popen[bytes]] = []
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        running += [subprocess.Popen(command, env=env, start_new_session=True) for _ in range(workers)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while any(process.poll() is None for process in running):
            if failed := next((process for process in running if process.poll()), None):
                return failed.returncode
            time.sleep(0.05)
        return max(process.returncode for process in running)
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()


def _eval(args: argparse.Namespace) -> None:
    found = evaluate(args.directory, False if args.infer == "no" else args.infer, args.temperature)
    if args.json:
        print(json.dumps(found))
        return
    measure = MEASURES[Results.from_json(read_results(args.directory)["results"]).measure]
    for name, value in {**found, "mean": sum(found.values()) / len(found)}.items():
        print(f"{name:<32}{measure.text(value):>10}")


def _report(args: argparse.Namespace) -> None:
    print(_write_report(args.directories, args.out, args.baseline))


def _write_report(directories: Sequence[Path], out: Path | None = None, baseline: Path | None = None) -> Path:
    from fasthyper.report import write_report

    return write_report(directories, out, baseline)


def _export(args: argparse.Namespace) -> None:
    load(args.directory).export(args.file, args.task)
    print(args.file)


def _list(args: argparse.Namespace) -> None:
    if args.json:
        plain = {name: dataclasses.asdict(runs) for name, runs in measured().items()}
        entries = [{**dataclasses.asdict(recipe), "measured": plain.get(name)} for name, recipe in RECIPES.items()]
        print(json.dumps(entries, indent=2))
        return
    width, reached = max(map(len, RECIPES)), measured()
    for name, recipe in RECIPES.items():
        published = f": {recipe.published}" if recipe.published else ""
        print(f"{name:<{width}}  {recipe.about}\n{'':<{width}}  {recipe.source}{published}")
        print(f"{'':<{width}}  {f'measured: {reached[name]}' if name in reached else 'not measured yet'}")


def _doctor(args: argparse.Namespace) -> None:
    facts = [
        ("fasthyper", fasthyper.__version__, ""),
        ("python", f"{platform.python_version()} on {platform.platform()}", ""),
        ("machine", f"{cpu_name()}, {torch.get_num_threads()} threads", ""),
        ("torch", torch.__version__, ""),
        ("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU seen: the CPU serves", ""),
    ]
    for device, backend in fasthyper.backends().items():
        name, _, why = backend.partition(" ")
        facts.append((f"ops on {device}", name, why.strip("()")))
    for package, extra in _OPTIONAL.items():
        have = importlib.util.find_spec(package) is not None
        fix = f"pip install 'fasthyper[{extra}]'" if extra else f"pip install {package}"
        trouble = vision.trouble() if package == "torchvision" else ""
        facts.append((package, "installed" if have else "not installed", trouble if have else fix))
    for name in fetch.DATASETS:
        fix = f"fasthyper data fetch {name}" if fetch.DATASETS[name].sources else "fasthyper data"
        found, fix = ("missing", fix) if fetch.missing(name) else ("complete", "")
        facts.append((f"data {name}", found, fix))
    if args.json:
        print(json.dumps({name: {"found": found, "note": note} for name, found, note in facts}))
        return
    for name, found, note in facts:
        print(f"{name:<15}{found}{f'   ({note})' if note else ''}")


def _data(args: argparse.Namespace) -> None:
    for name, dataset in fetch.DATASETS.items():
        missing, folder = fetch.missing(name), fetch.data_home() / name
        if not missing:
            state = f"{'complete' if all(dataset.files.values()) else 'there, checked when used'}, in {folder}"
        elif dataset.sources:
            state = f"not here: `fasthyper data fetch {name}`, or put {fetch.whereabouts(name, folder)}"
        else:
            state = f"not here, cannot be fetched: put {fetch.whereabouts(name, folder)}, or name another folder as data_dir"
        print(f"{name}: {state}\n    {dataset.about}")


def _fetch(args: argparse.Namespace) -> None:
    print(fetch.fetch(args.name, args.data_dir, log=print, force=args.force))


def _recipe(name: str) -> Recipe:
    try:
        if name.endswith(".toml"):
            return read(Path(name))
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]


def _device(text: str) -> str:
    if not text.startswith(("cpu", "cuda")) or (text.startswith("cuda") and not torch.cuda.is_available()):
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu, and no GPU is seen"
        raise argparse.ArgumentTypeError(f"no device {text!r} here; there is {have}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage from 0 to below 100")
    return share


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(filter(None, text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"unknown logger {kind!r}; choose from {', '.join(KINDS)}")
    return kinds


def _reader(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """``convert`` for argparse, which shows the message of its own errors only."""

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    read.__name__ = convert.__name__
    return read
