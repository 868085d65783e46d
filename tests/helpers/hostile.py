"""Runs folders and servers as somebody who means harm would make them."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from gptcore.files import JsonObject


def some(values: Iterable[str], *fast: str) -> list[Any]:
    """Values of a parameter, of which the fast tier takes a few."""
    return [
        pytest.param(value, id=ascii(value), marks=() if value in fast else pytest.mark.full)
        for value in values
    ]


COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, or that turn a text around."""


def seen_in(folder: Path, *but: Path) -> dict[str, object]:
    """Everything below a folder with its contents, without what lies below some others."""
    found: dict[str, object] = {}
    for place in sorted(folder.rglob("*")):
        if any(place.is_relative_to(one) for one in but):
            continue
        if place.is_symlink():
            found[str(place)] = place.readlink()
        else:
            found[str(place)] = place.read_bytes() if place.is_file() else "a folder"
    return found


class World:
    """A home with files that are nobody's business, and a runs folder that somebody else made."""

    def __init__(self, root: Path, runs_dir: Path) -> None:
        self.root, self.runs_dir, self.home = root, runs_dir, root / "home"
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ssh" / "id_rsa").write_text("a key")
        (self.home / ".bashrc").write_text("# mine\n")
        self.outside = root / "outside"
        self.outside.mkdir()
        self.sweep_run, self.location = self.sql(
            "select r.run_uuid, r.artifact_uri from runs r join tags t on t.run_uuid = r.run_uuid "
            "where t.key = 'kind' and t.value = 'sweep'"
        )[0]
        self.plan = self.files_of(self.sweep_run) / "plan.json"

    def sql(self, command: str, *values: object) -> list[Any]:
        """What the database answers."""
        with sqlite3.connect(self.runs_dir / "mlflow.db") as opened:
            return opened.execute(command, values).fetchall()

    def trials(self) -> list[str]:
        """The ids of the runs of finished trials."""
        found = self.sql("select run_uuid from tags where key = 'trial_status' and value = ?",
                         "finished")  # fmt: skip
        return [run_id for (run_id,) in found]

    def files_of(self, run_id: str) -> Path:
        """The folder of a run's files."""
        return self.runs_dir / "artifacts" / run_id / "artifacts"

    def tag(self, run_id: str, name: str, value: object) -> None:
        """Set a tag as no client would."""
        self.sql("delete from tags where run_uuid = ? and key = ?", run_id, name)
        self.sql("insert into tags (run_uuid, key, value) values (?, ?, ?)", run_id, name, value)

    def edit_plan(self, change: Callable[[JsonObject], object]) -> None:
        """Change the plan."""
        plan = json.loads(self.plan.read_text())
        change(plan)
        self.plan.write_text(json.dumps(plan))

    @contextmanager
    def untouched(self, *but: Path) -> Iterator[None]:
        """Inside, nothing is written but reports, what is named, and the database."""
        mine = (self.runs_dir / "reports", self.runs_dir / "mlflow.db", *but)
        before = seen_in(self.root, *mine)
        yield
        after = seen_in(self.root, *mine)
        assert after == before, sorted(after.keys() ^ before.keys())
        reports = self.runs_dir / "reports"
        if reports.is_dir():
            folders = [place.name for place in reports.iterdir()]
            assert all(re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) for name in folders), folders


def check_said(out: str, err: str, code: int) -> None:
    """Assert that a command ended as it may, in one sentence that a terminal shows as it is."""
    assert code in (0, 2), err
    assert not COMMANDS.search(out + err), (out, err)
    if code == 2:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err


@contextmanager
def answering(answer: Callable[[str, str, JsonObject], Any]) -> Iterator[tuple[str, list[str]]]:
    """An http server; yields its address, and the Authorization of every request to it.

    `answer` takes method, path and question of a request. It gives bytes, an object, or a status.
    """
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers.get("Authorization", ""))
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            url = urlsplit(self.path)
            question = {name: values[0] for name, values in parse_qs(url.query).items()}
            if body[:1] == b"{":
                question |= json.loads(body)
            found = answer(self.command, unquote(url.path), question)
            if isinstance(found, tuple):  # a redirection
                self.send_response(found[0])
                self.send_header("Location", found[1] + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status = found if isinstance(found, int) else 200
            whole = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()


class Answers:
    """What an MLflow server would answer that has the runs of a runs folder."""

    def __init__(self, world: World) -> None:
        from mlflow.utils.proto_json_utils import message_to_json

        from helpers.store import store_in

        store, self.world = store_in(world.runs_dir), world
        self.experiments = [
            json.loads(message_to_json(one.to_proto())) for one in store.client.search_experiments()
        ]
        self.runs: list[JsonObject] = [
            json.loads(message_to_json(run.to_proto()))
            for run in store.search("attributes.start_time > 0")
        ]
        for run in self.runs:
            run["info"]["artifact_uri"] = f"mlflow-artifacts:/{run['info']['run_id']}/artifacts"
        self._kinds = {
            kind: [run for run in self.runs if tag in run["data"]["tags"]]
            for kind in ("trial", "sweep")
            for tag in [{"key": "kind", "value": kind}]
        }

    def of_kind(self, kind: str) -> list[JsonObject]:
        """The runs with a tag `kind`."""
        return self._kinds[kind]

    def __call__(self, method: str, path: str, question: Mapping[str, Any]) -> Any:
        if path == "/health":
            return b"OK"
        if path.endswith("/experiments/search"):
            return {"experiments": self.experiments}
        if path.endswith("/runs/search"):
            kind = "sweep" if "'sweep'" in question.get("filter", "") else "trial"
            return {"runs": self.of_kind(kind)}
        if path.endswith("/runs/get"):
            return {"run": next(run for run in self.runs if run["info"]["run_id"] ==
                                question["run_id"])}  # fmt: skip
        if path.endswith("/mlflow-artifacts/artifacts"):
            folder = self.world.runs_dir / "artifacts" / question.get("path", "")
            files = folder.iterdir() if folder.is_dir() else []
            return {"files": [{"path": file.name, "is_dir": file.is_dir()} for file in files]}
        if "/mlflow-artifacts/artifacts/" in path and method == "PUT":
            return {}
        if "/mlflow-artifacts/artifacts/" in path:
            file = self.world.runs_dir / "artifacts" / path.partition("/artifacts/")[2]
            return file.read_bytes() if file.is_file() else 404
        return 404
