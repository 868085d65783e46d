"""The guard in front of MLflow's pages: who may ask, and from which page of a browser."""

from __future__ import annotations

import hmac
import urllib.parse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

FOREIGN = PlainTextResponse("a page of another site asked for this\n", status_code=403)

MLFLOW_SETTINGS: Mapping[str, str] = {
    # Otherwise MLflow starts a dozen processes for model serving and scoring, which nobody uses.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment variables for MLflow behind the guard."""


def guarded(
    app: ASGIApp,
    admits: Callable[[Headers], bool],
    refusal: ASGIApp,
    is_open: Callable[[str], bool] = lambda path: False,
) -> ASGIApp:
    """Return an application that answers only requests that are admitted.

    A browser sends its secrets also when a page of somebody else asks. It then names the origin of
    that page, and so does a page of this application whenever it changes anything.

    Args:
        app: what answers.
        admits: whether the headers of a request hold the secret.
        refusal: answers all other requests.
        is_open: the paths for which everybody is answered.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or is_open(scope["path"]):
            await app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if _is_foreign(headers):
            await FOREIGN(scope, receive, send)
        elif admits(headers):
            await app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    return answer


def equal(given: str, wanted: str) -> bool:
    """Return whether two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), wanted.encode())


def _is_foreign(headers: Headers) -> bool:
    """Return whether the page of a browser that asks is another application's."""
    origin = headers.get("origin")
    return origin is not None and urllib.parse.urlsplit(origin).netloc != headers.get("host")
