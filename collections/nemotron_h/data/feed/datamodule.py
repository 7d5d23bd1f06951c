"""The Lightning data module that feeds a prepared blend to NeMo's trainer with `MegatronStrategy`.

Global batch `g` holds the samples `[g * global_batch_size, (g + 1) * global_batch_size)` of the data order, whatever
the world size and the micro-batch size. Where reading starts is read off the trainer's step each time that an
iterator is opened, never off a counter of its own: a resumed run and a second Lightning epoch go on with the next
sample. (NeMo's sampler starts at its `init_consumed_samples`, which stays 0 unless the data module restores it - the
mock module does not - while the counter that it prints is computed from the step; so it may read old samples and
print the right number.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nemo.lightning.megatron_parallel import MegatronStep
from torch.utils.data import DataLoader, Dataset, Sampler

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import number
from nemotron_h.data.blend import Blend, load_blend
from nemotron_h.data.feed.phase_plan import DataOrder, DataPlan, compare
from nemotron_h.data.feed.prepared_module import (
    ENDLESS,
    PreparedDataModule,
    PreparedDataSampler,
    of_sample,
    say,
)
from nemotron_h.data.feed.rows import RowSampler
from nemotron_h.data.feed.sampler import BlendSampler, ValidationText
from nemotron_h.data.indexed import TokenStream, document_numbers
from nemotron_h.data.phases import Horizon


class WindowDataset(Dataset):
    """Samples of a data order, by number: rows of one window, or of several short ones, which the model keeps apart.

    Args:
        sampler: says which windows feed a sample.
        streams: source -> its tokens.
        seq_length: tokens of a sample.
        samples: how many there are.
        training: whether reading starts at the trainer's position; else always at sample 0.
        document_reset: add `seq_idx`, which tells the model where documents begin. It has it in any case where some
            rows are several sequences, and then tells where these begin.

    Each item has int64 `[seq_length]` `tokens`, `labels`, `position_ids`, float32 `[seq_length]` `loss_mask` (all
    ones), int32 `[seq_length]` `seq_idx` if asked for, and the int64 number of the sample, `sample_ids`: NeMo's data
    step passes on only what the model takes, and callbacks can see which samples a batch held.
    """

    def __init__(
        self,
        sampler: BlendSampler | RowSampler,
        streams: dict[str, TokenStream],
        seq_length: int,
        samples: int,
        training: bool,
        document_reset: bool = False,
    ) -> None:
        self.sampler, self.seq_length, self.samples = sampler, seq_length, samples
        self.training, self.document_reset = training, document_reset
        self._streams = streams
        self._loss_mask = torch.ones(seq_length)
        self._position_ids = torch.arange(seq_length)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        windows = self.sampler.row(index)
        length = self.seq_length // len(windows)
        texts, starts = [], [np.arange(0, self.seq_length, length)]
        try:
            for place, window in zip(starts[0].tolist(), windows, strict=True):
                stream = self._streams[window.source]
                texts.append(stream.read(window.start, length + 1))
                if self.document_reset:
                    starts.append(place + stream.document_starts(window.start, length))
        except UserError as error:
            raise of_sample(index, error) from error
        item = {
            "tokens": _joined([text[:-1] for text in texts]),
            "labels": _joined([text[1:] for text in texts]),
            "loss_mask": self._loss_mask,
            "position_ids": self._position_ids,
            "sample_ids": torch.tensor(index),
        }
        if self.document_reset or self.sampler.mixed:
            item["seq_idx"] = torch.from_numpy(document_numbers(np.concatenate(starts), self.seq_length))
        return item


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


class MicroBatches(Sampler[list[int]]):
    """The micro-batches of one data-parallel rank, as sample numbers.

    Args:
        first: gives the first sample to read; asked each time that an iterator is opened.
        samples: number of samples of all ranks together; None: endless, without a length (Lightning would take the end
            of a known length for an epoch's end, and warns when a run resumes before it).
        micro_batch_size: samples per micro-batch and rank.
        rank: of this process among the data-parallel ranks.
        size: number of data-parallel ranks.
    """

    def __init__(
        self, first: Callable[[], int], samples: int | None, micro_batch_size: int, rank: int, size: int
    ) -> None:
        self.first, self.samples = first, samples
        self.micro_batch_size, self.rank, self.size = micro_batch_size, rank, size

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("the training data has no end")
        return self.samples // (self.micro_batch_size * self.size)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.size
        for start in itertools.count(self.first(), stride):
            if self.samples is not None and start + stride > self.samples:
                return
            mine = start + self.rank * self.micro_batch_size
            yield list(range(mine, mine + self.micro_batch_size))


class BlendDataSampler(PreparedDataSampler):
    """Answers to `MegatronStrategy` about batches: sizes, a loader's sampler, and the count of consumed samples."""

    _data: BlendDataModule

    def micro_batches(
        self, dataset: Dataset, first: Callable[[], int], samples: int | None, rank: int, size: int
    ) -> MicroBatches:
        """Return micro-batches of consecutive samples."""
        return MicroBatches(first, samples, self.micro_batch_size, rank, size)

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Return the samples consumed after so many steps of the run: `init_global_step` stays 0 here."""
        return self._data.order.sample_at(steps_since_resume)

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Announce the phase when it begins."""
        if not step.forward_only:
            self._data.announce_switch(step.step_i)
        return super().on_megatron_step_start(step)

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        """Log the number of the phase (from 1), so that the switches are plotted with the loss."""
        super().on_megatron_step_end(step)
        if step.trainer and getattr(step.trainer, "training", False):
            step.pl_module.log("blend_phase", float(self._data.phase_number(step.step_i)), batch_size=1)


class BlendDataModule(PreparedDataModule):
    """A prepared blend as training and validation data.

    Validation uses a fixed list of windows of the validation splits, always in the same order: independent of the
    training state, the seed, and the run's length. Its shares are the mean of all phases' shares, so that every
    category is seen, those of the late phases too. `limit_val_batches` of the trainer is its length in global
    batches, at most as many as the validation splits have windows for; 1.0 means about that many.

    Args:
        horizon_tokens: length of the run that the phases divide, the recipe's `tokens`. A trainer whose `max_steps`
            ends earlier trains the beginning of it; one that goes on for longer stretches the phases to its length.
        horizon_steps: the same in steps, in place of both: keeps the switches to come when a run is made longer; those
            behind it stay where they were.

    The others, and errors, are those of `PreparedDataModule`.
    """

    horizon_steps: int | None = number(None, least=1)
    horizon_tokens: int | None = number(None, least=1)
    sampler_type = BlendDataSampler

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.too_long is not None:
            raise UserError("data.too_long is unused: pretraining reads text", "Leave it out.")
        self.blend_change: str | None = None  # `ResumeRun` sets it: how to resume is not a setting of the data
        #: adds to the windows of a split; a distillation from stored logits sets it
        self.beside: Callable[[WindowDataset, str], Dataset] | None = None
        self.order: DataOrder | None = None
        self._resumed: dict[str, Any] | None = None

    @cached_property
    def blend_spec(self) -> Blend:
        """Return the blend as written.

        Errors:
            UserError: its sources are conversations.
        """
        blend = load_blend(self.blend)
        if blend.is_chat():
            raise UserError(
                f"data.blend = {self.blend} holds {blend.holds()}: pretraining reads text",
                "Take a recipe of stage sft or preference (nemo llm finetune), or a blend of text.",
            )
        return blend

    # Lightning

    def setup(self, stage: str = "") -> None:
        """Check the data and plan the run's order. A checkpoint's state, if any, is loaded after this."""
        _ = self.tokenizer
        self.order = DataOrder(self._plan())
        self._resumed, self._opened = None, False

    def train_dataloader(self) -> DataLoader:
        """Return micro-batches of shape `[micro_batch_size, seq_length]` per rank, from the trainer's step on.

        Errors:
            UserError: the trainer was restored to a step that the data was not.
        """
        if not self._opened:
            self._check_restored()
            self._announce_start()
            self._opened = True
        return self._loader(self.windows("train"))

    def val_dataloader(self) -> DataLoader:
        """Return the fixed validation list."""
        return self._loader(self.windows("validation"))

    def windows(self, split: str) -> Dataset:
        """Return the samples of `train`, without end, or of `validation`, by number."""
        training = split == "train"
        sampler, samples = (self.order.rows, ENDLESS) if training else self._validation
        streams = {name: self.manifest.stream(name, split) for name in sampler.names}
        windows = WindowDataset(sampler, streams, self.seq_length, samples, training, self.document_reset)
        return windows if self.beside is None else self.beside(windows, split)

    def state_dict(self) -> dict[str, Any]:
        """Return the data plan and what of it was consumed, for the checkpoint."""
        return self.order.state_dict(self.trainer.global_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the order of a checkpoint.

        Errors:
            UserError: it was trained on another plan, and `resume.blend_change` does not declare it.
        """
        plan = self._plan()
        self.order = DataOrder.resume(plan, state_dict, self.blend_change)
        self._resumed = state_dict
        old = DataPlan.from_dict(state_dict["plan"])
        differences, moved = compare(old, self.order.plan, state_dict["step"])
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            say(f"Data: from step {state_dict['step']:,} on, declared by resume.blend_change:\n{lines}")
        elif self.order.plan != plan:
            say("Data: phases that have begun go on; a run of this length from its start would have switched later")
        if moved:
            say("Data: switches to come have moved:\n" + "\n".join(f"  {line}" for line in moved))

    def record(self) -> dict[str, Any]:
        """Return the data's part of a run's record: the blend, the tokenizer, the sha256 of every file that is read,
        the order and how far it was followed.
        """
        return {**self._prepared_record(self._horizon().tokens), "order": self.state_dict()}

    def settings(self) -> dict[str, Any]:
        """Return `PreparedDataModule.settings`, and whether states are reset where documents begin."""
        return {**super().settings(), "data.document_reset": self.document_reset}

    # the order

    def lengths(self, step: int) -> dict[int, float]:
        """Return tokens of a sequence -> share of the tokens, of the phase that a step belongs to."""
        return self.order.phase_at(step).lengths(self.seq_length)

    def next_sample(self) -> int:
        """Return the sample that the trainer's next step begins with."""
        return self.order.sample_at(self.trainer.global_step)

    def phase_number(self, step: int) -> int:
        """Return the number of a step's phase, from 1."""
        return self.order.plan.phases.index(self.order.phase_at(step)) + 1

    def announce_switch(self, step: int) -> None:
        """Log a line when a phase begins with this step."""
        phase = self.order.phase_at(step)
        if step == phase.first_step and step > 0:
            say(f"Data: step {step:,} begins phase {self.phase_number(step)}, {self._described(step)}")

    def _check_restored(self) -> None:
        step, restored = self.trainer.global_step, self._resumed["step"] if self._resumed else 0
        if step != restored:
            raise UserError(
                f"the trainer goes on at step {step:,}, but the checkpoint's data state is "
                + (f"of step {restored:,}" if self._resumed else "missing: the run would read its first samples again"),
                "Resume from a checkpoint that this data module wrote.",
            )

    def _announce_start(self) -> None:
        step, phases = self.trainer.global_step, len(self.order.plan.phases)
        first = self.next_sample()
        say(
            f"Data: blend {self.order.plan.blend}, {first:,} samples consumed; step {step:,} is in phase "
            f"{self.phase_number(step)} of {phases}, {self._described(step)}"
        )

    def _described(self, step: int) -> str:
        phase = self.order.phase_at(step)
        text = f"{phase.name} (to step {phase.end_step:,}): {self._categories(phase.shares)}"
        if phase.short is None:
            return text
        short = f"{phase.short.share:g} of the rows are sequences of {phase.short.seq_length:,}"
        return f"{text}; {short}: {self._categories(phase.short.shares)}"

    def _categories(self, shares: Mapping[str, float]) -> str:
        """Return the shares of sources as those of their categories, the largest first."""
        categories: dict[str, float] = {}
        for name, share in shares.items():
            category = self.blend_spec.sources[name].category
            categories[category] = categories.get(category, 0.0) + share
        return ", ".join(f"{c} {s:.1%}" for c, s in sorted(categories.items(), key=lambda item: -item[1]))

    def _horizon(self) -> Horizon:
        tokens_per_step = self.seq_length * self.global_batch_size
        horizon = Horizon(self.horizon_tokens or 0, tokens_per_step)
        steps = self.horizon_steps or max(self.trainer.max_steps, horizon.steps)
        if steps < 1:
            raise UserError(
                "the phases of the blend need the run's length", "Set tokens, trainer.max_steps or data.horizon_steps."
            )
        return horizon if horizon.steps == steps else Horizon.from_steps(steps, tokens_per_step)

    def _plan(self) -> DataPlan:
        horizon = self._horizon()
        batches = self.seq_length, self.global_batch_size, self.seed
        return DataPlan.of(self.blend_spec, self.manifest, horizon, *batches, self.phase_order)

    @cached_property
    def _validation(self) -> tuple[BlendSampler, int]:
        """Return the sampler of the validation list and its length."""
        text = ValidationText.of(self.blend_spec, self.manifest, self.seq_length)
        if text.left_out:
            names = ", ".join(text.left_out)
            say(f"Data: validation leaves out {names}: less text than a window of {self.seq_length:,}")
        limit, whole = self.trainer.limit_val_batches, max(1, text.windows // self.global_batch_size)
        if isinstance(limit, int) and limit > whole:
            say(f"Data: validation takes {whole:,} global batches, not {limit:,}: more would repeat held-out text")
            limit = whole
        batches = limit if isinstance(limit, int) else max(1, int(limit * text.windows) // self.global_batch_size)
        samples = batches * self.global_batch_size
        return text.sampler(samples), samples
