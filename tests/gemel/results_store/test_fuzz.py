"""Changed manifests and files are refused with one clear line each; none of them executes or writes anything.

Most changed manifests are sealed again, so that they have to be refused by more than their seal. Only changes that can
be recognised count: a sealed manifest with another accuracy, say, is simply another result.
"""

import copy
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from results_samples import slim_models, tree, write

from gemel.results_store.checkpoint import write_checkpoint
from gemel.results_store.files import ResultsError, sha256_of
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import seal
from gemel.results_store.tensors import checksum, open_store
from gemel.results_store.verify import verify

WRONG_NUMBERS = [None, "1", -1, 10**30, 1e308, [], {"a": 1}]
WRONG_TEXTS = [None, 3, "", "../../evil", "/etc/passwd", "x" * 5000, "\ud800", "a\nb", ["../x"]]
FREE = {"run", "stale", "unmerged_test_acc", "test_acc"}  # other values there can be right
OPTIONAL = {"checksum_block"}  # a manifest without it can be right
SENTINEL = "executed"

Mutation = tuple[str, Callable[[Path], None]]


class Payload:
    """Makes a folder beside the results if it is unpickled without weights_only=True."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / SENTINEL),)


def sealed(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A change of the manifest that is sealed again."""

    def mutate(path: Path) -> None:
        manifest = json.loads((path / "merged.json").read_text())
        change(manifest)
        (path / "merged.json").write_text(json.dumps(seal(manifest)))

    return mutate


def text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / "merged.json").write_bytes(change((path / "merged.json").read_bytes()))


def store_of(path: Path) -> Path:
    (file,) = path.glob("merged-*.safetensors")
    return file


def store(change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    return lambda path: store_of(path).write_bytes(change(bytearray(store_of(path).read_bytes()))) and None


# ---- manifests ------------------------------------------------------------------------------------------


def leaves(value: object, where: tuple = ()) -> Iterator[tuple[tuple, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in FREE and key != "sha256":
            yield from leaves(item, (*where, key)) if isinstance(item, dict | list) else [((*where, key), item)]


def dictionaries(value: object, where: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict):
        yield from ((*where, key) for key in value if key not in FREE | OPTIONAL and key != "sha256")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in FREE:
            yield from dictionaries(item, (*where, key))


def at(manifest: dict, where: tuple):
    for key in where[:-1]:
        manifest = manifest[key]
    return manifest


def replaced(where: tuple, value: object) -> Mutation:
    def change(manifest):
        at(manifest, where)[where[-1]] = copy.deepcopy(value)

    return f"{'.'.join(map(str, where))} = {str(value)[:20]!r}", sealed(change)


def removed(where: tuple) -> Mutation:
    return f"without {'.'.join(map(str, where))}", sealed(lambda manifest: at(manifest, where).pop(where[-1]))


def renamed(name: str) -> Mutation:
    """A task under another name, consistently."""

    def change(manifest):
        for part in ("tasks", "tensors"):
            manifest[part][name] = manifest[part].pop("a_slim")
        for part in ("files", "file_bytes"):
            manifest[part][f"weights/{name}.pt"] = manifest[part].pop("weights/a_slim.pt")
        for group in manifest["shared_layers"]:
            for occurrence in group["occurrences"]:
                occurrence["task"] = occurrence["task"].replace("a_slim", name)

    return f"a task named {name[:30]!r}", sealed(change)


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def manifest_mutations(manifest: dict, chance: random.Random) -> Iterator[Mutation]:
    for where, value in chance.sample(list(leaves(manifest)), 70):
        wrong = WRONG_NUMBERS if isinstance(value, int | float) else WRONG_TEXTS
        yield replaced(where, chance.choice([w for w in wrong if w != value]))
    for where in chance.sample(list(dictionaries(manifest)), 25):
        yield removed(where)
    for name in ("../../evil", "/etc/evil", "..", "", "a/b", "a\0b", "x" * 100 + "/"):
        yield renamed(name)
    yield "store outside", sealed(lambda m: m["store"].update(file="../" + m["store"]["file"]))
    yield "files outside", sealed(lambda m: m["files"].update({"../../x": "0" * 64}))
    yield "stale outside", sealed(lambda m: m["stale"].update({"weights/../../x.pt": "0" * 64}))
    yield "stale absolute", sealed(lambda m: m["stale"].update({"/etc/passwd": "0" * 64}))
    yield "tied what is not", sealed(lambda m: m["shared_layers"].append(m["shared_layers"][0]))
    yield "nothing is shared", sealed(lambda m: m.update(shared_layers=[]))
    yield "met without meeting", sealed(lambda m: m["tasks"]["a_slim"].update(merged_acc=0.1))
    yield "no architecture", sealed(lambda m: m["tasks"]["a_slim"].update(architecture=None))
    yield "endless", sealed(lambda m: m["tasks"]["a_slim"]["architecture"]["kwargs"].update(layers=[1, 10**9]))
    yield "enormous", sealed(lambda m: m["tasks"]["a_slim"]["architecture"].update(num_classes=10**15))
    yield "downloads", sealed(lambda m: m["tasks"]["a_slim"]["architecture"]["kwargs"].update(weights="DEFAULT"))
    yield "history", sealed(lambda m: m["run"].update(history=[{"seconds": "soon"}]))
    for key in ("layer1.0.conv1.weight", "bn1.weight", "bn1.running_mean"):
        yield f"swapped {key}", sealed(lambda m, key=key: swap(m["tensors"]["a_slim"], key, PARTNER[key]))
    for block in (0, 1, 8192, 1 << 40, 16384.0, True):
        yield f"blocks of {block}", sealed(lambda m, block=block: m["store"].update(checksum_block=block))
    for part in ("tasks", "tensors", "files", "memory", "store", "shared_layers"):
        yield f"{part} nested deeply", sealed(lambda m, part=part: m.update({part: nested(400)}))
    yield from text_mutations(chance)


PARTNER = {
    "layer1.0.conv1.weight": "layer1.0.conv2.weight",
    "bn1.weight": "bn1.bias",
    "bn1.running_mean": "layer1.0.bn1.running_mean",
}


def swap(keys: dict, a: str, b: str) -> None:
    keys[a], keys[b] = keys[b], keys[a]


def text_mutations(chance: random.Random) -> Iterator[Mutation]:
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        yield f"{share:.1%} of the manifest", text(lambda content, share=share: content[: int(len(content) * share)])
    for seed in [chance.random() for _ in range(12)]:
        yield "a bit of the manifest", text(lambda content, seed=seed: flipped(content, seed, True))
    first = b'"format": 1'
    for value in (b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"-1", b"true"):
        yield (
            f"format {value[:8]!r}",
            text(lambda content, value=value: content.replace(b": 1,", b": " + value + b",", 1)),
        )
    yield "NaN", text(lambda content: content.replace(b"0.85", b"NaN"))
    yield "Infinity", text(lambda content: content.replace(b"0.85", b"-Infinity"))
    yield "too large", text(lambda content: content.replace(b"0.85", b"1e999"))
    yield "a task twice", text(lambda content: content.replace(b'"b_slim": {', b'"a_slim": {', 1))
    yield "format twice", text(lambda content: content.replace(first, first + b', "format": 1', 1))
    yield "no text", text(lambda content: b"\xff\xfe\xfd" + content)
    yield "a list", text(lambda content: b"[" + content + b"]")


def flipped(content: bytes, seed: float, visible: bool = False) -> bytes:
    """One bit changed; of a text, one within a word or number, as blanks mean nothing."""
    chance, changed = random.Random(seed), bytearray(content)
    positions = [i for i, byte in enumerate(content) if chr(byte).isalnum()] if visible else range(len(content))
    changed[chance.choice(positions)] ^= 1 << chance.randrange(3)
    return bytes(changed)


# ---- stores ---------------------------------------------------------------------------------------------


def store_mutations(chance: random.Random) -> Iterator[Mutation]:
    for share in (0.0, 0.001, 0.2, 0.6, 0.999):
        yield f"{share:.1%} of the store", store(lambda content, share=share: content[: int(len(content) * share)])
    for seed in [chance.random() for _ in range(25)]:
        yield "a bit of the store", store(lambda content, seed=seed: flipped(content, seed))
    yield "a longer store", store(lambda content: content + b"\0" * 8)
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield f"header of {length}", store(lambda content, n=length: n.to_bytes(8, "little") + content[8:])
    for level in ("data", "header", "header and manifest", "checksums too"):
        for number in range(3):
            yield f"swapped tensors, {level}", lambda path, n=number, level=level: swapped_tensors(path, n, level)
    for name, change in HEADERS.items():
        yield name, lambda path, change=change: edit_header(path, change)
    yield "no store", lambda path: store_of(path).unlink()
    yield "a folder for a store", lambda path: (store_of(path).rename(path / "x"), (path / store_name(path)).mkdir())


def store_name(path: Path) -> str:
    return json.loads((path / "merged.json").read_text())["store"]["file"]


def header_of(path: Path) -> tuple[dict, bytes]:
    content = store_of(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edit_header(path: Path, change: Callable[[dict], object], data: bytes | None = None, seal_it: bool = True) -> None:
    """Another header; if sealed, the manifest gets its digest and the new length of the store."""
    header, old = header_of(path)
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64)
    store_of(path).write_bytes(len(encoded).to_bytes(8, "little") + encoded + (old if data is None else data))
    if seal_it:
        digest = hashlib.sha256(len(encoded).to_bytes(8, "little") + encoded).hexdigest()
        size = store_of(path).stat().st_size

        def tell(manifest):
            manifest["store"].update(header_sha256=digest, bytes=size)
            manifest["file_bytes"][manifest["store"]["file"]] = size

        sealed(tell)(path)


def first_of(header: dict, condition) -> dict:
    return next(entry for key, entry in header.items() if condition(entry))


HEADERS = {
    "another dtype": lambda h: first_of(h, lambda e: e["dtype"] == "F32").update(dtype="I32"),
    "unknown dtype": lambda h: first_of(h, lambda e: e["dtype"] == "F32").update(dtype="F31"),
    "another shape": lambda h: first_of(h, lambda e: len(e["shape"]) == 4)["shape"].reverse(),
    "negative shape": lambda h: first_of(h, lambda e: len(e["shape"]) == 1).update(shape=[-1]),
    "huge shape": lambda h: first_of(h, lambda e: len(e["shape"]) == 1).update(shape=[2**70]),
    "huge offsets": lambda h: first_of(h, lambda e: True).update(data_offsets=[2**80, 2**81]),
    "overlap": lambda h: [e.update(data_offsets=[0, e["data_offsets"][1] - e["data_offsets"][0]]) for e in h.values()],
    "no offsets": lambda h: first_of(h, lambda e: True).pop("data_offsets"),
    "offsets as text": lambda h: first_of(h, lambda e: True).update(data_offsets="ab"),
    "no tensors": lambda h: h.clear(),
    "one tensor less": lambda h: h.pop(next(iter(h))),
}


def swapped_tensors(path: Path, number: int, level: str) -> None:
    """Two tensors of one size change places in the data or in the header; `level` says what is made to agree."""
    header, data = header_of(path)
    by_size: dict[int, list[str]] = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        others = by_size.setdefault(end - begin, [])
        if all(data[begin:end] != data[slice(*header[other]["data_offsets"])] for other in others):
            others.append(key)
    a, b = [keys for keys in by_size.values() if len(keys) > 1][number][:2]
    (a0, a1), (b0, b1) = header[a]["data_offsets"], header[b]["data_offsets"]
    if level == "header":

        def exchange(h):
            h[a]["data_offsets"], h[b]["data_offsets"] = h[b]["data_offsets"], h[a]["data_offsets"]

        edit_header(path, exchange, seal_it=False)
        return
    changed = bytearray(data)
    changed[a0:a1], changed[b0:b1] = data[b0:b1], data[a0:a1]
    edit_header(path, lambda h: None, bytes(changed), seal_it=level != "data")
    if level == "checksums too":
        entries, content = open_store(store_of(path)).entries, memoryview(store_of(path).read_bytes())
        sums = {key: checksum(content[entry.begin : entry.end]) for key, entry in entries.items()}
        sealed(lambda manifest: manifest["store"].update(checksums=sums))(path)


# ---- other files ----------------------------------------------------------------------------------------


def told(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change of a file, whose new sha256 and size are put into the manifest."""

    def mutate(path: Path) -> None:
        change(path / name)
        digest, size = sha256_of(path / name), (path / name).stat().st_size
        sealed(lambda m: (m["files"].update({name: digest}), m["file_bytes"].update({name: size})))(path)

    return mutate


def file_mutations(chance: random.Random) -> Iterator[Mutation]:
    weights = "weights/a_slim.pt"

    def payload(file: Path) -> None:
        torch.save({"conv1.weight": Payload(file.parent.parent.parent)}, file)

    def changed(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        state["fc.bias"] += 1
        torch.save(state, file)

    yield "payload in .pt", lambda path: payload(path / weights)
    yield "payload in .pt, told", told(weights, payload)
    yield "another tensor in .pt, told", told(weights, changed)
    yield "garbage in .pt, told", told(weights, lambda file: file.write_bytes(b"garbage"))
    yield "no .pt", lambda path: (path / weights).unlink()
    yield "a list in .pt, told", told(weights, lambda file: torch.save([1], file))
    yield "payload in flight", lambda path: torch.save({"state": Payload(path.parent)}, path / "in_flight.pt")
    yield "garbage in flight", lambda path: (path / "in_flight.pt").write_bytes(b"garbage")
    yield "a number in flight", lambda path: torch.save(3, path / "in_flight.pt")
    yield "other statistics", lambda path: (path / "workload_stats.json").write_text("{}")
    for name in (weights, "in_flight.pt"):
        for share in (0.3, 0.95):
            yield f"{share:.0%} of {name}", lambda path, n=name, s=share: cut(path / n, s)
    for seed in [chance.random() for _ in range(5)]:
        yield "a bit of .pt", lambda path, seed=seed: flip(path / weights, seed)


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def flip(file: Path, seed: float) -> None:
    file.write_bytes(flipped(file.read_bytes(), seed))


# ---- the test -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original") / "results"
    models = slim_models()
    for tensor in models.state_dict().values():  # no two alike, so that a swap is a change
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape))
    write(path, models)
    write_checkpoint(path, {"step": 1, "weights": torch.rand(3)})
    assert load_merged(path) and all(check.status != "FAIL" for check in verify(path))
    return path


def refusals(path: Path) -> list[str]:
    """What load_merged and verify say against a folder; anything but a ResultsError comes through."""
    said = []
    try:
        load_merged(path)
    except ResultsError as error:
        said.append(str(error))
    return said + [check.what for check in verify(path) if check.status == "FAIL"]


def mutations(original: Path) -> list[Mutation]:
    chance = random.Random(0)
    manifest = json.loads((original / "merged.json").read_text())
    return [*manifest_mutations(manifest, chance), *store_mutations(chance), *file_mutations(chance)]


def test_mutated_folders_are_refused_and_do_nothing(original, tmp_path):
    all_mutations = mutations(original)
    for number, (what, mutate) in enumerate(all_mutations):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder / "results")
        mutate(folder / "results")
        before = tree(tmp_path)
        said = refusals(folder / "results")
        assert said, f"{number}: {what}: was accepted"
        for line in said:
            assert "\n" not in line and len(line) < 2000, f"{number}: {what}: {line}"
            line.encode()  # no lone surrogates: it can be printed
            assert str(folder / "results") in line or "slim" in line, f"{number}: {what}: names nothing: {line}"
        assert tree(tmp_path) == before, f"{number}: {what}: wrote something"
        shutil.rmtree(folder)
    print(f"\n{len(all_mutations)} mutations refused")
    assert len(all_mutations) >= 200


def test_a_manifest_that_was_only_laid_out_anew_is_accepted(original, tmp_path):
    """The test above does not pass only because everything is refused."""
    shutil.copytree(original, tmp_path / "results")
    manifest = json.loads((original / "merged.json").read_text())
    anew = json.dumps(dict(reversed(manifest.items())), indent=7)
    (tmp_path / "results" / "merged.json").write_text(anew)
    assert refusals(tmp_path / "results") == []


def test_the_payload_works(tmp_path):
    """If it were unpickled, the test above would fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path)))
    assert (tmp_path / SENTINEL).is_dir()
