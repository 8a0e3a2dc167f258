"""A sweep that is killed, stopped or repeated, and what it must not mix."""

import gc
import json
import os
import signal
import subprocess
import sys

import optuna
import pytest

from lorabook.config import LoraSettings, ModelSettings, RunConfig
from lorabook.data.pack import prepare_rows
from lorabook.data.source import load_and_prepare_data
from lorabook.errors import ConfigError, ModelError, TrainingError, TrainingStopped
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.run import run_training
from lorabook.train import sweep as chapter
from lorabook.train.sweep import sweep
from lorabook.train.trainer import create_trainer

SPACE = {"training.learning_rate": (1e-4, 1e-1, "log"), "lora.r": [2, 4, 8]}
KILLED = """
import json, os, signal, sys
from lorabook.config import RunConfig
from lorabook.train import sweep as chapter

def kill(self, args, state, control, **kwargs):
    if self.trial.number == 2 and state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

chapter._Report.on_step_begin = kill
values, folder = json.loads(sys.argv[1])
space = {"training.learning_rate": (1e-4, 1e-1, "log"), "lora.r": [2, 4, 8]}
chapter.sweep(RunConfig.from_dict(values), space, 3, folder)
"""


@pytest.fixture(scope="module", autouse=True)
def frozen():
    "What is imported is not garbage: looking through it took half a second in each trial."
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def cfg(thirty):
    "Runs of six steps on thirty short conversations, with an evaluation after every second."
    settings = "max_steps=6", "batch_size=2", "gradient_accumulation_steps=1", "logging_steps=1"
    settings += ("eval_steps=2",)
    changes = [f"data.train_file={thirty}", *(f"training.{change}" for change in settings)]
    return RunConfig().override("model.quantization=none", *changes)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
    "A sweep that nothing happened to."
    return sweep(cfg, SPACE, 3, tmp_path_factory.mktemp("whole") / "sweep")


def outcome(found):
    "What the trials that count have come to."
    kept = "state", *SPACE, "eval_loss", "steps", "error"
    rows = [row for row in found.table if row["state"] != "interrupted"]
    return [tuple(row[name] for name in kept) for row in rows]


def interrupted(found):
    return [row for row in found.table if row["state"] == "interrupted"]


def left(folder):
    "Names of what lies in a folder."
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_killed_in_a_trial(cfg, whole, fresh, tmp_path):
    folder = tmp_path / "sweep"
    process = fresh(KILLED, json.dumps([cfg.to_dict(), str(folder)]))
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert left(folder) == {"sweep.db", "best.yaml"}
    found = sweep(cfg, SPACE, 3, folder)
    assert outcome(found) == outcome(whole) and len(found.done) == 3
    assert [row["trial"] for row in interrupted(found)] == [2]
    assert len({row[1:3] for row in outcome(found)}) == 3
    assert interrupted(found)[0]["lora.r"] == found.table[3]["lora.r"]
    assert RunConfig.from_yaml(folder / "best.yaml") == found.best == whole.best


def test_interrupted(cfg, whole, monkeypatch, tmp_path):
    def interrupt(self, args, state, control, **kwargs):
        if self.trial.number == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(chapter._Report, "on_step_begin", interrupt)
        with pytest.raises(TrainingStopped) as stopped:
            sweep(cfg, SPACE, 3, tmp_path)
    for part in ("stopped after 1 of 3 trials", "SIGINT came", "Call `sweep` again"):
        assert part in str(stopped.value)
    found = sweep(cfg, SPACE, 0, tmp_path)
    assert [row["state"] for row in found.table][1:] == ["interrupted"]
    found = sweep(cfg, SPACE, 3, tmp_path)
    assert outcome(found) == outcome(whole)


def test_a_trial_is_a_run(cfg, whole, tmp_path):
    "The last trial, whose base model has been through others, is like a run of its own."
    row = [row for row in whole.table if row["state"] == "complete"][-1]
    assert row["trial"] > 0
    alone = whole.config(whole.study.trials[row["trial"]].params)
    result = run_training(alone.override(f"output_dir={tmp_path}/run"))
    assert min(result.history.column("eval_loss")[1]) == row["eval_loss"]


def test_pruned(cfg, tmp_path):
    "What is above a loss of 4.5, which is less than at the beginning, is given up at step 4."
    pruner = optuna.pruners.ThresholdPruner(upper=4.5, n_warmup_steps=3)
    found = sweep(cfg, {"training.learning_rate": [1e-9, 2e-2]}, 9, tmp_path, pruner=pruner)
    steps = {row["training.learning_rate"]: (row["state"], row["steps"]) for row in found.table}
    assert steps == {1e-9: ("pruned", 4), 2e-2: ("complete", 6)}
    assert len(found.table) == 2  # and no more, since there is nothing else to try
    assert found.best.training.learning_rate == 2e-2


def test_loads_what_it_must(cfg, monkeypatch, tmp_path):
    "The base model stays, unless another is asked for or a trial has failed."
    loaded, usual = [], chapter.setup_model
    short = cfg.override("training.max_steps=2", "training.gradient_checkpointing=false")

    def load(name, seed, settings):
        loaded.append(settings.quantization)
        return usual(name, seed, settings)

    monkeypatch.setattr(chapter, "setup_model", load)
    found = sweep(short, {"data.packing": [True, False]}, 2, tmp_path / "packed")
    assert loaded == ["none"] and {row["state"] for row in found.table} == {"complete"}
    loaded.clear()
    sweep(short, {"model.quantization": ["none", "nf4"]}, 2, tmp_path / "quantized")
    assert set(loaded) == {"none", "nf4"}
    loaded.clear()
    found = sweep(cfg, {"training.learning_rate": [1e30, 1e31]}, 2, tmp_path / "failed")
    assert all("is not a number" in row["error"] for row in found.table) and len(loaded) == 2


def test_refused_before_anything_is_loaded(cfg, refused, tmp_path):
    elsewhere = cfg.override("model.name=no/such-model")
    for space in ({}, {"lora.rank": [8]}, {"lora.r": [8, -1]}, {"lora.dropout": (0.0, 2.0)}):
        with refused(ConfigError):
            sweep(elsewhere, space, 1, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    with refused(ModelError, "no/such-model"):  # no trial could do better
        sweep(elsewhere, {"lora.r": [8]}, 1, tmp_path / "sweep")
    assert sweep(elsewhere, {"lora.r": [8]}, 0, tmp_path / "sweep").table == []


def test_values_that_the_model_refuses(cfg, tmp_path):
    space = {"lora.target_modules": [["nonesuch"], ["q_proj"]]}
    found = sweep(cfg, space, 2, tmp_path)
    failed, good = sorted(found.table, key=lambda row: row["state"], reverse=True)
    assert (failed["state"], failed["steps"], failed["eval_loss"]) == ("failed", 0, None)
    assert "'nonesuch', which" in failed["error"] and failed["lora.target_modules"] == ["nonesuch"]
    assert good["state"] == "complete" and found.best.lora.target_modules == ["q_proj"]
    assert "nonesuch" in str(found) and "failed" in found._repr_html_()


def test_another_sweep_in_the_folder(cfg, whole, refused, tmp_path):
    space = {"lora.r": [2, 4]}
    sweep(cfg, space, 0, tmp_path)
    with refused(ConfigError, "lora.alpha: 32.0 when it began, 8.0 now"):
        sweep(cfg.override("lora.alpha=8"), space, 0, tmp_path)
    with refused(ConfigError, "space of lora.r: [2, 4] when it began, [2, 8] now"):
        sweep(cfg, {"lora.r": [2, 8]}, 0, tmp_path)
    with refused(ConfigError, "space of data.packing: None when it began"):
        sweep(cfg, space | {"data.packing": [True]}, 0, tmp_path)
    sweep(cfg.override("output_dir=elsewhere"), space, 0, tmp_path)


def test_two_at_once(cfg, refused, tmp_path):
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held'); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-uc", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with refused(TrainingError, "Another run is writing"):
            sweep(cfg, {"lora.r": [2, 4]}, 1, tmp_path)
        process.communicate("\n")


def test_hyperparameter_search_of_transformers(cfg, tmp_path):
    "What `create_trainer` returns can still be searched in the way of transformers."
    load = lambda: setup_model(cfg=ModelSettings(quantization="none"))
    model, tokenizer = load()
    rows = prepare_rows(load_and_prepare_data(cfg.data.train_file, cfg.data), tokenizer, cfg)
    adapted = setup_lora(model, LoraSettings(r=2))
    trainer = create_trainer(adapted, tokenizer, *rows.values(), str(tmp_path), cfg.training)
    trainer.model_init = lambda: setup_lora(load()[0], LoraSettings(r=2))
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}
    losses = []  # three of each trial
    objective = lambda metrics: losses.append(metrics["eval_loss"]) or losses[-1]
    options = dict(backend="optuna", hp_space=space, n_trials=2, direction="minimize")
    best = trainer.hyperparameter_search(**options, compute_objective=objective)
    assert 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-2
    assert len(losses) == 6 and best.objective == min(losses[2], losses[5])
    assert losses[5] == pytest.approx(trainer.state.log_history[-2]["eval_loss"])
    assert (tmp_path / "run-0" / "checkpoint-4").is_dir()
