"""Where a run cannot be written, begun or continued: one line with cause and remedy, and nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith
from tests.test_bad_input import FEW, fails, sft  # noqa: F401 (fixtures)
from tunesmith.__main__ import main
from tunesmith.runlog import Run
