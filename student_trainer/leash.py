"""Start a program that ends with its parent, however that one ends: `python leash.py SIGNAL PARENT COMMAND...`.

Only Linux can promise this (prctl, PR_SET_PDEATHSIG), and only from within the process that shall end; so this sets
it and then becomes the command, under the same process id.

Rejected: subprocess's preexec_fn, which forks a process that has threads. Rejected: a pipe that the child watches, as
the teachers do: torchrun watches none, and hands none on to its ranks.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command."""
    number, parent, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.Signals[number].value) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # it ended before we could ask
        sys.exit("the parent is gone")
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
