"""Tables, and what takes time between steps."""

from msmdiff.cli import console
from msmdiff.cli.console import Console


def test_numbers_stand_right_and_words_left(capsys):
    rows = [("network", "tiny (uvit)", "7"), ("sha256", "0a" * 32, "1,024")]
    Console().table("weights", ("what", "value", "count"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights"
    assert lines[2].split("tiny")[0] == "  network  "
    assert lines[2].endswith("       7")
    assert lines[3].endswith("0a" * 32 + "  1,024")


def test_quiet_says_results_only(capsys):
    quiet = Console(quiet=True)
    quiet.note("a note")
    quiet.progress(1, 2, {"loss": 1.0})
    quiet.activity("drawing", 1, 2)
    quiet.result("the end")
    assert capsys.readouterr().out == "the end\n"


def test_what_takes_long_between_steps_is_said(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown = Console()
    for done in range(1, 5):
        shown.activity("drawing a preview", done, 4)
        now[0] += 3
    assert capsys.readouterr().out.splitlines() == [
        "drawing a preview: 2/4",
        "drawing a preview: 4/4",
    ]
    now[0] += 60
    shown.activity("drawing a preview", 1, 2)  # quick: nothing is said
    now[0] += 0.1
    shown.activity("drawing a preview", 2, 2)
    assert capsys.readouterr().out == ""
