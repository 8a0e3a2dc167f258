"""From the command line to an adapter that plain PEFT loads, and again, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorabook.cli import main
from lorabook.config import ModelSettings, RunConfig, builtin_path
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.run import run_training

SHORT = (
    "training.max_steps=4",
    "training.logging_steps=2",
    "training.batch_size=8",
    "training.gradient_accumulation_steps=1",
)


def lorabook(*arguments, **env):
    "Run the command."
    script = shutil.which("lorabook", path=Path(sys.executable).parent)
    code = "import sys; from lorabook.cli import main; sys.exit(main())"
    command = [script] if script else [sys.executable, "-c", code]
    settings = dict(env=os.environ | env, capture_output=True, text=True)
    return subprocess.run([*command, *arguments], **settings)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    "The output folder of a short built-in run."
    folder = tmp_path_factory.mktemp("run") / "first"
    few = "data.split=[0.97, 0.015, 0.015]"  # test rows take the most time
    result = lorabook("run", *SHORT, few, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def adapter(output):
    "The adapter's folder of that run."
    return Path(json.loads((output / "metrics.json").read_text())["adapter_dir"])


def test_records_of_a_run(output, adapter):
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    cfg = RunConfig.from_yaml(output / "run.yaml")
    assert (cfg.training.max_steps, cfg.output_dir) == (4, str(output))
    assert cfg.versions["torch"] == metrics["versions"]["torch"]
    assert torch.__version__.split("+")[0] == cfg.versions["torch"].split("+")[0]
    assert RunConfig.from_yaml(adapter / "run.yaml") == cfg


def test_adapter_loads_without_lorabook(adapter, fresh):
    result = fresh(f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(adapter)!r})
base = AutoModelForCausalLM.from_pretrained({builtin_path("model")!r})
model = PeftModel.from_pretrained(base, {str(adapter)!r})
inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "Hi"}}], return_dict=True,
                                       add_generation_prompt=True, return_tensors="pt")
trained = model(**inputs).logits
with model.disable_adapter(): base = model(**inputs).logits
assert trained.isfinite().all() and not torch.equal(trained, base)
assert tokenizer.chat_template and "lorabook" not in sys.modules
print("loaded", model.active_adapter)
""")
    assert "loaded default" in result.stdout, result.stderr


def test_run_yaml_repeats_the_run(output, adapter):
    second = output.parent / "second"
    result = lorabook("run", str(output / "run.yaml"), f"output_dir={second}")
    assert result.returncode == 0, result.stderr
    first_weights = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(second / adapter.name / "adapter_model.safetensors")
    assert weights.keys() == first_weights.keys()
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert all(torch.equal(weights[name], first_weights[name]) for name in weights)


def test_own_conversations(tmp_path):
    rows = [
        [("user", f"What is {i} plus 1?"), ("assistant", str(i + 1)), ("user", "Sure?")]
        + [("assistant", "Yes.")]
        for i in range(30)
    ]
    path = tmp_path / "mine.jsonl"
    with path.open("w") as file:
        for row in rows:
            messages = [{"role": role, "content": content} for role, content in row]
            print(json.dumps({"messages": messages}), file=file)
    changes = [f"data.train_file={path}", "data.system_prompt=You add.", f"output_dir={tmp_path}/o"]
    result = run_training(RunConfig().override(*SHORT, *changes))
    assert result.after.loss < result.before.loss
    prompt, reference, _ = result.after.answers[0]
    assert prompt[0] == {"role": "system", "content": "You add."}
    assert (prompt[-1]["content"], reference) == ("Sure?", "Yes.")
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["lora.rr=3"], ["Unknown key `lora.rr`", "rr: 3", "Did you mean `r`?"]),
        (["nowhere.yaml"], ["nowhere.yaml can't be read", "No such file", "YAML file"]),
        (["a.yaml", "b.yaml"], ["More than one config file", "a.yaml, b.yaml", "Give one"]),
        ([f"output_dir={__file__}/x"], ["`output_dir`", "test_end_to_end.py", "Give a folder"]),
        (["data.train_file=nowhere.jsonl"], ["'nowhere.jsonl'", "looked in", "`data.train_file`"]),
        (["--resume-from", "nowhere"], ["nowhere", "checkpoint"]),
        (["--resume"], ["no checkpoint", "outputs"]),
    ],
    ids=["key", "no file", "two files", "output folder", "data", "checkpoint", "no checkpoint"],
)
def test_error_at_the_command_line(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *arguments]) == 2
    message = capsys.readouterr().err
    for part in ("\nerror: ", "\n  found: ", "\n  to do: ", *parts):
        assert part in message


def test_a_pipe_that_knows_few_characters():
    done = lorabook("plan", PYTHONIOENCODING="cp1252")  # as Windows has it
    assert done.returncode == 0, done.stderr[-2000:]
    assert "??????" in done.stdout  # the bars


def test_error_has_no_traceback():
    result = lorabook("run", "lora.rr=3")
    assert result.returncode == 2
    assert "error: Unknown key `lora.rr`.\n  found: rr: 3\n  to do: " in result.stderr
    assert "Traceback" not in result.stderr


def test_evaluation_leaves_gradients_alone():
    model = setup_lora(setup_model(cfg=ModelSettings(quantization="nf4"))[0])
    ids = torch.arange(5, 85).view(2, 40)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.inference_mode():
        model(input_ids=ids)
    after = gradients()
    assert any(gradient.any() for gradient in before.values())
    for name, gradient in before.items():
        assert (after[name] - gradient).norm() <= 0.01 * gradient.norm(), name
