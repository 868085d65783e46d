"""The command line that every sweep shares: where its runs go, and a flag for each knob."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.config import KNOBS, InputError, TrialConfig, spelling
from gptcore.corpus import CORPORA
from gptcore.init_schemes import INIT_SCHEMES
from gptcore.optimizers import OPTIMIZERS, SCHEDULES
from tracking.arguments import Parser


def sweep_parser(doc: str) -> Parser:
    """A parser of what every sweep takes beside its knobs."""
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--name", help="of the sweep, by default the preset's; runs are kept under it"
    )
    parser.add_runs_dir()
    parser.add_argument("--no-report", action="store_true", help="end without building the report")
    parser.add_argument(
        "--no-estimate", action="store_true",
        help="measure nothing before trials run, and use what the runs folder has of an earlier "
        "measurement on the same hardware",
    )  # fmt: skip
    return parser


def add_knobs(parser: argparse.ArgumentParser, says: str) -> None:
    """A flag for each knob, after those that the parser has."""
    knobs = parser.add_argument_group("knobs", says)
    defaults = TrialConfig().to_flat()
    registries: dict[str, Mapping[str, Any]] = {
        "init.scheme": INIT_SCHEMES,
        "corpus.name": CORPORA,
        "optim.name": OPTIMIZERS,
        "optim.schedule": SCHEDULES,
    }
    for key, entry in KNOBS.items():
        names = entry.metadata["choices"] or registries.get(key, ())
        knobs.add_argument(
            f"--{key}",
            nargs="+",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{entry.metadata['doc']}{': ' if names else ''}{', '.join(names)} "
            f"[{spelling(defaults[key])}]",
        )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """The options, and what was typed for each knob that was given. Raises InputError."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{key}" for key in KNOBS], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown argument {unknown[0]}: {hint}--help names them all")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", args.name):
        raise InputError(
            "--name takes up to 100 letters, digits, dots, dashes and underscores, "
            f"the first a letter or digit, not {args.name!r}"
        )
    return args, {key: vars(args)[key] for key in KNOBS if key in args}
