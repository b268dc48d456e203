"""Evaluation beyond parity: closed forms, streaming, collapsed and too wide sets, inputs of every kind, mistakes."""
import importlib
import json
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, run, torchrun
from PIL import Image

import common
import fid
from common import UserError


def gaussian(rng, d, rank=None):
    """A mean and a covariance of this rank."""
    a = rng.standard_normal((d, d if rank is None else rank))
    return rng.standard_normal(d), a @ a.T / d


# --- Distances --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [6, 3, 1, 0])
def test_a_known_distance_of_any_rank(rank):
    """Commuting covariances, turned by a random rotation: sum of (sqrt a - sqrt b)^2, also where both are singular."""
    rng = np.random.default_rng(rank)
    Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b, m = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.standard_normal(6)
    a[rank:], b[rank:] = 0, 0
    exact = (m**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = fid.frechet((m, Q * a @ Q.T), (0 * m, Q * b @ Q.T))
    assert isinstance(got, float) and got == pytest.approx(exact, abs=1e-6)


def test_the_distance_is_symmetric_and_zero_for_equal_sets():
    rng = np.random.default_rng(0)
    for rank in (None, 5):
        a, b = gaussian(rng, 20, rank), gaussian(rng, 20, rank)
        assert fid.frechet(a, b) == pytest.approx(fid.frechet(b, a), rel=1e-9)
        assert abs(fid.frechet(a, a)) < 1e-9
    for broken, words in ((gaussian(rng, 19), "different features"), ((a[0] * np.nan, a[1]), "not finite")):
        with pytest.raises(UserError, match=words):
            fid.frechet(a, broken)


def test_streamed_merged_and_whole_moments_agree():
    """One at a time, in shards, all at once; with an offset that would ruin raw moments."""
    x = np.random.default_rng(0).standard_normal((1301, 7)).astype(np.float32) + 1000
    exact = x.astype(np.float64)
    for sizes in ([1301], [1] * 1301, [100, 1, 1200]):
        whole, streamed, at = fid.Moments(), fid.Moments(), 0
        for n in sizes:
            shard = fid.Moments()
            shard.add(x[at:at + n])
            whole.merge(shard)
            streamed.add(x[at:at + n])
            at += n
        for moments in (whole, streamed):
            mean, covariance = moments.gaussian()
            np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
            np.testing.assert_allclose(covariance, np.cov(exact.T), atol=1e-9)


def test_precision_and_recall_know_collapse_from_spread():
    """Collapsed: precise, nothing recalled. Too wide: the reverse. Blocks of any size give the same."""
    rng = np.random.default_rng(0)
    reference, narrow, wide = (scale * rng.standard_normal((700, 4)) for scale in (1, 0.05, 6))
    precision, recall = fid.precision_recall(narrow, reference)
    assert precision > 0.95 and recall < 0.05
    precision, recall = fid.precision_recall(wide, reference)
    assert precision < 0.2 and recall > 0.9
    x = torch.from_numpy(reference)
    torch.testing.assert_close(fid.radii(x, block=3), fid.radii(x))
    assert torch.equal(fid.inside(x, x[:9], fid.radii(x[:9]), block=1), fid.inside(x, x[:9], fid.radii(x[:9])))
    with pytest.raises(UserError, match="more than 3 images, not 3"):
        fid.precision_recall(reference[:3], reference)


def test_the_score_of_certain_and_uniform_predictions():
    """Each of ten classes equally often and for certain: 10. Always the same: 1. In the order of the classes: only a
    shuffle saves it."""
    certain = 50 * np.eye(10)[np.arange(1000) % 10]
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(10, rel=1e-6)
    assert fid.inception_score(np.ones((100, 10))) == pytest.approx((1, 0), abs=1e-9)
    in_order = 50 * np.eye(10)[np.arange(1000) // 100]
    assert fid.inception_score(in_order, shuffle=False)[0] == pytest.approx(1)
    assert fid.inception_score(in_order)[0] > 8


# --- Sets of images ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def images():
    """Sixteen drawn shapes, 24 px, of ten classes, and their labels."""
    return np.stack([np.asarray(common.draw_shape(i, 24)) for i in range(16)]), np.arange(16) % 10


@pytest.fixture
def evaluate(in_process, inception_file, tmp_path, monkeypatch, capsys):
    """fid.main with these arguments and the fixture's weights, in a temporary folder: (numbers, what was said)."""
    monkeypatch.setenv("FID_WEIGHTS", str(inception_file))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def call(samples, *arguments):
        capsys.readouterr()
        in_process(fid, samples, *arguments, "--device", "cpu")
        said = capsys.readouterr().out
        written = [line.split(" ", 1)[1] for line in said.splitlines() if line.startswith("wrote") and "json" in line]
        return json.loads(open(written[0]).read()) if written else None, said
    return call


def save_folder(folder, images, name="{}.png"):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / name.format(f"{i:03d}")).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / name.format(f"{i:03d}"))


def test_every_kind_of_input_gives_the_same_numbers(images, evaluate, tmp_path):
    """Folders, flat and of classes, .npz stored and compressed; and the statistics of ADM, pytorch-fid, torch-fidelity
    and --save-stats."""
    x, y = images
    a, b = x[:8], x[8:]
    np.savez(tmp_path / "b.npz", arr_0=b, arr_1=y[8:])
    np.savez(tmp_path / "a.npz", arr_0=a)
    exact, said = evaluate("a.npz", "b.npz", "--is-rule", "adm")
    assert {"fid", "sfid", "is", "precision", "recall", "floor"} <= exact.keys()
    assert ": few samples, published FID is of 50,000" in said and "inception-" in said and "tf1" in said
    np.savez_compressed(tmp_path / "small.npz", arr_0=a, arr_1=y[:8])
    save_folder(tmp_path / "flat", a)
    save_folder(tmp_path / "classes", a, "class/{}.png")
    for samples in ("small.npz", "flat", "classes"):
        found, _ = evaluate(samples, "b.npz", "--is-rule", "adm", "--metrics", "is,pr")
        for name in ("is", "precision", "recall"):
            assert found[name] == pytest.approx(exact[name], rel=1e-9), (samples, name)
    _, said = evaluate("b.npz", "--save-stats", "own.npz")
    assert "statistics of 8 images" in said
    own = dict(np.load(tmp_path / "own.npz"))
    assert own["mu"].dtype == own["sigma"].dtype == np.float64 and own["sigma_s"].shape == (2023, 2023)
    np.savez(tmp_path / "adm.npz", arr_0=b, **{k: own[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}, extra=[1])
    np.savez_compressed(tmp_path / "pytorch_fid.npz", mu=own["mu"], sigma=own["sigma"])
    torch.save({"mu": own["mu"].astype(np.float32), "sigma": own["sigma"]}, tmp_path / "torch-fidelity.pt")
    there = fid.Source(tmp_path / "torch-fidelity.pt").statistics
    assert np.array_equal(there["sigma"], own["sigma"]) and np.array_equal(there["mu"], own["mu"].astype(np.float32))
    for reference, metrics, known in (("pytorch_fid.npz", [], {"fid", "is"}),
                                      ("own.npz", ["--metrics", "sfid"], {"sfid"}),
                                      ("adm.npz", ["--metrics", "pr,sfid"], {"sfid", "precision", "recall"})):
        found, said = evaluate("a.npz", reference, "--is-rule", "adm", *metrics)
        assert {"fid", "sfid", "is", "precision", "recall"} & found.keys() == known, reference
        for name in known:
            assert found[name] == pytest.approx(exact[name], rel=1e-6), (reference, name)
        assert ("reference statistics)" in said) == (reference != "own.npz")
    pytorch, _ = evaluate("b.npz", "b.npz", "--resize", "pytorch", "--metrics", "is", "--is-rule", "adm")
    tf1, _ = evaluate("b.npz", "b.npz", "--metrics", "is", "--is-rule", "adm")
    assert abs(pytorch["is"] / tf1["is"] - 1) > 1e-3 and tf1["is_std"] == 0 and "fid" not in tf1


def test_batches_of_any_size_give_the_same_features(images, inception_file, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=images[0])
    sides = [fid.Judge(None, weights=inception_file, cache="off", batch=batch).features(fid.Source(tmp_path / "x.npz"))
             for batch in (1, 64)]
    largest = np.abs(sides[0]["rows"]).max()
    assert np.abs(sides[0]["rows"] - sides[1]["rows"]).max() < 1e-4 * largest
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(sides[0][name] - sides[1][name]).max() < 1e-4 * np.abs(sides[0][name]).max()


def test_pictures_of_all_sorts_are_read_and_broken_ones_named(images, evaluate, tmp_path, inception_file):
    """Sizes and modes are mixed; a truncated file is left out, and is as if it had never been there."""
    x, _ = images
    save_folder(tmp_path / "b", x[8:12])
    judge = fid.Judge(None, weights=inception_file, cache="off")
    folder = tmp_path / "a"
    save_folder(folder, x[:3])
    Image.fromarray(x[3]).convert("L").save(folder / "grey.png")
    Image.fromarray(x[4]).convert("P").save(folder / "palette.gif")
    Image.fromarray(x[5]).resize((50, 31)).convert("RGBA").save(folder / "wide.webp", lossless=True)
    Image.fromarray((np.asarray(x[6][..., 0], np.uint16) * 257)).save(folder / "sixteen.png")
    whole = judge.features(fid.Source(folder))
    assert whole["n"] == 7 and whole["broken"] == 0
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:200])
    (folder / "empty.webp").write_bytes(b"")
    found = judge.features(fid.Source(folder))
    assert found["n"] == 7 and found["broken"] == 2
    np.testing.assert_allclose(found["sigma"], whole["sigma"], atol=1e-4 * whole["sigma"].max())
    Image.fromarray(x[0]).save(folder / "lossy.jpg")
    found, said = evaluate("a", "b", "--metrics", "pr")
    assert found["n"] == 8 and "1 of the samples are JPEG" in said and "2 samples are broken and left out" in said
    cropped = judge.features(fid.Source(folder, 24))
    crop = common.centre_crop(Image.open(folder / "wide.webp").convert("RGB"), 24)
    save_folder(tmp_path / "c", [np.asarray(crop)] * 2)
    row = judge.features(fid.Source(tmp_path / "c"))["rows"][0]
    assert np.abs(cropped["rows"][-1] - row).max() < 1e-4 * row.max() < 1e-2 * np.abs(whole["rows"][-1] - row).max()


def test_results_are_found_again_by_content(images, evaluate, tmp_path, monkeypatch):
    """The same bytes under another name: nothing is computed. One changed picture: the numbers change."""
    x, _ = images
    save_folder(tmp_path / "a", x[:8])
    save_folder(tmp_path / "b", x[8:])
    how = ("b", "--metrics", "is,pr", "--is-rule", "adm")
    first, _ = evaluate("a", *how)
    extract = fid.Judge.extract
    monkeypatch.setattr(fid.Judge, "extract", lambda *args: pytest.fail("computed again"))
    precision_recall = fid.precision_recall
    monkeypatch.setattr(fid, "precision_recall", lambda *args, **how: pytest.fail("computed again"))
    shutil.copytree(tmp_path / "a", tmp_path / "c", ignore=lambda *args: ["fid.json"])
    second, _ = evaluate("c", *how)
    assert {k: v for k, v in first.items() if k != "samples"} == {k: v for k, v in second.items() if k != "samples"}
    for file in (tmp_path / "home" / "hub" / "fid").glob("*.json"):
        file.write_text('{"n": 8, ')  # damaged: computed again, from the features
    monkeypatch.setattr(fid, "precision_recall", precision_recall)
    assert evaluate("c", *how)[0]["precision"] == first["precision"]
    looked = []
    monkeypatch.setattr(fid.Judge, "extract", lambda self, s: looked.append(str(s.path)) or extract(self, s))
    Image.fromarray(x[9]).save(tmp_path / "c" / "000.png")
    third, _ = evaluate("c", *how)
    assert third["is"] != pytest.approx(first["is"], rel=1e-6) and looked == ["c"]  # the reference's are kept


def test_the_line_says_how_the_samples_were_made(images, evaluate, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images[0][:8])
    np.savez(tmp_path / "b.npz", arr_0=images[0][8:])
    (tmp_path / "a.meta.json").write_text(json.dumps({"weights": "EMA", "cfg": 1.5, "steps": 25, "x": 1, "step": 900}))
    found, said = evaluate("a.npz", "b.npz", "--metrics", "pr")
    line = next(line for line in said.splitlines() if line.startswith("precision "))
    for part in ("N 8, reference 8", "weights EMA", "cfg 1.5", "steps 25", "step 900", found["features"], "b.npz"):
        assert part in line
    assert found["cfg"] == 1.5 and found["weights"] == "EMA" and found["torch"] == str(torch.__version__)
    assert len(found["features"].split("-")[1]) == 8 and found["features"].endswith("tf1")


def test_two_processes_are_one(images, evaluate, tmp_path, inception_file):
    """Also where one of two ranks has only a broken picture."""
    save_folder(tmp_path / "a", images[0][:9])
    (tmp_path / "a" / "008.png").write_bytes(b"no picture")
    np.savez(tmp_path / "b.npz", arr_0=images[0][8:])
    one, _ = evaluate("a", "b.npz", "--cache", "one", "--metrics", "is,pr")
    torchrun(2, ROOT / "fid.py", "a", "b.npz", "--cache", "two", "--metrics", "is,pr", "--device", "cpu", "--weights",
             inception_file, cwd=tmp_path)
    two = json.loads((tmp_path / "a" / "fid.json").read_text())
    assert one.pop("broken") == two.pop("broken") == 1 and one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    kept = sorted(path.name for path in (tmp_path / "one").glob("*.npz"))
    assert len(kept) == 2
    for name in kept:
        a, b = (np.load(tmp_path / cache / name) for cache in ("one", "two"))
        for key in a.files:
            np.testing.assert_allclose(a[key], b[key], atol=1e-5 * max(np.abs(a[key]).max(), 1), err_msg=key)


# --- The classifier ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four hundred shapes of four classes in class folders, and as many others as .npz."""
    root = tmp_path_factory.mktemp("labelled")
    names = ("circle", "star", "cross", "ring")
    kinds = [common.SHAPES.index(name) for name in names]
    for k, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        (root / "real" / f"{k}_{name}").mkdir(parents=True)
        for i in range(100):
            common.draw_shape(10 * i + kind, 16).save(root / "real" / f"{k}_{name}" / f"{i:03d}.png")
    others = np.stack([np.asarray(common.draw_shape(10 * i + kind, 16)) for kind in kinds for i in range(100, 150)])
    np.savez(root / "good.npz", arr_0=others, arr_1=np.arange(200) // 50)
    np.savez(root / "swapped.npz", arr_0=others, arr_1=(np.arange(200) // 50 + 1) % 4)
    np.savez(root / "collapsed.npz", arr_0=others[np.arange(200) // 50 * 50], arr_1=np.arange(200) // 50)
    noise = np.random.default_rng(0).integers(0, 256, others.shape, np.uint8)
    np.savez(root / "noise.npz", arr_0=noise, arr_1=np.arange(200) // 50)
    return root


def test_the_classifier_tells_good_from_bad(labelled, evaluate, monkeypatch):
    """By its own name; trained once, kept beside the reference; labels of class folders, of arr_1 and of file names."""
    monkeypatch.chdir(labelled)
    reference = ("real", "--features", "classifier")
    good, said = evaluate("good.npz", *reference)
    assert not {"fid", "sfid", "is"} & good.keys() and "FID" not in said and "FD-classifier" in said
    assert good["accuracy"] > 0.85 and good["recall"] > 0.5 and (labelled / "real-classifier-16.pt").exists()
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: pytest.fail("trained again"))
    swapped, _ = evaluate("swapped.npz", *reference)
    assert swapped["accuracy"] < 0.1 and swapped["fd_classifier"] == pytest.approx(good["fd_classifier"])
    collapsed, _ = evaluate("collapsed.npz", *reference)
    assert collapsed["recall"] < 0.2 < collapsed["precision"] and collapsed["fd_classifier"] > 2 * good["fd_classifier"]
    noise, _ = evaluate("noise.npz", *reference)
    assert noise["precision"] < 0.1 and noise["fd_classifier"] > 5 * good["fd_classifier"]
    same, _ = evaluate("real", *reference)
    assert same["fd_classifier"] == pytest.approx(0, abs=1e-6) and same["accuracy"] > 0.95
    assert good["floor"] / 4 < good["fd_classifier"] < 4 * good["floor"]
    with np.load("good.npz") as content:
        save_folder(labelled / "named", content["arr_0"][::50])
    for k, file in enumerate(sorted((labelled / "named").glob("*.png"))):
        file.rename(file.with_name(f"{k:06d}_class{k}.png"))
    assert evaluate("named", *reference)[0]["accuracy"] >= 0.75
    shutil.copytree("real/3_ring", "some/3_ring")  # some of the classes: known by their names
    shutil.copytree("real/1_star", "some/1_star")
    assert evaluate("some", *reference)[0]["accuracy"] > 0.9
    (labelled / "named" / "meta.json").write_text('{"prompt": ["a", "b"]}')  # these labels count prompts
    assert "accuracy" not in evaluate("named", *reference)[0]


def test_the_classifier_is_the_same_every_time(labelled, tmp_path):
    """Also where it cannot be kept beside the reference and goes to the cache. No other random number changes."""
    source, file = fid.Source(labelled / "real"), labelled / "real-classifier-16.pt"
    file.unlink(missing_ok=True)
    state = torch.random.get_rng_state()
    made = common.fingerprint(fid.load_classifier(source, "data", tmp_path, "cpu"))
    assert torch.equal(state, torch.random.get_rng_state())
    file.write_bytes(file.read_bytes()[:1000])  # damaged: another is trained
    fid.load_classifier(source, "data", None, "cpu")
    assert common.read(file)["digest"] == source.digest
    file.unlink()
    file.mkdir()  # now it cannot be written, not even by root
    try:
        assert common.fingerprint(fid.load_classifier(source, "data", tmp_path, "cpu")) == made
        assert len(list(tmp_path.glob("*-classifier-16.pt"))) == 1
    finally:
        file.rmdir()


# --- Mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments,words", [
    (["nowhere", "b.npz"], "nowhere: no such folder or file"), (["b.npz", "nowhere"], "nowhere: no such folder"),
    (["b.npz"], "give a REFERENCE"), (["b.npz", "b.npz", "--save-stats", "x.npz"], "give a REFERENCE, or --save-stats"),
    (["b.npz", "b.npz", "--metrics", "kid"], "there are fid, sfid, is, pr"), (["empty", "b.npz"], "no file that"),
    (["float.npz", "b.npz"], "float64 (4, 8, 8, 3), not uint8"), (["grey.npz", "b.npz"], "uint8 (4, 8, 8), not uint8"),
    (["other.npz", "b.npz"], "it has weights, neither arr_0 nor mu"), (["text.npz", "b.npz"], "neither images"),
    (["cut.npz", "b.npz"], "cut.npz: neither images nor statistics"), (["short.npz", "b.npz"], "neither images nor"),
    (["half.npz", "b.npz"], "neither images nor statistics: 'sigma'"), (["tall.npz", "b.npz"], "mu is float64 (9, 1)"),
    (["void.npz", "b.npz"], "uint8 (4, 0, 0, 3), not uint8"), (["stats64.npz", "b.npz"], "64 features, not of Incep"),
    (["stats.npz", "--save-stats", "x.npz"], "has statistics already"), (["b.npz", "--save-stats", "b.npz"], "a new"),
    (["b.npz", "--save-stats", "x.pt"], "writes a new .npz"), (["bare.npz", "b.npz"], "neither images nor statistics"),
    (["one.npz", "b.npz"], "a covariance needs two images at least, there is one"),
    (["rotten", "b.npz"], "a covariance needs two images at least, there are none"),
    (["b.npz", "stats.npz", "--metrics", "pr"], "--metrics pr: needs images on both sides"),
    (["b.npz", "stats.npz", "--metrics", "sfid"], "--metrics sfid: mu_s and sigma_s"),
    (["b.npz", "nan.npz"], "not finite"), (["b.npz", "wrong.pt"], "neither arr_0 nor mu"),
    (["b.npz", "b.npz", "--features", "classifier"], "b.npz has no labels"),
    (["b.npz", "b.npz", "--features", "classifier", "--metrics", "is"], "has no labels"),
    (["b.npz", "--save-stats", "x.npz", "--features", "classifier"], "Inception's features"),
    (["b.npz", "b.npz", "--weights", "nowhere.pth"], "nowhere.pth: no such file"),
    (["b.npz", "b.npz", "--weights", "wrong.pt"], "wrong.pt does not fit: missing"),
    (["b.npz", "b.npz", "--weights", "text.npz"], "text.npz is damaged"),
    (["b.npz", "pytorch.npz"], "statistics of inception-x-pytorch, not of inception-"),
    (["b.npz", "b.npz", "--batch-size", "0"], "--batch-size is 1 or more"), (["b.npz", "cifar10"], "cannot download"),
    (["b.npz", "b.npz", "--device", "tpu"], "--device tpu")])
def test_mistakes_are_one_line(in_process, inception_file, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FID_WEIGHTS", str(inception_file))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    for name, content in (("b", {"arr_0": x}), ("float", {"arr_0": x / 255}), ("grey", {"arr_0": x[..., 0]}),
                          ("one", {"arr_0": x[:1]}), ("other", {"weights": x}), ("cut", {"arr_0": x}),
                          ("short", {"arr_0": x}), ("stats64", {"mu": np.zeros(64), "sigma": np.eye(64)}),
                          ("half", {"arr_0": x, "mu": np.zeros(9)}), ("void", {"arr_0": x[:, :0, :0]}),
                          ("tall", {"mu": np.zeros((9, 1)), "sigma": np.eye(9)}),
                          ("stats", {"mu": np.zeros(2048), "sigma": np.eye(2048), "further": np.array([{}])}),
                          ("nan", {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}),
                          ("pytorch", {"mu": np.zeros(9), "sigma": np.eye(9), "features": "inception-x-pytorch"})):
        np.savez(f"{name}.npz", **content)
    for name, length in (("cut", 500), ("short", -30)):
        (tmp_path / f"{name}.npz").write_bytes((tmp_path / f"{name}.npz").read_bytes()[:length])
    (tmp_path / "text.npz").write_text("hello")
    with open("bare.npz", "wb") as f:
        np.save(f, x)
    torch.save({"x": torch.zeros(3)}, "wrong.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rotten").mkdir()
    (tmp_path / "rotten" / "a.png").write_text("no picture")
    said = refusal(in_process, capsys, fid, *arguments, "--cache", "kept", *([] if "--device" in arguments else [
        "--device", "cpu"]))
    assert words in said and "\n" not in said.strip().split("error: ")[-1]
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "x.npz").exists()


def test_without_network_one_message_says_what_to_fetch(images, tmp_path, monkeypatch):
    """By the real command, exit code 2; and a damaged file in the cache is not believed."""
    np.savez(tmp_path / "a.npz", arr_0=images[0])
    monkeypatch.setitem(os.environ, "TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("conftest.ENV", {**os.environ, "https_proxy": "http://127.0.0.1:9", "FID_WEIGHTS": ""})
    said = run(ROOT / "fid.py", "a.npz", "a.npz", cwd=tmp_path, code=2).splitlines()[-1]
    file = tmp_path / "hub" / "checkpoints" / fid.WEIGHTS[0]
    assert said.startswith("error: cannot download")
    assert str(file) in said and fid.DIGEST in said and "--weights" in said
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"half of it")
    said = run(ROOT / "fid.py", "a.npz", "a.npz", cwd=tmp_path, code=2).splitlines()[-1]
    assert f"{file} is damaged" in said


def test_statistics_that_cannot_be_written_leave_what_was_there(images, evaluate, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=images[0][:4])
    evaluate("a.npz", "--save-stats", "own.npz")
    before = (tmp_path / "own.npz").read_bytes()
    monkeypatch.setattr(np, "savez", Mock(side_effect=OSError(28, "full")))
    with pytest.raises(UserError, match="cannot write own.npz: full; what was there is untouched"):
        evaluate("a.npz", "--save-stats", "own.npz", "--cache", "off")
    assert (tmp_path / "own.npz").read_bytes() == before and not list(tmp_path.glob(".own*"))


# --- Other people's tools, where they are installed -------------------------------------------------------------------

def importable(*names):
    """Are these packages installed, and do they work?"""
    try:
        return all(importlib.import_module(name) for name in names)
    except Exception:  # whatever is the matter with them
        return False


if importable("torch_fidelity"):
    def test_torch_fidelity_says_the_same(images, inception_file, tmp_path):
        import torch_fidelity
        save_folder(tmp_path / "a", images[0][:8])
        save_folder(tmp_path / "b", images[0][8:])
        theirs = torch_fidelity.calculate_metrics(
            input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True,
            isc_splits=2, cuda=False, cache=False, verbose=False, feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(inception_file))
        judge = fid.Judge(tmp_path / "b", weights=inception_file, cache="off", metrics=["fid"])
        side = judge.features(fid.Source(tmp_path / "a"))
        assert judge.measure(side)["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
        score, _ = fid.inception_score(side["logits"], splits=2)
        assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


if importable("pytorch_fid.fid_score"):
    def test_pytorch_fid_says_the_same(images, inception_file, tmp_path, monkeypatch):
        import pytorch_fid.fid_score
        import pytorch_fid.inception
        state = torch.load(inception_file, weights_only=True)
        monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: state)
        save_folder(tmp_path / "a", images[0][:8])
        save_folder(tmp_path / "b", images[0][8:])
        theirs = pytorch_fid.fid_score.calculate_fid_given_paths([str(tmp_path / "a"), str(tmp_path / "b")], 4, "cpu",
                                                                 2048, 0)
        judge = fid.Judge(tmp_path / "b", resize="pytorch", weights=inception_file, cache="off", metrics=["fid"])
        assert judge.results(fid.Source(tmp_path / "a"))["fid"] == pytest.approx(theirs, rel=1e-4)
