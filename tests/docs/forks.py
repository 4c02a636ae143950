"""A process that has imported everything once, and forks for every command that it is asked to run.

The commands of the pages are run by bash, with a `msmdiff` on its path that hands its arguments,
its folder and its outputs over to this process. So a command costs what it does, not an import.
"""

import json
import os
import socket
import sys
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps({{"kind": {kind!r}, "arguments": sys.argv[1:], "folder": os.getcwd()}})
    socket.send_fds(server, [asked.encode()], [0, 1, 2])
    sys.exit(int(server.recv(16)))
"""


def main(address: str) -> None:
    """Serve until the parent closes this process's input."""
    import matplotlib.figure  # noqa: F401
    import timm.layers  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    from msmdiff.core import registry
    from msmdiff.core.data import sources
    from msmdiff.core.training import trainer  # noqa: F401

    torch.set_num_threads(1)
    sources.open_source("digits")  # imports scikit-learn
    for kind in registry.KINDS:
        registry.entries(kind)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while True:
            caller, _ = door.accept()
            with caller:
                content, outputs, _, _ = socket.recv_fds(caller, 1 << 20, 3)
                if not content:
                    return
                caller.send(str(_fork(json.loads(content), outputs)).encode())
            for output in outputs:
                os.close(output)


def _fork(asked: dict, outputs: list[int]) -> int:
    """Run one command in a child; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for number, output in enumerate(outputs):
            os.dup2(output, number)
        os.chdir(asked["folder"])
        code = _run(asked["kind"], asked["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(kind: str, arguments: list[str]) -> int:
    import runpy

    import pages

    import msmdiff.cli

    sys.argv = arguments if kind == "python" else ["msmdiff", *arguments]
    try:
        if kind == "python":
            _train_small()
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            sys.argv[1:] = pages.small(arguments)
            msmdiff.cli.main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def _train_small() -> None:
    """Let `msmdiff.train` take two steps, whatever it is asked for."""
    from msmdiff.core.training import simple

    train = simple.train
    small = {"train.steps": 2, "train.batch_size": 4, "train.threads": 1, "train.preview_every": 0}
    simple.train = lambda settings=None, **more: train({**(settings or {}), **small}, **more)


def client(path: Path, address: str, kind: str) -> None:
    """Write an executable that has this process run its arguments."""
    path.write_text(CLIENT.format(python=sys.executable, address=address, kind=kind))
    path.chmod(0o755)


if __name__ == "__main__":
    main(sys.argv[1])
