"""Kill runs at random moments, and compare their ends with those of runs that were left alone.

    python tests/faults.py --kills 50          # all stages of the three models; a line for each
"""
import argparse
import math
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
                  "unet.blocks=1,1", "unet.attention=0,0", "unet.groups=4", "unet.time_dim=16",
                  "steps=3", *VAE]}
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
    arguments = [str(argument) for argument in arguments]
    script.write_text(SCRIPT.format(root=str(ROOT), patch=patch, arguments=arguments))
    launch = []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
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
    rng = random.Random(seed)
    command = ["--model", model, "--data", pictures(folder / "data"), *BATCH, "--steps", steps,
               "--save-every", 3, "--workers", 2, "--set", *SMALL[model]]  # they outlive a kill
    begun = time.monotonic()
    said = start([*command, "--out", folder / "whole"]).communicate()[0]
    took = time.monotonic() - begun
    stages = [path.parent.name for path in (folder / "whole").glob("*/state.pt")]
    assert stages, said
    lines, done, lost = [], 0, 0
    while done < n:
        out = folder / f"run{len(lines)}"
        killed = 0
        process = None
        while process is None or process.returncode == -9:
            process = start([*command, "--out", out])
            within = rng.uniform(0.3, 1.0) * took if done + killed < n else 600
            try:  # somewhere between the first import and the last file
                said = process.communicate(timeout=within)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
        good = process.returncode == 0
        for stage in stages if good else ():
            files = [place / stage / "state.pt" for place in (folder / "whole", out)]
            good = good and equal(*map(common.read_checkpoint, files))
        end = "bit-equal" if good else f"lost: {said[-300:]}"
        lines.append(f"{model}: {killed} kills, {end}")
        done += killed
        lost += not good
        shutil.rmtree(out)
    return [*lines, f"{done} kills, {lost} lost, {len(lines)} runs of {len(stages)} stages"]


def main():
    """Kill runs of the three models, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for model in SMALL:
        with tempfile.TemporaryDirectory() as folder:
            lines = kills(model, math.ceil(args.kills / 3), Path(folder), args.seed)
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
