"""Fine-tune chat models with LoRA and QLoRA from notebooks that explain every step."""

__version__ = "0.1.0"

import importlib
import logging
import os
import sys

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns in every layer
if sys.stderr is sys.__stderr__ and not (sys.stderr and sys.stderr.isatty()):
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a pipe or a file

_HOME = {  # public name -> the module that defines it; loaded on first use
    "RunConfig": "config",
    "ModelSettings": "config",
    "DataSettings": "config",
    "LoraSettings": "config",
    "TrainingSettings": "config",
    "LorabookError": "errors",
    "detect_hardware": "hardware",
    "print_gpu_memory_usage": "memory",
    "setup_model": "model.load",
    "setup_lora": "model.adapter",
    "trainable_report": "model.adapter",
    "load_and_prepare_data": "data.source",
    "assistant_spans": "data.template",
    "show_tokens": "data.chat",
    "prepare_datasets": "data.batch",
    "pack": "data.pack",
    "plan_memory": "plan",
    "device_table": "devices",
    "fit": "devices",
    "generate": "infer.generate",
    "chat": "infer.generate",
    "evaluate": "infer.evaluate",
    "compare": "infer.compare",
    "create_trainer": "train.trainer",
    "train_loop": "train.loop",
    "find_lr": "train.rate",
    "launch": "train.launch",
    "sweep": "train.sweep",
    "save_model": "export.save",
    "load_adapter": "export.save",
    "read_adapter": "export.folder",
    "check_adapter": "export.check",
    "merge_adapter": "export.merge",
    "how_to_serve": "export.serve",
    "write_modelfile": "export.serve",
    "push_adapter": "export.push",
    "list_runs": "records",
    "compare_runs": "records",
    "run_training": "run",
    "RunResult": "result",
    "DataView": "widgets.data",
    "ConfigView": "widgets.settings",
    "MemoryView": "widgets.memory",
    "CompareView": "widgets.compare",
    "ChatView": "widgets.chat",
    "TrainingView": "widgets.training",
    "Session": "widgets.session",
    "guide": "widgets.guide",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        from .config import nearest

        hint = nearest(name, _HOME)
        raise AttributeError(f"module 'lorabook' has no attribute {name!r}.{hint}")
    return getattr(importlib.import_module(f"lorabook.{_HOME[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
