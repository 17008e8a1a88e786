"""Rows as messages and back, and what is refused before any picture is read."""

from dataclasses import replace

import numpy as np
import pytest

from protos import teacher_pb2 as pb
from protos.arrays import from_message, to_message
from views.view import Rows
from views.wire import ask_by_reference, ask_encoded, ask_for_mean, ask_pixels, read_question


def rows() -> Rows:
    return Rows(
        sample=np.array([7, 9, 7, 4]),
        box=np.array([[0, 0, 5, 6], [1, 2, 3, 4], [2, 2, 2, 2], [0, 0, 9, 9]], np.int32),
        flip=np.array([True, False, False, True]),
        partner=np.array([3, 0, 1], np.int32),
        lam=np.full(3, 0.75, np.float32),
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float16, np.float32])
def test_arrays_survive_the_wire(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    sent = pb.Array.FromString(to_message(array).SerializeToString())
    back = from_message(sent, "x", dtype, (None, 3))
    assert back.dtype == dtype
    assert np.array_equal(back, array)


def test_references_name_each_picture_once():
    question = read_question(ask_by_reference(rows(), "abc"), size=8)
    assert question.transport == "reference"
    assert question.sample.tolist() == [4, 7, 9]
    assert question.sample[question.image].tolist() == rows().sample.tolist()
    for name in ("box", "flip", "partner", "lam"):
        assert np.array_equal(getattr(question, name), getattr(rows(), name))
    assert question.num_views == 4
    assert question.name(1) == "row 1, sample 9"
    assert question.name(3) == "view 3 (a mixup partner only), sample 4"


def test_encoded_pictures_travel_in_the_order_of_their_samples():
    question = read_question(ask_encoded(rows(), [b"four", b"seven", b"nine"]), size=8)
    assert [question.encoded[i] for i in question.image] == [b"seven", b"nine", b"seven", b"four"]


def test_pixels_travel_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    question = read_question(ask_pixels(rows(), pixels), size=8)
    assert question.pixels is not None
    assert np.array_equal(question.pixels, pixels)
    assert question.num_views == 4


def test_a_reference_costs_at_most_eighty_bytes_a_picture():
    num = 64
    many = Rows(
        sample=np.arange(num + 1) + 10**9,
        box=np.full((num + 1, 4), 499, np.int32),
        flip=np.ones(num + 1, bool),
        partner=np.arange(1, num + 1, dtype=np.int32),
        lam=np.full(num, 0.6, np.float32),
    )
    assert ask_by_reference(many, "f" * 64).ByteSize() / num <= 80


def change(path: str, array: np.ndarray):
    def apply(request: pb.PredictRequest) -> None:
        message = request
        for part in path.split("."):
            message = getattr(message, part)
        message.CopyFrom(to_message(array))

    return apply


def int32(*values) -> np.ndarray:
    return np.array(values, np.int32)


MALFORMED = {
    "no rows": (change("lam", np.zeros(0, np.float32)), "no rows"),
    "lambda is not a number": (change("lam", np.array([0.5, np.nan, 1], np.float32)), r"row 1: lam .* got nan"),
    "lambda above one": (change("lam", np.array([0.5, 0.5, 1.5], np.float32)), r"row 2: lam"),
    "lambda of another dtype": (change("lam", np.ones(3, np.float16)), "lam has dtype float16, expected float32"),
    "partner outside the views": (change("partner", int32(0, 4, 0)), r"row 1: partner must lie in \[0, 4\), got 4"),
    "a partner too few": (change("partner", int32(0, 1)), r"partner has shape \[2\], expected \[3\]"),
    "a view of no picture": (change("views.image", int32(0, 1, 2, 3)), "view 3: views.image"),
    "box before the picture": (
        change("views.box", np.array([[0, 0, 1, 1], [0, -1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], np.int32)),
        r"view 1: a box",
    ),
    "empty box": (change("views.box", np.zeros((4, 4), np.int32)), "view 0: a box"),
    "boxes of three numbers": (change("views.box", np.zeros((4, 3), np.int32)), r"views.box has shape \[4, 3\]"),
    "flip of two": (change("views.flip", np.array([0, 1, 2, 0], np.uint8)), "view 2: views.flip"),
    "audit outside": (change("audit", int32(0, 9)), "audit entry 1"),
    "more rows than views": (
        lambda request: (
            change("lam", np.ones(5, np.float32))(request),
            change("partner", int32(0, 0, 0, 0, 0))(request),
        ),
        "5 rows need at least as many views",
    ),
    "bytes missing": (lambda request: setattr(request.lam, "data", b"abc"), "3 bytes, expected 12"),
    "unknown dtype": (lambda request: setattr(request.lam, "dtype", 99), "lam has unknown dtype code 99"),
    "no pictures": (lambda request: request.ClearField("references"), "no pictures"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_in_a_sentence(name):
    spoil, sentence = MALFORMED[name]
    request = ask_by_reference(rows(), "abc")
    spoil(request)
    with pytest.raises(ValueError, match=sentence):
        read_question(request, size=8)


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"pixels has shape \[4, 9, 9, 3\], expected \[any, 8, 8, 3\]"):
        read_question(ask_pixels(rows(), np.zeros((4, 9, 9, 3), np.uint8)), size=8)


def test_rows_with_a_partner_outside_cannot_be_made():
    with pytest.raises(ValueError, match="partner"):
        Rows(
            sample=np.array([1]), box=np.ones((1, 4), np.int32), flip=np.zeros(1, bool),
            partner=int32(1), lam=np.ones(1, np.float32),
        )  # fmt: skip


def alone(num_rows: int) -> Rows:
    """Views of one picture, not mixed."""
    return Rows(
        sample=np.full(num_rows, 7),
        box=np.tile(np.array([0, 0, 5, 6], np.int32), (num_rows, 1)),
        flip=np.zeros(num_rows, np.bool_),
        partner=np.arange(num_rows, dtype=np.int32),
        lam=np.ones(num_rows, np.float32),
    )


def averaging(mean_of: int, average: int, rows: Rows | None = None) -> pb.PredictRequest:
    request = ask_by_reference(rows or alone(6), "abc")
    request.mean_of, request.average = mean_of, average
    return request


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_what_is_averaged_survives_the_wire(average):
    request = ask_by_reference(alone(6), "abc")
    ask_for_mean(request, 3, average)
    question = read_question(pb.PredictRequest.FromString(request.SerializeToString()), size=8)
    assert (question.mean_of, question.average) == (3, average)
    assert question.sample.tolist() == [7], "the picture is named once"


@pytest.mark.parametrize("mean_of", [0, 1])
def test_a_mean_of_none_or_one_is_no_mean(mean_of):
    assert read_question(averaging(mean_of, pb.AVERAGE_UNSPECIFIED, rows()), size=8).mean_of == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: averaging(4, pb.LOGITS, r), "6 rows cannot be averaged 4 at a time"),
        (lambda r: averaging(2**32 - 1, pb.LOGITS, r), "6 rows cannot be averaged 4294967295 at a time"),
        (lambda r: averaging(3, pb.AVERAGE_UNSPECIFIED, r), "mean_of needs average"),
        (lambda r: averaging(3, 9, r), "mean_of needs average"),
        (lambda r: averaging(3, pb.LOGITS, replace(r, lam=np.float32([1, 1, 1, 1, 0.5, 1]))), "row 4: .* not mixed"),
        (lambda r: averaging(3, pb.LOGITS, replace(r, partner=np.int32([0, 1, 1, 3, 4, 5]))), "row 2: .* not mixed"),
    ],
)
def test_rows_that_cannot_be_averaged_are_refused_with_the_reason(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_question(change(alone(6)), size=8)
