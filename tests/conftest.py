"""What several test files need: the repository's root on the path, one thread (small tensors, and the same sums on
every machine), commands, and a file in the layout of the published Inception weights."""
import json
import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
SMALL = ["--image-size", "16", "--device", "cpu", "--workers", "0", "--batch-size", "8", "--log-every", "1",
         "--set", "dim=32", "heads=2", "depth=2", "ar_depth=1", "features=16", "class_tokens=4", "dropout=0.1",
         "vae.width=8", "vae.channels=4", "vae.groups=4", "steps=3"]

import faults  # noqa: E402

import common  # noqa: E402
import fid  # noqa: E402


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three classes of real PNGs, few enough to be cached in a moment."""
    return faults.pictures(tmp_path_factory.mktemp("pictures") / "set")


def log_of(folder, changes=False):
    """The lines of a run's log; changes: those that say with what settings it went on."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if ("changed" in line) == changes]


def run(*command, cwd=None, code=0):
    """A command as a user types it; its output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    assert code == 0 or "Traceback" not in done.stderr
    return done.stdout + done.stderr


def torchrun(n, *command, cwd=None):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, "--", *command, cwd=cwd)


@pytest.fixture
def in_process(monkeypatch):
    """train.main or sample.main with these arguments, here: quicker than a process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: traces into one graph, a break is an error, and runs that as it is. Counts the
    graphs."""
    torch._dynamo.reset()
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, fullgraph=True))
    yield graphs
    torch._dynamo.reset()


def refusal(in_process, capsys, module, *arguments):
    """What a command says that is refused."""
    with pytest.raises((common.UserError, SystemExit)) as caught:
        in_process(module, *arguments)
    return str(caught.value) if isinstance(caught.value, common.UserError) else capsys.readouterr().err


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in the published layout, by the recipe of tests/fixtures/inception.npz."""
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
