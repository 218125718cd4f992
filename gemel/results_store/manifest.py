"""The manifest, merged.json: sealed with a sha256 when it is written, used only after everything in it was checked.

Checks go from the outside in, each relying on those before: parts, seal, entries (schema.py), agreement of the parts
with each other and with the store (agreement.py).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gemel.results_store.agreement import agreement_problems, store_problems
from gemel.results_store.files import MANIFEST, ResultsError, naming
from gemel.results_store.schema import entry_problems, part_problems, short
from gemel.results_store.tensors import Store, open_store

FORMAT = 1
SHOWN = 3  # problems in one message


# ---- writing --------------------------------------------------------------------------------------------


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it comes back from JSON, with the sha256 of all its other parts.

    Raises ResultsError if a value cannot be written (no JSON type, or NaN and infinity, which JSON has not).
    """
    try:
        plain = json.loads(
            json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, allow_nan=False)
        )
    except (TypeError, ValueError) as error:
        raise ResultsError(f"{MANIFEST}: cannot be written: {error}") from error
    return {**plain, "sha256": digest_of(plain)}


def digest_of(manifest: Mapping[str, Any]) -> str:
    """sha256 over the content: how the file is laid out, or the order of keys, does not matter."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def json_bytes(value: object) -> bytes:
    """A JSON file, indented so that people can read it."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def assert_valid(manifest: dict[str, Any], store: Store) -> None:
    """Asserts that `read_result` would accept what is about to be written."""
    problems = [*_problems(manifest)] or [*store_problems(manifest, store)]
    assert not problems, f"{MANIFEST} would be invalid: {'; '.join(problems[:SHOWN])}"


# ---- reading --------------------------------------------------------------------------------------------


def has_results(path: str | Path) -> bool:
    """Whether the folder holds a result, that is, a manifest."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a results folder, checked by itself (`read_result` also checks it against the store).

    Raises ResultsError, one line that names the file, if there is none or anything in it is wrong.
    """
    file = Path(path) / name
    if not file.exists():
        raise ResultsError(f"{file}: not found, so this folder holds no result")
    with naming(file, "read"):
        content = file.read_bytes()
    try:
        manifest = json.loads(content, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{file}: cannot be read: {str(error)[:200]}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ResultsError(f"{file}: format: got {short(got)}; allowed: {FORMAT}")
    _raise_if_any(file, _problems(manifest))
    return manifest


def read_result(path: str | Path) -> tuple[dict[str, Any], Store]:
    """The manifest and the opened store, which agree; no tensor of the store has been read yet.

    Raises ResultsError, one line that names the file, if the folder holds no valid result.
    """
    manifest = read_manifest(path)
    store = open_store(Path(path) / manifest["store"]["file"])
    if store.bytes != manifest["store"]["bytes"]:
        got = f"{store.bytes} bytes, the manifest says {manifest['store']['bytes']}"
        raise ResultsError(f"{store.file}: got {got}: the file is damaged or truncated")
    if store.header_sha256 != manifest["store"]["header_sha256"]:
        raise ResultsError(f"{store.file}: the sha256 of its header is not the one in the manifest: it is damaged")
    _raise_if_any(Path(path) / MANIFEST, store_problems(manifest, store))
    return manifest, store


class Additions(NamedTuple):
    """What a task has beside the shared parameters of a layer."""

    rank: int  # of its adapter; 0: none
    has_affine: bool  # a scale and bias


def adapted_layers(shared_layers: Iterable[Mapping[str, Any]], task: str) -> dict[str, Additions]:
    """The task's shared layers that have an adapter, or a scale and bias -> which."""
    found = ((group, Additions(group.get("rank", 0), bool(group.get("affine_bytes")))) for group in shared_layers)
    groups = ((group, added) for group, added in found if any(added))
    return {o["layer"]: added for group, added in groups for o in group["occurrences"] if o["task"] == task}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is repeated among {short(list(found))}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _raise_if_any(file: Path, problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ResultsError(f"{file}: {'; '.join(found[:SHOWN])}{more}")


def _problems(manifest: dict[str, Any]) -> Iterator[str]:
    """Of the first check that finds anything: later ones rely on what it checks."""
    for check in (part_problems, _seal_problems, entry_problems, agreement_problems):
        found = list(check(manifest))
        if found:
            yield from found
            return


def _seal_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        digest = digest_of(manifest)
    except (ValueError, RecursionError) as error:
        yield f"cannot be used: {str(error)[:200]}"
    else:
        if manifest["sha256"] != digest:
            yield "sha256: is not that of the content: the file was changed by hand or is damaged"
