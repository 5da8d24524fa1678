"""metrics.jsonl and the completed console lines."""

import json
import logging

import pytest

from nitp_titan.training.metrics import JsonlLogger, _on_console


def test_jsonl_has_one_object_a_step_and_null_for_what_json_cannot_say(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlLogger(str(path))
    writer.log({"a": 1, "b": float("nan")}, step=1)
    assert json.loads(path.read_text()) == {"step": 1, "a": 1.0, "b": None}
    writer.close()
    resumed = JsonlLogger(str(path))
    resumed.log({"a": float("inf")}, step=2)
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_what_is_logged_later_of_a_step_joins_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlLogger(str(path))
    for step, metrics in [(1, {"a": 1}), (1, {"b": 2}), (2, {"a": 3}), (2, {"a": 4})]:
        writer.log(metrics, step)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 4.0}]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(str(path))
    for step in (1, 2, 3, 4):
        first.log({"a": step}, step)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "a"')  # killed while writing
    resumed = JsonlLogger(str(path))
    resumed.go_on_from(2, saves=True)
    resumed.log({"a": 30}, 3)
    resumed.log({"a": 40}, 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": 30.0}, {"step": 4, "a": 40.0}]


def test_console_line_is_completed_only_inside(caplog):
    logger = logging.getLogger()
    with caplog.at_level(logging.INFO), _on_console({"loss_metrics/ntp_loss": 2.5, "loss_metrics/nitp_loss": 0.25}):
        logger.info("step:  1  loss: 2.75")
        logger.info("another line")
    with caplog.at_level(logging.INFO):
        logger.info("step:  2  loss: 2.75")
    assert caplog.messages[0].split() == ["step:", "1", "loss:", "2.75", "ntp:", "2.50000", "nitp:", "0.25000"]
    assert caplog.messages[1:] == ["another line", "step:  2  loss: 2.75"]


@pytest.mark.parametrize("metrics", [{}, {"something/else": 1.0}])
def test_console_line_without_our_metrics_stays(caplog, metrics):
    with caplog.at_level(logging.INFO), _on_console(metrics):
        logging.getLogger().info("step:  1")
    assert caplog.messages == ["step:  1"]
