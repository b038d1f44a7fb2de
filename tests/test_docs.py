"""The pages of docs/: each begins with code that runs, and relative links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

from fasthyper.streams import fetch

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES]
NEEDS = re.compile(r"<!-- needs: ([\w., ]+) -->")  # on a page's first line: modules without which its code cannot run
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"]+)\"")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_begins_with_code_that_runs(page, tmp_path, monkeypatch):
    text = page.read_text()
    first, *_ = text.splitlines()
    needs = NEEDS.fullmatch(first)
    for module in needs[1].split(",") if needs else ():
        pytest.importorskip(module.strip(), reason=f"docs/{page.name} needs {module.strip()}, which is not installed")
    block = BLOCK.search(text)
    assert block is not None, f"{page} has no block of Python"
    for name, data in fetch.DATASETS.items():  # whatever this machine has in its cache: a page needs no data set
        monkeypatch.setitem(fetch.DATASETS, name, data._replace(sources={}))
    monkeypatch.setattr(fetch, "data_home", lambda: tmp_path / "no data")
    monkeypatch.chdir(tmp_path)
    code = "\n" * text[: block.start(1)].count("\n") + block[1]  # so that errors name the page's own lines
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_relative_links_lead_somewhere(text):
    found = (link or source for link, source in LINK.findall(text.read_text()))
    paths = [link.split("#")[0] for link in found if not re.match(r"[a-z]+:", link)]
    missing = [path for path in paths if path and not (text.parent / path).exists()]
    assert not missing, f"{text.name} links to {', '.join(missing)}"
