"""Rendering on the CPU in overlapping runs, truncated outside of DALI: pixels and errors are those of one run."""

import io

import numpy as np
import nvidia.dali as dali
import pytest
import torch
from nvidia.dali import fn, types
from PIL import Image

from views.render import BadPictureError, Renderer, Rendering

NUM = 75  # more than two runs of one thread
ALONE = np.arange(NUM, dtype=np.int32)


def sharp_picture() -> np.ndarray:
    """Black and white noise: cubic interpolation leaves 0..255 everywhere."""
    file = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 2, (40, 56, 3), dtype=np.uint8) * 255
    Image.fromarray(noise).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


def crops() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    h, w = rng.integers(1, 41, NUM), rng.integers(1, 57, NUM)
    y, x = rng.integers(0, 41 - h), rng.integers(0, 57 - w)
    return np.stack([y, x, h, w], axis=1).astype(np.int32), rng.random(NUM) < 0.5


def in_one_run_by_dali_alone(picture: np.ndarray, rendering: Rendering) -> torch.Tensor:
    """The same law with DALI's floor and its saturating cast."""
    box, flip = crops()
    whole = np.asarray(Image.open(io.BytesIO(picture.tobytes())))
    graph = dali.Pipeline(batch_size=NUM, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with graph:
        crop = fn.external_source(name="crop", dtype=types.UINT8, ndim=3, layout="HWC")
        mirrored = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        filters = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}
        resized = fn.resize(
            crop, size=(rendering.size,) * 2, interp_type=filters[rendering.interpolation],
            antialias=rendering.antialias, dtype=types.FLOAT,
        )  # fmt: skip
        graph.set_outputs(fn.flip(fn.cast(dali.math.floor(resized + 2.0**-10), dtype=types.UINT8), horizontal=mirrored))
    graph.build()
    graph.feed_input("crop", [np.ascontiguousarray(whole[y : y + h, x : x + w]) for y, x, h, w in box])
    graph.feed_input("flip", flip.astype(np.int32))
    return torch.from_numpy(np.array(graph.run()[0].as_tensor()))


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_many_runs_and_numpys_truncation_give_the_bits_of_one_run_of_dali(interpolation, antialias):
    rendering = Rendering(size=29, interpolation=interpolation, antialias=antialias)
    picture, (box, flip) = sharp_picture(), crops()
    renderer = Renderer(rendering, NUM, None, num_threads=1)
    expected = in_one_run_by_dali_alone(picture, rendering)
    assert torch.equal(renderer.render([picture] * NUM, ALONE, box, flip), expected)
    assert torch.equal(renderer.render([picture], np.zeros(NUM, np.int32), box, flip), expected)


def test_views_that_were_given_out_stay_as_they_are():
    renderer = Renderer(Rendering(size=29), NUM, None, num_threads=1)
    box, flip = crops()
    first = renderer.render([sharp_picture()] * NUM, ALONE, box, flip)
    kept = first.clone()
    renderer.render([sharp_picture()] * NUM, ALONE, box[::-1].copy(), ~flip)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("place", [0, 20, 74])
def test_a_file_that_is_no_picture_is_named_wherever_it_stands_and_the_process_lives_on(place):
    renderer = Renderer(Rendering(size=8), NUM, None, num_threads=2)
    box, flip = crops()
    files = [sharp_picture()] * NUM
    files[place] = np.frombuffer(b"this is no picture" * 9, np.uint8)
    with pytest.raises(BadPictureError, match="does not decode") as raised:
        renderer.render(files, ALONE, box, flip)
    assert raised.value.view == place
    assert len(renderer.render([sharp_picture()] * NUM, ALONE, box, flip)) == NUM


def test_a_box_that_leaves_its_picture_in_a_later_run_is_named_by_its_place_in_the_batch():
    renderer = Renderer(Rendering(size=8), NUM, None, num_threads=1)
    box, flip = crops()
    box[40] = 30, 0, 11, 9
    with pytest.raises(BadPictureError, match="40 x 56") as raised:
        renderer.render([sharp_picture()] * NUM, ALONE, box, flip)
    assert raised.value.view == 40


def test_a_render_that_is_interrupted_leaves_nothing_for_the_next_one(monkeypatch):
    renderer = Renderer(Rendering(size=8), NUM, None, num_threads=1)
    box, flip = crops()
    expected = renderer.render([sharp_picture()] * NUM, ALONE, box, flip)
    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "_truncate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            renderer.render([sharp_picture()] * NUM, ALONE, box[::-1].copy(), flip)
    assert torch.equal(renderer.render([sharp_picture()] * NUM, ALONE, box, flip), expected)
