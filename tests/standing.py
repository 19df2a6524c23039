"""Wait for events, and make a script pause at a point, so that a test can act there.

    words = [sys.executable, *standing_still("minisft.chat.prompts:Answers.add", [4], told),
             ROOT / "chat.py", *flags]
    with subprocess.Popen(words) as process:
        wait_until(lambda: lines_in(told), process)
        process.kill()                      # in the fourth call, on slow and fast machines

`python tests/standing.py JSON SCRIPT FLAGS` runs the script. It pauses before the calls of the
function with these numbers: it adds a line to a file and waits for a signal.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Ends the test of a program that hangs. No outcome may depend on it: it is far longer than any
# wait on a slow machine.
HANG_SECONDS = 600


def wait_until(reached, process=None):
    """Return when `reached()` is true; fail if the process ends first, or if nothing happens."""
    began = time.monotonic()
    while not reached():
        assert process is None or process.poll() is None or reached(), "has ended by itself"
        assert time.monotonic() - began < HANG_SECONDS, "hangs"
        time.sleep(0.01)


def lines_in(path):
    """How many whole lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def state_of(process_id):
    """The letter of a process's state: R runs, S sleeps, Z has ended; "" where there is none."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True
    )
    return done.stdout.strip()[:1]


def standing_still(function, calls, told, **values):
    """The words between the interpreter and the path of a script that should pause.

    function: "module:name", also of a method. calls: numbers of calls, from 1. told: the file for
    a line at each of them. values: of other names, {"module:name": value}.
    """
    return [
        __file__,
        json.dumps({"function": function, "calls": calls, "told": str(told), "values": values}),
    ]


def stand_still(told):
    """Add a line to a file, then wait for a signal. An exception of its handler is raised here."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    # A signal that comes before the wait is in the pipe too, so that it is never missed.
    before = signal.set_wakeup_fd(write)
    try:
        with open(told, "a") as file:
            file.write("here\n")
        os.read(read, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def find(path):
    """The object and the name in it that "module:name" or "module:class.name" means."""
    module, names = path.split(":")
    *classes, name = names.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), name


def stop_at(function, calls, told, values):
    """Replace a function by one that pauses."""
    for path, value in values.items():
        owner, name = find(path)
        assert hasattr(owner, name), path
        setattr(owner, name, value)
    owner, name = find(function)
    original, number = getattr(owner, name), 0

    def standing(*arguments, **more):
        nonlocal number
        number += 1
        if number in calls:
            stand_still(told)
        return original(*arguments, **more)

    setattr(owner, name, standing)


def main():
    settings, script, *flags = sys.argv[1:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *flags]
    from minisft.common.script import run_script as run

    stop_at(**json.loads(settings))
    run(importlib.import_module(Path(script).stem).main)


if __name__ == "__main__":
    main()
