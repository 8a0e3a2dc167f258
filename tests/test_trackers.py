"""Trackers get what they should, once, and a training survives them; two are stand-ins."""

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_survive import make_trainer
from transformers import TrainerCallback

from lorabook.config import RunConfig
from lorabook.errors import ConfigError, TrainingError
from lorabook.run import run_training
from lorabook.testing import in_processes
from lorabook.train.trackers import tell_trackers

RECORDER = """
calls, run = [], None

class Config(dict):
    def update(self, values, allow_val_change):
        assert allow_val_change
        super().update(values)

config = Config()

class Run:
    summary = {}
    def _label(self, code):
        pass

def init(**options):
    global run
    calls.append(("init", options))
    run = Run()

def log(figures):
    calls.append(("log", figures))

def finish():
    global run
    if run is None:
        raise RuntimeError("there is no run")
    run = None
    calls.append(("finish", {}))
"""
SPACE = """
from types import SimpleNamespace
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
"""
FILES = {
    "wandb/__init__.py": RECORDER,
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/lib/__init__.py": "",
    "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): pass",
    "trackio/__init__.py": RECORDER + SPACE,
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    "Stand-ins that note their calls: name -> module."
    for name, text in FILES.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")]:
        monkeypatch.delitem(sys.modules, name)
    import trackio
    import wandb

    yield {"wandb": wandb, "trackio": trackio}
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")]:
        del sys.modules[name]


def made(folder, report_to, **settings):
    "A trainer whose trackers know their config."
    trainer = make_trainer(folder, report_to=report_to, max_steps=2, **settings)
    tell_trackers(trainer, RunConfig(output_dir=str(folder)))
    return trainer


def events(folder):
    "What TensorBoard finds: name -> {step: value}."
    (where,) = Path(folder, "runs").iterdir()
    found = EventAccumulator(str(where)).Reload()
    return {
        name: {event.step: event.value for event in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


def test_tensorboard_gets_every_log(tmp_path):
    trainer = made(tmp_path, "tensorboard")
    trainer.train()
    found = events(tmp_path)
    logged = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    assert found["train/loss"] == pytest.approx(logged)
    assert {"train/tokens_per_second", "eval/loss", "train/learning_rate"} <= set(found)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_of_its_own_for_each_training(name, modules, tmp_path):
    module = modules[name]
    for folder in (tmp_path / "one", tmp_path / "two"):
        module.calls.clear()
        made(folder, name).train()
        kinds = [kind for kind, _ in module.calls]
        assert (kinds[0], kinds[-1]) == ("init", "finish") and set(kinds[1:-1]) == {"log"}
        assert module.config["lorabook"]["output_dir"] == str(folder)
        logs = [figures for kind, figures in module.calls if kind == "log"]
        assert "train/loss" in logs[0] and any("eval/loss" in figures for figures in logs)
        assert name == "trackio" or module.calls[0][1]["dir"] == str(folder)


def test_runs_are_closed_when_the_training_fails(modules, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise ValueError("of its own")

    with pytest.raises(TrainingError, match="Fail failed"):
        made(tmp_path, [*modules], callbacks=[Fail()]).train()
    for module in modules.values():
        assert module.calls[-1][0] == "finish" and module.run is None


def test_a_run_that_somebody_else_began_stays_open(modules, tmp_path):
    wandb = modules["wandb"]
    wandb.init(project="mine")
    trainer = made(tmp_path, "wandb")
    trainer.train()
    assert [kind for kind, _ in wandb.calls].count("init") == 1 and wandb.run is not None


@pytest.mark.parametrize(
    ("name", "broken"), [("wandb", "init"), ("trackio", "log"), ("wandb", "finish")]
)
def test_a_tracker_that_fails_is_left_out(name, broken, modules, tmp_path, capsys):
    calls = []

    def fail(*args, **kwargs):
        calls.append(broken)
        raise OSError("no such host")

    setattr(modules[name], broken, fail)
    trainer = made(tmp_path, [name, "tensorboard"])
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("goes on without it") == said.count("OSError: no such host") == 1
    assert calls == [broken] and trainer.state.global_step == trainer.state.max_steps
    assert max(events(tmp_path)["train/loss"]) == trainer.state.max_steps


def test_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr("lorabook.run.setup_tokenizer", None)  # would fail if it were called
    cfg = RunConfig(output_dir=str(tmp_path / "out")).override("training.report_to=wandb")
    with pytest.raises(ConfigError, match=r"(?s)`wandb` can't be used here.*pip install wandb"):
        run_training(cfg)
    assert not (tmp_path / "out").exists()


def test_of_two_processes_the_first_reports(tmp_path):
    in_processes(lambda: made(tmp_path, "tensorboard").train() and None)
    (where,) = Path(tmp_path, "runs").iterdir()
    assert len(list(where.iterdir())) == 1
    assert len(events(tmp_path)["train/loss"]) == 2
