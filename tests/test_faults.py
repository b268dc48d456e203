"""Faults, put in on purpose: kills, full disks, damaged files, dead workers, bad numbers. Nothing
is lost, and a run that resumes ends like one that was never disturbed."""
import ast
import contextlib
import importlib
import os
import re
from pathlib import Path

import faults
import pytest
from conftest import ROOT, SMALL, log_of, refusal, run

import common
import sample
import train
from common import UserError


def arguments(data, out, *more):
    """Return the command line of six steps of a VAE."""
    return [*SMALL["transdiff"], "--stage", "vae", "--data", data, "--out", out, "--steps", 6,
            "--save-every", 2, *more]


@pytest.fixture
def training(in_process, pictures, tmp_path):
    """A function that trains a VAE for six steps in tmp_path."""
    def call(*more):
        in_process(train, *arguments(pictures, tmp_path, *more))

    return call


@pytest.fixture(scope="session")
def undisturbed(pictures, tmp_path_factory):
    """The state of six steps that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(ROOT / "train.py", *arguments(pictures, out))
    return state_of(out)


def state_of(folder):
    """Return the saved state of a run."""
    return common.read_checkpoint(folder / "vae" / "state.pt")


# --- Runs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["dar", "madformer"])
def test_runs_survive_kills(tmp_path, model):
    """The loop of tests/faults.py, short. (TransDiff is killed at given steps in test_scripts.)"""
    assert faults.kills(model, 1, tmp_path, seed=2)[-1].startswith("1 kills, 0 lost")


@pytest.fixture
def full_disk(capsys):
    """A context manager that limits the size of files, which looks like a full disk. (capsys keeps
    what is printed in memory.)"""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(UserError) as caught:
                yield caught
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def test_a_full_disk_loses_nothing(undisturbed, full_disk, training, monkeypatch, tmp_path):
    """A good state under half of a new one, or half a line of the log that stops the next run."""
    save = common.save

    def save_and_stop(path, content):
        save(path, content)
        if path.name == "state.pt" and content["step"] == 4:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        training()
    with full_disk(40_000) as caught:
        training()
    assert re.search(r"cannot write .*vae/\S*\.(pt|png): ", str(caught.value))
    assert state_of(tmp_path)["step"] == 4
    with open(tmp_path / "vae" / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    training()
    assert faults.equal(state_of(tmp_path), undisturbed)
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [*range(1, 7)]
    assert not list((tmp_path / "vae").glob(".*"))


def test_a_disk_that_is_too_full_for_the_set(full_disk, in_process, training, tmp_path,
                                             monkeypatch):
    """A crash without words, or samples that must be made again when there is space."""
    training("--stage", "all", "--steps", 1)
    command = ["--model", "transdiff", "--run", tmp_path, "--n", 6, "--batch-size", 2,
               "--device", "cpu", "--out", tmp_path / "x.npz"]
    with full_disk(3000) as caught:  # enough for two images
        in_process(sample, *command)
    assert "x.npz: [Errno 27] File too large" in str(caught.value)
    monkeypatch.setattr(sample.Job, "make", None)
    in_process(sample, *command)
    assert (tmp_path / "x.npz").stat().st_size > 6 * 16 * 16 * 3


def test_a_dead_worker_is_named(undisturbed, training, tmp_path, monkeypatch):
    """A process that loads images is killed, as by a lack of memory: a page of traceback."""
    view = common.Samples.view

    def die(self, epoch, index):
        if epoch == 1 and not (tmp_path / "mark").exists():
            (tmp_path / "mark").touch()
            os.kill(os.getpid(), 9)
        return view(self, epoch, index)

    monkeypatch.setattr(common.Samples, "view", die)
    with pytest.raises(RuntimeError) as caught:
        training("--workers", 1)
    assert "a process that loads images died" in common.explain(caught.value)
    training("--workers", 1)
    assert faults.equal(state_of(tmp_path), undisturbed)


HURT = """
forward, seed_of = common.KLVAE.forward, common.seed_of
def poison(self, *args, calls=[], **kwargs):
    calls.append(1)
    out = forward(self, *args, **kwargs)
    bad = os.environ["RANK"] == "1" and len(calls) == 2
    return {name: value * float("nan") if bad else value for name, value in out.items()}
def fail(seed, step, *place):
    if os.environ["RANK"] == "1" and step == 5:
        raise common.UserError("no such thing")
    return seed_of(seed, step, *place)
common.KLVAE.forward, common.seed_of = poison, fail
"""


@pytest.fixture(scope="session")
def hurt(pictures, tmp_path_factory):
    """A run of two ranks: the loss of rank 1 is NaN at step 1, and rank 1 ends with an error at
    step 5. Its folder, and what it said."""
    out = tmp_path_factory.mktemp("hurt")
    process = faults.start(arguments(pictures, out), HURT, ranks=2)
    said = process.communicate(timeout=60)[0]  # no rank waits for what will not come
    assert process.returncode != 0
    return out, said


def test_an_error_on_one_rank_ends_all(hurt):
    """An error without its rank, or with a traceback."""
    assert "error on rank 1: no such thing" in hurt[1]
    assert not re.search(r"Traceback[^$]*(train|common)\.py", hurt[1].split("ChildFailed")[0])


def test_bad_numbers_of_one_rank_skip_the_step_of_all(hurt):
    """NaN in averages or optimizer, or ranks that disagree."""
    state = state_of(hurt[0])
    lines = log_of(hurt[0] / "vae")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 1] and "loss" not in lines[1]
    assert all(t.isfinite().all() for t in [*state["model"].values(), *state["ema"].values()])
    states = list(state["optimizer"]["state"].values())
    assert all(t.isfinite().all() for s in states for t in s.values())
    assert {int(s["step"]) for s in states if "exp_avg" in s} == {3}  # Muon does not count


@pytest.mark.parametrize("left", [999, 0, None])
def test_a_damaged_state_is_one_line(training, tmp_path, left):
    """A traceback, or a run that starts again unasked: after a state that is cut off, empty, or
    without its keys."""
    training("--steps", 1)
    path = tmp_path / "vae" / "state.pt"
    path.write_bytes(path.read_bytes()[:left])
    if left is None:
        common.save(path, {"step": 4})
    with pytest.raises(UserError, match="state.pt is (damaged|not readable)"):
        training()
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [1]


def test_no_image_is_seen_twice(in_process, pictures, tmp_path, monkeypatch):
    """Another batch size resumes after the last image that was seen, and epochs count images: six
    of 18 are seen, three times four are left."""
    seen = []
    getitem = common.Order.__getitem__

    def watch(self, place):
        seen.append(getitem(self, place))
        return seen[-1]

    monkeypatch.setattr(common.Order, "__getitem__", watch)
    command = [*SMALL["transdiff"], "--stage", "vae", "--data", pictures, "--out", tmp_path]
    in_process(train, *command, "--steps", 1, "--batch-size", 6)
    in_process(train, *command, "--epochs", 1, "--batch-size", 4)
    assert log_of(tmp_path / "vae")[-1]["step"] == 4
    assert sorted(int(image) for epoch, [image] in seen) == list(range(18))


def test_ranks_draw_different_noise():
    """The same draws for two steps, ranks or micro-batches."""
    keys = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert len({common.seed_of(0, *key) for key in keys}) == len(keys)


# --- Memory ---------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
def test_memory_does_not_grow(in_process, training, tmp_path, monkeypatch):
    """Losses kept with their graphs, pictures kept by the sampler: 20 MB more after a warm-up."""
    sizes = []

    def watch(owner, name):
        method = getattr(owner, name)

        def measure(*args):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
            return method(*args)

        monkeypatch.setattr(owner, name, measure)

    watch(common, "update_ema")
    training("--steps", 120, "--save-every", 30, "--log-every", 30)
    assert len(sizes) == 120 and max(sizes[60:]) - sizes[59] < 20e6
    training("--stage", "1step", "--steps", 1)
    sizes.clear()
    watch(sample.Job, "make")
    in_process(sample, "--model", "transdiff", "--run", tmp_path, "--n", 60, "--batch-size", 5,
               "--device", "cpu", "--out", tmp_path / "x.npz")
    assert len(sizes) == 12 and max(sizes[5:]) - sizes[4] < 20e6


# --- What the code may not do, and how it talks ---------------------------------------------------

@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")],
                         ids=lambda path: path.name)
def test_nothing_is_unpickled_freely(file):
    """A call that runs what a file says, or loose loading."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("pickle.load", "pickle.loads", "os.system", "marshal.loads")
            assert name != "torch.load" or keywords.get("weights_only") == "True", node.lineno
            assert name != "np.load" or keywords.get("allow_pickle", "False") == "False"
            assert keywords.get("strict") != "False" or name == "zip", node.lineno


def test_imagenet_is_in_presets_alone():
    """A literal count of its classes elsewhere."""
    allowed = re.compile(r'PRESETS|    (classes: int =|"\w)')
    count = re.compile(r"class\w*\b[^#\"']*\b100[01]\b")
    for file in ROOT.glob("*.py"):
        for line in file.read_text().splitlines():
            assert not count.search(line) or allowed.match(line), line


@pytest.mark.parametrize("script", ["train", "sample", "fid", "sample --model dar"])
def test_help_fits_100_columns(in_process, capsys, monkeypatch, script):
    """Lines that a terminal wraps, or no examples."""
    name, *more = script.split()
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        in_process(importlib.import_module(name), *more, "--help")
    said = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, said.splitlines())) <= 100
    assert f"python {name}.py" in said


FLAGS = {  # what is refused before anything is read or written
    train: ["--steps 0", "--lr nan", "--lr -1", "--image-size -8", "--workers -1",
            "--seed -1", "--accumulate 0", "--unknown", "--precision fp8",
            "--batch-size 2.5", "--save-every 0", "--fid-samples 0"],
    sample: ["--n 0", "--cfg high", "--cfg nan --n 1", "--steps -1", "--seed -1",
             "--noise-scale nan --n 1", "--tokens 4", "--prompt x", "--top-k 3",
             "--batch-size 0", "--ckpt a --run b", "--unknown"]}


@pytest.mark.parametrize("module, flags", [(module, x) for module in FLAGS for x in FLAGS[module]])
def test_impossible_flags(in_process, capsys, tmp_path, monkeypatch, module, flags):
    """A traceback, or files of a command that cannot work."""
    monkeypatch.chdir(tmp_path)
    said = refusal(in_process, capsys, module, "--model", "transdiff", *flags.split())
    assert said and "Traceback" not in said and not list(tmp_path.iterdir())
