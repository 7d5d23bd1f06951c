"""`nemo llm pretrain` with mistakes: one message that names key and fix, exit code 2, before any training."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "safety"))
from code_in_values import OF_THE_TASK, REFUSED, TEXTS, probe

pytestmark = pytest.mark.slow

DEFINITION = "M-M*-"


@pytest.fixture(scope="module")
def app():
    """The `nemo` command, with every factory registered."""
    from nemotron_h.launch import factories  # noqa: F401 - what the entry point loads

    before, sys.argv = sys.argv, ["nemo", "llm", "pretrain"]
    try:
        from nemo_run.cli.api import create_cli

        yield create_cli()
    finally:
        sys.argv = before


@pytest.fixture
def pretrain(app, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Run the command in an empty folder; its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)
    own = "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: {}\noverrides: [{}]\n"
    (tmp_path / "my.yaml").write_text(own.format("my", "trainer.max_steps=3, optim.warmup_steps=1"))
    (tmp_path / "wrong.yaml").write_text(own.format("wrong", "trainer.max_stpes=3"))

    def run(*arguments: str, factory: str = "nemotron_h_tiny") -> tuple[int, str]:
        result: Result = CliRunner().invoke(app, ["llm", "pretrain", "--factory", factory, "--yes", *arguments])
        captured = capfd.readouterr()
        return result.exit_code, result.output + captured.out + captured.err

    return run


@pytest.mark.parametrize(
    ("factory", "arguments", "expected"),
    [
        ("nemotron_h_tinny", (), ("no factory 'nemotron_h_tinny'", "Did you mean nemotron_h_tiny?")),
        ("nemotron_h_tiny", ("trainer.max_stpes=3",), ("trainer.max_stpes", "Did you mean max_steps?")),
        ("nemotron_h_tiny", ("optim.peak_lrr=3",), ("optim.peak_lrr", "Did you mean peak_lr?")),
        (
            "nemotron_h_tiny",
            ("optim.peak_lr=1e-3", "trainer.max_steps=ten"),
            ("trainer.max_steps=ten: 'ten' cannot be read as int",),
        ),
        ("nemotron_h_tiny", ("trainer.precision=bf16",), ("trainer.precision=bf16: nemo-run cannot read the type",)),
        (
            "nemotron_h_tiny",
            ("model.config.hybrid_override_pattern=M-M*M-",),
            ("attention at layer 3 that is not followed by an FFN", "write *-"),
        ),
        (
            "nemotron_h_tiny",
            ("trainer.strategy.tensor_model_parallel_size=4", "trainer.devices=4"),
            ("parallel.tensor = 4 does not divide mamba_num_groups = 2", "sizes that fit: 1, 2"),
        ),
        (
            "nemotron_h_tiny",
            ("model.config.mamba_num_heads=15",),
            ("mamba_num_heads = 15 is not a multiple of model.mamba_num_groups = 2",),
        ),
        ("nemotron_h_tiny", (), ("data prepare",)),  # nothing is prepared in this folder
        ("nemotron_h_tiny", ("data.blend=sample_smal",), ("no blend named 'sample_smal'", "sample_small")),
        (
            "nemotron_h_tiny",
            ("data.micro_batch_size=3",),
            ("data.global_batch_size = 16 is not a multiple of data.micro_batch_size",),
        ),
        # numbers: in the range of the recipe's key of that name, finite anywhere; a run longer than its warm-up
        ("nemotron_h_tiny", ("optim.clip_grad=nan",), ("optim.clip_grad = nan is not a finite number",)),
        ("nemotron_h_tiny", ("optim.peak_lr*=inf",), ("optim.peak_lr = inf is not a finite number",)),
        ("nemotron_h_tiny", ("model.config.init_method_std=1e999",), ("model.config.init_method_std = inf",)),
        ("nemotron_h_tiny", ("data.seed=-1",), ("data.seed = -1 is below 0",)),
        (
            "nemotron_h_tiny",
            ("trainer.max_steps=10",),
            ("the run has 10 steps (trainer.max_steps), its warm-up 10 (optim)",),
        ),
        ("nemotron_h_tiny", ("trainer.plugins.name=fp61",), ("precision = 'fp61'",)),
        # what a recipe's checks refuse, by either name, and names that contradict each other
        (
            "nemotron_h_tiny",
            ("trainer.devices=2",),
            ("data.global_batch_size = 16 is not a multiple", "parallel.nodes * parallel.devices = 2"),
        ),
        ("nemotron_h_tiny", ("parallel.devices=3", "parallel.tensor=2"), ("= 3 is not a multiple of parallel.tensor",)),
        ("nemotron_h_tiny", ("tokens=8192",), ("optim.warmup_tokens (81,920) is not shorter than the run",)),
        ("nemotron_h_tiny", ("tokns=8192",), ("unknown key tokns", "Did you mean tokens?")),
        ("nemotron_h_tiny", ("parallel.tensr=2",), ("parallel has no 'tensr'", "Did you mean tensor?")),
        ("nemotron_h_tiny", ("distill.top_k=4",), ("distill is unused: stage is pretrain",)),
        (
            "nemotron_h_tiny",
            ("trainer.devices=2", "parallel.devices=1"),
            ("trainer.devices=2 and parallel.devices=1 set one value", "keep one of them: parallel.devices=1"),
        ),
        (
            "nemotron_h_tiny",
            ("log.dir=a", "log.explicit_log_dir=b"),
            ("log.explicit_log_dir=b and log.dir=a set one value",),
        ),
        ("nemotron_h_recipe(path=no.yaml)", (), ("no recipe file no.yaml",)),
        ("nemotron_h_recipe(pathh=no.yaml)", (), ("--factory nemotron_h_recipe(...)", "it takes: path")),
        (
            "nemotron_h_recipe(path=wrong.yaml)",
            (),
            ("wrong: overrides: unknown key trainer.max_stpes", "Did you mean max_steps?"),
        ),
    ],
)
def test_mistakes_are_named(pretrain, factory: str, arguments: tuple[str, ...], expected: tuple[str, ...]) -> None:
    code, output = pretrain(*arguments, factory=factory)
    assert code == 2, output
    for text in expected:
        assert text in output.replace("\n", " "), output
    assert len(output.splitlines()) < 40, "more than one screen"
    assert "Traceback" not in output


def test_the_help_says_which_keys_are_taken(app) -> None:
    for command in ("pretrain", "finetune", "distill"):
        said = CliRunner().invoke(app, ["llm", command, "--help"]).output.split("Options")[0]
        assert "by its key in the recipe: tokens=163_840" in re.sub(r"[│\s]+", " ", said), said


def test_every_bad_number_of_a_built_task_is_named(app, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.core.errors import UserError
    from nemotron_h.core.strict import ranges
    from nemotron_h.launch import factories
    from nemotron_h.schema.recipe import RecipeConfig
    from nemotron_h.training import settings

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fuzz"))
    from bad_inputs import task_settings

    task = factories.build(factories.compose("nemotron_h_tiny/pretrain"))
    keys = [key for key in ranges(RecipeConfig) if hasattr(getattr(task, key.split(".")[0], None), key.split(".")[-1])]
    assert {"optim.clip_grad", "optim.beta2", "data.seed", "data.seq_length"} <= set(keys)
    rng = random.Random(2026)
    for key, setting in itertools.islice(task_settings(rng, keys), 60):
        with pytest.raises(UserError, match=re.escape(key)):
            settings.apply(copy.deepcopy(task), [setting])


def test_overrides_reach_the_objects() -> None:
    """Dotted overrides of every kind of node parse with their types."""
    import nemo_run as run
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_cli_args

    from nemotron_h.launch import factories

    task = factories.build(factories.compose("nemotron_h_tiny/pretrain"))
    assert isinstance(task, run.Partial)
    parse_cli_args(
        llm.pretrain,
        [
            "trainer.max_steps=20",
            "trainer.devices=2",
            "trainer.strategy.tensor_model_parallel_size=2",
            "trainer.strategy.sequence_parallel=True",
            "optim.peak_lr=3e-4",
            "model.config.ffn_hidden_size=512",
            "data.seed=7",
            "data.root=elsewhere",
            "resume.must_exist=True",
            "log.explicit_log_dir=there",
        ],
        task,
    )
    assert (task.trainer.max_steps, task.trainer.devices) == (20, 2)
    assert task.trainer.strategy.tensor_model_parallel_size == 2
    assert task.trainer.strategy.sequence_parallel is True
    assert task.optim.peak_lr == pytest.approx(3e-4)
    assert (task.model.config.ffn_hidden_size, task.data.seed, task.data.root) == (512, 7, "elsewhere")
    assert (task.resume.must_exist, task.log.explicit_log_dir) == (True, "there")


def test_a_file_of_the_user_s_own_runs_by_its_relative_path(pretrain, tmp_path: Path) -> None:
    for path in ("my.yaml", f"{tmp_path}/my.yaml"):
        code, output = pretrain("--dryrun", "optim.peak_lr=4e-3", factory=f"nemotron_h_recipe(path={path})")
        assert code == 0, output
        assert "runs/my" in output
        assert "0.004" in output
        assert "trainer.max_steps=3" in output.replace(" ", "")  # in the record's overrides


def test_what_a_command_changes_travels_in_the_task_and_its_record_builds_the_same_task(app, tmp_path: Path) -> None:
    from nemo.collections import llm
    from nemo_run.cli.api import RunContext
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from nemotron_h.recipe.compose import compose
    from nemotron_h.training.callbacks.run_record import RunRecord, recipe_text
    from nemotron_h.training.stages import pretrain

    (tmp_path / "own.yaml").write_text(
        "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: own\n"
        "overrides: [trainer.max_steps=5, optim.weight_decay=0.2, optim.warmup_steps=1]\n"
    )
    (tmp_path / "more.yaml").write_text("optim: {beta1: 0.8}\n")
    context = RunContext(
        name="pretrain", factory=f"nemotron_h_recipe(path={tmp_path}/own.yaml)", yaml=f"{tmp_path}/more.yaml"
    )
    changed = ["trainer.max_steps=3", "optim.peak_lr=2e-3", "optim.peak_lr*=2", "data.root=elsewhere"]
    task = context.parse_fn(llm.pretrain, changed)
    assert (task.trainer.max_steps, task.data.root) == (3, "elsewhere")
    assert (task.optim.peak_lr, task.optim.weight_decay, task.optim.beta1) == (pytest.approx(4e-3), 0.2, 0.8)

    sent = ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(task))  # as an executor does
    record = next(c for c in sent.trainer.callbacks if c.__fn_or_cls__ is RunRecord)
    assert sorted(record.recipe["overrides"]) == ["optim.warmup_steps=1", "trainer.max_steps=3"]
    optim = {key: record.recipe["optim"][key] for key in ("peak_lr", "weight_decay", "beta1")}
    assert optim == {"peak_lr": pytest.approx(4e-3), "weight_decay": 0.2, "beta1": 0.8}
    assert record.recipe["data"]["root"] == "elsewhere"
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(record.recipe, path, []))
    assert pretrain.build(compose(str(path))) == task


def test_a_value_has_the_name_of_its_recipe_key(app, tmp_path: Path) -> None:
    from nemo.collections import llm
    from nemo_run.cli.api import RunContext

    from nemotron_h.recipe.compose import compose
    from nemotron_h.recipe.overrides import split
    from nemotron_h.training.stages import pretrain

    (tmp_path / "own.yaml").write_text("defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: own\n")
    values = ["tokens=163_840", "parallel.devices=2", "parallel.tensor=2", "log.dir=there", "name=one"]
    values.append("checkpoint.keep=-1")
    graph = ["trainer.val_check_interval=7"]
    task = RunContext(name="pretrain", factory=f"nemotron_h_recipe(path={tmp_path}/own.yaml)").parse_fn(
        llm.pretrain, [*values, *graph]
    )
    assert (task.trainer.max_steps, task.trainer.devices, task.optim.warmup_steps) == (20, 2, 10)
    assert (task.trainer.strategy.tensor_model_parallel_size, task.trainer.val_check_interval) == (2, 7)
    assert (task.log.explicit_log_dir, task.log.ckpt.keep) == ("there/one", -1)
    composed = compose(f"{tmp_path}/own.yaml", values)
    composed.overrides = graph
    assert pretrain.build(composed) == task
    old = ["trainer.devices=2", "trainer.strategy.tensor_model_parallel_size=2", "log.ckpt.keep=-1"]
    again = [*values[:1], *old, "log.explicit_log_dir=there/one", "data.num_workers=3", *graph]
    by_graph_keys = RunContext(name="pretrain", factory="nemotron_h_tiny").parse_fn(llm.pretrain, again)
    assert (by_graph_keys.trainer.strategy, by_graph_keys.log) == (task.trainer.strategy, task.log)
    assert by_graph_keys.data.workers == 3
    before = [f"model.{key}=1" for key in ("beta", "config.beta", "config.lm_weight")]
    assert split(before)[0] == ["preference.beta=1", "preference.beta=1", "distill.lm_weight=1"]


#: graph -> settings of its recipe, so that as many values as can be differ from the defaults
DIFFERENT = {
    "nemotron_h_tiny/pretrain": (
        *("init_seed=5", "data.workers=3", "checkpoint.every_steps=7", "checkpoint.keep=9", "recompute.mamba=layer"),
        *(
            "recompute.ffn=activation",
            "recompute.attention=layer",
            "recompute.logits=chunks",
            "recompute.offload=true",
            "init.checkpoint=there",
            "parallel.nodes=3",
        ),
        *("parallel.devices=8", "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"),
        "parallel.context=2",
        *("data.global_batch_size=48", "precision=bf16", "optim.gradients=bf16"),
    ),
    "nemotron_h_56b/pretrain": ("precision_options.bf16_edge_layers=3", "precision_options.fp8_backend=emulate"),
    "nemotron_h_tiny/sft_lora": ("adapter.rank=3", "adapter.alpha=5", "adapter.dropout=0.5"),
    "nemotron_h_8b/preference": (
        "preference.beta=0.7",
        "preference.gt_reward_scale=3",
        "preference.reward_gap=2",
        "preference.reference=there",
    ),
    "nemotron_h_tiny/distill": ("distill.temperature=2", "distill.lm_weight=3", "distill.top_k=5"),
    "nemotron_h_tiny/pretrain_muon": ("optim.qk_clip=100",),
}
#: keys that name no single value of the graph
BY_THEMSELVES = ("name", "stage", "tokens", "log.", "minipuzzle.", "puzzle.", "hybridise.", "model.")
BY_THEMSELVES += (
    "reason.",
    "optim.schedule",
    "optim.warmup_tokens",
    "sources.",
    "optim.decay_tokens",
    "checkpoint.leave_after",
    "precision_options.measured_steps",
)


def test_one_table_has_the_graph_s_name_of_every_value(app) -> None:
    from nemotron_h.launch.factories import build
    from nemotron_h.recipe.compose import compose
    from nemotron_h.recipe.overrides import recipe_keys
    from nemotron_h.schema.nemo_names import DERIVED, SAME
    from nemotron_h.training.settings import _value_of, unknown_key

    left = {key for key in recipe_keys() if not key.startswith(BY_THEMSELVES)}
    for name, values in DIFFERENT.items():
        recipe = compose(name, values)
        task = build(recipe)
        for graph, key in [*SAME.items(), *((key, key) for key in sorted(left))]:
            part, _, field = key.rpartition(".")
            holder = functools.reduce(getattr, part.split("."), recipe) if part else recipe
            if holder is None or _value_of(task, graph) is None:
                continue
            assert _value_of(task, graph) == getattr(holder, field), (graph, key)
            left.discard(key)
        if name == "nemotron_h_tiny/pretrain":
            assert not [key for key in DERIVED if unknown_key(task, key)]
    assert left == {"distill.teacher_logits", "resume.blend_change", "resume.optimizer_change", "data.root"}


def refusal(function: Callable, *arguments: Any) -> str:
    """The message of the error that a call has to end with; empty where it goes through."""
    from nemotron_h.core.errors import UserError

    try:
        function(*arguments)
    except UserError as error:
        return error.message
    return ""


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Settings with the name of a module that can be imported; the file that it makes."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    marker, names = probe(tmp_path, f"probe_{tmp_path.name}".replace("-", "_"))
    yield marker, lambda setting: setting.format(**names)
    assert names["probe"] not in sys.modules
    assert not marker.exists()


def test_settings_of_a_file_build_nothing(app, probed) -> None:
    from nemotron_h.recipe.compose import compose
    from nemotron_h.training import settings
    from nemotron_h.training.stages import pretrain

    marker, written = probed
    task = pretrain.build(compose("nemotron_h_tiny/pretrain"))
    for setting in map(written, (*REFUSED, *OF_THE_TASK)):
        assert "own.yaml: " in refusal(settings.apply, task, [setting], "own.yaml"), setting
        assert not marker.exists(), setting
    assert task == pretrain.build(compose("nemotron_h_tiny/pretrain"))
    for setting in map(written, TEXTS):
        settings.apply(task, [setting], "own.yaml")
    assert (task.data.root, task.log.explicit_log_dir) == ("a(1)", written("{probe}.value"))


def test_files_given_to_nemo_build_nothing(app, probed, tmp_path: Path) -> None:
    """`--yaml` and `key=@FILE`, with nemo-run's spellings of what to build."""
    from nemo.collections import llm
    from nemo_run.cli.api import RunContext

    marker, written = probed
    files = (
        "trainer: {{strategy: {{_target_: {probe}.Thing}}}}",
        "trainer: {{strategy: {{_target_: {probe}.run, _partial_: true}}}}",
        "trainer: {{callbacks: [{{_target_: {probe}.Thing}}]}}",
        "data: {{_factory_: '{probe}.run()'}}",
        "data: {{_factory_: mock}}",
        "model: '{probe}.run()'",
        "data: {{blend: '{probe}.run()'}}",
        "optim: {{peak_lr: {probe}.value}}",
        "trainer: {probe}.Thing",
        "_factory_: {probe}.run",
        "run: {{factory: {probe}.run()}}",
    )
    path = tmp_path / "more.yaml"
    for file in files:
        path.write_text(written(file))
        context = RunContext(name="pretrain", factory="nemotron_h_tiny", yaml=str(path))
        assert refusal(context.parse_fn, llm.pretrain, []), file
        assert not marker.exists(), file
    path.write_text(written("_target_: {probe}.Thing"))
    for factory, args, yaml in (
        ("nemotron_h_tiny", [f"data=@{path}"], None),
        (None, [], str(path)),
        (f"@{path}", [], None),
        ("nemotron_h_recipe(path={probe}.run)", [], None),
        ("nemotron_h_recipe(path={probe}.run())", [], None),
        ("nemotron_h_recipe(path=Config[{probe}.Thing])", [], None),
    ):
        context = RunContext(name="pretrain", factory=factory and written(factory), yaml=yaml)
        assert refusal(context.parse_fn, llm.pretrain, args), factory
        assert not marker.exists(), factory
    for options in ({"yaml": str(path)}, {"factory": f"@{path}"}):
        with pytest.raises(SystemExit, match="2"):
            RunContext(name="pretrain", **options).execute_lazy(None, [], "pretrain")
    with pytest.raises(SystemExit, match="2"):
        RunContext(name="pretrain").execute_lazy(None, [f"data=@{path}"], "pretrain")


def test_what_is_typed_may_name_a_factory(app) -> None:
    """It is the user's own."""
    from nemo.collections import llm
    from nemo_run.cli.api import RunContext

    task = RunContext(name="pretrain", factory="nemotron_h_tiny").parse_fn(llm.pretrain, ["data=mock"])
    assert task.data.__fn_or_cls__.__name__ == "MockDataModule"


def test_what_a_checkpoint_s_context_names_is_not_built(app) -> None:
    from nemo import lightning as nl

    from nemotron_h.training.resume import ResumeRun

    config = nl.RestoreConfig(path="run", load_artifacts=True)
    assert "builds what a checkpoint's context names" in refusal(lambda: ResumeRun(restore_config=config))


def test_a_recipe_with_code_is_refused_by_a_dry_run(pretrain, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    setting = REFUSED[0].format(marker=marker)
    (tmp_path / "code.yaml").write_text(
        f'defaults: [/nemotron_h_tiny/pretrain]\nname: code\noverrides: ["{setting}"]\n'
    )
    code, output = pretrain("--dryrun", factory="nemotron_h_recipe(path=code.yaml)")
    assert code == 2
    assert "os.system(...) is code" in output.replace("\n", " ")
    assert not marker.exists()
