"""What the commands `python -m gemel edge profile|run|schedule|simulate` do and print."""

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gemel.edge.aoti import export_compiled
from gemel.edge.blocks import Blocks, blocks_of, sizes_of
from gemel.edge.compare import Row, compare, draw, rows_table
from gemel.edge.counts import Counts
from gemel.edge.endpoint import serve
from gemel.edge.export import export
from gemel.edge.frames import default_transform, frames_from
from gemel.edge.outputs import json_line
from gemel.edge.own import NOTHING_OWN, own_of
from gemel.edge.profile import Profile, measure, read_profile
from gemel.edge.runtime import Result, Runtime
from gemel.edge.schedule import best_batches, best_order, cycle_bytes
from gemel.edge.simulator import Load, Plan, simulate
from gemel.edge.tables import event_text, profile_table, summary_table
from gemel.edge.watch import WatchOptions
from gemel.results_store import files
from gemel.results_store.files import ResultsError
from gemel.results_store.manifest import json_bytes, read_result

DEFAULT_SECONDS = 60.0  # of a simulated stream

signalled = threading.Event()  # whether a signal ended a run of this process


def run_command(flags: argparse.Namespace) -> int:
    """Runs the command that the flags name; the exit code. Raises ValueError for wrong input."""
    for name in ("json", "outputs", "plot"):  # before anything is measured or run
        target = getattr(flags, name, None)
        if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
            raise ResultsError(f"--{name}: got {target}; allowed: a file in a folder that exists")
    commands = {"profile": _profile, "run": _run, "schedule": _schedule, "simulate": _simulate, "export": _export}
    return commands[flags.edge_command](flags)


# ---- profile, run ---------------------------------------------------------------------------------------


def _open(flags: argparse.Namespace, **options: Any) -> Runtime:
    own = own_of(flags.workload) if flags.workload else NOTHING_OWN
    manifest, _ = read_result(flags.results)
    kinds = {task: record["task"] for task, record in manifest["tasks"].items()}
    shared = {kind: default_transform(kind, flags.size) for kind in set(kinds.values())}
    transforms = {task: own.transforms.get(task, shared[kind]) for task, kind in kinds.items()}
    models = {task: model for task, model in own.models.items() if task in kinds}
    return Runtime(
        flags.results, tasks=flags.tasks, models=models, transforms=transforms, device=flags.device, **options
    )


def _profile(flags: argparse.Namespace) -> int:
    source = frames_from(flags.frames)
    with _open(flags) as runtime:
        profile = measure(runtime, source, flags.batches, flags.repeats)
    print(profile_table(profile))
    print(f"\nwritten: {profile.write(flags.results)}")
    return 0


def _run(flags: argparse.Namespace) -> int:
    plan = _read_plan(flags.plan) if flags.plan else Plan()
    options = {"order": plan.order, "batches": plan.batches, "eager": flags.eager or plan.eager}
    options |= {"merged": not flags.unmerged, "through_cache": not flags.cold}
    options |= {"shared_computation": not flags.no_shared_computation}
    source = frames_from(flags.frames)
    with (
        _writer(flags.outputs) as write,
        _open(flags, memory=flags.memory, watch=_watch_options(flags, write), **options) as runtime,
        _ended_by_signals(runtime.stop),
    ):

        def start(counts: Counts) -> None:
            if flags.serve:
                serve(flags.serve, counts, runtime.describe())

        seconds = flags.seconds
        if seconds is None and flags.frames is None:
            seconds = 10.0  # of random images, which have no end of their own

        def answer(result: Result) -> None:
            if flags.outputs:
                write(json_line(result))

        summary = runtime.run(source, flags.fps, flags.sla, seconds=seconds, on_result=answer, on_counts=start)
    if flags.json:
        files.write(Path(flags.json), [json_bytes(summary)])
    print(summary_table(summary), file=sys.stderr if flags.outputs == "-" else sys.stdout)
    return 0


def _watch_options(flags: argparse.Namespace, write: Callable[[str], object]) -> WatchOptions | None:
    """What --watch and the flags beside it ask for. write: for the events."""
    own = {"store": flags.unmerged_store, "alpha": flags.watch_alpha, "seed": flags.watch_seed}
    given = {key: value for key, value in own.items() if value is not None}
    if flags.watch is None:
        if given:
            raise ResultsError("--unmerged-store, --watch-alpha, --watch-seed: allowed: with --watch RATE")
        return None

    def tell(event: dict[str, Any]) -> None:
        write(json.dumps(event))
        print(event_text(event), file=sys.stderr if flags.outputs == "-" else sys.stdout, flush=True)

    return WatchOptions(flags.watch, on_event=tell, **given)


def _export(flags: argparse.Namespace) -> int:
    own = own_of(flags.workload) if flags.workload else NOTHING_OWN
    write = export_compiled if flags.format == "aoti" else export
    folder = write(flags.results, flags.size, flags.tasks, own.models)
    print(f"written: {folder}")
    return 0


@contextlib.contextmanager
def _writer(target: str | None) -> Iterator[Callable[[str], object]]:
    """A function that writes a line; without a target, nothing."""
    if target is None:
        yield lambda line: None
        return
    with contextlib.ExitStack() as stack:
        stream: IO[str] = sys.stdout
        if target != "-":
            with files.naming(Path(target), "written"):
                stream = stack.enter_context(open(target, "w", buffering=1))  # a line at once, for who follows it
        yield lambda line: print(line, file=stream, flush=stream is sys.stdout)


@contextlib.contextmanager
def _ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first SIGTERM or Ctrl-C calls `stop`; the second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        signalled.set()
        stop()
        for other, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(other, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- schedule, simulate ---------------------------------------------------------------------------------


def _read(results: str) -> tuple[dict, Blocks, Blocks, Profile]:
    """(manifest, merged and unmerged blocks, profile) of the tasks that were profiled."""
    manifest, store = read_result(results)
    profile = read_profile(results, manifest["store"]["file"])
    tasks = [task for task in manifest["tensors"] if task in profile.tasks]
    sizes = sizes_of(store.entries)
    merged, unmerged = (blocks_of(manifest["tensors"], sizes, tasks, shared) for shared in (True, False))
    return manifest, merged, unmerged, profile


def _load(flags: argparse.Namespace) -> Load:
    return Load(flags.fps, flags.sla, max(1, round((flags.seconds or DEFAULT_SECONDS) * flags.fps)))


def _schedule(flags: argparse.Namespace) -> int:
    _, blocks, _, profile = _read(flags.results)
    order = best_order(blocks, flags.memory, flags.eager, profile.groups)
    batches = best_batches(blocks, profile, flags.memory, _load(flags), order, flags.eager)
    given = cycle_bytes(blocks, list(blocks.needs), flags.memory, flags.eager)
    plan = {"order": order, "batches": batches, "eager": flags.eager}
    counts = simulate(blocks, profile, flags.memory, _load(flags), Plan(**plan))
    moved = cycle_bytes(blocks, order, flags.memory, flags.eager)
    print(f"order: {', '.join(order)}\nbatches: {', '.join(f'{t} {n}' for t, n in batches.items())}")
    print(f"a cycle moves {moved / (1 << 20):.2f} MiB, in the order of the results {given / (1 << 20):.2f} MiB")
    print(f"simulated: {100 * counts.share:.1f} % of frames in time")
    if flags.json:
        files.write(Path(flags.json), [json_bytes(plan)])
    return 0


def _read_plan(file: str) -> Plan:
    """A plan that `edge schedule` wrote. Raises ResultsError if it is none."""
    try:
        with files.naming(Path(file), "read"):
            content = json.loads(Path(file).read_bytes())
        order, batches, eager = content["order"], content["batches"], content["eager"]
        sound = isinstance(order, list) and all(isinstance(name, str) for name in order) and isinstance(eager, bool)
        if not sound or not all(type(size) is int and size > 0 for size in batches.values()):
            raise ValueError("allowed: order (task names), batches (task: whole number), eager (true or false)")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultsError(f"{file}: is no plan: {error}") from None
    return Plan(order, batches, eager)


def _simulate(flags: argparse.Namespace) -> int:
    manifest, merged, unmerged, profile = _read(flags.results)
    accuracies = {task: manifest["tasks"][task]["merged_acc"] for task in merged.needs}
    budgets: Sequence[int] | int = flags.budgets if flags.memory is None else [flags.memory]
    rows: list[Row] = compare((merged, unmerged), profile, _load(flags), budgets, accuracies, flags.eager)
    print(rows_table(rows))
    if flags.json:
        files.write(Path(flags.json), [json_bytes([row._asdict() for row in rows])])
    if flags.plot:
        draw(rows, flags.plot)
    return 0
