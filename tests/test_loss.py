"""The loss on the trained positions is that of the model's own forward, and so is its gradient."""

import copy
import json

import bitsandbytes
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils.operations import convert_outputs_to_fp32
from conftest import stir
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING

from lorabook.data.batch import PadCollator
from lorabook.data.pack import PackCollator
from lorabook.errors import ModelError
from lorabook.model import loss as module
from lorabook.model.adapter import recompute_layers
from lorabook.model.loss import Tail, check_loss, measure_tail, trained_loss
from lorabook.testing import FAMILIES, tiny_model

CASES = [
    *((family, {}) for family in FAMILIES if family != "gemma2"),
    ("llama", dict(tie_word_embeddings=True)),
    ("gemma2", dict(final_logit_softcapping=3.0)),
    ("gemma2", dict(final_logit_softcapping=None, tie_word_embeddings=False)),
    ("gemma3_text", dict(final_logit_softcapping=3.0)),
    ("cohere", dict(logit_scale=0.25)),
    ("cohere2", dict(logit_scale=4.0, tie_word_embeddings=False)),
    ("granite", dict(logits_scaling=8.0)),
    ("hyperclovax", dict(logits_scaling=0.3)),
    ("minicpm3", dict(dim_model_base=16)),
    ("nanochat", dict(final_logit_softcapping=3.0)),
    ("phi", {}),
    ("gptj", dict(n_embd=32, n_head=2, n_layer=2, rotary_dim=16)),
    ("gpt2", dict(n_embd=32, n_head=2, n_layer=2)),
    ("bloom", dict(n_layer=2, n_head=2)),
    ("mixtral", dict(num_local_experts=4)),
    ("mamba", {}),
]


def named(family, config):
    "A case with a name, which is skipped where an older transformers lacks the family."
    lacks = pytest.mark.skipif(family not in CONFIG_MAPPING, reason=f"no {family} in transformers")
    return pytest.param(
        family, config, marks=lacks, id=" ".join([family, *map(str, config.values())])
    )


CASES = [named(*case) for case in CASES]


def lively(family="llama", **config):
    "A tiny model whose logits are large enough for a cap, and whose biases are not zero."
    model = tiny_model(family, 128, use_cache=False, **config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    return model


def lora(**options):
    "An adapter of which every weight gets a gradient, once `stir` was called."
    return LoraConfig(**dict(r=2, target_modules="all-linear") | options)


def adapted(family="llama", config=None, **options):
    "The same with an adapter; without dropout, unless it is switched on."
    if family == "mamba":
        options["target_modules"] = ["in_proj", "x_proj"]
    return stir(get_peft_model(lively(family, **config or {}), lora(**options)), 0.1).eval()


def rows(*lengths, vocabulary=128, prompt=4):
    random = torch.Generator().manual_seed(len(lengths))
    ids = [torch.randint(3, vocabulary, [n], generator=random).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]


PADDED = PadCollator(0, 8)(rows(21, 13, 9))
PADDED["labels"][2, 0] = 5  # a label that nothing predicts
TRAINED = (PADDED["labels"][:, 1:] != -100).sum().item()


def gradient_of(loss, model):
    "Of all that is trained, in one piece."
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten().float() for part in parts])


def own_loss(model, batch, num_items=None):
    items = {} if num_items is None else {"num_items_in_batch": num_items}
    return model(**batch, **items).loss


def assert_same(model, batch=PADDED, num_items=None, rel=2e-6):
    "Both losses and gradients agree; the random numbers are the same for both."
    results = []
    for compute in (own_loss, trained_loss):
        torch.manual_seed(0)
        loss = compute(model, batch, num_items)
        results.append((loss, gradient_of(loss, model)))
    (theirs, wanted), (ours, gradient) = results
    assert ours.dtype is torch.float32 and ours.shape == ()
    assert ours.item() == pytest.approx(theirs.item(), rel=rel)
    assert wanted.norm() > 0
    assert (gradient - wanted).norm() < 5 * rel * wanted.norm()


@pytest.mark.parametrize("family, config", CASES)
def test_families(family, config):
    model = adapted(family, config)
    assert_same(model)
    assert check_loss(model) is None


@pytest.mark.parametrize("family, config", CASES[:12])
def test_in_16_bits_it_is_as_exact_as_the_model(family, config):
    model = adapted(family, config).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    truth = own_loss(exact, PADDED)
    wanted, apart = gradient_of(truth, exact), []
    for compute in (own_loss, trained_loss):
        loss = compute(model, PADDED)
        assert loss.item() == pytest.approx(truth.item(), rel=0.01)
        apart.append((gradient_of(loss, model) - wanted).norm() / wanted.norm())
    assert apart[1] < 1.5 * apart[0] < 0.1
    assert check_loss(model) is None


@pytest.mark.parametrize(
    "family, config",
    [("cohere", dict(logit_scale=0.25)), ("gemma2", dict(final_logit_softcapping=3.0))],
)
def test_a_bias_beside_a_scale_or_a_cap(family, config):
    model = adapted(family, config)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(128), requires_grad=False)
    assert_same(model)


def test_tails():
    tail = measure_tail(lively("gemma2", final_logit_softcapping=3.0))
    assert tail.cap == 3 and tail.scale == pytest.approx(1, rel=1e-5)
    assert measure_tail(lively("cohere", logit_scale=0.25)) == Tail(0.25)
    assert measure_tail(lively("granite", logits_scaling=8.0)) == Tail(0.125)


@pytest.mark.parametrize(
    "family, config, tail",
    [
        ("hyperclovax", dict(logits_scaling=8.0), Tail(8)),
        ("minicpm3", dict(dim_model_base=4), Tail()),
    ],
)
def test_tails_of_newer_families(family, config, tail):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    assert measure_tail(lively(family, **config)) == tail


@pytest.mark.parametrize("at_a_time", [1, 7, 10**6])
@pytest.mark.parametrize("capped", [False, True], ids=["", "capped"])
@pytest.mark.parametrize("trained_head", [False, True], ids=["", "trained head"])
def test_size_of_the_parts(at_a_time, capped, trained_head, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", at_a_time)
    monkeypatch.setattr(module, "_BYTES", 0)
    sizes, part_size = [], module._part_size
    monkeypatch.setattr(module, "_part_size", lambda n: sizes.append(part_size(n)) or sizes[-1])
    config = ("gemma2", dict(final_logit_softcapping=3.0)) if capped else ("phi", {})
    assert_same(adapted(*config, modules_to_save=["lm_head"] if trained_head else None))
    assert sizes == [at_a_time]


def test_parts_are_large_enough_and_fixed():
    size = module._part_size
    assert size(10**6) == size(2**16) == 256
    assert size(32_000) == 2**26 // (4 * 32_000) and size(1000) == 2**26 // 4000


TRAINED_HEADS = {
    "modules_to_save": lambda model: get_peft_model(model, lora(modules_to_save=["lm_head"])),
    "lora": lambda model: get_peft_model(model, lora(target_modules=["q_proj", "lm_head"])),
    "dora": lambda model: get_peft_model(model, lora(target_modules=["lm_head"], use_dora=True)),
    "tokens": lambda model: get_peft_model(model, lora(trainable_token_indices=[5, 7])),
    "all": lambda model: model,
    "embeddings": lambda model: (
        model.requires_grad_(False).get_input_embeddings().requires_grad_() and model
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("adapt", TRAINED_HEADS.values(), ids=TRAINED_HEADS)
@pytest.mark.filterwarnings("ignore:.*(tie|tied).*")
def test_heads_that_are_trained(adapt, tied):
    model = stir(adapt(lively(tie_word_embeddings=tied)), 0.1)
    assert_same(model.train())
    assert check_loss(model) is None


def test_a_head_that_waits_elsewhere():
    model = adapted()
    wanted = own_loss(model, PADDED)
    gradient = gradient_of(wanted, model)
    head = model.get_output_embeddings()
    cpu_offload(head, execution_device=torch.device("cpu"))
    loss = trained_loss(model, PADDED)
    assert head.weight.is_meta and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(gradient_of(loss, model), gradient, atol=1e-6)


def test_quantized_head():
    model = adapted()
    base, head = model.get_base_model(), bitsandbytes.nn.Linear4bit(32, 128, bias=False)
    head.weight = bitsandbytes.nn.Params4bit(base.lm_head.weight.data, requires_grad=False)
    head.support_avx512bf16_for_cpu = False
    base.lm_head = head.to("cpu")
    assert head.weight.dtype is torch.uint8
    assert_same(model)
    assert check_loss(model) is None


def test_dropout_in_a_head(monkeypatch):
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5).train()
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_BYTES", 0)
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        gradients.append(gradient_of(trained_loss(model, PADDED), model))
        monkeypatch.setattr(module, "checkpoint", lambda run, *part, **_: run(*part))
    assert torch.allclose(*gradients, rtol=1e-5)
    torch.manual_seed(1)
    assert not torch.allclose(gradient_of(trained_loss(model, PADDED), model), gradients[0])


def test_native_adapter():
    model = lively("gemma2")
    model.add_adapter(lora(target_modules=["q_proj", "down_proj"]))
    assert_same(stir(model, 0.1).eval())
    assert check_loss(model) is None


@pytest.mark.parametrize("flatten", [False, True], ids=["stacked", "flattened"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_rows(family, flatten):
    model = adapted(family)
    parts = rows(9, 12, 7, 10, 6, prompt=0)
    packed = [
        {
            "input_ids": sum((row["input_ids"] for row in some), []),
            "labels": sum(([-100, *row["labels"][1:]] for row in some), []),
            "position_ids": [i for row in some for i in range(len(row["labels"]))],
        }
        for some in (parts[:3], parts[3:])
    ]
    batch = PackCollator(0, 8, flatten)(packed)
    assert (len(batch["labels"]) == 1) == flatten
    assert_same(model, batch)
    alone = PadCollator(0)(parts)
    assert trained_loss(model, batch).item() == pytest.approx(own_loss(model, alone).item(), 1e-5)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_activation_checkpointing_and_dropout(share):
    model = adapted(lora_dropout=0.3).train()
    recompute_layers(model, share)
    assert_same(model)
    loss = trained_loss(model, PADDED)
    assert loss.item() != pytest.approx(trained_loss(model.eval(), PADDED).item(), rel=1e-3)


@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["", "trained head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(dtype, head, monkeypatch):
    model = adapted(modules_to_save=head).to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.float()
    formats, run = [], module._run_part
    monkeypatch.setattr(
        module, "_run_part", lambda *args: formats.append(args[0].dtype) or run(*args)
    )
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    model.forward = convert_outputs_to_fp32(autocast()(model.forward))  # as accelerate does
    assert_same(model, rel=0.003)
    assert check_loss(model) is None
    assert set(formats) == (set() if head else {torch.bfloat16})
    with autocast():
        assert_same(model, rel=0.003)


@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["", "trained head"])
def test_no_logits_are_kept(head):
    model, shapes = adapted(modules_to_save=head), []
    keep = lambda tensor: shapes.append(tensor.shape) or tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trained_loss(model, PADDED)
    assert shapes and (TRAINED, 128) not in [shape[-2:] for shape in shapes]
    assert gradient_of(loss, model).any()


def test_16_bits_do_not_round_the_factor():
    hidden = torch.randn(9, 32, dtype=torch.bfloat16, requires_grad=True)
    weight, labels = torch.randn(128, 32, dtype=torch.bfloat16), torch.arange(9)
    once, scaled = (
        torch.autograd.grad(
            factor * module._FrozenHead.apply(hidden, labels, weight, None, Tail()), hidden
        )[0]
        for factor in (1, 1.003)
    )
    assert torch.equal(scaled, (once.float() * 1.003).bfloat16())
    assert not torch.equal(scaled, once)


def test_float16_gradients_do_not_vanish():
    model = adapted().half()
    exact = copy.deepcopy(model).float()
    many, scale = 2.0**24, 2.0**20
    wanted = gradient_of(scale * own_loss(exact, PADDED, many), exact)
    gradient = gradient_of(scale * trained_loss(model, PADDED, many), model)
    assert (gradient - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["", "trained head"])
def test_a_batch_without_trained_tokens(head):
    model = adapted(modules_to_save=head)
    for labels in (torch.full_like(PADDED["labels"], -100), PADDED["labels"].clone()):
        labels[:, 1:] = -100  # the second batch has labels, but where nothing predicts them
        for num_items in (None, 7):
            loss = trained_loss(model, PADDED | {"labels": labels}, num_items)
            assert loss.item() == 0 and not gradient_of(loss, model).any()


@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["", "trained head"])
def test_accumulated_batches_are_one_batch(head):
    model = adapted("granite", dict(logits_scaling=2.0), modules_to_save=head)
    parts = rows(21, 13, 9, 17)
    whole, pairs = PadCollator(0)(parts), [PadCollator(0)(parts[i : i + 2]) for i in (0, 2)]
    items = (whole["labels"][:, 1:] != -100).sum()
    for num_items in (items, items.item()):
        assert_same(model, whole, num_items)
        total = sum(trained_loss(model, pair, num_items) for pair in pairs)
        assert total.item() == pytest.approx(own_loss(model, whole).item(), rel=1e-6)
        wanted = gradient_of(own_loss(model, whole), model)
        assert (gradient_of(total, model) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["", "trained head"])
def test_evaluation_computes_no_gradient(head, monkeypatch):
    model = adapted(modules_to_save=head)
    wanted, gradients, run = own_loss(model, PADDED).item(), [], module._run_part
    monkeypatch.setattr(
        module, "_run_part", lambda *args: gradients.append(len(args[2])) or run(*args)
    )
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            loss = trained_loss(model, PADDED)
        assert loss.item() == pytest.approx(wanted, rel=1e-6) and not loss.requires_grad
    assert not any(gradients) and len(gradients) == (0 if head else 2)


def test_a_loss_that_is_kept_keeps_no_gradient():
    model = adapted()
    loss = trained_loss(model, PADDED)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    loss.backward()
    second = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def hooks(model):
    return [
        hook
        for part in model.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ]


def test_generation_is_untouched(monkeypatch):
    model = adapted("gemma2")
    prompt = PADDED["input_ids"][:1, :5]
    answer = lambda: model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    before, logits = answer(), model(prompt).logits
    trained_loss(model, PADDED).backward()
    assert torch.equal(answer(), before) and torch.equal(model(prompt).logits, logits)
    assert not hooks(model)

    broken = model.get_base_model().model.layers[1]
    for compute in (trained_loss, measure_tail, lambda model, *_: 1 / bool(not check_loss(model))):
        module._TAILS.clear()
        with monkeypatch.context() as patch:
            patch.setattr(broken, "forward", lambda *args, **more: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                compute(*((model, PADDED) if compute is trained_loss else (model,)))
        assert not hooks(model) and not model.training
        assert torch.equal(answer(), before) and torch.equal(model(prompt).logits, logits)


MEASURE = """
import torch
from lorabook.memory import MemoryTimeline
from lorabook.model.loss import trained_loss
from lorabook.testing import tiny_model

torch.set_num_threads(1)
model = tiny_model("llama", 32_000, max_position_embeddings=512, tie_word_embeddings=False)
model.requires_grad_(False).model.layers[0].requires_grad_()
random = torch.Generator().manual_seed(0)
batch = {"input_ids": torch.randint(32_000, (4, 512), generator=random)}
batch["labels"] = batch["input_ids"].clone()
small = {name: values[:, :8] for name, values in batch.items()}
for loss in (trained_loss, lambda model, batch: model(**batch).loss):
    loss(model, small).backward()
    with MemoryTimeline(0.002) as timeline:
        timeline.mark("before")
        result = loss(model, batch)
        result.backward()
        timeline.mark("run")
    before, run = timeline.rows
    print(run["peak"] - before["allocated"], result.item())
"""


def test_memory(fresh):
    lines = fresh(MEASURE).stdout.splitlines()
    (ours, loss), (plain, wanted) = ([float(x) for x in line.split()] for line in lines)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert plain > 2 * 2048 * 32_000 * 4  # bytes: more than twice the logits
    assert ours < plain / 5


def state(model):
    grads = [p.grad for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    return torch.get_rng_state().tolist(), grads, modes, hooks(model), torch.is_grad_enabled()


@pytest.mark.parametrize("grad", [True, False])
def test_the_check_leaves_no_trace(grad):
    model = adapted("llama", dict(attention_dropout=0.5), lora_dropout=0.5).train()
    model.get_base_model().model.layers[0].eval()
    weights = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        before = state(model)
        assert check_loss(model) is None
        assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_check_finds_other_losses():
    experts = dict(num_local_experts=4, output_router_logits=True)
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted("mixtral", experts).to(dtype)
        assert "is not the next-token loss alone" in check_loss(model)
    model = lively()
    model.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten()
    )  # not shifted
    assert "is not the next-token loss alone" in check_loss(model)


@pytest.mark.parametrize("wrong", [Tail(1.1), Tail(1, 2.0)])
def test_the_check_finds_a_wrong_loss(wrong, monkeypatch):
    monkeypatch.setattr(module, "measure_tail", lambda model: wrong)
    model = adapted()
    assert "here it would be" in check_loss(model)
    assert "here it would be" in check_loss(copy.deepcopy(model).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_check_finds_a_wrong_gradient(dtype, monkeypatch):
    right = module._FrozenHead.backward
    wrong = lambda ctx, incoming: right(ctx, 1.2 * incoming)
    monkeypatch.setattr(module._FrozenHead, "backward", staticmethod(wrong))
    found = "20.0% apart" if dtype is torch.float32 else "% apart"
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert found in check_loss(adapted().to(dtype))


def test_models_without_anything_trained_are_checked_too(monkeypatch):
    model = lively().requires_grad_(False)
    assert check_loss(model) is None
    monkeypatch.setattr(module, "_TAILS", {model: Tail(2.0)})
    assert "here it would be" in check_loss(model)


def test_refused_models(refused):
    model = lively()
    model.get_output_embeddings = lambda: None
    with refused(ModelError, "LlamaForCausalLM has no output head"):
        trained_loss(model, PADDED)
    model.get_output_embeddings = lambda: torch.nn.Linear(32, 128)
    with refused(ModelError, "used 0 times"):
        trained_loss(model, PADDED)
    assert "used 0 times" in check_loss(model)
    with refused(ModelError, "used 0 times"):
        measure_tail(model)


def logits_changed(model, change):
    forward = model.forward

    def changed(**batch):
        output = forward(**batch)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 0.01,
        lambda logits: logits.clamp(-9, 9),
        lambda logits: logits.clamp(min=-99),
        lambda logits: logits * (1 + 0.1 * (torch.arange(128) == 77)),
        lambda logits: logits[..., :-1],
        lambda logits: logits[:, :-1],
        lambda logits: 3 * torch.asinh(logits),
        lambda logits: logits * logits.abs().sqrt(),
    ],
    ids="shifted clamped below uneven cut shorter asinh power".split(),
)
def test_unknown_tails_are_refused(change, refused):
    with refused(ModelError, "not known here"):
        measure_tail(logits_changed(lively(), change))


PARALLEL = """
import json, sys, torch
from pathlib import Path
from lorabook.model.loss import trained_loss
from lorabook.testing import tiny_model

folder, found = Path(sys.argv[1]), []
store = torch.distributed.FileStore(str(folder / "store"), 1)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(tiny_model("gemma2", 64))
ids = torch.arange(3, 23)[None]
batch = {"input_ids": ids, "labels": ids}
for of in (lambda: model(**batch).loss, lambda: trained_loss(model, batch)):
    model.zero_grad()
    loss = of()
    loss.backward()
    found.append((loss.item(), sum(p.grad.norm().item() for p in model.parameters())))
torch.distributed.destroy_process_group()
(folder / "found.json").write_text(json.dumps(found))
"""


def test_inside_of_a_parallel_model(fresh, tmp_path):
    result = fresh(PARALLEL, str(tmp_path))
    assert result.returncode == 0, result.stderr
    own, ours = json.loads((tmp_path / "found.json").read_text())
    assert ours == pytest.approx(own, rel=1e-5)
