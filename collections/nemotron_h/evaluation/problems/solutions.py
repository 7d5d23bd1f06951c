"""Solutions that a model has sampled, as data: texts and conversations to imitate, and pairs of right and wrong ones.

FOLDER/train/TASK.jsonl   records with `text` and `messages`, of the solutions that are kept
       pairs.jsonl        pairs of answers: `prompt`, `chosen`, `rejected` and their rewards, 1 and 0
       solutions.yaml, solutions_chat.yaml, pairs.yaml    blends of these, with the model's tokenizer and template
       template.jinja     where the template is not the family's
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.files import whole_file
from nemotron_h.data.blend import PREFERENCE
from nemotron_h.data.chat import FAMILY_SOURCE, FAMILY_TEMPLATE
from nemotron_h.evaluation.problems.answers import answer_of
from nemotron_h.evaluation.problems.generate import TRAIN, write_blend, write_lines
from nemotron_h.evaluation.problems.problem import Problem

ALL, RIGHT, SHORTEST = KEEP = ("all", "right", "shortest-right")
PAIRS = "pairs"
#: ours: share of the pairs that a training validates on
VALIDATION = 0.05
#: writes the turns of a problem as the document that `nemotron-h data problems` writes of it
TEXT_SOURCE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '\n' + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('a text has no ' + message['role'] + ' message') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Written:
    """A sample of a problem.

    Attributes:
        text: without white space around it.
        tokens: of it.
        ended: it ended by itself; else it was cut off, and is neither kept nor in a pair.
    """

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Judged:
    """The different solutions of a problem, each once, in the order of their samples.

    Attributes:
        right, wrong: (text, tokens).
        samples, unfinished: how many were drawn, and cut off.
        right_samples: those with a right answer.
    """

    problem: Problem
    right: list[tuple[str, int]]
    wrong: list[tuple[str, int]]
    samples: int
    unfinished: int
    right_samples: int

    @classmethod
    def of(cls, problem: Problem, written: Sequence[Written]) -> Judged:
        """Judge samples by the problem's exact check."""
        right: dict[str, int] = {}
        wrong: dict[str, int] = {}
        ended = [each for each in written if each.ended and each.text]
        count = 0
        for each in ended:
            answer = answer_of(each.text)
            is_right = answer is not None and problem.right(answer)
            count += is_right
            (right if is_right else wrong).setdefault(each.text, each.tokens)
        return cls(problem, [*right.items()], [*wrong.items()], len(written), len(written) - len(ended), count)

    def kept(self, keep: str) -> list[str]:
        """Return the solutions to imitate.

        Args:
            keep: one of `KEEP`; of the shortest ones, in tokens, the first.
        """
        if keep == SHORTEST:
            return [text for text, _ in sorted(self.right, key=lambda each: each[1])[:1]]
        return [text for text, _ in (self.right if keep == RIGHT else [*self.right, *self.wrong])]

    def pairs(self, most: int, seed: int) -> list[tuple[str, str]]:
        """Return different pairs of a right and a wrong solution; both take turns, in a random order.

        Args:
            seed: of the orders; they depend on it and on the problem alone.
        """
        rng = random.Random(f"{seed} {self.problem.question}")
        right, wrong = ([text for text, _ in each] for each in (self.right, self.wrong))
        for each in (right, wrong):
            rng.shuffle(each)
        if not right or not wrong:
            return []
        # in rounds of the least common multiple each pair comes once; the next round is moved by one
        turn = math.lcm(len(right), len(wrong))
        numbers = range(min(most, len(right) * len(wrong)))
        return [(right[i % len(right)], wrong[(i + i // turn) % len(wrong)]) for i in numbers]


@dataclass(frozen=True)
class Form:
    """The way in which a model was asked, and is trained.

    Attributes:
        template: Jinja text.
        system: a system message, or nothing.
        tokenizer: as a blend has it.
    """

    template: str
    system: str
    tokenizer: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Counts of what was written, over problems.

    Attributes:
        solutions, pairs: that are in the files.
        all_right, all_wrong: problems that give no pair.
        rows: of each task: its name, problems, samples, share of right ones, unfinished ones, solutions and pairs.
        files: that were written.
    """

    solutions: int
    pairs: int
    all_right: int
    all_wrong: int
    rows: list[tuple[str, int, int, float, int, int, int]]
    files: list[Path]


def write_solutions(
    folder: Path,
    judged: Sequence[Judged],
    form: Form,
    keep: str,
    most_pairs: int,
    seed: int,
    validation: float = VALIDATION,
) -> Summary:
    """Write solutions and pairs, and their blends where there are any.

    Args:
        keep: which solutions are written.
        most_pairs: of each problem.
        seed: of the choice of pairs.
        validation: share of the pairs that is held out.
    """
    tasks = list(dict.fromkeys(each.problem.task for each in judged))
    of_task = {task: [each for each in judged if each.problem.task == task] for task in tasks}
    kept = {task: list(_kept(members, form.system, keep)) for task, members in of_task.items()}
    pairs = {task: list(_pairs(members, form.system, most_pairs, seed)) for task, members in of_task.items()}
    (folder / TRAIN).mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob(f"{TRAIN}/*.jsonl"), *folder.glob("*.yaml"), folder / f"{PAIRS}.jsonl"):
        stale.unlink(missing_ok=True)  # of another choice
    own = folder / "template.jinja"
    if form.template != FAMILY_SOURCE:
        with whole_file(own) as temporary:
            temporary.write_text(form.template, encoding="utf-8")
    template = FAMILY_TEMPLATE if form.template == FAMILY_SOURCE else own.name
    files, paths = [], {}
    for task, records in kept.items():
        if records:
            paths[task] = f"{TRAIN}/{task}.jsonl"
            files.append(folder / paths[task])
            write_lines(files[-1], records)
    forms: dict[str, tuple[Mapping[str, str], dict[str, Any]]] = {
        "solutions": (paths, {}),
        "solutions_chat": (paths, {"chat": "messages"}),
    }
    if found := list(itertools.chain.from_iterable(pairs.values())):
        files.append(folder / f"{PAIRS}.jsonl")
        write_lines(files[-1], found)
        forms[PAIRS] = ({PAIRS: files[-1].name}, {"chat": PREFERENCE, "validation": validation})
    for stem, (sources, keys) in forms.items():
        if sources:
            more = {"tokenizer": form.tokenizer} | ({"chat_template": template} if keys else {})
            files.append(write_blend(folder / f"{stem}.yaml", sources, keys, **more))
    rows = [
        (
            task,
            len(members),
            (samples := sum(each.samples for each in members)),
            sum(each.right_samples for each in members) / max(1, samples),
            sum(each.unfinished for each in members),
            len(kept[task]),
            len(pairs[task]),
        )
        for task, members in of_task.items()
    ]
    return Summary(
        sum(map(len, kept.values())),
        len(found),
        sum(not each.wrong for each in judged if each.right),
        sum(not each.right for each in judged),
        rows,
        files,
    )


def _kept(judged: Sequence[Judged], system: str, keep: str) -> Iterator[dict[str, Any]]:
    for each in judged:
        yield from (each.problem.told(text, system) for text in each.kept(keep))


def _pairs(judged: Sequence[Judged], system: str, most: int, seed: int) -> Iterator[dict[str, Any]]:
    for each in judged:
        for chosen, rejected in each.pairs(most, seed):
            record = {"prompt": each.problem.question, "chosen": chosen, "rejected": rejected}
            record |= {"chosen_reward": 1.0, "rejected_reward": 0.0}
            yield {**({"system": system} if system else {}), **record}
