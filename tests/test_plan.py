"""The memory plan against arithmetic, against real tensors, and against itself."""

import dataclasses
import gc
import json
import math
import os

import pytest
import torch
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoConfig,
    FalconConfig,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    ViTConfig,
)

from lorabook.config import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunConfig,
    TrainingSettings,
)
from lorabook.dryrun import Ledger, empty_model, enter_model
from lorabook.errors import ModelError, PlanError
from lorabook.hardware import Hardware
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.plan import Workload, _component, _mark_loss, plan_memory, plan_step, workload
from lorabook.testing import FAMILIES, save_tiny_model
from lorabook.train.trainer import create_trainer

A100 = Hardware("cuda", "A100", 1, 80 * 2**30, (8, 0))
T4 = Hardware("cuda", "T4", 1, 16 * 2**30, (7, 5))
CPU = Hardware("cpu", "CPU", 1, 2**34)
SHAPES = {  # as published
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "Phi-4-mini": Phi3Config(
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        pad_token_id=0,
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-32B": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}
PARAMETERS = {  # on the model cards, in billions
    "Qwen2.5-0.5B": 0.49,
    "Llama-3.2-1B": 1.24,
    "Phi-4-mini": 3.84,
    "Llama-3.1-8B": 8.03,
    "Qwen2.5-32B": 32.76,
}


# Arithmetic, with nothing of lorabook in it


def blocks(*sizes):
    "Bytes of some tensors, as a GPU's allocator rounds them."
    return sum(math.ceil(size / 512) * 512 for size in sizes)


def layers(config):
    "(inputs, outputs, whether there is a bias) of the linear layers in a transformer layer."
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    if config.model_type == "phi3":
        return [
            (width, q + 2 * kv, False),
            (q, width, False),
            (width, 2 * inner, False),
            (inner, width, False),
        ]
    bias = config.model_type == "qwen2"
    attention = [(width, q, bias), (width, kv, bias), (width, kv, bias), (q, width, False)]
    return attention + [(width, inner, False), (width, inner, False), (inner, width, False)]


def base_bytes(config, kind):
    "Bytes of the weights."
    width, n, total = config.hidden_size, config.num_hidden_layers, 0
    embeddings = 1 if config.tie_word_embeddings else 2
    total += embeddings * blocks(2 * config.vocab_size * width)
    total += (2 * n + 1) * blocks(2 * width)  # norms
    for inputs, outputs, bias in layers(config):
        size = inputs * outputs
        packed = {
            "none": [2 * size],
            "int8": [size, 4 * outputs],  # a scale for each output
            # 4 bits; 8 for 64 weights, and their mean; 32 for 256 of these; the 16 values
            "nf4": [size / 2, size / 64, 4, 4 * size / 64 / 256, 64],
        }
        total += n * (blocks(*packed[kind]) + (blocks(2 * outputs) if bias else 0))
    return total


def adapter_parts(config, r):
    "Numbers in each matrix of the adapter."
    pairs = [(r * inputs, r * outputs) for inputs, outputs, _ in layers(config)]
    return config.num_hidden_layers * [size for pair in pairs for size in pair]


# Plans that several tests look at


def short(name, n=2):
    "A published shape with fewer layers."
    config = SHAPES[name].__class__(**SHAPES[name].to_dict())
    config.num_hidden_layers = n
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n]
    return config


def settings(quantization="nf4", **lora):
    "A run with these settings."
    model = ModelSettings(name="shape", quantization=quantization)
    return RunConfig(model=model, lora=LoraSettings(**lora))


@pytest.fixture(scope="module")
def plans():
    "Plan two layers of Llama-3.1-8B, once for each choice; 2 x 256 tokens if nothing else is said."
    made = {}

    def plan(quantization="nf4", lora=(), n=2, evaluates=False, device=A100, **work):
        key = (quantization, lora, n, evaluates, device, *sorted(work.items()))
        if key not in made:
            work = Workload(**dict(rows=2, length=256, accumulates=True) | work)
            cfg = settings(quantization, **dict(lora))
            made[key] = plan_step(short("Llama-3.1-8B", n), cfg, work, device, evaluates)
        return made[key]

    return plan


# The parts


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_weights_of_published_shapes(name, kind):
    config, ledger = SHAPES[name], Ledger()
    model = empty_model(config, kind)
    with torch.device("meta"):
        model = setup_lora(model, LoraSettings(r=16))
    enter_model(model, ledger)
    gc.collect()  # what was needed on the way may hang in cycles
    held = {"base weights": 0, "adapter": 0}
    for number in ledger.alive.values():
        held[ledger.births[number][0]] += ledger.sizes[number]
    computed = base_bytes(config, kind)
    assert 0 <= held["base weights"] - computed <= 2048  # the frequencies of the positions
    assert held["adapter"] == blocks(*(4 * size for size in adapter_parts(config, 16)))
    if kind == "none":
        assert computed / 2e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.1-8B", "Phi-4-mini"])
def test_the_components_of_a_plan(name, kind):
    config, work = short(name), Workload(2, 256, accumulates=True)
    plan = plan_step(config, settings(kind, r=8), work, A100, evaluates=False)
    parts = plan.components
    assert 0 <= parts["base weights"] - base_bytes(config, kind) <= 2048
    assert parts["adapter"] == blocks(*(4 * size for size in adapter_parts(config, 8)))
    assert parts["gradients"] == parts["adapter"]
    assert parts["optimizer"] == 2 * parts["adapter"]
    assert parts["activations"] > 0
    assert plan.peak_bytes == sum(parts.values()) - parts["context"]


def test_logits_exist_in_parts(plans):
    vocabulary = SHAPES["Llama-3.1-8B"].vocab_size
    parts = plans(rows=4, checkpointing=1.0).components
    # of 256 positions at most: in 16 bits, and their softmax in 32
    assert parts["logits and loss"] <= (2 + 4) * 256 * vocabulary


def test_the_loss_of_the_model_holds_all_logits(plans):
    vocabulary, tokens = SHAPES["Llama-3.1-8B"].vocab_size, 2 * 256
    plan = plans(own_loss=True)
    # 32 bits each: log-probabilities, their gradients, and those of the logits
    wanted = 3 * 4 * tokens * vocabulary
    assert plan.components["logits and loss"] == pytest.approx(wanted, rel=0.01)
    assert plan.phase == "backward" and plan.peak_bytes > plans().peak_bytes + wanted / 2
    smoothed = RunConfig().override("training.label_smoothing_factor=0.1")
    assert workload(smoothed, A100).own_loss and not workload(RunConfig(), A100).own_loss


def test_an_evaluation_has_twice_the_rows(plans):
    plan = plans(evaluates=True, checkpointing=1.0, own_loss=True)
    vocabulary = SHAPES["Llama-3.1-8B"].vocab_size
    # logits in 16 bits, the same in 32, and the log-probabilities
    logits = (2 + 4 + 4) * 2 * 2 * 256 * vocabulary
    assert plan.phase == "evaluation loss"
    assert plan.components["logits and loss"] == pytest.approx(logits, rel=0.01)
    without = plans(checkpointing=1.0, own_loss=True)
    assert without.phases.items() <= plan.phases.items() and without.peak_bytes < plan.peak_bytes


def test_the_optimizer(plans):
    sizes = adapter_parts(short("Llama-3.1-8B"), 16)
    in_8_bits = 2 * (blocks(*sizes) + blocks(*(4 * (size // 256 + 1) for size in sizes)))
    assert plans(optimizer="adamw_8bit").components["optimizer"] == in_8_bits
    assert plans(optimizer="paged_adamw_8bit").components["optimizer"] == 0
    assert plans().components["optimizer"] == 2 * 4 * sum(sizes)


def test_gradients_wait_only_where_they_accumulate(plans):
    waiting, fresh = plans(), plans(accumulates=False)
    assert waiting.phases["forward"] - fresh.phases["forward"] == waiting.components["adapter"]
    assert fresh.peak_bytes <= waiting.peak_bytes


def test_what_stays_unquantized():
    sizes = dict(
        vocab_size=4096, hidden_size=256, num_hidden_layers=2, num_attention_heads=4
    ) | dict(intermediate_size=512, num_key_value_heads=4)

    def base(config, kind="nf4"):
        ledger, model = Ledger(), empty_model(config, kind)
        enter_model(model, ledger)
        return sum(ledger.sizes[number] for number in ledger.alive.values())

    tied, loose = (base(LlamaConfig(tie_word_embeddings=t, **sizes)) for t in (True, False))
    assert loose - tied == 2 * 4096 * 256  # the head, in 16 bits
    experts = MixtralConfig(num_local_experts=8, **sizes)
    kept = 2 * 8 * 3 * 256 * 512  # numbers in the experts, which are no layers
    assert 2 * kept < base(experts) < 2 * kept + 3 * 2 * 4096 * 256
    falcon = FalconConfig(num_attention_heads=4, **{k: sizes[k] for k in list(sizes)[:3]})
    assert base(falcon) == base(falcon, "none")  # its layers are of a class of its own


# The direction of every change


def test_more_needs_more(plans):
    for key, values in {"rows": (1, 2, 4), "length": (128, 256, 512)}.items():
        peaks = [plans(**{key: value}).peak_bytes for value in values]
        assert peaks == sorted(set(peaks)), key
    ranks = [plans(lora=lora).peak_bytes for lora in ((("r", 4),), (), (("r", 64),))]
    assert ranks == sorted(set(ranks))
    stored = [plans(quantization=kind).peak_bytes for kind in ("nf4", "int8", "none")]
    assert stored == sorted(set(stored))


def test_more_recomputing_never_needs_more(plans):
    for kind, shares in {"nf4": (0.0, 0.5, 1.0), "none": (0.0, 0.25, 0.75, 1.0)}.items():
        plan = lambda share: plans(quantization=kind, n=4, rows=1, checkpointing=share)
        peaks = [plan(share).peak_bytes for share in shares]
        assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0], kind


def test_packed_rows(plans):
    padded, packed = plans(), plans(packed=True)
    assert packed.peak_bytes == pytest.approx(padded.peak_bytes, rel=0.01)
    extra = {}  # where there is no kernel, packed rows need a mask
    for device in (T4, A100):
        both = [plans(device=device, packed=packed).phases["forward"] for packed in (True, False)]
        extra[device] = both[0] - both[1]
    assert extra[T4] - extra[A100] >= 2 * 256 * 256


def test_the_same_every_time():
    config, work = short("Qwen2.5-0.5B"), Workload(2, 128, checkpointing=0.5)
    first, second = (plan_step(config, settings(), work, A100) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


REMEMBERED = [(family, "nf4") for family in (*FAMILIES, "falcon", "mixtral", "gpt2")]


@pytest.mark.parametrize("family, kind", [*REMEMBERED, ("llama", "none"), ("llama", "int8")])
def test_what_is_remembered_is_what_torch_says(family, kind, monkeypatch, request):
    sizes = dict(vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=4, intermediate_size=96, pad_token_id=0)
    config, cfg = AutoConfig.for_model(family, **sizes), settings(kind, r=4)
    works = [Workload(2, 48, checkpointing=0.5)]
    if family in ("llama", "mixtral") or request.config.getoption("--slow"):
        works.append(Workload(1, 64, packed=True, own_loss=True))
    for work in works:
        quick = plan_step(config, cfg, work, A100)
        with monkeypatch.context() as slowly:
            slowly.setattr(Ledger, "_remember", lambda *args: None)
            slowly.setattr("lorabook.dryrun._gives", lambda function: "new")
            slow = plan_step(config, cfg, work, A100)
        assert dataclasses.asdict(quick) == dataclasses.asdict(slow)


# Where the config comes from


def test_a_folder_with_nothing_but_a_config(tmp_path):
    config = short("Llama-3.2-1B")
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    cfg = RunConfig().override(f"model.name={tmp_path}", "model.max_length=128")
    plan = plan_memory(cfg, A100)
    assert plan.components == plan_memory(cfg, A100, config).components
    assert str(tmp_path) in str(plan) and plan.work == workload(cfg, A100)


def test_what_cannot_be_planned(refused, tmp_path):
    small = dict(hidden_size=64, num_hidden_layers=2, vocab_size=500)
    work = Workload(2, 64, checkpointing=1.0)
    plan = lambda config, **change: plan_step(
        config, settings(), dataclasses.replace(work, **change), A100
    )
    with refused(ModelError, "not on this machine"):
        plan_memory(RunConfig().override("model.name=nobody/has-this"), A100)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with refused(ModelError, "no-such-type"):
        plan_memory(RunConfig().override(f"model.name={tmp_path}"), A100)
    with refused(PlanError, "'shape' can't be planned", "ViTConfig"):
        plan(ViTConfig())
    with refused(PlanError, "JetMoeForCausalLM does not support", "checkpointing"):
        plan(JetMoeConfig(**small))
    with refused(PlanError, "can't be planned", "depends on the numbers"):  # counts its tokens
        plan(JetMoeConfig(**small), checkpointing=0.0)
    with refused(PlanError, "Mamba"):  # PEFT adapts none of its layers
        plan(MambaConfig(**small))
    with refused(PlanError, "gptq"):
        plan(LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}, **small))


def test_a_model_that_was_stored_in_4_bits(plans):
    config = short("Llama-3.1-8B")
    config.quantization_config = dict(
        quant_method="bitsandbytes",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    plan = plan_step(config, settings("none"), plans().work, A100, evaluates=False)
    assert plan.components == plans().components


# Real tensors


class Watch(TorchDispatchMode):
    "Notes the results of real operations in a ledger."

    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, torch.Tensor):
                self.ledger.note(item)
        return result


def watched_step(trainer, rows, count):
    "A ledger of a real training step and an evaluation, and the storages of the gradients."
    model, ledger = trainer.model, Ledger()
    for tensor in [*model.parameters(), *model.buffers()]:
        ledger.phase = "adapter" if tensor.requires_grad else "base weights"
        ledger.note(tensor)
        if state := getattr(tensor, "quant_state", None):  # of 4 bits
            for part in (state.absmax, state.code, state.offset, state.state2.absmax):
                ledger.note(part)
    ledger.phase = "optimizer"
    for state in trainer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            ledger.note(state[name])
    _mark_loss(model, ledger)
    trained = [p for p in model.parameters() if p.requires_grad]
    cast = trainer.args.bf16 or trainer.args.fp16
    with Watch(ledger), disable_input_dtype_casting(model, cast):  # as `training_step` does
        ledger.phase = "forward"
        batch, items = trainer.data_collator(rows[:count]), torch.ones(())
        loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=items)
        del batch  # as the trainer does
        ledger.phase = "backward"
        trainer.accelerator.backward(loss)
        ledger.phase = "step"
        gradients = {ledger.alive[p.grad.untyped_storage()._cdata] for p in trained}
        for parameter in trained:
            parameter.grad = None
        del loss
    with Watch(ledger):
        ledger.phase = "evaluation"
        trainer.prediction_step(model.eval(), trainer.data_collator((2 * rows)[: 2 * count]), True)
    return ledger, gradients


CASES = [  # family, share of recomputed layers, compute dtype, storage, packed, and rows if not two
    *[(family, 0.0, "float32", "none", False) for family in FAMILIES],
    *[(family, 1.0, "bfloat16", "none", False) for family in ("gemma2", "gpt_neox")],
    ("llama", 0.5, "float32", "none", False),
    ("qwen2", 0.0, "float32", "none", True),
    ("llama", 1.0, "bfloat16", "nf4", False),
    ("qwen3", 0.0, "float32", "nf4", True),
    ("gpt_neox", 1.0, "float32", "int8", False),
    ("llama", 0.0, "float32", "none", False, 1),
    ("mistral", 1.0, "bfloat16", "nf4", False, 1),
]


def real_trainer(cfg, length, folder):
    "A trainer that has taken one step, and rows for another."
    model, tokenizer = setup_model(cfg.model.name, 0, cfg.model, CPU)
    rows = []
    for n in (length, length - (not cfg.data.packing)):
        ids = torch.randint(5, 900, [n]).tolist()
        rows.append({"input_ids": ids, "labels": ids, "length": n})
        if cfg.data.packing:
            rows[-1]["position_ids"] = [*range(n // 2)] * 2
    model, data = setup_lora(model, cfg.lora), Dataset.from_list(rows)
    trainer = create_trainer(model, tokenizer, data, None, folder, cfg.training)
    trainer.train()  # from the second step on, the optimizer has its state
    model.zero_grad()
    return trainer, rows


@pytest.mark.parametrize("case", CASES)
def test_a_real_step_takes_what_was_planned(case, tmp_path):
    family, share, dtype, kind, packed, count = (*case, 2)[:6]
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, head_dim=32)
    cfg = RunConfig(
        model=ModelSettings(
            name=save_tiny_model(tmp_path / "model", family, **sizes),
            max_length=192,
            quantization=kind,
            dtype=dtype,
        ),
        data=DataSettings(packing=packed),
        lora=LoraSettings(r=8),
        training=TrainingSettings(
            batch_size=count,
            gradient_accumulation_steps=1,
            max_steps=1,
            gradient_checkpointing=share if 0 < share < 1 else bool(share),
        ),
    )
    plan = plan_memory(cfg, CPU)
    trainer, rows = real_trainer(cfg, 192, str(tmp_path))
    ledger, gradients = watched_step(trainer, rows, count)

    peaks, vocabulary = ledger.peaks(), trainer.model.config.vocab_size
    for phase, planned in plan.phases.items():
        assert planned == pytest.approx(peaks[phase][0], rel=0.005), phase
    found = dict.fromkeys(plan.components, 0)
    for number in peaks[plan.phase][1]:
        found[_component(ledger, number, gradients, vocabulary)] += ledger.sizes[number]
    for part, planned in plan.components.items():
        assert planned == pytest.approx(found[part], rel=0.005, abs=0.003 * plan.peak_bytes), part


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_planning_leaves_no_trace(plans, kind):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plans(quantization=kind, checkpointing=1.0)
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
    assert type(torch.ones(2) + 1) is torch.Tensor
    weight = torch.randn(64, 64)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert type(state.state2.code) is torch.Tensor
    assert (dequantize_4bit(packed, state) - weight).abs().mean() < 0.2


# A large model in a process of its own

LARGE = """
import json, resource, sys
from transformers import LlamaConfig
from lorabook.config import RunConfig
from lorabook.hardware import Hardware
from lorabook.plan import plan_memory

a100 = Hardware("cuda", "A100", 1, 80 * 2**30, (8, 0))
cfg = RunConfig().override("model.max_length=128")
plan_memory(cfg, a100)  # imports what it needs
unit = 1 if sys.platform == "darwin" else 1024
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = used()
plan = plan_memory(cfg, a100, LlamaConfig(**json.loads(%r)))
print(json.dumps([used() - before, plan.components]))
"""


def test_planning_a_large_model_takes_little_memory(fresh):
    config = SHAPES["Llama-3.1-8B"]
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    sizes = {name: getattr(config, name) for name in [*names.split(), "num_key_value_heads"]}
    done = fresh(LARGE % json.dumps(sizes))
    assert done.returncode == 0, done.stderr
    grown, parts = json.loads(done.stdout)
    assert grown < 1e9
    assert 0 <= parts["base weights"] - base_bytes(config, "nf4") <= 2048
    assert parts["adapter"] == blocks(*(4 * size for size in adapter_parts(config, 16)))


FORKED = """
import os, torch
from concurrent.futures import ThreadPoolExecutor
from lorabook.plan import plan_memory

def train():
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()

for _ in range(2):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(plan_memory).result()
train()
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
train()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_plans_of_threads_leave_nothing_that_a_fork_trips_over(fresh):
    done = fresh(FORKED)
    assert done.returncode == 0, done.stderr
