"""Make items: of each task and length the largest haystack that fits, then items by seed and number."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.progress import StageProgress
from nemotron_h.evaluation.long_context.item import Draft, Item, Request
from nemotron_h.evaluation.long_context.search import largest
from nemotron_h.evaluation.long_context.tasks import TASKS, tasks_named
from nemotron_h.evaluation.long_context.texts import Texts
from nemotron_h.evaluation.problems.generate import TRAIN, write_lines

#: ours: items one after the other that do not fit with the smallest haystack, at which none is taken to
_FRUITLESS = 200


class Maker:
    """Items of a task at a length; the same ones for the same arguments, whatever their number.

    Args:
        name: of the task.
        length: tokens of prompt, prefix and answer that an item has at most.
        seed: with task, length and number, of all choices.
        texts: of haystacks.
        count: returns the tokens of `prompt` and `prefix`, so named.
        practice: items are to train on: others at every seed, of the task's form for that.
    Errors:
        UserError: no item fits; names how many tokens one takes.
    """

    def __init__(
        self, name: str, length: int, seed: int, texts: Texts, count: Callable[[str, str], int], practice: bool = False
    ) -> None:
        self.name, self.length, self._texts, self._count = name, length, texts, count
        self._seed = f"{TRAIN} {seed}" if practice else str(seed)
        self.task = TASKS[name]
        self._budget, self._step = length - self.task.max_tokens, self.task.step_at(length)
        self._least = max(self.task.least, self._step)
        self._make = (practice and self.task.practice) or self.task.make
        self._units = self._largest()

    def items(self, count: int) -> Iterator[Item]:
        """Yield items; one whose texts are longer than those of the first has a smaller haystack, as RULER's have.

        An item that fits with none is left out, and the next takes its place.
        """
        number = made = fruitless = 0
        while made < count:
            if (fitting := self.fitting(number, self.sizes)) is not None:
                draft, tokens = fitting
                limits = {"rule": self.task.rule, "max_tokens": self.task.max_tokens}
                own = sorted(self._texts.own)
                yield Item(self.name, self.length, number, **vars(draft), **limits, tokens=tokens, own_texts=own)
                made, fruitless = made + 1, -1
            number, fruitless = number + 1, fruitless + 1
            if fruitless == _FRUITLESS:
                raise self._too_long()

    @property
    def sizes(self) -> range:
        """Return the sizes of haystacks, from the least to the largest that fits, in units."""
        return range(self._least, self._units + 1, self._step)

    def draft(self, number: int, units: int) -> Draft:
        """Return the texts of an item with so large a haystack, whatever its length."""
        rng = random.Random(f"{self._seed} {self.name} {self.length} {number}")
        count = functools.partial(self._count, prefix="")
        return self._make(Request(rng, units, number, self.length, self._texts, count))

    def _fits(self, number: int, units: int) -> bool:
        return self._tokens(number, units) <= self._budget

    def _tokens(self, number: int, units: int) -> int:
        draft = self.draft(number, units)
        return self._count(draft.prompt, draft.prefix)

    def _largest(self) -> int:
        most = self.task.most(self._texts)
        for number in range(_FRUITLESS):
            units = largest(functools.partial(self._fits, number), self._least, self._step, most)
            if units is not None:
                return units
        raise self._too_long()

    def fitting(self, number: int, sizes: range) -> tuple[Draft, int] | None:
        """Return the texts of an item with the largest haystack of some sizes that fits, and its tokens."""
        for units in reversed(sizes):
            draft = self.draft(number, units)
            if (tokens := self._count(draft.prompt, draft.prefix)) <= self._budget:
                return draft, tokens
        return None

    def _too_long(self) -> UserError:
        tokens = min(self._tokens(number, self._least) for number in range(8)) + self.task.max_tokens
        return UserError(
            f"--lengths {self.length:,}: an item of {self.name} takes {tokens:,} tokens at least, "
            f"{self.task.max_tokens} of them for the answer",
            hint=f"raise the length, or leave {self.name} out of --tasks",
        )


@dataclass(frozen=True)
class ItemSettings:
    """Items to make.

    Attributes:
        tasks, lengths: in order.
        samples: of each task and length.
        seed: see `Maker`.
        folder: of a user's texts, or None.
    """

    tasks: list[str]
    lengths: list[int]
    samples: int
    seed: int
    folder: Path | None

    @classmethod
    def of(cls, tasks: str, lengths: str | None, samples: int, seed: int, folder: Path | None) -> ItemSettings:
        """Return settings of tasks and lengths joined by commas.

        Errors:
            UserError: there are none, one is unknown, or named twice.
        """
        try:
            numbers = [int(part) for part in (lengths or "").split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < 1 or len({*numbers}) < len(numbers):
            raise UserError(f"--lengths {(lengths or '')[:40]!r} is no list of lengths", hint="write 4096,8192")
        return cls(tasks_named(tasks), sorted(numbers), samples, seed, folder)

    def items(self, count: Callable[[str, str], int], console: Console) -> list[Item]:
        """Return the items of all tasks and lengths.

        Args:
            count: see `Maker`.
            console: for the progress.
        Errors:
            UserError: see `Maker`; or texts are not there.
        """
        texts = Texts(self.folder, lambda text: console.print(text, markup=False))
        makers, items = [], []
        with StageProgress(console, "items", len(self.tasks) * sum(self.lengths) * (self.samples + 1)) as bar:
            for length in self.lengths:  # the shortest first: what does not fit is told at once
                for task in self.tasks:
                    makers.append(Maker(task, length, self.seed, texts, count))
                    bar.advance(length, f"items: size of {task}, {length:,} tokens")
            for maker in makers:
                bar.advance(0, f"items: {maker.name}, {maker.length:,} tokens")
                for item in maker.items(self.samples):
                    items.append(item)
                    bar.advance(maker.length)
        return items


def write_items(file: Path, items: Iterable[Item]) -> None:
    """Write items as `read_items` reads them."""
    with naming(str(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, (item.record() for item in items))
