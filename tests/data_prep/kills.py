"""A process that kills itself at a chosen call into the file system: every state that a crash can leave on disk can be tried."""

import signal
import subprocess
import sys

PROLOGUE = """
import os, signal, sys
left = int(sys.argv[1])
def step():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def killing(name, after):
    call = getattr(os, name)
    def stepped(*arguments, **named):
        step()
        result = call(*arguments, **named)
        if after:
            step()
        return result
    setattr(os, name, stepped)
"""
MANY = 10**6
"""More steps than any of these programs takes."""


def run(program, limit, *arguments, calls=("replace", "fsync"), after=True):
    """Run `program` (its own arguments are sys.argv[2:]) and kill it at the step `limit`.

    A step is before, and if `after` also behind, each of the `calls` of os.
    """
    wrapped = "".join(f"killing({name!r}, {after})\n" for name in calls)
    command = [sys.executable, "-c", PROLOGUE + wrapped + program + "\nprint(left)\n", str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def steps_of(program, *arguments, **options):
    """How many steps the whole program takes; it runs to its end."""
    done = run(program, MANY, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return MANY - int(done.stdout.split()[-1])


def killed(done):
    return done.returncode == -signal.SIGKILL
