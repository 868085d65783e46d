"""Names, texts and folders that others may have made: what is accepted, and how it is shown.

A runs folder may be a copy of another person's, and many people may use a tracking server. Whatever
these hold may give wrong numbers, and nothing worse.
"""

from __future__ import annotations

import re
from pathlib import Path

from gptcore.config import InputError

NAME_TAKES = "up to 100 letters, digits, dots, dashes and underscores, the first a letter or digit"
"""What the name of a sweep takes, as a message says it."""

HIDDEN = re.compile(
    # Control characters except tab and line feed; marks that turn the direction of a text, that
    # have no width, or that begin a new line; halves of characters.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""The characters by which a text would show as another one, or command a terminal."""


def is_sweep_name(text: str) -> bool:
    """Return whether a text can be the name of a sweep, which becomes the name of a folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text))


def is_run_id(text: str) -> bool:
    """Return whether a text is the id of a run, as MLflow makes it; it becomes a folder too."""
    return bool(re.fullmatch(r"[0-9a-f]{32}", text))


PLAIN = r"[\w .,:;()/+*'-]{0,100}"
"""What the words of tables and findings consist of: none of it has a meaning to a page."""


def is_plain(text: str) -> bool:
    """Return whether a text is a short one, without markup."""
    return bool(re.fullmatch(PLAIN, text))


def printable(text: str) -> str:
    r"""Write characters that command a terminal as escapes such as \x1b. Lines stay lines."""
    return HIDDEN.sub(_escaped, text)


def one_line(text: str) -> str:
    """Write a text in one line, as `printable` does."""
    return printable(" ".join(text.split()))


def in_markdown(text: str) -> str:
    """Write a text in one line of Markdown, without its links, code, tables and HTML."""
    return re.sub(r"([\\`\[<|])", r"\\\1", one_line(text))


def _escaped(hidden: re.Match[str]) -> str:
    code = ord(hidden[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def check_no_link(place: Path, below: Path) -> None:
    """Check that a file or folder lies below a folder, and does not just point elsewhere.

    Raises:
        InputError: it, or a folder on the way to it, is a symbolic link.
    """
    for part in (place, *place.parents):
        if part == below:
            return
        if part.is_symlink():
            raise InputError(
                f"{part} is a link, by which a copied runs folder could have files written "
                "elsewhere: put what it points to in its place"
            )
