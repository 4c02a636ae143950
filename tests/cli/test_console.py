"""Tables, and what takes time between steps."""

import re

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


ROWS = [("data", "photos/, " + "a long name " * 12), ("results", "runs/a")]


def test_a_panel_is_plain_lines_where_there_is_no_terminal(capsys):
    Console().panel("training runs/a", ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"data: {ROWS[0][1]}", "results: runs/a"]
    Console(quiet=True).panel("training runs/a", ROWS)
    assert capsys.readouterr().out == ""


def test_a_panel_on_a_terminal_is_a_frame_as_wide_as_it(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = Console()
    shown.panel("training runs/a", ROWS)
    shown.progress(2, 2, {"loss": 0.5, "images_per_s": 3.0})
    written = capsys.readouterr().out
    assert not re.search(r"\x1b\[(3|9)\d", written)  # no colour
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written).splitlines()
    assert {len(line) for line in lines[:5]} == {60}
    assert lines[0].startswith("╭─ training runs/a ─")
    assert lines[1].startswith("│ data     photos/, a long name")


def test_the_last_held_out_loss_stays_in_sight(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = Console()
    shown.progress(10, 100, {"loss": 0.5, "val_loss": 0.25})
    shown.progress(20, 100, {"loss": 0.4, "peak_memory_bytes": 3 * 2**29, "seconds_left": 75.0})
    shown.finish()
    assert "loss 0.4000, held-out loss 0.2500, 0:01:15 left, 1.5 GiB" in capsys.readouterr().out
    figures = dict(shown.figures())
    assert figures == {"loss": "0.4000", "held-out loss": "0.2500", "memory": "1.50 GiB at most"}


def test_a_dumb_terminal_gets_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    shown = Console()
    assert not shown.draws
    shown.progress(1, 1, {"loss": 0.5})
    assert "1/1 images, loss 0.5000" in capsys.readouterr().out
