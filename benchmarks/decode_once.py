"""1000 crops of one picture (fix/ic_ens): decoded once, or each box by itself. `python -m benchmarks.decode_once`."""

import io
import statistics
import time

import numpy as np
from PIL import Image

from views.draw import ViewLaw
from views.render import Renderer, Rendering
from views.setting import FixedViews

NUM_CROPS = 1000


def a_photograph(height: int, width: int) -> np.ndarray:
    """A JPEG with structure at several scales."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for cells in (3, 8, 20, 60):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray((total / 4).astype(np.uint8)).save(file, "JPEG", quality=90)
    return np.frombuffer(file.getvalue(), np.uint8)


def main() -> None:
    """Time both in turn, five times, and print medians."""
    views = FixedViews(law=ViewLaw(crop="ic", mixup=False), num_views=NUM_CROPS)
    print(f"{NUM_CROPS} inception crops of one JPEG, milliseconds (median of 5), 2 threads")
    print("picture      view   decoded once   each box alone   ratio")
    for height, width, size in ((128, 128, 128), (160, 213, 128), (375, 500, 224)):
        picture = a_photograph(height, width)
        rows = views.rows(np.zeros(1, np.int64), np.array([height], np.int32), np.array([width], np.int32))
        renderer = Renderer(Rendering(size=size), 128, None, num_threads=2)
        once: list[float] = []
        alone: list[float] = []
        for _ in range(5):
            for times, pictures, image in (
                (once, [picture], np.zeros(NUM_CROPS, np.int32)),
                (alone, [picture] * NUM_CROPS, np.arange(NUM_CROPS, dtype=np.int32)),
            ):
                start = time.perf_counter()
                renderer.render(pictures, image, rows.box, rows.flip)
                times.append(1000 * (time.perf_counter() - start))
        a, b = statistics.median(once), statistics.median(alone)
        print(f"{height} x {width:<6}{size:5}{a:15.0f}{b:17.0f}{b / a:8.2f}")


if __name__ == "__main__":
    main()
