"""FID, sFID, Inception score, precision and recall: the numbers that papers report, from one file.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz     # FID, sFID, IS, precision, recall
    python fid.py samples/ statistics.npz --metrics fid --resize pytorch    # as pytorch-fid
    python fid.py /data/imagenet/train --image-size 256 --save-stats train.npz
    python fid.py samples.npz fashion-mnist --features classifier   # toy runs: no download
    torchrun --nproc_per_node 8 -- fid.py samples.npz reference.npz

Idea      A network turns every image into 2048 features. FID (Heusel et al., 2017) is the Frechet
          distance between the Gaussians that have the mean and covariance of two sets' features;
          sFID (Nash et al., 2021) the same of 2023 features that still know where things are; the
          Inception score (Salimans et al., 2016) looks at the class probabilities; precision and
          recall (Kynkaanniemi et al., 2019) count the samples that lie among the reference's
          images, and the reference's images that lie among the samples.
Same as   torch-fidelity and the ADM suite with `--resize tf1`, the default (TransDiff, D-AR);
          pytorch-fid with `--resize pytorch` (MADFormer). Never compare numbers of other resizing,
          reference or number of samples.
Inputs    SAMPLES and REFERENCE are each a folder of pictures; an .npz of uint8 images arr_0
          (N, H, W, 3) and perhaps labels arr_1 (uncompressed, it is not read into memory); a file
          of statistics mu, sigma and perhaps mu_s, sigma_s (.npz or .pt); or a named data set:
          fashion-mnist is its test images, fashion-mnist:train the others.
"""
import argparse
import collections
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError

WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # one file, two names
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
SIDE = 299  # pixels that the network sees
PAUSE = 60  # seconds between two savings of what an extraction has
METRICS = ("fid", "sfid", "is", "pr")
KNOWN = {"arr_1", "mu", "sigma", "mu_s", "sigma_s", "n", "features"}  # of the entries of a file, besides arr_0
NAMES = {"fid": "FID", "fd_classifier": "FD-classifier", "sfid": "sFID", "is": "IS"}  # as people write them


# --- The network ------------------------------------------------------------------------------------------------------

class Unit(nn.Module):
    """Convolution, batch norm with stored statistics, ReLU. Padded to keep the size, unless strided or told not to."""

    def __init__(self, c_in, c_out, kernel, stride=1, pad=True):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = tuple(k // 2 for k in kernel) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Chains of units side by side, concatenated; the last branch is a pool, and a 1x1 unit if it has a width.

    chains: lists of (name, channels out, kernel[, stride]). The kernel "fork" stands for two units side by side, 1x3
    (its name ends in "a") and 3x1 ("b").
    """

    def __init__(self, c_in, chains, pool, width=0):
        super().__init__()
        self.chains, self.pool = [], pool
        for chain in chains:
            c, steps = c_in, []
            for name, c_out, kernel, *stride in chain:
                units = {name + "a": (1, 3), name + "b": (3, 1)} if kernel == "fork" else {name: kernel}
                for unit, shape in units.items():
                    self.add_module(unit, Unit(c, c_out, shape, *stride))
                steps.append(list(units))
                c = c_out
            self.chains.append(steps)
        self.branch_pool = Unit(c_in, width, 1) if width else nn.Identity()

    def forward(self, x):
        branches = []
        for steps in self.chains:
            h = x
            for units in steps:
                h = torch.cat([getattr(self, unit)(h) for unit in units], 1)
            branches.append(h)
        return torch.cat([*branches, self.branch_pool(self.pool(x))], 1)


def average():
    """The mean of a cell and its neighbours, at the border of those that exist."""
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def block_a(c_in, width):
    """5x5 and double 3x3, at 35 x 35."""
    return Block(c_in, [[("branch1x1", 64, 1)],
                        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]],
                 average(), width)


def block_b(c_in):
    """To 17 x 17."""
    return Block(c_in, [[("branch3x3", 384, 3, 2)],
                        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]],
                 nn.MaxPool2d(3, 2))


def block_c(c_in, c):
    """7x7 as rows and columns, at 17 x 17."""
    wide, tall = (1, 7), (7, 1)
    return Block(c_in, [[("branch1x1", 192, 1)],
                        [("branch7x7_1", c, 1), ("branch7x7_2", c, wide), ("branch7x7_3", 192, tall)],
                        [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, tall), ("branch7x7dbl_3", c, wide),
                         ("branch7x7dbl_4", c, tall), ("branch7x7dbl_5", 192, wide)]], average(), 192)


def block_d(c_in):
    """To 8 x 8."""
    return Block(c_in, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                        [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                         ("branch7x7x3_4", 192, 3, 2)]], nn.MaxPool2d(3, 2))


def block_e(c_in, pool):
    """Forked 3x3, at 8 x 8."""
    return Block(c_in, [[("branch1x1", 320, 1)],
                        [("branch3x3_1", 384, 1), ("branch3x3_2", 384, "fork")],
                        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3", 384, "fork")]],
                 pool, 192)


class Inception(nn.Module):
    """Inception v3 as it was in TensorFlow in 2015, under the names of its published PyTorch weights."""

    def __init__(self):
        super().__init__()
        parts = [
            ("Conv2d_1a_3x3", Unit(3, 32, 3, 2)), ("Conv2d_2a_3x3", Unit(32, 32, 3, pad=False)),
            ("Conv2d_2b_3x3", Unit(32, 64, 3)), ("pool_1", nn.MaxPool2d(3, 2)), ("Conv2d_3b_1x1", Unit(64, 80, 1)),
            ("Conv2d_4a_3x3", Unit(80, 192, 3, pad=False)), ("pool_2", nn.MaxPool2d(3, 2)),
            ("Mixed_5b", block_a(192, 32)), ("Mixed_5c", block_a(256, 64)), ("Mixed_5d", block_a(288, 64)),
            ("Mixed_6a", block_b(288)), ("Mixed_6b", block_c(768, 128)), ("Mixed_6c", block_c(768, 160)),
            ("Mixed_6d", block_c(768, 160)), ("Mixed_6e", block_c(768, 192)), ("Mixed_7a", block_d(768)),
            ("Mixed_7b", block_e(1280, average())), ("Mixed_7c", block_e(2048, nn.MaxPool2d(3, 1, 1)))]
        for name, part in parts:
            self.add_module(name, part)
        self.trunk = [name for name, _ in parts]
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, x):
        """pool3 (B, 2048), spatial (B, 2023) and logits (B, 1008), without their bias, of x (B, 3, 299, 299)."""
        for name in self.trunk:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (row, column, channel), as in TensorFlow
        pool3 = x.mean((2, 3))
        return pool3, spatial, F.linear(pool3, self.fc.weight)

    def folded(self):
        """This network, faster: batch norms go into the convolutions, channels come last in memory."""
        for unit in [part for part in self.modules() if isinstance(part, Unit)]:
            conv, norm = unit.conv, unit.bn
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = (conv.weight.double() * scale[:, None, None, None]).float()
            bias = (norm.bias.double() - norm.running_mean.double() * scale).float()
            conv.weight, conv.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
            unit.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def load_inception(path=None):
    """(the folded network, first digits of its file's SHA-256). The file is `path`, or FID_WEIGHTS in the environment,
    or in torch.hub's cache, or downloaded there. Raises UserError if it cannot be had or holds something else."""
    given = path or os.environ.get("FID_WEIGHTS")
    places = [Path(given)] if given else [Path(torch.hub.get_dir(), "checkpoints", name) for name in WEIGHTS]
    file = next((place for place in places if place.exists()), places[0])
    if not given:
        common.download(SOURCE, file, DIGEST, "or name it with --weights; --features classifier needs none")
    elif not file.exists():
        raise UserError(f"--weights {file}: no such file; {SOURCE}{WEIGHTS[0]} is it (SHA-256 {DIGEST})")
    digest = common.file_digest(file, hashlib.sha256())
    if not given and digest != DIGEST:
        raise UserError(f"{file} is damaged (SHA-256 {digest[:8]}..., not {DIGEST[:8]}...): delete it and it is"
                        " downloaded again")
    network = Inception()
    state = {name: tensor for name, tensor in common.read(file).items() if "num_batches_tracked" not in str(name)}
    counters = {name: tensor for name, tensor in network.state_dict().items() if "num_batches_tracked" in name}
    common.load_strict(network, {**counters, **state}, file)
    if digest != DIGEST and common.ranks()[0] == 0:
        print(f"note: {file} is not the published file: its numbers compare with no others")
    return network.folded(), digest[:8]


def resize_tf1(images):
    """uint8 images (B, H, W, 3) as the network's input (B, 3, 299, 299), resized as TensorFlow 1 did it: bilinear,
    pixel i of the result stands at i H / 299, no antialiasing, all in float32."""
    x = images.permute(0, 3, 1, 2)                                                         # (B, 3, H, W)

    def places(size):
        at = torch.arange(SIDE, dtype=torch.float32, device=x.device) * torch.tensor(size / SIDE, dtype=torch.float32)
        low = at.floor().long()
        return low, (low + 1).clamp(max=size - 1), at - low
    low, high, share = places(x.shape[3])
    left, right = x[..., low].float(), x[..., high].float()
    x = left + (right - left) * share                                                      # (B, 3, H, 299)
    low, high, share = places(x.shape[2])
    upper, lower = x[..., low, :], x[..., high, :]
    return (upper + (lower - upper) * share[:, None] - 128) / 128


def resize_pytorch(images):
    """The same as pytorch-fid does it: half-pixel centres, and 2 v / 255 - 1."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


RESIZE = {"tf1": resize_tf1, "pytorch": resize_pytorch}


# --- Distances --------------------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of rows that come in batches, in float64; those of parts can be merged."""

    def __init__(self, n=0, mean=0.0, scatter=0.0):
        self.n, self.mean, self.scatter = n, mean, scatter  # scatter: sum of products of deviations from the mean
        self.waiting = []

    def add(self, rows):
        """Rows (B, d), at least one."""
        self.waiting.append(np.asarray(rows, np.float64))
        if sum(map(len, self.waiting)) >= 512:  # one product of large matrices is faster than many of small ones
            self.settle()

    def settle(self):
        """Counts the rows that wait."""
        if self.waiting:
            x, self.waiting = np.concatenate(self.waiting), []
            mean = x.mean(0)
            self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other):
        """Makes these the moments of both sets together (Chan et al., 1979)."""
        other.settle()
        if other.n:
            n, delta = self.n + other.n, other.mean - self.mean
            self.scatter = self.scatter + other.scatter + np.multiply.outer(delta, delta) * (self.n * other.n / n)
            self.mean, self.n = self.mean + delta * (other.n / n), n

    def gaussian(self):
        """Mean (d,) and unbiased covariance (d, d). Raises UserError for fewer than two rows."""
        self.settle()
        if self.n < 2:
            raise UserError(f"a covariance needs two images at least, and thousands to mean something; there"
                            f" {'is one' if self.n else 'are none'}")
        return self.mean, self.scatter / (self.n - 1)


def trace_sqrt(a, b):
    """Tr (a b)^(1/2) of covariances a, b (d, d), from symmetric matrices only: never complex, right for any rank.

    With a = R R^T and b = S S^T, the eigenvalues of a b are the squared singular values of M = S^T R. Of full rank, R
    and S come from Cholesky, and the eigenvalues of M^T M are exact enough. Else they come from the eigenvectors,
    without those whose eigenvalues are rounding.
    """
    rounding = len(a) * np.finfo(float).eps  # as a share of the largest eigenvalue
    with contextlib.suppress(scipy.linalg.LinAlgError):
        R, S = (scipy.linalg.cholesky(c, lower=True, check_finite=False) for c in (a, b))
        if all(L.diagonal().min() ** 2 > rounding * L.diagonal().max() ** 2 for L in (R, S)):
            M = scipy.linalg.blas.dtrmm(1, S, R, lower=True, trans_a=True)    # S^T R, half the work of a matrix product
            square = scipy.linalg.blas.dsyrk(1, M, lower=True, trans=True)    # M^T M, its lower half
            return np.sqrt(scipy.linalg.eigvalsh(square, overwrite_a=True, check_finite=False).clip(0)).sum()
    roots = []
    for c in (a, b):
        w, Q = scipy.linalg.eigh(c)
        keep = w > rounding * max(w.max(), 0)
        roots.append(Q[:, keep] * np.sqrt(w[keep]))
    R, S = roots
    return scipy.linalg.svdvals(S.T @ R).sum() if R.size and S.size else 0.0


def frechet(gaussian1, gaussian2):
    """Squared Frechet distance |m1 - m2|^2 + Tr (s1 + s2 - 2 (s1 s2)^(1/2)) of two (mean, covariance), any float type.
    Raises UserError if they do not fit."""
    (m1, s1), (m2, s2) = ((np.atleast_1d(np.asarray(m, np.float64)), np.atleast_2d(np.asarray(s, np.float64)))
                          for m, s in (gaussian1, gaussian2))
    if len({(len(m1),) * 2, (len(m2),) * 2, s1.shape, s2.shape}) > 1:
        raise UserError(f"statistics of different features: {len(m1)}, {s1.shape} and {len(m2)}, {s2.shape}")
    if not all(np.isfinite(part).all() for part in (m1, s1, m2, s2)):
        raise UserError("there are statistics that are not finite")
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace_sqrt(s1, s2))


def inception_score(logits, splits=10, chunk=None, shuffle=True):
    """Mean and standard deviation over splits of exp E KL(p(y|x), p(y)), for logits (n, classes).

    torch-fidelity: 10 splits of rows in the order of RandomState(2020). The ADM suite: chunks of 5,000 as they come.
    """
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    n, scores = len(log_p), []
    if shuffle:
        log_p = log_p[np.random.RandomState(2020).permutation(n)]
    edges = [*range(0, n, chunk), n] if chunk else [i * n // splits for i in range(splits + 1)]
    for part in (log_p[begin:end] for begin, end in itertools.pairwise(edges) if end > begin):
        mean = scipy.special.logsumexp(part, axis=0) - math.log(len(part))
        scores.append(math.exp((np.exp(part) * (part - mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def distances(a, b):
    """Squared distances (n, m) of rows a (n, d) and b (m, d), never negative."""
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def radii(x, k=3, block=512):
    """Squared distance of each row to its k-th nearest other row; blockwise, so that no (n, n) matrix is made."""
    return torch.cat([distances(rows, x).kthvalue(k + 1).values for rows in x.split(block)])


def inside(x, centres, squared_radii, block=512):
    """Which rows of x lie within the radius of at least one centre."""
    return torch.cat([(distances(rows, centres) <= squared_radii).any(1) for rows in x.split(block)])


def precision_recall(samples, reference, k=3, device="cpu"):
    """Share of the samples that lie among the reference's features, and the reverse; (n, d) and (m, d), in float64.
    Raises UserError for k or fewer rows."""
    if min(len(samples), len(reference)) <= k:
        raise UserError(f"precision and recall need more than {k} images, not {min(len(samples), len(reference))}")
    samples, reference = (torch.as_tensor(x).to(device, torch.float64) for x in (samples, reference))
    return (inside(samples, reference, radii(reference, k)).double().mean().item(),
            inside(reference, samples, radii(samples, k)).double().mean().item())


# --- Sets of images ---------------------------------------------------------------------------------------------------

def named(path):
    """Is this the name of a data set? A folder of that name is given as ./name."""
    return re.fullmatch(f"({'|'.join(['shapes', 'cifar10', *common.IDX])})(:train)?", str(path)) is not None


class Source:
    """A set of images or its statistics, see Inputs above.

    n images, read(i) -> uint8 (H, W, 3), or None where a file is broken; labels (n,) or None; statistics, name ->
    array, empty where the file has none; meta, what sample.py wrote beside it; digest, of the content. size: pictures
    of other sizes become squares of so many pixels by ADM's centre crop (named sets: 32 without it). Raises UserError
    for what is none of this.
    """

    def __init__(self, path, size=None, data_root="data"):
        self.path, self.size, self.meta = Path(path), size, {}
        self.n, self.labels, self.classes, self.statistics, self.lossy = 0, None, None, {}, 0
        self.named = named(path)
        if self.named:
            name, _, split = str(path).partition(":")
            self.size = size or 32
            data = common.load_data(name, data_root, self.size, split or "test")
            self.n, self.labels, self.classes, self.get = len(data.labels), data.labels, data.classes, data.read
            self.digest = f"{data.key}-{split or 'test'}-{self.size}"
        elif self.path.is_dir():
            self.open_folder()
        elif self.path.is_file():
            self.open_file()
        else:
            raise UserError(f"{path}: no such folder or file, nor one of shapes, {', '.join(common.IDX)}, cifar10")
        beside = self.path / "meta.json" if self.path.is_dir() else self.path.with_suffix(".meta.json")
        if beside.is_file():
            with contextlib.suppress(ValueError, TypeError, OSError, RecursionError):
                self.meta = dict(json.loads(beside.read_text()))
        if self.meta.get("prompt") or self.meta.get("labels") == "none":
            self.labels = None  # they count prompts, or nothing

    def read(self, i):
        """Image i, uint8 (H, W, 3); None if it is broken, which is said."""
        try:
            image = self.get(i)
            if self.size and image.size != (self.size, self.size):
                image = common.centre_crop(image, self.size)
            return np.array(image)
        except common.UNREADABLE as error:
            common.tqdm.write(f"skipped broken file {common.printable(self.files[i])}: {error}")

    def open_folder(self):
        """Pictures in the folder itself, in the order of their names; else those of its class folders."""
        here = sorted(p for p in self.path.iterdir() if p.suffix.lower() in common.endings() and p.name[0] != "."
                      and (p.is_file() or not p.exists()))
        if here:
            self.files, said = here, [re.search(r"_class(\d+)\.\w+$", p.name) for p in here]  # sample.py's names
            self.labels = np.array([int(found[1]) for found in said]) if all(said) else None
        else:
            names, labels, self.classes = common.listing(self.path)
            self.files, self.labels = [self.path / name for name in names], np.array(labels)
        self.n, self.lossy = len(self.files), sum(p.suffix.lower() in (".jpg", ".jpeg") for p in self.files)

        def get(i):
            with common.open_picture(self.files[i], self.size or 0) as image:
                return common.rgb(image)
        self.get = get

    @functools.cached_property
    def digest(self):
        """Sixteen hexadecimal digits that name what is read (of more than 100,000 files, their sizes and times)."""
        digest = hashlib.blake2b(f"{self.size} {self.labels is None}".encode())
        for file in self.files:
            digest.update(os.fsencode(file.relative_to(self.path)) if self.path.is_dir() else b"")
            with contextlib.suppress(OSError):  # read() names the file
                if len(self.files) > 100_000:
                    digest.update(str((file.stat().st_size, file.stat().st_mtime_ns)).encode())
                else:
                    common.file_digest(file, digest)
        return digest.hexdigest()[:16]

    def open_file(self):
        """Images and statistics of an .npz, or statistics of a .pt. Images stay in the file: 50,000 are 10 GB."""
        self.files = [self.path]
        try:
            if self.path.suffix != ".npz":
                content = common.read(self.path)
                names, content = [*content], {k: np.asarray(content[k]) for k in KNOWN & content.keys()}
            else:
                with np.load(self.path, allow_pickle=False) as archive:
                    names, content = archive.files, {}
                    for k in KNOWN & {*archive.files}:
                        if archive.zip.getinfo(f"{k}.npy").file_size > 2**26:  # sigma of 2048 features has half of that
                            raise ValueError(f"{k} is too large")
                        content[k] = archive[k]
            self.labels = content.pop("arr_1", None)
            for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
                if {mean, covariance} & content.keys():
                    m, s = content[mean], content[covariance]
                    if m.ndim != 1 or s.shape != 2 * m.shape or not {m.dtype.kind, s.dtype.kind} <= {*"fiu"}:
                        raise ValueError(f"{mean} is {m.dtype} {m.shape}, {covariance} {s.dtype} {s.shape}")
                    if not (np.isfinite(m).all() and np.isfinite(s).all()):
                        raise ValueError(f"{mean} or {covariance} is not finite")
            self.statistics = content if "mu" in content else {}
            if "arr_0" in names:
                images = stored_array(self.path, "arr_0")
                if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape[1:]:
                    raise ValueError(f"arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
                self.n, self.get = len(images), lambda i: common.Image.fromarray(images[i])
            elif not self.statistics:
                raise ValueError(f"it has {', '.join(map(str, names)) or 'nothing'}, neither arr_0 nor mu and sigma")
        except UserError:
            raise
        except Exception as error:  # damaged zips and headers raise all sorts
            raise UserError(f"{self.path}: neither images nor statistics: {error}") from None
        if not (isinstance(self.labels, np.ndarray) and self.labels.shape == (self.n,)
                and self.labels.dtype.kind in "iu"):
            self.labels = None


def stored_array(path, name):
    """An array of an .npz, memory-mapped where it is not compressed."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as f:
        info, version = archive.getinfo(f"{name}.npy"), np.lib.format.read_magic(f)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(f)
        if info.compress_type != zipfile.ZIP_STORED or fortran or not math.prod(shape):
            return np.load(path, allow_pickle=False)[name]
        with open(path, "rb") as raw:
            raw.seek(info.header_offset + 26)  # the lengths of name and extra field end a zip entry's 30-byte header
            begin = info.header_offset + 30 + int(np.frombuffer(raw.read(4), "<u2").sum()) + f.tell()
    return np.memmap(path, dtype, "r", begin, shape)


# --- Features ---------------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small network for small images, whose features and classes take the place of Inception's."""

    def __init__(self, classes, side):
        super().__init__()
        self.side, layers = side, []
        for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(128 * (side // 8) ** 2, classes)

    def forward(self, x):
        """Features (B, 128), None, and logits (B, classes) of x (B, 3, side, side) in -1 .. 1."""
        maps = self.layers(x)
        return maps.mean((2, 3)), None, self.fc(maps.flatten(1))

    def resize(self, images):
        """uint8 images (B, H, W, 3) as this network's input."""
        x = common.to_float(images.permute(0, 3, 1, 2))
        side = (self.side, self.side)
        return x if x.shape[2:] == side else F.interpolate(x, side, mode="bilinear", antialias=True)


def load_classifier(reference, data_root, cache, device):
    """The classifier of a labelled reference; of a named set, of its training images. Trained once, for three epochs
    (of at most 60,000 images) but 100 steps at least, and kept beside the reference, or in `cache` where that cannot be
    written. Raises UserError if there are not two classes."""
    if reference.labels is None or not reference.n or not 0 <= reference.labels.min() < reference.labels.max() < 10**5:
        raise UserError(f"--features classifier: {reference.path} has no labels of two classes or more: give a named"
                        " data set, class folders, or an .npz with arr_1")
    if reference.named:
        name = str(reference.path).partition(":")[0]
        beside, reference = Path(data_root, name, "classifier"), Source(f"{name}:train", reference.size, data_root)
    else:
        path = reference.path.resolve()
        beside = path.with_name(f"{path.stem}-classifier")
    readable = (len(image) for i in range(reference.n) if (image := reference.read(i)) is not None)
    side = max(8, min(64, next(readable, 0)))
    name = f"{beside.name}-{side}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Classifier(int(reference.labels.max()) + 1, side).to(device)
    places = [beside.with_name(name), *([cache / f"{reference.digest}-{name}"] if cache else [])]
    for file in places:
        with contextlib.suppress(UserError), common.foreign(file):  # it is damaged, or not there: another is trained
            if (saved := common.read(file)).get("digest") == reference.digest:
                common.load_strict(network, saved["model"], file)
                return network.eval().requires_grad_(False)
    images, labels = [], []
    for i in np.linspace(0, reference.n - 1, min(reference.n, 60_000)).round().astype(int).tolist():
        if (image := reference.read(i)) is not None:
            images.append(common.to_uint8(network.resize(torch.from_numpy(image)[None])))
            labels.append(int(reference.labels[i]))
    if len(images) < 2:
        raise UserError(f"--features classifier: {reference.path} has too few readable images")
    images, labels = torch.cat(images), torch.tensor(labels)
    batches = math.ceil(len(images) / 128)
    epochs = max(3, math.ceil(100 / batches))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    shuffle = torch.Generator().manual_seed(0)
    bar = common.progress(epochs * batches, "training a classifier", "step")
    with torch.enable_grad():
        order = (torch.randperm(len(images), generator=shuffle) for _ in range(epochs))
        for index in itertools.chain.from_iterable(epoch.split(128) for epoch in order):
            bar.update()
            if len(index) == 1:  # no batch norm of one image
                continue
            logits = network(common.to_float(images[index].to(device)))[2]
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[index].to(device)).backward()
            optimizer.step()
            schedule.step()
    bar.close()
    for last, file in enumerate(places, 1):
        try:
            common.save(file, {"digest": reference.digest, "model": network.state_dict()})
            break
        except UserError as error:
            if last == len(places):
                print(f"note: {error}; the classifier is not kept")
    return network.eval().requires_grad_(False)


class Features:
    """What a network made of images: moments, and (keep) each image's features and logits, too."""

    def __init__(self, keep=True):
        self.keep, self.pool, self.spatial = keep, Moments(), Moments()
        self.rows, self.logits, self.right, self.asked, self.broken = [], [], 0, 0, 0

    def add(self, pool, spatial, logits, labels=None):
        """A batch, as arrays; labels (B,) are the classes that were asked for."""
        self.pool.add(pool)
        if spatial is not None:
            self.spatial.add(spatial)
        if self.keep:
            self.rows.append(pool)
            self.logits.append(logits)
        if labels is not None:
            self.right, self.asked = self.right + int((logits.argmax(1) == labels).sum()), self.asked + len(labels)

    def packed(self, done):
        """All of it, and how many images were seen, as arrays by name."""
        lists = {name: np.concatenate(x) for name in ("rows", "logits") if (x := getattr(self, name))}
        for name in ("pool", "spatial"):
            moments = getattr(self, name)
            lists |= {f"{name}_{part}": getattr(moments, part) for part in ("n", "mean", "scatter")}
            lists |= {f"{name}_waiting": np.concatenate(moments.waiting)} if moments.waiting else {}
        return {"done": done, **{name: getattr(self, name) for name in ("right", "asked", "broken")}, **lists}

    def unpack(self, content):
        """Takes what `packed` gave; the number of images."""
        arrays = {name: content[name] for name in content}
        for name in ("right", "asked", "broken"):
            setattr(self, name, int(arrays[name]))
        for name in ("rows", "logits"):
            setattr(self, name, [arrays[name]] if name in arrays else [])
        for name in ("pool", "spatial"):
            moments = Moments(int(arrays[f"{name}_n"]), arrays[f"{name}_mean"], arrays[f"{name}_scatter"])
            moments.waiting = [arrays[f"{name}_waiting"]] if f"{name}_waiting" in arrays else []
            setattr(self, name, moments)
        return int(arrays["done"])

    def gathered(self):
        """Of all ranks, in their order: a dict of arrays on rank 0, None elsewhere."""
        rank, world = common.ranks()
        parts = [self] * world
        if world > 1:
            dist.gather_object(self, parts if rank == 0 else None)
        if rank > 0:
            return None
        pool, spatial, whole = Moments(), Moments(), {}
        for part in parts:
            pool.merge(part.pool)
            spatial.merge(part.spatial)
        for end, moments in (("", pool), ("_s", spatial)):
            if moments.n > 1:
                whole[f"mu{end}"], whole[f"sigma{end}"] = moments.gaussian()
        if self.keep and pool.n:
            whole |= {name: np.concatenate([x for part in parts for x in getattr(part, name)])
                      for name in ("rows", "logits")}
        return {"n": pool.n, **whole, **{name: sum(getattr(part, name) for part in parts)
                                         for name in ("right", "asked", "broken")}}


@contextlib.contextmanager
def exact():
    """No TF32, which moves the features by more than the tools differ."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Judge:
    """A reference, and the network that looks at it and at samples. On all ranks alike; numbers are rank 0's.

    reference: see Source; None to look only. features: "inception" (resize "tf1" or "pytorch", weights as in
    load_inception) or "classifier". metrics: of METRICS; None: all that the two sides allow. size: see Source. cache:
    a folder for features and results, by the content of the images; None: torch.hub's; "off": nowhere.
    """

    def __init__(self, reference, features="inception", resize="tf1", weights=None, metrics=None, size=None,
                 data_root="data", cache=None, batch=64, device="cpu", is_rule="torch-fidelity"):
        self.metrics, self.is_rule, self.batch, self.device = metrics, is_rule, batch, torch.device(device)
        self.inception = features == "inception"
        self.cache = None if cache == "off" else Path(cache or Path(torch.hub.get_dir(), "fid"))
        self.reference = Source(reference, size, data_root) if reference else None
        with common.rank_zero_first():
            if self.inception:
                self.network, digest = load_inception(weights)
            else:
                self.network, digest = load_classifier(self.reference, data_root, self.cache, device), ""
        self.network.to(device)
        for tensor in self.network.state_dict().values() if common.ranks()[1] > 1 else ():
            dist.broadcast(tensor, 0)  # ranks that share no disk have trained classifiers of their own
        self.resize = RESIZE[resize] if self.inception else self.network.resize
        self.name = f"{features}-{digest or common.fingerprint(self.network)[:8]}" + f"-{resize}" * self.inception

    def look(self, images):
        """Features, spatial features (None of the classifier) and logits, arrays, of uint8 images: (B, H, W, 3), or a
        list of (H, W, 3)."""
        same = len({image.shape for image in images}) == 1
        parts = [torch.stack(list(images))] if same else [image[None] for image in images]
        with exact(), torch.autocast(self.device.type, enabled=False):
            found = self.network(torch.cat([self.resize(part.to(self.device)) for part in parts]))
        return [part if part is None else part.cpu().numpy() for part in found]

    def features(self, source, images=False):
        """The source's features and statistics: a dict on rank 0, None elsewhere; from the cache if they are there.
        Statistics that the source holds itself go first; then its images are looked at only if asked to (images)."""
        known = source.statistics if self.inception else {}
        if str(known.get("features", self.name)) != self.name:
            raise UserError(f"{source.path}: statistics of {known['features']}, not of {self.name}")
        if len(known.get("mu", range(2048))) != 2048:
            raise UserError(f"{source.path}: statistics of {len(known['mu'])} features, not of Inception's 2048")
        if not known and not source.n:
            raise UserError(f"{source.path}: --features classifier needs images, not statistics")
        first = common.ranks()[0] == 0
        if known and not (images and source.n):
            return {"n": 0, **known} if first else None

        def load(file):
            with np.load(file, allow_pickle=False) as content:
                return {"n": content["n"], **content}
        found = self.kept(lambda: f"{source.digest}-{self.name}.npz", load, lambda: self.extract(source),
                          lambda f, made: np.savez(f, **made))
        if first and "mu" not in found and not known:
            raise UserError(f"{source.path}: a covariance needs two images at least, there"
                            f" {'is one' if found['n'] else 'are none'} that can be read")
        return {**found, **known, "n": known.get("n", 0) if known else found["n"]} if first else None

    def kept(self, name, load, make, store):
        """load(file) if name() is in the cache and whole, else make(), stored by store(f, made); on rank 0, None
        elsewhere. All ranks take part in make; the rest is rank 0's."""
        found, first = None, common.ranks()[0] == 0
        file = self.cache and first and self.cache / name()
        if file:
            with contextlib.suppress(UserError), common.foreign(file):
                found = load(file)
        if agreed(found is not None):
            return found
        found = make()
        if file:
            try:
                with common.atomic(file) as f:
                    store(f, found)
            except UserError as error:
                print(f"note: {error}; nothing is kept for the next time (--cache DIR names another place)")
        return found

    def extract(self, source):
        """Features of the images, gathered. Of more than 100,000 only the moments are kept. What a rank has of its
        share is stored now and then, so that an interrupted job goes on."""
        rank, world = common.ranks()
        labels, known = source.labels, self.reference and self.reference.classes
        if source.classes and known and labels is not None:  # by name: samples may have some of the classes only
            labels = np.array([known.index(name) if name in known else -1 for name in source.classes])[labels]
        mine, found, done = np.array_split(np.arange(source.n), world)[rank], Features(keep=source.n <= 100_000), 0
        key, begun = agreed(source.digest if self.cache and rank == 0 else None), time.monotonic()
        key = key and f"{key}-{self.name}-{zlib.crc32(b'' if labels is None else labels.tobytes()):x}"
        partial = key and self.cache / f"{key}-{rank}-{world}.partial"
        if partial and partial.exists():  # of a job that was interrupted
            earlier = Features(found.keep)
            with contextlib.suppress(UserError), common.foreign(partial):
                with np.load(partial, allow_pickle=False) as content:
                    done, found = earlier.unpack(content), earlier
        bar = common.progress(len(mine), f"features of {source.path.name}", "img", rank, done)
        mine = mine[done:]
        chunks = iter(np.array_split(mine, range(self.batch, len(mine), self.batch)) if len(mine) else ())
        with ThreadPoolExecutor(4) as readers:
            def ahead(chunk):  # a batch in each thread
                return readers.submit(lambda: [(i, source.read(i)) for i in chunk.tolist()])
            waiting = collections.deque(map(ahead, itertools.islice(chunks, 4)))
            while waiting:
                read = waiting.popleft().result()
                waiting.extend(map(ahead, itertools.islice(chunks, 1)))
                index = [i for i, image in read if image is not None]
                images = [torch.from_numpy(image) for _, image in read if image is not None]
                if images:
                    found.add(*self.look(images), None if labels is None else labels[index])
                found.broken += len(read) - len(images)
                done += len(read)
                bar.update(len(read))
                if partial and time.monotonic() - begun > PAUSE:
                    with contextlib.suppress(UserError), common.atomic(partial) as f:  # no room: goes on without
                        np.savez(f, **found.packed(done))
                    begun = time.monotonic()
        bar.close()
        whole = found.gathered()
        if key and rank == 0:  # all have given theirs
            for file in self.cache.glob(f"{glob.escape(key)}-*.partial"):
                file.unlink(missing_ok=True)
        return whole

    @functools.cached_property
    def side(self):
        """The reference's features and statistics."""
        return self.features(self.reference, images=self.metrics is None or "pr" in self.metrics)

    @functools.cached_property
    def floor(self):
        """The distance between two random halves of the reference's images: what samples can hardly get below at half
        its size. None where the reference has too few images, or comes with statistics."""
        rows, halves = self.side.get("rows", ()), []
        if len(rows) < 4 or (self.inception and self.reference.statistics):
            return None
        order = np.random.RandomState(0).permutation(len(rows))
        for part in (order[::2], order[1::2]):
            halves.append(Moments())
            halves[-1].add(rows[part])
        return frechet(*(half.gaussian() for half in halves))

    def results(self, source):
        """The numbers of a source, on rank 0: found again by content if they were computed before."""
        def name():
            about = [source.digest, self.reference.digest, self.name, self.metrics, self.is_rule]
            return f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
        return self.kept(name, lambda file: json.loads(file.read_text()), lambda: self.measure(self.features(
            source, images=not self.metrics or bool({"is", "pr"} & {*self.metrics}))),
                         lambda f, numbers: f.write(json.dumps(numbers).encode()))

    def measure(self, samples):
        """Numbers, by name, from the samples' features, on rank 0. Raises UserError for a metric that was asked for and
        cannot be had."""
        reference, numbers = self.side, {}  # all ranks take part in the reference's features
        if samples is None:
            return None
        both = samples.keys() & reference.keys()

        def wanted(metric, possible, why):
            if not possible and self.metrics and metric in self.metrics:
                raise UserError(f"--metrics {metric}: {why}")
            return possible and (not self.metrics or metric in self.metrics)
        if not self.metrics or "fid" in self.metrics:
            numbers["fid" if self.inception else "fd_classifier"] = frechet(
                *((side["mu"], side["sigma"]) for side in (samples, reference)))
            if self.floor is not None:
                numbers["floor"] = self.floor
        if wanted("sfid", "mu_s" in both, "mu_s and sigma_s are not known of both sides"):
            numbers["sfid"] = frechet(*((side["mu_s"], side["sigma_s"]) for side in (samples, reference)))
        scored = self.inception and "logits" in samples
        if wanted("is", scored, "needs the samples' images (at most 100,000) and Inception"):
            numbers["is"], numbers["is_std"] = inception_score(
                samples["logits"], **({"chunk": 5000, "shuffle": False} if self.is_rule == "adm" else {}))
        if not self.inception and samples.get("asked"):
            numbers["accuracy"] = float(samples["right"] / samples["asked"])
        enough = "rows" in both and min(len(samples["rows"]), len(reference["rows"])) > 3
        if wanted("pr", enough, "needs images on both sides, more than 3 and at most 100,000 of each"):
            where = self.device if self.device.type == "cuda" else "cpu"  # Apple's GPUs have no float64
            numbers["precision"], numbers["recall"] = precision_recall(samples["rows"], reference["rows"], device=where)
        return {**numbers, "n": int(samples["n"]), "reference_n": int(reference["n"]),
                "broken": int(samples.get("broken", 0))}


def agreed(answer):
    """Rank 0's answer, on all ranks."""
    box = [answer]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


# --- Command line -----------------------------------------------------------------------------------------------------

def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="folder, .npz, statistics, or a data set")
    add("reference", metavar="REFERENCE", nargs="?", help="the same kinds")
    add("--metrics", help="of fid, sfid, is, pr, separated by commas (default: all that the two sides allow)")
    add("--features", choices=("inception", "classifier"), default="inception", help="classifier: a small one, trained"
                                                                                    " on the reference's labels")
    add("--resize", choices=RESIZE, default="tf1", help="tf1: torch-fidelity and the ADM suite (default); pytorch:"
                                                        " pytorch-fid")
    add("--is-rule", choices=("torch-fidelity", "adm"), default="torch-fidelity", help="10 splits of shuffled rows, or"
                                                                                      " chunks of 5,000 as they come")
    add("--weights", metavar="FILE", help=f"{WEIGHTS[0]} (default: FID_WEIGHTS, torch.hub's cache, else downloaded)")
    add("--save-stats", metavar="FILE.npz", help="write mu, sigma, mu_s, sigma_s of SAMPLES; without REFERENCE")
    add("--image-size", type=int, metavar="PIXELS", help="centre crop of pictures of other sizes, by ADM's rule"
                                                         " (default: as they are; named data sets: the samples' size)")
    add("--data-root", default="data", help="where named data sets are, or are downloaded to")
    add("--cache", metavar="DIR", help="where features are kept (default: torch.hub's folder); off: nowhere")
    add("--batch-size", type=int, default=64)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    args = parser.parse_args()
    args.metrics = args.metrics and args.metrics.split(",")
    if wrong := [m for m in args.metrics or [] if m not in METRICS]:
        parser.error(f"--metrics {wrong[0]}: there are {', '.join(METRICS)}")
    if bool(args.reference) == bool(args.save_stats):
        parser.error("give a REFERENCE, or --save-stats FILE")
    if args.save_stats and args.features == "classifier":
        parser.error("--save-stats is for Inception's features")
    if args.save_stats and (Path(args.save_stats).suffix != ".npz" or Path(args.save_stats) == Path(args.samples)):
        parser.error("--save-stats writes a new .npz")
    if args.batch_size < 1 or (args.image_size or 8) < 8:
        parser.error("--batch-size is 1 or more, --image-size 8 or more")
    return args


def main():
    """Features of both sides, numbers, one line, and one JSON file."""
    args = arguments()
    rank, world, device = common.distributed(args.device)
    size, samples = args.image_size, Source(args.samples, args.image_size, args.data_root)
    if not size and named(args.reference):
        size = next((len(image) for i in range(samples.n) if (image := samples.read(i)) is not None), None)
    judge = Judge(args.reference, args.features, args.resize, args.weights, args.metrics, size, args.data_root,
                  args.cache, args.batch_size, device, args.is_rule)
    if args.save_stats:
        if samples.statistics:
            raise UserError(f"{samples.path} has statistics already")
        side = judge.features(samples)
        if rank == 0:
            with common.atomic(args.save_stats) as f:
                np.savez(f, **{k: side[k] for k in ("mu", "sigma", "mu_s", "sigma_s", "n") if k in side},
                         features=judge.name)
            print(f"wrote {args.save_stats}: statistics of {int(side['n']):,} images, {judge.name}")
    else:
        numbers = judge.results(samples)
        if rank == 0:
            report(args, samples, judge, numbers)
    if world > 1:
        dist.destroy_process_group()


def report(args, samples, judge, numbers):
    """One line, and the same as JSON beside the samples (of a data set: here)."""
    meta = {k: samples.meta[k] for k in ("checkpoint", "step", "weights", "cfg", "steps", "seed") if k in samples.meta}
    about = {"samples": args.samples, "reference": args.reference, "features": judge.name, **meta}
    if "is" in numbers:
        about["is_rule"] = args.is_rule
    if args.image_size:
        about["image_size"] = args.image_size
    notes = {f"{samples.lossy:,} of the samples are JPEG, whose artefacts change the features": samples.lossy,
             f"{numbers['broken']:,} samples are broken and left out": numbers["broken"]}
    for note in (note for note, true in notes.items() if true):
        print(f"note: {note}")
    print(line(numbers) + " | " + ", ".join(f"{k} {v}" for k, v in about.items()))
    beside = samples.path / "fid.json" if samples.path.is_dir() else samples.path.with_suffix(".fid.json")
    if samples.named:
        beside = Path(args.samples.replace(":", "-") + ".fid.json")
    with common.atomic(beside) as f:
        f.write(json.dumps({**numbers, **about, "torch": str(torch.__version__)}, indent=1).encode())
    print(f"wrote {beside}")


def line(numbers):
    """The numbers as people write them."""
    said = [f"{NAMES.get(k, k)} {v:.4g}" + (f" +- {numbers['is_std']:.2g}" if k == "is" else "")
            for k, v in numbers.items() if isinstance(v, float) and k != "is_std"]
    count, of = (f"{numbers[k]:,}" if numbers[k] else "statistics" for k in ("n", "reference_n"))
    few = "fid" in numbers and 0 < numbers["n"] < 10_000
    return f"{', '.join(said)} (N {count}, reference {of})" + ": few samples, published FID is of 50,000" * few


if __name__ == "__main__":
    common.command(main)
