"""How much faster sampling is than its plain form in the same file, with equal outputs: one line per case.

    python tests/bench.py [--device cpu] [--size tiny] [--batch 8] [--steps 25] [--repeats 5]

Random weights. The two ways run in turn; a row gives the median of each with its range, and the ratio of the medians.
"""
import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import transdiff  # noqa: E402


def measured(calls, repeats, device):
    """Seconds of each call, `repeats` times in turn, after one run of each to warm up."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            begun = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                taken.append(time.perf_counter() - begun)
    return times


def main():
    """Plain and fast sampling, 1-step and MRAR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny", choices=transdiff.PRESETS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{args.size}, batch {args.batch}, {args.steps} steps, guidance 1.5, float32, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; seconds: median (range) of {args.repeats}")
    for name, mrar in (("1-step", False), ("MRAR", True)):
        torch.manual_seed(0)
        model = transdiff.TransDiff(dataclasses.replace(transdiff.PRESETS[args.size], mrar=mrar)).to(device).eval()
        torch.nn.init.normal_(model.decoder.output.weight, std=0.02)  # zero at first: then every sampler agrees
        labels = torch.arange(args.batch, device=device) % model.config.classes
        how = dict(cfg=1.5, steps=args.steps, drift_scale=0.9, noise_scale=0.9)

        def way(sampler, model=model, labels=labels, how=how):
            return lambda: getattr(model, sampler)(labels, common.Noise.of(0, range(args.batch), device), **how)

        ways = way("sample_plainly"), way("sample")
        plain, fast = measured(ways, args.repeats, device)
        gap = (ways[0]() - ways[1]()).abs().max() / ways[0]().abs().max()
        medians = [statistics.median(times) for times in (plain, fast)]
        print(f"  {name:7s} plain {medians[0]:.3f} ({min(plain):.3f} - {max(plain):.3f})   fast {medians[1]:.3f} "
              f"({min(fast):.3f} - {max(fast):.3f})   {medians[0] / medians[1]:.2f} x   largest difference {gap:.1e}")


if __name__ == "__main__":
    main()
