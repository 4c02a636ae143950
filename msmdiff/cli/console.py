"""What people see: notes, progress, tables, and the one place that turns errors into a sentence."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from msmdiff.core import interrupts
from msmdiff.core.errors import MsmdiffError

PLAIN_LINE_EVERY = 5.0
"""Seconds between progress lines where output is not a terminal."""
ACTIVITY_AFTER = 1.0
"""Seconds that something between steps takes before it is shown."""


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what a user can meet into one line on stderr and an exit code: 2 for usage, 1 for
    failure.
    """
    try:
        yield
    except MsmdiffError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt as asked:
        _fail(str(asked) or "interrupted", 128 + signal.SIGINT)
    except SystemExit as left:
        if (cause := _interruption(left)) is not None:
            _fail(str(cause) or "interrupted", 128 + signal.SIGINT)
        raise
    except BrokenPipeError:
        # The reader left: nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except MemoryError:
        _fail("out of memory: lower train.micro_batch_size or --batch-size", 1)
    except Exception as error:
        if (sentence := _explained(error)) is None:
            raise
        _fail(sentence, 1)


def _interruption(left: SystemExit) -> KeyboardInterrupt | None:
    """The Ctrl-C that typer turned into this, which says nothing."""
    cause = left.__context__.__cause__ if left.__context__ is not None else None
    return cause if isinstance(cause, KeyboardInterrupt) else None


def heed_the_second_interrupt() -> None:
    """The first Ctrl-C lets what is running clean up; a second one meanwhile ends it at once."""
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            # Nothing is unwound: some library may be waiting for its threads or processes.
            os.write(2, f"error: {interrupts.QUIT}\n".encode())
            os._exit(128 + number)
        asked = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, interrupt)
    interrupts.listen()


def _explained(error: Exception) -> str | None:
    """What a library's words mean to the user, or which plugin failed; None: a fault of ours."""
    from msmdiff.core import registry

    words = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in words:
        return (
            "out of memory: lower train.micro_batch_size (or --batch-size), or set "
            "train.gradient_checkpointing=true"
        )
    if words.startswith("DataLoader timed out"):
        return "no image came for ten minutes: does the disk with the data still answer?"
    if words.startswith("DataLoader worker"):
        return (
            "a loader process was ended from outside, most often by the system for want of memory: "
            "use fewer (data.workers, --workers) and run the same command again"
        )
    return registry.blame(error)


def _fail(sentence: str, code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


class Console:
    """Notes and progress: a live bar on a terminal, plain lines every few seconds elsewhere.

    Args:
        to_stderr: keep stdout for results, as with `--json`.
        prefix: in front of every line.
        quiet: say results only.
    """

    def __init__(self, to_stderr: bool = False, prefix: str = "", quiet: bool = False) -> None:
        from rich.console import Console as Rich

        self._rich = Rich(stderr=to_stderr, highlight=False, soft_wrap=True)
        self._live = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._quiet = quiet
        self._prefix = prefix
        self._bar: Any = None
        self._task: Any = None
        self.last: dict[str, Any] = {}
        """The last figures of progress, and the last held-out loss."""
        self._last_line = self._activity_since = 0.0
        self._active = False

    def note(self, text: str) -> None:
        """One line, unless nothing but results is wanted."""
        if not self._quiet:
            self.result(text)

    def result(self, text: str) -> None:
        """One line."""
        self._rich.print(f"{self._prefix}{text}", markup=False)

    @property
    def draws(self) -> bool:
        """Whether panels are drawn, as on a terminal."""
        return self._live and not self._quiet

    def panel(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Several things to know at once: in a frame on a terminal, a line each elsewhere."""
        if not self.draws:
            for what, text in rows:
                self.note(f"{what}: {text}")
            return
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        self.finish()
        inside = Table.grid(padding=(0, 2))
        inside.add_column(style="dim", no_wrap=True)
        inside.add_column(overflow="fold")
        for what, text in rows:
            inside.add_row(Text(what), Text(text))
        frame = Panel(inside, title=Text(title), title_align="left", border_style="dim")
        self._rich.print(frame, soft_wrap=False)

    def progress(self, done: int, total: int, metrics: dict[str, Any]) -> None:
        """`done` of `total` images; metrics may hold `loss`, `images_per_s` and others."""
        held_out = {"val_loss": self.last["val_loss"]} if "val_loss" in self.last else {}
        self.last = held_out | metrics
        if self._quiet:
            return
        text = _summary(self.last if self._live else metrics)
        if self._live:
            self._show_bar(done, total, text)
            return
        now = time.monotonic()
        if done >= total or now - self._last_line >= PLAIN_LINE_EVERY:
            self._last_line = now
            self._rich.print(f"{self._prefix}{done:,}/{total:,} images{text}", markup=False)

    def figures(self) -> list[tuple[str, str]]:
        """(what, value) of the last progress."""
        known = {"loss": "loss", "val_loss": "held-out loss"}
        rows = [(name, f"{self.last[key]:.4f}") for key, name in known.items() if key in self.last]
        if peak := self.last.get("peak_memory_bytes"):
            rows.append(("memory", f"{peak / 2**30:.2f} GiB at most"))
        return rows

    def activity(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of something that takes time; said only where it takes long."""
        now = time.monotonic()
        if self._quiet:
            return
        if done <= 1:
            self._activity_since = now
        if now - self._activity_since < ACTIVITY_AFTER and not self._active:
            return
        if self._live:
            self._show_activity(what, done, total)
        elif now - self._last_line >= PLAIN_LINE_EVERY:
            self._last_line = now
            self._rich.print(f"{self._prefix}{what}: {done:,}/{total:,}", markup=False)

    def _show_activity(self, what: str, done: int, total: int) -> None:
        """In the bar's own line, or in one that goes away."""
        self._active = done < total
        if self._bar is not None:
            text = f"{what}: {done:,}/{total:,}" if self._active else ""
            self._bar.update(self._task, description=text)
            return
        end = "" if self._active else "\n"
        print(f"\r{self._prefix}{what}: {done:,}/{total:,}", end=end, file=self._rich.file)
        self._rich.file.flush()

    def _show_bar(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn(self._prefix + "{task.completed:,.0f}/{task.total:,.0f} images"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._rich,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done, total=total, description=text.strip(", "))
        if done >= total:
            self.finish()

    def finish(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Iterable[Sequence[str]],
        figures: bool = True,
    ) -> None:
        """A table: drawn on a terminal, aligned columns elsewhere, never cut.

        Columns behind the first that hold numbers stand to the right where there are `figures`.
        """
        rows = [[str(cell) for cell in row] for row in rows]
        right = [
            bool(i) and figures and all(_is_figure(row[i]) for row in rows)
            for i in range(len(header))
        ]
        if self._live:
            from rich.table import Table

            table = Table(title=title, title_justify="left")
            for i, name in enumerate(header):
                table.add_column(name, justify="right" if right[i] else "left")
            for row in rows:
                table.add_row(*row)
            self._rich.print(table)
            return
        widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]
        self._rich.print(title, markup=False)
        for row in [list(header), *rows]:
            cells = [
                cell.rjust(w) if right[i] else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            self._rich.print("  " + "  ".join(cells).rstrip(), markup=False)


class Notes:
    """What a comparison reports to: its own notes are shown, its trainings' progress is not."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        self._console.note(text)

    def progress(self, images_seen: int, total: int, metrics: dict[str, Any]) -> None:
        pass

    def activity(self, what: str, done: int, total: int) -> None:
        pass


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(content, indent=2))


def _is_figure(cell: str) -> bool:
    """Whether a cell is numbers, with their units, or says that there is none."""
    return cell in ("", "-") or cell[0].isdigit() or cell[0] in "+-.±"


def _summary(metrics: dict[str, Any]) -> str:
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "val_loss" in metrics:
        parts.append(f"held-out loss {metrics['val_loss']:.4f}")
    if "images_per_s" in metrics:
        rate = metrics["images_per_s"]
        parts.append(f"{rate:,.{0 if rate >= 10 else 2}f} images/s")
    if metrics.get("seconds_left", 0) >= 1:
        left = round(metrics["seconds_left"])
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
    if "step" in metrics and "images_per_s" not in metrics:
        parts.append(f"sampler step {metrics['step']}")
    if metrics.get("peak_memory_bytes"):
        parts.append(f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB")
    if "data_wait" in metrics and metrics["data_wait"] > 0.1:
        parts.append(f"{metrics['data_wait']:.0%} waiting for data")
    return "".join(f", {part}" for part in parts)
