"""What README and DESIGN say about GPUs, from what bench/gpu.py and bench/longseq.py wrote, if they did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEER = "hypnettorch"
PARTS = ("rows", "hyper_linear", "alternatives", "profiles")  # of a result
NOTHING = "\nNothing was measured on a GPU yet (`bench/run_gpu.sh` does it).\n"
# of the project, on one H200: past tasks of a step of p100 -> times faster than the peer; precision -> ms of one at 100
RATIOS, MILLISECONDS = {100: 50, 2: 10}, {"fp32": 1.6, "tf32": 0.6}
SECONDS, LARGE = 480, 16e6  # all of PermutedMNIST-100; weights from which hyper_linear is to be ahead
SHOWN = {"fp32": "fp32", "tf32": "TF32"}

Record = dict[str, Any]


def load(folder: Path) -> tuple[Record | None, Record | None]:
    """The two results, as far as they are there."""
    paths = folder / "gpu.json", folder / "gpu_longseq.json"
    found = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    return found[0], found[1]


def readme_text(gpu: Record | None, longseq: Record | None) -> str:
    if gpu is None:
        return NOTHING
    cases = list(dict.fromkeys((row["workload"], row["past"]) for row in gpu["rows"]))
    heads = [f"step, {SHOWN[p]}, ms" for p in SHOWN] + [f"step, {peer}" for peer in (PEER, "eager")]
    heads += [f"regularizer, {SHOWN[p]}, ms" for p in SHOWN] + [f"regularizer, {peer}" for peer in (PEER, "eager")]
    heads += [f"step, MB: ours, {PEER}"]
    lines = ["", f"| workload | past tasks | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 2)}"]
    for workload, past in cases:
        cells = []
        for what in ("step", "regularizer"):
            cells += [milliseconds(best(row_of(gpu, what, workload, past, precision))) for precision in SHOWN]
            row = row_of(gpu, what, workload, past, "fp32")
            cells += [ratio(row, peer) for peer in (PEER, "eager")]
        lines.append(
            f"| `{workload}` | {past} | {' | '.join(cells)} | {memory(row_of(gpu, 'step', workload, past, 'fp32'))} |"
        )
    lines += ["", *machine_lines(gpu), *(longseq_lines(longseq) if longseq else ()), ""]
    return "\n".join(lines)


def design_text(gpu: Record | None, longseq: Record | None) -> str:
    if gpu is None:
        return NOTHING
    lines = ["", f"| on one {gpu['environment']['gpu']} | asked | measured |", "|---|---|---|"]
    lines += [f"| {what} | {asked} | {found} |" for what, asked, found in goals(gpu, longseq)]
    for profile in gpu["profiles"]:
        name = f"`{profile['workload']}` at {profile['past']}, {SHOWN[profile['precision']]}"
        first, *_ = profile["kernels"] or [{"name": "none", "seconds": 0.0}]
        lines += ["", f"{name}: {1e6 * profile['seconds']:.0f} us a step, {profile['launches']:.0f} kernels of "]
        lines[-1] += f"{1e6 * profile['busy']:.0f} us in all; the longest, {1e6 * first['seconds']:.0f} us, is"
        lines += [f"`{first['name'][:100]}`."]
    lines += fastest_lines(gpu)
    return "\n".join([*lines, ""])


def goals(gpu: Record, longseq: Record | None) -> Iterator[tuple[str, str, str]]:
    """What was asked, how much, and what was found. A peer has the flat layout only; ours may have either."""
    missing = "not measured"
    for past, asked in RATIOS.items():
        peer = (row_of(gpu, "step", "p100", past, "fp32") or {}).get("peers", {}).get(PEER, {})
        for workload in ("p100", "p100-aligned"):
            ours = best(row_of(gpu, "step", workload, past, "fp32"))
            found = f"{peer['median'] / ours['median']:.1f}×" if ours and "median" in peer else missing
            yield f"step `{workload}` at {past}, fp32, against {PEER}", f"{asked}×", found
    for precision, most in MILLISECONDS.items():
        for workload in ("p100", "p100-aligned"):
            found = milliseconds(best(row_of(gpu, "step", workload, 100, precision))) or missing
            yield f"step `{workload}` at 100, {SHOWN[precision]}, ms", f"{most}", found
    for precision in SHOWN:
        ratios = [
            row["ratio"]
            for row in gpu["hyper_linear"]
            if row["weights"] >= LARGE and row["precision"] == precision and "ratio" in row
        ]
        found = f"{min(ratios):.2f}× to {max(ratios):.2f}×" if ratios else missing
        yield f"`hyper_linear` at 16 M weights and more, {SHOWN[precision]}, against generate then `F.linear`", "1×", found
    whole = missing
    if longseq and longseq["finished"] and "MNIST" in longseq["settings"]["data"] and not longseq["settings"]["tf32"]:
        whole = f"{longseq['training_seconds'] + longseq['evaluation_seconds']:.0f}"
    yield "PermutedMNIST-100, evaluation included, fp32, s", f"{SECONDS}", whole


def row_of(gpu: Record, what: str, workload: str, past: int, precision: str) -> Record | None:
    wanted = what, workload, past, precision
    rows = (r for r in gpu["rows"] if (r["what"], r["workload"], r["past"], r["precision"]) == wanted)
    return next(rows, None)


def best(row: Record | None) -> Record | None:
    """Our fastest way."""
    ways = [way for way in (row or {"ours": {}})["ours"].values() if "median" in way]
    return min(ways, key=lambda way: way["median"], default=None)


def milliseconds(way: Record | None) -> str:
    return "" if way is None else f"{1e3 * way['median']:.3g} ({1e3 * way['low']:.3g} to {1e3 * way['high']:.3g})"


def ratio(row: Record | None, peer: str) -> str:
    entry = (row or {"peers": {}})["peers"].get(peer, {})
    return f"{entry['ratio']:.1f}×" if "ratio" in entry else ""


def memory(row: Record | None) -> str:
    ours, peer = best(row), (row or {"peers": {}})["peers"].get(PEER, {})
    return ", ".join(f"{1e-6 * side['memory']:.0f}" for side in (ours or {}, peer) if side.get("memory") is not None)


def machine_lines(gpu: Record) -> list[str]:
    machine, rates = gpu["environment"], gpu["rates"]
    size, commits = rates["gemm_size"], sorted({row["commit"] for part in PARTS for row in gpu[part]})
    lines = [
        f"{machine['gpu']}: medians (quartiles) of ours, as one CUDA graph where that is faster, and the others' times over",
        f"ours in float32; torch {machine['torch']}, CUDA {machine['cuda']}, Triton {machine['triton']}, {PEER} "
        f"{machine['hypnettorch']}, commit {' and '.join(commits)}, {machine['date']}.",
        f"Its best product of {size}^3 in that run: fp32 {1e-12 * rates['fp32']:.0f}, TF32 {1e-12 * rates['tf32']:.0f}, "
        f"bf16 {1e-12 * rates['bf16']:.0f} TFLOP/s; its best copy {1e-12 * rates['copy']:.2f} TB/s.",
    ]
    return lines


def longseq_lines(longseq: Record) -> list[str]:
    settings, last = longseq["settings"], max(longseq["evaluations"], key=int, default=None)
    if last is None:
        return []
    score, machine = longseq["evaluations"][last], longseq["slices"][-1]["environment"]
    tf32 = "TF32" if settings["tf32"] else "fp32"
    return [
        "",
        f"{settings['data']}, {settings['layout']}, {tf32}, {settings['steps']} steps a task: after {last} of "
        f"{settings['tasks']} tasks {100 * score['mean']:.2f} % mean accuracy, the lowest {100 * score['lowest']:.2f} %;",
        f"{longseq['training_seconds']:.0f} s of training and {longseq['evaluation_seconds']:.0f} s of evaluation on "
        f"{machine['gpu']}, commit {machine['commit']}.",
    ]


def fastest_lines(gpu: Record) -> list[str]:
    """Of each op that a step calls, what takes how long."""
    if not gpu["alternatives"]:
        return []
    lines = ["", "| op, workload | by each implementation, us |", "|---|---|"]
    for entry in gpu["alternatives"]:
        times = {name: found["median"] for name, found in entry["seconds"].items() if "median" in found}
        shown = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in sorted(times.items(), key=lambda pair: pair[1]))
        name = f"`{entry['op']}`, `{entry['workload']}` at {entry['past']}, {SHOWN[entry['precision']]}"
        lines.append(f"| {name} | {shown or 'none ran'} |")
    return lines
