"""Writes the measured parts of README.md and DESIGN.md, and the figure, from bench/results/*.json; none is typed by hand.

python bench/report.py            rewrite both and bench/figures
python bench/report.py --check    exit 1 if they are not what the results say
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import report_gpu
import report_soak

from fasthyper.bench.costs import FLOAT, Shapes, Work, messages
from fasthyper.bench.figure import times_figure
from fasthyper.bench.machine import Link, Machine
from fasthyper.bench.predict import seconds_on_ranks
from fasthyper.bench.workloads import WORKLOADS
from fasthyper.metrics import Results
from fasthyper.recipes import RECIPES, measured, with_error

ROOT = Path(__file__).parent.parent
RESULTS, FIGURES = ROOT / "bench" / "results", ROOT / "bench" / "figures"
README, DESIGN = ROOT / "README.md", ROOT / "DESIGN.md"
PEER, OTHERS = "hypnettorch", ("eager", "compile")
GOALS = (  # of the project: times faster than the peer
    *(("regularizer", "p10", 10, 60), ("regularizer", "p10", 100, 450), ("regularizer", "p100", 100, 30)),
    *(("step", "p10", 10, 12), ("step", "p100", 10, 5), ("step", "p100", 100, 25)),
    *(("step", "p100-aligned", 10, 6), ("step", "p100-aligned", 100, 27)),
)
RANKS, MOST_RANKS = (1, 2, 4, 8, 16), 65  # of the scaling table; below which the fastest is looked for
CEILING_TEXT = (
    "\n*/ ceiling*: our time over that of the counted work at the machine's best float32 product and copy rates, measured\n"
    "in the same run; below 1 where tile units or caches do better than those."
)


def main() -> int:
    names = ("cpu", "commands", "precision", "layouts", "hypnettorch_loop")
    cpu, commands, precision, layouts, loop = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    plain, amd, aligned, avx2 = (
        json.loads((RESULTS / f"cpu_{of}.json").read_text()) for of in ("without_tiles", "amd", "amd_aligned", "avx2")
    )  # by ``fasthyper bench``
    memory = json.loads((RESULTS / "memory.json").read_text())  # so, too: p100 at 100, a step, against recompute
    planner, products, products_avx2 = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("planner", "products", "products_avx2")
    )
    gpu = report_gpu.load(RESULTS)
    entries = [entry["extra_info"] for entry in cpu["benchmarks"]]
    rows = [with_peers(entry) for entry in entries if entry["what"] in ("regularizer", "step")]
    ceiling = cpu["machine_info"]["ceiling"]
    parts = {
        README: {
            "headline": headline(rows),
            "figure": figure_link(),
            "times": times(commands),
            "table": table(rows, cpu["machine_info"]),
            **{
                name: table(
                    found["rows"],
                    {**found["environment"], "ceiling": found["machine"], PEER: cpu["machine_info"][PEER]},
                )
                for name, found in (
                    ("table-without-tiles", plain),
                    ("table-amd", amd),
                    ("table-aligned", aligned),
                    ("table-avx2", avx2),
                )
            },
            "loop": loop_text(loop),
            "recipes": recipes_table(),
            "gpu": report_gpu.readme_text(*gpu),
        },
        DESIGN: {
            "precision": precision_table(precision),
            "layouts": layouts_table(layouts),
            "goals": goals_table(machines_of(cpu, entries, plain, amd, aligned, products, avx2), aligned["environment"])
            + memory_text(memory),
            "planner": planner_table(planner),
            "threads": threads_text(json.loads((RESULTS / "threads.json").read_text())),
            "products": products_table(products),
            "products-avx2": products_table(products_avx2),
            "ablation": ablation_tables(RESULTS / "ablation.json"),
            "scaling": scaling_table(json.loads((RESULTS / "scaling.json").read_text()), entries, ceiling),
            "gpu-goals": report_gpu.design_text(*gpu),
            "slowdown": slowdown_text(),
            "soak": report_soak.text(report_soak.load(RESULTS)),
        },
    }
    for path, contents in parts.items():
        found = wanted = path.read_text()
        for name, text in contents.items():
            wanted = between_markers(wanted, name, text)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif wanted != found:
            print(f"{path.name} is not what bench/results says: run `python bench/report.py`", file=sys.stderr)
            return 1
    if "--check" not in sys.argv[1:]:
        draw(rows, cpu)
    return 0


def between_markers(text: str, name: str, content: str) -> str:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->``, or puts both where the first one stands."""
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    tail = rest.partition(stop)[2] if stop in rest else rest
    return f"{head}{start}{content}{stop}{tail}"


def headline(rows: list[dict[str, Any]]) -> str:
    steps = [row["peers"].get(PEER, {}) for row in rows if row["what"] == "step" and row["past"] == 100]
    ratios = [entry["ratio"] for entry in steps if "ratio" in entry]
    low, high = min(ratios), max(ratios)
    return f" {low:.0f} to {high:.0f} times faster than\n{PEER} after 100 tasks,"


def figure_link() -> str:
    alt = "Seconds per training step against the number of past tasks, fasthyper and hypnettorch"
    return (
        f'\n<picture><source media="(prefers-color-scheme: dark)" srcset="bench/figures/step-dark.svg">'
        f'<img alt="{alt}" src="bench/figures/step-light.svg"></picture>\n'
    )


def times(commands: dict[str, Any]) -> str:
    seconds, demo = commands["seconds"], commands["demo"]
    results = Results.from_json(demo["results"])
    scores, config = results.scores(), demo["config"]
    training, drop = sum(task.seconds for task in results.tasks), 100 * scores["largest_drop"]
    lines = [
        "",
        f"On {commands['environment']['machine']}, from a clean clone:",
        f"`make demo` {seconds['demo'] / 60:.1f} minutes, of which the ten tasks took {training / 60:.1f}; "
        f"`make test` {seconds['test'] / 60:.1f} minutes more.",
        f"The demo ends at {100 * scores['acc']:.2f} % mean accuracy, no task more than {drop:.2f} points",
        f"under what it had when it was learned ({config['steps']} steps a task, seed {config['seed']}).",
        "",
    ]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    others = [name for name in OTHERS if any(name in row["peers"] for row in rows)]
    named = f"{PEER} {machine['hypnettorch']}"
    columns = [(what, peer) for what in ("regularizer", "step") for peer in (PEER, *others)]
    columns = [(what, peer) for what, peer in columns if any("ratio" in entry for entry in of(rows, what, peer))]
    whats = {row["what"] for row in rows}
    ceilings = [what for what in ("regularizer", "step") if "ceiling" in machine and what in whats]
    heads = [f"{what}, {peer}" for what, peer in columns] + [f"{what} / ceiling" for what in ceilings]
    lines = ["", f"| workload | past tasks | {' | '.join(heads)} |", f"|---|---{'|---' * len(heads)}|"]
    for workload, past in dict.fromkeys((row["workload"], row["past"]) for row in rows):
        cells = [cell(rows, what, workload, past, peer) for what, peer in columns]
        cells += [over_ceiling(rows, what, workload, past, machine["ceiling"]) for what in ceilings]
        lines.append(f"| `{workload}` | {past} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Times of {' and '.join([named, *others])} over ours, medians (quartiles) of alternating runs:",
        f"{machine['machine']}, {machine['threads']} threads,",
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
        *([CEILING_TEXT] if ceilings else []),
        "",
    ]
    return "\n".join(lines)


def of(rows: list[dict[str, Any]], what: str, peer: str) -> list[dict[str, Any]]:
    """What is known of a peer, row by row."""
    return [row["peers"].get(peer, {}) for row in rows if row["what"] == what]


def over_ceiling(rows: list[dict[str, Any]], what: str, workload: str, past: int, rates: dict[str, Any]) -> str:
    """Our time over the machine's for the counted work."""
    found = [row for row in rows if (row["what"], row["workload"], row["past"]) == (what, workload, past) and "macs" in row]
    if not found or rates is None:
        return ""
    ceiling = Machine(rates["gemm"], rates["copy"]).ceiling_seconds(Work(found[0]["macs"], found[0]["bytes"]))
    return f"{found[0]['ours']['median'] / ceiling:.2f}"


def cell(rows: list[dict[str, Any]], what: str, workload: str, past: int, peer: str) -> str:
    """The ratio to a peer; where it was not run, our time over that at the smallest number of tasks, in words."""
    points = {row["past"]: row for row in rows if (row["what"], row["workload"]) == (what, workload)}
    if past not in points:
        return ""
    entry = points[past]["peers"].get(peer, {})
    if "ratio" in entry:
        low, high = entry["ratio_quartiles"]
        return f"{entry['ratio']:.1f}× ({low:.1f} to {high:.1f})"
    fewest = min(points)
    own = points[past]["ours"]["median"] / points[fewest]["ours"]["median"]
    return f"not run; ours {own:.2f}× its time at {fewest}" if peer == PEER else "not run"


def with_peers(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results, with ``peers`` also where it was written before there was more than one."""
    if "peers" in row:
        return row
    return {**row, "peers": {PEER: {**row["peer"], "ratio": row["ratio"], "ratio_quartiles": row["ratio_quartiles"]}}}


def loop_text(loop: dict[str, Any]) -> str:
    machine, whole, last = loop["environment"], loop["loop"], loop["by_task"][-1]
    (low, high), tasks = whole["ratio_quartiles"], loop["tasks"]
    lines = [
        "",
        f"A loop of {tasks} tasks (`bench/split_loop.py`) then takes {whole['ratio']:.1f} times less time ({low:.1f} to "
        f"{high:.1f}), its last task {last['ratio']:.1f} times,",
        f"with the same losses: {machine['machine']}, {machine['threads']} threads, hypnettorch {machine['hypnettorch']},",
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
        "",
    ]
    return "\n".join(lines)


def recipes_table() -> str:
    reached = measured()
    lines = [
        "",
        "| recipe | published | measured: mean ± SEM of seeds | largest drop, points | steps, minutes a seed |",
        f"|{'---|' * 5}",
    ]
    for name, runs in reached.items():
        seeds = f"{runs.mean_and_error}, {len(runs.seeds)} seed{'s' if len(runs.seeds) > 1 else ''}"
        drop = f"{100 * max(runs.largest_drop):.2f}" if runs.largest_drop and runs.measure == "accuracy" else ""
        minutes = f"{runs.steps:,}, {statistics.median(runs.seconds) / 60:.1f} on {runs.where}"
        lines.append(f"| `{name}` | {RECIPES[name].published} | {seeds} | {drop} | {minutes} |")
    missing = sum(name not in reached for name in RECIPES)
    more = f" {missing} more recipes have not been run yet; `fasthyper list` shows all." if missing else ""
    ours = "Settings without a published figure are our own."
    lines += [
        "",
        f"Minutes are wall time of training, the median of seeds, on machines that did other work beside. {ours}{more}",
    ]
    return "\n".join([*lines, ""])


def slowdown_text() -> str:
    """Of long sequences, how much slower last tasks were than the first ones with a past, and the worst task."""
    lines = [""]
    for name, runs in json.loads((RESULTS / "recipes.json").read_text()).items():
        if runs.get("slowdown") and RECIPES[name].num_tasks >= 100:
            found = zip(runs["seeds"], runs["slowdown"], strict=True)
            ratios = ", ".join(f"{ratio:.2f} (seed {seed})" for seed, ratio in found if ratio is not None)
            lowest = f"no task of seeds {', '.join(map(str, runs['seeds']))} below {100 * min(runs['lowest']):.2f} %"
            lines.append(f"`{name}` {ratios} on {runs['where']}; at the end {lowest}.")
    return "\n".join([*lines, ""])


def precision_table(precision: dict[str, Any]) -> str:
    lines = ["", "| state | step | value: ours | loop | gradient: ours | loop | high | medium |", f"|{'---|' * 8}"]
    for row in precision["errors"]:
        errors = [f"{row[who][what]:.0e}" for what in ("value", "gradient") for who in ("ours", "loop")]
        errors += [f"{row[precision]['gradient']:.0e}" for precision in ("high", "medium")]
        step = "" if row["step"] is None else f"{row['step']:.0e}"
        lines.append(f"| {row['state']} | {step} | {' | '.join(errors)} |")
    return "\n".join([*lines, ""])


def layouts_table(layouts: dict[str, Any]) -> str:
    runs = layouts["runs"]
    lines = ["", "| seed | flat: mean accuracy, largest drop | aligned |", "|---|---|---|"]
    for seed in dict.fromkeys(run["seed"] for run in runs):
        cells = [
            f"{100 * run['scores']['acc']:.2f} %, {100 * run['scores']['largest_drop']:.2f} points"
            for layout in ("flat", "aligned")
            for run in runs
            if (run["seed"], run["layout"]) == (seed, layout)
        ]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    means = [
        sum(run["scores"]["acc"] for run in runs if run["layout"] == layout) / (len(runs) / 2)
        for layout in ("flat", "aligned")
    ]
    lines.append(f"| mean | {' | '.join(f'{100 * mean:.2f} %' for mean in means)} |")
    return "\n".join([*lines, ""])


def goals_table(
    machines: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]], aligned: dict[str, Any]
) -> str:
    """Times faster than the peer: asked, and on each machine (what of, rows, its rates) measured and at most.

    At most: were our time that of the counted work at the machine's best rates. ``aligned``: where and when AMD's steps of
    that layout were timed, in a run of their own.
    """
    lines = ["", f"| | asked | {' | '.join(machines)} |", f"|{'---|' * (2 + len(machines))}"]
    for what, workload, past, asked in GOALS:
        cells = []
        for _, rows, rates in machines.values():
            found = [row for row in rows if (row["what"], row.get("workload"), row.get("past")) == (what, workload, past)]
            peer = found[0]["peers"].get(PEER, {}) if found else {}
            if "ratio" not in peer:
                cells.append("not run")
                continue
            floor = Machine(rates["gemm"], rates["copy"]).ceiling_seconds(Work(found[0]["macs"], found[0]["bytes"]))
            cells.append(f"{peer['ratio']:.1f}× of {peer['median'] / floor:.1f}×")
        lines.append(f"| {what} `{workload}` at {past} | {asked}× | {' | '.join(cells)} |")
    lines.append("")
    for name, (environment, _, rates) in machines.items():
        of_what = f"{environment['machine']}, commit {environment['commit']}, {environment['date']}"
        lines.append(f"- {name}: {of_what}; {1e-9 * rates['gemm']:.0f} GFLOP/s, {1e-9 * rates['copy']:.0f} GB/s")
    lines.append(
        f"- AMD, aligned: a run of its own, commit {aligned['commit']}, {aligned['date']}, held against the same rates"
    )
    return "\n".join([*lines, ""])


def machines_of(
    cpu: dict[str, Any],
    entries: list[dict[str, Any]],
    plain: dict[str, Any],
    amd: dict[str, Any],
    aligned: dict[str, Any],
    products: dict[str, Any],
    avx2: dict[str, Any],
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]]:
    """The machines of the goals' table; a rate of products is the best there is, torch's or that of the kernels."""
    (of_tiles,) = (entry["flops_per_second"] for entry in entries if entry["what"] == "product")
    of_products = products["flops_per_second"].values()
    with_tiles = cpu["machine_info"]["ceiling"] | {"gemm": max(of_tiles.values())}
    return {
        "tile units": (cpu["machine_info"], entries, with_tiles),
        "no tile units": (plain["environment"], plain["rows"], plain["machine"]),
        "AMD": (amd["environment"], [*amd["rows"], *aligned["rows"]], amd["machine"] | {"gemm": max(of_products)}),
        "AMD, AVX2": (avx2["environment"], avx2["rows"], avx2["machine"]),
    }


def planner_table(planner: dict[str, Any]) -> str:
    machine, entries = planner["machine_info"], [entry["extra_info"] for entry in planner["benchmarks"]]
    lines = [
        "",
        f"on {machine['machine']}, {machine['threads']} thread{'s' * (machine['threads'] != '1')} "
        f"({machine['backend']}), commit {machine['commit']}:",
        "",
        "| tasks, chunks, chunk size, width | Gram form, ms | direct form, ms | pick over best |",
        f"|{'---|' * 4}",
    ]
    for over, most in (("workloads", None), ("random", 5)):
        (found,) = (entry["table"] for entry in entries if entry["over"] == over)
        for row in sorted(found, key=lambda row: -row["pick_over_best"])[:most]:
            shape = ", ".join(str(row[key]) for key in ("tasks", "chunks", "chunk_size", "width"))
            name = f"`{row['workload']}`: {shape}" if "workload" in row else shape
            times = " | ".join(f"{1e3 * row['seconds'][form]:.2f}" for form in ("gram", "direct"))
            lines.append(f"| {name} | {times} | {row['pick_over_best']:.2f} |")
    return "\n".join([*lines, ""])


def threads_text(found: dict[str, Any]) -> str:
    """How much faster the regularizer is with all threads than with one."""
    machine, entries = found["machine_info"], [entry["extra_info"] for entry in found["benchmarks"]]
    times = ", ".join(f"`{row['workload']}` at {row['past']} {row['speedup']:.2f} times" for row in entries)
    return f"\n{times}\n({machine['machine']}, commit {machine['commit']}).\n"


def memory_text(found: dict[str, Any]) -> str:
    """What a step holds, ours and the peer's."""
    (row,), machine = found["rows"], found["environment"]
    recompute, theirs = row["peers"]["recompute"], row["peers"][PEER]
    of_what = "with what a snapshot, moments and kept scratch take"
    ours, less, most = (1e-6 * sum(side["memory"].values()) for side in (row, recompute, theirs))
    return (
        f"\nMemory of a {row['what']} of `{row['workload']}` at {row['past']}, {of_what}:\n"
        f"{ours:.0f} MB; {less:.0f} MB with `memory_budget=0`, "
        f"which takes {recompute['ratio']:.2f} times as long; {PEER}'s {most:.0f} MB,\n"
        f"{most / ours:.1f} and {most / less:.1f} times as much (asked: 10); on {machine['machine']},\n"
        f"commit {machine['commit']}, {machine['date']}.\n"
    )


def products_table(found: dict[str, Any]) -> str:
    """What takes how long with products in registers and by torch's matrix library."""
    machine, rates = found["environment"], found["flops_per_second"]
    lines = ["", "| | in registers, ms | by torch's library, ms | times |", f"|{'---|' * 4}"]
    for case, row in found["rows"].items():
        if case != "product":
            times = " | ".join(f"{1e3 * row[way]['median']:.2f}" for way in ("registers", "torch"))
            low, median, high = (f"{row['ratio'][key]:.2f}" for key in ("low", "median", "high"))
            lines.append(f"| {case} | {times} | {median} ({low} to {high}) |")
    lines += [
        "",
        f"{machine['machine']}, {machine['threads']} threads, commit {machine['commit']}, {machine['date']}.",
        f"Best product of 2048³ in that run: {1e-9 * rates['registers']:.0f} and {1e-9 * rates['torch']:.0f} GFLOP/s.",
    ]
    return "\n".join([*lines, ""])


def ablation_tables(path: Path) -> str:
    """Mean ± standard error over seeds of what is reached with so many past tasks held in each step, recipe by recipe."""
    if not path.exists():
        return "\nIt has not been run yet.\n"
    lines = []
    for recipe, ablation in json.loads(path.read_text()).items():
        runs = ablation["runs"]
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
        lines += [
            "",
            f"`{recipe}` cut to {ablation['tasks']} tasks of {ablation['steps']} steps, seeds {seeds}; CPU time:",
            "",
            "| held in each step | equal | steps a task | mean accuracy | forgetting, points | CPU time |",
            f"|{'---|' * 6}",
        ]
        whole = statistics.mean(run["seconds"] for run in runs if run["sampled"] is None)
        for kind in dict.fromkeys((run["equal"], run["sampled"], run["per_chunk"]) for run in runs):
            equal, sampled, per_chunk = kind
            some = [run for run in runs if (run["equal"], run["sampled"], run["per_chunk"]) == kind]
            steps = "/".join(str(step) for step in dict.fromkeys(run["steps"] for run in some))
            accuracy = with_error([run["acc"] for run in some])
            forgetting = with_error([run["forgetting"] for run in some]).removesuffix(" %")
            seconds = statistics.mean(run["seconds"] for run in some) / whole
            name = "all past tasks" if sampled is None else f"{sampled} sampled{' for each chunk' * per_chunk}"
            lines.append(f"| {name} | {equal} | {steps} | {accuracy} | {forgetting} | {seconds:.2f}× |")
    return "\n".join([*lines, ""])


def scaling_table(scaling: dict[str, Any], entries: list[dict[str, Any]], rates: dict[str, Any]) -> str:
    """What ranks send, and how long a step then takes, as predicted from those of one and from sums of two."""
    machine, where = Machine(rates["gemm"], rates["copy"]), scaling["environment"]
    lines = [
        "",
        f"| workload, past tasks | MB a step | {' | '.join(f'ms, K = {ranks}' for ranks in RANKS)} | fastest K |",
        f"|{'---|' * (3 + len(RANKS))}",
    ]
    links = []
    for name in dict.fromkeys(entry["workload"] for entry in scaling["sums"]):
        link = Link.of_two({entry["bytes"]: entry["seconds"] for entry in scaling["sums"] if entry["workload"] == name})
        links.append(f"{1e-9 * link.rate:.2f} GB/s after {1e6 * link.latency:.0f} us (`{name}`)")
        shapes = Shapes.of(WORKLOADS[name])
        step, drift = (
            {e["past"]: e["ours"]["median"] for e in entries if (e["what"], e.get("workload")) == (what, name)}
            for what in ("step", "regularizer")
        )
        for past, alone in step.items():
            seconds = {
                ranks: seconds_on_ranks(shapes, past, ranks, alone, drift, machine, link) for ranks in range(1, MOST_RANKS)
            }
            cells = " | ".join(f"{1e3 * seconds[ranks]:.1f}" for ranks in RANKS)
            best = min(seconds, key=seconds.__getitem__)
            lines.append(f"| `{name}`, {past} | {1e-6 * FLOAT * sum(messages(shapes)):.1f} | {cells} | {best} |")
    lines += [
        "",
        f"In a ring a rank sends 2 (K-1) / K times those MB. gloo, between two processes: {' and '.join(links)} a round;",
        f"{where['machine']}, torch {where['torch']}, commit {where['commit']}, {where['date']}.",
    ]
    return "\n".join([*lines, ""])


def draw(rows: list[dict[str, Any]], cpu: dict[str, Any]) -> None:
    """Step time against past tasks, a panel per workload measured at more than one number, and the soak, for a light and
    a dark page."""
    FIGURES.mkdir(exist_ok=True)
    steps = [row for row in rows if row["what"] == "step"]
    counts = Counter(row["workload"] for row in steps)
    machine = cpu["machine_info"]
    for theme, ink in (("light", "#24292f"), ("dark", "#d0d7de")):
        drawn = [row for row in steps if counts[row["workload"]] > 1]
        figure = times_figure(drawn, f"{machine['machine']}, {machine['threads']} threads", ink)
        metadata = {"Date": None, "Creator": None}
        figure.savefig(FIGURES / f"step-{theme}.svg", transparent=True, metadata=metadata)
        if (soak := report_soak.load(RESULTS)) is not None:
            report_soak.figure(soak, ink).savefig(FIGURES / f"soak-{theme}.svg", transparent=True, metadata=metadata)


if __name__ == "__main__":
    sys.exit(main())
