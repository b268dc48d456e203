"""What the models share and none of the papers invented: KL-VAE, data, randomness, training state.

Sections   1  Errors and scripts: configurations, launch    UserError, override, launch
           2  Layers, KL-VAE and its published weights      KLVAE, load_vae
           3  Data: named sets, folders, order, cache       load_data, Samples, cached
           4  Randomness: one generator per image           Noise
           5  Training state: stages, ranks, checkpoints    Stage, Recipe, read_checkpoint
           6  Pictures: uint8 borders, grids, animations    to_uint8, grid, save_gif
Range      Images are float in [-1, 1] inside, uint8 at the borders (files, caches, data sets).
Errors     A mistake that the user can mend raises UserError with one line that says how. The
           scripts print that line and exit with code 2.
"""
import argparse
import datetime
import gzip
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import sys
import tarfile
import typing
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from tqdm import tqdm

# --- 1  Errors and scripts ------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what is wrong and what to do."""


@contextmanager
def untrusted(path, what="damaged"):
    """Turn any error of the block, which uses what a file or the user says, into a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a hostile file raises cannot be listed
        words = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{path} is {what} ({words[:300]})") from None


def run_script(main):
    """Run a script. A user's mistake or a failing disk ends it with one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # class names may not fit the terminal
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # DDP leaves gloo's threads, which may abort the interpreter's own end
        return
    except UserError as error:
        words = str(error).rpartition("\ncommon.UserError: ")[2]  # of a data worker's traceback
        message = " ".join(words.split())
    except (KeyboardInterrupt, MemoryError, OSError) as error:  # disk full, a vanished folder
        message = f"{type(error).__name__} {error}"
    except RuntimeError as error:
        message = explain(error)
        if message is None:
            raise
    sys.stdout.flush()
    where = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    if where:
        os._exit(2)  # the other ranks may hang; torchrun ends them
    sys.exit(2)


ADVICE = {  # pattern in the type and the words of a RuntimeError -> what to say
    "OutOfMemoryError": "out of memory: smaller batches need less (--batch-size, --accumulate)",
    r"'torch\._(dynamo|inductor)|stream is capturing":
        "torch.compile failed: --no-compile runs without it",
    "DataLoader worker": "a process that loads images died (memory?): the same command resumes",
    "DistBackendError|gloo/|Connection (closed|reset) by peer":
        "lost the connection to the other ranks"}


def explain(error):
    """Return one line about a RuntimeError that is not a programming mistake, else None."""
    for pattern, advice in ADVICE.items():
        if re.search(pattern, f"{type(error)} {error}"):
            return f"{advice} ({str(error).splitlines()[0][:200]})"


def check(config, rules, **choices):
    """Raise UserError for a field outside its choices or a rule that does not hold.

    rules: what must hold, in words -> whether it does. choices: field -> the values it may have.
    """
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise UserError(f"{name} is one of {', '.join(map(str, allowed))}, not {value}")
    for rule, holds in rules.items():
        if not holds:
            raise UserError(rule)


def with_options(config, **options):
    """Return the config with those options that are not None. Raise UserError for a bad value."""
    given = {name: value for name, value in options.items() if value is not None}
    return replace(config, **given)


def override(config, assignments):
    """Return a (nested) dataclass with `field=value` strings applied, typed by the fields.

    Raise UserError for an unknown field, a bad value, or values that do not fit together.
    """
    values = asdict(config)
    with untrusted(f"--set {' '.join(assignments)}",
                   f"not possible: choose from the fields {', '.join(values)}"):
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            value = values
            kind = type(config)
            for part in name.split("."):
                kind = typing.get_type_hints(kind)[part]
                fields = value
                value = fields[part]
            fields[part] = parse(text, kind)
        return rebuild(type(config), values)  # all at once: they may only fit together


def parse(text, kind):
    """Return the value of a text as a bool, int, float, str, or a tuple of one of these."""
    elements = typing.get_args(kind)  # int and ... of tuple[int, ...]
    if elements:
        return tuple(elements[0](part) for part in text.split(",") if part)
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if is_dataclass(kind):
        raise TypeError("set its fields")
    return kind(text)


def rebuild(kind, values):
    """Return the (nested) dataclass that dataclasses.asdict turned into these values."""
    fields = dict(values)
    for name, value in values.items():
        if isinstance(value, dict):
            fields[name] = rebuild(typing.get_type_hints(kind)[name], value)
    return kind(**fields)


@dataclass(frozen=True)
class Process:
    """This process among the ranks of a job, its device and its precision."""
    rank: int
    world: int
    device: torch.device
    precision: str  # "bf16" or "fp32"

    def autocast(self):
        """Return the context in which networks run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def launch(device=None, precision=None):
    """Join torchrun's process group, if there is one, and return this Process.

    device: cpu, cuda, cuda:1, mps; by default the best there is. precision: by default bf16 on
    CUDA.
    """
    torch.set_flush_denormal(True)  # CPUs are several times slower on numbers below 1e-38
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    with untrusted(f"--device {device}", "not at hand"):
        device = torch.device(device or "cpu")
        if device == torch.device("cuda"):
            device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.empty(1, device=device)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # masked, it has given NaN gradients on Hopper
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if on_cuda else "gloo",
                                timeout=datetime.timedelta(minutes=60),
                                device_id=device if on_cuda else None)
    rank, world = ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w", errors="ignore")  # rank 0 alone prints
    return Process(rank, world, device, precision or ("bf16" if on_cuda else "fp32"))


@contextmanager
def true_float32():
    """Switch TF32 off: it keeps ten bits of a mantissa, which moves codes and features."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def progress(total, title, unit, done=0):
    """Return a progress bar on rank 0. Without a terminal it prints a line every half minute."""
    return tqdm(total=total, initial=done, desc=title, unit=unit,
                disable=ranks()[0] > 0 or done >= total,
                mininterval=0.2 if sys.stderr.isatty() else 30)


def load_model(name):
    """Import the model file NAME.py, which is beside the scripts or in the working directory."""
    sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
        if not hasattr(module, "STAGES"):
            raise ImportError("it has no STAGES")
        return module
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"--model {name}: no model file {name}.py here or beside the scripts, or it"
                        f" does not work ({error})") from None


def natural(text, least=0):
    """Convert an option to an integer of 0 or more. argparse shows this function's name."""
    if int(text) < least:
        raise ValueError
    return int(text)


def positive(text):
    """Convert the text of an option to an integer of 1 or more."""
    return natural(text, 1)


def class_ids(texts, config):
    """Return the labels of classes given as ids or names, or raise UserError."""
    known = {str(k): k for k in range(config.classes)}
    for k, name in enumerate(config.class_names):
        known[name] = k
    with untrusted(f"a class of {', '.join(texts)}", f"unknown: use ids 0 to {config.classes - 1},"
                   f" or names: {', '.join(config.class_names[:20])}"):
        return [known[text] for text in texts]


def print_presets(presets, published, **builds):
    """Print how many parameters the modules of each preset have, and the published number of the
    last one. builds: name -> (config -> module)."""
    print("preset  ", *(f"{name:>15s}" for name in builds), "published")
    for preset, config in presets.items():
        with torch.device("meta"):
            counts = [f"{sum(map(torch.numel, build(config).parameters())):15,d}"
                      for build in builds.values()]
        print(f"{preset:8s}", *counts, f"{published.get(preset, '-'):>9s}")


def walk(module, *inputs):
    """Run the module once and print the shape of each part's first output."""
    names = {part: name for name, part in module.named_modules() if name and name.count(".") < 2}

    def show(part, args, output):
        if part in names:
            first = tree_leaves(output)[0]
            print(f"  {names.pop(part):32s} {type(part).__name__:18s} {tuple(first.shape)}")

    with nn.modules.module.register_module_forward_hook(show):
        return module(*inputs)


# --- 2  Layers and KL-VAE -------------------------------------------------------------------------

GroupNorm = partial(nn.GroupNorm, eps=1e-6)
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
Matrix = partial(nn.Linear, bias=False)  # a linear layer that is a matrix alone
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def plain_norm(x):
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def split_heads(x, heads):
    """Return x (..., n, dim) as (..., heads, n, dim/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x):
    """Return x (B, heads, n, C) as (B, n, heads * C)."""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a latent-diffusion KL autoencoder. The default is the 16-channel f16 one."""
    channels: int = 16                       # latent channels
    width: int = 128                         # channels at full resolution
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # width multiple per level; each but the last halves
    blocks: int = 2                          # residual blocks per encoder level; decoder: one more
    attention: tuple[int, ...] = (4,)        # encoder levels with attention after every block
    decoder_attention: tuple[int, ...] = ()  # the same for the decoder
    groups: int = 32                         # of every group norm
    scale: float = 0.2325                    # latent = scale * posterior sample; 0: to be measured
    kl_weight: float = 1e-6                  # training: weight of the KL term per latent value

    @property
    def factor(self):
        """Image side over latent side."""
        return 2 ** (len(self.mult) - 1)


SD_VAE = VAEConfig(channels=4, mult=(1, 2, 4, 4), attention=(), scale=0.18215)  # the f8 one
TINY_VAE = VAEConfig(width=16, mult=(1, 2, 4), blocks=1, attention=(), groups=8, scale=0,
                     kl_weight=1e-3)


class ResBlock(nn.Module):
    """Two rounds of group norm, SiLU and convolution, added to the input."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = GroupNorm(groups, c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map, added to the input."""

    def __init__(self, channels, groups):
        super().__init__()
        linear = partial(nn.Conv2d, channels, channels, 1)
        self.norm = GroupNorm(groups, channels)
        self.q = linear()
        self.k = linear()
        self.v = linear()
        self.proj_out = linear()

    def forward(self, x):                                              # (B, C, h, w)
        h = self.norm(x)
        q, k, v = torch.stack([self.q(h), self.k(h), self.v(h)]).flatten(3).mT[:, :, None]
        h = F.scaled_dot_product_attention(q, k, v)                    # (B, 1, h w, C)
        return x + self.proj_out(h.mT.reshape(x.shape))


class Coder(nn.Module):
    """The encoder, images (B, 3, h, w) to moments (B, 2 channels, h/f, w/f), or the decoder, which
    goes up, latents (B, channels, h/f, w/f) to images. Level 0 is full resolution in both."""

    def __init__(self, config, c_in, c_out, blocks, attention, up):
        super().__init__()
        self.up = up
        groups = config.groups
        widths = [config.width * m for m in config.mult]
        lowest = widths[-1]  # of the lowest resolution
        width = lowest if up else config.width
        self.conv_in = conv3x3(c_in, width)
        self.levels = nn.ModuleList([nn.Sequential() for _ in widths])
        order = sorted(range(len(widths)), reverse=up)
        for i in order:
            level = self.levels[i]
            for _ in range(blocks):
                block = nn.Sequential(ResBlock(width, widths[i], groups))
                width = widths[i]
                if i in attention:
                    block.append(SpatialAttention(width, groups))
                level.append(block)
            if i != order[-1]:
                resample = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, 2)]
                if up:
                    resample = [nn.Upsample(scale_factor=2.0), conv3x3(width, width)]
                level.add_module("resample", nn.Sequential(*resample))
        self.mid = nn.Sequential(ResBlock(lowest, lowest, groups), SpatialAttention(lowest, groups),
                                 ResBlock(lowest, lowest, groups))
        self.norm_out = GroupNorm(groups, width)
        self.conv_out = conv3x3(width, c_out)

    def forward(self, x):
        x = self.conv_in(x)
        parts = [*self.levels, self.mid]
        if self.up:
            parts.reverse()
        for part in parts:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def in_parts(function, batch, size):
    """Return function(batch), computed in parts of up to 2^22 pixels, for images of size x size:
    activations are large."""
    return torch.cat([function(part) for part in batch.split(max(1, 2**22 // size**2))])


class KLVAE(nn.Module):
    """Autoencoder with a Gaussian posterior (Rombach et al., 2022), and the scale of its latents.

    The scale belongs to the weights: everything outside this class sees scaled latents. Image sides
    are divisible by config.factor.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config.channels
        self.encoder = Coder(config, 3, 2 * c, config.blocks, config.attention, up=False)
        self.decoder = Coder(config, c, 3, config.blocks + 1, config.decoder_attention, up=True)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.register_buffer("scale", torch.tensor(float(config.scale or 1)))
        # Unit gains and zero residual branches: worth 8 dB after 500 steps of `tiny`.
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "proj_out")):
                    nn.init.zeros_(module.weight)

    def encode(self, images):
        """Return the posterior's moments (B, 2 channels, h, w): mean, then log-variance."""
        return self.quant_conv(self.encoder(images))

    def posterior(self, moments):
        """Return mean and standard deviation (B, channels, h, w), unscaled."""
        mean, logvar = moments.float().chunk(2, 1)
        return mean, torch.exp(logvar.clamp(-30, 20) / 2)

    def codes(self, moments, noise=None):
        """Return scaled latents drawn from the posterior, by noise of their shape if given."""
        mean, std = self.posterior(moments)
        return self.scale * (mean + std * (torch.randn_like(mean) if noise is None else noise))

    def decode(self, latents):
        """Return images (B, 3, h, w) for scaled latents, not clamped."""
        decode = nn.Sequential(self.post_quant_conv, self.decoder)
        return in_parts(decode, latents / self.scale, latents.shape[-1] * self.config.factor)

    def reconstruct(self, images, noise, on_step=None):
        """Return the images (B, 3, h, w) encoded and decoded. noise: common.Noise."""
        moments = self.encode(images)
        return self.decode(self.codes(moments, noise.normal(moments[0].chunk(2)[0].shape)))

    def sampled(self):
        """Return the parts that sampling runs, see cast_once."""
        return [self.decoder, self.post_quant_conv]

    def kl(self, moments):
        """Return the KL divergence to N(0, I) per image (B,), summed over channels and space."""
        mean, std = self.posterior(moments)
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).flatten(1).sum(1)

    def forward(self, images, labels=None, *, noise=None):
        """Return the training loss: mean L1 error plus kl_weight times the KL per latent value."""
        moments = self.encode(images)
        l1 = F.l1_loss(self.decode(self.codes(moments, noise)).float(), images)
        kl = self.kl(moments).mean() / (moments[0].numel() / 2)
        return {"loss": l1 + self.config.kl_weight * kl, "l1": l1, "kl": kl}

    @torch.no_grad()
    def finish(self, images):
        """Set the scale that gives latents of these images unit deviation, if it is measured."""
        if not self.config.scale:
            mean, std = self.posterior(self.encode(images))
            self.scale.copy_((mean.var() + (std**2).mean()).rsqrt())


VAE_PARTS = r"((first_stage_model|vae)\.)?(encoder|decoder|quant_conv|post_quant_conv|scale)\b"
# Published name, latent-diffusion's or diffusers', -> ours.
PUBLISHED = r"""
^(first_stage_model|vae)\.    ->
conv_norm_out                 -> norm_out
mid_block\.resnets\.0         -> mid.0
mid_block\.attentions\.0      -> mid.1
mid_block\.resnets\.1         -> mid.2
mid\.block_1                  -> mid.0
mid\.attn_1                   -> mid.1
mid\.block_2                  -> mid.2
group_norm                    -> norm
\b(to_q|query)\b              -> q
\b(to_k|key)\b                -> k
\b(to_v|value)\b              -> v
\b(to_out\.0|proj_attn)\b     -> proj_out
(nin|conv)_shortcut           -> shortcut
\.(down|up)(_blocks)?\.       -> .levels.
(block|resnets)\.(\d+)        -> \2.0
(attn|attentions)\.(\d+)      -> \2.1
(down|up)sample(rs\.0)?\.conv -> resample.1
"""


def load_vae(path):
    """Return a frozen KL-VAE from one of our checkpoints or a published file.

    The shapes give the config. The number of groups and the latent scale do not show in the
    weights: they come from a diffusers config.json beside the file, else they are the published
    ones, which is said. Raise UserError for a missing, extra or misshapen entry.
    """
    path = Path(path)
    content = read_checkpoint(path)
    with untrusted(path, "not a KL-VAE"):
        beside = path.with_name("config.json")
        about = json.loads(beside.read_text()) if beside.exists() else {}
        fields = {"norm_num_groups": "groups", "scaling_factor": "scale"}
        known = {ours: about[name] for name, ours in fields.items() if name in about}
        if content.get("stage") == "vae":
            known = content["config"]["vae"]
        state = unwrap(content, "model", "state_dict")
        vae = vae_from_state(state, path, **known)
        if "scale" not in {**known, **state}:
            print(f"note: {path} does not tell its latent scale and groups: assuming"
                  f" {vae.config.scale} and {vae.config.groups}")
        return vae


def vae_from_state(state, path="the VAE", **known):
    """Return the KL-VAE of a state dict in one of the published layouts (see load_vae).

    known: fields of VAEConfig that the shapes do not tell; those missing are the published ones.
    """
    state = {name: value for name, value in state.items() if re.match(VAE_PARTS, name)}
    blocks = numbered(state, r".*decoder\.up_blocks\.(\d+)")  # diffusers counts from the other end
    flips = [rf"\.up_blocks\.{i}\. -> .levels.{blocks[-1] - i}." for i in blocks]
    state = renamed(state, "\n".join(flips) + PUBLISHED)
    for name, value in state.items():
        if value.ndim == 2:  # attention written with linear layers
            state[name] = value[..., None, None]
    width = len(state["encoder.conv_in.weight"])
    channels = len(state["post_quant_conv.weight"])
    levels = numbered(state, r"encoder\.levels\.(\d+)")
    scale = SD_VAE.scale if channels == SD_VAE.channels else VAEConfig.scale
    fields = dict(
        channels=channels, width=width, scale=float(state.get("scale", scale)),
        mult=tuple(len(state[f"encoder.levels.{i}.0.0.conv1.weight"]) // width for i in levels),
        blocks=len(numbered(state, r"encoder\.levels\.0\.(\d+)\.")),
        attention=tuple(numbered(state, r"encoder\.levels\.(\d+)\.\d+\.1\.")),
        decoder_attention=tuple(numbered(state, r"decoder\.levels\.(\d+)\.\d+\.1\.")))
    vae = KLVAE(VAEConfig(**fields | known))
    load_strict(vae, {"scale": vae.scale, **state}, path)
    return vae.eval().requires_grad_(False)


# --- 3  Data --------------------------------------------------------------------------------------

@dataclass
class Data:
    """A labelled set of pictures. Nothing is held per image but its label and its file's name."""
    name: str
    labels: np.ndarray                     # (n,) int64, 0 .. len(classes) - 1
    classes: list[str]
    open: Callable                         # index -> RGB picture of any size, or any error
    key: str                               # digest that changes with the content
    paths: tuple = ()                      # of the pictures, if each is a file
    broken: set = field(default_factory=set)  # indices of files that could not be read

    def read(self, index):
        """Return picture `index`, or the next of its class if the file is broken, which is printed.

        Raise UserError if the class has no readable picture.
        """
        n = len(self.labels)
        for k in range(n):
            i = (index + k) % n
            if self.labels[i] == self.labels[index] and i not in self.broken:
                try:
                    return self.open(i)
                except Exception as error:  # what Pillow raises cannot be listed
                    self.broken.add(i)
                    tqdm.write(f"skipped broken file {self.paths[i]}: {error}", sys.stderr)
        raise UserError(f"class {self.classes[self.labels[index]]} has no readable picture")


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
FASHION = "t-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
NAMED = {  # name: (URL, class names, {file: SHA-256 or its first digits})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", list("0123456789"), {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546f",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", FASHION, {
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf8",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f3",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84d",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", CIFAR10, {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a"})}
FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM".split()  # not EPS, which is a program
ENDINGS = ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .pgm".split()


def load_data(name, root="data", size=32, split="train"):
    """Return the data set `shapes`, `mnist`, `fashion-mnist`, `cifar10`, or that of a FOLDER.

    Named sets are read from root/<name>/ and downloaded there if missing. size (pixels) is the side
    of drawn shapes, and limits the scale at which JPEGs are decoded. split is "train" or "test"; a
    folder has one split. Raise UserError for what is missing, damaged or empty.
    """
    if name == "shapes":
        first, n = (0, 20000) if split == "train" else (20000, 4000)
        labels = np.arange(n) % len(SHAPES)
        return Data(name, labels, SHAPES, lambda i: draw_shape(first + i, size), f"flat-{first}")
    if name not in NAMED:
        return load_folder(Path(name), size)
    url, classes, files = NAMED[name]
    paths = [download(url + file, Path(root, name, file), files[file]) for file in files]
    if name == "cifar10":
        images, labels = read_cifar10(paths[0], split)
    else:
        images, labels = map(read_idx, paths[:2] if split == "train" else paths[2:])
    if len(images) != len(labels) or labels.max() >= len(classes):
        raise UserError(f"the files in {paths[0].parent} are not those of {name}: delete them")
    return Data(name, np.int64(labels), classes,
                lambda i: Image.fromarray(images[i]).convert("RGB"),
                short_hash(images.tobytes() + labels.tobytes()))


def download(url, path, digest=None, hint="or name another folder with --data-root"):
    """Return `path`, downloaded if it is missing, checked by the start of its SHA-256.

    Raise UserError if it cannot be had; hint says what else the user can do.
    """
    with rank_zero_first(), untrusted(path, f"missing: cannot download {url} (SHA-256 {digest});"
                                      f" try again, or fetch it by other means, {hint}"):
        if not path.exists():
            print(f"downloading {url} to {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, digest, sys.stderr.isatty())
    return path


def read_idx(path):
    """Return the array in a gzipped IDX file: zero, zero, type 8, dimensions, sizes, values."""
    with untrusted(path, "damaged; delete it to download it again"):
        with gzip.open(path) as f:
            raw = f.read(1 << 30)
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def read_cifar10(path, split):
    """Return images (n, 32, 32, 3) and labels (n,) from the archive of the binary version."""
    names = [f"data_batch_{k}" for k in "12345"] if split == "train" else ["test_batch"]
    raw = b""
    with untrusted(path, "not the binary CIFAR-10 archive, or damaged; delete it"):
        with tarfile.open(path) as archive:
            for name in names:
                raw += archive.extractfile(f"cifar-10-batches-bin/{name}.bin").read(10_000 * 3073)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32)  # planes of red, green and blue
    return images.transpose(0, 2, 3, 1), records[:, 0]


def pictures_by_class(path):
    """Return a dict from each sub-folder's name to the pictures below it, and from "." to those at
    the top. Links are followed; hidden folders are left out."""
    classes = {}
    for at, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(at) in map(os.path.realpath, Path(at).parents):  # a loop of links
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != "."]
        top_folder = os.path.relpath(at, path).split(os.sep)[0]
        for name in names:
            file = Path(at, name)
            if file.suffix.lower() in ENDINGS and name[0] != "." and file.is_file():
                classes.setdefault(top_folder, []).append(file)
    return classes


def load_folder(path, size):
    """Return the Data of a folder of class folders, or of a flat one: a single class.

    Raise UserError for a folder without pictures, and for one that has pictures both at its top and
    in sub-folders, which could mean either.
    """
    path = Path(os.path.realpath(path))
    pictures = pictures_by_class(path)
    if not pictures:
        raise UserError(f"{path}: no such folder, nor one of shapes, {', '.join(NAMED)}; or it has"
                        f" no picture ({', '.join(ENDINGS)})")
    if "." in pictures and len(pictures) > 1:
        raise UserError(f"{path} has {len(pictures.pop('.'))} pictures at its top,"
                        f" {sum(map(len, pictures.values()))} in sub-folders:"
                        " keep either the sub-folders, one for each class, or the pictures")

    def by_number(name):  # class 2 before class 10
        return re.sub(r"\d+", lambda digits: f"{digits[0]:0>300}", name)

    classes = sorted(sorted(pictures), key=by_number)
    files, labels, about = [], [], ""
    for label, name in enumerate(classes):
        for file in sorted(pictures[name]):
            files.append(file)
            labels.append(label)
            stat = file.stat()  # of the target, if it is a link
            about += f"{file.relative_to(path)} {(stat.st_size, stat.st_mtime_ns)}\n"

    if classes == ["."]:
        classes = [path.name]
    return Data(path.name, np.array(labels), classes, lambda i: open_picture(files[i], size),
                short_hash(about.encode(errors="surrogateescape")), tuple(files))


def open_picture(path, size=0):
    """Return a picture file as RGB, upright. JPEGs are decoded no larger than needed.

    Raise an error for a broken file, also for a picture so narrow that it would be giant at a
    shorter side of `size` pixels.
    """
    with Image.open(path, formats=FORMATS) as image:
        if max(image.size) * size**2 / min(image.size) > 2**26:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        if size:
            image.draft("RGB", (2 * size, 2 * size))
        return rgb(ImageOps.exif_transpose(image))


def rgb(image):
    """Return a picture of any mode as RGB: transparency over white, deep pictures scaled to 8 bits.

    The white of a deep picture is the smallest of 1 (floating point), 255, 4095 (12 bits) and 65535
    (16 bits) that none of its values exceeds. Raise ValueError if there is none.
    """
    if image.mode[0] in "FI":
        values = np.asarray(image, np.float64)
        white = min(white for white in (1, 255, 4095, 65535) if values.max() <= white)
        image = Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_picture(path, size):
    """Return the centre of a picture file, uint8 (3, size, size), or raise UserError."""
    with untrusted(path, "not a readable picture"):
        return from_pil(centre_crop(open_picture(path, size), size))


def shrink(image, side):
    """Make the shorter side `side`: box filters while twice too large, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    return ImageOps.cover(image, (side, side))


def cut(image, size, left, top):
    """Return the square of `size` pixels whose upper left corner is given."""
    return image.crop((left, top, left + size, top + size))


mirror = ImageOps.mirror  # exchanges left and right


def centre_crop(image, size):
    """Return the centre square at `size` pixels, by the rule of ADM (Dhariwal and Nichol, 2021)."""
    image = shrink(image, size)
    return cut(image, size, (image.width - size) // 2, (image.height - size) // 2)


def centre(image, size, rng):
    """Views: the centre crop."""
    return [centre_crop(image, size)]


def centre_and_mirror(image, size, rng):
    """Views: the centre crop and its mirror image."""
    image = centre_crop(image, size)
    return [image, mirror(image)]


def polar(n, radii, shift=0):
    """Return n points around 0, clockwise from the top, as complex numbers. radii and shifts, in
    steps of 1/n turn, repeat."""
    turns = (np.arange(n) + np.resize(shift, n)) / n
    return -1j * np.resize(radii, n) * np.exp(2j * np.pi * turns)


TURN = np.arange(90) / 90
WAVE = np.cos(2 * np.pi * np.outer([1, 2, 3], TURN))
HEART = 0.9 * np.sin(2 * np.pi * TURN) ** 3 + 1j * (np.array([-0.74, 0.29, 0.11]) @ WAVE - 0.1)
DISC = polar(90, 0.85)
OUTLINES = {  # each a shape and, for two of them, a hole
    "circle": [DISC],
    "ring": [DISC, 0.5 * DISC],
    "square": [polar(4, 1.1, 0.5)],
    "triangle": [polar(3, 1.05) + 0.2j],
    "diamond": [polar(4, [1, 0.62])],
    "star": [polar(10, [1, 0.42])],
    "heart": [HEART],
    "cross": [polar(12, [0.95, 0.95, 0.42], [-0.66, -0.34, -0.5])],
    "crescent": [DISC, 0.85 * DISC + 0.4 - 0.1j],
    "flower": [polar(90, 0.45 + 0.45 * np.abs(WAVE[2]) ** 0.5)]}
SHAPES = list(OUTLINES)


def draw_shape(index, size):
    """Return picture `index` of `shapes`: a shape of class index % 10 on a pale background."""
    rng = np.random.default_rng((20, index))
    move = np.exp(1j * rng.uniform(-0.15, 0.15)) * rng.uniform(0.72, 0.82)  # turns and scales
    place = complex(*rng.uniform(-0.06, 0.06, 2)) + 1 + 1j
    fine = Image.new("L", (4 * size, 4 * size))  # four times as fine, so that edges are smooth
    for outline, value in zip(OUTLINES[SHAPES[index % len(SHAPES)]], (255, 0)):
        corners = (move * outline + place) * (2 * size)
        ImageDraw.Draw(fine).polygon(corners.view(float).tolist(), fill=value)
    hue = rng.integers(360)
    ground = f"hsv({(hue + rng.integers(120, 240)) % 360}, {rng.integers(10, 30)}%, 95%)"
    colour = f"hsv({hue}, {rng.integers(60, 90)}%, {rng.integers(60, 90)}%)"
    return ImageOps.colorize(fine.resize((size, size), Image.BOX), ground, colour)


@dataclass
class Order:
    """The order in which a run sees its samples: an endless row of shuffled epochs.

    order[place] is (epoch, indices), where `indices` are `group` images of one class. It depends on
    the seed alone: a run resumes at the number of samples it has seen, with any batch size and any
    number of ranks.
    """
    labels: np.ndarray
    group: int = 1
    seed: int = 0

    def __post_init__(self):
        self.epoch = lru_cache(2)(self.shuffled)
        self.length = len(self.epoch(0))  # samples per epoch

    def shuffled(self, epoch):
        """Return the indices (n, group) of one epoch. Small classes repeat some of their images."""
        rng = np.random.default_rng((self.seed, epoch))
        groups = []
        for label in np.unique(self.labels):
            members = rng.permutation(np.flatnonzero(self.labels == label))
            rows = math.ceil(len(members) / self.group)
            groups.append(np.resize(members, (rows, self.group)))
        return rng.permutation(np.concatenate(groups))

    def __getitem__(self, place):
        epoch, offset = divmod(place, self.length)
        return epoch, self.epoch(epoch)[offset]


@dataclass
class Samples:
    """A data set of training samples, indexed by the entries of an Order: a view of each image,
    drawn at random.

    Without a cache a view is a picture, uint8 (3, h, w). A cache has what a first stage made of all
    views of the images. A sample (group, ...) stacks a view of each of its images, and comes with
    their label.
    """
    data: Data
    size: int
    views: Callable
    seed: int = 0
    cache: "Cache" = None

    def view(self, epoch, index):
        """Return one view of image `index`."""
        rng = np.random.default_rng((self.seed, epoch, index))
        if self.cache:
            views = self.cache[index]
            return torch.tensor(views[rng.integers(len(views))])
        views = self.views(self.data.read(index), self.size, rng)
        return from_pil(views[rng.integers(len(views))])

    def __getitem__(self, item):
        epoch, indices = item
        sample = torch.stack([self.view(epoch, index) for index in indices])
        return sample, self.data.labels[indices[0]]


class Cache:
    """Arrays on disk, one file for each chunk of images. Ranks and runs fill it together.

    The folder's name identifies what the arrays are, and a file appears whole. cache[i] is the
    memory-mapped array of image i.
    """

    def __init__(self, folder, n, chunk):
        self.folder = folder
        self.chunk = chunk
        self.chunks = [range(n)[start:start + chunk] for start in range(0, n, chunk)]
        # An open file for each: systems allow 1024 or fewer.
        self.load = lru_cache(200)(partial(np.load, mmap_mode="r"))

    def file(self, indices):
        """Return the path of a chunk."""
        return self.folder / f"{indices[0]:08d}.npy"

    def missing(self):
        """Return the chunks of this rank's share that are not there."""
        rank, world = ranks()
        return [indices for indices in self.chunks[rank::world] if not self.file(indices).exists()]

    def write(self, indices, array):
        """Store a chunk."""
        with atomic(self.file(indices)) as f:
            np.save(f, array)

    def __getitem__(self, index):
        file = self.file(self.chunks[index // self.chunk])
        with untrusted(file, "damaged; delete it"):
            return self.load(file)[index % self.chunk]


@torch.no_grad()
def cached(folder, data, size, first_stage, views, workers=0):
    """Return a Cache of the first stage's codes of all views of all images.

    Its name comes from the data, the size, the first stage's weights and the views. Ranks share the
    work, and what an interrupted run has stored is kept.
    """
    def load(indices):
        """Return all views of a chunk of images, uint8 (b, views, 3, h, w)."""
        rows = [np.stack(views(data.read(i), size, np.random.default_rng(i))) for i in indices]
        return torch.from_numpy(np.stack(rows)).movedim(-1, 2).contiguous()

    def encode(images):
        return first_stage.encode(to_float(images.to(device)))

    device = next(first_stage.parameters()).device
    about = json.dumps([data.key, size, fingerprint(first_stage), views.__name__])
    name = f"{data.name}-{size}-{short_hash(about.encode())}"
    cache = Cache(Path(folder, name), len(data.labels), 256)
    missing = cache.missing()
    loader = torch.utils.data.DataLoader(missing, None, collate_fn=load, num_workers=workers)
    with progress(len(missing), f"caching {data.name}", "x256 images") as bar:
        for indices, images in zip(missing, loader):
            codes = in_parts(encode, images.flatten(0, 1), size)
            cache.write(indices, codes.unflatten(0, images.shape[:2]).cpu().numpy())
            bar.update()
    gather(None)  # wait for the other ranks
    return cache


# --- 4  Randomness --------------------------------------------------------------------------------

def seed_of(seed, *numbers):
    """Return a seed that follows from a seed and some numbers: an image, or a step and its part."""
    return np.random.SeedSequence(seed, spawn_key=numbers).generate_state(1, np.uint64).item()


class Noise:
    """One random generator per image: image k of a seed never depends on its batch or on the ranks.

    The generators are on the CPU, so that an image's noise is the same on every device.
    """

    def __init__(self, seed, indices, device="cpu"):
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(seed_of(seed, k)) for k in indices]

    def normal(self, shape):
        """Return standard normal values (images, *shape) in float32."""
        return self.draw(torch.randn, shape)

    def uniform(self, shape):
        """Return uniform values in [0, 1), (images, *shape), in float32."""
        return self.draw(torch.rand, shape)

    def draw(self, function, shape):
        """Return one draw of each generator, stacked, on the device."""
        values = torch.stack([function(shape, generator=g) for g in self.generators])
        if self.device.type == "cuda":
            values = values.pin_memory()  # so that the copy does not hold up the host
        return values.to(self.device, non_blocking=True)


def drop_labels(model, labels, drop=None):
    """Return labels (B,) of which some become "no label", on which guidance relies: those where
    drop (B,) is true or, by default, in training, a share drawn at random."""
    c = model.config
    if drop is None:
        share = c.label_drop if model.training else 0.0
        drop = torch.rand(len(labels), device=labels.device) < share
    return labels.masked_fill(drop, c.classes)


def moves(x):
    """Return whether x is a tensor, but not one of key_value_pairs."""
    return torch.is_tensor(x) and not hasattr(x, "stays")


def recorded(step):
    """Return the inner step of a sampler; on CUDA its kernels are recorded as a graph and launched
    together, as launching each takes longer than it runs. There is a graph for each combination of
    shapes and of other values; tensors are copied to where it reads.
    """
    graphs = {}

    def launch(*args):
        inputs, form = tree_flatten(args)
        if not inputs[0].is_cuda:
            return step(*args)
        key = tuple((x.shape, x.dtype) if moves(x) else x for x in inputs)
        if key not in graphs:
            own = [x.clone() if moves(x) else x for x in inputs]
            args = tree_unflatten(own, form)
            step(*args)  # what is compiled at the first call cannot be recorded
            torch.clear_autocast_cache()  # its tensors would be gone at the next launch
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's own thread may call CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = step(*args)
            graphs[key] = graph, [*filter(moves, own)], output
        graph, own, output = graphs[key]
        torch._foreach_copy_(own, [*filter(moves, inputs)])
        graph.replay()
        return output.clone()  # the next launch writes there
    return launch


def cast_once(*modules):
    """Store linear layers and convolutions in bfloat16: autocast would cast them at each call."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.bfloat16()


def key_value_pairs(depth, shape, dtype, device):
    """Return zeros for the keys and values of each layer. A recorded graph uses them in place, so
    it gets the same ones for each batch: what is still there of the last one must be masked."""
    tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * depth)]
    for tensor in tensors:
        tensor.stays = True
    return [*zip(tensors[::2], tensors[1::2])]


# --- 5  Training state ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How a stage is trained: warm-up from zero, a constant learning rate, and decay."""
    lr: float
    batch: int                        # samples per optimizer step, over all ranks and micro-batches
    epochs: float                     # length in passes over the data
    warmup: float = 0.0               # share of the run, 0 .. 1
    decay: float = 0.0                # share of the run, at its end
    final: float = 0.0                # learning rate at the end of the decay, as a share of lr
    exponential: bool = False         # shape of the decay; exponential needs final above 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    muon: bool = False                # for the matrices of blocks; all else is always AdamW's
    clip: float = 3.0                 # largest gradient norm
    ema: float = 0.9999               # largest decay of the moving average of the weights

    def __post_init__(self):
        check(self, {"lr and epochs must be more than 0 and finite":
                     0 < self.lr < math.inf and 0 < self.epochs < math.inf})

    def rate(self, step, steps):
        """Return the learning rate of optimizer step `step`, 0 .. steps - 1."""
        rising = min(1, step / (self.warmup * steps)) if self.warmup else 1
        left = min(1, (steps - step) / (self.decay * steps)) if self.decay else 1
        share = self.final + (1 - self.final) * left
        if self.exponential:
            share = self.final ** (1 - left)
        return self.lr * rising * share


@dataclass(frozen=True)
class Stage:
    """One thing that is trained. Optional methods of its module customise it:

    decays(name, parameter)       whether weight decay acts on this parameter (default: on matrices)
    carry(name, old, shape)       for --init: an old weight made to fit, or None (the default)
    ready(config)                 called before the first step of a process
    finish(images)                called with some images before the weights are written
    first stages: encode(images) -> what is cached; codes(cached) -> a batch for the next stage;
    reconstruct(images, noise, on_step=None) -> images; sampled() -> parts that sampling runs

    An attribute needs_weights says that random weights are of no use, idle_parameters that some
    may get no gradient. A Config's images_per_sample is the number of images of one class that
    make a sample.
    """
    name: str
    build: Callable               # config -> module; module(batch, labels) -> {"loss": ..., parts}
    recipes: dict                 # preset -> Recipe; a missing preset needs published weights
    views: Callable               # config -> (image, size, rng) -> list of pictures, see Samples
    first_stage: str = ""         # the frozen stage whose codes it is trained on; "": images
    start: str = ""               # the stage whose weights it starts from
    load: Callable | None = None  # of first stages: path -> frozen module; the others make pictures
    adapt: Callable = lambda config: config  # the preset's config -> the config of this stage


def vae_stage():
    """Return the stage that trains a KL-VAE. Only `tiny` trains its own: see load_vae."""
    recipe = Recipe(muon=True, lr=3e-3, batch=16, epochs=0.6, warmup=0.03, decay=0.4,
                    betas=(0.9, 0.99), weight_decay=0.0, clip=1.0, ema=0.99)
    return Stage("vae", lambda config: KLVAE(config.vae), {"tiny": recipe},
                 lambda config: centre, load=load_vae)


def check_vae(model, vae):
    """Raise UserError if the model was made for another kind of VAE."""
    has = f"{vae.config.channels} channels at f{vae.config.factor}"
    needs = f"{model.config.vae.channels} channels at f{model.config.vae.factor}"
    if has != needs:
        raise UserError(f"the VAE has {has}, the model needs {needs}")


def ranks():
    """Return (rank, world) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def rank_zero_first():
    """Let rank 0 run the block before the others: it downloads or creates what they find."""
    rank = ranks()[0]
    if rank > 0:
        gather(None)  # waits for all ranks
    yield
    if rank == 0:
        gather(None)


def gather(value):
    """Return the list of all ranks' values, which may be any objects, on every rank."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def rank_share(n):
    """Return the indices of this rank's share of n things. The shares are in the order of rank."""
    rank, world = ranks()
    return torch.arange(n).tensor_split(world)[rank]


class Muon(torch.optim.AdamW):
    """AdamW, and Muon (Jordan et al., 2024) for the parameter groups with muon=True.

    They hold matrices and kernels (C_out, C_in, k, k), which count as matrices (C_out, C_in k k).
    Muon adds the momentum of a matrix with all its singular values made nearly equal, so that
    directions with small gradients are learned, too. Scaled as in Liu et al. (2025), a step is
    about as large as AdamW's at the same rate. torch.optim.Muon works in bfloat16, which many CPUs
    compute many times slower than float32.
    """

    @torch.no_grad()
    def step(self):
        """Change all parameters that have a gradient. Those of the matrices are dropped."""
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if group.get("muon") and p.grad is not None:  # not in states of older runs
                    alike.setdefault(p.shape, []).append(p)
            for shape, matrices in alike.items():  # in one batch, which two threads can share
                updates = orthogonal(torch.stack([self.momentum(p).flatten(1) for p in matrices]))
                for p, update in zip(matrices, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    rate = 0.2 * max(update.shape)**0.5 * group["lr"]
                    p.sub_(update.view(shape), alpha=rate)
                    p.grad = None                  # AdamW leaves it alone
        super().step()

    def momentum(self, p):
        """Return Nesterov's momentum of a parameter, with this step's gradient."""
        state = self.state[p]
        if not state:  # AdamW expects a step when it loads them
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        state["momentum"].lerp_(p.grad, 0.05)
        return p.grad.lerp(state["momentum"], 0.95)


def orthogonal(x):
    """Return matrices x (n, a, b) with all singular values near 1, by steps of Newton and Schulz.

    The five steps and their coefficients, of Jordan et al., end between 0.7 and 1.2.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT  # with the smaller of the two squares
    x = F.normalize(x, dim=(1, 2))
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


@torch.no_grad()
def update_ema(ema, model, decay):
    """Average parameters, ema = decay * ema + (1 - decay) * model, and copy buffers."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for old, new in zip(ema.buffers(), model.buffers()):
        old.copy_(new)


@contextmanager
def atomic(path):
    """Open a binary file that takes the place of `path` when the block ends without an error.

    Raise UserError if it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")  # Pillow knows the format by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}; what was there is untouched") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def save(path, content):
    """Write tensors, numbers, strings, lists and dicts atomically."""
    with atomic(path) as f:
        torch.save(content, f)


def save_json(path, content):
    """Write numbers, strings, lists and dicts as a text, atomically."""
    with atomic(path) as f:
        f.write(json.dumps(content, indent=1).encode())


class StandIn:
    """Stands for a class that files name: the configuration of D-AR, a callback of Lightning."""


HARMLESS = [argparse.Namespace, np.ndarray, np.dtype, (StandIn, "config_util.Config"),
            (StandIn, "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"),
            (StandIn, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
HARMLESS += [type(np.dtype(kind)) for kind in "?bBhilqefd"]  # NumPy's codes of its types
for value in (np.zeros(0), np.float64(0)):  # how NumPy rebuilds arrays and scalars, by both names
    function = value.__reduce__()[0]
    HARMLESS += [(function, f"numpy.core.multiarray.{function.__name__}"),
                 (function, f"numpy._core.multiarray.{function.__name__}")]


def read_checkpoint(path):
    """Return the dict in a checkpoint file. Nothing in the file is executed.

    Raise UserError for a missing, damaged or unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with untrusted(path, "not readable"), torch.serialization.safe_globals(HARMLESS):
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        try:
            return dict(torch.load(path, "cpu", weights_only=True))
        except pickle.UnpicklingError:  # torch's own words advise to switch the protection off
            raise UserError(f"{path} is damaged or contains code, which is not executed") from None


def unwrap(content, *keys):
    """Return the tensors of the first dict under one of the keys, else of the content itself,
    without the prefixes that DDP and torch.compile put before names."""
    dicts = [content[key] for key in keys if isinstance(content.get(key), dict)]
    state = next(filter(None, dicts), content)
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value
            for name, value in state.items() if isinstance(value, torch.Tensor)}


def renamed(state, table):
    """Return a state dict in float32 under new names.

    Each line of the table, "pattern -> replacement", is a substitution in all names, in order.
    """
    for line in table.strip().splitlines():
        pattern, replacement = re.split(" *-> *", line)
        state = {re.sub(pattern, replacement, name): value.float() for name, value in state.items()}
    return state


def numbered(state, pattern):
    """Return the distinct numbers, sorted, in group 1 of the pattern at starts of names."""
    found = re.findall(f"^{pattern}", "\n".join(state), re.MULTILINE)
    return sorted(set(map(int, found)))


def load_strict(module, state, path):
    """Load a state dict and return the module. Raise UserError for an entry that is missing,
    unknown or misshapen."""
    with untrusted(path, "of another kind"):
        module.load_state_dict(state)
    return module


def short_hash(raw):
    """Return twelve hexadecimal digits that identify these bytes."""
    return hashlib.sha256(raw).hexdigest()[:12]


def fingerprint(module):
    """Return twelve hexadecimal digits that identify the weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- 6  Pictures ----------------------------------------------------------------------------------

def to_float(images):
    """Convert uint8 0 .. 255 to float -1 .. 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Convert float -1 .. 1, clipped, to uint8 0 .. 255, rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def from_pil(image):
    """Return an RGB picture as uint8 (3, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def grid(images, columns, names=()):
    """Return one picture of uint8 images (n, 3, h, w), row by row, with the names to the left of
    their rows. Small images are enlarged to about 64 pixels."""
    images = F.interpolate(images.cpu(), scale_factor=max(1, 64 // images.shape[2]))
    images = F.pad(images, (0, 2, 0, 2), value=255)
    n, _, h, w = images.shape
    font = ImageFont.load_default(20)
    left = max([2, *(8 + int(font.getlength(name)) for name in names)])
    sheet = Image.new("RGB", (left + columns * w, 2 + math.ceil(n / columns) * h), "white")
    for k, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(k, columns)
        sheet.paste(Image.fromarray(image), (left + column * w, 2 + row * h))
    for row, name in enumerate(names):
        ImageDraw.Draw(sheet).text((4, 1 + (row + 0.5) * h), name, "black", font, anchor="lm")
    return sheet


def save_picture(path, picture):
    """Write a picture in the format that the file's ending names, atomically."""
    with atomic(path) as f:
        picture.save(f)


def save_gif(path, frames):
    """Write a looping GIF of four seconds, whose last frame stays for 1.5 seconds more."""
    durations = [4000 // len(frames)] * len(frames)
    durations[-1] += 1500
    with atomic(path) as f:
        frames[0].save(f, save_all=True, append_images=frames[1:], loop=0, duration=durations)
