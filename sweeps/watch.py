"""The page of --watch: the two main pictures of a sweep, drawn again as its trials finish.

It is served by a thread of the driver, on the loopback address, behind a link that opens once.
Another thread draws. Neither is waited for while trials run, and a failure of theirs ends nothing.
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
"""Drawing takes at most this share of the time since the command began.

What it takes is seconds of a core. Where trials use every core, drawing also waits for one, and
takes nothing from them by that.
"""
FIRST_DRAWING, READING = 0.4, 0.01
"""Seconds that a drawing is taken to need before one was measured, and more for each trial."""
MARGIN = 1.5
"""How much more the next drawing is taken to need than the last one: it has more trials, and Polars
reads them in threads that are not measured."""
LOOK_EVERY = 1.0
"""Seconds between two looks whether a picture is due."""
SECONDS_TO_CLOSE = 2.0
"""How long the end of a sweep waits for each thread."""


class Watch:
    """The page of one sweep, and what is known of its trials."""

    def __init__(self, sweep: str, runs_dir: Path, address: StoreAddress, console: Console) -> None:
        """Begin to count the time of the sweep; nothing is served before `open`.

        Args:
            sweep: its name.
            runs_dir: the runs folder.
            address: of the store where the sweep is recorded.
            console: where to print the link, and why a picture cannot be drawn.
        """
        self.sweep, self.console = sweep, console
        # A store of its own: the driver's is used by another thread.
        self.pictures = LivePictures(Store(address), sweep, runs_dir)
        self.planned: Mapping[str, Mapping[str, Scalar]] = {}
        self.had_result: frozenset[str] = frozenset()  # before these trials began
        self.finished: frozenset[str] = frozenset()
        self.line, self.losses, self.share = "no trial has started", "", 0.0
        self.drawing, self.json = 0, "{}"
        self.drawn = (
            f"No picture yet: drawing takes at most {SHARE:.0%} of the time, so the first picture "
            f"comes after {clock(FIRST_DRAWING / SHARE)} or later, when a trial has finished."
        )
        self.begun, self.spent, self.latest = time.monotonic(), 0.0, 0.0
        self._threads: list[threading.Thread] = []
        self._has_failed, self._closed = False, threading.Event()

    def open(self, plan: Plan, done: Collection[str]) -> None:
        """Serve the page until `close`. A sweep that gets more seeds calls this again.

        Args:
            plan: all trials of the sweep.
            done: the keys of those that have a result already.
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
            "--watch: this link opens the page of the sweep once, on this machine:\n"
            f"  http://{HOST}:{listener.getsockname()[1]}{links[0]}",
            soft_wrap=True,
        )

    def close(self) -> None:
        """Serve and draw no more."""
        self._closed.set()
        if self._threads:
            self._server.should_exit = True
        for thread in self._threads:
            thread.join(SECONDS_TO_CLOSE)

    def tell(self, progress: SweepProgress) -> None:
        """Take over what the driver knows of the trials that run."""
        self.line, self.losses = progress.line(), progress.losses()
        self.share = progress.outcomes.share_done
        self.finished = frozenset(progress.outcomes.finished)

    def _app(self, page: str) -> Starlette:
        """Return what answers those who have opened the link."""
        fresh = {"Cache-Control": "no-store"}

        async def state(request: Request) -> Response:
            names = ("line", "losses", "share", "drawing", "drawn")
            return JSONResponse({name: getattr(self, name) for name in names}, headers=fresh)

        async def pictures(request: Request) -> Response:
            return Response(self.json, media_type="application/json", headers=fresh)

        async def whole(request: Request) -> Response:
            return HTMLResponse(page, headers=fresh)

        routes = {"/": whole, "/state": state, "/pictures": pictures}
        return Starlette(routes=[Route(path, answer) for path, answer in routes.items()])

    def _draw_until_closed(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            if self.is_due():
                self.draw()

    def is_due(self) -> bool:
        """Return whether there is something new to draw, and time for it."""
        new = (self.had_result | self.finished) - self.pictures.read
        expected = MARGIN * self.latest or FIRST_DRAWING + READING * len(new)
        allowed = SHARE * (time.monotonic() - self.begun) - self.spent
        return bool(new) and expected <= allowed

    def draw(self) -> None:
        """Draw the pictures of the trials that have a result, and measure how long it takes."""
        begun = time.thread_time()
        try:
            self.json = self.pictures.draw(self.had_result | self.finished, self.planned)
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                self.console.print(
                    f"--watch: the pictures cannot be drawn, and the sweep goes on: "
                    f"{one_line(str(error) or type(error).__name__)}",
                    soft_wrap=True,
                )
        else:
            self.drawing += 1
        self.latest = time.thread_time() - begun
        self.spent += self.latest
        elapsed = time.monotonic() - self.begun
        self.drawn = (
            f"The pictures are of {self.pictures.shown} of "
            f"{counted(len(self.planned), 'trial')}, as of {time.strftime('%H:%M:%S')}. Drawing "
            f"took {self.spent / elapsed:.2%} of the time so far."
        )
