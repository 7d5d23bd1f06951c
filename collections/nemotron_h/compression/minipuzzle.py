"""MiniPuzzle (paper 3) as stages over one recipe: importance -> candidates -> score -> short-distil -> select -> distil
-> export. Each is one function of this file; what a stage computes is in the file that its name promises.

    <log.dir>/<name>/importance/    importance.json, importance.safetensors
                     candidates/    candidates.json: every architecture of the grid within the budget
                     score/         scores.jsonl (a line as each is scored), ranking.json
                     short-distil/  NAME-pruned (checkpoint), NAME (run), for each of the best; results.json
                     select/        winner.json
                     distil/        <name> (run): its checkpoint is the child
                     export/        hf/, model.yaml, report.html, result.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.reader import find_checkpoint, read_definition, read_record
from nemotron_h.checkpoint.writer import definition_text
from nemotron_h.compression import distillations, importance, ranking, report
from nemotron_h.compression.candidates import Candidate, Candidates
from nemotron_h.compression.child import Child, child_definition
from nemotron_h.compression.importance import Importance, Scores
from nemotron_h.compression.recovery import recovered, sentence
from nemotron_h.compression.scoring import Predictions, Score, predict
from nemotron_h.compression.selection import child_of
from nemotron_h.compression.slicing import slice_model, write_child
from nemotron_h.compression.speed import generation_speed
from nemotron_h.compression.stages import Pipeline, Stage, content_digest
from nemotron_h.compression.task_scores import task_scores
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.sizes import GIB
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.calibration import calibration_sampler, calibration_windows, text_record
from nemotron_h.data.feed.validation import ValidationText
from nemotron_h.data.manifest import check_manifest
from nemotron_h.export import hf_writer
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.trained_tokenizer import check_data, tokenizer_for
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run
from nemotron_h.recipe.checks import count_of, definition_of
from nemotron_h.schema.recipe import RecipeConfig

#: candidates and winner are chosen on one half of the held-out text; the other, which no choice has seen, is reported
CHOICE, REPORTED = "choice", "report"
HALVES = {
    half: f"the {nth} half of each source's validation text" for half, nth in ((CHOICE, "first"), (REPORTED, "second"))
}
RANKING, RESULTS, WINNER, RESULT = "ranking.json", "results.json", "winner.json", "result.json"
SCORES, CANDIDATES = "scores.jsonl", "candidates.json"
REPORT, DEFINITION, HF = "report.html", "model.yaml", "hf"
#: ours: validation windows that the orders of the report are compared on
ORDER_WINDOWS = 8
#: ours: the largest weight file, the command's default
SHARD = 5 * 10**9
#: trains a run to its end and returns its folder: `distillations.train`, or what a test puts in its place
Train = Callable[[Run, str, Console], Path]


def candidate_of(row: Mapping[str, Any]) -> Candidate:
    """The candidate of a row of `candidates.json`."""
    return Candidate(*(row[key] for key in Candidate._fields))


class MiniPuzzle:
    """A compression.

    Args:
        recipe: of stage minipuzzle.
        console: where progress goes.
        train: trains a run to its end; None takes `distillations.train`.
        origin: what errors call the recipe: its file.
        place: where the distillations run.
    Errors:
        UserError: the parent is missing, damaged or of another model than the recipe's; its tokenizer is not the
            data's; the data is not prepared, or has fewer samples than are asked for; no candidate fits the budget
            (where the grid gives a depth, the stage that makes them says so).
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        console: Console,
        train: Train | None = None,
        origin: str | None = None,
        place: Place = HERE,
    ) -> None:
        self.recipe, self.part, self.console, self.place = recipe, recipe.minipuzzle, console, place
        self.train = train or partial(distillations.train, place=place)
        self.origin = origin or f"recipe {recipe.name}"
        self._predicted: dict[str, Predictions] = {}
        self.folder = Path(recipe.log.dir) / recipe.name
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.blend = load_blend(recipe.data.blend)
        with self._named("data"):
            self.manifest = check_manifest(recipe.data.root, self.blend)
        with self._named("minipuzzle.parent", hint="train it first, or name another: minipuzzle.parent=runs/NAME"):
            self.parent_checkpoint = find_checkpoint(Path(self.part.parent).expanduser())
        self.definition = self._check_parent()
        self._check_text()
        if not self.part.grid.depth:  # which layers fill a depth is known when their importance is
            self._candidates_within(None)
        self.pipeline = Pipeline(
            self.folder,
            [
                Stage(
                    "importance",
                    "how much each layer and neuron matters",
                    (),
                    importance.FILES,
                    self._importance_inputs,
                    self._importance,
                ),
                Stage(
                    "candidates",
                    "architectures within the budget",
                    ("importance",),
                    (CANDIDATES,),
                    self._candidates_inputs,
                    self._candidates,
                ),
                Stage(
                    "score",
                    "every candidate on held-out text, untrained",
                    ("importance", "candidates"),
                    (RANKING,),
                    self._score_inputs,
                    self._score,
                ),
                Stage(
                    "short-distil",
                    f"the best {self.part.short} for {self.part.short_tokens} tokens each",
                    ("importance", "score"),
                    (RESULTS,),
                    self._short_inputs,
                    self._short,
                ),
                Stage("select", "the best of them", ("short-distil",), (WINNER,), self._select_inputs, self._select),
                Stage(
                    "distil",
                    f"the winner for {recipe.tokens} tokens",
                    ("short-distil", "select"),
                    (RESULTS,),
                    self._distil_inputs,
                    self._distil,
                ),
                Stage(
                    "export",
                    "Hugging Face folder, model definition, report",
                    ("importance", "candidates", "score", "short-distil", "select", "distil"),
                    (RESULT, DEFINITION),
                    dict,
                    self._export,
                ),
            ],
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )

    # what the stages share

    @contextmanager
    def _named(self, key: str, hint: str = "") -> Iterator[None]:
        """Errors say which key of the recipe they are of, and what to do."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.origin}: {key}: {error.message}", error.hint or hint) from error

    def _check_text(self) -> None:
        for key in ("layer_samples", "neuron_samples"):
            with self._named(f"minipuzzle.{key} = {getattr(self.part, key):,}"):
                calibration_sampler(self.blend, self.manifest, getattr(self.part, key), self.recipe.data.seq_length)
        with self._named(f"minipuzzle.score_tokens = {self.part.score_tokens}, of each half of the validation text"):
            for half in self._halves.values():
                half.check(self._windows)

    @cached_property
    def _halves(self) -> dict[str, ValidationText]:
        halves = ValidationText.halves(self.blend, self.manifest, self.recipe.data.seq_length)
        return dict(zip((CHOICE, REPORTED), halves, strict=True))

    @property
    def _windows(self) -> int:
        """Of each half."""
        tokens = count_of(self.part.score_tokens, "minipuzzle.score_tokens", self.origin)
        return tokens // self.recipe.data.seq_length

    def _check_parent(self) -> Any:
        checkpoint = self.parent_checkpoint
        record = read_record(checkpoint)
        found = distillations.counted(read_definition(record, f"checkpoint {checkpoint}"))
        wanted = definition_of(self.recipe, self.origin)
        skip = {"name", "sources", "init_std", "expect"}
        there, asked = dataclasses.asdict(found), dataclasses.asdict(wanted)
        changed = [key for key in asked if key not in skip and there[key] != asked[key]]
        differs = [f"{key}: {there[key]} in the checkpoint, {asked[key]} in the recipe" for key in changed]
        if differs:
            raise UserError(
                f"{self.origin}: minipuzzle.parent: {checkpoint} is of another model: {'; '.join(differs)}",
                hint="name a checkpoint of the recipe's model, or take the model of the checkpoint: model=NAME",
            )
        tokenizer = self.manifest.tokenizer
        if tokenizer.vocab_size > wanted.vocab_size:
            raise UserError(
                f"{self.origin}: the tokenizer of blend {self.blend.name} has {tokenizer.vocab_size:,} tokens, the "
                f"parent a vocabulary of {wanted.vocab_size:,}",
                hint="choose a blend that was prepared with the parent's tokenizer",
            )
        if warning := check_data(checkpoint, self.manifest, f"{self.origin}: minipuzzle.parent"):
            self.console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
        return wanted

    @cached_property
    def parent(self) -> GenerationModel:
        """The parent's weights; candidates are made of them."""
        self.console.print(f"loading {self.parent_checkpoint}", highlight=False, markup=False, soft_wrap=True)
        return load_model(self.parent_checkpoint, dtype=self.dtype, device=self.device)

    def _release_parent(self) -> None:
        """Give its memory back: to a child, or to a run on the same machine. It is read again when it is asked for."""
        self.__dict__.pop("parent", None)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def trained(self, run: Run, title: str) -> Path:
        """Train a distillation, without the parent in this process; its folder."""
        self._release_parent()
        return self.train(run, title, self.console)

    @cached_property
    def text(self) -> dict[str, np.ndarray]:
        """Held-out windows [samples, seq_length + 1] by half: `CHOICE`, `REPORTED`."""
        return {name: half.read(self.manifest, self._windows) for name, half in self._halves.items()}

    def parent_predictions(self, half: str) -> Predictions:
        """The parent's greedy predictions of a half of the held-out text; kept in the run's folder."""
        if half not in self._predicted:
            key = {"parent": content_digest(self.parent_checkpoint), **self._held_out_inputs(half)}
            name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"parent-{name}.npz"
            if not path.exists():
                with StageProgress(self.console, "parent", self.text[half][:, 1:].size) as bar:
                    made = predict(self.parent, self.text[half], self.recipe.data.micro_batch_size, bar.advance)
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".tmp.npz")
                np.savez_compressed(temporary, greedy=made.greedy, loss=made.loss)
                temporary.replace(path)
            with np.load(path) as kept:
                self._predicted[half] = Predictions(kept["greedy"], float(kept["loss"]))
        return self._predicted[half]

    def parent_score(self, half: str) -> Score:
        """The parent on a half of the held-out text."""
        found = self.parent_predictions(half)
        return found.score(self.text[half], found.greedy)

    def score(self, model: GenerationModel, half: str, advance: Callable[[int], None] = lambda _: None) -> Score:
        """A model on a half of the held-out text."""
        found = predict(model, self.text[half], self.recipe.data.micro_batch_size, advance)
        return found.score(self.text[half], self.parent_predictions(half).greedy)

    def read(self, stage: str, file: str) -> Any:
        """A JSON output of a finished stage."""
        return json.loads((self.pipeline.path(stage) / file).read_text())

    @cached_property
    def importance(self) -> Importance:
        """The result of the first stage."""
        return Importance.load(self.pipeline.path("importance"), self.definition)

    def child(self, candidate: Candidate) -> Child:
        """What of the parent a candidate keeps."""
        return child_of(self.definition, self.scores, candidate)

    @cached_property
    def scores(self) -> Scores:
        """The order in which layers and channels stay; a control has another."""
        return self.importance.scores(self.part.aggregation).ordered(self.part.order, self.recipe.init_seed)

    def name_of(self, candidate: Candidate) -> str:
        """The name of a candidate's model definition."""
        return f"{self.definition.name}-{candidate.name}"

    def realised(self, candidate: Candidate) -> GenerationModel:
        """A candidate over the parent's weights."""
        return slice_model(self.parent, self.child(candidate), self.name_of(candidate))

    def definition_of(self, candidate: Candidate) -> ModelDefinition:
        """A candidate's definition."""
        return child_definition(self.definition, self.child(candidate), self.name_of(candidate))

    def _text_inputs(self, split: str) -> dict[str, Any]:
        """The text of a split, by content."""
        sources = {name: text for name, text in self.manifest.texts(split).items() if name in self.blend.sources}
        text = hashlib.sha256(json.dumps([self.blend.hash(), sources], sort_keys=True).encode()).hexdigest()
        return {f"{split} text": text, "data.seq_length": self.recipe.data.seq_length}

    def _held_out_inputs(self, *halves: str) -> dict[str, Any]:
        return {
            **self._text_inputs("validation"),
            "held-out text": [HALVES[half] for half in halves],
            "minipuzzle.score_tokens": self.part.score_tokens,
            "dtype": str(self.dtype),
        }

    def _parent_inputs(self) -> dict[str, Any]:
        return {"parent": content_digest(self.parent_checkpoint)}

    # importance

    def _importance_inputs(self) -> dict[str, Any]:
        return {
            **self._parent_inputs(),
            **self._text_inputs("train"),
            "dtype": str(self.dtype),
            "minipuzzle.layer_samples": self.part.layer_samples,
            "minipuzzle.neuron_samples": self.part.neuron_samples,
            "minipuzzle.layer_metric": self.part.layer_metric,
        }

    def _importance(self, folder: Path) -> str:
        length, part = self.recipe.data.seq_length, self.part
        windows = calibration_windows(self.blend, self.manifest, max(part.layer_samples, part.neuron_samples), length)
        total = importance.work(self.definition, part.layer_samples, part.neuron_samples)
        with StageProgress(self.console, "windows through the model", total) as bar:
            made = importance.measure(
                self.parent,
                windows[: part.layer_samples],
                windows[: part.neuron_samples],
                metric=part.layer_metric,
                settings={**self._parent_inputs(), "text": text_record(self.blend, self.manifest)},
                advance=bar.advance,
                unfinished=folder / "unfinished",
            )
        made.save(folder)
        least = [int(n) for n in made.scores().layers.argsort()[:4]]
        named = ", ".join(f"{n} ({self.definition.pattern[n]})" for n in least)
        return f"least important layers: {named}"

    # candidates

    def _candidates_inputs(self) -> dict[str, Any]:
        values = {**dataclasses.asdict(self.part.grid), **dataclasses.asdict(self.part.budget)}
        values |= {"aggregation": self.part.aggregation, "order": self.part.order, "init_seed": self.recipe.init_seed}
        return {**self._parent_inputs(), **{f"minipuzzle.{key}": value for key, value in values.items()}}

    def _candidates_within(self, layer_scores: np.ndarray | None) -> Candidates:
        with self._named("minipuzzle"):
            return Candidates(self.definition, self.part.grid, self.part.budget, layer_scores)

    def _candidates(self, folder: Path) -> str:
        found = self._candidates_within(self.scores.layers)
        rows = []
        for candidate in found:
            definition, cost = self.definition_of(candidate), found.cost(candidate)
            rows.append(
                {
                    "name": candidate.name,
                    **candidate._asdict(),
                    "pattern": definition.pattern,
                    "layers": list(self.child(candidate).layers),
                    "parameters": cost.parameters,
                    "memory_gib": cost.memory.total / GIB,
                    "read_gib": cost.read / GIB,
                }
            )
        if self.part.budget.speedup is not None and self.part.budget.speedup_by == "measured":
            rows = self._fast_enough(rows, folder)
        write_json(folder / CANDIDATES, rows)
        return f"{len(rows):,} of {len(found):,} combinations are within the budget"

    def _fast_enough(self, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """Those that generate as fast as the budget asks; the speeds are kept as they are measured."""
        path = folder / "speeds.json"
        speeds = json.loads(path.read_text()) if path.exists() else {}
        budget = self.part.budget
        with StageProgress(self.console, "speeds", len(rows)) as bar:
            for name, model in (("", lambda: self.parent), *((r["name"], partial(self._of_row, r)) for r in rows)):
                if name not in speeds:
                    speeds[name] = generation_speed(model(), budget.sequences)
                    write_json(path, speeds)
                bar.advance(int(bool(name)))
        for row in rows:
            row["speedup"] = speeds[row["name"]] / speeds[""]
        kept = [row for row in rows if row["speedup"] >= budget.speedup]
        if not kept:
            fastest = max(rows, key=lambda row: row["speedup"])
            raise UserError(
                f"{self.origin}: minipuzzle.budget.speedup = {budget.speedup:g}: no candidate generates as fast here; "
                f"the fastest is {fastest['name']}, {fastest['speedup']:.3f} times the parent",
                hint=f"lower it to {fastest['speedup']:.3f} or less, or widen the grid",
            )
        return kept

    def _of_row(self, row: Mapping[str, Any]) -> GenerationModel:
        return self.realised(candidate_of(row))

    # score

    def _score_inputs(self) -> dict[str, Any]:
        keys = ("rank", "keep", "short", "evaluate")
        return {
            **self._parent_inputs(),
            **self._held_out_inputs(CHOICE),
            **{f"minipuzzle.{key}": getattr(self.part, key) for key in keys},
        }

    def _score(self, folder: Path) -> str:
        rows = self.read("candidates", CANDIDATES)
        found = [candidate_of(row) for row in rows]
        kept = self._scores(folder)
        missing = [c for c in found if c.name not in kept]
        parent = self.parent_score(CHOICE)  # before the clock of the candidates starts
        with (
            (folder / SCORES).open("a") as file,
            StageProgress(self.console, "candidates", len(missing) * parent.tokens) as bar,
        ):
            for candidate in missing:
                score = self.score(self.realised(candidate), CHOICE, bar.advance)
                kept[candidate.name] = dataclasses.asdict(score)
                file.write(json.dumps({"name": candidate.name, **kept[candidate.name]}) + "\n")
                file.flush()
        scores = [Score(**kept[c.name]) for c in found]
        order = ranking.order(scores, self.part.rank)
        best = order[: self.part.keep]
        evaluated = {}
        if self.part.evaluate:
            evaluated = self._evaluate_pruned(folder, [found[n] for n in best])
            best = sorted(best, key=lambda n: (-evaluated[found[n].name]["mean"], order.index(n)))
        table = [
            {**rows[n], **dataclasses.asdict(scores[n]), "place": place, "evaluated": evaluated.get(found[n].name)}
            for place, n in enumerate(order, 1)
        ]
        chosen = [found[n].name for n in best[: self.part.short]]
        write_json(folder / RANKING, {"parent": dataclasses.asdict(parent), "candidates": table, "chosen": chosen})
        first = scores[best[0]]
        return (
            f"{len(found)} scored on {parent.tokens:,} tokens; first {chosen[0]}: accuracy "
            f"{first.accuracy:.3f} (parent {parent.accuracy:.3f}), agreement {first.agreement:.3f}"
        )

    def _scores(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Scores that are known, by candidate, out of this attempt or of one with other candidates."""
        key = {
            **self._parent_inputs(),
            **self._held_out_inputs(CHOICE),
            **self.pipeline.outputs("importance"),
            "order": [self.part.order, self.part.aggregation, self.recipe.init_seed],
        }
        head = json.dumps({"of": key}, sort_keys=True)
        path = folder / SCORES
        before = folder.with_name(folder.name + ".before") / SCORES
        for source in (path, before):
            lines = source.read_text().splitlines() if source.exists() else []
            if lines and lines[0] == head:
                whole = [line for line in lines if line.endswith("}")]  # a killed process leaves half a line
                path.write_text("\n".join(whole) + "\n")
                rows = [json.loads(line) for line in whole[1:]]
                return {row.pop("name"): row for row in rows}
        path.write_text(head + "\n")
        return {}

    def _evaluate_pruned(self, folder: Path, chosen: list[Candidate]) -> dict[str, dict[str, float]]:
        path = folder / "evaluated.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        with StageProgress(self.console, "evaluating", len(chosen)) as bar:
            for candidate in chosen:
                if candidate.name not in kept:
                    checkpoint = self._pruned(folder, candidate)
                    kept[candidate.name] = task_scores(self.part.evaluate, checkpoint, self.origin)
                    shutil.rmtree(checkpoint)
                    write_json(path, kept)
                bar.advance()
        return {c.name: kept[c.name] for c in chosen}

    # short distillation

    def _distillation_inputs(self) -> dict[str, Any]:
        return {**self._parent_inputs(), **self._text_inputs("train"), **distillations.settings(self.recipe)}

    def _short_inputs(self) -> dict[str, Any]:
        return {
            **self._distillation_inputs(),
            **self._held_out_inputs(CHOICE, REPORTED),
            "minipuzzle.short_tokens": self.part.short_tokens,
            "minipuzzle.evaluate": self.part.evaluate,
        }

    def _chosen(self) -> list[Candidate]:
        made = self.read("score", RANKING)
        rows = {row["name"]: row for row in made["candidates"]}
        return [candidate_of(rows[name]) for name in made["chosen"]]

    def _pruned(self, folder: Path, candidate: Candidate) -> Path:
        """The candidate's checkpoint before any training."""
        path = folder / f"{candidate.name}-pruned"
        if not (path / "integrity.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
            write_child(self.parent_checkpoint, self.child(candidate), path, self.name_of(candidate))
        return path

    def _short(self, folder: Path) -> str:
        chosen = self._chosen()
        path = folder / "measured.json"
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        runs = {
            c.name: distillations.run_of(
                self.recipe,
                c.name,
                self.definition_of(c),
                folder / f"{c.name}-pruned",
                self.parent_checkpoint,
                self.part.short_tokens,
                folder,
            )
            for c in chosen
        }
        if self.place.submits:  # every candidate's job waits in the queue at once
            missing = [c for c in chosen if c.name not in kept]
            for candidate in missing:
                self._pruned(folder, candidate)
            distillations.submit([runs[c.name] for c in missing], self.place, self.console)
        for number, candidate in enumerate(chosen, 1):
            if candidate.name in kept:
                continue
            pruned = self._pruned(folder, candidate)
            run = self.trained(runs[candidate.name], f"  {candidate.name}, {number} of {len(chosen)}")
            kept[candidate.name] = {"pruned": self.measure(pruned), "short": self.measure(run)}
            write_json(path, kept)
        results = {c.name: {**kept[c.name], "candidate": c._asdict()} for c in chosen}
        write_json(folder / RESULTS, results)
        return "; ".join(
            f"{name}: loss {r['pruned']['loss']:.3f} -> {r['short']['loss']:.3f}" for name, r in results.items()
        )

    def measure(self, checkpoint: Path) -> dict[str, Any]:
        """A trained model on the text of the report, under `choice` on that of the choices, and on the recipe's
        evaluation.
        """
        for half in HALVES:  # then the parent makes way
            self.parent_predictions(half)
        self._release_parent()
        checkpoint = find_checkpoint(checkpoint)
        model = load_model(checkpoint, dtype=self.dtype, device=self.device)
        made: dict[str, Any] = {"checkpoint": str(checkpoint), "weights": content_digest(checkpoint)}
        made |= dataclasses.asdict(self.score(model, REPORTED))
        made[CHOICE] = dataclasses.asdict(self.score(model, CHOICE))
        if self.part.evaluate:
            made["evaluated"] = task_scores(self.part.evaluate, checkpoint, self.origin)
        return made

    # select

    def _select_inputs(self) -> Mapping[str, Any]:
        return {"minipuzzle.evaluate": self.part.evaluate}

    def _select(self, folder: Path) -> str:
        results = self.read("short-distil", RESULTS)
        by = "evaluation" if self.part.evaluate else "accuracy"

        def value(name: str) -> float:
            short = results[name]["short"]
            return short["evaluated"]["mean"] if self.part.evaluate else short[CHOICE]["accuracy"]

        order = sorted(results, key=lambda name: (-value(name), results[name]["short"][CHOICE]["loss"]))
        winner = {"name": order[0], "by": by, "order": order, **results[order[0]]}
        write_json(folder / WINNER, winner)
        return f"{order[0]} by {by}: {value(order[0]):.4f}"

    # distil

    def _distil_inputs(self) -> dict[str, Any]:
        return {
            **self._distillation_inputs(),
            **self._held_out_inputs(REPORTED),
            "tokens": self.recipe.tokens,
            "minipuzzle.start": self.part.start,
        }

    def _distil(self, folder: Path) -> str:
        winner = self.read("select", WINNER)
        candidate = candidate_of(winner["candidate"])
        start = Path(winner[self.part.start]["checkpoint"])
        run = distillations.run_of(
            self.recipe,
            self.recipe.name,
            self.definition_of(candidate),
            start,
            self.parent_checkpoint,
            self.recipe.tokens,
            folder,
        )
        measured = self.measure(self.trained(run, f"  {self.recipe.name}"))
        score = self.parent_score(REPORTED)
        parent, pruned, child = score.loss, winner["pruned"]["loss"], measured["loss"]
        share = recovered(parent, pruned, child)
        write_json(folder / RESULTS, {"parent": dataclasses.asdict(score), "child": measured, "recovered": share})
        said = sentence(parent, pruned, child)
        return f"loss {pruned:.3f} pruned -> {child:.3f}, parent {parent:.3f}: {said}"

    # export

    def _export(self, folder: Path) -> str:
        winner, made = self.read("select", WINNER), self.read("distil", RESULTS)
        checkpoint = Path(made["child"]["checkpoint"])
        record = read_record(checkpoint)
        definition = distillations.counted(read_definition(record, f"checkpoint {checkpoint}"))
        tokenizer = tokenizer_for(record, checkpoint, None, definition.vocab_size)
        plan = hf_writer.plan(checkpoint, tokenizer, None, SHARD)
        shutil.rmtree(folder / HF, ignore_errors=True)  # an attempt that was interrupted
        hf_writer.write(plan, folder / HF, tokenizer)
        (folder / DEFINITION).write_text(
            definition_text(definition, f"Compressed by {self.recipe.name}."), encoding="utf-8"
        )
        words = {"pruned": winner["pruned"], "short": winner["short"], "child": made["child"]}
        result = {
            "recipe": self.recipe.name,
            "child": {"name": winner["name"], "checkpoint": str(checkpoint), "pattern": definition.pattern},
            "parameters": {"parent": self.definition.parameters, "child": definition.parameters},
            "text": HALVES,
            "validation": {
                "parent": made["parent"],
                **{word: {key: found[key] for key in made["parent"]} for word, found in words.items()},
            },
            "recovered": made["recovered"],
            "orders": self.orders(folder / "orders.json"),
            "order_tokens": self.text[REPORTED][:ORDER_WINDOWS, 1:].size,
        }
        write_json(folder / RESULT, result)
        report.write(self.folder, self.recipe, self.definition, result, folder / REPORT)
        return f"{checkpoint}; {folder / HF}; {folder / REPORT}"

    def orders(self, path: Path) -> dict[str, list[float]]:
        """Loss without 0, 1, 2, ... layers, dropped in the order of importance, in random orders (the mean of three)
        and in the reversed one; half of the layers at most. Kept in `path`.
        """
        if path.exists():
            return json.loads(path.read_text())
        found, depth = self.importance.scores(self.part.aggregation), self.definition.num_layers // 2
        text = self.text[REPORTED][:ORDER_WINDOWS]
        controls = {
            "importance": [found],
            "random": [found.shuffle(n) for n in range(3)],
            "reversed": [found.reverse()],
        }
        losses: dict[str, list[float]] = {}
        with StageProgress(self.console, "orders", 5 * (depth + 1)) as bar:
            for name, scores in controls.items():
                curves = []
                for each in scores:
                    order = each.layers.argsort(kind="stable")
                    curve = []
                    for count in range(depth + 1):
                        child = Child.whole(self.definition, tuple(sorted(int(n) for n in order[count:])))
                        curve.append(predict(slice_model(self.parent, child), text, len(text)).loss)
                        bar.advance()
                    curves.append(curve)
                losses[name] = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        write_json(path, losses)
        return losses
