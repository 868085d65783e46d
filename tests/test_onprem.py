"""`ray up` on several hosts of one computer. A host is a namespace with an address, home and sshd.

The hosts share only the file system, the cores and the clock. A test can cut the network of a host,
or switch a host off.

One cluster serves all of these tests, because it takes a minute to start.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
import yaml

from gptcore.config import TrialConfig
from helpers.driving import running_in, wait_for
from helpers.paths import ROOT
from helpers.trials import TINY, WORDS, flags, undisturbed, with_knobs

pytestmark = [pytest.mark.full, pytest.mark.cluster]

NET = "10.231.78"
SSHD = """
Port 22
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
StrictModes no
MaxSessions 100
MaxStartups 100
Subsystem sftp internal-sftp
"""
BOOT = """
set -e
mount --make-rprivate /
hostname {name}
{keep}
mount --rbind {home} /root
for private in /tmp/ray /dev/shm /run/sshd; do
    mkdir -p $private && mount -t tmpfs -o mode=755 tmpfs $private
done
export HOME=/root; cd /
trap 'exit 0' TERM
/usr/sbin/sshd -D -e -f {folder}/sshd_config \\
    -o ListenAddress={address} -o HostKey={folder}/hostkey &
while :; do wait || true; sleep 1; done
"""


def missing():
    """What this machine lacks for hosts of its own, in words."""
    if os.geteuid():
        return "not root"
    for tool in ("ip", "sshd", "ssh", "ssh-keygen", "rsync", "unshare", "ss"):
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            return f"no {tool} (apt-get install openssh-server rsync iproute2)"
    if str(ROOT).startswith(("/root", "/tmp/ray")) or sys.prefix.startswith(("/root", "/tmp/ray")):
        return "the checkout or its environment lies where each host has a folder of its own"
    for folder in Path(sys.prefix).resolve().parents:
        if not folder.stat().st_mode & 0o001:
            return f"{folder} is closed to PostgreSQL, which will not run as root (chmod o+x)"
    tried = subprocess.run(["ip", "netns", "add", "sweeps-tried"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "sweeps-tried"], capture_output=True)
    return tried.stderr.strip() and f"no network namespaces ({tried.stderr.strip()})"


def kept(home):
    """The commands after which a host still sees the interpreter, where that is in /root."""
    base = Path(sys.base_prefix).resolve()
    if not base.is_relative_to("/root"):
        return ""
    inside = home / base.relative_to("/root")
    return f"mkdir -p {inside} && mount --bind {base} {inside}"


def sh(*command, **more):
    return subprocess.run(command, check=True, capture_output=True, text=True, **more).stdout


class Lab:
    """A laptop and three hosts on one switch: h1, the head, and h2 and h3."""

    hosts = ("h1", "h2", "h3")

    def __init__(self, folder):
        self.folder, self.laptop = folder, "sweepslab"
        self.processes = {}

    def space(self, host):
        return f"{self.laptop}-{host}"

    def address(self, host):
        return f"{NET}.1{host[1]}"

    def __enter__(self):
        folder = self.folder
        for key in ("key", "hostkey"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "sshd_config").write_text(SSHD)
        self.remove()
        sh("ip", "netns", "add", self.laptop)
        on_laptop = ("ip", "-n", self.laptop)
        sh(*on_laptop, "link", "set", "lo", "up")
        sh(*on_laptop, "link", "add", "br0", "type", "bridge")
        sh(*on_laptop, "addr", "add", f"{NET}.1/24", "dev", "br0")
        sh(*on_laptop, "link", "set", "br0", "up")
        for host in self.hosts:
            space = self.space(host)
            sh("ip", "netns", "add", space)
            sh(*on_laptop, "link", "add", f"v{host}", "type", "veth",
               "peer", "name", "eth0", "netns", space)  # fmt: skip
            sh(*on_laptop, "link", "set", f"v{host}", "master", "br0", "up")
            sh("ip", "-n", space, "link", "set", "lo", "up")
            sh("ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            sh("ip", "-n", space, "link", "set", "eth0", "up")
            sh("ip", "-n", space, "route", "add", "default", "via", f"{NET}.1")
            self.switch_on(host)
        for host in self.hosts:
            wait_for(lambda host=host: self.ssh(host, "true")[0] == 0, 20)
        return self

    def switch_on(self, host):
        home = self.folder / f"home-{host}"
        if not home.exists():
            (home / ".ssh").mkdir(parents=True, mode=0o700)
            shutil.copy(self.folder / "key.pub", home / ".ssh" / "authorized_keys")
            (home / ".bashrc").touch()
            # What the setup commands would install, already there.
            (home / "venv").symlink_to(sys.prefix)
        boot = self.folder / f"boot-{host}.sh"
        boot.write_text(
            BOOT.format(
                name=host,
                home=home,
                folder=self.folder,
                address=self.address(host),
                keep=kept(home),
            )
        )
        with (self.folder / f"{host}.log").open("a") as log:
            self.processes[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.space(host), "unshare", "--mount", "--pid", "--uts",
                 "--ipc", "--fork", "--kill-child", "--mount-proc", "bash", str(boot)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def switch_off(self, host):
        os.kill(self.processes[host].pid, signal.SIGKILL)
        self.processes[host].wait()

    def cable(self, host, state):
        sh("ip", "-n", self.laptop, "link", "set", f"v{host}", state)

    def ssh(self, host, command, seconds=60):
        """(exit code, output) of a command in a login shell on a host."""
        done = subprocess.run(
            [*self.at(self.laptop), "ssh", "-q", "-o", "StrictHostKeyChecking=no",
             "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2",
             "-i", str(self.folder / "key"), f"root@{self.address(host)}",
             f"bash --login -c {shlex.quote(command)}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def at(self, space):
        return ["ip", "netns", "exec", space]

    def running(self, host):
        """What runs on a host beside the host itself, by name."""
        return running_in(self.space(host), rf"sshd|boot-{host}|^sleep 1$")

    def remove(self):
        for space in (*map(self.space, self.hosts), self.laptop):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def __exit__(self, *_):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.remove()


@pytest.fixture(scope="module")
def lab():
    if why := missing():
        pytest.skip(f"no hosts out of namespaces here: {why}")
    # Short, for the database's socket is in it; and not where hosts have a folder of their own.
    folder = Path(f"/var/tmp/sweepslab-{os.getpid()}")
    folder.mkdir()
    try:
        with Lab(folder) as lab:
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ray(lab, *arguments):
    """A command of Ray's own, on the laptop, in the checkout."""
    environment = {
        **os.environ,
        "HOME": str(lab.folder / "laptop"),
        "RAY_TMPDIR": str(lab.folder / "ray"),
        "RAY_AUTH_MODE": "token",
    }
    del environment["RAY_ADDRESS"]  # it would count for more than --address
    command = [*lab.at(lab.laptop), str(Path(sys.executable).parent / "ray"), *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def cluster(lab):
    """The cluster of sweeps/clusters/onprem.yaml; -> its file."""
    home = lab.folder / "laptop"
    (home / ".ray").mkdir(parents=True)
    (lab.folder / "ray").mkdir()
    (home / ".ray" / "auth_token").write_text(os.urandom(32).hex())
    (lab.folder / "shared").mkdir()
    file = yaml.safe_load((ROOT / "sweeps" / "clusters" / "onprem.yaml").read_text())
    file["provider"] |= {
        "head_ip": lab.address("h1"),
        "worker_ips": [lab.address("h2"), lab.address("h3")],
        "shared": str(lab.folder / "shared"),
    }
    file["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.folder / "key")}
    # It would point the environment that all hosts and this test share at a host's checkout.
    file["setup_commands"] = [
        command for command in file["setup_commands"] if "pip install" not in command
    ]
    # The hosts have the same two cores.
    last = file["worker_start_ray_commands"][-1]
    file["worker_start_ray_commands"][-1] = last.replace(
        "--block", "--block --num-cpus=1 --object-store-memory=100000000"
    )
    edited = lab.folder / "onprem.yaml"
    edited.write_text(yaml.safe_dump(file))
    begun = time.monotonic()
    up = ray(lab, "up", "--yes", str(edited))
    assert up.returncode == 0, (up.stdout + up.stderr)[-3000:]
    print(f"ray up: {time.monotonic() - begun:.0f} s")
    assert f"tracking server: http://{lab.address('h1')}:5000" in up.stdout
    wait_for(lambda: len(nodes(lab)) == 3, 120)
    print(f"all machines there: {time.monotonic() - begun:.0f} s: {nodes(lab)}")
    yield edited
    ray(lab, "down", "--yes", str(edited))


NODES = (
    "python -c 'import ray; ray.init(logging_level=50, log_to_driver=False); "
    'print("NODES", *sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]))\''
)


def nodes(lab):
    """The addresses of the machines that Ray has."""
    _, said = lab.ssh("h1", NODES)
    return next((line.split()[1:] for line in said.splitlines() if line.startswith("NODES")), [])


def on_laptop(lab, script, *arguments, **environment):
    """What a Python script prints that runs on the laptop."""
    return sh(
        *lab.at(lab.laptop), sys.executable, "-c", script, *arguments,
        cwd=ROOT, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def password_of(lab):
    """The password of the cluster's MLflow, as a shell of its head prints it."""
    _, said = lab.ssh("h1", "echo PASSWORD $MLFLOW_TRACKING_PASSWORD")
    return next(line.split()[1] for line in said.splitlines() if line.startswith("PASSWORD"))


SWEEP = "python ~/gpt-sweeps/sweeps/init_sweep.py"
LONG = {**WORDS, "train.steps": 600, "train.checkpoint_seconds": 1.0}
SEEDS = range(5)


def test_a_file_that_was_not_filled_in_is_refused_at_once():
    file = ROOT / "sweeps" / "clusters" / "onprem.yaml"
    command = [str(Path(sys.executable).parent / "ray"), "up", "--yes", str(file)]
    up = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert up.returncode == 1
    assert "Error: Please supply a `head_ip` and list of `worker_ips`." in up.stdout + up.stderr
    assert "Traceback" not in up.stdout + up.stderr


def test_what_listens_on_the_head_and_who_is_let_in(lab, cluster):
    listening = sh(*lab.at(lab.space("h1")), "ss", "-ltnH")
    print(sh(*lab.at(lab.space("h1")), "ss", "-ltnp"))
    at = {local: [] for local in (":8265", ":5000", ":6379")}
    for line in listening.splitlines():
        for local in at:
            if line.split()[3].endswith(local):
                at[local].append(line.split()[3].removesuffix(local))
    assert at[":8265"] == ["127.0.0.1"]
    assert at[":5000"] == [lab.address("h1")]
    assert not re.search(r":5432\s", listening)
    head = lab.address("h1")
    token = (lab.folder / "laptop" / ".ray" / "auth_token").read_text()
    asked = json.loads(on_laptop(lab, ASKS, head, token, password_of(lab)))
    print(asked)
    assert asked == {
        "tracking": 401,
        "tracking, wrong password": 401,
        "tracking, Ray's token": 401,
        "tracking, its password": 200,
        "tracking, health": 200,
        "dashboard": "ConnectionError",
        "agent": 401,
        "ray": "AuthenticationError",
        "ray, MLflow's password": "AuthenticationError",
        "ray, its token": "joins",
    }


ASKS = """
import json, os, subprocess, sys
import requests
head, token, password = sys.argv[1:]
def ask(path, **more):
    try:
        return requests.get(f"http://{head}{path}", timeout=10, **more).status_code
    except requests.ConnectionError as error:
        return "ConnectionError"
said = {
    "tracking": ask(":5000/"),
    "tracking, wrong password": ask(":5000/api/3.0/mlflow/server-info", auth=("gpt-sweeps", "no")),
    "tracking, Ray's token": ask(":5000/version", auth=("gpt-sweeps", token)),
    "tracking, its password": ask(":5000/version", auth=("gpt-sweeps", password)),
    "tracking, health": ask(":5000/health"),
    "dashboard": ask(":8265/"),
    "agent": ask(":52365/api/healthz_"),
}
joins = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
def join(**known):
    done = subprocess.run(
        [sys.executable, "-c", joins, f"{head}:6379"],
        env={**os.environ, **known}, capture_output=True, text=True,
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return "joins" if done.returncode == 0 else last.partition(":")[0].rpartition(".")[2]
said["ray"] = join(RAY_AUTH_MODE="disabled")
said["ray, MLflow's password"] = join(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=password)
said["ray, its token"] = join(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
print(json.dumps(said))
"""

KEPT_OUT = {
    "the token is not asked for": ("RAY_AUTH_MODE=disabled", "asks for a token"),
    "another token": ("RAY_AUTH_TOKEN_PATH=/proc/sys/kernel/random/uuid", "has another token"),
    "no token": (
        "RAY_AUTH_TOKEN_PATH=/dev/null",
        "RAY_AUTH_MODE is token, but this account has no token",
    ),
    "no such cluster": ("RAY_ADDRESS=127.0.0.1:6378", "does not answer"),
    "a word": ("RAY_ADDRESS=head", "'head' is not the address of a Ray cluster"),
    "no tracking server": ("MLFLOW_TRACKING_URI=http://127.0.0.1:1", "does not answer"),
    "a folder of one's own": ("GPT_SWEEPS_RUNS_DIR=/root/runs", "cannot see --runs-dir /root/runs"),
}


@pytest.mark.parametrize("why", KEPT_OUT)
def test_a_sweep_that_cannot_use_the_cluster_is_told_why_in_one_sentence(lab, cluster, why):
    wrong, sentence = KEPT_OUT[why]
    tiny = shlex.join(flags(TrialConfig.from_flat(TINY)))
    code, said = lab.ssh("h1", f"{wrong} {SWEEP} --name refused {tiny}")
    assert code == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert sentence in error
    assert "Traceback" not in said
    assert ".cc:" not in said


RUNS = """
import json, sys
from collections import Counter
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
(experiment,) = client.search_experiments(filter_string="name = 'spread'")
said = []
for run in client.search_runs([experiment.experiment_id], "tags.kind = 'trial'"):
    history = client.get_metric_history(run.info.run_id, "loss/train")
    steps = Counter(point.step for point in history)
    tags = run.data.tags
    said.append({
        "key": tags["trial_key"], "status": run.info.status, "host": tags["host"],
        "seed": int(run.data.params["init.seed"]), "retries": int(tags.get("retries", 0)),
        "because": tags.get("retried_because"), "artifacts": run.info.artifact_uri,
        "run": run.info.run_id, "points": len(steps), "most": max(steps.values()),
    })
print(json.dumps(said))
"""


def test_a_sweep_outlives_a_cut_cable_and_a_machine_that_is_switched_off(lab, cluster):
    tiny = TrialConfig.from_flat(LONG)
    command = (
        f"{SWEEP} --name spread --array off {shlex.join(flags(tiny))} --init.seed "
        + " ".join(map(str, SEEDS))
    )
    checkpoints = lab.folder / "shared" / "runs" / "checkpoints"
    begun = time.monotonic()

    def tell(what):
        print(f"{time.monotonic() - begun:4.0f} s: {what}", flush=True)

    def trains(host):
        return any("ray::ImplicitFunc" in process for process in lab.running(host))

    with ThreadPoolExecutor(max_workers=1) as beside:
        driver = beside.submit(lab.ssh, "h1", command, 900)
        wait_for(lambda: driver.done() or len(list(checkpoints.glob("*.pt"))) == 2, 200)
        assert not driver.done(), driver.result()
        tell("a trial on each of h2 and h3: the cable of h2 is cut")
        lab.cable("h2", "down")
        wait_for(lambda: len(nodes(lab)) == 2, 60)
        tell("Ray has given h2 up")
        lab.cable("h2", "up")
        tell("the cable is back")
        wait_for(lambda: driver.done() or len(nodes(lab)) == 3, 200)
        tell(f"Ray has {nodes(lab)}")
        wait_for(lambda: driver.done() or trains("h2"), 200)
        assert not driver.done(), driver.result()
        tell("h2 trains again: h3 is switched off")
        lab.switch_off("h3")
        code, said = driver.result()
        tell("the sweep has ended")
    print(said)
    assert code == 0, said
    assert f"Ray: the cluster at {lab.address('h1')}:6379, 2 CPUs, 0 GPUs" in said
    runs = json.loads(
        on_laptop(
            lab, RUNS, f"http://{lab.address('h1')}:5000",
            MLFLOW_TRACKING_USERNAME="gpt-sweeps",
            MLFLOW_TRACKING_PASSWORD=password_of(lab),
        )
    )  # fmt: skip
    for run in runs:
        print({name: run[name] for name in ("key", "status", "host", "retries", "because")})
    assert sorted(run["seed"] for run in runs) == list(SEEDS)
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert {(run["points"], run["most"]) for run in runs} == {(tiny.train.steps + 1, 1)}
    again = [run for run in runs if run["retries"]]
    assert again
    # A trial that went on elsewhere is what it would have been.
    whole = undisturbed(with_knobs(tiny, init__seed=again[0]["seed"]))
    (kept,) = (lab.folder / "shared" / "artifacts").glob(f"*/{again[0]['run']}/**/training.parquet")
    rows = pl.read_parquet(kept).sort("step")
    assert rows["loss"].to_list() == [row.loss for row in whole.rows["training"]]


def test_machines_that_share_a_bucket_alone_find_its_checkpoints(lab, cluster):
    """A folder by its address is to them what a bucket is."""
    kept = lab.folder / "shared" / "bucket"
    kept.mkdir()
    known = f"GPT_SWEEPS_BUCKET=file://{kept} GPT_SWEEPS_RUNS_DIR=/root/runs"
    alone = TrialConfig.from_flat({**LONG, "init.seed": len(SEEDS)})
    command = f"{known} {SWEEP} --name bucket {shlex.join(flags(alone))}"
    with ThreadPoolExecutor(max_workers=1) as beside:
        driver = beside.submit(lab.ssh, "h1", command, 300)
        wait_for(lambda: driver.done() or list(kept.glob("checkpoints/*.pt")), 200)
        assert not driver.done(), driver.result()
        code, said = driver.result()
    assert code == 0, said
    assert not list(kept.glob("checkpoints/*.pt"))
    assert (lab.folder / "home-h2" / "runs" / "checkpoints").exists()
    assert not (lab.folder / "home-h1" / "runs" / "checkpoints").exists()


def opens(lab, port):
    """Whether something listens at the laptop's end of a tunnel."""
    probe = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
    asked = [*lab.at(lab.laptop), sys.executable, "-c", probe]
    return subprocess.run(asked, capture_output=True).returncode == 0


def test_ray_job_submit_from_the_laptop_does_the_same(lab, cluster):
    tunnel = subprocess.Popen(
        [*lab.at(lab.laptop), "ssh", "-q", "-N", "-o", "StrictHostKeyChecking=no",
         "-o", "UserKnownHostsFile=/dev/null", "-i", str(lab.folder / "key"),
         "-L", "8265:127.0.0.1:8265", f"root@{lab.address('h1')}"],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: tunnel.poll() is not None or opens(lab, 8265), 30)
        tiny = flags(TrialConfig.from_flat(TINY))
        submitted = ray(
            lab, "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", ".", "--",
            "python", "sweeps/init_sweep.py", "--name", "submitted", *tiny, "--init.seed", "0", "1",
        )  # fmt: skip
    finally:
        tunnel.kill()
        tunnel.wait()
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said[-3000:]
    assert f"Ray: the cluster at {lab.address('h1')}:6379" in said
    assert "2 of 2 finished, 0 running, 0 failed" in said
    assert (lab.folder / "shared" / "runs" / "reports" / "submitted" / "report.html").exists()


def test_ray_down_leaves_nothing_running(lab, cluster):
    down = ray(lab, "down", "--yes", str(cluster))
    assert down.returncode == 0, (down.stdout + down.stderr)[-3000:]
    begun = time.monotonic()
    on = [host for host in lab.hosts if lab.processes[host].poll() is None]
    try:
        wait_for(lambda: not any(lab.running(host) for host in on), 150)
    finally:
        print({host: lab.running(host) for host in on})
    print(f"nothing runs any more {time.monotonic() - begun:.0f} s after ray down")
