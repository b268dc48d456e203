"""The real command lines, in a temporary folder: training, resuming, several processes, sampling, and mistakes."""
import argparse
import ast
import dataclasses
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
import sample
import train
import transdiff

DAR = ["--model", "dar", *SMALL[:SMALL.index("--set")], "--set", "dim=32", "heads=2", "depth=2", "dropout=0.1",
       *(f"tokenizer.{field}" for field in ("dim=64", "depth=1", "queries=8", "query_rows=8", "codebook=32", "groups=4",
                                            "decoder_dim=64", "decoder_depth=1", "pixel_dim=64", "pixel_depth=2",
                                            "steps=4"))]

MAD = ["--model", "madformer", *SMALL[:SMALL.index("--set")], "--set", "dim=64", "mlp=64", "depth=3",
       "diffusion_depth=2", "unet.channels=8,16", "unet.groups=4", "unet.time_dim=16", "vae.width=8", "vae.channels=4",
       "vae.groups=4", "steps=3", "text_drop=0.1"]


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """A run of all three stages, two steps each, by the real command."""
    out = tmp_path_factory.mktemp("run")
    said = run(ROOT / "train.py", "--model", "transdiff", "--data", pictures, "--out", out, "--steps", 2, *SMALL)
    assert all(f"stage {name}: done" in said for name in ("vae", "1step", "mrar"))
    return out


@pytest.fixture(scope="session")
def trained_dar(pictures, tmp_path_factory):
    """A D-AR run of both stages, two steps each, by the real command."""
    out = tmp_path_factory.mktemp("dar")
    said = run(ROOT / "train.py", "--data", pictures, "--out", out, "--steps", 2, *DAR)
    assert all(f"stage {name}: done" in said for name in ("tokenizer", "ar"))
    assert "trained without LPIPS and REPA" in said
    return out


@pytest.fixture(scope="session")
def trained_mad(pictures, tmp_path_factory):
    """A MADFormer run of both stages, two steps each, by the real command."""
    out = tmp_path_factory.mktemp("mad")
    said = run(ROOT / "train.py", "--data", pictures, "--out", out, "--steps", 2, *MAD)
    assert all(f"stage {name}: done" in said for name in ("vae", "madformer"))
    return out


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
        assert equal(whole, killed), stage
        whole, killed = (log_of(tmp_path / name / stage) for name in ("whole", "killed"))
        assert [(line["step"], line["loss"]) for line in whole] == [(line["step"], line["loss"]) for line in killed]


@pytest.mark.parametrize("model, stage", [("transdiff", 1), ("transdiff", 2), ("dar", 0), ("dar", 1), ("madformer", 1)])
def test_recomputing_changes_memory_alone(traced, model, stage):
    """Gradients, dropout and all, bit for bit, also when traced into one graph; few activations are kept."""
    module, found = train.MODELS[model], []
    stage, config = module.STAGES[stage], dataclasses.replace(module.PRESETS["tiny"], classes=4)
    if model == "madformer":
        config = dataclasses.replace(config, texts=("a", "b", "c", "d"))
    for how in ("plain", "recompute", "compile"):
        train.reseed(0)
        network, kept = stage.build(stage.config(config)).train(), 0
        first = next((s for s in module.STAGES if s.name == stage.first), None)
        x = torch.rand(2 * stage.group(config), 3, 32, 32)
        if first:
            first = first.build(stage.config(config)).eval()
            x = stage.codes(first, first.encode(x))
            x = x.unflatten(0, (2, -1)) if stage.group(config) > 1 else x
        if how != "plain":
            train.recompute(network)
        if how == "compile":
            network.compile()

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel() * tensor.element_size() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor
        train.reseed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(x, torch.tensor([0, 3]))["loss"]
        loss.backward()
        found.append((kept, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}))
    (much, plain), (little, again), (_, compiled) = found
    assert little < much / 2 and plain.keys() == again.keys() == compiled.keys()
    assert all(torch.equal(again[name], g) for name, g in plain.items())
    for name, g in plain.items():
        torch.testing.assert_close(compiled[name], g, rtol=1e-3, atol=1e-5)


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
    (["--seed", "-1"], "0 or more"), (["--init", "x.pt", "--stage", "vae"], "always begins afresh")])
def test_mistakes_in_training_are_one_line(in_process, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(in_process, capsys, train, "--model", "transdiff", "--steps", 1, *arguments)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_mistake_ends_with_code_two(tmp_path):
    said = run(ROOT / "train.py", "--model", "transdiff", "--size", "b", cwd=tmp_path, code=2)
    assert said.splitlines()[-1].startswith("error: size b is trained with a published vae")
    said = run(ROOT / "sample.py", "--model", "transdiff", cwd=tmp_path, code=2)
    assert "no trained stage in runs/transdiff: python train.py --model transdiff makes one" in said


# --- Training D-AR ----------------------------------------------------------------------------------------------------

def test_dar_runs_say_what_the_codes_do(trained_dar):
    for stage, parts in (("tokenizer", {"flow", "codebook", "commitment", "usage", "dead"}), ("ar", {"accuracy"})):
        line = log_of(trained_dar / stage)[-1]
        assert parts <= set(line) and 0 <= line[min(parts)] <= line["loss"] + 10
        assert (trained_dar / stage / "samples/step_000002.png").exists()
    assert not any("teacher" in name for name in common.read(trained_dar / "tokenizer/model.pt")["model"])


@pytest.mark.parametrize("stage", ["tokenizer", "ar"])
def test_two_dar_processes_are_one_with_the_same_batch(trained_dar, pictures, tmp_path, stage):
    arguments = ["--data", pictures, "--stage", stage, "--steps", 3, *DAR]
    for out in ("one", "two"):
        if stage == "ar":
            shutil.copytree(trained_dar / "tokenizer", tmp_path / out / "tokenizer")
    run(ROOT / "train.py", *arguments, "--out", tmp_path / "one", "--accumulate", 2, cwd=tmp_path)
    torchrun(2, ROOT / "train.py", *arguments, "--out", tmp_path / "two", cwd=tmp_path)
    for a, b in zip(log_of(tmp_path / "one" / stage), log_of(tmp_path / "two" / stage), strict=True):
        for name in ("loss", "norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_a_tokenizer_is_tuned_to_a_smaller_codebook(trained_dar, in_process, pictures, tmp_path, capsys):
    """Table 1's 4096 from 16384 codes, in small: all but the codebook is carried over."""
    in_process(train, "--data", pictures, "--out", tmp_path, "--stage", "tokenizer", "--steps", 1, "--init",
               trained_dar / "tokenizer/model.pt", *DAR, "tokenizer.codebook=16")
    assert "begun afresh: quantizer.age, quantizer.embedding.weight; not used: none" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="holds an AR model, not a tokenizer"):
        in_process(train, "--data", pictures, "--out", tmp_path, "--stage", "ar", "--tokenizer",
                   trained_dar / "ar/model.pt", *DAR)
    with pytest.raises(common.UserError, match="image_size: 16 -> 32"):
        in_process(train, "--data", pictures, "--out", tmp_path, "--stage", "ar", "--tokenizer",
                   trained_dar / "tokenizer/model.pt", *DAR, "--image-size", 32)


def test_tokens_are_cached_small_and_are_what_the_tokenizer_says(trained_dar, in_process, pictures, tmp_path):
    """Ten crops: ten rows of 16-bit codes per picture, equal to encoding the crops; another run finds the cache."""
    arguments = ["--data", pictures, "--out", tmp_path, "--stage", "ar", "--steps", 1, "--tokenizer",
                 trained_dar / "tokenizer/model.pt", *DAR, "crops=10"]
    in_process(train, *arguments)
    folder = next((tmp_path / "cache").iterdir())
    rows = np.load(folder / "rows.npy")
    assert rows.shape == (18, 10, 8) and rows.dtype == np.int16
    tokenizer = dar.load_tokenizer(trained_dar / "tokenizer/model.pt")
    data = common.load_data(str(pictures), size=16)
    crops = torch.stack([common.from_pil(crop) for crop in common.ten_crops(data.read(7), 16)])
    assert np.array_equal(tokenizer.encode(common.to_float(crops)).numpy(), rows[7])
    stamp = (folder / "rows.npy").stat().st_mtime_ns
    in_process(train, *arguments, "--fresh")
    assert (folder / "rows.npy").stat().st_mtime_ns == stamp


def test_tokens_on_the_fly_are_the_cached_ones(trained_dar, in_process, pictures, tmp_path):
    """--cache off with one view for each picture: the same tokens, so the same losses."""
    logs = []
    for cache in ("off", tmp_path / "cache"):
        out = tmp_path / str(cache == "off")
        in_process(train, "--data", pictures, "--out", out, "--stage", "ar", "--tokenizer",
                   trained_dar / "tokenizer/model.pt", "--steps", 3, "--cache", cache, *DAR)
        logs.append([line["loss"] for line in log_of(out / "ar")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


@pytest.mark.parametrize("arguments,words", [
    (["--size", "m"], "tiny, b, l, xl, xxl"), (["--stage", "vae"], "tokenizer, ar"),
    (["--stage", "ar"], "train stage tokenizer, or give --tokenizer FILE"),
    (["--set", "tokenizer.groups=5"], "a multiple of 5 groups"), (["--set", "tokenizer.beta=x"], "beta is a float"),
    (["--init", "x.pt"], "--stage tokenizer or ar"), (["--vae", "x.pt"], "--vae: dar has none"),
    (["--stage", "tokenizer", "--tokenizer", "x.pt"], "not trained where one is given"),
    (["--set", "cfg=4"], "cfg is a pair"), (["--set", "tokenizer.groups=0"], "groups is 1 or more"),
    (["--init", "x.pt", "--stage", "ar"], "train stage tokenizer"),
    (["--set", "repa_weight=0.5"], "REPA needs a grid of 16"), (["--tokenizer", "x.pt"], "x.pt, which is not there")])
def test_mistakes_in_training_dar_are_one_line(in_process, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(in_process, capsys, train, "--model", "dar", "--steps", 1, *arguments)
    assert not list(tmp_path.rglob("*.pt"))


# --- Training MADFormer -----------------------------------------------------------------------------------------------

def test_madformer_learns_the_names_of_the_folders(trained_mad):
    line = log_of(trained_mad / "madformer")[-1]
    assert line["loss"] == pytest.approx(5 * line["image"] + line["text"] + 0.1 * line["hidden"], rel=1e-4)
    config = common.read(trained_mad / "madformer/model.pt")["config"]
    assert config["texts"] == ("circle", "star", "triangle")
    assert (trained_mad / "madformer/samples/step_000002.png").exists()


def test_killed_madformer_runs_end_bit_equal(trained_mad, pictures, tmp_path):
    """As above, with frozen parts."""
    changes = ["text=0", "mlp_denoising=1", "hidden_weight=0"]

    def arguments(name):
        shutil.copytree(trained_mad / "vae", tmp_path / name / "vae", dirs_exist_ok=True)
        return [str(a) for a in ("--data", pictures, "--out", tmp_path / name, "--stage", "madformer", "--steps", 6,
                                 "--save-every", 3, "--sample-every", 100, *MAD, *changes)]

    run(ROOT / "train.py", *arguments("whole"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), arguments=arguments("killed")))
    run(script, code=9)
    run(ROOT / "train.py", *arguments("killed"))
    whole, killed = (common.read(tmp_path / name / "madformer/state.pt") for name in ("whole", "killed"))
    assert equal(whole, killed)
    whole, killed = (log_of(tmp_path / name / "madformer") for name in ("whole", "killed"))
    assert [(line["step"], line["loss"]) for line in whole] == [(line["step"], line["loss"]) for line in killed]


@pytest.mark.parametrize("changes", [["text=0", "condition=0"], ["mlp_denoising=1", "shared=1"]])
def test_two_madformer_processes_are_one_with_the_same_batch(trained_mad, pictures, tmp_path, changes):
    """Parameters that an ablation never uses must not stop two processes."""
    arguments = ["--data", pictures, "--stage", "madformer", "--steps", 3, *MAD, *changes]
    for out in ("one", "two"):
        shutil.copytree(trained_mad / "vae", tmp_path / out / "vae")
    run(ROOT / "train.py", *arguments, "--out", tmp_path / "one", "--accumulate", 2, cwd=tmp_path)
    torchrun(2, ROOT / "train.py", *arguments, "--out", tmp_path / "two", cwd=tmp_path)
    for a, b in zip(log_of(tmp_path / "one/madformer"), log_of(tmp_path / "two/madformer"), strict=True):
        for name in ("loss", "norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_madformer_goes_on_from_other_weights(trained_mad, in_process, pictures, tmp_path, capsys):
    """--init: from a run with another split of the layers, all weights fit."""
    in_process(train, "--data", pictures, "--out", tmp_path, "--stage", "madformer", "--steps", 1, "--vae",
               trained_mad / "vae/model.pt", "--init", trained_mad / "madformer/model.pt", *MAD, "diffusion_depth=1")
    assert "changed: none; begun afresh: none; not used: none" in capsys.readouterr().out


@pytest.mark.parametrize("arguments,words", [
    (["--size", "b"], "tiny, ffhq, imagenet"), (["--stage", "ar"], "vae, madformer"),
    (["--size", "ffhq"], "--vae FILE"),
    (["--set", "ar_length=5"], "not a square number"), (["--set", "diffusion_depth=0"], "diffusion_depth is 1 to 8"),
    (["--tokenizer", "x.pt"], "madformer has none"), (["--image-size", "28"], "does not divide into 2 x 2 blocks"),
    (["--set", "target=v"], "target is one of clean, noise")])
def test_mistakes_in_training_madformer_are_one_line(in_process, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(in_process, capsys, train, "--model", "madformer", "--steps", 1, *arguments)
    assert not list(tmp_path.rglob("*.pt"))


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
    with pytest.raises(common.UserError, match="has 4 channels at f2, the model needs 4 channels at f4"):
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
    run_of = [] if {"--run", "--ckpt"} & {*arguments} else ["--run", trained]
    assert words in refusal(in_process, capsys, sample, "--model", "transdiff", *run_of, "--n", 1, *arguments)
    assert not list(tmp_path.glob("samples*.png"))


# --- Sampling D-AR ----------------------------------------------------------------------------------------------------

def test_dar_samples_by_the_real_command(trained_dar, tmp_path):
    """A set from one process and from two, of other batch sizes; guidance as a pair; what was done is written down."""
    common_part = ["--model", "dar", "--run", trained_dar, "--n", 6, "--cfg", "1.1:4", "--top-k", 9, "--out"]
    run(ROOT / "sample.py", *common_part, tmp_path / "one.npz")
    torchrun(2, ROOT / "sample.py", *common_part, tmp_path / "two.npz", "--batch-size", 2)
    (one, labels), (two, _) = arrays(tmp_path / "one.npz"), arrays(tmp_path / "two.npz")
    assert one.shape == (6, 16, 16, 3) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    meta = json.loads((tmp_path / "one.meta.json").read_text())
    assert (meta["stage"], meta["cfg"], meta["top_k"], meta["steps"], meta["solver"]) == ("ar", [1.1, 4], 9, 4, "adams")


def test_streamed_pictures_grow_while_tokens_come(trained_dar, in_process, tmp_path, monkeypatch):
    """The file on disk has one column more after each group; at the end its last column is the result."""
    widths, previews, whole = [], [], dar.Decoding.advance

    def watched(self):
        whole(self)
        previews.append(common.to_uint8(self.image.clamp(-1, 1)).permute(0, 2, 3, 1).numpy())
        with Image.open(tmp_path / "x.png") as picture:
            ink = np.asarray(picture).astype(int).sum((0, 2))
        widths.append(sum(ink[k * 66 + 90:k * 66 + 110].mean() for k in range(4)))
    monkeypatch.setattr(dar.Decoding, "advance", watched)
    arguments = ["--model", "dar", "--run", trained_dar, "--device", "cpu", "--n", 3]
    in_process(sample, *arguments, "--stream", "--out", tmp_path / "x.png")
    assert len(widths) == 4 and sorted(widths) == widths and len(set(widths)) == 4
    monkeypatch.setattr(dar.Decoding, "advance", whole)
    in_process(sample, *arguments, "--out", tmp_path / "plain.npz")
    strip = np.asarray(Image.open(tmp_path / "x.png"))
    for k, image in enumerate(arrays(tmp_path / "plain.npz")[0]):
        row = strip[2 + 66 * k:66 * (k + 1)][::4]
        assert np.array_equal(row[:, -66:-2:4], image)
        for step, shown in enumerate(previews):
            assert np.array_equal(row[:, (step - 4) * 66:][:, :64:4], shown[k])
    in_process(sample, *arguments, "--stream", "--out", tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames >= 2  # equal frames are one in a GIF


def test_the_layout_of_a_picture_is_kept(trained_dar, in_process, pictures, tmp_path, capsys):
    """All tokens given: its reconstruction whatever the label. None: the plain samples. Rows differ in nothing else."""
    arguments = ["--model", "dar", "--run", trained_dar, "--device", "cpu", "--classes", "star,circle", "--n", 2]
    file = pictures / "triangle/0.png"
    in_process(sample, *arguments, "--prefix-image", file, "--prefix-tokens", "0,4,8", "--out", tmp_path / "x.npz")
    said = capsys.readouterr().out
    images, labels = arrays(tmp_path / "x.npz")
    assert labels.tolist() == [1, 0] * 3
    in_process(sample, *arguments, "--out", tmp_path / "free.npz")
    assert np.array_equal(images[:2], arrays(tmp_path / "free.npz")[0])
    tokenizer = dar.load_tokenizer(trained_dar / "tokenizer/model.pt")
    picture = common.to_float(common.from_pil(Image.open(file).convert("RGB"))[None])
    noise = common.Noise.of(0, range(2)).normal((3, 16, 16))
    both = common.to_uint8(tokenizer.decode(tokenizer.encode(picture).expand(2, -1), noise)).permute(0, 2, 3, 1).numpy()
    assert np.abs(images[4:].astype(int) - both).max() <= 1
    distance = json.loads((tmp_path / "x.meta.json").read_text())["distance_to_reference"]
    expected = [np.sqrt(np.mean(((images[2 * k:2 * k + 2].astype(float) - np.asarray(Image.open(file).convert("RGB")))
                                 / 127.5) ** 2)) for k in range(3)]
    assert distance == pytest.approx(expected, abs=1e-3) and f"{distance[1]:.3f} with 4 tokens" in said
    in_process(sample, *arguments, "--prefix-image", file, "--prefix-tokens", "0,4", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").height == 2 + 2 * 66


def test_reconstructions_of_files(trained_dar, in_process, pictures, tmp_path, capsys):
    """Original, one column per step, and figures that follow from them."""
    files = [pictures / "star/0.png", pictures / "circle/1.png"]
    in_process(sample, "--model", "dar", "--run", trained_dar, "--device", "cpu", "--reconstruct", *files, "--out",
               tmp_path / "x.png")
    said = capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "x.png"))[2:, -5 * 66:]
    tiles = [[sheet[66 * r:66 * r + 64:4, 66 * k:66 * k + 64:4].astype(float) for k in range(5)] for r in range(2)]
    assert all(np.array_equal(tiles[r][0], np.asarray(Image.open(f).convert("RGB"))) for r, f in enumerate(files))
    psnr = np.mean([10 * np.log10(255**2 / np.mean((row[4] - row[0]) ** 2)) for row in tiles])
    assert f"of 2: {psnr:.2f} dB" in said and "% of 32 codes used" in said


@pytest.mark.parametrize("arguments,words", [
    (["--rounds", "2"], "--rounds is not an option of dar"), (["--vae", "x"], "--vae is not an option of dar"),
    (["--solver", "maruyama"], "adams or euler"), (["--cfg", "1,2"], "one scale, or first:last"),
    (["--tokens", "1"], "from 2 (one group) to 8"), (["--prefix-image", "x.png"], "go together"),
    (["--prefix-image", "x.png", "--prefix-tokens", "3"], "cannot read x.png"),
    (["--prefix-image", "x.png", "--prefix-tokens", "9"], "the tokenizer has 8 tokens"),
    (["--stream", "--out", "x.npz"], "--stream writes a .png or .gif"), (["--top-p", "2"], "top-p is more than 0"),
    (["--reconstruct", "x.png"], "no such folder"), (["--reconstruct", "x.png", "--cfg", "2"], "not go with --cfg"),
    (["--drift-scale", "0"], "--drift-scale is not an option of dar"),
    (["--reconstruct", "x.png", "y.png"], "cannot read x.png"),
    (["--tokenizer", "none.pt"], "no such file")])
def test_mistakes_in_sampling_dar_are_one_line(trained_dar, in_process, tmp_path, monkeypatch, capsys, arguments,
                                               words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(in_process, capsys, sample, "--model", "dar", "--run", trained_dar, "--n", 1, *arguments)
    assert not list(tmp_path.glob("*.png"))


def test_a_released_pair_makes_pictures(trained_dar, in_process, tmp_path):
    """--ckpt with --tokenizer: an AR file in the released layout beside a tokenizer."""
    with pytest.raises(common.UserError, match="give --tokenizer FILE"):
        in_process(sample, "--model", "dar", "--ckpt", trained_dar / "ar/model.pt")
    model = dar.Llama(dar.Config(dim=64, heads=1, depth=1, classes=4, repa_weight=0.0, tokenizer=dar.TokenizerConfig()))
    state = {k.replace("class_embed", "cls_embedding.embedding_table").replace("token_embed", "tok_embeddings"): v
             for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "ar.pt")
    with pytest.raises(common.UserError, match="8 tokens of 32 codes for 16 pixels, the model needs 256 of 16384"):
        in_process(sample, "--model", "dar", "--ckpt", tmp_path / "ar.pt", "--tokenizer",
                   trained_dar / "tokenizer/model.pt", "--out", tmp_path / "x.png")


# --- Sampling MADFormer -----------------------------------------------------------------------------------------------

def test_madformer_samples_by_the_real_command(trained_mad, tmp_path):
    """A set from one process and from two, of other batch sizes; a budget is met and said, and written down."""
    part = ["--model", "madformer", "--run", trained_mad, "--n", 6, "--cfg", 2, "--nfe", 10, "--sampler", "dpm",
            "--out"]
    said = run(ROOT / "sample.py", *part, tmp_path / "one.npz")
    assert "steps 4; nfe per block 9" in said
    torchrun(2, ROOT / "sample.py", *part, tmp_path / "two.npz", "--batch-size", 2)
    (one, labels), (two, _) = arrays(tmp_path / "one.npz"), arrays(tmp_path / "two.npz")
    assert one.shape == (6, 16, 16, 3) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    meta = json.loads((tmp_path / "one.meta.json").read_text())
    assert (meta["steps"], meta["nfe"], meta["nfe_per_block"], meta["sampler"], meta["cfg"]) == (4, 10, 9, "dpm", 2)


def test_a_prompt_is_the_name_of_a_class(trained_mad, in_process, tmp_path, capsys):
    """The same pictures as --classes, in any case; what was never read is said."""
    arguments = ["--model", "madformer", "--run", trained_mad, "--device", "cpu", "--n", 2]
    in_process(sample, *arguments, "--classes", "star,circle", "--out", tmp_path / "a.npz")
    capsys.readouterr()
    in_process(sample, *arguments, "--prompt", "Star", " circle", "--out", tmp_path / "b.npz")
    assert "note" not in capsys.readouterr().out
    assert np.array_equal(arrays(tmp_path / "a.npz")[0], arrays(tmp_path / "b.npz")[0])
    in_process(sample, *arguments, "--prompt", "a green moon", "--out", tmp_path / "c.png")
    assert "not a text of the training data: a green moon" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.meta.json").read_text())["prompt"] == ["a green moon"]


def test_a_released_file_and_its_vae_make_pictures(in_process, tmp_path):
    """--ckpt with --vae, FFHQ's way: no text, one class, four channels at f8."""
    from test_madformer import published, released
    args = argparse.Namespace(diff_depth=2, ar_len=4, image_size=64)
    torch.save({"ema": released(published()), "args": args}, tmp_path / "ffhq.pt")
    vae = common.KLVAE(common.VAEConfig(4, 32, (1, 1, 1, 1), 1, (), scale=0.18215))
    torch.save({"state_dict": {k: v for k, v in vae.state_dict().items() if k != "scale"}}, tmp_path / "vae.pt")
    command = ["--model", "madformer", "--ckpt", tmp_path / "ffhq.pt", "--device", "cpu", "--out", tmp_path / "x.npz"]
    with pytest.raises(common.UserError, match="give --vae FILE"):
        in_process(sample, *command)
    in_process(sample, *command, "--vae", tmp_path / "vae.pt", "--n", 2, "--steps", 2)
    images, labels = arrays(tmp_path / "x.npz")
    assert images.shape == (2, 64, 64, 3) and labels.tolist() == [0, 0] and (images[0] != images[1]).any()
    for option in ("--prompt", "--classes"):
        with pytest.raises(common.UserError, match="no text tower"):
            in_process(sample, *command, "--vae", tmp_path / "vae.pt", option, "0")


def test_the_animation_grows_block_by_block(trained_mad, in_process, tmp_path):
    in_process(sample, "--model", "madformer", "--run", trained_mad, "--device", "cpu", "--n", 3, "--out",
               tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        film.seek(0)
        first = np.asarray(film.convert("RGB"))[2:66, -66:-2].astype(int)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB"))[2:66, -66:-2].astype(int)
    assert (np.abs(first[32:] - 128) <= 2).all() and np.abs(last[32:] - 128).max() > 8


@pytest.mark.parametrize("arguments,words", [
    (["--nfe", "2"], "one step takes 3"), (["--nfe", "9", "--steps", "2"], "not both"),
    (["--steps", "1001"], "1 to 1000"),
    (["--prompt", "x", "--classes", "0"], "takes the place"), (["--rounds", "2"], "not an option of madformer"),
    (["--solver", "euler"], "not an option of madformer"), (["--sampler", "euler"], "ddim"),
    (["--tokenizer", "x"], "not an option of madformer"), (["--cfg", "1,2"], "first:last")])
def test_mistakes_in_sampling_madformer_are_one_line(trained_mad, in_process, tmp_path, monkeypatch, capsys, arguments,
                                                     words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(in_process, capsys, sample, "--model", "madformer", "--run", trained_mad, "--n", 1,
                            *arguments)
    assert not list(tmp_path.glob("*.png"))


# --- Evaluation in training, and sweeps -------------------------------------------------------------------------------

@pytest.mark.parametrize("model,small,stage", [("transdiff", SMALL, "mrar"), ("dar", DAR[2:], "ar"),
                                               ("madformer", MAD[2:], "madformer")])
def test_training_measures_what_sampling_and_fid_do(request, in_process, pictures, tmp_path, monkeypatch, model, small,
                                                    stage):
    """--fid-every logs the numbers of sample.py and fid.py at the same step, and changes nothing else."""
    source = request.getfixturevalue({"transdiff": "trained", "dar": "trained_dar", "madformer": "trained_mad"}[model])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for out in ("with", "without"):
        shutil.copytree(source, tmp_path / out)
        in_process(train, "--model", model, "--data", pictures, "--out", out, "--stage", stage, "--steps", 3, *small,
                   *(["--fid-every", 3, "--fid-samples", 9, "--seed", 0] if out == "with" else []))
    *lines, found = log_of(tmp_path / "with" / stage)
    assert [line["loss"] for line in lines] == [line["loss"] for line in log_of(tmp_path / "without" / stage)]
    assert found["step"] == 3 and {"fd_classifier", "accuracy", "precision", "recall", "floor"} <= found.keys()
    in_process(sample, "--model", model, "--run", "with", "--device", "cpu", "--n", 9, "--out", "s.npz")
    in_process(fid, "s.npz", pictures, "--features", "classifier", "--device", "cpu")
    again = json.loads((tmp_path / "s.fid.json").read_text())
    assert again["weights"] == "EMA" and again["step"] == 3 and again["n"] == found["n"] == 9
    for name in ("fd_classifier", "accuracy", "precision", "recall", "floor", "features"):
        assert again[name] == (pytest.approx(found[name], rel=1e-4) if name != "features" else found[name]), name


def test_two_processes_measure_the_same(trained, pictures, tmp_path, monkeypatch):
    """Nine samples over two ranks: unequal shares."""
    monkeypatch.setitem(ENV, "TORCH_HOME", str(tmp_path / "home"))
    logs = []
    for out, start in (("one", run), ("two", lambda *command, **where: torchrun(2, *command, **where))):
        shutil.copytree(trained, tmp_path / out)
        (tmp_path / out / "mrar" / "log.jsonl").unlink()
        start(ROOT / "train.py", "--model", "transdiff", "--data", pictures, "--out", out, "--stage", "mrar", "--steps",
              2, "--lr", 1e-4, "--fresh", *SMALL, "--fid-every", 2, "--fid-samples", 9,
              *(["--accumulate", 2] if out == "one" else []), cwd=tmp_path)
        logs.append(log_of(tmp_path / out / "mrar")[-1])
    for name, value in logs[0].items():
        assert logs[1][name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name


@pytest.mark.parametrize("arguments,words", [
    (["--fid-every", "0"], "--fid-every is more than 0"), (["--fid-samples", "3"], "--fid-samples is 4 or more"),
    (["--fid-every", "1", "--fid-reference", "nowhere"], "nowhere: no such folder or file"),
    (["--fid-every", "1", "--fid-features", "inception"], "cannot download")])
def test_mistakes_in_evaluation_end_a_run_before_it_begins(trained, in_process, pictures, tmp_path, monkeypatch, capsys,
                                                           arguments, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    shutil.copytree(trained / "vae", tmp_path / "run" / "vae")
    said = refusal(in_process, capsys, train, "--model", "transdiff", "--data", pictures, "--out", tmp_path / "run",
                   "--stage", "1step", "--steps", 1, *SMALL, *arguments)
    assert words in said and not list((tmp_path / "run" / "1step").glob("*.pt"))


def test_a_sweep_compares_guidance(trained, in_process, pictures, tmp_path, monkeypatch, capsys):
    """One set for each scale, as --cfg makes it; a grid with a row for each; a table; and it goes on where it was."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "transdiff", "--run", trained, "--device", "cpu", "--n", 6]
    sweep = [*arguments, "--cfg-sweep", "1,2.5,1:4", "--fid-reference", pictures, "--out", "sweep"]
    in_process(sample, *sweep)
    said = capsys.readouterr().out
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert table in said and "6 images each" in said
    assert [line.split(" | ")[0] for line in table.splitlines()] == ["| cfg", "| ---", "| 1", "| 2.5", "| 1:4"]
    assert "FD-classifier | floor | accuracy | precision | recall" in table and "FID" not in table
    height, width = np.asarray(Image.open("sweep/sweep.png")).shape[:2]
    assert height == 2 + 3 * 66 and width > 6 * 66
    in_process(sample, *arguments, "--cfg", "1:4", "--out", "one.npz")
    one, swept = (np.load(file) for file in ("one.npz", "sweep/cfg-1-4.npz"))
    assert np.array_equal(one["arr_0"], swept["arr_0"]) and np.array_equal(one["arr_1"], swept["arr_1"])
    numbers = json.loads(Path("sweep/sweep.json").read_text())
    assert f"{numbers['2.5']['fd_classifier']:.4g}" in table

    Path("sweep/cfg-2.5.meta.json").write_text("{half")
    drawn, generate = [], transdiff.generate
    monkeypatch.setattr(transdiff, "generate", lambda *args, cfg, **options: drawn.append(cfg) or generate(
        *args, cfg=cfg, **options))
    in_process(sample, *sweep)
    assert drawn == [2.5] and (tmp_path / "sweep" / "sweep.md").read_text() == table
    shutil.copytree("sweep", "again")
    for file in Path("again").glob("cfg-*"):
        file.unlink()
    torchrun(2, ROOT / "sample.py", *sweep[:-1], "again", cwd=tmp_path)
    assert (tmp_path / "again" / "sweep.md").read_text() == table
    for wrong, words in ((["--cfg", 2], "goes without --cfg"), (["--out", "x.png"], "its --out is a folder")):
        assert words in refusal(in_process, capsys, sample, *sweep, *wrong)
    sweep.remove("--fid-reference")
    sweep.remove(pictures)
    assert "say with --fid-reference" in refusal(in_process, capsys, sample, *sweep)
    assert "belong to --cfg-sweep" in refusal(in_process, capsys, sample, *arguments, "--fid-features", "classifier")


# --- The house --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", train.MODELS)
def test_the_models_introduce_themselves(in_process, capsys, model):
    """Presets with their parameters, and a batch on its way to a finite loss."""
    in_process(train.MODELS[model])
    said = capsys.readouterr().out
    assert all(size in said for size in train.MODELS[model].PRESETS)
    assert re.search(r"loss: \{'loss': \d+\.\d", said)


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
    doors = {"common": set(), "transdiff": {"common"}, "dar": {"common"}, "madformer": {"common"},
             "fid": {"common"},
             "sample": {"common", "transdiff", "dar", "madformer", "fid"},
             "train": {"common", "transdiff", "dar", "madformer", "fid"}}
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
