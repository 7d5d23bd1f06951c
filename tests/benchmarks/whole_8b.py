"""Train the whole 8B on all GPUs of a machine through the real command, in parts of under nine minutes.

    nemotron-h data prepare --blend sample                              # 20 M tokens of the family's vocabulary
    python tests/benchmarks/whole_8b.py --out OUT --part layouts        # TP over all GPUs, TP 2, best of the plan
    python tests/benchmarks/whole_8b.py --out OUT --part scaling        # equal work on 1, 2, 4 ... GPUs
    python tests/benchmarks/whole_8b.py --out OUT --part checkpoint     # stall; killed, resumed, in another layout too
    python tests/benchmarks/whole_8b.py --out OUT --part generate       # with the weights of the last part
    python tests/benchmarks/whole_8b.py --out OUT --part vision         # 13 layers behind the paper's image encoder
    python tests/benchmarks/whole_8b.py --out OUT --part all --small    # a dry run: the tiny model on two CPU ranks

OUT has room for two checkpoints of 106 GiB; files in memory (/dev/shm) are fine. Results are printed as lines of JSON
at the end of each run and kept in OUT/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from results import Report

from nemotron_h.core.progress import STEPS, read_steps
from nemotron_h.core.units import GIB
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.compose import compose

PARTS = ("layouts", "scaling", "checkpoint", "generate", "vision")
PRECISIONS = ("bf16", "fp8_current_scaling")
#: the 8B's widths at a depth that one GPU trains, as in the verification cards
CUT = ("model.pattern=M-M-M-M*-M-M-", "model.expect={mamba: 6, attention: 1, ffn: 6, parameters: 2_830_522_624}")


class Bench:
    """Runs of one model and what was measured of them.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.absolute()
        self.add = Report(self.out).add
        self.name = "nemotron_h_tiny" if args.small else "nemotron_h_8b"
        self.sequence = compose(self.name).data.seq_length
        self.environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1" if args.small else "8"}

    def settings(self, gpus: int, tensor: int, precision: str, batch: int, *more: str) -> list[str]:
        """Return the recipe's keys of a run; `batch` is in sequences."""
        steps = self.args.steps
        return [
            f"data.blend={'sample_small' if self.args.small else 'sample'}",
            f"data.global_batch_size={batch}",
            f"tokens={steps * batch * self.sequence}",
            f"optim.warmup_tokens={steps // 5 * batch * self.sequence}",
            *("parallel.nodes=1", f"parallel.devices={gpus}", f"parallel.tensor={tensor}"),
            f"parallel.sequence={str(tensor > 1).lower()}",
            f"precision={precision}",
            *("checkpoint.every_steps=100_000", "checkpoint.keep=1"),
            *("log.validation_batches=0", "log.every_steps=1", "log.trackers=[]"),
            *more,
        ]

    def start(self, folder: str, settings: list[str], stage: str = "pretrain") -> subprocess.Popen[bytes]:
        """Start `nemo llm pretrain`, or `finetune` for another stage, with its output in FOLDER.log."""
        verb = "pretrain" if stage == "pretrain" else "finetune"
        factory = self.name if stage in ("pretrain", "sft") else f"{self.name}_{stage}"
        module = [sys.executable, "-m", "nemotron_h.launch.command", "llm", verb, "--factory", factory, "--yes"]
        with (self.out / f"{folder}.log").open("ab") as log:
            return subprocess.Popen(
                [*module, *settings, f"log.explicit_log_dir={self.out / folder}"],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def train(
        self, title: str, folder: str, settings: list[str], keep: bool = False, stage: str = "pretrain"
    ) -> dict[int, float]:
        """Train to the end, add what was measured, and return the losses by step."""
        began = time.monotonic()
        code = self.start(folder, settings, stage).wait()
        seconds = time.monotonic() - began
        run = self.out / folder
        if code:
            tail = (self.out / f"{folder}.log").read_text(errors="replace").splitlines()[-12:]
            self.add(title, failed=code, end=tail)
            shutil.rmtree(run, ignore_errors=True)
            return {}
        record = json.loads((run / "run.json").read_text())
        losses = {step.step: step.loss for step in read_steps(run / STEPS)[0]}
        plan = make_plan(compose(f"{self.name}/{stage}", settings), self.args.gpu)
        self.add(
            title,
            seconds=round(seconds, 1),
            losses={step: round(loss, 4) for step, loss in losses.items() if step in (1, 10, max(losses))},
            planned_gib=round(max(part.peak for part in plan.stages) / GIB, 2),
            throughput={k: v for k, v in (record["throughput"] or {}).items() if isinstance(v, int | float | str)},
            save=record["save"],
        )
        if not keep:
            shutil.rmtree(run)
        return losses

    def layouts(self) -> None:
        """Train in each precision with tensor parallelism over all GPUs, and over two with data parallelism."""
        gpus = self.args.gpus
        for tensor in dict.fromkeys((gpus, min(2, gpus))):
            for precision in PRECISIONS[: 1 if self.args.small else 2]:
                title = f"TP {tensor} x DP {gpus // tensor}, {precision}"
                settings = self.settings(gpus, tensor, precision, self.args.batch)
                self.train(title, f"tp{tensor}_{precision}", settings)

    def scaling(self) -> None:
        """Train the cut on 1, 2, 4 ... GPUs with data parallelism and equal work for each."""
        gpus = 1
        while gpus <= self.args.gpus:
            changes = () if self.args.small else CUT
            batch = self.args.batch * gpus
            self.train(f"DP {gpus}", f"dp{gpus}", self.settings(gpus, 1, "bf16", batch, *changes))
            gpus *= 2

    def checkpoint(self) -> None:
        """Save in the middle of a run, kill it, resume it; and train on from its end in another layout."""
        gpus, steps = self.args.gpus, self.args.steps
        settings = self.settings(gpus, gpus, "bf16", self.args.batch)
        straight = self.train("straight", "straight", settings)
        settings[settings.index("checkpoint.every_steps=100_000")] = f"checkpoint.every_steps={steps // 2}"
        process, file = self.start("resumed", settings), self.out / "resumed" / STEPS
        while process.poll() is None:
            if file.is_file() and any(step.step > steps // 2 for step in read_steps(file)[0]):
                if list((self.out / "resumed/checkpoints").glob("*-unfinished")):
                    continue  # it is still written
                break
            time.sleep(0.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        resumed = self.train("killed and resumed", "resumed", settings, keep=True)
        gaps = [abs(loss - straight[step]) / loss for step, loss in resumed.items() if step in straight]
        self.add("resumed against straight", steps=len(gaps), largest_relative_difference=max(gaps, default=None))
        other = self.settings(gpus, min(2, gpus) if gpus > 2 else 1, "bf16", self.args.batch)
        tokens = next(each for each in other if each.startswith("tokens="))
        other[other.index(tokens)] = f"tokens={(steps + 4) * self.args.batch * self.sequence}"
        self.train("on in another layout", "resumed", other, keep=True)

    def generate(self) -> None:
        """Generate with the weights that `checkpoint` left, on one GPU."""
        began = time.monotonic()
        program = [sys.executable, "-c", "from nemotron_h.cli.main import main; main()"]
        command = [*program, "generate", str(self.out / "resumed")]
        command += ["The license of this program", "--max-tokens", "64", "--temperature", "0"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        said = (done.stdout + done.stderr).splitlines()[-8:]
        self.add("generate", seconds=round(time.monotonic() - began, 1), code=done.returncode, output=said)

    def vision(self) -> None:
        """Train the cut behind an encoder that begins anew, on pictures of charts: the projector alone, then all."""
        small, pictures = self.args.small, self.out / "pictures"
        program = [sys.executable, "-c", "from nemotron_h.cli.main import main; main()", "data"]
        count, size = (400, 32) if small else (1500, 448)
        making = ["pictures", "--kinds", "charts", "--count", str(count), "--size", str(size), "--out", str(pictures)]
        blend = pictures / "pictures.yaml"
        subprocess.run([*program, *making], env=self.environment, check=True, stdout=subprocess.DEVNULL)
        if not small:  # the family's vocabulary
            text = blend.read_text().replace("kind: bpe", "kind: tiktoken")
            blend.write_text(text.replace("blend: sample_small", "blend: sample"))
        preparing = ["prepare", "--blend", str(blend)]
        subprocess.run([*program, *preparing], env=self.environment, check=True, stdout=subprocess.DEVNULL)
        self.sequence = 256 if small else 4096
        changes = ("vision=internvit_tiny", "data.seq_length=256") if small else CUT
        changes = ("init.checkpoint=null", "data.micro_batch_size=2", *changes)
        for title, stage, frozen in (
            ("vision, the projector alone", "sft_vlm_projector", "[vision, language]"),
            ("vision, all parts", "sft_vlm", "[]"),
        ):
            settings = self.settings(1, 1, "bf16", 2, f"optim.frozen={frozen}", *changes)
            settings[0] = f"data.blend={blend}"
            self.train(title, stage, settings, stage="sft" if small else stage)


def main() -> None:
    """Run one part, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--gpus", type=int, help="how many (default: all that are visible)")
    parser.add_argument("--gpu", default="h200", help="their name in configs/gpus.yaml")
    parser.add_argument("--steps", type=int, default=50, help="of a run")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step; of one GPU in `scaling`")
    parser.add_argument("--small", action="store_true", help="dry run: the tiny model on two CPU ranks, ten steps")
    args = parser.parse_args()
    if args.small:
        args.gpus, args.steps, args.batch = 2, 10, 32
    elif args.gpus is None:
        import torch

        args.gpus = torch.cuda.device_count()
    bench = Bench(args)
    for part in PARTS if args.part == "all" else (args.part,):
        getattr(bench, part)()


if __name__ == "__main__":
    main()
