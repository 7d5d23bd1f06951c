"""A reader of the pretraining path has a bounded number of files to enter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_run import Small

pytestmark = pytest.mark.slow
#: measured; a file more has a reason, and is worth a look at what could leave the path
MOST = 93


def test_a_pretraining_enters_so_many_files_before_its_first_step(small: Small) -> None:
    done = small.train("entered", program=Path(__file__).with_name("entered_files.py"))
    entered = re.search(r"^entered (\d+) files of \d+ loaded$", done.stdout, re.MULTILINE)
    assert 40 < int(entered[1]) <= MOST, done.stdout
