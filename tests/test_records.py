"""A run's folder tells what became of it: in the list of runs, in a comparison, in its card."""

import json
import os
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from lorabook.config import RunConfig
from lorabook.records import compare_runs, list_runs
from lorabook.run import run_training


class Look(TrainerCallback):
    "Lists the runs of a folder while one of them is going on."

    def __init__(self, folder):
        self.folder, self.states = folder, []

    def on_step_end(self, args, state, control, **kwargs):
        self.states += [record.state for record in list_runs(self.folder).records]


@pytest.fixture(scope="module")
def run(thirty, tmp_path_factory):
    "A folder with a finished run, its result, and the states that it was in."
    home = tmp_path_factory.mktemp("all") / "runs"
    home.mkdir()
    short = "max_steps=4", "batch_size=2", "gradient_accumulation_steps=1", "logging_steps=2"
    changes = [f"data.train_file={thirty}", "data.split=[8,1,1]", "model.quantization=none"]
    changes += [f"training.{change}" for change in short]
    cfg = RunConfig(output_dir=str(home / "first")).override(*changes)
    look = Look(home)
    return home, run_training(cfg, callbacks=[look]), look.states


def test_a_run_is_running_until_it_has_finished(run):
    home, result, states = run
    assert states == ["running"] * 4
    (record,) = list_runs(home).records
    assert (record.state, record.steps, record.config) == ("finished", 4, result.config)
    assert record.after["loss"] == result.after.loss and record.memory == result.memory.peak
    steps, losses = result.history.column("eval_loss")
    assert record.curve == list(zip(steps, losses))
    assert list_runs(home / "first").records == list_runs(home.parent).records == [record]
    assert list_runs(result.adapter_dir).records == []


def test_two_runs(run, tmp_path):
    home, result, _ = run
    other = shutil.copytree(home / "first", tmp_path / "second")
    result.config.override("lora.r=4", "seed=1").to_yaml(other / "run.yaml")
    compared = compare_runs(home / "first", other)
    assert compared.settings == {"lora.r": ["16", "4"], "seed": ["42", "1"]}
    assert "test rows are not the same (seed differ)" in repr(compared)
    assert "The test rows are not the same" in compared._repr_html_()


def test_what_is_no_record_is_named_and_passed_over(run, tmp_path):
    home, _, _ = run
    damage = {
        "cut": lambda folder: os.truncate(folder / "metrics.json", 40),
        "binary": lambda folder: (folder / "run.yaml").write_bytes(b"\xff\xfe\x00"),
        "newer": lambda folder: (folder / "run.yaml").write_text("lora: {q: 1}"),
        "folder": lambda folder: (folder / "end.json").mkdir(),
        "deep": lambda folder: (folder / "end.json").write_text("[" * 100_000),
        "other": lambda folder: (folder / "metrics.json").write_text('{"steps": {"a": 1}}'),
        "\x1b[31m<b>\nred": lambda folder: (folder / "metrics.json").write_text("null"),
    }
    for name, harm in damage.items():
        harm(shutil.copytree(home / "first", tmp_path / name))
    shutil.copytree(home / "first", tmp_path / "whole")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "whole")
    found = list_runs(tmp_path)
    assert [record.folder.name for record in found.records] == ["whole"]
    for name in damage:
        assert any(name.split("\n")[0] in fault for fault in found.faults), name
    assert "\x1b" not in repr(found) and "<b>" not in found._repr_html_()


def test_the_card_has_the_figures_and_no_place(run):
    home, result, _ = run
    text = (result.adapter_dir / "README.md").read_text(encoding="utf-8")
    figures = json.loads((home / "first" / "metrics.json").read_text())
    assert f"| optimizer steps | {figures['steps']} |" in text
    for row in result.history.rows:
        assert f"| {row['step']} | {row['loss']:.4g} | {row['eval_loss']:.4g} |" in text
    scores = {r.metric_type: r.metric_value for r in ModelCard(text).data.eval_results}
    assert scores["loss"] == round(figures["after"]["loss"], 4)
    assert str(home) not in text
