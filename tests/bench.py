"""How much faster sampling is than its plain form in the same file, with equal outputs: one line per case.

    python tests/bench.py [--model transdiff] [--device cpu] [--size tiny] [--batch 8] [--steps 25] [--repeats 5]
    python tests/bench.py --model dar --tokens 256
    python tests/bench.py --model madformer --set image_size=64
    python tests/bench.py --model fid                      # features, and the trace term of a distance

Random weights. The ways run in turn; a row gives the median of each with its range, and the ratio of the medians.
"""
import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import dar  # noqa: E402
import fid  # noqa: E402
import madformer  # noqa: E402
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


def released_attention(self, x, rotary, cache=None, at=0):
    """One token as the released sampler does it: copies of the whole cache, all of its slots under a mask."""
    q, k, v = self.wqkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = dar.rotate(q, rotary), dar.rotate(k, rotary)
    cache[0][:, :, at:at + 1], cache[1][:, :, at:at + 1] = k, v
    k, v = (kept.repeat_interleave(1, dim=1) for kept in cache)  # "repeat the key heads once" copies
    weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    weights = weights.masked_fill(torch.arange(k.shape[2], device=x.device) > at, -math.inf).softmax(-1)
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

    def way(sampler, attention=forward):
        def call():
            dar.LlamaAttention.forward = attention
            codes = getattr(model, sampler)(labels, common.Noise.of(0, range(args.batch), device), cfg=1.5)
            dar.LlamaAttention.forward = forward
            return codes
        return call

    (cached, released, plain), (a, b, c) = measured(
        (way("sample"), way("sample", released_attention), way("sample_plainly")), args.repeats, device)
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

    def again(x, t, j, condition, cache):
        rows = kept.get("rows") if j and not c.mlp_denoising else None
        for i in range(c.ar_depth, c.depth) if rows is not None else ():
            rows = model.layers[i].cached("clean", rows, model.rotary[:, (j - 1) * n:j * n], cache.store[i],
                                          cache.begin + (j - 1) * n, cache.mask)
        return denoise(x, t, j, condition, cache)

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


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="transdiff", choices=("transdiff", "dar", "madformer", "fid"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (madformer: of each block)")
    parser.add_argument("--tokens", type=int, help="dar: N (default: the preset's)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="madformer: fields of its Config")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    guidance = "guidance 1.5" if args.model in ("transdiff", "dar") else "no guidance"
    print(f"{args.model} {args.size}, batch {args.batch}, {guidance}, float32, {device}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}; seconds: median (range) of {args.repeats}")
    {"transdiff": bench_transdiff, "dar": bench_dar, "madformer": bench_madformer,
     "fid": bench_fid}[args.model](args, device)


if __name__ == "__main__":
    main()
