"""Two processes train as one does, with layers shared out or not, and survive each other's end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from test_survive import (
    Damage,
    assert_same,
    changes,
    make_trainer,
    poison_row_11,
    run_out,
    trained,
    zygote,
)

from lorabook.config import RunConfig
from lorabook.errors import ConfigError, LorabookError
from lorabook.processes import is_first, process_number
from lorabook.run import run_training
from lorabook.testing import in_processes
from lorabook.train.callbacks import SamplesCallback
from lorabook.train.loop import train_loop
from lorabook.train.trainer import get_history

__all__ = ["zygote"]  # a fixture
COMMAND = [sys.executable, "-c", "import sys; from lorabook.cli import main; sys.exit(main())"]


def train(folder, prepare=lambda trainer: None, **settings):
    "Losses and weights of a training of twelve rows, or the message of its error."
    trainer = make_trainer(folder, **settings)
    prepare(trainer)
    try:
        trainer.train()
    except LorabookError as error:
        return str(error)
    history = get_history(trainer)
    losses = history.column("loss")[1], history.column("eval_loss")[1]
    weights = {name: weight.numpy() for name, weight in trained(trainer).items()}
    return losses, weights, trainer.micro.times["training"]


UNEVEN = dict(batch_size=5, gradient_accumulation_steps=2)  # twelve rows: a second step of two
CASES = {
    "end to end": dict(),
    "a last partial batch": UNEVEN,
    "padded, by length": UNEVEN
    | dict(attention="eager", train_sampling_strategy="group_by_length"),
    "in random order": UNEVEN | dict(train_sampling_strategy="random"),
    "smaller micro-batches": dict(gradient_accumulation_steps=1),
    "the model's own loss": UNEVEN
    | dict(prepare=lambda trainer: setattr(trainer, "own_loss", "it")),
}


ALIKE = "end to end", "padded, by length", "in random order"  # how layers are shared, is the same


def also_shared(case):
    "A case with layers shared out, behind the slow flag where another case does the same."
    return pytest.param(case, True, marks=[pytest.mark.slow] if case in ALIKE else [])


@pytest.mark.parametrize(
    "case, fsdp", [*((case, False) for case in CASES), *map(also_shared, CASES)]
)
def test_two_processes_train_as_one(case, fsdp, tmp_path):
    (expected, weights, _), *_ = in_processes(partial(train, tmp_path / "one", **CASES[case]), 1)
    both = in_processes(partial(train, tmp_path / "two", fsdp=fsdp, **CASES[case]))
    for losses, found, _ in both:
        for ours, theirs in zip(losses, expected):
            assert len(theirs) > 2 and ours == pytest.approx(theirs, rel=1e-5)
        for name, weight in weights.items():
            assert abs(found[name] - weight).max() < 1e-5, name


def test_label_smoothing(tmp_path):
    "A mean over each process' rows, of which the last step has none in one of them."
    settings = UNEVEN | dict(label_smoothing_factor=0.1, max_steps=2)
    (expected, _, _), *_ = in_processes(partial(train, tmp_path / "one", **settings), 1)
    (found, _, _), _ = in_processes(partial(train, tmp_path / "two", **settings))
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-5)
    assert found[1][0] == pytest.approx(expected[1][0], rel=1e-5)


def test_memory_runs_out_in_one_of_them(tmp_path):
    def fail_once(trainer):
        def fail(gradient):
            if process_number() == 1 and trainer.state.global_step == 2 and not trainer.failed:
                trainer.failed = True
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

        trainer.failed = False
        next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(fail)

    (expected, _, _), *_ = in_processes(partial(train, tmp_path / "one"), 1)
    first, second = in_processes(partial(train, tmp_path / "two", fail_once))
    assert (first[2], second[2]) == (0, 1)
    assert first[0] == second[0] and first[0][0] == pytest.approx(expected[0], rel=1e-5)


def test_memory_runs_out_where_layers_are_shared(tmp_path):
    for message in in_processes(partial(train, tmp_path, run_out, fsdp=True)):
        assert "Memory ran out in training" in message and "have to stay in step" in message


def test_loss_of_one_of_them_is_not_a_number(tmp_path):
    one, other = in_processes(partial(train, tmp_path, poison_row_11))
    assert one == other and "not a number, in step 4" in one and "training row 11" in one


def test_stopped_in_one_of_them(tmp_path):
    "Both end after the same step, and one alone goes on."
    whole = make_trainer(tmp_path / "whole")
    whole.train()

    def stop(trainer):
        if process_number() == 1:
            trainer.add_callback(Damage(2, trainer.stopper.stop))

    folder = tmp_path / "run"
    for message in in_processes(partial(train, folder, stop)):
        assert "stopped after step 3 of 6" in message and "checkpoint-3" in message
    assert (folder / "checkpoint-3" / "adapter_model.safetensors").stat().st_size < 1e6
    alone = make_trainer(folder)
    alone.train(resume_from_checkpoint=True)
    ours, theirs = (get_history(t).column("loss") for t in (alone, whole))
    assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_rows_that_cannot_be_shared(tmp_path):
    def build():
        try:
            make_trainer(tmp_path, batch_size=3, gradient_accumulation_steps=1)
        except LorabookError as error:
            return str(error)

    for message in in_processes(build):
        assert "The 3 rows of an optimizer step can't be shared by 2 processes" in message


def flat(scores):
    "Scores, and the ends of their intervals."
    ends = {(name, i): pair[i] for name, pair in scores["intervals"].items() for i in (0, 1)}
    return {name: value for name, value in scores.items() if name != "intervals"} | ends


def test_whole_run(thirty, tmp_path):
    "Scores, files and output of a run in two processes; quantized layers shared out."
    options = changes(thirty, "training.max_steps=4", "lora.dropout=0", "model.quantization=nf4")

    def run(name, *more):
        cfg = RunConfig().override(*options, *more, f"output_dir={tmp_path / name}")
        return run_training(cfg).to_dict()

    (expected,) = in_processes(partial(run, "one"), 1)
    for name, more in {"two": [], "shared": ["training.fsdp=true"]}.items():
        for found in in_processes(partial(run, name, *more)):
            for when in ("before", "after"):
                assert flat(found[when]) == pytest.approx(flat(expected[when]), rel=1e-4)
            planned, measured = found["planned_tensor_bytes"], found["measured_tensor_bytes"]
            assert measured == pytest.approx(planned, rel=0.1)
        assert (tmp_path / name / "metrics.json").exists()


def test_adapter_of_shared_layers_loads_alone(thirty, tmp_path):
    from lorabook.export.save import load_adapter

    options = changes(thirty, "training.max_steps=4", "training.fsdp=true")
    cfg = RunConfig().override(*options, f"output_dir={tmp_path}/run")
    result, _ = in_processes(lambda: run_training(cfg))
    model, _ = load_adapter(result.adapter_dir)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def start(options, *more):
    "`lorabook launch` in a process group of its own."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [*COMMAND, "launch", *options, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, start_new_session=True, env=environment, **pipes)


def read_until(process, words):
    "What a process prints up to a line with these words."
    text = ""
    while words not in text:
        line = process.stdout.readline()
        assert line, text
        text += line
    return text


@pytest.fixture(scope="module")
def undisturbed(thirty, tmp_path_factory):
    "Changes of a run in two processes, and the folder of one that ran to its end."
    options = changes(thirty, "training.logging_steps=1", "training.eval_steps=4")
    folder = tmp_path_factory.mktemp("undisturbed")
    cfg = RunConfig().override(*options, f"output_dir={folder}")
    in_processes(lambda: run_training(cfg))
    return options, folder


def test_launcher_is_told_to_stop(undisturbed, tmp_path):
    (options, whole), folder = undisturbed, tmp_path / "run"
    with start(options, f"output_dir={folder}", "--nproc", "2") as process:
        text = read_until(process, "step    5/16")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and to all
        text += process.stdout.read()
    assert process.returncode == 130, text
    assert "finishing this step, then saving" in text and "The training was stopped" in text
    with start(options, f"output_dir={folder}", "--nproc", "2", "--resume") as process:
        text = process.stdout.read()
    assert process.returncode == 0, text
    assert len(re.findall("goes on from", text)) == 1
    assert_same(folder, whole)


def test_stopped_before_it_begins(thirty, tmp_path):
    with start(changes(thirty), f"output_dir={tmp_path}/run", "--nproc", "2") as process:
        text = read_until(process, "[1/6] data")
        os.killpg(process.pid, signal.SIGINT)
        text += process.stdout.read()
    assert process.returncode == 130, text
    assert "SIGINT came" in text


def test_launcher_is_killed(thirty, tmp_path):
    "Its processes save, and end."
    options = changes(thirty, "training.max_steps=2000", "training.logging_steps=1")
    with start(options, f"output_dir={tmp_path}/run", "--nproc", "2") as process:
        read_until(process, "step    5/2000")
        workers = psutil.Process(process.pid).children()
        process.kill()
        process.stdout.read()  # to its end: nobody is left that could write
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    assert any((tmp_path / "run").glob("checkpoint-*"))


def is_open(port):
    "Whether something listens on a port of this machine."
    with socket.socket() as one:
        return one.connect_ex(("localhost", port)) == 0


@pytest.mark.slow  # eight processes, one after another
def test_machine_that_is_lost(undisturbed, tmp_path):
    "Two launchers on this machine stand for two hosts; one is killed, and started again."
    (options, whole), folder = undisturbed, tmp_path / "run"
    port = 29000 + os.getpid() % 900
    more = [f"output_dir={folder}", "--nproc", "1", "--nnodes", "2", "--max-restarts", "3"]
    more += ["--rdzv-endpoint", f"localhost:{port}"]
    host = start(options, *more)
    while not is_open(port):  # so that this one keeps the meeting place
        time.sleep(0.1)
        assert host.poll() is None, host.stdout.read()
    other = start(options, *more)
    try:
        while not any(folder.glob("checkpoint-*")):
            time.sleep(0.1)
            assert host.poll() is None, host.stdout.read()
        os.killpg(other.pid, signal.SIGKILL)
        other.communicate()
        other = start(options, *more)
        text, _ = host.communicate(timeout=200)
        assert host.returncode == 0, text
        assert "goes on from" in text
        assert other.wait(60) == 0
    finally:
        for process in (host, other):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert_same(folder, whole)


def test_first_process_speaks_alone(thirty, tmp_path, capfd):
    options = changes(thirty, "training.max_steps=2")
    cfg = RunConfig().override(*options, f"output_dir={tmp_path}/run")
    assert in_processes(lambda: run_training(cfg) is not None and is_first()) == [True, False]
    assert capfd.readouterr().out.count("[4/6] train") == 1


def test_samples_while_layers_are_shared(tmp_path):
    "The processes generate together, and train on."

    def ask(trainer):
        trainer.add_callback(SamplesCallback(trainer.processing_class, ["I have a cough."], 2))

    (expected, _, _), *_ = in_processes(partial(train, tmp_path / "one"), 1)
    (found, _, _), _ = in_processes(partial(train, tmp_path / "two", ask, fsdp=True))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_plain_loop_is_for_one_process(thirty, tmp_path):
    def loop():
        with pytest.raises(ConfigError, match="The plain loop is for one process"):
            train_loop(None, None, None, output_dir=tmp_path)

    in_processes(loop)
