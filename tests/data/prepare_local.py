"""Prepares a local blend in a process of its own, with small shards: `prepare_local.py BLEND ROOT WORKERS`.

With KILL_AT=N it kills itself and its workers, as by kill -9, when it (or one of its workers) touches its N-th file
under ROOT.
"""

import os
import signal
import sys

if kill_at := int(os.environ.get("KILL_AT", 0)):
    touched = 0

    def count(event: str, arguments: tuple) -> None:
        global touched
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and sys.argv[2] in str(arguments[0]):
            touched += 1
            if touched == kill_at:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(count)

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare import sources
from nemotron_h.data.prepare.pipeline import prepare

sources.MIN_SHARD_BYTES = 1 << 16

if __name__ == "__main__":
    try:
        prepare(load_blend(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]))
    except UserError as error:
        sys.exit(f"UserError: {error}")
