"""What the two cluster files do on machines: what is copied there, and how uv comes there."""

import hashlib
import re
import shutil
import subprocess
import zipfile

import pytest
import yaml
from ray.autoscaler._private.command_runner import SSHCommandRunner

from helpers.paths import ROOT
from sweeps.clusters.aws_rules import KEPT_HOME

FILES = {
    name: yaml.safe_load((ROOT / name).read_text())
    for name in ("cluster.yaml", "sweeps/clusters/onprem.yaml")
}
SECRETS = [
    ".env", ".env.local", "sweeps/.env", ".netrc", ".aws/credentials", ".ssh/config",
    "lab.pem", "keys/wandb.key", "id_ed25519", "id_rsa.pub", ".git/config",
]  # fmt: skip
NOT_SENT = [".venv/bin/python", "runs/mlflow.db", "__pycache__/x.pyc"]


@pytest.mark.parametrize("name", FILES)
def test_the_checkout_is_copied_without_secrets(name, tmp_path):
    """By the options that Ray makes of the file, and a real rsync."""
    if not shutil.which("rsync"):
        pytest.skip("no rsync on this machine: apt-get install rsync")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("this is not a checkout of git")
    here, there = tmp_path / "here", tmp_path / "there"
    for file in listed:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, here / file)
    for file in SECRETS + NOT_SENT + [".git/HEAD"]:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text("x")
    options = {key: FILES[name][key] for key in ("rsync_filter", "rsync_exclude")}
    chosen = SSHCommandRunner._create_rsync_filter_args(None, options)
    subprocess.run(["rsync", "-avz", *chosen, f"{here}/", f"{there}/"], check=True)
    arrived = {file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file()}
    assert arrived == {*listed, ".git/HEAD"}
    # The token is copied by a command of its own, with the same options.
    token = tmp_path / "auth_token"
    token.write_text("x")
    subprocess.run(["rsync", "-avz", *chosen, str(token), f"{there}/token"], check=True)
    assert (there / "token").exists()


def test_a_checkout_without_its_git_config_still_names_its_commit(tmp_path):
    git = ["git", "-C", str(tmp_path)]
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, *who, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    commit = [*git, "rev-parse", "HEAD"]
    before = subprocess.run(commit, capture_output=True, check=True).stdout
    (tmp_path / ".git" / "config").unlink()
    assert subprocess.run(commit, capture_output=True, check=True).stdout == before


def test_both_files_keep_the_same_at_home():
    assert {tuple(file["rsync_exclude"]) for file in FILES.values()} == {KEPT_HOME}


DIGEST = "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19"
CURL = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
cp "{wheel}" "$2"
"""


def uv_in(folder, digest_of=lambda wheel: DIGEST):
    """Run the command of cluster.yaml that brings uv, where the index sends another file."""
    for name in ("home", "bin"):
        (folder / name).mkdir()
    wheel = folder / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("uv-0.13.9.data/scripts/uv", "#!/bin/sh\necho uv\n")
    (folder / "bin" / "curl").write_text(CURL.format(wheel=wheel))
    (folder / "bin" / "curl").chmod(0o755)
    (command,) = [one for one in FILES["cluster.yaml"]["setup_commands"] if "curl" in one]
    assert command.count(DIGEST) == 1
    return subprocess.run(
        ["bash", "-c", command.replace(DIGEST, digest_of(wheel))],
        env={"HOME": str(folder / "home"), "PATH": f"{folder}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_uv_is_not_used_unless_it_has_the_digest(tmp_path):
    ended = uv_in(tmp_path)
    assert ended.returncode != 0
    assert "did NOT match" in ended.stderr
    assert not (tmp_path / "home" / "uv" / "uv").exists()


def test_uv_with_the_digest_is_there_to_be_run(tmp_path):
    ended = uv_in(tmp_path, lambda wheel: hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert ended.returncode == 0, ended.stderr
    said = subprocess.run([tmp_path / "home" / "uv" / "uv"], capture_output=True, text=True)
    assert said.stdout == "uv\n"


def test_nothing_that_is_fetched_is_run_unseen():
    for file in FILES.values():
        for command in file["setup_commands"]:
            assert not re.search(r"\|\s*(ba)?sh\b", command)
            assert "curl" not in command or "sha256sum --check" in command
