"""Silence what upstream packages print on every run and nobody can act on. `NEMOTRON_H_VERBOSE=1` shows all of it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings

from nemotron_h.platform import imports

#: loggers that report optional packages that are absent, or what the progress line and the summary say better
NOISY = (
    "DistributedDataParallel",
    "lightning.fabric",
    "lightning.pytorch",
    "megatron",
    "megatron.core",
    "nemo_logger",
    "nv_one_logger",
    "onelogger",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torchao",
)


def verbose() -> bool:
    """Return True if the user asked for everything."""
    return os.environ.get("NEMOTRON_H_VERBOSE", "") not in ("", "0")


def speak() -> None:
    """Show this project's own log lines, as plain lines on the standard output."""
    own = logging.getLogger("nemotron_h")
    if not own.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False


def hush() -> None:
    """Raise the threshold of noisy loggers to ERROR, drop warnings, and import NeMo without its import-time prints.

    Errors:
        UserError: NeMo does not import because Transformer Engine fails.
    """
    speak()
    imports.keep_tuned_kernels()
    if verbose():
        with imports.without_gpu_builds(), imports.without_unused():
            import nemo.collections.llm
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # data workers and ranks
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # megatron-core and NeMo print about optional packages while they are imported
    try:
        silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with imports.without_gpu_builds(), imports.without_unused(), silent[0], silent[1]:
            import nemo.collections.llm  # noqa: F401
    except Exception:
        from nemotron_h.platform.hardware import check_engine_does_not_break_imports

        check_engine_does_not_break_imports()
        raise
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    for name in [*NOISY, *(n for n in logging.root.manager.loggerDict if n.startswith(NOISY))]:
        logging.getLogger(name).setLevel(logging.ERROR)
