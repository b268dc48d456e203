"""The real command lines, in a temporary folder: training, resuming, several processes, sampling,
and mistakes."""
import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, SMALL, log_of, refusal, run, torchrun
from faults import equal
from PIL import Image

import common
import dar
import fid
import madformer
import sample
import train
import transdiff

MODELS = {"transdiff": transdiff, "dar": dar, "madformer": madformer}
LAST = {name: module.STAGES[-1].name for name, module in MODELS.items()}


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """A function from a model to its run of all stages, two steps each, by the real command."""
    @functools.cache
    def run_of(model):
        out = tmp_path_factory.mktemp(model)
        said = run(ROOT / "train.py", *SMALL[model], "--data", pictures, "--out", out, "--steps", 2)
        assert all(f"stage {stage.name}: done" in said for stage in MODELS[model].STAGES)
        return out

    return run_of


@pytest.fixture
def training(in_process, pictures, tmp_path):
    """A function that trains a small model in this process; fields are appended to --set."""
    def call(*arguments, model="transdiff", fields=(), out=tmp_path):
        in_process(train, *SMALL[model], *fields, "--data", pictures, "--out", out, *arguments)

    return call


@pytest.fixture
def sampling(in_process, trained, tmp_path):
    """A function that samples a trained model to tmp_path / out, and returns images and labels."""
    def call(out, *arguments, model="transdiff"):
        in_process(sample, "--model", model, "--run", trained(model), "--device", "cpu",
                   "--out", tmp_path / out, *arguments)
        return arrays(tmp_path / out) if out.endswith(".npz") else None

    return call


def arrays(path):
    """Return the images and labels of a set."""
    with np.load(path, allow_pickle=False) as content:
        return content["arr_0"], content["arr_1"]


def meta_of(path):
    """Return what is written beside a set or a picture."""
    return json.loads(path.with_suffix(".meta.json").read_text())


def gap(a, b):
    """Return the largest difference of two uint8 arrays."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


# --- Training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", MODELS)
def test_a_run_leaves_what_the_readme_says(trained, model):
    """A missing file, a log without its steps, or weights under names of DDP."""
    for stage in MODELS[model].STAGES:
        folder = trained(model) / stage.name
        config = json.loads((folder / "config.json").read_text())["config"]
        assert config["class_names"] == ["circle", "star", "triangle"]
        assert [line["step"] for line in log_of(folder)] == [1, 2]
        assert Image.open(folder / "samples/step_000002.png").height == 2 + 3 * 66
        names = common.read_checkpoint(folder / "model.pt")["model"]
        assert not [name for name in names if name.startswith(("module.", "_orig_mod."))]


def test_a_finished_stage_is_skipped(trained, training, capsys):
    """A second command that trains again."""
    training("--steps", 2, out=trained("transdiff"))
    assert capsys.readouterr().out.count("2 steps are done") == 3


def test_a_longer_stage_resumes(trained, training, tmp_path):
    """--steps that starts again instead, or a log with the wrong lines."""
    shutil.copytree(trained("transdiff") / "vae", tmp_path / "vae")
    training("--steps", 3, "--stage", "vae")
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [1, 2, 3]


def test_another_configuration_is_not_mixed_in(trained, training):
    """Weights of one configuration that another one resumes."""
    with pytest.raises(common.UserError, match="another configuration .dropout: 0.1 -> 0.0"):
        training("--steps", 5, "--stage", "1step", fields=["dropout=0"], out=trained("transdiff"))


def test_fresh_starts_again(training, tmp_path):
    """--fresh that keeps the old log or state."""
    training("--steps", 2, "--stage", "vae")
    training("--steps", 1, "--stage", "vae", "--fresh")
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [1]


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
import common, train
save = common.save
def save_and_die(path, content):
    save(path, content)
    if path.name == "state.pt" and content["step"] == 3:
        os._exit(9)                                    # as kill -9 would: nothing is cleaned up
common.save = save_and_die
sys.argv = ["train.py"] + {arguments!r}
train.main()
"""


def test_killed_runs_end_bit_equal(pictures, tmp_path):
    """Six steps = three, kill -9, three more, in each stage: weights, averages, optimizer and
    losses, bit for bit."""
    def arguments(out):
        return [str(a) for a in (*SMALL["transdiff"], "--data", pictures, "--out", out,
                                 "--steps", 6, "--save-every", 3)]

    run(ROOT / "train.py", *arguments(tmp_path / "whole"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), arguments=arguments(tmp_path / "killed")))
    for _ in ("vae", "1step", "mrar"):
        run(script, code=9)
    run(ROOT / "train.py", *arguments(tmp_path / "killed"))
    for stage in ("vae", "1step", "mrar"):
        folders = [tmp_path / name / stage for name in ("whole", "killed")]
        assert equal(*(common.read_checkpoint(folder / "state.pt") for folder in folders)), stage
        whole, killed = ([(line["step"], line["loss"]) for line in log_of(f)] for f in folders)
        assert whole == killed


def test_sigterm_saves(pictures, tmp_path):
    """A scheduler that ends the job: nothing is lost since the last --save-every."""
    command = [ROOT / "train.py", *SMALL["transdiff"], "--data", pictures, "--out", tmp_path,
               "--steps", 100000, "--stage", "vae"]
    process = subprocess.Popen([sys.executable, *map(str, command)], env=ENV, text=True,
                               stderr=subprocess.PIPE)
    log = tmp_path / "vae" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "saved" in said and "Traceback" not in said
    state = common.read_checkpoint(tmp_path / "vae" / "state.pt")
    assert state["step"] == log_of(tmp_path / "vae")[-1]["step"]


@pytest.mark.parametrize("model, ranks, fields", [
    ("transdiff", 2, ["feed=features"]), ("dar", 3, []), ("madformer", 2, ["condition=0"])])
def test_ranks_are_one_with_the_same_batch(trained, training, pictures, tmp_path, model, ranks,
                                           fields):
    """Other images, draws, gradients or code statistics than one process with micro-batches, idle
    parameters that stop DDP, unequal shares of the evaluation."""
    stage = "tokenizer" if model == "dar" else LAST[model]
    more = ["--stage", stage, "--steps", 3, "--batch-size", 12, "--fid-every", 3,
            "--fid-samples", 8]
    for out in ("one", "many"):
        for earlier in MODELS[model].STAGES:
            if earlier.name != stage:
                shutil.copytree(trained(model) / earlier.name, tmp_path / out / earlier.name)
    training(*more, "--accumulate", ranks, model=model, fields=fields, out=tmp_path / "one")
    said = torchrun(ranks, ROOT / "train.py", *SMALL[model], *fields, "--data", pictures,
                    "--out", tmp_path / "many", *more)
    assert "Warning" not in said
    one, many = (log_of(tmp_path / out / stage) for out in ("one", "many"))
    assert len(one) == len(many) == 3 + (stage != "tokenizer")
    for a, b in zip(one, many):
        for name in a.keys() - {"images_per_s", "memory_gb", "features"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3 if "floor" in a else 1e-4), name
    file = f"{stage}/samples/step_000003.png"
    assert gap(Image.open(tmp_path / "one" / file), Image.open(tmp_path / "many" / file)) <= 2


def test_two_machines_train_together(pictures, tmp_path):
    """torchrun --nnodes 2 over the loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node",
               "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id",
               "x", "--local_addr", "127.0.0.1", ROOT / "train.py", *SMALL["transdiff"], "--data",
               pictures, "--out", tmp_path, "--steps", "2", "--stage", "vae"]
    agents = [subprocess.Popen(list(map(str, command)), env=ENV, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT) for _ in range(2)]
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("2 x 1 x 4 samples" in text for text in said) == 1  # one rank speaks
    assert log_of(tmp_path / "vae")[-1]["step"] == 2


@pytest.fixture
def poisoned(monkeypatch):
    """A function that makes the VAE's loss NaN at these calls."""
    forward = common.KLVAE.forward

    def call(steps):
        calls = []

        def poison(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            calls.append(out)
            factor = float("nan") if len(calls) - 1 in steps else 1.0
            return {name: value * factor for name, value in out.items()}

        monkeypatch.setattr(common.KLVAE, "forward", poison)

    return call


def test_a_step_that_is_not_finite_is_skipped(poisoned, training, tmp_path):
    """NaN in weights, averages, optimizer or the means of the log."""
    poisoned({1, 2})
    training("--stage", "vae", "--steps", 4)
    lines = log_of(tmp_path / "vae")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2]
    assert "loss" not in lines[1] and lines[3]["loss"] < 2
    state = common.read_checkpoint(tmp_path / "vae" / "state.pt")
    assert all(t.isfinite().all() for t in [*state["model"].values(), *state["ema"].values()])
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {2}


def test_ten_bad_steps_stop_the_run_and_keep_the_good_weights(poisoned, training, tmp_path):
    """A run that spends a night on NaN."""
    poisoned(set(range(2, 99)))
    with pytest.raises(common.UserError, match="ten times in a row, up to step 11.*state.pt"):
        training("--stage", "vae", "--steps", 50, "--save-every", 2)
    assert common.read_checkpoint(tmp_path / "vae" / "state.pt")["step"] == 10


def test_the_average_ramps_up_in_a_short_run(monkeypatch, training):
    """EMA weights that are still the random ones after a short stage."""
    decays = []
    update = common.update_ema

    def watch(ema, model, decay):
        decays.append(decay)
        update(ema, model, decay)

    monkeypatch.setattr(common, "update_ema", watch)
    training("--stage", "vae", "--steps", 3)
    assert decays == [1 / 10, 2 / 11, 3 / 12]


def test_the_speed_of_a_short_window(monkeypatch, training, tmp_path):
    """Images per second of --log-every steps where fewer were taken, or with the time of a grid."""
    clock = [0.0]

    def slow(function, seconds):
        def call(*args):
            clock[0] += seconds
            return function(*args)
        return call

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(common, "update_ema", slow(common.update_ema, 2))
    monkeypatch.setattr(train, "save_grid", slow(train.save_grid, 100))
    training("--stage", "vae", "--steps", 6, "--log-every", 4, "--sample-every", 2)
    assert [line["images_per_s"] for line in log_of(tmp_path / "vae")] == [8 / 2, 8 / 2]


def test_numbered_weights(training, tmp_path):
    """--keep-every that writes over the weights before, or leaves out model.pt."""
    training("--stage", "vae", "--steps", 4, "--keep-every", 2)
    found = sorted(file.name for file in (tmp_path / "vae").glob("model*.pt"))
    assert found == ["model.pt", "model_000002.pt", "model_000004.pt"]


def test_init_carries_weights_to_another_size(trained, training, tmp_path, capsys):
    """256 to 512 px in small: only the decoder trains, its positions are resampled."""
    old = trained("transdiff") / "1step/model.pt"
    vae = trained("transdiff") / "vae/model.pt"
    more = ["--stage", "1step", "--steps", 1, "--vae", vae, "--image-size", 32]
    with pytest.raises(common.UserError, match="--init"):
        training(*more, fields=["only_decoder=true"])
    training(*more, "--init", old, fields=["only_decoder=true"])
    assert "random: nothing" in capsys.readouterr().out
    new = common.read_checkpoint(tmp_path / "1step/model.pt")["model"]
    old = common.read_checkpoint(old)["model"]
    assert new["decoder.pos"].shape[1] == 4 * old["decoder.pos"].shape[1]
    assert all(torch.equal(new[name], old[name]) for name in new if name.startswith("ar."))


def test_init_takes_no_foreign_weights(training, tmp_path):
    """A file of another model that leaves nearly all weights random."""
    torch.save({"model": {"x": torch.zeros(1)}, "stage": "tokenizer"}, tmp_path / "wrong.pt")
    with pytest.raises(common.UserError, match="wrong.pt .* of .* tensors"):
        training("--stage", "tokenizer", "--init", tmp_path / "wrong.pt", model="dar")


@pytest.mark.parametrize("model", ["transdiff", "dar"])
def test_codes_on_the_fly_are_the_cached_ones(trained, training, tmp_path, model):
    """Another crop, latent or token with --cache off."""
    stage = MODELS[model].STAGES[1]
    first = trained(model) / stage.first_stage / "model.pt"
    losses = []
    for cache in ("off", tmp_path / "cache"):
        out = tmp_path / str(cache == "off")
        training("--stage", stage.name, "--steps", 3, "--vae", first, "--cache", cache,
                 model=model, out=out)
        losses.append([line["loss"] for line in log_of(out / stage.name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mrar_of_one_image(trained, training, tmp_path):
    """Groups of one image have no dimension of images."""
    for stage in ("vae", "1step"):
        shutil.copytree(trained("transdiff") / stage, tmp_path / stage)
    training("--stage", "mrar", "--steps", 2, fields=["images=1"])
    assert log_of(tmp_path / "mrar")[-1]["loss"] < 9


def test_no_compiler(monkeypatch, tmp_path):
    """A page of traceback where torch.compile finds no C++ compiler."""
    monkeypatch.setitem(ENV, "CXX", "no-such-compiler")
    monkeypatch.setitem(ENV, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    code = "import common; from torch import *; common.run_script(lambda: compile(sin)(ones(9)))"
    said = run("-c", code, cwd=ROOT, code=2)
    assert re.fullmatch("error: torch.compile failed.*--no-compile.*\n", said)


TRAINING = {  # command -> words of the line that it ends with
    "transdiff --size xxl": "tiny, b, l, h",
    "transdiff --stage gan": "vae, 1step, mrar",
    "transdiff --size b": "--vae FILE",
    "transdiff --data /nowhere": "no such folder",
    "transdiff --set dim=x": "of type",
    "transdiff --set depths=2": "no such field",
    "transdiff --set dim=30": "dim must be divisible by",
    "transdiff --image-size 30": "must be divisible by 4",
    "transdiff --accumulate 5": "does not divide",
    "transdiff --stage mrar": "train stage vae, or give",
    "transdiff --vae x.pt": "x.pt, which does not exist",
    "transdiff --device tpu": "--device tpu",
    "transdiff --init x.pt --stage vae": "always starts from random weights",
    "dar --stage ar": "train stage tokenizer, or give --tokenizer FILE",
    "dar --set tokenizer.groups=5": "divisible by groups",
    "dar --set tokenizer.beta=x": "of type",
    "dar --set cfg=4": "a pair",
    "dar --stage tokenizer --tokenizer x.pt": "nothing",
    "madformer --size ffhq": "--vae FILE",
    "madformer --set ar_length=5": "square number",
    "madformer --set target=v": "target is one of clean, noise",
    "flow": "no model file flow.py"}


@pytest.mark.parametrize("command, words", TRAINING.items())
def test_mistakes_in_training_are_one_line(in_process, tmp_path, monkeypatch, capsys, command,
                                           words):
    """A traceback, or a run that starts all the same."""
    monkeypatch.chdir(tmp_path)
    said = refusal(in_process, capsys, train, "--steps", 1, "--model", *command.split())
    assert words in said and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("script, words", [("train.py", "--vae FILE"), ("sample.py", "no trained")])
def test_a_mistake_ends_with_code_two(tmp_path, script, words):
    """A traceback, or an exit code that a shell script takes for success."""
    more = ["--size", "b"] if script == "train.py" else []
    said = run(ROOT / script, "--model", "transdiff", *more, cwd=tmp_path, code=2)
    assert said.splitlines()[-1].startswith("error: ") and words in said


def test_tensorboard(monkeypatch, training, tmp_path):
    """Scalars without their step."""
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    training("--stage", "vae", "--steps", 1, "--tensorboard")
    loss = log_of(tmp_path / "vae")[0]["loss"]
    board.SummaryWriter().add_scalar.assert_any_call("loss", loss, 1)


def test_tensorboard_is_not_installed(monkeypatch, training):
    """An ImportError's traceback."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        training("--stage", "vae", "--steps", 1, "--tensorboard")


# --- Sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, options, facts", [
    ("transdiff", {"steps": 4, "cfg": 2.0}, {"weights": "EMA"}),
    ("dar", {"cfg": "1.1:4", "top_k": 9}, {"cfg": [1.1, 4], "solver": "adams"}),
    ("madformer", {"nfe": 10, "sampler": "dpm"}, {"nfe_per_block": 9})])
def test_a_picture_by_the_real_command(trained, tmp_path, model, options, facts):
    """Options that are not passed on, or not written down."""
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", value]
    run(ROOT / "sample.py", "--model", model, "--run", trained(model), "--n", 6,
        "--out", tmp_path / "x.png", *flags)
    assert Image.open(tmp_path / "x.png").size[1] == 2 + 3 * 66
    meta = meta_of(tmp_path / "x.png")
    expected = {**options, **facts, "stage": LAST[model], "count": 6}
    assert {name: meta[name] for name in expected} == expected


def test_the_weights_of_a_set_are_identified(trained, sampling, tmp_path):
    """A hash of something else than the sampled weights."""
    sampling("x.png", "--n", 1)
    content = common.read_checkpoint(trained("transdiff") / "mrar/model.pt")
    model = transdiff.TransDiff(common.rebuild(transdiff.Config, content["config"]))
    model.load_state_dict(content["model"])
    assert meta_of(tmp_path / "x.png")["weights_hash"] == common.fingerprint(model)


@pytest.fixture(scope="session")
def two_ranks(trained, tmp_path_factory):
    """A set of six images that two ranks sampled in batches of two."""
    out = tmp_path_factory.mktemp("ranks") / "x.npz"
    torchrun(2, ROOT / "sample.py", "--model", "transdiff", "--run", trained("transdiff"),
             "--n", 6, "--batch-size", 2, "--out", out)
    return out


def test_ranks_sample_the_same_images(two_ranks, sampling):
    """Noise or labels that depend on the rank, or files that stay behind."""
    images, labels = sampling("x.npz", "--n", 6)
    again, _ = arrays(two_ranks)
    assert images.shape == (6, 16, 16, 3) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert gap(images, again) <= 1 and not list(two_ranks.parent.glob("*.partial"))


def test_facts_are_means_of_all_images(two_ranks, sampling, monkeypatch, tmp_path):
    """The mean of one rank or of the last batch."""
    values = []
    generate = transdiff.generate

    def watch(*inputs, **options):
        images, facts = generate(*inputs, **options)
        values.extend(facts["feature_similarity"].tolist())
        return images, facts

    monkeypatch.setattr(transdiff, "generate", watch)
    sampling("x.png", "--n", 6, "--batch-size", 4)
    expected = pytest.approx(np.mean(values), abs=1e-4)
    assert len(values) == 6 and meta_of(tmp_path / "x.png")["feature_similarity"] == expected
    assert meta_of(two_ranks)["feature_similarity"] == expected


@pytest.mark.parametrize("model", ["dar", "madformer"])
def test_batches_sample_the_same_images(sampling, model):
    """Noise that depends on the place in the batch."""
    whole, _ = sampling("one.npz", "--n", 5, model=model)
    parts, _ = sampling("two.npz", "--n", 5, "--batch-size", 2, model=model)
    assert gap(whole, parts) <= 1


def test_a_folder_has_the_images_of_a_set(sampling, tmp_path):
    """Other images, names or labels in a folder than in an .npz, or a dot taken for an ending."""
    images, labels = sampling("set.npz", "--classes", "star,0", "--n", 4)
    sampling("v1.2/set.old/", "--classes", "star", "0", "--n", 4)
    files = sorted((tmp_path / "v1.2/set.old").glob("*.png"))
    assert labels.tolist() == [1, 1, 0, 0] and files[0].name == "000000_class1.png"
    for file, image in zip(files, images, strict=True):
        assert gap(Image.open(file), image) == 0


@pytest.mark.parametrize("out, kind", [("x.PNG", "PNG"), ("x.Gif", "GIF"), ("x.NPZ", None)])
def test_endings_in_upper_case(sampling, tmp_path, out, kind):
    """x.NPZ that becomes a folder."""
    sampling(out, "--n", 2)
    assert (tmp_path / "x.meta.json").exists()
    if kind:
        assert Image.open(tmp_path / out).format == kind
    else:
        assert len(arrays(tmp_path / out)[0]) == 2


def test_a_full_folder_is_left_alone(sampling, tmp_path):
    """Samples among a user's files."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.png").touch()
    with pytest.raises(common.UserError, match="not empty"):
        sampling("set", "--n", 2)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_grows_on_disk(sampling, monkeypatch, tmp_path, model):
    """A file that is written at the end only, rows of what fills up a compiled batch, or a last
    column that is not the sample."""
    sizes = []
    add = sample.Film.add

    def watch(self, images):
        add(self, images)
        sizes.append(Image.open(tmp_path / "x.png").size)

    monkeypatch.setattr(sample.Film, "add", watch)
    monkeypatch.setattr(MODELS[model], "compile_steps", Mock())
    sampling("x.png", "--stream", "--compile", model=model)
    widths, heights = zip(*sizes)
    assert len(sizes) > 2 and set(np.diff(widths)) == {66} and set(heights) == {2 + 3 * 66}
    images, _ = sampling("x.npz", "--n", 3, model=model)
    strip = np.asarray(Image.open(tmp_path / "x.png"))
    for k, image in enumerate(images):
        assert gap(strip[2 + 66 * k:66 * (k + 1), -66:-2][::4, ::4], image) == 0


def test_an_animation_shows_the_steps(sampling, tmp_path):
    """A GIF of the last step alone."""
    sampling("x.gif", "--n", 3)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames > 5


def test_fused_classes(sampling, tmp_path):
    """--fuse that changes nothing."""
    plain, _ = sampling("plain.npz", "--classes", "circle", "--n", 2)
    fused, _ = sampling("fused.npz", "--classes", "circle", "--fuse", "star", "--n", 2)
    assert gap(plain, fused) > 0 and meta_of(tmp_path / "fused.npz")["fuse"] == "star"


def test_a_prompt_is_the_name_of_a_class(sampling):
    """Another text than in training, or its order lost."""
    by_class, _ = sampling("a.npz", "--classes", "star,circle", "--n", 2, model="madformer")
    by_text, _ = sampling("b.npz", "--prompt", "Star", "circle", "--n", 2, model="madformer")
    assert gap(by_class, by_text) == 0


def test_all_tokens_of_a_picture_are_its_reconstruction(sampling, trained, pictures, tmp_path):
    """A prefix that is shifted, or not kept."""
    file = pictures / "triangle/0.png"
    prefix = ["--prefix-image", file, "--prefix-tokens", 8]
    images, _ = sampling("x.npz", "--n", 2, *prefix, model="dar")
    tokenizer = dar.load_tokenizer(trained("dar") / "tokenizer/model.pt")
    picture = common.to_float(common.load_picture(file, 16))[None].repeat(2, 1, 1, 1)
    expected = tokenizer.reconstruct(picture, common.Noise(0, range(2)))
    assert gap(images, common.to_uint8(expected).permute(0, 2, 3, 1)) <= 1


@pytest.mark.parametrize("model", ["dar", "madformer"])
def test_files_are_reconstructed(sampling, pictures, tmp_path, model):
    """Columns in another order, or a PSNR that is not that of the picture shown."""
    files = [pictures / "star/0.png", pictures / "circle/1.png"]
    sampling("x.png", "--image-size", 16, "--reconstruct", *files, model=model)
    psnr = meta_of(tmp_path / "x.png")["psnr_after_each_step"]
    columns = len(psnr) + 1
    sheet = np.asarray(Image.open(tmp_path / "x.png"), float)[2:, -66 * columns:]
    found = []
    for k, file in enumerate(files):
        row = sheet[66 * k:66 * k + 64:4]
        original, last = row[:, :64:4], row[:, 66 * columns - 66:][:, :64:4]
        assert gap(original, Image.open(file).convert("RGB")) == 0
        found.append(10 * np.log10(255**2 / np.square(last - original).mean()))
    assert psnr[-1] == pytest.approx(np.mean(found), abs=1e-3)


def test_a_data_set_is_reconstructed(sampling, pictures, tmp_path):
    """--reconstruct that knows files only."""
    images, labels = sampling("x.npz", "--reconstruct", pictures, "--n", 9, "--image-size", 16)
    assert images.shape == (9, 16, 16, 3) and labels.tolist() == [0] * 6 + [1] * 3


def test_another_vae_than_the_models_is_refused(sampling, tmp_path):
    """Latents of another scale or size."""
    vae = common.KLVAE(common.VAEConfig(channels=4, width=32, mult=(1, 2), attention=()))
    common.save(tmp_path / "f2.pt", vae.state_dict())
    with pytest.raises(common.UserError, match="has 4 channels at f2, the model needs 4 .* f4"):
        sampling("x.png", "--vae", tmp_path / "f2.pt")


def test_a_released_pair_makes_pictures(in_process, tmp_path):
    """--ckpt with --vae: neither has a run."""
    vae = common.KLVAE(common.VAEConfig(4, 32, (1, 1, 1, 1), 1, (), scale=0.18215))
    unet = madformer.UNetConfig((32, 64), (1, 1), (0, 0), time_dim=16)
    config = madformer.Config(image_size=64, dim=64, mlp=64, depth=3, diffusion_depth=2,
                              ar_length=4, vae=vae.config, unet=unet)
    args = {"diff_depth": 2, "ar_len": 4}
    ema = madformer.MADFormer(config).state_dict()
    torch.save({"ema": ema, "args": args}, tmp_path / "ffhq.pt")
    torch.save({"state_dict": vae.state_dict()}, tmp_path / "vae.pt")
    in_process(sample, "--model", "madformer", "--ckpt", tmp_path / "ffhq.pt", "--n", 2,
               "--vae", tmp_path / "vae.pt", "--steps", 2, "--out", tmp_path / "x.npz",
               "--device", "cpu")
    assert arrays(tmp_path / "x.npz")[0].shape == (2, 64, 64, 3)


@pytest.fixture
def interrupted(monkeypatch):
    """A list of the sizes of batches that TransDiff samples. The third is interrupted."""
    calls = []
    generate = transdiff.generate

    def dies(model, vae, labels, noise, **options):
        calls.append(len(labels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, vae, labels, noise, **options)

    monkeypatch.setattr(transdiff, "generate", dies)
    return calls


@pytest.mark.parametrize("out", ["x.npz", "folder"])
def test_an_interrupted_set_resumes(sampling, two_ranks, interrupted, tmp_path, out):
    """Images that are sampled again, or a mean of those that were sampled last."""
    with pytest.raises(KeyboardInterrupt):
        sampling(out, "--n", 6, "--batch-size", 2)
    assert not (tmp_path / out).exists()
    sampling(out, "--n", 6, "--batch-size", 2)
    assert interrupted == [2, 2, 2, 2]
    beside = tmp_path / ("x.meta.json" if out == "x.npz" else "folder/meta.json")
    found = json.loads(beside.read_text())["feature_similarity"]
    assert found == pytest.approx(meta_of(two_ranks)["feature_similarity"], abs=1e-4)
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_do_not_resume(sampling, interrupted):
    """A set of two seeds."""
    with pytest.raises(KeyboardInterrupt):
        sampling("x.npz", "--n", 6, "--batch-size", 2)
    sampling("x.npz", "--n", 6, "--batch-size", 2, "--seed", 1)
    assert interrupted == [2] * 6


def test_a_folder_that_was_half_written_is_finished(sampling, monkeypatch, tmp_path):
    """A kill among the PNGs: the folder is not empty, and must be taken up all the same."""
    save = common.save_picture
    written = []

    def dies(path, picture):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        save(path, picture)

    monkeypatch.setattr(common, "save_picture", dies)
    with pytest.raises(KeyboardInterrupt):
        sampling("set", "--n", 4)
    monkeypatch.setattr(transdiff, "generate", None)
    sampling("set", "--n", 4)
    assert len(list((tmp_path / "set").glob("*.png"))) == 4


SAMPLING = {  # as TRAINING
    "transdiff --classes moon": "circle, star, triangle",
    "transdiff --classes 3": "ids 0 to 2",
    "transdiff --out x.bmp": ".png or .gif",
    "transdiff --rounds 5": "trained for 4",
    "transdiff --features 99": "16",
    "transdiff --fuse moon": "circle, star, triangle",
    "transdiff --ckpt x.pth": "give --vae FILE",
    "transdiff --ckpt x.pth --vae y": "no such file: x.pth",
    "transdiff --run elsewhere": "no trained stage",
    "transdiff --stream --out x.npz": "--stream writes",
    "transdiff --reconstruct x.png": "no such folder",
    "dar --drift-scale 0": "unrecognized arguments",
    "dar --solver maruyama": "adams, euler",
    "dar --cfg 1,2": "--cfg",
    "dar --tokens 1": "from 2 (one group) to 8",
    "dar --prefix-image x.png": "go together",
    "dar --prefix-image x.png --prefix-tokens 3": "cannot read x.png",
    "dar --top-p 2": "top_p",
    "dar --reconstruct x.png y.png": "cannot read x.png",
    "dar --cfg 2 --reconstruct x.png y.png": "does not act on reconstructions",
    "dar --tokenizer none.pt": "no such file",
    "madformer --nfe 2": "one step takes 3",
    "madformer --nfe 9 --steps 2": "give one of them",
    "madformer --steps 1001": "steps",
    "madformer --prompt x --classes 0": "--classes"}


@pytest.mark.parametrize("command, words", SAMPLING.items())
def test_mistakes_in_sampling_are_one_line(trained, in_process, tmp_path, monkeypatch, capsys,
                                           command, words):
    """A traceback, or a picture all the same."""
    monkeypatch.chdir(tmp_path)
    model, *arguments = command.split()
    said = refusal(in_process, capsys, sample, "--model", model, "--run", trained(model), "--n", 1,
                   *arguments)
    assert words in said and not list(tmp_path.glob("*.png"))


# --- Evaluation in training -----------------------------------------------------------------------

@pytest.mark.parametrize("model", MODELS)
def test_training_measures_what_sampling_and_fid_do(trained, training, in_process, pictures,
                                                    tmp_path, monkeypatch, model):
    """Other weights, labels, noise or features under --fid-every than at the command line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained(model), "run")
    training("--stage", LAST[model], "--steps", 3, "--fid-every", 3, "--fid-samples", 9,
             model=model, out="run")
    found = log_of(Path("run", LAST[model]))[-1]
    in_process(sample, "--model", model, "--run", "run", "--n", 9, "--out", "s.npz",
               "--device", "cpu")
    in_process(fid, "s.npz", pictures, "--features", "classifier", "--device", "cpu")
    again = json.loads(Path("s.fid.json").read_text())
    assert again["weights"] == "EMA" and again["features"] == found["features"]
    for name in ("n", "fd_classifier", "accuracy", "precision", "recall", "floor"):
        assert again[name] == pytest.approx(found[name], rel=1e-4), name


def test_evaluation_changes_no_step(trained, training, tmp_path):
    """Random numbers drawn from the stream of training."""
    losses = []
    for more in ([], ["--fid-every", 1, "--fid-samples", 9]):
        out = tmp_path / str(len(more))
        shutil.copytree(trained("transdiff") / "vae", out / "vae")
        training("--stage", "1step", "--steps", 3, *more, out=out)
        losses.append([line["loss"] for line in log_of(out / "1step") if "loss" in line])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("data, n, words", [
    ("star", 9, "no labels of two classes"), ("", 3, "must be 4 or more")])
def test_an_impossible_evaluation_ends_a_run_before_it_starts(trained, training, pictures, tmp_path,
                                                              data, n, words):
    """A night of training, and then no number."""
    shutil.copytree(trained("transdiff") / "vae", tmp_path / "vae")
    with pytest.raises(common.UserError, match=words):
        training("--stage", "1step", "--data", pictures / data, "--fid-every", 1,
                 "--fid-samples", n)
    assert not list(tmp_path.glob("1step/*.pt"))
