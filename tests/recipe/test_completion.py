"""`nemotron-h completion`: real shells complete commands, options and values with the script."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.recipe.compose import known_recipes

pytest.importorskip("shtab", reason="shtab is not installed: pip install -e '.[completion]'")
#: what is typed, and what the shell then offers
TYPED = {
    "nemotron-h rec": ["recipe"],
    "nemotron-h recipe ": ["check", "diff", "list", "new", "show"],
    "nemotron-h recipe show --p": ["--plain"],
    "nemotron-h recipe show nemotron_h_56": [name for name in known_recipes() if name.startswith("nemotron_h_56")],
    "nemotron-h recipe diff nemotron_h_8b mi": ["mine.yaml"],
    "nemotron-h data prepare --blend sample_s": ["sample_small", "sample_small_long"],
    "nemotron-h plan nemotron_h_8b --gpu h": ["h100", "h200"],
    "nemotron-h generate ru": ["runs"],
    "nemotron-h recipe new nemotron_h_56": [],  # a name of one's own
}
#: calls the function that `complete` names as bash does at a TAB
BASH = """
source "$1"; shift
tab() {
  COMP_WORDS=($1); [[ $1 == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  local function=$(complete -p nemotron-h | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
  $function nemotron-h "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  echo "${COMPREPLY[*]}"
}
for line in "$@"; do tab "$line"; done
"""


def script(shell: str, folder: Path) -> Path:
    """Write the script of a shell, beside a recipe and a run."""
    found = CliRunner().invoke(app, ["completion", shell], catch_exceptions=False)
    (folder / "runs").mkdir()
    (folder / "mine.yaml").touch()
    path = folder / "_nemotron-h"
    path.write_text(found.stdout)
    return path


def needs(shell: str) -> str:
    """Return the program of a shell, or skip."""
    return shutil.which(shell) or pytest.skip(f"{shell} is not installed")


def test_bash_completes(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [needs("bash"), "-c", BASH, "bash", str(script("bash", tmp_path)), *TYPED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert dict(zip(TYPED, map(sorted, map(str.split, done.stdout.splitlines())), strict=True)) == TYPED
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spent.ru_utime - before.ru_utime < 0.3, "seconds of the processor, for all of them"


def test_fish_completes(tmp_path: Path) -> None:
    ask = "source $argv[1]; for line in $argv[2..]; echo (complete -C $line | string replace -r '\\t.*' ''); end"
    typed = {line: offered for line, offered in TYPED.items() if not {"runs", "mine.yaml"} & set(offered)}
    command = [needs("fish"), "--no-config", "-c", ask, str(script("fish", tmp_path)), *typed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(typed, map(sorted, map(str.split, done.stdout.splitlines())), strict=True)) == typed


def test_zsh_reads_its_script(tmp_path: Path) -> None:
    subprocess.run([needs("zsh"), "-n", str(script("zsh", tmp_path))], check=True)


def test_every_command_and_option_is_there(tmp_path: Path) -> None:
    text = script("bash", tmp_path).read_text()
    for word in ("compare-precision", "--allow-code-execution", "minitron_ssm", "nano_12b_v2/sft"):
        assert word in text


def test_another_shell_is_an_error() -> None:
    with pytest.raises(UserError, match=r"shell = 'bahs'\nDid you mean bash\?"):
        CliRunner().invoke(app, ["completion", "bahs"], catch_exceptions=False)
