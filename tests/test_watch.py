"""The page of --watch: what it draws and when, who can open it, and that the sweep goes on."""

import json
import re
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import requests
from rich.console import Console

from analysis.live import LivePictures
from gptcore.config import TrialConfig
from helpers.driving import outcome, start, wait_for
from helpers.paths import SCREENSHOTS
from helpers.store import moved, store_in
from helpers.trials import KILLED, TINY, flags
from sweeps import watch
from sweeps.watch import SHARE, Watch
from tracking.store import trial_status
from tracking.sweep_run import read_plan


@pytest.fixture
def planned(finished_sweep):
    """The knobs of the trials of the sweep `small`, by trial key."""
    store = store_in(finished_sweep)
    trials = read_plan(store, store.sweep_runs()["small"]).trials
    return {key: trial.params for key, trial in trials.items()}


@pytest.fixture
def ended(finished_sweep):
    """The keys of the trials by status, in the order of the plan."""
    keys = {}
    for key, run in reversed(store_in(finished_sweep).trial_runs().items()):
        keys.setdefault(trial_status(run), []).append(key)
    return keys


@pytest.fixture
def pictures(finished_sweep):
    return LivePictures(store_in(finished_sweep), "small", finished_sweep)


def rows_of(drawn, name="qkv_std"):
    """Return all rows of data of a figure."""
    return [row for rows in json.loads(drawn)[name]["datasets"].values() for row in rows]


def test_pictures_drawn_trial_by_trial_are_those_drawn_at_once(
    finished_sweep, planned, ended, pictures
):
    at_once = pictures.draw(ended["finished"], planned)
    growing = LivePictures(store_in(finished_sweep), "small", finished_sweep)
    keys = [*ended["diverged"], *reversed(ended["finished"])]
    drawn = [growing.draw(keys[: count + 1], planned) for count in range(len(keys))]
    assert json.loads(drawn[0]) == {}  # nothing is drawn of a trial that diverged
    assert len(set(drawn)) == len(keys)
    assert json.loads(drawn[-1]) == json.loads(at_once)
    assert set(json.loads(at_once)) == {"qkv_std", "group_log_probs"}
    schemes = {"model5, optim.lr 0.001", "gpt2, optim.lr 0.001"}
    assert {row["scheme"] for row in rows_of(at_once)} == schemes
    assert (growing.shown, len(growing.read)) == (4, 5)


def test_the_tables_of_a_trial_are_read_once(finished_sweep, planned, ended, tmp_path):
    runs_dir = moved(finished_sweep, tmp_path / "runs")
    pictures = LivePictures(store_in(runs_dir), "small", runs_dir)
    before = pictures.draw(ended["finished"], planned)
    for file in runs_dir.rglob("*.parquet"):
        file.unlink()
    assert pictures.draw(ended["finished"], planned) == before


@pytest.fixture
def watching(finished_sweep, planned, monkeypatch):
    """Serve a page of the sweep `small`, without any ended trial.

    The page draws only when the test calls `draw`.
    """
    monkeypatch.setattr(watch, "CHECK_EVERY", 600)
    store = store_in(finished_sweep)
    console = Console(record=True, width=200)
    shown = Watch("small", finished_sweep, store.address, console)
    trials = {key: TrialConfig.from_flat(params) for key, params in planned.items()}
    shown.open(SimpleNamespace(trials=trials), [])
    yield shown
    shown.close()


def link_of(shown):
    return re.search(r"http://\S+", shown.console.export_text(clear=False))[0]


def opened(shown):
    """Open the link. Return the session of the visitor, and the address of the page."""
    visitor, link = requests.Session(), link_of(shown)
    assert visitor.get(link, timeout=30).status_code == 200
    return visitor, link.partition("open?")[0]


def test_the_page_is_private(watching):
    visitor, page = opened(watching)
    assert "vegaEmbed" in visitor.get(page, timeout=30).text
    assert visitor.get(page + "state", timeout=30).json()["drawing"] == 0
    assert visitor.get(page + "pictures", timeout=30).json() == {}
    again = requests.get(link_of(watching), timeout=30)
    assert again.status_code == 401
    assert "the link that `init_sweep.py --watch` has printed last" in again.text
    for path in ("", "state", "pictures"):
        assert requests.get(page + path, timeout=30).status_code == 401
        foreign = {"Origin": "http://elsewhere.example"}
        assert visitor.get(page + path, headers=foreign, timeout=30).status_code == 403
        renamed = {"Host": "elsewhere.example"}
        assert visitor.get(page + path, headers=renamed, timeout=30).status_code == 403
        assert visitor.post(page + path, timeout=30).status_code == 405
    assert visitor.get(page + "runs", timeout=30).status_code == 404
    port = int(page.split(":")[2].partition("/")[0])
    listening = [at.laddr for at in psutil.Process().net_connections() if at.status == "LISTEN"]
    assert [at.ip for at in listening if at.port == port] == ["127.0.0.1"]


def test_the_link_is_printed_once_and_the_page_ends_when_it_is_closed(watching):
    watching.open(SimpleNamespace(trials={}), [])  # more seeds
    _, page = opened(watching)
    assert watching.console.export_text(clear=False).count("http://") == 1
    begun = time.monotonic()
    watching.close()
    assert time.monotonic() - begun < 4
    with pytest.raises(requests.ConnectionError):
        requests.get(page, timeout=5)


def test_it_draws_only_new_trials_and_only_within_its_share_of_the_time(watching, ended):
    assert not watching.is_due()
    watching.begun -= 30
    watching.finished = frozenset(ended["finished"][:1])
    assert not watching.is_due()  # the estimate for the first drawing is 0.4 s
    watching.begun -= 60
    assert watching.is_due()
    watching.draw()
    assert 0 < watching.spent == watching.latest < 10
    assert not watching.is_due()
    watching.finished = frozenset(ended["finished"])
    watching.begun = time.monotonic() - 2 * watching.spent / SHARE
    assert not watching.is_due()  # another drawing of this length would be too long
    watching.begun -= watching.spent / SHARE
    assert watching.is_due()


def test_it_draws_by_itself_when_a_trial_has_finished(finished_sweep, planned, ended, monkeypatch):
    monkeypatch.setattr(watch, "CHECK_EVERY", 0.01)
    shown = Watch("small", finished_sweep, store_in(finished_sweep).address, Console(record=True))
    shown.begun -= 1000
    trials = {key: TrialConfig.from_flat(params) for key, params in planned.items()}
    shown.open(SimpleNamespace(trials=trials), ended["finished"][:1])
    for count in (1, 4):
        shown.finished = frozenset(ended["finished"][:count])
        wait_for(lambda count=count: shown.pictures.shown == count, 30)
    shown.close()
    assert shown.drawing == 2


def test_a_failure_to_draw_is_printed_once_and_drawing_is_tried_again(watching, ended, monkeypatch):
    watching.finished = frozenset(ended["finished"])
    with monkeypatch.context() as broken:
        broken.setattr(watch.LivePictures, "draw", lambda *_: 1 / 0)
        for _ in range(2):
            watching.draw()
    said = watching.console.export_text(clear=False)
    assert said.count("the figures cannot be drawn (the sweep goes on): division by zero") == 1
    assert watching.drawing == 0
    watching.draw()
    assert watching.drawing == 1


@pytest.mark.browser
def test_a_browser_sees_the_pictures_change_without_a_reload(watching, ended, page):
    page.goto(link_of(watching))
    page.get_by_text("Drawing may take 1% of the time").wait_for()
    counts = []
    for count in (1, 4):
        watching.finished = frozenset(ended["finished"][:count])
        watching.line = f"{count} of 6 finished, 1:40 min left"
        watching.draw()
        page.wait_for_function(f"document.documentElement.dataset.drawn == {watching.drawing}")
        page.get_by_text(f"{count} of 6 finished, 1:40 min left").wait_for()
        page.get_by_text(f"the figures show {count} of 6 trials").wait_for()
        counts.append(page.locator("#qkv_std svg path").count())
    assert counts[0] < counts[1]
    assert page.locator("svg.marks").count() == 2
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "watch.png", full_page=True)
    assert page.asked == []
    assert [said for said in page.said if "401" not in said] == []  # the icon of the link's page
    watching.close()
    page.get_by_text("This page is closed, because the sweep has ended or was stopped").wait_for()


@pytest.mark.full
@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C"])
def test_the_page_of_a_real_sweep_is_closed_with_it(tmp_path, ends):
    """Slow, because Ray takes seconds to start, and Ctrl-C has to come while a trial runs."""
    knobs = TINY if ends == "by itself" else {**KILLED, "train.steps": 10**6}
    process = start(
        "init_sweep.py", tmp_path / "runs", "--watch", "--no-estimate", "--no-report",
        *flags(TrialConfig.from_flat(knobs)), "--init.seed", "0", "1", PYTHONUNBUFFERED="1",
    )  # fmt: skip
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            break
    visitor = requests.Session()
    assert visitor.get(found[0], timeout=30).status_code == 200
    state = found[0].partition("open?")[0] + "state"
    assert "of 2 finished" in wait_for(
        lambda: (said := visitor.get(state, timeout=30).json()["line"]) and "of" in said and said
    )
    begun = time.monotonic()
    if ends == "by Ctrl-C":
        wait_for(lambda: "2 running" in visitor.get(state, timeout=30).json()["line"])
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
    code, output = outcome(process, 120)
    print(f"ended after {time.monotonic() - begun:.1f} s")
    assert code == (0 if ends == "by itself" else 130), output
    with pytest.raises(requests.ConnectionError):
        visitor.get(state, timeout=5)
