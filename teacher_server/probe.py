"""Does a teacher serve? `python -m teacher_server.probe`: an exit code, for health checks of images and orchestrators.

0  it serves; with --alive: it answers, serving or not
1  it answers, but does not serve: it loads, drains, or is broken
2  a flag or a file is wrong
3  it does not answer: nothing listens, a handshake failed, or the time is up

It asks the standard health service, which needs no token, and imports nothing heavy: it runs every few seconds beside
the server. Kubernetes' own gRPC probe and the grpc_health_probe binary are the alternatives: the first speaks no TLS,
the second would be one more thing to download and pin.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVES, SERVES_NOT, WRONG, SILENT = 0, 1, 2, 3


def main(args: list[str] | None = None) -> int:
    """Ask once; prints what was answered."""
    asked = _parser().parse_args(args)
    try:
        channel = _open(asked)
    except (OSError, ValueError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return WRONG
    with channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=asked.service), timeout=asked.timeout_s
            )
        except grpc.RpcError as error:
            print(f"{asked.address}: {error.code().name}: {error.details()}")
            unknown = error.code() is grpc.StatusCode.NOT_FOUND  # it answers, but not to that name
            return SERVES_NOT if unknown else SILENT
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    print(f"{asked.address}: {status}")
    return SERVES if asked.alive or status == "SERVING" else SERVES_NOT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m teacher_server.probe", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--address", default="127.0.0.1:50051", help="HOST:PORT or unix:/PATH; default %(default)s")
    parser.add_argument("--service", default="", help='health name: "" (default) or funmatch.v1.Teacher')
    parser.add_argument("--alive", action="store_true", help="any answer will do: for liveness")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="default %(default)s")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM; the server's CA: ask over TLS")
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM; our certificate, where the server wants one"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM; its key")
    parser.add_argument("--tls-name", metavar="NAME", help="the name in the server's certificate, if not the address's")
    return parser


def _open(asked: argparse.Namespace) -> grpc.Channel:
    if (asked.tls_cert is None) != (asked.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    if asked.tls_ca is None:
        if asked.tls_cert or asked.tls_name:
            raise ValueError("--tls-cert and --tls-name need --tls-ca")
        return grpc.insecure_channel(asked.address)
    credentials = grpc.ssl_channel_credentials(
        asked.tls_ca.read_bytes(),
        asked.tls_key.read_bytes() if asked.tls_key else None,
        asked.tls_cert.read_bytes() if asked.tls_cert else None,
    )
    options = [("grpc.ssl_target_name_override", asked.tls_name)] if asked.tls_name else []
    return grpc.secure_channel(asked.address, credentials, options)


if __name__ == "__main__":
    sys.exit(main())
