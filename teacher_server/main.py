"""The door: `python -m teacher_server.main --model NAME_OR_FILE [--data DIR ...]`; --help lists every setting.

Exit codes: 0 drained as asked, 2 a setting or file is wrong, 3 the start-up gate refused, 4 model or device broke or
hung, 5 no GPU is free. The first SIGTERM (or SIGINT) drains: NOT_SERVING, requests in progress finish, and the
process ends within --drain-s and 5 seconds. The second ends at once. FUNMATCH_TRACEBACK=1 in the environment logs where
an error came from.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import tyro

from teacher_server import events
from teacher_server.config import Config
from teacher_server.gpu_claim import NoFreeGpuError, claim

if TYPE_CHECKING:
    from teacher_server.server import Server

_WRONG, _REFUSED, _BROKEN, _NO_GPU = 2, 3, 4, 5


def main() -> int:
    """Serve until told to stop; returns the exit code."""
    events.set_up()
    config = tyro.cli(Config, description=__doc__)
    try:
        events.set_up(config.log_format)
        _yield_idle_cores()
        if config.claim_gpu is not None:
            config = _with_gpu_of_its_own(config, config.claim_gpu)
        # torch and DALI take seconds to import: --help and a wrong flag are answered before.
        from teacher_server.server import create_server

        server, address = create_server(config)
    except NoFreeGpuError as error:
        return _give_up(error, _NO_GPU)
    except ValueError as error:
        return _give_up(error, _WRONG, _if_taken(config.address) if "(--address)" in str(error) else "")
    _end_on_signals(server)
    if config.exit_when_stdin_closes:
        threading.Thread(target=_end_with_stdin, args=(server,), name="stdin", daemon=True).start()
    code = _load(server) or _serve(server, config.address_file, address)
    idle = server.drain()
    events.event("stopped", address=address, exit_code=code, left_behind=not idle)
    if not idle or code == _BROKEN:
        # The interpreter's own end waits for threads and frees what is on the device: neither may ever come to its end.
        os._exit(code)
    return code


def _with_gpu_of_its_own(config: Config, folder: Path) -> Config:
    """Claimed for the life of this process; a device that then does not work is an error and no reason for the CPU."""
    events.event("gpu_claimed", gpu=claim(folder).gpu, folder=str(folder))
    return replace(config, device="cuda")


def _yield_idle_cores() -> None:
    """Make OpenMP's threads sleep at a barrier and not spin; effective only before torch is imported.

    A teacher on the CPU often shares its cores with the student. Measured with two threads on two cores, of which
    another process kept one busy, EfficientNet-Lite0 at 128 px, 32 rows: 1.5 to 1.7 s spinning, 0.26 to 0.35 s
    sleeping. With both cores free sleeping costs a fifth (0.19 s, 0.24 s): a machine that serves and does nothing
    else may set OMP_WAIT_POLICY=ACTIVE.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _load(server: Server) -> int:
    """0, or the exit code of what went wrong."""
    from teacher_server.gate import GateError
    from teacher_server.model import broken_device

    try:
        server.load()
    except GateError as error:
        return _give_up(error, _REFUSED)
    except (ValueError, OSError) as error:
        return _give_up(error, _WRONG)
    except RuntimeError as error:
        if broken_device(error) is None:
            raise
        return _give_up(error, _BROKEN)
    return 0


def _serve(server: Server, address_file: Path | None, address: str) -> int:
    if address_file is not None:
        partial = address_file.with_name(f".{address_file.name}.{os.getpid()}")
        partial.write_text(address + "\n")
        partial.replace(address_file)
    server.ended.wait()
    events.event("draining", address=address, broken=server.broken)
    if address_file is not None:
        address_file.unlink(missing_ok=True)
    return _BROKEN if server.broken else 0


def _give_up(error: Exception, code: int, cure: str = "") -> int:
    if os.environ.get("FUNMATCH_TRACEBACK"):
        events.failure("where_it_happened")
    events.event("gave_up", exit_code=code, reason=f"{error}{cure}")
    return code


def _if_taken(address: str) -> str:
    """What to do about an address where somebody listens already; "" where nobody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return ""
    return "; somebody listens there already: end that, or choose another --address (port 0: any free one)"


def _end_on_signals(server: Server) -> None:
    def end(number: int, _frame: FrameType | None) -> None:
        if server.ended.is_set():
            os._exit(128 + number)
        _end(server)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


def _end_with_stdin(server: Server) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _end(server)


def _end(server: Server) -> None:
    """Begin the end. While loading nothing is in progress, and loading cannot be interrupted: leave at once."""
    if not server.serving:
        events.event("stopped", while_="loading")
        os._exit(0)
    server.ended.set()


if __name__ == "__main__":
    sys.exit(main())
