"""Many views of a picture as one row: the average is that of a slow computation, and the picture travels once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from decoded_files import files_decoded
from one_teacher import Client, by_hand, crops, draw, files, serving, small
from protos import teacher_pb2 as pb
from teacher_server import service
from teacher_server.config import Config
from views.wire import ask_by_reference, ask_encoded, ask_for_mean


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: Path) -> Config:
    return small(tiny_model, tiny_data)


@pytest.fixture(scope="module")
def client(config: Config) -> Iterator[Client]:
    with serving(config) as (_, client):
        yield client


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("ask", ["reference", "encoded"])
def test_many_views_of_a_picture_are_averaged_as_a_slow_computation_averages_them(
    client, index, tiny_model, average, ask
):
    rows = crops(20).rows(np.array([3, 11]), index.height, index.width)
    request = ask_by_reference(rows, index.digest) if ask == "reference" else ask_encoded(rows, files(index, rows))
    if ask == "encoded":
        assert len(request.encoded.image) == 2, "each picture travels once"
    ask_for_mean(request, 20, average)
    every = by_hand(index, rows, tiny_model).astype(np.float64).reshape(2, 20, 6)
    p = np.exp(every) / np.exp(every).sum(-1, keepdims=True)
    expected = every.mean(axis=1) if average == "logits" else np.log(p.mean(axis=1))
    np.testing.assert_allclose(client.logits(request), expected, atol=2e-2)


def test_an_average_equals_that_of_its_rows_asked_one_by_one(client, index):
    rows = crops(10).rows(np.array([5, 6]), index.height, index.width)
    one_by_one = [client.logits(ask_by_reference(rows.take(row, row + 1), index.digest)) for row in range(20)]
    every = np.concatenate(one_by_one).astype(np.float64).reshape(2, 10, 6)
    request = ask_by_reference(rows, index.digest)
    ask_for_mean(request, 10, "logits")
    np.testing.assert_allclose(client.logits(request), every.mean(axis=1), atol=1e-6)
    ask_for_mean(request, 10, "probabilities")
    p = np.exp(every) / np.exp(every).sum(-1, keepdims=True)
    np.testing.assert_allclose(client.logits(request), np.log(p.mean(axis=1)), atol=1e-6)


@pytest.mark.parametrize("ask", ["reference", "encoded"])
def test_a_picture_of_many_views_travels_once_and_is_decoded_once(tiny_data, tiny_model, index, ask):
    """1000 crops, as in the paper: one file in the request, one in the decoder; the reply is one row."""
    rows = crops(1000).rows(np.array([3]), index.height, index.width)
    request = ask_by_reference(rows, index.digest) if ask == "reference" else ask_encoded(rows, files(index, rows))
    ask_for_mean(request, 1000, "probabilities")
    (picture,) = files(index, rows)
    assert request.ByteSize() < 30_000 + len(picture), "30 bytes a view, and at most one file"
    config = Config(model=str(tiny_model), data=(tiny_data,), address="127.0.0.1:0", device="cpu", threads=1,
                    batch_rows=100, gate_images=8)  # fmt: skip
    with serving(config) as (_, client), files_decoded() as decoded:
        assert client.logits(request).shape == (1, 6)
    assert decoded == [picture]


def test_the_mean_of_probabilities_stays_finite_where_the_teacher_is_certain():
    certain = np.array([[400.0, -400.0, 0.0], [380.0, -420.0, 0.0]], np.float32)
    mean = service.averaged(certain, 2, "probabilities")
    assert np.isfinite(mean).all()
    np.testing.assert_allclose(mean[0, 1], -800 + np.log(1.0), rtol=1e-5)


def test_rows_that_cannot_be_averaged_are_refused(client, index):
    rows = crops(10).rows(np.array([5, 6]), index.height, index.width)
    request = ask_by_reference(rows, index.digest)
    request.mean_of = 10
    refused(client, request, "mean_of needs average")
    ask_for_mean(request, 7, "logits")
    refused(client, request, "20 rows cannot be averaged 7 at a time")
    mixed = ask_by_reference(draw(index, 20), index.digest)
    ask_for_mean(mixed, 10, "logits")
    refused(client, mixed, "row 0: a row that is averaged is not mixed")


def refused(client: Client, request: pb.PredictRequest, sentence: str) -> None:
    with pytest.raises(grpc.RpcError, match=re.escape(sentence)) as error:
        client.predict(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
