import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from sweeps.execution import progress
from sweeps.execution.progress import StopTune, SweepProgress, TrialOutcomes
from tracking.job import Job


def job_of(key):
    return Job(key, "a trial", {"train.steps": 100, "init.scheme": "gpt2"}, {})


def trial(key, **last_result):
    return SimpleNamespace(config={"key": key, "batch": [job_of(key)]}, last_result=last_result)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def shown(clock):
    console = Console(file=io.StringIO(), width=200)
    return SweepProgress(console, TrialOutcomes({"a": 100, "b": 100, "c": 100}, trials=3))


def result(shown, key, step, **more):
    shown.on_trial_result(0, [], trial(key), {"trial_key": key, "step": step, **more})


def test_it_counts_and_foretells_at_the_pace_so_far(shown, clock):
    assert shown.line() == "0 of 3 finished, 0 running, 0 failed, starting"
    for key in ("a", "b"):
        shown.on_trial_start(0, [], trial(key))
        result(shown, key, 0)
    clock.seconds += 10
    for key in ("a", "b"):
        result(shown, key, 50)
    # 100 of 300 steps in 10 s
    assert shown.line() == "0 of 3 finished, 2 running, 0 failed, 0:20 min left"
    result(shown, "a", 100, status="finished")
    shown.on_trial_complete(0, [], trial("a"))
    assert shown.line() == "1 of 3 finished, 1 running, 0 failed, 0:10 min left"


def test_what_a_trial_had_done_before_is_not_counted_as_pace(shown, clock):
    result(shown, "a", 90)
    clock.seconds += 10
    result(shown, "a", 95)
    # 5 steps in 10 s, 205 to go
    assert shown.line() == "0 of 3 finished, 0 running, 0 failed, 6:50 min left"


def test_a_trial_that_is_heard_of_only_at_its_end_counts_whole(shown, clock):
    result(shown, "a", 1)
    clock.seconds += 10
    result(shown, "a", 51)
    result(shown, "b", 100, status="finished")
    assert shown.line() == "1 of 3 finished, 0 running, 0 failed, 0:09 min left"


def test_a_diverged_trial_leaves_nothing_to_wait_for(shown, clock):
    result(shown, "a", 0)
    clock.seconds += 10
    result(shown, "a", 20, status="diverged")
    result(shown, "b", 100, status="finished")
    assert shown.line().endswith("0:05 min left")


def test_a_failed_trial_is_told_with_its_reason_and_not_waited_for(shown, clock, tmp_path):
    result(shown, "a", 0)
    clock.seconds += 10
    result(shown, "a", 100)
    shown.on_trial_start(0, [], trial("b"))
    broken = trial("b")
    broken.error_file = tmp_path / "error.txt"
    broken.error_file.write_text("Failure # 1\nTraceback\nOSError: the disk is full\n\n")
    shown.on_trial_error(0, [], broken)
    assert shown.outcomes.failed == {"b": "OSError: the disk is full"}
    assert "trial b failed: OSError: the disk is full" in shown.console.file.getvalue()
    assert shown.line() == "0 of 3 finished, 0 running, 1 failed, 0:10 min left"


FULL = {"trial_key": "a", "status": "failed", "reason": "OSError: full"}


def test_a_trial_that_broke_by_itself_is_told_with_its_reason(shown):
    shown.on_trial_start(0, [], trial("a"))
    shown.on_trial_result(0, [], trial("a"), FULL)
    shown.on_trial_complete(0, [], trial("a"))
    assert (shown.outcomes.failed, shown.outcomes.finished) == ({"a": "OSError: full"}, set())
    assert "trial a failed: OSError: full" in shown.console.file.getvalue()


def test_a_trial_that_lost_its_worker_goes_on(shown, tmp_path):
    lost = trial("a")
    lost.error_file = tmp_path / "error.txt"
    lost.error_file.write_text("Failure # 1\nThe actor died unexpectedly.\nIt never ran.\n")
    shown.on_trial_start(0, [], lost)
    shown.on_trial_recover(0, [], lost)
    assert (shown.outcomes.retried, shown.outcomes.running) == (
        {"a": ["the worker died: It never ran."]},
        set(),
    )
    shown.on_trial_start(0, [], lost)
    result(shown, "a", 100, status="finished")
    shown.on_trial_complete(0, [], trial("a"))
    assert (shown.outcomes.finished, shown.outcomes.failed) == ({"a"}, {})


def test_a_machine_that_cannot_be_reached_has_taken_its_worker_along(shown, tmp_path):
    lost = trial("a")
    lost.error_file = tmp_path / "error.txt"
    lost.error_file.write_text("Failure # 1\nThe actor 28e9 is unavailable: Socket closed\n")
    shown.on_trial_recover(0, [], lost)
    assert shown.outcomes.retried["a"] == [
        "the worker died: The actor 28e9 is unavailable: Socket closed"
    ]


def test_a_worker_that_ray_killed_for_its_memory_leaves_rays_numbers(shown, tmp_path):
    lost = trial("a")
    lost.error_file = tmp_path / "error.txt"
    lost.error_file.write_text(
        "Failure # 1 (occurred at 2026-11-22_19-23-09)\n1 worker(s) were killed due to the node "
        "running low on memory. Memory on the node (IP: 127.0.0.1) was 1.42GB used / 23.54GB limit "
        "(0.060126)\nConsidered workers: [\nSelected to kill: (Task: job ID=1, pid=17103, "
        "actual memory used=0.04GB, worker ID=9)\n]\nRefer to the documentation on how to\n"
        "Failure # 2 (occurred at 2026-11-22_19-23-11)\nThe actor died.\nIt was killed.\n"
    )
    shown.on_trial_recover(0, [], lost)
    text = lost.error_file.read_text()
    lost.error_file.write_text(text[: text.index("Failure # 2")])
    shown.on_trial_recover(0, [], lost)
    assert shown.outcomes.retried["a"] == [
        "the worker died: It was killed.",
        "out of memory, the worker was killed by Ray: Memory on the node (IP: 127.0.0.1) was "
        "1.42GB used / 23.54GB limit (0.060126); it held 0.04GB",
    ]


def test_a_fault_of_the_sweep_ends_it(shown):
    shown.on_step_end(0, [])
    no_room = {"trial_key": "a", "status": "failed", "reason": "no room", "ends_sweep": True}
    shown.on_trial_result(0, [], trial("a"), no_room)
    with pytest.raises(StopTune):
        shown.on_step_end(0, [])
    assert (shown.outcomes.fault, shown.outcomes.failed) == ("no room", {"a": "no room"})


def test_a_fault_that_an_array_tells_of_by_a_trial_that_has_its_result_ends_the_sweep(shown):
    jobs = [job_of(key) for key in ("a", "b")]
    array = SimpleNamespace(config={"key": "a", "batch": jobs})
    array.last_result = {**FULL, "ends_sweep": True}
    shown.on_trial_start(0, [], array)
    shown.on_trial_result(0, [], array, {"trial_key": "a", "step": 20, "status": "diverged"})
    shown.on_trial_result(0, [], array, array.last_result)
    shown.on_trial_complete(0, [], array)
    assert (shown.outcomes.fault, shown.outcomes.finished, shown.outcomes.pruned) == (
        "OSError: full",
        {"a"},
        {},
    )
    with pytest.raises(StopTune):
        shown.on_step_end(0, [])


def test_nothing_is_foretold_when_every_trial_has_ended(shown):
    for key in ("a", "b", "c"):
        result(shown, key, 100, status="finished")
    assert shown.line() == "3 of 3 finished, 0 running, 0 failed"


def test_a_search_tells_what_it_pruned_and_counts_trials_that_are_yet_to_be_suggested(clock):
    searching = SweepProgress(Console(file=io.StringIO(), width=200), TrialOutcomes({}, trials=4))
    for key in ("a", "b"):
        searching.on_trial_start(0, [], trial(key))
        result(searching, key, 0)
    clock.seconds += 10
    result(searching, "a", 50)
    searching.on_trial_complete(0, [], trial("a", step=50))
    result(searching, "b", 50)
    # 100 steps in 10 s; half of b and two trials to go.
    assert searching.line() == "0 of 4 finished, 1 pruned, 1 running, 0 failed, 0:25 min left"
    assert searching.outcomes.pruned == {"a": "pruned at step 50"}
    result(searching, "b", 100, status="finished")
    assert (searching.outcomes.ended, searching.outcomes.finished) == (2, {"b"})


def test_of_an_array_each_trial_is_counted_as_it_ends(shown, tmp_path):
    jobs = [job_of(key) for key in ("a", "b", "c")]
    array = SimpleNamespace(config={"key": "a", "batch": jobs}, last_result={})
    array.error_file = tmp_path / "error.txt"
    array.error_file.write_text("Failure # 1\nThe actor died.\nIt was killed.\n")
    shown.on_trial_start(0, [], array)
    assert shown.outcomes.running == {"a", "b", "c"}
    shown.on_trial_result(0, [], array, {"trial_key": "b", "step": 20, "status": "diverged"})
    assert (shown.outcomes.running, shown.outcomes.finished) == ({"a", "c"}, {"b"})
    shown.on_trial_recover(0, [], array)
    assert set(shown.outcomes.retried) == {"a", "c"}
    assert not array.config["isolate"]
    shown.on_trial_start(0, [], array)
    assert shown.outcomes.running == {"a", "c"}
    for _ in range(2):  # a batch that goes on says again what it had
        shown.on_trial_result(0, [], array, {"trial_key": "b", "step": 20, "status": "diverged"})
    shown.on_trial_result(0, [], array, {"trial_key": "c", "step": 100, "status": "finished"})
    shown.on_trial_result(0, [], array, {**FULL, "trial_key": "a"})
    shown.on_trial_complete(0, [], array)
    assert shown.line() == "2 of 3 finished, 0 running, 1 failed"
    assert shown.console.file.getvalue().count("trial b diverged") == 1


def of_schemes(*schemes, console=None):
    """Make the progress of one trial for each scheme, with the trial keys "0", "1" and so on."""
    keys = [str(place) for place in range(len(schemes))]
    outcomes = TrialOutcomes(
        dict.fromkeys(keys, 100), len(keys), dict(zip(keys, schemes, strict=True))
    )
    return SweepProgress(console or Console(file=io.StringIO(), width=200), outcomes)


def test_the_last_loss_of_each_scheme_is_shown_with_its_step_in_the_order_of_the_plan(clock):
    shown = of_schemes("model5", "gpt2", "normal", "model5")
    assert shown.losses() == ""
    result(shown, "1", 20, loss=10.25)
    result(shown, "0", 40, loss=9.5)
    result(shown, "3", 100, loss=8.125, status="finished")
    result(shown, "1", 40)  # a report without a loss, such as on a trial that had its result
    assert shown.losses() == "last loss: model5 8.125 (step 100), gpt2 10.25 (step 20)"


def test_a_loss_that_is_not_a_number_is_shown(clock):
    shown = of_schemes("gpt2")
    result(shown, "0", 7, loss=float("nan"), status="diverged")
    assert shown.losses() == "last loss: gpt2 nan (step 7)"


def test_only_eight_schemes_are_named(clock):
    shown = of_schemes(*(f"scheme {place}" for place in range(11)))
    for place in range(11):
        result(shown, str(place), 1, loss=1.0)
    assert shown.losses().count("(step 1)") == 8
    assert shown.losses().endswith("scheme 7 1 (step 1), and 3 more")


def test_a_terminal_shows_a_bar_of_all_steps_the_time_left_and_the_losses(clock):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with of_schemes("model5", "gpt2", console=console) as shown:
        result(shown, "0", 0, loss=10.0)
        clock.seconds += 10
        result(shown, "0", 50, loss=9.0)
    last = console.file.getvalue()
    assert "━" * 10 in last
    for told in ("25%", "0 of 2 finished", "0:30 min left", "last loss: model5 9 (step 50)"):
        assert told in last


def test_a_bar_is_not_drawn_at_every_report_but_at_every_event(clock):
    told = []
    shown = of_schemes("gpt2", "gpt2")
    shown.tell = lambda progress: told.append(progress.line())
    for step in range(10):
        clock.seconds += 0.1
        result(shown, "0", step)
    assert len(told) == 2
    result(shown, "0", 100, status="finished")
    assert len(told) == 3
    assert told[-1].startswith("1 of 2 finished")


def test_a_file_gets_the_losses_from_time_to_time(clock):
    shown = of_schemes("gpt2", "gpt2")
    for step in range(40):
        clock.seconds += 1
        result(shown, "0", step, loss=5.0)
    lines = shown.console.file.getvalue().splitlines()
    assert [line for line in lines if "last loss" in line] == [
        "  last loss: gpt2 5 (step 15)", "  last loss: gpt2 5 (step 31)"
    ]  # fmt: skip
    assert len(lines) == 4
