"""Files are data: whatever they contain, they are read or refused with one line.

Small valid files with random damage (of fixed seeds), and files made with malice.
"""
import argparse
import dataclasses
import gzip
import io
import os
import pickle
import random
import signal
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin

import common
import fid
import sample
from common import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


class Late(BaseException):
    """Something hangs. It is no Exception, so that it is not taken for a broken file."""


@pytest.fixture(autouse=True)
def alarm(monkeypatch, tmp_path):
    """Let what takes ten seconds end, and what writes to the working directory write here."""
    def late(*_):
        raise Late
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.signal(signal.SIGALRM, before)


def attempt(load, path):
    """Fail if a file is neither read nor refused with words."""
    signal.alarm(10)
    try:
        load(path)
    except UserError:
        pass
    finally:
        signal.alarm(0)


# --- Damaged files --------------------------------------------------------------------------------

EXTREMES = [0, 1, 127, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**64 - 1]


def damaged(raw, rng):
    """Return the bytes after two accidents, half of them near an end, where headers are."""
    raw = bytearray(raw)
    for _ in range(2):
        at = rng.randrange(len(raw) + 1)
        at = rng.choice([at, at, at % 150, max(len(raw) - at % 150, 0)])
        size = rng.choice([1, 2, 4, 8])
        number = (rng.choice(EXTREMES) % 256**size).to_bytes(size, rng.choice(["little", "big"]))
        end = rng.choice([at, at + size, at + size, len(raw)])  # inserted, replaced, truncated
        raw[at:end] = rng.choice([b"", rng.randbytes(size), number, number])
    return bytes(raw)


def written(store, *args, **options):
    """Return the bytes that store(file, ...) writes."""
    store(file := io.BytesIO(), *args, **options)
    return file.getvalue()


def saved(content, zipped=True):
    return written(lambda f: torch.save(content, f, _use_new_zipfile_serialization=zipped))


def archive(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, content in entries.items():
            z.writestr(name, content)
    return file.getvalue()


def below(whole, entry):
    """Return an entry of a zip file, and a function that packs another in its place."""
    with zipfile.ZipFile(io.BytesIO(whole)) as z:
        entries = {name: z.read(name) for name in z.namelist()}
    return entries[entry], lambda raw: archive({**entries, entry: raw})


def tarred(*members):
    """Return a tar file of (name, content, fields of TarInfo)."""
    raw = b""
    for name, content, fields in members:
        info = tarfile.TarInfo(name)
        for field, value in {"size": len(content), **fields}.items():
            setattr(info, field, value)
        raw += info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)
    return raw + bytes(1024)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def picture(size=(9, 9), kind="PNG", **options):
    return written(Image.new("RGB", size, "red").save, kind, **options)


def look(path):
    """Read a picture as in training, in evaluation and alone."""
    data = common.load_folder(path.parent, 16)
    for i in range(len(data.labels)):
        common.Samples(data, 16, common.centre)[0, [i]]
        fid.Source(path.parent, 16).read(i)
    common.load_picture(path, 16)


def measure(path):
    """Read images or statistics as fid.py does."""
    source = fid.Source(path)
    for i in range(2 if source.data else 0):
        source.read(i % len(source.data.labels))


def read_batch(path):
    return common.read_cifar10(path, "test")


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
STATISTICS = {"mu": np.arange(3.0), "sigma": np.eye(3), "n": np.array(9)}
CHECKPOINT = {"step": 3, "names": ["a", None], "args": argparse.Namespace(a=(1, 2)),
              "array": np.arange(3.0), "best": np.float64(1), "model": {"w": torch.ones(3, 2)}}
BATCH = ("cifar-10-batches-bin/test_batch.bin", bytes([3]) + bytes(3072), {})
IDX = b"\0\0\x08\x03" + struct.pack(">3i", 3, 5, 5) + bytes(75)
SETS = written(np.savez, arr_0=IMAGES, arr_1=np.arange(4), **STATISTICS)


def kinds():
    """Yield name, (file, bytes to damage, what packs them afterwards, loader)."""
    yield "checkpoint", ("x.pt", saved(CHECKPOINT), bytes, common.read_checkpoint)
    pickled = below(saved(CHECKPOINT), "archive/data.pkl")
    yield "checkpoint, below", ("x.pt", *pickled, common.read_checkpoint)
    yield "checkpoint, legacy", ("x.pth", saved(CHECKPOINT, False), bytes, common.read_checkpoint)
    header = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    tensors = struct.pack("<Q", len(header)) + header + bytes(4)
    yield "safetensors", ("x.safetensors", tensors, bytes, common.read_checkpoint)
    yield "IDX", ("x-idx3-ubyte.gz", IDX, gzip.compress, common.read_idx)
    yield "tar", ("c.tar.gz", tarred(BATCH), gzip.compress, read_batch)
    yield "tar, packed", ("c.tar.gz", gzip.compress(tarred(BATCH)), bytes, read_batch)
    yield "images", ("x.npz", SETS, bytes, measure)
    for name in ("arr_0", "arr_1", "sigma"):
        yield f"{name}, below", ("x.npz", *below(SETS, f"{name}.npy"), measure)
    yield "cache", ("00000000.npy", written(np.save, IMAGES), bytes,
                    lambda path: common.Cache(path.parent, 4, 4)[3])
    base = Image.fromarray(IMAGES[0]).resize((24, 18))
    deep = Image.fromarray(np.arange(432, dtype=np.uint16).reshape(18, 24) * 150)
    film = {"save_all": True, "append_images": [base.rotate(90)]}
    cases = [("PNG", deep, {}), ("TIFF", deep, {}), ("PNG", base.convert("P"), {"transparency": 3}),
             ("JPEG", base.convert("CMYK"), {}), ("TIFF", base, {"compression": "tiff_lzw"})]
    cases += [(kind, base, film) for kind in ("PNG", "GIF", "WEBP", "TIFF")]
    cases += [(kind, base, {}) for kind in common.FORMATS]
    for k, (kind, image, options) in enumerate(cases):
        yield f"{kind} {k}", ("a.png", written(image.save, kind, **options), bytes, look)


KINDS = dict(kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind, tmp_path, monkeypatch):
    """A loader lets another exception out, hangs, or writes a file somewhere. Checksums of PNGs are
    ignored: behind a wrong one, nothing is read."""
    monkeypatch.setattr(PngImagePlugin.ChunkStream, "crc", PngImagePlugin.ChunkStream.crc_skip)
    name, raw, pack, load = KINDS[kind]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ok.png").write_bytes(picture())  # takes the place of a broken one
    file = tmp_path / "set" / name
    contents = [pack(raw), b"", raw[:1], b"PK\5\6" + bytes(18)]
    contents += [pack(damaged(raw, random.Random(f"{kind} {k}"))) for k in range(40)]
    for content in contents:
        file.write_bytes(content)
        attempt(load, file)
    assert {p.name for p in tmp_path.rglob("*")} == {"set", "ok.png", name}


# --- Checkpoints whose entries are other things ---------------------------------------------------

THINGS = [None, -1, "x", [1], {}, np.zeros(3), torch.zeros(0), torch.eye(2).to_sparse(),
          torch.zeros(()).expand(2**60)]


def changed(content, rng):
    """Return a copy in which one entry, at any depth, is another thing or has another name."""
    content = inner = dict(content)
    key = rng.choice(["config", "model"])
    while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
        inner[key] = inner = dict(inner[key])
        key = rng.choice(list(inner))
    value = inner.pop(key)
    if rng.random() < 0.3:
        inner[rng.choice([None, 0, "", "a\nb", ("a",)])] = value
    else:
        inner[key] = rng.choice(THINGS)
    return content


@pytest.mark.parametrize("file", ["model.pt", "first.pt"])
@pytest.mark.parametrize("name", faults.SMALL)
def test_strange_checkpoints_are_loaded_or_refused(name, file, tmp_path):
    """A loader believes that an entry is there, is a tensor, or has a sensible size."""
    module = common.load_model(name)
    sizes = ["image_size=16", "classes=2", *faults.SMALL[name]]
    config = common.override(module.PRESETS["tiny"], sizes)
    contents = {}
    for path, stage in (("first.pt", module.STAGES[0]), ("model.pt", module.STAGES[1])):
        contents[path] = {
            "model_name": name, "stage": stage.name, "size": "tiny", "step": 2, "data": "x",
            "first_stage": "first.pt", "config": dataclasses.asdict(config),
            "model": stage.build(config).state_dict()}
        torch.save(contents[path], tmp_path / path)

    def load(path):
        args = SimpleNamespace(model=name, run=path, ckpt=None, first_stage=None, raw=False)
        sample.load(args, module, torch.device("cpu"))

    load(tmp_path)
    for k in range(25):
        torch.save(changed(contents[file], random.Random(f"{name} {k}")), tmp_path / file)
        attempt(load, tmp_path)


# --- Malice ---------------------------------------------------------------------------------------

class Evil:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("created", "w")


OBJECTS = np.array([Evil(), None], object)


@pytest.mark.parametrize("name,content,load", [
    ("x.pth", saved({"model": Evil()}, zipped=False), common.read_checkpoint),
    ("x.ckpt", pickle.dumps({"model": Evil()}), common.read_checkpoint),
    ("x.bin", saved({"array": OBJECTS}), common.read_checkpoint),
    ("vae.pt", saved({"stage": "vae", "config": Evil()}), common.load_vae),
    ("x.npz", written(np.savez, arr_0=IMAGES, arr_1=OBJECTS), measure),
    ("x.npz", pickle.dumps(Evil()), measure),
    ("00000000.npy", written(np.save, OBJECTS), lambda path: common.Cache(path.parent, 2, 2)[0]),
    ("c.tar.gz", pickle.dumps(Evil()), read_batch)])
def test_nothing_is_executed(name, content, load, tmp_path):
    """torch.load, np.load and pickle run what a file says, if they are let."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError):
        load(tmp_path / name)
    assert not (tmp_path / "created").exists()


def test_pictures_are_no_programs(tmp_path, monkeypatch):
    """Pillow gives an EPS, whatever its name, to Ghostscript, which runs it."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail())
    (tmp_path / "a.png").write_bytes(picture(kind="EPS"))
    with pytest.raises(UserError, match="a.png is not a readable picture"):
        common.load_picture(tmp_path / "a.png", 16)


@pytest.mark.parametrize("width,height", [
    (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 500_000), (500_000, 1)])
def test_pictures_that_explode_are_broken(width, height, tmp_path):
    """Giants in tiny files, and narrow ones, which are giants once they are as high as asked."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(2_000_000)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="a.png is not a .* pixels"):
        common.load_picture(tmp_path / "a.png", 16)


def array_of(shape, kind="|u1", content=bytes(64)):
    """Return a .npy whose header claims this shape."""
    about = {"descr": kind, "fortran_order": False, "shape": shape}
    return written(np.lib.format.write_array_header_1_0, about) + content


GIANT = (10**5, 10**5, 10**5, 3)  # uint8, 3 petabytes
WIDE = array_of((10**8, 10**8), "<f8")
HEADERS = {
    "giant": ("x.npz", archive({"arr_0.npy": array_of(GIANT)}), measure),
    "sigma": ("x.npz", archive({"mu.npy": array_of((8,)), "sigma.npy": WIDE}), measure),
    "meta": ("meta.json", b"[" * 10**5, lambda path: fid.Source(path.parent)),
    "cache": ("00000000.npy", array_of(GIANT), lambda path: common.Cache(path.parent, 4, 4)[3]),
    "IDX": ("x-idx3-ubyte", b"\0\0\x08\xff" + b"\x7f\xff\xff\xff" * 255, common.read_idx)}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_claim_too_much_are_refused(kind, tmp_path):
    """A file of a hundred bytes is no array of petabytes."""
    name, content, load = HEADERS[kind]
    (tmp_path / "ok.png").write_bytes(picture())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load(tmp_path / name)


def test_bombs_are_not_unpacked(tmp_path):
    """184 MB of zeros in 200 KB stand for as many gigabytes."""
    bomb = tarred((BATCH[0], bytes(60_000 * 3073), {}))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(bomb, 1))
    tracemalloc.start()
    attempt(read_batch, tmp_path / "c.tar.gz")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**27


LINK = {"type": tarfile.SYMTYPE, "size": 0}
SPARSE = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(3073 * 10**12)}
ARCHIVES = {
    "upwards": [("../escaped", b"x", {}), BATCH],
    "link to itself": [(BATCH[0], b"", {**LINK, "linkname": "test_batch.bin"})],
    "link out": [(BATCH[0], b"", {**LINK, "linkname": "/etc/passwd"})],
    "pipe": [(BATCH[0], b"", {"type": tarfile.FIFOTYPE, "size": 0})],
    "giant": [(BATCH[0], b"", {"size": 3073 * 10**12})],
    "sparse": [(BATCH[0], b"", {"pax_headers": SPARSE})]}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_stay_in_their_place(kind, tmp_path):
    """An archive is unpacked, followed along its links for ever, or believed about its sizes."""
    (tmp_path / "c.tar.gz").write_bytes(tarred(*ARCHIVES[kind]))
    attempt(read_batch, tmp_path / "c.tar.gz")
    assert os.listdir(tmp_path) == ["c.tar.gz"] and not os.path.exists("../escaped")


@pytest.mark.parametrize("trap", [
    lambda: os.mkfifo("a.png"), lambda: os.symlink("/dev/zero", "a.png"),
    lambda: os.symlink("a.png", "a.png"), lambda: os.symlink("nowhere", "a.png"),
    lambda: os.symlink("a", "a"), lambda: os.symlink("..", "a"), lambda: os.mkdir("a.png"),
    lambda: os.mkdir("²"), lambda: os.mkdir("9" * 250),
    lambda: os.mkdir(b"\xff"), lambda: os.symlink("/dev/null", b"\xff.png"),
    lambda: Path("0_class99999999999999999.png").write_bytes(picture())])
def test_folders_with_traps(trap, tmp_path):
    """A pipe that nobody writes to, links in circles, names that are no numbers or no text."""
    trap()
    (tmp_path / "ok.png").write_bytes(picture())
    attempt(look, tmp_path / "ok.png")
