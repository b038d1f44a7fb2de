"""Writes THIRD_PARTY.md: what fasthyper needs to run, for its extras and for development, with licences.

All is read from the metadata of what is installed; ``make lock`` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """# Licences of others' work

fasthyper is under the Apache License 2.0 (LICENSE). Wheels and source archives hold no other work. What they need is installed
beside them, under licences of its own, as its metadata has them: the first table to run, the second for extras and development.
"""


def needed(name: str, extras: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    """All distributions that ``name`` with ``extras`` needs here, by canonical name, itself left out."""
    found: dict[str, Distribution] = {}
    left, seen = [(name, extras)], set()
    while left:
        entry = left.pop()
        if entry in seen:
            continue
        seen.add(entry)
        try:
            here = distribution(entry[0])
        except PackageNotFoundError:  # of another platform, or not wanted
            continue
        found[canonicalize_name(entry[0])] = here
        for line in here.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in entry[1] or {""}):
                left.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    found.pop(canonicalize_name(name), None)
    return found


def licence(of: Distribution) -> str:
    """As short as its metadata has it: an expression, classifiers, or a line of text; "" where there is none."""
    data = of.metadata
    classifiers = [line.rpartition(" :: ")[2] for line in data.get_all("Classifier", ()) if line.startswith("License ::")]
    text = (data.get("License") or "").strip()
    named = [line for line in classifiers if line != "OSI Approved"]
    if data.get("License-Expression"):
        return data["License-Expression"]
    if named:
        return ", ".join(named)
    return text if text and len(text) < 60 and "\n" not in text else ""


def rows(found: dict[str, Distribution]) -> Iterator[str]:
    yield "| package | licence |\n|---|---|"
    yield from (f"| {name} | {licence(own)} |" for name, own in sorted(found.items()))


if __name__ == "__main__":
    runtime = needed("fasthyper")
    more = {"ninja": distribution("ninja")}
    more |= {name: own for name, own in needed("fasthyper", frozenset({"dev"})).items() if name not in runtime}
    print("\n".join([HEADER, *rows(runtime), "", *rows(more)]))
