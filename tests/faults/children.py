"""Many short-lived processes from one warm one: it has imported everything, and forks a child for
each job, so that a command line costs no more than its own work and hundreds can be killed.

Run as a program, it is the warm process: each line of its input is a list of jobs that start at
once, each line of its output the list of their ends.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WARM = (
    "msmdiff.cli",
    "msmdiff.core.gallery",
    "msmdiff.core.data.encode",
    "msmdiff.core.metrics.evaluate",
    "msmdiff.core.training.trainer",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.optim.adamw",
    "accelerate",
    "einops._torch_specific",
    "rich.progress",
)


@dataclass
class Job:
    """What a child does, and what happens to it.

    Attributes:
        folder: where it runs, and the only place where it may write.
        argv: a command line, without the program's name; or else
        call: a module beside this file and its function, with `arguments`; what it returns, as
            JSON, is the end's `result`.
        fault, at: what happens to its file operations, see `injection.Operations`.
        kill_after: seconds after which it is killed.
        seconds: after which it counts as hanging, and is killed.
        megabytes: that it may ask for beside what the warm process has.
    """

    folder: str
    argv: list[str] = field(default_factory=list)
    call: tuple[str, str] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    at: int = -1
    kill_after: float | None = None
    seconds: float = 120
    megabytes: int = 2048


@dataclass
class End:
    """How a child ended: its exit code, or minus the signal; what it printed, what it returned,
    what it must not have done, its file operations, and whether it had to be stopped.
    """

    code: int
    out: str
    err: str
    result: Any
    seen: list[str]
    operations: list[str]
    hung: bool
    took: float


class Children:
    """The warm process, from the test's side."""

    def __init__(self, cache: Path) -> None:
        here = Path(__file__).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MSMDIFF_CACHE": str(cache)}
        environment |= {"COLUMNS": "200", "MPLCONFIGDIR": str(cache), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(cache), "TORCH_HOME": str(cache), "no_proxy": "*"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        paths = [str(here), str(here.parents[1]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, *jobs: Job) -> list[End]:
        """The ends of jobs that start at once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
        self._process.stdin.flush()
        return [End(**end) for end in json.loads(self._process.stdout.readline())]

    def command(self, folder: Path, *argv: str, **how: Any) -> End:
        """The end of one command line."""
        return self.run(Job(str(folder), [*argv], **how))[0]

    def call(self, folder: Path, what: tuple[str, str], given: Any = None, **how: Any) -> End:
        """The end of one function's call, with these arguments."""
        return self.run(Job(str(folder), call=what, arguments=given or {}, **how))[0]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def require_calm(end: End, *codes: int) -> None:
    """The invariants of every command: no traceback, no crash, no hang, nothing written elsewhere,
    no program and no connection; and one of these exit codes, with a sentence where it is not 0.
    """
    told = f"{end.code} after {end.took:.1f} s\n{end.out}\n{end.err}"
    assert not end.hung, f"hung: {told}"
    assert "Traceback" not in end.err, told
    assert end.code in codes, told
    assert "Warning" not in end.err, told
    assert end.seen == [], f"{end.seen}\n{told}"
    if end.code == 128 + signal.SIGINT:
        assert "interrupted" in end.out + end.err, told
    elif end.code:
        assert end.err.count("error: ") == 1 or "Usage:" in end.err or "─ Error ─" in end.err, told
        assert "more memory than" not in end.err, told
        assert "out of memory" not in end.err, told


# ------------------------------------------------------------------ the warm process


def _serve() -> None:
    for module in WARM:
        importlib.import_module(module)
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    Image.init()
    load_digits()
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        running = [_Running(Job(**fields)) for fields in json.loads(line)]
        ends = [each.end() for each in running]
        os.write(answers, (json.dumps([asdict(end) for end in ends]) + "\n").encode())


class _Running:
    """A child, from its fork on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.notes = Path(tempfile.mkdtemp(prefix="child-"))
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = _live(job, self.notes)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def end(self) -> End:
        """Wait, kill where that is asked for or time is over, and tell."""
        limit = self.job.kill_after if self.job.kill_after is not None else self.job.seconds
        status = None
        while status is None and time.monotonic() - self.began < limit:
            done, found = os.waitpid(self.pid, os.WNOHANG)
            status = found if done else None
            time.sleep(0.002)
        hung = status is None and self.job.kill_after is None
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            status = os.waitpid(self.pid, 0)[1]
        texts = {}
        for name in ("out", "err", "result", "seen", "operations"):
            path = self.notes / name
            texts[name] = path.read_text(errors="replace") if path.exists() else ""
        for path in self.notes.iterdir():
            path.unlink()
        self.notes.rmdir()
        return End(
            code=os.waitstatus_to_exitcode(status),
            out=texts["out"],
            err=texts["err"],
            result=json.loads(texts["result"] or "null"),
            seen=texts["seen"].splitlines(),
            operations=texts["operations"].splitlines(),
            hung=hung,
            took=time.monotonic() - self.began,
        )


def _live(job: Job, notes: Path) -> int:
    """A child's life. Returns its exit code."""
    from injection import Operations, Watch

    for name, descriptor in (("out", 1), ("err", 2)):
        opened = os.open(notes / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    os.chdir(job.folder)
    _bound_memory(job.megabytes)
    watch = Watch([job.folder, os.environ["MSMDIFF_CACHE"], str(notes)])
    watch.install()
    if job.fault:
        Operations(Path(job.folder), job.fault, job.at, notes / "operations").install()
    code = 0
    try:
        if job.call is None:
            sys.argv = ["msmdiff", *job.argv]
            importlib.import_module("msmdiff.cli").main()
        else:
            function = getattr(importlib.import_module(job.call[0]), job.call[1])
            result = function(**job.arguments)
            (notes / "result").write_text(json.dumps(result))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    (notes / "seen").write_text("\n".join(watch.seen))
    return code


def _bound_memory(megabytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _serve()
