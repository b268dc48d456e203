"""D-AR: the tokens that a plain language model predicts are the steps of a diffusion decoder (Gao and Shou, 2025).

Idea      A tokenizer turns an image into N discrete tokens in K groups. A diffusion transformer on pixels turns noise
          into the image again, and looks at another group at each of its steps: the first groups while there is only
          noise, the last ones when details are left. So the tokens run from coarse to fine, and a Llama that predicts
          them one after another, with nothing changed, carries out a diffusion: as soon as a group is complete its
          step can be done, and every step gives a preview of the whole image.
Shapes    B batch, P image patches, N query tokens, K groups of q = N / K tokens, D width, n codes, V = n.
          Images (B, 3, h, w) in -1 .. 1. Codes (B, N) in 0 .. n - 1. Labels (B,) in 0 .. classes - 1.
Time      t = 0 is noise, t = 1 the image: x_t = t x_1 + (1 - t) x_0, velocity v = x_1 - x_0. There are two clocks:
          the group follows the token clock u, the network sees t = S(u) = u / (u + beta (1 - u)).
Where     Eq. 1, tokens: Tokenizer.encode             Eq. 5, 8, clocks and groups: shift, unshift, Tokenizer.starts
          Eq. 2 to 4 and 7, the loss: Tokenizer.forward           jump-estimates, Eq. 8's steps: Decoding.advance
          Eq. 6, next-token loss: Llama.forward                   Sec. 3.3, streaming: generate
Differs   The paper leaves much open; what the released code does is a Config field where both are plausible: `times`,
          `preview`, `lpips_dropout`. The table "Where paper and code differ" in the README has all points.
"""
import dataclasses
import functools
import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Recipe, Stage, UserError

HEAD = 64  # channels of an attention head, everywhere in the tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape, loss and sampler of the sequential diffusion tokenizer. The default is the published one."""
    image_size: int = 256           # pixels
    patch: int = 16                 # side of the encoder's patches, pixels
    dim: int = 768                  # D of the encoder; a multiple of 64, as are the other two
    depth: int = 8                  # encoder blocks
    queries: int = 256              # N
    query_rows: int = 1024          # rows of the tables of queries and positions, of which the first N are used
    query_rank: int = 8             # queries are made of vectors of this width
    codebook: int = 16384           # n
    code_dim: int = 8               # width of a code
    decoder_dim: int = 768          # D of the causal layers behind the quantizer
    decoder_depth: int = 8          # their number
    groups: int = 8                 # K; divides N
    beta: float = 2.0               # time shift: above 1, more tokens speak about the early, noisy steps
    pixel_patch: int = 8            # side of the diffusion decoder's patches, pixels
    pixel_dim: int = 768            # its D
    pixel_depth: int = 12           # its blocks
    data_std: float = 0.6           # sigma: images are multiplied by it before noise is added
    times: str = "shifted"          # in training: u uniform and t = S(u), "shifted" (released), or t "uniform" (Sec. 4)
    repa_layer: int = 8             # REPA looks at the stream before this block; 0: the model has no REPA head
    steps: int = 0                  # sampler defaults: diffusion steps (0: one for each group),
    solver: str = "adams"           # "euler", or "adams": two-step Adams-Bashforth
    preview: str = "solver"         # previews jump to t = 1 by the "solver's" step (released) or along "v" (Sec. 5.1)

    def __post_init__(self):
        for name, values in (("times", ("shifted", "uniform")), ("solver", ("euler", "adams")),
                             ("preview", ("solver", "v"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}, not {getattr(self, name)}")
        for name in ("dim", "decoder_dim", "pixel_dim"):
            if getattr(self, name) % HEAD:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {HEAD}")
        for name in ("patch", "pixel_patch", "groups", "queries", "codebook", "code_dim", "dim", "decoder_dim",
                     "pixel_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more")
        for name in ("patch", "pixel_patch"):
            if self.image_size % getattr(self, name):
                raise ValueError(f"image_size {self.image_size} is not divisible by {name} {getattr(self, name)}")
        if self.queries % self.groups or self.queries > self.query_rows:
            raise ValueError(f"queries {self.queries}: a multiple of {self.groups} groups, at most query_rows"
                             f" {self.query_rows}")
        if self.data_std <= 0 or self.beta <= 0 or self.steps < 0:
            raise ValueError("data_std and beta are more than 0, steps is 0 or more")


@dataclass(frozen=True)
class Config:
    """Everything: the AR model, its sampler's defaults, how the tokenizer is trained, and the tokenizer."""
    image_size: int = 256           # pixels; the tokenizer's follows
    classes: int = 1000             # label `classes` means "no label"
    dim: int = 768                  # D of the Llama
    heads: int = 12
    depth: int = 12                 # blocks
    dropout: float = 0.1            # on the embeddings, behind attention and behind the MLP, 0 .. 1
    label_drop: float = 0.1         # share of training images that lose their label, 0 .. 1
    cfg: tuple[float, ...] = (1.1, 8.0)  # guidance scale, from the first token to the last
    temperature: float = 1.0        # 0: always the most likely token
    top_k: int = 0                  # draw from the k most likely tokens; 0: from all
    top_p: float = 1.0              # draw from the most likely tokens that together have this probability
    crops: int = 10                 # training views: 10 (random scale and place for the tokenizer, ten crops for the
                                    # AR model) or 1 (the centre crop for both)
    lpips_weight: float = 0.5       # lambda_1 of Eq. 7
    lpips_dropout: float = 0.5      # in front of LPIPS' linear layers; on in released training, paper silent
    repa_weight: float = 0.5        # lambda_2 of Eq. 7
    teachers: str = field(default="", compare=False)  # folder of the LPIPS, VGG-16 and DINOv2 files (default:
                                    # where torch.hub keeps downloads)
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self):
        if self.tokenizer.image_size != self.image_size:
            object.__setattr__(self, "tokenizer", dataclasses.replace(self.tokenizer, image_size=self.image_size))
        if self.heads < 1 or self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} is not divisible into {self.heads} heads of even width")
        if self.crops not in (1, 10) or len(self.cfg) != 2:
            raise ValueError("crops is 1 or 10; cfg is a pair: first token, last token")


TINY_TOKENIZER = TokenizerConfig(
    image_size=32, patch=4, dim=128, depth=2, queries=64, query_rows=64, codebook=512, code_dim=3, decoder_dim=128,
    decoder_depth=2, pixel_patch=4, pixel_dim=128, pixel_depth=4, repa_layer=0)
ABLATION = TokenizerConfig(dim=512, decoder_dim=512, pixel_dim=512, pixel_depth=8, repa_layer=5)  # App. III; 5: a guess
PRESETS = {
    "tiny": Config(image_size=32, classes=10, dim=192, heads=3, depth=4, dropout=0.0, cfg=(4.0, 4.0), crops=1,
                   lpips_weight=0.0, repa_weight=0.0, tokenizer=TINY_TOKENIZER),
    "b": Config(tokenizer=ABLATION),
    "l": Config(dim=1024, heads=16, depth=24),
    "xl": Config(dim=1280, heads=20, depth=36, cfg=(1.1, 10.0)),
    "xxl": Config(dim=1536, heads=24, depth=48, cfg=(1.1, 10.0))}
PUBLISHED = {"b": "111M", "l": "343M", "xl": "775M", "xxl": "1.4B"}


# --- Layers of the tokenizer ------------------------------------------------------------------------------------------

def plain_norm(x):
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x, rotary):
    """Turns pairs of neighbouring channels of x (B, H, n, C) by the angles whose cos and sin are rotary (2, n, C/2)."""
    cos, sin = rotary
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def rotary_line(n, width):
    """cos and sin (2, n, width/2) of a line's positions 0 .. n - 1."""
    omega = 10000 ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.arange(n).float()[:, None] * omega
    return torch.stack([angles.cos(), angles.sin()])


def rotary_grid(side):
    """cos and sin (2, side^2, HEAD/2) of a square grid, row by row: half of the pairs turn by row, half by column."""
    omega = 10000 ** (-torch.arange(0, HEAD // 2, 2).double() / (HEAD // 2))
    along = torch.arange(side)[:, None] * omega                                            # (side, 16)
    angles = torch.cat([along.repeat_interleave(side, 0), along.repeat(side, 1)], 1)
    return torch.stack([angles.cos(), angles.sin()]).float()


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD, eps=1e-6) for _ in range(2))

    def query(self, x, rotary=None):
        """(B, H, n, 64) of x (B, n, D)."""
        q = self.q(x).unflatten(2, (-1, HEAD)).transpose(1, 2)
        q = self.q_norm(q).to(q.dtype)
        return q if rotary is None else rotate(q, rotary)

    def key_value(self, x, rotary=None):
        """Two (B, H, n, 64) of x (B, n, D)."""
        k, v = (linear(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for linear in (self.k, self.v))
        k = self.k_norm(k).to(k.dtype)
        return (k if rotary is None else rotate(k, rotary)), v

    def merge(self, x):
        """(B, n, D) of the heads (B, H, n, 64)."""
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """D -> 4D -> D with SiLU."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with gates that are zero at first. `attend(q, k, v)` decides who sees whom."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim)
        self.gate1, self.gate2 = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, x, attend, rotary=None):
        h = self.norm1(x)
        h = attend(self.attention.query(h, rotary), *self.attention.key_value(h, rotary))
        x = x + self.gate1 * self.attention.merge(h)
        return x + self.gate2 * self.mlp(self.norm2(x))


class Quantizer(nn.Module):
    """The nearest of n unit vectors (van den Oord et al., 2017; l2-normalised as in LlamaGen)."""

    def __init__(self, n, dim, window=65536):
        super().__init__()
        self.embedding = nn.Embedding(n, dim)
        self.window = window
        self.register_buffer("age", torch.full((n,), window))  # tokens since its last use

    def codewords(self):
        """(n, code_dim), of length one; what is stored need not be."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, z):
        """Of vectors z (B, N, code_dim): quantized ones with a straight-through gradient, codes (B, N), and for each
        token (B, N) the codebook loss and the commitment loss of App. I."""
        with torch.autocast(z.device.type, enabled=False):
            z, codewords = F.normalize(z.float(), dim=-1), self.codewords()
            codes = (z.detach() @ codewords.detach().T).argmax(-1)                         # unit vectors: nearest
            e = codewords[codes]
            codebook = (e - z.detach()).square().mean(-1)
            commitment = 0.25 * (e.detach() - z).square().mean(-1)
            return z + (e - z).detach(), codes, codebook, commitment

    @torch.no_grad()
    def usage(self, codes):
        """Notes these codes; the share of the codebook among the latest `window`, 0 .. 1."""
        self.age += codes.numel()
        self.age[codes.flatten()] = 0
        return (self.age < self.window).float().mean()


# --- The pixel diffusion decoder --------------------------------------------------------------------------------------

class PixelBlock(nn.Module):
    """A DiT block whose modulation differs from patch to patch: time embedding plus what the patch finds in the group.

    The cross-attention adds nothing to the stream: its result only steers AdaLN (Sec. 4).
    """

    def __init__(self, dim):
        super().__init__()
        self.time, self.condition = (nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
                                     for _ in range(2))
        self.cross, self.modulation = Attention(dim), nn.Linear(dim, 6 * dim)
        self.attention, self.mlp = Attention(dim), MLP(dim)

    def forward(self, x, time, c, rotary):                           # (B, n, D), (B or 1, D), (B, q, D)
        h = plain_norm(x)
        k, v = self.cross.key_value(plain_norm(self.condition(c)))                         # tokens: no rotation
        s = self.cross.merge(F.scaled_dot_product_attention(self.cross.query(h, rotary), k, v))
        m = self.modulation(F.silu(self.time(time)[:, None] + s))                          # (B, n, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        h = h * (1 + scale1) + shift1
        h = F.scaled_dot_product_attention(self.attention.query(h, rotary), *self.attention.key_value(h, rotary))
        x = x + gate1 * self.attention.merge(h)
        return x + gate2 * self.mlp(plain_norm(x) * (1 + scale2) + shift2)


class PixelDecoder(nn.Module):
    """Velocity v = D_FM(x_t, t, c) of Eq. 2, on patches of pixels."""

    def __init__(self, config):
        super().__init__()
        D, channels = config.pixel_dim, 3 * config.pixel_patch**2
        self.config = config
        self.condition = nn.Linear(config.decoder_dim, D)
        self.input, self.output = nn.Linear(channels, D), nn.Linear(D, channels)
        self.blocks = nn.ModuleList(PixelBlock(D) for _ in range(config.pixel_depth))
        if config.repa_layer:
            self.repa = nn.Sequential(nn.Linear(D, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(),
                                      nn.Linear(2048, 768))
        self.register_buffer("rotary", rotary_grid(config.image_size // config.pixel_patch), persistent=False)

    def forward(self, x, t, c, repa=False):
        """Velocity (B, 3, h, w) of x (B, 3, h, w) at t (B,) or (1,) in 0 .. 1, for a group c (B, q, decoder_dim); and
        features (B, 256, 768) to be aligned with DINOv2's, if asked for."""
        D, p = self.config.pixel_dim, self.config.pixel_patch
        angles = 1000 * t[:, None] * 10000 ** (-torch.arange(D // 2, device=t.device) / (D // 2))
        time = torch.cat([angles.cos(), angles.sin()], 1)                                  # (B or 1, D)
        c = plain_norm(self.condition(c))                                                  # (B, q, D)
        x, features = self.input(F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)), None  # (B, n, D)
        for i, block in enumerate(self.blocks):
            if repa and i == self.config.repa_layer:
                grid = x.transpose(1, 2).unflatten(2, (self.config.image_size // p, -1))
                pooled = F.avg_pool2d(grid, grid.shape[2] // 16).flatten(2).transpose(1, 2)
                features = self.repa(pooled)                                               # (B, 256, 768)
            x = block(x, time, c, self.rotary)
        x = self.output(plain_norm(x)).float().transpose(1, 2)
        return F.pixel_shuffle(x.unflatten(2, (self.config.image_size // p, -1)), p), features


# --- The tokenizer ----------------------------------------------------------------------------------------------------

def shift(u, beta):
    """Model time t = S(u) of token time u, Eq. 8: slower near noise for beta above 1."""
    return u / (u + beta * (1 - u))


def unshift(t, beta):
    """Token time u of model time t, Eq. 5."""
    return t / (t + (1 - t) / beta)


class Tokenizer(nn.Module):
    """Image to codes and back: encoder, quantizer, causal layers, pixel diffusion decoder.

    encode: images (B, 3, h, w) to codes (B, N); decode: codes, or their first ones, to images. In training `judges`
    are an LPIPS network and DINOv2, each with its weight, or None: then that loss is left out.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.judges, self.lpips_dropout = (None, None), 0.5  # a tuple: what it holds is no part of this module
        self.patchify = nn.Conv2d(3, c.dim, c.patch, c.patch)
        self.query_table = nn.Embedding(c.query_rows, c.query_rank)
        self.query_linear = nn.Linear(c.query_rank, c.dim)
        self.encoder_layers = nn.ModuleList(Block(c.dim) for _ in range(c.depth))
        self.to_code = nn.Linear(c.dim, c.code_dim, bias=False)
        self.quantizer = Quantizer(c.codebook, c.code_dim)
        self.from_code = nn.Linear(c.code_dim, c.decoder_dim, bias=False)
        self.positions = nn.Embedding(c.query_rows, c.decoder_dim)
        self.decoder_layers = nn.ModuleList(Block(c.decoder_dim) for _ in range(c.decoder_depth))
        self.pixels = PixelDecoder(c)
        still = torch.stack([torch.ones(c.queries, HEAD // 2), torch.zeros(c.queries, HEAD // 2)])  # queries: unturned
        self.register_buffer("rotary", torch.cat([rotary_grid(c.image_size // c.patch), still], 1), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Released initialisation: blocks begin as the identity, the velocity as zero. Blocks narrower than the
        released ones, 768, get larger weights: with 0.02 for all, `tiny` learns markedly slower."""
        c = self.config
        for layers, width in ((self.encoder_layers, c.dim), (self.decoder_layers, c.decoder_dim),
                              (self.pixels.blocks, c.pixel_dim)):
            for linear in (part for part in layers.modules() if isinstance(part, nn.Linear)):
                nn.init.trunc_normal_(linear.weight, std=0.02 * math.sqrt(768 / min(width, 768)))
                nn.init.zeros_(linear.bias)
        for block in self.pixels.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.pixels.output.weight)
        nn.init.zeros_(self.pixels.output.bias)
        nn.init.trunc_normal_(self.query_table.weight)
        nn.init.trunc_normal_(self.positions.weight, std=0.02)
        codes = self.quantizer.embedding.weight
        codes.copy_(F.normalize(codes.uniform_(-1 / len(codes), 1 / len(codes)), dim=-1))

    def features(self, images):
        """What the encoder knows at the N queries, (B, N, D). Patches see patches; query j sees them and queries up to
        j, so that token j never depends on a later one."""
        N = self.config.queries
        patches = plain_norm(self.patchify(images).flatten(2).transpose(1, 2))             # (B, P, D)
        queries = self.query_linear(self.query_table.weight[:N]).expand(len(images), -1, -1)
        P = patches.shape[1]
        mask = torch.ones(N, P + N, dtype=torch.bool, device=images.device).tril(P)

        def attend(q, k, v):
            seen = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P])
            return torch.cat([seen, F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=mask)], 2)

        x = torch.cat([patches, queries.to(patches.dtype)], 1)                             # (B, P + N, D)
        for layer in self.encoder_layers:
            x = layer(x, attend, self.rotary)
        return plain_norm(x[:, P:])

    def encode(self, images):
        """Codes (B, N) of images (B, 3, h, w), Eq. 1, as the smallest integers that hold them."""
        codes = self.quantizer(self.to_code(self.features(images)))[1]
        return codes.to(torch.int16 if self.config.codebook <= 2**15 else torch.int32)

    def condition(self, z, past=None):
        """z' (B, n, decoder_dim) of the next n code vectors z (B, n, code_dim), and every layer's keys and values so
        far. `past` are those of the tokens before, () at the first ones: causal layers can take tokens as they come.
        None: these are all, and no keys and values are kept."""
        begin = past[0][0].shape[2] if past else 0
        x, kept = self.from_code(z) + self.positions.weight[begin:begin + z.shape[1]], []

        def attend(q, k, v):
            if past:
                k, v = (torch.cat(pair, 2) for pair in zip(past[len(kept)], (k, v)))
            if past is not None:
                kept.append((k, v))
            if not begin:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(begin)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        for layer in self.decoder_layers:
            x = layer(x, attend)
        return plain_norm(x), kept

    def starts(self, u):
        """First token of the group that speaks at token times u (...,) in [0, 1): the nearest of the times j / K of
        Eq. 8, halves up; the last group also has what lies behind it."""
        c = self.config
        group = torch.floor(u * c.groups + 0.5).long()
        return (group * (c.queries // c.groups)).clamp(max=c.queries - c.queries // c.groups)

    def forward(self, images, labels=None, *, u=None, noise=None):
        """Training loss, Eq. 7. u (B,) in [0, 1) and noise x_0 (like images) are drawn unless given.

        The quantizer's losses count the tokens up to the end of the group that u names: nothing else is asked of the
        others. usage: share of the codebook among the latest codes; dead: share of positions with the same code in
        all images of the batch.
        """
        c, B = self.config, len(images)
        u = torch.rand(B, device=images.device) if u is None else u
        x_0 = torch.randn_like(images) if noise is None else noise
        if c.times == "shifted":
            t = shift(u, c.beta)
        else:
            t, u = u, unshift(u, c.beta)                                                   # Eq. 5
        z, codes, codebook, commitment = self.quantizer(self.to_code(self.features(images)))
        q = c.queries // c.groups
        tokens = self.starts(u)[:, None] + torch.arange(q, device=u.device)                # (B, q)
        counted = torch.arange(c.queries, device=u.device) <= tokens[:, -1:]               # (B, N)
        group = self.condition(z)[0].gather(1, tokens[..., None].expand(-1, -1, c.decoder_dim))  # c(t), Eq. 5

        x_1 = c.data_std * images
        s = t[:, None, None, None]
        x_t = s * x_1 + (1 - s) * x_0                                                      # Eq. 3
        lpips, repa = self.judges
        v, aligned = self.pixels(x_t, t, group, repa is not None)
        out = {"flow": F.mse_loss(v, x_1 - x_0) / c.data_std**2,                           # Eq. 2, in units of images
               "codebook": (codebook * counted).sum() / counted.sum(),
               "commitment": (commitment * counted).sum() / counted.sum()}
        loss = out["flow"] + out["codebook"] + out["commitment"]
        if lpips:
            guess = (x_t + (1 - s) * v) / c.data_std                                       # the image, if v were right
            network, weight = lpips
            out["lpips"] = network(images, guess, self.lpips_dropout * self.training).sum(0).mean()
            loss = loss + weight * out["lpips"]
        if repa:
            network, weight = repa
            out["repa"] = (1 - F.cosine_similarity(aligned.float(), dino_features(network, images), dim=-1)).mean()
            loss = loss + weight * out["repa"]
        elif c.repa_layer:
            loss = loss + 0 * sum(p.sum() for p in self.pixels.repa.parameters())          # DDP wants all gradients
        if self.training:
            out["usage"] = self.quantizer.usage(codes)
            out["dead"] = (codes == codes[:1]).all(0).float().mean()
        return {"loss": loss, **out}

    @torch.no_grad()
    def decode(self, codes, noise, *, steps=None, solver=None, preview=None, on_step=None):
        """Images (B, 3, h, w), not clamped, of codes (B, N) or of their first n, from standard normal noise
        (B, 3, h, w). Of n < N tokens it is the preview after the steps that they allow. For on_step see Decoding."""
        decoding = Decoding(self, noise, steps, solver, preview, on_step)
        for end in sorted({end for end in decoding.ends if end <= codes.shape[1]}):
            decoding.take(codes[:, :end])
        return decoding.image


class Decoding:
    """A batch of images on the way from noise: takes tokens as they come, does the steps that they allow.

    steps, solver and preview default to the tokenizer's config. on_step(k, images) gets the preview (B, 3, h, w) after
    step k = 1 .. steps, not clamped. `ends` are the token counts at which a step becomes possible, in order; `image`
    is the latest preview, and the result after the last step.
    """

    def __init__(self, tokenizer, noise, steps=None, solver=None, preview=None, on_step=None):
        c = tokenizer.config
        c = dataclasses.replace(c, steps=steps or c.steps or c.groups, solver=solver or c.solver,
                                preview=preview or c.preview)
        self.tokenizer, self.config, self.on_step = tokenizer, c, on_step
        u = torch.arange(c.steps, dtype=torch.float64) / c.steps                           # Eq. 8
        self.starts = tokenizer.starts(u).tolist()
        self.ends = [start + c.queries // c.groups for start in self.starts]
        self.times = [*shift(u, c.beta).tolist(), 1.0]
        self.x, self.image = noise, noise / c.data_std
        self.z, self.past, self.done, self.before = None, (), 0, None

    def take(self, codes):
        """codes (B, n): all tokens so far, old and new."""
        known = 0 if self.z is None else self.z.shape[1]
        new, self.past = self.tokenizer.condition(self.tokenizer.quantizer.codewords()[codes[:, known:].long()],
                                                  self.past)
        self.z = new if self.z is None else torch.cat([self.z, new], 1)
        while self.done < self.config.steps and self.ends[self.done] <= self.z.shape[1]:
            self.advance()

    def advance(self):
        """One step of the solver, and the preview: the same step, but straight to t = 1."""
        c, i = self.config, self.done
        t, h = self.times[i], self.times[i + 1] - self.times[i]
        group = self.z[:, self.starts[i]:self.ends[i]]
        v = self.tokenizer.pixels(self.x, torch.full((1,), t, device=self.x.device), group)[0]
        w = v
        if self.before is not None and c.solver == "adams":
            w = 1.5 * v - 0.5 * self.before  # as for equal steps; S is smooth, so the order is 2 on unequal ones, too
        self.image = (self.x + (1 - t) * (w if c.preview == "solver" or i == c.steps - 1 else v)) / c.data_std
        self.x, self.before, self.done = self.x + h * w, v, i + 1
        if self.on_step:
            self.on_step(self.done, self.image)


# --- Networks that judge the tokenizer while it is trained ------------------------------------------------------------

class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al., 2018): VGG-16 features, weighted squared differences."""
    TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            c_in = width or c_in
        self.features = nn.Sequential(*layers)
        self.lin = nn.ParameterList(torch.empty(1, c, 1, 1) for c in (64, 128, 256, 512, 512))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def taps(self, x):
        """The five feature maps of images (B, 3, h, w) in -1 .. 1; h and w are 16 or more."""
        x, taps = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            taps += [x] if i in self.TAPS else []
        return taps

    def forward(self, x, y, dropout=0.0):
        """The five parts (5, B) of the distance; it is their sum. dropout: of the weighted channels, in training."""
        parts = []
        with torch.autocast(x.device.type, enabled=False):
            x, y = (images.to(self.shift.dtype) for images in (x, y))
            for a, b, weight in zip(self.taps(x), self.taps(y), self.lin, strict=True):
                a, b = (f / ((f.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10) for f in (a, b))
                parts.append((F.dropout((a - b).square(), dropout) * weight).sum(1).mean((1, 2)))
        return torch.stack(parts)


@torch.no_grad()
def dino_features(network, images):
    """DINOv2's patch features (B, 256, 768) of images (B, 3, h, w) in -1 .. 1, at 224 pixels."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                                              (0.229, 0.224, 0.225)))
    x = F.interpolate((0.5 * images + 0.5 - mean) / std, (224, 224), mode="bicubic")
    return network.forward_features(x)["x_norm_patchtokens"].float()


NETWORKS = {  # published files: (where from, first digits of the SHA-256, MD5)
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/", "397923af", None),
    "vgg.pth": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/", "",
                "d507d7349b931f0638a25a48a722f98a"),
    "dinov2_vitb14_pretrain.pth": ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/", "", None)}


def published(file, folder):
    """The entries of a published file, from the folder or downloaded into it. Raises UserError if it cannot be had."""
    source, sha256, md5 = NETWORKS[file]
    path = Path(folder or Path(torch.hub.get_dir(), "checkpoints"), file)
    common.download(source, path, sha256, f"name the folder of {', '.join(NETWORKS)} with --set teachers=FOLDER, or"
                                          " train without LPIPS and REPA: --set lpips_weight=0 repa_weight=0")
    if md5 and hashlib.md5(path.read_bytes()).hexdigest() != md5:
        raise UserError(f"{path} is not the published file (MD5 {md5}); delete it and it is downloaded again")
    return common.read(path)


def load_lpips(folder=""):
    """LPIPS with the published weights."""
    return lpips_from_states(published("vgg16-397923af.pth", folder), published("vgg.pth", folder))


def lpips_from_states(vgg, lin):
    """LPIPS of a VGG-16 state dict (features.*) and the five linear layers (lin0.model.1.weight ...)."""
    network = LPIPS()
    state = {k: v for k, v in vgg.items() if k.startswith("features.")}
    common.load_strict(network, {**state, **{re.sub(r"lin(\d).*", r"lin.\1", k): v for k, v in lin.items()}}, "LPIPS")
    return network


def load_dino(folder=""):
    """DINOv2 ViT-B/14: its code by torch.hub, its weights as data. Raises UserError when they cannot be had."""
    state = published("dinov2_vitb14_pretrain.pth", folder)
    try:
        with common.rank_zero_first():
            network = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14", pretrained=False, trust_repo=True,
                                     verbose=False)
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise UserError(f"torch.hub cannot load facebookresearch/dinov2 ({str(error).splitlines()[0]}); --set"
                        " repa_weight=0 trains without it") from None
    common.load_strict(network, state, "dinov2_vitb14_pretrain.pth")
    return network.eval().requires_grad_(False)


# --- The AR model -----------------------------------------------------------------------------------------------------

class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions.

    For a single token: `cache` (2, B, H, places, C) has keys and values of earlier ones and gets those of this one, at
    place `at` (1,); mask (1, places) says which places are seen, None: all.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.wqkv, self.wo = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x, rotary, cache=None, at=None, mask=None):                          # (B, n, D)
        q, k, v = self.wqkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # (B, H, n, C) each
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:                                                              # n = 1
            cache[0].index_copy_(2, at, k.to(cache.dtype))
            cache[1].index_copy_(2, at, v.to(cache.dtype))
            k, v = cache
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        return self.wo(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) * w3 x), two thirds of 4D wide, rounded up to a multiple of 256."""

    def __init__(self, dim):
        super().__init__()
        hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.attention_norm, self.attention = nn.RMSNorm(dim, eps=1e-5), LlamaAttention(dim, heads)
        self.ffn_norm, self.feed_forward = nn.RMSNorm(dim, eps=1e-5), FeedForward(dim)

    def forward(self, x, rotary, *cached):
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, *cached))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Llama(nn.Module):
    """A language model of codes with the class as its first token (Touvron et al., 2023; LlamaGen): p(z) of Eq. 6."""

    def __init__(self, config):
        super().__init__()
        c, V = config, config.tokenizer.codebook
        self.config = config
        self.class_embed = nn.Embedding(c.classes + 1, c.dim)                              # the last one: no label
        self.token_embed = nn.Embedding(V, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(LlamaBlock(c.dim, c.heads, c.dropout) for _ in range(c.depth))
        self.norm, self.output = nn.RMSNorm(c.dim, eps=1e-5), nn.Linear(c.dim, V, bias=False)
        self.register_buffer("rotary", rotary_line(c.tokenizer.queries, c.dim // c.heads), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # every token is equally likely at first
        self.kept, self.stride = None, 1  # see compile_steps: a step looks at a multiple of `stride` places

    def logits(self, codes, labels):
        """Logits (B, N, V) of all tokens of codes (B, N): those of token i come from the label and tokens before i."""
        x = torch.cat([self.class_embed(labels)[:, None], self.token_embed(codes[:, :-1])], 1)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, self.rotary[:, :x.shape[1]])                                      # (B, N, D)
        return self.output(self.norm(x)).float()

    def forward(self, codes, labels, *, drop=None):
        """Next-token loss, Eq. 6, for codes (B, N) and labels (B,); accuracy: share of tokens that were the most likely
        ones. drop (B,) bool, which images lose their label, is drawn unless given."""
        if drop is None:
            drop = torch.rand(len(labels), device=labels.device) < self.config.label_drop * self.training
        logits = self.logits(codes, torch.where(drop, self.config.classes, labels)).flatten(0, 1)
        return {"loss": F.cross_entropy(logits, codes.flatten()),
                "accuracy": (logits.argmax(-1) == codes.flatten()).float().mean()}

    def step(self, x, cache, at, end, mask=None):
        """Logits (B, V) of token `at` (1,) from the embedding x (B, D) of the one before. cache (layers, 2, B or more,
        H, N, C): keys and values of those before, within `end` places; mask (1, end): which of these are filled."""
        x, rotary = x[:, None], self.rotary[:, at]
        for layer, kept in zip(self.layers, cache):
            x = layer(x, rotary, kept[:, :len(x), :, :end], at, mask)
        return self.output(self.norm(x[:, 0])).float()

    def settings(self, cfg, interval, temperature, top_k, top_p):
        """Guidance scale of each token, and the filter's settings; what is None comes from the config."""
        c, N = self.config, self.config.tokenizer.queries
        cfg, temperature, top_k, top_p = (getattr(c, name) if value is None else value for name, value in
                                          (("cfg", cfg), ("temperature", temperature), ("top_k", top_k),
                                           ("top_p", top_p)))
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UserError("temperature and top-k are 0 or more, top-p is more than 0 and at most 1")
        scales = [g if interval[0] <= i / N <= interval[1] else 1.0
                  for i, g in enumerate(common.guidance_scales(cfg, N))]
        return scales, (temperature, top_k, top_p)

    @torch.no_grad()
    def sample(self, labels, noise, *, cfg=None, interval=(0.0, 1.0), temperature=None, top_k=None, top_p=None,
               prefix=None, tokens=None, on_token=None):
        """Codes (B, N) for labels (B,), or their first `tokens`, one after another with a cache of keys and values.

        What is not given comes from the config. cfg: guidance scale of the logits, a number or a pair (first token,
        last token); 1 is off, 0 unconditional; it acts while i / N is in `interval`. prefix (B, N): tokens that are
        given, -1 where they are free. on_token(n, codes) is called when n tokens are there. Nothing in the loop waits
        for the device. Raises UserError for settings out of range.
        """
        B, N = len(labels), tokens or self.config.tokenizer.queries
        scales, filters = self.settings(cfg, interval, temperature, top_k, top_p)
        guided = 1 + max((i for i, g in enumerate(scales[:N]) if g != 1), default=-1)      # tokens up to the last one
        rows = torch.cat([labels, torch.full_like(labels, self.config.classes)]) if guided else labels
        x, draws = self.class_embed(rows), noise.uniform((self.config.tokenizer.queries,))
        C, H = self.config.dim // self.config.heads, self.config.heads
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        cache = common.zeros(self.kept, (len(self.layers), 2, len(rows), H, N, C), x, dtype)
        codes, places = torch.zeros(B, N, dtype=torch.long, device=x.device), torch.arange(N, device=x.device)
        seen = places <= places[:, None]                                                   # (N, N)
        for i in range(N):
            if i == guided:
                x = x[:B]  # from here on nobody looks at the unconditional half
            end = min(-(-(i + 1) // self.stride) * self.stride, N)                         # only what is filled
            logits = self.step(x, cache, places[i:i + 1], end, seen[i:i + 1, :end] if self.stride > 1 else None)
            if i < guided:
                logits, null = logits.chunk(2)
                logits = null + scales[i] * (logits - null)
            token = pick(probabilities(logits, *filters), draws[:, i])
            if prefix is not None:
                token = torch.where(prefix[:, i] < 0, token, prefix[:, i])
            codes[:, i] = token
            x = self.token_embed(token).repeat(len(x) // B, 1)
            if on_token:
                on_token(i + 1, codes)
        return codes

    @torch.no_grad()
    def sample_plainly(self, labels, noise, *, cfg=None, interval=(0.0, 1.0), temperature=None, top_k=None, top_p=None):
        """The same codes as `sample`, as plainly as possible: all tokens go through the network again for each one."""
        N = self.config.tokenizer.queries
        scales, filters = self.settings(cfg, interval, temperature, top_k, top_p)
        codes, draws = torch.zeros(len(labels), N, dtype=torch.long, device=labels.device), noise.uniform((N,))
        for i in range(N):
            logits, null = (self.logits(codes[:, :i + 1], y)[:, i]
                            for y in (labels, torch.full_like(labels, self.config.classes)))
            logits = null + scales[i] * (logits - null)
            codes[:, i] = pick(probabilities(logits, *filters), draws[:, i])
        return codes


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What tokens are drawn from, (B, V) of logits (B, V): divided by the temperature, without those below the k-th,
    without those behind the first ones that have probability p together."""
    logits = logits / max(temperature, 1e-5)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        behind = share.cumsum(-1) - share > top_p  # the one that crosses p stays
        logits = logits.masked_fill(torch.zeros_like(behind).scatter(1, order, behind), -math.inf)
    return logits.softmax(-1)


def pick(probs, u):
    """One token (B,) for each row of probs (B, V), by u (B,) in [0, 1) and the cumulated probabilities."""
    rising = probs.cumsum(-1)
    total = rising.amax(-1)
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))     # rounding never leads past
    reached = (rising > target[:, None]) & (probs > 0)  # on CUDA a cumulated sum may waver where nothing is added
    return reached.float().argmax(-1)                                                      # the first


def compile_steps(model, tokenizer):
    """Compiles what sampling repeats: the step of a token and that of the pixel decoder.

    A token's step is recorded for every 32nd length, not for every one. The decoder's is not recorded: it may run
    beside it, on another stream, and recorded graphs share their memory.
    """
    model.step, model.kept, model.stride = common.compiled(model.step), {}, min(32, model.config.tokenizer.queries)
    tokenizer.pixels.compile()


@functools.cache
def side_stream(device):
    """The CUDA stream that images are decoded on beside the tokens."""
    return torch.cuda.Stream(device)


# --- Both together ----------------------------------------------------------------------------------------------------

def generate(model, tokenizer, labels, noise, *, prefix=None, tokens=None, steps=None, solver=None, preview=None,
             on_step=None, **options):
    """Images (B, 3, h, w) in -1 .. 1 for labels (B,), and a dict of facts (none here).

    A group's diffusion step is done as soon as its tokens are there, on CUDA beside the next tokens (Sec. 3.3).
    on_step(images): the preview after each step, while later tokens are still unknown. tokens: stop after so many and
    return the preview (Table 5). prefix (B, N): tokens that are given (Fig. 6). options: see Llama.sample.
    """
    c = tokenizer.config
    if tokens is not None and not c.queries // c.groups <= tokens <= c.queries:
        raise UserError(f"{tokens} tokens: a picture needs from {c.queries // c.groups} (one group) to {c.queries}")
    start = noise.normal((3, c.image_size, c.image_size))
    watch = on_step and (lambda k, images: on_step(images.clamp(-1, 1)))
    decoding = Decoding(tokenizer, start, steps, solver, preview, watch)
    side = side_stream(start.device) if start.device.type == "cuda" else None

    def on_token(n, codes):
        if n in decoding.ends:
            if side is None:
                decoding.take(codes[:, :n])
                return
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                decoding.take(codes[:, :n])

    model.sample(labels, noise, prefix=prefix, tokens=tokens, on_token=on_token, **options)
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
        decoding.image.record_stream(torch.cuda.current_stream())
    return decoding.image.clamp(-1, 1), {}


def check(model, tokenizer):
    """Raises UserError if the model speaks another language than the tokenizer."""
    has, needs = ((c.queries, c.codebook, c.image_size) for c in (tokenizer.config, model.config.tokenizer))
    if has != needs:
        raise UserError("the tokenizer has {} tokens of {} codes for {} pixels, ".format(*has)
                        + "the model needs {} of {} for {}".format(*needs))


# --- Stages: what is trained, in order, and how -----------------------------------------------------------------------

def judged(tokenizer, config):
    """Gives the tokenizer the networks that its loss asks for. Raises UserError if they cannot be had."""
    c = config.tokenizer
    grid = c.image_size // c.pixel_patch
    if config.repa_weight and (grid % 16 or not 0 < c.repa_layer < c.pixel_depth):
        raise UserError(f"REPA needs a grid of 16, 32, ... patches (this one has {grid}) and repa_layer below"
                        " pixel_depth; --set repa_weight=0 trains without")
    if not (config.lpips_weight or config.repa_weight) and not int(os.environ.get("RANK", 0)):
        print("the tokenizer is trained without LPIPS and REPA (lpips_weight and repa_weight are 0)")
    device = tokenizer.positions.weight.device
    tokenizer.lpips_dropout = config.lpips_dropout
    tokenizer.judges = tuple((load(config.teachers).to(device), weight) if weight else None for load, weight in
                             ((load_lpips, config.lpips_weight), (load_dino, config.repa_weight)))


@torch.no_grad()
def reconstructions(tokenizer, first, images, labels, noise):
    """Images and what the tokenizer makes of them, in turn."""
    decoded = tokenizer.decode(tokenizer.encode(images), noise.normal(images.shape[1:]))
    return torch.stack([images, decoded], 1).flatten(0, 1)


def load_tokenizer(path):
    """A tokenizer from a file of this project or a released one. Raises UserError if it does not fit."""
    content = common.read(path)
    with common.foreign(path, "not a tokenizer"):
        if "stage" not in content:
            tokenizer = load_official(path)
            if isinstance(tokenizer, Tokenizer):
                return tokenizer
        if content.get("stage") != "tokenizer":
            raise UserError(f"{path} holds an AR model, not a tokenizer")
        tokenizer = Tokenizer(common.rebuild(TokenizerConfig, content["config"]["tokenizer"], path))
        common.load_strict(tokenizer, content["model"], path)
        return tokenizer.eval().requires_grad_(False)


IMAGENET = 1281167  # training images: the paper counts the tokenizer's training in steps
PAPER_TOKENIZER = Recipe(lr=2e-4, batch=1024, epochs=210_000 * 1024 / IMAGENET, warmup=500 / 210_000, weight_decay=0.0,
                         clip=1.0, ema=0.999)
PAPER_AR = Recipe(lr=4e-4, batch=1024, epochs=300, decay=50 / 300, final=1e-5 / 4e-4, weight_decay=0.05, clip=1.0)
TOKENIZER = Stage(
    "tokenizer", build=lambda c: Tokenizer(c.tokenizer), ready=judged, load=load_tokenizer, preview=reconstructions,
    carry=lambda name, old, shape: None,
    recipes={"tiny": Recipe(lr=3e-3, batch=16, epochs=1.6, warmup=0.02, decay=0.4, weight_decay=0.0, clip=1.0,
                            ema=0.998),
             "b": dataclasses.replace(PAPER_TOKENIZER, batch=256, epochs=50_000 * 256 / IMAGENET, warmup=500 / 50_000),
             **dict.fromkeys(("l", "xl", "xxl"), PAPER_TOKENIZER)},
    augment=lambda c: common.random_scale_crop if c.crops == 10 else common.centre_crop)
AR = Stage(
    "ar", build=Llama, first="tokenizer", codes=lambda tokenizer, codes: codes.long(),
    recipes={"tiny": Recipe(lr=2e-3, batch=64, epochs=1.1, warmup=0.03, decay=0.5, weight_decay=0.05, clip=1.0,
                            ema=0.998),
             "b": dataclasses.replace(PAPER_AR, epochs=50), **dict.fromkeys(("l", "xl", "xxl"), PAPER_AR)},
    augment=lambda c: common.one_of_ten_crops if c.crops == 10 else common.centre_crop,
    views=lambda c: common.ten_crops if c.crops == 10 else common.centre_only,
    carry=lambda name, old, shape: None,
    preview=lambda model, tokenizer, images, labels, noise: generate(model, tokenizer, labels, noise)[0])
STAGES = [TOKENIZER, AR]


# --- Released checkpoints ---------------------------------------------------------------------------------------------

RELEASED = [  # released name -> ours
    (r"^query_embedding", "query_table"), (r"^quant_in_conv", "to_code"), (r"^quant_out_conv", "from_code"),
    (r"^quantize\.", "quantizer."), (r"^decoder_embedding", "positions"), (r"^diff_decoder\.net\.", "pixels."),
    (r"cond_mlp", "condition"), (r"conv_in", "input"), (r"conv_out", "output"), (r"repa_out", "repa"),
    (r"cross_attn", "cross"), (r"adaLN_modulation\.1", "modulation"), (r"time_embed\.mlp", "time"),
    (r"cond_embed", "condition"),
    (r"^cls_embedding\.embedding_table", "class_embed"), (r"^tok_embeddings", "token_embed")]
FIELDS = {  # released configuration -> ours, for what shapes do not tell
    "num_all_queries": "queries", "num_query_groups": "groups", "num_denoising_steps": "steps",
    "sampling_resolution": "image_size", "time_shift": "beta", "data_std": "data_std", "repa_layer": "repa_layer"}


def renamed(state):
    """A released state dict under this file's names, in float32; 1x1 convolutions are linear layers here."""
    state = {re.sub(r"^(_orig_mod\.|module\.)+", "", k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    state.pop("quantize.codebook_used", None)  # a monitor
    for old, new in RELEASED:
        state = {re.sub(old, new, k): v for k, v in state.items()}
    return {k: (v[:, :, 0, 0] if v.shape[2:] == (1, 1) else v).float() for k, v in state.items()}


def load_official(path, **overrides):
    """The tokenizer or the AR model in a released checkpoint (or one of LlamaGen's layout), ready to use.

    The tokenizer's EMA weights if the file has them; an AR file's plain ones, as its authors do. The configuration
    comes from the shapes and, for what shapes do not tell, from the one in the file, else the published one. overrides:
    fields of TokenizerConfig or Config. Strict: raises UserError for an entry that is missing, extra or misshapen.
    """
    content = common.read(path)
    with common.foreign(path, "not a D-AR checkpoint"):
        plain = next((content[k] for k in ("model", "module", "state_dict") if isinstance(content.get(k), dict)), None)
        state = plain or content.get("ema") or content
        if not any("quant_in_conv" in k for k in state):
            return ar_from_released(state, path, **overrides)
        config = content.get("config", {})
        config = config if isinstance(config, dict) else getattr(config, "_data", {})
        return tokenizer_from_released(content.get("ema") or state, config.get("model", {}), path, **overrides)


def count(pattern, state):
    """How many layers have names that begin like this."""
    return 1 + max(int(m[1]) for m in (re.match(pattern, k) for k in state) if m)


def tokenizer_from_released(state, released=None, path="the checkpoint", **overrides):
    """The tokenizer of a released state dict. released: its configuration, a dict (see load_official)."""
    state = renamed(state)
    released = {**(released or {}), **(released or {}).get("diff_decoder", {})}
    given = {FIELDS[k]: v for k, v in released.items() if k in FIELDS}
    expected = {"vq_enable": True, "query_low_rank": True, "mlp_head": False, "share_time_encoding": False,
                "rope_base_len": 10000, "output_resolution": 0,
                "queries_per_step": given.get("queries", 256) // given.get("groups", 8)}
    try:
        if odd := [k for k, v in expected.items() if released.get(k, v) != v]:
            raise ValueError(f"no published model has this {', '.join(odd)}")
        shape = {k: v.shape for k, v in state.items()}
        found = dict(patch=shape["patchify.weight"][2], dim=shape["patchify.weight"][0],
                     depth=count(r"encoder_layers\.(\d+)", state), query_rows=shape["query_table.weight"][0],
                     query_rank=shape["query_table.weight"][1], codebook=shape["quantizer.embedding.weight"][0],
                     code_dim=shape["quantizer.embedding.weight"][1], decoder_dim=shape["from_code.weight"][0],
                     decoder_depth=count(r"decoder_layers\.(\d+)", state), pixel_dim=shape["pixels.input.weight"][0],
                     pixel_patch=math.isqrt(shape["pixels.input.weight"][1] // 3),
                     pixel_depth=count(r"pixels\.blocks\.(\d+)", state))
        if "pixels.repa.0.weight" not in state:
            found["repa_layer"] = 0
        tokenizer = Tokenizer(TokenizerConfig(**{**given, **found, **overrides}))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a D-AR tokenizer ({error})") from None
    common.load_strict(tokenizer, {**state, "quantizer.age": tokenizer.quantizer.age}, path)
    return tokenizer.eval().requires_grad_(False)


def ar_from_released(state, path="the checkpoint", **overrides):
    """The AR model of a released state dict (see load_official)."""
    state = renamed(state)
    try:
        V, D = state["token_embed.weight"].shape
        preset = next((p for p in PRESETS.values() if p.dim == D and p.depth > 4), Config())
        fields = dict(dim=D, depth=count(r"layers\.(\d+)", state), heads=max(D // HEAD, 1), cfg=preset.cfg,
                      lpips_weight=0.0, repa_weight=0.0, classes=len(state["class_embed.weight"]) - 1)
        tokenizer = TokenizerConfig(codebook=V)
        model = Llama(Config(**{"tokenizer": tokenizer, **fields, **overrides}))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a D-AR checkpoint ({error})") from None
    common.load_strict(model, state, path)
    return model.eval()


def main():
    """Prints the presets with their parameter counts, and walks one batch through the tiny one."""
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        print("tokenizer  N  K  codes  D (encoder, causal, pixels)  blocks    parameters  without REPA head  published")
        for name, c in (("tiny", TINY_TOKENIZER), ("b", ABLATION), ("others", TokenizerConfig())):
            whole, plain = (parameters(Tokenizer(dataclasses.replace(c, repa_layer=r))) for r in (c.repa_layer, 0))
            print(f"{name:7s} {c.queries:4d} {c.groups:2d} {c.codebook:6d}   {c.dim:7d} {c.decoder_dim:7d}"
                  f" {c.pixel_dim:7d}   {c.depth:2d}, {c.decoder_depth}, {c.pixel_depth:2d} {whole:13,d} {plain:18,d}"
                  f"  {dict(others='300M', b='113M').get(name, '-'):>9s}")
        print("\nAR model  D  heads  blocks     parameters  published")
        for name, c in PRESETS.items():
            print(f"{name:6s} {c.dim:4d} {c.heads:6d} {c.depth:7d} {parameters(Llama(c)):14,d}"
                  f"  {PUBLISHED.get(name, '-'):>9s}")
    config = PRESETS["tiny"]
    print("\nTokenizer: images (2, 3, 32, 32) through Tokenizer.forward")
    tokenizer = Tokenizer(config.tokenizer)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    loss = common.walk(tokenizer, images)
    print("  loss:", {k: round(v.item(), 3) for k, v in loss.items()})
    codes = tokenizer.encode(images).long()
    print(f"\nAR model: codes {tuple(codes.shape)} and labels (2,) through Llama.forward")
    loss = common.walk(Llama(config), codes, torch.tensor([0, 1]))
    print("  loss:", {k: round(v.item(), 3) for k, v in loss.items()})


if __name__ == "__main__":
    common.command(main)
