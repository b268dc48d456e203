"""Kills runs at random moments and sees whether they end like runs that were left alone.

    python tests/faults.py --kills 50                  # all stages of the three models; a line for each
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

BATCH = ["--image-size", "16", "--device", "cpu", "--workers", "0", "--batch-size", "8", "--log-every", "1",
         "--sample-every", "100"]
VAE = ["vae.width=8", "vae.channels=4", "vae.groups=4"]
SMALL = {"transdiff": ["dim=32", "heads=2", "depth=2", "ar_depth=1", "features=16", "class_tokens=4", "steps=3",
                       "dropout=0.1", *VAE],
         "dar": ["dim=32", "heads=2", "depth=2", "dropout=0.1", *(f"tokenizer.{field}" for field in (
             "dim=64", "depth=1", "queries=8", "query_rows=8", "codebook=32", "groups=4", "decoder_dim=64",
             "decoder_depth=1", "pixel_dim=64", "pixel_depth=2", "steps=4"))],
         "madformer": ["dim=64", "mlp=64", "depth=3", "diffusion_depth=2", "unet.channels=8,16", "unet.groups=4",
                       "unet.time_dim=16", "steps=3", *VAE]}
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import common, train
{patch}
if __name__ == "__main__":
    sys.argv = ["train.py"] + {arguments!r}
    common.command(train.main)
"""


def start(arguments, patch="", ranks=1, restarts=1):
    """A process that trains with these arguments, after the lines of `patch`."""
    folder = Path(tempfile.mkdtemp())
    script = folder / "run.py"
    script.write_text(SCRIPT.format(root=str(ROOT), patch=patch, arguments=[str(a) for a in arguments]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--max-restarts",
              str(restarts)] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def equal(a, b):
    """Bit for bit, at any depth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def pictures(folder):
    """Three classes of six drawn shapes."""
    for label in (0, 3, 5):
        (folder / common.SHAPES[label]).mkdir(parents=True)
        for k in range(6):
            common.draw_shape(10 * k + label, 16).save(folder / common.SHAPES[label] / f"{k}.png")
    return folder


def kills(model, n, folder, seed=0, steps=10):
    """Kills runs of a model n times in all, at moments that are random but for the seed, and starts them again until
    they are through; while kills are left, begins with another run. What happened, a line for each run."""
    rng, lines, done, lost, run = random.Random(seed), [], 0, 0, 0
    command = ["--model", model, "--data", pictures(folder / "data"), "--steps", steps, "--save-every", 3, *BATCH,
               "--set", *SMALL[model]]
    command[command.index("--workers") + 1] = "2"  # they outlive a killed run for some seconds
    begun = time.monotonic()
    said = start([*command, "--out", folder / "whole"]).communicate()[0]
    took, stages = time.monotonic() - begun, [p.name for p in (folder / "whole").iterdir() if (p / "state.pt").exists()]
    assert stages, said
    while done < n:
        out, before = folder / f"run{run}", done
        while True:
            process = start([*command, "--out", out])
            try:  # somewhere between the first import and the last file; the last kills of all come early enough
                said = process.communicate(timeout=rng.uniform(0.3, 1.0) * took if done < n else 600)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                continue
            break
        states = [[common.read(place / stage / "state.pt") for place in (folder / "whole", out)] for stage in stages
                  if (out / stage / "state.pt").exists()]
        good = process.returncode == 0 and len(states) == len(stages) and all(equal(*pair) for pair in states)
        lost += not good
        lines.append(f"{model}, run {run}: {done - before} kills, {'bit-equal' if good else f'lost: {said[-300:]}'}")
        shutil.rmtree(out, ignore_errors=True)
        run += 1
    return [*lines, f"{done} kills, {lost} lost, {run} runs of {len(stages)} stages of {model}"]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for k, model in enumerate(SMALL):
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(kills(model, args.kills // 3 + (k < args.kills % 3), Path(folder), args.seed)), flush=True)


if __name__ == "__main__":
    main()
