"""Faults, put in on purpose: kills, full disks, damaged files, dead workers and ranks, bad numbers. Nothing is lost,
and a run that goes on ends like one that was never disturbed."""
import ast
import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, SMALL, log_of, refusal
from faults import equal, start

import common
import fid
import sample
import train
from common import Noise, UserError


@pytest.fixture(scope="session")
def undisturbed(pictures, tmp_path_factory):
    """Six steps of a VAE that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    said, code = finished(start(arguments(pictures, out)))
    assert code == 0, said
    return out


def arguments(data, out, *more):
    return ["--model", "transdiff", "--stage", "vae", "--data", data, "--out", out, "--steps", 6, "--save-every", 2,
            "--sample-every", 100, *more, *SMALL]


def finished(process, within=120):
    """What a process said, and its exit code."""
    said = process.communicate(timeout=within)[0]
    ours = said.split("ChildFailedError")[0].split("torch/distributed/run.py")[0]  # torchrun has a traceback of its own
    assert not re.search(r"Traceback[^$]*(train|common)\.py", ours), said
    return said, process.returncode


def same(a, b, stage="vae", tolerance=0.0):
    """The runs a and b ended alike: everything in the state, bit for bit unless told otherwise."""
    a, b = (common.read(out / stage / "state.pt") for out in (a, b))
    if tolerance:
        return all((a[k][name] - b[k][name]).abs().max() <= tolerance for k in ("model", "ema") for name in a[k])
    return equal(a, b)


# --- Runs -------------------------------------------------------------------------------------------------------------

def test_runs_survive_kills(tmp_path):
    """The loop of tests/faults.py, short: both stages of D-AR, killed at a random moment, end bit-equal. (The other
    models are killed at a given step, in test_scripts.)"""
    assert faults.kills("dar", 1, tmp_path, seed=2)[-1].startswith("1 kills, 0 lost")


def test_a_full_disk_loses_nothing(undisturbed, pictures, tmp_path):
    """A limit on the size of files, as a disk that is full: a state cannot be written, then it can."""
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    said, code = finished(start(arguments(pictures, tmp_path), limit))
    assert code == 2 and re.search("error: cannot write .*File too large; what was there is untouched", said)
    died = "save = common.save\ndef die(path, content, keep=False):\n    save(path, content, keep)\n" \
           "    path.name == 'state.pt' and content['step'] == 4 and os._exit(9)\ncommon.save = die"
    assert finished(start(arguments(pictures, tmp_path), died))[1] == 9
    assert finished(start(arguments(pictures, tmp_path), limit))[1] == 2
    assert common.read(tmp_path / "vae" / "state.pt")["step"] == 4
    assert finished(start(arguments(pictures, tmp_path)))[1] == 0 and same(tmp_path, undisturbed)
    assert not [f for f in (tmp_path / "vae").iterdir() if f.name.startswith(".")]


def test_a_vanished_folder_is_made_again(undisturbed, pictures, tmp_path):
    """Somebody removes the run while it runs: it goes on, and what it saves is whole."""
    patch = """
import shutil, pathlib
update = common.update_ema
def remove(ema, model, decay, done=[]):
    update(ema, model, decay)
    done.append(1)
    if len(done) == 3:
        shutil.rmtree(pathlib.Path(OUT) / "vae")
common.update_ema = remove"""
    assert finished(start(arguments(pictures, tmp_path), f"OUT = {str(tmp_path)!r}{patch}"))[1] == 0
    assert same(tmp_path, undisturbed) and (tmp_path / "vae" / "config.json").exists()
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [3, 4, 5, 6]


def test_a_dead_worker_is_named(undisturbed, pictures, tmp_path):
    """A process that loads images is killed, as by a lack of memory: one line, and the next attempt goes on."""
    patch = """
get = common.Pictures.__getitem__
def die(self, item):
    if item[0] == 1 and not os.path.exists(MARK):  # in the second epoch, once
        open(MARK, "w").close()
        os.kill(os.getpid(), 9)
    return get(self, item)
common.Pictures.__getitem__ = die"""
    patch = f"MARK = {str(tmp_path / 'mark')!r}{patch}"
    said, code = finished(start([*arguments(pictures, tmp_path), "--workers", 1], patch))
    assert code == 2 and "a process that loads images died" in said
    assert finished(start([*arguments(pictures, tmp_path), "--workers", 1], patch))[1] == 0
    assert same(tmp_path, undisturbed)


def test_a_dead_rank_and_restarts(pictures, tmp_path):
    """Rank 1 is killed at step 3; torchrun --max-restarts starts both anew, and they end as if nothing had happened."""
    patch = """
reseed = train.reseed
def die(seed, step, micro):
    if os.environ["RANK"] == "1" and step == 3 and not os.path.exists(MARK):
        open(MARK, "w").close()
        os.kill(os.getpid(), 9)
    reseed(seed, step, micro)
train.reseed = die"""
    for out, mark in (("whole", ROOT), ("restarted", tmp_path / "mark")):  # ROOT exists: nobody dies
        said, code = finished(start(arguments(pictures, tmp_path / out), f"MARK = {str(mark)!r}{patch}", ranks=2))
        assert code == 0, said
    assert (tmp_path / "mark").exists() and same(tmp_path / "whole", tmp_path / "restarted")


def test_an_error_on_one_rank_ends_all(pictures, tmp_path):
    """Its message names the rank; nobody waits for what will not come."""
    patch = """
reseed = train.reseed
def fail(seed, step, micro):
    if os.environ["RANK"] == "1" and step == 1:
        raise common.UserError("no such thing")
    reseed(seed, step, micro)
train.reseed = fail"""
    begun = time.monotonic()
    said, code = finished(start(arguments(pictures, tmp_path), patch, ranks=2, restarts=0), 60)
    assert code != 0 and "error on rank 1: no such thing" in said and time.monotonic() - begun < 60


def test_bad_numbers_of_one_rank_skip_the_step_of_all(pictures, tmp_path):
    """A NaN in the loss of rank 1 at step 1: no rank takes the step, average and optimizer never see it."""
    patch = """
forward = common.KLVAE.forward
def poison(self, *args, calls=[], **kwargs):
    calls.append(1)
    out = forward(self, *args, **kwargs)
    bad = os.environ["RANK"] == "1" and len(calls) == 2
    return {name: value * float("nan") if bad else value for name, value in out.items()}
common.KLVAE.forward = poison"""
    assert finished(start(arguments(pictures, tmp_path), patch, ranks=2))[1] == 0
    state, lines = common.read(tmp_path / "vae" / "state.pt"), log_of(tmp_path / "vae")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 1, 1] and "loss" not in lines[1]
    assert all(t.isfinite().all() for name in ("model", "ema") for t in state[name].values())
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {5}


def test_three_ranks_and_a_change_of_their_number(pictures, tmp_path):
    """18 images in batches of 12: epochs do not divide by three. Three ranks, and one that goes on where two stopped,
    are one with three micro-batches."""
    size = ["--batch-size", 12]
    for out, ranks, more in (("one", 1, ["--accumulate", 3]), ("three", 3, []), ("moved", 2, ["--steps", 2]),
                             ("moved", 1, ["--accumulate", 2])):
        said, code = finished(start([*arguments(pictures, tmp_path / out), *size, *more], "", ranks=ranks))
        assert code == 0, said
    assert [line["changed"] for line in log_of(tmp_path / "moved" / "vae", changes=True)] == [
        "steps 2 -> 6, ranks 2 -> 1"]
    assert same(tmp_path / "one", tmp_path / "three", tolerance=1e-4)
    momentum = [torch.cat([s["exp_avg"].flatten() for s in common.read(tmp_path / name / "vae" / "state.pt")[
        "optimizer"]["state"].values()]) for name in ("one", "three")]  # a moving average of the gradients
    assert (momentum[0] - momentum[1]).norm() < 1e-5 * momentum[0].norm()
    one, three = (log_of(tmp_path / name / "vae") for name in ("one", "three"))
    assert [line["l1"] for line in one] == pytest.approx([line["l1"] for line in three], rel=1e-4)


def test_two_runs_do_not_share_a_folder(in_process, pictures, tmp_path):
    hold = "import sys, time; sys.path.insert(0, sys.argv[1]); import common; from pathlib import Path\n" \
           "with common.locked(Path(sys.argv[2])):\n    print('held', flush=True)\n    time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold, str(ROOT), str(tmp_path / ".vae.lock")], text=True,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another process \({other.pid} on .*works in.*another --out"):
            in_process(train, *arguments(pictures, tmp_path))
        other.kill()
    assert not (tmp_path / "vae").exists()
    in_process(train, *arguments(pictures, tmp_path))                          # the lock is free again


def flipped(path):
    """A bit in the middle of the file, turned over."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [flipped, lambda path: path.write_bytes(path.read_bytes()[:999]),
                                    lambda path: path.write_bytes(b""),
                                    lambda path: common.save(path, {"step": 4})], ids=["bit", "half", "empty", "keys"])
def test_a_damaged_state(undisturbed, in_process, pictures, tmp_path, capsys, damage):
    """The one before takes its place, and stays until the next is saved. Where both are damaged nothing is done."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    newest, before = (tmp_path / "vae" / name for name in ("state.pt", "state.previous.pt"))
    damage(newest)
    saved = []

    def watch(path, content, keep=False, save=common.save):
        save(path, content, keep)
        saved.append((path.name, common.read(before)["step"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save", watch)
        in_process(train, *arguments(pictures, tmp_path))
    assert "trying the one before" in capsys.readouterr().out and saved == [("model.pt", 4), ("state.pt", 4)]
    assert same(tmp_path, undisturbed)
    damage(newest)
    damage(before)
    with pytest.raises(UserError, match="no state in .* can be used; --out names another"):
        in_process(train, *arguments(pictures, tmp_path))


def test_changes_are_logged_and_no_image_is_seen_twice(in_process, pictures, tmp_path, monkeypatch):
    """Another batch size, learning rate and length: the order goes on behind the last image that was seen."""
    seen, get = [], common.Pictures.__getitem__
    monkeypatch.setattr(common.Pictures, "__getitem__",
                        lambda self, item: seen.append(tuple(item[1])) or get(self, item))
    in_process(train, *arguments(pictures, tmp_path), "--steps", 1, "--batch-size", 6)
    in_process(train, *arguments(pictures, tmp_path), "--steps", 4, "--batch-size", 4, "--lr", 1e-4)
    assert len(seen) == 18 and len(set(seen)) == 18                              # an epoch of 18 images, each once
    lines = [line["changed"] for line in log_of(tmp_path / "vae", changes=True)]
    in_process(train, *arguments(pictures, tmp_path)[:-len(SMALL) - 6], "--epochs", 2, *SMALL, "--batch-size", 6,
               "--stage", "vae")  # 18 of 36 images are seen: three steps of six are left
    assert log_of(tmp_path / "vae")[-1]["step"] == 7 and len(seen) == 36 and len(set(seen)) == 18
    assert len(lines) == 1 and all(part in lines[0] for part in ("batch 6 -> 4", "lr 0.003 -> 0.0001", "steps 1 -> 4"))


def test_ranks_draw_different_noise():
    draws = []
    for step, chunk in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):                 # chunk: micro_step * world + rank
        train.reseed(0, step, chunk)
        draws.append(torch.randn(4))
    assert len({tuple(draw.tolist()) for draw in draws}) == 5


# --- Long jobs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(tmp_path, ranges):
    """The line breaks twice; what came stays, and only the rest is asked for (of servers that can do that)."""
    content, asked = np.random.default_rng(0).bytes(100_000), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begin = int((self.headers["Range"] or "bytes=0-")[6:-1]) if ranges else 0
            asked.append(begin)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin:begin + 40_000] if len(asked) < 3 else content[begin:])

        def log_message(self, *args):
            pass
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source, target = f"http://127.0.0.1:{server.server_port}/", tmp_path / "root" / "file.gz"
        fetch = functools.partial(common.download, source, target, hashlib.sha256(content).hexdigest())
        for _ in range(2):
            with pytest.raises(UserError, match="cannot download.*missing.*try again"):
                fetch()
            assert not target.exists()
        assert fetch().read_bytes() == content
        server.shutdown()
    assert asked == ([0, 40_000, 80_000] if ranges else [0, 0, 0])
    assert [f.name for f in target.parent.iterdir() if not f.name.startswith(".")] == ["file.gz"]


def test_an_interrupted_extraction_goes_on(tmp_path, monkeypatch):
    """Features of 40 images: after an interruption only the missing ones are computed, with the same result."""
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", arr_0=images, arr_1=np.arange(40) % 2)
    monkeypatch.setattr(fid, "PAUSE", -1)
    made, looked = [], []
    for cache, stop in (("whole", None), ("parts", 3), ("parts", None)):
        judge = fid.Judge.__new__(fid.Judge)
        judge.cache, judge.batch, judge.reference, judge.name = tmp_path / cache, 8, None, "test"

        def look(batch, stop=stop):
            if stop and len(looked) == stop:
                raise KeyboardInterrupt
            looked.append(len(batch))
            x = torch.stack(list(batch)).numpy().reshape(len(batch), -1)[:, :6].astype(np.float32)
            return x, None, x[:, :2]
        judge.look = look
        looked.clear()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                judge.extract(fid.Source(tmp_path / "set.npz"))
        else:
            made.append((judge.extract(fid.Source(tmp_path / "set.npz")), sum(looked)))
    (whole, all_of_them), (parts, rest) = made
    assert all_of_them == 40 and rest == 16 and not list((tmp_path / "parts").iterdir())
    assert whole.keys() == parts.keys() and all(np.array_equal(whole[k], parts[k]) for k in whole)


# --- Memory -----------------------------------------------------------------------------------------------------------

def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
def test_memory_does_not_grow(in_process, pictures, tmp_path, monkeypatch):
    """Over 300 training steps, and over 20 batches of samples, after as many to warm up; margin 20 MB."""
    sizes, update = [], common.update_ema
    monkeypatch.setattr(common, "update_ema", lambda *args: sizes.append(resident()) or update(*args))
    in_process(train, *arguments(pictures, tmp_path), "--steps", 400, "--save-every", 100, "--log-every", 50)
    assert len(sizes) == 400 and max(sizes[100:]) - sizes[99] < 20e6
    in_process(train, *arguments(pictures, tmp_path), "--stage", "1step", "--steps", 1)
    sizes.clear()
    of = Noise.of
    monkeypatch.setattr(Noise, "of", lambda *args: sizes.append(resident()) or of(*args))
    in_process(sample, "--model", "transdiff", "--run", tmp_path, "--n", 250, "--batch-size", 10, "--device", "cpu",
               "--out", tmp_path / "x.npz")
    assert len(sizes) == 25 and max(sizes[5:]) - sizes[4] < 20e6


# --- What the code may not do, and how it talks -----------------------------------------------------------------------

def test_nothing_is_unpickled_freely():
    """No call that runs what a file says, no loose loading, no bare except; ImageNet's class count in presets alone."""
    for file in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, (file, node.lineno)
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("pickle.load", "pickle.loads", "os.system", "marshal.loads"), file
            assert name != "torch.load" or keywords.get("weights_only") == "True", (file, node.lineno)
            assert name != "np.load" or keywords.get("allow_pickle", "False") == "False", (file, node.lineno)
            assert keywords.get("strict") != "False" or name == "zip", (file, node.lineno)
    for file in ROOT.glob("*.py"):  # 1000 also counts diffusion steps, and images of an evaluation
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not re.search(r"class\w*\b[^#\"']*\b100[01]\b", line) or "PRESETS" in line or re.match(
                r"    (classes: int =|\"\w)", line), f"{file.name}:{number}: {line}"


@pytest.mark.parametrize("script", ["train", "sample", "fid"])
def test_help_fits_100_columns(script):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], env={**ENV, "COLUMNS": "100"}, text=True,
                          capture_output=True)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100
    assert f"python {script}.py" in done.stdout                                   # examples


FLAGS = {  # what is refused before anything is read or written
    train: [["--steps", "0"], ["--lr", "nan"], ["--epochs", "inf"], ["--image-size", "-8"], ["--workers", "-1"],
            ["--seed", "-1"], ["--accumulate", "0"], ["--steps", "3", "--epochs", "1"],
            ["--fid-features", "classifier"], ["--fid-samples", "2"], ["--unknown"], ["--precision", "fp8"],
            ["--batch-size", "2.5"], ["--save-every", "0"]],
    sample: [["--n", "0"], ["--cfg", "nan"], ["--cfg", "1:2:3"], ["--interval", "0.8,0.2"], ["--interval", "0,2"],
             ["--steps", "-1"], ["--seed", "-1"], ["--drift-scale", "-1"], ["--noise-scale", "nan"], ["--tokens", "4"],
             ["--prompt", "x"], ["--sampler", "ddim"], ["--top-k", "3"], ["--solver", "adams"], ["--batch-size", "0"],
             ["--ckpt", "a", "--run", "b"], ["--fid-reference", "x"], ["--unknown"], ["--prefix-tokens", "1"]]}


@pytest.mark.parametrize("module, flags", [(module, flags) for module in FLAGS for flags in FLAGS[module]],
                         ids=lambda x: " ".join(x) if isinstance(x, list) else x.__name__)
def test_impossible_flags(in_process, capsys, tmp_path, monkeypatch, module, flags):
    monkeypatch.chdir(tmp_path)
    said = refusal(in_process, capsys, module, "--model", "transdiff", *flags)
    assert said and "Traceback" not in said and not list(tmp_path.iterdir())
