"""What several test files need: the repository's root on the path, one thread (small tensors, and
the same sums on every machine), commands, and a file in the layout of the Inception weights."""
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

import faults  # noqa: E402

import common  # noqa: E402
import fid  # noqa: E402

SMALL = {}  # model -> arguments that train it in a moment
for name, fields in faults.SMALL.items():
    SMALL[name] = ["--model", name, *faults.BATCH, "--set", *fields]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three classes of real PNGs, few enough to be cached in a moment."""
    return faults.pictures(tmp_path_factory.mktemp("pictures") / "set")


def log_of(folder):
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run(*command, cwd=None, code=0):
    """Run a command as a user types it, and return what it prints."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=ENV,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    assert code == 0 or "Traceback" not in done.stderr
    return done.stdout + done.stderr


def torchrun(ranks, *command, cwd=None):
    """Run a command on several ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, "--")
    return run(*launcher, *command, cwd=cwd)


@pytest.fixture
def in_process(monkeypatch):
    """Run train.main or sample.main with these arguments here: quicker than a process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: it traces into one graph, which then runs as it is. A graph
    break is an error. Yields the list of graphs."""
    torch._dynamo.reset()
    graphs = []
    compile = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def trace(function, **options):
        return compile(function, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace)
    yield graphs
    torch._dynamo.reset()


def refusal(in_process, capsys, module, *arguments):
    """Return what a command prints that ends with an error."""
    with pytest.raises((common.UserError, SystemExit)) as caught:
        in_process(module, *arguments)
    if isinstance(caught.value, common.UserError):
        return str(caught.value)
    return capsys.readouterr().err


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
