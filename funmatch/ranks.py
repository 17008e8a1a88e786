"""Several processes of one training run: torchrun, and at its end the ranks' own last words and nothing after them.

torchrun ends with a traceback of itself whenever a rank ends with an error or a signal comes, below which the rank's
sentence is lost. This is torchrun with these two caught; its arguments are torchrun's.
"""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Run torchrun on this process's arguments; returns the exit code of the rank that failed first."""
    if not os.environ.get("FUNMATCH_TRACEBACK"):
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        if os.environ.get("FUNMATCH_TRACEBACK"):
            raise
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # killed by a signal: as a shell counts
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
