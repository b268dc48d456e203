"""What all models share: options, VAE files, data sets, folders, caches, noise, checkpoints."""
import dataclasses
import gzip
import io
import os
import re
import struct
import sys
import tarfile
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run
from PIL import Image

import common
import train
import transdiff
from common import Noise, UserError, VAEConfig

TINY = transdiff.PRESETS["tiny"]

# --- Errors and options ---------------------------------------------------------------------------


def test_set_overrides_are_typed():
    config = common.override(VAEConfig(), ["width=8", "mult=1,2", "scale=0.5", "attention="])
    assert config == VAEConfig(width=8, mult=(1, 2), scale=0.5, attention=())


@pytest.mark.parametrize("assignment", ["nothing=1", "dim=wide", "vae.x=1", "heads=0", "mrar=1"])
def test_bad_overrides_are_refused(assignment):
    with pytest.raises(UserError, match=f"{assignment} is not possible: choose .* image_size"):
        common.override(TINY, [assignment])


def test_options_are_checked_like_fields():
    """None is the config's value."""
    assert common.with_options(TINY, steps=5, cfg=None) == dataclasses.replace(TINY, steps=5)
    with pytest.raises(UserError, match="solver is one of .*, not rk4"):
        common.with_options(TINY, solver="rk4")


CLASSES = SimpleNamespace(classes=6, class_names=("A", "B", "a", "big cat", "0"))


def test_classes_are_ids_or_names():
    """`a` stands beside `A`. A class may have a number as its name, which is not its id."""
    assert common.class_ids(["a", "big cat", "0", "1"], CLASSES) == [2, 3, 4, 1]


@pytest.mark.parametrize("text", ["c", "6", "-1", "²"])
def test_unknown_classes_are_refused(text):
    with pytest.raises(UserError, match="use ids 0 to 5, or names: A, B"):
        common.class_ids([text], CLASSES)


def test_an_ascii_terminal_shows_names_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setitem(conftest.ENV, "PYTHONIOENCODING", "ascii")
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"broken")
    read = "common.run_script(lambda: common.load_data(sys.argv[1]).read(0))"
    said = run("-c", f"import sys, common; {read}", tmp_path, cwd=ROOT, code=2)
    assert re.search(r"skipped broken file .*\\udcff/\\udcfe\.png", said)
    assert r"error: class \udcff has no readable picture" in said


# --- KL-VAE ---------------------------------------------------------------------------------------

def small_vae(**changes):
    """A VAE whose weights all matter: the initialisation has zeros."""
    torch.manual_seed(0)
    config = VAEConfig(channels=4, width=32, mult=(1, 2, 2), blocks=1, attention=(2,), scale=0.5)
    vae = common.KLVAE(dataclasses.replace(config, **changes))
    for p in vae.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return vae.eval()


def test_published_vae_sizes():
    with torch.device("meta"):
        vaes = [common.KLVAE(VAEConfig()), common.KLVAE(common.SD_VAE)]
    assert [sum(p.numel() for p in vae.parameters()) for vae in vaes] == [66_456_019, 83_653_863]


@pytest.mark.parametrize("layout", ["state/", "sd_state/"])
@pytest.mark.parametrize("key,prefix", [
    (None, "vae."), ("model", "module."), ("state_dict", "module.first_stage_model.")])
def test_vae_files_in_every_layout(tmp_path, layout, key, prefix):
    """test_parity has their numbers. A loss is no part of the VAE."""
    f = np.load(ROOT / "tests" / "fixtures" / "vae.npz")
    plain = {k.removeprefix(layout): torch.from_numpy(f[k]) for k in f if k.startswith(layout)}
    state = {prefix + k: value for k, value in plain.items()} | {"loss.logvar": torch.zeros(1)}
    torch.save({key: state} if key else state, tmp_path / "x.CKPT")
    vae = common.load_vae(tmp_path / "x.CKPT")
    assert common.fingerprint(vae) == common.fingerprint(common.vae_from_state(plain))


@pytest.fixture
def vae_file(tmp_path):
    """A file that does not tell its groups and scale."""
    state = small_vae().state_dict()
    del state["scale"]
    torch.save(state, tmp_path / "vae.bin")
    return tmp_path / "vae.bin"


def test_a_config_beside_a_vae_tells_its_groups_and_scale(vae_file, capsys):
    beside = vae_file.with_name("config.json")
    beside.write_text('{"norm_num_groups": 8, "scaling_factor": 0.75}')
    vae = common.load_vae(vae_file)
    assert (vae.config.groups, vae.scale) == (8, 0.75)
    assert not capsys.readouterr().out


def test_what_is_assumed_about_a_vae_is_said(vae_file, capsys):
    """Of 4 channels, that they are Stable Diffusion's."""
    vae = common.load_vae(vae_file)
    assert (vae.config.groups, vae.config.scale) == (32, 0.18215)
    assert "assuming 0.18215 and 32" in capsys.readouterr().out


@pytest.mark.parametrize("name,value,words", [
    ("encoder.mid.1.q.bias", None, "Missing key.*encoder.mid.1.q.bias"),
    ("encoder.more", torch.zeros(1), "Unexpected key.*encoder.more"),
    ("quant_conv.bias", torch.zeros(3), "size mismatch for quant_conv.bias"),
    ("post_quant_conv.weight", None, "not a KL-VAE")])
def test_load_vae_is_strict(tmp_path, name, value, words):
    state = {**small_vae().state_dict(), name: value}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=f"vae.pt.*{words}"):
        common.load_vae(tmp_path / "vae.pt")


def test_the_measured_scale_gives_unit_latents():
    vae, images = small_vae(scale=0), torch.rand(64, 3, 16, 16) * 2 - 1
    vae.finish(images)
    assert abs(vae.codes(vae.encode(images)).std() - 1) < 0.02


# --- Named data sets ------------------------------------------------------------------------------

def test_the_splits_of_shapes_differ():
    data, test = (common.load_data("shapes", split=split) for split in ("train", "test"))
    assert not np.array_equal(data.read(7), test.read(7))


def test_idx_files(tmp_path):
    """Sizes are big-endian, one for each dimension."""
    (tmp_path / "mnist").mkdir()
    for name in common.NAMED["mnist"][2]:
        sizes, values = ((3, 2, 2), range(12)) if "images" in name else ((3,), (7, 0, 9))
        header = bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}i", *sizes)
        (tmp_path / "mnist" / name).write_bytes(gzip.compress(header + bytes(values)))
    data = common.load_data("mnist", tmp_path)
    assert data.labels.tolist() == [7, 0, 9]
    assert np.asarray(data.read(1))[..., 0].tolist() == [[4, 5], [6, 7]]


def test_cifar10(tmp_path):
    """A record is a label, then planes of colour, not pixels."""
    record = bytes([3] + [200] * 1024 + [100] * 1024 + [50] * 1024)
    (tmp_path / "cifar10").mkdir()
    with tarfile.open(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        info.size = 2 * len(record)
        archive.addfile(info, io.BytesIO(record * 2))
    data = common.load_data("cifar10", tmp_path, split="test")
    assert data.labels.tolist() == [3, 3] and data.classes[3] == "cat"
    assert data.read(1).getpixel((5, 5)) == (200, 100, 50)


def test_a_download_with_another_digest_leaves_nothing(tmp_path):
    (tmp_path / "source.gz").write_bytes(b"content")
    url, target = (tmp_path / "source.gz").as_uri(), tmp_path / "root" / "x.gz"
    with pytest.raises(UserError, match="x.gz is missing: cannot .*SHA-256 0000.*, or else"):
        common.download(url, target, "0000", "or else")
    assert not list(target.parent.iterdir())
    assert common.download(url, target).read_bytes() == b"content"


# --- Folders --------------------------------------------------------------------------------------

def picture(path, colour="red", mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), colour).save(path)


def ramp():
    """A picture of 96 x 64 whose red is its column and whose green is its row."""
    values = np.zeros((64, 96, 3), np.uint8)
    values[..., 0] = np.arange(96)
    values[..., 1] = np.arange(64)[:, None]
    return Image.fromarray(values)


def test_class_folders_sort_as_numbers(tmp_path):
    for name in ("2", "10", "1"):
        picture(tmp_path / name / "x.png")
    data = common.load_folder(tmp_path, 16)
    assert data.classes == ["1", "2", "10"] and data.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name,colour,mode,expected", [
    ("a.JPG", 100, "L", 100), ("clear.png", (0, 255, 0, 0), "RGBA", 255),
    ("UPPER.TIF", (0, 0, 0, 255), "CMYK", 0), ("grey.PNG", (7, 255), "LA", 7)])
def test_pictures_of_every_mode(tmp_path, name, colour, mode, expected):
    """Transparency lies over white; endings may be in upper case."""
    picture(tmp_path / name, colour, mode)
    [path] = common.load_folder(tmp_path, 16).paths
    assert common.load_picture(path, 16).unique().tolist() == [expected]


@pytest.mark.parametrize("white,kind", [(1, "f4"), (4095, "u2"), (65535, "u2")])
def test_deep_pictures_are_scaled(tmp_path, white, kind):
    """Floating-point values of 0 to 1 are not black, nor are 12 bits in 16."""
    values = np.linspace(0, white, 256).astype(kind).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    grey = common.load_picture(tmp_path / "x.tif", 16)[0].flatten()
    assert (grey - torch.arange(256.0)).abs().max() <= 1


def test_photographs_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # its left side is the top
    ramp().save(tmp_path / "x.jpg", exif=exif)
    red = common.load_picture(tmp_path / "x.jpg", 16)[0].float()
    assert (red.mean(1).diff() > 2).all()


def test_broken_pictures_are_named_once_and_replaced(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"broken")
    picture(tmp_path / "b.png", "blue")
    data = common.load_folder(tmp_path, 16)
    assert data.read(0).getpixel((0, 0)) == data.read(0).getpixel((0, 0)) == (0, 0, 255)
    assert capsys.readouterr().err.count("skipped broken file") == 1


def test_pictures_at_the_top_and_in_sub_folders_are_refused(tmp_path):
    """Neither half is left out silently."""
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(tmp_path / name)
    with pytest.raises(UserError, match="has 2 pictures at its top, 1 in sub-folders"):
        common.load_folder(tmp_path, 16)


def test_a_sub_folder_without_pictures_is_no_class(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / ".thumbs" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "all.txt").touch()
    assert common.load_folder(tmp_path, 16).classes == [tmp_path.name]


def test_linked_folders_are_followed_once(tmp_path):
    """A loop of links ends."""
    picture(tmp_path / "set" / "cat" / "a.PNG")
    picture(tmp_path / "more" / "b.png")
    (tmp_path / "set" / "cat" / "link").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "loop").symlink_to(tmp_path / "set" / "cat")
    paths = common.load_folder(tmp_path / "set", 16).paths
    assert [path.name for path in paths] == ["a.PNG", "b.png"]


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="no picture .*.png"):
        common.load_folder(tmp_path, 16)


def test_the_key_changes_with_the_target_of_a_link(tmp_path):
    """Of the same size: a cache must not outlive its pictures. The link itself does not change."""
    picture(tmp_path / "x.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "x.png")
    keys = []
    for time in (0, 0, 1):
        os.utime(tmp_path / "x.png", ns=(0, time))
        keys.append(common.load_folder(tmp_path / "set", 16).key)
    assert keys[0] == keys[1] != keys[2]


# --- Views, order, cache --------------------------------------------------------------------------

def test_the_centre_crop_is_the_centre():
    crop = np.asarray(common.centre_crop(ramp(), 16))
    assert crop.mean((0, 1)) == pytest.approx([47.5, 31.5, 0], abs=0.6)


def test_order_is_epochs_without_loss_or_repetition():
    """And indexed by place, so that a run may resume in the middle."""
    order, again = common.Order(np.zeros(10), seed=1), common.Order(np.zeros(10), seed=1)
    row = [order[place][1].item() for place in range(20)]
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10)) and row[:10] != row[10:]
    assert again[17] == (1, row[17])


def test_groups_are_of_one_class():
    """No image is left out; a class of less than four alone repeats within a group."""
    labels = np.array([0] * 9 + [1] * 4 + [2] * 2)
    order = common.Order(labels, 4)
    groups = [order[place][1].tolist() for place in range(order.length)]
    assert set(sum(groups, [])) == set(range(15))
    assert [len(set(labels[group])) for group in groups] == [1] * 5
    assert sorted(len(set(group)) for group in groups) == [2, 4, 4, 4, 4]


@pytest.fixture
def data(tmp_path):
    """Six pictures of one class, whose mirror images differ."""
    (tmp_path / "set").mkdir()
    for k in range(6):
        common.cut(ramp(), 40, 8 * k, 0).save(tmp_path / "set" / f"{k}.png")
    return common.load_folder(tmp_path / "set", 16)


def test_a_view_is_drawn_in_each_epoch(tmp_path, data):
    """Of the image's own row of the cache."""
    cache = common.Cache(tmp_path, 6, 4)
    for indices in cache.missing():
        cache.write(indices, np.array([[10 * i, 10 * i + 1] for i in indices]))
    samples = common.Samples(data, 16, common.centre_and_mirror, cache=cache)
    assert {samples[epoch, [4]][0].item() for epoch in range(20)} == {40, 41}


def test_an_interrupted_cache_keeps_what_it_has(tmp_path, data, monkeypatch):
    vae, whole, encoded = small_vae(), common.Cache, []
    monkeypatch.setattr(common, "Cache", lambda folder, n, chunk: whole(folder, n, 4))
    common.cached(tmp_path, data, 16, vae, common.centre).file([4]).unlink()
    encode = vae.encode
    vae.encode = lambda x: encoded.append(len(x)) or encode(x)
    for _ in range(2):
        common.cached(tmp_path, data, 16, vae, common.centre)
    assert encoded == [2]


# --- Randomness -----------------------------------------------------------------------------------

def test_noise_belongs_to_the_image():
    """Its generator does not know the batch, in the second draw either."""
    together, alone = Noise(7, range(5)), Noise(7, [3])
    assert torch.equal(together.normal((4, 2))[3], alone.normal((4, 2))[0])
    assert torch.equal(together.uniform((5,))[3], alone.uniform((5,))[0])


def test_only_keys_and_values_stay_for_a_recorded_step():
    """All other tensors are copied at each launch."""
    [(keys, values)] = common.key_value_pairs(1, (3, 4), torch.float32, torch.device("cpu"))
    assert [common.moves(x) for x in (keys, values, keys.clone(), 1)] == [False, False, True, False]


# --- Training state -------------------------------------------------------------------------------

def test_recipe_rates():
    """Warm-up from zero, constant, linear to the final share."""
    recipe = common.Recipe(lr=2.0, batch=1, epochs=1, warmup=0.1, decay=0.5, final=0.1)
    rates = [recipe.rate(step, 100) for step in (0, 5, 10, 50, 75, 100)]
    assert rates == pytest.approx([0, 1, 2, 2, 1.1, 0.2])


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1, 1)])
def test_muon_evens_out_singular_values(shape):
    """A step turns matrix or kernel as the gradient does, by nearly the same in all directions."""
    grad = torch.randn(3, 5)
    matrix = torch.nn.Parameter(torch.zeros(shape))
    matrix.grad = grad.view(shape).clone()
    common.Muon([{"params": [matrix], "muon": True, "weight_decay": 0}], lr=1.0).step()
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    turned = u.mT @ matrix.view(3, 5) @ v.mT / (-0.2 * 5**0.5)
    values = turned.diag()
    assert 0.6 < values.min() and values.max() < 1.3
    torch.testing.assert_close(turned, values.diag(), rtol=0, atol=1e-4)


def test_ema_in_closed_form():
    """Parameters are averaged, buffers copied."""
    model, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    for value in (2.0, 4.0):
        model.weight.data.fill_(value)
        model.running_mean.fill_(value)
        common.update_ema(ema, model, 0.9)
    assert ema.weight.tolist() == pytest.approx([0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4] * 2)
    assert ema.running_mean.tolist() == [4, 4]


@pytest.mark.parametrize("step,decay", [(6254, 0.99856), (10**6, 0.9999)])
def test_the_average_ramps(step, decay, pictures, tmp_path, in_process, monkeypatch):
    """In the 6,255 steps of MRAR (40 epochs of groups of four) it never reaches 0.9999."""
    decays = []
    recipe = common.Recipe(lr=1e-3, batch=8, epochs=1)
    monkeypatch.setitem(transdiff.STAGES[0].recipes, "tiny", recipe)
    monkeypatch.setattr(train, "load_initial_weights", lambda run: setattr(run, "step", step))
    monkeypatch.setattr(common, "update_ema", lambda ema, model, decay: decays.append(decay))
    in_process(train, *SMALL["transdiff"], "--stage", "vae", "--data", pictures, "--out", tmp_path,
               "--steps", step + 1)
    assert decays == [pytest.approx(decay, abs=1e-5)]


def test_numpy_scalars_are_data(tmp_path):
    """Scores that training loops keep beside the weights."""
    scalars = {"a": np.float64(0.5), "b": np.float32(2), "c": np.int64(3), "d": np.bool_(True)}
    torch.save(scalars, tmp_path / "x.ckpt")
    assert common.read_checkpoint(tmp_path / "x.ckpt") == scalars


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_callbacks_are_data(tmp_path, monkeypatch, package):
    """Its checkpoints have the class of each callback as a key."""
    name = f"{package}.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in (name, name.split(".")[0]):
            patch.setitem(sys.modules, part, SimpleNamespace(ModelCheckpoint=callback))
        torch.save({callback: 1.0}, tmp_path / "x.ckpt")
    assert list(common.read_checkpoint(tmp_path / "x.ckpt").values()) == [1.0]


def test_safetensors_without_the_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "x.SAFETENSORS").touch()
    with pytest.raises(UserError, match="x.SAFETENSORS is not readable .*safetensors.torch"):
        common.read_checkpoint(tmp_path / "x.SAFETENSORS")


# --- Pictures -------------------------------------------------------------------------------------

def test_bytes_become_floats_and_return():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(every)), every)


def test_a_grid_goes_row_by_row():
    images = torch.arange(0, 250, 50, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 64, 64)
    sheet = common.grid(images, 3)
    assert sheet.size == (200, 134)
    assert [sheet.getpixel((9 + 66 * k, 75))[0] for k in range(3)] == [150, 200, 255]


def test_a_grid_has_room_for_its_names():
    """Even for one that is no text."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert common.grid(images, 1, ["a name", os.fsdecode(b"\xff")]).width > 80
