"""MADFormer: early layers run autoregressively over image blocks, late layers denoise (Chen, Tsvetkov, Han, 2025).

Idea      The latent of an image is cut into T square blocks that are generated one after another. One transformer does
          both halves of the work. Its first N - D layers run once per block: from the text and the clean blocks so
          far they make a condition for the next block. Its last D layers run at every denoising step: they turn the
          condition plus a noisy block into the clean block. The more layers are autoregressive, the cheaper a step is.
Towers    Text, clean blocks and noisy blocks are rows of one sequence with parameters of their own in every layer; only
          the softmax of the attention mixes them. A small U-Net makes tokens of latents and latents of tokens.
Shapes    B batch, T blocks of n tokens, H width, N layers, the last D of them denoise; S denoising steps.
          Images (B, 3, h, w), latents (B, z, h', w') scaled by the VAE, blocks (B, T, z, p, p). Labels (B,).
Time      DDPM steps t = 0 .. 999: 0 is almost clean, 999 noise; x_t = alpha_t x_0 + sigma_t eps.
Where     Eq. 1 to 5, all rows at once: MADFormer.towers     Eq. 6, the loss: MADFormer.forward
          Eq. 1 to 3 for one block: prepare                  Eq. 4 and 5 for one step: denoise
          who sees whom: rule                                DDIM and DPM-Solver++: solve
          sampling with caches: sample                       as plainly as possible: sample_plainly
Differs   Paper and released code differ in much: `target`, `image_weight`, `hidden`, `clean_target`, `clean_time` have
          both. The table "Where paper and code differ" in the README has all points.
"""
import base64
import dataclasses
import functools
import math
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import common
from common import SD_VAE, TINY_VAE, Recipe, Stage, UserError, VAEConfig

HEAD = 64  # channels of an attention head
TEXT, CLEAN, NOISE = range(3)  # kinds of rows
TOWERS = ("text", "clean", "noise")
MOST = {"ddim": 1000, "dpm": 999}  # samplers, and their largest number of steps


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net halves that stand before and behind the transformer."""
    channels: tuple[int, ...] = (512, 1024)  # per level; each level but the last halves the side
    blocks: tuple[int, ...] = (2, 2)         # residual blocks per level; the upsampler has one more
    attention: tuple[int, ...] = (0, 1)      # 1: attention after every residual block of the level
    groups: int = 8                          # of every group norm
    heads: int = 8                           # of that attention
    time_dim: int = 128                      # width of the time embedding


@dataclass(frozen=True)
class Config:
    """Everything that fixes shapes, loss and the sampler's defaults. The default is the published FFHQ model."""
    image_size: int = 1024          # pixels
    classes: int = 1                # number of classes
    texts: tuple[str, ...] = ()     # what each class is called; taken from the data
    text: bool = False              # is there a text tower? Then the class's name is the prompt
    text_tokenizer: str = ""        # tiktoken file, e.g. Llama 3's tokenizer.model; none: bytes
    vocabulary: int = 0             # rows of the token embedding; 0: as many as the text tokenizer has tokens
    text_drop: float = 0.0          # share of training images that lose their text, 0 .. 1; guidance needs it
    dim: int = 1152                 # H, a multiple of 64
    mlp: int = 4096                 # hidden width of the MLPs
    depth: int = 28                 # N
    diffusion_depth: int = 14       # D, 1 .. N: layers that denoise (Table 1)
    ar_length: int = 16             # T, a square number: blocks of an image (Table 2)
    clean_blocks: bool = True       # earlier blocks are seen clean; else only through the noise tower (Table 3)
    condition: bool = True          # the AR layers' output is added to the noisy latent, Eq. 4 (Table 3)
    shared: bool = False            # one set of parameters for all towers (Table 4)
    mlp_denoising: bool = False     # while denoising every block sees only itself (Table 5)
    target: str = "noise"           # the network predicts the "clean" latent (Eq. 6) or the "noise" (released)
    text_weight: float = 1.0        # lambda_text of Eq. 6
    image_weight: float = 1.0       # lambda_image; paper: 5, released: 1
    hidden_weight: float = 0.1      # lambda_hidden (Table 6)
    clean_weight: float = 0.0       # lambda_tower (Table 6)
    hidden: str = "sum"             # the hidden loss judges the "condition" (Eq. 6) or its "sum" with z (released)
    clean_target: str = "next"      # the clean tower is to predict the "next" block (Sec. 3.2) or the "same" (released)
    clean_time: str = "noisy"       # time that a clean block is embedded with: that of the "noisy" block in its place
                                    # (released; when sampling the last one of the schedule) or "zero"
    sampler: str = "ddim"           # sampler defaults: "ddim" (paper) or "dpm" (DPM-Solver++ 2M, released)
    steps: int = 250                # S, 1 .. 1000 (dpm: 999)
    cfg: float = 1.0                # guidance scale; 1 is off, as in the paper
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = SD_VAE

    def __post_init__(self):
        u = self.unet
        for name, values in (("target", ("clean", "noise")), ("hidden", ("condition", "sum")),
                             ("clean_target", ("next", "same")), ("clean_time", ("noisy", "zero")),
                             ("sampler", tuple(MOST))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}, not {getattr(self, name)}")
        if self.dim < HEAD or self.dim % HEAD:
            raise ValueError(f"dim {self.dim} is not a multiple of {HEAD}")
        if not 0 < self.diffusion_depth <= self.depth:
            raise ValueError(f"diffusion_depth is 1 to {self.depth} (depth), not {self.diffusion_depth}")
        if self.ar_length < 1 or math.isqrt(self.ar_length) ** 2 != self.ar_length:
            raise ValueError(f"ar_length {self.ar_length} is not a square number")
        if not u.channels or not len(u.channels) == len(u.blocks) == len(u.attention) or {*u.attention} - {0, 1}:
            raise ValueError("unet.channels, blocks and attention have an entry for each level; attention is 0 or 1")
        if min(self.mlp, u.time_dim, u.groups, u.heads, *u.channels, *u.blocks) < 1:
            raise ValueError("mlp and the fields of unet are 1 or more")
        if any(c % u.groups or a and c % (c // min(u.heads, c)) for c, a in zip(u.channels, u.attention)):
            raise ValueError(f"unet.channels do not divide into {u.groups} groups and {u.heads} heads")
        if self.image_size < 1 or self.image_size % self.vae.factor or self.latent_size % (self.across * self.factor):
            raise ValueError(f"image_size {self.image_size}: its latent, 1/{self.vae.factor} of that, does not divide"
                             f" into {self.across} x {self.across} blocks whose side is a multiple of {self.factor}")
        if self.clean_weight and not (self.clean_blocks and self.ar_length > 1):
            raise ValueError("the clean-tower loss needs clean blocks, and more than one")
        if not 1 <= self.steps <= MOST[self.sampler] or not 0 <= self.text_drop <= 1:
            raise ValueError(f"steps is 1 to {MOST[self.sampler]}, text_drop 0 to 1")
        if self.cfg != 1 and not (self.text and self.text_drop):
            raise ValueError("guidance (cfg other than 1) needs text and text_drop")
        if self.text and self.texts and len(self.texts) != self.classes:
            raise ValueError(f"{len(self.texts)} texts for {self.classes} classes")

    @property
    def factor(self):
        """Side of a block in latent pixels over its side in tokens."""
        return 2 ** (len(self.unet.channels) - 1)

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
        """Side p of a block in latent pixels."""
        return self.latent_size // self.across

    @property
    def tokens(self):
        """n, tokens of a block."""
        return (self.block // self.factor) ** 2

    @property
    def side(self):
        """Tokens per image side."""
        return self.latent_size // self.factor

    @property
    def ar_depth(self):
        """N - D, layers that run once per block."""
        return self.depth - self.diffusion_depth

    @property
    def seen(self):
        """Clean blocks that somebody sees in training; the last one is seen by EOI alone, which follows the image."""
        return (self.ar_length if self.text else self.ar_length - 1) * self.clean_blocks

    def working(self, layer):
        """Names of the towers whose rows somebody still needs at this layer of a training step (N: behind the last)."""
        early = layer < self.ar_depth
        looked_at = layer < self.depth and (not self.mlp_denoising or early and self.condition)  # by later blocks
        needed = {"text": self.text, "clean": self.seen and (looked_at or self.clean_weight),
                  "noise": not early or self.condition}
        return [name for name in needed if needed[name]]

    def evaluations(self, steps):
        """NFE as the paper counts it: layer evaluations per block, AR layers once and the others at every step."""
        return self.ar_depth + self.diffusion_depth * steps

    def steps_within(self, nfe):
        """The largest number of steps with at most so many evaluations. Raises UserError if not even one fits."""
        steps = min((nfe - self.ar_depth) // self.diffusion_depth, *MOST.values())
        if steps < 1:
            raise UserError(f"--nfe {nfe}: one step takes {self.evaluations(1)} layer evaluations")
        return steps


PRESETS = {
    "tiny": Config(image_size=32, classes=10, text=True, dim=128, mlp=384, depth=8, diffusion_depth=4, ar_length=4,
                   target="clean", image_weight=5.0, hidden="condition", clean_time="zero", steps=25,
                   unet=UNetConfig((32, 64), (1, 1), (0, 0), time_dim=64), vae=TINY_VAE),
    "ffhq": Config(),
    "imagenet": Config(image_size=256, classes=1000, text=True, vocabulary=128256, ar_length=4, target="clean",
                       image_weight=5.0, hidden="condition", steps=100)}
PUBLISHED = {"ffhq": "1.3B", "imagenet": "2.1B"}


# --- Text -------------------------------------------------------------------------------------------------------------

class Text:
    """Text to tokens and back: lower-case bytes, or the tokens of a tiktoken file (Llama 3's), then BOS, EOS, BOI, EOI.

    Raises UserError if the file or tiktoken itself is missing.
    """
    LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")  # where Llama 3 splits text before it merges bytes

    def __init__(self, file=""):
        self.coder, first, special = None, 256, 4
        if file:
            try:
                import tiktoken
                lines = (line.split() for line in Path(file).read_bytes().splitlines() if line)
                ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
                self.coder = tiktoken.Encoding("text", pat_str=self.LLAMA3, mergeable_ranks=ranks, special_tokens={})
            except ImportError:
                raise UserError(f"text_tokenizer {file}: pip install tiktoken, or leave it out: then bytes are tokens"
                                ) from None
            except (OSError, ValueError) as error:
                raise UserError(f"text_tokenizer {file}: cannot be read as a tiktoken file ({error})") from None
            first, special = len(ranks), 256  # Llama 3 reserves 256 special tokens
        self.bos, self.eos, self.boi, self.eoi = range(first, first + 4)
        self.size = first + special

    def encode(self, texts):
        """[BOS text BOI] of each text, (B, L), filled up with EOS. Case does not matter."""
        rows = []
        for text in texts:
            text = text.strip().lower()
            words = self.coder.encode_ordinary(text) if self.coder else list(text.encode())
            rows.append(torch.tensor([self.bos, *words, self.boi]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.eos)

    def lengths(self, tokens):
        """Of texts (B, L), up to and with BOI: (B,)."""
        return (tokens == self.boi).int().argmax(1) + 1

    def decode(self, tokens):
        """The text of a list of tokens, special ones left out."""
        words = [token for token in tokens if token < self.bos]
        return self.coder.decode(words) if self.coder else bytes(words).decode(errors="replace")


# --- The U-Net before and behind the transformer ----------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """e(t) = W2 SiLU(W1 t): the step itself, no sinusoid. In float32 always: bfloat16 cannot count to 999."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(width, 1)), nn.Parameter(torch.empty(width, width))
        nn.init.xavier_uniform_(self.first)
        nn.init.xavier_uniform_(self.second)

    def forward(self, t):                                                                  # (M,)
        with torch.autocast(t.device.type, enabled=False):
            return F.linear(F.silu(F.linear(t[:, None].float(), self.first)), self.second)


class ResBlock(nn.Module):
    """GN, SiLU, conv, plus time, GN, SiLU, conv, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, c_in, c_out, unet):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(unet.groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(unet.time_dim, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(unet.groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, e):                                                               # (M, C, p, p), (M or 1, E)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(e))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PlaneAttention(nn.Module):
    """Attention over the positions of one block's feature map, plus the input."""

    def __init__(self, c, unet):
        super().__init__()
        self.width = c // min(unet.heads, c)  # of a head
        self.norm = nn.GroupNorm(unet.groups, c, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                                        # (M, p p, C)
        q, k, v = (linear(h).unflatten(2, (-1, self.width)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        h = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """The residual blocks of one resolution, with attention behind each where the level has it, and the way to the
    next one. `widths` are pairs (c_in, c_out)."""

    def __init__(self, widths, attention, unet, resample):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(*pair, unet) for pair in widths)
        self.attentions = nn.ModuleList(PlaneAttention(c, unet) for _, c in widths if attention == 1)
        self.resample = resample

    def block(self, j, x, e):
        """Residual block j and its attention."""
        x = self.resnets[j](x, e)
        return self.attentions[j](x) if self.attentions else x


class Downsampler(nn.Module):
    """Blocks of latents to tokens; what the upsampler needs to find the details again is kept."""

    def __init__(self, config):
        super().__init__()
        u, c = config.unet, config.unet.channels
        self.time = TimeEmbedding(u.time_dim)
        self.conv_in = nn.Conv2d(config.vae.channels, c[0], 3, padding=1)
        self.levels, width = nn.ModuleList(), c[0]
        for i in range(len(c)):
            half = nn.Conv2d(c[i], c[i], 3, stride=2, padding=1) if i < len(c) - 1 else None
            pairs = [(width, c[i])] + [(c[i], c[i])] * (u.blocks[i] - 1)
            self.levels.append(Level(pairs, u.attention[i], u, half))
            width = c[i]
        self.conv_out = nn.Conv2d(c[-1], config.dim, 3, padding=1)

    def forward(self, x, e):                                                               # (M, z, p, p), (M or 1, E)
        """Tokens (M, n, H), in float32, and the feature maps for the upsampler. e: what `time` makes of the steps."""
        kept = [x := self.conv_in(x)]
        for level in self.levels:
            for j in range(len(level.resnets)):
                kept.append(x := level.block(j, x, e))
            if level.resample is not None:
                kept.append(x := level.resample(x))
        return self.conv_out(x).float().flatten(2).transpose(1, 2), kept


class Upsampler(nn.Module):
    """Tokens to blocks of latents, the mirror image of the downsampler."""

    def __init__(self, config):
        super().__init__()
        u, c = config.unet, config.unet.channels
        kept = [c[0]]  # widths of what the downsampler keeps
        for i in range(len(c)):
            kept += [c[i]] * (u.blocks[i] + (i < len(c) - 1))
        self.side = config.block // config.factor
        self.time = TimeEmbedding(u.time_dim)
        self.conv_in = nn.Conv2d(config.dim, c[-1], 3, padding=1)
        self.levels, width = nn.ModuleList(), c[-1]
        for i in reversed(range(len(c))):
            pairs = []
            for _ in range(u.blocks[i] + 1):
                pairs.append((width + kept.pop(), c[i]))
                width = c[i]
            twice = nn.Conv2d(width, width, 3, padding=1) if i else None
            self.levels.append(Level(pairs, u.attention[i], u, twice))
        self.conv_out = nn.Conv2d(c[0], config.vae.channels, 3, padding=1)

    def forward(self, x, e, kept):                                                         # (M, n, H), (M or 1, E)
        """Blocks (M, z, p, p), in float32. e: what `time` makes of the steps."""
        kept = list(kept)
        x = self.conv_in(x.transpose(1, 2).unflatten(2, (self.side, self.side)))
        for level in self.levels:
            for j in range(len(level.resnets)):
                x = level.block(j, torch.cat([x, kept.pop()], 1), e)
            if level.resample is not None:
                x = level.resample(F.interpolate(x, scale_factor=2.0))
        return self.conv_out(x).float()


# --- The transformer --------------------------------------------------------------------------------------------------

def rotary_grid(rows, columns, side):
    """cos and sin (2, m, 64) for tokens at (rows, columns), both (m,), of an image with `side` tokens per side."""
    base = 100 * (1 + int(8 * side / math.pi) // 100)
    omega = base ** (-torch.arange(HEAD // 4, device=rows.device) / (HEAD // 4 - 1))
    r, c = rows[:, None] * omega, columns[:, None] * omega
    angles = torch.cat([r, r, c, c], 1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Mixes channel i of x (B, heads, m, 64), by its row's angle, with channel i + 32, by its column's. As released:
    only where row and column are equal is this a rotation."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Tower(nn.Module):
    """One tower's parameters in one layer: pre-norm, normalised queries and keys, SwiGLU."""

    def __init__(self, config):
        super().__init__()
        H, width = config.dim, config.mlp
        self.norm1, self.norm2 = (nn.RMSNorm(H, eps=1e-5) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(HEAD, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.gate, self.up = (nn.Linear(H, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, H, bias=False)

    def heads(self, x, rotary):
        """Queries, keys and values (B, heads, m, 64) of rows x (B, m, H)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(norm(part.float()), rotary).to(v.dtype) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v

    def rest(self, x, found):
        """The layer's output (B, m, H) for rows x and what the heads found, (B, heads, m, 64)."""
        x = x + self.proj(found.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Layer(nn.Module):
    """A decoder layer: a Tower for each kind of rows, or one for all. Only the softmax mixes them."""

    def __init__(self, config):
        super().__init__()
        names = [n for n, there in zip(TOWERS, (config.text, config.clean_blocks, True)) if there]
        self.sets = nn.ModuleDict({name: Tower(config) for name in (["all"] if config.shared else names)})

    def tower(self, name):
        """The parameters for these rows."""
        return self.sets["all" if "all" in self.sets else name]

    def forward(self, rows, rotaries, attend, going_on):
        """rows: name of the tower -> (B, m, H). going_on: the towers whose rows are needed behind this layer, in the
        same order; the others only give keys and values. attend(q, k, v) decides who sees whom."""
        heads = {name: self.tower(name).heads(x, rotaries[name]) for name, x in rows.items()}
        k, v = (torch.cat([three[i] for three in heads.values()], 2) for i in (1, 2))
        found = attend(torch.cat([heads[name][0] for name in going_on], 2), k, v)          # (B, heads, rows, 64)
        parts = found.split([rows[name].shape[1] for name in going_on], 2)
        return {name: self.tower(name).rest(rows[name], part) for name, part in zip(going_on, parts)}

    def cached(self, name, x, rotary, store=None, begin=0, mask=None, causal=False, going_on=True):
        """Rows x (B, m, H) of one tower when sampling: their keys and values take places begin .. begin + m of the
        store (2, B, heads, places, 64), and they see all up to there; without a store they see only themselves."""
        q, k, v = self.tower(name).heads(x, rotary)
        if store is not None:
            end = begin + x.shape[1]
            store[0][:, :, begin:end] = k
            store[1][:, :, begin:end] = v
            k, v = store[:, :, :, :end]
            mask = None if mask is None else mask[..., :end]
        if not going_on:
            return None
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.tower(name).rest(x, found)


# --- Who sees whom ----------------------------------------------------------------------------------------------------

Layout = namedtuple("Layout", "kind place shown rotary")  # of m rows: what they are (m,), their place in the sequence
#                               (m,), whether later places may look at them (1 or B, m), and the angles (2, m, 64)


def rule(queries, keys, alone):
    """mask_mod(b, h, i, j): does row i of `queries` see row j of `keys`? Both are Layouts.

    Places count text tokens and image blocks in their order: the clean and the noisy rows of a block share one. All see
    their own kind at their own place, and what is `shown` (clean blocks, text but its padding) at earlier places.
    alone: blocks see only themselves, text only text (Table 5).
    """
    def mask(b, h, i, j):
        here = (queries.kind[i] == keys.kind[j]) & (queries.place[i] == keys.place[j])
        earlier = keys.shown[b if len(keys.shown) > 1 else 0, j] & (keys.place[j] < queries.place[i])
        if alone:
            earlier = earlier & (queries.kind[i] == TEXT) & (keys.kind[j] == TEXT)
        return here | earlier
    return mask


def attention(queries, keys, alone, flex):
    """attend(q, k, v) under the rule, by FlexAttention, which skips what is hidden, or with a dense mask."""
    mask, device = rule(queries, keys, alone), keys.place.device
    B, m_q, m_k = len(keys.shown), len(queries.place), len(keys.place)
    if flex:
        block_mask = create_block_mask(mask, B if B > 1 else None, None, m_q, m_k, device)
        fused = device.type == "cuda" and not torch.compiler.is_compiling()  # else it is compiled with the model
        kernel = compiled_flex() if fused else flex_attention
        return lambda q, k, v: kernel(q, k, v, block_mask=block_mask)
    b, i, j = (torch.arange(m, device=device) for m in (B, m_q, m_k))
    dense = mask(b[:, None, None, None], None, i[:, None], j)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)


@functools.cache
def compiled_flex():
    """FlexAttention is slow unless it is compiled."""
    return torch.compile(flex_attention)


def together(layouts):
    """The Layout of several towers, one after another."""
    B = max(len(part.shown) for part in layouts)
    return Layout(torch.cat([part.kind for part in layouts]), torch.cat([part.place for part in layouts]),
                  torch.cat([part.shown.expand(B, -1) for part in layouts], 1), None)


# --- Samplers ---------------------------------------------------------------------------------------------------------

def alphas_bar():
    """The DDPM schedule (1000,): share of the signal's variance at steps 0 .. 999."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


@functools.cache
def schedule(sampler, steps):
    """Steps t, from noise to image, and alpha and sigma at each and at the end (1 and 0); lists of numbers.

    DDIM: multiples of 1000 // steps, "leading". DPM-Solver++: evenly spaced from 999, rounded, "linspace".
    """
    if sampler == "ddim":
        ts = torch.arange(steps).flip(0) * (1000 // steps)
    else:
        ts = torch.linspace(0, 999, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]
    abar = torch.cat([alphas_bar()[ts].double(), torch.ones(1)])
    return ts.tolist(), abar.sqrt().tolist(), (1 - abar).sqrt().tolist()


def solve(network, x, sampler, steps, target, clip=0.0, on_step=None):
    """x_0 of noise x by DDIM (eta = 0) or DPM-Solver++ (2M). network(x_t, i, t) gives the target at step i, time t.

    on_step(i, x_0) gets the estimates. clip: DDIM clamps x_0 to -clip .. clip (0: not), as its usual implementation
    does by default; harmful to latents.
    """
    ts, alpha, sigma = schedule(sampler, steps)
    log_snr = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma)]
    before = None
    for i, t in enumerate(ts):
        out = network(x, i, t).float()
        x_0 = (x - sigma[i] * out) / alpha[i] if target == "noise" else out
        if sampler == "ddim":
            eps = out if target == "noise" else (x - alpha[i] * out) / sigma[i]
            x_0 = x_0.clamp(-clip, clip) if clip else x_0  # eps stays that of the unclamped one
            x = alpha[i + 1] * x_0 + sigma[i + 1] * eps
        else:
            middle = x_0
            if 0 < i < steps - 1:  # second order, but for the first and the last step
                r = (log_snr[i] - log_snr[i - 1]) / (log_snr[i + 1] - log_snr[i])
                middle = x_0 + (x_0 - before) / (2 * r)
            ratio = sigma[i + 1] / sigma[i]
            x = ratio * x + (alpha[i + 1] - ratio * alpha[i]) * middle
            before = x_0
        if on_step:
            on_step(i, x_0)
    return x


# --- The whole model --------------------------------------------------------------------------------------------------

Cache = namedtuple("Cache", "store begin mask")  # keys and values (layers, 2, B, heads, places, 64); where the image
#                                begins, behind the text; what hides the text's padding (B, 1, 1, places), or None


class MADFormer(nn.Module):
    """Downsampler, transformer, upsampler, and the text's embedding and head."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.down, self.up = Downsampler(c), Upsampler(c)
        self.boi = nn.Parameter(torch.empty(1, c.tokens, c.dim))                           # in place of a block before
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))                      # the first one
        token, p = torch.arange(c.ar_length * c.tokens), c.block // c.factor
        block, inside = token // c.tokens, token % c.tokens
        row, column = block // c.across * p + inside // p, block % c.across * p + inside % p
        self.register_buffer("rotary", rotary_grid(row, column, c.side), persistent=False)
        self.register_buffer("alphas_bar", alphas_bar(), persistent=False)
        self.kept = None  # see compile_steps
        if c.text:
            self.tokenizer = Text(c.text_tokenizer)
            if 0 < c.vocabulary < self.tokenizer.size:
                raise UserError(f"vocabulary {c.vocabulary}: the text tokenizer has {self.tokenizer.size} tokens")
            self.embed = nn.Embedding(c.vocabulary or self.tokenizer.size, c.dim)
            self.head = nn.Linear(c.dim, c.vocabulary or self.tokenizer.size, bias=False)  # no norm in front of it
            self.register_buffer("names", self.tokenizer.encode(c.texts) if c.texts else None, persistent=False)
            self.register_buffer("blank", self.tokenizer.encode([""]), persistent=False)
        self.initialise()
        for i, layer in enumerate(self.layers):  # what a switch leaves without use is not trained: DDP must know
            for name, tower in layer.sets.items():
                now, then = (any(n in c.working(k) for n in (TOWERS if c.shared else (name,))) for k in (i, i + 1))
                tower.requires_grad_(now and then)
                for part in (tower.norm1, tower.qkv, tower.k_norm):
                    part.requires_grad_(now)
        self.boi.requires_grad_(c.condition)

    @torch.no_grad()
    def initialise(self):
        """Released initialisation: Xavier for linear layers, torch's own for convolutions; nothing is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.boi)

    def cut(self, latents):
        """Latents (B, z, h', w') as square blocks (B, T, z, p, p) in raster order."""
        n, p = self.config.across, self.config.block
        return latents.unflatten(3, (n, p)).unflatten(2, (n, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)

    def join(self, blocks):
        """The inverse of cut."""
        n = self.config.across
        return blocks.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def noised(self, x, eps, t):
        """x_t of blocks x (B, T, z, p, p) at steps t (B, T), Sec. 2.2."""
        abar = self.alphas_bar[t][..., None, None, None]
        return abar.sqrt() * x + (1 - abar).sqrt() * eps

    def image_layout(self, kind, first, blocks):
        """Layout of the rows of image blocks first .. first + blocks."""
        n = self.config.tokens
        place = torch.arange(first, first + blocks, device=self.boi.device).repeat_interleave(n)
        shown = torch.full((1, len(place)), kind == CLEAN or not self.config.clean_blocks, device=place.device)
        return Layout(torch.full_like(place, kind), place, shown, self.rotary[:, first * n:(first + blocks) * n])

    def text_layout(self, tokens, closed=False):
        """Layout of the rows of tokens (B, L) = [BOS text BOI], closed: with EOI, which stands behind the image. Their
        positions are the diagonal, where the released form of RoPE is a rotation."""
        at = torch.arange(tokens.shape[1] - closed, device=tokens.device)
        place, shown = at - len(at), at < self.tokenizer.lengths(tokens)[:, None]
        if closed:
            at, place = F.pad(at, (0, 1), value=self.config.side), F.pad(place, (0, 1), value=self.config.ar_length)
            shown = F.pad(shown, (0, 1), value=True)
        return Layout(torch.full_like(at, TEXT), place, shown, rotary_grid(at, at, self.config.side))

    def towers(self, rows, layouts, z):
        """All rows through all layers under a mask, as in training.

        rows: tower -> (B, m, H); layouts: tower -> Layout. The noise tower's rows come as the block before theirs, and
        get their noisy latents z (B, m, H) between the two halves. Returns the rows behind the last layer that are
        needed there, and the condition (B, m, H), None if it is off.
        """
        c, rows, condition, attends = self.config, dict(rows), None, {}
        for i, layer in enumerate(self.layers):
            if i == c.ar_depth:
                condition = rows["noise"] if c.condition else None                         # Eq. 3
                rows["noise"] = z if condition is None else condition + z                  # Eq. 4
            rows = {name: x for name, x in rows.items() if name in c.working(i) or name == "noise"}
            now = tuple(name for name in rows if name in c.working(i))
            going_on = tuple(name for name in now if name in c.working(i + 1))
            if not going_on:
                continue
            alone = c.mlp_denoising and i >= c.ar_depth
            if (now, going_on, alone) not in attends:  # three at most: AR layers, diffusion layers, the last layer
                queries, keys = (together([layouts[name] for name in names]) for names in (going_on, now))
                attends[now, going_on, alone] = attention(queries, keys, alone, flex=z.is_cuda)
            rows |= layer({name: rows[name] for name in now}, {name: layouts[name].rotary for name in now},
                          attends[now, going_on, alone], going_on)                         # Eq. 2, 5
        return {name: x for name, x in rows.items() if name in c.working(c.depth)}, condition

    def forward(self, latents, labels, *, t=None, eps=None, drop=None, text=None):
        """Training loss, Eq. 6, for latents (B, z, h', w') and labels (B,).

        Drawn unless given: t (B, T) steps 0 .. 999, one for each block, eps (B, T, z, p, p), drop (B,) bool: who loses
        the text. text (B, L): tokens [BOS text BOI] instead of the classes' names. Raises UserError without either.
        """
        c, B, T = self.config, len(latents), self.config.ar_length
        x = self.cut(latents)                                                              # (B, T, z, p, p)
        t = torch.randint(1000, (B, T), device=x.device) if t is None else t
        eps = torch.randn_like(x) if eps is None else eps
        clean_t = t if c.clean_time == "noisy" else torch.zeros_like(t)
        features, kept = self.down(torch.cat([x, self.noised(x, eps, t)]).flatten(0, 1),
                                   self.down.time(torch.cat([clean_t, t]).flatten()))
        clean, z = features.unflatten(0, (2, B, T))                                        # (B, T, n, H) each
        of_clean, of_noisy = zip(*(f.chunk(2) for f in kept))

        rows, layouts = {}, {}
        if c.text:
            text = self.prompts(labels, text)
            if drop is None:
                drop = torch.rand(B, device=x.device) < c.text_drop * self.training
            text = torch.where(drop[:, None], self.empty(text), text)                      # (B, L)
            tokens = F.pad(text, (0, 1), value=self.tokenizer.eoi)                         # (B, L + 1)
            rows["text"], layouts["text"] = self.embed(tokens), self.text_layout(tokens, closed=True)
        if c.seen:
            rows["clean"], layouts["clean"] = clean[:, :c.seen].flatten(1, 2), self.image_layout(CLEAN, 0, c.seen)
        rows["noise"] = torch.cat([self.boi.expand(B, -1, -1), clean[:, :-1].flatten(1, 2)], 1)  # Eq. 1
        layouts["noise"] = self.image_layout(NOISE, 0, T)
        rows, condition = self.towers(rows, layouts, z.flatten(1, 2))

        def latent(rows, t, kept):
            m = rows.shape[1] // c.tokens                                                  # blocks; T, or T - 1
            kept = [f.unflatten(0, (B, T))[:, :m].flatten(0, 1) for f in kept]
            e = self.up.time(t[:, :m].flatten())
            return self.up(rows.unflatten(1, (m, -1)).flatten(0, 1), e, kept).unflatten(0, (B, m))

        out = {"image": F.mse_loss(latent(rows["noise"], t, of_noisy), x if c.target == "clean" else eps)}
        loss = c.image_weight * out["image"]                                               # Eq. 6, term by term
        if c.text:
            # Row k tells token k + 1, up to BOI, and EOI tells EOS. A text that was dropped tells nothing.
            unknown = torch.arange(1, text.shape[1], device=x.device) >= self.tokenizer.lengths(text)[:, None]
            targets = text[:, 1:].masked_fill(unknown | drop[:, None], -100)
            targets = F.pad(targets, (0, 1), value=self.tokenizer.eos)
            logits = self.head(torch.cat([rows["text"][:, :-2], rows["text"][:, -1:]], 1)).float()
            out["text"] = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss = loss + c.text_weight * out["text"]
        if c.hidden_weight and condition is not None:
            # As released, the upsampler also gets the U-Net's features of the very block that is the target.
            guess = latent(condition if c.hidden == "condition" else condition + z.flatten(1, 2), t, of_clean)
            out["hidden"] = F.mse_loss(guess, x)
            loss = loss + c.hidden_weight * out["hidden"]
        if c.clean_weight:
            guess = latent(rows["clean"], clean_t, of_clean)[:, :T - 1]
            out["clean"] = F.mse_loss(guess, x[:, 1:] if c.clean_target == "next" else x[:, :-1])
            loss = loss + c.clean_weight * out["clean"]
        return {"loss": loss, **out}

    def prompts(self, labels, text=None):
        """Tokens (B, L) of these texts, or of the classes' names."""
        if text is None and self.names is None:
            raise UserError("this model knows no names of classes: give it texts")
        return self.names[labels] if text is None else text

    def empty(self, text):
        """The empty text, as long as these tokens (B, L)."""
        return F.pad(self.blank, (0, text.shape[1] - 2), value=self.tokenizer.eos).expand_as(text)

    @torch.no_grad()
    def sample(self, labels, noise, *, cfg=None, interval=(0.0, 1.0), steps=None, sampler=None, clip=0.0, text=None,
               on_step=None):
        """Scaled latents (B, z, h', w') for labels (B,), block by block; text and clean blocks go through once each.

        What is not given comes from the config. cfg: guidance scale against the empty text, a number or a pair that
        runs linearly over a block's steps; 1 throughout is off and costs half, 0 is unconditional. It acts while
        t / 1000 is in `interval`. clip: see solve. text (B, L): tokens [BOS text BOI] instead of the classes' names.
        on_step(block, step, latents): the blocks so far with the current estimate of this one, zeros where nothing is
        yet. Raises UserError for settings that the model cannot follow.
        """
        c, B, device = self.config, len(labels), labels.device
        text, scales, sampler = self.settings(labels, cfg, interval, steps, sampler, text)
        guided = any(g != 1 for g in scales)
        if guided:  # the second half of the batch goes without text
            text = torch.cat([text, self.empty(text)])
        times = 2 if guided else 1
        cache = self.remember(times * B, text)
        ts = torch.tensor(schedule(sampler, len(scales))[0], device=device)
        down, up = self.down.time(ts), self.up.time(ts)                                    # (steps, E), for all blocks
        clean = down[-1:] if c.clean_time == "noisy" else self.down.time(torch.zeros_like(ts[:1]))
        blocks = torch.zeros(B, c.ar_length, c.vae.channels, c.block, c.block, device=device)
        before = self.boi.expand(times * B, -1, -1)
        for j in range(c.ar_length):
            if j:
                before = self.down(blocks[:, j - 1], clean)[0].repeat(times, 1, 1)
            condition = self.prepare(j, before, cache)

            def network(x, i, t, j=j, condition=condition):
                out = self.denoise(x, (down[i:i + 1], up[i:i + 1]), j, condition, cache)
                if not guided:
                    return out
                out, null = out.chunk(2)
                return null + scales[i] * (out - null)

            def watch(i, x_0, j=j):
                blocks[:, j] = x_0
                on_step(j, i, self.join(blocks))
            start = noise.normal((c.vae.channels, c.block, c.block))
            blocks[:, j] = solve(network, start, sampler, len(scales), c.target, clip, on_step and watch)
        return self.join(blocks)

    def settings(self, labels, cfg, interval, steps, sampler, text):
        """Text tokens or None, the guidance scale of each step, and the sampler."""
        c = self.config
        cfg, steps, sampler = (getattr(c, name) if value is None else value for name, value in
                               (("cfg", cfg), ("steps", steps), ("sampler", sampler)))
        if sampler not in MOST or not 1 <= steps <= MOST[sampler]:
            raise UserError(f"{sampler}, {steps} steps: there are ddim, of 1 to 1000 steps, and dpm, of 1 to 999")
        acts = [interval[0] <= t / 1000 <= interval[1] for t in schedule(sampler, steps)[0]]
        scales = [g if act else 1.0 for g, act in zip(common.guidance_scales(cfg, steps), acts, strict=True)]
        if not c.text and (text is not None or any(g != 1 for g in scales)):
            raise UserError("this model has no text tower: it takes no prompt and no guidance")
        if not c.text_drop and any(g != 1 for g in scales):
            raise UserError("guidance needs a model that was trained with text_drop: this one never saw an empty text")
        return self.prompts(labels, text) if c.text else None, scales, sampler

    def remember(self, B, text):
        """A Cache for B images, with the keys and values of the text (B, L) or None in all layers that look back."""
        c, L, device = self.config, 0 if text is None else text.shape[1], self.boi.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        depth = c.ar_depth if c.mlp_denoising else c.depth
        shape = (depth, 2, B, c.dim // HEAD, L + c.ar_length * c.tokens, HEAD)
        store = common.zeros(self.kept, shape, self.boi, dtype)
        if text is None:
            return Cache(store, 0, None)
        rows, layout = self.embed(text), self.text_layout(text)
        for i in range(depth):
            rows = self.layers[i].cached("text", rows, layout.rotary, store[i], causal=True, going_on=i < depth - 1)
        hides = F.pad(layout.shown, (0, store.shape[4] - L), value=True)[:, None, None]
        return Cache(store, L, None if hides.all() else hides)

    def prepare(self, j, before, cache):
        """The AR pass for block j: the condition (B, n, H) of Eq. 3. before (B, n, H) is block j - 1, clean, or BOI.

        Keys and values of block j - 1 stay in the cache; those of the noisy block j stand in the place of block j until
        the clean ones come, or for good where there are no clean blocks.
        """
        c, n, noise, clean = self.config, self.config.tokens, before, before               # Eq. 1
        here = self.rotary[:, j * n:(j + 1) * n]
        for i, store in enumerate(cache.store):
            layer = self.layers[i]
            if j and c.clean_blocks:
                clean = layer.cached("clean", clean, self.rotary[:, (j - 1) * n:j * n], store,
                                     cache.begin + (j - 1) * n, cache.mask, going_on=i < len(cache.store) - 1)
            if i < c.ar_depth and c.condition:
                noise = layer.cached("noise", noise, here, store, cache.begin + j * n, cache.mask)  # Eq. 2
        return noise if c.condition else torch.zeros_like(noise)

    def denoise(self, x, time, j, condition, cache):
        """The network's output for block j: x (B, z, p, p) under the conditions (B, n, H), or 2 B of them. time: the
        embeddings (1, E) of the step, for the downsampler and for the upsampler."""
        c, n = self.config, self.config.tokens
        z, kept = self.down(x, time[0])
        times = len(condition) // len(x)
        rows = condition + z.repeat(times, 1, 1)                                           # Eq. 4
        for i in range(c.ar_depth, c.depth):                                               # Eq. 5
            history = () if c.mlp_denoising else (cache.store[i], cache.begin + j * n, cache.mask)
            rows = self.layers[i].cached("noise", rows, self.rotary[:, j * n:(j + 1) * n], *history)
        return self.up(rows, time[1], [f.repeat(times, 1, 1, 1) for f in kept])

    @torch.no_grad()
    def sample_plainly(self, labels, noise, *, cfg=None, steps=None, sampler=None, clip=0.0, text=None):
        """The same latents as `sample`, as plainly as possible: at every step all rows so far go through all layers."""
        c, B = self.config, len(labels)
        text, scales, sampler = self.settings(labels, cfg, (0.0, 1.0), steps, sampler, text)
        last = schedule(sampler, len(scales))[0][-1] if c.clean_time == "noisy" else 0
        images, starts, noisy = [], [self.boi.expand(B, -1, -1)], []                        # of each block

        def network(x, t, text):
            j, t = len(images), torch.full((1,), t, device=x.device)
            first = j if c.clean_blocks else 0  # without clean blocks history is seen through noise rows
            z, kept = self.down(x, self.down.time(t))
            rows, layouts = {}, {}
            if text is not None:
                rows["text"], layouts["text"] = self.embed(text), self.text_layout(text)
            if c.clean_blocks and j:
                rows["clean"], layouts["clean"] = torch.cat(starts[1:], 1), self.image_layout(CLEAN, 0, j)
            rows["noise"] = torch.cat(starts[first:], 1)
            layouts["noise"] = self.image_layout(NOISE, first, j + 1 - first)
            noisy[j:] = [z]
            rows, _ = self.towers(rows, layouts, torch.cat(noisy[first:], 1))
            return self.up(rows["noise"][:, -c.tokens:], self.up.time(t), kept)

        def guided(x, i, t):
            out = network(x, t, text)
            if scales[i] == 1:
                return out
            null = network(x, t, self.empty(text))
            return null + scales[i] * (out - null)

        for _ in range(c.ar_length):
            start = noise.normal((c.vae.channels, c.block, c.block))
            images.append(solve(guided, start, sampler, len(scales), c.target, clip))
            clean = self.down.time(torch.full((1,), last, device=start.device))
            starts.append(self.down(images[-1], clean)[0])
        return self.join(torch.stack(images, 1))

    @torch.no_grad()
    def complete(self, text="", most=64):
        """The text that the text tower goes on with, greedily, until an image begins or the text ends."""
        if not self.config.text:
            raise UserError("this model has no text tower")
        tokens = self.tokenizer.encode([text]).to(self.boi.device)[:, :-1]                  # without BOI
        for _ in range(most):
            rows, layout = self.embed(tokens), self.text_layout(tokens)
            for layer in self.layers:
                rows = layer.cached("text", rows, layout.rotary, causal=True)
            token = self.head(rows[:, -1]).argmax(-1)
            if token.item() in (self.tokenizer.boi, self.tokenizer.eos):
                break
            tokens = torch.cat([tokens, token[None]], 1)
        return self.tokenizer.decode(tokens[0].tolist())


# --- Stages: what is trained, in order, and how -----------------------------------------------------------------------

def compile_steps(model, vae):
    """Compiles what sampling repeats: a denoising step."""
    model.denoise, model.kept = common.compiled(model.denoise), {}


def generate(model, vae, labels, noise, *, nfe=None, steps=None, on_step=None, **options):
    """Images (B, 3, h, w) in -1 .. 1 and what they cost: steps, and layer evaluations per block as the paper counts
    them (guidance takes twice as many). nfe: the number of steps that fits so many, instead of steps.

    options: see MADFormer.sample. on_step(images): the blocks so far, grey where none is yet; about 24 times.
    """
    c = model.config
    steps = c.steps_within(nfe) if nfe else steps or c.steps
    every = max(c.ar_length * steps // 24, 1)

    def watch(j, i, latents):
        if (j * steps + i) % every == 0 or (j, i) == (c.ar_length - 1, steps - 1):
            there = (torch.arange(c.ar_length, device=latents.device) <= j).float().view(1, 1, c.across, c.across)
            there = F.interpolate(there, (c.image_size, c.image_size))
            on_step(there * vae.decode(latents).clamp(-1, 1))
    latents = model.sample(labels, noise, steps=steps, on_step=on_step and watch, **options)
    return vae.decode(latents).clamp(-1, 1), {"steps": steps, "nfe_per_block": c.evaluations(steps)}


check = common.same_kind_of_vae
FFHQ, IMAGENET = 70_000, 1_281_167  # training images: the paper counts steps
WSD = Recipe(lr=3e-4, batch=64, epochs=210_000 * 64 / FFHQ, warmup=0.01, decay=0.15, final=1 / 64, exponential=True,
             weight_decay=0.05, clip=1.0)
VAE = common.vae_stage(lambda c: common.random_crop)
MAD = Stage("madformer", build=MADFormer, first="vae", codes=lambda vae, moments: vae.sample(moments),
            recipes={"tiny": dataclasses.replace(WSD, lr=3e-3, batch=32, epochs=2, decay=0.4, ema=0.998),
                     "ffhq": WSD,
                     "imagenet": dataclasses.replace(WSD, batch=256, epochs=250_000 * 256 / IMAGENET)},
            views=lambda c: common.centre_only, carry=lambda name, old, shape: None,
            decays=lambda name, parameter: True, names="texts",
            preview=lambda model, vae, images, labels, noise: generate(model, vae, labels, noise)[0])
STAGES = [VAE, MAD]


# --- Released checkpoints ---------------------------------------------------------------------------------------------

RELEASED = [  # released name -> ours
    (r"^boi_block", "boi"), (r"^downsampler\.", "down."), (r"^upsampler\.", "up."),
    (r"time_embedding\.linear_1\.weight", "time.first"), (r"time_embedding\.linear_2\.weight", "time.second"),
    (r"(down|up)_blocks\.", "levels."), (r"(down|up)samplers\.0\.conv", "resample"), (r"time_emb_proj", "time"),
    (r"conv_shortcut", "shortcut"), (r"group_norm", "norm"), (r"to_out\.0", "out"), (r"to_(q|k|v)\.", r"\1."),
    (r"^blocks\.(\d+)\.(self_attn\.|mlp_list\.(?=\d))?", r"layers.\1."),
    (r"(qkv|q_norm|k_norm|proj|input_layernorm|post_attention_layernorm)_list\.(\d)", r"sets.\2.\1"),
    (r"^(layers\.\d+\.)(\d)\.(gate|up|down)_proj", r"\1sets.\2.\3"),
    (r"input_layernorm", "norm1"), (r"post_attention_layernorm", "norm2"),
    (r"sets\.0", "sets.clean"), (r"sets\.1", "sets.noise")]
SWITCHES = {"clear_clean": ("clean_blocks", False), "clear_cond": ("condition", False),
            "denoising_mlp": ("mlp_denoising", True)}  # released switch -> field, value when it is on


def renamed(state):
    """A released state dict under this file's names, in float32."""
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    for old, new in RELEASED:
        state = {re.sub(old, new, k): v for k, v in state.items()}
    return {k: v.float() for k, v in state.items()}


def load_official(path, **overrides):
    """The model in a released checkpoint, its EMA weights if it has them, ready to sample.

    The configuration comes from the shapes and from the arguments in the file, else the published ones. overrides:
    Config fields; unet is a dict with fields of UNetConfig (groups and heads cannot be seen in the shapes). Strict:
    raises UserError for an entry that is missing, extra or misshapen.
    """
    content = common.read(path)
    with common.foreign(path, "not a MADFormer checkpoint"):
        args = content.get("args") or {}
        args = args if isinstance(args, dict) else vars(args)
        given = {field: value for switch, (field, value) in SWITCHES.items() if args.get(switch)}
        given |= {field: args[name] for name, field in (("diff_depth", "diffusion_depth"), ("ar_len", "ar_length"),
                                                        ("image_size", "image_size")) if args.get(name)}
        return from_released(content.get("ema") or content.get("model") or content, path, **{**given, **overrides})


def from_released(state, path="the checkpoint", **overrides):
    """The model of a released state dict (see load_official)."""
    state = renamed(state)
    try:
        def count(pattern):
            return 1 + max(int(m[1]) for m in (re.match(pattern, k) for k in state) if m)

        shape = {k: v.shape for k, v in state.items()}
        levels = range(count(r"down\.levels\.(\d+)\."))
        unet = UNetConfig(channels=tuple(shape[f"down.levels.{i}.resnets.0.conv1.weight"][0] for i in levels),
                          blocks=tuple(count(rf"down\.levels\.{i}\.resnets\.(\d+)") for i in levels),
                          attention=tuple(int(f"down.levels.{i}.attentions.0.norm.weight" in shape) for i in levels),
                          time_dim=shape["down.time.first"][0])
        unet = dataclasses.replace(unet, **overrides.pop("unet", {}))
        tokens, dim = shape["boi"][1:]
        T = overrides.get("ar_length", Config.ar_length)
        vae = dataclasses.replace(SD_VAE, channels=shape["down.conv_in.weight"][1])
        side = math.isqrt(T * tokens) * 2 ** (len(levels) - 1) * vae.factor
        config = dataclasses.replace(
            Config(), **{"image_size": side, "dim": dim, "depth": count(r"layers\.(\d+)\."), "unet": unet, "vae": vae,
                         "mlp": shape["layers.0.sets.noise.gate.weight"][0], **overrides})
        model = MADFormer(config)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a MADFormer checkpoint ({error})") from None
    if not config.clean_blocks:  # the files have the clean tower even where it is off
        state = {k: v for k, v in state.items() if ".sets.clean." not in k}
    common.load_strict(model, state, path)
    return model.eval()


def main():
    """Prints the presets with their parameter counts, and walks one batch through the tiny one."""
    print("preset      N   D     H   MLP   T    n  text      parameters  published")
    for name, c in PRESETS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in MADFormer(c).parameters())
        print(f"{name:9s} {c.depth:3d} {c.diffusion_depth:3d} {c.dim:5d} {c.mlp:5d} {c.ar_length:3d} {c.tokens:4d}"
              f"  {'yes' if c.text else 'no':4s} {count:15,d}  {PUBLISHED.get(name, '-'):>9s}")
    c = PRESETS["tiny"]
    c = dataclasses.replace(c, texts=tuple(f"class {k}" for k in range(c.classes)))
    model, latents = MADFormer(c), torch.randn(2, c.vae.channels, c.latent_size, c.latent_size)
    blocks = model.cut(latents)
    print(f"\nlatents {tuple(latents.shape)} as blocks {tuple(blocks.shape)}, all in one through Downsampler.forward")
    common.walk(model.down, blocks.flatten(0, 1), model.down.time(torch.arange(2 * c.ar_length)), depth=5)
    print("\nlatents and labels (2,) through MADFormer.forward")
    loss = common.walk(model, latents, torch.tensor([0, 1]))
    print("  loss:", {k: round(v.item(), 3) for k, v in loss.items()})
    print("  layer evaluations per block:", {steps: c.evaluations(steps) for steps in (5, 10, 25)})


if __name__ == "__main__":
    common.command(main)
