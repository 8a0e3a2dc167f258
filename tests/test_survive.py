"""A run that is killed, damaged, starved or interrupted, and what is left of it."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from lorabook.config import LoraSettings, ModelSettings, RunConfig, TrainingSettings
from lorabook.errors import ConfigError, HardwareError, TrainingError, TrainingStopped
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.run import run_training
from lorabook.runfolder import read_run
from lorabook.train.callbacks import SaveBestCallback, StopCallback
from lorabook.train.checkpoint import only_run
from lorabook.train.loop import train_loop
from lorabook.train.trainer import create_trainer, get_history

ZYGOTE = '''
"""Imports once; then each line is a job, which runs in a forked process."""
import json, os, signal, sys, time
from lorabook.config import RunConfig
from lorabook.run import run_training

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            run_training(RunConfig().override(*job["changes"]), job["resume"] or None)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(3)
        os._exit(0)
    end = time.monotonic() + (job["kill"] or 1e9)
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.005)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
        found = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(found[1]), flush=True)
'''


@pytest.fixture(scope="module")
def zygote():
    "Runs a config in a process of its own, and kills it after so many seconds."
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", ZYGOTE], **pipes) as process:

        def run(changes, log, resume=False, kill=None):
            job = dict(changes=changes, log=str(log), resume=resume, kill=kill)
            print(json.dumps(job), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


def changes(rows, *more):
    "A short run: 16 steps of about 6 an epoch, with dropout, evaluations and checkpoints."
    settings = "max_steps=16", "batch_size=2", "gradient_accumulation_steps=2", "logging_steps=2"
    settings += "save_steps=4", "early_stopping_patience=null", "learning_rate=3e-3"
    base = [f"data.train_file={rows}", "model.quantization=none", "lora.r=4"]
    return [*base, *(f"training.{change}" for change in settings), *more]


def outcome(folder):
    "The adapter's weights and what was logged, of a finished run."
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = load_file(Path(metrics["adapter_dir"]) / "adapter_model.safetensors")
    state = json.loads((folder / "checkpoint-16" / "trainer_state.json").read_text())
    figures = "step", "loss", "eval_loss", "grad_norm", "learning_rate"
    return weights, [{k: row[k] for k in figures if k in row} for row in state["log_history"]]


def assert_same(folder, other):
    "Two runs ended with the same adapter, to the last bit, and the same history."
    (weights, history), (expected, expected_history) = outcome(folder), outcome(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert history == expected_history


@pytest.mark.parametrize("attention", ["sdpa", "eager"], ids=["end to end", "padded, by length"])
def test_killed_at_any_moment(attention, thirty, zygote, tmp_path, request):
    kills, chance = (15 if request.config.getoption("--slow") else 1), random.Random(0)
    whole = tmp_path / "whole"
    options = changes(thirty, f"model.attn_implementation={attention}")
    begun = time.monotonic()
    assert zygote([*options, f"output_dir={whole}"], tmp_path / "log") == 0
    seconds = time.monotonic() - begun
    done = 0
    while done < kills:
        folder, log = tmp_path / f"killed-{done}", tmp_path / f"log-{done}"
        here = [*options, f"output_dir={folder}"]
        begun = time.monotonic()
        code = zygote(here, log, kill=seconds * chance.uniform(0.3, 0.95))
        if code == 0:  # it had finished; the machine is less busy than it was
            seconds = time.monotonic() - begun
            shutil.rmtree(folder)
            continue
        assert code == -signal.SIGKILL, log.read_text()
        saved = any(folder.glob("checkpoint-*"))  # else it begins anew
        assert zygote(here, log, resume=saved) == 0, log.read_text()
        assert_same(folder, whole)
        done += 1


def test_interrupted_and_resumed(thirty, zygote, tmp_path):
    options = changes(thirty, "training.logging_steps=1", "training.eval_steps=2")
    whole, folder = tmp_path / "whole", tmp_path / "interrupted"
    assert zygote([*options, f"output_dir={whole}"], tmp_path / "log") == 0
    command = [sys.executable, "-c", "import sys; from lorabook.cli import main; sys.exit(main())"]
    arguments = ["run", *options, f"output_dir={folder}"]
    with subprocess.Popen(
        command + arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        text = ""
        while "step    5/16" not in text:
            line = process.stdout.readline()
            assert line, text
            text += line
        process.send_signal(signal.SIGINT)
        text += process.stdout.read()
    assert process.returncode == 130, text
    for part in ("The training was stopped after step", "SIGINT came", "saved: ", "--resume"):
        assert part in text
    assert not (folder / "metrics.json").exists()
    assert zygote([*options, f"output_dir={folder}"], tmp_path / "log", resume=True) == 0
    assert_same(folder, whole)


def test_sigterm(tmp_path, capsys):
    "What a scheduler sends before it takes the machine away; the second one doesn't wait."
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="after step 3 of 6: SIGTERM came"):
        make_trainer(tmp_path / "run", callbacks=[Damage(3, terminate)]).train()
    assert "finishing this step, then saving" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(
            tmp_path / "twice", callbacks=[Damage(3, lambda: (terminate(), terminate()))]
        ).train()
    assert not (tmp_path / "twice" / "checkpoint-3").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signal_in_the_middle_of_a_line(monkeypatch):
    "The stream is busy then, and refuses to be written to by the same thread."
    got, stopper = [], StopCallback()

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not stopper.reason:
                signal.raise_signal(signal.SIGINT)
            got.append(bytes(data))
            return len(data)

    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(Raw())))
    with stopper.listening():
        print("step 5", flush=True)
    while b"once more ends at once" not in b"".join(got):
        time.sleep(0.01)
    assert stopper.reason == "SIGINT came" and got[0] == b"step 5\n"


def test_finished_run_started_again(tmp_path, refused):
    trainer = make_trainer(tmp_path)
    trainer.train()
    with refused(TrainingError, "holds checkpoints of another training", "checkpoint-6"):
        make_trainer(tmp_path).train()
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)  # nothing is left to do
    for name, weight in trained(trainer).items():
        assert torch.equal(trained(again)[name], weight), name


def test_finished_run_resumed(thirty, zygote, tmp_path):
    "There is nothing left to train."
    options, log = changes(thirty, f"output_dir={tmp_path}/run"), tmp_path / "log"
    whole = changes(thirty, f"output_dir={tmp_path}/whole")
    assert zygote(whole, log) == zygote(options, log) == 0
    assert zygote(options, log, resume=True) == 0, log.read_text()
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / "checkpoint-17").exists()


def test_time_is_over(thirty, tmp_path):
    cfg = RunConfig().override(*changes(thirty), f"output_dir={tmp_path}/run")
    longer = cfg.override("training.max_time=1e-6", "training.max_steps=20")
    with pytest.raises(TrainingStopped, match="after step 1 of 20") as stopped:
        run_training(longer)
    assert "checkpoint-1" in str(stopped.value) and "resume_from_checkpoint=True" in str(
        stopped.value
    )
    assert read_run(tmp_path / "run").state == "stopped"
    result = run_training(cfg, resume_from_checkpoint=True)
    assert result.to_dict()["steps"] == 16
    card = (result.adapter_dir / "README.md").read_text(encoding="utf-8")
    for change in result.changes:
        assert f"* `{change}`" in card and "this repeats the run" not in card
    assert result.changes == ["training.max_steps: 20 when it began, 16 now"]
    record = read_run(tmp_path / "run")
    assert (record.state, record.resumed_from) == ("finished", "checkpoint-1")


def test_second_run_into_the_same_folder(thirty, zygote, tmp_path):
    with only_run(tmp_path / "run"):
        code = zygote([*changes(thirty), f"output_dir={tmp_path}/run"], tmp_path / "log")
    assert code == 3 and "Another run is writing" in (tmp_path / "log").read_text()


class Damage(TrainerCallback):
    "Does something after a step."

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 200 MB, where one may be mounted."
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_disk_full(thirty, small_disk, refused):
    "The disk is full at the third checkpoint; the two before it are whole, and it goes on later."
    folder, filler = small_disk / "run", small_disk / "filler"

    def fill():
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass

    cfg = RunConfig().override(*changes(thirty), f"output_dir={folder}")
    with refused(TrainingError, "checkpoint-10 can't be written", "untouched: checkpoint-"):
        run_training(cfg, callbacks=[Damage(9, fill)])
    assert not (folder / ".saving").exists()
    with refused(ConfigError, "too small for the checkpoints", "0 B free", "save_total_limit"):
        run_training(cfg, resume_from_checkpoint=True)
    filler.unlink()
    assert run_training(cfg, resume_from_checkpoint=True).to_dict()["steps"] == 16


def test_no_right_to_write(thirty, refused):
    with refused(ConfigError, "`output_dir` can't be written to", "/proc/run"):
        run_training(RunConfig().override(*changes(thirty), "output_dir=/proc/run"))


def test_damaged_checkpoints(thirty, zygote, tmp_path):
    options, log = changes(thirty, f"output_dir={tmp_path}/run"), tmp_path / "log"
    whole = changes(thirty, f"output_dir={tmp_path}/whole")
    assert zygote(whole, log) == zygote(options, log) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    listed = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    os.truncate(listed[-1] / "optimizer.pt", 1000)
    (listed[-2] / "adapter_model.safetensors").unlink()
    assert zygote(options, log, resume=True) == 0, log.read_text()
    text = log.read_text()
    assert f"passed over: {listed[-1].name}: optimizer.pt has 1,000 bytes" in text
    assert f"passed over: {listed[-2].name}: adapter_model.safetensors is missing" in text
    assert_same(tmp_path / "run", tmp_path / "whole")


def make_parts(attention="sdpa", dropout=0.0):
    "A model with an adapter, its tokenizer, and twelve rows of different lengths."
    model, tokenizer = setup_model(
        cfg=ModelSettings(quantization="none", attn_implementation=attention)
    )
    model = setup_lora(model, LoraSettings(r=4, dropout=dropout))
    lengths = [5, 60, 17, 33, 8, 41, 12, 27, 50, 9, 22, 38]
    ids = [[(7 * i + j) % 900 + 10 for j in range(n)] for i, n in enumerate(lengths)]
    data = Dataset.from_list(
        [{"input_ids": x, "labels": [-100, *x[1:]], "length": len(x)} for x in ids]
    )
    return model, tokenizer, data


def make_settings(**settings):
    "Six steps of four times two rows, of which there are two in an epoch."
    values = dict(max_steps=6, logging_steps=1, save_steps=2, learning_rate=1e-3)
    values |= dict(batch_size=4, gradient_accumulation_steps=2, early_stopping_patience=None)
    return TrainingSettings(**values | settings)


def make_trainer(folder, seed=0, attention="sdpa", callbacks=None, **settings):
    "A trainer of these rows, in their order, without dropout."
    model, tokenizer, data = make_parts(attention)
    cfg = make_settings(**dict(train_sampling_strategy="sequential") | settings)
    return create_trainer(model, tokenizer, data, data, str(folder), cfg, seed, callbacks)


def trained(trainer):
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"], ids=["end to end", "padded"])
def test_out_of_memory_in_the_middle_of_a_step(attention, tmp_path, capsys):
    "On the way back of the second micro-batch of step 3, with half of the gradients there."
    small = dict(batch_size=2, gradient_accumulation_steps=4)
    expected = make_trainer(tmp_path / "small", attention=attention, **small)
    expected.train()
    trainer = make_trainer(tmp_path / "large", attention=attention)
    calls = []

    def fail(gradient):
        calls.append(trainer.state.global_step)
        if calls.count(2) == 2 and len(calls) == 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    first = next(p for p in trainer.model.parameters() if p.requires_grad)
    first.register_hook(fail)
    trainer.train()
    assert trainer.micro.times == {"training": 1, "evaluation": 0}
    assert "are cut into 2 parts from here on" in capsys.readouterr().out
    ours, theirs = (get_history(t).column("loss")[1] for t in (trainer, expected))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, weight in trained(expected).items():
        assert torch.allclose(trained(trainer)[name], weight, atol=1e-5), name


def test_out_of_memory_in_an_evaluation(tmp_path):
    trainer, expected = (make_trainer(tmp_path / name, max_steps=1) for name in "ab")
    usual, limit = trainer.compute_loss, 100

    def limited(model, inputs, *args, **kwargs):
        if not model.training and inputs["labels"].numel() > limit:
            raise MemoryError("can't allocate memory")
        return usual(model, inputs, *args, **kwargs)

    trainer.compute_loss = limited
    trainer.train(), expected.train()
    assert trainer.micro.times["evaluation"] > 0
    ours, theirs = (get_history(t).column("eval_loss")[1] for t in (trainer, expected))
    assert ours == pytest.approx(theirs, rel=1e-5)


def run_out(trainer):
    "Let memory run out with more than thirty tokens at once."
    usual = trainer.compute_loss

    def limited(model, inputs, *args, **kwargs):
        if inputs["labels"].numel() > 30:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return usual(model, inputs, *args, **kwargs)

    trainer.compute_loss = limited


def test_out_of_memory_with_one_conversation(tmp_path, refused):
    trainer = make_trainer(tmp_path)
    run_out(trainer)
    with refused(HardwareError, "with 60 tokens at once", "a single conversation"):
        trainer.train()


def poison_row_11(trainer):
    "From step 4 on, the loss of this row is not a number."
    usual, poison = trainer.compute_loss, 7 * 11 + 37 + 10  # the last token of row 11, in no other

    def poisoned(model, inputs, *args, **kwargs):
        loss = usual(model, inputs, *args, **kwargs)
        bad = model.training and (inputs["input_ids"] == poison).any()
        return loss * torch.nan if bad and trainer.state.global_step >= 3 else loss

    trainer.compute_loss = poisoned


def test_loss_that_is_not_a_number(tmp_path, refused):
    trainer = make_trainer(tmp_path)
    poison_row_11(trainer)
    with refused(TrainingError, "not a number, in step 4", "training row 11", "saved before is in"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trained(trainer).values())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_gradient_that_is_not_a_number(tmp_path, refused):
    trainer = make_trainer(tmp_path)
    first = next(p for p in trainer.model.parameters() if p.requires_grad)
    first.register_hook(lambda g: g * (torch.inf if trainer.state.global_step == 1 else 1))
    with refused(TrainingError, "not a number, in step 2", "each row alone has a finite loss"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trained(trainer).values())


def test_clock_that_is_set_back(tmp_path, monkeypatch):
    usual = time.time
    back = Damage(3, lambda: monkeypatch.setattr(time, "time", lambda: usual() - 3600))
    touched = lambda: [os.utime(p, (0, 0)) for p in tmp_path.glob("checkpoint-*")]
    trainer = make_trainer(tmp_path, callbacks=[back, Damage(5, touched)], save_total_limit=2)
    trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert "checkpoint-6" in kept and len(kept) <= 3
    again = make_trainer(tmp_path, max_steps=7)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7


def test_best_is_kept_and_loaded(tmp_path):
    "The best evaluation falls between two regular checkpoints."
    trainer = make_trainer(tmp_path, eval_steps=1, save_steps=3, save_total_limit=1)
    usual, made = trainer.evaluate, iter([5.0, 1.0, 4.0, 3.0, 2.0, 2.5])

    def evaluate(*args, **kwargs):
        metrics = usual(*args, **kwargs)
        metrics["eval_loss"] = next(made)
        return metrics

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    for name, weight in trained(trainer).items():
        assert torch.equal(weight, weights[name.replace(".default", "")])


def test_callback_that_fails(tmp_path, refused):
    trainer = make_trainer(tmp_path, callbacks=[Damage(2, lambda: 1 / 0)])
    with refused(TrainingError, "The callback Damage failed in `on_step_end`", "division by zero"):
        trainer.train()


def test_early_stopping_goes_on_counting(tmp_path, capsys):
    "No evaluation is better than the first; the third of these ends it, in whichever process."
    settings = dict(max_steps=12, eval_steps=1, early_stopping_patience=3, learning_rate=1e-30)
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    said = "Step 1 is kept: no later one was better, so the training ended after step 4."
    assert said in capsys.readouterr().out
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.add_callback(Damage(2, trainer.stopper.stop))
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.state.global_step == 3
    for _ in range(2):  # once more, when there is nothing left to do
        again = make_trainer(tmp_path / "run", **settings)
        again.train(resume_from_checkpoint=True)
        assert whole.state.global_step == again.state.global_step == 4


def run_loop(folder, callbacks=None, resume=None, attention="sdpa", **settings):
    "The plain loop over these rows, with dropout: its model and its history."
    model, tokenizer, data = make_parts(attention, dropout=0.1)
    cfg = make_settings(**settings)
    return model, train_loop(model, tokenizer, data, data, folder, cfg, 0, callbacks, resume)


def without_clock(history):
    return [{k: row[k] for k in row if k not in ("tokens_per_second", "idle")} for row in history]


@pytest.mark.parametrize("attention", ["sdpa", "eager"], ids=["end to end", "padded, by length"])
def test_loop_goes_on_bit_for_bit(attention, tmp_path, refused):
    "After a failure in the second epoch; a checkpoint damaged since then is passed over."
    settings = dict(attention=attention, max_steps=8, eval_steps=1)
    model, history = run_loop(tmp_path / "whole", **settings)
    with refused(TrainingError, "The callback Damage failed", "division by zero"):
        run_loop(tmp_path / "run", [Damage(5, lambda: 1 / 0)], **settings)
    os.truncate(tmp_path / "run" / "checkpoint-4" / "loop.pt", 1000)
    again, resumed = run_loop(tmp_path / "run", resume=True, **settings)
    assert without_clock(resumed.rows) == without_clock(history.rows)
    for (name, weight), expected in zip(again.named_parameters(), model.parameters()):
        assert torch.equal(weight, expected), name


def test_loop_goes_on_counting(tmp_path, refused):
    "No evaluation is better than the first; what the callbacks counted so far is kept."
    settings = dict(max_steps=12, eval_steps=1, early_stopping_patience=3, learning_rate=1e-30)
    settings |= dict(save_steps=1)
    _, whole = run_loop(tmp_path / "whole", **settings)
    best = tmp_path / "best"
    with refused(TrainingError, "The callback Damage failed"):
        run_loop(tmp_path / "run", [SaveBestCallback(best), Damage(3, lambda: 1 / 0)], **settings)
    shutil.rmtree(best)
    for _ in range(2):  # once more, when there is nothing left to do
        _, resumed = run_loop(tmp_path / "run", [SaveBestCallback(best)], True, **settings)
        assert whole.rows[-1]["step"] == resumed.rows[-1]["step"] == 4
    assert not best.exists()


def test_loop_that_is_prolonged(tmp_path):
    run_loop(tmp_path, max_steps=2)
    _, history = run_loop(tmp_path, resume=True, max_steps=5)
    assert history.rows[-1]["step"] == 5
    _, again = run_loop(tmp_path, resume=True, max_steps=5)  # nothing left to do
    assert without_clock(again.rows) == without_clock(history.rows)


def test_loop_and_gradients_that_are_not_clipped(tmp_path):
    "`max_grad_norm: 0` means no limit, as for the trainer."
    (_, free), (_, limited) = (
        run_loop(tmp_path / str(limit), max_grad_norm=limit) for limit in (0, 1e9)
    )
    assert without_clock(free.rows) == without_clock(limited.rows)
    assert free.rows[-1]["loss"] < free.rows[0]["loss"]


def test_the_guide_names_these_tests(root):
    "Each row of the table in the guide says where its fault is tested."
    text = (root / "nbs" / "guides" / "09_what_goes_wrong.ipynb").read_text(encoding="utf-8")
    named = set(re.findall(r"\btest_\w+", text)) - {"test_survive"}
    assert len(named) > 15
    assert named <= set(globals()), named - set(globals())
