"""The samplers do the work that the formulas in bench.py say, and no more; and the bench itself."""
import dataclasses
import json

import bench
import pytest
import torch
from conftest import ROOT, run

import common
import dar
import madformer
import transdiff


def frozen(module):
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("B,S", [(4, 10), (1, 3)])
def test_transdiff_does_what_is_necessary(B, S):
    """The plain sampler does what the released one does, the fast one what cannot be left out."""
    c = transdiff.PRESETS["tiny"]
    model, labels = frozen(transdiff.TransDiff(c)), torch.arange(B)
    D, L, M, z = c.dim, c.depth, c.features, c.vae.channels
    n, N = c.class_tokens + c.features, c.latent_size**2
    enc, cond = c.ar_depth * (24 * n * D**2 + 4 * n**2 * D), 2 * M * D**2 + 4 * L * M * D**2
    query = L * (28 * N * D**2 + 4 * N**2 * D + 4 * N * M * D) + 4 * z * N * D
    trunk, time = 2 * z * N * D + 10 * N * D**2 + 4 * N**2 * D, 2 * (256 * D + 7 * D**2)

    def work(sampler, **how):
        return bench.counted(lambda: sampler(labels, common.Noise.of(0, range(B)), cfg=1.5, steps=S, **how))
    plain = 2 * B * enc + S * 2 * B * (cond + query + time)
    assert work(model.sample_plainly, drift_scale=1, noise_scale=1) == pytest.approx(plain, rel=1e-6)
    fast = (B + 1) * enc + (B + 1) * cond + S * (2 * B * query - B * trunk + time)
    assert work(model.sample) == pytest.approx(fast, rel=0.02)


@pytest.mark.parametrize("cfg", [1.5, 1])
def test_dar_does_what_is_necessary(cfg):
    """Each token goes through the network once and looks at those before it."""
    c, B = dar.PRESETS["tiny"], 3
    model, N = frozen(dar.Llama(c)), c.tokenizer.queries
    W, D, L = bench.dar_sizes(c)
    assert sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name) == W
    rows = B * (2 if cfg != 1 else 1)
    work = bench.counted(lambda: model.sample(torch.arange(B), common.Noise.of(0, range(B)), cfg=cfg))
    assert work == rows * (2 * N * W + 2 * L * N * (N + 1) * D)


@pytest.mark.parametrize("T,D,S", [(16, 4, 10), (4, 4, 25), (4, 2, 3)])
def test_madformer_does_what_is_necessary(T, D, S):
    """Of the rows before a block nothing goes through the layers again at its steps."""
    c = dataclasses.replace(madformer.PRESETS["tiny"], ar_length=T, diffusion_depth=D, text=False)
    model, B, n, H = frozen(madformer.MADFormer(c)), 2, c.tokens, c.dim
    plane, t = torch.zeros(B, c.vae.channels, c.block, c.block), torch.zeros(1)
    e = model.down.time(t)
    rows, kept = model.down(plane, e)
    down, up = bench.counted(lambda: model.down(plane, e)), bench.counted(lambda: model.up(rows, e, kept))
    linear = B * 2 * n * (4 * H**2 + 3 * H * c.mlp)
    keys_values, necessary = B * 4 * n * H**2, 0
    for j in range(T):
        layer, before = linear + B * 4 * n * n * (j + 1) * H, linear + B * 4 * n * n * j * H
        necessary += (c.depth - D) * layer + S * (down + up + D * layer)
        necessary += (down + (c.depth - 1) * before + keys_values) if j else 0  # the last layer: keys and values
    work = bench.counted(lambda: model.sample(torch.arange(B), common.Noise.of(0, range(B)), steps=S))
    assert work == pytest.approx(necessary, rel=0.02)


def test_the_bench_by_the_real_command(tmp_path):
    said = run(ROOT / "tests" / "bench.py", "--model", "dar", "--device", "cpu", "--batch", 2, "--train-batch", 2,
               "--repeats", 1, cwd=tmp_path)
    found = json.loads(said.splitlines()[-1])
    rows = {(row["what"].strip(), row["batch"]): row for row in found["rows"]}
    assert {("train tokenizer", 2), ("train ar", 2), ("sample", 1), ("sample", 2), ("encode", 2)} <= rows.keys()
    assert rows["sample", 1]["gflop_per_image"] == pytest.approx(rows["sample", 2]["gflop_per_image"], rel=0.01)
    for row in found["rows"]:
        assert row["least"] <= row["seconds"] <= row["most"]
        assert row["tflops"] == pytest.approx(row["share"] * found["flops_per_s"] / 1e12)
