"""Streams the source `web` of a blend and is killed, as by kill -9, within the part after so many: BLEND PARTS."""

import os
import signal
import sys

from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare import hub_stream

hub_stream.PART_BYTES = 3000
lines = 0
encode = hub_stream._Stream._line


def line(self, row: dict) -> bytes:
    global lines
    if len(self.state["parts"]) == int(sys.argv[2]):
        lines += 1
        if lines == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, row)


hub_stream._Stream._line = line
hub_stream.stream(load_blend(sys.argv[1]), "web", print)
