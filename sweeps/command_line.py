"""The command line that sweeps and searches share: common options, and a flag for each knob."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from gptcore.config import KNOBS, InputError, TrialConfig, did_you_mean, plain, spelling
from gptcore.corpus import CORPORA
from gptcore.init_schemes import INIT_SCHEMES
from gptcore.optimizers import OPTIMIZERS, SCHEDULES
from tracking.arguments import Parser
from tracking.untrusted import NAME_TAKES, is_sweep_name


def sweep_parser(doc: str) -> Parser:
    """Return a parser of the options that sweeps and searches share."""
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", help="name of the sweep (by default the preset's name)")
    parser.add_runs_dir()
    parser.add_argument(
        "--wait", action="store_true",
        help="if another driver works on this sweep, wait for it instead of ending",
    )  # fmt: skip
    parser.add_argument(
        "--share", action="store_true",
        help="open the runs folder to its group, for this and all later commands",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="build no report at the end")
    parser.add_argument(
        "--no-estimate", action="store_true",
        help="measure nothing before trials run; use an earlier measurement on the same hardware "
        "if the runs folder has one",
    )  # fmt: skip
    return parser


def add_knobs(parser: argparse.ArgumentParser, description: str) -> None:
    """Add a flag for each knob."""
    knobs = parser.add_argument_group("knobs", description)
    defaults = TrialConfig().to_flat()
    registries: dict[str, Mapping[str, object]] = {
        "init.scheme": INIT_SCHEMES,
        "corpus.name": CORPORA,
        "optim.name": OPTIMIZERS,
        "optim.schedule": SCHEDULES,
    }
    for key, entry in KNOBS.items():
        names = entry.metadata["choices"] or registries.get(key, ())
        text = f"{entry.metadata['doc']}{': ' if names else ''}{', '.join(names)}"
        limits = "".join(
            f"; {sign} {plain(limit)}" for sign, limit in entry.metadata["limits"].items()
        )
        knobs.add_argument(
            f"--{key}",
            nargs="+",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{text} [{spelling(defaults[key])}{limits}]".replace("%", "%%"),
        )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Parse a command line. Raise InputError for bad arguments.

    Returns:
        The options, and the texts given for each knob.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = did_you_mean(unknown[0], [f"--{key}" for key in KNOBS])
        raise InputError(f"unknown argument {unknown[0]}: {hint}--help names them all")
    if args.name is not None and not is_sweep_name(args.name):
        raise InputError(f"--name takes {NAME_TAKES}, not {args.name!r}")
    return args, {key: vars(args)[key] for key in KNOBS if key in args}
