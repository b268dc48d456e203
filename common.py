"""What the three papers share and none of them invented: the KL-VAE, data, randomness, training state, pictures.

Sections   1  KL-VAE: encoder, decoder, published weights             KLVAE, load_vae
           2  Data: named sets, folders, crops, order, cache          load_data, crop, Order, cached
           3  Randomness: one stream per image                        Noise
           4  Training state: stages, ranks, checkpoints, EMA, log    Stage, Recipe, distributed, save, read, update_ema
           5  Pictures: uint8 borders, grids, PNG and GIF             to_uint8, grid, save_gif
Range      Images are float in [-1, 1] inside, uint8 at the borders (files, caches, data sets).
Errors     A mistake that the user can mend raises UserError with one line that says how; the scripts print it and
           leave with exit code 2.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import http.client
import json
import lzma
import math
import os
import pickle
import platform
import re
import struct
import sys
import tarfile
import typing
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: one line, what is wrong and what to do."""


@contextlib.contextmanager
def foreign(path, what="damaged"):
    """For reading what anybody may have written: what goes wrong in the block becomes a UserError with the path."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = [type(error).__name__, *str(error).splitlines()[:1]]
        raise UserError(f"{path} is {what} ({': '.join(words)})") from None


def command(main):
    """Runs a script's `main`: a user's mistake or a failing disk ends it with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        message = str(error).splitlines()[-1].removeprefix("common.UserError: ")  # a data worker adds its traceback
    except OSError as error:  # disk full, no permission, a vanished folder
        message = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    except MemoryError:
        message = "out of memory"
    except torch.OutOfMemoryError as error:
        message = f"{str(error).split('. ')[0]}: a smaller --batch-size, or in training more --accumulate, needs less"
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            message = "a process that loads images died (killed, or out of memory): the same command goes on where it" \
                      " was, --workers 0 does without"
        elif dist.is_initialized() and (isinstance(error, dist.DistBackendError)
                                        or re.search("gloo/|Connection (closed|reset) by peer", str(error))):
            message = f"lost the other ranks ({str(error).splitlines()[0][:200]})"
        else:
            raise
    except KeyboardInterrupt:
        message = "interrupted"
    else:
        return
    sys.stdout.flush()
    rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
    print(f"error{rank}: {message}", file=sys.stderr, flush=True)
    os._exit(2) if dist.is_initialized() else sys.exit(2)  # other ranks may hang: torchrun ends them


def override(config, assignments):
    """A copy of a (nested) dataclass with `field=value` strings applied, typed by the field. Raises UserError."""
    hints, changes, nested = typing.get_type_hints(type(config)), {}, {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        head, _, rest = name.strip().partition(".")
        if not equals or head not in hints:
            raise UserError(f"--set {assignment}: no such field; the fields are {', '.join(hints)}")
        kind = hints[head]
        try:
            if dataclasses.is_dataclass(kind):
                nested.setdefault(head, []).append(f"{rest}={text}")
            elif kind is bool:
                changes[head] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            elif typing.get_origin(kind) is tuple:
                changes[head] = tuple(typing.get_args(kind)[0](part) for part in text.split(",") if part)
            else:
                changes[head] = kind(text)
        except (KeyError, ValueError) as error:
            raise UserError(f"--set {assignment}: {head} is a {getattr(kind, '__name__', kind)} ({error})") from None
    changes |= {head: override(getattr(config, head), parts) for head, parts in nested.items()}
    try:
        return dataclasses.replace(config, **changes)  # all at once: only together they need to make sense
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"--set {' '.join(assignments)}: {error}") from None


def rebuild(kind, values, path=None):
    """The (nested) dataclass that dataclasses.asdict made these values of. path: the checkpoint that has them. Raises
    UserError for a number that is larger than the bytes of that file: no model in it can be so wide or deep."""
    if path and any(isinstance(v, int) and v > os.path.getsize(path) for v in values.values()):
        raise UserError(f"{path}: the model that it describes is larger than the file")
    nested = {f.name: type(f.default) for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.default)}
    return kind(**{k: rebuild(nested[k], v, path) if k in nested else v for k, v in values.items()})


# --- 1  KL-VAE --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VAEConfig:
    """Shape of a latent-diffusion KL autoencoder (Rombach et al., 2022). The default is the 16-channel f16 one."""
    channels: int = 16                            # latent channels z
    width: int = 128                              # channels at full resolution
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)       # width multiple per level; each level but the last halves the side
    blocks: int = 2                               # residual blocks per encoder level; the decoder has one more
    attention: tuple[int, ...] = (4,)             # encoder levels with attention after every residual block
    decoder_attention: tuple[int, ...] = ()       # the same for the decoder
    groups: int = 32                              # of every group norm
    scale: float = 0.2325                         # latent = scale * posterior sample; 0: measured by the vae stage
    kl_weight: float = 1e-6                       # training: weight of the KL term, per latent value

    @property
    def factor(self):
        """Image side over latent side."""
        return 2 ** (len(self.mult) - 1)


SD_VAE = VAEConfig(channels=4, mult=(1, 2, 4, 4), attention=(), scale=0.18215)  # the 4-channel f8 one
TINY_VAE = VAEConfig(channels=16, width=16, mult=(1, 2, 4), blocks=1, attention=(), groups=8, scale=0, kl_weight=1e-3)


class ResBlock(nn.Module):
    """GN, SiLU, conv, GN, SiLU, conv, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map, plus the input."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, hw, C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Half the side: zeros on the right and at the bottom only, then a 3x3 convolution of stride 2.
    Twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, c, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, c_in, c_out, blocks, attention, groups):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, groups) for j in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(c_out, groups) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return x


def middle(c, groups):
    """Residual block, attention, residual block, at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c, groups), attn_1=SpatialAttention(c, groups),
                                     block_2=ResBlock(c, c, groups)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, 2z, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        widths, last = [config.width * m for m in config.mult], len(config.mult) - 1
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level([config.width, *widths][i], width, config.blocks, i in config.attention, config.groups)
            if i < last:
                level.downsample = Resample(width, up=False)
            self.down.append(level)
        self.mid = middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.down) - 1:
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, z, H/f, W/f) to images (B, 3, H, W). Level 0 is full resolution, so the levels run backwards."""

    def __init__(self, config):
        super().__init__()
        widths, last = [config.width * m for m in config.mult], len(config.mult) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, last)], width, config.blocks + 1, i in config.decoder_attention,
                          config.groups)
            if i > 0:
                level.upsample = Resample(width, up=True)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            if i > 0:
                x = self.up[i].upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class KLVAE(nn.Module):
    """Autoencoder with a Gaussian posterior (Rombach et al., 2022, KL-regularised), and the latent scale that goes
    with its weights: everybody else sees scaled latents only.

    encode: images (B, 3, H, W) to moments (B, 2z, h, w); sample: moments to scaled latents (B, z, h, w);
    decode: scaled latents to images. H and W are divisible by config.factor.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)
        self.register_buffer("scale", torch.tensor(float(config.scale or 1)))
        self.initialise()

    def initialise(self):
        """Unit-gain convolutions, and every residual branch zero at first: worth 8 dB after 500 steps of `tiny`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (ResBlock, SpatialAttention)):
                nn.init.zeros_((module.conv2 if isinstance(module, ResBlock) else module.proj_out).weight)

    def encode(self, images):
        """Moments of the posterior: mean, then log-variance (not clamped)."""
        return self.quant_conv(self.encoder(images))

    def posterior(self, moments):
        """Mean and standard deviation (B, z, h, w), unscaled."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, torch.exp(logvar.clamp(-30, 20) / 2)

    def sample(self, moments, noise=None):
        """Scaled latents drawn from the posterior. noise (B, z, h, w) is drawn unless given."""
        mean, std = self.posterior(moments)
        return self.scale * (mean + std * (torch.randn_like(mean) if noise is None else noise))

    def decode(self, latents):
        """Images (B, 3, H, W) of scaled latents, not clamped. In parts of 64 images of 256 pixels or as much: what the
        decoder keeps on the way is larger than all else when sampling."""
        z, (h, w) = latents / self.scale, latents.shape[2:]
        parts = z.split(max(1, 2**22 // (h * w * self.config.factor**2)))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    def kl(self, moments):
        """KL divergence to N(0, I) per image (B,), summed over channels and space."""
        mean, std = self.posterior(moments)
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).flatten(1).sum(1)

    def forward(self, images, labels=None, *, noise=None):
        """Training loss: L1 reconstruction + kl_weight * KL, both means (over image values; over latent values)."""
        moments = self.encode(images)
        l1 = F.l1_loss(self.decode(self.sample(moments, noise)).float(), images)
        kl = self.kl(moments).mean() / (moments[0].numel() / 2)
        return {"loss": l1 + self.config.kl_weight * kl, "l1": l1, "kl": kl}

    @torch.no_grad()
    def calibrate(self, images):
        """Sets the scale so that the latents of these images have unit standard deviation (if it is measured)."""
        if not self.config.scale:
            mean, std = self.posterior(self.encode(images))
            self.scale.copy_((mean.var() + (std**2).mean()).rsqrt())


DIFFUSERS = [  # diffusers name -> latent-diffusion name; the decoder's block order is turned round in load_vae
    (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d+)\.attentions", r"down.\1.attn"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"), (r"up_blocks\.(\d+)\.attentions", r"up.\1.attn"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"group_norm", "norm"), (r"\b(to_q|query)\b", "q"), (r"\b(to_k|key)\b", "k"), (r"\b(to_v|value)\b", "v"),
    (r"\b(to_out\.0|proj_attn)\b", "proj_out")]


def load_vae(path):
    """A KL-VAE from a file of this project, of latent-diffusion or of diffusers; the config comes from the shapes.

    Strict: a missing, extra or misshapen entry is a UserError that names it. The latent scale is the file's own if it
    holds one, else the published one for 16 (0.2325, TransDiff) or 4 channels (0.18215, Stable Diffusion).
    """
    content = read(path)
    with foreign(path, "not a KL-VAE"):
        config = rebuild(VAEConfig, content["config"]["vae"], path) if content.get("stage") == "vae" else None
        state = next((content[k] for k in ("model", "state_dict") if isinstance(content.get(k), dict)), content)
        return vae_from_state(state, config, path)


def vae_from_state(state, config=None, path="the VAE"):
    """The KL-VAE of a state dict in one of the three layouts (see load_vae)."""
    state = {k: v for k, v in state.items() if not k.startswith(("loss", "model_ema."))}
    if any("_blocks." in k for k in state):
        levels = 1 + max(int(m[1]) for m in (re.match(r"decoder\.up_blocks\.(\d+)", k) for k in state) if m)
        for old, new in DIFFUSERS:
            state = {re.sub(old, new, k): v for k, v in state.items()}
        state = {re.sub(r"\bup\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", k): v for k, v in state.items()}
        state = {k: v[:, :, None, None] if ("attn" in k and v.ndim == 2) else v for k, v in state.items()}
    if config is None:
        def count(pattern):  # how many different numbers stand at the group of the pattern
            return sorted({int(m[1]) for m in (re.match(pattern, k) for k in state) if m})
        try:
            width, channels = state["encoder.conv_in.weight"].shape[0], state["post_quant_conv.weight"].shape[0]
            levels = count(r"encoder\.down\.(\d+)\.block")
            config = VAEConfig(
                channels=channels, width=width, blocks=len(count(r"encoder\.down\.0\.block\.(\d+)")),
                mult=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width for i in levels),
                attention=tuple(count(r"encoder\.down\.(\d+)\.attn")),
                decoder_attention=tuple(count(r"decoder\.up\.(\d+)\.attn")),
                scale=float(state.get("scale", {16: 0.2325, 4: 0.18215}.get(channels, 1.0))))
        except KeyError as missing:
            raise UserError(f"{path}: not a KL-VAE in a known layout: no entry {missing}") from None
        if width % config.groups:
            raise UserError(f"{path}: weights alone do not tell the norms' groups, and {width} channels are not the"
                            f" published {config.groups}; give the run's own model.pt")
    vae = KLVAE(config)
    load_strict(vae, {"scale": torch.tensor(float(config.scale or 1)), **state}, path)
    return vae.eval().requires_grad_(False)


# --- 2  Data ----------------------------------------------------------------------------------------------------------

@dataclass
class Data:
    """A labelled set of pictures. Nothing per image is held but its label and what `read` needs to find it."""
    name: str
    labels: np.ndarray                     # (n,) int64, 0 .. len(classes) - 1
    classes: list[str]
    read: Callable[[int], Image.Image]     # the i-th picture, RGB, any size
    key: str                               # digest: another set, or the same one changed, has another key


SHAPES = ["circle", "ring", "square", "triangle", "diamond", "star", "heart", "cross", "crescent", "flower"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
IDX = {  # name: (source, class names, {file: SHA-256 or its first digits})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", list("0123456789"), {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", FASHION, {
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf8", "train-labels-idx1-ubyte.gz": "0ae29f65d86684f3",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84d", "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44"})}
CIFAR10_FILE = ("https://www.cs.toronto.edu/~kriz/", "cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError, struct.error, zlib.error,
              Image.DecompressionBombError)  # what Pillow raises for files that are not what they seem


def load_data(name, root="data", size=32, split="train"):
    """The data set `shapes`, `mnist`, `fashion-mnist`, `cifar10`, or a FOLDER with a sub-folder per class.

    Named sets are read from root/<name>/, and downloaded there once if missing. `size` (pixels) matters to shapes,
    which are drawn at that size, and to folders, whose JPEGs are decoded no larger than needed. split is "train" or
    "test"; a folder has no test split. Raises UserError for what is missing, damaged or empty.
    """
    if name == "shapes":
        first, n = (0, 20000) if split == "train" else (20000, 4000)
        return Data(name, np.arange(first, first + n) % len(SHAPES), SHAPES, lambda i: draw_shape(first + i, size),
                    f"shapes-{first}-{n}")
    if name in IDX:
        source, classes, files = IDX[name]
        images, labels = (read_idx(download(source, Path(root, name, f), digest)) for f, digest in files.items()
                          if f.startswith("train" if split == "train" else "t10k"))
        if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) >= len(classes):
            raise UserError(f"{Path(root, name)}: images {images.shape} and labels {labels.shape} do not match")
    elif name == "cifar10":
        source, file, digest = CIFAR10_FILE
        images, labels = read_cifar10(download(source, Path(root, name, file), digest), split)
        classes = CIFAR10
    else:
        return load_folder(Path(name), size)
    key = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:12]
    return Data(name, labels.astype(np.int64), classes, lambda i: Image.fromarray(images[i]).convert("RGB"), key)


def download(source, path, digest, hint="or name another folder with --data-root"):
    """`path`, fetched from source/<its name> if it is not there; kept only if its SHA-256 starts with `digest`. What
    was fetched when the line broke stays beside it; the next attempt goes on there. hint: what else the user can do."""
    plain = path.with_suffix("") if path.suffix == ".gz" and path.with_suffix("").suffix != ".tar" else path
    with rank_zero_first():
        if not path.exists() and plain.exists():
            return plain
        if not path.exists():
            part = path.with_name(path.name + ".part")
            try:
                with locked(path.with_name(f".{path.name}.lock"), wait=True):
                    if path.exists():  # another process had the lock, and fetched it
                        return path
                    print(f"downloading {source}{path.name} to {path}")
                    if not digest:  # nothing would tell whether old and new pieces fit
                        part.unlink(missing_ok=True)
                    fetch(source + path.name, part)
                    if not (found := file_digest(part, hashlib.sha256())).startswith(digest or ""):
                        part.unlink()
                        raise OSError(f"what came has SHA-256 {found}")
                    os.replace(part, path)
            except (OSError, http.client.HTTPException) as error:
                known = f" (SHA-256 {digest})" if digest else ""
                raise UserError(f"cannot download {source}{path.name}: {error}; try again, or fetch it by other means"
                                f" to {path}{known}, {hint}") from None
    return path


def file_digest(path, digest):
    """Hexadecimal digest of a file of any size."""
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetch(url, part):
    """The content of a URL into the file `part`, behind what is there already, if the server can do that."""
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and there:  # nothing is missing
            return
        raise
    with answer, open(part, "ab" if answer.status == 206 else "wb") as f:
        size = int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(total=f.tell() + size or None, initial=f.tell(), unit="B", unit_scale=True, mininterval=1.0,
                   disable=not sys.stderr.isatty())
        while piece := answer.read(1 << 20):
            f.write(piece)
            bar.update(len(piece))
            size -= len(piece)
        bar.close()
    if size > 0:
        raise OSError(f"the line broke, {size} bytes are missing")


def read_idx(path):
    """The array in an IDX file, gzipped or not: two zero bytes, type 8 (uint8), dimensions, sizes, values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            head = f.read(4)
            head += f.read(4 * head[3]) if len(head) == 4 else b""
            sizes = np.frombuffer(head, ">i4", (len(head) - 4) // 4, 4).tolist() if len(head) > 4 else []
            raw = head + f.read(min(math.prod(max(n, 0) for n in sizes), 1 << 30) + 1)  # no more than it promises
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and it is downloaded again") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise UserError(f"{path} is not an IDX file of bytes: it starts with {raw[:4].hex() or 'nothing'}")
    shape = np.frombuffer(raw, ">i4", raw[3], 4).tolist()
    if not 0 < len(shape) <= 4 or min(shape) < 1 or len(raw) != 4 + 4 * raw[3] + math.prod(shape):
        raise UserError(f"{path} is damaged: {len(raw)} bytes do not hold the {'x'.join(map(str, shape))} values that"
                        " its header promises; delete it and it is downloaded again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def read_cifar10(path, split):
    """Images (n, 32, 32, 3) and labels (n,) from the binary version's archive, read without unpacking it."""
    records = []
    try:
        with tarfile.open(path) as archive:
            for name in [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]:
                member = archive.getmember(f"cifar-10-batches-bin/{name}")
                if not member.isreg() or member.size > 10_000 * 3073:
                    raise ValueError(f"{name} is no file of at most 10,000 records")
                raw = np.frombuffer(archive.extractfile(member).read(), np.uint8)
                records.append(raw.reshape(-1, 3073))  # a label, then 1024 red, green and blue values
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, tarfile.TarError, zlib.error,
            lzma.LZMAError) as error:
        raise UserError(f"{path} is not the binary CIFAR-10 archive, or damaged ({error}); delete it") from None
    records = np.concatenate(records)
    if not len(records) or records[:, 0].max() > 9:
        raise UserError(f"{path} does not hold CIFAR-10 records")
    return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), records[:, 0]


@functools.cache
def endings():
    """Of the files that are pictures."""
    formats = picture_formats()
    return {ending for ending, kind in Image.EXTENSION.items() if kind in formats}


@functools.cache
def picture_formats():
    """What Pillow reads by itself: an EPS is a program, which it gives to Ghostscript."""
    Image.init()
    return [kind for kind in Image.OPEN if kind not in ("EPS", "WMF")]


def open_picture(path, size=0):
    """A picture file, of any ending. Raises one of UNREADABLE; also for one that is so narrow that it would be giant
    when its shorter side has `size` pixels."""
    image = Image.open(path, formats=picture_formats())
    width, height = image.size
    if min(image.size) < 1 or max(image.size) * size * size / min(image.size) > 2**26:
        image.close()
        raise Image.DecompressionBombError(f"{width} x {height} pixels")
    return image


def printable(path):
    """A path whose name may be no text, as text."""
    return os.fsencode(path).decode(errors="replace")


def listing(path):
    """The pictures of a folder of class folders, whose naturally sorted names are the classes, or of a flat one, a
    single class: names (relative to the folder), labels, classes. Raises UserError if there are none."""
    def natural(p):  # class 2 before class 10
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", p.name)]

    folders = sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural) or [path]
    names, labels, classes = [], [], []
    for folder in folders:
        found = sorted(os.path.relpath(os.path.join(at, f), path) for at, _, files in os.walk(folder) for f in files
                       if os.path.splitext(f)[1].lower() in endings() and not f.startswith(".")
                       and (os.path.isfile(os.path.join(at, f)) or not os.path.exists(os.path.join(at, f))))  # no pipes
        if not found:
            print(f"{printable(folder)}: no pictures; left out")
            continue
        names += found
        labels += [len(classes)] * len(found)
        classes.append(folder.name)
    if not names:
        raise UserError(f"{path}: no file that Pillow reads, here or in the sub-folders")
    return names, labels, classes


def load_folder(path, size):
    """A folder of pictures, see listing."""
    if not path.is_dir():
        raise UserError(f"--data {path}: no such folder, and not one of shapes, {', '.join(IDX)}, cifar10")
    names, labels, classes = listing(path)
    names, labels = np.array([os.fsencode(n) for n in names]), np.array(labels)
    broken = set()

    def read_picture(i):
        file = path / os.fsdecode(names[i])
        try:
            with open_picture(file, size) as image:
                image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at the smallest scale that is still larger
                return rgb(image)
        except UNREADABLE as error:
            if i not in broken:
                broken.add(i)
                tqdm.write(f"skipped broken file {printable(file)} ({len(broken)} so far): {error}")
        others = [j for j in np.flatnonzero(labels == labels[i]) if j not in broken]
        if not others:
            raise UserError(f"{path / classes[labels[i]]}: no readable picture in this class")
        return read_picture(others[i % len(others)])  # another one of its class takes its place

    stamp = str([(n, os.lstat(path / os.fsdecode(n)).st_size) for n in names]).encode()
    return Data(path.resolve().name, labels, classes, read_picture, hashlib.sha256(stamp).hexdigest()[:12])


def rgb(image):
    """Any mode that Pillow reads, as RGB: alpha over white, 16 bits to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def shrink(image, side):
    """The shorter side becomes `side`: halved by a box filter while twice too large, then bicubic (as ADM does)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = side / min(image.size)
    return image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)


def cut(image, size, left, top):
    """A square of `size` pixels."""
    return image.crop((left, top, left + size, top + size))


def centre_crop(image, size, rng=None):
    """The centre square, by ADM's rule."""
    image = shrink(image, size)
    return cut(image, size, (image.width - size) // 2, (image.height - size) // 2)


def random_crop(image, size, rng):
    """A square of the shorter side at a random place, resized (TransDiff)."""
    side = min(image.size)
    image = cut(image, side, rng.integers(image.width - side + 1), rng.integers(image.height - side + 1))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def random_crop_mirror(image, size, rng):
    """random_crop, mirrored every other time."""
    return mirror(random_crop(image, size, rng)) if rng.random() < 0.5 else random_crop(image, size, rng)


def mirror(image):
    """Left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def centre_only(image, size):
    """Views for the cache: the centre crop."""
    return [centre_crop(image, size)]


def centre_and_mirror(image, size):
    """Views for the cache: the centre crop and its mirror image (TransDiff)."""
    return [centre_crop(image, size), mirror(centre_crop(image, size))]


def ten_crops(image, size):
    """Four corners and the centre of the picture at 1.1 times the size, and their mirror images (D-AR's AR stage)."""
    image = centre_crop(image, int(size * 1.1))
    far = image.width - size
    five = [cut(image, size, x, y) for x, y in ((0, 0), (far, 0), (0, far), (far, far), (far // 2, far // 2))]
    return five + [mirror(crop) for crop in five]


def one_of_ten_crops(image, size, rng):
    """One of ten_crops."""
    return ten_crops(image, size)[rng.integers(10)]


def random_scale_crop(image, size, rng):
    """A square of `size` at a random place of the picture at 1 to 1.25 times that size, mirrored every other time
    (D-AR's tokenizer)."""
    image = shrink(image, int(rng.integers(size, math.ceil(size / 0.8) + 1)))
    image = cut(image, size, rng.integers(image.width - size + 1), rng.integers(image.height - size + 1))
    return mirror(image) if rng.random() < 0.5 else image


def draw_shape(index, size):
    """Picture `index` of the data set `shapes`: class index % 10, anti-aliased and shaded, on a varied ground.

    Everything follows from a signed distance d(x, y): negative inside the shape, in units of half the picture.
    """
    rng = np.random.default_rng((20, index))
    kind = SHAPES[index % len(SHAPES)]
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(axis, axis)

    def colour(hue, saturation, value):
        rise = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
        return value * (1 - saturation * (1 - rise.clip(0, 1)))

    def mix(a, b, share):  # colours or pictures a and b; share (size, size) of b
        return a + (b - a) * share[..., None]

    hue, turn, light = rng.random(), rng.uniform(-0.15, 0.15), -2.2  # the light comes from the upper left
    scale, at = rng.uniform(0.72, 0.82), rng.uniform(-0.06, 0.06, 2)
    ground = colour((hue + rng.uniform(0.35, 0.65)) % 1, rng.uniform(0.1, 0.4), rng.uniform(0.8, 1))
    along = np.cos(light) * x + np.sin(light) * y
    picture = mix(ground * rng.uniform(0.55, 0.8), ground, (along + 1.4) / 2.8)

    def distance(dx=0.0, dy=0.0):
        u, v = (x - at[0] - dx) / scale, (y - at[1] - dy) / scale
        u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
        return scale * signed_distance(kind, u, v)

    shadow = (0.5 - distance(-0.09 * np.cos(light), -0.09 * np.sin(light)) / 0.16).clip(0, 1)  # away from the light
    picture = picture * (1 - 0.4 * shadow)[..., None]
    d = distance()
    bright = 0.5 + 0.5 * ((x - at[0]) * np.cos(light) + (y - at[1]) * np.sin(light)) / scale
    deep, pale = colour(hue, 0.9, rng.uniform(0.5, 0.7)), colour(hue, rng.uniform(0.5, 0.75), 1.0)
    surface = mix(deep, pale, bright.clip(0, 1)) * (0.8 + 0.2 * (-d / 0.12).clip(0, 1))[..., None]  # darker rim
    picture = mix(picture, surface, (0.5 - d * size / 2).clip(0, 1))
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def signed_distance(kind, u, v):
    """Distance of the points (u, v) to the outline of a shape of about unit radius, negative inside; v points down."""
    def disc(x, y, r):
        return np.hypot(u - x, v - y) - r

    def box(a, b):
        p, q = np.abs(u) - a, np.abs(v) - b
        return np.hypot(p.clip(0), q.clip(0)) + np.maximum(p, q).clip(None, 0)

    def polygon(points):
        d, inside = np.full_like(u, np.inf), np.zeros(u.shape, bool)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, 1, 0)):
            ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
            t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clip(0, 1)
            d = np.minimum(d, np.hypot(wx - ex * t, wy - ey * t))
            if ay != by:  # crossings of a ray to the right
                inside ^= ((v >= ay) != (v >= by)) & (u < ax + (v - ay) * ex / ey)
        return np.where(inside, -d, d)

    def corners(n, radii, start=-math.pi / 2):
        angle = start + np.arange(n) * 2 * math.pi / n
        return np.stack([np.cos(angle), np.sin(angle)], 1) * np.resize(radii, n)[:, None]

    if kind == "circle":
        return disc(0, 0, 0.92)
    if kind == "ring":
        return np.abs(disc(0, 0, 0.72)) - 0.22
    if kind == "square":
        return box(0.78, 0.78)
    if kind == "triangle":
        return polygon(corners(3, 1.05) + [0, 0.2])
    if kind == "diamond":
        return polygon(corners(4, [1.1, 0.68]))
    if kind == "star":
        return polygon(corners(10, [1.08, 0.45]))
    if kind == "heart":  # a square on its corner and two discs on its upper sides
        return np.minimum(polygon(corners(4, 0.85) + [0, 0.12]), np.minimum(disc(-0.425, -0.305, 0.601),
                                                                             disc(0.425, -0.305, 0.601)))
    if kind == "cross":
        return np.minimum(box(0.95, 0.33), box(0.33, 0.95))
    if kind == "crescent":
        return np.maximum(disc(0, 0, 0.98), -disc(0.42, -0.1, 0.78))
    petals = [disc(*(0.66 * p), 0.36) for p in corners(6, 1.0)]  # flower
    return functools.reduce(np.minimum, petals, disc(0, 0, 0.5))


class Order:
    """Which images make which micro-batch of a run: an endless row of shuffled epochs, cut into pieces.

    order(k) is micro-batch k of the whole run, over all ranks and steps: a list of (epoch, images), where `images`
    are `group` images of one class. It depends on (seed, k) alone: resuming and re-sharding keep it. Places in the row
    are moved on by `shift` where a run goes on with another batch size.
    """

    def __init__(self, labels, batch, group=1, seed=0):
        self.labels, self.batch, self.group, self.seed, self.shift = labels, batch, group, seed, 0
        self.epoch = functools.lru_cache(2)(self.shuffled)
        self.length = len(self.shuffled(0))  # samples per epoch

    def shuffled(self, epoch):
        """Indices (n, group) of one epoch. A class that does not divide into groups repeats some of its images."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.group == 1:
            return rng.permutation(len(self.labels))[:, None]
        members = [rng.permutation(np.flatnonzero(self.labels == c)) for c in np.unique(self.labels)]
        groups = [np.resize(m, (math.ceil(len(m) / self.group), self.group)) for m in members]
        return rng.permutation(np.concatenate(groups))

    def __call__(self, k):
        begin = k * self.batch + self.shift
        places = (divmod(p, self.length) for p in range(begin, begin + self.batch))
        return [(e, self.epoch(e)[offset]) for e, offset in places]


class Pictures(torch.utils.data.Dataset):
    """Augmented images as uint8 (3, h, w), or (group, 3, h, w), with their label; indexed by Order's pairs."""

    def __init__(self, data, size, augment, seed=0):
        self.data, self.size, self.augment, self.seed = data, size, augment, seed

    def __getitem__(self, item):
        epoch, indices = item
        stack = torch.stack([from_pil(self.augment(self.data.read(i), self.size,
                                                   np.random.default_rng((self.seed, epoch, i)))) for i in indices])
        return stack if len(indices) > 1 else stack[0], int(self.data.labels[indices[0]])


class Rows:
    """A memory-mapped array on disk whose rows are filled once, by several ranks, over several runs if need be.

    A folder with rows.npy, done.npy (which rows are there) and header.json (`about`: what they are). Opening it with
    another `about`, shape or type raises UserError.
    """

    def __init__(self, folder, shape, dtype, about):
        folder = Path(folder)
        header = {"shape": list(shape), "dtype": np.dtype(dtype).name, **about}
        with rank_zero_first(), locked(folder / ".lock", wait=True):  # runs that start together may share a cache
            if not (folder / "header.json").exists():
                for name, form, kind in (("rows", shape, dtype), ("done", shape[:1], bool)):
                    array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, tuple(form))
                    if hasattr(os, "posix_fallocate"):  # a full disk says so now, not by a crash in the middle
                        with open(folder / f"{name}.npy", "r+b") as f:
                            os.posix_fallocate(f.fileno(), 0, array.offset + array.nbytes)
                with atomic(folder / "header.json") as f:
                    f.write(json.dumps(header).encode())
        try:
            found = dict(json.loads((folder / "header.json").read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / 'header.json'} is damaged ({error}); delete {folder} to start anew") from None
        if found != header:
            differ = [k for k in {*found, *header} if found.get(k) != header.get(k)]
            raise UserError(f"{folder} was begun with other settings ({', '.join(differ)}); delete it to start anew")
        with foreign(folder, "damaged; delete it to start anew"):
            self.rows, self.done = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("rows", "done"))
            if [(a.shape, a.dtype) for a in (self.rows, self.done)] != [(tuple(shape), np.dtype(dtype)),
                                                                        (tuple(shape[:1]), np.dtype(bool))]:
                raise ValueError("another shape or type than its header says")

    def todo(self, rank, world):
        """The rows of this rank's share that are not there yet."""
        return [int(i) for i in np.array_split(np.arange(len(self.done)), world)[rank] if not self.done[i]]

    def write(self, indices, values):
        """Stores rows, and only when they are on disk says that they are."""
        self.rows[indices] = values
        self.rows.flush()
        self.done[indices] = True
        self.done.flush()


class Stored(torch.utils.data.Dataset):
    """What a first stage made of the views of each image, one view at random; indexed by Order's pairs."""

    def __init__(self, rows, labels, seed=0):
        self.rows, self.labels, self.seed = rows, labels, seed

    def __getitem__(self, item):
        epoch, indices = item
        views = [np.random.default_rng((self.seed, epoch, i)).integers(self.rows.shape[1]) for i in indices]
        stack = torch.from_numpy(np.stack([self.rows[i, view] for i, view in zip(indices, views)]))
        return stack if len(indices) > 1 else stack[0], int(self.labels[indices[0]])


@torch.no_grad()
def cached(folder, data, size, first, views, workers=0):
    """The memory-mapped array (n, views, ...) of first.encode(view) for each view of each image, built if missing.

    Keyed by data set, image size, first-stage weights and views; building is shared by the ranks and goes on where it
    was interrupted.
    """
    device = next(first.parameters()).device
    rank, world = ranks()
    sample = views(data.read(0), size)
    shape = first.encode(to_float(torch.stack([from_pil(v) for v in sample]).to(device))).cpu().numpy()
    about = {"data": data.name, "key": data.key, "size": size, "weights": fingerprint(first), "views": views.__name__}
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    rows = Rows(Path(folder) / f"{data.name}-{size}-{digest}", (len(data.labels), *shape.shape), shape.dtype, about)
    todo = rows.todo(rank, world)
    loader = torch.utils.data.DataLoader(_Views(data, size, views), 64, sampler=todo, num_workers=workers)
    bar = progress(len(todo), f"caching {data.name}", "img", rank)
    for indices, pictures in loader:                                     # (b,), (b, V, 3, h, w)
        encoded = first.encode(to_float(pictures.flatten(0, 1).to(device)))
        rows.write(indices.numpy(), encoded.unflatten(0, pictures.shape[:2]).cpu().numpy())
        bar.update(len(indices))
    bar.close()
    if world > 1:
        dist.barrier()
    if not rows.done.all():
        raise UserError(f"{folder}: the other ranks' share is not here; --cache names a folder that all machines share")
    return rows.rows


class _Views(torch.utils.data.Dataset):
    def __init__(self, data, size, views):
        self.data, self.size, self.views = data, size, views

    def __getitem__(self, i):
        return i, torch.stack([from_pil(view) for view in self.views(self.data.read(i), self.size)])


# --- 3  Randomness ----------------------------------------------------------------------------------------------------

def philox(counter, key):
    """Philox4x32-10, a counter-based generator (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter (four tensors), key (two): words of 32 bits as int64, of shapes that broadcast. Returns four words of random
    bits for each counter, the same on every device.
    """
    (a, b, c, d), (k0, k1), low = counter, key, 0xFFFFFFFF
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57                       # 64 bits; int64 wraps around as unsigned numbers do
        a, b, c, d = (q >> 32 & low) ^ b ^ k0, q & low, (p >> 32 & low) ^ d ^ k1, p & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return a, b, c, d


class Noise:
    """One random stream per image, so that an image does not depend on its batch, neighbours or number of GPUs.

    Noise.of(seed, indices): image k of seed s always has the same stream, on every device: its block n of four words
    is Philox of the counter (n, k) under the key s. A device's logarithm and cosine may round a value's last bit.
    """

    def __init__(self, seeds, device="cpu"):
        words = [[int(s) >> 32 * i & 0xFFFFFFFF for s in seeds] for i in range(4)]
        *self.index, low, high = torch.tensor(words, dtype=torch.long, device=device)[:, :, None]  # each (images, 1)
        self.key = low, high
        # Blocks of four words are made ahead: few small operations on a GPU, and what fits a core's cache on a CPU.
        self.ahead = max(1, (1 << 14 if torch.device(device).type == "cpu" else 1 << 18) // max(1, len(low)))
        self.block, self.ready = 0, low[:, :0]

    @classmethod
    def of(cls, seed, indices, device="cpu"):
        """The streams of images `indices` of seed `seed`, each a number of 64 bits."""
        return cls([(int(seed) << 64) + int(k) for k in indices], device)

    def words(self, n):
        """The next n words of 32 random bits of each stream, (images, n) int64."""
        parts, missing = [self.ready], n - self.ready.shape[1]
        while missing > 0:
            blocks = torch.arange(self.block, self.block + self.ahead, device=self.ready.device)
            made = philox((blocks & 0xFFFFFFFF, blocks >> 32, *self.index), self.key)
            parts.append(torch.stack(made, -1).flatten(1))
            self.block, missing = self.block + self.ahead, missing - 4 * self.ahead
        words = torch.cat(parts, 1) if len(parts) > 1 else self.ready
        self.ready = words[:, n:]
        return words[:, :n]

    def normal(self, shape):
        """Standard normal values (images, *shape) in float32, two from two words (Box and Muller, 1958)."""
        n = math.prod(shape)
        u, v = self.words(n + n % 2).unflatten(1, (-1, 2)).float().unbind(-1)
        radius, angle = (-2 * (u * 2**-32 + 2**-33).log()).sqrt(), 2 * math.pi * 2**-32 * v
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        return values.flatten(1)[:, :n].unflatten(1, shape)

    def uniform(self, shape):
        """Uniform values in [0, 1) (images, *shape): multiples of 2^-24, exact in float32."""
        return ((self.words(math.prod(shape)) >> 8).float() * 2**-24).unflatten(1, shape)


def compiled(step):
    """The inner step of a sampler, compiled; on CUDA it is recorded as a graph, so that the host launches it at once.

    The result is a copy: the next call writes into the graph's own memory.
    """
    step = torch.compile(step, mode="reduce-overhead")
    return lambda *args: step(*args).clone()


def zeros(kept, shape, like, dtype=None):
    """Memory for keys and values, like this tensor. kept: None, or a dict in which it stays from one batch to the next,
    for a recorded graph reads and writes at the places where it was recorded."""
    if kept is None:
        return like.new_zeros(shape, dtype=dtype)
    if (key := (*shape, dtype, like.device)) not in kept:
        kept.clear()  # of another batch size
        kept[key] = like.new_zeros(shape, dtype=dtype)
        torch._dynamo.mark_static_address(kept[key])
    return kept[key]


def guidance_scales(cfg, steps):
    """One guidance scale per step from a number, or from a pair (first, last) that is joined linearly."""
    return [float(g) for g in np.linspace(*cfg, steps)] if isinstance(cfg, tuple) else [float(cfg)] * steps


# --- 4  Training state ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How a stage is trained: AdamW, linear warm-up from zero, constant, decay at the end."""
    lr: float
    batch: int                        # samples per optimizer step, over all ranks and micro-batches
    epochs: float                     # length in passes over the data
    warmup: float = 0.0               # share of the run, 0 .. 1
    decay: float = 0.0                # share of the run, at its end
    final: float = 0.0                # learning rate at the end of the decay, as a share of lr
    exponential: bool = False         # shape of the decay: linear, or exponential (then final is more than 0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    clip: float = 3.0                 # largest gradient norm
    ema: float = 0.9999               # largest decay of the moving average of the weights

    def rate(self, step, steps):
        """Learning rate of optimizer step `step` (0 .. steps - 1)."""
        rising, falling = self.warmup * steps, self.decay * steps
        rate = self.lr * min(1, step / rising) if rising else self.lr
        left = min(1, (steps - step) / falling) if falling else 1
        return rate * (self.final ** (1 - left) if self.exponential else self.final + (1 - self.final) * left)


@dataclass(frozen=True)
class Stage:
    """One thing that is trained: what it is built from, what it eats, and how."""
    name: str
    build: Callable                            # config -> module; module(batch, labels) -> {"loss": ..., parts}
    recipes: dict[str, Recipe]                 # by preset; a preset that is missing takes published weights
    load: Callable | None = None               # path -> the frozen module, where published weights may be given
    config: Callable = lambda config: config   # what this stage changes in the preset's config
    first: str | None = None                   # the earlier, frozen stage whose codes it eats; None: it eats images
    codes: Callable | None = None              # (first, stored codes) -> the module's batch
    augment: Callable = lambda config: centre_crop          # config -> (image, size, rng) -> image
    views: Callable | None = None              # config -> (image, size) -> the views of an image that are cached
    group: Callable = lambda config: 1         # images of one class that make one sample
    start: str | None = None                   # the earlier stage whose weights it goes on from
    names: str = ""                            # the config's field that takes the classes' names, if it has one
    carry: Callable | None = None              # (name, old, shape) -> tensor or None, for weights that change shape
    decays: Callable = lambda name, p: p.ndim > 1           # does weight decay act on this parameter?
    trains: Callable = lambda config, name: True            # is this parameter trained?
    finish: Callable = lambda ema, images: None             # called with some images before the weights are written
    ready: Callable = lambda module, config: None           # called before the first step of a process
    preview: Callable | None = None            # (ema, first, images, labels, noise) -> pictures for the grid


def vae_stage(augment):
    """The stage that trains a KL-VAE, for the models whose first stage it is. Recipes: `tiny` alone, see load."""
    def reconstructions(vae, first, images, labels, noise):
        moments = vae.encode(images)                                                        # (B, 2z, h, w)
        latents = vae.sample(moments, noise.normal(moments[0].chunk(2)[0].shape))
        return torch.stack([images, vae.decode(latents)], 1).flatten(0, 1)                  # in turn

    return Stage("vae", build=lambda c: KLVAE(c.vae), augment=augment, load=load_vae, preview=reconstructions,
                 recipes={"tiny": Recipe(lr=3e-3, batch=16, epochs=0.8, warmup=0.03, decay=0.4, betas=(0.9, 0.99),
                                         weight_decay=0.0, clip=1.0, ema=0.99)},
                 finish=lambda vae, images: vae.calibrate(images))


def same_kind_of_vae(model, vae):
    """Raises UserError if the model was made for another kind of VAE."""
    has, needs = (f"{c.channels} channels at f{c.factor}" for c in (vae.config, model.config.vae))
    if has != needs:
        raise UserError(f"the VAE has {has}, the model needs {needs}")


def distributed(device=None):
    """(rank, world, device) of this process; joins torchrun's group where there is one. device: cpu, cuda, mps."""
    torch.set_flush_denormal(True)  # numbers below 1e-38, as gradients come to have, make CPUs several times slower
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cpu" if device == "mps" and world > 1 else device
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        if device.type == "meta":
            raise RuntimeError("has no memory")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        how = {"timeout": datetime.timedelta(minutes=60)}
        if world == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
            # With gloo, ranks that torchrun starts again find the addresses of the dead ones in its store (torch 2.13).
            # On one machine the count of the attempts tells them apart; those of several machines may differ.
            store = next(rendezvous("env://"))[0]
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            how |= {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": world}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **how)
    return rank, world, device


def ranks():
    """(rank, world) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others do (it downloads or creates, they find it)."""
    wait = dist.is_initialized() and dist.get_world_size() > 1
    if wait and dist.get_rank() > 0:
        dist.barrier()
    yield
    if wait and dist.get_rank() == 0:
        dist.barrier()


def gather(x):
    """The tensors (b, ...) of all ranks, one after another, on every rank; equal shapes."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def update_ema(ema, model, decay):
    """Moves the averaged weights towards the model's, ema = decay * ema + (1 - decay) * model; copies buffers."""
    torch._foreach_lerp_(list(ema.parameters()), [p.detach().float() for p in model.parameters()], 1 - decay)
    for old, new in zip(ema.buffers(), model.buffers()):
        old.copy_(new)


@contextlib.contextmanager
def atomic(path, keep=False):
    """A binary file to write; it takes the place of `path` when the block ends well, and leaves no trace if not.

    keep: what was there stays as <stem>.previous<suffix>.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():  # by a link, so that there is a whole `path` at any moment
            spare = path.with_name(f".{path.name}.spare")
            spare.unlink(missing_ok=True)
            try:
                os.link(path, spare)
            except OSError:  # a file system without links
                spare = path
            os.replace(spare, path.with_suffix(".previous" + path.suffix))
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was there is"
                        " untouched") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, wait=False):
    """Holds the lock `path` until the block or the process ends, however it does. Taken: waits, or raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        try:
            import fcntl
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))  # not flock: workers would hold that, too
        except (BlockingIOError, PermissionError):
            f.seek(0)
            raise UserError(f"another process ({f.read().strip() or 'of an unknown number'}) works in {path.parent}:"
                            " wait for it, or take another --out") from None
        except (ImportError, OSError):  # Windows, and file systems without locks: on one's own
            pass
        f.truncate(0)
        f.write(f"{os.getpid()} on {platform.node()}")
        f.flush()
        yield


def save(path, content, keep=False):
    """Writes tensors, numbers, strings, lists and dicts, atomically."""
    with atomic(path, keep) as f:
        torch.save(content, f)


class ReleasedConfig:
    """Stands in for the class that released D-AR files hold their configuration in: nothing but a dict, `_data`."""


HARMLESS = [argparse.Namespace, (ReleasedConfig, "config_util.Config"),  # what checkpoints may hold besides tensors:
            *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
            np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1"))]  # NumPy arrays


def read(path, sums=False):
    """The content of a checkpoint: .pt, .pth, .ckpt, .bin, or .safetensors. Runs nothing that the file says.

    sums: looks at the checksums of a file that `save` wrote; torch.load does not. Raises UserError for a missing,
    damaged or unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path}: pip install safetensors, or give the file as .pt, .pth, .ckpt or .bin") from None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    try:
        if sums:
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise UserError(f"{path} is damaged: wrong checksum of {bad}")
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds code ({found[1]}), which is not run" if found else "not a file that torch.save wrote"
        raise UserError(f"{path}: {reason}") from None
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise all sorts
        words = str(error).splitlines()[:1] or ["it is empty" if isinstance(error, EOFError) else type(error).__name__]
        raise UserError(f"{path} is damaged: {words[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def load_strict(module, state, path):
    """Loads a state dict into the module; a missing, extra or misshapen entry is a UserError that names it."""
    own = module.state_dict()
    if strange := [k for k, v in state.items() if not isinstance(v, torch.Tensor)]:
        raise UserError(f"{path} does not fit: {strange[0]} is a {type(state[strange[0]]).__name__}, not a tensor")
    wrong = ([f"missing {k}" for k in own if k not in state] + [f"unknown {k}" for k in state if k not in own]
             + [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
                if k in state and state[k].shape != own[k].shape])
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} does not fit: {'; '.join(wrong[:5])}{more}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # sparse, or of another kind
        raise UserError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from None


def fingerprint(module):
    """Twelve hexadecimal digits that name the weights of a module, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def progress(total, title, unit, rank=0, done=0):
    """A progress bar on rank 0; a line every half minute where nobody watches."""
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=rank > 0 or done >= total,
                mininterval=0.2 if sys.stderr.isatty() else 30)


def walk(module, *inputs, depth=2):
    """Runs the module once and prints the shape that every part gives, when it first runs."""
    seen = set()

    def show(name):
        def hook(part, args, output):
            parts = output if isinstance(output, dict) else {"": output[0] if isinstance(output, tuple) else output}
            shape = ", ".join(f"{key} {tuple(part.shape)}".strip() for key, part in parts.items())
            if name not in seen:
                print(f"  {name:32s} {type(part).__name__:18s} {shape}")
            seen.add(name)
        return hook

    hooks = [part.register_forward_hook(show(name)) for name, part in module.named_modules()
             if name and name.count(".") < depth and not isinstance(part, nn.ModuleList)]
    output = module(*inputs)
    for hook in hooks:
        hook.remove()
    return output


# --- 5  Pictures ------------------------------------------------------------------------------------------------------

def to_float(images):
    """uint8 0 .. 255 to float -1 .. 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float -1 .. 1 (clipped) to uint8 0 .. 255, rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_pil(image):
    """uint8 (3, h, w) of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def grid(images, columns, names=None, gap=2, zoom=None):
    """One picture of uint8 images (n, 3, h, w), row by row; `names` stand to the left of their rows.

    zoom: how many pixels become of one, each way; unless given, enough for images of 64 pixels.
    """
    zoom = zoom or max(1, 64 // images.shape[2])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    font = ImageFont.load_default(max(10, min(h // 3, 24)))
    left = max((int(font.getlength(name)) for name in names), default=0) + 8 if names else gap
    sheet = Image.new("RGB", (left + columns * (w + gap), gap + rows * (h + gap)), "white")
    for k, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(image), (left + k % columns * (w + gap), gap + k // columns * (h + gap)))
    for row, name in enumerate((names or [])[:rows]):
        ImageDraw.Draw(sheet).text((4, gap + row * (h + gap) + h / 2), name, "black", font, anchor="lm")
    return sheet


def save_picture(path, picture):
    """Writes a PNG (or what the suffix says), atomically."""
    with atomic(path) as f:
        picture.save(f, Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"))


def save_gif(path, frames, seconds=4.0, hold=1.5):
    """Writes pictures as a looping GIF of `seconds`, whose last frame stays for `hold` seconds more."""
    pace = int(1000 * seconds / len(frames))
    with atomic(path) as f:
        frames[0].save(f, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[pace] * (len(frames) - 1) + [pace + int(1000 * hold)])
