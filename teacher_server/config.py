"""Every setting of a teacher server, with its unit and range. The command line is made from this (main.py).

torch's compiler has its own switch: TORCH_COMPILE_DISABLE=1 in the environment serves without it.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve a frozen teacher's logits over gRPC."""

    model: str
    """A .safetensors file, a BiT .npz file, an ONNX one, local-dir:DIR (a folder as `funmatch export` writes it), or by
    name and downloaded: bit:NAME (python -m models.zoo), timm's name of published weights, hf-hub:OWNER/NAME."""
    architecture: str | None = None
    """timm's name of the network, for weight files that do not say which they are."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from RGB on the scale 0..1, for files that do not say it (ONNX) or say it wrongly."""
    std: tuple[float, float, float] | None = None
    """Then divided by this; positive."""
    data: tuple[Path, ...] = ()
    """Prepared data sets (data_prep/prepare.py) that requests may refer to. Without one, pictures must be sent."""
    address: str = "127.0.0.1:50051"
    """HOST:PORT, port 0 for any free one, or unix:/PATH. Off this machine it needs TLS, and a token or mTLS."""
    tls_cert: Path | None = None
    """PEM file with the server's certificate (chain): TLS. Renewed files are taken up while serving."""
    tls_key: Path | None = None
    """PEM file with its key, without a password."""
    tls_client_ca: Path | None = None
    """PEM file with the authority that callers' certificates must be of (mTLS)."""
    token_file: Path | None = None
    """File of accepted tokens, one a line; callers must send one. Read again when it changes."""
    insecure: bool = False
    """Listen off this machine without TLS, or to callers without token and certificate: trust the network."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, or cuda:N."""
    claim_gpu: Path | None = field(default_factory=lambda: _path_or_none(os.environ.get("FUNMATCH_CLAIM_GPU")))
    """Take a free one of the visible GPUs, under a lock in this folder (shared by the replicas of one machine), and
    use no other; exit code 5 if none is free. Default: the environment's FUNMATCH_CLAIM_GPU."""
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the forward pass. auto: float16 on CUDA, float32 on the CPU. Norms' statistics and head stay float32."""
    size: int | None = None
    """Height and width in pixels at which the network looks at a view, 16 to 1024; by default the model's own."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """How a box is resized. The paper's code: linear."""
    antialias: bool = False
    """Low-pass filter before shrinking. The paper's code: no."""
    batch_rows: int | None = None
    """Rows of one forward pass; fewer are padded, so that a row's logits do not depend on its batch-mates.
    Default 32 on the CPU, 128 on CUDA. Part of the fingerprint."""
    max_rows: int = 1024
    """Rows of one request at most."""
    max_pending_rows: int = 4096
    """Rows of all requests in progress at most; beyond, RESOURCE_EXHAUSTED with a time to come back.
    A row costs up to 2 * size * size * 3 bytes while it waits."""
    max_picture_pixels: int = 64_000_000
    """Height times width of one picture that a request carries, at most; refused before it is decoded."""
    max_picture_bytes: int = 32 * 2**20
    """Of one picture file that a request carries, at most."""
    threads: int = 0
    """CPU threads for decoding, and on the CPU for the forward pass; 0: all of this process's cores."""
    gate_images: int = 64
    """Pictures that the start-up gate looks at, 1 to 4096."""
    gate_max_difference: float = 1.0
    """The gate's bound on |logit - its float32 value|, the largest of all."""
    gate_max_kl: float = 0.01
    """The gate's bound on KL(float32 || served) at temperature 1, nats, mean over the pictures."""
    gate_min_agreement: float = 0.75
    """The gate's bound on the share of pictures with the same top-1 class. Loose: where a network is undecided, as on
    synthetic pictures, a rounding decides; a trained EfficientNet-Lite0 in bfloat16 agreed on 80 % of those."""
    drain_s: float = 60.0
    """Seconds that requests in progress get to finish after SIGTERM."""
    stall_s: float = 120.0
    """The teacher ends itself when for so many seconds no batch and no rendering comes to its end, while there is work:
    a device that hangs raises no error. Longer than the slowest batch, and the slowest request's decoding, may take."""
    metrics_address: str = ""
    """HOST:PORT where Prometheus reads the metrics over HTTP, port 0 for any free one; empty: nowhere."""
    log_format: Literal["text", "json"] = "text"
    """json: each line of the log is one JSON object."""
    address_file: Path | None = None
    """Written, in one piece, with the address that is actually bound, once the server serves."""
    exit_when_stdin_closes: bool = False
    """Drain and exit when standard input ends: the server then lives no longer than the process that owns it."""

    def __post_init__(self) -> None:
        if self.claim_gpu is not None and self.device not in ("auto", "cuda"):
            raise ValueError(f"--claim-gpu chooses the device itself; leave out --device {self.device}")
        if self.size is not None and not 16 <= self.size <= 1024:
            raise ValueError(f"--size must lie in 16..1024, got {self.size}")
        if self.batch_rows is not None and not 1 <= self.batch_rows <= 4096:
            raise ValueError(f"--batch-rows must lie in 1..4096, got {self.batch_rows}")
        if not 1 <= self.max_rows <= self.max_pending_rows:
            raise ValueError(
                f"--max-rows must lie in 1..max-pending-rows ({self.max_pending_rows}), got {self.max_rows}"
            )
        if (self.batch_rows or 0) > self.max_pending_rows:
            raise ValueError(f"--max-pending-rows must hold one batch, got {self.max_pending_rows}")
        if not 1 <= self.max_picture_pixels <= 2**30:
            raise ValueError(f"--max-picture-pixels must lie in 1..2**30, got {self.max_picture_pixels}")
        if self.max_picture_bytes < 1:
            raise ValueError(f"--max-picture-bytes must be positive, got {self.max_picture_bytes}")
        if not 0 <= self.threads <= 1024:
            raise ValueError(f"--threads must lie in 0..1024, got {self.threads}")
        if not 1 <= self.gate_images <= 4096:
            raise ValueError(f"--gate-images must lie in 1..4096, got {self.gate_images}")
        if not (self.gate_max_difference > 0 and self.gate_max_kl > 0 and 0 <= self.gate_min_agreement <= 1):
            raise ValueError("--gate-max-difference and --gate-max-kl must be positive, --gate-min-agreement in 0..1")
        if self.drain_s < 0:
            raise ValueError(f"--drain-s must not be negative, got {self.drain_s}")
        if not self.stall_s > 0:
            raise ValueError(f"--stall-s must be positive, got {self.stall_s}")
        self._check_door()

    @property
    def num_threads(self) -> int:
        """The threads to use, a positive number."""
        return self.threads or len(os.sched_getaffinity(0))

    def _check_door(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca checks callers inside TLS: give --tls-cert and --tls-key too")
        if self.insecure or is_private(self.address):
            return
        missing = [] if self.tls_cert is not None else ["--tls-cert FILE --tls-key FILE"]
        if self.token_file is None and self.tls_client_ca is None:
            missing.append("--token-file FILE (or --tls-client-ca FILE)")
        if missing:
            raise ValueError(
                f"--address {self.address} can be reached from other machines: give {' and '.join(missing)}, or say "
                f"--insecure if you trust everyone on that network; 127.0.0.1, localhost and unix:/PATH need neither"
            )


def is_private(address: str) -> bool:
    """Whether an address can be reached from this machine alone; no, where it is not understood."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0]
    if host == "localhost":
        return True
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:  # an IPv6 address without brackets: where its port begins is a guess
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None
