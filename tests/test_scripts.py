"""The real command lines, in a temporary folder: training, resuming, several processes, sampling,
and mistakes."""
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import faults
import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, SMALL, log_of, refusal, run, torchrun
from PIL import Image
from torch import nn
from torch.distributed import run as launcher

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
        run(ROOT / "train.py", *SMALL[model], "--data", pictures, "--out", out, "--steps", 2)
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
        return arrays(tmp_path / out) if out.lower().endswith(".npz") else None

    return call


def arrays(path):
    """Return the images and labels of a set."""
    with np.load(path) as content:
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
    """A missing file, or a log without its steps."""
    files = {"config.json", "model.pt", "state.pt", "log.jsonl", "samples"}
    for stage in MODELS[model].STAGES:
        folder = trained(model) / stage.name
        assert {path.name for path in folder.iterdir()} == files
        config = json.loads((folder / "config.json").read_text())["config"]
        assert config["class_names"] == ["circle", "star", "triangle"]
        assert [line["step"] for line in log_of(folder)] == [1, 2]
        assert Image.open(folder / "samples/step_000002.png").width == 2 + 8 * 66


def test_a_finished_stage_is_skipped(trained, training, capsys):
    """A second command that trains again."""
    training("--steps", 2, out=trained("transdiff"))
    said = capsys.readouterr().out
    assert said.count("2 steps are done") == 3 == said.count("\n")


def test_another_configuration_is_not_mixed_in(trained, training):
    """Weights of one configuration that another one resumes."""
    with pytest.raises(common.UserError, match="another configuration .{'dropout': 0.1}"):
        training("--steps", 5, "--stage", "1step", fields=["dropout=0"], out=trained("transdiff"))


def test_fresh_starts_again(training, tmp_path):
    """--fresh that keeps the old log or state."""
    training("--steps", 2, "--stage", "vae")
    training("--steps", 1, "--stage", "vae", "--fresh")
    assert [line["step"] for line in log_of(tmp_path / "vae")] == [1]


KILL = """
save = common.save
def save_and_die(path, content):
    save(path, content)
    if path.name == "state.pt" and content["step"] == 3:
        os._exit(9)                                    # as kill -9 would: nothing is cleaned up
common.save = save_and_die
"""


@pytest.mark.parametrize("model", [transdiff, dar])
def test_killed_runs_end_bit_equal(model, pictures, tmp_path):
    """Six steps = three, kill -9, three more, in each stage: weights, averages, optimizer and
    losses, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [*SMALL[model.__name__], "--data", pictures, "--steps", 6, "--save-every", 3, "--out"]
    run(ROOT / "train.py", *command, whole)
    for _ in model.STAGES:
        process = faults.start([*command, killed], KILL)
        process.communicate()
        assert process.returncode == 9
    run(ROOT / "train.py", *command, killed)
    for stage in model.STAGES:
        folders = whole / stage.name, killed / stage.name
        assert faults.equal(*(common.read_checkpoint(f / "state.pt") for f in folders)), stage
        losses = [[line["loss"] for line in log_of(folder)] for folder in folders]
        assert losses[0] == losses[1]


def test_sigterm_saves(monkeypatch, training, tmp_path):
    """Nothing is lost since the last --save-every. torchrun ends the whole process group, where a
    worker that loads images must not be."""
    def terminate(*_):
        [worker] = multiprocessing.active_children()
        assert os.getpgid(worker.pid) == worker.pid
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(common, "update_ema", terminate)
    with pytest.raises(common.UserError, match="stopped at step 2 .*saved"):
        training("--steps", 9, "--workers", 1)
    assert common.read_checkpoint(tmp_path / "vae/state.pt")["step"] == 2


@pytest.mark.parametrize("model, ranks, fields", [
    ("transdiff", 2, ["feed=features"]), ("dar", 3, []), ("madformer", 2, ["condition=false"])])
def test_ranks_are_one_with_the_same_batch(trained, training, pictures, tmp_path, model, ranks,
                                           fields):
    """Other images, draws, gradients or code statistics than one process with micro-batches, idle
    parameters that stop DDP, unequal shares of the evaluation."""
    stage = "tokenizer" if model == "dar" else LAST[model]
    more = ["--stage", stage, "--fresh", "--steps", 3, "--batch-size", 12, "--fid-every", 3,
            "--fid-samples", 8]
    one, many = tmp_path / "one", tmp_path / "many"
    for out in (one, many):
        shutil.copytree(trained(model), out)
    training(*more, "--accumulate", ranks, model=model, fields=fields, out=one)
    said = torchrun(ranks, ROOT / "train.py", *SMALL[model], *fields, "--data", pictures,
                    "--out", many, *more)
    assert "Warning" not in said and said.count("of 12 samples") == 1  # one rank prints
    for a, b in zip(log_of(one / stage), log_of(many / stage), strict=True):
        for name in a.keys() - {"images_per_s"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3 if "floor" in a else 1e-4), name
    grids = [Image.open(out / stage / "samples/step_000003.png") for out in (one, many)]
    assert gap(*grids) <= 2
    one, many = (common.read_checkpoint(out / stage / "state.pt") for out in (one, many))
    assert one["model"].keys() == many["model"].keys()  # not those of DDP


def test_two_machines_are_one_run(tmp_path):
    """A rank taken for its number on its machine. The two machines are two launchers, which meet
    at a file; a third one starts them."""
    said = torchrun(2, launcher.__file__, "--nnodes=2", "--local_addr=localhost",
                    "--rdzv_backend=c10d", "--rdzv_conf=store_type=file",
                    f"--rdzv_endpoint={tmp_path}/meeting", ROOT / "train.py",
                    *SMALL["transdiff"], "--stage=vae", "--steps=2", "--out", tmp_path)
    assert said.count("2 steps are done") == 1


def test_ten_bad_steps_stop_the_run_and_keep_the_good_weights(monkeypatch, training, tmp_path):
    """A run that spends a night on NaN."""
    codes = train.codes
    monkeypatch.setattr(train, "codes", lambda run, batch: codes(run, batch) / (run.step < 2))
    with pytest.raises(common.UserError, match="ten times in a row, up to step 12.*state.pt"):
        training("--stage", "vae", "--steps", 50, "--save-every", 2)
    state = common.read_checkpoint(tmp_path / "vae/state.pt")
    assert state["step"] == 10 and all(t.isfinite().all() for t in state["model"].values())


def test_numbered_weights(training, tmp_path):
    """--keep-every that writes over the weights before, or leaves out model.pt."""
    training("--stage", "vae", "--steps", 4, "--keep-every", 2)
    found = sorted(file.name for file in tmp_path.glob("vae/model*.pt"))
    assert found == ["model.pt", "model_000002.pt", "model_000004.pt"]


def test_init_carries_weights_to_another_size(trained, training, tmp_path, capsys):
    """256 to 512 px in small: only the decoder trains, its positions are resampled."""
    old = trained("transdiff") / "1step/model.pt"
    more = ["--stage", "1step", "--steps", 1, "--vae", trained("transdiff") / "vae/model.pt",
            "--image-size", 32]
    with pytest.raises(common.UserError, match="--init"):
        training(*more, fields=["only_decoder=true"])
    training(*more, "--init", old, fields=["only_decoder=true"])
    assert re.search(r"1step/model.pt: (\d+) of \1 tensors", capsys.readouterr().out)
    new = common.read_checkpoint(tmp_path / "1step/model.pt")["model"]
    old = common.read_checkpoint(old)["model"]
    assert new["decoder.pos"].shape[1] == 4 * old["decoder.pos"].shape[1]
    assert all(torch.equal(new[name], old[name]) for name in new if name.startswith("ar."))


def test_init_takes_no_foreign_weights(trained, training):
    """A file of another model that leaves all weights random."""
    with pytest.raises(common.UserError, match="few tensors of .*ar/model.pt"):
        training("--stage", "vae", "--init", trained("dar") / "ar/model.pt")


@pytest.mark.parametrize("model", ["transdiff", "dar"])
def test_codes_on_the_fly_are_the_cached_ones(trained, training, tmp_path, model):
    """Another crop, latent or token with --cache off."""
    stage = MODELS[model].STAGES[1]
    first = trained(model) / stage.first_stage / "model.pt"
    losses = []
    for cache in ("off", tmp_path / "cache"):
        training("--stage", stage.name, "--fresh", "--steps", 3, "--vae", first, "--cache", cache,
                 model=model)
        losses.append([line["loss"] for line in log_of(tmp_path / stage.name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("model, depths, graphs", [
    ("transdiff", ["depth=4", "ar_depth=3"], 4), ("dar", ["depth=4"], 1),
    ("madformer", ["depth=6"], 1)])
def test_blocks_are_compiled_one_by_one(trained, training, traced, tmp_path, model, depths, graphs):
    """A graph for each of several equal blocks, or at each step, or another loss."""
    shutil.copytree(trained(model), tmp_path, dirs_exist_ok=True)
    last = LAST[model]
    losses = []
    for flag in ("--no-compile", "--compile"):
        training("--stage", last, "--fresh", "--steps", 3, flag, model=model, fields=depths)
        losses.append([line["loss"] for line in log_of(tmp_path / last)])
    assert losses[0] == losses[1] and len(traced) <= graphs
    assert not torch._dynamo.config.optimize_ddp


def test_the_first_stage_is_channels_last_on_cuda():
    """Convolutions in a slower memory layout."""
    vae = Mock()
    run = Mock(**{"process.device": torch.device("cuda"), "stage.first_stage": vae.name,
                  "model_file.STAGES": [vae]})
    train.load_first_stage(run)
    vae.load().to.assert_called_with(torch.device("cuda"), memory_format=torch.channels_last)


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
    "transdiff --set dim=x": "not possible",
    "transdiff --set depths=2": "choose from the fields image_size",
    "transdiff --set dim=30": "dim must be divisible by",
    "transdiff --accumulate 5": "is not divisible",
    "transdiff --stage mrar": "vae/model.pt",
    "transdiff --vae x.pt": "no such file",
    "transdiff --device tpu": "--device tpu",
    "transdiff --init x.pt --stage vae": "no such file",
    "dar --stage ar": "tokenizer/model.pt",
    "dar --set tokenizer.groups=5": "divisible by groups",
    "dar --set tokenizer.beta=x": "not possible",
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


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_mistake_ends_with_code_two(tmp_path, script):
    """A traceback, or an exit code that a shell script takes for success."""
    said = run(ROOT / script, "--model", "flow", cwd=tmp_path, code=2)
    assert re.fullmatch("error: .*no model file flow.py.*\n", said)


def test_tensorboard(monkeypatch, training, tmp_path):
    """Scalars without their step."""
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    training("--stage", "vae", "--steps", 1, "--tensorboard")
    loss = log_of(tmp_path / "vae")[0]["loss"]
    board.SummaryWriter().add_scalar.assert_any_call("loss", loss, 1)


# --- Sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, options, facts", [
    ("transdiff", "--steps 4 --cfg 2", {"steps": 4, "cfg": 2, "weights": "EMA"}),
    ("dar", "--cfg 1.1:4 --top-k 9", {"cfg": [1.1, 4], "top_k": 9, "top_p": 1}),
    ("madformer", "--nfe 10 --sampler dpm", {"nfe": 10, "sampler": "dpm", "nfe_per_block": 9})])
def test_a_picture_by_the_real_command(trained, tmp_path, model, options, facts):
    """Options that are not passed on, or not written down."""
    out = tmp_path / "x.png"
    run(ROOT / "sample.py", "--model", model, "--run", trained(model), "--n", 6, "--out", out,
        *options.split())
    assert Image.open(out).height == 2 + 3 * 66
    meta = meta_of(out)
    assert meta == meta | facts | {"stage": LAST[model], "count": 6}


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


def test_facts_are_means_of_all_images(two_ranks, sampling, tmp_path):
    """The mean of one rank or of the last batch."""
    sampling("x.npz", "--n", 6)  # in one batch
    expected = meta_of(tmp_path / "x.npz")["feature_similarity"]
    assert meta_of(two_ranks)["feature_similarity"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", ["dar", "madformer"])
def test_batches_sample_the_same_images(sampling, model):
    """Noise that depends on the place in the batch."""
    whole, _ = sampling("one.npz", "--n", 5, model=model)
    parts, _ = sampling("two.npz", "--n", 5, "--batch-size", 2, model=model)
    assert gap(whole, parts) <= 1


def test_a_folder_has_the_images_of_a_set(sampling, tmp_path):
    """Other images, names or labels in a folder than in an .npz, a dot taken for an ending, or
    an ending in upper case for none."""
    which = ["--classes", "star", 0, "--n", 4]
    images, labels = sampling("set.NPZ", *which)
    sampling("v1.2/set.old/", *which)
    files = sorted((tmp_path / "v1.2/set.old").glob("*.png"))
    assert labels.tolist() == [1, 1, 0, 0] and files[0].name == "000000_class1.png"
    for file, image in zip(files, images, strict=True):
        assert gap(Image.open(file), image) == 0


def test_a_folder_of_the_user_is_left_alone(sampling, tmp_path):
    """Samples among a user's files."""
    with pytest.raises(common.UserError, match="existing folder"):
        sampling(".", "--n", 2)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_grows_on_disk(sampling, monkeypatch, tmp_path, model):
    """A file that is written at the end only."""
    sizes = []
    keep = sample.Job.keep

    def watch(self, images):
        keep(self, images)
        sizes.append(Image.open(tmp_path / "x.png").size)

    monkeypatch.setattr(sample.Job, "keep", watch)
    sampling("x.png", "--stream", model=model)
    widths, heights = zip(*sizes)
    assert set(heights) == {2 + 3 * 66}
    *growth, last = np.diff(widths)
    assert set(growth) == {66} and last == 0  # the result replaces the last estimate


def test_an_animation_shows_the_steps(sampling, monkeypatch, tmp_path):
    """A GIF of the last step alone, or of what fills up a compiled batch."""
    monkeypatch.setattr(transdiff, "compile_steps", Mock())
    sampling("x.gif", "--n", 3, "--batch-size", 2, "--compile")
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames > 5 and film.height == 2 + 3 * 66


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_cast_once(sampling, monkeypatch, model):
    """Other samples than those of autocast, a part that is left out, or a first stage that makes
    other codes."""
    generate = Mock(wraps=MODELS[model].generate)
    monkeypatch.setattr(MODELS[model], "generate", generate)
    made = []
    for cast in (Mock(), common.cast_once):
        monkeypatch.setattr(common, "cast_once", cast)
        images, _ = sampling("x.npz", "--n", 2, "--precision", "bf16", model=model)
        made.append(images)
    assert gap(*made) == 0
    network, first_stage, *_ = generate.call_args.args
    read = nn.ModuleList([network, *first_stage.sampled()])
    layers = [part for part in read.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert next(first_stage.parameters()).dtype == torch.float32  # of the encoder


def test_a_prompt_is_the_name_of_a_class(sampling):
    """Another text than in training, or its order lost."""
    by_class, _ = sampling("a.npz", "--classes", "star", "circle", "--n", 2, model="madformer")
    by_text, _ = sampling("b.npz", "--prompt", "Star", "circle", "--n", 2, model="madformer")
    assert gap(by_class, by_text) == 0


def test_all_tokens_of_a_picture_are_its_reconstruction(sampling, pictures):
    """A prefix that is shifted, or not kept."""
    file = pictures / "triangle/0.png"
    images, _ = sampling("x.npz", "--n", 1, "--prefix-image", file, "--prefix-tokens", 8,
                         model="dar")
    expected, _ = sampling("y.npz", "--reconstruct", file, model="dar")
    assert gap(images, expected) <= 1


@pytest.mark.parametrize("model", ["dar", "madformer"])
def test_files_are_reconstructed(sampling, pictures, tmp_path, model):
    """Columns in another order, or a PSNR that is not that of the picture shown."""
    files = [pictures / "star/0.png", pictures / "circle/1.png"]
    originals = np.stack([np.asarray(Image.open(file)) for file in files])
    command = ["--image-size", 16, "--reconstruct", *files]
    images, _ = sampling("x.npz", *command, model=model)
    sampling("y.png", *command, model=model)
    psnr = meta_of(tmp_path / "y.png")["psnr_after_each_step"]
    errors = np.square(originals - images.astype(float)).mean((1, 2, 3))
    assert psnr[-1] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)
    sheet = np.asarray(Image.open(tmp_path / "y.png"))[2:66:4]
    assert gap(sheet[:, -66 * len(psnr) - 66:][:, :64:4], originals[0]) == 0
    assert gap(sheet[:, -66:-2:4], images[0]) == 0


def test_another_vae_than_the_models_is_refused(sampling, tmp_path):
    """Latents of another scale or size."""
    vae = common.KLVAE(common.VAEConfig(channels=4, width=32, mult=(1, 2), attention=()))
    common.save(tmp_path / "f2.pt", vae.state_dict())
    with pytest.raises(common.UserError, match="has 4 channels at f2, the model needs 4 .* f4"):
        sampling("x.png", "--vae", tmp_path / "f2.pt")


def test_a_released_pair_makes_pictures(trained, in_process, monkeypatch, tmp_path):
    """--ckpt with --vae: neither has a run."""
    run = trained("transdiff")
    content = common.read_checkpoint(run / "mrar/model.pt")
    model = transdiff.TransDiff(common.rebuild(transdiff.Config, content["config"]))
    monkeypatch.setattr(transdiff, "load_official", Mock(return_value=model))
    in_process(sample, "--model", "transdiff", "--ckpt", "x.pth", "--vae", run / "vae/model.pt",
               "--device", "cpu", "--n", 2, "--out", tmp_path / "x.npz")
    assert arrays(tmp_path / "x.npz")[0].shape == (2, 16, 16, 3)


def test_without_a_run_the_weights_that_come_with_it_are_sampled(trained, in_process, pictures,
                                                                 monkeypatch, tmp_path, capsys):
    """Half precision that does not load, or a first stage that two models share and none finds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "sample.py"))
    for folder in (Path("transdiff/mrar"), Path("vae")):
        content = common.read_checkpoint(trained("transdiff") / folder.name / "model.pt")
        content["model"] = {name: value.half() for name, value in content["model"].items()}
        content["first_stage"] = "../../vae/model.pt"  # from transdiff/mrar; a VAE needs none
        common.save("weights" / folder / "model.pt", content)
    command = ["--model", "transdiff", "--device", "cpu", "--image-size", 16, "--n", 9]
    in_process(sample, *command, "--out", "x.npz")
    assert "no run in runs/transdiff: sampling from the weights that" in capsys.readouterr().out
    in_process(sample, *command, "--out", "y.npz", "--reconstruct", pictures)
    in_process(sample, *command, "--out", "z.npz", "--run", trained("transdiff"))
    assert gap(arrays("x.npz")[0], arrays("z.npz")[0]) <= 2
    assert arrays("y.npz")[1].tolist() == [0] * 6 + [1] * 3  # of the data


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


@pytest.mark.parametrize("out, about", [("x.npz", "x.meta.json"), ("folder", "folder/meta.json")])
def test_an_interrupted_set_resumes(sampling, two_ranks, interrupted, tmp_path, out, about):
    """Images that are sampled again, or a mean of those that were sampled last."""
    with pytest.raises(KeyboardInterrupt):
        sampling(out, "--n", 6, "--batch-size", 2)
    assert not (tmp_path / out).exists()
    sampling(out, "--n", 6, "--batch-size", 2)
    assert interrupted == [2, 2, 2, 2]
    found = json.loads((tmp_path / about).read_text())["feature_similarity"]
    assert found == pytest.approx(meta_of(two_ranks)["feature_similarity"], abs=1e-4)
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_do_not_resume(sampling, interrupted):
    """A set of two seeds."""
    with pytest.raises(KeyboardInterrupt):
        sampling("x.npz", "--n", 6, "--batch-size", 2)
    sampling("x.npz", "--n", 6, "--batch-size", 2, "--seed", 1)
    assert interrupted == [2] * 6


def test_a_folder_appears_whole(sampling, monkeypatch, tmp_path):
    """A kill among the PNGs that leaves half a folder, or makes the images again."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_picture", Mock(side_effect=[None, KeyboardInterrupt]))
        sampling("set", "--n", 4)
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(sample.Job, "make", None)
    sampling("set", "--n", 4)
    assert len(list((tmp_path / "set").glob("*.png"))) == 4


SAMPLING = {  # as TRAINING
    "transdiff --classes moon": "circle, star, triangle",
    "transdiff --classes 3": "ids 0 to 2",
    "transdiff --rounds 5": "trained for 4",
    "transdiff --features 99": "16",
    "transdiff --fuse moon": "circle, star, triangle",
    "transdiff --ckpt x.pth": "give --vae FILE",
    "transdiff --ckpt x.pth --vae y": "no such file: x.pth",
    "transdiff --run elsewhere": "no trained stage",
    "transdiff --reconstruct x.png": "no such folder",
    "dar --drift-scale 0": "unrecognized arguments",
    "dar --solver maruyama": "adams, euler",
    "dar --cfg 1,2": "--cfg",
    "dar --tokens 1": "from 2 (one group) to 8",
    "dar --prefix-image x.png": "go together",
    "dar --prefix-image x.png --prefix-tokens 3": "x.png is not a readable picture",
    "dar --top-p 2": "top_p",
    "dar --cfg 2 --reconstruct x.png": "argument 'cfg'",
    "dar --tokenizer none.pt": "no such file",
    "madformer --nfe 2": "one step takes 3",
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
    """Other weights, labels or noise under --fid-every than at the command line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained(model), "run")
    training("--stage", LAST[model], "--steps", 3, "--fid-every", 3, "--fid-samples", 9,
             model=model, out="run")
    found = log_of(Path("run", LAST[model]))[-1]
    in_process(sample, "--model", model, "--run", "run", "--n", 9, "--out", "s.npz",
               "--device", "cpu")
    in_process(fid, "s.npz", pictures, "--features", "classifier", "--device", "cpu")
    again = json.loads(Path("s.fid.json").read_text())
    for name in ("n", "fd_classifier", "accuracy", "precision", "recall", "floor"):
        assert again[name] == pytest.approx(found[name], rel=1e-4), name


def test_an_impossible_evaluation_ends_a_run_at_once(training, trained, pictures, tmp_path):
    """A night of training, and then no number."""
    vae = trained("transdiff") / "vae/model.pt"
    with pytest.raises(common.UserError, match="no labels of two classes"):
        training("--stage", "1step", "--vae", vae, "--data", pictures / "star", "--fid-every", 1)
    assert not list(tmp_path.glob("1step/*.pt"))
