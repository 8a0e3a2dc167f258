"""A wrong config is refused before anything is loaded, and the message names the key."""

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from lorabook.config import RunConfig
from lorabook.errors import ConfigError

CASES = {  # kind -> YAML, then what the message holds: the key, what was found, what is allowed
    "unknown section": ("trainer: {steps: 3}", "`trainer`", "{'steps': 3}", "data, lora, training"),
    "misspelt section": ("modle: {name: x}", "`modle`", "{'name': 'x'}", "Did you mean `model`?"),
    "misspelt top-level key": ("output: x", "`output`", "'x'", "Did you mean `output_dir`?"),
    "unknown key in model": ("model: {nmae: x}", "`model.nmae`", "'x'", "Did you mean `name`?"),
    "unknown key in data": (
        "data: {train_fil: x}",
        "`data.train_fil`",
        "'x'",
        "Did you mean `train_file`?",
    ),
    "unknown key in lora": (
        "lora: {target: [q_proj]}",
        "`lora.target`",
        "['q_proj']",
        "Did you mean `target_modules`?",
    ),
    "unknown key in training": (
        "training: {learning_rat: 1e-4}",
        "`training.learning_rat`",
        "0.0001",
        "Did you mean `learning_rate`?",
    ),
    "unknown key near none": ("lora: {zzz: 8}", "`lora.zzz`", "zzz: 8", "r, alpha, dropout"),
    "key of a training argument that was renamed": (
        "training: {evaluation_strategy: steps}",
        "`training.evaluation_strategy`",
        "'steps'",
        "Did you mean `eval_strategy`?",
    ),
    "key that some transformers know, and some do not": (
        "training: {warmup_ratio: 0.1}",
        "`training.warmup_ratio`",
        "0.1",
        "Use `training.warmup_steps`",
    ),
    "key that stands elsewhere": (
        "training: {output_dir: x}",
        "`training.output_dir`",
        "'x'",
        "Use `output_dir`",
    ),
    "seed in the wrong place": ("training: {seed: 1}", "`training.seed`", "1", "Use `seed`"),
    "key under transformers' name": (
        "training: {per_device_train_batch_size: 4}",
        "`training.per_device_train_batch_size`",
        "4",
        "Use `training.batch_size`",
    ),
    "key that lorabook sets: label_names": (
        "training: {label_names: [x]}",
        "`training.label_names`",
        "['x']",
        "lorabook sets it",
    ),
    "key that lorabook sets: remove_unused_columns": (
        "training: {remove_unused_columns: true}",
        "`training.remove_unused_columns`",
        "True",
        "lorabook sets it",
    ),
    "key that is a name in Python": ("lora: {self: 1}", "`lora.self`", "self: 1", "r, alpha"),
    "top-level key that is a name in Python": ("self: 1", "`self`", "self: 1", "model, data"),
    "key that is a number": ("lora: {5: 1}", "`lora.5`", "5: 1", "r, alpha"),
    "number for a text": ("model: {name: 3}", "`model.name`", "3 (int)", "valid string"),
    "text for a number": ('lora: {r: "16"}', "`lora.r`", "'16' (str)", "valid integer"),
    "word for a rate": (
        "training: {learning_rate: fast}",
        "`training.learning_rate`",
        "'fast' (str)",
        "valid number, or: Input should be 'auto'",
    ),
    "float for an int": ("lora: {r: 16.5}", "`lora.r`", "16.5 (float)", "valid integer"),
    "bool for an int": ("lora: {r: true}", "`lora.r`", "True (bool)", "valid integer"),
    "text for a bool": ('lora: {use_dora: "yes"}', "`lora.use_dora`", "'yes' (str)", "boolean"),
    "int for a bool": (
        "model: {trust_remote_code: 1}",
        "`model.trust_remote_code`",
        "1 (int)",
        "boolean",
    ),
    "number for a list": ("data: {split: 9}", "`data.split`", "9 (int)", "valid list"),
    "list for a text": (
        "data: {train_file: [a, b]}",
        "`data.train_file`",
        "['a', 'b'] (list)",
        "valid string",
    ),
    "text for a list": (
        "lora: {target_modules: q_proj}",
        "`lora.target_modules`",
        "'q_proj' (str)",
        "valid list, or: Input should be 'all-linear'",
    ),
    "wrong type in a list": (
        "lora: {modules_to_save: [3]}",
        "`lora.modules_to_save`",
        "3 (int)",
        "valid string",
    ),
    "null where a value is needed": ("lora: {r: null}", "`lora.r`", "None", "valid integer"),
    "no value after the colon": ("lora:\n  r:", "`lora.r`", "None", "valid integer"),
    "rank of 0": ("lora: {r: 0}", "`lora.r`", "0 (int)", "greater than 0"),
    "dropout of 1": ("lora: {dropout: 1.0}", "`lora.dropout`", "1.0", "less than 1"),
    "negative learning rate": (
        "training: {learning_rate: -1e-4}",
        "`training.learning_rate`",
        "-0.0001",
        "greater than 0",
    ),
    "learning rate that is no number": (
        "training: {learning_rate: .nan}",
        "`training.learning_rate`",
        "nan",
        "Input should be",
    ),
    "infinite learning rate": (
        "training: {learning_rate: .inf}",
        "`training.learning_rate`",
        "inf",
        "finite",
    ),
    "infinite part": ("data: {split: [9, .inf, 1]}", "`data.split`", "inf", "finite"),
    "window too small": ("model: {max_length: 4}", "`model.max_length`", "4", "equal to 8"),
    "seed too large": ("seed: 4294967296", "`seed`", "4294967296", "less than 4294967296"),
    "no steps": ("training: {max_steps: 0}", "`training.max_steps`", "0", "-1"),
    "choice of quantization": (
        "model: {quantization: int4}",
        "`model.quantization`",
        "'int4'",
        "'auto', 'nf4', 'int8' or 'none'",
    ),
    "choice of dtype": ("model: {dtype: fp16}", "`model.dtype`", "'fp16'", "'float16'"),
    "choice of schedule": (
        "training: {lr_scheduler_type: cosin}",
        "`training.lr_scheduler_type`",
        "'cosin'",
        "'cosine'",
    ),
    "choice of start": (
        "lora: {init_lora_weights: xavier}",
        "`lora.init_lora_weights`",
        "'xavier'",
        "'pissa'",
    ),
    "split of two": ("data: {split: [9, 1]}", "`data.split`", "[9.0, 1.0]", "three parts"),
    "split without train": ("data: {split: [0, 1, 1]}", "`data.split`", "[0.0", "train above 0"),
    "no layers": ("lora: {target_modules: []}", "`lora.target_modules`", "found: []"),
    "a checkpoint between evaluations": (
        "training: {save_steps: 15, eval_steps: 10}",
        "`training.save_steps`",
        "15, with an evaluation every 10 steps",
        "multiple",
    ),
    "wrong type of a passed-through argument": (
        "training: {max_grad_norm: hello}",
        "`training.max_grad_norm`",
        "'hello'",
        "number",
    ),
    "section that is a number": ("lora: 8", "`lora`", "8", "`lora: {key: value}`"),
    "section that is a list": ("model: [a]", "`model`", "['a']", "`model: {key: value}`"),
    "section that is empty": ("data:", "`data`", "None", "`data: {key: value}`"),
    "key twice": ("lora: {r: 8, r: 16}", "`r`", "line 1", "Delete one"),
    "section twice": ("lora: {r: 8}\nlora: {r: 9}", "`lora`", "line 1", "Delete one"),
    "bracket left open": ("seed: 1\nlora: {r: 8", "bad.yaml", "line 2", "indentation"),
    "tab as indentation": ("lora:\n\tr: 8", "bad.yaml", "'\\t'", "indentation"),
    "two documents": ("seed: 1\n---\nseed: 2", "bad.yaml", "another document", "YAML"),
    "tag that would run code": ("seed: !!python/name:os.system", "bad.yaml", "python/name", "YAML"),
    "list": ("- lora", "mapping", "['lora'] (list)", "model, data, lora, training"),
    "empty list": ("[]", "mapping", "[] (list)", "model, data, lora, training"),
    "plain text": ("hello", "mapping", "'hello' (str)", "model, data, lora, training"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_yaml(case, tmp_path, refused):
    text, *parts = case
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with refused(ConfigError, *parts):
        RunConfig.from_yaml(path)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    "content, part",
    [(None, "No such file"), ("a folder", "directory"), (b"seed: 1 # caf\xe9", "utf-8")],
    ids=["missing", "folder", "not UTF-8"],
)
def test_unreadable_file(content, part, tmp_path, refused):
    path = tmp_path / "bad.yaml"
    if content == "a folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with refused(ConfigError, "bad.yaml", part, "Give the path of a YAML file"):
        RunConfig.from_yaml(path)


@pytest.mark.parametrize(
    "change, parts",
    [
        ("training.max_steps", ["section.key=value", "training.max_steps"]),
        ("a.b.c=3", ["section.key=value", "a.b.c=3"]),
        ("trainng.max_steps=3", ["section.key=value", "trainng.max_steps=3", "training"]),
        ("lora.rr=3", ["`lora.rr`", "rr: 3", "Did you mean `r`?"]),
        ("lora.r=x", ["`lora.r`", "'x' (str)", "valid integer"]),
        ("lora.r=", ["`lora.r`", "None", "valid integer"]),
        ("lora=3", ["`lora`", "3", "`lora: {key: value}`"]),
        ("lora.r=[", ["'lora.r=['", "not valid YAML"]),
    ],
)
def test_bad_override(change, parts, refused):
    with refused(ConfigError, *parts):
        RunConfig().override(change)


def test_bad_assignment(refused):
    cfg = RunConfig()
    with refused(ConfigError, "`lora.r`", "'16' (str)", "valid integer"):
        cfg.lora.r = "16"
    assert cfg.lora.r == 16


@pytest.mark.parametrize(
    "text, keys",
    [
        (
            "trainer: 1\nseed: x\nmodel: {name: 3, nmae: x}\ndata: {split: 9}\n"
            "lora: {rank: 8, r: 0}\ntraining: {batch_size: 0}",
            "trainer seed model.name model.nmae data.split lora.rank lora.r training.batch_size",
        ),
        ("training: {nope: 1, nada: 2}", "training.nope training.nada"),
        ("training: {nope: 1, batch_size: 0}", "training.nope training.batch_size"),
    ],
    ids=["all sections", "two unknown training keys", "unknown and wrong training keys"],
)
def test_all_faults_at_once(text, keys, tmp_path, refused):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with refused(ConfigError, *[f"`{key}`" for key in keys.split()]):
        RunConfig.from_yaml(path)


def test_the_promised_yaml_loads(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("""\
    training: {batch_size: 4, gradient_accumulation_steps: 8, learning_rate: 2e-4, max_steps: 100, logging_steps: 10, early_stopping_patience: 3}
    lora: {r: 16, alpha: 32, dropout: 0.1, target_modules: [q_proj, v_proj, k_proj, o_proj]}
    model: {name: microsoft/Phi-4-mini-instruct, max_length: 512}
""")  # noqa: E501
    cfg = RunConfig.from_yaml(path)
    assert cfg.training.learning_rate == 0.0002
    assert cfg.lora.target_modules == ["q_proj", "v_proj", "k_proj", "o_proj"]
    assert (cfg.model.name, cfg.model.max_length) == ("microsoft/Phi-4-mini-instruct", 512)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    cfg = RunConfig.from_yaml(path)
    assert RunConfig.from_dict(cfg.to_dict()) == cfg


positive = st.floats(0, exclude_min=True, allow_infinity=False)
values = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"max_length": st.integers(8, 10**6)}),
        "data": st.fixed_dictionaries(
            {
                "split": st.tuples(positive, positive, positive).map(list),
                "system_prompt": st.none() | st.text(),
            }
        ),
        "lora": st.fixed_dictionaries(
            {
                "r": st.integers(1, 10**6),
                "alpha": positive,
                "dropout": st.floats(0, 1, exclude_max=True),
                "target_modules": st.just("all-linear") | st.lists(st.text(min_size=1), min_size=1),
            }
        ),
        "training": st.fixed_dictionaries({"learning_rate": st.just("auto") | positive}),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@given(values)
def test_yaml_round_trip(tmp_path_factory, values):
    cfg = RunConfig.from_dict(values)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    cfg.to_yaml(path)
    read = RunConfig.from_yaml(path)
    assert read == cfg
    assert (read.seed, read.lora.alpha) == (values["seed"], values["lora"]["alpha"])
