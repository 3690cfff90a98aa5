"""metrics.jsonl across a kill, and figures that leave evaluation out."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mmpt.train import metrics
from mmpt.train.metrics import Clock, MetricsLog, Ticker, read_metrics


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path: Path):
    log = MetricsLog(tmp_path, step=0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0 / step, "seconds": 10.0 * step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "train", "step": 4, "lo')  # killed while writing
    log = MetricsLog(tmp_path, step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert log.seconds_before == 20.0
    log.write("train", 3, {"loss": 0.3})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"kind": "train", "step": 3, "loss": 0.3}


def test_tensorboard_gets_the_same_figures(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, step=0)
    log.write("train", 1, {"loss": 0.5, "loss/next_token": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("loss/next_token")] == [(1, 0.25)]


def test_the_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock(seconds_before=7.0)
    for _ in range(2):
        now[0] += 5.0
        clock.count(samples=50)
    with clock.paused():
        now[0] += 1000.0
    assert clock.read() == {"seconds": 17.0, "samples_per_second": 10.0}
    assert clock.seconds_per_step == 5.0


def test_a_line_shows_what_objectives_there_are():
    out = io.StringIO()
    with Ticker(Console(file=out, width=200), steps=10, done=0, silent=False) as ticker:
        losses = {
            "loss": 3.5,
            "loss/next_token": 2.0,
            "loss/contrastive/tower/text_image": 1.0,
            "loss/contrastive/tower/text_audio": 0.5,
        }
        parts = {"loss/source/web": 3.0, "loss/source/none": 0.5, "loss/modality/text": 2.0, "loss/modality/text_image": 1.5}
        ticker.log(4, {**losses, **parts, "samples_per_second": 12.3, "lr": 0.1}, seconds_left=61.0)
        ticker.log(5, {"loss": 0.0, "samples_per_second": 1.0}, seconds_left=0.0)
    first, second = out.getvalue().splitlines()
    assert first == "step 4/10  loss 3.500 (next token 2.000, contrastive 1.500)  12 samples/s  1:01 left"
    assert second == "step 5/10  loss 0.000  1 samples/s  0:00 left"
