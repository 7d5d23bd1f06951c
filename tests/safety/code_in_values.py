"""Settings whose values name code, for every way in which a file gives settings."""

from __future__ import annotations

from pathlib import Path

#: a module that makes a file when it is imported or called; `{probe}` in a setting is its name
PROBE = """
from pathlib import Path
MARKER = Path({marker!r})
MARKER.touch()
class Thing:
    def __init__(self, **_): MARKER.touch()
def run(**_): MARKER.touch()
value = 5
"""
#: refused by their text alone, without torch
REFUSED = (
    "trainer.strategy=os.system(command='touch {marker}')",
    "trainer.strategy = os.system(command='touch {marker}')",
    "data=subprocess.getoutput(cmd='touch {marker}')",
    "model=os.mkdir(path='{marker}')",
    "log=os.system(command='touch {marker}')",
    "optim=runpy.run_module(mod_name='{probe}')",
    "resume=importlib.import_module(name='{probe}')",
    "trainer.callbacks=[os.system(command='touch {marker}')]",
    "trainer.callbacks+=[{probe}.run()]",
    "trainer.callbacks=['Config[{probe}.Thing]']",
    "trainer.callbacks=[('a', {{'b': '<Partial[{probe}.run]'}})]",
    "trainer.plugins=Config[{probe}.Thing]",
    "model=<Config[{probe}.Thing]>",
    "trainer.strategy=Partial[{probe}.run]",
    "data.blend={probe}.run()",
    "data.root=os.system(command='touch {marker}')",
    "trainer.max_steps={probe}.run()",
    "optim.peak_lr=float({probe}.run())",
    "log.tensorboard={probe}.run(path='x')",
    "resume.init_checkpoint={probe}.run(a=1)",
    "model.config.init_seed+={probe}.run()",
    "resume.restore_config=nemo.lightning.RestoreConfig(path='x', load_artifacts=True)",
    "data=mock(seq_length=8)",
    "trainer.max_steps=__import__('{probe}').run()",
)
#: refused because of what stands at the key, or of the type that it takes
OF_THE_TASK = (
    "trainer.strategy={probe}.run",
    "trainer.callbacks={probe}.Thing",
    "trainer.callbacks=[{probe}.Thing]",
    "trainer.callbacks=[]",
    "trainer.plugins={probe}.value",
    "data={probe}.run",
    "data=mock",
    "model=llama3_8b",
    "log.ckpt={probe}.Thing",
    "optim={probe}.run",
    "optim.peak_lr={probe}.value",
    "trainer.max_steps={probe}.value",
    "trainer.strategy.ckpt_save_optimizer={probe}.value",
    "resume.restore_config={probe}.Thing",
)
#: plain text, though nemo-run would import the module of the first
TEXTS = ("data.root={probe}.run", "log.explicit_log_dir={probe}.value", "data.root=Configs/a", "data.root='a(1)'")


def probe(folder: Path, name: str) -> tuple[Path, dict[str, str]]:
    """Write a module `name` into a folder; the file that it makes, and what stands in the settings."""
    marker = folder / "ran"
    (folder / f"{name}.py").write_text(PROBE.format(marker=str(marker)))
    return marker, {"marker": str(marker), "probe": name}
