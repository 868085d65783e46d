"""Serve the page of --watch: the two main figures of a sweep, drawn again as trials finish.

A thread of the driver serves the page on the loopback address, behind a link that opens once.
Another thread draws. The driver never waits for these threads while trials run. If one of them
fails, the sweep goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from analysis.live import LivePictures, live_page
from gptcore.config import Scalar
from gptcore.units import clock, counted
from sweeps.plan import Plan
from tracking.address import StoreAddress
from tracking.pages import HOST, behind_link, listen, quiet_server
from tracking.store import Store
from tracking.untrusted import one_line

if TYPE_CHECKING:
    from sweeps.execution.progress import SweepProgress

SHARE = 0.01
"""The largest share of the time since the command began that drawing may take.

The time of drawing is measured in seconds of a core. Waiting for a core does not count, because it
takes nothing from the trials.
"""
FIRST_DRAWING, READING = 0.4, 0.01
"""The estimate for the first drawing in seconds: a fixed part, and a part for each trial."""
MARGIN = 1.5
"""The estimate for the next drawing, relative to the last one. It is above 1 because the next
drawing has more trials, and because the threads in which Polars reads are not measured."""
CHECK_EVERY = 1.0
"""Seconds between two checks whether a drawing is due."""
SECONDS_TO_CLOSE = 2.0
"""The longest time that the end of a sweep waits for each thread."""


class Watch:
    """The page of one sweep, and the state of the trials."""

    def __init__(self, sweep: str, runs_dir: Path, address: StoreAddress, console: Console) -> None:
        """Start to measure the time of the sweep. `open` starts to serve the page.

        Args:
            sweep: the name of the sweep.
            runs_dir: the runs folder.
            address: the address of the store where the sweep is recorded.
            console: prints the link, and the reason if a figure cannot be drawn.
        """
        self.sweep, self.console = sweep, console
        # A separate store, because the driver uses its own store in another thread.
        self.pictures = LivePictures(Store(address), sweep, runs_dir)
        self.planned: Mapping[str, Mapping[str, Scalar]] = {}
        self.had_result: frozenset[str] = frozenset()  # before this command
        self.finished: frozenset[str] = frozenset()
        self.line, self.losses, self.share = "no trial has started", "", 0.0
        self.drawing, self.json = 0, "{}"
        self.drawn = (
            f"There is no figure yet. Drawing may take {SHARE:.0%} of the time, so the first "
            "figures appear when a trial has finished, but not before "
            f"{clock(FIRST_DRAWING / SHARE)}."
        )
        self.begun, self.spent, self.latest = time.monotonic(), 0.0, 0.0
        self._threads: list[threading.Thread] = []
        self._has_failed, self._closed = False, threading.Event()

    def open(self, plan: Plan, done: Collection[str]) -> None:
        """Serve the page until `close`. If a sweep gets more seeds, call this again.

        Args:
            plan: all trials of the sweep.
            done: the keys of the trials that already have a result.
        """
        self.planned = {key: config.to_flat() for key, config in plan.trials.items()}
        self.had_result = frozenset(done)
        if self._threads:
            return
        page = live_page(self.sweep)  # takes a second, so before trials run
        links: list[str] = []
        app = behind_link(self._app(page), "", links.append, "init_sweep.py --watch")
        listener = listen(0)
        self._server = quiet_server(app, log_level="critical")
        self._threads = [
            threading.Thread(target=self._server.run, args=[[listener]], daemon=True),
            threading.Thread(target=self._draw_until_closed, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self.console.print(
            "--watch: open this link on this machine. It works once, and shows the sweep:\n"
            f"  http://{HOST}:{listener.getsockname()[1]}{links[0]}",
            soft_wrap=True,
        )

    def close(self) -> None:
        """Stop serving and drawing."""
        self._closed.set()
        if self._threads:
            self._server.should_exit = True
        for thread in self._threads:
            thread.join(SECONDS_TO_CLOSE)

    def tell(self, progress: SweepProgress) -> None:
        """Copy the state of the trials from the driver."""
        self.line, self.losses = progress.line(), progress.losses()
        self.share = progress.outcomes.share_done
        self.finished = frozenset(progress.outcomes.finished)

    def _app(self, page: str) -> Starlette:
        """Return the application that answers visitors who have opened the link."""
        fresh = {"Cache-Control": "no-store"}

        async def state(request: Request) -> Response:
            names = ("line", "losses", "share", "drawing", "drawn")
            return JSONResponse({name: getattr(self, name) for name in names}, headers=fresh)

        async def pictures(request: Request) -> Response:
            return Response(self.json, media_type="application/json", headers=fresh)

        async def html(request: Request) -> Response:
            return HTMLResponse(page, headers=fresh)

        routes = {"/": html, "/state": state, "/pictures": pictures}
        return Starlette(routes=[Route(path, answer) for path, answer in routes.items()])

    def _draw_until_closed(self) -> None:
        while not self._closed.wait(CHECK_EVERY):
            if self.is_due():
                self.draw()

    def is_due(self) -> bool:
        """Return whether there are new trials to draw, and drawing may take more time."""
        new = (self.had_result | self.finished) - self.pictures.read
        expected = MARGIN * self.latest or FIRST_DRAWING + READING * len(new)
        allowed = SHARE * (time.monotonic() - self.begun) - self.spent
        return bool(new) and expected <= allowed

    def draw(self) -> None:
        """Draw the figures of the trials with a result, and measure how long this takes."""
        begun = time.thread_time()
        try:
            self.json = self.pictures.draw(self.had_result | self.finished, self.planned)
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                self.console.print(
                    "--watch: the figures cannot be drawn (the sweep goes on): "
                    f"{one_line(str(error) or type(error).__name__)}",
                    soft_wrap=True,
                )
        else:
            self.drawing += 1
        self.latest = time.thread_time() - begun
        self.spent += self.latest
        elapsed = time.monotonic() - self.begun
        self.drawn = (
            f"At {time.strftime('%H:%M:%S')}, the figures show {self.pictures.shown} of "
            f"{counted(len(self.planned), 'trial')}. Drawing has taken {self.spent / elapsed:.2%} "
            "of the time."
        )
