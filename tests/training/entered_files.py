"""Count the files of the library that a pretraining enters before its first optimizer step, and those that it loads.

`python tests/training/entered_files.py RECIPE.yaml` prints both; a file is entered when one of its functions runs after
the imports.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import FrameType

OPTIMIZED = 0x1  # of code: a function's, not a module's or a class body's
ENTERED: set[str] = set()


def note(frame: FrameType, event: str, _: object) -> None:
    """Note the file of a function that is called."""
    if event == "call" and frame.f_code.co_flags & OPTIMIZED:
        ENTERED.add(frame.f_code.co_filename)


def count(library: Path, files: set[str]) -> list[str]:
    """Return those of the files that are the library's, by their path in it."""
    return sorted(str(Path(file).relative_to(library)) for file in files if Path(file).is_relative_to(library))


def main(recipe: str) -> None:
    """Train the recipe up to its first optimizer step and print the counts."""
    from nemotron_h.platform import quiet

    quiet.hush()
    import fiddle as fdl
    import lightning.pytorch as pl
    import nemo_run as run

    import nemotron_h
    from nemotron_h.recipe.compose import compose
    from nemotron_h.training.stages import pretrain

    library = Path(nemotron_h.__file__).parent

    class Stop(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            sys.setprofile(None)
            threading.setprofile(None)
            loaded = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
            entered = count(library, ENTERED)
            print(*entered, sep="\n")
            print(f"entered {len(entered)} files of {len(count(library, loaded))} loaded", flush=True)
            os._exit(0)

    threading.setprofile(note)
    sys.setprofile(note)
    task = pretrain.build(compose(recipe))
    task.trainer.callbacks.insert(0, run.Config(Stop))
    fdl.build(task)()


if __name__ == "__main__":
    main(*sys.argv[1:])
