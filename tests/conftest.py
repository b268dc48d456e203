"""The repository's root on the path, one thread (small tensors, and the same sums on every machine), and a file in the
layout of the published Inception weights."""
import json
import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in the published layout, by the recipe of tests/fixtures/inception.npz."""
    import fid
    folder = Path(os.environ.get("PARITY_FIXTURES", ROOT / "tests" / "fixtures"))
    with np.load(folder / "inception.npz", allow_pickle=False) as content:
        seed = json.loads(str(content["meta"]))["weights_seed"]
    state = {}
    for name, value in fid.Inception().state_dict().items():
        if "num_batches_tracked" in name:
            continue
        u = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(tuple(value.shape))
        if name == "Conv2d_1a_3x3.conv.weight":
            w = 6 / math.sqrt(27) * (u - 0.5)
        elif name.endswith("conv.weight"):
            w = 6 / math.sqrt(math.prod(u.shape[1:])) * (u - u.mean((1, 2, 3), keepdims=True))
        elif name == "fc.weight":
            w = 0.16 * (u - u.mean(1, keepdims=True))
        elif name == "fc.bias":
            w = u - 0.5
        elif name.endswith("bn.weight"):
            w = 0.8 + 0.4 * u
        else:
            w = 0.6 + 0.8 * u if name.endswith("running_var") else 0.2 * (u - 0.5)
        state[name] = torch.from_numpy(w.astype(np.float32))
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)  # as the published file is
    return file
