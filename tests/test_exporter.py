"""What a run tells Prometheus, read with Prometheus's own parser; and its log as JSON."""

from __future__ import annotations

import json
import logging
import urllib.request
import warnings

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import serve
from data_prep.index import Index
from student_trainer import log
from student_trainer.exporter import Exporter
from student_trainer.fleet import Fleet
from views.draw import Plan
from views.setting import ViewSetting


def samples(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    return {
        (one.name, tuple(one.labels[name] for name in sorted(one.labels))): one.value
        for family in families
        for one in family.samples
    }


def test_prometheus_sees_the_last_step_and_every_replica(tiny_model, tiny_data):
    index = Index.open(tiny_data)
    plan = Plan(
        seed=0, batch_size=24, law=ViewSetting().student, samples=index.splits["train"], height=index.height,
        width=index.width,
    )  # fmt: skip
    with serve((tiny_model, tiny_data), (tiny_model, tiny_data)) as addresses:
        with Fleet(addresses, data_digest=index.digest, rows_per_request=4) as fleet:
            with Exporter("127.0.0.1:0", 0, [fleet]) as exporter:
                before = samples(exporter.port)
                fleet.ask(plan.rows(0, 0, 24)).result()
                exporter.step(1, {"loss": 0.5, "view_mismatch": 2.0, "eval/student_top1": 0.25})
                exporter.step(2, {"loss": 0.75, "view_mismatch": 1.0, "teacher_wait_s": 0.125})
                after = samples(exporter.port)
    assert ("funmatch_student_loss", ()) not in before, "what was not measured is not there"
    assert after["funmatch_student_step", ()] == 2
    assert after["funmatch_student_loss", ()] == 0.75
    assert after["funmatch_student_teacher_wait_seconds", ()] == 0.125
    assert after["funmatch_student_top1", ()] == 0.25, "of the last evaluation, until the next"
    assert after["funmatch_student_view_mismatch_max", ()] == 2
    rows = {labels: value for (name, labels), value in after.items() if name == "funmatch_student_replica_rows_total"}
    assert {replica for replica, _teacher in rows} == set(addresses)
    assert sum(rows.values()) == 24
    assert after["funmatch_student_retries_total", ("0",)] == 0
    assert all(after["funmatch_student_in_flight", labels] == 0 for labels in rows)


def test_a_port_that_is_taken_and_an_address_that_is_none_are_said(tmp_path):
    with Exporter("127.0.0.1:0", 0, []) as exporter:
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{exporter.port} \(--metrics-address\)"):
            Exporter(f"127.0.0.1:{exporter.port - 1}", 1, [])
    with pytest.raises(ValueError, match="HOST:PORT is wanted"):
        Exporter("9091", 0, [])


@pytest.fixture
def restored_logging():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_json_log_has_one_object_a_line_with_request_ids_and_warnings(restored_logging, capsys):
    log.set_up("json", rank=3)
    logging.getLogger("student_trainer.fleet.dispatch").warning(
        "sent again\nand %s", np.float32(1), extra={"request_id": "abc"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of a library", UserWarning, stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["WARNING", "WARNING"]
    assert lines[0]["request_id"] == "abc" and lines[0]["rank"] == 3 and lines[0]["message"] == "sent again\nand 1.0"
    assert "of a library" in lines[1]["message"]
