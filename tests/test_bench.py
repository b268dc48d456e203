"""The samplers do the necessary work and no more, and the bench counts and measures it."""
import dataclasses
import json

import bench
import gpu
import pytest
import torch
from conftest import ROOT, run

import common
import dar
import madformer


def test_llama_runs_each_token_once():
    """An earlier token that runs again, or guidance that is paid although it is off, shows."""
    c = dataclasses.replace(dar.PRESETS["tiny"], cfg=(1.0, 1.0))
    model = dar.Llama(c)
    N = c.tokenizer.queries
    weights = sum(p.numel() for p in model.layers.parameters()) + model.output.weight.numel()
    attention = 2 * c.depth * N * c.dim
    noise = common.Noise(0, range(3))
    work = bench.counted(lambda: list(model.stream(torch.arange(3), noise)))
    assert work == pytest.approx(2 * 3 * N * (weights + attention), rel=0.01)


@pytest.mark.parametrize("name,saved", [("transdiff", 1.14), ("madformer", 2.37)])
def test_fast_samplers_save_work(name, saved):
    """The plain sampler's FLOPs over the fast one's. A saving that is lost makes it smaller."""
    model_file = common.load_model(name)
    config = dataclasses.replace(model_file.PRESETS["tiny"], steps=5)
    first_stage, model = [stage.build(config) for stage in model_file.STAGES[:2]]
    sampling = bench.Sampling(model_file, model, first_stage, common.launch("cpu"))
    plain = bench.counted(lambda: sampling.codes_plainly(1))
    fast = bench.counted(lambda: sampling.codes(1))
    assert plain / fast == pytest.approx(saved, rel=0.01)


def test_flex_attention_counts_what_its_mask_lets_through():
    """All pairs of rows would make a training step look faster than it is."""
    c = madformer.PRESETS["tiny"]
    model = madformer.MADFormer(c)
    clean, noisy = model.image_layout(madformer.CLEAN), model.image_layout(madformer.NOISE)
    layout = torch.cat([clean, noisy], 1)
    q = torch.zeros(2, 3, layout.shape[1], 64, requires_grad=True)

    def attend():
        madformer.masked_attention(layout, torch.zeros(1, 0), False, flex=True)(q, q, q)

    pairs = c.tokens**2 * c.ar_length * (c.ar_length + 1)  # clean blocks before each, and itself
    assert bench.counted(attend) == 7 * 2 * 2 * 3 * 64 * pairs


def test_the_real_command_measures_all(tmp_path):
    said = run(ROOT / "tests/bench.py", "--model", "dar", "--device", "cpu", "--batch", 2,
               "--train-batch", 2, "--repeats", 1, "--plain", "--set", "tokenizer.queries=8",
               cwd=tmp_path)
    found = json.loads(said.splitlines()[-1])
    rows = {row["what"]: row for row in found["rows"]}
    assert " ".join(rows) == ("encode reconstruct train tokenizer train ar sample ar codes ar"
                              " plain codes ar")
    for row in rows.values():
        assert row["tflops"] == pytest.approx(row["share"] * found["flops_per_s"] / 1e12)


@pytest.mark.parametrize("limit,mark,code", [(1.0, "ok", 0), (-1.0, "FAILED", 1)])
def test_gpu_script(in_process, monkeypatch, capsys, limit, mark, code):
    """A dry run: a check is a line, and one that fails makes the exit code 1."""
    monkeypatch.setattr(gpu, "TOLERANCES", {"fp32": {"loss": limit, "gradient": limit}})
    with pytest.raises(SystemExit) as end:
        in_process(gpu, "--device", "cpu", "--only", "agree dar tok")
    assert end.value.code == code
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{mark} agree dar tokenizer")
