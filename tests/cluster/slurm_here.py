"""Slurm's commands as far as a submission asks for them, on this machine: jobs run one after the other where they were
submitted. A stand-in: what a cluster does with the same script is not shown by it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SBATCH = """
script="${@: -1}"
id=$(($(cat "$SPOOL/last" 2>/dev/null || echo 100) + 1)); echo $id > "$SPOOL/last"; cp "$script" "$SPOOL/$id.sh"
output=$(sed -n 's/^#SBATCH --output=//p' "$script")
tasks=$(sed -n 's/^#SBATCH --array=1-\\([0-9]*\\)%1/\\1/p' "$script")
touch "$SPOOL/$id.queued"
(
  export SLURM_JOB_NODELIST=localhost
  for task in $(seq ${tasks:-1}); do
    [ -e "$SPOOL/$id.cancelled" ] && break
    [ -n "$tasks" ] && export SLURM_ARRAY_JOB_ID=$id
    out=${output//%j/$id}; out=${out//%A/$id}; out=${out//%a/$task}
    SLURM_JOB_ID=$((id + 1000 * task)) bash "$script" >> "$out" 2>&1
  done
  rm "$SPOOL/$id.queued"
) < /dev/null > /dev/null 2>&1 &
echo $id
"""

SQUEUE = """
while [ $# -gt 0 ]; do [ "$1" = --jobs ] && id=$2; shift; done
echo "$id" >> "$SPOOL/asked"
if [ -e "$SPOOL/$id.queued" ]; then echo "RUNNING (None)"; exit; fi
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
"""

SCANCEL = 'touch "$SPOOL/${@: -1}.cancelled"'

SCONTROL = "echo localhost"

# options with a value of their own, then the command; its output goes where --output says
SRUN = """
output=/dev/stdout
while [ $# -gt 0 ]; do
  case $1 in
    --output) output=${2//%j/$SLURM_JOB_ID}; shift 2 ;;
    --chdir|-w) shift 2 ;;
    --*) shift ;;
    *) break ;;
  esac
done
exec "$@" >> "$output" 2>&1
"""

COMMANDS = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "scontrol": SCONTROL, "srun": SRUN}


def path(folder: Path) -> str:
    """Write the commands to a folder, and return the PATH that has them first."""
    for name, body in COMMANDS.items():
        file = folder / name
        file.write_text(f"#!{shutil.which('bash')}\nSPOOL={folder}\n{body.strip()}\n")
        file.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
