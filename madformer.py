"""MADFormer: early layers run once per image block, late layers denoise it (Chen et al., 2025).

Idea     The latent of an image is cut into T square blocks, which are generated one after another.
         One transformer does both halves of the work. Its first N - D layers run autoregressively,
         once per block: from the text and the blocks so far they compute a condition for the next
         block. Its last D layers run at every denoising step: they turn the condition plus a noisy
         block into the clean block. The more layers are autoregressive, the cheaper a step is.
Towers   Text, clean blocks and noisy blocks are three kinds of rows in one sequence. Each kind has
         its own parameters in every layer, its tower; rows of different kinds meet in the attention
         only. A small U-Net turns blocks of latents into tokens and tokens into blocks.
Shapes   B images, T blocks of n tokens, N layers. Images (B, 3, h, w), latents (B, z, h', w') as
         scaled by the VAE, blocks (B, T, z, p, p), rows (B, m, dim), labels (B,).
Time     DDPM steps t = 0 .. 999: 0 is almost clean, 999 is noise. x_t = alpha x_0 + sigma eps.
Where    Training, all blocks at once: Eq. 1 and Eq. 6 in MADFormer.forward, Eq. 2 to Eq. 5 in
         MADFormer.run_layers. Sampling, block by block: Eq. 1 to Eq. 3 in MADFormer.sample, Eq. 4
         and Eq. 5 in MADFormer.denoise. The attention mask: visibility. The samplers: solve.
Differs  The paper and its released code differ in much. The fields `target`, `image_weight`,
         `hidden`, `clean_target` and `clean_time` of Config have both; docs/paper_and_code.md lists
         every point.
"""
import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import common
from common import (SD_VAE, TINY_VAE, GroupNorm, Matrix, Recipe, Stage, UserError, VAEConfig,
                    conv3x3, merge_heads, split_heads)

MAX_STEPS = {"ddim": 1000, "dpm": 999}  # of each sampler
TEXT, CLEAN, NOISE = range(3)           # kinds of rows
NEVER = 2**30                           # later than any place
BOS, EOS, BOI, EOI = range(256, 260)    # begin and end of text and image; smaller tokens: bytes
TOKENS = 260


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net halves before and after the transformer."""
    channels: tuple[int, ...] = (512, 1024)  # per level; each level but the last halves the side
    blocks: tuple[int, ...] = (2, 2)         # residual blocks per level; the upsampler has one more
    attention: tuple[int, ...] = (0, 1)      # 1: attention after every residual block of the level
    groups: int = 8                          # of every group norm
    heads: int = 8                           # of that attention
    time_dim: int = 128                      # width of the time embedding

    def __post_init__(self):
        common.check(self, {
            "unet.channels, blocks and attention have an entry for each level":
                len(self.channels) == len(self.blocks) == len(self.attention),
            f"unet.channels divide into {self.groups} groups and {self.heads} heads":
                not any(c % self.groups or c % self.heads for c in self.channels)})

    @property
    def factor(self):
        """Side of a block in latent pixels over its side in tokens."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class Config:
    """Everything that fixes shapes, loss and sampling. The default is the published FFHQ model."""
    image_size: int = 1024             # pixels
    classes: int = 1                   # number of classes
    class_names: tuple[str, ...] = ()  # the texts that the model is trained on; from the data
    text: bool = False                 # whether there is a text tower
    vocabulary: int = TOKENS           # rows of the token embedding, 260 or more
    dim: int = 1152                    # a multiple of `head`
    head: int = 64                     # channels of an attention head, 8, 12, 16, ...
    mlp: int = 4096                    # hidden width of the MLPs
    depth: int = 28                    # N
    diffusion_depth: int = 14          # D, 1 .. N: layers that denoise (Table 1)
    ar_length: int = 16                # T, a square number: blocks of an image (Table 2)
    clean_blocks: bool = True          # earlier blocks are clean rows, else noise rows (Table 3)
    condition: bool = True             # add the AR layers' output to the noisy latent (Table 3)
    shared: bool = False               # one set of parameters for all towers (Table 4)
    mlp_denoising: bool = False        # a block attends only to itself while denoising (Table 5)
    target: str = "noise"              # prediction: "clean" latent (paper) or "noise" (released)
    text_weight: float = 1.0           # lambda_text of Eq. 6
    image_weight: float = 1.0          # lambda_image: 5 (paper) or 1 (released)
    hidden_weight: float = 0.1         # lambda_hidden (Table 6)
    clean_weight: float = 0.0          # lambda_tower (Table 6)
    hidden: str = "sum"                # its loss is on "condition" (paper), "sum" with z (released)
    clean_target: str = "next"         # clean tower's loss: "next" block (paper), "same" (released)
    clean_time: str = "noisy"          # step of a clean block: "zero", or "noisy", as its noisy one
    sampler: str = "ddim"              # "ddim" (paper) or "dpm", DPM-Solver++ 2M (released)
    steps: int = 250                   # denoising steps of a sample, 1 .. 1000 (dpm: 999)
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = SD_VAE

    def __post_init__(self):
        most = MAX_STEPS.get(self.sampler, 0)
        unit = self.vae.factor * self.unet.factor * self.across
        common.check(
            self,
            {"dim is a multiple of head, and head of 4, from 8 on":
                 self.dim % self.head == self.head % 4 == 0 and self.head > 4,
             f"diffusion_depth is 1 to {self.depth}": 1 <= self.diffusion_depth <= self.depth,
             "ar_length is a square number": self.across**2 == self.ar_length,
             f"image_size is a multiple of {unit}: {self.across} blocks of whole tokens a side":
                 self.image_size % unit == 0,
             f"steps is 1 to {most}": 1 <= self.steps <= most,
             f"vocabulary is {TOKENS} or more": self.vocabulary >= TOKENS,
             "the clean-tower loss needs clean blocks, and more than one":
                 self.clean_weight == 0 or self.clean_blocks and self.ar_length > 1},
            target=("clean", "noise"), hidden=("condition", "sum"), sampler=MAX_STEPS,
            clean_target=("next", "same"), clean_time=("noisy", "zero"))

    @property
    def latent_size(self):
        """Side of the latent."""
        return self.image_size // self.vae.factor

    @property
    def across(self):
        """Blocks per image side."""
        return math.isqrt(self.ar_length)

    @property
    def block(self):
        """p, the side of a block in latent pixels."""
        return self.latent_size // self.across

    @property
    def tokens(self):
        """n, the tokens of a block."""
        return (self.block // self.unet.factor) ** 2

    @property
    def side(self):
        """Tokens per image side."""
        return self.latent_size // self.unet.factor

    @property
    def ar_depth(self):
        """N - D, the layers that run once per block."""
        return self.depth - self.diffusion_depth

    def evaluations(self, steps):
        """Return the paper's NFE per block: AR layers count once, the others at every step."""
        return self.ar_depth + self.diffusion_depth * steps

    def steps_within(self, nfe):
        """Return the largest number of steps with at most `nfe` evaluations, or raise UserError."""
        steps = min((nfe - self.ar_depth) // self.diffusion_depth, *MAX_STEPS.values())
        if steps < 1:
            raise UserError(f"--nfe {nfe}: one step takes {self.evaluations(1)} layer evaluations")
        return steps


# The released code trains FFHQ; of ImageNet there is only the paper.
PRESETS = {
    "tiny": Config(image_size=32, classes=10, text=True, dim=96, head=32, mlp=256, depth=6,
                   diffusion_depth=3, ar_length=4, clean_time="zero", sampler="dpm", steps=50,
                   unet=UNetConfig((64,), (1,), (0,), time_dim=64),
                   vae=replace(TINY_VAE, channels=8, kl_weight=5e-3), image_weight=5.0,
                   hidden="condition"),
    "ffhq": Config(),
    "imagenet": Config(image_size=256, classes=1000, text=True, vocabulary=128256, ar_length=4,
                       steps=100, target="clean", image_weight=5.0, hidden="condition")}
PUBLISHED = {"ffhq": "1.3B", "imagenet": "2.1B"}


# --- Text -----------------------------------------------------------------------------------------

def tokenize(texts):
    """Return tokens (B, L): BOS, the lower-case bytes of a text, BOI, and EOS as padding."""
    rows = []
    for text in texts:
        content = text.strip().lower().encode(errors="surrogateescape")  # folder names can be bytes
        rows.append(torch.tensor([BOS, *content, BOI]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOS)


# --- The U-Net before and after the transformer ---------------------------------------------------

class TimeEmbedding(nn.Module):
    """e(t) = W2 SiLU(W1 t), of the step itself, in float32: bfloat16 cannot count to 999."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, 1)))
        self.second = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, width)))

    def forward(self, t):                                                # (M,)
        with torch.autocast(t.device.type, enabled=False):
            return F.silu(t[:, None] * self.first.flatten()) @ self.second.T


class PlaneAttention(nn.Module):
    """Attention over the positions of one block's feature map, plus the input."""

    def __init__(self, channels, unet):
        super().__init__()
        self.heads = unet.heads
        self.norm = GroupNorm(unet.groups, channels)
        self.qkv = nn.ModuleDict({name: nn.Linear(channels, channels) for name in "qkv"})
        self.out = nn.Linear(channels, channels)

    def forward(self, x):                                                # (M, C, p, p)
        h = self.norm(x).flatten(2).mT                                   # (M, p p, C)
        qkv = [split_heads(linear(h), self.heads) for linear in self.qkv.values()]
        h = F.scaled_dot_product_attention(*qkv)                         # (M, heads, p p, C/heads)
        h = self.out(merge_heads(h))                                     # (M, p p, C)
        return x + h.mT.unflatten(2, x.shape[2:])


class ResBlock(nn.Module):
    """GN, SiLU, conv, plus time, GN, SiLU, conv, plus the input; then attention, if wanted."""

    def __init__(self, c_in, c_out, unet, has_attention):
        super().__init__()
        self.norm1 = GroupNorm(unet.groups, c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.time = nn.Linear(unet.time_dim, c_out)
        self.norm2 = GroupNorm(unet.groups, c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = PlaneAttention(c_out, unet) if has_attention else nn.Identity()

    def forward(self, x, e):                                             # (M, C, p, p), (M or 1, E)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(e))[:, :, None, None]
        return self.attention(self.shortcut(x) + self.conv2(F.silu(self.norm2(h))))


class UNetHalf(nn.Module):
    """The downsampler, from blocks of latents to tokens, or the upsampler, its mirror image, which
    also reads the feature maps of the downsampler: skip_widths are their channels."""

    def __init__(self, unet, c_in, c_out, skip_widths=()):
        super().__init__()
        self.is_up = bool(skip_widths)
        skips = list(skip_widths)
        levels = [*zip(unet.channels, unet.blocks, unet.attention)]
        if self.is_up:
            levels.reverse()
        width = levels[0][0]
        self.time = TimeEmbedding(unet.time_dim)
        self.conv_in = conv3x3(c_in, width)
        self.skip_widths = [width]
        self.layers = nn.ModuleDict()
        for i, (channels, blocks, has_attention) in enumerate(levels):
            if i > 0:
                stride = 1 if self.is_up else 2
                self.layers[f"resample_{i - 1}"] = conv3x3(width, width, stride=stride)
                self.skip_widths.append(width)
            for j in range(blocks + 1 if self.is_up else blocks):
                c_block = width + skips.pop() if self.is_up else width
                self.layers[f"{i}_{j}"] = ResBlock(c_block, channels, unet, has_attention)
                width = channels
                self.skip_widths.append(width)
        self.conv_out = conv3x3(width, c_out)

    def forward(self, x, t, skips=()):
        """Return tokens (M, n, dim) for blocks x (M, z, p, p) at steps t (M or 1,), and the feature
        maps on the way; or blocks for tokens x and these maps. Tokens and blocks are float32."""
        skips = list(skips)
        e = self.time(t)                                                 # (M or 1, E)
        if self.is_up:
            x = x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1))
        x = self.conv_in(x)
        maps = [x]
        for layer in self.layers.values():
            if isinstance(layer, ResBlock):
                x = layer(torch.cat([x, skips.pop()], 1) if self.is_up else x, e)
            else:
                x = layer(F.interpolate(x, scale_factor=2.0) if self.is_up else x)
            maps.append(x)
        x = self.conv_out(x).float()
        return x if self.is_up else (x.flatten(2).mT, maps)


# --- The transformer ------------------------------------------------------------------------------

def rotary_grid(rows, columns, side, head):
    """Return cos and sin (2, m, head) for tokens at (rows, columns), of `side` tokens per side."""
    base = 100 * (1 + int(8 * side / math.pi) // 100)
    omega = base ** (-torch.arange(head // 4, device=rows.device) / (head // 4 - 1))
    positions = torch.stack([rows, rows, columns, columns], 1)           # (m, 4)
    angles = (positions[:, :, None] * omega).flatten(1)                  # (m, head)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Mix channel i of x (..., m, head), by its row's angle, with i + head/2, by its column's.

    As released: this is a rotation only where row and column are equal.
    """
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Tower(nn.Module):
    """One tower's parameters in one layer: pre-norm, normalised queries and keys, SwiGLU."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.heads = dim // config.head
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(config.head, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head, eps=1e-6)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.gate = Matrix(dim, config.mlp)
        self.up = Matrix(dim, config.mlp)
        self.down = Matrix(config.mlp, dim)

    def project_qkv(self, x):
        """Return queries, keys and values (B, heads, m, head) of rows x (B, m, dim)."""
        qkv = self.qkv(self.norm1(x))
        q, k, v = split_heads(qkv, 3 * self.heads).chunk(3, 1)
        return self.q_norm(q.float()), self.k_norm(k.float()), v

    def project_and_mlp(self, x, mixed):
        """Return the layer's output (B, m, dim). mixed (B, heads, m, head): what attention gave."""
        x = x + self.proj(merge_heads(mixed))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Layer(nn.Module):
    """A decoder layer with a Tower for each kind of rows, or one for all if they are shared.

    Training and sampling differ only in what they pass: training all rows and masked_attention,
    sampling the new rows of one tower and cached_attention.
    """

    def __init__(self, config):
        super().__init__()
        exists = {"text": config.text, "clean": config.clean_blocks, "noise": True}
        self.towers = nn.ModuleDict({name: Tower(config) for name in exists if exists[name]})
        if config.shared:
            self.towers.update({name: self.towers["noise"] for name in self.towers})

    def forward(self, rows, rotary, attend):
        """Return the layer's output like `rows`: name of a tower -> (B, m, dim).

        The M rows of all towers are in the order of the dict. rotary (2, M, head). attend
        maps queries, keys and values (B, heads, M, head) to their shape.
        """
        parts = [self.towers[name].project_qkv(x) for name, x in rows.items()]
        q, k, v = (torch.cat(part, 2) for part in zip(*parts))
        q, k = rotate(torch.stack([q, k]), rotary).to(v.dtype)
        mixed = attend(q, k, v).split([x.shape[1] for x in rows.values()], 2)
        output = {}
        for name, part in zip(rows, mixed):
            output[name] = self.towers[name].project_and_mlp(rows[name], part)
        return output


# --- Attention ------------------------------------------------------------------------------------

# A layout (4, m) describes m rows: their kind (TEXT, CLEAN or NOISE), their place in the sequence
# (text below 0, blocks 0 .. T - 1, clean or noisy, EOI T), their row and their column in the image.

def visibility(layout, text, isolated):
    """Return the attention mask as a function: may row i of image b attend to row j?

    A row attends to the rows of its own kind at its own place, and to rows at earlier places: text
    without its padding, and clean blocks or, if there are none, noisy ones. text (B, L): the tokens
    of the first rows; without text (1, 0). isolated: blocks attend only to themselves, text only to
    text (Table 5).
    """
    kind, place = layout[:2].int()
    own = 3 * place + kind  # one short number: FlexAttention looks it up for every pair
    not_padding = F.pad(text != EOS, (0, len(kind) - text.shape[1]), value=True)
    visible = not_padding & ((kind != NOISE) | (kind != CLEAN).all())    # (B or 1, m)
    if isolated:
        visible = visible & (kind == TEXT)
        place = place.where(kind == TEXT, -NEVER)  # for blocks nothing is earlier
    seen_after = place.where(visible, NEVER)                             # (B or 1, m)

    def mask(b, h, i, j):
        return (own[i] == own[j]) | (seen_after[b % len(seen_after), j] < place[i])
    return mask


def attention_mask(layout, text, isolated=False, create=create_mask):
    """Return `visibility` as a tensor (B or 1, 1, m, m), or as FlexAttention's block mask."""
    m = layout.shape[1]
    return create(visibility(layout, text, isolated), len(text), 1, m, m, text.device)


@functools.cache
def compiled_flex_attention():
    """Return FlexAttention compiled: without that it is slow."""
    return torch.compile(flex_attention)


def masked_attention(layout, text, isolated, flex):
    """Return attend(q, k, v) under `visibility`, by FlexAttention or with a dense mask."""
    if flex:
        mask = attention_mask(layout, text, isolated, create_block_mask)
        return functools.partial(compiled_flex_attention(), block_mask=mask)
    mask = attention_mask(layout, text, isolated)
    return functools.partial(F.scaled_dot_product_attention, attn_mask=mask)


class Span(NamedTuple):
    """Where m rows of the sequence stand while sampling."""
    caches: list               # keys and values (B, heads, slots, head), each layer that looks back
    slots: torch.Tensor        # (m,) where their own keys and values are stored
    end: int                   # they attend to the slots before this one
    mask: torch.Tensor         # (B or 1, 1, m, end) bool: to which of them; None: to all
    rotary: torch.Tensor       # (2, m, head)


def cached_attention(cache, span, q, k, v):
    """Store k and v (B, heads, m, head) in a layer's cache, then attend to the cache."""
    keys, values = cache
    keys.index_copy_(2, span.slots, k)
    values.index_copy_(2, span.slots, v)
    return F.scaled_dot_product_attention(
        q, keys[:, :, :span.end], values[:, :, :span.end], span.mask)


# --- Samplers -------------------------------------------------------------------------------------

def alphas_bar():
    """Return the DDPM schedule (1000,): the signal's share of the variance at steps 0 .. 999."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


def schedule(sampler, steps):
    """Return the steps t, from noise to image, and alpha and sigma there and at the end, as lists.

    DDIM takes multiples of 1000 // steps ("leading"), DPM-Solver++ rounds evenly spaced numbers
    from 999 on ("linspace"). At the end alpha is 1 and sigma 0.
    """
    if sampler == "ddim":
        ts = [i * (1000 // steps) for i in reversed(range(steps))]
    else:
        ts = np.linspace(0, 999, steps + 1).round().astype(int)[:0:-1].tolist()
    abar = torch.cat([alphas_bar()[ts].double(), torch.ones(1)])
    return ts, abar.sqrt().tolist(), (1 - abar).sqrt().tolist()


def solve(network, x, sampler, steps, target):
    """Yield the estimate of x_0 at each step from noise x on; the last one is the result.

    DDIM (eta = 0) or DPM-Solver++ (2M), whose first-order step is DDIM's. network(x_t, i) predicts
    the target at step i.
    """
    _, alpha, sigma = schedule(sampler, steps)
    half_log_snr = [math.log(a / s) for a, s in zip(alpha[:-1], sigma)]
    x_0 = None
    for i in range(steps):
        previous = x_0
        out = network(x, i)
        x_0 = out if target == "clean" else (x - sigma[i] * out) / alpha[i]
        middle = x_0
        if sampler == "dpm" and 0 < i < steps - 1:  # second order
            r = (half_log_snr[i] - half_log_snr[i - 1]) / (half_log_snr[i + 1] - half_log_snr[i])
            middle = x_0 + (x_0 - previous) / (2 * r)
        ratio = sigma[i + 1] / sigma[i]
        x = ratio * x + (alpha[i + 1] - ratio * alpha[i]) * middle
        yield x_0


# --- The whole model ------------------------------------------------------------------------------

class MADFormer(nn.Module):
    """Downsampler, transformer and upsampler, and the text's embedding and head."""
    key_value_pairs = staticmethod(common.key_value_pairs)  # see compile_steps

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.down = UNetHalf(c.unet, c.vae.channels, c.dim)
        self.up = UNetHalf(c.unet, c.dim, c.vae.channels, self.down.skip_widths)
        self.boi = nn.Parameter(torch.randn(1, c.tokens, c.dim))         # before the first block
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))
        if c.text:
            self.embed = nn.Embedding(c.vocabulary, c.dim)
            self.head = Matrix(c.dim, c.vocabulary)  # without a norm before it
            self.register_buffer("names", tokenize(conditions(c)), persistent=False)
        grid = self.cut(torch.tensor(np.indices((c.side, c.side))[None]))  # rows and columns
        grid = grid.movedim(2, 0).flatten(1)                             # (2, T n)
        place = torch.arange(grid.shape[1]) // c.tokens
        image = torch.cat([place[None], grid])                           # (3, T n)
        self.register_buffer("image", image, persistent=False)
        self.register_buffer("alphas_bar", alphas_bar(), persistent=False)
        # DDP must know whether some parameters may get no gradient: without the clean-tower loss
        # that tower's output is unused, and without the condition that of the AR layers.
        self.idle_parameters = not c.condition or c.clean_blocks and not c.clean_weight
        self.initialise()

    def initialise(self):
        """Initialise as released: Xavier for linear layers, torch's default for convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def decays(self, name, parameter):
        """Weight decay acts on all parameters, norms and biases included."""
        return True

    def cut(self, latents):
        """Cut latents (B, z, h', w') into square blocks (B, T, z, p, p) in raster order."""
        p = latents.shape[2] // self.config.across
        return latents.unfold(2, p, p).unfold(3, p, p).movedim(1, 3).flatten(1, 2)

    def join(self, blocks):
        """Join blocks (B, T, z, p, p) to latents (B, z, h', w'): the inverse of cut."""
        rows = blocks.split(self.config.across, 1)
        return torch.cat([torch.cat(row.unbind(1), 3) for row in rows], 2)

    def noised(self, x, eps, t):
        """Return x_t for blocks x (B, T, z, p, p) and steps t (B, T), Sec. 2.2."""
        abar = self.alphas_bar[t][..., None, None, None]
        return abar.sqrt() * x + (1 - abar).sqrt() * eps

    def downsample(self, blocks, t):
        """Return rows (B, T n, dim) and feature maps for blocks (B, T, z, p, p), steps t (B, T)."""
        tokens, skips = self.down(blocks.flatten(0, 1), t.flatten())
        return tokens.unflatten(0, t.shape).flatten(1, 2), skips

    def upsample(self, rows, t, skips):
        """Return blocks (B, T, z, p, p) for rows (B, T n, dim) and steps t (B, T)."""
        tokens = rows.unflatten(1, (t.shape[1], -1)).flatten(0, 1)
        return self.up(tokens, t.flatten(), skips).unflatten(0, t.shape)

    def image_layout(self, kind):
        """Return the layout (4, T n) of the rows of all blocks, of kind CLEAN or NOISE."""
        return F.pad(self.image, (0, 0, 1, 0), value=kind)

    def text_layout(self, text):
        """Return the layout (4, L) of text (B, L), which may end in EOI.

        Text is on the diagonal, where the released form of RoPE is a rotation.
        """
        at = torch.arange(text.shape[1], device=text.device)
        is_eoi = text[0] == EOI
        place = torch.where(is_eoi, self.config.ar_length, at - len(at))
        at = torch.where(is_eoi, self.config.side, at)
        return torch.stack([torch.full_like(at, TEXT), place, at, at])

    def run_layers(self, rows, layout, text, z):
        """Run all rows through all layers under the attention mask, as in training.

        rows: tower -> (B, m, dim), in the order of the layout. text: see visibility. The rows of
        the noise tower come as the tokens of the block before theirs. After the AR layers their own
        noisy latents z (B, m, dim) are added. Return the rows after the last layer, and the
        condition (B, m, dim).
        """
        c = self.config
        rotary = rotary_grid(*layout[2:], c.side, c.head)
        attend = masked_attention(layout, text, isolated=False, flex=z.is_cuda)
        for i, layer in enumerate(self.layers):
            if i == c.ar_depth:
                condition = rows["noise"]                                # Eq. 3
                rows = {**rows, "noise": condition + z if c.condition else z}  # Eq. 4
                if c.mlp_denoising:
                    attend = masked_attention(layout, text, isolated=True, flex=z.is_cuda)
            rows = layer(rows, rotary, attend)                           # Eq. 2, Eq. 5
        return rows, condition

    def forward(self, latents, labels, *, t=None, eps=None):
        """Return the training loss and its terms for latents (B, z, h', w') and labels (B,).

        Drawn unless given: t (B, T), steps 0 .. 999, one for each block; eps (B, T, z, p, p).
        """
        c = self.config
        x = self.cut(latents)                                            # (B, T, z, p, p)
        if t is None:
            t = torch.randint(1000, x.shape[:2], device=x.device)
        eps = torch.randn_like(x) if eps is None else eps
        clean_t = t if c.clean_time == "noisy" else 0 * t
        clean, clean_skips = self.downsample(x, clean_t)                 # (B, T n, dim)
        z, noisy_skips = self.downsample(self.noised(x, eps, t), t)

        rows = {}
        text = labels[None, :0]                                          # (1, 0): no text
        if c.text:
            text = F.pad(self.names[labels], (0, 1), value=EOI)          # (B, L + 1)
            rows["text"] = self.embed(text)
        layouts = [self.text_layout(text)]
        if c.clean_blocks:
            rows["clean"] = clean
            layouts.append(self.image_layout(CLEAN))
        rows["noise"] = torch.cat(                                       # Eq. 1
            [self.boi.expand(len(x), -1, -1), clean[:, :-c.tokens]], 1)
        layouts.append(self.image_layout(NOISE))
        rows, condition = self.run_layers(rows, torch.cat(layouts, 1), text, z)

        output = self.upsample(rows["noise"], t, noisy_skips)
        terms = {"image": F.mse_loss(output, x if c.target == "clean" else eps)}
        loss = c.image_weight * terms["image"]                           # Eq. 6, term by term
        if c.text:
            terms["text"] = self.text_loss(rows["text"], text)
            loss += c.text_weight * terms["text"]
        if c.condition and c.hidden_weight:
            # As released, the upsampler gets the feature maps of the very block that is the target.
            hidden = condition if c.hidden == "condition" else condition + z
            terms["hidden"] = F.mse_loss(self.upsample(hidden, t, clean_skips), x)
            loss += c.hidden_weight * terms["hidden"]
        if c.clean_weight:
            output = self.upsample(rows["clean"], clean_t, clean_skips)[:, :-1]
            terms["clean"] = F.mse_loss(output, x[:, 1:] if c.clean_target == "next" else x[:, :-1])
            loss += c.clean_weight * terms["clean"]
        return {"loss": loss, **terms}

    def text_loss(self, rows, text):
        """Return the mean next-token loss of the text tower's rows (B, L + 1, dim).

        Each token of text (B, L + 1) up to BOI is predicted by the row before it. EOI predicts EOS.
        """
        targets = text[:, 1:]
        targets = targets.masked_fill((targets == EOS) | (targets == EOI), -100)  # not predicted
        targets = F.pad(targets, (0, 1), value=EOS)
        return F.cross_entropy(self.head(rows).float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def sample(self, labels, noise, *, prompt=None, on_step=None, **options):
        """Return scaled latents (B, z, h', w') for labels (B,), generated block by block.

        Text and clean blocks run once and a noisy block at each step: thanks to the cache that is
        the same as running all rows so far at each step. With `prompt`, a list of texts, labels are
        its indices. on_step(j, i, latents) is called after step i of block j; later blocks are
        zero. options: steps and sampler, in place of the config's. Raise UserError for a bad one.
        """
        c = common.with_options(self.config, **options)
        spans = self.prefill_text(labels, prompt)
        ts = labels.new_tensor(schedule(c.sampler, c.steps)[0])
        clean_t = ts[-1:] if c.clean_time == "noisy" else 0 * ts[-1:]
        tokens = self.boi.expand(len(labels), -1, -1)                    # (B, n, dim)
        shape = (c.vae.channels, c.block, c.block)
        blocks = self.boi.new_zeros(len(labels), c.ar_length, *shape)
        for j, span in enumerate(spans):
            if j > 0 and c.clean_blocks:
                self.run_cached("clean", tokens, range(len(span.caches)), spans[j - 1])
            # The noise rows of a block take the slots that its clean rows get later.
            condition = torch.zeros_like(tokens)
            if c.condition:                                              # Eq. 1, Eq. 2, Eq. 3
                condition = self.run_cached("noise", tokens, range(c.ar_depth), span)

            def network(x, i):
                return self.denoise(x, ts[i:i + 1], condition, span)

            estimates = solve(network, noise.normal(shape), c.sampler, c.steps, c.target)
            for i, x_0 in enumerate(estimates):
                blocks[:, j] = x_0
                if on_step:
                    on_step(j, i, self.join(blocks))
            tokens, _ = self.down(x_0, clean_t)
        return self.join(blocks)

    def prefill_text(self, labels, prompt):
        """Run the text of labels (B,) into a new cache, and return the Span of each block."""
        c = self.config
        text = labels[None, :0]                                          # (1, 0): no text
        if c.text:
            text = tokenize(conditions(c, prompt)).to(labels.device)[labels]  # (B, L)
        layout = torch.cat([self.text_layout(text), self.image_layout(CLEAN)], 1)
        rotary = rotary_grid(*layout[2:], c.side, c.head)
        mask = attention_mask(layout, text)
        slots = torch.arange(layout.shape[1], device=labels.device)
        shape = (len(labels), c.dim // c.head, len(slots), c.head)
        dtype = (self.boi @ self.boi.mT).dtype  # of any product: bfloat16 under autocast
        depth = c.ar_depth if c.mlp_denoising else c.depth
        caches = self.key_value_pairs(depth, shape, dtype, labels.device)
        spans = []
        ends = range(text.shape[1], len(slots) + 1, c.tokens)
        for start, end in zip([0, *ends], ends):
            own = slots[start:end]
            seen = mask[..., own, :end] if c.text else None  # without text: all that came before
            spans.append(Span(caches, own, end, seen, rotary[:, own]))
        if c.text:
            self.run_cached("text", self.embed(text), range(depth), spans[0])
        return spans[1:]

    def run_cached(self, name, rows, indices, span):
        """Run the rows (B, m, dim) of one tower through some layers, which attend to the cache."""
        for i in indices:
            attend = F.scaled_dot_product_attention
            if i < len(span.caches):  # else MLP-style denoising: a block attends to itself
                attend = functools.partial(cached_attention, span.caches[i], span)
            rows = self.layers[i]({name: rows}, span.rotary, attend)[name]
        return rows

    def denoise(self, x, t, condition, span):
        """Return the network's output for the noisy block x (B, z, p, p) at step t (1,)."""
        c = self.config
        z, skips = self.down(x, t)
        rows = condition + z                                             # Eq. 4
        rows = self.run_cached("noise", rows, range(c.ar_depth, c.depth), span)  # Eq. 5
        return self.up(rows, t, skips)


# --- Sampler options, stages and recipes ----------------------------------------------------------

OPTIONS = {
    "steps": dict(type=int, help="denoising steps of each block"),
    "sampler": dict(choices=MAX_STEPS, help="DDIM or DPM-Solver++ (2M)"),
    "nfe": dict(type=int, help="as many steps as fit this number of layer evaluations per block"),
    "prompt": dict(nargs="+", metavar="TEXT", help="texts instead of the names of classes")}


def conditions(config, prompt=None, **options):
    """Return the text that each label stands for: the prompts, else the names of the classes.

    A model without a text tower has one label, without text. Raise UserError if it gets a prompt.
    """
    if not config.text:
        if prompt:
            raise UserError("--prompt: this model has no text tower")
        return [""]
    return list(prompt or config.class_names or [""] * config.classes)


def generate(model, vae, labels, noise, *, on_step=None, nfe=None, **options):
    """Return images (B, 3, h, w) in -1 .. 1, and the steps and layer evaluations per block (B,).

    nfe: as many steps as fit this number of evaluations, instead of `steps`. on_step(images) is
    called about 24 times, at least once a block, with the blocks so far and grey for later ones.
    See MADFormer.sample.
    """
    c = model.config
    if nfe is not None:
        options["steps"] = c.steps_within(nfe)
    steps = options.get("steps", c.steps)
    every = 1 + c.ar_length * steps // 24

    def show(j, i, latents):
        if (steps - 1 - i) % every == 0:  # always after the last step of a block
            blocks = model.cut(vae.decode(latents).clamp(-1, 1))
            blocks[:, j + 1:] = 0
            on_step(model.join(blocks))

    latents = model.sample(labels, noise, on_step=show if on_step else None, **options)
    facts = {"steps": torch.full_like(labels, steps),
             "nfe_per_block": torch.full_like(labels, c.evaluations(steps))}
    return vae.decode(latents).clamp(-1, 1), facts


def compile_steps(model, vae):
    """Compile what sampling repeats, the denoising step, and record it, a graph for each block."""
    model.denoise = common.recorded(torch.compile(model.denoise))
    model.key_value_pairs = functools.cache(common.key_value_pairs)


check = common.check_vae

FFHQ = 70_000  # training images; the paper counts steps
IMAGENET = 1_281_167
WSD = Recipe(lr=3e-4, batch=64, epochs=210_000 * 64 / FFHQ, warmup=0.01, decay=0.15, final=1 / 64,
             exponential=True, weight_decay=0.05, clip=1.0)  # warm-up, stable, decay
RECIPES = {
    "tiny": replace(WSD, muon=True, lr=3e-3, batch=32, epochs=2, decay=0.4, ema=0.998),
    "ffhq": WSD,
    "imagenet": replace(WSD, batch=256, epochs=250_000 * 256 / IMAGENET)}
STAGES = [common.vae_stage(),
          Stage("madformer", MADFormer, RECIPES, lambda config: common.centre, first_stage="vae")]


# --- Released checkpoints -------------------------------------------------------------------------

# Released name -> ours.
RELEASED = r"""
^boi_block                                          -> boi
^downsampler\.                                      -> down.
^upsampler\.                                        -> up.
time_embedding\.linear_1\.weight                    -> time.first
time_embedding\.linear_2\.weight                    -> time.second
(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.           -> layers.\2_\3.
(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.        -> layers.\2_\3.attention.
(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv -> layers.resample_\2
time_emb_proj                                       -> time
conv_shortcut                                       -> shortcut
group_norm                                          -> norm
to_out\.0                                           -> out
to_(q|k|v)\.                                        -> qkv.\1.
(gate|up|down)_proj                                 -> \1
^blocks\.(\d+)\.(self_attn\.|mlp_list\.(?=\d))?     -> layers.\1.
(qkv|q_norm|k_norm|proj|\w+_layernorm)_list\.(\d)   -> \2.\1
input_layernorm                                     -> norm1
post_attention_layernorm                            -> norm2
^(layers\.\d+)\.0\.                                 -> \1.towers.clean.
^(layers\.\d+)\.1\.                                 -> \1.towers.noise.
"""
ARGUMENTS = {  # argument in a file -> field, and its value if the argument is set
    "clear_clean": ("clean_blocks", False),
    "clear_cond": ("condition", False),
    "denoising_mlp": ("mlp_denoising", True)}


def load_official(path, **overrides):
    """Return the model in a released checkpoint, with its EMA weights if it has them.

    The configuration comes from the shapes and from the arguments in the file. overrides are fields
    of Config; unet is a dict of fields of UNetConfig (shapes do not tell its groups and heads).
    Raise UserError for an entry that is missing, unknown or of another shape.
    """
    content = common.read_checkpoint(path)
    with common.untrusted(path, "not a MADFormer checkpoint"):
        args = content["args"]
        fields = {"diffusion_depth": args.diff_depth, "ar_length": args.ar_len}
        for name, (field, value) in ARGUMENTS.items():
            if getattr(args, name, False):
                fields[field] = value
        return from_released(common.unwrap(content, "ema", "model"), path, **fields | overrides)


def from_released(state, path="the checkpoint", *, unet=None, **fields):
    """Return the model of a released state dict (see load_official)."""
    state = common.renamed(state, RELEASED)
    levels = common.numbered(state, r"down\.layers\.(\d+)_")
    unet = UNetConfig(
        channels=tuple(len(state[f"down.layers.{i}_0.conv1.weight"]) for i in levels),
        blocks=tuple(len(common.numbered(state, rf"down\.layers\.{i}_(\d+)")) for i in levels),
        attention=tuple(f"down.layers.{i}_0.attention.qkv.q.bias" in state for i in levels),
        time_dim=len(state["down.time.first"]), **(unet or {}))
    _, tokens, dim = state["boi"].shape
    vae = replace(SD_VAE, channels=state["down.conv_in.weight"].shape[1])
    side = math.isqrt(fields["ar_length"] * tokens)  # tokens per image side
    shapes = dict(dim=dim, mlp=len(state["layers.0.towers.noise.gate.weight"]),
                  depth=len(common.numbered(state, r"layers\.(\d+)\.")),
                  image_size=side * unet.factor * vae.factor)
    config = Config(unet=unet, vae=vae, **shapes | fields)
    if not config.clean_blocks:  # the files have the clean tower even where it is off
        state = {name: tensor for name, tensor in state.items() if ".towers.clean." not in name}
    return common.load_strict(MADFormer(config), state, path).eval()


def main():
    """Print the presets with their parameter counts, and walk one batch through the tiny one."""
    common.print_presets(PRESETS, PUBLISHED, parameters=MADFormer)
    print("\nTiny: latents (2, 8, 8, 8) and labels (2,) through MADFormer.forward")
    common.walk(MADFormer(PRESETS["tiny"]), torch.randn(2, 8, 8, 8), torch.arange(2))


if __name__ == "__main__":
    common.run_script(main)
