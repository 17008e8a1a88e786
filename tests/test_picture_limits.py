"""What a picture file may cost: sizes from headers against Pillow's, files that lie, the memory of a real server."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import peak_mb
from make_pictures import awkward_pictures, encode, jpeg, plain_pictures, smooth
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from teacher_server import pictures as pictures_room
from teacher_server.picture_header import HeaderError, claimed_size
from teacher_server.pictures import BadRequestError, Pictures, make_renderers
from views import render as render_room
from views.wire import Question

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("JPEG", "PNG", "WEBP")
SIDE = 30_000  # of the bombs: 2.7 GB as RGB


def some_pictures() -> dict[str, bytes]:
    """Honest files of the three formats, in the variants that encoders make."""
    image = Image.fromarray(smooth(7, 61, 83))
    alpha = image.copy()
    alpha.putalpha(77)
    made = {
        "lossy.webp": encode(image, "WEBP"),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "alpha.webp": encode(alpha, "WEBP"),  # VP8X, ALPH, VP8
        "profile.webp": encode(image, "WEBP", icc_profile=b"x" * 99),
        "interlaced_text.png": encode(image, "PNG", pnginfo=None),
        "restarts.jpg": encode(image, restart_marker_blocks=2),
        "comment.jpg": encode(image, comment=b"\xff\xc0" * 99),
    }
    taken = {name: file for name, file in (plain_pictures() | awkward_pictures()).items()
             if Image.open(io.BytesIO(file)).format in (*FORMATS, "MPO")}  # fmt: skip
    return made | taken


HONEST = some_pictures()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *before_pixels: bytes) -> bytes:
    """A PNG of black and white pixels, all black: a million of them in 150 bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    squeeze = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    pixels = b"".join(squeeze.compress(line) for _ in range(height)) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before_pixels) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def ihdr(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))


def frame_of(file: bytes) -> int:
    """Where the frame header of one of our JPEGs begins."""
    return file.index(b"\xff\xc2" if b"\xff\xc2" in file else b"\xff\xc0")


def with_size(file: bytes, height: int, width: int) -> bytes:
    """A JPEG that says another size than it has."""
    place = frame_of(file) + 5
    return file[:place] + struct.pack(">HH", height, width) + file[place + 4 :]


def with_frame_twice(file: bytes) -> bytes:
    place = frame_of(file)
    end = place + 2 + struct.unpack_from(">H", file, place + 2)[0]
    return file[:end] + file[place:]


def with_scans(file: bytes, num: int) -> bytes:
    """A progressive JPEG with more scans, each of which costs a pass over its pixels and no bytes to speak of."""
    second = file.index(b"\xff\xda", file.index(b"\xff\xda") + 2)
    length = 2 + struct.unpack_from(">H", file, second + 2)[0]
    return file[:second] + file[second : second + length] * num + file[second:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"VP8X", bytes([flags, 0, 0, 0]) + sides


def bitstream(width: int, height: int) -> tuple[bytes, bytes]:
    """The head of a lossless bitstream; what follows is not there."""
    return b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(99)


# --- headers


@pytest.mark.parametrize("name", HONEST)
def test_the_size_is_that_of_pillow(name):
    file = HONEST[name]
    with Image.open(io.BytesIO(file)) as opened:
        assert claimed_size(file) == (opened.height, opened.width)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (encode(Image.fromarray(smooth(1)), "BMP"), "no JPEG, PNG or WebP"),
        (encode(Image.fromarray(smooth(1)), "TIFF"), "no JPEG, PNG or WebP"),
        (encode(Image.fromarray(smooth(1)), "GIF"), "no JPEG, PNG or WebP"),
        (encode(Image.fromarray(smooth(1)), "PPM"), "no JPEG, PNG or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no JPEG, PNG or WebP"),
        (jpeg(1)[:40], "ends inside its header"),
        (with_frame_twice(jpeg(1)), "says its size twice"),
        (with_size(jpeg(1), 0, 80), "does not say its size"),  # the height would follow in a DNL segment
        (jpeg(1)[:2] + b"\xff\xd0" + jpeg(1)[2:], "do not follow each other"),
        (jpeg(1)[:2] + b"\xff" * 20_000 + jpeg(1)[2:], "more than 10000 segments"),
        (with_scans(jpeg(1, progressive=True), 101), "scans"),
        (png(20, 20, ihdr(SIDE, SIDE)), "says its size twice"),
        (png(20, 20, chunk(b"acTL", bytes(8))), "animation"),
        (png(20, 20, *[chunk(b"tEXt", b"x\0")] * 10_000), "more than 10000 chunks"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"gAMA", bytes(4)), "does not begin with its size"),
        (webp(canvas(20, 20, flags=2), bitstream(20, 20)), "animation"),
        (webp(canvas(20, 20), (b"ANMF", bytes(40))), "animation"),
        (webp(canvas(20, 20), (b"ICCP", b"x")), "ends inside its header"),
        (webp(*[(b"JUNK", b"")] * 10_001), "more than 10000 chunks"),
    ],
)
def test_an_odd_header_is_refused_with_what_is_odd(file, sentence):
    with pytest.raises(HeaderError, match=sentence):
        claimed_size(file)


def test_of_two_sizes_the_larger_one_counts():
    assert claimed_size(webp(canvas(20, 20), bitstream(9000, 8000))) == (8000, 9000)
    assert claimed_size(webp(canvas(9000, 8000), bitstream(20, 20))) == (8000, 9000)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_damage_makes_the_reader_fail_or_pillow_see_a_larger_picture(data):
    file = bytearray(data.draw(st.sampled_from(list(HONEST.values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(file), 700) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "repeat"])):
            case "set":
                file[place] = data.draw(st.integers(0, 255))
            case "cut":
                del file[place : place + data.draw(st.integers(1, 30))]
            case "insert":
                file[place:place] = data.draw(st.binary(min_size=1, max_size=30))
            case "repeat":
                file[place:place] = file[place : place + data.draw(st.integers(1, 60))]
        assume(len(file) > 12)
    try:
        height, width = claimed_size(bytes(file))
    except HeaderError:
        return
    with warnings.catch_warnings(), contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        warnings.simplefilter("ignore")  # of EXIF that it has to guess
        with Image.open(io.BytesIO(bytes(file)), formats=FORMATS) as opened:
            assert opened.width * opened.height <= height * width


def test_reading_the_header_costs_less_than_a_fiftieth_of_decoding():
    image = Image.fromarray(smooth(3, 375, 500))
    for file in (encode(image), encode(image, progressive=True), encode(image, "PNG"), encode(image, "WEBP")):
        header_s = least_seconds(lambda file=file: claimed_size(file), 300)
        decode_s = least_seconds(lambda file=file: Image.open(io.BytesIO(file)).load(), 5)
        assert header_s < decode_s / 50


def least_seconds(call: Callable[[], object], times: int) -> float:
    tries = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        tries.append(time.perf_counter() - began)
    return min(tries)


# --- limits and portions


def question(files: list[bytes], image: list[int], box: list[list[int]]) -> Question:
    num_views = len(image)
    return Question(
        transport="encoded", partner=np.arange(num_views, dtype=np.int32), lam=np.ones(num_views, np.float32),
        mean_of=1, average="logits", audit=np.zeros(0, np.int32), sample=100 + np.arange(len(files)), encoded=files,
        image=np.array(image, np.int32), box=np.array(box, np.int32), flip=np.zeros(num_views, np.bool_), pixels=None,
    )  # fmt: skip


def at_once(num_pixels: int) -> contextlib.AbstractContextManager[None]:
    """A turn that nobody waits for."""
    return contextlib.nullcontext()


@pytest.fixture(scope="module")
def shop() -> Pictures:
    import torch

    renderers, _ = make_renderers(16, "linear", False, device=torch.device("cpu"), num_threads=2, num=1)
    return Pictures([], renderers, max_pixels=60 * 80, max_bytes=20_000)


def test_a_picture_beyond_the_limits_is_named_before_anything_is_decoded(shop):
    good = jpeg(1)
    whole = [0, 0, 8, 8]
    with pytest.raises(BadRequestError, match=r"row 1, sample 101: .* 61 x 80 pixels .* 4800 .*--max-picture-pixels"):
        shop.views(question([good, jpeg(1, 61, 80)], [0, 1], [whole, whole]), "", at_once)
    with pytest.raises(BadRequestError, match=r"row 0, sample 101: .* bytes, .* 20000 \(--max-picture-bytes\)"):
        shop.views(question([good, good + bytes(20_000)], [1, 0], [whole, whole]), "", at_once)
    with pytest.raises(BadRequestError, match=r"picture 1 \(no view shows it\), sample 101: the picture is empty"):
        shop.views(question([good, b""], [0, 0], [whole, whole]), "", at_once)


def test_portions_hold_no_more_pixels_than_allowed_and_give_the_same_views(shop, monkeypatch):
    rng = np.random.default_rng(4)
    files = [jpeg(seed) for seed in range(6)]
    image = rng.integers(0, 6, 40).tolist()
    box = [[int(rng.integers(0, 30)), int(rng.integers(0, 40)), int(rng.integers(1, 30)), int(rng.integers(1, 40))]
           for _ in image]  # fmt: skip
    asked = question(files, image, box)
    in_one_go = shop.views(asked, "", at_once)
    for limit in (1, 12_000, 20_000, 10**9):
        monkeypatch.setattr(pictures_room, "_PIXELS_AT_ONCE", limit)
        parts = list(pictures_room._portions(asked, np.full(6, 4800)))
        assert [view for part, _ in parts for view in range(part.start, part.stop)] == list(range(40))
        for part, num_pixels in parts:
            shown, num_views = set(image[part]), part.stop - part.start
            decoded = 4800 * (len(shown) if num_views >= 2 * len(shown) else num_views)
            assert num_pixels == decoded + sum(h * w for _, _, h, w in box[part])
            assert num_pixels <= limit or num_views == 1
        assert shop.views(asked, "", at_once).equal(in_one_go)


def test_a_request_that_nobody_wants_any_more_ends_at_the_next_portion(shop, monkeypatch):
    monkeypatch.setattr(pictures_room, "_PIXELS_AT_ONCE", 2 * 4800 + 200)
    begun: list[int] = []

    @contextlib.contextmanager
    def turn(num_pixels: int) -> Iterator[None]:
        if len(begun) == 2:
            raise TimeoutError
        begun.append(num_pixels)
        yield

    with pytest.raises(TimeoutError):
        shop.views(question([jpeg(seed) for seed in range(7)], [*range(7)], [[0, 0, 8, 8]] * 7), "", turn)
    assert begun == [2 * (4800 + 64)] * 2


def test_a_picture_that_only_the_renderer_refuses_is_named_and_no_other_is_blamed(shop, monkeypatch):
    file = encode(Image.fromarray(smooth(1)), "PNG")
    end_of_pixels = file.index(b"IEND") - 4
    wrong_checksum = file[: end_of_pixels - 1] + bytes([file[end_of_pixels - 1] ^ 1]) + file[end_of_pixels:]
    Image.open(io.BytesIO(wrong_checksum)).load()
    whole = [0, 0, 8, 8]
    asked = question([jpeg(1), wrong_checksum], [0, 1], [whole, whole])
    with pytest.raises(BadRequestError, match=r"row 1, sample 101: the picture .* does not decode: DALI"):
        shop.views(asked, "", at_once)
    good = shop.views(question([jpeg(1)], [0], [whole]), "", at_once)
    assert good.shape == (1, 16, 16, 3)
    monkeypatch.setattr(render_room, "_sound_picture", lambda: np.zeros(9, np.uint8))
    with pytest.raises(RuntimeError, match="though every picture decodes"):  # not even a sound one: a broken device
        shop.views(asked, "", at_once)


# --- a real server's memory


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pb_grpc.TeacherStub, int]]:
    """A stub of a server process, and the process's number."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "teacher_server.main", f"--model={tiny_model}", "--address=127.0.0.1:0",
               "--device=cpu", "--threads=4", "--batch-rows=4", "--gate-images=4",
               f"--address-file={folder / 'address'}"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (folder / "address").exists():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    with grpc.insecure_channel((folder / "address").read_text().strip()) as channel:
        yield pb_grpc.TeacherStub(channel), process.pid
    process.kill()
    process.wait()


def ask(stub: pb_grpc.TeacherStub, files: list[bytes], box: tuple[int, int, int, int]) -> pb.PredictReply:
    n = len(files)
    return stub.Predict(
        pb.PredictRequest(
            fingerprint=stub.Describe(pb.DescribeRequest(), timeout=60).fingerprint,
            encoded=pb.EncodedImages(image=files, sample=to_message(np.arange(7, 7 + n))),
            views=pb.Views(
                image=to_message(np.arange(n, dtype=np.int32)),
                box=to_message(np.tile(np.array(box, np.int32), (n, 1))),
                flip=to_message(np.zeros(n, np.uint8)),
            ),
            partner=to_message(np.arange(n, dtype=np.int32)),
            lam=to_message(np.ones(n, np.float32)),
        ),
        timeout=120,
    )


def jpeg2000() -> bytes:
    return encode(Image.fromarray(smooth(1)), "JPEG2000")


@pytest.mark.parametrize(
    ("bomb", "sentence"),
    [
        (lambda: png(SIDE, SIDE), "30000 x 30000 pixels"),
        (lambda: with_size(jpeg(1), SIDE, SIDE), "30000 x 30000 pixels"),
        (lambda: with_size(jpeg(1, progressive=True), 65535, 65535), "65535 x 65535 pixels"),
        (lambda: encode(Image.new("L", (16383, 4100)), "WEBP", lossless=True, method=0), "4100 x 16383 pixels"),
        (lambda: webp(canvas(20, 20), bitstream(16384, 16384)), "16384 x 16384 pixels"),
        (lambda: png(20, 20, ihdr(SIDE, SIDE)), "says its size twice"),
        (lambda: with_scans(jpeg(1, 2000, 2000, progressive=True), 5000), "5010 scans"),
        (lambda: encode(Image.new("L", (9000, 9000)), "TIFF", compression="tiff_deflate"), "no JPEG, PNG or WebP"),
        (jpeg2000, "no JPEG, PNG or WebP"),
        (lambda: jpeg(1) + bytes(33 * 2**20), "34[0-9]* bytes"),
    ],
    ids=["png", "jpeg", "progressive", "webp", "lying webp", "lying png", "scans", "tiff", "jpeg2000", "large file"],
)
def test_a_bomb_costs_a_refusal_and_no_memory(server, bomb, sentence):
    stub, pid = server
    ask(stub, [jpeg(1)], (0, 0, 20, 20))
    file = bomb()
    before = reset_peak_mb(pid)
    with pytest.raises(grpc.RpcError, match=rf"row 1, sample 8: .*{sentence}") as error:
        ask(stub, [jpeg(1), file], (0, 0, 20, 20))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert peak_mb(pid) - before < 80 + 3 * len(file) / 2**20, "MB"
    ask(stub, [jpeg(1)], (0, 0, 20, 20))


@pytest.mark.parametrize(
    "file",
    [
        png(20, 20, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**28), 9))),
        png(20, 20, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**28), 9))),
        with_size(jpeg(1, 2000, 2000, progressive=True), 20, 20),
    ],
    ids=["profile", "text", "small header"],
)
def test_what_unfolds_beside_the_pixels_is_not_unfolded(server, file):
    """Answered, or refused as undecodable: that is the decoder's choice. The memory is not."""
    stub, pid = server
    ask(stub, [jpeg(1)], (0, 0, 20, 20))
    before = reset_peak_mb(pid)
    try:
        ask(stub, [file], (0, 0, 20, 20))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert peak_mb(pid) - before < 80, "MB; 256 unfolded"


def test_many_large_pictures_are_decoded_a_few_at_a_time(server):
    """Ten pictures of 62 Mpx would unfold to 1.9 GB."""
    stub, pid = server
    large = encode(Image.new("L", (7900, 7900)))
    before = reset_peak_mb(pid)
    reply = ask(stub, [large] * 10, (0, 0, 7900, 7900))
    assert reply.logits.shape == [10, 6]
    assert peak_mb(pid) - before < 1000, "MB"


def reset_peak_mb(pid: int) -> int:
    """Let the kernel count a process's peak anew; returns where it begins, MB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_mb(pid)
