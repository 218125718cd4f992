"""The command line of merge_workloads.py. Imports no torch, so that --help and a wrong flag answer at once."""

import argparse
import re

from gemel.environment import DEVICES
from gemel.forward import STEP_PRECISIONS, STORE_TYPES
from gemel.strategies import STRATEGIES

UNITS = ("", "K", "M", "G")  # powers of 1024 with an i, else of 1000


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Merge vision models so that a workload fits one box.",
        epilog="Exit codes: 0 done; 1 the result does not fit --memory, or another failure; 2 the input is wrong; "
        "130 interrupted.",
    )
    parser.add_argument("--workload", metavar="FILE.py", help="a file with create_model_dict(); default: this script's")
    parser.add_argument("--datasets", metavar="DIR", help="default: ../dataset_formation/datasets beside the script")
    parser.add_argument("--results", metavar="DIR", default="results", help="results folder (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help="target accuracy as a share of the unmerged (default: 0.95)")
    parser.add_argument("--strategy", choices=sorted(STRATEGIES), default="adaptive", help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    duration_help = "such as 90s, 30m or 2h; counts from after the models are loaded (and prepared)"
    parser.add_argument("--time-budget", type=parse_duration, metavar="TIME", help=duration_help)
    types_help = "of the weights as stored and judged (default: %(default)s)"
    parser.add_argument("--store-dtype", choices=STORE_TYPES, default="float32", help=types_help)
    precision_help = "of training steps; auto: as measured, with all that is judged in float32 (default: %(default)s)"
    parser.add_argument("--precision", choices=STEP_PRECISIONS, default="float32", help=precision_help)
    compile_help = "compile training steps with torch.compile where that is faster: for long trainings"
    parser.add_argument("--compile", action="store_true", help=compile_help)
    norm_help = "share normalisation in first layers as well, so that tasks of one camera run them once"
    parser.add_argument("--share-norm", action="store_true", help=norm_help)
    parser.add_argument("--memory", type=parse_size, metavar="SIZE", help="such as 600MiB: stop once parameters fit it")
    parser.add_argument("--pareto", metavar="FILE.json", help="write what was measured: memory against worst accuracy")
    parser.add_argument("--per-class", action="store_true", help="also say how every class fares")
    retry_help = "merge this task of the results again, with the dataset of --data"
    parser.add_argument("--retry", metavar="TASK", help=retry_help)
    parser.add_argument("--data", metavar="DIR", help="with --retry: the task's new dataset folder")
    kept_help = "also store the unmerged models, for `edge run --watch`"
    parser.add_argument("--keep-unmerged", action="store_true", help=kept_help)
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier result is kept aside")
    board_help = "write what is measured there as well, for TensorBoard (which must be installed)"
    parser.add_argument("--tensorboard", metavar="DIR", help=board_help)
    parser.add_argument("--quiet", action="store_true", help="print the closing tables alone")
    parser.add_argument("--debug", action="store_true", help="on an error, print where in the code it came from")
    parser.add_argument("--check", action="store_true", help="try what a merge needs; train and write nothing")
    parser.add_argument("--html", metavar="FILE.html", help="with --plan or --check: write it as a page as well")
    parser.add_argument("--json", metavar="FILE.json", help="with --plan: write it as JSON as well")
    parser.add_argument("--plan", action="store_true", help="print what could be saved; train nothing")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 30m, 1.5h or 45 (seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a duration such as 90s, 30m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_size(text: str) -> int:
    """Bytes of a size such as 600MiB, 1.5GiB, 800MB or 1000000 (bytes), rounded down."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG])(i?)B|B)?", text.strip())
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** UNITS.index(match[2] or "")) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a size such as 600MiB, 1.5GiB, 800MB or 1000000")
    return size
