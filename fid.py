"""FID, sFID, Inception score, precision and recall: the numbers that papers report, in one file.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py samples/ ffhq.npz --resize pytorch                # pytorch-fid, as MADFormer
    python fid.py /data/imagenet/train --image-size 256 --save-stats train.npz
    python fid.py samples.npz fashion-mnist --features classifier   # toy runs: no weights needed
    torchrun --nproc_per_node 8 -- fid.py samples.npz reference.npz

Idea      A network turns every image into 2048 features. FID (Heusel et al., 2017) is the Frechet
          distance between two Gaussians that have the mean and covariance of the features of the
          samples and of real images; sFID (Nash et al., 2021) is the same for 2023 features that
          keep their positions. The Inception score (Salimans et al., 2016) looks at the class
          probabilities. Precision (Kynkaanniemi et al., 2019) is the share of samples that lie
          among the real images, and recall the share of real images that lie among the samples.
Same as   torch-fidelity and the ADM suite with `--resize tf1`, the default (TransDiff, D-AR);
          pytorch-fid with `--resize pytorch` (MADFormer). Numbers compare only if resize, reference
          and number of samples are the same. Published FID is of 50,000 samples, MADFormer's FFHQ
          of 8,000.
Inputs    SAMPLES and REFERENCE are each a folder of pictures; an .npz with uint8 images arr_0
          (N, H, W, 3) and perhaps labels arr_1; statistics mu, sigma and perhaps mu_s, sigma_s in
          an .npz, which may also have images, or in a .pt; or a named data set: fashion-mnist is
          its test images, fashion-mnist:train its training images.
Floor     Two sets of real images also have a distance, which grows as they get smaller. The floor
          beside a distance is that of as many real images as there are samples: see `floor`.

  --save-stats FILE    write an .npz: the statistics of the samples, and their features
  --features NAME      inception (default), or classifier: a small one, trained on the reference's
                       labels
  --resize NAME        tf1 (default), as torch-fidelity and the ADM suite; or pytorch, as
                       pytorch-fid and MADFormer
  --weights FILE       of Inception (default: FID_WEIGHTS, torch.hub's folder, else downloaded)
  --image-size N       pixels; centre crop of pictures of other sizes (default: samples stay as they
                       are, the reference takes their size)
  --data-root DIR      where data sets are, or are downloaded to (default: data)
  --device NAME        cpu, cuda, cuda:1, mps (default: the best there is)
"""
import argparse
import itertools
import json
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.special import entr
from tqdm import tqdm

import common
from common import UserError

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299       # pixels of the network's input
BATCH = 128      # images that are read at a time
KEEP = 100_000   # images of a set; the features of a larger one are not kept, but its moments are
DATA_SETS = ("shapes", *common.NAMED)
STORED = ("mu", "sigma", "mu_s", "sigma_s",                           # of every tool
          "n", "features", "rows", "logits", "labels")                # and of --save-stats


# --- The network ----------------------------------------------------------------------------------

class Unit(nn.Sequential):
    """Convolution, batch norm with stored statistics, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


# The blocks. Each line is a unit: its input, which is that of the block or the output of another
# unit, its name, channels, height and width of the kernel, and perhaps stride and padding.
A = """
input           branch1x1       64  1 1
input           branch5x5_1     48  1 1
branch5x5_1     branch5x5_2     64  5 5
input           branch3x3dbl_1  64  1 1
branch3x3dbl_1  branch3x3dbl_2  96  3 3
branch3x3dbl_2  branch3x3dbl_3  96  3 3
"""
B = """
input           branch3x3       384  3 3  2 0
input           branch3x3dbl_1  64   1 1
branch3x3dbl_1  branch3x3dbl_2  96   3 3
branch3x3dbl_2  branch3x3dbl_3  96   3 3  2 0
"""
C = """
input           branch1x1       192  1 1
input           branch7x7_1     {c}  1 1
branch7x7_1     branch7x7_2     {c}  1 7
branch7x7_2     branch7x7_3     192  7 1
input           branch7x7dbl_1  {c}  1 1
branch7x7dbl_1  branch7x7dbl_2  {c}  7 1
branch7x7dbl_2  branch7x7dbl_3  {c}  1 7
branch7x7dbl_3  branch7x7dbl_4  {c}  7 1
branch7x7dbl_4  branch7x7dbl_5  192  1 7
"""
D = """
input           branch3x3_1     192  1 1
branch3x3_1     branch3x3_2     320  3 3  2 0
input           branch7x7x3_1   192  1 1
branch7x7x3_1   branch7x7x3_2   192  1 7
branch7x7x3_2   branch7x7x3_3   192  7 1
branch7x7x3_3   branch7x7x3_4   192  3 3  2 0
"""
E = """
input           branch1x1       320  1 1
input           branch3x3_1     384  1 1
branch3x3_1     branch3x3_2a    384  1 3
branch3x3_1     branch3x3_2b    384  3 1
input           branch3x3dbl_1  448  1 1
branch3x3dbl_1  branch3x3dbl_2  384  3 3
branch3x3dbl_2  branch3x3dbl_3a 384  1 3
branch3x3dbl_2  branch3x3dbl_3b 384  3 1
"""
AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # torchvision counts the padding


class Mixed(nn.Module):
    """A block of the network: what its units and a pool return is concatenated.

    table: the units, see above; those whose output no other unit takes are the ends. c_pool:
    channels of the 1x1 unit that follows the pool, 0 for none.
    """

    def __init__(self, c_in, table, c_pool=192, pool=AVERAGE):
        super().__init__()
        self.sources = {}
        channels = {"input": c_in}
        for line in table.strip().splitlines():
            source, name, *numbers = line.split()
            c_out, height, width, *stride = map(int, numbers)
            self.add_module(name, Unit(channels[source], c_out, (height, width), *stride))
            self.sources[name] = source
            channels[name] = c_out
        self.pool = pool
        self.branch_pool = Unit(c_in, c_pool, 1) if c_pool else nn.Identity()

    def forward(self, x):
        outputs = {"input": x}
        for name, source in self.sources.items():
            outputs[name] = getattr(self, name)(outputs[source])
        ends = [h for name, h in outputs.items() if name not in self.sources.values()]
        return torch.cat([*ends, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Inception v3 as it was in TensorFlow in 2015, with the names of its published weights."""
    widths = {"": 2048, "_s": 2023}  # of mu and of mu_s

    def __init__(self):
        super().__init__()  # the layers run in this order
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.pool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padding=0)
        self.pool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = Mixed(192, A, 32)                            # (B, 256, 35, 35)
        self.Mixed_5c = Mixed(256, A, 64)
        self.Mixed_5d = Mixed(288, A, 64)
        self.Mixed_6a = Mixed(288, B, 0, nn.MaxPool2d(3, 2))         # (B, 768, 17, 17)
        self.Mixed_6b = Mixed(768, C.format(c=128))
        self.Mixed_6c = Mixed(768, C.format(c=160))
        self.Mixed_6d = Mixed(768, C.format(c=160))
        self.Mixed_6e = Mixed(768, C.format(c=192))
        self.Mixed_7a = Mixed(768, D, 0, nn.MaxPool2d(3, 2))         # (B, 1280, 8, 8)
        self.Mixed_7b = Mixed(1280, E)
        self.Mixed_7c = Mixed(2048, E, 192, nn.MaxPool2d(3, 1, 1))   # torchvision averages
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, x):
        """Return pool3 (B, 2048), logits (B, 1008) without their bias, and spatial (B, 2023).

        x (B, 3, 299, 299) is what a function of RESIZE returns.
        """
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
            if name == "Mixed_6d":  # in the order (row, column, channel), as in TensorFlow
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool3 = x.mean((2, 3))
        return pool3, F.linear(pool3, self.fc.weight), spatial


def load_inception(path=None):
    """Return the network and the first eight digits of its file's SHA-256.

    The file is `path`, else FID_WEIGHTS in the environment, else in torch.hub's folder, where it is
    downloaded if missing. Raise UserError if it cannot be had or holds something else.
    """
    given = path or os.environ.get("FID_WEIGHTS")
    file = Path(given or f"{torch.hub.get_dir()}/checkpoints/{Path(URL).name}")
    if not given:
        common.download(URL, file, DIGEST, "or name it with --weights; the classifier needs none")
    state = common.read_checkpoint(file)
    network = Inception().to(memory_format=torch.channels_last)
    with common.untrusted(file, "not the weights of Inception"):
        network.load_state_dict(state)
    return network, common.short_hash(file.read_bytes())[:8]


def stretch_tf1(x):
    """Return x (..., size) as float32 (..., 299), resized as by TensorFlow 1.

    Pixel i lies at i * size / 299, between two pixels. No antialiasing.
    """
    size = x.shape[-1]
    position = torch.arange(SIDE, device=x.device) * (size / SIDE)   # (299,), float32
    low = position.long()
    high = (low + 1).clamp(max=size - 1)
    first = x[..., low].float()
    second = x[..., high].float()
    return first + (second - first) * (position - low)


def resize_tf1(images):
    """Return uint8 images (B, H, W, 3) as the network's input, as torch-fidelity and ADM do."""
    x = stretch_tf1(images.permute(0, 3, 1, 2))                      # (B, 3, H, 299)
    x = stretch_tf1(x.mT).mT                                         # (B, 3, 299, 299)
    return (x - 128) / 128


def resize_pytorch(images):
    """Return uint8 images (B, H, W, 3) as the network's input, as pytorch-fid does."""
    x = images.permute(0, 3, 1, 2).float() / 255                     # (B, 3, H, W)
    return 2 * F.interpolate(x, SIDE, mode="bilinear", align_corners=False) - 1


RESIZE = {"tf1": resize_tf1, "pytorch": resize_pytorch}


# --- Distances ------------------------------------------------------------------------------------

def moments(rows):
    """Return X^T X in float64, where X is the rows (n, d) with a column of ones in front.

    It has n, the sums and the sums of products of the rows, and is added up over sets of rows.
    """
    x = np.column_stack([np.ones(len(rows)), rows])
    return x.T @ x                                                   # (1 + d, 1 + d)


def gaussian(sums):
    """Return the mean (d,) and unbiased covariance (d, d) of at least two rows, given `moments`.

    The difference cancels digits only where a mean is thousands of times its standard deviation.
    """
    n = sums[0, 0]
    mean = sums[0, 1:] / n
    return mean, (sums[1:, 1:] - n * np.outer(mean, mean)) / (n - 1)


def root(covariance):
    """Return R (d, r), where r is the rank, so that R R^T is the covariance (d, d)."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # not of full rank
        w, Q = np.linalg.eigh(covariance)
        keep = w > len(w) * np.finfo(float).eps * w.max()  # the others are rounding
        return Q[:, keep] * np.sqrt(w[keep])


def frechet(m1, s1, m2, s2):
    """Return |m1 - m2|^2 + Tr (s1 + s2 - 2 (s1 s2)^(1/2)) of means (d,) and covariances (d, d).

    With s1 = R R^T and s2 = S S^T, the eigenvalues of s1 s2 are those of M^T M with M = S^T R, and
    zeros: the trace of the root is the sum of the singular values of M.
    """
    m1, s1, m2, s2 = [np.asarray(part, np.float64) for part in (m1, s1, m2, s2)]
    trace_root = np.linalg.norm(root(s2).T @ root(s1), "nuc")
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * trace_root


def floor(rows, n):
    """Return how far n real images are from other real images, given features (N, d) of real ones.

    A draw is the Frechet distance between m random rows and all other rows, where m is n, or N / 2
    if that is less. The result is the mean of five draws, their standard deviation, and m.
    """
    rng = np.random.default_rng(0)
    m = min(n, len(rows) // 2)
    whole = moments(rows)
    distances = []
    for _ in range(5):
        drawn = moments(rng.permutation(rows)[:m])
        distances.append(frechet(*gaussian(drawn), *gaussian(whole - drawn)))
    return np.mean(distances), np.std(distances), m


def inception_score(logits, splits=10, shuffle=True):
    """Return the mean and standard deviation, over splits, of exp E KL(p(y|x), p(y)).

    logits: (n, classes). The defaults are the 10 splits and the shuffle of torch-fidelity. The ADM
    suite takes 5,000 rows at a time as they come: also ten splits of 50,000 samples, which have to
    be in random order.
    """
    probs = torch.as_tensor(logits).double().softmax(1)
    n = len(probs)
    if shuffle:
        probs = probs[np.random.RandomState(2020).permutation(n)]
    scores = []
    for part in probs.tensor_split([i * n // splits for i in range(1, splits)]):
        if len(part):  # the mean divergence is the entropy of the mean less the mean entropy
            divergence = entr(part.mean(0)).sum() - entr(part).sum(1).mean()
            scores.append(divergence.exp().item())
    return np.mean(scores), np.std(scores)


def radii(x):
    """Return the distance of each row to its third nearest other row, block by block."""
    # The nearest of all is the row itself.
    return torch.cat([torch.cdist(rows, x).kthvalue(4).values for rows in x.split(512)])


def inside(x, centres, limits):
    """Return which rows of x lie no farther from at least one centre than its limit, a radius."""
    return torch.cat([(torch.cdist(rows, centres) <= limits).any(1) for rows in x.split(512)])


def precision_recall(samples, reference, device="cpu"):
    """Return precision and recall of features (n, d) and (m, d), more than 3 of each."""
    samples = torch.as_tensor(samples).to(device, torch.float64)
    reference = torch.as_tensor(reference).to(device, torch.float64)
    precision = inside(samples, reference, radii(reference)).double().mean()
    recall = inside(reference, samples, radii(samples)).double().mean()
    return precision.item(), recall.item()


# --- Sets of images -------------------------------------------------------------------------------

class Source:
    """A set of images, its statistics, or both: see Inputs above. Raise UserError for other files.

    data: the images as common.Data, or None; labels of -1 are unknown. statistics: arrays by name.
    meta: what sample.py wrote beside the images. named: the name of a data set, or None. size:
    pixels; pictures of another size are centre-cropped to a square, by ADM's rule. None leaves them
    as they are, and is 32 for a named set.
    """

    def __init__(self, path, size=None, data_root="data"):
        name, _, split = str(path).partition(":")
        self.named = name if name in DATA_SETS and split in ("", "train", "test") else None
        self.path = Path(data_root, name) if self.named else Path(path)
        self.size = size or (32 if self.named else 0)
        self.data = None
        self.statistics = {}
        self.meta = {}
        if self.named:
            self.data = common.load_data(name, data_root, self.size, split or "test")
        elif self.path.is_file():
            self.open_file()
        else:
            self.data = common.load_folder(self.path, self.size)
        beside = self.beside("meta.json")
        if beside.is_file():
            with common.untrusted(beside):
                self.meta = dict(json.loads(beside.read_text()))
        if self.data:
            self.find_labels()

    def beside(self, name):
        """Return the path of a file about this set, which is in a folder or beside a file."""
        if self.path.is_dir():
            return self.path / name
        return self.path.with_suffix(f".{name}")

    def open_file(self):
        """Read images, statistics or both from an .npz, or statistics from a checkpoint."""
        with common.untrusted(self.path, "neither images nor statistics"):
            if self.path.suffix.lower() == ".npz":
                content = np.load(self.path, allow_pickle=False)
            else:
                content = common.read_checkpoint(self.path)
            if "mu" in content:
                self.statistics = {k: np.asarray(content[k]) for k in STORED if k in content}
                self.statistics["n"] = int(content.get("n", 0))
            elif "arr_0" not in content:
                raise ValueError("it has neither arr_0 nor mu")
            if "arr_0" in content:
                self.data = stored_data(content, self.path)

    def find_labels(self):
        """Take labels from file names such as 000123_class4.png, if they have them.

        Take none if meta says that they are not of classes, but of prompts, for example.
        """
        found = [re.search(r"_class(\d{1,5})\.\w+$", path.name) for path in self.data.paths]
        if found and all(found):
            self.data.labels = np.array([int(match[1]) for match in found])
            self.data.classes = []
        if self.meta.get("labels", "balanced") != "balanced":
            self.data.labels.fill(-1)

    def height(self):
        """Return the height of the first image in pixels."""
        return self.size or self.data.read(0).height

    def read(self, i):
        """Return image i, uint8 (H, W, 3), and its label; or None for a broken file, naming it."""
        try:
            image = self.data.open(i)
            if self.size:
                image = common.centre_crop(image, self.size)
            return torch.from_numpy(np.array(image)), self.data.labels[i]
        except Exception as error:
            tqdm.write(f"left out broken file {self.data.paths[i]}: {error}", sys.stderr)


def stored_data(archive, path):
    """Return the images of an .npz as common.Data. Raise ValueError if they are not images."""
    images = stored_images(archive)
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or not images.size:
        raise ValueError(f"arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")

    def open_image(i):
        return Image.fromarray(images[i])

    labels = np.broadcast_to(archive.get("arr_1", -1), len(images)).astype(np.int64)
    return common.Data(path.name, labels, [], open_image, f"{path.stat().st_mtime_ns:x}")


def stored_images(archive):
    """Return arr_0 of an .npz, memory-mapped unless it is compressed."""
    npy = np.lib.format
    entry = archive.zip.getinfo("arr_0.npy")
    if entry.compress_type == zipfile.ZIP_STORED:
        f = archive.zip.fp
        f.seek(entry.header_offset)
        f.seek(entry.header_offset + f.read(2**10).index(npy.MAGIC_PREFIX))
        npy.read_magic(f)
        shape, fortran, dtype = npy.read_array_header_1_0(f)
        if dtype == np.uint8 and not fortran:  # mapped objects would be pointers
            return np.memmap(f, dtype, "r", f.tell(), shape)
    return archive["arr_0"]


# --- The classifier -------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small network for small images, which takes the place of Inception."""
    widths = {"": 128}  # of mu

    def __init__(self, classes, side):
        super().__init__()
        self.side = side
        self.layers = nn.Sequential()
        c_in = 3
        for c_out in (32, 64, 128):
            self.layers.extend([nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out),
                                nn.ReLU(), nn.MaxPool2d(2)])
            c_in = c_out
        self.fc = nn.Linear(128 * (side // 8) ** 2, classes)

    def forward(self, x):
        """Return features (B, 128) and logits (B, classes) of x (B, 3, side, side)."""
        maps = self.layers(x)
        return maps.mean((2, 3)), self.fc(maps.flatten(1))

    def resize(self, images):
        """Return uint8 images (B, H, W, 3) as this network's input."""
        x = common.to_float(images.permute(0, 3, 1, 2))
        return F.interpolate(x, self.side, mode="bilinear", antialias=True)


def load_classifier(reference, data_root, device):
    """Return a classifier trained on the reference, or on the training images of a named set.

    It is trained once and kept beside the reference. Raise UserError if there are no two classes.
    """
    data = reference.data
    if not data or not 0 <= data.labels.min() < data.labels.max() < 10**5:
        raise UserError(f"--features classifier: {reference.path} has no labels of two classes:"
                        " give a named data set, class folders, or an .npz with arr_1")
    if reference.named:
        data = common.load_data(reference.named, data_root, reference.size)
    side = max(8, min(64, reference.height()))
    file = reference.beside(f"classifier-{data.key}-{side}.pt")
    torch.manual_seed(0)
    network = Classifier(int(data.labels.max()) + 1, side)
    network.to(device, memory_format=torch.channels_last)
    with common.rank_zero_first():
        if file.exists():
            common.load_strict(network, common.read_checkpoint(file), file)
        else:
            train_classifier(network, data, device)
            try:
                common.save(file, network.state_dict())
            except UserError as error:
                print(f"note: {error}")
    return network.eval()


def train_classifier(network, data, device):
    """Train for at most 1400 steps, each on 128 random images."""
    rng = np.random.default_rng(0)
    samples = common.Samples(data, network.side, common.centre)
    steps = min(1400, 100 + len(data.labels) // 40)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    with common.progress(steps, "training a classifier", "step") as bar, common.true_float32():
        for _ in range(steps):
            indices = rng.integers(len(data.labels), size=128)
            images, _ = samples[0, indices]
            _, logits = network(common.to_float(images.to(device)))
            loss = F.cross_entropy(logits, torch.from_numpy(data.labels[indices]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()


# --- Features and numbers -------------------------------------------------------------------------

class Features:
    """What a network made of images: moments and, with keep, the features of each image."""

    def __init__(self, keep=True):
        self.keep = keep
        self.broken = 0
        self.moments = {"": np.zeros((1, 1)), "_s": np.zeros((1, 1))}  # of mu and of mu_s
        self.batches = []

    def add(self, labels, rows, logits, *spatial):
        """Add arrays: labels (B,), features (B, d), logits (B, classes), perhaps spatial (B, s)."""
        for end, features in zip(self.moments, (rows, *spatial)):
            self.moments[end] = self.moments[end] + moments(features)
        if self.keep:
            self.batches.append((labels, rows, logits))

    def gathered(self):
        """Return what all ranks have, in order of rank, as a dict."""
        parts = common.gather(self)
        whole = {"broken": sum(part.broken for part in parts)}
        for end in ("_s", ""):  # so that n is that of mu
            together = sum(part.moments[end] for part in parts)
            whole["n"] = int(together[0, 0])
            if whole["n"] > 1:
                whole[f"mu{end}"], whole[f"sigma{end}"] = gaussian(together)
        batches = [batch for part in parts for batch in part.batches]
        for name, arrays in zip(("labels", "rows", "logits"), zip(*batches)):
            whole[name] = np.concatenate(arrays)
        return whole


class Evaluator:
    """A reference, and the network that extracts its features and those of samples.

    All ranks construct it and call its methods, which return the same on all of them. reference,
    size and data_root: see Source; without a reference there are features only. features:
    "inception", with resize "tf1" or "pytorch" and weights as in load_inception, or "classifier".
    Raise UserError for an unusable reference.
    """

    def __init__(self, reference, features="inception", *, resize="tf1", weights=None, size=None,
                 data_root="data", device="cpu"):
        source = Source(reference, size, data_root) if reference else None
        self.device = torch.device(device)
        self.inception = features == "inception"
        if self.inception:
            network, digest = load_inception(weights)
            self.resize = RESIZE[resize]
            self.name = f"inception-{digest}-{resize}"
        else:
            network = load_classifier(source, data_root, device)
            self.resize = network.resize
            self.name = f"classifier-{common.fingerprint(network)[:8]}"
            self.classes = source.data.classes
        self.network = network.to(self.device)
        self.reference = self.side(source) if source else None

    @torch.no_grad()
    def extract(self, features, images, labels):
        """Add uint8 images (B, H, W, 3), or a list of (H, W, 3), and labels (B,) to a Features."""
        inputs = []
        with common.true_float32():
            for _, equal in itertools.groupby(images, np.shape):
                inputs.append(self.resize(torch.stack([*equal]).to(self.device)))
            arrays = [output.cpu().numpy() for output in self.network(torch.cat(inputs))]
        features.add(labels, *arrays)

    def extract_all(self, source):
        """Return the gathered features of a Source's images. Each rank reads its share."""
        n = len(source.data.labels)
        features = Features(keep=n <= KEEP)
        share = common.rank_share(n)
        bar = common.progress(len(share), f"features of {source.path.name}", "img")
        with bar, ThreadPoolExecutor(8) as threads:
            for indices in share.split(BATCH):
                whole = [pair for pair in threads.map(source.read, indices.tolist()) if pair]
                if whole:
                    self.extract(features, *zip(*whole))
                features.broken += len(indices) - len(whole)
                bar.update(len(indices))
        return features.gathered()

    def side(self, source):
        """Return the features and statistics of a Source as a dict.

        If a file has statistics, they are taken rather than those of its images. n is 0 if it does
        not say of how many images they are. Raise UserError for statistics that are not finite, not
        of this network or of less than two images.
        """
        known = source.statistics
        if str(known.get("features", self.name)) != self.name:
            raise UserError(f"{source.path} is of {known['features']}, not of {self.name}")
        found = {}
        if source.data:
            if not self.inception and source.data.classes not in ([], self.classes):
                source.data.labels.fill(-1)  # they are not those of the classifier
            found = self.extract_all(source)
            if known:  # and not the statistics of the images beside them
                found = {name: found[name] for name in ("rows", "logits") if name in found}
        side = {"features": self.name, **found, **known}
        if "mu" not in side:
            raise UserError(f"{source.path}: statistics need two readable images, not {side['n']}")
        with common.untrusted(source.path, "unusable as statistics"):
            for end, width in self.network.widths.items():
                if f"mu{end}" in side:
                    both = np.vstack([side[f"mu{end}"], side[f"sigma{end}"]])
                    if both.shape != (width + 1, width) or not np.isfinite(both).all():
                        raise ValueError(f"mu{end}: not finite, or not of {width} features")
        return side

    def compare(self, samples):
        """Return all numbers that the reference and the samples allow.

        samples: what `side` or `Features.gathered` returns. The numbers are a dict: fid or
        fd_classifier, floor, sfid, is, precision, recall and accuracy, and counts of images.
        """
        reference = self.reference
        n = samples["n"]
        rows = [side.get("rows", ()) for side in (samples, reference)]
        distance = frechet(samples["mu"], samples["sigma"], reference["mu"], reference["sigma"])
        numbers = {"fid" if self.inception else "fd_classifier": distance}
        if n and reference["n"] == len(rows[1]) > 3:
            numbers["floor"], numbers["floor_std"], numbers["floor_n"] = floor(rows[1], n)
        if "mu_s" in samples and "mu_s" in reference:
            numbers["sfid"] = frechet(
                samples["mu_s"], samples["sigma_s"], reference["mu_s"], reference["sigma_s"])
        if self.inception and "logits" in samples:
            numbers["is"], numbers["is_std"] = inception_score(samples["logits"])
        labels = samples.get("labels", [-1])
        if not self.inception and min(labels) >= 0:
            numbers["accuracy"] = (samples["logits"].argmax(1) == labels).mean()
        if min(map(len, rows)) > 3:
            device = self.device if self.device.type == "cuda" else "cpu"  # MPS has no float64
            numbers["precision"], numbers["recall"] = precision_recall(*rows, device)
        return {**numbers, "n": n, "reference_n": reference["n"],
                "broken": samples.get("broken", 0)}


def describe(numbers):
    """Return the numbers as one line for people."""
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in numbers.items())


# --- Command line ---------------------------------------------------------------------------------

def arguments():
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples")
    add("reference", nargs="?")
    add("--save-stats")
    add("--features", choices=["inception", "classifier"], default="inception")
    add("--resize", choices=RESIZE, default="tf1")
    add("--weights")
    add("--image-size", type=common.positive)
    add("--data-root", default="data")
    add("--device")
    args = parser.parse_args()
    if not args.reference and (args.features == "classifier" or not args.save_stats):
        parser.error("give a REFERENCE; only --save-stats of Inception's features needs none")
    if args.save_stats == args.samples:
        parser.error("--save-stats writes a new file")
    return args


def main():
    """Compare two sets. Print the numbers, and write them beside the samples, with the settings of
    sample.py if it made these."""
    args = arguments()
    process = common.launch(args.device)
    samples = Source(args.samples, args.image_size, args.data_root)
    size = samples.height() if samples.data else args.image_size
    evaluator = Evaluator(args.reference, args.features, resize=args.resize, weights=args.weights,
                          size=size, data_root=args.data_root, device=process.device)
    side = evaluator.side(samples)
    if process.rank > 0:
        return
    if args.save_stats:
        with common.atomic(args.save_stats) as f:
            np.savez(f, **side)
        print(f"wrote {args.save_stats}: {evaluator.name} of {side['n']:,} images")
    if args.reference:
        numbers = {**evaluator.compare(side), "features": evaluator.name, "image_size": size,
                   "samples": args.samples, "reference": args.reference}
        print(describe(numbers))
        file = samples.beside("fid.json")
        common.save_json(file, {**samples.meta, **numbers})
        print(f"wrote {file}")


if __name__ == "__main__":
    common.run_script(main)
