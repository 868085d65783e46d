"""MLflow's pages of a runs folder, for the user who starts this command and for nobody else.

python -m tracking.pages --runs-dir runs --name quick

It prints a link that opens the page of a sweep. The link opens once, and after each use there is a
new one. Every other request is refused. A plain `mlflow ui` asks for nothing: whoever has an
account on this machine can open it, and can have it show any file of the user who runs it.

The pages can rename, tag, note, delete and restore runs and experiments. They make none, and they
show no file that is outside the runs folder. From another machine, open a tunnel with the same port
at both ends, such as `ssh -L 5001:127.0.0.1:5001 HOST`, and give --port 5001.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from gptcore.config import InputError
from tracking.address import StoreAddress, chart_path, store_address
from tracking.arguments import Parser, prepare_output, print_error
from tracking.guard import MLFLOW_SETTINGS, equal, guarded
from tracking.private_api import pages_app
from tracking.store import Store, named_runs

if TYPE_CHECKING:
    from pathlib import Path

    import uvicorn
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
COOKIE = "gpt-sweeps"
OWN_HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]+)?")
"""What a browser calls this machine, at either end of a tunnel.

Any other name is one that somebody else has made point here, to have a browser ask for his page.
"""
ALLOWED = re.compile(
    r"GET /(version|get-artifact|static-files/.+)?"
    r"|(GET|POST) /graphql"
    r"|GET /ajax-api/[23]\.0/mlflow/"
    r"(server-info|runs/get|artifacts/list|experiments/(get|get-by-name|search)"
    r"|metrics/get-history(-bulk(-interval)?)?|(registered-models|model-versions)/search)"
    r"|POST /ajax-api/[23]\.0/mlflow/"
    r"((experiments|runs|logged-models|traces)/search|experiments/search-datasets"
    r"|(experiments|runs)/(update|delete|restore)|runs/(set|delete)-tag"
    r"|experiments/(set|delete)-experiment-tag)"
)
"""The requests that the pages may make: those that look, and those that tidy up.

What is left out would make experiments and models whose files lie anywhere, upload files, call
other machines, or have MLflow's assistant run commands.
"""
OTHER_HOST = PlainTextResponse(f"these pages are at {HOST} alone\n", status_code=403)
NOT_ALLOWED = JSONResponse(
    {
        "error_code": "PERMISSION_DENIED",
        "message": "these pages rename, tag, delete and restore runs and experiments, and nothing "
        "more: use MLflow's Python client on the database for the rest",
    },
    status_code=403,
)
OPENS = (
    '<!doctype html><meta http-equiv="refresh" content="0; url={page}">'
    '<a href="{page}">Open the page</a>\n'
)


def behind_link(
    app: ASGIApp,
    page: str,
    announce: Callable[[str], object],
    printed_by: str = "python -m tracking.pages",
) -> ASGIApp:
    """Put an application behind links that open once.

    Args:
        app: what answers those who have opened a link.
        page: where a link leads, below the application.
        announce: called with the path and query of each new link, the first one at once.
        printed_by: the command that prints the links. It is named when a visitor is refused.
    """
    refused = PlainTextResponse(
        f"these pages need the link that `{printed_by}` has printed last: each link opens only "
        "once\n",
        status_code=401,
    )
    # A browser sends a cookie to every port of a machine, and so to servers of other accounts. It
    # sends this one only below a path that they do not know.
    folder = f"/{secrets.token_urlsafe(16)}/"
    session = f"{COOKIE}={secrets.token_urlsafe(32)}"
    token = ""

    def renew() -> None:
        nonlocal token
        token = secrets.token_urlsafe(32)
        announce(f"{folder}open?token={token}")

    def admits(headers: Headers) -> bool:
        cookies = headers.get("cookie", "").split(";")
        return any(equal(cookie.strip(), session) for cookie in cookies)

    def opened(request: Request) -> Response:
        if not admits(request.headers):
            if not equal(request.query_params.get("token", ""), token):
                return refused
            renew()
        # A page, for a browser does not send the cookie after a redirect that begins elsewhere, as
        # in a terminal that is a page itself.
        answer = HTMLResponse(OPENS.format(page=html.escape(f"{folder}{page}")))
        answer.headers["Set-Cookie"] = f"{session}; Path={folder}; HttpOnly; SameSite=Strict"
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def below_folder(scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is admitted, as the application would at the top."""
        path = scope["path"].removeprefix(folder[:-1])
        if scope["path"].startswith(folder):
            await app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
        else:
            await refused(scope, receive, send)

    inside = guarded(below_folder, admits, refused)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_privately(message: Message) -> None:
            if message["type"] == "http.response.start":
                # No other server learns the folder from a link that is followed.
                message["headers"] = [*message["headers"], (b"referrer-policy", b"same-origin")]
            await send(message)

        if not OWN_HOSTS.fullmatch(Headers(scope=scope).get("host", "")):
            await OTHER_HOST(scope, receive, send)
        elif (scope["method"], scope["path"]) == ("GET", f"{folder}open"):
            await opened(Request(scope))(scope, receive, send_privately)
        else:
            await inside(scope, receive, send_privately)

    renew()
    return answer


def tidying_only(app: ASGIApp) -> ASGIApp:
    """Wrap an application so that it answers only the requests of ALLOWED."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        asked = f"{scope['method'].replace('HEAD', 'GET')} {scope['path']}"
        await (app if ALLOWED.fullmatch(asked) else NOT_ALLOWED)(scope, receive, send)

    return answer


def page_of(address: StoreAddress, names: Sequence[str]) -> str:
    """Return the path of a sweep's page of charts.

    Args:
        address: of the store.
        names: of the sweep; without one, the sweep launched last.

    Raises:
        InputError: the store is not a database, does not answer, or has no such sweep.
    """
    if address.is_server:
        raise InputError(
            f"MLFLOW_TRACKING_URI names {address.server}, which has pages of its own: open "
            f"{address.masked}"
        )
    if not address.exists:
        raise InputError(f"there is no sweep yet: {address.database} does not exist")
    store = Store(address)
    store.open()
    (run,) = named_runs(store, names)
    return chart_path(run.info.experiment_id)


def listen(port: int) -> socket.socket:
    """Listen on a port of the loopback address; 0 stands for a free one.

    Raises:
        InputError: the port cannot be had.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise InputError(
            f"--port {port} cannot be used ({error.strerror}): give another one, or none for a "
            "free one"
        ) from error


def quiet_server(app: ASGIApp, log_level: str = "warning") -> uvicorn.Server:
    """Return a server that logs no requests, because they contain the secret links."""
    import uvicorn  # not at the top: MLflow thinks that a process with uvicorn is a server

    # Without lifespan, because MLflow's lifespan would look for containers of its assistant.
    settings = uvicorn.Config(
        app, log_level=log_level, access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    return uvicorn.Server(settings)


def serve(runs_dir: Path, names: Sequence[str], port: int) -> None:
    """Serve the pages until Ctrl-C.

    Args:
        runs_dir: the runs folder.
        names: of the sweep whose page the links open; without one, the sweep launched last.
        port: to listen on; 0 stands for a free one.

    Raises:
        InputError: there are no such pages, or the port cannot be had.
    """
    os.environ.update(MLFLOW_SETTINGS)
    address = store_address(runs_dir)
    page = page_of(address, names)
    with listen(port) as listener:
        base = f"http://{HOST}:{listener.getsockname()[1]}"
        mlflow = tidying_only(pages_app(address.uri, runs_dir.resolve() / "artifacts"))
        print(f"MLflow's pages of {runs_dir}, until Ctrl-C. The last link opens once:", flush=True)
        app = behind_link(mlflow, page, lambda link: print(f"  {base}{link}", flush=True))
        with contextlib.suppress(KeyboardInterrupt):
            quiet_server(app).run([listener])


def port_number(text: str) -> int:
    """Parse --port."""
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code: 0 after Ctrl-C, 2 for bad input."""
    prepare_output()
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_runs_dir()
    parser.add_argument("--name", help="name of the sweep to open [the sweep launched last]")
    parser.add_argument("--port", type=port_number, default=0, help="to listen on [a free one]")
    try:
        args = parser.parse_args(argv)
        serve(args.runs_dir, [args.name] if args.name is not None else [], args.port)
    except InputError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
