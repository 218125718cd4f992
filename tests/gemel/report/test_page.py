"""The report: one file, nothing from outside, and every number that of the manifest and of the console."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image
from results_samples import pico_models, slim_models, tree, write

from gemel.console import tables
from gemel.environment.units import mib
from gemel.report import page as module
from gemel.report.page import report_of, write_report
from gemel.report.record import Layer, Record, TaskMemory, read_record
from gemel.results_store.files import ResultsError
from gemel.results_store.load import build_empty
from gemel.results_store.write import update_run
from merge_workloads import merge_workload

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """The numbers, links, ids and texts of a page; fails where an element is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers, self.addresses, self.ids, self.tags, self.open = {}, [], [], [], []
        self.text, self.key = [], None
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.addresses += [given[key] for key in ("src", "href", "xlink:href", "action", "data") if given.get(key)]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "data":
            self.key = given["data-key"]
            self.numbers[self.key] = (float(given["value"]), "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.key = None if tag == "data" else self.key

    def handle_data(self, data):
        self.text.append(data)
        if self.key:
            value, said = self.numbers[self.key]
            self.numbers[self.key] = (value, said + data)


def looked_up(manifest: dict, key: str):
    found = manifest
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


@pytest.fixture(scope="module")
def merged(trained_entries, datasets, tmp_path_factory):
    """(folder, manifest, what was printed) of a merge in which a task cannot reach its target and one can."""
    import contextlib
    import copy

    entries = {n: {**e, "model": copy.deepcopy(e["model"]), "tolerance": 0.6} for n, e in trained_entries.items()}
    folder, printed = tmp_path_factory.mktemp("report") / "results", io.StringIO()
    with contextlib.redirect_stdout(printed):
        manifest = merge_workload(entries, folder, datasets=datasets, per_class=True)
    return folder, manifest, printed.getvalue()


def test_manifest_console_and_report_say_the_same(merged):
    folder, manifest, printed = merged
    page = Page((folder / "report.html").read_text())
    memory = manifest["memory"]
    assert {f"memory.{key}" for key in memory} <= set(page.numbers)
    for key, (value, said) in page.numbers.items():
        assert value == looked_up(manifest, key), key
        assert said == (mib(value) if key.endswith("bytes") else f"{value:.3f}"), key
    closing = tables.closing_report(manifest, per_class=False)
    assert closing in printed
    for key in ("unmerged_bytes", "merged_bytes", "saved_bytes", "optimal_saved_bytes"):
        assert page.numbers[f"memory.{key}"][1] in closing
    for name, task in manifest["tasks"].items():
        row = next(line for line in closing.splitlines() if line.startswith(name)).split()
        shown = [
            page.numbers[f"tasks.{name}.{key}"][1] for key in ("measured_unmerged_acc", "target_acc", "merged_acc")
        ]
        assert row[1:4] == shown == [f"{task[k]:.3f}" for k in ("measured_unmerged_acc", "target_acc", "merged_acc")]


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """Caption of each table -> its rows of cells as text."""
    found = {}
    for caption, body in re.findall(r"<table><caption>(.*?)</caption>.*?<tbody>(.*?)</tbody>", text, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows)
        found[html.unescape(caption)] = [[html.unescape(re.sub(r"<[^>]+>", "", c)) for c in row] for row in cells]
    return found


def test_the_tables_behind_the_charts_say_what_manifest_and_console_say(merged):
    folder, manifest, printed = merged
    tables, rounds = tables_of((folder / "report.html").read_text()), manifest["run"]["rounds"]
    assert len(tables["Every round"]) == len(rounds) > 0
    for row, cells in zip(rounds, tables["Every round"], strict=True):
        assert cells[0] == str(row["round"]) and cells[2] == f"{len(row['met'])} of {len(row['trained'])}"
        assert cells[3].startswith("kept" if row["kept"] else "undone")
        assert cells[4:] == [mib(row["trial_saved_bytes"]), mib(row["saved_bytes"]), str(row["steps"])]
        line = next(line for line in printed.splitlines() if re.match(rf"{row['round']} +\d+ group", line))
        assert mib(row["saved_bytes"]) in line and f"{len(row['met'])}/{len(row['trained'])}" in line
    for name, target, reached in tables["Accuracy of each task in each round"]:
        task = manifest["tasks"][name]
        expected = [(0, task["measured_unmerged_acc"])]
        expected += [(row["round"], row["accuracies"][name]) for row in rounds if name in row["accuracies"]]
        assert target == f"{task['target_acc']:.3f}"
        assert re.findall(r"(\d+): ([\d.]+)", reached) == [(str(n), f"{a:.3f}") for n, a in expected]
    shared = [cells[2] for cells in tables["Every shared layer"]]
    assert shared == [mib(group["bytes"]) for group in manifest["shared_layers"]]
    *models, whole = tables["Memory by model"]
    assert [cells[0] for cells in models] == list(manifest["tasks"])
    assert [whole[1], whole[5]] == [mib(manifest["memory"][key]) for key in ("unmerged_bytes", "merged_bytes")]


def test_the_log_has_every_round_of_the_manifest(merged):
    folder, manifest, _ = merged
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    ended = [event for event in events if event["event"] in ("kept", "undone", "out of memory")]
    assert [event["row"] for event in ended] == manifest["run"]["rounds"]
    assert [event["event"] == "kept" for event in ended] == [row["kept"] for row in manifest["run"]["rounds"]]
    assert events[-1]["event"] == "run ends" and events[-1]["saved_bytes"] == manifest["memory"]["saved_bytes"]


def test_nothing_is_asked_of_the_network_and_no_script_runs(merged):
    text = (merged[0] / "report.html").read_text()
    page = Page(text)
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in page.addresses)
    assert not {"script", "iframe", "object", "link", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert "default-src 'none'" in text and len(text.encode()) < 300_000


def test_every_picture_is_named_and_has_its_table(merged):
    text = (merged[0] / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "an id is on the page once"
    pictures = [given for tag, given in page.tags if tag == "svg"]
    assert len(pictures) > 4 and all(given.get("role") == "img" and given.get("aria-label") for given in pictures)
    for block in re.findall(r"<figure>.*?</figure>", text, re.DOTALL):
        assert "<svg" in block and "<table>" in block
        for svg in re.findall(r"<svg.*?</svg>", block, re.DOTALL):
            ElementTree.fromstring(svg)
    assert re.findall(r"#[0-9a-f]*0b0c", text) == [], "colours are those of the page"


def test_memory_by_model_sums_up_to_the_manifest(merged):
    record = read_record(merged[0])
    memory = record.manifest["memory"]
    assert sum(task.before for task in record.memory.values()) == memory["unmerged_bytes"]
    assert sum(task.after for task in record.memory.values()) == pytest.approx(memory["merged_bytes"], abs=1e-3)


def test_the_map_has_every_layer_and_its_group(merged):
    folder, manifest, _ = merged
    text = (folder / "report.html").read_text()
    drawn = re.search(r'<svg class="map".*?</svg>', text, re.DOTALL)[0]
    titles = re.findall(r"<rect(?: class=\"([^\"]*)\")?[^>]*><title>([^<]*)</title>", drawn)
    layers = [layer for found in read_record(folder).layers.values() for layer in found]
    assert [title.split(",")[0] for _, title in titles] == [layer.name for layer in layers], "none is too thin here"
    for index, group in enumerate(manifest["shared_layers"]):
        own = [title for kind, title in titles if f"g{index}" in kind.split()]
        assert len(own) == len(group["occurrences"]) and all(f"group {index + 1}" in title.split(", ") for title in own)


def test_examples_show_what_both_models_say(merged):
    folder, manifest, _ = merged
    found = json.loads((folder / "examples.json").read_text())
    assert set(found) == set(manifest["tasks"])
    for name, of_task in found.items():
        assert 0 < len(of_task["shown"]) <= of_task["looked_at"]
        worst_first = [example["disagreement"] for example in of_task["shown"]]
        assert worst_first == sorted(worst_first, reverse=True) and all(0 <= value <= 1 for value in worst_first)
        for example in of_task["shown"]:
            picture = Image.open(io.BytesIO(base64.b64decode(example["image"])))
            assert picture.size == (example["width"], example["height"]), name
    assert (folder / "report.html").read_text().count('class="card"') == sum(len(t["shown"]) for t in found.values())


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{" * 99999, b'{"north_pico": {"shown": [{"image": "<script>"}], "looked_at": 1}}']
)
def test_examples_that_somebody_changed_are_left_out(merged, tmp_path, content):
    folder = shutil.copytree(merged[0], tmp_path / "results")
    (folder / "examples.json").write_bytes(content)
    page = Page(write_report(folder).read_text())
    assert "script" not in {tag for tag, _ in page.tags} and 'class="card"' not in page.text
    assert any("holds no examples" in text for text in page.text)


def test_the_same_folder_gives_the_same_page_and_nothing_else_changes(merged, tmp_path):
    folder = shutil.copytree(merged[0], tmp_path / "results")
    before = tree(folder)
    write_report(folder)
    assert tree(folder) == before


def test_a_folder_without_rounds_or_examples_has_a_page(tmp_path):
    write(tmp_path, pico_models())
    page = Page(report_of(read_record(tmp_path)))
    assert any("No round was played" in text for text in page.text)
    (tmp_path / "merged.json").unlink()
    with pytest.raises(ResultsError, match="holds no result"):
        read_record(tmp_path)


def test_names_are_escaped(tmp_path):
    models = slim_models()
    manifest = write(tmp_path, models)
    record = read_record(tmp_path)
    for task in record.manifest["tasks"].values():
        task["class_names"], task["per_class"] = ["<b>&"], {"0": {"unmerged": {"top1": 1.0}, "merged": {"top1": 1.0}}}
    record.manifest["run"] = {**manifest["run"], "command": '"><script>alert(1)</script>', "versions": {"<i>": "<u>"}}
    page = Page(report_of(record))
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags} and any("<b>&" in text for text in page.text)


def test_twenty_resnet50_stay_below_300_kb(merged):
    """Every layer has a mark on the map; with 30 rounds, and an example a task as large as a merge writes it."""
    sizes = {}
    for key, value in build_empty({"name": "resnet50", "num_classes": 2, "kwargs": {}}, 400).state_dict().items():
        sizes[key.rpartition(".")[0]] = sizes.get(key.rpartition(".")[0], 0) + value.nbytes
    record, tasks = read_record(merged[0]), [f"main_2nd_camera_{i:02d}_resnet50" for i in range(20)]
    shared = [name for name in sizes if "bn" not in name and "downsample.1" not in name]
    groups = [
        {"signature": f"Conv2d({size}, {size}, kernel_size=(3, 3), stride=(1, 1)): weight", "bytes": sizes[name]}
        | {"occurrences": [{"task": task, "layer": name} for task in tasks]}
        for size, name in enumerate(shared)
    ]
    layers = [Layer(name, size, 0, shared.index(name) if name in shared else None) for name, size in sizes.items()]
    task = next(iter(record.manifest["tasks"].values()))
    example = {**record.examples["north_pico"]["shown"][0], "image": "/9j/" + "A" * 2200}
    accuracies = {name: 0.5 + i / 60 for i, name in enumerate(tasks)}
    row = {"trained": tasks, "met": [], "kept": False, "kept_for": [], "reason": "needs training", "steps": 12}
    row |= {"accuracies": accuracies, "saved_bytes": 1 << 28, "trial_saved_bytes": 1 << 29}
    manifest = {
        **record.manifest,
        "tasks": {name: {**task, "per_class": None, "class_names": None} for name in tasks},
        "shared_layers": groups,
        "run": {"rounds": [{**row, "round": n, "ended_at": 31.7 * n} for n in range(1, 31)], "not_shared": []},
    }
    memory = {name: TaskMemory(98_000_000, 200_000, 4_700_000, 70_000) for name in tasks}
    examples = {name: {"looked_at": 24, "shown": [example]} for name in tasks}
    text = report_of(Record(record.path, manifest, dict.fromkeys(tasks, layers), memory, examples))
    Page(text)
    assert text.count("<rect") >= 20 * len(shared) and text.count('class="card"') == 20
    assert 150_000 < len(text.encode()) < 300_000


def test_a_page_that_would_be_too_large_shows_fewer_examples(merged, monkeypatch):
    record = read_record(merged[0])
    whole = report_of(record)
    monkeypatch.setattr(module, "MAX_BYTES", len(whole.encode()) - 1)
    fewer = report_of(record)
    assert 0 < fewer.count('class="card"') < whole.count('class="card"')
    monkeypatch.setattr(module, "MAX_BYTES", 1)
    assert 'class="card"' not in (none := report_of(record)) and "too large with images" in none


@pytest.mark.parametrize("run", [{"rounds": [{"trial_saved_bytes": "much"}]}, {"not_shared": [1]}, {"flags": 3}])
def test_a_manifest_whose_run_somebody_changed_is_named(merged, tmp_path, run):
    folder = shutil.copytree(merged[0], tmp_path / "results")
    update_run(folder, {**merged[1]["run"], **run})
    before = (folder / "report.html").read_bytes()
    with pytest.raises(ResultsError, match="merged.json: run: is not what a merge writes"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_names_that_no_file_can_hold_are_shown(tmp_path):
    """A class folder whose name is no UTF-8, as Python reads it."""
    write(tmp_path, slim_models())
    record, scores = read_record(tmp_path), {"0": {"unmerged": {"top1": 1.0}, "merged": {"top1": 1.0}}}
    for task in record.manifest["tasks"].values():
        task["class_names"], task["per_class"] = ["caf\udce9"], scores
    page = Page(report_of(record).encode().decode())
    assert any("caf\N{REPLACEMENT CHARACTER}" in text for text in page.text)
