"""Who is there, and what it answers: a real server on a free port and a real client."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import models
from one_teacher import SIZE, Client, by_hand, draw, files, rendered, serving, small
from protos import teacher_pb2 as pb
from protos.arrays import from_message, to_message
from teacher_server.config import Config
from teacher_server.server import Server, create_server
from views.view import view_digest
from views.wire import ask_by_reference, ask_encoded, ask_pixels


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: Path) -> Config:
    return small(tiny_model, tiny_data)


@pytest.fixture(scope="module")
def running(config: Config) -> Iterator[tuple[Server, Client]]:
    with serving(config) as both:
        yield both


@pytest.fixture(scope="module")
def client(running: tuple[Server, Client]) -> Client:
    return running[1]


def test_the_description_says_what_is_served(client, index, tiny_model):
    description = client.description
    assert description.model == "resnetv2_14x05_bit"
    assert (description.num_classes, description.precision, description.max_rows) == (6, "float32", 40)
    assert (description.rendering.size, description.rendering.interpolation) == (SIZE, "linear")
    assert description.weights_digest == models.weights_digest(models.load(tiny_model)[0])
    assert [(d.name, d.digest, d.num_samples) for d in description.data_sets] == [(index.name, index.digest, 24)]
    assert description.renders
    assert description.batch_invariant
    assert len(bytes.fromhex(description.fingerprint)) == 32


def test_the_standard_health_stub_sees_a_serving_teacher(client):
    for name in ("", "funmatch.v1.Teacher"):
        assert client.health(name) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as error:
        client.health("other")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service_and_its_methods(client):
    database = ProtoReflectionDescriptorDatabase(client.channel)
    assert {"funmatch.v1.Teacher", "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("funmatch.v1.Teacher")
    assert [method.name for method in file.service[0].method] == ["Describe", "Predict"]


def test_the_port_answers_not_serving_while_the_model_is_not_loaded(config):
    server, address = create_server(config)
    client = Client(address)
    try:
        assert client.health() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert client.health("funmatch.v1.Teacher") == health_pb2.HealthCheckResponse.NOT_SERVING
        for call, request in ((client.stub.Describe, pb.DescribeRequest()), (client.stub.Predict, pb.PredictRequest())):
            with pytest.raises(grpc.RpcError, match=r"still loading") as error:
                call(request, timeout=5)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        client.channel.close()
        server.drain()


def test_equal_settings_give_equal_fingerprints_and_other_settings_others(config, client):
    prints = {client.description.fingerprint}
    for change in ({}, {"size": 40}, {"interpolation": "cubic"}, {"antialias": True}, {"batch_rows": 4}):
        with serving(dataclasses.replace(config, **change)) as (_, other):
            prints.add(other.description.fingerprint)
    assert len(prints) == 5


def test_an_address_in_use_is_refused(client, running, config):
    with pytest.raises(ValueError, match=r"--address"):
        create_server(dataclasses.replace(config, address=running[0].address))


def test_logits_equal_those_computed_slowly_by_hand(client, index, tiny_model):
    rows = draw(index, 19)
    logits = client.logits(ask_by_reference(rows, index.digest))
    expected = by_hand(index, rows, tiny_model)
    assert expected.std(axis=0).min() > 0.1, "a network that always says the same proves nothing"
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_three_transports_give_the_same_bits(client, index):
    rows = draw(index, 13)
    by_reference = client.logits(ask_by_reference(rows, index.digest))
    np.testing.assert_array_equal(client.logits(ask_encoded(rows, files(index, rows))), by_reference)
    np.testing.assert_array_equal(client.logits(ask_pixels(rows, rendered(index, rows))), by_reference)


def test_split_and_merged_requests_give_the_same_bits(client, index):
    rows = draw(index, 37)
    whole = client.logits(ask_by_reference(rows, index.digest))
    bounds = [0, 1, 9, 17, 30, 37]
    parts = [rows.take(start, stop) for start, stop in itertools.pairwise(bounds)]
    with ThreadPoolExecutor() as pool:  # at once: they share batches
        answers = list(pool.map(lambda part: client.logits(ask_by_reference(part, index.digest)), parts))
    np.testing.assert_array_equal(np.concatenate(answers), whole)


def test_many_clients_at_once_get_their_own_rows(client, index):
    every = [draw(index, 1 + seed % 7, seed) for seed in range(24)]
    alone = [client.logits(ask_by_reference(rows, index.digest)) for rows in every]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda rows: client.logits(ask_by_reference(rows, index.digest)), every))
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_many_views_of_one_picture_send_it_once(client, index):
    rows = draw(index, 10)
    rows = dataclasses.replace(rows, sample=np.full(10, 3), box=np.tile(np.int32([1, 2, 20, 25]), (10, 1)))
    request = ask_encoded(rows, files(index, rows))
    assert len(request.encoded.image) == 1
    np.testing.assert_array_equal(client.logits(request), client.logits(ask_by_reference(rows, index.digest)))


def test_the_reply_carries_the_request_id_and_the_fingerprint(client, index):
    reply = client.predict(ask_by_reference(draw(index, 2), index.digest))
    assert (reply.request_id, reply.fingerprint) == ("r1", client.description.fingerprint)
    assert not reply.HasField("audit_digest")


def test_the_audit_vouches_for_the_rendered_views_and_shows_them_on_request(client, index):
    rows = draw(index, 6).take(0, 5)  # its last view is a partner only
    request = ask_by_reference(rows, index.digest)
    request.audit.CopyFrom(to_message(np.int32([5, 0])))
    views = rendered(index, rows)
    reply = client.predict(request)
    assert reply.audit_digest.data == view_digest(views[5]) + view_digest(views[0])
    assert not reply.HasField("audit_pixels")
    request.audit_pixels = True
    pixels = from_message(client.predict(request).audit_pixels, "pixels", np.uint8, (2, SIZE, SIZE, 3))
    np.testing.assert_array_equal(pixels, views[[5, 0]])


def test_half_precision_travels_as_float16_and_is_close(config, client, index):
    rows = draw(index, 8)
    with serving(dataclasses.replace(config, precision="bfloat16")) as (_, half):
        reply = half.predict(ask_by_reference(rows, index.digest))
        logits = from_message(reply.logits, "logits", np.float16, (8, 6))
        assert half.description.precision == "bfloat16"
    expected = client.logits(ask_by_reference(rows, index.digest))
    assert 0 < np.abs(logits - expected).max() < 0.2 * expected.std()
