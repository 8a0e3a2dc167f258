"""What the README shows, runs."""

import re
import shlex
from pathlib import Path

import pytest

import lorabook as lb
from lorabook.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = (
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.batch_size=8",
    "training.gradient_accumulation_steps=1",
    "data.split=[0.97, 0.015, 0.015]",
)


def test_ten_lines(tmp_path, monkeypatch):
    code = re.search(r"```py\n(.*?)```", README, flags=re.S)[1]
    small = lb.RunConfig(output_dir=str(tmp_path)).override(*SMALL)
    monkeypatch.setattr(lb, "RunConfig", lambda: small, raising=False)
    exec(code, {})
    assert (tmp_path / "my_custom_llm_builtin" / "adapter_model.safetensors").exists()


def test_commands_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran, served, folders = [], [], []
    (tmp_path / "mine.jsonl").touch()
    for path in (tmp_path / "outputs/my_custom_llm_builtin", tmp_path / "merged"):
        path.mkdir(parents=True)
        (path / "adapter_config.json").touch()
    monkeypatch.setattr("lorabook.run.run_training", lambda cfg, **kwargs: ran.append(cfg))
    monkeypatch.setattr("lorabook.devices.device_table", lambda cfg, **options: "")
    monkeypatch.setattr("lorabook.devices.fit", lambda cfg, card, **options: ran.append(cfg))
    for name in ("terminal.chat_in_terminal", "export.merge.merge_adapter", "records.list_runs"):
        take = lambda folder, *rest, **options: folders.append(folder)
        monkeypatch.setattr(f"lorabook.{name}", take)
    launched = lambda function, cfg, *rest, nproc: ran.append(cfg) if nproc == 4 else None
    monkeypatch.setattr("lorabook.train.launch.launch", launched)
    monkeypatch.setattr("lorabook.cli.serve_app", lambda *options: served.append(options))
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.S))
    commands = re.findall(r"^lorabook (.*?)(?:\s+#.*)?$", shell, flags=re.M)
    assert len(commands) >= 3
    for command in commands:
        words, _, target = command.partition(" > ")
        assert main(shlex.split(words)) == 0, command
        if target:
            Path(target.strip()).write_text(capsys.readouterr().out)
    assert len(served) == 1
    assert folders == ["outputs", *2 * ["outputs/my_custom_llm_builtin"]]
    assert [cfg.model.name for cfg in ran] == [
        "builtin",
        *2 * ["Qwen/Qwen2.5-0.5B-Instruct"],
        "builtin",
    ]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links(path):
    assert (ROOT / path).exists()
