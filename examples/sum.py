#!/usr/bin/env python3
"""A script as a job: it arrives on stdin of the interpreter its first line names."""

import os
import sys
from pathlib import Path

total = sum(int(word) for word in sys.argv[1:])
sys.stdout.write(f"the sum is {total}\n")
Path(os.environ["OUTRIDER_RESULT"]).write_text(f"{total}\n")
