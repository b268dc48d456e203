"""Foreign files are data: whatever a file or a command line says, it is understood or refused with a UserError.

Small valid files that were damaged at random (always the same way: the seeds are fixed), files made with malice, and
command lines. Where a format guards its bytes by checksums, the damage is done below them.
"""
import argparse
import bz2
import contextlib
import copy
import dataclasses
import gzip
import io
import json
import lzma
import math
import os
import pickle
import random
import re
import signal
import struct
import sys
import tarfile
import traceback
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import common
import dar
import fid
import madformer
import sample
import train
import transdiff
from common import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(common.__file__).parent


class Late(BaseException):
    """Something hangs. Not an OSError, as TimeoutError is, so that nobody takes it for a broken file."""


@contextlib.contextmanager
def within(seconds):
    """Ends what takes longer."""
    def late(*_):
        raise Late(f"more than {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def offence(call, *args, seconds=10):
    """What a call did other than to succeed or to raise a UserError with words; None if it kept to that."""
    try:
        with within(seconds):
            call(*args)
    except UserError as error:
        return None if str(error).strip() else "UserError without words"
    except (Exception, Late) as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ROOT]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the test"
        return f"{type(error).__name__} in {place}: {str(error)[:150]}"


def offences(call, cases):
    """The first case of each kind of offence."""
    found = {}
    for name, case in cases:
        if said := offence(call, case):
            kind, _, words = said.partition(": ")
            found.setdefault(kind if ".py" in kind else said.splitlines()[0], f"{name}: {words}")
    return found


# --- Damaged files ----------------------------------------------------------------------------------------------------

EXTREMES = [0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 10**15, 2**63 - 1, 2**64 - 1]
NUMERALS = [b"0", b"-1", b"7", b"1e999", b"4294967296", b"999999999999999", b"9" * 25]


def damaged(raw, rng):
    """The bytes after one to three accidents, half of them near an end, where headers are."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        at = rng.choice([at, at, at % 150, max(len(raw) - at % 150, 0)])
        size, width, accident = rng.randint(1, 32), rng.choice([1, 2, 4, 8]), rng.randrange(9)
        if accident == 0:  # truncated
            del raw[at:]
        elif accident < 3:  # a flipped bit
            raw[at:at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in raw[at:at + 1])
        elif accident == 3:  # zeroed
            raw[at:at + size] = bytes(len(raw[at:at + size]))
        elif accident == 4:  # inserted
            raw[at:at] = rng.randbytes(size)
        elif accident == 5:  # lost
            del raw[at:at + size]
        elif accident == 6:  # a number of a header
            raw[at:at + width] = (rng.choice(EXTREMES) % 256**width).to_bytes(width, rng.choice(["little", "big"]))
        elif accident == 7:  # two fields of a header exchanged
            raw[at:at + 2 * width] = raw[at + width:at + 2 * width] + raw[at:at + width]
        elif numbers := list(re.finditer(rb"\d+", raw)):  # a number in letters
            begin, end = rng.choice(numbers).span()
            raw[begin:end] = rng.choice(NUMERALS)
    return bytes(raw)


def written(store, *args, **options):
    """The bytes that store(f, ...) writes into a file."""
    store(f := io.BytesIO(), *args, **options)
    return f.getvalue()


def saved(content, zipped=True):
    """A checkpoint, in today's format or the legacy one."""
    return written(lambda f: torch.save(content, f, _use_new_zipfile_serialization=zipped))


def picture(size=(9, 9), kind="PNG", **options):
    return written(Image.new("RGB", size, "red").save, kind, **options)


def gzipped(raw):
    return gzip.compress(raw, 1, mtime=0)


def tarred(*members):
    """An archive of (name, content, fields of TarInfo)."""
    raw = b""
    for name, content, fields in members:
        info = tarfile.TarInfo(name)
        for field, value in {"size": len(content), **fields}.items():
            setattr(info, field, value)
        raw += info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)
    return raw + bytes(1024)


def below_zip(whole, entry):
    """The bytes of an entry, and a function that packs others in their place, with the right checksum."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def pack(raw):
        f = io.BytesIO()
        with zipfile.ZipFile(f, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, raw if name == entry else part)
        return f.getvalue()
    return parts[entry], pack


def below_tar(raw):
    """The right checksum for an archive's first header."""
    head = raw[:148] + b" " * 8 + raw[156:512]
    return gzipped(head[:148] + b"%06o\0 " % sum(head) + raw[156:])


def below_png(raw):
    """The right checksums for the chunks of a PNG."""
    out, at = raw[:8], 8
    while at + 12 <= len(raw):
        size = struct.unpack(">I", raw[at:at + 4])[0]
        body = raw[at + 4:at + 8 + size]
        out += raw[at:at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return out + raw[at:]


def look(path):
    """A picture as training, evaluation and --prefix-image read it."""
    data = common.load_data(str(path.parent), size=16)
    for crop in (common.centre_crop, common.random_crop):
        common.Pictures(data, 16, crop)[0, [0]]
    fid.Source(path.parent, 16).read(0)
    sample.picture_file(path, 16)


def judge(path):
    """Images or statistics as fid.py reads them."""
    source = fid.Source(path)
    for i in range(min(source.n, 2)):
        source.read(i)
    assert source.digest


def batch_of(path):
    return common.read_cifar10(path, "test")


def rows(path):
    """A cache that goes on, read and written."""
    table = common.Rows(path.parent, (4, 2), np.uint8, {"seed": 1})
    table.todo(0, 1)
    table.write([0, 3], np.ones((2, 2), np.uint8))


def kept_features(path):
    """fid.py's cache, where a damaged file counts as none; without the network."""
    judge = fid.Judge.__new__(fid.Judge)
    judge.inception, judge.name, judge.cache = True, "name", path.parent
    judge.extract = lambda source: {"n": 2, "mu": np.zeros(2), "sigma": np.eye(2)}
    judge.features(SimpleNamespace(statistics={}, n=2, digest="digest", path=path))


def tokens(path):
    """A tiktoken file, read with everything but tiktoken."""
    with patch.dict(sys.modules, tiktoken=Mock()):
        madformer.Text(str(path))


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
STATISTICS = {"mu": np.arange(3.0), "sigma": np.eye(3), "mu_s": np.arange(2.0), "sigma_s": np.eye(2), "n": np.array(9)}
SET = {**STATISTICS, "arr_0": IMAGES}
CHECKPOINT = {"stage": "x", "step": 3, "lr": 1e-3, "names": ["a", None], "args": argparse.Namespace(a=(1, 2)),
              "array": np.arange(3.0), "model": {"weight": torch.ones(3, 2), "bias": torch.zeros(2, dtype=torch.half)}}
BATCH = ("cifar-10-batches-bin/test_batch.bin", bytes([3]) + bytes(3072), {})
IDX = b"\0\0\x08\x03" + struct.pack(">3i", 3, 5, 5) + bytes(75)


def pictures():
    """A picture in each format that Pillow writes and reads here, and in less common modes."""
    Image.init()
    base = Image.fromarray(IMAGES[0]).resize((24, 18))
    deep = Image.fromarray(np.arange(432, dtype=np.uint16).reshape(18, 24) * 150)
    film = {"save_all": True, "append_images": [base.rotate(90)]}
    cases = [("PNG", deep, {}), ("TIFF", deep, {}), ("PNG", base.convert("RGBA"), {}), ("PNG", base.convert("LA"), {}),
             ("PNG", base.convert("P"), {"transparency": 3}), ("JPEG", base.convert("CMYK"), {}),
             ("JPEG", base, {"progressive": True}), ("TIFF", base.convert("CMYK"), {"compression": "tiff_lzw"}),
             ("TIFF", base, {"compression": "tiff_adobe_deflate"}), ("WEBP", base, {"lossless": True}),
             *((kind, base, film) for kind in ("PNG", "GIF", "WEBP", "TIFF"))]
    cases += [(kind, base.convert(mode), {}) for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys() - {"EPS"})
              for mode in ("RGB", "P", "1")]  # EPS: see test_pictures_are_no_programs
    for k, (kind, image, options) in enumerate(cases):  # left out: a mode without the format, or a missing library
        with contextlib.suppress(OSError, ValueError, KeyError), warnings.catch_warnings(action="ignore"):
            yield f"{kind} {k}", kind, written(image.save, kind, **options)


def kinds():
    """name, (file, bytes that are damaged, what packs them afterwards, loader, number of cases)."""
    inner, repack = below_zip(saved(CHECKPOINT), "archive/data.pkl")
    vae = saved({"stage": "vae", "config": {"vae": dataclasses.asdict(common.TINY_VAE)}, "model": {}})
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    images, statistics = written(np.savez, arr_0=IMAGES, arr_1=np.arange(4)), written(np.savez, **STATISTICS)
    fidelity = saved({k: torch.as_tensor(v) for k, v in STATISTICS.items()})
    features = written(np.savez, n=2, mu=np.zeros(2), sigma=np.eye(2))
    yield "checkpoint", ("model.pt", saved(CHECKPOINT), bytes, common.read, 60)
    yield "checkpoint, below", ("model.pt", inner, repack, common.read, 200)
    yield "checkpoint, legacy", ("x.pth", saved(CHECKPOINT, zipped=False), bytes, common.read, 200)
    yield "bare pickle", ("x.ckpt", pickle.dumps({"a": [1, "x", (2.5, None)]}, 2), bytes, common.read, 60)
    yield "VAE, below", ("vae.ckpt", *below_zip(vae, "archive/data.pkl"), common.load_vae, 60)
    yield "safetensors", ("x.safetensors", struct.pack("<Q", len(header)) + header + bytes(4), bytes, common.read, 40)
    yield "IDX", ("x-idx3-ubyte.gz", gzipped(IDX), bytes, common.read_idx, 60)
    yield "IDX, below", ("x-idx3-ubyte.gz", IDX, gzipped, common.read_idx, 60)
    yield "IDX, bare", ("x-idx3-ubyte", IDX, bytes, common.read_idx, 30)
    for ending, pack in (("tar", bytes), ("gz", gzipped), ("bz2", bz2.compress), ("xz", lzma.compress)):
        yield f"CIFAR, {ending}", ("c.tar.gz", pack(tarred(BATCH)), bytes, batch_of, 50)
    yield "CIFAR, below", ("c.tar.gz", tarred(BATCH), below_tar, batch_of, 80)
    yield "images", ("x.npz", images, bytes, judge, 80)
    yield "images, below", ("x.npz", *below_zip(images, "arr_0.npy"), judge, 100)
    yield "labels, below", ("x.npz", *below_zip(images, "arr_1.npy"), judge, 60)
    yield "images, compressed", ("x.npz", written(np.savez_compressed, arr_0=IMAGES), bytes, judge, 40)
    yield "statistics", ("x.npz", statistics, bytes, judge, 40)
    yield "statistics, below", ("x.npz", *below_zip(statistics, "sigma.npy"), judge, 100)
    yield "torch-fidelity, below", ("x.pt", *below_zip(fidelity, "archive/data.pkl"), judge, 80)
    yield "meta.json", ("x.meta.json", b'{"labels": "balanced", "step": 3, "prompt": ["a"], "x": {"y": 1}}', bytes,
                        lambda path: judge(path.with_name("x.npz")), 60)
    yield "cache's rows", ("rows.npy", written(np.save, np.zeros((4, 2), np.uint8)), bytes, rows, 80)
    yield "cache's marks", ("done.npy", written(np.save, np.zeros(4, bool)), bytes, rows, 60)
    yield "cache's header", ("header.json", b'{"shape": [4, 2], "dtype": "uint8", "seed": 1}', bytes, rows, 60)
    yield "features", ("digest-name.npz", features, bytes, kept_features, 60)
    yield "features, below", ("digest-name.npz", *below_zip(features, "mu.npy"), kept_features, 60)
    yield "log", ("log.jsonl", b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n', bytes,
                  lambda path: train.Log(path.parent, 2, False), 60)
    yield "tokens", ("tokenizer.model", b"YQ== 0\nYg== 1\n", bytes, tokens, 40)
    for name, kind, raw in pictures():
        yield name, ("a.png", raw, bytes, look, 12)
        if kind == "PNG":
            yield f"{name}, below", ("a.png", raw, below_png, look, 12)


KINDS = dict(kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind, tmp_path, monkeypatch):
    """A loader that lets another exception out, hangs, or writes a file somewhere."""
    monkeypatch.chdir(tmp_path)
    name, raw, pack, load, cases = KINDS[kind]
    folder, beside = tmp_path / "set", {}
    folder.mkdir()
    if load is rows:
        rows(folder / name)
        beside = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != name}
    elif load is look:
        beside = {"ok.png": picture()}  # takes the place of a broken one
    elif kind == "meta.json":
        beside = {"x.npz": written(np.savez, arr_0=IMAGES)}

    def attempt(content):
        for file, whole in {**beside, name: content}.items():
            (folder / file).write_bytes(whole)
        load(folder / name)
    attempts = [("as it was", pack(raw)), ("empty", b""), ("short", raw[:1]), ("zip", b"PK\5\6" + bytes(18)),
                ("text", b"hello\n" * 9)]
    attempts += [(k, pack(damaged(raw, random.Random(f"{kind} {k}")))) for k in range(cases)]
    if kind not in ("VAE, below", "bare pickle", "safetensors"):  # no weights; no dict of torch.save; no package
        attempt(attempts[0][1])
    found = offences(attempt, attempts)
    (folder / name).unlink()
    (folder / name).mkdir()  # a directory in its place
    with contextlib.suppress(UserError, IsADirectoryError):  # command() says this in one line, too
        load(folder / name)
    assert not found
    assert {p.name for p in tmp_path.rglob("*")} == {"set", name, *beside}


# --- Checkpoints whose entries are other things -----------------------------------------------------------------------

SMALL = {
    "transdiff": common.override(transdiff.PRESETS["tiny"], [
        "image_size=16", "dim=32", "heads=2", "depth=1", "ar_depth=1", "features=16", "class_tokens=4", "vae.width=8",
        "vae.channels=4", "vae.groups=4", "classes=2"]),
    "dar": common.override(dar.PRESETS["tiny"], [
        "image_size=16", "dim=32", "heads=2", "depth=1", "classes=2", *(f"tokenizer.{field}" for field in (
            "dim=64", "depth=1", "queries=8", "query_rows=8", "codebook=32", "groups=4", "decoder_dim=64",
            "decoder_depth=1", "pixel_dim=64", "pixel_depth=1"))]),
    "madformer": common.override(madformer.PRESETS["tiny"], [
        "image_size=16", "dim=64", "mlp=64", "depth=2", "diffusion_depth=1", "unet.channels=8,16", "unet.groups=4",
        "unet.time_dim=16", "vae.width=8", "vae.channels=4", "vae.groups=4", "classes=2"])}
THINGS = [None, True, -1, 0, 2**62, math.nan, "", "x", [], [1], (), {}, {"a": 1}, np.zeros(3), argparse.Namespace(),
          torch.zeros(0), torch.zeros(3), torch.zeros(()), torch.zeros(2, 2, dtype=torch.complex64),
          torch.eye(2).to_sparse(), torch.zeros((), dtype=torch.half).expand(2**60)]  # the last claims 2 exabytes
NAMES = [None, 0, 1.5, "", "x", "a\nb", ("a",), "encoder.down.99999999999.block.0.conv1.weight"]


def changed(content, rng):
    """A copy whose one entry, at any depth, is another thing, has another name, or is gone."""
    inner = content = dict(content)
    while isinstance(inner[key := rng.choice(list(inner))], dict) and inner[key] and rng.random() < 0.8:
        inner[key] = inner = dict(inner[key])
    if (change := rng.randrange(4)) == 0:
        del inner[key]
    elif change == 1:
        inner[rng.choice(NAMES)] = inner.pop(key)
    else:
        inner[key] = rng.choice(THINGS)
    return content


@pytest.fixture(scope="module")
def checkpoints():
    """name: (file, content, loader of a folder)."""
    torch.manual_seed(0)
    found, cpu = {}, torch.device("cpu")
    for name, module in (("transdiff", transdiff), ("dar", dar), ("madformer", madformer)):
        source, stage = (next(s for s in module.STAGES if bool(s.first) == second) for second in (False, True))
        config = stage.config(SMALL[name])
        first, model = source.build(SMALL[name]), stage.build(config)
        meta = {"family": name, "size": "tiny", "data": "set", "classes": ["a", "b"], "step": 2, "seed": 0}
        run = {**meta, "stage": stage.name, "first": "first.pt", "config": dataclasses.asdict(config),
               "model": model.state_dict()}
        whole = {**meta, "stage": source.name, "config": dataclasses.asdict(SMALL[name]), "model": first.state_dict()}
        optimizer = train.adamw(model, stage, stage.recipes["tiny"], cpu)
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        state = {"step": 2, "seen": 16, "model": model.state_dict(), "ema": model.state_dict(),
                 "optimizer": optimizer.state_dict(), "meta": {**run, "recipe": {}}}
        released = {"model": model.state_dict(), "args": {"diff_depth": 1, "ar_len": 4, "image_size": 32}}
        own = {"unet": {"groups": 4}, "text": True} if name == "madformer" else {}  # what a file does not tell

        def sampled(folder, name=name, whole=whole, raw=False):
            if not (folder / "first.pt").exists():
                common.save(folder / "first.pt", whole)
            sample.load(argparse.Namespace(model=name, run=folder, ckpt=None, vae=None, tokenizer=None, raw=raw), cpu)

        def resumed(folder, stage=stage, config=config):
            copy_of = stage.build(config)
            train.resume(folder, copy_of, copy.deepcopy(copy_of), train.adamw(copy_of, stage, stage.recipes["tiny"],
                                                                             cpu), config, 0)
        found |= {f"run of {name}": ("model.pt", run, sampled),
                  f"first stage of {name}": ("x.pt", whole, lambda folder, load=source.load: load(folder / "x.pt")),
                  f"state of {name}": ("state.pt", state, resumed),
                  f"released {name}": ("x.pth", released, lambda folder, module=module, own=own: module.load_official(
                      folder / "x.pth", **own))}
    tokenizer = {k.replace("to_code", "quant_in_conv"): v for k, v in found["first stage of dar"][1]["model"].items()}
    config = {"model": {"num_all_queries": 8, "num_query_groups": 4, "queries_per_step": 2, "sampling_resolution": 16}}
    found["released tokenizer"] = ("x.pt", {"ema": tokenizer, "model": tokenizer, "config": config},
                                   lambda folder: dar.load_tokenizer(folder / "x.pt"))
    vae = {"state_dict": {k: v for k, v in common.KLVAE(common.VAEConfig(
        channels=4, width=32, mult=(1, 2), blocks=1, attention=())).state_dict().items() if k != "scale"}}
    found["released VAE"] = ("x.ckpt", vae, lambda folder: common.load_vae(folder / "x.ckpt"))
    return found


CHECKPOINTS = [*(f"{kind} {name}" for kind in ("run of", "first stage of", "state of", "released") for name in SMALL),
               "released tokenizer", "released VAE"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_strange_checkpoints_are_loaded_or_refused(name, checkpoints, tmp_path):
    """A loader that believes that an entry is there, is a tensor, or has a sensible size, because ours do."""
    file, content, load = checkpoints[name]

    def attempt(content):
        torch.save(content, tmp_path / file)
        load(tmp_path)
    attempt(content)
    assert not offences(attempt, ((k, changed(content, random.Random(f"{name} {k}"))) for k in range(25)))


@pytest.mark.parametrize("field,value", [("dim", 2**60), ("depth", 2**31), ("heads", 0), ("image_size", -16),
                                         ("image_size", 2**40), ("classes", 2**60)])
@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_that_claims_a_giant_is_refused(name, field, value, checkpoints, tmp_path):
    """A few bytes of configuration that fill the memory, or build blocks for ever, before the weights are compared."""
    file, content, load = checkpoints[f"run of {name}"]
    torch.save({**content, "config": {**content["config"], field: value}}, tmp_path / file)
    assert not offence(load, tmp_path, seconds=2)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: type(thing).__name__)
def test_strange_entries_do_not_fit(thing):
    """Entries of a state dict that have no shape, or one that cannot be copied; and a classifier kept beside a set."""
    module = torch.nn.Linear(3, 1)
    state = {"weight": torch.zeros(1, 3), "bias": thing}
    assert not offence(common.load_strict, module, state, "x.pt")


@pytest.mark.parametrize("kept", [{}, {"model": None}, {"model": {"fc.bias": 3}}, {"model": {1: 2}}, {"digest": None}])
def test_a_strange_classifier_is_trained_anew(kept, tmp_path, monkeypatch):
    """The classifier that fid.py finds beside a reference came with it."""
    np.savez(tmp_path / "x.npz", arr_0=IMAGES, arr_1=np.arange(4) % 2)
    source, anew = fid.Source(tmp_path / "x.npz"), Mock(side_effect=UserError("it is trained anew"))
    torch.save({"digest": source.digest, **kept}, tmp_path / "x-classifier-8.pt")
    monkeypatch.setattr(torch.optim, "AdamW", anew)
    assert not offence(fid.load_classifier, source, "data", None, "cpu") and anew.called


# --- Malice -----------------------------------------------------------------------------------------------------------

class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def numpy_of(evil):
    return np.array([evil, None], object)


@pytest.mark.parametrize("file,make,load", [
    ("x.pth", lambda evil: saved({"model": evil}, zipped=False), common.read),
    ("x.ckpt", lambda evil: pickle.dumps({"model": evil}), common.read),
    ("x.bin", lambda evil: saved({"array": numpy_of(evil)}), common.read),
    ("vae.pt", lambda evil: saved({"stage": "vae", "config": evil}), common.load_vae),
    ("x.pth", lambda evil: saved({"model_ema": evil}), transdiff.load_official),
    ("x.pth", lambda evil: saved({"ema": evil}), dar.load_official),
    ("x.pth", lambda evil: saved({"args": evil}), madformer.load_official),
    ("statistics.pt", lambda evil: saved({"mu": evil, "sigma": np.eye(2)}), judge),
    *(("x.npz", lambda evil, name=name: written(np.savez, **{**SET, name: numpy_of(evil)}), judge)
      for name in ("arr_0", "arr_1", "mu", "sigma_s", "n", "other")),
    ("x.npz", lambda evil: pickle.dumps(evil), judge),
    ("digest-name.npz", lambda evil: written(np.savez, mu=numpy_of(evil)), kept_features),
    ("rows.npy", lambda evil: written(np.save, np.resize(numpy_of(evil), (4, 2))), rows),
    ("done.npy", lambda evil: pickle.dumps(evil), rows),
    ("c.tar.gz", lambda evil: gzipped(tarred((BATCH[0], pickle.dumps(evil), {}))), batch_of),
    ("c.tar.gz", pickle.dumps, batch_of), ("a.png", pickle.dumps, look)])
def test_pickles_are_not_run(file, make, load, tmp_path):
    """np.load, torch.load and pickle run what a file says, if they are let."""
    if load is rows:
        rows(tmp_path / file)
    (tmp_path / file).write_bytes(make(Evil(tmp_path / "created")))
    said = offence(load, tmp_path / file)
    assert not (tmp_path / "created").exists() and not said


def test_a_storage_is_no_larger_than_its_file(tmp_path):
    """Bytes behind the end of what was read would be read as weights, or end the process."""
    inner, repack = below_zip(saved({"x": torch.zeros(100)}), "archive/data.pkl")
    assert inner.count(b"Kd") == 2  # the storage's length and the shape, 100 in one byte
    (tmp_path / "x.pt").write_bytes(repack(inner.replace(b"Kd", b"J\0\0\0\x10")))
    with contextlib.suppress(UserError):
        assert common.read(tmp_path / "x.pt")["x"].untyped_storage().nbytes() < 10_000


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, rows):
    """A grey PNG of 1 bit whose header says so."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes((1 + (width + 7) // 8) * rows), 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width,height,rows", [(60_000, 60_000, 1), (2**31 - 1, 2**31 - 1, 1), (1, 500_000, 500_000),
                                               (500_000, 1, 1), (0, 5, 5)])
def test_pictures_that_explode_are_refused(width, height, rows, tmp_path, monkeypatch, capsys):
    """Giant pictures in tiny files; and narrow ones, which are giants once their shorter side is as long as asked."""
    resize = Image.Image.resize

    def watched(image, size, *args, **options):
        if math.prod(size) > 2**26:
            raise Late(f"resized to {size}")
        return resize(image, size, *args, **options)
    monkeypatch.setattr(Image.Image, "resize", watched)
    (tmp_path / "a.png").write_bytes(png(width, height, rows))
    (tmp_path / "ok.png").write_bytes(picture())
    assert not offence(sample.picture_file, tmp_path / "a.png", 16)
    assert not offence(lambda: fid.Source(tmp_path, 16).read(0))
    data = common.load_data(str(tmp_path), size=16)
    assert not offence(lambda: common.Pictures(data, 16, common.centre_crop)[0, [0]])
    assert capsys.readouterr().out.count("skipped broken file") == 2


def test_pictures_are_no_programs(tmp_path, monkeypatch):
    """Pillow gives an EPS, whatever its file is called, to Ghostscript, which runs it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/created\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(picture(kind="EPS"))
    (tmp_path / "set" / "ok.png").write_bytes(picture())
    assert not offence(look, tmp_path / "set" / "a.png")
    assert not (tmp_path / "created").exists()


def array_of(shape, kind="|u1", content=bytes(64)):
    """A .npy whose header claims this shape."""
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": kind, "fortran_order": False, "shape": shape})
    return f.getvalue() + content


def zipped(entries, method=zipfile.ZIP_STORED):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return f.getvalue()


GIANT = (10**5, 10**5, 10**5, 3)  # uint8, 3 petabytes


HEADERS = {
    "giant": ("x.npz", zipped({"arr_0.npy": array_of(GIANT)}), judge),
    "giant, compressed": ("x.npz", zipped({"arr_0.npy": array_of(GIANT)}, zipfile.ZIP_DEFLATED), judge),
    "overflow": ("x.npz", zipped({"arr_0.npy": array_of((2**80, 8, 8, 3))}), judge),
    "negative": ("x.npz", zipped({"arr_0.npy": array_of((-4, 8, 8, -3))}), judge),
    "bool": ("x.npz", zipped({"arr_0.npy": array_of((True, 8, 8, 3), content=bytes(192))}), judge),
    "mu": ("x.npz", zipped({"mu.npy": array_of((10**15,), "<f8"), "sigma.npy": array_of((10**8,) * 2, "<f8")}), judge),
    "mu, overflow": ("x.npz", zipped({"mu.npy": array_of((2**70,), "<f8"), "sigma.npy": array_of((2,), "<f8")}), judge),
    "labels": ("x.npz", zipped({"arr_0.npy": array_of((1, 4, 4, 3)), "arr_1.npy": array_of((10**15,))}), judge),
    "objects": ("x.npz", zipped({"arr_0.npy": array_of((1, 4, 4, 3), "|O")}), judge),
    "brackets": ("x.npz", zipped({"arr_0.npy": b"\x93NUMPY\1\0\x20\0" + b"(" * 32}), judge),
    "half a header": ("x.npz", zipped({"arr_0.npy": b"\x93NUMPY\1\0\x20\0" + b"{'descr': (), ".ljust(32)}), judge),
    "paths": ("x.npz", zipped({"../../escaped.npy": array_of((4,)), "/tmp/escaped.npy": array_of((4,))}), judge),
    "rows": ("rows.npy", array_of((10**15, 2)), rows), "marks": ("done.npy", array_of((10**15,), "|b1"), rows),
    "other rows": ("rows.npy", written(np.save, np.zeros((2, 3), np.uint8)), rows),
    "other marks": ("done.npy", written(np.save, np.zeros(3)), rows), "nested": ("header.json", b"[" * 10**5, rows),
    "nested meta": ("ok.meta.json", b"[" * 10**5, lambda path: judge(path.with_name("ok.npz"))),
    "IDX": ("x-idx1-ubyte", b"\0\0\x08\x01\x7f\xff\xff\xff", common.read_idx),
    "IDX, dimensions": ("x-idx3-ubyte", b"\0\0\x08\xff" + b"\x7f\xff\xff\xff" * 255, common.read_idx),
    "IDX, ones": ("x-idx3-ubyte", b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"x", common.read_idx)}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_claim_too_much_are_refused(header, tmp_path):
    """Memory for what a header claims: a file of a hundred bytes is no array of petabytes."""
    file, content, load = HEADERS[header]
    if load is rows:
        rows(tmp_path / file)
    (tmp_path / "ok.npz").write_bytes(written(np.savez, arr_0=IMAGES))
    (tmp_path / file).write_bytes(content)
    assert not offence(load, tmp_path / file)


def test_a_zip_that_claims_too_much_is_refused(tmp_path):
    """An .npz whose directory says that an entry has almost 4 GB."""
    raw = zipped({"arr_0.npy": array_of((1, 4, 4, 3))}, zipfile.ZIP_DEFLATED)
    at = raw.index(b"PK\1\2") + 24
    (tmp_path / "x.npz").write_bytes(raw[:at] + b"\xfe\xff\xff\xff" + raw[at + 4:])
    assert not offence(judge, tmp_path / "x.npz")


@pytest.mark.parametrize("file,content,load", [
    ("x-idx3-ubyte.gz", lambda zeros: gzipped(IDX + zeros), common.read_idx),
    ("c.tar.gz", lambda zeros: gzipped(tarred((BATCH[0], zeros, {}))), batch_of),
    ("x.npz", lambda zeros: zipped({"mu.npy": array_of((2**23,), "<f8", zeros)}, zipfile.ZIP_DEFLATED), judge)])
def test_bombs_are_not_unpacked(file, content, load, tmp_path):
    """64 MB of zeros in 300 KB stand for as many gigabytes."""
    (tmp_path / file).write_bytes(content(bytes(2**26)))
    tracemalloc.start()
    said, (_, most) = offence(load, tmp_path / file), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not said and most < 2**25


LINK, HARD, PIPE = ({"type": kind, "size": 0} for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
FOLDER, FILE = BATCH[0].split("/")
SPARSE = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(3073 * 10**12)}
ARCHIVES = {
    "upwards": [("../escaped", b"x", {}), BATCH], "absolute": [("/tmp/test_fuzz_escaped", b"x", {}), BATCH],
    "linked folder": [(FOLDER, b"", {**LINK, "linkname": ".."}), BATCH],
    "link to itself": [(BATCH[0], b"", {**LINK, "linkname": FILE})],
    "hard link to itself": [(BATCH[0], b"", {**HARD, "linkname": BATCH[0]})],
    "circle": [(BATCH[0], b"", {**LINK, "linkname": "b"}), (f"{FOLDER}/b", b"", {**LINK, "linkname": FILE})],
    "link out": [(BATCH[0], b"", {**LINK, "linkname": "/etc/passwd"})],
    "hard link out": [(BATCH[0], b"", {**HARD, "linkname": "../../x"})], "pipe": [(BATCH[0], b"", PIPE)],
    "giant": [(BATCH[0], b"", {"size": 3073 * 10**12})], "sparse": [(BATCH[0], b"", {"pax_headers": SPARSE})],
    "no size": [("x", b"", {"pax_headers": {"size": "x"}}), BATCH],
    "negative": [("x", b"", {"pax_headers": {"size": "-1024"}}), BATCH]}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_stay_in_their_place(name, tmp_path, monkeypatch):
    """An archive that is unpacked, followed along its links for ever, or believed about its sizes."""
    monkeypatch.chdir(tmp_path)
    for pack in (bytes, gzipped):
        (tmp_path / "c.tar.gz").write_bytes(pack(tarred(*ARCHIVES[name])))
        assert not offence(batch_of, tmp_path / "c.tar.gz")
    assert os.listdir(tmp_path) == ["c.tar.gz"] and not os.path.exists("../escaped")
    assert not os.path.exists("/tmp/test_fuzz_escaped")


@pytest.mark.parametrize("trap", [
    lambda p: os.mkfifo(p / "a.png"), lambda p: (p / "a.png").symlink_to("/dev/zero"),
    lambda p: (p / "a.png").symlink_to("a.png"), lambda p: (p / "a.png").symlink_to("nowhere.png"),
    lambda p: (p / "a").symlink_to("."), lambda p: (p / "a").symlink_to("a"), lambda p: (p / "a").symlink_to(".."),
    lambda p: (p / "²").mkdir() or (p / "²" / "a.png").write_bytes(picture()), lambda p: (p / "a.png").mkdir(),
    lambda p: ((p / os.fsdecode(b"\xff")).mkdir(), (p / os.fsdecode(b"\xff/\xff.png")).write_bytes(b"broken")),
    lambda p: (p / os.fsdecode(b"\xff")).mkdir(), lambda p: (p / ("9" * 250)).mkdir(),
    lambda p: (p / "0_class99999999999999999999999999.png").write_bytes(picture()),
    lambda p: (p / "a.png").write_bytes(picture()) and (p / "a.png").chmod(0)])
def test_folders_with_traps(trap, tmp_path, capsys):
    """A pipe that nobody writes, a device without end, links in circles, names that are no numbers or no text."""
    folder = tmp_path / "set"
    folder.mkdir()
    trap(folder)
    (folder / "ok.png").write_bytes(picture())

    def load():
        data = common.load_data(str(folder), size=16)
        for i in range(len(data.labels)):
            data.read(i)

    def evaluate():
        source = fid.Source(folder, 16)
        for i in range(source.n):
            source.read(i)
        assert source.digest
    found = [offence(call, seconds=2) for call in (load, evaluate)]
    assert found == [None, None]


# --- Command lines ----------------------------------------------------------------------------------------------------

VALUES = ["", " ", ",", ":", "0:0", "1:2:3", "1,2", "1:3", "0", "1", "2", "-1", "8", "0.5", "1.5", "nan", "-inf", "inf",
          "1e999", "9" * 25, "9" * 400, "9" * 5000, "1_0", "ü", "²", "٣", "\udcff", "a=b", "-", "all", "tiny",
          "x.png", "x.npz", "x.gif", "folder/", "shapes", "transdiff", "dar", "madformer", "fid,is", "star"]
DEVICES = ["", "cpu", "cpu:7", "cpu:-1", "cuda", "cuda:99", "cuda:-1", "cuda:" + "9" * 30, "mps", "meta", "xpu", "hpu",
           "xla", "vulkan", "lazy", "privateuseone", "gpu", "ü", "\udcff", "cpu:0:0", "9" * 5000]


def options(module, monkeypatch):
    """What the script's parser knows, without --help."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: caught.append(parser) or sys.exit())
        with pytest.raises(SystemExit):
            module.arguments()
    return [action for action in caught[0]._actions if action.dest != "help"]


def floats(value):
    """All floats in nested lists, tuples, dicts and namespaces."""
    parts = vars(value).values() if isinstance(value, argparse.Namespace) else (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ())
    return [value] if isinstance(value, float) else [x for part in parts for x in floats(part)]


@pytest.mark.parametrize("module", [train, sample, fid], ids=lambda module: module.__name__)
def test_command_lines_are_understood_or_refused(module, monkeypatch, tmp_path):
    """Exit code 2 or a namespace; and what comes through is a number that a run can begin with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "print_usage", lambda *_: None)  # most of the time
    known, accepted = options(module, monkeypatch), 0

    def parse(line):
        nonlocal accepted
        monkeypatch.setattr(sys, "argv", [module.__name__, *line])
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                args = module.arguments()
            except SystemExit as end:
                assert end.code == 2
                return
        accepted += 1
        assert all(map(math.isfinite, floats(args))), "a number that is not finite"
        for name, least in (("seed", 0), ("workers", 0), ("top_k", 0), ("image_size", 1), ("batch_size", 1)):
            value = getattr(args, name, None)
            assert value is None or least <= value, f"{name} is less than {least}"
        assert getattr(args, "seed", 0) < 2**64, "a seed of more than 64 bits"

    def lines():
        for k in range(1000):
            rng = random.Random(f"{module.__name__} {k}")
            line = ["--model", rng.choice([*sample.MODELS])] if module is not fid else ["a.npz", "b.npz"]
            for action in rng.sample(known, rng.choice([0, 1, 1, 1, 2, 3])):
                count = 0 if action.nargs == 0 else rng.randint(1, 3) if action.nargs == "+" else 1
                values = [*(action.choices or []), *VALUES] if rng.random() < 0.8 else list(action.choices or VALUES)
                line += [*action.option_strings[:1], *(rng.choice(values) for _ in range(count))]
            yield " ".join(line)[:90], line[:rng.choice([1, 2, 99, 99, 99, 99])]
    assert not offences(parse, lines())
    assert accepted > 150 and not os.listdir(tmp_path)


def fields(config):
    """Names of the fields, those of nested ones after a dot."""
    for field in dataclasses.fields(config):
        yield field.name
        if dataclasses.is_dataclass(getattr(config, field.name)):
            yield from (f"{field.name}.{inner}" for inner in fields(getattr(config, field.name)))


@pytest.mark.parametrize("name", SMALL)
def test_fields_are_set_or_refused(name):
    """--set: a field's own check that divides by zero, or overflows, is a mistake like any other."""
    known = [*fields(SMALL[name]), "", ".", "x", "vae", "vae.", ".vae", "vae.x", "vae.vae.width", "dim.x", "__class__"]

    def override(assignments):
        assert isinstance(common.override(SMALL[name], assignments), type(SMALL[name]))

    def cases():
        for k in range(2000):
            rng = random.Random(f"{name} {k}")
            yield k, [rng.choice(known) + rng.choice(["=", "=", "=", "=", "", "=="]) + rng.choice(VALUES)
                      for _ in range(rng.choice([1, 1, 1, 2]))]
    assert not offences(override, cases())


def test_class_names_are_known_or_refused():
    """--classes and --fuse: ids that Python takes for digits but not for numbers."""
    def ids(text):
        assert all(0 <= k < 3 for k in sample.class_ids(text, rng.choice([None, ["star", "heart", "²²"]]), 3))
    rng = random.Random(0)
    assert not offences(ids, ((k, ",".join(rng.choices(VALUES, k=rng.randint(1, 3)))) for k in range(500)))


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: ascii(device)[:20])
def test_devices_are_there_or_refused(device):
    """A device that torch has a name for, but no memory."""
    def ask():
        assert common.distributed(device)[2].type != "meta"
    assert not offence(ask)
    torch.set_flush_denormal(False)  # as it was
