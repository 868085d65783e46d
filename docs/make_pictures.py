"""Make the pictures of README.md and docs/ from a finished sweep, in a headless Chromium.

    python docs/make_pictures.py --runs-dir runs --name quick

Run it by hand after a change to the report or to MLflow's view. It needs Chromium
(apt-get install chromium), the extra `dev` of this project for Playwright, and a sweep with a
report (python analysis/report.py writes it anew). It writes report.png, depth.png and mlflow.png
into docs/pictures. The report's list of contents is left out, so that the verdicts fit into one
picture.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 980
"""Pixels of a picture of the report."""
MOST_BYTES = 300_000
"""Of one picture: everybody who clones the repository has to fetch it."""


def main() -> int:
    """Run the command. Return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="of the sweep (runs)")
    parser.add_argument("--name", default="quick", help="of the sweep (quick)")
    args = parser.parse_args()
    report = (args.runs_dir / "reports" / args.name / "report.html").resolve()
    if not report.exists():
        print(f"error: there is no report {report}: run the sweep first", file=sys.stderr)
        return 2
    PICTURES.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        picture_report(browser, report)
        with served_pages(args.runs_dir.resolve(), args.name) as link:
            picture_mlflow(browser, link)
    too_large = [file for file in PICTURES.glob("*.png") if file.stat().st_size > MOST_BYTES]
    for file in sorted(PICTURES.glob("*.png")):
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
    return 1 if too_large else 0


def picture_report(browser: Any, report: Path) -> None:
    """Picture the verdicts of a report, and the figure of growth over depth."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
    page.goto(report.as_uri())
    page.wait_for_selector("#growth_by_layer svg.marks")
    page.add_style_tag(
        content=".vega-embed details, nav { display: none } h2#verdicts { margin-top: 1rem }"
    )
    table = page.locator("section:has(#verdicts) table").first.bounding_box()
    height = table["y"] + table["height"] + 8
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
    page.screenshot(path=PICTURES / "report.png", clip=clip, full_page=True)
    page.set_viewport_size({"width": 740, "height": 1000})  # as wide as the figure
    figure = page.locator("figure:has(#growth_by_layer)")
    figure.screenshot(path=PICTURES / "depth.png")
    page.close()


def picture_mlflow(browser: Any, link: str) -> None:
    """Picture the page that MLflow shows of a sweep."""
    page = browser.new_page(viewport={"width": 1280, "height": 960})
    page.goto(link)
    page.get_by_text("What the claims are about").wait_for(timeout=60_000)
    for label in ("Hide banner", "Close", "Toggle sidebar"):  # what MLflow has around the page
        button = page.locator(f"button[aria-label='{label}']").first
        if button.count():
            button.click()
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 4")
    page.get_by_text("loss/val").first.wait_for(timeout=30_000)
    page.wait_for_timeout(3_000)  # until the lines are drawn
    page.screenshot(path=PICTURES / "mlflow.png")
    page.close()


@contextmanager
def served_pages(runs_dir: Path, name: str) -> Iterator[str]:
    """Serve MLflow's pages of a sweep. Yield the link that opens them."""
    command = [sys.executable, "-m", "tracking.pages", "--runs-dir", str(runs_dir), "--name", name]
    checkout = Path(__file__).resolve().parents[1]
    server = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        links = (line.strip() for line in server.stdout if line.startswith("  http"))
        link = next(links, "")
        assert link, f"there are no pages of sweep {name}"
        yield link
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
