"""A Slurm of its own: a login node and three nodes, each a host out of namespaces.

The hosts share the file system, the cores and the clock. Each has its own address, processes,
/tmp, /root and /dev/shm. Two accounts, ada and ben, have their homes on every host.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from helpers.driving import running_in, wait_for
from helpers.paths import ROOT

NET = "10.231.79"
LOGIN, NODES = "h0", ("h1", "h2", "h3")
USERS = {"ada": 61001, "ben": 61002}
SPACE = f"slurm{os.getpid()}"

CONF = """
ClusterName=lab
SlurmctldHost=h0
SlurmUser=root
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2
DefMemPerCPU=1000
ReturnToService=2
NodeName=h[1-3] CPUs=4 RealMemory=8000
PartitionName=all Nodes=h[1-3] Default=YES State=UP
"""
BOOT = """
set -e
mount --make-rprivate /
hostname {name}
i=0
for kept in {kept}; do
    i=$((i + 1)); mkdir -p {own}/$i; mount --bind $kept {own}/$i
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /root
i=0
for kept in {kept}; do
    i=$((i + 1)); mkdir -p $kept; mount --bind {own}/$i $kept
done
mkdir -p /run/munge /etc/slurm
mount -t tmpfs -o mode=755 tmpfs /run/munge
for file in hosts passwd group; do mount --bind {folder}/etc/$file /etc/$file; done
mount --bind {folder}/etc/slurm /etc/slurm
cd /
trap 'exit 0' TERM
munged --foreground --force --key-file {folder}/munge.key --log-file {own}/munged.log \\
    --pid-file /run/munge/munged.pid --seed-file {own}/munge.seed &
{daemon} &
while :; do wait || true; sleep 1; done
"""


def missing():
    """What this machine lacks for a Slurm of its own, in words."""
    if os.geteuid():
        return "not root"
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for tool in ("ip", "ss", "unshare", "nsenter", "setpriv"):
        if not shutil.which(tool, path=search):
            return f"no {tool} (apt-get install iproute2 util-linux)"
    for tool in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(tool, path=search):
            return f"no {tool} (apt-get install slurmctld slurmd munge slurm-client)"
    for place in needed():
        for above in (place, *place.parents):
            if above != Path("/root") and not above.stat().st_mode & 0o001:
                return f"{above} is closed to other accounts (chmod o+x)"
    tried = subprocess.run(["ip", "netns", "add", f"{SPACE}-t"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", f"{SPACE}-t"], capture_output=True)
    return tried.stderr.strip() and f"no network namespaces ({tried.stderr.strip()})"


def needed():
    """The folders that hold the checkout and its Python."""
    places = [ROOT, sys.prefix, sys.base_prefix, *filter(os.path.isdir, sys.path)]
    return list(dict.fromkeys(Path(place).resolve() for place in places))


def kept():
    """Those of them that a host of its own /tmp and /root would not see."""
    hidden = [place for place in needed() if str(place).startswith(("/tmp/", "/root/"))]
    return [one for one in hidden if not any(other in one.parents for other in hidden)]


def sh(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, **more)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


class SlurmLab:
    """The hosts, with what a test does to them."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}

    def space(self, host):
        return f"{SPACE}-{host}"

    def address(self, host):
        return f"{NET}.1{host[1]}"

    def home(self, user):
        return self.folder / user

    def __enter__(self):
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def begin(self):
        etc = self.folder / "etc"
        (etc / "slurm").mkdir(parents=True)
        (self.folder / "state").mkdir()
        (etc / "slurm" / "slurm.conf").write_text(CONF.format(folder=self.folder))
        (etc / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used
        hosts = "".join(f"{self.address(host)} {host}\n" for host in (LOGIN, *NODES))
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        accounts = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
        for user, uid in USERS.items():
            self.home(user).mkdir(mode=0o700)
            os.chown(self.home(user), uid, uid)
        known = "".join(f"{user}:x:{uid}:{uid}::{self.home(user)}:/bin/bash\n"
                        for user, uid in USERS.items())  # fmt: skip
        (etc / "passwd").write_text(accounts[0] + known)
        (etc / "group").write_text(
            accounts[1] + "".join(f"{user}:x:{uid}:\n" for user, uid in USERS.items())
        )
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        self.remove()
        sh("ip", "netns", "add", SPACE)
        switch = ("ip", "-n", SPACE)
        sh(*switch, "link", "add", "br0", "type", "bridge")
        sh(*switch, "link", "set", "br0", "up")
        for host in (LOGIN, *NODES):
            space = self.space(host)
            sh("ip", "netns", "add", space)
            sh(*switch, "link", "add", f"v{host}", "type", "veth",
               "peer", "name", "eth0", "netns", space)  # fmt: skip
            sh(*switch, "link", "set", f"v{host}", "master", "br0", "up")
            sh("ip", "-n", space, "link", "set", "lo", "up")
            sh("ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            sh("ip", "-n", space, "link", "set", "eth0", "up")
            self.switch_on(host)
        wait_for(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), 60)

    def switch_on(self, host):
        own = self.folder / f"own-{host}"
        own.mkdir(exist_ok=True)
        boot = own / "boot.sh"
        daemon = "slurmctld -D" if host == LOGIN else f"slurmd -D -N {host}"
        boot.write_text(
            BOOT.format(
                name=host, own=own, folder=self.folder, daemon=daemon,
                kept=" ".join(map(str, kept())),
            )
        )  # fmt: skip
        with (own / "boot.log").open("a") as log:
            self.processes[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.space(host), "unshare", "--mount", "--pid", "--uts",
                 "--ipc", "--fork", "--kill-child", "--mount-proc", "bash", str(boot)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def switch_off(self, host):
        os.kill(self.processes[host].pid, signal.SIGKILL)
        self.processes[host].wait()

    def command(self, host, user, command, **environment):
        """What runs a command of a user on a host, in the checkout."""
        (inside,) = psutil.Process(self.processes[host].pid).children()
        uid = str(USERS.get(user, 0))
        known = {
            "HOME": "/root" if user == "root" else str(self.home(user)), "USER": user,
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8", **environment,
        }  # fmt: skip
        return [
            "nsenter", "--target", str(inside.pid),
            "--mount", "--pid", "--net", "--uts", "--ipc",
            "setpriv", "--reuid", uid, "--regid", uid, "--clear-groups",
            "env", "-i", *(f"{name}={value}" for name, value in known.items()),
            "bash", "-c", f"cd {ROOT} && {command}",
        ]  # fmt: skip

    def run(self, host, user, command, seconds=60, **environment):
        """(exit code, output) of a command of a user on a host, in the checkout."""
        done = subprocess.run(
            self.command(host, user, command, **environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip
        return done.returncode, done.stdout

    def states(self):
        """The state of each node, as Slurm sees it."""
        code, said = self.run(LOGIN, "root", "sinfo --noheader --Node --format='%N %T'")
        if code:
            return {}
        return dict(line.upper().replace("H", "h", 1).split() for line in said.splitlines())

    def set_node(self, host, settings):
        code, said = self.run(LOGIN, "root", f"scontrol update nodename={host} {settings}")
        assert code == 0, said

    def submit(self, user, options, flags, **environment):
        """Submit sweeps/clusters/slurm.sh, and return the job's number."""
        output = f"--output={self.home(user)}/%j.out"
        command = f"sbatch --parsable {output} {options} sweeps/clusters/slurm.sh {flags}"
        code, said = self.run(LOGIN, user, command, **environment)
        assert code == 0, said
        return int(said)

    def output(self, user, job):
        """What a job has printed so far."""
        file = self.home(user) / f"{job}.out"
        return file.read_text() if file.exists() else ""

    def state(self, job):
        """(state, exit code of the batch script, how often it has begun again) of a job."""
        _, said = self.run(LOGIN, "root", f"scontrol show job {job}")
        found = [
            re.search(rf"\b{name}=(\S+)", said) for name in ("JobState", "ExitCode", "Restarts")
        ]
        assert all(found), said
        state, code, restarts = (one[1] for one in found)
        return state, int(code.partition(":")[0]), int(restarts)

    def is_over(self, job):
        """Whether a job has ended for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.state(job)[0] in over

    def ended(self, job, seconds=400):
        """Wait for a job to end, and return its state."""
        wait_for(lambda: self.is_over(job), seconds)
        return self.state(job)

    def during(self, user, job, condition, seconds=300):
        """Wait for a condition while a job lasts."""
        wait_for(lambda: condition() or self.is_over(job), seconds)
        assert not self.is_over(job), self.output(user, job)

    def running(self, host):
        """What runs on a host beside the host itself, by its command line."""
        return running_in(self.space(host), r"munged|slurmd|slurmctld|boot\.sh|^sleep 1$")

    def remove(self):
        for space in (*map(self.space, (LOGIN, *NODES)), SPACE):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def __exit__(self, *_):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.remove()
