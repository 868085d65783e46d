"""Ray's token, by which the processes of one Ray know each other: our own, or a cluster's."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptcore.config import InputError
from sweeps.execution.private_api import forget_token

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's variables: whether it asks for a token, the token, the file that holds it."""


@contextmanager
def own_token(folder: Path) -> Iterator[None]:
    """Inside, a Ray that this process starts has a new token.

    Without this, Ray would take the token of the home folder, which may be a cluster's, or else
    leave a new one there that everyone can read.

    Args:
        folder: where the token is kept; no other account can enter it.
    """
    before = {name: os.environ.pop(name, None) for name in (MODE, TOKEN, TOKEN_PATH)}
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    os.environ[TOKEN_PATH] = str(file)
    forget_token()
    try:
        yield
    finally:
        os.environ.pop(MODE, None)  # Ray sets it where it is not set
        del os.environ[TOKEN_PATH]
        os.environ.update({name: value for name, value in before.items() if value is not None})
        forget_token()


def token_file() -> Path:
    """Return the file from which Ray reads this account's token, which need not exist."""
    return Path(os.environ.get(TOKEN_PATH) or "~/.ray/auth_token").expanduser()


def close_to_others(file: Path) -> None:
    """Close a file with a token to other accounts, if there is one.

    Raises:
        InputError: others can read it, and this account cannot change that.
    """
    try:
        found = file.stat()
    except OSError:
        return  # Ray says so, if it needs the file
    # A device, or a file of /proc, is no place of a token, whatever is read from it.
    if not (stat.S_ISREG(found.st_mode) and found.st_size and found.st_mode & 0o077):
        return
    try:
        if found.st_uid != os.geteuid():
            raise PermissionError
        file.chmod(0o600)
    except OSError as error:
        raise InputError(
            f"other accounts can use Ray's token, {file}: RAY_AUTH_TOKEN_PATH takes a file of your "
            "own, with the mode 600"
        ) from error
