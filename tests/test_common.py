"""The shared ground: VAE files, data sets and their damage, order, cache, noise, checkpoints."""
import argparse
import gzip
import hashlib
import io
import json
import math
import struct
import tarfile

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import common
from common import Noise, UserError, VAEConfig

# --- KL-VAE -----------------------------------------------------------------------------------------------------------

def small_vae(**changes):
    torch.manual_seed(0)
    vae = common.KLVAE(VAEConfig(**{**dict(channels=4, width=32, mult=(1, 2, 2), blocks=1, attention=(2,), scale=0.5),
                                    **changes}))
    for p in vae.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return vae.eval()


def test_published_vae_sizes():
    for config, count in ((VAEConfig(), 66_456_019), (common.SD_VAE, 83_653_863)):
        with torch.device("meta"):
            assert sum(p.numel() for p in common.KLVAE(config).parameters()) == count


@pytest.mark.parametrize("key,ending", [("model", "ckpt"), ("state_dict", "pth"), (None, "bin")])
def test_load_vae_reads_every_wrapping(tmp_path, key, ending):
    """Published files have no scale: 16 and 4 channels take the published one. Losses and EMA copies are ignored."""
    vae = small_vae()
    state = {k: v for k, v in vae.state_dict().items() if k != "scale"}
    state |= {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    torch.save({key: state, "args": argparse.Namespace()} if key else state, tmp_path / f"vae.{ending}")
    loaded = common.load_vae(tmp_path / f"vae.{ending}")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert loaded.scale == torch.tensor(0.18215) and loaded.config.attention == (2,)
    torch.testing.assert_close(loaded.encode(images), vae.encode(images))


def test_load_vae_is_strict(tmp_path):
    state = small_vae().state_dict()
    for change, words in ((lambda s: s.pop("encoder.mid.attn_1.q.bias"), "missing encoder.mid.attn_1.q.bias"),
                          (lambda s: s.update(more=torch.zeros(1)), "unknown more"),
                          (lambda s: s.update({"quant_conv.bias": torch.zeros(3)}), r"quant_conv.bias is \(3,\), not"),
                          (lambda s: s.pop("post_quant_conv.weight"), "not a KL-VAE")):
        broken = dict(state)
        change(broken)
        torch.save(broken, tmp_path / "vae.pt")
        with pytest.raises(UserError, match=words):
            common.load_vae(tmp_path / "vae.pt")


def test_calibration_gives_unit_latents():
    vae = small_vae(scale=0)
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    vae.calibrate(images)
    torch.manual_seed(1)
    assert abs(vae.sample(vae.encode(images)).std() - 1) < 0.02
    fixed = small_vae(scale=0.5)
    fixed.calibrate(images)
    assert fixed.scale == 0.5


def test_kl_is_the_kl_divergence():
    vae, moments = small_vae(), torch.randn(3, 8, 2, 2)
    mean, std = vae.posterior(moments)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(vae.kl(moments), expected)


# --- Data -------------------------------------------------------------------------------------------------------------

def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_mnist(folder, images, labels, pack=gzip.compress, ending=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"train-images-idx3-ubyte{ending}").write_bytes(pack(idx(images)))
    (folder / f"train-labels-idx1-ubyte{ending}").write_bytes(pack(idx(labels)))


def test_shapes_are_deterministic_balanced_and_distinct():
    a, b = (common.load_data("shapes", size=32) for _ in range(2))
    test = common.load_data("shapes", size=32, split="test")
    assert np.bincount(a.labels).tolist() == [2000] * 10
    for i in (0, 7, 123):
        assert np.array_equal(a.read(i), b.read(i))
        assert not np.array_equal(a.read(i), a.read(i + 10)) and not np.array_equal(a.read(i), test.read(i))
    large = common.load_data("shapes", size=128).read(5).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, float) - np.asarray(a.read(5), float)).mean() < 12  # the same picture, finer


def test_signed_distances():
    """Negative inside, zero on the outline, and no steeper than a distance."""
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    for kind in common.SHAPES:
        d = common.signed_distance(kind, u, v)
        assert 0.05 < (d < 0).mean() < 0.5 and d[0, 0] > 0.3
        steep = np.hypot(*np.gradient(d, axis[1] - axis[0]))
        assert steep.max() < 1.3
    assert common.signed_distance("ring", *np.zeros((2, 1))) > 0 > common.signed_distance("star", *np.zeros((2, 1)))


@pytest.mark.parametrize("pack,ending", [(gzip.compress, ".gz"), (bytes, "")])
def test_idx_files(tmp_path, pack, ending):
    images, labels = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8), np.array([7, 0, 9], np.uint8)
    write_mnist(tmp_path / "mnist", images, labels, pack, ending)
    data = common.load_data("mnist", tmp_path)
    assert data.labels.tolist() == [7, 0, 9] and data.classes[7] == "7"
    assert np.array_equal(np.asarray(data.read(1))[..., 0], images[1])


@pytest.mark.parametrize("damage,words", [
    (lambda raw: b"", "not an IDX file"), (lambda raw: b"\0\0\x09\x03" + raw[4:], "not an IDX file"),
    (lambda raw: raw[:-5], "damaged"), (lambda raw: raw + b"x", "damaged"),
    (lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "damaged"), (lambda raw: raw[:6], "not an IDX file")])
def test_damaged_idx_files(tmp_path, damage, words):
    write_mnist(tmp_path / "mnist", np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8),
                lambda raw: gzip.compress(damage(raw)))
    with pytest.raises(UserError, match=words):
        common.load_data("mnist", tmp_path)


def test_truncated_and_mismatched_downloads(tmp_path):
    write_mnist(tmp_path / "mnist", np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8),
                lambda raw: gzip.compress(raw)[:-9])
    with pytest.raises(UserError, match="delete it"):
        common.load_data("mnist", tmp_path)
    write_mnist(tmp_path / "mnist", np.zeros((3, 28, 28), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(UserError, match="do not match"):
        common.load_data("mnist", tmp_path)


def test_download_checks_the_sum_and_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file.gz").write_bytes(b"content")
    target, url = tmp_path / "root" / "file.gz", source.as_uri() + "/"
    with pytest.raises(UserError, match="cannot download.*SHA-256 0000"):
        common.download(url, target, "0000")
    assert not [f for f in target.parent.iterdir() if f.suffix != ".lock"]
    assert common.download(url, target, hashlib.sha256(b"content").hexdigest()).read_bytes() == b"content"
    with pytest.raises(UserError, match="cannot download"):
        common.download(url, target.with_name("absent.gz"), "0000")


def cifar_archive(path, records=2, size=3073):
    with tarfile.open(path, "w:gz") as archive:
        for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
            raw = bytes([3]) + bytes([200] * 1024 + [100] * 1024 + [50] * 1024)
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = records * len(raw[:size])
            archive.addfile(info, io.BytesIO(raw[:size] * records))


def test_cifar10(tmp_path):
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    cifar_archive(path)
    data = common.load_data("cifar10", tmp_path)
    assert len(data.labels) == 10 and data.classes[data.labels[0]] == "cat"
    assert np.asarray(data.read(0))[5, 5].tolist() == [200, 100, 50]
    assert len(common.load_data("cifar10", tmp_path, split="test").labels) == 2
    for damage in (lambda: cifar_archive(path, size=3000), lambda: path.write_bytes(path.read_bytes()[:99]),
                   lambda: path.write_bytes(b"nothing")):
        damage()
        with pytest.raises(UserError, match="cifar-10-binary"):
            common.load_data("cifar10", tmp_path)


def picture(mode, colour, size=(40, 30)):
    return Image.new(mode, size, colour)


def write_folder(root):
    """Three classes whose names sort as numbers, in many modes."""
    for name in ("2", "10", "1"):
        (root / name).mkdir(parents=True)
    picture("RGB", (255, 0, 0)).save(root / "1" / "a.png")
    picture("L", 100).save(root / "1" / "b.jpg", quality=100)
    picture("RGBA", (0, 255, 0, 0)).save(root / "2" / "clear.png")
    palette = picture("P", 0)
    palette.putpalette([0, 0, 255] + [0] * 765)
    palette.save(root / "2" / "palette.gif")
    Image.fromarray(np.full((30, 40), 65535 // 2, np.uint16)).save(root / "10" / "deep.png")
    picture("CMYK", (0, 0, 0, 255)).save(root / "10" / "print.tif")
    picture("LA", (7, 255)).save(root / "10" / "UPPER.PNG")
    (root / "10" / "notes.txt").write_text("not a picture")


def test_folders_of_every_mode(tmp_path):
    write_folder(tmp_path / "set")
    data = common.load_data(str(tmp_path / "set"), size=16)
    assert data.classes == ["1", "2", "10"] and data.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    centre = [common.centre_crop(data.read(i), 16).getpixel((8, 8)) for i in range(7)]
    assert centre == [(255, 0, 0), (100,) * 3, (255,) * 3, (0, 0, 255), (7,) * 3, (127,) * 3, (0,) * 3]


def test_broken_pictures_are_named_and_replaced(tmp_path, capsys):
    write_folder(tmp_path)
    whole = (tmp_path / "1" / "a.png").read_bytes()
    (tmp_path / "1" / "a.png").write_bytes(whole[:60])
    data = common.load_data(str(tmp_path), size=16)
    assert data.read(0).getpixel((0, 0)) == (100,) * 3  # b.jpg takes its place
    assert "skipped broken file" in (said := capsys.readouterr().out) and "a.png" in said
    (tmp_path / "1" / "b.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(UserError, match="no readable picture"):
        common.load_data(str(tmp_path), size=16).read(0)


def test_flat_and_empty_folders(tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        common.load_data(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no file that Pillow reads"):
        common.load_data(str(tmp_path))
    picture("RGB", 0).save(tmp_path / "x.png")
    assert common.load_data(str(tmp_path)).classes == [tmp_path.name]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    picture("RGB", 0).save(tmp_path / "b" / "x.png")
    assert common.load_data(str(tmp_path)).classes == ["b"]
    assert "left out" in capsys.readouterr().out


def test_crops():
    """Sizes and places: a picture whose red is its column and green its row."""
    ramp = np.zeros((64, 96, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(96)[None], np.arange(64)[:, None]
    image = Image.fromarray(ramp)
    centre = np.asarray(common.centre_crop(image, 16), float)
    assert centre.shape == (16, 16, 3)
    assert abs(centre[..., 0].mean() - 47.5) < 0.6 and abs(centre[..., 1].mean() - 31.5) < 0.6
    random = [np.asarray(common.random_crop(image, 16, np.random.default_rng(i)), float) for i in range(40)]
    offsets = {round(crop[..., 0].mean()) for crop in random}
    assert min(offsets) < 40 and max(offsets) > 56 and len(offsets) > 15
    ten = [np.asarray(crop, float) for crop in common.ten_crops(image, 20)]
    assert all(crop.shape == (20, 20, 3) for crop in ten)
    for crop, twin in zip(ten[:5], ten[5:]):
        assert np.array_equal(crop[:, ::-1], twin)
    x, y = ([crop[..., axis].mean() for crop in ten] for axis in (0, 1))
    assert x[0] < x[4] < x[1] and y[0] < y[4] < y[2]


def test_order_is_epochs_without_loss_or_repetition():
    """Every image once an epoch; the same order however the run is cut into batches and ranks."""
    labels = np.arange(10) % 3
    fours, ones = common.Order(labels, 4, seed=1), common.Order(labels, 1, seed=1)
    row = [int(i[0]) for k in range(5) for _, i in fours(k)]
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10)) and row[:10] != row[10:]
    assert row == [int(ones(k)[0][1][0]) for k in range(20)]
    assert row != [int(i[0]) for k in range(5) for _, i in common.Order(labels, 4, seed=2)(k)]


def test_groups_are_of_one_class():
    """MRAR's samples: four images of one class; no image is left out, few are repeated."""
    labels = np.array([0] * 9 + [1] * 4 + [2] * 2)
    order = common.Order(labels, 3, group=4)
    groups = [group for k in range(2) for _, group in order(k)][:order.length]
    assert order.length == 3 + 1 + 1
    assert all(len(set(labels[group])) == 1 for group in groups)
    assert set(np.concatenate(groups)) == set(range(15))
    assert sum(len(set(group)) < 4 for group in groups) == 1  # the class of two


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("cat", 50), ("dog", 200)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(3):
            array = np.full((20, 20, 3), colour, np.uint8)
            array[:, :10] = 10 * k
            Image.fromarray(array).save(tmp_path / "set" / name / f"{k}.png")
    return str(tmp_path / "set")


def test_cached_latents_are_uncached_latents(tmp_path, folder):
    data, vae = common.load_data(folder, size=16), small_vae()
    rows = common.cached(tmp_path / "cache", data, 16, vae, common.centre_and_mirror)
    assert rows.shape == (6, 2, 8, 4, 4)
    for i in range(6):
        views = torch.stack([common.from_pil(v) for v in common.centre_and_mirror(data.read(i), 16)])
        torch.testing.assert_close(torch.from_numpy(rows[i]), vae.encode(common.to_float(views)), rtol=1e-5, atol=1e-5)
    stored = common.Stored(rows, data.labels, seed=3)
    picks = {tuple(stored[epoch, np.array([4])][0].flatten().tolist()) for epoch in range(20)}
    assert picks == {tuple(rows[4, v].flatten().tolist()) for v in (0, 1)}
    latents, label = stored[0, np.array([3, 5, 4, 3])]
    assert latents.shape == (4, 8, 4, 4) and label == 1


def test_an_interrupted_cache_goes_on_and_another_key_does_not_use_it(tmp_path, folder, monkeypatch):
    data, vae = common.load_data(folder, size=16), small_vae()
    encode, calls = vae.encode, []
    monkeypatch.setattr(vae, "encode", lambda x: calls.append(len(x)) or encode(x))

    write = common.Rows.write
    monkeypatch.setattr(common.Rows, "write", lambda self, i, v: write(self, i[:2], v[:2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.cached(tmp_path, data, 16, vae, common.centre_only)
    monkeypatch.setattr(common.Rows, "write", write)
    calls.clear()
    rows = common.cached(tmp_path, data, 16, vae, common.centre_only)
    assert calls == [1, 4]  # one to learn the shape, then the four that were missing
    calls.clear()
    assert np.array_equal(common.cached(tmp_path, data, 16, vae, common.centre_only), rows) and calls == [1]
    with torch.no_grad():
        vae.quant_conv.bias += 1
    common.cached(tmp_path, data, 16, vae, common.centre_only)
    assert len(list(tmp_path.glob("set-16-*"))) == 2


def test_rows_of_other_settings_are_refused(tmp_path):
    common.Rows(tmp_path / "t", (4, 2), np.uint8, {"seed": 1})
    with pytest.raises(UserError, match="other settings .seed"):
        common.Rows(tmp_path / "t", (4, 2), np.uint8, {"seed": 2})
    shares = [common.Rows(tmp_path / "t", (4, 2), np.uint8, {"seed": 1}).todo(r, 3) for r in range(3)]
    assert sorted(sum(shares, [])) == [0, 1, 2, 3]


# --- Randomness -------------------------------------------------------------------------------------------------------

PHILOX = [  # counter, key, and four words: the known answers that the authors publish with their code (Random123)
    ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, answer", PHILOX)
def test_philox_known_answers(counter, key, answer):
    words = common.philox([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert " ".join(f"{word:08x}" for word in words) == answer


def test_noise_is_philox_of_image_and_place():
    """Word n of image k of seed s is Philox of counter (n, k) and key s, however the stream is cut into draws."""
    s, k = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    counters = [torch.arange(3), torch.zeros(3, dtype=torch.long), torch.tensor(k & 0xFFFFFFFF), torch.tensor(k >> 32)]
    expected = torch.stack(common.philox(counters, [torch.tensor(s & 0xFFFFFFFF), torch.tensor(s >> 32)]), -1).flatten()
    assert torch.equal(Noise.of(s, [k]).words(12)[0], expected)
    noise = Noise.of(s, [k])
    assert torch.equal(torch.cat([noise.words(n)[0] for n in (1, 6, 5)]), expected)
    far = Noise.of(s, [k] * 5000)                                   # many images: made in many small pieces
    assert torch.equal(far.words(12)[4999], expected)


def test_noise_belongs_to_the_image():
    """The stream of an image does not know its neighbours."""
    together, alone = Noise.of(7, range(5)), Noise.of(7, [3])
    for _ in range(3):
        assert torch.equal(together.normal((4, 2))[3], alone.normal((4, 2))[0])
        assert torch.equal(together.uniform((5,))[3], alone.uniform((5,))[0])
        assert torch.equal(together.normal((3, 40, 41))[3], alone.normal((3, 40, 41))[0])   # an odd number, in pieces


def test_noise_is_normal_and_uniform():
    """Moments, tails and a Kolmogorov-Smirnov test of 2 million values; bounds of five standard errors."""
    x = Noise.of(0, range(200)).normal((10000,)).double().flatten()
    n = len(x)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 5 * (variance / n)**0.5, power
    for tail in (1, 2, 3, 4, 4.5):
        p = math.erfc(tail / 2**0.5) / 2
        for side in (x > tail, x < -tail):
            assert abs(side.double().mean() - p) < 5 * (p / n)**0.5, tail
    assert scipy.stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    u = Noise.of(0, range(200)).uniform((10000,)).double().flatten()
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3 and 0 <= u.min() and u.max() < 1


def test_noise_of_neighbours_is_unrelated():
    """Correlations between neighbouring images, seeds and places, against their standard error of 1 / sqrt(n)."""
    n = 20000
    x = torch.cat([Noise.of(seed, range(40)).normal((n,)) for seed in (0, 1, 2**32)])
    for values in (x, x.abs(), torch.cat([x, x.roll(1, 1)])):       # the last: a value and the one after it
        off = torch.corrcoef(values.double()) - torch.eye(len(values))
        assert off.abs().max() < 5.5 / n**0.5


def test_guidance_schedules():
    assert common.guidance_scales(3, 2) == [3.0, 3.0]
    assert common.guidance_scales((1.0, 2.0), 3) == [1.0, 1.5, 2.0]


# --- Training state ---------------------------------------------------------------------------------------------------

def test_recipe_rates():
    """Warm-up from zero, constant, linear to the final share."""
    recipe = common.Recipe(lr=2.0, batch=1, epochs=1, warmup=0.1, decay=0.5, final=0.1)
    rates = [recipe.rate(step, 100) for step in range(101)]
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10:51] == [2.0] * 41
    assert rates[75] == pytest.approx(1.1) and rates[100] == pytest.approx(0.2)


def test_ema_in_closed_form():
    model, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    expected, value = torch.ones(2), torch.ones(2)
    for step in range(5):
        model.weight.data = value = value + step
        model.running_mean += 1
        common.update_ema(ema, model, 0.9)
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(ema.weight.data, expected)
    assert ema.running_mean.tolist() == [5, 5]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    common.save(path, {"step": 1}, keep=True)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        common.save(path, {"step": 2}, keep=True)
    monkeypatch.undo()
    assert common.read(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    common.save(path, {"step": 2}, keep=True)
    assert common.read(path) == {"step": 2} and common.read(tmp_path / "state.previous.pt") == {"step": 1}


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoints_run_nothing(tmp_path):
    torch.save({"model": Evil(tmp_path / "created")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="holds code"):
        common.read(tmp_path / "evil.pt")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_damaged_checkpoints_are_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        common.read(tmp_path / "x.pt")
    assert "x.pt" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        common.read(tmp_path / "absent.pt")


def test_safetensors_without_the_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(common.sys.modules, "safetensors", None)
    monkeypatch.setitem(common.sys.modules, "safetensors.torch", None)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="pip install safetensors"):
        common.read(tmp_path / "x.safetensors")


def test_set_overrides_are_typed():
    config = common.override(VAEConfig(), ["width=8", "mult=1,2", "scale=0.5", "attention="])
    assert config == VAEConfig(width=8, mult=(1, 2), scale=0.5, attention=())
    for bad, words in (("nothing=1", "no such field; the fields are channels"), ("width=wide", "width is a int"),
                       ("width", "no such field")):
        with pytest.raises(UserError, match=words):
            common.override(VAEConfig(), [bad])


# --- Pictures ---------------------------------------------------------------------------------------------------------

def test_bytes_go_round():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(every)), every)
    assert common.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_grids_and_animations(tmp_path):
    images = torch.stack([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (0, 50, 100, 150, 200)])
    sheet = common.grid(images, 3, gap=1, zoom=1)
    assert sheet.size == (1 + 3 * 9, 1 + 2 * 9)
    assert [sheet.getpixel((5 + 9 * (k % 3), 5 + 9 * (k // 3)))[0] for k in range(6)] == [0, 50, 100, 150, 200, 255]
    assert common.grid(images, 3, ["a long name", "b"], 1, 1).width > sheet.width
    assert common.grid(images, 3, gap=1).size == (1 + 3 * 65, 1 + 2 * 65)
    common.save_gif(tmp_path / "x.gif", [common.grid(images[k:k + 1], 1) for k in range(5)], seconds=1)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
