"""What holds for all tests."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads would only get in each other's way
    torch.set_num_threads(1)
