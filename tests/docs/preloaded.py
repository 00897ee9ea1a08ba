"""Commands of ``lorafleet`` and pieces of Python, in processes that have imported everything before they begin.

A page has dozens of commands, and each would import SQLAlchemy, gRPC and torch for seconds. So one process imports them
once, and makes a child for each command, as an interpreter that was started for it would be: its arguments, folder,
environment, standard streams and exit status are its own. ``lorafleet`` and ``python`` on the pages' PATH are small
programs that hand these over, wait, and pass signals on; where they are killed, their commands are.

::

    python -m tests.docs.preloaded SOCKET
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import sys
import traceback
from pathlib import Path

_PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
near = socket.socket(socket.AF_UNIX)
near.connect({address!r})
said = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(near, [len(said).to_bytes(8, "big")], [0, 1, 2])
near.sendall(said)
answers = near.makefile()
child = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _frame: os.kill(child, number))
sys.exit(int(answers.readline()))
"""


def write_programs(folder: Path, address: Path) -> None:
    """``lorafleet`` and ``python`` in a folder, for a process that listens at an address."""
    for name in ("lorafleet", "python"):
        program = folder / name
        program.write_text(_PROGRAM.format(python=sys.executable, address=str(address), name=name))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)


def _run(name: str, arguments: list[str]) -> int:
    try:
        if name == "lorafleet":
            from lorafleet.cli import main

            sys.argv = [name, *arguments]
            main()
        else:
            assert arguments == ["-"], "a piece of Python comes on standard input"
            exec(compile(sys.stdin.read(), "<page>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve_one(connection: socket.socket) -> None:
    """In a child of the process that listens: one more for the command, whose end it tells."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, said = int.from_bytes(length, "big"), b""
    while len(said) < size:
        said += connection.recv(size - len(said))
    name, arguments, folder, environment = json.loads(said)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = _run(name, arguments)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([connection, ended], [], [])[0]:  # nobody waits for it any more
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main(address: str) -> None:
    import openai
    import torch
    import transformers

    import lorafleet.api_client
    import lorafleet.cli
    import lorafleet.engine
    import lorafleet.router_service.server

    assert all((openai, torch, transformers, lorafleet.api_client, lorafleet.engine, lorafleet.router_service.server))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                _serve_one(connection)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
