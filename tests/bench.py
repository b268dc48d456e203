"""What a machine makes of the models: its own ceilings, then training, sampling and the first stage against them.

    python tests/bench.py --model transdiff                              # a table; the last line is the same as JSON
    python tests/bench.py --model dar --size l --device cuda --batch 64
    python tests/bench.py --model transdiff --compare plain              # the fast paths against the plain ones
    python tests/bench.py --model madformer --grow ar_length=1,4,16      # how cost grows: a process for each value
    python tests/bench.py --model fid                                    # features, and the trace term of a distance
    python tests/bench.py --model images                                 # decoding JPEGs

Random weights and images; bf16 autocast on CUDA, float32 elsewhere. A row gives the median of the repeats after a
warm-up, with its range. Work is counted while it runs: 2 for each multiply-add of matrix products, convolutions and
attention; norms and activations count nothing. On the machine's side stand the rate of a large matrix product and of a
large copy. By formula, for batch b, S steps, width D, with guidance (tests/test_bench.py checks
that the samplers do this work and no more):

    TransDiff   (b + 1) enc + (b + 1) cond + S (2 b query - b trunk + time), with n AR and N latent tokens, M features,
                enc = Le (24 n D^2 + 4 n^2 D), cond = 2 M D^2 + 4 L M D^2, query = L (28 N D^2 + 4 N^2 D + 4 N M D)
                + 4 z N D, trunk = 2 z N D + 10 N D^2 + 4 N^2 D, time = 2 (256 D + 7 D^2)
    D-AR        2 b (2 N W + 2 L N (N + 1) D), W = L (4 D^2 + 3 D F) + V D; bytes: the weights for every token, N W e,
                and keys and values, 2 b L 2 D (N (N + 1) / 2 + N) e, with e bytes a number
    MADFormer   without text and guidance, for each of T blocks of n tokens (j = 0 .. T - 1) and N layers, D of them
                denoising: once AR (N - D layers) and, from the second on, the clean rows before it (down + N layers);
                S times down + up + D layers; layer = 2 n (4 H^2 + 3 H F) + 4 n n (j + 1) H
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import dar  # noqa: E402
import fid  # noqa: E402
import madformer  # noqa: E402
import train  # noqa: E402
import transdiff  # noqa: E402


def measured(calls, repeats, device):
    """Seconds of each call, `repeats` times in turn, after one run of each to warm up; and what they gave."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        results = []
        for call, taken in zip(calls, times, strict=True):
            begun = time.perf_counter()
            results.append(call())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                taken.append(time.perf_counter() - begun)
    return times, results


def show(times):
    """Median and range."""
    return f"{statistics.median(times):.3f} ({min(times):.3f} - {max(times):.3f})"


def ratio(a, b):
    """Of the medians."""
    return f"{statistics.median(a) / statistics.median(b):.2f} x"


def attention_flops(q, k, v, dropout=0.0, causal=False, *args, **kwargs):
    """Of one call of CPU attention, by the shapes (B, H, n, C): what torch's counter does not know."""
    pairs = q[2] * (q[2] + 1) // 2 if causal else q[2] * k[2]
    return 2 * q[0] * q[1] * pairs * (q[3] + v[3])


def counted(call):
    """FLOPs of a call."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={cpu: attention_flops}) as counter:
        call()
    return counter.get_total_flops()


def ceilings(device, dtype):
    """(FLOP/s of a large matrix product in this type, bytes/s of a large copy), best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (product, copy), _ = measured([lambda: a @ b, lambda: target.copy_(source)], 5, device)
    return 2 * n**3 / min(product), 2 * len(source) / min(copy)


# --- The table --------------------------------------------------------------------------------------------------------

def setting(args):
    """The model's module, its configuration, its last stage at this size, and the first stage of that one."""
    module = MODELS[args.model]
    config = module.PRESETS[args.size]
    if hasattr(config, "texts"):
        config = dataclasses.replace(config, texts=tuple(f"name {k}" for k in range(config.classes)))
    stages = {stage.name: stage for stage in module.STAGES}
    last = next(stage for stage in reversed(module.STAGES) if args.size in stage.recipes)
    config = common.override(config, args.set)
    first = stages[last.first].build(config).to(args.device).eval().requires_grad_(False)
    return module, config, last, first


def bench(args, device):
    """Training of each stage, sampling at batch 1 and at the batch, and the first stage; the ceilings come last, for
    their memory would hide that of the models."""
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    module, config, last, first = setting(args)
    rows = []

    def row(what, batch, images, call, **more):
        """Measures a call that makes or takes `images` images. work: its FLOPs, if they are known."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            work = more.pop("work") if "work" in more else counted(call)
            (times,), _ = measured([call], args.repeats, device)
        rows.append({"what": what, "batch": batch, "seconds": statistics.median(times), "least": min(times),
                     "most": max(times), "images_per_s": images / statistics.median(times),
                     "gflop_per_image": work / images / 1e9, "tflops": work / statistics.median(times) / 1e12,
                     "memory_gb": train.memory(device), **more})
        return rows[-1]

    for stage in module.STAGES if "train" in args.only else ():
        if args.size in stage.recipes:
            train_row(args, stage, stage.config(config), first, device, row)
    config = last.config(config)
    model = last.build(config).to(device).eval().requires_grad_(False)
    if precision == torch.bfloat16:
        for linear in (part for part in model.modules() if isinstance(part, torch.nn.Linear)):
            linear.bfloat16()  # as sample.py does it
    how = {name: value for name, value in (("steps", args.steps), ("cfg", args.cfg)) if value}
    batches, work, draws = dict.fromkeys((1, args.batch)) if "sample" in args.only else (), {}, []
    cfg = args.cfg or getattr(config, "cfg", 1.0)

    def noise(batch):
        return common.Noise.of(0, range(batch), device)

    def generate(batch):
        return module.generate(model, first, torch.arange(batch, device=device) % config.classes, noise(batch), **how)

    def tokens(batch):
        return model.sample(torch.arange(batch, device=device) % config.classes, noise(batch), cfg=cfg)

    def all_draws(batch):
        stream = noise(batch)
        for name, shape in draws:
            getattr(stream, name)(shape)

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        for batch in batches:  # before anything is compiled: the counter does not look into that
            work[batch] = counted(lambda: generate(batch)), counted(lambda: tokens(batch)) if args.model == "dar" else 0
        watched = noise(1)
        for name in ("normal", "uniform"):
            setattr(watched, name, lambda shape, name=name, draw=getattr(watched, name): draws.append((name, shape))
                    or draw(shape))
        module.generate(model, first, torch.zeros(1, dtype=torch.long, device=device), watched, **how)
    if args.compile:
        module.compile_steps(model, first)
    for batch in batches:
        with torch.no_grad():
            whole = row("sample", batch, batch, lambda: generate(batch), work=work[batch][0])
            part = row("  its noise", batch, batch, lambda: all_draws(batch), work=0)
            part["note"] = f"{100 * part['seconds'] / whole['seconds']:.1f} % of sampling"
            if args.model == "dar":
                N, (W, D, L) = first.config.queries, dar_sizes(config)
                moved = precision.itemsize * (N * W + (1 + (cfg != 1)) * batch * L * 2 * D * (N * (N + 1) // 2 + N))
                found = row("  tokens alone", batch, batch, lambda: tokens(batch), work=work[batch][1], bytes=moved)
                found["tokens_per_s"] = batch * N / found["seconds"]
    if "first" in args.only:
        images = torch.rand(args.batch, 3, config.image_size, config.image_size, device=device) * 2 - 1
        with torch.no_grad():
            codes = first.encode(images)
            row("encode", args.batch, args.batch, lambda: first.encode(images))
            decode = ((lambda: first.decode(codes, images)) if args.model == "dar" else
                      (lambda: first.decode(codes.chunk(2, 1)[0])))
            row("decode", args.batch, args.batch, decode)

    rate, bandwidth = ceilings(device, precision)
    print(f"{' '.join([args.model, args.size, *args.set])}, {device}, {str(precision)[6:]}, {torch.get_num_threads()}"
          f" threads, torch {torch.__version__}; a large product {rate / 1e12:.3g} TFLOP/s, a large copy"
          f" {bandwidth / 1e9:.3g} GB/s\n{'':20s} {'batch':>5s} {'seconds: median (range)':>25s} {'images/s':>9s}"
          f" {'GFLOP/image':>11s} {'TFLOP/s':>8s} {'share':>6s} {'GB':>5s}")
    for r in rows:
        r["share"] = r["tflops"] * 1e12 / rate
        if "bytes" in r:
            r["bandwidth_share"] = r["bytes"] / r["seconds"] / bandwidth
            r["note"] = f"{r['tokens_per_s']:.0f} tokens/s, {100 * r['bandwidth_share']:.0f} % of the copy's rate"
        if "data_s" in r:
            r["note"] = f"loading {100 * r['data_s'] / r['seconds']:.1f} % of the step"
        print(f"{r['what']:20s} {r['batch']:5d} {show([r['seconds'], r['least'], r['most']]):>25s}"
              f" {r['images_per_s']:9.2f} {r['gflop_per_image']:11.3g} {r['tflops']:8.3g} {100 * r['share']:5.1f}%"
              f" {r['memory_gb']:5.2f}  {r.get('note', '')}".rstrip())
    print(json.dumps({"model": args.model, "size": args.size, "set": args.set, "device": str(device),
                      "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                      "torch": str(torch.__version__), "threads": torch.get_num_threads(), "flops_per_s": rate,
                      "bytes_per_s": bandwidth, "rows": rows}))


def dar_sizes(config):
    """Weights read for a token, width and depth of a Llama."""
    D, L, V = config.dim, config.depth, config.tokenizer.codebook
    F = -(-int(2 * 4 * D / 3) // 256) * 256
    return L * (4 * D * D + 3 * D * F) + V * D, D, L


def train_row(args, stage, config, first, device, row):
    """A whole optimizer step of a stage, and the time to load its batch (from cached codes where it eats codes)."""
    recipe, group, batch = stage.recipes[args.size], stage.group(config), args.train_batch
    torch.manual_seed(0)
    model = stage.build(config).to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and stage.trains(config, name))
    optimizer = train.adamw(model, stage, recipe, device)
    labels = torch.arange(batch, device=device) % config.classes
    images = torch.rand(batch * group, 3, config.image_size, config.image_size, device=device) * 2 - 1
    with torch.no_grad():
        stored = first.encode(images) if stage.first else images
        x = stage.codes(first, stored) if stage.first else images
    x = x.unflatten(0, (batch, group)) if group > 1 else x

    def step():
        model(x, labels)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        work = counted(step)
    if args.recompute:
        train.recompute(model)
    if args.compile:
        model.compile()
    found = row(f"train {stage.name}", batch, batch * group, step, work=work)
    if not stage.first:
        return
    with tempfile.TemporaryDirectory() as folder:  # as train.py reads a cache
        codes = stored.cpu().numpy()
        array = np.lib.format.open_memmap(Path(folder, "rows.npy"), "w+", codes.dtype, (1024, 2, *codes.shape[1:]))
        array[:] = codes[0]
        source = common.Stored(array, np.arange(1024) % config.classes)
        order = common.Order(source.labels, batch, group)
        batches = iter(torch.utils.data.DataLoader(source, batch_sampler=(order(k) for k in itertools.count())))
        (times,), _ = measured([lambda: next(batches)], 5 * args.repeats, torch.device("cpu"))
    found["data_s"] = statistics.median(times)


def grow(args):
    """--grow FIELD=A,B,...: sampling at each value in a process of its own, and the exponent from one to the next."""
    field, _, values = args.grow.partition("=")
    print(f"{' '.join([args.model, args.size, *args.set])}, sampling, {args.device}, batch {args.batch}, or as said\n"
          f"{field:>12s} {'s/image':>9s} {'exponent':>9s} {'GFLOP/image':>12s} {'exponent':>9s} {'memory GB':>10s}")
    before = None
    for value in values.split(","):
        own = {"batch": ["--batch", value], "size": ["--size", value], "steps": ["--steps", value]}
        command = [sys.executable, __file__, "--model", args.model, "--device", args.device, "--only", "sample",
                   "--size", args.size, "--batch", str(args.batch), "--repeats", str(args.repeats), "--set", *args.set,
                   *([] if field in own else [f"{field}={value}"]), *own.get(field, [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{value}: {done.stderr.strip().splitlines()[-1]}")
        rows = [found for found in json.loads(done.stdout.splitlines()[-1])["rows"] if found["what"] == "sample"]
        now = (value, 1 / rows[-1]["images_per_s"], rows[-1]["gflop_per_image"])
        exponents = ["", ""]
        with contextlib.suppress(ValueError, TypeError):  # a first value, or no number
            exponents = [f"{math.log(a / b) / math.log(float(value) / float(before[0])):.2f}"
                         for a, b in zip(now[1:], before[1:], strict=True)]
        print(f"{value:>12s} {now[1]:9.4f} {exponents[0]:>9s} {now[2]:12.3g} {exponents[1]:>9s}"
              f" {rows[-1]['memory_gb']:10.2f}")
        before = now


# --- The fast paths against the plain ones ----------------------------------------------------------------------------

def bench_transdiff(args, device):
    """Plain and fast sampling, 1-step and MRAR."""
    for name, mrar in (("1-step", False), ("MRAR", True)):
        torch.manual_seed(0)
        model = transdiff.TransDiff(dataclasses.replace(transdiff.PRESETS[args.size], mrar=mrar)).to(device).eval()
        torch.nn.init.normal_(model.decoder.output.weight, std=0.02)  # zero at first: then every sampler agrees
        labels = torch.arange(args.batch, device=device) % model.config.classes
        how = dict(cfg=1.5, steps=args.steps, drift_scale=0.9, noise_scale=0.9)

        def way(sampler, model=model, labels=labels, how=how):
            return lambda: getattr(model, sampler)(labels, common.Noise.of(0, range(args.batch), device), **how)

        (plain, fast), (a, b) = measured((way("sample_plainly"), way("sample")), args.repeats, device)
        gap = (a - b).abs().max() / a.abs().max()
        print(f"  {name:7s} plain {show(plain)}   fast {show(fast)}   {ratio(plain, fast)}   largest difference"
              f" {gap:.1e}")


def released_attention(self, x, rotary, cache, at, mask):
    """One token as the released sampler does it: copies of the whole cache, all of its slots under a mask."""
    q, k, v = self.wqkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = dar.rotate(q, rotary), dar.rotate(k, rotary)
    cache[0].index_copy_(2, at, k)
    cache[1].index_copy_(2, at, v)
    k, v = (kept.repeat_interleave(1, dim=1) for kept in cache)  # "repeat the key heads once" copies
    weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    weights = weights.masked_fill(~mask, -math.inf).softmax(-1)
    return self.wo((weights @ v).transpose(1, 2).flatten(2))


def bench_dar(args, device):
    """Tokens with a cache, with the released use of the cache, and without; then whole images, streamed."""
    torch.manual_seed(0)
    config = dar.PRESETS[args.size]
    if args.tokens:
        N = args.tokens
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, queries=N, query_rows=N))
    model = dar.Llama(config).to(device).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    labels, N = torch.arange(args.batch, device=device) % config.classes, config.tokenizer.queries
    forward = dar.LlamaAttention.forward

    def way(sampler, attention=forward, stride=1):
        def call():
            dar.LlamaAttention.forward, model.stride = attention, stride
            codes = getattr(model, sampler)(labels, common.Noise.of(0, range(args.batch), device), cfg=1.5)
            dar.LlamaAttention.forward, model.stride = forward, 1
            return codes
        return call

    (cached, released, plain), (a, b, c) = measured(
        (way("sample"), way("sample", released_attention, N), way("sample_plainly")), args.repeats, device)
    rate = args.batch * N / statistics.median(cached)
    print(f"  {N} tokens  cached {show(cached)}, {rate:.0f} tokens/s   released structure {show(released)},"
          f" {ratio(released, cached)}   uncached {show(plain)}, {ratio(plain, cached)}   same tokens:"
          f" {(a == b).float().mean():.4f}, {(a == c).float().mean():.4f}")
    tokenizer = dar.Tokenizer(dataclasses.replace(config.tokenizer, repa_layer=0)).to(device).eval()
    noise = common.Noise.of(0, range(args.batch), device).normal((3, config.image_size, config.image_size))
    (decoding, whole), _ = measured(
        (lambda: tokenizer.decode(a, noise),
         lambda: dar.generate(model, tokenizer, labels, common.Noise.of(0, range(args.batch), device), cfg=1.5)),
        args.repeats, device)
    print(f"  decoding {show(decoding)}   tokens and decoding, streamed {show(whole)}"
          f"   {args.batch / statistics.median(whole):.2f} images/s")


def repeating(model):
    """Makes the sampler work as the released one: the clean block before this one goes through the denoising layers
    again at each step, though nothing about it has changed."""
    c, n, denoise, kept = model.config, model.config.tokens, model.denoise, {}
    first = model.layers[c.ar_depth]

    def noticed(name, x, *args, cached=first.cached, **kwargs):
        if name == "clean":
            kept["rows"] = x
        return cached(name, x, *args, **kwargs)

    def again(x, time, j, condition, cache):
        rows = kept.get("rows") if j and not c.mlp_denoising else None
        for i in range(c.ar_depth, c.depth) if rows is not None else ():
            rows = model.layers[i].cached("clean", rows, model.rotary[:, (j - 1) * n:j * n], cache.store[i],
                                          cache.begin + (j - 1) * n, cache.mask)
        return denoise(x, time, j, condition, cache)

    def sample(*args, **kwargs):
        first.cached, model.denoise = noticed, again
        try:
            return model.sample(*args, **kwargs)
        finally:
            del first.cached, model.denoise
    return sample


def bench_madformer(args, device):
    """Sampling with everything clean computed once, as released, and with everything again at each step."""
    torch.manual_seed(0)
    preset = madformer.PRESETS[args.size]
    config = common.override(dataclasses.replace(preset, texts=tuple(f"name {k}" for k in range(preset.classes))),
                             args.set)
    model = madformer.MADFormer(config).to(device).eval()
    labels = torch.arange(args.batch, device=device) % config.classes

    def way(sampler):
        return lambda: sampler(labels, common.Noise.of(0, range(args.batch), device), steps=args.steps)

    (fast, released, plain), (a, b, c) = measured(
        [way(sampler) for sampler in (model.sample, repeating(model), model.sample_plainly)], args.repeats, device)
    gaps = [((x - a).abs().max() / a.abs().max()).item() for x in (b, c)]
    print(f"  {config.ar_length} blocks of {config.tokens} tokens, {config.ar_depth} AR and {config.diffusion_depth}"
          f" diffusion layers, NFE per block {config.evaluations(args.steps)}\n  once {show(fast)},"
          f" {args.batch / statistics.median(fast):.2f} images/s   clean block again at each step {show(released)},"
          f" {ratio(released, fast)}   everything again {show(plain)}, {ratio(plain, fast)}   largest differences"
          f" {gaps[0]:.1e}, {gaps[1]:.1e}")


def bench_images(args, device):
    """JPEGs of several sizes to training images of 256 pixels on one core: as a folder is read here (decoded at a
    reduced scale, at least twice the size that is needed), and naively, at full size."""
    rng, size = np.random.default_rng(0), 256
    for wide, high in ((500, 375), (1024, 1024), (2048, 1536), (4096, 3072)):
        with tempfile.TemporaryDirectory() as folder:
            for k in range(4):
                coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                picture = np.asarray(Image.fromarray(coarse).resize((wide, high), Image.Resampling.BICUBIC), np.int16)
                picture = (picture + rng.integers(-8, 9, picture.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(picture).save(Path(folder, f"{k}.jpg"), quality=90)
            data, names = common.load_data(folder, size=size), sorted(Path(folder).iterdir())

            def read(source):
                return [np.asarray(common.centre_crop(source(k), size), np.int16) for k in range(4)]
            (naive, draft), (a, b) = measured((lambda: read(lambda k: Image.open(names[k]).convert("RGB")),
                                               lambda: read(data.read)), args.repeats, device)
        gap = np.abs(np.stack(a) - np.stack(b))
        print(f"  {wide} x {high}: full decoding {4 / statistics.median(naive):6.1f} images/s   here"
              f" {4 / statistics.median(draft):6.1f}   {ratio(naive, draft)}   differences of 255: mean"
              f" {gap.mean():.2f}, most {gap.max()}")


def bench_fid(args, device):
    """Features with folded norms and channels last, and without; the trace term for full and for deficient rank."""
    torch.manual_seed(0)
    plain, folded = fid.Inception(), fid.Inception()
    state = {name: torch.rand_like(v) + 0.5 if "running_var" in name else v for name, v in plain.state_dict().items()}
    for network in (plain, folded):
        network.load_state_dict(state)
    plain, folded = plain.to(device), folded.folded().to(device)
    images = torch.randint(0, 256, (args.batch, 256, 256, 3), dtype=torch.uint8, device=device)

    def way(network):
        return torch.inference_mode()(lambda: network(fid.resize_tf1(images))[0])

    (slow, fast), (a, b) = measured((way(plain), way(folded)), args.repeats, device)
    print(f"  features plain {show(slow)}   folded, channels last {show(fast)}, "
          f"{args.batch / statistics.median(fast):.1f} images/s   {ratio(slow, fast)}   largest difference"
          f" {(a - b).abs().max() / a.abs().max():.1e}")
    rng, d = np.random.default_rng(0), 2048
    for title, n in (("full rank", 3 * d), (f"rank {d // 2}", d // 2 + 1)):
        s, t = (np.cov((rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.3).T) for _ in range(2))
        spent, traces = ([], []), [0, 0]
        for _ in range(3):
            for k, call in enumerate((lambda: np.trace(scipy.linalg.sqrtm(s @ t)).real, lambda: fid.trace_sqrt(s, t))):
                begun = time.process_time()
                traces[k] = call()
                spent[k].append(time.process_time() - begun)
        print(f"  trace, {d} dimensions, {title}, CPU seconds: sqrtm of the product {show(spent[0])}   of symmetric"
              f" matrices {show(spent[1])}   {ratio(*spent)}   relative difference"
              f" {abs(traces[0] - traces[1]) / traces[1]:.1e}")


MODELS = {"transdiff": transdiff, "dar": dar, "madformer": madformer}
COMPARE = {"transdiff": bench_transdiff, "dar": bench_dar, "madformer": bench_madformer}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="transdiff", choices=(*MODELS, "fid", "images"))
    add("--size", default="tiny")
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--batch", type=int, default=8, help="of sampling and the first stage, beside batch 1 (default: 8)")
    add("--train-batch", type=int, default=8, help="samples of a training step (default: 8)")
    add("--steps", type=int, help="denoising steps (madformer: of each block; default: the preset's)")
    add("--cfg", type=float, help="guidance scale (default: the preset's)")
    add("--tokens", type=int, help="dar with --compare: N (default: the preset's)")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the model's Config")
    add("--only", nargs="+", default=["train", "sample", "first"], choices=("train", "sample", "first"))
    add("--compile", action="store_true", help="compile what is trained, and the samplers' inner step")
    add("--recompute", action="store_true", help="as in train.py")
    add("--compare", choices=("plain",), help="the fast sampler against the plain one, in one run")
    add("--grow", metavar="FIELD=A,B,...", help="sampling as batch, size, steps or a field of the Config grows")
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = common.distributed(args.device)[2]
    args.device = str(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.grow:
        return grow(args)
    if args.model in MODELS and not args.compare:
        return bench(args, device)
    args.steps = args.steps or 25
    guidance = "guidance 1.5" if args.model in ("transdiff", "dar") else "no guidance"
    print(f"{args.model} {args.size}, batch {args.batch}, {guidance}, float32, {device}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}; seconds: median (range) of {args.repeats}")
    (COMPARE | {"fid": bench_fid, "images": bench_images})[args.model](args, device)


if __name__ == "__main__":
    common.command(main)
