"""The status line, the log and following it: nothing silent, nothing garbled, at most a line lost."""

import io
import json
import logging

import pytest

from gemel.console import progress as module
from gemel.console.progress import Progress
from gemel.console.run_log import RunLog
from gemel.console.watch import watch
from gemel.environment.clock import Clock
from gemel.environment.events import emit, listening, warnings_as_events
from gemel.results_store.files import ResultsError, append


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_status_knows_the_round_the_rounds_before_and_the_budget():
    shown = Progress(Clock(100.0), stream=io.StringIO())
    shown("round begins", {"round": 3, "what": "2 groups of 4 tasks"})
    shown.seconds_of_rounds += [30.0, 50.0, 40.0]
    shown("step", {"step": 7, "max_steps": 90})
    text = shown.status()
    assert text.startswith("round 3: training, step 7 of at most 90") and "about 0:40 more" in text
    assert text.endswith("budget: 1:40 left")
    shown("doing", {"what": "evaluating " + "a_long_name_" * 9})
    assert len(shown.status()) < module.WIDTH and shown.status().endswith("budget: 1:40 left")
    assert "left" not in Progress(Clock(), stream=io.StringIO()).status()


def test_a_terminal_is_written_to_all_the_time_and_left_clean(monkeypatch):
    monkeypatch.setattr(module, "TERMINAL_INTERVAL", 0.01)
    stream = Terminal()
    with Progress(Clock(), stream=stream) as shown:
        shown._over.wait(0.2)
    written = stream.getvalue()
    assert written.count("starting") > 3 and written.endswith(module.CLEAR)
    assert max(map(len, written.split(module.CLEAR))) < module.WIDTH and "\n" not in written


def test_a_file_gets_lines_without_control_characters(monkeypatch):
    monkeypatch.setattr(module, "FILE_INTERVAL", 0.01)
    stream = io.StringIO()
    with Progress(Clock(), stream=stream) as shown:
        shown._over.wait(0.1)
    lines = stream.getvalue().splitlines()
    assert lines and all(line.startswith("starting") for line in lines) and "\033" not in stream.getvalue()


def test_quiet_says_nothing(capsys):
    stream = Terminal()
    with Progress(Clock(), quiet=True, stream=stream) as shown:
        shown.say("a row")
        shown("search begins", {"about_to_do": "something"})
    assert not stream.getvalue() and not capsys.readouterr().out


def test_a_warning_is_an_event_and_listeners_end_with_their_block():
    found = []
    with listening(lambda kind, fields: found.append((kind, fields))), warnings_as_events():
        logging.getLogger("gemel.somewhere").warning("too %s", "bad")
        logging.getLogger("gemel.somewhere").info("fine")
    emit("step", step=1, max_steps=2)
    assert found == [("warning", {"text": "too bad"})]


def test_events_wait_until_there_is_a_result_and_then_are_appended(tmp_path):
    log = RunLog(tmp_path, Clock())
    log("warning", {"text": "early"})
    assert not list(tmp_path.iterdir()), "a run that ends before it searches leaves no file"
    log("search begins", {"about_to_do": "x"})
    log("step", {"step": 1, "max_steps": 2})
    log("fit", {"round": 1, "attempt": 0, "ratios": {"a": float("nan")}})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["warning", "search begins", "fit"]
    assert lines[2]["ratios"] == {"a": None} and all({"time", "seconds"} <= set(line) for line in lines)


def test_a_line_that_a_kill_cut_costs_no_other(tmp_path):
    file = tmp_path / "log.jsonl"
    append(file, b'{"event": "one"}\n{"event": "cu')
    append(file, b'{"event": "two"}\n')
    assert file.read_bytes().splitlines() == [b'{"event": "one"}', b'{"event": "cu', b'{"event": "two"}']


def test_a_log_is_not_written_through_a_link(tmp_path):
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResultsError, match="log.jsonl: cannot be written"):
        append(tmp_path / "log.jsonl", b"x\n")
    assert not (tmp_path / "elsewhere").exists()


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    log = RunLog(tmp_path / "gone", Clock())
    for _ in range(3):
        log("search begins", {"about_to_do": "x"})
    assert len(caplog.records) == 1 and "goes on without its log" in caplog.text


def test_watching_prints_the_last_run_and_skips_what_is_no_event(tmp_path, capsys):
    log = RunLog(tmp_path, Clock())
    log("search begins", {"about_to_do": "the first run"})
    log("search begins", {"about_to_do": "the second run"})
    log("round begins", {"round": 1, "what": "2 groups of 3 tasks", "tasks": [], "would_save_bytes": 1})
    append(tmp_path / "log.jsonl", b'nothing\n{"event": "kept"}\n[1]\n')
    log("run ends", {"finished": True, "saved_bytes": 3 << 20})
    watch(tmp_path)
    said = capsys.readouterr().out
    assert "the second run" in said and "the first run" not in said and "round 1 tries 2 groups of 3 tasks" in said
    assert said.endswith("everything was tried; saved 3.00 MiB\n")
    with pytest.raises(ResultsError, match="no merge has begun"):
        watch(tmp_path / "elsewhere", follow=False)
