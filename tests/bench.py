"""Measure the models on this machine: training, sampling and the first stage against its ceilings.

    python tests/bench.py --model transdiff                    # a table; the last line is JSON
    python tests/bench.py --model dar --size l --batch 64 --train-batch 32 --compile
    python tests/bench.py --model transdiff --only sample --plain
    python tests/bench.py --model dar --only sample --set cfg=1,1
    python tests/bench.py --model images                       # reading JPEGs, on one core

Weights and images are random; bf16 autocast on CUDA, float32 elsewhere. D-AR's tokenizer is trained
without its perceptual losses. A row gives the median of the repeats, after a warm-up, and their
range. FLOPs are counted in a call that is not compiled: 2 for each multiply-add of matrix products,
convolutions and attention, none for norms and activations. Attention counts all pairs of queries
and keys, FlexAttention (MADFormer in training on CUDA) the pairs that its mask lets through.
"share" is FLOP/s over that of a large matrix product in the same precision, GB the peak memory on
CUDA. "codes" are the latents or tokens alone, before the first stage decodes them.
"""
import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plain  # noqa: E402

import common  # noqa: E402
import madformer  # noqa: E402
import train  # noqa: E402

for name in ("", "_backward"):  # torch's counter knows this attention on CUDA only
    on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")
    on_cuda = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{name}")
    flop_registry[on_cpu] = flop_registry[on_cuda]


def arguments():
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="transdiff", choices=("transdiff", "dar", "madformer", "images"))
    add("--size", default="tiny", help="preset of the model file (default: tiny)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--batch", type=common.positive, default=8,
        help="images of sampling, besides 1, and of the first stage (default: 8)")
    add("--train-batch", type=common.positive, default=8, help="samples of a training step")
    add("--only", nargs="+", default=["first", "train", "sample"],
        choices=("first", "train", "sample"), help="encode and decode, train, sample")
    add("--plain", action="store_true", help="also measure the plain samplers of tests/plain.py")
    add("--compile", action="store_true", help="compile what is trained, and samplers' inner steps")
    add("--repeats", type=common.positive, default=5)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the Config")
    return parser.parse_args()


# --- Time, work and ceilings ----------------------------------------------------------------------

def measured(call, repeats, device=torch.device("cpu")):
    """Return the seconds that each of the repeats takes, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


class CountedAttention:
    """Replaces FlexAttention while FLOPs are counted: adds its inputs, and counts visible pairs.

    FlexAttention itself computes all pairs at once unless it is compiled, which takes too much
    memory at the papers' sizes.
    """

    def __init__(self):
        self.flops = 0

    def __call__(self, q, k, v, block_mask):                       # (B, heads, m, C) each
        B, heads, m, channels = q.shape
        at = torch.arange(m, device=q.device)
        image = torch.arange(block_mask.shape[0], device=q.device).view(-1, 1, 1, 1)
        visible = block_mask.mask_mod(image, 0, at[:, None], at).expand(B, 1, m, m)
        products = 7 if q.requires_grad else 2  # backward: the scores again, and four gradients
        self.flops += products * 2 * heads * channels * visible.sum().item()
        return q + k + v


def counted(call):
    """Return the FLOPs of a call."""
    flex = CountedAttention()
    with (FlopCounterMode(display=False) as counter,
          mock.patch.object(madformer, "compiled_flex_attention", return_value=flex)):
        call()
    return counter.get_total_flops() + flex.flops


def ceilings(device, dtype):
    """Return the FLOP/s of a large matrix product and the bytes/s of a large copy, best of five."""
    is_large = device.type == "cuda"
    n = 8192 if is_large else 1536
    matrix = torch.randn(n, n, device=device).to(dtype)
    source = torch.zeros(2**30 if is_large else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = measured(partial(torch.mm, matrix, matrix), 5, device)
    copy = measured(partial(target.copy_, source), 5, device)
    return 2 * n**3 / min(product), 2 * len(source) / min(copy)


class Table:
    """Measures calls against the machine's ceilings, and prints a row for each."""

    def __init__(self, args, process):
        self.process = process
        self.repeats = args.repeats
        self.rows = []
        device = process.device
        dtype = torch.bfloat16 if process.precision == "bf16" else torch.float32
        flops, bandwidth = ceilings(device, dtype)
        self.about = {
            "model": args.model, "size": args.size, "set": args.set, "compile": args.compile,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": process.precision, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "flops_per_s": flops, "bytes_per_s": bandwidth}
        print(f"{' '.join([args.model, args.size, *args.set])}, {self.about['device']},"
              f" {process.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"large product {flops / 1e12:.3g} TFLOP/s, large copy {bandwidth / 1e9:.3g} GB/s")
        print(f"{'':21s} {'images':>6s} {'seconds: median (range)':>26s} {'images/s':>9s}"
              f" {'GFLOP/image':>11s} {'TFLOP/s':>8s} {'share':>6s} {'GB':>5s}")

    def add(self, what, images, call, work, baseline=None, moved=0):
        """Measure a call that makes or takes so many images, and return its row.

        work: its FLOPs. baseline: a row to compare its time with. moved: the bytes that it reads.
        """
        device = self.process.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = measured(call, self.repeats, device)
        seconds = statistics.median(times)
        row = {
            "what": what, "images": images, "seconds": seconds, "least": min(times),
            "most": max(times), "images_per_s": images / seconds,
            "gflop_per_image": work / images / 1e9, "tflops": work / seconds / 1e12,
            "share": work / seconds / self.about["flops_per_s"],
            "memory_gb": train.peak_memory(device)}
        note = ""
        if baseline:
            row["ratio"] = seconds / baseline["seconds"]
            note = f"{row['ratio']:.3g} x {baseline['what']}"
        if moved:
            row["bandwidth_share"] = moved / seconds / self.about["bytes_per_s"]
            note = f"{row['bandwidth_share']:.1%} of the copy's rate"
        span = f"{seconds:.4f} ({min(times):.4f} - {max(times):.4f})"
        print(f"{what:21s} {images:6d} {span:>26s} {row['images_per_s']:9.2f}"
              f" {row['gflop_per_image']:11.3g} {row['tflops']:8.3g} {row['share']:6.1%}"
              f" {row['memory_gb']:5.2f}  {note}", flush=True)
        self.rows.append(row)
        return row


# --- What is measured -----------------------------------------------------------------------------

def make_config(args, model_file, stage):
    """Return the Config of a stage, with class names, which MADFormer's text tower reads."""
    config = common.override(stage.adapt(model_file.PRESETS[args.size]), args.set)
    names = tuple(f"name {k}" for k in range(config.classes))
    return dataclasses.replace(config, class_names=names)


def frozen(module, process):
    """Return a module on the device, ready to sample, as sample.py prepares it."""
    on_cuda = process.device.type == "cuda"
    layout = torch.channels_last if on_cuda else torch.contiguous_format
    return module.to(process.device, memory_format=layout).eval().requires_grad_(False)


def random_images(n, config, process):
    """Return images (n, 3, h, w) in -1 .. 1."""
    return torch.rand(n, 3, config.image_size, config.image_size, device=process.device) * 2 - 1


def bench_first_stage(args, table, config, first_stage):
    """Measure encoding and decoding."""
    images = random_images(args.batch, config, table.process)
    codes = first_stage.codes(first_stage.encode(images))
    inputs = [codes]
    if not codes.is_floating_point():  # a diffusion starts from noise
        inputs.append(torch.randn_like(images))
    encode = partial(first_stage.encode, images)
    decode = partial(first_stage.decode, *inputs)
    table.add("encode", args.batch, encode, counted(encode))
    table.add("decode", args.batch, decode, counted(decode))


def bench_training(args, table, model_file, stage, first_stage):
    """Measure a whole optimizer step of a stage."""
    process = table.process
    config = make_config(args, model_file, stage)
    recipe = stage.recipes[args.size]
    network = stage.build(config).to(process.device).train()
    optimizer = train.adamw(network, recipe, process.device)
    group = getattr(config, "images_per_sample", 1)
    labels = torch.arange(args.train_batch, device=process.device) % config.classes
    batch = random_images(args.train_batch * group, config, process)
    if stage.first_stage:
        with torch.no_grad():
            batch = first_stage.codes(first_stage.encode(batch))
    if group > 1:
        batch = batch.unflatten(0, (-1, group))

    def step():
        with process.autocast():
            loss = network(batch, labels)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    work = counted(step)
    if args.compile:
        network.compile()
    table.add(f"train {stage.name}", args.train_batch * group, step, work)


class RecordingNoise(common.Noise):
    """Noise that remembers what was drawn from it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.draws = []

    def draw(self, function, shape):
        """Return one draw of each generator."""
        self.draws.append((function, shape))
        return super().draw(function, shape)


def transdiff_sample(model, labels, noise):
    """Call the plain sampler of TransDiff with the options of the model's config."""
    c = model.config
    plain.transdiff_sample(model, labels, noise, cfg=c.cfg, steps=c.steps,
                           drift_scale=c.drift_scale, noise_scale=c.noise_scale)


PLAIN = {"transdiff": transdiff_sample, "dar": plain.llama_sample,
         "madformer": plain.madformer_sample}


class Sampling:
    """A stage with random weights, and the ways to sample n images from it, or parts of that."""

    def __init__(self, model_file, stage, config, first_stage, process):
        self.model_file = model_file
        self.first_stage = first_stage
        self.device = process.device
        self.model = frozen(stage.build(config), process)
        if process.precision == "bf16":
            for part in self.model.modules():  # as in sample.py
                if isinstance(part, nn.Linear):
                    part.bfloat16()
        recorded = RecordingNoise(0, [0], self.device)
        model_file.generate(self.model, first_stage, self.labels(1), recorded)
        self.draws = recorded.draws

    def labels(self, n):
        """Return labels (n,)."""
        return torch.arange(n, device=self.device) % self.model.config.classes

    def noise(self, n):
        """Return the noise of n images."""
        return common.Noise(0, range(n), self.device)

    def images(self, n):
        """Sample images."""
        self.model_file.generate(self.model, self.first_stage, self.labels(n), self.noise(n))

    def draw_noise(self, n):
        """Draw the noise of images, and nothing else."""
        noise = self.noise(n)
        for function, shape in self.draws:
            noise.draw(function, shape)

    def codes(self, n):
        """Sample latents or tokens, without the first stage."""
        if hasattr(self.model, "stream"):
            list(self.model.stream(self.labels(n), self.noise(n)))
        else:
            self.model.sample(self.labels(n), self.noise(n))

    def codes_plainly(self, n):
        """Sample latents or tokens by the plain sampler."""
        PLAIN[self.model_file.__name__](self.model, self.labels(n), self.noise(n))

    def bytes_read(self, n):
        """Return the bytes that D-AR's tokens need: for each, all weights and the whole cache."""
        if not hasattr(self.model, "stream"):
            return 0
        c = self.model.config
        N = c.tokenizer.queries
        rows = n if set(c.cfg) == {1} else 2 * n
        output = self.model.output.weight
        weights = sum(p.numel() for p in self.model.layers.parameters()) + output.numel()
        cache = 2 * c.depth * rows * N * c.dim
        return N * (weights + cache) * output.element_size()


def bench_sampling(args, table, stage, sampling):
    """Measure sampling of one image and of a batch: all of it, its noise, the codes without the
    first stage and, with --plain, the plain sampler beside that."""
    work = counted(partial(sampling.images, 1))  # before anything is compiled
    codes_work = counted(partial(sampling.codes, 1))
    plain_work = counted(partial(sampling.codes_plainly, 1)) if args.plain else 0
    if args.compile:
        sampling.model_file.compile_steps(sampling.model, sampling.first_stage)
    for n in sorted({1, args.batch}):
        torch.compiler.reset()  # else the second size would be compiled for all sizes
        whole = table.add(f"sample {stage.name}", n, partial(sampling.images, n), n * work)
        table.add(f"noise {stage.name}", n, partial(sampling.draw_noise, n), 0, baseline=whole)
        codes = table.add(f"codes {stage.name}", n, partial(sampling.codes, n), n * codes_work,
                          moved=sampling.bytes_read(n))
        if args.plain:
            table.add(f"plain codes {stage.name}", n, partial(sampling.codes_plainly, n),
                      n * plain_work, baseline=codes)


def read_fully(path, size):
    """Read a picture as common.load_picture does, but decode it at full size."""
    return common.from_pil(common.centre_crop(common.open_picture(path), size))


def bench_images(args):
    """Measure how fast JPEGs become pictures of 256 pixels: decoded at a reduced scale, as folders
    are read, and at full size."""
    rows = []
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for size in ((500, 375), (1024, 1024), (2048, 1536), (4096, 3072)):
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        grain = Image.effect_noise(size, 64).convert("RGB")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "picture.jpg")
            Image.blend(picture, grain, 0.1).save(path, quality=90)
            reduced = measured(partial(common.load_picture, path, 256), args.repeats)
            fully = measured(partial(read_fully, path, 256), args.repeats)
        rates = [1 / statistics.median(times) for times in (reduced, fully)]
        print(f"{size[0]} x {size[1]}: {rates[0]:.1f} images/s, at full size {rates[1]:.1f}")
        rows.append({"size": size, "images_per_s": rates[0], "at_full_size": rates[1]})
    print(json.dumps({"rows": rows}))


def main():
    """Measure what the command line asks for."""
    args = arguments()
    process = common.launch(args.device)
    if args.model == "images":
        bench_images(args)
        return
    model_file = common.load_model(args.model)
    table = Table(args, process)
    source = next(stage for stage in model_file.STAGES if stage.load)
    config = make_config(args, model_file, source)
    first_stage = frozen(source.build(config), process)
    stages = [stage for stage in model_file.STAGES if args.size in stage.recipes]
    if "first" in args.only:
        with torch.no_grad(), process.autocast():
            bench_first_stage(args, table, config, first_stage)
    for stage in stages if "train" in args.only else ():
        bench_training(args, table, model_file, stage, first_stage)
    for stage in stages if "sample" in args.only else ():
        if stage.first_stage:
            config = make_config(args, model_file, stage)
            with torch.no_grad(), process.autocast():
                sampling = Sampling(model_file, stage, config, first_stage, process)
                bench_sampling(args, table, stage, sampling)
    print(json.dumps({**table.about, "rows": table.rows}))


if __name__ == "__main__":
    common.run_script(main)
