"""The Lightning data module that feeds packed conversations to NeMo's trainer with `MegatronStrategy`.

A window holds whole conversations, each with states and attention of its own (`seq_idx`), and padding behind them that
is in no loss. Global batch `g` holds the windows `[g * global_batch_size, (g + 1) * global_batch_size)` of
`PackedOrder`, whatever the world size; which rank takes which balances their work. As in `data.feed.datamodule`,
reading starts where the trainer's step says, so a resumed run goes on with the next window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import CONVERSATIONS, Blend, load_blend
from nemotron_h.data.feed.packing import Item, PackedOrder, balanced
from nemotron_h.data.feed.prepared_module import (
    ENDLESS,
    PreparedDataModule,
    PreparedDataSampler,
    of_sample,
    say,
)
from nemotron_h.data.feed.sampler import VALIDATION_SEED
from nemotron_h.data.indexed import ArrayFile, TokenStream, read_lengths
from nemotron_h.schema.recipe import TOO_LONG


class Conversations:
    """The conversations of one split of a source that fit into a window.

    A conversation of n tokens takes n - 1 positions: each predicts the token after it. A longer one than the window is
    truncated to it (`too_long` is `cut`), or left out (`drop`); one whose truncated part has nothing to learn is left
    out too.

    Args:
        stream: the tokens of all.
        seq_length: positions of a window.
        too_long: one of `schema.TOO_LONG`.

    Attributes:
        lengths: positions that each takes, int64 [conversations].
        cut, dropped: how many were truncated, and left out.
        tokens_lost: tokens of both that are not seen.
    """

    def __init__(self, stream: TokenStream, seq_length: int, too_long: str) -> None:
        self._stream, self._loss = stream, ArrayFile(stream.prefix + ".loss", np.uint8)
        tokens = read_lengths(stream.prefix + ".idx").astype(np.int64)
        starts = np.cumsum(tokens) - tokens
        keep = np.ones(len(tokens), dtype=bool)
        for number in np.flatnonzero(tokens - 1 > seq_length).tolist():
            inside = self._loss.read(starts[number] + 1, starts[number] + seq_length + 1)
            keep[number] = too_long == "cut" and bool(inside.any())
        self._starts, self.lengths = starts[keep], np.minimum(tokens - 1, seq_length)[keep]
        self.cut, self.dropped = int((tokens[keep] - 1 > seq_length).sum()), int((~keep).sum())
        self.tokens_lost = int(tokens.sum() - self.lengths.sum() - len(self.lengths))

    def costs(self) -> np.ndarray:
        """Return the attention work of each conversation, int64 [conversations]."""
        return self.lengths**2

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids, int64 [length + 1], and a mask of those that are learnt, float32 [length + 1]."""
        begin, count = int(self._starts[number]), int(self.lengths[number]) + 1
        return self._stream.read(begin, count), self._loss.read(begin, begin + count).astype(np.float32)


@dataclass(frozen=True)
class WindowList:
    """A fixed number of windows of an order; those behind `filled` are padding alone."""

    order: PackedOrder
    filled: int

    def window(self, number: int) -> list[Item]:
        """Return the conversations of a window."""
        return self.order.window(number) if number < self.filled else []

    def cost(self, number: int) -> int:
        """Return the attention work of a window, as `PackedOrder.cost`."""
        return self.order.cost(number) if number < self.filled else 0


def packed_window(
    conversations: list[tuple[np.ndarray, np.ndarray]], seq_length: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """Return a window as the model takes it.

    Args:
        conversations: token ids and whether each is learnt, `[length + 1]` both.
        seq_length: positions of the window.
        pad_id: fills tokens and labels behind the last conversation.
    Returns:
        int64 `[seq_length]` tokens, labels, position_ids; float32 `[seq_length]` loss_mask; int32 `[seq_length]`
        seq_idx, the number of the conversation that a position belongs to (padding has one of its own).
    """
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels, loss_mask = tokens.copy(), np.zeros(seq_length, dtype=np.float32)
    seq_idx = np.full(seq_length, len(conversations), dtype=np.int32)
    begin = 0
    for number, (ids, learnt) in enumerate(conversations):
        place = slice(begin, begin := begin + len(ids) - 1)
        tokens[place], labels[place], loss_mask[place], seq_idx[place] = ids[:-1], ids[1:], learnt[1:], number
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "seq_idx": seq_idx}
    return {
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        "position_ids": torch.arange(seq_length),
    }


class PackedDataset(Dataset):
    """Windows of packed conversations, by number.

    Args:
        windows: says which conversations a window holds.
        sources: source -> its conversations.
        seq_length: positions of a window.
        pad_id: of the tokenizer.
        samples: how many windows there are.
        training: whether reading starts at the trainer's position; else always at window 0.

    Each item is `packed_window`'s, with the int64 number of the window, `sample_ids`.
    """

    def __init__(
        self,
        windows: PackedOrder | WindowList,
        sources: dict[str, Conversations],
        seq_length: int,
        pad_id: int,
        samples: int,
        training: bool,
    ) -> None:
        self.windows, self.sources = windows, sources
        self.seq_length, self.pad_id = seq_length, pad_id
        self.samples, self.training = samples, training

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        try:
            read = [self.sources[item.source].read(item.number) for item in self.windows.window(index)]
        except UserError as error:
            raise of_sample(index, error) from error
        return {**packed_window(read, self.seq_length, self.pad_id), "sample_ids": torch.tensor(index)}


class BalancedMicroBatches(Sampler[list[int]]):
    """The micro-batches of one data-parallel rank, as window numbers: global batch by global batch, shared out by cost.

    Args:
        cost: of a window, by its number.
        first: gives the first window to read; asked each time that an iterator is opened.
        samples: number of windows of all ranks together; None is endless.
        global_batch_size, micro_batch_size: windows per step over all ranks, and per micro-batch and rank.
        rank, size: of this process among the data-parallel ranks, and their number.
    """

    def __init__(
        self,
        cost: Callable[[int], int],
        first: Callable[[], int],
        samples: int | None,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        size: int,
    ) -> None:
        self.cost, self.first, self.samples = cost, first, samples
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.size = rank, size

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("the training data has no end")
        return self.samples // (self.micro_batch_size * self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in itertools.count(self.first(), self.global_batch_size):
            if self.samples is not None and begin >= self.samples:
                return
            costs = np.array([self.cost(begin + n) for n in range(self.global_batch_size)])
            for micro_batch in balanced(costs, self.size, self.micro_batch_size):
                yield [begin + n for n in micro_batch[self.rank].tolist()]


class ConversationSampler(PreparedDataSampler):
    """Answers to `MegatronStrategy` about batches of conversations."""

    def micro_batches(
        self, dataset: PackedDataset, first: Callable[[], int], samples: int | None, rank: int, size: int
    ) -> BalancedMicroBatches:
        """Return micro-batches that balance the ranks' work."""
        sizes = (self.global_batch_size, self.micro_batch_size, rank, size)
        return BalancedMicroBatches(dataset.windows.cost, first, samples, *sizes)

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Return the windows consumed after so many steps of the run: `init_global_step` stays 0 here."""
        return steps_since_resume * self.global_batch_size


class ConversationDataModule(PreparedDataModule):
    """A prepared blend of conversations as training and validation data.

    Validation reads the held-out conversations in a fixed packing, each once: `limit_val_batches` global batches at
    most, the last filled up with padding.

    Arguments and errors are those of `PreparedDataModule`.
    """

    sampler_type = ConversationSampler

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.too_long not in TOO_LONG:
            raise UserError(f"data.too_long = {self.too_long!r}", hint=f"Known: {', '.join(TOO_LONG)}.")
        self._restored_step = 0

    unit = "conversations"  # what is packed, as messages call it
    source_type = Conversations
    holds, reader = CONVERSATIONS, "fine-tuning"
    example = "whose sources have `chat`, such as sft_sample"

    @cached_property
    def blend_spec(self) -> Blend:
        """Return the blend as written.

        Errors:
            UserError: its sources are something else than `holds`.
        """
        blend = load_blend(self.blend)
        if blend.holds() != self.holds:
            raise UserError(
                f"data.blend = {self.blend} holds {blend.holds()}: {self.reader} reads {self.holds}",
                f"Name a blend {self.example}.",
            )
        return blend

    @cached_property
    def training(self) -> dict[str, Conversations]:
        """Return source -> the conversations to train on."""
        return self._conversations("train")

    @cached_property
    def order(self) -> PackedOrder:
        """Return the windows of the run."""
        return self._order(self.training, self.blend_spec.source_shares(0), self.seed)

    def _order(self, sources: dict[str, Conversations], shares: dict[str, float], seed: int) -> PackedOrder:
        lengths = {name: source.lengths for name, source in sources.items()}
        costs = {name: source.costs() for name, source in sources.items()}
        return PackedOrder(lengths, shares, self.seq_length, seed, costs)

    def _each_once(self, sources: dict[str, Conversations], seed: int) -> PackedOrder:
        """Return the order whose first round holds every conversation once."""
        lengths = {name: int(source.lengths.sum()) for name, source in sources.items() if len(source.lengths)}
        total = sum(lengths.values())
        return self._order(sources, {name: length / total for name, length in lengths.items()}, seed)

    def _conversations(self, split: str) -> dict[str, Conversations]:
        named = [name for name, share in self.blend_spec.source_shares(0).items() if share > 0]
        return {name: self._source(name, split) for name in named if self.manifest.prefix(name, split)}

    def _source(self, name: str, split: str) -> Conversations:
        return self.source_type(self.manifest.stream(name, split), self.seq_length, self.too_long)

    # Lightning

    def setup(self, stage: str = "") -> None:
        """Check the data and pack its first round. A checkpoint's state, if any, is loaded after this."""
        _ = self.tokenizer
        _ = self.order.round(0)
        self._restored_step, self._opened = 0, False

    def train_dataloader(self) -> DataLoader:
        """Return micro-batches of shape `[micro_batch_size, seq_length]` per rank, from the trainer's step on.

        Errors:
            UserError: the trainer was restored to a step that the data was not.
        """
        step = self.trainer.global_step
        if step != self._restored_step and not self._opened:
            raise UserError(
                f"the trainer goes on at step {step:,}, the checkpoint's data state is of step {self._restored_step:,}",
                "Resume from a checkpoint that this data module wrote.",
            )
        if not self._opened:
            say(self._described())
            self._opened = True
        return self._packed_loader(self.order, self.training, ENDLESS, training=True)

    def val_dataloader(self) -> DataLoader:
        """Return the fixed validation list."""
        windows, samples = self._validation
        return self._packed_loader(windows, self._held_out, samples, training=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings of the order and how far it was followed, for the checkpoint."""
        return {"step": self.trainer.global_step, "plan": self._plan()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the order of a checkpoint.

        Errors:
            UserError: it was trained on other data, or in another order.
        """
        if "plan" not in state_dict or "too_long" not in state_dict["plan"]:
            raise UserError("the checkpoint's data is not conversations", "Start from its weights: init.checkpoint=RUN")
        now, then = self._plan(), state_dict["plan"]
        changed = [f"  {key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        if changed:
            raise UserError(
                "the checkpoint was trained on other data, or in another order:\n" + "\n".join(changed),
                "Restore these settings, or start a new run from its weights: init.checkpoint=RUN",
            )
        self._restored_step = state_dict["step"]

    def record(self) -> dict[str, Any]:
        """Return the data's part of a run's record: the blend, the tokenizer, the sha256 of every file that is read,
        how conversations fit, the order and how far it was followed.
        """
        return {
            **self._prepared_record(self.trainer.max_steps * self.global_batch_size * self.seq_length),
            "conversations": {
                name: {"used": len(c.lengths), "cut": c.cut, "dropped": c.dropped, "tokens_lost": c.tokens_lost}
                for name, c in self.training.items()
            },
            "order": self.state_dict(),
        }

    def next_sample(self) -> int:
        """Return the window that the trainer's next step begins with."""
        return self.trainer.global_step * self.global_batch_size

    def _plan(self) -> dict[str, Any]:
        """Return the settings that the order of the data depends on."""
        manifest, shares = self.manifest, self.blend_spec.source_shares(0)
        return {
            "blend": self.blend_spec.name,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "global_batch_size": self.global_batch_size,
            "too_long": self.too_long,
            "sources": {
                name: {"share": shares[name], "sha256": [split.sha256_bin, split.sha256_loss]}
                for name in sorted(self.training)
                if (split := manifest.sources[name].splits["train"])
            },
        }

    def _described(self) -> str:
        used = sum(len(c.lengths) for c in self.training.values())
        windows = self.order.round(0)
        positions = sum(int(self.training[i.source].lengths[i.number]) for window in windows for i in window)
        cut, dropped, lost = (
            sum(getattr(c, key) for c in self.training.values()) for key in ("cut", "dropped", "tokens_lost")
        )
        text = (
            f"Data: blend {self.blend_spec.name}, {used:,} {self.unit}; a round packs them into {len(windows):,} "
            f"windows of {self.seq_length:,}, {positions / (len(windows) * self.seq_length):.1%} full"
        )
        if cut or dropped:
            text += f"; longer than a window: {cut:,} cut, {dropped:,} left out ({lost:,} tokens not seen)"
        rounds = self.trainer.max_steps * self.global_batch_size / len(windows)
        return f"{text}; the run is about {rounds:.2f} rounds"

    @cached_property
    def _held_out(self) -> dict[str, Conversations]:
        return self._conversations("validation")

    @cached_property
    def _validation(self) -> tuple[WindowList, int]:
        """Return the validation windows and their number."""
        if not any(len(source.lengths) for source in self._held_out.values()):
            raise UserError(
                f"blend {self.blend_spec.name!r} holds out no conversation that fits into {self.seq_length:,} tokens",
                "Hold out more (`validation` of the sources), or set trainer.limit_val_batches=0.",
            )
        order = self._each_once(self._held_out, VALIDATION_SEED)
        windows, limit = len(order.round(0)), self.trainer.limit_val_batches
        batches = -(-windows // self.global_batch_size)
        batches = min(limit, batches) if isinstance(limit, int) else max(1, int(limit * batches))
        samples = batches * self.global_batch_size
        return WindowList(order, min(windows, samples)), samples

    def _packed_loader(
        self, windows: PackedOrder | WindowList, sources: dict[str, Conversations], samples: int, training: bool
    ) -> DataLoader:
        pad_id = self.tokenizer.pad_id
        return self._loader(PackedDataset(windows, sources, self.seq_length, pad_id, samples, training))
