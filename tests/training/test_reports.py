"""--report_to, with the real packages, offline: names, steps after resuming, failures."""

import json
import math
import sqlite3
import time

import pytest
import torch
from run_builder import training_options
from standing import wait_until
from transformers.integrations.integration_utils import rewrite_logs

import train
from minisft.common.errors import UserError
from minisft.common.metric_lines import read_metrics
from minisft.training import reports
from minisft.training.metrics import Progress
from minisft.training.reports import SERVICES, Reports, scalar_name

SERVICE_TESTS = pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab", "trackio"])


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """All services write into tmp_path; none contacts a server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "swanlab_home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def read_tensorboard(folder):
    """{name: {step: value}} and the texts, as TensorBoard shows them."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing"
    )
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        scalars[name] = {event.step: event.value for event in events.Scalars(name)}
        if name != "train/global_step":  # evaluations repeat it
            assert len(scalars[name]) == len(events.Scalars(name))
    texts = "".join(
        event.tensor_proto.string_val[0].decode()
        for name in events.Tags()["tensors"]
        for event in events.Tensors(name)
    )
    return scalars, texts


def read_trackio(folder):
    """The same from the database of Trackio."""
    scalars: dict = {}
    texts = ""
    with sqlite3.connect(folder / "trackio" / "minisft.db") as database:
        runs = set(database.execute("select run_name from metrics"))
        for step, line in database.execute("select step, metrics from metrics order by id"):
            for name, value in json.loads(line).items():
                if isinstance(value, str):
                    texts += value
                else:
                    scalars.setdefault(name, {})[step] = value
        texts += "".join(str(row) for row in database.execute("select config from configs"))
    assert len(runs) == 1
    return scalars, texts


def records(path):
    """The records of a log in LevelDB's form: pieces in blocks of 32 kB."""
    data, place, record = path.read_bytes(), 7, b""  # after the header of the file
    while True:
        left = 2**15 - place % 2**15
        place += left if left < 7 else 0
        if place + 7 > len(data):
            return
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # complete, or the last piece
            yield record
            record = b""


def read_wandb(folder):
    """The same from the files that wandb would upload."""
    from wandb.proto.wandb_internal_pb2 import Record

    scalars: dict = {}
    texts, ids = "", set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(path):
            record = Record.FromString(data)
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if "train/global_step" in items:
                step = items["train/global_step"]
                for name, value in items.items():
                    scalars.setdefault(name, {})[step] = value
            if record.HasField("run"):
                ids.add(record.run.run_id)
            texts += str(record.run.config) + str(record.summary)
    assert len(ids) == 1
    return scalars, texts


def start(tmp_path, name, step, **flags):
    """Open the services of a run after a step."""
    run = Reports(training_options(output_dir=tmp_path, report_to=name, **flags))
    run.start(step)
    return run


@SERVICE_TESTS
def test_services_continue_after_the_step_of_a_checkpoint(name, offline):
    pytest.importorskip(name, reason=f"{name} is missing")
    first = start(offline, name, 0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 0.5, "learning_rate": 1e-4 * step})
    if name == "tensorboard":  # the others would wait for the run that was killed
        first.services[name].writer.close()
    else:
        first.services[name].run.finish()
    if name == "wandb":  # runs of the same second have the same folder
        began = int(time.time())
        wait_until(lambda: int(time.time()) != began)
    again = start(offline, name, 2, learning_rate=3e-3)
    again.log({"step": 3, "loss": 0.25, "learning_rate": 0.1})
    again.log({"step": 4, "loss": 0.125, "learning_rate": 0.2})
    again.log({"step": 4, "eval_loss": 0.75, "eval_perplexity": 2.0})
    (offline / "adapter_model.safetensors").write_text("")
    again.finish()
    assert not again.services and not first.services.keys() - {name}
    if name == "swanlab":
        return check_swanlab(offline)
    read = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}[name]
    if name == "wandb":  # another process writes its file
        wait_until(lambda: 4 in read(offline)[0].get("eval/loss", {}))
    scalars, texts = read(offline)
    assert scalars["train/loss"] == {1: 0.5, 2: 0.5, 3: 0.25, 4: 0.125}
    assert scalars["eval/loss"] == {4: 0.75} and scalars["eval/perplexity"] == {4: 2.0}
    assert scalars["train/learning_rate"][4] == pytest.approx(0.2)
    assert scalars["train/global_step"] == {step: step for step in (1, 2, 3, 4)}
    assert "learning_rate" in texts and "0.003" in texts and "adapter_model.safetensors" in texts


def check_swanlab(folder):
    """SwanLab's log holds its own protocol buffers; their bytes contain the names and one run."""
    paths = list(folder.glob("swanlab/run-*/run-*.swanlab"))
    data = b"".join(path.read_bytes() for path in paths)
    for name in (b"train/loss", b"train/learning_rate", b"eval/loss", b"train/global_step"):
        assert name in data
    assert len({path.name for path in paths}) == 1 < len(paths)
    config = "".join(path.read_text() for path in folder.glob("swanlab/run-*/files/config.yaml"))
    assert "learning_rate" in config and "adapter_model.safetensors" in config


def test_a_run_of_train_py(checkpoint, rows_file, tmp_path, here):
    pytest.importorskip("tensorboard", reason="tensorboard is missing")
    flags = dict(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="alpaca",
        output_dir=tmp_path / "out",
        report_to="tensorboard",
        per_device_train_batch_size=2,
        validation_split=4,
        eval_steps=2,
        logging_steps=1,
        dataloader_num_workers=0,
    )
    here(train, **flags, max_steps=2)
    here(train, **flags, max_steps=4, overwrite_output_dir=True)
    scalars, texts = read_tensorboard(tmp_path / "out")
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    for line in lines:
        for name, value in line.items():
            if name != "step":
                logged = scalars[scalar_name(name)][line["step"]]
                assert logged == pytest.approx(value, rel=1e-5)
    assert set(scalars["train/loss"]) == {1, 2, 3, 4} and set(scalars["eval/loss"]) == {2, 4}
    assert str(tmp_path / "out" / "adapter_model.safetensors") in texts


def test_names_are_those_of_transformers():
    names = ("loss", "learning_rate", "grad_norm", "epoch", "eval_loss", "eval_perplexity")
    for name in names:
        assert [scalar_name(name)] == list(rewrite_logs({name: 0}))
    assert scalar_name("tokens") == "train/num_input_tokens_seen"


class Broken:
    """A service that fails while it starts, at a step, or at the end."""

    run_id = None

    def __init__(self, options, step, run_id):
        self.fails_at = options.run_name
        self.fail("start")

    def fail(self, when):
        if self.fails_at == when:
            raise ConnectionError("the server is away\nTraceback")

    def log(self, scalars, step):
        self.fail("log")

    def finish(self, files):
        self.fail("finish")


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_service_that_fails_is_named_once(when, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SERVICES, "wandb", Broken)
    monkeypatch.setattr(reports, "find_spec", lambda name: True)
    options = training_options(output_dir=tmp_path, report_to="wandb", run_name=when)
    progress = Progress(9, tmp_path / "metrics.jsonl", "cpu", Reports(options))
    progress.start()
    for _ in range(3):
        progress.add({"loss": torch.tensor(math.nan)}, 1, 1)
        progress.record(0.1, 1e-4)
    progress.close()
    progress.reports.finish()
    said = capsys.readouterr().out
    assert said.count("--report_to wandb: the server is away; training continues without it\n") == 1
    assert "Traceback" not in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_only_rank_0_reports(tmp_path, monkeypatch):
    monkeypatch.setitem(SERVICES, "wandb", Broken)
    monkeypatch.setattr(reports, "find_spec", lambda name: True)
    monkeypatch.setattr("minisft.common.processes.rank", lambda: 1)
    options = training_options(output_dir=tmp_path, report_to="wandb", run_name="start")
    progress = Progress(9, tmp_path / "metrics.jsonl", "cpu", Reports(options))
    progress.start()
    progress.add({"loss": 1.0}, 1, 1)
    progress.record_evaluation({"loss": 1.0}, 0.0)
    progress.reports.finish()
    assert not progress.reports.services and not list(tmp_path.iterdir())


def test_mistakes_are_named_before_training(monkeypatch):
    with pytest.raises(UserError, match="'mlflow' is not one of tensorboard, wandb"):
        training_options(report_to="wandb,mlflow")
    with pytest.raises(UserError, match="'none, wandb': none excludes the others"):
        training_options(report_to="none, wandb")
    monkeypatch.setattr(reports, "find_spec", lambda name: True)
    assert training_options(report_to="wandb, tensorboard,wandb").report_to == "wandb,tensorboard"
    monkeypatch.setattr(reports, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to swanlab needs a package: pip install swanlab"):
        training_options(report_to="swanlab")
