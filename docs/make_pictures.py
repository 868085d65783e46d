"""Make the pictures of README.md and docs/ from a finished sweep, in a headless Chromium.

    python docs/make_pictures.py --runs-dir runs --name quick

Run it by hand after a change to the report or to MLflow's view. It needs Chromium
(apt-get install chromium), the extra `dev` of this project for Playwright, and a sweep with a
report (python analysis/report.py writes it anew). It writes report.png, depth.png and mlflow.png
into docs/pictures. The report's list of contents is left out, so that the verdicts fit into one
picture.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The checkout's root, not its docs/, is where imports start.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import requests
from playwright.sync_api import sync_playwright

from tracking.address import StoreAddress
from tracking.store import Store

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 980
"""Pixels of a picture of the report."""
MOST_BYTES = 300_000
"""Of one picture: everybody who clones the repository has to fetch it."""
SECONDS_TO_START = 120.0


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
        with mlflow_server(args.runs_dir.resolve()) as address:
            picture_mlflow(browser, address, args.name)
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


def picture_mlflow(browser: Any, address: str, name: str) -> None:
    """Picture the page that MLflow shows of a sweep."""
    store = Store(StoreAddress(address))
    experiment = store.client.get_experiment_by_name(name)
    assert experiment, f"there is no sweep {name}"
    page = browser.new_page(viewport={"width": 1280, "height": 960})
    page.goto(store.address.chart_page(experiment.experiment_id))
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
def mlflow_server(runs_dir: Path) -> Iterator[str]:
    """Serve the MLflow database of a runs folder. Yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    database = f"sqlite:///{runs_dir / 'mlflow.db'}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", database,
    ]  # fmt: skip
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            try:
                requests.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
