"""Prepares a local blend in a process of its own, with small shards, so that tests can kill it: `prepare_local.py
BLEND ROOT WORKERS`.
"""

import sys

from nemotron_h.data import sources
from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare import prepare
from nemotron_h.errors import UserError

sources.MIN_SHARD_BYTES = 1 << 15

if __name__ == "__main__":
    try:
        prepare(load_blend(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]))
    except UserError as error:
        sys.exit(f"UserError: {error}")
