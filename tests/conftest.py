"""The repository's root on the path, and one thread: small tensors, and the same sums on every machine."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
