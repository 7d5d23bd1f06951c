"""The `nemo` command tells a mistake in a recipe before PyTorch and NeMo are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_h.launch.command import recipe_of

OWN = "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: wrong\noptim: {peak_lrr: 3}\n"


def test_a_mistake_in_a_recipe_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(OWN)
    arguments = ["nemo", "llm", "pretrain", "--factory", "nemotron_h_recipe(path=wrong.yaml)", "--yes"]
    code = (
        f"import sys; sys.argv = {arguments}\nfrom nemotron_h.launch.command import main\n"
        "try: main()\nfinally: print({'torch', 'nemo', 'nemo_run'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert "wrong.yaml: unknown key optim.peak_lrr" in run.stderr
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ("llm pretrain --factory nemotron_h_tiny", ("nemotron_h_tiny/pretrain", [])),
        ("llm finetune --yes --factory=nemotron_h_tiny_sft_lora", ("nemotron_h_tiny/sft_lora", [])),
        (
            "llm finetune -f nemotron_h_tiny_preference trainer.devices=2 executor=slurm executor.time=1 a.b=1",
            ("nemotron_h_tiny/preference", ["parallel.devices=2"]),
        ),
        ("llm pretrain --factory nemotron_h_recipe(path=my.yaml) tokens=3", ("my.yaml", ["tokens=3"])),
        ("llm pretrain --factory nemotron_h_recipe(path='a%20b.yaml')", ("a b.yaml", [])),
        ("llm distill --factory nemotron_h_tiny", ("nemotron_h_tiny/distill", [])),
        ("llm distill --factory nemotron_h_tiny(student=tiny_half)", None),
        ("llm pretrain --factory nemotron_h_tiny data=@data.yaml", None),
        ("llm pretrain --factory nemotron_h_tiny --yaml my.yaml", None),
        ("llm pretrain --factory llama3_8b", None),
        ("llm pretrain --help", None),
        ("llm pretrain --factory", None),
        ("", None),
    ],
)
def test_the_recipe_of_a_command_line(arguments: str, recipe: tuple[str, list[str]] | None) -> None:
    assert recipe_of(arguments.split(" ")) == recipe
