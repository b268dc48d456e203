"""Kill runs at random moments, and compare their ends with those of runs that were left alone.

    python tests/faults.py --kills 50          # all stages of the three models; a line for each
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

BATCH = ["--image-size", "16", "--device", "cpu", "--workers", "0", "--batch-size", "8",
         "--log-every", "1", "--sample-every", "100"]
VAE = ["vae.width=8", "vae.channels=4", "vae.groups=4"]
SMALL = {
    "transdiff": ["dim=32", "heads=2", "depth=2", "ar_depth=1", "features=16", "class_tokens=4",
                  "steps=3", "dropout=0.1", *VAE],
    "dar": ["dim=32", "heads=2", "depth=2", "dropout=0.1", *(f"tokenizer.{field}" for field in (
        "dim=64", "depth=1", "queries=8", "query_rows=8", "codebook=32", "groups=4",
        "decoder_dim=64", "decoder_depth=1", "pixel_dim=64", "pixel_depth=2", "steps=4"))],
    "madformer": ["dim=64", "mlp=64", "depth=3", "diffusion_depth=2", "unet.channels=8,16",
                  "unet.groups=4", "unet.time_dim=16", "steps=3", *VAE]}
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import common, train
{patch}
if __name__ == "__main__":
    sys.argv = ["train.py"] + {arguments!r}
    common.run_script(train.main)
"""


def start(arguments, patch="", ranks=1):
    """Start a process that trains with these arguments, after the lines of `patch`."""
    folder = Path(tempfile.mkdtemp())
    script = folder / "run.py"
    script.write_text(SCRIPT.format(
        root=str(ROOT), patch=patch, arguments=[str(a) for a in arguments]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
              str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launch, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def equal(a, b):
    """Return whether two states are equal bit for bit, at any depth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def pictures(folder):
    """Write three classes of six drawn shapes."""
    for label in (0, 3, 5):
        (folder / common.SHAPES[label]).mkdir(parents=True)
        for k in range(6):
            file = folder / common.SHAPES[label] / f"{k}.png"
            common.draw_shape(10 * k + label, 16).save(file)
    return folder


def kills(model, n, folder, seed=0, steps=10):
    """Kill runs of a model n times in all, at random moments that follow from the seed.

    A killed run is started again until it is done; while kills are left, another run follows.
    Return what happened, a line for each run.
    """
    rng, lines, done, lost, run = random.Random(seed), [], 0, 0, 0
    command = ["--model", model, "--data", pictures(folder / "data"), "--steps", steps,
               "--save-every", 3, *BATCH, "--set", *SMALL[model]]
    command[command.index("--workers") + 1] = "2"  # they outlive a killed run for some seconds
    begun = time.monotonic()
    said = start([*command, "--out", folder / "whole"]).communicate()[0]
    took = time.monotonic() - begun
    stages = [p.name for p in (folder / "whole").iterdir() if (p / "state.pt").exists()]
    assert stages, said
    while done < n:
        out, before = folder / f"run{run}", done
        while True:
            process = start([*command, "--out", out])
            within = rng.uniform(0.3, 1.0) * took if done < n else 600
            try:  # somewhere between the first import and the last file
                said = process.communicate(timeout=within)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                continue
            break
        states = []
        for stage in stages:
            if (out / stage / "state.pt").exists():
                files = [place / stage / "state.pt" for place in (folder / "whole", out)]
                states.append([common.read_checkpoint(file) for file in files])
        good = (process.returncode == 0 and len(states) == len(stages)
                and all(equal(*pair) for pair in states))
        lost += not good
        end = "bit-equal" if good else f"lost: {said[-300:]}"
        lines.append(f"{model}, run {run}: {done - before} kills, {end}")
        shutil.rmtree(out, ignore_errors=True)
        run += 1
    return [*lines, f"{done} kills, {lost} lost, {run} runs of {len(stages)} stages of {model}"]


def main():
    """Kill runs of the three models, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for k, model in enumerate(SMALL):
        with tempfile.TemporaryDirectory() as folder:
            lines = kills(model, args.kills // 3 + (k < args.kills % 3), Path(folder), args.seed)
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
