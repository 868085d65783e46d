import multiprocessing
import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest

from gptcore.config import InputError, TrialConfig
from helpers.driving import outcome, start, wait_for
from helpers.servers import free_port, start_server
from helpers.store import job_of, open_store
from helpers.trials import KILLED, flags
from tracking import lease
from tracking.address import sqlite_address
from tracking.holder import Holder
from tracking.lease import (
    NOBODY,
    Watch,
    holder_of,
    latest_claim,
    own_trial,
    sweep_lease,
    works_elsewhere,
)
from tracking.recorder import close_cut_off, make_run
from tracking.store import Store


@pytest.fixture
def shared(tmp_path):
    """The address of a store that several runs folders share, and the id of its experiment."""
    store = open_store(sqlite_address(tmp_path / "shared.db"))
    return store.address, store.open_experiment("sweep", tmp_path)


@pytest.fixture
def hasty(monkeypatch):
    """Leases are renewed and run out within two seconds instead of a minute."""
    monkeypatch.setattr(lease, "SECONDS_TO_RENEW", 0.1)
    monkeypatch.setattr(lease, "SECONDS_TO_EXPIRE", 1.5)
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_LOOKS", 0.05)


def leased(shared, sweep="sweep", wait=False, say=lambda _: None, on_loss=lambda: None):
    address, experiment_id = shared
    return sweep_lease(Store(address), experiment_id, sweep, wait=wait, say=say, on_loss=on_loss)


def pretend_on_another_machine(store, held):
    """Write a lease as a driver on another machine would, which nobody here can look at."""
    tags = store.client.get_run(held.run_id).data.tags
    tag = Holder.from_json(tags[f"lease.{held.number}"]).to_json()
    elsewhere = tag.replace(Holder.here().machine, "another machine")
    store.client.set_tag(held.run_id, f"lease.{held.number}", elsewhere)


def test_a_second_driver_is_told_who_works_on_the_sweep(shared):
    with leased(shared) as held:
        store = Store(shared[0])
        store.set_tags(held.run_id, kind="sweep", launched="1")
        with pytest.raises(InputError) as refused, leased(shared):
            raise AssertionError("it is held")
        assert f"process {os.getpid()} on " in str(refused.value)
        assert "--wait" in str(refused.value)
        assert f"process {os.getpid()}" in holder_of(store, store.client.get_run(held.run_id))
        with leased(shared, sweep="another"):
            pass
    run = store.client.get_run(held.run_id)
    assert latest_claim(run).owner == NOBODY
    assert holder_of(store, run) is None
    with leased(shared) as again:
        assert again.run_id == held.run_id
        assert again.number > held.number


def test_a_driver_that_ends_before_it_has_a_plan_leaves_no_run(shared):
    with leased(shared):
        pass
    assert Store(shared[0]).search("tags.lease_of = 'sweep'", shared[1]) == []


def test_with_wait_the_second_driver_goes_on_when_the_first_has_ended(shared, hasty):
    said, order = [], []

    def second():
        with leased(shared, wait=True, say=said.append):
            order.append("second")

    with leased(shared):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.5)
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]
    assert len(said) == 1
    assert "waiting for it" in said[0]


def test_of_several_drivers_that_wait_for_a_new_sweep_each_has_it_alone(shared, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_LOOKS", 0.05)
    begin, inside, most, runs = threading.Barrier(4), [], [], set()

    def work():
        begin.wait(60)
        with leased(shared, wait=True) as held:
            inside.append(held)
            most.append(len(inside))
            time.sleep(0.05)
            Store(shared[0]).set_tags(held.run_id, kind="sweep", launched="1")
            runs.add(held.run_id)
            inside.remove(held)

    drivers = [threading.Thread(target=work) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(120)
    assert most == [1, 1, 1, 1]
    assert len(runs) == 1
    assert len(Store(shared[0]).search("tags.lease_of = 'sweep'", shared[1])) == 1


@pytest.mark.parametrize("wait", [False, True])
def test_a_driver_whose_new_run_another_one_took_is_told_so(shared, hasty, monkeypatch, wait):
    """Both ask at once, and the run that this one has made is the only one there is."""
    real, held, said = lease._runs_of_sweep, ExitStack(), []
    looks = iter(range(1000))

    def runs_of_sweep(*arguments):
        found = real(*arguments)
        if next(looks) == 1:  # it has made a run, and does not own it yet
            monkeypatch.setattr(lease, "_runs_of_sweep", real)
            held.enter_context(leased(shared))
        return found

    def asks():
        try:
            with leased(shared, wait=wait, say=said.append):
                said.append("mine")
        except InputError as error:
            said.append(str(error))

    monkeypatch.setattr(lease, "_runs_of_sweep", runs_of_sweep)
    asking = threading.Thread(target=asks, daemon=True)
    asking.start()
    try:
        wait_for(lambda: said, 20)
        assert f"sweep sweep is being run by process {os.getpid()} on " in said[0]
        assert ("waiting for it" if wait else "wait for it (--wait)") in said[0]
    finally:
        held.close()
        asking.join(20)
    assert said[1:] == ["mine"] * wait


def _hold(shared, ready):
    with leased(shared):
        ready.set()
        time.sleep(600)


def test_a_driver_that_was_killed_on_this_machine_holds_nothing(shared):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(shared, ready))
    other.start()
    assert ready.wait(120)
    with pytest.raises(InputError, match=f"process {other.pid} on "), leased(shared):
        raise AssertionError("it is held")
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    begun = time.monotonic()
    with leased(shared):
        assert time.monotonic() - begun < lease.SECONDS_TO_EXPIRE / 2


def test_a_lease_of_a_machine_that_is_gone_runs_out_and_a_slept_one_notices(
    shared, hasty, monkeypatch
):
    """Clocks that are an hour apart make no difference: they are not compared."""
    said, lost = [], threading.Event()
    store = Store(shared[0])
    with leased(shared, on_loss=lost.set) as slept:
        slept._writing.acquire()  # it renews nothing from now on
        pretend_on_another_machine(store, slept)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() - 3600)
        with leased(shared, say=said.append) as now:
            assert now.number > slept.number
            assert len(said) == 1
            assert "to see whether it still is" in said[0]
            slept._writing.release()  # it wakes up
            assert lost.wait(10)
            assert f"process {os.getpid()}" in slept.taken_by
        # What the driver that slept does at its end leaves the lease of the other alone.
    assert latest_claim(store.client.get_run(now.run_id)).owner == NOBODY


def test_a_driver_on_another_machine_that_renews_its_lease_is_not_taken_for_dead(
    shared, hasty, monkeypatch
):
    monkeypatch.setattr(Holder, "is_here", property(lambda _: False))
    with leased(shared):
        begun = time.monotonic()
        with pytest.raises(InputError, match="is being run by process"), leased(shared):
            raise AssertionError("it is held")
        assert time.monotonic() - begun < lease.SECONDS_TO_EXPIRE


def test_a_store_that_was_away_gives_a_driver_time_to_renew_its_lease(shared, hasty, monkeypatch):
    watch = Watch()
    now = [0.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    with leased(shared) as held:
        held._writing.acquire()
        store = Store(shared[0])
        pretend_on_another_machine(store, held)
        run = store.client.get_run(held.run_id)

        def has_run_out(at):
            now[0] = at
            return watch.has_run_out(run, held.number)

        assert not has_run_out(0)
        assert not has_run_out(1)
        assert not has_run_out(30)  # nothing was seen for half a minute
        assert not has_run_out(31)
        assert has_run_out(32)
        held._writing.release()


def _train(shared, sweep, keys, job, trained, begin):
    """Train trials as a driver of its own would; what it trained goes into `trained`."""
    address, experiment_id = shared
    store = Store(address)
    with leased(shared, sweep) as held:
        begin.wait(60)
        for key in keys:
            mine = job_of(job, key)
            run = own_trial(
                store,
                key,
                held.owner,
                lambda mine=mine: make_run(store, experiment_id, mine),
                is_new=store.find_run("trial", trial_key=key) is None,
            )
            if run is None:
                continue
            trained.append(key)
            time.sleep(0.05)
            assert latest_claim(store.client.get_run(run.info.run_id)).owner == held.owner
            store.set_tags(run.info.run_id, trial_status="finished")
            store.client.set_terminated(run.info.run_id, "FINISHED")


def test_of_several_drivers_that_ask_at_once_one_trains_each_trial(shared, tiny, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_LOOKS", 0.05)
    keys, trained, begin = [f"{i:012x}" for i in range(5)], [], threading.Barrier(4)
    drivers = [
        threading.Thread(target=_train, args=(shared, f"sweep{i}", keys, tiny, trained, begin))
        for i in range(4)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(120)
    assert sorted(trained) == keys
    runs = Store(shared[0]).runs("trial")
    assert sorted(run.data.tags["trial_key"] for run in runs) == keys
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_trial_goes_from_a_driver_that_has_ended_to_the_next(shared, tiny):
    address, experiment_id = shared
    store, job = Store(address), job_of(tiny, "0" * 12)

    def make():
        return make_run(store, experiment_id, job)

    with leased(shared, "one") as one, leased(shared, "two") as two:
        run = store.client.get_run(own_trial(store, job.key, one.owner, make).info.run_id)
        assert works_elsewhere(store, run, two.owner)
        assert not works_elsewhere(store, run, one.owner)
        close_cut_off(store, experiment_id, two.owner)  # it is not this driver's
        assert store.client.get_run(run.info.run_id).info.status == "RUNNING"
        assert own_trial(store, job.key, one.owner, make)  # as another worker of the driver
    with leased(shared, "two") as two:
        assert not works_elsewhere(store, run, two.owner)
        assert own_trial(store, job.key, two.owner, make)
        (run,) = store.find_runs("trial", trial_key=job.key)
        assert latest_claim(run).owner == two.owner
        # It failed: another sweep may try again while this one goes on.
        store.client.set_terminated(run.info.run_id, "FAILED")
        with leased(shared, "one") as one:
            assert own_trial(store, job.key, one.owner, make)


def test_a_run_that_a_killed_process_made_twice_is_set_aside(shared, tiny):
    address, experiment_id = shared
    store, job = Store(address), job_of(tiny, "1" * 12)
    for _ in range(2):
        make_run(store, experiment_id, job)
    with leased(shared) as held:
        assert own_trial(store, job.key, held.owner, lambda: pytest.fail("there are two"))
        (run,) = store.find_runs("trial", trial_key=job.key)
        assert run.info.status == "RUNNING"
        assert len(store.search("tags.kind = 'replaced'")) == 1


def test_a_worker_that_does_not_know_of_a_newer_experiment_trains_nothing_twice(shared, tiny):
    """It makes a run, finds the one with the result, and deletes its own."""
    address, experiment_id = shared
    store, job = Store(address), job_of(tiny, "2" * 12)
    known = tuple(store.experiment_ids())
    newer = store.client.create_experiment("newer")
    done = make_run(store, newer, job)
    store.set_tags(done.info.run_id, trial_status="finished")
    store.client.set_terminated(done.info.run_id, "FINISHED")
    assert store.find_run("trial", trial_key=job.key, known=known) is None

    def make():
        return make_run(store, experiment_id, job)

    with leased(shared) as held:
        assert own_trial(store, job.key, held.owner, make, is_new=True) is None
    (run,) = store.search(f"tags.trial_key = '{job.key}'")
    assert run.info.run_id == done.info.run_id


@pytest.mark.full
def test_two_drivers_with_a_server_between_them_train_each_trial_once(tmp_path, monkeypatch):
    """Sweeps as commands, each with a runs folder of its own: the store is all that they share."""
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    server = start_server(uri, tmp_path)
    try:
        # The trials are long, so the first driver still works when the second one asks.
        config = TrialConfig.from_flat({**KILLED, "train.steps": 4000, "probes.every": 200})
        wanted = [*flags(config), "--init.seed", "0", "1", "2", "--no-estimate", "--no-report"]
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        drivers = [
            start("init_sweep.py", tmp_path / one / "runs", "--name", "shared", *wanted)
            for one in "ab"
        ]
        store = open_store(uri)
        wait_for(lambda: any(driver.poll() is not None for driver in drivers))
        refused, works = sorted(drivers, key=lambda driver: driver.poll() is None)
        code, said = outcome(refused, 60)
        assert code == 2, said
        assert f"sweep shared is being run by process {works.pid} on " in said
        # Another sweep of the same trials waits for those that are under way.
        other = start("init_sweep.py", tmp_path / "b" / "runs", "--name", "other", *wanted)
        wait_for(store.trial_runs)
        works.kill()
        works.communicate()
        waits = start(
            "init_sweep.py", tmp_path / "a" / "runs", "--name", "shared", "--wait", *wanted
        )
        for driver in (other, waits):
            code, said = outcome(driver)
            assert code == 0, said
        runs = store.runs("trial")
        assert len(runs) == len({run.data.tags["trial_key"] for run in runs}) == 3
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in runs:
            points = store.client.get_metric_history(run.info.run_id, "loss/train")
            assert [point.step for point in points] == list(range(config.train.steps + 1))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
