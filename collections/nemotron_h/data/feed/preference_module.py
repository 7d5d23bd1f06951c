"""The Lightning data module of preference training: packed pairs of conversations, with the reference's log-probs.

A pair's two conversations stand side by side in one window, each with states and attention of its own, so no
micro-batch and no rank has one without the other. Order, packing, resuming and validation are those of
`data.feed.sft_module`, of pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import PAIRS
from nemotron_h.data.feed.packing import PackedOrder
from nemotron_h.data.feed.prepared_module import of_sample, say
from nemotron_h.data.feed.sampler import VALIDATION_SEED
from nemotron_h.data.feed.sft_module import ConversationDataModule, PackedDataset, WindowList, packed_window
from nemotron_h.data.indexed import ArrayFile, TokenStream, read_lengths
from nemotron_h.data.pairs import REJECTED

#: source -> summed log-probabilities of every pair's answers, float64 [pairs, 2]: chosen, rejected
Reference = dict[str, np.ndarray]


class Pairs:
    """The pairs of one split of a source that fit into a window.

    A pair takes the positions of both its conversations. Of one longer than the window, `cut` ends both at half of it
    (one takes what the other leaves); a pair whose truncated conversations are equal, or teach nothing, is left out;
    `drop` leaves out every longer one.

    Args:
        stream: the tokens of all.
        seq_length: positions of a window.
        too_long: one of `schema.TOO_LONG`.

    Attributes:
        lengths: positions that each takes, int64 [pairs].
        rewards: of each, float32 [pairs, 2], NaN where there are none.
        cut, dropped: how many were truncated, and left out.
        tokens_lost: tokens of both that are not seen.
    """

    def __init__(self, stream: TokenStream, seq_length: int, too_long: str) -> None:
        self._stream, self._loss = stream, ArrayFile(stream.prefix + ".loss", np.uint8)
        tokens = read_lengths(stream.prefix + ".idx").astype(np.int64)
        starts = np.cumsum(tokens) - tokens
        rejected = np.add.reduceat(self._loss.read(0, self._loss.size) >= REJECTED, starts, dtype=np.int64)
        self._starts = np.stack([starts, starts + tokens - rejected], 1)
        whole = np.stack([tokens - rejected, rejected], 1) - 1
        self._sides = whole.copy()  # positions of the chosen and the rejected conversation, [pairs, 2]
        keep = np.ones(len(tokens), dtype=bool)
        for number in np.flatnonzero(whole.sum(1) > seq_length).tolist():
            a, b = whole[number].tolist()
            half = seq_length // 2
            self._sides[number] = min(a, max(half, seq_length - b)), min(b, max(seq_length - half, seq_length - a))
            keep[number] = too_long == "cut" and self._teaches(number)
        cut = self._sides.sum(1) < whole.sum(1)
        self.cut, self.dropped = int((cut & keep).sum()), int((~keep).sum())
        self._starts, self._sides = self._starts[keep], self._sides[keep]
        self.lengths = self._sides.sum(1)
        self.tokens_lost = int(tokens.sum() - self.lengths.sum() - 2 * len(self.lengths))
        self.rewards = np.fromfile(stream.prefix + ".rewards", dtype=np.float32).reshape(-1, 2)[keep]

    def _teaches(self, number: int) -> bool:
        (chosen, chosen_loss), (rejected, rejected_loss) = self.read(number)
        return bool(chosen_loss[1:].any() and rejected_loss[1:].any()) and not np.array_equal(chosen, rejected)

    def costs(self) -> np.ndarray:
        """Return the attention work of each pair, int64 [pairs]."""
        return (self._sides**2).sum(1)

    def read(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the chosen and the rejected conversation: token ids, int64 [length + 1], and of each token whether it
        is learnt, float32 [length + 1].
        """
        found = []
        for start, length in zip(self._starts[number].tolist(), self._sides[number].tolist(), strict=True):
            learnt = self._loss.read(start, start + length + 1) & 1
            found.append((self._stream.read(start, length + 1), learnt.astype(np.float32)))
        return found


def pair_window(
    pairs: list[list[tuple[np.ndarray, np.ndarray]]],
    reference: np.ndarray,
    reward_gaps: np.ndarray,
    seq_length: int,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """Return a window as the model and the loss take it.

    Args:
        pairs: of each, the chosen and the rejected conversation as `packed_window` takes them.
        reference: float64 [pairs, 2], log-probabilities of both answers.
        reward_gaps: float64 [pairs], the chosen answer's reward less the rejected one's.
        seq_length: positions of the window.
        pad_id: fills what is left.
    Returns:
        `packed_window`'s, where pair n is the conversations 2 n and 2 n + 1; int64 `pairs`, their number; and float64
        `reference` [seq_length // 2, 2] and `reward_gap` [seq_length // 2], zero behind the last pair.
    """
    window = packed_window([side for pair in pairs for side in pair], seq_length, pad_id)
    slots = seq_length // 2  # a conversation takes one position at least
    padded = torch.zeros(slots, 2, dtype=torch.float64), torch.zeros(slots, dtype=torch.float64)
    for target, values in zip(padded, (reference, reward_gaps), strict=True):
        target[: len(pairs)] = torch.from_numpy(np.asarray(values, dtype=np.float64))
    return {**window, "pairs": torch.tensor(len(pairs)), "reference": padded[0], "reward_gap": padded[1]}


class PairDataset(PackedDataset):
    """Windows of packed pairs, by number; see `PackedDataset` and `pair_window`.

    Args:
        reference: of each source, or None while it is being computed (zeros are given then).
        reward_gap: of pairs whose records state no rewards.
    """

    def __init__(self, *args: Any, reference: Reference | None, reward_gap: float | None) -> None:
        super().__init__(*args)
        self.reference, self.reward_gap = reference, reward_gap

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        items = self.windows.window(index)
        try:
            pairs = [self.sources[item.source].read(item.number) for item in items]
        except UserError as error:
            raise of_sample(index, error) from error
        reference, gaps = np.zeros((len(items), 2)), np.zeros(len(items))
        for place, item in enumerate(items):
            if self.reference is not None:
                reference[place] = self.reference[item.source][item.number]
            chosen, rejected = self.sources[item.source].rewards[item.number].astype(np.float64)
            gaps[place] = chosen - rejected
        if self.reward_gap is not None:
            gaps = np.where(np.isnan(gaps), self.reward_gap, gaps)
        window = pair_window(pairs, reference, gaps, self.seq_length, self.pad_id)
        return {**window, "sample_ids": torch.tensor(index)}


class PreferenceDataModule(ConversationDataModule):
    """A prepared blend of pairs as training and validation data; `global_batch_size` counts windows.

    Args:
        reward_gap: the chosen answer's reward less the rejected one's, for records without rewards.

    The others, and errors, are those of `PreparedDataModule`.

    Attributes:
        reference: split -> what the starting weights say of its pairs; given before the first batch is read.
        reference_record: how it was found, for the run's record.
    """

    reward_gap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference: dict[str, Reference] = {}
        self.reference_record: dict[str, Any] = {}

    unit = "pairs"
    source_type = Pairs
    holds, reader = PAIRS, "preference training"
    example = "whose sources have `chat: preference`, such as preference_sample"

    def settings(self) -> dict[str, Any]:
        """Return `PreparedDataModule.settings`, and what stands in for rewards."""
        return {**super().settings(), "preference.reward_gap": self.reward_gap}

    def splits(self) -> dict[str, dict[str, Pairs]]:
        """Return the pairs of every split that is read: `train`, and `validation` where validations are made."""
        held_out = self._held_out if self.trainer.limit_val_batches else {}
        return {"train": self.training} | ({"validation": held_out} if held_out else {})

    def check_rewards(self) -> None:
        """Check that every pair has the rewards that the loss reads.

        Errors:
            UserError: a pair has none, and no `reward_gap` stands in.
        """
        if self.reward_gap is not None:
            return
        for split, sources in self.splits().items():
            for name, pairs in sources.items():
                missing = int(np.isnan(pairs.rewards).any(1).sum())
                if missing:
                    raise UserError(
                        f"preference.loss reads rewards, and {missing:,} of {len(pairs.rewards):,} pairs of source "
                        f"{name} ({split}) state none",
                        "Give the records chosen_reward and rejected_reward, set preference.reward_gap to one "
                        "difference for all, or take preference.loss: dpo.",
                    )

    def reference_dataset(self, split: str) -> PairDataset:
        """Return the windows that hold every pair of a split once, without a reference; those of training's first round
        where it has one source.
        """
        sources = self.splits()[split]
        order = self._each_once(sources, self.seed if split == "train" else VALIDATION_SEED)
        filled = len(order.round(0))
        size = -(-filled // self.micro_batch_size) * self.micro_batch_size
        return self._dataset(WindowList(order, filled), sources, size, training=False, reference=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `ConversationDataModule`, with the reference."""
        return {**super().state_dict(), "reference": self.reference_record.get("sha256")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the order of a checkpoint, and say when the reference is another than it was trained with.

        Errors:
            UserError: it was trained on other data, or in another order.
        """
        super().load_state_dict(state_dict)
        then, now = state_dict.get("reference"), self.reference_record.get("sha256")
        if then != now:
            say(
                "Warning: the reference log-probs are not the checkpoint's: they were computed again, on another "
                "layout or machine; the run goes on with the new ones"
            )

    def record(self) -> dict[str, Any]:
        """Return the record of `ConversationDataModule`, with the reference."""
        return {**super().record(), "reward_gap": self.reward_gap, "reference": self.reference_record}

    def _plan(self) -> dict[str, Any]:
        plan = super()._plan()
        for name, source in plan["sources"].items():
            source["sha256"].append(self.manifest.sources[name].splits["train"].sha256_rewards)
        return {**plan, "reward_gap": self.reward_gap}

    def _described(self) -> str:
        pairs = sum(len(source.lengths) for source in self.training.values())
        step = pairs / len(self.order.round(0)) * self.global_batch_size
        return f"{super()._described()}; a step holds about {step:.0f} pairs"

    def _packed_loader(
        self, windows: PackedOrder | WindowList, sources: dict[str, Pairs], samples: int, training: bool
    ) -> DataLoader:
        reference = self.reference["train" if training else "validation"]
        return self._loader(self._dataset(windows, sources, samples, training, reference))

    def _dataset(
        self,
        windows: PackedOrder | WindowList,
        sources: dict[str, Pairs],
        samples: int,
        training: bool,
        reference: Reference | None,
    ) -> PairDataset:
        return PairDataset(
            windows,
            sources,
            self.seq_length,
            self.tokenizer.pad_id,
            samples,
            training,
            reference=reference,
            reward_gap=self.reward_gap,
        )
