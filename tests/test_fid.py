"""Evaluation beyond parity: closed forms, sets of every kind, the classifier, mistakes.

Most tests use a stand-in for Inception that runs in a moment.
"""
import importlib.util
import json
import os
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, refusal, run, torchrun
from PIL import Image

import common
import fid
from common import UserError

# --- Distances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [6, 3, 1, 0])
def test_a_known_distance_of_any_rank(rank):
    """Commuting covariances, rotated: sum of (sqrt a - sqrt b)^2, also where both are singular."""
    rng = np.random.default_rng(rank)
    Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b, m = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.standard_normal(6)
    a[rank:], b[rank:] = 0, 0
    exact = (m**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet(m, Q * a @ Q.T, 0 * m, Q * b @ Q.T) == pytest.approx(exact, abs=1e-6)


def test_the_distance_is_symmetric_and_zero_for_equal_sets():
    """A root of the product in the wrong order, or one that is complex, breaks this."""
    rng = np.random.default_rng(0)
    for n in (40, 5):
        a, b = [fid.gaussian(fid.moments(rows)) for rows in rng.standard_normal((2, n, 20))]
        assert fid.frechet(*a, *b) == pytest.approx(fid.frechet(*b, *a), rel=1e-9)
        assert abs(fid.frechet(*a, *a)) < 1e-9


def test_the_floor_is_that_of_as_many_real_images():
    """Rows of one Gaussian: about C / m for m drawn rows, and half of the rows at most."""
    rows = np.random.default_rng(0).standard_normal((2000, 8))
    few, spread, m = fid.floor(rows, 50)
    assert m == 50 and 0 < spread < few
    assert 5 < few / fid.floor(rows, 500)[0] < 20
    assert fid.floor(rows, 5000) == fid.floor(rows, 1000)


def test_precision_and_recall_know_collapse_from_spread():
    """Collapsed samples are precise and recall nothing, too wide ones the reverse."""
    rng = np.random.default_rng(0)
    reference, narrow, wide = [scale * rng.standard_normal((700, 4)) for scale in (1, 0.05, 6)]
    precision, recall = fid.precision_recall(narrow, reference)
    assert precision > 0.95 and recall < 0.05
    precision, recall = fid.precision_recall(wide, reference)
    assert precision < 0.2 and recall > 0.9


def test_the_score_of_certain_and_uniform_predictions():
    """Ten classes, equally often and for certain: 10. In class order only a shuffle saves it."""
    certain = 50 * np.eye(10)[np.arange(1000) % 10]
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(10, rel=1e-6)
    assert fid.inception_score(np.ones((100, 10))) == pytest.approx((1, 0), abs=1e-9)
    in_order = 50 * np.eye(10)[np.arange(1000) // 100]
    assert fid.inception_score(in_order, shuffle=False)[0] == pytest.approx(1)
    assert fid.inception_score(in_order)[0] > 8


# --- Sets of images -------------------------------------------------------------------------------

class Small(nn.Module):
    """Six features, four logits and two spatial features, in the place of Inception."""
    widths = {"": 6, "_s": 2}

    def forward(self, x):
        means = F.adaptive_avg_pool2d(x, 4).flatten(1)               # (B, 48)
        return means[:, :6], 9 * means[:, 10:14], means[:, [20, 40]]


@pytest.fixture
def evaluate(in_process, tmp_path, monkeypatch, capsys):
    """Run fid.main in a temporary folder, with the stand-in: (numbers, what was said)."""
    monkeypatch.setattr(fid, "load_inception", lambda weights: (Small(), "01234567"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        in_process(fid, *arguments, "--device", "cpu")
        said = "".join(capsys.readouterr())
        files = re.findall(r"wrote (.*\.json)", said)
        return json.loads(open(files[0]).read()) if files else None, said

    return call


@pytest.fixture(scope="module")
def images():
    """Sixteen drawn shapes of 24 pixels."""
    return np.stack([np.asarray(common.draw_shape(i, 24)) for i in range(16)])


def save_folder(folder, images, name="{:03d}.png"):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / name.format(i))


def same(found, exact, names):
    """Are these numbers of two results equal?"""
    return all(found[name] == pytest.approx(exact[name], rel=1e-6) for name in names)


ALL = ("fid", "floor", "sfid", "is", "precision", "recall")


@pytest.mark.parametrize("kind", ["compressed.NPZ", "flat", "classes"])
def test_images_of_every_kind_give_the_same_numbers(images, evaluate, tmp_path, kind):
    """An uncompressed .npz is memory-mapped; it must start at the right byte."""
    np.savez("b.npz", arr_0=images[8:])
    np.savez("a.npz", arr_0=images[:8], arr_1=np.arange(8))
    with np.load("a.npz") as archive:
        assert isinstance(fid.stored_images(archive), np.memmap)
    exact, _ = evaluate("a.npz", "b.npz")
    with open("compressed.NPZ", "wb") as f:
        np.savez_compressed(f, arr_0=images[:8])
    save_folder(tmp_path / "flat", images[:8])
    save_folder(tmp_path / "classes" / "one", images[:8])
    assert same(evaluate(kind, "b.npz")[0], exact, ALL)


def test_statistics_of_every_tool_give_the_same_numbers(images, evaluate):
    """Those of the ADM suite (with images), pytorch-fid and torch-fidelity (mu in float32)."""
    np.savez("a.npz", arr_0=images[:8])
    np.savez("b.npz", arr_0=images[8:])
    exact, _ = evaluate("a.npz", "b.npz")
    evaluate("b.npz", "--save-stats", "own.npz")
    own = dict(np.load("own.npz"))
    np.savez("adm.npz", arr_0=images[8:], extra=[1], **{k: own[k] for k in fid.STORED[:4]})
    np.savez_compressed("pytorch_fid.npz", mu=own["mu"], sigma=own["sigma"])
    torch.save({"mu": own["mu"].astype(np.float32), "sigma": own["sigma"]}, "torch-fidelity.PT")
    for file, names in (("adm.npz", {"fid", "sfid", "is", "precision", "recall"}),
                        ("pytorch_fid.npz", {"fid", "is"}), ("torch-fidelity.PT", {"fid", "is"})):
        found, said = evaluate("a.npz", file)
        assert found.keys() & {*ALL} == names and same(found, exact, names), file
        assert "reference_n 0" in said


def test_saved_statistics_need_no_second_pass(images, evaluate, monkeypatch):
    """Features are stored, too: all numbers, on either side, without a look at an image."""
    np.savez("a.npz", arr_0=images[:8])
    np.savez("b.npz", arr_0=images[8:])
    exact, _ = evaluate("a.npz", "b.npz", "--save-stats", "own_a.npz")
    evaluate("b.npz", "--save-stats", "own_b.npz")
    monkeypatch.setattr(fid.Evaluator, "extract", lambda *args: pytest.fail("extracted again"))
    found, _ = evaluate("own_a.npz", "own_b.npz")
    assert same(found, exact, ALL) and found["n"] == found["reference_n"] == 8


def test_broken_files_are_named_counted_and_left_out(images, evaluate, tmp_path):
    """They are as if they had never been there; sizes and modes may differ."""
    np.savez("b.npz", arr_0=images[8:])
    save_folder(tmp_path / "a", images[:3])
    Image.fromarray(images[3]).convert("L").save("a/grey.png")
    Image.fromarray(images[5]).resize((50, 31)).convert("RGBA").save("a/wide.webp", lossless=True)
    whole, _ = evaluate("a", "b.npz")
    (tmp_path / "a" / "002a.png").write_bytes((tmp_path / "a" / "000.png").read_bytes()[:200])
    (tmp_path / "a" / "empty.webp").write_bytes(b"")
    found, said = evaluate("a", "b.npz")
    assert (found["n"], found["broken"]) == (5, 2) and same(found, whole, ALL)
    assert "002a.png" in said and "empty.webp" in said and "broken 2" in said


def test_the_reference_takes_the_size_of_the_samples(images, evaluate, tmp_path):
    """By the centre crop of training, not by a stretch to the network's input."""
    large = [np.asarray(Image.fromarray(image).resize((96, 48))) for image in images]
    np.savez("a.npz", arr_0=images[:8])
    save_folder(tmp_path / "b", large)
    save_folder(tmp_path / "c", [np.asarray(common.centre_crop(Image.fromarray(image), 24))
                                 for image in large])
    assert same(evaluate("a.npz", "b")[0], evaluate("a.npz", "c")[0], ALL)


def test_the_result_says_what_was_compared(images, evaluate, tmp_path):
    """Numbers of images, network and reference; in the file also the settings of sample.py."""
    np.savez("a.npz", arr_0=images[:8])
    np.savez("b.npz", arr_0=images[8:])
    (tmp_path / "a.meta.json").write_text('{"weights": "EMA", "n": 5}')
    found, said = evaluate("a.npz", "b.npz", "--resize", "pytorch")
    assert (found["weights"], found["n"]) == ("EMA", 8)
    for part in ("floor_n 4", " n 8, reference_n 8", "features inception-01234567-pytorch",
                 "samples a.npz, reference b.npz"):
        assert part in said.partition("wrote")[0], part


# --- The classifier -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four hundred shapes of four classes in class folders, and other sets as .npz."""
    root = tmp_path_factory.mktemp("labelled")
    kinds = [0, 5, 7, 1]
    for k, kind in enumerate(kinds):
        shapes = [np.asarray(common.draw_shape(10 * i + kind, 16)) for i in range(100)]
        save_folder(root / "real" / f"{k}_class", shapes)
    others = [[np.asarray(common.draw_shape(10 * i + kind, 16)) for i in range(100, 150)]
              for kind in kinds]
    others = np.concatenate(others)
    labels = np.arange(200) // 50
    noise = np.random.default_rng(0).integers(0, 256, others.shape, np.uint8)
    np.savez(root / "good.npz", arr_0=others, arr_1=labels)
    np.savez(root / "swapped.npz", arr_0=others, arr_1=(labels + 1) % 4)
    np.savez(root / "collapsed.npz", arr_0=others[labels * 50], arr_1=labels)
    np.savez(root / "noise.npz", arr_0=noise, arr_1=labels)
    save_folder(root / "named", others[::50], "{0:06d}_class{0}.png")
    return root


@pytest.fixture
def classify(evaluate, labelled, monkeypatch):
    monkeypatch.chdir(labelled)
    return lambda *arguments: evaluate(*arguments, "real", "--features", "classifier")


def test_the_classifier_tells_good_from_bad(classify):
    """By its own name, fd_classifier, and beside its floor."""
    good, said = classify("good.npz")
    assert not {"fid", "sfid", "is"} & good.keys() and said.startswith("fd_classifier ")
    assert good["accuracy"] > 0.85 and good["recall"] > 0.5 and good["floor_n"] == 200
    assert good["floor"] / 4 < good["fd_classifier"] < 4 * good["floor"]
    swapped, _ = classify("swapped.npz")
    assert swapped["accuracy"] < 0.1 and same(swapped, good, ["fd_classifier", "floor"])
    collapsed, _ = classify("collapsed.npz")
    assert collapsed["recall"] < 0.2 < collapsed["precision"]
    assert collapsed["fd_classifier"] > 2 * good["fd_classifier"]
    noise, _ = classify("noise.npz")
    assert noise["precision"] < 0.1 and noise["fd_classifier"] > 5 * good["fd_classifier"]


def test_labels_come_from_file_names_but_not_from_prompts(classify, labelled):
    """A flat folder is one class to its reader, and prompts are numbered like classes."""
    assert classify("named")[0]["accuracy"] >= 0.75
    (labelled / "named" / "meta.json").write_text('{"labels": "prompts"}')
    assert "accuracy" not in classify("named")[0]
    save_folder(labelled / "nameless", np.load(labelled / "good.npz")["arr_0"][:8])
    assert "accuracy" not in classify("nameless")[0]


def test_the_classifier_is_trained_once_and_the_same_every_time(labelled, monkeypatch):
    """Also where it cannot be kept."""
    source = fid.Source(labelled / "real", 16)
    made = common.fingerprint(fid.load_classifier(source, "data", "cpu"))
    file, = labelled.glob("real/classifier-*-16.pt")
    with monkeypatch.context() as patch:
        patch.setattr(fid, "train_classifier", lambda *args: pytest.fail("trained again"))
        assert common.fingerprint(fid.load_classifier(source, "data", "cpu")) == made
    file.unlink()
    monkeypatch.setattr(common, "save", Mock(side_effect=UserError("read-only")))
    assert common.fingerprint(fid.load_classifier(source, "data", "cpu")) == made


def test_training_adds_batches_to_features(labelled):
    """As train.py does: tensors of one size, then `measure`."""
    evaluator = fid.Evaluator(labelled / "real", "classifier", size=16)
    with np.load(labelled / "good.npz") as file:
        images, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["arr_1"])
    whole = evaluator.compare(evaluator.side(fid.Source(labelled / "good.npz")))
    features = fid.Features()
    for x, y in zip(images.split(30), labels.split(30)):
        evaluator.extract(features, x, y)
    numbers = evaluator.compare(features.gathered())
    assert same(numbers, whole, ["fd_classifier", "floor", "accuracy", "precision", "recall"])
    assert fid.describe(numbers).endswith("n 200, reference_n 400, broken 0")


def test_two_processes_are_one(labelled):
    """Also where one of two ranks has only a broken picture, whose name is not UTF-8."""
    save_folder(labelled / "odd", np.load(labelled / "good.npz")["arr_0"][::20])
    with open(os.fsencode(labelled / "odd" / "z") + b"\xff.png", "wb") as f:
        f.write(b"no picture")
    command = (ROOT / "fid.py", "odd", "real", "--features", "classifier", "--device", "cpu")
    results = []
    for start in (run, lambda *command, cwd: torchrun(2, *command, cwd=cwd)):
        said = start(*command, cwd=labelled)
        assert re.search("left out broken file .*odd/z", said) and "broken 1" in said
        results.append(json.loads((labelled / "odd" / "fid.json").read_text()))
    one, two = results
    assert one["n"] == two["n"] == 10 and same(two, one, ["fd_classifier", "floor", "precision"])


# --- Mistakes -------------------------------------------------------------------------------------

X = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
SIX = {"mu": np.zeros(6), "sigma": np.eye(6)}
FILES = {  # name: content
    "b": {"arr_0": X}, "float": {"arr_0": X / 255},
    "one": {"arr_0": X[:1]}, "void": {"arr_0": X[:, :0, :0]},
    "half": {"arr_0": X, "mu": np.zeros(6)},
    "wide": {"mu": np.zeros(64), "sigma": np.eye(64)}, "nan": {**SIX, "mu": np.full(6, np.nan)},
    "objects": {"arr_0": np.array([{}, {}])},
    "foreign": {**SIX, "features": "inception-x-pytorch"}}
CLASSIFIER = ("--features", "classifier")


@pytest.mark.parametrize("arguments,words", [
    (["fashion-mnist:tset", "b.npz"], "fashion-mnist:tset: no such folder, nor one of shapes"),
    (["b.npz"], "give a REFERENCE"), (["empty", "b.npz"], "no picture"),
    (["mixed", "b.npz"], "mixed has 1 pictures at its top"),
    (["rotten", "b.npz"], "no readable picture"),
    (["float.npz", "b.npz"], "float64 (4, 8, 8, 3), not uint8"),
    (["void.npz", "b.npz"], "uint8 (4, 0, 0, 3), not uint8"),
    (["wrong.pt", "b.npz"], "it has neither arr_0 nor mu"),
    (["cut.npz", "b.npz"], "neither images nor"),
    (["objects.npz", "b.npz"], "Object arrays cannot be loaded"),
    (["b.npz", "half.npz"], "half.npz is unusable as statistics"),
    (["b.npz", "wide.npz"], "mu: not finite, or not of 6 features"),
    (["b.npz", "nan.npz"], "mu: not finite, or not of 6 features"),
    (["b.npz", "foreign.npz"], "is of inception-x-pytorch, not of inception-01234567-tf1"),
    (["one.npz", "b.npz"], "one.npz: statistics need two readable images, not 1"),
    (["b.npz", "nan.npz", *CLASSIFIER], "nan.npz has no labels of two classes"),
    (["b.npz", "--save-stats", "x.npz", *CLASSIFIER], "give a REFERENCE"),
    (["b.npz", "--save-stats", "b.npz"], "--save-stats writes a new file"),
    (["b.npz", "cifar10"], "cannot download")])
def test_mistakes_are_one_line(evaluate, in_process, tmp_path, monkeypatch, capsys, arguments,
                               words):
    """Neither a traceback nor a file is left."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    for name, content in FILES.items():
        np.savez(f"{name}.npz", **content)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:500])
    torch.save({"x": torch.zeros(3)}, "wrong.pt")
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "mixed", X[:1])
    save_folder(tmp_path / "mixed" / "more", X[:1])
    (tmp_path / "rotten").mkdir()
    (tmp_path / "rotten" / "a.png").write_text("no picture")
    said = refusal(in_process, capsys, fid, *arguments, "--device", "cpu")
    assert words in said and "\n" not in said.strip().split("error: ")[-1]
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "x.npz").exists()


def test_weights_that_are_not_inceptions_are_refused(tmp_path, monkeypatch):
    """Missing, or of another network; or there is no connection."""
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no such file: nowhere.pth"):
        fid.load_inception("nowhere.pth")
    torch.save({"x": torch.zeros(3)}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="wrong.pt is not the weights of Inception .*Missing key"):
        fid.load_inception(tmp_path / "wrong.pt")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    with pytest.raises(UserError, match=f"cannot download .*{fid.DIGEST}.*--weights"):
        fid.load_inception()


# --- Another tool, where it is installed ----------------------------------------------------------

if importlib.util.find_spec("torch_fidelity"):
    def test_torch_fidelity_says_the_same(images, inception_file, tmp_path):
        import torch_fidelity
        save_folder(tmp_path / "a", images[:8])
        save_folder(tmp_path / "b", images[8:])
        theirs = torch_fidelity.calculate_metrics(
            input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True,
            isc_splits=2, cuda=False, cache=False, verbose=False,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(inception_file))
        evaluator = fid.Evaluator(tmp_path / "b", weights=inception_file)
        side = evaluator.side(fid.Source(tmp_path / "a"))
        distance = theirs["frechet_inception_distance"]
        assert evaluator.compare(side)["fid"] == pytest.approx(distance, rel=1e-4)
        score, _ = fid.inception_score(side["logits"], splits=2)
        assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
