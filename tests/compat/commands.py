"""Run commands of `nemotron-h` and hash checkpoints, all in one process: `commands.py ORDER ...`.

Each order is a list in JSON, the arguments of a command, or `hash` and folders of weights. Prints a line of JSON for
each: what the command printed, or the sha256 of every tensor by folder. Run by `continued.orders` in a fork of a
process that has imported everything.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from same_tensors import FORMER, MAIN, whole_tensors  # of tests/training: installs what a CPU needs first
from typer.testing import CliRunner

from nemotron_h.cli.main import app


def sha256_of(tensor: torch.Tensor) -> str:
    """Return the hash of its dtype, shape and numbers."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data).hexdigest()


def hashes(folder: str) -> dict[str, str]:
    """Return the hash of each tensor, read as megatron-core does, by the name that it had before."""
    return {key.replace(MAIN, FORMER): sha256_of(value) for key, value in whole_tensors(folder).items()}


def main(*orders: str) -> None:
    """Run each in turn; the first error ends all."""
    for order in orders:
        name, *arguments = json.loads(order)
        if name == "hash":
            answer = {folder: hashes(folder) for folder in arguments}
        else:
            answer = CliRunner().invoke(app, [name, *arguments], catch_exceptions=False).stdout
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
