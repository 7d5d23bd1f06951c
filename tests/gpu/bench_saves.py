"""What saves cost: seconds that training stops, bytes per second to the disk, and memory of the GPU.

After `nemotron-h data prepare --blend sample_small`, `python tests/gpu/bench_saves.py --out FOLDER` pretrains the 8B's
widths in 13 layers (1.82 B parameters, a checkpoint of 24 GiB), or the tiny model without a GPU, with a checkpoint
every so many steps, and prints for each save what training waited and what the write reached, and the peak of the
GPU's memory before and after saves.
Then it writes the same bytes to the same folder with as many threads in turn, plainly and as a save does. FOLDER is on
the disk to be measured, and has room for two checkpoints. Numbers are printed as lines of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from nemotron_h.platform import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

from nemotron_h.checkpoint import folders  # noqa: E402
from nemotron_h.core.files import HashedFile  # noqa: E402
from nemotron_h.core.units import GIB  # noqa: E402
from nemotron_h.platform import checkpoint_writer  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.schema.recipe import RecipeConfig  # noqa: E402
from nemotron_h.training.callbacks.progress import Throughput  # noqa: E402
from nemotron_h.training.stages import pretrain  # noqa: E402

ON_GPU = torch.cuda.is_available()
#: the 8B's widths in 13 layers, as in its verification cards; nothing changes on the CPU
CUT = (
    "model.pattern=M-M-M-M*-M-M-",
    "model.expect={mamba: 6, attention: 1, ffn: 6, parameters: 1_823_889_664}",
    *("model.vocab_size=8192", "data.blend=sample_small", "data.global_batch_size=4"),
    *("parallel.nodes=1", "parallel.devices=1", "parallel.tensor=1", "parallel.sequence=false"),
)


def recipe(args: argparse.Namespace, folder: Path, *settings: str) -> RecipeConfig:
    """Return the recipe of the run, with settings that come last."""
    name, changes, batch = ("nemotron_h_8b", CUT, 4 * 8192) if ON_GPU else ("nemotron_h_tiny", (), 32 * 256)
    own = (
        f"tokens={args.steps * batch}",
        f"optim.warmup_tokens={batch}",
        f"precision={args.precision}",
        f"checkpoint={{every_steps: {args.every}, keep: 1}}",
        *("log.validate_every_steps=100_000", "log.validation_batches=0", "log.trackers=[]"),
        f"log.dir={folder}",
    )
    return compose(name, [*changes, *own, *settings])


class Watch(pl.Callback):
    """Take note of saves, of the peak of the GPU's memory, and of the steps that go on while a save is written."""

    def __init__(self) -> None:
        self.saves: list[Any] = []
        self.peaks: list[float] = []
        self.besides: list[bool] = []
        self.starts: list[float] = []
        self.begun: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.look(trainer)
        self.starts.append(time.monotonic())
        save = trainer.checkpoint_callback.save
        self.besides.append(save is not None)
        if save is not None and save.step == trainer.global_step:
            self.begun.append(len(self.starts) - 1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer)
        self.seconds = next(cb.seconds for cb in trainer.callbacks if isinstance(cb, Throughput))

    def look(self, trainer: pl.Trainer) -> None:
        if ON_GPU:
            self.peaks.append(torch.cuda.max_memory_allocated() / GIB)
        last = trainer.checkpoint_callback.last
        if last is not None and last not in self.saves:
            self.saves.append(last)

    def lost(self) -> list[float]:
        """Return the seconds that each save cost: of the step that it came after, and the next, over the usual."""
        steps = [end - begin for begin, end in zip(self.starts, self.starts[1:], strict=False)]
        usual = median(steps)
        return [sum(steps[index - 1 : index + 1]) - 2 * usual for index in self.begun]


def rate(folder: Path, sizes: list[int], way: str) -> float:
    """Return the bytes per second of writing files of these sizes, a thread each, until the disk has them.

    Args:
        way: `plain`, or `hashed`, as saves do.
    """
    memory = memoryview(checkpoint_writer.STAGING._memory)

    def write(number: int) -> None:
        begin = min(sum(sizes[:number]), max(0, len(memory) - sizes[number]))
        data = memory[begin : begin + sizes[number]]
        if way == "hashed":
            with HashedFile(folder / str(number)) as file:
                file.write(data)
                file.sync()
            return
        with (folder / str(number)).open("wb", buffering=0) as file:
            while data:
                data = data[file.write(data[: 1 << 24]) :]
            os.fsync(file.fileno())

    folder.mkdir()
    began = time.monotonic()
    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(write, range(len(sizes))))
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return sum(sizes) / seconds


def main() -> None:
    """Train, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder on the disk to be measured, made anew")
    parser.add_argument("--every", type=int, default=30 if ON_GPU else 4, help="steps between saves")
    parser.add_argument("--steps", type=int, default=95 if ON_GPU else 12, help="of the run")
    parser.add_argument("--precision", default="bf16", help="of the recipe")
    parser.add_argument("--rounds", type=int, default=2, help="of such writes")
    parser.add_argument("settings", nargs="*", help="of the recipe, such as optim.moments=bf16")
    args = parser.parse_args()
    folder = args.out.absolute() / "saves"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    composed, watch = recipe(args, folder, *args.settings), Watch()
    run_dir = folder / composed.name
    task = pretrain.build(composed)
    task.trainer.callbacks.insert(0, watch)
    fdl.build(task)()
    took = time.monotonic() - began
    checkpoint = folders.finished(run_dir)[0]
    sizes = [path.stat().st_size for path in sorted((checkpoint / folders.WEIGHTS).glob("*.distcp"))]
    shutil.rmtree(run_dir)
    rates: dict[str, list[float]] = {"plain": [], "hashed": []}
    for _ in range(args.rounds):
        for way, found in rates.items():
            found.append(rate(folder / "files", sizes, way) / 1e9)
    shutil.rmtree(folder)

    for save in watch.saves:
        print(json.dumps({**save.record(), "gb_per_second": round(save.bytes / save.writing / 1e9, 3)}))
    besides, alone = (
        [s for s, b in zip(watch.seconds, watch.besides, strict=True) if b is found] for found in (True, False)
    )
    print(
        json.dumps(
            {
                "machine": torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()} CPU cores",
                "files": len(sizes),
                "disk_gb_per_second": {name: [round(r, 3) for r in found] for name, found in rates.items()},
                "step_seconds_without_a_save": round(median(alone[3:] or alone), 4),
                "step_seconds_beside_a_save": round(median(besides), 4) if besides else None,
                "seconds_that_saves_cost": [round(seconds, 3) for seconds in watch.lost()],
                "peak_gib_before_saves": round(watch.peaks[args.every - 1], 3) if ON_GPU else None,
                "peak_gib_after_saves": round(watch.peaks[-1], 3) if ON_GPU else None,
                "seconds_of_the_run": round(took, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
