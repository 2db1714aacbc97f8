"""What all tests share."""

from __future__ import annotations

import torch

# Tests run in one process a core; with models this small, more threads only wait for each other.
torch.set_num_threads(1)
