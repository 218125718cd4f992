"""Writing into a results folder: the names of its files, atomic writes, digests, the lock.

Every file is written under a temporary name in the same folder, synced, and renamed. Whatever the operating system
refuses (disk full, no permission, ...) becomes a ResultsError that names the file. Files get the modes that the user's
umask asks for, because open() creates them; temporaries are created exclusively, so that a link that lies in their
place is never followed.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MANIFEST = "merged.json"
STATISTICS = "workload_stats.json"
IN_FLIGHT = "in_flight.pt"
LOG = "log.jsonl"  # what happened; like the two below no part of the result: a folder without them is complete
EXAMPLES = "examples.json"  # images of val with what unmerged and merged models say
REPORT = "report.html"
WEIGHTS = "weights"
UNMERGED = "unmerged"  # a result of the unmerged models, where they are kept
TEMPORARY = ".tmp"
PENDING = MANIFEST + TEMPORARY  # a complete manifest whose commit is under way: merged.json is replaced by it last
STORE_PATTERN = re.compile(r"merged-[0-9a-f]{16}\.safetensors")
WEIGHTS_PATTERN = re.compile(r"weights/[A-Za-z0-9][A-Za-z0-9_-]*\.pt")
_TEMPORARY_NAMES = (
    PENDING,
    "merged.json.run.tmp",
    "merged.safetensors.tmp",
    STATISTICS + TEMPORARY,
    IN_FLIGHT + TEMPORARY,
    EXAMPLES + TEMPORARY,
    REPORT + TEMPORARY,
)
# What flock says on file systems that cannot lock a folder.
_CANNOT_LOCK = (errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)

log = logging.getLogger(__name__)


class ResultsError(ValueError):
    """A results folder cannot be read or written; the message is one line that names the file."""


class Written(NamedTuple):
    """What was written into a file."""

    sha256: str
    bytes: int


@contextlib.contextmanager
def naming(file: Path, what: str) -> Iterator[None]:
    """Turns an OSError into a ResultsError that names the file."""
    try:
        yield
    except OSError as error:
        raise ResultsError(f"{file}: cannot be {what}: {error.strerror or error}") from error


# ---- writing --------------------------------------------------------------------------------------------


class Sink:
    """A file that is being written, with the digest and the size of what went into it so far.

    Once a write has failed it takes what follows and drops it: torch.save would make other errors of ours. `error` is
    then the first one.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        num_bytes = memoryview(data).nbytes
        try:
            if self.error is None:
                self._file.write(data)
        except OSError as error:
            self.error = error
        self.digest.update(data)
        self.size += num_bytes
        return num_bytes

    def flush(self) -> None:
        """Nothing: the file is synced once it is whole."""


def stage(temporary: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Writes chunks of bytes into a temporary file and syncs it; `commit` renames it. On any error it is removed."""

    def fill(sink: Sink) -> None:
        for chunk in chunks:
            sink.write(chunk)
            if sink.error is not None:
                return

    return stage_by(temporary, fill)


def stage_by(temporary: Path, fill: Callable[[Sink], object]) -> Written:
    """The same of what a function writes into the file, so that it need not be in memory as a whole."""
    try:
        with naming(temporary, "written"):
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as file:
                sink = Sink(file)
                fill(sink)
                if sink.error is not None:
                    raise sink.error
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        discard(temporary)
        raise
    return Written(sink.digest.hexdigest(), sink.size)


def commit(temporary: Path, target: Path) -> None:
    """Renames a staged file; follow with `sync_folder`, or the rename may be lost with the power."""
    with naming(target, "replaced"):
        os.replace(temporary, target)


def write(target: Path, chunks: Iterable[bytes | memoryview], temporary: Path | None = None) -> Written:
    """Replaces a file atomically: whenever the process is killed, it is the old file or the new one."""
    temporary = temporary or target.with_name(target.name + TEMPORARY)
    return _replaced(target, temporary, stage(temporary, chunks))


def write_by(target: Path, fill: Callable[[Sink], object]) -> Written:
    """The same of what a function writes."""
    temporary = target.with_name(target.name + TEMPORARY)
    return _replaced(target, temporary, stage_by(temporary, fill))


def _replaced(target: Path, temporary: Path, written: Written) -> Written:
    try:
        commit(temporary, target)
    except BaseException:
        discard(temporary)
        raise
    sync_folder(target.parent)
    return written


def append(target: Path, lines: bytes) -> None:
    """Appends whole lines to a file; a last line that a killed process left unfinished is ended first.

    One write, not synced: after a loss of power the last lines may be missing. A link in its place is not followed.
    """
    with naming(target, "written"):
        descriptor = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            size = os.fstat(descriptor).st_size
            ended = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
            os.write(descriptor, lines if ended else b"\n" + lines)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that renames in it survive a loss of power."""
    with naming(folder, "synced"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it. Raises ResultsError if it cannot, or if our own one within it is a link."""
    if folder.name in (WEIGHTS, UNMERGED) and folder.is_symlink():
        raise ResultsError(f"{folder}: is a link; allowed: a folder, as nothing is written outside the results folder")
    if not folder.is_dir():
        with naming(folder, "made"):
            folder.mkdir(parents=True, exist_ok=True)


def remove(file: Path) -> None:
    """Removes a file, if it is there; raises ResultsError if it cannot be removed."""
    with naming(file, "removed"):
        file.unlink(missing_ok=True)


def discard(*temporaries: Path) -> None:
    """Removes temporaries after another error; those that cannot be removed now, the next run removes."""
    for temporary in temporaries:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def leftovers(path: Path) -> list[str]:
    """Temporaries of a killed run, by their names in the results folder; only names that this module gives."""
    found = [name for name in _TEMPORARY_NAMES if (path / name).is_file()]
    if not (path / WEIGHTS).is_symlink():
        names = (f"{WEIGHTS}/{file.name}" for file in (path / WEIGHTS).glob(f"*.pt{TEMPORARY}"))
        found += sorted(name for name in names if WEIGHTS_PATTERN.fullmatch(name.removesuffix(TEMPORARY)))
    return found


def stores(path: Path) -> list[str]:
    """Names of all stores in the folder."""
    return sorted(file.name for file in path.glob("merged-*.safetensors") if STORE_PATTERN.fullmatch(file.name))


# ---- reading --------------------------------------------------------------------------------------------


def sha256_of(file: Path) -> str:
    """sha256 of a file, as hex; raises ResultsError if it cannot be read."""
    digest = hashlib.sha256()
    with naming(file, "read"), open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_bytes(content: bytes | memoryview) -> str:
    """sha256 of bytes, as hex."""
    return hashlib.sha256(content).hexdigest()


def size_of(file: Path) -> int | None:
    """Bytes of a regular file; None if there is none."""
    return file.stat().st_size if file.is_file() else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---- the lock -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Locks the results folder for this process alone; makes it if need be, and removes it again if it stayed empty.

    The lock is on the folder itself (flock on its descriptor): it needs no file, follows the folder when that is
    renamed, and ends with the process however that ends. A new folder under the old name is not locked by it. Where the
    file system cannot lock a folder (some network file systems), a warning says so and the run continues.
    Raises ResultsError if another process holds the lock, or if the operating system has no flock (Windows), before
    anything is made.
    """
    path = Path(path)
    _require_flock(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        with naming(path, "opened"):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _flock(descriptor, path)
            yield
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # not empty, as a rule
            for folder in made:
                folder.rmdir()


def _require_flock(path: Path) -> None:
    """Only a run that merges needs fcntl: results can be loaded and verified on every operating system."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise ResultsError(
            f"{path}: cannot be locked: merging needs an operating system with fcntl (Linux, macOS); "
            "load_merged and verify do not"
        ) from None


def _flock(descriptor: int, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResultsError(f"{path}: another process is merging into this folder") from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise ResultsError(f"{path}: cannot be locked: {error.strerror}") from error
        log.warning("%s: cannot be locked on this file system: start no second run into it", path)
