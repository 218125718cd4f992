"""The benchmark of one camera, with random weights and few frames."""

from benchmarks import one_camera


def test_a_ratio_and_equal_answers(tmp_path, capsys):
    assert one_camera.main(["--random", "--folder", str(tmp_path), "--seconds", "0.2", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert " x; " in printed and "answers equal in every bit" in printed
    equal, compared = printed.split(" x; ")[1].split(" answers")[0].split(" of ")
    assert int(equal) == int(compared) > 5
