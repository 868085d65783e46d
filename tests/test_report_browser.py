"""The report in a browser, without a network."""

import pytest

from analysis.figures import FIGURES
from analysis.report import main
from helpers.paths import SCREENSHOTS

pytestmark = pytest.mark.browser


def test_a_browser_draws_every_figure_without_a_network(two_sweeps, tmp_path, page):
    out = tmp_path / "report"
    names = ["--name", "one", "two"]
    assert main(["--runs-dir", str(two_sweeps), "--out", str(out), *names]) == 0
    page.goto((out / "report.html").as_uri())
    page.wait_for_function(f"document.querySelectorAll('svg.marks').length >= {len(FIGURES)}")
    found = page.eval_on_selector_all(".chart", "charts => charts.map(chart => chart.id)")
    assert sorted(found) == sorted(FIGURES)
    for name in FIGURES:  # each has marks, and a name for those who cannot see it
        assert page.locator(f"#{name} svg.marks path, #{name} svg.marks line").count() > 10, name
        label = page.locator(f"#{name} [role=graphics-document]").get_attribute("aria-label")
        assert label == FIGURES[name].caption
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "report.png", full_page=True)
    assert page.asked == []
    assert page.said == []


def test_a_figure_shows_numbers_under_the_mouse(two_sweeps, tmp_path, page):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.goto((tmp_path / "report.html").as_uri())
    mark = page.locator("#init_errors g.mark-symbol.role-mark path").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert {"scheme", "subset", "seed", "kind", "expected", "found"} == set(
        tip.locator("td.key").all_inner_texts()
    )


def test_the_page_can_be_used_by_keyboard(two_sweeps, tmp_path, page):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#histograms input[type=range]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdicts")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"
    # Another step of the slider gives another drawing.
    slider = page.locator("#histograms input[type=range]")
    before = page.locator("#histograms svg.marks").inner_html()
    slider.focus()
    page.keyboard.press("Home")
    drawn = "before => document.querySelector('#histograms svg.marks').innerHTML !== before"
    page.wait_for_function(drawn, arg=before)
    every = page.locator("table")
    assert every.count() == page.locator("table:has(caption):has(th[scope=col])").count()
