"""What the classifier of real images sees in blends of two classes. See transdiff_fig5.sh.

    python experiments/blends.py FOLDER fashion-mnist A:B ...

Reads FOLDER/A_B_a.npz (samples of A), A_B_both.npz (blends) and A_B_b.npz. Prints a table of the
classifier's mean probabilities, and writes blends.png: for each pair a row of A, of blends, of B.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import fid


@torch.no_grad()
def main():
    """Print the table and write the picture."""
    folder, data, pairs = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with np.load(folder / f"{pairs[0].replace(':', '_').replace(' ', '_')}_a.npz") as samples:
        size = samples["arr_0"].shape[1]
    source = fid.Source(data, size, "data")
    classifier = fid.load_classifier(source, "data", "cpu")
    names = source.data.classes
    print("| samples | A | B | another class |\n|---|---|---|---|")
    rows = []
    for pair in pairs:
        a, b = pair.split(":")
        for kind, title in ("a", a), ("both", f"{a} + {b}"), ("b", b):
            name = f"{pair.replace(':', '_').replace(' ', '_')}_{kind}.npz"
            with np.load(folder / name) as samples:
                images = torch.from_numpy(samples["arr_0"])
            logits = classifier(classifier.resize(images))[1]
            shares = logits.softmax(1).mean(0)
            of_a, of_b = shares[names.index(a)].item(), shares[names.index(b)].item()
            print(f"| {title} | {of_a:.2f} | {of_b:.2f} | {1 - of_a - of_b:.2f} |")
            rows.append(images[:10].permute(0, 3, 1, 2))
    common.save_picture(folder / "blends.png", common.grid(torch.cat(rows), 10))


if __name__ == "__main__":
    common.run_script(main)
