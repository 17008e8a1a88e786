"""One DALI graph, against the slow reference."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from decoded_files import files_decoded
from reference_render import decode
from reference_render import render as slow_render
from views.mix import mix
from views.render import BadPictureError, Renderer, Rendering
from views.view import view_digest


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB", file_format: str = "JPEG", **save) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, file_format, **save)
    return np.frombuffer(file.getvalue(), np.uint8)


def boxes(*rows) -> np.ndarray:
    return np.array(rows, np.int32)


PICTURES = [
    picture(80, 120, 1, quality=92),
    picture(161, 90, 2, quality=75, progressive=True),
    picture(64, 64, 3, mode="L"),
    picture(50, 70, 4, quality=95, subsampling=0),
    picture(60, 40, 5, file_format="PNG"),
]


@pytest.mark.parametrize("size", [32, 96, 128])
def test_views_equal_the_float64_reference_but_for_a_grey_level_at_the_edge_of_truncation(size):
    image = np.array([0, 1, 2, 3, 4, 0, 1], np.int32)
    box = boxes((0, 0, 80, 120), (3, 5, 150, 60), (10, 10, 7, 9), (0, 1, 49, 69), (5, 5, 50, 30), (79, 119, 1, 1),
                (100, 0, 61, 90))  # fmt: skip
    flip = np.array([0, 1, 0, 1, 1, 0, 0], bool)
    views = Renderer(Rendering(size=size), 4, None, num_threads=2).render(PICTURES, image, box, flip).numpy()
    assert views.shape == (7, size, size, 3)
    reference = np.stack([slow_render(PICTURES[image[v]], box[v], size, flip[v]) for v in range(7)])
    difference = np.abs(views.astype(int) - reference)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


def test_decoding_without_resizing_is_exact():
    """A crop of the output's own size passes the resize unchanged."""
    renderer = Renderer(Rendering(size=32), 5, None, 2)
    box = boxes((7, 9, 32, 32), (100, 50, 32, 32), (0, 0, 32, 32), (11, 30, 32, 32), (20, 3, 32, 32))
    views = renderer.render(PICTURES, np.arange(5, dtype=np.int32), box, np.zeros(5, bool)).numpy()
    for v, (y, x, h, w) in enumerate(box):
        assert np.array_equal(views[v], decode(PICTURES[v])[y : y + h, x : x + w])


def test_boxes_are_rows_then_columns():
    """On a square picture, a mix-up of axes would be silent."""
    file = io.BytesIO()
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    Image.fromarray(pixels).save(file, "PNG")
    stored = np.frombuffer(file.getvalue(), np.uint8)
    view = Renderer(Rendering(size=8), 1, None, 1).render(
        [stored], np.zeros(1, np.int32), boxes((0, 0, 32, 64)), np.zeros(1, bool)
    )
    assert (view == 255).all()


def test_exif_rotation_is_undone_before_the_box_is_cut():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    rotated = picture(40, 100, 6, exif=exif, quality=95)
    box = boxes((60, 5, 40, 30))
    view = Renderer(Rendering(size=24), 1, None, 1).render([rotated], np.zeros(1, np.int32), box, np.zeros(1, bool))
    assert np.abs(view[0].numpy().astype(int) - slow_render(rotated, box[0], 24, False)).max() <= 1


def test_a_view_does_not_depend_on_its_batch_mates():
    renderer = Renderer(Rendering(size=48), 8, None, 2)
    box = boxes((0, 0, 80, 120), (3, 5, 150, 60), (10, 10, 40, 44))
    together = renderer.render(PICTURES[:3], np.arange(3, dtype=np.int32), box, np.zeros(3, bool))
    for v in (2, 0, 1):
        alone = renderer.render([PICTURES[v]], np.zeros(1, np.int32), box[v : v + 1], np.zeros(1, bool))
        assert torch.equal(alone[0], together[v])


def test_antialias_and_cubic_are_other_pixels_of_the_same_box():
    args = [PICTURES[1]], np.zeros(1, np.int32), boxes((0, 0, 161, 90)), np.zeros(1, bool)
    plain = Renderer(Rendering(size=24), 1, None, 1).render(*args).int()
    for other in (Rendering(size=24, antialias=True), Rendering(size=24, interpolation="cubic")):
        difference = (Renderer(other, 1, None, 1).render(*args).int() - plain).abs().float()
        assert 0 < difference.mean() < 20


def test_antialiased_linear_stays_near_pillows_bilinear():
    args = [PICTURES[1]], np.zeros(1, np.int32), boxes((0, 0, 161, 90)), np.zeros(1, bool)
    ours = Renderer(Rendering(size=24, antialias=True), 1, None, 1).render(*args)[0].numpy().astype(int)
    with Image.open(io.BytesIO(PICTURES[1].tobytes())) as image:
        theirs = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - theirs).max() <= 16
    assert np.abs(ours - theirs).mean() < 1


def bad_pictures():
    whole = PICTURES[0]
    return {
        "cut in half": whole[: len(whole) // 2],
        "cut at its end": whole[:-2],
        "garbage": np.frombuffer(b"this is not a picture", np.uint8),
        "empty": np.zeros(0, np.uint8),
    }


@pytest.mark.parametrize("name", bad_pictures())
@pytest.mark.filterwarnings("ignore:image file could not be identified:UserWarning")
def test_a_bad_picture_is_named_and_the_renderer_lives_on(name):
    renderer = Renderer(Rendering(size=16), 2, None, 1)
    pictures = [PICTURES[0], PICTURES[3], bad_pictures()[name]]
    box = boxes((0, 0, 80, 120), (0, 0, 50, 70), (0, 0, 10, 10))
    with pytest.raises(BadPictureError, match="does not decode") as raised:
        renderer.render(pictures, np.arange(3, dtype=np.int32), box, np.zeros(3, bool))
    assert raised.value.view == 2
    again = renderer.render(PICTURES[:1], np.zeros(1, np.int32), box[:1], np.zeros(1, bool))
    assert np.array_equal(again[0].numpy(), slow_render(PICTURES[0], box[0], 16, False))


def test_a_box_that_leaves_its_picture_is_refused():
    renderer = Renderer(Rendering(size=16), 2, None, 1)
    with pytest.raises(BadPictureError, match=r"h=60.*80 x 120") as raised:
        renderer.render([PICTURES[0]], np.zeros(2, np.int32), boxes((0, 0, 80, 120), (30, 0, 60, 9)), np.zeros(2, bool))
    assert raised.value.view == 1


def test_digests_tell_views_apart():
    view = np.zeros((4, 4, 3), np.uint8)
    other = view.copy()
    other[3, 3, 2] = 1
    assert len(view_digest(view)) == 16
    assert view_digest(view) == view_digest(np.asfortranarray(view))
    assert view_digest(view) != view_digest(other)


def test_mixing_is_the_weighted_sum_then_normalised():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    partner, lam = np.array([3, 0, 1]), np.array([0.7, 0.7, 1.0], np.float32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
    out = mix(torch.from_numpy(pixels), torch.from_numpy(partner), torch.from_numpy(lam), mean, std)
    slow = pixels.astype(np.float64) / 255
    slow = lam[:, None, None, None] * slow[:3] + (1 - lam[:, None, None, None]) * slow[partner]
    slow = ((slow - mean) / std).transpose(0, 3, 1, 2)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(out.numpy(), slow, atol=2e-6)


def test_a_row_with_lambda_one_is_its_own_view_exactly():
    pixels = torch.arange(2 * 3 * 3 * 3, dtype=torch.uint8).reshape(2, 3, 3, 3)
    out = mix(pixels, torch.tensor([1]), torch.tensor([1.0]), (0, 0, 0), (1, 1, 1))
    assert torch.equal(out[0], (pixels[0] / 255).permute(2, 0, 1))


def test_the_reference_scaling_maps_bytes_to_minus_one_to_one():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 1, 3)
    out = mix(pixels, torch.tensor([0]), torch.tensor([1.0]), (0.5,) * 3, (0.5,) * 3)
    assert out.flatten().tolist() == pytest.approx([-1.0, 1.0, 51 / 255 * 2 - 1])


@pytest.mark.parametrize("settings", [{"size": 0}, {"size": 9999}, {"size": 8, "interpolation": "nearest"}])
def test_an_impossible_rendering_is_refused(settings):
    with pytest.raises(ValueError, match=r"size is|interpolation is"):
        Rendering(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_views_differ_from_cpu_views_within_the_stated_bound():
    from views.render import MAX_PIXEL_DIFFERENCE

    jpegs = PICTURES[:4]
    box = boxes((0, 0, 80, 120), (3, 5, 150, 60), (10, 10, 40, 44), (0, 1, 49, 69))
    args = jpegs, np.arange(4, dtype=np.int32), box, np.array([0, 1, 0, 1], bool)
    cpu = Renderer(Rendering(size=96), 4, None, 2).render(*args).int()
    gpu = Renderer(Rendering(size=96), 4, 0, 2).render(*args).cpu().int()
    assert (cpu - gpu).abs().max() <= MAX_PIXEL_DIFFERENCE["cuda"]


def turned(orientation: int, height: int, width: int) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(height, width, 10 + orientation, exif=exif, quality=90)


MANY_KINDS = [
    *PICTURES,
    picture(61, 87, 6, quality=80, subsampling=1),
    picture(77, 45, 7, mode="L", file_format="PNG"),
    picture(52, 51, 8, file_format="WEBP", lossless=True),
    *(turned(orientation, 41 + orientation, 60) for orientation in range(2, 9)),
]


def many_boxes(num: int, seed: int, pictures: list[np.ndarray] = PICTURES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random boxes of all the pictures, many of each."""
    rng = np.random.default_rng(seed)
    sizes = np.array([decode(one).shape[:2] for one in pictures])
    image = rng.integers(0, len(pictures), num).astype(np.int32)
    h, w = rng.integers(1, sizes[image, 0] + 1), rng.integers(1, sizes[image, 1] + 1)
    y, x = rng.integers(0, sizes[image, 0] - h + 1), rng.integers(0, sizes[image, 1] - w + 1)
    return image, np.stack([y, x, h, w], axis=1).astype(np.int32), rng.random(num) < 0.5


def test_a_picture_decoded_once_for_many_views_gives_the_pixels_of_each_box_decoded_alone():
    image, box, flip = many_boxes(1000, 1, MANY_KINDS)
    renderer = Renderer(Rendering(size=32), 64, None, 2)
    together = renderer.render(MANY_KINDS, image, box, flip)
    files = [MANY_KINDS[i] for i in image]  # one for each view: nothing is shared
    alone = renderer.render(files, np.arange(1000, dtype=np.int32), box, flip)
    for view in range(1000):
        assert torch.equal(together[view], alone[view]), f"box {box[view]} of picture {image[view]}"


def test_many_views_of_one_picture_decode_it_once():
    image, box, flip = many_boxes(1000, 2)
    order = np.argsort(image, kind="stable")
    with files_decoded() as files:
        Renderer(Rendering(size=16), 128, None, 2).render(PICTURES, image[order], box[order], flip[order])
    assert files == [one.tobytes() for one in PICTURES]


def test_the_count_of_decoded_files_counts_each_time_where_nothing_is_shared():
    """As the renderer did for all views before; or the test above would say little."""
    image, box, flip = many_boxes(40, 2)
    with files_decoded() as files:
        Renderer(Rendering(size=16), 16, None, 2).render(
            [PICTURES[i] for i in image], np.arange(40, dtype=np.int32), box, flip
        )
    assert files == [PICTURES[i].tobytes() for i in image]


def test_a_bad_box_or_picture_among_many_views_is_named_and_the_renderer_lives_on():
    image, box, flip = many_boxes(200, 3)
    renderer = Renderer(Rendering(size=16), 64, None, 2)
    good = renderer.render(PICTURES, image, box, flip)
    outside = box.copy()
    for bad in ((0, 0, 500, 500), (2**31 - 1, 0, 2**31 - 1, 1), (-1, 0, 3, 3), (0, 0, 0, 5)):
        outside[77] = bad
        with pytest.raises(BadPictureError, match="leaves the picture") as raised:
            renderer.render(PICTURES, image, outside, flip)
        assert raised.value.view == 77
    noise = [*PICTURES[:4], np.frombuffer(b"no picture at all", np.uint8)]
    with pytest.raises(BadPictureError, match="does not decode") as raised:
        renderer.render(noise, image, box, flip)
    assert raised.value.view == int(np.argmax(image == 4))
    assert torch.equal(renderer.render(PICTURES, image, box, flip), good)
