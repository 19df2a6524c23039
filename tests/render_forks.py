"""Processes that render chat templates, forked from one that has loaded Jinja.

    render_forks.begin()    # in pytest: start that process, and use it
    render_forks.install()  # in a process that pytest has started: use it

Loading Jinja is most of what such a process takes, and the tests start thousands of them.
tests/text/test_rendering.py tests those of `rendering.start_process`, which users have.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minisft.text import render_process, rendering  # noqa: E402

ADDRESS = "RENDER_FORKS"  # the environment variable with the path of the socket
REAL = rendering.start_process
NUMBER = struct.Struct("i")  # a process id, then its exit status
KILL = b"k"


class Forked:
    """A forked render_process.py, with what rendering.py uses of subprocess.Popen."""

    def __init__(self, max_seconds):
        (given, stdin), (stdout, answers) = os.pipe(), os.pipe()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(os.environ[ADDRESS])
        socket.send_fds(self._connection, [str(max_seconds).encode()], [given, answers])
        os.close(given), os.close(answers)
        self.stdin, self.stdout = open(stdin, "wb"), open(stdout, "rb")
        self.pid, self.returncode = self._receive(), None

    def _receive(self):
        return NUMBER.unpack(self._connection.recv(NUMBER.size, socket.MSG_WAITALL))[0]

    def kill(self):
        if self.returncode is None:
            self._connection.send(KILL)

    def wait(self):
        if self.returncode is None:
            self.returncode = self._receive()
            self._connection.close()
        return self.returncode


def install():
    """Let this process fork them, if pytest has begun to."""
    if ADDRESS in os.environ:
        rendering.start_process = Forked


def begin():
    """Start the process that forks, once. It ends when this one and its children have ended."""
    if ADDRESS in os.environ:  # the workers of pytest-xdist use that of their parent
        install()
        return None
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)  # connections wait until the process is ready
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    os.environ[ADDRESS] = path
    install()
    return folder, server


def serve(descriptor):
    """Fork a process for each connection, kill it on request, report its status.

    descriptor: of a socket that listens.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    # Jinja's lexer is made once.
    render_process.environment(render_process.Clock()).from_string("{{ 1 }}")
    new, running = set(), {}  # connections; of those that run, the process id, None after its end
    with socket.socket(fileno=descriptor) as listener:
        while True:
            ready, _, _ = select.select([0, ended, listener, *new, *running], [], [])
            if 0 in ready:  # nobody can ask any more
                return
            if listener in ready:
                # The other side may collect garbage now, and so wait for the end of another
                # process, before it says what it wants.
                new.add(listener.accept()[0])
            for connection in running.keys() & set(ready):
                if connection.recv(1) != KILL:  # the other side is gone, and with it their stdin
                    connection.close()
                    del running[connection]
                elif running[connection]:
                    os.kill(running[connection], signal.SIGKILL)
            for connection in new & set(ready):
                new.remove(connection)
                if (process := fork(connection)) is None:
                    connection.close()
                    continue
                running[connection] = process
                with contextlib.suppress(BrokenPipeError):
                    connection.send(NUMBER.pack(process))
            if ended in ready:
                os.read(ended, 1000)
                report(running)


def fork(connection):
    """Fork a process that renders; returns its id, or None if the other side is gone."""
    words, descriptors, _, _ = socket.recv_fds(connection, 100, 2)
    if not words:
        return None
    child = os.fork()
    if child:
        for descriptor in descriptors:
            os.close(descriptor)
        return child
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.argv = ["render_process.py", words.decode()]
    status = 1
    try:
        render_process.main()
        status = 0
    finally:
        os._exit(status)


def report(running):
    """Send the status of each process that has ended."""
    connections = {process: connection for connection, process in running.items()}
    with contextlib.suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if connection := connections.get(ended[0]):
                running[connection] = None
                with contextlib.suppress(BrokenPipeError):
                    connection.send(NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
