"""How many samples does a classifier of real images take for the class that was asked for, and how far are they from
real ones?

    python sample.py --model transdiff --n 1000 --out samples.npz
    python tests/recognise.py samples.npz --data fashion-mnist [--data-root data]

Trains a small convolutional network for three epochs (kept in <data>-classifier.pt), prints its accuracy on the data
set's own test images, then on each file of samples, and the Frechet distance between the samples' and the test images'
features (128 of this network, so no FID: lower is better, comparable for the same data and number of samples only).
Two minutes on two CPU cores.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def images_of(args, split):
    """All images of a split as uint8 (n, 3, s, s), and their labels."""
    data = common.load_data(args.data, args.data_root, args.image_size, split)
    crops = [common.from_pil(common.centre_crop(data.read(i), args.image_size)) for i in range(len(data.labels))]
    return torch.stack(crops), torch.from_numpy(data.labels), len(data.classes)


@torch.no_grad()
def accuracy(network, images, labels):
    """Share of images whose most likely class is their label, and the same for each class."""
    right = torch.cat([network(common.to_float(x)).argmax(1) for x in images.split(500)]) == labels
    return right.float().mean().item(), [round(right[labels == c].float().mean().item(), 2) for c in labels.unique()]


@torch.no_grad()
def statistics(network, images):
    """Mean (128,) and covariance (128, 128) of the features: the last maps, averaged over their positions."""
    flatten = next(i for i, layer in enumerate(network) if isinstance(layer, nn.Flatten))
    features = torch.cat([network[:flatten](common.to_float(x)).mean((2, 3)) for x in images.split(500)]).double()
    return features.mean(0), features.T.cov()


def distance(a, b):
    """Squared Frechet distance of two Gaussians (mean, covariance)."""
    (m, s), (n, t) = a, b
    root = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()  # the trace of the square root of s t
    return ((m - n).square().sum() + s.trace() + t.trace() - 2 * root).item()


def trained(args):
    """The classifier, from its file if there is one, and the statistics of the real test images."""
    width, path = args.image_size // 8, Path(f"{args.data}-classifier.pt")
    images, labels, classes = images_of(args, "test")
    layers = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * width**2, classes))
    if path.exists():
        network.load_state_dict(common.read(path))
    else:
        torch.manual_seed(0)
        x, y, _ = images_of(args, "train")
        batches = [i for _ in range(3) for i in torch.randperm(len(x)).split(128)]
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(batches))
        for i in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(common.to_float(x[i])), y[i]).backward()
            optimizer.step()
            schedule.step()
        common.save(path, network.state_dict())
    network.eval()
    print(f"{args.data}: {100 * accuracy(network, images, labels)[0]:.1f} % of {len(images)} real test images")
    return network, statistics(network, images)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="+", help=".npz files of sample.py")
    parser.add_argument("--data", default="shapes", choices=("shapes", "cifar10", *common.IDX))
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--image-size", type=int, default=32)
    args = parser.parse_args()
    network, real = trained(args)
    for file in args.samples:
        with np.load(file, allow_pickle=False) as content:
            images, labels = torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(content["arr_1"])
        share, by_class = accuracy(network, images, labels)
        print(f"{file}: {100 * share:.1f} % of {len(images)}, Frechet distance"
              f" {distance(statistics(network, images), real):.2f}; by class {by_class}")


if __name__ == "__main__":
    common.command(main)
