"""The report in a browser, without a network."""

import pytest
from axe_playwright_python.sync_playwright import Axe

from analysis.figures import FIGURES
from analysis.report import main
from helpers.paths import SCREENSHOTS

pytestmark = pytest.mark.browser


def wait_until_drawn(page):
    """Wait until all figures of a report are drawn, one after another."""
    page.wait_for_function("document.documentElement.dataset.drawn === 'all'")


def test_a_browser_draws_every_figure_without_a_network(two_sweeps, tmp_path, page):
    out = tmp_path / "report"
    names = ["--name", "one", "two"]
    assert main(["--runs-dir", str(two_sweeps), "--out", str(out), *names]) == 0
    page.goto((out / "report.html").as_uri())
    wait_until_drawn(page)
    found = page.eval_on_selector_all(".chart", "charts => charts.map(chart => chart.id)")
    assert sorted(found) == sorted(set(FIGURES) - {"tau_by_rate"})  # these have one learning rate
    for name in found:  # each figure has marks and an accessible name
        assert page.locator(f"#{name} svg.marks path, #{name} svg.marks line").count() > 5, name
        label = page.locator(f"#{name} [role=graphics-document]").get_attribute("aria-label")
        assert label == FIGURES[name].caption
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "report.png", full_page=True)
    assert page.asked == []
    assert page.said == []


def test_a_figure_shows_numbers_under_the_mouse(two_sweeps, tmp_path, page):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.goto((tmp_path / "report.html").as_uri())
    wait_until_drawn(page)  # a figure moves while those above it are drawn
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


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_is_accessible_and_fits_every_width(two_sweeps, tmp_path, page, scheme, width):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((tmp_path / "report.html").as_uri())
    wait_until_drawn(page)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_a_printed_report_cuts_no_figure_and_shows_all_folded_parts(two_sweeps, tmp_path, page):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.goto((tmp_path / "report.html").as_uri())
    wait_until_drawn(page)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("main details:not([open]):not(.vega-embed details)").count() == 0
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins, in pixels
    widths = page.eval_on_selector_all(
        ".chart svg.marks", "all => all.map(svg => svg.getBoundingClientRect().width)"
    )
    assert max(widths) <= 718
