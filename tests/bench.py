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
    add("--only", nargs="+", default=list(MEASURES), choices=MEASURES,
        help="encode and decode, train, sample")
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
        self.rows = []
        device = process.device
        dtype = torch.bfloat16 if process.precision == "bf16" else torch.float32
        flops, bandwidth = ceilings(device, dtype)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.about = {**vars(args), "device": name, "precision": process.precision,
                      "threads": torch.get_num_threads(), "torch": str(torch.__version__),
                      "flops_per_s": flops, "bytes_per_s": bandwidth}
        print(f"{args.model} {args.size} {' '.join(args.set)} on {name}: large product"
              f" {flops / 1e12:.3g} TFLOP/s, large copy {bandwidth / 1e9:.3g} GB/s")
        print(f"{'':21s} {'images':>6s} {'seconds: median (range)':>26s} {'images/s':>9s}"
              f" {'GFLOP/image':>11s} {'TFLOP/s':>8s} {'share':>6s} {'GB':>5s}")

    def add(self, what, images, call, work, baseline=None, moved=0):
        """Measure a call that makes or takes so many images, and return its row.

        work: its FLOPs. baseline: a row to compare its time with. moved: the bytes that it reads.
        """
        device = self.process.device
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        times = measured(call, self.about["repeats"], device)
        seconds = statistics.median(times)
        rate = work / seconds
        row = {"what": what, "images": images, "seconds": seconds, "gflop": work / 1e9,
               "tflops": rate / 1e12, "share": rate / self.about["flops_per_s"],
               "memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        note = ""
        if baseline:
            note = f"{seconds / baseline['seconds']:.3g} x {baseline['what']}"
        if moved:
            row["bandwidth_share"] = moved / seconds / self.about["bytes_per_s"]
            note += f", {row['bandwidth_share']:.1%} of the copy's rate"
        span = f"{seconds:.4f} ({min(times):.4f} - {max(times):.4f})"
        print(f"{what:21s} {images:6d} {span:>26s} {images / seconds:9.2f}"
              f" {row['gflop'] / images:11.3g} {row['tflops']:8.3g} {row['share']:6.1%}"
              f" {row['memory_gb']:5.2f}  {note}", flush=True)
        self.rows.append(row)
        return row


# --- What is measured -----------------------------------------------------------------------------

def make_config(args, model_file, stage):
    """Return the Config of a stage, with class names, which MADFormer's text tower reads."""
    config = common.override(stage.adapt(model_file.PRESETS[args.size]), args.set)
    names = tuple(f"name {k}" for k in range(config.classes))
    return dataclasses.replace(config, class_names=names)


def frozen(module, device):
    """Return a module on the device, ready to sample, as sample.py prepares it."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return module.to(device, memory_format=layout).eval().requires_grad_(False)


def training_batch(n, stage, config, first_stage, device):
    """Return a batch of n samples, from random images in -1 .. 1, and labels (n,)."""
    group = getattr(config, "images_per_sample", 1)
    shape = (n * group, 3, config.image_size, config.image_size)
    batch = torch.rand(shape, device=device) * 2 - 1
    if stage.first_stage:
        with torch.no_grad():
            batch = first_stage.codes(first_stage.encode(batch))
    batch = batch.unflatten(0, (n, group)).squeeze(1)
    return batch, torch.arange(n, device=device) % config.classes


def bench_first_stage(args, table, model_file, stage, first_stage):
    """Measure encoding, and encoding with decoding."""
    process = table.process
    config = make_config(args, model_file, stage)
    images, _ = training_batch(args.batch, stage, config, first_stage, process.device)
    noise = common.Noise(0, range(args.batch), process.device)
    calls = {"encode": partial(first_stage.encode, images),
             "reconstruct": partial(first_stage.reconstruct, images, noise)}
    with torch.no_grad(), process.autocast():
        for name, call in calls.items():
            table.add(name, args.batch, call, counted(call))


def bench_training(args, table, model_file, stage, first_stage):
    """Measure a whole optimizer step of a stage."""
    process = table.process
    config = make_config(args, model_file, stage)
    recipe = stage.recipes[args.size]
    network = stage.build(config).to(process.device).train()
    optimizer = train.make_optimizer(network, recipe)
    batch, labels = training_batch(args.train_batch, stage, config, first_stage, process.device)

    def step():
        with process.autocast():
            loss = network(batch, labels)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()

    work = counted(step)
    if args.compile:
        train.compile_blocks(network)
    images = args.train_batch * getattr(config, "images_per_sample", 1)
    table.add(f"train {stage.name}", images, step, work)


PLAIN = {"transdiff": plain.transdiff_sample, "dar": plain.llama_sample,
         "madformer": plain.madformer_sample}


class Sampling:
    """A model, and the ways to sample n images from it, or parts of that."""

    def __init__(self, model_file, model, first_stage, process):
        self.model_file = model_file
        self.first_stage = first_stage
        self.device = process.device
        self.model = frozen(model, process.device)
        if process.precision == "bf16":
            common.cast_once(self.model, *first_stage.sampled())  # as in sample.py

    def inputs(self, n):
        """Return labels (n,) and the noise of n images."""
        labels = torch.arange(n, device=self.device) % self.model.config.classes
        return labels, common.Noise(0, range(n), self.device)

    def images(self, n):
        """Sample images."""
        return self.model_file.generate(self.model, self.first_stage, *self.inputs(n))[0]

    def codes(self, n):
        """Sample latents or tokens, without the first stage."""
        if hasattr(self.model, "stream"):
            list(self.model.stream(*self.inputs(n)))
        else:
            self.model.sample(*self.inputs(n))

    def codes_plainly(self, n):
        """Sample latents or tokens by the plain sampler."""
        PLAIN[self.model_file.__name__](self.model, *self.inputs(n))

    def bytes_read(self, n):
        """Return the bytes that D-AR's tokens need: for each, all weights and the whole cache."""
        if not hasattr(self.model, "stream"):
            return 0
        c = self.model.config
        N = c.tokenizer.queries
        rows = n if set(c.cfg) == {1} else 2 * n
        weights = [*self.model.layers.parameters(), self.model.output.weight]
        cache = 2 * c.depth * rows * N * c.dim
        return N * (sum(w.numel() for w in weights) + cache) * weights[-1].element_size()


def bench_sampling(args, table, model_file, stage, first_stage):
    """Measure sampling of one image and of a batch: all of it, the codes without the first stage
    and, with --plain, the plain sampler beside that."""
    model = stage.build(make_config(args, model_file, stage))
    with torch.no_grad(), table.process.autocast():
        sampling = Sampling(model_file, model, first_stage, table.process)
        ways = {"sample": sampling.images, "codes": sampling.codes}
        if args.plain:
            ways["plain codes"] = sampling.codes_plainly
        work = {name: counted(partial(way, 1)) for name, way in ways.items()}
        if args.compile:
            model_file.compile_steps(sampling.model, first_stage)
        for n in sorted({1, args.batch}):
            torch.compiler.reset()  # else the second size would be compiled for all sizes
            row = None
            for name, way in ways.items():
                moved = sampling.bytes_read(n) if name == "codes" else 0
                row = table.add(f"{name} {stage.name}", n, partial(way, n), n * work[name],
                                baseline=row, moved=moved)


MEASURES = {"first": bench_first_stage, "train": bench_training, "sample": bench_sampling}


def parts(args, table):
    """Yield the name of each thing to measure, and the function that measures it."""
    model_file = common.load_model(args.model)
    source = next(stage for stage in model_file.STAGES if stage.load)
    first_stage = source.build(make_config(args, model_file, source))
    first_stage = frozen(first_stage, table.process.device)
    for part in args.only:
        for stage in model_file.STAGES:
            trained = args.size in stage.recipes
            applies = {"first": stage.load, "train": trained,
                       "sample": trained and stage.first_stage}
            if applies[part]:
                job = (args, table, model_file, stage, first_stage)
                yield f"{part} {stage.name}", partial(MEASURES[part], *job)


def read_fully(path, size):
    """Read a picture as common.load_picture does, but decode it at full size."""
    return common.from_pil(common.centre_crop(common.open_picture(path), size))


def bench_images(args):
    """Measure how fast JPEGs become pictures of 256 pixels: decoded at a reduced scale, as folders
    are read, and at full size."""
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for size in ((500, 375), (1024, 1024), (2048, 1536), (4096, 3072)):
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        grain = Image.effect_noise(size, 64).convert("RGB")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "picture.jpg")
            Image.blend(picture, grain, 0.1).save(path, quality=90)
            for read in (common.load_picture, read_fully):
                seconds = statistics.median(measured(partial(read, path, 256), args.repeats))
                print(f"{size[0]} x {size[1]}, {read.__name__}: {1 / seconds:.1f} images/s")


def main():
    """Measure what the command line asks for."""
    args = arguments()
    process = common.launch(args.device)
    if args.model == "images":
        return bench_images(args)
    table = Table(args, process)
    for _, measure in parts(args, table):
        measure()
    print(json.dumps({**table.about, "rows": table.rows}))


if __name__ == "__main__":
    common.run_script(main)
