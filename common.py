"""What the models share and none of the papers invented: KL-VAE, data, randomness, training state.

Sections   1  Errors and scripts: configurations, launch    UserError, override, launch
           2  KL-VAE: encoder, decoder, published weights   KLVAE, load_vae
           3  Data: named sets, folders, order, cache       load_data, Samples, cached
           4  Randomness: one generator per image           Noise
           5  Training state: stages, ranks, checkpoints    Stage, Recipe, read_checkpoint
           6  Pictures: uint8 borders, grids, animations    to_uint8, grid, save_gif
Range      Images are float in [-1, 1] inside, uint8 at the borders (files, caches, data sets).
Errors     A mistake that the user can mend raises UserError with one line that says how. The
           scripts print that line and exit with code 2.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import http.client
import importlib
import json
import math
import os
import pickle
import re
import struct
import sys
import tarfile
import typing
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

# --- 1  Errors and scripts ------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what is wrong and what to do."""


@contextlib.contextmanager
def untrusted(path, what="damaged"):
    """Turn any error of the block, which reads an untrusted file, into a UserError."""
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
        return
    except UserError as error:
        text = str(error).rpartition("\ncommon.UserError: ")[2]  # of a data worker's traceback
        message = " ".join(text.splitlines())
    except KeyboardInterrupt:
        message = "interrupted"
    except MemoryError:
        message = "out of memory"
    except OSError as error:  # disk full, no permission, a vanished folder
        message = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    except RuntimeError as error:
        message = explain(error)
        if message is None:
            raise
    sys.stdout.flush()
    if dist.is_initialized():
        print(f"error on rank {dist.get_rank()}: {message}", file=sys.stderr, flush=True)
        os._exit(2)  # the other ranks may hang; torchrun ends them
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def explain(error):
    """Return one line about a RuntimeError that is not a programming mistake, else None."""
    first_line = str(error).splitlines()[0][:200] if str(error) else ""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{first_line.split('. ')[0]}: use a smaller --batch-size, or --accumulate"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first_line}): --no-compile runs without it"
    if "DataLoader worker" in str(error):
        return "a process that loads images died (out of memory?): the same command resumes"
    lost = re.search("gloo/|Connection (closed|reset) by peer", str(error))
    if dist.is_initialized() and (lost or isinstance(error, dist.DistBackendError)):
        return f"lost the connection to the other ranks ({first_line})"
    return None


def check(config, rules, **choices):
    """Raise ValueError for a field outside its choices or a rule that does not hold.

    rules: what must hold, in words -> whether it does. choices: field -> the values it may have.
    """
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            listed = ", ".join(map(str, allowed))
            raise ValueError(f"{name} is one of {listed}, not {getattr(config, name)}")
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(rule)


def with_options(config, **options):
    """Return the config with those options that are not None. Raise UserError for a bad value."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return dataclasses.replace(config, **given)
    except (ValueError, ArithmeticError) as error:
        raise UserError(str(error)) from None


def override(config, assignments):
    """Return a (nested) dataclass with `field=value` strings applied, typed by the fields.

    Raise UserError for an unknown field, a bad value, or values that do not fit together.
    """
    hints = typing.get_type_hints(type(config))
    changes = {}
    nested = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        head, _, rest = name.partition(".")
        if not equals or head not in hints:
            raise UserError(f"--set {assignment}: no such field; choose from {', '.join(hints)}")
        if rest:
            nested.setdefault(head, []).append(f"{rest}={text}")
            continue
        try:
            changes[head] = parse(text, hints[head])
        except (KeyError, ValueError, TypeError):
            raise UserError(f"--set {assignment}: not a value of type {hints[head]}") from None
    for head, parts in nested.items():
        changes[head] = override(getattr(config, head), parts)
    return with_options(config, **changes)  # all at once: they may only fit together


def parse(text, kind):
    """Return the value of a text as a bool, int, float, str, or a tuple of one of these."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if dataclasses.is_dataclass(kind):
        raise TypeError("only its fields can be set")
    if typing.get_origin(kind) is tuple:
        return tuple(parse(part, typing.get_args(kind)[0]) for part in text.split(",") if part)
    return kind(text)


def rebuild(kind, values):
    """Return the (nested) dataclass that dataclasses.asdict turned into these values."""
    fields = dict(values)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.default) and f.name in fields:
            fields[f.name] = rebuild(type(f.default), fields[f.name])
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
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        apple = torch.backends.mps.is_available() and world == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        device = torch.device(device)
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # masked, it has given NaN gradients on Hopper
    if world > 1 and not dist.is_initialized():
        options = {"backend": "nccl", "device_id": device} if on_cuda else {"backend": "gloo"}
        dist.init_process_group(timeout=datetime.timedelta(minutes=60), **options)
    if precision is None:
        precision = "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "fp32"
    return Process(rank, world, device, precision)


@contextlib.contextmanager
def true_float32():
    """Switch TF32 off: it keeps ten bits of a mantissa, which moves codes and features."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def progress(total, title, unit, rank=0, done=0):
    """Return a progress bar on rank 0. Without a terminal it prints a line every half minute."""
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=rank > 0 or done >= total,
                mininterval=0.2 if sys.stderr.isatty() else 30)


def load_model(name):
    """Import the model file NAME.py, which is beside the scripts or in the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        module = None
    if not hasattr(module, "STAGES"):
        raise UserError(f"--model {name}: no model file {name}.py here or beside the scripts")
    return module


def natural(text, least=0):
    """Convert an option to an integer of 0 or more. argparse shows this function's name."""
    if int(text) < least:
        raise ValueError
    return int(text)


def positive(text):
    """Convert the text of an option to an integer of 1 or more."""
    return natural(text, 1)


def class_ids(texts, config):
    """Return the labels of classes given as ids or names; a text may list several with commas.

    A name in the right case is preferred to one in another. Raise UserError for what is neither.
    """
    names = list(config.class_names)
    lower = [name.lower() for name in names]
    ids = []
    for text in texts:
        is_name = text.lower() in lower  # a name may have commas
        for part in [text] if is_name else [part.strip() for part in text.split(",")]:
            if part in names:
                ids.append(names.index(part))
            elif part.lower() in lower:
                ids.append(lower.index(part.lower()))
            elif part.isdecimal() and len(part) < 10 and int(part) < config.classes:
                ids.append(int(part))
            else:
                listed = f", or names: {', '.join(names[:20])}" if names else ""
                raise UserError(f"no class {part}: use ids 0 to {config.classes - 1}{listed}")
    return ids


def walk(module, *inputs, depth=2):
    """Run the module once and print the shape of each part's first output."""
    shapes = {}

    def note(name, output):
        if isinstance(output, (tuple, list, dict)):
            output = next(iter(output.values() if isinstance(output, dict) else output))
        if isinstance(output, torch.Tensor):
            shapes.setdefault(name, tuple(output.shape))

    for name, part in module.named_modules():
        if name and name.count(".") < depth:
            part.register_forward_hook(lambda part, args, output, name=name: note(name, output))
    output = module(*inputs)
    for name, shape in shapes.items():
        print(f"  {name:32s} {type(module.get_submodule(name)).__name__:18s} {shape}")
    return output


# --- 2  KL-VAE ------------------------------------------------------------------------------------

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
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map, added to the input."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):                                              # (B, C, h, w)
        h = self.norm(x)
        q, k, v = torch.stack([self.q(h), self.k(h), self.v(h)]).flatten(3).mT[:, :, None]
        h = F.scaled_dot_product_attention(q, k, v)                    # (B, 1, h w, C)
        return x + self.proj_out(h.mT.reshape(x.shape))


def resample(channels, double):
    """Return a module that doubles the side, by nearest neighbours and a convolution, or halves it,
    by a convolution of stride 2 that is padded on the right and at the bottom only."""
    if double:
        return nn.Sequential(nn.Upsample(scale_factor=2.0),
                             nn.Conv2d(channels, channels, 3, padding=1))
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


class Coder(nn.Module):
    """The encoder, images (B, 3, h, w) to moments (B, 2 channels, h/f, w/f), or the decoder,
    latents (B, channels, h/f, w/f) to images. Level 0 is full resolution in both."""

    def __init__(self, config, decoder):
        super().__init__()
        self.is_decoder = decoder
        widths = [config.width * m for m in config.mult]
        inputs = [*widths[1:], widths[-1]] if decoder else [config.width, *widths[:-1]]
        blocks = config.blocks + 1 if decoder else config.blocks
        attention = config.decoder_attention if decoder else config.attention
        first, final = (widths[-1], widths[0]) if decoder else (config.width, widths[-1])
        self.conv_in = nn.Conv2d(config.channels if decoder else 3, first, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Sequential()
            for j in range(blocks):
                block = nn.Sequential(ResBlock(width if j else inputs[i], width, config.groups))
                if i in attention:
                    block.append(SpatialAttention(width, config.groups))
                level.append(block)
            if i != (0 if decoder else len(widths) - 1):
                level.add_module("resample", resample(width, double=decoder))
            self.levels.append(level)
        self.mid = nn.Sequential(ResBlock(widths[-1], widths[-1], config.groups),
                                 SpatialAttention(widths[-1], config.groups),
                                 ResBlock(widths[-1], widths[-1], config.groups))
        self.norm_out = nn.GroupNorm(config.groups, final, eps=1e-6)
        self.conv_out = nn.Conv2d(final, 3 if decoder else 2 * config.channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        parts = [self.mid, *reversed(self.levels)] if self.is_decoder else [*self.levels, self.mid]
        for part in parts:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class KLVAE(nn.Module):
    """Autoencoder with a Gaussian posterior (Rombach et al., 2022), and the scale of its latents.

    The scale belongs to the weights: everything outside this class sees scaled latents. Image sides
    are divisible by config.factor.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Coder(config, decoder=False)
        self.decoder = Coder(config, decoder=True)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)
        self.register_buffer("scale", torch.tensor(float(config.scale or 1)))
        self.initialise()

    def initialise(self):
        """Use unit gains and zero residual branches: worth 8 dB after 500 steps of `tiny`."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "proj_out")):
                    nn.init.zeros_(module.weight)

    def encode(self, images):
        """Return the posterior's moments (B, 2 channels, h, w): mean, then log-variance."""
        pixels = images[0, 0].numel()
        return torch.cat([self.quant_conv(self.encoder(part)) for part in in_parts(images, pixels)])

    def posterior(self, moments):
        """Return mean and standard deviation (B, channels, h, w), unscaled."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, torch.exp(logvar.clamp(-30, 20) / 2)

    def codes(self, moments, noise=None):
        """Return scaled latents drawn from the posterior, by noise of their shape if given."""
        mean, std = self.posterior(moments)
        return self.scale * (mean + std * (torch.randn_like(mean) if noise is None else noise))

    def decode(self, latents):
        """Return images (B, 3, h, w) for scaled latents, not clamped."""
        z = latents / self.scale
        pixels = z[0, 0].numel() * self.config.factor**2
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in in_parts(z, pixels)])

    def reconstruct(self, images, noise, on_step=None):
        """Return the images (B, 3, h, w) encoded and decoded. noise: common.Noise."""
        moments = self.encode(images)
        return self.decode(self.codes(moments, noise.normal(moments.chunk(2, dim=1)[0].shape[1:])))

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


def in_parts(x, pixels):
    """Split a batch so that a part has at most 64 images of 256 x 256: activations are large."""
    return x.split(max(1, 2**22 // pixels))


# Published name -> ours.
LATENT_DIFFUSION = r"""
\.(down|up)\.(\d+)\.block\.(\d+)   -> .levels.\2.\3.0
\.(down|up)\.(\d+)\.attn\.(\d+)    -> .levels.\2.\3.1
\.(down|up)\.(\d+)\.\1sample\.conv -> .levels.\2.resample.1
nin_shortcut                       -> shortcut
\.mid\.block_1                     -> .mid.0
\.mid\.attn_1                      -> .mid.1
\.mid\.block_2                     -> .mid.2
"""
# Published name -> latent-diffusion's, which counts the decoder's levels from the other end.
DIFFUSERS = r"""
conv_norm_out                          -> norm_out
conv_shortcut                          -> nin_shortcut
mid_block\.resnets\.0                  -> mid.block_1
mid_block\.resnets\.1                  -> mid.block_2
mid_block\.attentions\.0               -> mid.attn_1
(down|up)_blocks\.(\d+)\.resnets       -> \1.\2.block
(down|up)_blocks\.(\d+)\.attentions    -> \1.\2.attn
(down|up)_blocks\.(\d+)\.\1samplers\.0 -> \1.\2.\1sample
group_norm                             -> norm
\b(to_q|query)\b                       -> q
\b(to_k|key)\b                         -> k
\b(to_v|value)\b                       -> v
\b(to_out\.0|proj_attn)\b              -> proj_out
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
        if content.get("stage") == "vae":
            return vae_from_state(content["model"], path, **content["config"]["vae"])
        beside = path.with_name("config.json")
        about = json.loads(beside.read_text()) if beside.exists() else {}
        if about.get("shift_factor"):
            raise UserError(f"{beside}: latents with a shift_factor are not supported")
        known = {}
        for name, ours in (("norm_num_groups", "groups"), ("scaling_factor", "scale")):
            if name in about:
                known[ours] = about[name]
        state = unwrap(content, "model", "state_dict")
        vae = vae_from_state(state, path, **known)
        if "scale" not in {**known, **state}:
            print(f"note: {path} does not tell its latent scale and groups: assuming"
                  f" {vae.config.scale} and {vae.config.groups}")
        return vae


def vae_from_state(state, path="the VAE", **known):
    """Return the KL-VAE of a state dict in one of the published layouts (see load_vae).

    known: fields of VAEConfig that the weights do not tell.
    """
    inner = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
    state = renamed(inner or state, r"^(first_stage_model|vae)\. ->")
    state = {k: v for k, v in state.items() if not k.startswith(("loss", "model_ema."))}
    if any("_blocks." in name for name in state):
        top = max(numbered(state, r"decoder\.up_blocks\.(\d+)"), default=0)
        state = renamed(state, DIFFUSERS)
        state = {re.sub(r"\.up\.(\d+)", lambda m: f".up.{top - int(m[1])}", k): v
                 for k, v in state.items()}
    state = renamed(state, LATENT_DIFFUSION)
    for name, value in state.items():
        if value.ndim == 2:  # attention written with linear layers
            state[name] = value[:, :, None, None]
    try:
        vae = KLVAE(dataclasses.replace(vae_config(state), **known))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a KL-VAE in a known layout ({error})") from None
    load_strict(vae, {"scale": vae.scale, **state}, path)
    return vae.eval().requires_grad_(False)


def vae_config(state):
    """Return the VAEConfig that the shapes of a renamed state dict tell, as published otherwise."""
    width = state["encoder.conv_in.weight"].shape[0]
    channels = state["post_quant_conv.weight"].shape[0]
    mult = []
    for i in numbered(state, r"encoder\.levels\.(\d+)"):
        mult.append(state[f"encoder.levels.{i}.0.0.conv1.weight"].shape[0] // width)
    scale = SD_VAE.scale if channels == SD_VAE.channels else VAEConfig.scale
    return VAEConfig(
        channels=channels, width=width, mult=tuple(mult), scale=float(state.get("scale", scale)),
        blocks=len(numbered(state, r"encoder\.levels\.0\.(\d+)\.")),
        attention=tuple(numbered(state, r"encoder\.levels\.(\d+)\.\d+\.1\.")),
        decoder_attention=tuple(numbered(state, r"decoder\.levels\.(\d+)\.\d+\.1\.")))


# --- 3  Data --------------------------------------------------------------------------------------

@dataclass
class Data:
    """A labelled set of pictures. Nothing is held per image but its label and its file's name."""
    name: str
    labels: np.ndarray                     # (n,) int64, 0 .. len(classes) - 1
    classes: list[str]
    open: Callable[[int], Image.Image]     # index -> RGB picture of any size, or one of UNREADABLE
    key: str                               # digest that changes with the content
    paths: list[Path] = field(default_factory=list)  # of the pictures, if each is a file
    broken: set = field(default_factory=set)         # indices of files that could not be read

    def read(self, index):
        """Return picture `index`, or another of its class if the file is broken, which is printed.

        Raise UserError if the class has no readable picture.
        """
        for i in self.candidates(index):
            if i not in self.broken:
                try:
                    return self.open(i)
                except UNREADABLE as error:
                    self.broken.add(i)
                    count = len(self.broken)
                    tqdm.write(f"skipped broken file {self.paths[i]} ({count} so far): {error}")
        raise UserError(f"class {self.classes[self.labels[index]]} has no readable picture")

    def candidates(self, index):
        """Yield the index, then those of the other pictures of its class."""
        yield index
        of_class = np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(of_class, -index).tolist()


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot"]
IDX = {  # name: (URL, class names, {file: SHA-256 or its first digits})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", list("0123456789"), {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546f",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", FASHION, {
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf8",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f3",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84d",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44"})}
CIFAR10_FILE = ("https://www.cs.toronto.edu/~kriz/", "cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS, which is a program
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError,
              struct.error, zlib.error, Image.DecompressionBombError)  # what Pillow raises


def load_data(name, root="data", size=32, split="train"):
    """Return the data set `shapes`, `mnist`, `fashion-mnist`, `cifar10`, or that of a FOLDER.

    Named sets are read from root/<name>/ and downloaded there if missing. size (pixels) is the side
    of drawn shapes, and limits the scale at which JPEGs are decoded. split is "train" or "test"; a
    folder has one split. Raise UserError for what is missing, damaged or empty.
    """
    if name == "shapes":
        first, n = (0, 20000) if split == "train" else (20000, 4000)
        labels = np.arange(n) % len(SHAPES)
        return Data(name, labels, SHAPES, lambda i: draw_shape(first + i, size), f"shapes-{first}")
    if name in IDX:
        url, classes, files = IDX[name]
        arrays = []
        for file, digest in files.items():
            if file.startswith("train" if split == "train" else "t10k"):
                arrays.append(read_idx(download(url + file, Path(root, name, file), digest)))
        images, labels = arrays
        if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max() >= len(classes):
            raise UserError(f"{Path(root, name)}: {images.shape} images, {labels.shape} labels")
    elif name == "cifar10":
        url, file, digest = CIFAR10_FILE
        images, labels = read_cifar10(download(url + file, Path(root, name, file), digest), split)
        classes = CIFAR10
    else:
        return load_folder(Path(name), size)
    key = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:12]

    def open_image(i):
        return Image.fromarray(images[i]).convert("RGB")

    return Data(name, labels.astype(np.int64), classes, open_image, key)



def download(url, path, digest="", hint="or name another folder with --data-root"):
    """Return `path`, downloaded if it is missing, checked by the start of its SHA-256.

    Raise UserError if it cannot be had; hint says what else the user can do.
    """
    with rank_zero_first():
        if path.exists():
            return path
        print(f"downloading {url} to {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest or None, sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {url}: {error}; try again, or fetch it by other means"
                            f" to {path} (SHA-256 {digest or 'unknown'}), {hint}") from None
    return path


def read_idx(path):
    """Return the array in a gzipped IDX file: zero, zero, type 8, dimensions, sizes, values."""
    with untrusted(path, "damaged; delete it to download it again"):
        with gzip.open(path) as f:
            raw = f.read(1 << 30)
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.clip(1))


def read_cifar10(path, split):
    """Return images (n, 32, 32, 3) and labels (n,) from the archive of the binary version."""
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    records = []
    with untrusted(path, "not the binary CIFAR-10 archive, or damaged; delete it"):
        with tarfile.open(path) as archive:
            for name in names:
                raw = archive.extractfile(f"cifar-10-batches-bin/{name}").read(10_000 * 3073)
                records.append(np.frombuffer(raw, np.uint8).reshape(-1, 3073))
        records = np.concatenate(records)  # each a label, then 1024 red, green and blue values
        if records[:, 0].max() > 9:
            raise ValueError("a label above 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]


def picture_files(folder):
    """Return the picture files below a folder, sorted, and the number of other files.

    Links are followed, each folder is visited once, and hidden files are left out.
    """
    pictures = []
    others = 0
    visited = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        target = os.path.realpath(at)
        if target in visited:  # a loop of links
            folders.clear()
            continue
        visited.add(target)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(at, name)
            if name.startswith(".") or path.exists() and not path.is_file():
                continue
            if path.suffix.lower() in ENDINGS:
                pictures.append(path)
            else:
                others += 1
    return sorted(pictures), others


def load_folder(path, size):
    """Return the Data of a folder of class folders, or of a flat one: a single class.

    What is left out is said. Raise UserError for a folder without pictures, and for one that has
    pictures both at its top and in sub-folders, which could mean either.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder, nor one of shapes, {', '.join(IDX)}, cifar10")

    def natural(folder):  # class 2 before class 10
        parts = re.split(r"(\d+)", folder.name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    entries = [p for p in sorted(path.iterdir()) if p.name[0] != "."]
    folders = sorted([p for p in entries if p.is_dir()], key=natural)
    # A broken link is a broken file. A pipe is no file.
    top = [p for p in entries if p.suffix.lower() in ENDINGS and (p.is_file() or not p.exists())]
    files, labels, classes = [], [], []
    for folder in folders:
        pictures, others = picture_files(folder)
        if others or not pictures:
            print(f"{folder}: {len(pictures)} pictures, {others} other files are left out")
        if pictures:
            files += pictures
            labels += [len(classes)] * len(pictures)
            classes.append(folder.name)
    if top and files:
        raise UserError(f"{path} has {len(top)} pictures at its top, {len(files)} in sub-folders:"
                        " keep either the sub-folders, one for each class, or the pictures")
    if top:
        files, labels, classes = top, [0] * len(top), [path.resolve().name]
    if not files:
        raise UserError(f"{path}: no picture ({', '.join(ENDINGS)}) here or in its sub-folders")

    digest = hashlib.sha256()
    for file in files:
        stat = file.stat() if file.exists() else None  # of the target, if it is a link
        version = (stat.st_size, stat.st_mtime_ns) if stat else ()
        digest.update(f"{file.relative_to(path)} {version}\n".encode(errors="surrogateescape"))

    def open_file(i):
        return open_picture(files[i], size)

    key = digest.hexdigest()[:12]
    return Data(path.resolve().name, np.array(labels), classes, open_file, key, files)


def open_picture(path, size=0):
    """Return a picture file as RGB, upright. JPEGs are decoded no larger than needed.

    Raise one of UNREADABLE, also for a picture so narrow that it would be giant at a shorter side
    of `size` pixels.
    """
    with Image.open(path, formats=FORMATS) as image:
        longer, shorter = max(image.size), min(image.size)
        if shorter < 1 or longer * size * size / shorter > 2**26:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        if size:
            image.draft("RGB", (2 * size, 2 * size))
        return rgb(ImageOps.exif_transpose(image))


def rgb(image):
    """Return a picture of any mode as RGB: transparency over white, deep pictures scaled to 8 bits.

    The white of a deep picture is the smallest of 1 (floating point), 255, 4095 (12 bits) and 65535
    (16 bits) that none of its values exceeds. Raise ValueError if there is none.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, np.float64)
        whites = [1, 255, 4095, 65535] if image.mode == "F" else [255, 4095, 65535]
        white = next((white for white in whites if values.max() <= white), None)
        if white is None:  # or not a number
            raise ValueError(f"values up to {values.max():g} have no known white")
        values = (values.clip(0) * (255 / white)).round()
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def load_picture(path, size):
    """Return the centre of a picture file, uint8 (3, size, size), or raise UserError."""
    try:
        return from_pil(centre_crop(open_picture(path, size), size))
    except UNREADABLE as error:
        raise UserError(f"cannot read {path} as a picture: {error}") from None


def shrink(image, side):
    """Make the shorter side `side`: box filters while twice too large, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = side / min(image.size)
    new_size = (round(image.width * ratio), round(image.height * ratio))
    return image.resize(new_size, Image.Resampling.BICUBIC)


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


def random_square(image, size, rng):
    """Views: a square of the shorter side at a random place, resized."""
    side = min(image.size)
    left = rng.integers(image.width - side + 1)
    top = rng.integers(image.height - side + 1)
    return [cut(image, side, left, top).resize((size, size), Image.Resampling.BICUBIC)]


def random_square_and_mirror(image, size, rng):
    """Views: random_square and its mirror image."""
    square = random_square(image, size, rng)[0]
    return [square, mirror(square)]


def polar(turns, radii):
    """Return points as complex numbers, given turns clockwise from the top and radii."""
    return -1j * np.resize(radii, len(turns)) * np.exp(2j * np.pi * turns)


TURN = np.arange(90) / 90
WAVE = np.cos(2 * np.pi * np.outer([1, 2, 3], TURN))
HEART = 0.9 * np.sin(2 * np.pi * TURN) ** 3 + 1j * (np.array([-0.74, 0.29, 0.11]) @ WAVE - 0.1)
DISC = polar(TURN, 0.85)
ARMS = (np.arange(4)[:, None] + [-0.22, 0.22, 0.5]).flatten() / 4
OUTLINES = {
    "circle": DISC,
    "ring": DISC,
    "square": polar(np.arange(4) / 4 + 1 / 8, 1.1),
    "triangle": polar(np.arange(3) / 3, 1.05) + 0.2j,
    "diamond": polar(np.arange(4) / 4, [1, 0.62]),
    "star": polar(np.arange(10) / 10, [1, 0.42]),
    "heart": HEART,
    "cross": polar(ARMS, [0.95, 0.95, 0.42]),
    "crescent": DISC,
    "flower": polar(TURN, 0.45 + 0.45 * np.abs(WAVE[2]) ** 0.5)}
HOLES = {"ring": 0.5 * DISC, "crescent": 0.85 * DISC + 0.4 - 0.1j}
SHAPES = list(OUTLINES)


def draw_shape(index, size):
    """Return picture `index` of `shapes`: a shaded shape of class index % 10."""
    rng = np.random.default_rng((20, index))
    name = SHAPES[index % len(SHAPES)]
    move = np.exp(1j * rng.uniform(-0.15, 0.15)) * rng.uniform(0.72, 0.82)  # turns and scales
    place = complex(*rng.uniform(-0.06, 0.06, 2)) + 1 + 1j
    fine = Image.new("L", (4 * size, 4 * size))  # four times as fine, so that edges are smooth
    for shapes, value in ((OUTLINES, 255), (HOLES, 0)):
        if name in shapes:
            corners = (move * shapes[name] + place) * (2 * size)
            ImageDraw.Draw(fine).polygon(corners.view(float).tolist(), fill=value)
    mask = fine.resize((size, size), Image.Resampling.BOX)
    shadow = ImageChops.offset(mask, size // 16).filter(ImageFilter.GaussianBlur(size / 24))
    light = Image.linear_gradient("L").resize((size, size))  # from above

    def shaded(hue, saturation, value):
        colour = f"hsv({hue % 360:.0f}, {saturation:.0f}%, {{:.0f}}%)"
        return ImageOps.colorize(light, colour.format(value), colour.format(0.7 * value))

    hue = rng.uniform(0, 360)
    ground = shaded(hue + rng.uniform(120, 240), rng.uniform(10, 40), rng.uniform(80, 100))
    ground = Image.composite(ImageEnhance.Brightness(ground).enhance(0.6), ground, shadow)
    return Image.composite(shaded(hue, rng.uniform(60, 90), rng.uniform(80, 100)), ground, mask)


class Order:
    """The order in which a run sees its samples: an endless row of shuffled epochs.

    order[place] is (epoch, indices), where `indices` are `group` images of one class. It depends on
    the seed alone: a run resumes at the number of samples it has seen, with any batch size and any
    number of ranks.
    """

    def __init__(self, labels, group=1, seed=0):
        self.labels = labels
        self.group = group
        self.seed = seed
        self.epoch = functools.lru_cache(2)(self.shuffled)
        self.length = len(self.epoch(0))  # samples per epoch

    def shuffled(self, epoch):
        """Return the indices (n, group) of one epoch. Small classes repeat some of their images."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.group == 1:
            return rng.permutation(len(self.labels))[:, None]
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
class Samples(torch.utils.data.Dataset):
    """Training samples, indexed by the entries of an Order: a view of each image, drawn at random.

    Without a cache a view is a picture, uint8 (3, h, w). A cache has what a first stage made of all
    views of the images. A sample of several images has one more dimension in front. Each comes with
    its label.
    """
    data: Data
    size: int
    views: Callable
    seed: int = 0
    cache: "Cache" = None

    def view(self, epoch, index):
        """Return one view of image `index`."""
        rng = np.random.default_rng((self.seed, epoch, index))
        if self.cache is not None:
            views = self.cache[index]
            return torch.from_numpy(np.array(views[rng.integers(len(views))]))
        views = self.views(self.data.read(index), self.size, rng)
        return from_pil(views[rng.integers(len(views))])

    def __getitem__(self, item):
        epoch, indices = item
        sample = torch.stack([self.view(epoch, index) for index in indices])
        return sample if len(indices) > 1 else sample[0], int(self.data.labels[indices[0]])


class Cache:
    """Arrays on disk, one file for each chunk of images. Ranks and runs fill it together.

    The folder's name identifies what the arrays are, and a file appears whole. cache[i] is the
    memory-mapped array of image i.
    """

    def __init__(self, folder, n, chunk):
        self.folder = Path(folder)
        self.chunk = chunk
        self.chunks = [range(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        self.maps = {}

    def file(self, indices):
        """Return the path of a chunk."""
        return self.folder / f"{indices[0]:08d}.npy"

    def missing(self, rank=0, world=1):
        """Return the chunks of this rank's share that are not there."""
        return [indices for indices in self.chunks[rank::world] if not self.file(indices).exists()]

    def write(self, indices, array):
        """Store a chunk."""
        with atomic(self.file(indices)) as f:
            np.save(f, array)

    def __getitem__(self, index):
        k = index // self.chunk
        with untrusted(self.file(self.chunks[k]), "damaged; delete it"):
            if k not in self.maps:
                self.maps[k] = np.load(self.file(self.chunks[k]), mmap_mode="r")
            return self.maps[k][index % self.chunk]


@dataclass
class AllViews(torch.utils.data.Dataset):
    """All views of each image, uint8 (views, 3, h, w)."""
    data: Data
    size: int
    views: Callable

    def __getitem__(self, index):
        views = self.views(self.data.read(index), self.size, np.random.default_rng(index))
        return torch.stack([from_pil(view) for view in views])


@torch.no_grad()
def cached(folder, data, size, first_stage, views, workers=0):
    """Return a Cache of the first stage's codes of all views of all images.

    Its name comes from the data, the size, the first stage's weights and the views. Ranks share the
    work, and what an interrupted run has stored is kept.
    """
    device = next(first_stage.parameters()).device
    rank, world = ranks()
    about = json.dumps([data.key, size, fingerprint(first_stage), views.__name__])
    name = f"{data.name}-{size}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    cache = Cache(Path(folder, name), len(data.labels), 256)
    missing = cache.missing(rank, world)
    bar = progress(sum(map(len, missing)), f"caching {data.name}", "img", rank)
    loader = torch.utils.data.DataLoader(AllViews(data, size, views), batch_sampler=missing,
                                         num_workers=workers)
    for indices, images in zip(missing, loader):                   # (b, views, 3, h, w)
        stored = first_stage.encode(to_float(images.flatten(0, 1).to(device)))
        cache.write(indices, stored.unflatten(0, images.shape[:2]).cpu().numpy())
        bar.update(len(indices))
    bar.close()
    if world > 1:
        dist.barrier()
    if cache.missing():
        raise UserError(f"{folder} lacks other ranks' files: --cache needs a folder that all share")
    return cache


# --- 4  Randomness --------------------------------------------------------------------------------

class Noise:
    """One random generator per image: image k of a seed never depends on its batch or on the ranks.

    The generators are on the CPU, so that an image's noise is the same on every device.
    """

    def __init__(self, seed, indices, device="cpu"):
        self.device = torch.device(device)
        self.generators = []
        for k in indices:
            state = np.random.SeedSequence(seed, spawn_key=(k,)).generate_state(1, np.uint64)
            self.generators.append(torch.Generator().manual_seed(int(state[0])))

    def normal(self, shape):
        """Return standard normal values (images, *shape) in float32."""
        return self.draw(torch.randn, shape)

    def uniform(self, shape):
        """Return uniform values in [0, 1), (images, *shape), in float32."""
        return self.draw(torch.rand, shape)

    def draw(self, function, shape):
        """Return one draw of each generator, stacked, on the device."""
        values = torch.stack([function(tuple(shape), generator=g) for g in self.generators])
        if self.device.type == "cuda":
            values = values.pin_memory()  # so that the copy does not hold up the host
        return values.to(self.device, non_blocking=True)


def compiled(step):
    """Compile the inner step of a sampler. On CUDA it is recorded as a graph, launched at once.

    The result is a copy: the next call writes into the graph's own memory.
    """
    step = torch.compile(step, mode="reduce-overhead")
    return lambda *args: step(*args).clone()


class KeyValueCache:
    """Memory for the keys and values of each layer, kept from one batch to the next: a recorded
    graph reads and writes at the addresses at which it was recorded."""

    def __init__(self):
        self.allocated = None
        self.layers = []

    def allocate(self, depth, shape, dtype, device):
        """Return `depth` pairs (K, V) of zeros of this shape, at the old addresses if they fit."""
        wanted = (depth, tuple(shape), dtype, device)
        if wanted != self.allocated:
            self.allocated = wanted
            self.layers = []
            for _ in range(depth):
                keys = torch.empty(shape, dtype=dtype, device=device)
                self.layers.append([keys, torch.empty_like(keys)])
        for pair in self.layers:
            torch._foreach_zero_(pair)
            for tensor in pair:
                torch._dynamo.mark_static_address(tensor)
        return self.layers


# --- 5  Training state ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How a stage is trained: AdamW with warm-up from zero, a constant rate, and decay."""
    lr: float
    batch: int                        # samples per optimizer step, over all ranks and micro-batches
    epochs: float                     # length in passes over the data
    warmup: float = 0.0               # share of the run, 0 .. 1
    decay: float = 0.0                # share of the run, at its end
    final: float = 0.0                # learning rate at the end of the decay, as a share of lr
    exponential: bool = False         # shape of the decay; exponential needs final above 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    clip: float = 3.0                 # largest gradient norm
    ema: float = 0.9999               # largest decay of the moving average of the weights

    def __post_init__(self):
        check(self, {"lr must be more than 0 and finite": 0 < self.lr < math.inf,
                     "epochs must be more than 0 and finite": 0 < self.epochs < math.inf})

    def rate(self, step, steps):
        """Return the learning rate of optimizer step `step`, 0 .. steps - 1."""
        rising = self.warmup * steps
        falling = self.decay * steps
        rate = self.lr * min(1, step / rising) if rising else self.lr
        left = min(1, (steps - step) / falling) if falling else 1
        if self.exponential:
            return rate * self.final ** (1 - left)
        return rate * (self.final + (1 - self.final) * left)


@dataclass(frozen=True)
class Stage:
    """One thing that is trained. Optional methods of its module customise it:

    decays(name, parameter)       whether weight decay acts on this parameter (default: on matrices)
    carry(name, old, shape)       an old weight made to fit another shape, or None; enables --init
    ready(config)                 called before the first step of a process
    finish(images)                called with some images before the weights are written
    first stages: encode(images) -> what is cached; codes(cached) -> a batch for the next stage;
    reconstruct(images, noise, on_step=None) -> images

    An attribute needs_weights says that random weights are of no use, idle_parameters that some
    may get no gradient. A Config's images_per_sample is the number of images of one class that
    make a sample.
    """
    name: str
    build: Callable               # config -> module; module(batch, labels) -> {"loss": ..., parts}
    recipes: dict[str, Recipe]    # by preset; a preset that is missing needs published weights
    views: Callable               # config -> (image, size, rng) -> list of pictures, see Samples
    first_stage: str = ""         # the frozen stage whose codes it is trained on; "": images
    start: str = ""               # the stage whose weights it starts from
    load: Callable | None = None  # of first stages: path -> frozen module; the others make pictures
    adapt: Callable = lambda config: config  # the preset's config -> the config of this stage


def vae_stage(views):
    """Return the stage that trains a KL-VAE. Only `tiny` trains its own: see load_vae."""
    recipe = Recipe(lr=3e-3, batch=16, epochs=0.8, warmup=0.03, decay=0.4, betas=(0.9, 0.99),
                    weight_decay=0.0, clip=1.0, ema=0.99)
    return Stage("vae", lambda config: KLVAE(config.vae), {"tiny": recipe}, views, load=load_vae)


def check_vae(model, vae):
    """Raise UserError if the model was made for another kind of VAE."""
    has = f"{vae.config.channels} channels at f{vae.config.factor}"
    needs = f"{model.config.vae.channels} channels at f{model.config.vae.factor}"
    if has != needs:
        raise UserError(f"the VAE has {has}, the model needs {needs}")


def ranks():
    """Return (rank, world) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def rank_zero_first():
    """Let rank 0 run the block before the others: it downloads or creates what they find."""
    rank, world = ranks()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def gather(value):
    """Return the list of all ranks' values, which may be any objects, on every rank."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def update_ema(ema, model, decay):
    """Average parameters, ema = decay * ema + (1 - decay) * model, and copy buffers."""
    new = [p.detach().float() for p in model.parameters()]
    torch._foreach_lerp_(list(ema.parameters()), new, 1 - decay)
    for old, new in zip(ema.buffers(), model.buffers()):
        old.copy_(new)


@contextlib.contextmanager
def atomic(path):
    """Open a binary file that takes the place of `path` when the block ends without an error.

    Raise UserError if it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error  # without the temporary file's name
        raise UserError(f"cannot write {path}: {reason}; what was there is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def save(path, content):
    """Write tensors, numbers, strings, lists and dicts atomically."""
    with atomic(path) as f:
        torch.save(content, f)


class ReleasedConfig:
    """Stands for the class of a configuration in released D-AR files: a dict, `_data`."""


class Callback:
    """Stands for the class of a Lightning callback, which some checkpoints use as a key."""


HARMLESS = [argparse.Namespace, np.ndarray, np.dtype, (ReleasedConfig, "config_util.Config")]
HARMLESS += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u1", "b1")]
for value in (np.zeros(0), np.float64(0)):  # how NumPy rebuilds arrays and scalars, by both names
    rebuilds = value.__reduce__()[0]
    HARMLESS += [(rebuilds, f"numpy.{core}.multiarray.{rebuilds.__name__}")
                 for core in ("core", "_core")]


def read_checkpoint(path):
    """Return the dict in a checkpoint file. Nothing in the file is executed.

    Raise UserError for a missing, damaged or unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix.lower() == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path}: pip install safetensors, or use a .pt file") from None
        with untrusted(path):
            return load_file(path)
    with untrusted(path):
        content = load_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a checkpoint")
    return content


def load_pickle(path, callbacks=()):
    """Return what torch.save wrote; `callbacks` are Lightning classes used as keys in it."""
    stand_ins = [(Callback, name) for name in callbacks]
    try:
        with torch.serialization.safe_globals([*HARMLESS, *stand_ins]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to switch the protection off
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if not found:
        raise UserError(f"{path} is not a file that torch.save wrote")
    if re.match(r"(pytorch_)?lightning\.[\w.]*callbacks", found[1]) and found[1] not in callbacks:
        return load_pickle(path, [*callbacks, found[1]])
    raise UserError(f"{path} contains code ({found[1]}), which is not executed")


def unwrap(content, *keys):
    """Return the tensors of the first dict under one of the keys, else of the content itself,
    without the prefixes that DDP and torch.compile put before names."""
    state = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value
            for name, value in state.items() if isinstance(value, torch.Tensor)}


def renamed(state, table):
    """Return a state dict in float32 under new names.

    Each line of the table, "pattern -> replacement", is a substitution in all names, in order.
    """
    for line in table.strip().splitlines():
        pattern, replacement = (part.strip() for part in line.split("->"))
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return {name: value.float() for name, value in state.items()}


def numbered(state, pattern):
    """Return the distinct numbers, sorted, in group 1 of the pattern at starts of names."""
    found = [re.match(pattern, name) for name in state]
    return sorted({int(match[1]) for match in found if match})


def load_strict(module, state, path):
    """Load a state dict, or raise UserError that names entries that do not fit."""
    own = module.state_dict()
    wrong = [f"{k} is no tensor" for k, v in state.items() if not isinstance(v, torch.Tensor)]
    wrong += [f"missing {k}" for k in own if k not in state]
    wrong += [f"unknown {k}" for k in state if k not in own]
    for name in [] if wrong else own:
        if state[name].shape != own[name].shape:
            wrong.append(f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} does not fit: {'; '.join(wrong[:5])}{more}")
    with untrusted(path, "of another kind"):  # sparse tensors, say
        module.load_state_dict(state)


def fingerprint(module):
    """Return twelve hexadecimal digits that identify the weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:12]


# --- 6  Pictures ----------------------------------------------------------------------------------

def to_float(images):
    """Convert uint8 0 .. 255 to float -1 .. 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Convert float -1 .. 1, clipped, to uint8 0 .. 255, rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_pil(image):
    """Return an RGB picture as uint8 (3, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def grid(images, columns, names=None):
    """Return one picture of uint8 images (n, 3, h, w), row by row, with the names to the left of
    their rows. Small images are enlarged to about 64 pixels."""
    gap = 2
    zoom = max(1, 64 // images.shape[2])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    font = ImageFont.load_default(max(10, min(h // 3, 24)))
    names = (names or [])[:rows]
    left = max([gap, *(8 + int(font.getlength(name)) for name in names)])
    sheet = Image.new("RGB", (left + columns * (w + gap), gap + rows * (h + gap)), "white")
    for k, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        row, column = divmod(k, columns)
        sheet.paste(Image.fromarray(image), (left + column * (w + gap), gap + row * (h + gap)))
    for row, name in enumerate(names):
        middle = gap + row * (h + gap) + h / 2
        ImageDraw.Draw(sheet).text((4, middle), name, "black", font, anchor="lm")
    return sheet


def save_picture(path, picture):
    """Write a PNG, or the format that the file's ending names, atomically."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    with atomic(path) as f:
        picture.save(f, kind)


def save_gif(path, frames, seconds=4.0, hold=1.5):
    """Write a looping GIF of `seconds`, whose last frame stays for `hold` seconds more."""
    duration = [int(1000 * seconds / len(frames))] * len(frames)
    duration[-1] += int(1000 * hold)
    with atomic(path) as f:
        frames[0].save(f, "GIF", save_all=True, append_images=frames[1:], loop=0, duration=duration)
