"""The report as a browser shows it: as wide as a phone and as a screen, light and dark. Without a browser: skipped."""

from __future__ import annotations

import io
from itertools import product

import pytest
import torch
from browser import PACKAGE, Browser, executable
from synthetic_runs import results, results_of, write_embeddings, write_run, write_samples

from fasthyper.report import write_report

matplotlib = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(
    not executable(), reason=f"no browser: `make` unpacks {PACKAGE} where npm is (Linux, x86-64), and Debian has chromium"
)
VIEWS = list(product((390, 1440), ("light", "dark")))

# what the tests ask of the page; sizes in CSS pixels
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
PICTURES = """[...document.querySelectorAll('svg')].map(svg => {
  const {x, y, width, height} = svg.getBoundingClientRect();
  return [x + scrollX, y + scrollY, width, height].map(Math.round);
})"""
EMBEDDED = """Promise.all([...document.querySelectorAll('svg image')].map(async image => {
  const picture = new Image();
  picture.src = image.getAttribute('href') || image.getAttribute('xlink:href');
  await picture.decode();
  return picture.naturalWidth * picture.naturalHeight;
}))"""
LETTERS = """[...document.querySelectorAll('body *')]
  .filter(element => element.tagName != 'style')
  .filter(element => [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
  .map(element => {
    const style = getComputedStyle(element), svg = element.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return [element.textContent.trim().slice(0, 40), parseFloat(style.fontSize) * scale, svg ? style.fill : style.color];
  })"""
CUT_OFF = """[...document.querySelectorAll('svg text')].filter(text => {
  const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(text => text.textContent)"""
GROUND = "getComputedStyle(document.body).backgroundColor"
IN_CELLS = ("rgb(16, 34, 46)", "rgb(255, 255, 255)")  # chosen by the cell, not by the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(executable(), tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def five_tasks(path):
    directory = write_run(path / "five", results(5), measured={"baseline": [0.91] * 5})
    generator = torch.Generator().manual_seed(1)
    write_embeddings(directory, torch.randn(5, 8, generator=generator))
    write_samples(directory, torch.randint(256, (5, 10, 784), dtype=torch.uint8, generator=generator))
    return [directory], 9


def of_many(size):
    def made(path):
        directory = write_run(path / str(size), results(size))
        write_embeddings(directory, torch.randn(size, 8, generator=torch.Generator().manual_seed(1)))
        return [directory], 8

    return made


def compared(path):
    made = [
        write_run(
            path / f"{beta}-{seed}", results(size), "a-recipe-with-a-rather-long-name", config={"beta": beta, "seed": seed}
        )
        for beta, size in ((0.1, 12), (0.01, 6))
        for seed in (1, 2)
    ]
    errors = results_of([[0.004], [0.0045, 0.003]])
    return [*made, write_run(path / "mse", errors, "toy-regression", measured={"measure": "mse"})], 4 + 2 * 7 + 5


RUNS = {"5": five_tasks, "100": of_many(100), "1,000": of_many(1000), "compared": compared}


def luminance(color):
    """Relative, after WCAG, of `rgb(r, g, b)`."""
    parts = [float(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("kind", RUNS)
def test_page_can_be_read(browser, tmp_path, kind):
    directories, count = RUNS[kind](tmp_path)
    page = write_report(directories, tmp_path / "out")
    assert page.stat().st_size < 5_000_000
    browser.told.clear(), browser.asked.clear()
    for width, scheme in VIEWS:
        browser.open(page, width, scheme)
        assert browser.run(OVERFLOW) <= 0
        ground = luminance(browser.run(GROUND))
        assert ground < 0.05 if scheme == "dark" else ground > 0.9
        letters = browser.run(LETTERS)
        assert len(letters) > 100
        for text, size, color in letters:
            assert size >= 7.9, text  # the numbers in the cells of a matrix; all else is larger
            if color not in IN_CELLS:
                light, dark = sorted((luminance(color), ground), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, color)
        assert not browser.run(CUT_OFF)
        assert all(browser.run(EMBEDDED))
        pictures = browser.run(PICTURES)
        assert len(pictures) == count
        shown = matplotlib.image.imread(io.BytesIO(browser.picture()))
        for x, y, across, down in pictures:
            assert across > 0.8 * min(width - 48, 500) and down > 80
            part = shown[y : y + down, x : min(x + across, width), :3]
            assert len(part) == down and part.std() > 0.01
    assert not browser.told
    assert {address.partition(":")[0] for address in browser.asked} <= {"file", "data"}
    assert {address for address in browser.asked if address.startswith("file:")} == {page.resolve().as_uri()}


def test_a_bad_page_is_noticed(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<script>console.error('said')</script><img src=missing.png><div style='width: 2000px'>wide</div>"
        "<svg viewBox='0 0 10 10' width=10 height=10><text x=5>far out</text></svg>"
    )
    browser.told.clear(), browser.asked.clear()
    browser.open(page, 390, "light")
    assert browser.run(OVERFLOW) > 1000 and browser.run(CUT_OFF) == ["far out"]
    assert any("said" in told for told in browser.told)
    assert any(address.endswith("missing.png") for address in browser.asked)
