"""TLS of the port: certificate, key and the callers' authority from PEM files, taken up anew when they change.

Every new connection looks whether the files have changed; connections that are open keep what they began with. A new
pair that does not fit is not taken: the old one serves on, and the log says why. So certificate and key may be replaced
one after the other, in any order.

Python's ssl module checks the files, because it can say what is wrong with them; gRPC's answer to a key of another
certificate is a handshake that fails without a word.

Not here: when TLS is demanded (config.py), what callers show inside it (tokens.py).

Rejected: a proxy in front that ends TLS. It is one more thing to deploy, and the way from it to the teacher is open.
"""

from __future__ import annotations

import ssl
import threading
from pathlib import Path

import grpc

from teacher_server import events
from teacher_server.config import Config
from teacher_server.watched_file import stamp, warn_if_public


def credentials(config: Config) -> grpc.ServerCredentials | None:
    """What the port is opened with; None: plain text.

    Raises:
        ValueError: a file is missing, no PEM, or not the key of the certificate; says which.
    """
    if config.tls_cert is None:
        return None
    assert config.tls_key is not None  # config.py checks
    keys = _Keys(config.tls_cert, config.tls_key, config.tls_client_ca)
    return grpc.dynamic_ssl_server_credentials(
        keys.read(),
        keys.renewed,  # type: ignore[arg-type]  # None is an answer too: no change
        require_client_authentication=config.tls_client_ca is not None,
    )


class _Keys:
    """The PEM files of one port."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._files = [file for file in (cert, key, client_ca) if file is not None]
        self._lock = threading.Lock()
        self._stamps = [stamp(file) for file in self._files]
        warn_if_public(key)

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What the files hold now; ValueError where they do not belong together."""
        held = [_pem(file) for file in self._files]
        _check_pair(self._cert, self._key)
        if self._client_ca is not None:
            _check_authority(self._client_ca)
        if held != [_pem(file) for file in self._files]:
            raise ValueError("the files of --tls-cert, --tls-key, --tls-client-ca changed while they were read")
        cert, key, *authority = held
        return grpc.ssl_server_certificate_configuration([(key, cert)], authority[0] if authority else None)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """For a new connection: what the files hold, if it is new and fits together; None: go on as before."""
        with self._lock:
            stamps = [stamp(file) for file in self._files]
            if stamps == self._stamps:
                return None
            self._stamps = stamps  # what does not fit is said once, and tried again when a file changes again
            try:
                renewed = self.read()
            except ValueError as error:
                events.event("certificate_not_renewed", reason=str(error))
                return None
            events.event("certificate_renewed", cert=str(self._cert))
            return renewed


def _pem(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def _check_pair(cert: Path, key: Path) -> None:
    for flag, file, label in (("--tls-cert", cert, b"CERTIFICATE"), ("--tls-key", key, b"PRIVATE KEY")):
        if label + b"-----" not in _pem(file):
            raise ValueError(f"{file} ({flag}) holds no PEM block {label.decode()!r}")
    try:
        # Without a password it would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key} (--tls-key) is not the key of {cert} (--tls-cert)") from error
        raise ValueError(
            f"{cert} (--tls-cert) and {key} (--tls-key) cannot be used: {error}; both must be PEM, the key without a "
            f"password"
        ) from error


def _check_authority(file: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(file)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"{file} (--tls-client-ca) holds no PEM certificate: {error}") from error
