import os
import signal
import sys
import time

import pytest
import torch.distributed as dist

from gemel.environment import alive, ranks


def child(number: int, port: int, stuck: int, errors: str) -> None:
    """A rank of two: the one that is stuck does nothing, the other one computes without asking it for anything."""
    alive.BEAT, alive.SILENCE = 0.1, 1.5
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    with alive.watched():
        ranks.wait_for_all()
        if number == stuck:
            os.kill(os.getpid(), signal.SIGSTOP)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if alive_and_talking:
                ranks.wait_for_all()
            time.sleep(0.01)


alive_and_talking = False


def end_of_the_other(tmp_path, stop: signal.Signals | None, talking: bool, monkeypatch) -> tuple[int, str]:
    """Exit code and standard error of a rank whose partner is killed (or, without a signal, stuck)."""
    monkeypatch.setattr(sys.modules[__name__], "alive_and_talking", talking)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pids = []
    for number in range(2):
        if (pid := os.fork()) == 0:
            try:
                child(number, store.port, 1 if stop is None else -1, str(tmp_path / "errors"))
            finally:
                os._exit(3)
        pids.append(pid)
    if stop is not None:
        time.sleep(1.0)
        os.kill(pids[1], stop)
    _, status = os.waitpid(pids[0], 0)
    os.kill(pids[1], signal.SIGKILL)
    os.waitpid(pids[1], 0)
    return os.waitstatus_to_exitcode(status), (tmp_path / "errors").read_text()


@pytest.mark.parametrize(
    ("stop", "talking", "said"),
    [(None, False, "rank 1 of 2 has been silent"), (signal.SIGKILL, True, "rank 0 of 2: another rank is gone")],
    ids=["a rank is stuck", "a rank is killed"],
)
def test_the_loss_of_a_rank_ends_the_others_with_one_line(tmp_path, stop, talking, said, monkeypatch):
    code, errors = end_of_the_other(tmp_path, stop, talking, monkeypatch)
    assert code == 1
    lines = [line for line in errors.splitlines() if "[W" not in line and "[E" not in line]
    assert said in lines[0] and "resumes there" in lines[1] and len(lines) == 2
