"""The released files by name, from a real HTTP server that says hashes as Google's storage does."""

from __future__ import annotations

import base64
import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import scipy.stats
import torch

import models
from models import zoo
from teacher_server.model import Teacher
from test_weights import bit_forward, images, in_big_transfer_naming, in_big_vision_naming, random_bit

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def storage(files: dict[str, bytes], wrong_md5: bool = False, cut: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Serve files; yields the address and the list of paths that were downloaded."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            asked.append(self.path)
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            body = files.get(self.path.removeprefix("/"))
            if body is None:
                self.send_error(404)
                return
            digest = hashlib.md5(b"another" if wrong_md5 else body).digest()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==, md5={base64.b64encode(digest).decode()}")
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if cut else body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FUNMATCH_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def small_npz(tmp_path: Path, num_classes: int = 1000) -> bytes:
    model = random_bit(num_classes)
    np.savez(tmp_path / "small.npz", **in_big_transfer_naming(model))
    return (tmp_path / "small.npz").read_bytes()


def test_a_file_is_downloaded_once_and_kept(tmp_path, kept):
    body = small_npz(tmp_path)
    with storage({"distill/R50x1_224.npz": body}) as (address, asked):
        path = zoo.fetch("bit:R50x1_224", address)
        assert path == kept / "R50x1_224.npz"
        assert path.read_bytes() == body
        assert zoo.fetch("R50x1_224", address) == path
    assert asked == ["/distill/R50x1_224.npz"]
    assert zoo.fetch("R50x1_224", "http://127.0.0.1:9/") == path, "no network is needed any more"


@pytest.mark.parametrize("fault", [{"wrong_md5": True}, {"cut": True}])
def test_what_does_not_arrive_whole_gets_no_name(tmp_path, kept, fault):
    with storage({"distill/R50x1_224.npz": small_npz(tmp_path)}, **fault) as (address, _):
        with pytest.raises(OSError, match=r"cannot download .*Fetch that file by hand, and put it there"):
            zoo.fetch("bit:R50x1_224", address)
    assert not list(kept.glob("[!.]*")), "nothing half done stays behind"


def test_a_file_that_the_server_does_not_have_is_named(kept):
    with storage({}) as (address, _):
        with pytest.raises(OSError, match=r"404 .*R152x2_T_sun128\.npz.*by hand"):
            zoo.fetch("bit:R152x2_T_sun128", address)


def test_ranks_that_start_at_once_download_once(kept):
    with storage({"distill/R50x1_224.npz": bytes(1_000_000)}) as (address, asked):
        with ThreadPoolExecutor(8) as ranks:
            paths = list(ranks.map(lambda _: zoo.fetch("bit:R50x1_224", address), range(8)))
    assert set(paths) == {kept / "R50x1_224.npz"}
    assert len(asked) == 1


def test_without_network_the_file_its_address_and_its_place_are_named(kept):
    with pytest.raises(OSError, match="by hand") as error:
        zoo.fetch("bit:R152x2_T_384", "http://127.0.0.1:9/models/")
    assert "http://127.0.0.1:9/models/distill/R152x2_T_384.npz" in str(error.value)
    assert str(kept / "R152x2_T_384.npz") in str(error.value)


def test_a_file_that_changed_since_it_came_is_refused(tmp_path, kept):
    with storage({"distill/R50x1_224.npz": small_npz(tmp_path)}) as (address, _):
        path = zoo.fetch("bit:R50x1_224", address)
    rotten = bytearray(path.read_bytes())
    rotten[1000] ^= 1
    path.write_bytes(rotten)
    with pytest.raises(ValueError, match="is not the file it was"):
        zoo.fetch("bit:R50x1_224")


def test_a_file_that_holds_something_else_than_its_name_says_is_refused(tmp_path, kept):
    kept.mkdir()
    (kept / "R50x1_224.npz").write_bytes(small_npz(tmp_path))
    with pytest.raises(ValueError, match=r"holds resnetv2_14x05_bit with 1000 classes; bit:R50x1_224 is resnetv2_50x1"):
        models.load("bit:R50x1_224")


def test_a_file_put_there_by_hand_is_loaded_by_name(tmp_path, kept, monkeypatch):
    small = zoo.Released("distill/R50x1_160.npz", "resnetv2_14x05_bit", 1000, 160, "a small stand-in")
    monkeypatch.setitem(zoo.RELEASED, "R50x1_160", small)
    kept.mkdir()
    (kept / "R50x1_160.npz").write_bytes(small_npz(tmp_path))
    model, card = models.load("bit:R50x1_160")
    assert (card.num_classes, card.size) == (1000, 160)
    original = random_bit(1000)
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), original(images()))


def test_a_student_that_starts_from_a_bit_file_has_its_body_and_a_zero_head(tmp_path):
    """The features, against the forward pass written out; a head of the identity shows them."""
    original = random_bit(21)
    np.savez(tmp_path / "in21k.npz", **in_big_transfer_naming(original))
    model, card = models.load(tmp_path / "in21k.npz", "resnetv2_14x05_bit", num_classes=6)
    assert card.num_classes == 6
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), torch.zeros(2, 6))
        x = images().double()
        features = model.double().forward_head(model.forward_features(x), pre_logits=True).flatten(1)
    tree = in_big_vision_naming(original)
    width = tree["head/kernel"].shape[0]
    tree["head/kernel"], tree["head/bias"] = np.eye(width, dtype=np.float32), np.zeros(width, np.float32)
    torch.testing.assert_close(features, bit_forward(tree, images()), rtol=1e-8, atol=1e-8)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no released BiT file is called 'R51'; there are R152x2_T_224"):
        models.load("bit:R51")


def test_the_list_names_every_file_and_says_what_is_here(tmp_path):
    run = subprocess.run([sys.executable, "-W", "error", "-m", "models.zoo"], cwd=ROOT, capture_output=True, text=True,
                         check=True)  # fmt: skip
    for name in zoo.RELEASED:
        assert f"bit:{name}" in run.stdout


def test_a_tag_of_timms_belongs_to_its_architecture(monkeypatch):
    with pytest.raises(ValueError, match=r"holds architecture 'resnetv2_101x1_bit.goog_in21k'"):
        models.load("resnetv2_101x1_bit.goog_in21k", "resnetv2_50x1_bit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"cannot download the weights of resnetv2_50x1_bit.goog_in21k.*safetensors"):
        models.load("resnetv2_50x1_bit.goog_in21k", "resnetv2_50x1_bit")


@pytest.mark.parametrize(
    ("name", "plain"),
    [("mobilenetv3_large_100_gn8", "mobilenetv3_large_100"), ("mobilenetv3_small_100_gn8", "mobilenetv3_small_100"),
     ("mobilenetv3_small_050_gn8", "mobilenetv3_small_050")],
)  # fmt: skip
def test_a_mobilenet_with_group_norm_differs_in_its_norms_alone(name, plain):
    ours, theirs = models.create(name, 10), models.create(plain, 10)
    norms = [m for m in ours.modules() if isinstance(m, torch.nn.GroupNorm)]
    batch_norms = [m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == len(batch_norms) > 30
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in ours.modules())
    for norm, batch_norm in zip(norms, batch_norms, strict=True):
        assert (norm.num_groups, norm.num_channels) == (8, batch_norm.num_features)
        assert type(norm.act) is type(batch_norm.act)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    one, two = images(1), images(2)
    two[0] = one[0]
    torch.testing.assert_close(ours.train()(two)[:1], ours.eval()(one), rtol=1e-4, atol=1e-5)


def test_a_mobilenet_with_group_norm_is_saved_and_loaded(tmp_path):
    model = models.create("mobilenetv3_small_050_gn8", 5)
    half = (0.5, 0.5, 0.5)
    card = models.ModelCard(architecture="mobilenetv3_small_050_gn8", num_classes=5, size=64, mean=half, std=half)
    models.save(tmp_path / "m.safetensors", model, card)
    loaded, again = models.load(tmp_path / "m.safetensors")
    assert again == card
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()), model.eval()(images()))


def test_a_teacher_in_half_precision_runs_such_a_mobilenets_norms_in_float32():
    """And errs by rounding alone: about eight times less with float16's three more bits.

    The logits alone would not show the norms: with all of it in bfloat16 they err as much.
    """
    half = (0.5, 0.5, 0.5)
    card = models.ModelCard(architecture="mobilenetv3_small_050_gn8", num_classes=10, size=64, mean=half, std=half)
    error = {}
    for precision in ("float16", "bfloat16"):
        torch.manual_seed(1)
        model = models.create("mobilenetv3_small_050_gn8", 10).eval()
        with torch.no_grad():
            expected = model(images(8))
        teacher = Teacher(model, card, device=torch.device("cpu"), precision=precision, batch_rows=8)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
        seen: list[torch.dtype] = []
        for norm in norms:
            norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].dtype))
        error[precision] = (teacher.logits(images(8)) - expected).abs().max()
        assert len(seen) == len(norms)
        assert {*seen, *(norm.weight.dtype for norm in norms)} == {torch.float32}
        assert model.conv_stem.weight.dtype != torch.float32
    assert 0 < error["float16"] < error["bfloat16"] / 4


def test_a_bit_from_scratch_is_drawn_by_the_law_of_the_papers_code():
    """flax's default, which bit_paper.py leaves as it is; jax holds the same law, for kernels (height, width, in, out).

    timm zeroes the last convolution of each unit (conv3); the paper's code does not.
    """
    torch.manual_seed(2)
    model = models.create("resnetv2_26x05_bit", 10)
    head = model.head.fc.weight.clone()
    models.init_as_bit(model)
    assert torch.equal(model.head.fc.weight, head)
    for conv in (
        model.stages[2].blocks[1].conv2,
        model.stages[3].blocks[0].conv3,
        model.stages[3].blocks[0].downsample.conv,
    ):
        hwio = conv.weight.detach().permute(2, 3, 1, 0)
        theirs = jax.nn.initializers.lecun_normal()(jax.random.key(1), tuple(hwio.shape))
        ours, theirs = hwio.numpy().ravel(), np.asarray(theirs).ravel()
        assert scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-3
        assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=1e-3), "cut at the same place"
