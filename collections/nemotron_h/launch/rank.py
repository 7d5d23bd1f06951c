"""A rank under `launch.restarts`: connect to its monitor first, then be the module that the arguments name.

`python -m nemotron_h.launch.rank MODULE ARGUMENTS`
"""

from __future__ import annotations

import runpy
import sys

from nemotron_h.core.children import end_with_parent
from nemotron_h.core.ending import run_to_the_end
from nemotron_h.training.sections import sections


def main() -> None:
    """Run the module as `python -m` does, and end the process."""
    run_to_the_end(_main)


def _main() -> None:
    end_with_parent()
    sections.connect()
    _, module, *arguments = sys.argv
    if module.startswith("nemo_run."):  # it imports NeMo
        from nemotron_h.platform import quiet

        quiet.hush()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
