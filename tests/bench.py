"""How much faster sampling is than its plain form in the same file, with equal outputs: one line per case.

    python tests/bench.py [--model transdiff] [--device cpu] [--size tiny] [--batch 8] [--steps 25] [--repeats 5]
    python tests/bench.py --model dar --tokens 256

Random weights. The ways run in turn; a row gives the median of each with its range, and the ratio of the medians.
"""
import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import dar  # noqa: E402
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


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="transdiff", choices=("transdiff", "dar"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25, help="transdiff: denoising steps")
    parser.add_argument("--tokens", type=int, help="dar: N (default: the preset's)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{args.model} {args.size}, batch {args.batch}, guidance 1.5, float32, {device}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}; seconds: median (range) of {args.repeats}")
    {"transdiff": bench_transdiff, "dar": bench_dar}[args.model](args, device)


if __name__ == "__main__":
    main()
