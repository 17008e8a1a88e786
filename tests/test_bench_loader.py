"""Rows 6 and 7: the benchmarks run, compare the same views, and would notice if they did not."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch

from benchmarks import draw, loader
from benchmarks.other_loaders import MEAN, STD, Views, webdataset_loader
from data_prep.index import Index
from data_prep.prepare import prepare
from make_pictures import jpeg, write_files
from views.draw import Plan, ViewLaw
from views.view import Rows

pytestmark = pytest.mark.suite  # they set what all of torch shares, as a benchmark may


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("loader")
    write_files(folder / "pictures", {f"flower/{seed:03d}.jpg": jpeg(seed, 40 + seed, 61) for seed in range(8)})
    return prepare("folder", folder / "pictures", folder / "set", workers=1, pictures_per_shard=4, progress=False)


def crops(index: Index) -> Rows:
    law = ViewLaw(mixup=False)
    plan = Plan(seed=1, batch_size=8, law=law, samples=range(8), height=index.height, width=index.width)
    return plan.rows(0)


def in_process(index: Index, rows: Rows, size: int = 24):
    """What torchvision's workers would send, without workers."""
    views = Views(index, rows, size, passes=1)
    yield tuple(
        map(torch.stack, zip(*((torch.tensor(s), v) for s, v in map(views.__getitem__, range(8))), strict=True))
    )


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves the shards to the collector
def test_the_loaders_show_the_same_views_within_a_grey_level(index):
    rows = crops(index)
    ours = loader.ours(index, rows, 24, passes=1, batch_size=4)
    assert 0 < loader.largest_mean_difference(ours, lambda: in_process(index, rows)) < 1
    webdataset = webdataset_loader(index, rows, 24, passes=1, batch_size=4, workers=0)
    assert 0 < loader.largest_mean_difference(ours, webdataset) < 1
    del webdataset
    gc.collect()


def test_another_box_or_a_missing_flip_would_be_noticed(index):
    rows = crops(index)
    ours = loader.ours(index, rows, 24, passes=1, batch_size=4)
    for other in (
        dataclasses.replace(rows, flip=~rows.flip),
        dataclasses.replace(rows, box=np.roll(rows.box, 1, 0) // 2 + 1),
    ):
        assert loader.largest_mean_difference(ours, lambda other=other: in_process(index, other)) > 2


def test_loaders_that_show_other_pictures_are_refused(index):
    rows = crops(index)
    with pytest.raises(RuntimeError, match="other pictures: 8 and 4 of them"):
        loader.largest_mean_difference(
            loader.ours(index, rows.take(0, 4), 24, passes=1, batch_size=4), lambda: in_process(index, rows)
        )


def test_our_loader_gives_each_view_normalised_as_many_times_as_passes(index):
    rows = crops(index)
    samples, images = map(torch.cat, zip(*loader.ours(index, rows, 24, passes=3, batch_size=4)(), strict=True))
    assert samples.tolist() == rows.sample.tolist() * 3
    assert torch.equal(images[:8], images[16:])
    levels = (images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    assert (levels - levels.round()).abs().max() < 1e-3


def test_planning_is_measured_at_each_size_and_for_a_billion_pictures():
    figures = list(draw.measure(quick=True))
    assert [one.name.split(", ")[1].split()[0] for one in figures] == ["64", "512", "4096", "4096"]
    assert "1,000,000,000" in figures[-1].name
    assert all(one.value > 0 and one.alternative > 0 for one in figures)
    assert figures[-1].met is not None


def test_a_plan_of_a_billion_pictures_draws_rows_at_once_and_without_memory_for_them():
    side = np.broadcast_to(np.int32(300), 10**9)
    plan = Plan(seed=0, batch_size=64, law=ViewLaw(), samples=range(10**9), height=side, width=side)
    rows = plan.rows(10**7)
    assert len(np.unique(rows.sample)) == 64
    assert rows.sample.max() > 10**8  # from all of them, not from the first


def test_the_row_6_benchmark_runs():
    figures = list(loader.measure(quick=True))
    assert [one.row for one in figures] == ["6", "6"]
    assert figures[0].goal == (">=", 2.0) and figures[0].floor > figures[0].value > 0
    assert figures[1].value > 0
