"""The command line of `python -m gemel edge`. Imports no torch, so that --help and a wrong flag answer at once."""

import argparse
import math
import re
from collections.abc import Callable

from gemel.console.flags import parse_duration, parse_size
from gemel.environment import DEVICES

FORMATS = ("onnx", "aoti")


def add_edge_commands(commands: argparse._SubParsersAction) -> None:
    """Adds `edge` and its commands to those of `python -m gemel`."""
    edge = commands.add_parser("edge", help="run a merged workload on a box with little memory")
    commands = edge.add_subparsers(dest="edge_command", required=True, metavar="COMMAND")
    _add_profile(commands.add_parser("profile", help="measure every model on this device; written beside the results"))
    _add_run(commands.add_parser("run", help="run all models on frames, under a budget of memory"))
    _add_schedule(commands.add_parser("schedule", help="choose the order of turns and the batch sizes"))
    _add_simulate(commands.add_parser("simulate", help="compare orders and budgets by the profile, running no model"))
    _add_export(commands.add_parser("export", help="write models that run outside this package, weights shared"))


def _add_profile(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    parser.add_argument("--batches", type=parse_sizes, default=(1, 2, 4, 8), metavar="N,N", help="default: 1,2,4,8")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="default: %(default)s")


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    _add_load(parser)
    parser.add_argument("--memory", type=parse_size, metavar="SIZE", help="of weights, such as 600MiB; default: all")
    parser.add_argument("--plan", metavar="FILE.json", help="order and batch sizes, as `edge schedule` writes them")
    parser.add_argument("--eager", action="store_true", help="load the next model early even where more bytes move")
    parser.add_argument("--unmerged", action="store_true", help="give every model weights of its own")
    alone_help = "run every layer of every model, also those that several models compute alike"
    parser.add_argument("--no-shared-computation", action="store_true", help=alone_help)
    parser.add_argument("--cold", action="store_true", help="read weights from the disk, not from the system's cache")
    watch_help = "share of frames that also run through the unmerged model, such as 0.01; a task goes back if need be"
    parser.add_argument("--watch", type=_rate, metavar="RATE", help=watch_help)
    store_help = "with --watch: results folder of the unmerged models; default: `unmerged` in RESULTS"
    parser.add_argument("--unmerged-store", metavar="DIR", help=store_help)
    alpha_help = "with --watch: probability that any task goes back without a cause (default: 0.05)"
    parser.add_argument("--watch-alpha", type=_probability, metavar="P", help=alpha_help)
    parser.add_argument("--watch-seed", type=int, metavar="N", help="with --watch: of the sampling (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write the summary there")
    parser.add_argument("--outputs", metavar="FILE", help="write an answer a line as JSON; - is standard output")
    parser.add_argument("--serve", type=parse_address, metavar="[HOST:]PORT", help="metrics for Prometheus over HTTP")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", help="the results folder")
    _add_load(parser)
    parser.add_argument("--memory", type=parse_size, required=True, metavar="SIZE", help="of weights, such as 600MiB")
    parser.add_argument("--eager", action="store_true", help="as for run")
    parser.add_argument("--json", metavar="FILE", help="write the plan there, for `edge run --plan`")


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", help="the results folder")
    _add_load(parser)
    parser.add_argument("--budgets", type=_positive, default=5, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--memory", type=parse_size, metavar="SIZE", help="this budget alone")
    parser.add_argument("--eager", action="store_true", help="as for run")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", metavar="FILE", help="draw frames in time against memory (needs matplotlib)")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", help="the results folder")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="aoti: compiled (default: %(default)s)")
    parser.add_argument("--size", type=_positive, required=True, metavar="PIXELS", help="a side of the images")
    parser.add_argument("--workload", metavar="FILE.py", help="models that the results do not describe")
    parser.add_argument("--tasks", metavar="NAME,NAME", type=lambda text: text.split(","), help="only these")


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", help="the results folder")
    parser.add_argument("--frames", metavar="SOURCE", help="folder of images, or a video; default: random images")
    parser.add_argument("--size", type=_positive, metavar="PIXELS", help="resize frames to this square")
    help_text = "a file with create_model_dict(): models and val transforms are taken from it"
    parser.add_argument("--workload", metavar="FILE.py", help=help_text)
    parser.add_argument("--tasks", metavar="NAME,NAME", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="default: %(default)s")


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fps", type=_positive_number, default=10.0, help="frames a second (default: %(default)s)")
    help_text = "time from a frame to its answer, such as 100ms; default: no frame is late"
    parser.add_argument("--sla", type=parse_time, metavar="TIME", help=help_text)
    parser.add_argument("--seconds", type=parse_duration, metavar="TIME", help="length of the stream, such as 60s")


def parse_time(text: str) -> float:
    """Seconds of a time such as 100ms, 0.5s or 2m."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)ms", text.strip()):
        if float(match[1]) > 0:
            return float(match[1]) / 1e3
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a time such as 100ms or 2s")
    return parse_duration(text)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes such as 1,2,4, ascending."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or "0" in text.split(","):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: whole numbers such as 1,2,4")
    return tuple(sorted({int(word) for word in text.split(",")}))


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of 9100 or 0.0.0.0:9100; the host is the loopback where none is given."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a port such as 9100, or HOST:PORT")
    return host or "127.0.0.1", int(port)


def _rate(text: str) -> float:
    return _number_in(text, "(0, 1]", lambda value: 0 < value <= 1)


def _probability(text: str) -> float:
    return _number_in(text, "(0, 1)", lambda value: 0 < value < 1)


def _number_in(text: str, allowed: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number in {allowed}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number of at least 1")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number above 0")
    return value
