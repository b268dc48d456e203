"""The real command lines, in a temporary folder: training, resuming, several processes, sampling, and mistakes."""
import ast
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import sample
import train
import transdiff

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--image-size", "16", "--device", "cpu", "--workers", "0", "--batch-size", "8", "--log-every", "1",
         "--set", "dim=32", "heads=2", "depth=2", "ar_depth=1", "features=16", "class_tokens=4", "dropout=0.1",
         "vae.width=8", "vae.channels=4", "vae.groups=4", "steps=3"]


def run(*command, cwd=None, code=0):
    """A command as a user types it; its output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    assert code == 0 or "Traceback" not in done.stderr
    return done.stdout + done.stderr


def torchrun(n, *command, cwd=None):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, "--", *command, cwd=cwd)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three classes of real PNGs, few enough to be cached in a moment."""
    root = tmp_path_factory.mktemp("pictures") / "set"
    for label, name in ((0, "circle"), (3, "triangle"), (5, "star")):
        (root / name).mkdir(parents=True)
        for k in range(6):
            common.draw_shape(10 * k + label, 16).save(root / name / f"{k}.png")
    return root


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


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """A run of all three stages, two steps each, by the real command."""
    out = tmp_path_factory.mktemp("run")
    said = run(ROOT / "train.py", "--model", "transdiff", "--data", pictures, "--out", out, "--steps", 2, *SMALL)
    assert all(f"stage {name}: done" in said for name in ("vae", "1step", "mrar"))
    return out


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def equal_tensors(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal_tensors, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- Training ---------------------------------------------------------------------------------------------------------

def test_a_run_leaves_what_the_readme_says(trained):
    for stage in ("vae", "1step", "mrar"):
        folder = trained / stage
        config = json.loads((folder / "config.json").read_text())
        assert config["classes"] == ["circle", "star", "triangle"] and config["config"]["classes"] == 3
        assert [line["step"] for line in log_of(folder)] == [1, 2]
        assert (folder / "samples" / "step_000002.png").exists()
        weights = common.read(folder / "model.pt")["model"]
        assert not any(name.startswith(("module.", "_orig_mod.")) for name in weights)
    assert Image.open(trained / "1step/samples/step_000002.png").height == 2 + 3 * 66


def test_finished_stages_are_skipped_and_longer_ones_go_on(trained, in_process, pictures, tmp_path, capsys):
    import shutil
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["--model", "transdiff", "--data", pictures, "--out", tmp_path / "run", *SMALL]
    in_process(train, "--steps", 2, *arguments)
    assert capsys.readouterr().out.count("2 steps are done") == 3
    in_process(train, "--steps", 3, "--stage", "1step", *arguments)
    assert [line["step"] for line in log_of(tmp_path / "run/1step")] == [1, 2, 3]
    with pytest.raises(common.UserError, match="another configuration .dropout: 0.1 -> 0.0"):
        in_process(train, "--steps", 5, *arguments, "dropout=0")
    in_process(train, "--steps", 1, "--stage", "vae", "--fresh", *arguments)
    assert [line["step"] for line in log_of(tmp_path / "run/vae")] == [1]


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
import common, train
save = common.save
def save_and_die(path, content, keep=False):
    save(path, content, keep)
    if path.name == "state.pt" and content["step"] == 3:
        os._exit(9)                                    # as kill -9 would: nothing is cleaned up
common.save = save_and_die
sys.argv = ["train.py"] + {arguments!r}
train.main()
"""


def test_killed_runs_end_bit_equal(pictures, tmp_path):
    """Six steps = three, kill -9, three more, in each stage: weights, averages, optimizer and losses, bit for bit."""
    def arguments(out):
        return [str(a) for a in ("--model", "transdiff", "--data", pictures, "--out", out, "--steps", 6, "--save-every",
                                 3, "--sample-every", 100, *SMALL)]

    run(ROOT / "train.py", *arguments(tmp_path / "whole"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), arguments=arguments(tmp_path / "killed")))
    for _ in ("vae", "1step", "mrar"):
        run(script, code=9)
    run(ROOT / "train.py", *arguments(tmp_path / "killed"))
    for stage in ("vae", "1step", "mrar"):
        whole, killed = (common.read(tmp_path / name / stage / "state.pt") for name in ("whole", "killed"))
        assert equal_tensors(whole, killed), stage
        whole, killed = (log_of(tmp_path / name / stage) for name in ("whole", "killed"))
        assert [(line["step"], line["loss"]) for line in whole] == [(line["step"], line["loss"]) for line in killed]


def test_sigterm_saves(pictures, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--model", "transdiff", "--data", str(pictures), "--out",
         str(tmp_path), "--steps", "100000", "--stage", "vae", *SMALL], env=ENV, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "vae" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "saved, the same command goes on" in said and "Traceback" not in said
    assert common.read(tmp_path / "vae" / "state.pt")["step"] == log_of(tmp_path / "vae")[-1]["step"]


def test_a_damaged_state_falls_back_to_the_one_before(trained, in_process, pictures, tmp_path, capsys):
    arguments = ["--model", "transdiff", "--data", pictures, "--out", tmp_path, "--stage", "vae", *SMALL]
    in_process(train, "--steps", 4, "--save-every", 2, *arguments)
    state = tmp_path / "vae" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    in_process(train, "--steps", 5, *arguments)
    said = capsys.readouterr().out
    assert "trying the one before" in said and "steps 2 to 5" in said
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stage,steps", [("vae", 4), ("mrar", 3)])
def test_two_processes_are_one_with_the_same_batch(trained, pictures, tmp_path, stage, steps):
    """torchrun with two ranks, and one process with two micro-batches: the same images, draws, losses and gradients."""
    import shutil
    arguments = ["--model", "transdiff", "--data", pictures, "--stage", stage, "--steps", steps, *SMALL]
    for out in ("one", "two"):
        for earlier in ("vae", "1step"):
            if earlier != stage:
                shutil.copytree(trained / earlier, tmp_path / out / earlier)
    run(ROOT / "train.py", *arguments, "--out", tmp_path / "one", "--accumulate", 2, cwd=tmp_path)
    torchrun(2, ROOT / "train.py", *arguments, "--out", tmp_path / "two", cwd=tmp_path)
    one, two = log_of(tmp_path / "one" / stage), log_of(tmp_path / "two" / stage)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    first, second = (Image.open(tmp_path / n / stage / f"samples/step_{steps:06d}.png") for n in ("one", "two"))
    assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 2


def test_two_agents_on_loopback(pictures, tmp_path):
    """torchrun --nnodes 2: two agents meet over c10d and train together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "x", "--local_addr",
               "127.0.0.1", str(ROOT / "train.py"), "--model", "transdiff", "--data", str(pictures), "--out",
               str(tmp_path), "--steps", "2", "--stage", "vae", *SMALL]
    agents = [subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
              for _ in range(2)]
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("2 x 1 x 4 samples" in text for text in said) == 1  # one rank speaks
    assert log_of(tmp_path / "vae")[-1]["step"] == 2


def poisoned(monkeypatch, steps):
    """The VAE's loss is NaN at these calls."""
    forward, calls = common.KLVAE.forward, iter(range(10**6))

    def poison(self, *args, **kwargs):
        out, k = forward(self, *args, **kwargs), next(calls)
        return {name: value * float("nan") if k in steps else value for name, value in out.items()}
    monkeypatch.setattr(common.KLVAE, "forward", poison)


def test_a_step_that_is_not_finite_is_skipped(monkeypatch, in_process, pictures, tmp_path):
    poisoned(monkeypatch, {1, 2})
    arguments = ["--model", "transdiff", "--data", pictures, "--out", tmp_path, "--stage", "vae", *SMALL]
    in_process(train, "--steps", 4, *arguments)
    lines = log_of(tmp_path / "vae")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2] and "loss" not in lines[1] and lines[3]["loss"] < 2
    state = common.read(tmp_path / "vae" / "state.pt")
    assert all(t.isfinite().all() for t in [*state["model"].values(), *state["ema"].values()])
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {2}


def test_ten_in_a_row_stop_the_run_and_keep_the_good_weights(monkeypatch, in_process, pictures, tmp_path):
    poisoned(monkeypatch, set(range(2, 99)))
    arguments = ["--model", "transdiff", "--data", pictures, "--out", tmp_path, "--stage", "vae", *SMALL]
    with pytest.raises(common.UserError, match="ten times in a row, up to step 11.*state.pt"):
        in_process(train, "--steps", 50, "--save-every", 2, *arguments)
    assert common.read(tmp_path / "vae" / "state.pt")["step"] == 10
    assert all(t.isfinite().all() for t in common.read(tmp_path / "vae" / "model.pt")["model"].values())


def test_init_carries_weights_to_another_size(trained, in_process, pictures, tmp_path, capsys):
    """256 to 512 px in small: only the decoder trains, its position table is resampled, the rest stays as it was."""
    old = common.read(trained / "1step/model.pt")["model"]
    arguments = ["--model", "transdiff", "--data", pictures, "--out", tmp_path, "--vae", trained / "vae/model.pt",
                 "--stage", "1step", "--steps", 1, *SMALL, "only_decoder=true", "image_size=32"]
    with pytest.raises(common.UserError, match="give the rest with --init"):
        in_process(train, *arguments)
    with pytest.raises(common.UserError, match="no such file: absent.pt"):
        in_process(train, *arguments, "--init", "absent.pt")
    in_process(train, *arguments, "--init", trained / "1step/model.pt")
    said = capsys.readouterr().out
    assert "decoder.pos (1, 16, 32) -> (1, 64, 32)" in said and "begun afresh: none" in said
    new = common.read(tmp_path / "1step/model.pt")["model"]
    assert all(torch.equal(new[name], old[name]) for name in new if name.startswith("ar."))
    torch.save({"model": {"x": torch.zeros(1)}, "stage": "1step"}, tmp_path / "wrong.pt")
    with pytest.raises(common.UserError, match="fits 0 of"):
        in_process(train, *arguments, "--fresh", "--init", tmp_path / "wrong.pt")


def test_latents_on_the_fly(trained, in_process, pictures, tmp_path):
    """--cache off trains both stages without a cache; without mirror and random crops of squares the moments are the
    cached ones, so the losses are, too."""
    logs = []
    for cache in ("off", tmp_path / "cache"):
        in_process(train, "--model", "transdiff", "--data", pictures, "--out", tmp_path / str(cache == "off"), "--vae",
                   trained / "vae/model.pt", "--steps", 2, "--cache", cache, *SMALL)
        logs.append([line["loss"] for s in ("1step", "mrar") for line in log_of(tmp_path / str(cache == "off") / s)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize("arguments,words", [
    (["--size", "xxl"], "tiny, b, l, h"), (["--stage", "gan"], "vae, 1step, mrar"), (["--size", "b"], "--vae FILE"),
    (["--data", "/nowhere"], "no such folder"), (["--batch-size", "0"], "more than 0"), (["--lr", "-1"], "more than"),
    (["--set", "dim=x"], "dim is a int"), (["--set", "depths=2"], "no such field"),
    (["--set", "dim=30"], "not divisible by 4 heads"), (["--image-size", "30"], "not divisible"),
    (["--accumulate", "5"], "does not divide"), (["--stage", "mrar"], "train stage vae, or give"),
    (["--vae", "x.pt"], "x.pt, which is not there"), (["--device", "tpu"], "--device tpu"),
    (["--seed", "-1"], "0 or more")])
def test_mistakes_in_training_are_one_line(in_process, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((common.UserError, SystemExit)) as caught:
        in_process(train, "--model", "transdiff", "--steps", 1, *arguments)
    said = str(caught.value) if isinstance(caught.value, common.UserError) else capsys.readouterr().err
    assert words in said
    assert not list(tmp_path.rglob("*.pt"))


def test_a_mistake_ends_with_code_two(tmp_path):
    said = run(ROOT / "train.py", "--model", "transdiff", "--size", "b", cwd=tmp_path, code=2)
    assert said.splitlines()[-1].startswith("error: size b is trained with a published vae")
    said = run(ROOT / "sample.py", "--model", "transdiff", cwd=tmp_path, code=2)
    assert "no trained stage in runs/transdiff: python train.py --model transdiff makes one" in said


# --- Sampling ---------------------------------------------------------------------------------------------------------

def arrays(path):
    with np.load(path, allow_pickle=False) as content:
        return content["arr_0"], content["arr_1"]


def test_sampling_by_the_real_command(trained, tmp_path):
    """A grid of the last stage, its facts, and the same from another process count and batch size."""
    said = run(ROOT / "sample.py", "--model", "transdiff", "--run", trained, "--n", 6, "--out", tmp_path / "x.png")
    assert "wrote" in said
    meta = json.loads((tmp_path / "x.meta.json").read_text())
    assert (meta["stage"], meta["weights"], meta["count"], meta["steps"]) == ("mrar", "EMA", 6, 3)
    model = transdiff.TransDiff(common.rebuild(transdiff.Config, common.read(trained / "mrar/model.pt")["config"]))
    model.load_state_dict(common.read(trained / "mrar/model.pt")["model"])
    assert meta["weights_hash"] == common.fingerprint(model)
    run(ROOT / "sample.py", "--model", "transdiff", "--run", trained, "--n", 6, "--out", tmp_path / "one.npz")
    torchrun(2, ROOT / "sample.py", "--model", "transdiff", "--run", trained, "--n", 6, "--batch-size", 2, "--out",
             tmp_path / "two.npz")
    (one, labels), (two, _) = arrays(tmp_path / "one.npz"), arrays(tmp_path / "two.npz")
    assert one.shape == (6, 16, 16, 3) and one.dtype == np.uint8 and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    assert not list(tmp_path.glob("*.partial"))


def test_every_kind_of_output(trained, in_process, tmp_path):
    def draw(*arguments):
        in_process(sample, "--model", "transdiff", "--run", trained, "--device", "cpu", *arguments)

    draw("--classes", "star,0", "--n", 4, "--out", tmp_path / "set.npz")
    draw("--classes", "star,0", "--n", 4, "--out", tmp_path / "set")
    images, labels = arrays(tmp_path / "set.npz")
    files = sorted((tmp_path / "set").glob("*.png"))
    assert labels.tolist() == [1, 1, 0, 0] and [f.name for f in files][0] == "000000_class1.png"
    assert all(np.array_equal(np.asarray(Image.open(f)), image) for f, image in zip(files, images, strict=True))
    with pytest.raises(common.UserError, match="not empty"):
        draw("--n", 4, "--out", tmp_path / "set")
    draw("--n", 3, "--out", tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames > 5
    draw("--n", 2, "--fuse", "circle,star", "--features", 8, "--out", tmp_path / "fused.png")
    assert json.loads((tmp_path / "fused.meta.json").read_text())["fuse"] == "circle,star"


def test_another_vae_than_the_models_is_refused(trained, in_process, tmp_path):
    vae = common.KLVAE(common.VAEConfig(channels=4, width=32, mult=(1, 2), blocks=1, attention=()))
    common.save(tmp_path / "f2.pt", vae.state_dict())
    with pytest.raises(common.UserError, match="has 4 channels at f2, the model needs 4 at f4"):
        in_process(sample, "--model", "transdiff", "--run", trained, "--vae", tmp_path / "f2.pt", "--out",
                   tmp_path / "x.png")


def test_an_interrupted_set_goes_on(trained, in_process, tmp_path, monkeypatch):
    """What is there is not sampled again; other settings are refused; the end is the same."""
    def draw(*arguments):
        in_process(sample, "--model", "transdiff", "--run", trained, "--device", "cpu", "--n", 6, "--batch-size", 2,
                   "--out", tmp_path / "x.npz", *arguments)

    generate, calls = transdiff.generate, []

    def dies(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)
    monkeypatch.setattr(transdiff, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        draw()
    assert not (tmp_path / "x.npz").exists()
    with pytest.raises(common.UserError, match="other settings .seed"):
        draw("--seed", 1)
    draw()
    assert calls == [2, 2, 2, 2]  # the third was interrupted, and the only one to be done again
    again = arrays(tmp_path / "x.npz")[0]
    draw()
    assert np.array_equal(arrays(tmp_path / "x.npz")[0], again)


def test_a_folder_that_was_half_written_is_finished(trained, in_process, tmp_path, monkeypatch):
    """Killed among the PNGs: the same command goes on, samples nothing again and leaves the whole set."""
    def draw():
        in_process(sample, "--model", "transdiff", "--run", trained, "--device", "cpu", "--n", 4, "--out",
                   tmp_path / "s")

    whole, written = common.save_picture, []

    def dies(*args):
        written.append(args)
        return whole(*args) if len(written) < 3 else 1 / 0
    monkeypatch.setattr(common, "save_picture", dies)
    with pytest.raises(ZeroDivisionError):
        draw()
    monkeypatch.setattr(common, "save_picture", whole)
    monkeypatch.setattr(transdiff, "generate", None)
    draw()
    assert len(list((tmp_path / "s").glob("*.png"))) == 4 and not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize("arguments,words", [
    (["--classes", "moon"], "circle, star, triangle"), (["--classes", "3"], "ids 0 to 2"), (["--n", "0"], "1 or more"),
    (["--out", "x.bmp"], ".png, .gif or .npz"), (["--rounds", "5"], "trained for 4 rounds"),
    (["--features", "99"], "16 features"), (["--fuse", "star"], "two classes"),
    (["--solver", "magic"], "maruyama or euler"), (["--ckpt", "x.pth"], "no such file"),
    (["--cfg", "high"], "--cfg"), (["--run", "elsewhere"], "no trained stage"),
    (["--vae", "none.pt"], "no such file")])
def test_mistakes_in_sampling_are_one_line(trained, in_process, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((common.UserError, SystemExit)) as caught:
        in_process(sample, "--model", "transdiff", *([] if {"--run", "--ckpt"} & {*arguments} else ["--run", trained]),
                   "--n", 1, *arguments)
    said = str(caught.value) if isinstance(caught.value, common.UserError) else capsys.readouterr().err
    assert words in said
    assert not list(tmp_path.glob("samples*.png"))


# --- The house --------------------------------------------------------------------------------------------------------

def test_only_the_named_packages_are_imported():
    """Nothing beyond torch, NumPy, SciPy, Pillow and tqdm at import; no model file imports another."""
    code = ("import sys; before = set(sys.modules); import train, sample; print(' '.join({m.split('.')[0] for m in "
            "set(sys.modules) - before if getattr(sys.modules[m], '__file__', None)}))")
    loaded = set(run("-c", code, cwd=ROOT).split())
    installed = {p.name.split("-")[0].lower() for p in Path(np.__file__).parent.parent.glob("*.dist-info")}
    asked = {"torch", "numpy", "scipy", "pil", "pillow", "tqdm"}
    needed_by_torch = {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions",
                       "setuptools", "pytest", "pip", "packaging"}
    assert not {m.lower() for m in loaded} & (installed - asked - needed_by_torch)
    doors = {"common": set(), "transdiff": {"common"}, "sample": {"common", "transdiff"},
             "train": {"common", "transdiff"}}
    for room, may in doors.items():
        imported = {name for node in ast.walk(ast.parse((ROOT / f"{room}.py").read_text())) for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else
            [node.module] if isinstance(node, ast.ImportFrom) else [])}
        assert imported & set(doors) == may


def test_tensorboard_is_asked_for_or_absent(monkeypatch, in_process, pictures, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        in_process(train, "--model", "transdiff", "--data", pictures, "--out", tmp_path, "--steps", 1, "--tensorboard",
                   *SMALL)
