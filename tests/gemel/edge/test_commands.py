"""python -m gemel edge ...: what is printed and written, and what is refused."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from edge_samples import write_slim
from PIL import Image

from gemel.__main__ import main
from gemel.edge.activations import peak_bytes
from gemel.edge.frames import FolderFrames, Frames, RandomFrames, default_transform, frames_from
from gemel.edge.profile import PROFILE, read_profile
from gemel.results_store.files import ResultsError

ROOT = Path(__file__).resolve().parents[3]
TASKS = ["a_slim", "b_slim"]


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """Results with a profile."""
    path = write_slim(tmp_path_factory.mktemp("slim"))
    assert main(["edge", "profile", str(path), "--size", "16", "--repeats", "2", "--batches", "1,2"]) == 0
    return path


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 12), (50 * i, 10, 10)).save(images / f"{i}.png")
    return images


def test_a_profile_says_what_was_measured(slim):
    store = next(slim.glob("merged-*.safetensors")).name
    profile = read_profile(slim, store)
    assert list(profile.tasks) == TASKS and profile.device == "cpu"
    for task in profile.tasks.values():
        assert list(task.run_ms) == [1, 2] and all(ms > 0 for ms in task.run_ms.values())
        assert task.activation_bytes[2] == 2 * task.activation_bytes[1] > 0
        assert 0 < task.shared_bytes[next(iter(task.shared_bytes))] < task.bytes and task.load_ms > 0
    assert profile.tasks["a_slim"].input == profile.tasks["b_slim"].input
    one, two = (profile.tasks["a_slim"].run_ms[size] for size in (1, 2))
    assert profile.tasks["a_slim"].run_seconds(2) == pytest.approx(two / 1e3)
    assert profile.tasks["a_slim"].run_seconds(6) == pytest.approx(3 * two / 1e3)
    assert profile.tasks["a_slim"].run_seconds(1) == pytest.approx(one / 1e3)


def test_a_profile_of_other_results_is_refused(slim, tmp_path):
    with pytest.raises(ResultsError, match="measure it again"):
        read_profile(slim, "merged-0000000000000000.safetensors")
    with pytest.raises(ResultsError, match="`python -m gemel edge profile` measures it"):
        read_profile(tmp_path, "x")
    for content in ("[]", "{}", '{"format": 1, "tasks": {"a": {}}}', "no JSON"):
        (tmp_path / PROFILE).write_text(content)
        with pytest.raises(ResultsError, match="is no profile"):
            read_profile(tmp_path, "x")


def test_activations_are_what_is_alive_at_once():
    inputs = torch.zeros(1000)

    def run():
        first = inputs + 1
        second = first + 1
        del first
        return (second + 1).relu_().view(10, 100)

    assert peak_bytes(run) == 8000


def test_run_writes_a_summary_and_an_answer_a_line(slim, folder, tmp_path, capsys):
    summary, lines = tmp_path / "summary.json", tmp_path / "lines.jsonl"
    command = ["edge", "run", str(slim), "--frames", str(folder), "--fps", "500", "--memory", "1MiB"]
    assert main([*command, "--json", str(summary), "--outputs", str(lines)]) == 0
    printed = capsys.readouterr().out
    assert "a_slim" in printed and "merged:" in printed
    found = json.loads(summary.read_text())
    assert list(found["tasks"]) == TASKS and found["budget_bytes"] == 1 << 20
    for task in found["tasks"].values():
        assert (task["processed"], task["dropped"], task["late"]) == (4, 0, 0)
        assert set(task["latency_ms"]) == {"p50", "p95", "p99"}
    assert {"bytes_moved", "peak_resident_bytes", "seconds"} <= set(found)
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(answers) == 8 and {a["task"] for a in answers} == set(TASKS)
    assert all(a["in_time"] and 0 <= a["class"] < 5 and 0 < a["score"] <= 1 for a in answers)


def test_unmerged_moves_more(slim, tmp_path, capsys):
    moved = {}
    for flag in ("--unmerged", "--eager"):
        command = ["edge", "run", str(slim), "--fps", "500", "--seconds", "0.1s", "--size", "16"]
        assert main([*command, flag, "--cold", "--json", str(tmp_path / "summary.json")]) == 0
        moved[flag] = json.loads((tmp_path / "summary.json").read_text())["bytes_moved"]
    assert moved["--unmerged"] > moved["--eager"]
    assert "unmerged:" in capsys.readouterr().out


def test_a_plan_is_chosen_and_run(slim, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    assert main(["edge", "schedule", str(slim), "--memory", "1MiB", "--fps", "20", "--json", str(plan)]) == 0
    found = json.loads(plan.read_text())
    assert found["order"] == TASKS and set(found["batches"]) == set(TASKS) and found["eager"] is False
    command = ["edge", "run", str(slim), "--plan", str(plan), "--fps", "500", "--seconds", "0.1s"]
    assert main([*command, "--json", str(tmp_path / "summary.json")]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["batches"] == found["batches"]
    assert "of frames in time" in capsys.readouterr().out
    for content in (
        "[]",
        '{"order": 1, "batches": {}, "eager": false}',
        '{"order": [], "batches": {"a": 0}, "eager": 1}',
    ):
        plan.write_text(content)
        assert main(["edge", "run", str(slim), "--plan", str(plan)]) == 2
        assert "is no plan" in capsys.readouterr().err


def test_simulate_prints_a_row_per_way_and_budget(slim, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    command = ["edge", "simulate", str(slim), "--budgets", "2", "--fps", "100", "--sla", "50ms", "--seconds", "5s"]
    assert main([*command, "--json", str(rows), "--plot", str(tmp_path / "plot.svg")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("merged, given order") == 2 and printed.count("everything in memory") == 1
    assert len(json.loads(rows.read_text())) == 9 and (tmp_path / "plot.svg").is_file()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["run", "{slim}", "--memory", "10B"], "memory: got 10 bytes; allowed: at least"),
        (["run", "{slim}", "--frames", "{empty}"], "allowed: one with images"),
        (["run", "{slim}", "--tasks", "c_slim"], "allowed: a_slim, b_slim"),
        (["run", "{empty}"], "holds no result"),
        (["run", "{slim}", "--plan", "{empty}/none.json"], "cannot be read"),
        (["simulate", "{slim}", "--memory", "10B"], "allowed: at least"),
        (["profile", "{empty}"], "holds no result"),
        (["run", "{slim}", "--json", "{empty}/none/summary.json"], "allowed: a file in a folder that exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(slim, tmp_path, arguments, said, capsys):
    given = [word.format(slim=slim, empty=tmp_path) for word in arguments]
    assert main(["edge", *given]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--fps=0", "--sla=0ms", "--sla=soon", "--memory=lots", "--serve=web", "--seconds=0"])
def test_a_wrong_flag_is_refused(slim, flag):
    with pytest.raises(SystemExit) as ended:
        main(["edge", "run", str(slim), flag])
    assert ended.value.code == 2


def test_sigterm_ends_a_run_within_a_second_with_its_summary(slim, tmp_path):
    """Timed by the summary: how long the process then takes to end depends on how busy the machine is."""
    lines, summary = tmp_path / "lines.jsonl", tmp_path / "summary.json"
    command = [sys.executable, "-m", "gemel", "edge", "run", str(slim), "--seconds", "600", "--outputs", str(lines)]
    process = subprocess.Popen([*command, "--json", str(summary)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: lines.exists() and lines.stat().st_size, 150), "the run never began"
        began = time.time()
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=30)
        ended = time.time()
    finally:
        process.kill()
    assert process.returncode == 0 and "a_slim" in printed
    assert summary.stat().st_mtime - began < 1
    assert ended - summary.stat().st_mtime < 2, "the modules of torch are not taken down"
    assert json.loads(summary.read_text())["tasks"]["a_slim"]["processed"] > 0


def wait_until(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(condition())


def test_metrics_are_served(slim):
    pytest.importorskip("prometheus_client")
    from gemel.edge.counts import counts_of
    from gemel.edge.endpoint import serve

    counts = counts_of(TASKS)
    counts.tasks["a_slim"].answered(0.02, 0.1)
    counts.tasks["a_slim"].dropped = 3
    server, thread = serve(("127.0.0.1", 0), counts, {"budget_bytes": 7})
    try:
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        text = urllib.request.urlopen(address).read().decode()
        assert 'gemel_frames_total{state="dropped",task="a_slim"} 3.0' in text
        assert 'gemel_latency_seconds{quantile="0.5",task="a_slim"} 0.02' in text and "gemel_budget_bytes 7.0" in text
        with pytest.raises(ResultsError, match="cannot be used"):
            serve(("127.0.0.1", server.server_port), counts, {"budget_bytes": 7})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_without_the_optional_packages_it_says_what_to_install(slim, tmp_path, monkeypatch, capsys):
    for module in ("av", "prometheus_client", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    for flags in (["--frames", str(tmp_path / "film.mp4")], ["--serve", "0"]):
        assert main(["edge", "run", str(slim), *flags]) == 2
        assert re.search(
            r"needs (PyAV|prometheus_client): pip install 'gemel-merging\[edge\]'", capsys.readouterr().err
        )
    assert main(["edge", "simulate", str(slim), "--budgets", "1", "--plot", str(tmp_path / "x.png")]) == 2
    assert "a plot needs matplotlib" in capsys.readouterr().err


# ---- frames -----------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    frames = FolderFrames(folder)
    assert len(frames) == 4 and frames[2].shape == (3, 12, 20) and int(frames[2][0, 0, 0]) == 100
    (folder / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png: cannot be read"):
        FolderFrames(folder)[4]


def test_a_video_is_decoded(tmp_path):
    av = pytest.importorskip("av")
    file = tmp_path / "film.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(torch.full((16, 32, 3), 200, dtype=torch.uint8).numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = list(frames_from(str(file)))
    assert len(found) == 6 and found[0].shape == (3, 16, 32) and abs(int(found[0].float().mean()) - 200) < 8
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="which PyAV cannot open"):
        list(frames_from(str(tmp_path / "bad.mp4")))


def test_an_input_is_made_once_for_tasks_with_one_transform():
    calls = []

    def transform(image):
        calls.append(1)
        return image.float()

    frames = Frames(RandomFrames(4, 4), {"a": transform, "b": transform, "c": default_transform("object_detection", 2)})
    assert frames.input("a", 3) is frames.input("b", 3) and len(calls) == 1
    assert frames.input("c", 3).shape == (3, 2, 2) and 0 <= float(frames.input("c", 3).min()) <= 1


def test_images_of_an_iterable_are_forgotten():
    frames = Frames((torch.zeros(1) for _ in range(10)), {"a": lambda image: image})
    assert frames.read_until(8) == 8
    frames.forget(6)
    assert sorted(frames._read) == [6, 7] and frames.read_until(20) == 10


def test_transforms_of_a_workload_file_are_used(slim, folder, tmp_path):
    """Its val transform is called with a PIL image; models are loaded into."""
    (tmp_path / "edge_own.py").write_text(OWN.format(path=str(ROOT / "tests")))
    done = tmp_path / "summary.json"
    command = ["edge", "run", str(slim), "--frames", str(folder), "--fps", "500", "--json", str(done)]
    assert main([*command, "--workload", str(tmp_path / "edge_own.py")]) == 0
    assert json.loads(done.read_text())["tasks"]["b_slim"]["processed"] == 4
    assert (tmp_path / "seen").read_text() == "Image" * 4, "once a frame for both tasks"


OWN = """
import sys
sys.path.insert(0, {path!r})
from pathlib import Path
from pico import classification_entry, to_tensor
from model_architectures import build

def val(image):
    with open(Path(__file__).parent / "seen", "a") as file:
        file.write(type(image).__name__)
    return to_tensor(image)

def create_model_dict():
    entries = {{}}
    for name, classes in (("a_slim", 3), ("b_slim", 5)):
        entries[name] = classification_entry(build("slim_resnet", classes, width=4, layers=[1, 1]))
        entries[name]["transforms"] = {{"train": to_tensor, "val": val}}
    return entries
"""
