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
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import common
from common import UserError

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299       # pixels of the network's input
KEEP = 100_000   # images of a set; the features of a larger one are not kept, but its moments are
LARGEST = 2**30  # bytes of an array in a file, except images
DATA_SETS = ("shapes", "cifar10", *common.IDX)
PUBLISHED = ("mu", "sigma", "mu_s", "sigma_s")                        # arrays of statistics files
STORED = (*PUBLISHED, "n", "features", "rows", "logits", "labels")    # those of --save-stats
META = ("checkpoint", "step", "weights", "cfg", "steps", "seed")      # what is told of sample.py
NAMES = {"fid": "FID", "fd_classifier": "FD-classifier", "sfid": "sFID", "is": "IS", "n": "N",
         "reference_n": "reference"}


# --- The network ----------------------------------------------------------------------------------

class Unit(nn.Sequential):
    """Convolution, batch norm with stored statistics, ReLU. Strided ones are not padded."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # torchvision counts the padding
ROW = (1, 7)
COLUMN = (7, 1)
FORK = {"a": (1, 3), "b": (3, 1)}  # two units side by side, at the end of a chain; see Mixed
A = {"branch1x1": [(64, 1)],
     "branch5x5": [(48, 1), (64, 5)],
     "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
B = {"branch3x3": [(384, 3, 2)],
     "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
D = {"branch3x3": [(192, 1), (320, 3, 2)],
     "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)]}
E = {"branch1x1": [(320, 1)],
     "branch3x3": [(384, 1), (384, FORK)],
     "branch3x3dbl": [(448, 1), (384, 3), (384, FORK)]}


def chains_c(c):
    """Return the chains of the blocks whose 7x7 convolutions are rows and columns of c channels."""
    return {"branch1x1": [(192, 1)],
            "branch7x7": [(c, 1), (c, ROW), (192, COLUMN)],
            "branch7x7dbl": [(c, 1), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)]}


class Mixed(nn.Module):
    """A block of the network: chains of units and a pool, side by side, with results concatenated.

    chains: name -> (channels, kernel) or (channels, kernel, stride) of each unit. The units are
    called name_1, name_2 and so on, or just name if there is only one. width: channels of the 1x1
    unit that follows the pool, 0 for none.
    """

    def __init__(self, c_in, chains, width=192, pool=AVERAGE):
        super().__init__()
        self.chains = []
        for chain, units in chains.items():
            steps = []
            channels = c_in
            for number, (c_out, kernel, *stride) in enumerate(units, 1):
                name = f"{chain}_{number}" if len(units) > 1 else chain
                kernels = FORK if kernel == FORK else {"": kernel}
                for end, size in kernels.items():
                    self.add_module(name + end, Unit(channels, c_out, size, *stride))
                steps.append([name + end for end in kernels])
                channels = c_out
            self.chains.append(steps)
        self.pool = pool
        self.branch_pool = Unit(c_in, width, 1) if width else nn.Identity()

    def forward(self, x):
        branches = []
        for steps in self.chains:
            h = x
            for names in steps:
                h = torch.cat([getattr(self, name)(h) for name in names], 1)
            branches.append(h)
        return torch.cat([*branches, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Inception v3 as it was in TensorFlow in 2015, with the names of its published weights."""
    widths = {"": 2048, "_s": 2023}  # of mu and of mu_s

    def __init__(self):
        super().__init__()  # the layers run in this order
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
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
        self.Mixed_6b = Mixed(768, chains_c(128))
        self.Mixed_6c = Mixed(768, chains_c(160))
        self.Mixed_6d = Mixed(768, chains_c(160))
        self.Mixed_6e = Mixed(768, chains_c(192))
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
    content = common.read_checkpoint(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != DIGEST and not given:
        raise UserError(f"{file} is damaged: delete it, and it is downloaded again")
    network = Inception()
    state = network.state_dict()
    counters = {name: state[name] for name in state if name.endswith("num_batches_tracked")}
    common.load_strict(network, {**counters, **content}, file)  # the file may lack the counters
    return network.to(memory_format=torch.channels_last), digest[:8]


def stretch_tf1(x, axis):
    """Return x with 299 pixels along an axis, in float32, resized as by TensorFlow 1.

    Pixel i lies at i * size / 299, between two pixels. No antialiasing.
    """
    size = x.shape[axis]
    scale = torch.tensor(size / SIDE, dtype=torch.float32)
    position = torch.arange(SIDE, dtype=torch.float32, device=x.device) * scale
    low = position.floor().long()
    high = (low + 1).clamp(max=size - 1)
    share = (position - low).view(-1, *[1] * (x.ndim - axis - 1))
    first = x.index_select(axis, low).float()
    second = x.index_select(axis, high).float()
    return first + (second - first) * share


def resize_tf1(images):
    """Return uint8 images (B, H, W, 3) as the network's input, as torch-fidelity and ADM do."""
    x = images.permute(0, 3, 1, 2)                                   # (B, 3, H, W)
    x = stretch_tf1(stretch_tf1(x, 3), 2)                            # (B, 3, 299, 299)
    return (x - 128) / 128


def resize_pytorch(images):
    """Return uint8 images (B, H, W, 3) as the network's input, as pytorch-fid does."""
    x = images.permute(0, 3, 1, 2).float() / 255                     # (B, 3, H, W)
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


RESIZE = {"tf1": resize_tf1, "pytorch": resize_pytorch}


# --- Distances ------------------------------------------------------------------------------------

def moments(rows):
    """Return [n, sum (d,), sum of products (d, d)] of rows (n, d), in float64."""
    x = np.asarray(rows, np.float64)
    return [len(x), x.sum(0), x.T @ x]


def added(*sets):
    """Return the moments of several sets together."""
    return [sum(parts) for parts in zip(*sets)]


def gaussian(n, total, products):
    """Return the mean (d,) and unbiased covariance (d, d) that moments of at least two rows give.

    The difference cancels digits only where a mean is thousands of times its standard deviation.
    """
    mean = total / n
    return mean, (products - n * np.multiply.outer(mean, mean)) / (n - 1)


def trace_sqrt(a, b):
    """Return Tr (a b)^(1/2) of covariances a, b (d, d), which is never complex, for any rank.

    With a = R R^T and b = S S^T, the eigenvalues of a b are the squared singular values of
    M = S^T R. For full rank, R and S come from Cholesky, and the eigenvalues of M^T M are exact
    enough. Otherwise they come from the eigenvectors whose eigenvalues are more than rounding.
    """
    rounding = len(a) * np.finfo(float).eps  # as a share of the largest eigenvalue
    with contextlib.suppress(scipy.linalg.LinAlgError):
        R = scipy.linalg.cholesky(a, lower=True, check_finite=False)
        S = scipy.linalg.cholesky(b, lower=True, check_finite=False)
        ratios = [L.diagonal().min() / L.diagonal().max() for L in (R, S)]
        if min(ratios) ** 2 > rounding:
            M = scipy.linalg.blas.dtrmm(1, S, R, lower=True, trans_a=True)  # S^T R, half the work
            square = scipy.linalg.blas.dsyrk(1, M, lower=True, trans=True)  # lower half of M^T M
            return np.sqrt(scipy.linalg.eigvalsh(square, check_finite=False).clip(0)).sum()
    roots = []
    for covariance in (a, b):
        w, Q = scipy.linalg.eigh(covariance)
        keep = w > rounding * max(w.max(), 0)
        roots.append(Q[:, keep] * np.sqrt(w[keep]))
    R, S = roots
    return scipy.linalg.svdvals(S.T @ R).sum() if R.size and S.size else 0.0


def frechet(m1, s1, m2, s2):
    """Return |m1 - m2|^2 + Tr (s1 + s2 - 2 (s1 s2)^(1/2)) of means (d,) and covariances (d, d)."""
    m1, s1, m2, s2 = [np.asarray(part, np.float64) for part in (m1, s1, m2, s2)]
    squares = ((m1 - m2) ** 2).sum()
    return float(squares + np.trace(s1) + np.trace(s2) - 2 * trace_sqrt(s1, s2))


def floor(rows, n, draws=5):
    """Return how far n real images are from other real images, given features (N, d) of real ones.

    A draw is the Frechet distance between m random rows and all other rows, where m is n, or N / 2
    if that is less. The result is the mean of the draws, their standard deviation, and m.
    """
    rng = np.random.default_rng(0)
    m = min(n, len(rows) // 2)
    distances = []
    for _ in range(draws):
        drawn, others = np.split(rng.permutation(len(rows)), [m])
        sides = [gaussian(*moments(rows[part])) for part in (drawn, others)]
        distances.append(frechet(*sides[0], *sides[1]))
    return float(np.mean(distances)), float(np.std(distances)), m


def inception_score(logits, splits=10, shuffle=True):
    """Return the mean and standard deviation, over splits, of exp E KL(p(y|x), p(y)).

    logits: (n, classes). The defaults are the 10 splits and the shuffle of torch-fidelity. The ADM
    suite takes 5,000 rows at a time as they come: also ten splits of 50,000 samples, which have to
    be in random order.
    """
    log_p = torch.as_tensor(logits).double().log_softmax(1)
    n = len(log_p)
    if shuffle:
        log_p = log_p[np.random.RandomState(2020).permutation(n)]
    scores = []
    for part in log_p.tensor_split([i * n // splits for i in range(1, splits)]):
        if len(part):
            log_mean = part.logsumexp(0) - math.log(len(part))
            divergence = (part.exp() * (part - log_mean)).sum(1)
            scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def squared_distances(a, b):
    """Return the squared distances (n, m) of rows a (n, d) and b (m, d), never negative."""
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def radii(x, k=3, block=512):
    """Return the squared distance of each row to its k-th nearest other row, block by block."""
    parts = [squared_distances(rows, x).kthvalue(k + 1).values for rows in x.split(block)]
    return torch.cat(parts)


def inside(x, centres, squared_radii, block=512):
    """Return which rows of x lie within the radius of at least one centre."""
    parts = [(squared_distances(rows, centres) <= squared_radii).any(1) for rows in x.split(block)]
    return torch.cat(parts)


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

    data: the images as common.Data, or None. labels: the class of each image, -1 if unknown.
    classes: their names, or []. statistics: arrays by name. meta: what sample.py wrote beside the
    images. size: pixels; pictures of another size are centre-cropped to a square, by ADM's rule.
    None leaves them as they are, and is 32 for a named set.
    """

    def __init__(self, path, size=None, data_root="data"):
        name, _, split = str(path).partition(":")
        self.named = name in DATA_SETS and split in ("", "train", "test")
        self.path = Path(path)
        self.size = size or (32 if self.named else 0)
        self.data = None
        self.labels = None
        self.statistics = {}
        if self.named:
            self.data = common.load_data(name, data_root, self.size, split or "test")
        elif self.path.is_dir():
            self.data = common.load_folder(self.path, self.size)
        elif self.path.is_file():
            self.open_file()
        else:
            names = ", ".join(DATA_SETS)
            raise UserError(f"{path}: no such folder or file, and not one of {names}")
        beside = self.beside("meta.json")
        self.meta = {}
        if beside.is_file():
            with common.untrusted(beside):
                self.meta = dict(json.loads(beside.read_text()))
        if self.data:
            self.find_labels()

    def beside(self, name):
        """Return the path of a file about this set, which is in a folder or beside a file."""
        if self.path.is_dir():
            return self.path / name
        return self.path.with_name(self.path.name.replace(":", "-")).with_suffix(f".{name}")

    def find_labels(self):
        """Take the labels of the data, or those in file names such as 000123_class4.png.

        Take none if meta says that they are not of classes, but of prompts, for example.
        """
        self.labels = self.data.labels
        self.classes = self.data.classes
        found = [re.search(r"_class(\d{1,5})\.\w+$", path.name) for path in self.data.paths]
        if found and all(found):
            self.labels = np.array([int(match[1]) for match in found])
            self.classes = []
        if self.meta.get("labels", "balanced") != "balanced":
            self.labels = np.full(len(self.labels), -1)

    def open_file(self):
        """Read images, statistics or both from an .npz, or statistics from a .pt."""
        ending = self.path.suffix.lower()
        if ending not in (".npz", ".pt"):
            raise UserError(f"{self.path}: neither .npz nor .pt; a pickle could run code: not read")
        with common.untrusted(self.path, "neither images nor statistics"):
            reader = stored_arrays if ending == ".npz" else common.read_checkpoint
            content = reader(self.path)
            if "mu" in content:
                names = STORED if "features" in content else PUBLISHED
                self.statistics = {k: np.asarray(content[k]) for k in names if k in content}
                self.statistics["n"] = int(self.statistics.get("n", 0))
            if "arr_0" in content:
                self.take_images(content["arr_0"], content.get("arr_1"))
            elif "mu" not in content:
                raise ValueError("it has neither arr_0 nor mu")

    def take_images(self, images, labels):
        """Take images (n, H, W, 3), perhaps memory-mapped, and labels (n,) or None as the data."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
            raise ValueError(f"arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
        if labels is None or labels.shape != images.shape[:1]:
            labels = np.full(len(images), -1)

        def open_image(i):
            return Image.fromarray(images[i])

        key = f"{self.path.stat().st_mtime_ns:x}"
        self.data = common.Data(self.path.name, labels.astype(np.int64), [], open_image, key)

    def read(self, i):
        """Return image i as uint8 (H, W, 3), or None for a broken file, which is named."""
        try:
            image = self.data.open(i)
            if self.size and image.size != (self.size, self.size):
                image = common.centre_crop(image, self.size)
            return np.array(image)
        except common.UNREADABLE as error:
            tqdm.write(f"left out broken file {self.data.paths[i]}: {error}")


def stored_arrays(path):
    """Return those arrays of an .npz that are known here. Raise ValueError for giant ones."""
    arrays = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in {"arr_0", "arr_1", *STORED}.intersection(archive.files):
            entry = archive.zip.getinfo(f"{name}.npy")
            if name == "arr_0" and entry.compress_type == zipfile.ZIP_STORED:
                arrays[name] = mapped_array(path, entry.header_offset)
            elif name != "arr_0" and entry.file_size > LARGEST:
                raise ValueError(f"{name} is too large")
            else:
                arrays[name] = archive[name]
    return arrays


def mapped_array(path, offset):
    """Return an uncompressed array of an .npz, memory-mapped. offset: of its header in the zip."""
    with open(path, "rb") as f:
        f.seek(offset)
        f.seek(offset + f.read(2**10).index(b"\x93NUMPY"))
        np.lib.format.read_magic(f)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")


# --- The classifier -------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small network for small images, which takes the place of Inception."""
    widths = {"": 128}  # of mu

    def __init__(self, classes, side):
        super().__init__()
        self.side = side
        layers = []
        for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(128 * (side // 8) ** 2, classes)

    def forward(self, x):
        """Return features (B, 128) and logits (B, classes) of x (B, 3, side, side)."""
        maps = self.layers(x)
        return maps.mean((2, 3)), self.fc(maps.flatten(1))

    def resize(self, images):
        """Return uint8 images (B, H, W, 3) as this network's input."""
        x = common.to_float(images.permute(0, 3, 1, 2))
        return F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)


def load_classifier(reference, data_root, device):
    """Return a classifier trained on the reference, or on the training images of a named set.

    It is trained once and kept beside the reference. Raise UserError if there are no two classes.
    """
    labels = reference.labels
    if labels is None or not 0 <= labels.min() < labels.max() < 10**5:
        raise UserError(f"--features classifier: {reference.path} has no labels of two classes:"
                        " give a named data set, class folders, or an .npz with arr_1")
    file = reference.path.resolve().with_suffix(".classifier")
    if reference.named:
        name = str(reference.path).partition(":")[0]
        file = Path(data_root, name, "classifier")
        reference = Source(f"{name}:train", reference.size, data_root)
    side = max(8, min(64, reference.size or reference.data.read(0).height))
    file = file.with_name(f"{file.name}-{reference.data.key}-{side}.pt")
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        network = Classifier(int(labels.max()) + 1, side).to(device)
    if common.ranks()[0] == 0:
        if file.exists():
            common.load_strict(network, common.read_checkpoint(file), file)
        else:
            train_classifier(network, reference, device)
            with noted():
                common.save(file, network.state_dict())
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
    return network.eval().requires_grad_(False)


def train_classifier(network, reference, device):
    """Train for three epochs, or 100 steps if that is more, on up to 60,000 images."""
    stride = math.ceil(len(reference.labels) / 60_000)
    images = []
    for i in range(0, len(reference.labels), stride):
        image = common.centre_crop(reference.data.read(i), network.side)
        images.append(common.from_pil(image))
    images = torch.stack(images).to(memory_format=torch.channels_last)  # as `resize` has them
    labels = torch.from_numpy(reference.labels[::stride])
    epochs = max(3, math.ceil(100 / math.ceil(len(images) / 128)))
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(images), generator=rng) for _ in range(epochs)]
    batches = [batch for order in orders for batch in order.split(128) if len(batch) > 1]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(batches))
    bar = common.progress(len(batches), "training a classifier", "step")
    with common.true_float32(), torch.enable_grad():
        for batch in batches:
            logits = network(common.to_float(images[batch].to(device)))[1]
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch].to(device)).backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()


# --- Features and numbers -------------------------------------------------------------------------

class Features:
    """What a network made of images: moments and, with keep, the features of each image."""

    def __init__(self, keep=True):
        self.keep = keep
        self.broken = 0
        self.moments = {"": [0, 0, 0], "_s": [0, 0, 0]}  # of mu and of mu_s
        self.batches = []

    def add(self, labels, rows, logits, spatial=None):
        """Add arrays: labels (B,), features (B, d), logits (B, classes), spatial (B, s)."""
        self.moments[""] = added(self.moments[""], moments(rows))
        if spatial is not None:
            self.moments["_s"] = added(self.moments["_s"], moments(spatial))
        if self.keep:
            self.batches.append((rows, logits, labels))

    def gathered(self):
        """Return what all ranks have, in order of rank: a dict on rank 0, None elsewhere."""
        rank, world = common.ranks()
        parts = [self] * world
        if world > 1:
            dist.gather_object(self, parts if rank == 0 else None)
        if rank > 0:
            return None
        whole = {"broken": sum(part.broken for part in parts)}
        for end in ("_s", ""):  # so that n is that of mu
            together = added(*[part.moments[end] for part in parts])
            whole["n"] = together[0]
            if together[0] > 1:
                whole[f"mu{end}"], whole[f"sigma{end}"] = gaussian(*together)
        batches = [batch for part in parts for batch in part.batches]
        for name, arrays in zip(("rows", "logits", "labels"), zip(*batches)):
            whole[name] = np.concatenate(arrays)
        return whole


class Evaluator:
    """A reference, and the network that extracts its features and those of samples.

    All ranks construct it and call its methods; the numbers are on rank 0. reference, size and
    data_root: see Source; without a reference there are features only. features: "inception", with
    resize "tf1" or "pytorch" and weights as in load_inception, or "classifier". batch: how many
    images are read at a time. Raise UserError for an unusable reference.
    """

    def __init__(self, reference, features="inception", *, resize="tf1", weights=None, size=None,
                 data_root="data", batch=128, device="cpu"):
        source = Source(reference, size, data_root) if reference else None
        self.batch = batch
        self.device = torch.device(device)
        self.inception = features == "inception"
        self.classes = None
        if self.inception:
            network, digest = load_inception(weights)
            self.resize = RESIZE[resize]
            self.name = f"inception-{digest}-{resize}"
        else:
            network = load_classifier(source, data_root, device)
            self.resize = network.resize
            self.name = f"classifier-{common.fingerprint(network)[:8]}"
            self.classes = source.classes
        self.network = network.to(self.device)
        self.floors = {}
        self.reference = self.side(source) if reference else None

    @torch.no_grad()
    def extract(self, features, images, labels=None):
        """Add uint8 images (B, H, W, 3), or a list of (H, W, 3), and labels (B,) to a Features."""
        parts = [torch.as_tensor(image)[None] for image in images]
        if len({part.shape for part in parts}) == 1:
            parts = [torch.cat(parts)]
        with common.true_float32(), torch.autocast(self.device.type, enabled=False):
            x = torch.cat([self.resize(part.to(self.device)) for part in parts])
            arrays = [output.cpu().numpy() for output in self.network(x)]
        labels = np.full(len(x), -1) if labels is None else np.asarray(labels)
        features.add(labels, *arrays)

    def extract_all(self, source):
        """Return the gathered features of a Source's images. Each rank reads its share."""
        rank, world = common.ranks()
        labels = source.labels
        if source.classes not in ([], self.classes):
            labels = np.full(len(labels), -1)
        features = Features(keep=len(labels) <= KEEP)
        share = np.array_split(np.arange(len(labels)), world)[rank]
        bar = common.progress(len(share), f"features of {source.path.name}", "img", rank)
        with ThreadPoolExecutor(8) as threads:
            for batch in np.array_split(share, range(self.batch, len(share), self.batch)):
                images = list(threads.map(source.read, batch.tolist()))
                whole = [k for k, image in enumerate(images) if image is not None]
                if whole:
                    self.extract(features, [images[k] for k in whole], labels[batch[whole]])
                features.broken += len(images) - len(whole)
                bar.update(len(images))
        bar.close()
        return features.gathered()

    def side(self, source):
        """Return the features and statistics of a Source: a dict on rank 0, None elsewhere.

        If a file has statistics, its images give features only; n is 0 if the file does not say of
        how many images it is. Raise UserError for statistics that are not finite, not of this
        network or of less than two images.
        """
        known = source.statistics
        if not self.inception and "features" not in known:
            known = {}  # published statistics are Inception's
        if str(known.get("features", self.name)) != self.name:
            raise UserError(f"{source.path} is of {known['features']}, not of {self.name}")
        found = {}
        if source.data and "rows" not in known:
            found = self.extract_all(source)
        if common.ranks()[0] > 0:
            return None
        if known:  # and not the statistics of the images beside them
            found = {name: found[name] for name in found if name not in PUBLISHED}
        side = {"n": 0, **found, **known}
        if "mu" not in side:
            raise UserError(f"{source.path}: statistics need two readable images, not {side['n']}")
        with common.untrusted(source.path, "unusable as statistics"):
            for end, width in self.network.widths.items():
                if f"mu{end}" in side:
                    both = np.vstack([side[f"mu{end}"], side[f"sigma{end}"]])
                    if both.shape != (width + 1, width) or not np.isfinite(both).all():
                        raise ValueError(f"mu{end}: not finite, or not of {width} features")
        return side

    def measure(self, features):
        """Return the numbers of a Features, gathered over the ranks: see `compare`."""
        return self.compare(features.gathered())

    def compare(self, samples):
        """Return all numbers that the reference and the samples allow; None for None.

        samples: what `side` or `Features.gathered` returns. The numbers are a dict: fid or
        fd_classifier, floor, sfid, is, precision, recall and accuracy, and counts of images.
        """
        if samples is None:
            return None
        reference = self.reference
        both = samples.keys() & reference.keys()
        numbers = {}
        distance = frechet(samples["mu"], samples["sigma"], reference["mu"], reference["sigma"])
        numbers["fid" if self.inception else "fd_classifier"] = distance
        n = samples["n"]
        if n and reference["n"] == len(reference.get("rows", ())) > 3:
            if n not in self.floors:
                self.floors[n] = floor(reference["rows"], n)
            numbers["floor"], numbers["floor_std"], numbers["floor_n"] = self.floors[n]
        if "mu_s" in both:
            numbers["sfid"] = frechet(
                samples["mu_s"], samples["sigma_s"], reference["mu_s"], reference["sigma_s"])
        if self.inception and "logits" in samples:
            numbers["is"], numbers["is_std"] = inception_score(samples["logits"])
        known = samples.get("labels", np.zeros(0)) >= 0
        if not self.inception and known.any():
            right = samples["logits"].argmax(1) == samples["labels"]
            numbers["accuracy"] = float(right[known].mean())
        if "rows" in both and min(len(samples["rows"]), len(reference["rows"])) > 3:
            device = self.device if self.device.type == "cuda" else "cpu"  # MPS has no float64
            shares = precision_recall(samples["rows"], reference["rows"], device)
            numbers["precision"], numbers["recall"] = shares
        broken = samples.get("broken", 0)
        return {**numbers, "n": n, "reference_n": reference["n"], "broken": broken}


def describe(numbers):
    """Return the numbers as one line for people."""
    words = []
    for key, value in numbers.items():
        name = NAMES.get(key, key)
        if key == "floor":
            name = f"floor of {numbers['floor_n']:,} real images"
        if isinstance(value, float) and not key.endswith("_std"):
            spread = f" +- {numbers[key + '_std']:.2g}" if key + "_std" in numbers else ""
            words.append(f"{name} {value:.4g}{spread}")
        elif key in ("n", "reference_n"):
            words.append(f"{name} {value:,}" if value else f"{name} statistics")
    line = ", ".join(words)
    if "fid" in numbers and 0 < numbers["n"] < 50_000:
        line += "; published FID is of 50,000 samples, MADFormer's FFHQ of 8,000"
    return line


# --- Command line ---------------------------------------------------------------------------------

def arguments():
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="folder, .npz, statistics or data set")
    add("reference", metavar="REFERENCE", nargs="?", help="the same kinds")
    add("--save-stats", metavar="FILE.npz",
        help="write the statistics of SAMPLES, and their features for precision, recall and IS")
    add("--features", choices=["inception", "classifier"], default="inception",
        help="classifier: a small one, trained on the reference's labels")
    add("--resize", choices=RESIZE, default="tf1",
        help="tf1 (default): torch-fidelity and ADM suite; pytorch: pytorch-fid, as MADFormer")
    add("--weights", metavar="FILE",
        help="Inception (default: FID_WEIGHTS, torch.hub's folder, else downloaded)")
    add("--image-size", type=int, metavar="PIXELS", help="centre crop of pictures of other sizes"
        " (default: SAMPLES stay as they are, REFERENCE takes their size)")
    add("--data-root", default="data", help="where data sets are, or are downloaded to")
    add("--batch-size", type=int, default=128)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    args = parser.parse_args()
    if not args.reference and (args.features == "classifier" or not args.save_stats):
        parser.error("give a REFERENCE; only --save-stats of Inception's features needs none")
    stats = Path(args.save_stats or "new.npz")
    if stats.suffix.lower() != ".npz" or stats.resolve() == Path(args.samples).resolve():
        parser.error("--save-stats writes a new .npz")
    if args.batch_size < 1 or (args.image_size or 8) < 8:
        parser.error("--batch-size is 1 or more, --image-size 8 or more")
    return args


def main():
    """Compare two sets, and store what was found."""
    args = arguments()
    process = common.launch(args.device)
    samples = Source(args.samples, args.image_size, args.data_root)
    size = samples.size
    if samples.data and not size:
        size = samples.data.read(0).height
    evaluator = Evaluator(args.reference, args.features, resize=args.resize, weights=args.weights,
                          size=size, data_root=args.data_root, batch=args.batch_size,
                          device=process.device)
    side = evaluator.side(samples)
    if side and args.save_stats:
        arrays = {name: side[name] for name in STORED if name in side}
        with common.atomic(args.save_stats) as f:
            np.savez(f, **{**arrays, "features": evaluator.name})
        print(f"wrote {args.save_stats}: {evaluator.name} of {side['n']:,} images")
    if side and args.reference:
        report(args, samples, evaluator.name, evaluator.compare(side))
    if process.world > 1:
        dist.destroy_process_group()


def report(args, samples, features, numbers):
    """Print the numbers in one line, and write them beside the samples."""
    settings = {"samples": args.samples, "reference": args.reference, "features": features}
    settings |= {name: samples.meta[name] for name in META if name in samples.meta}
    words = [f"{name} {value}" for name, value in settings.items()]
    print(f"{describe(numbers)} | {', '.join(words)}")
    file = samples.beside("fid.json")
    content = {**numbers, **settings, "image_size": args.image_size, "torch": torch.__version__}
    if numbers["broken"]:
        print(f"note: {numbers['broken']:,} broken samples are left out")
    with noted():
        with common.atomic(file) as f:
            f.write(json.dumps(content, indent=1).encode())
        print(f"wrote {file}")


@contextlib.contextmanager
def noted():
    """Print a UserError that is raised in the block as a note."""
    try:
        yield
    except UserError as error:
        print(f"note: {error}")


if __name__ == "__main__":
    common.run_script(main)
