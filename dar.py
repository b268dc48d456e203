"""D-AR: a plain language model predicts tokens that are steps of a diffusion (Gao and Shou, 2025).

Idea     A tokenizer encodes an image as N discrete tokens in K groups. A diffusion transformer on
         pixels decodes them, and each of its steps is conditioned on one group: early groups while
         the image is mostly noise, late groups when only details are missing. So the tokens are
         ordered from coarse to fine, and an unmodified Llama that predicts them one by one carries
         out a diffusion: once a group is complete its step can be taken, and every step gives a
         preview of the whole image.
Shapes   B batch, P image patches, N query tokens, K groups of q = N / K tokens, V codes.
         Images (B, 3, h, w) in -1 .. 1, codes (B, N) in 0 .. V - 1, labels (B,) below `classes`.
Time     t = 0 is noise, t = 1 the image: x_t = t x_1 + (1 - t) x_0, velocity v = x_1 - x_0. There
         are two clocks: token time u (t' in Eq. 5) selects the group, model time t = S(u) is what
         the network is given.
Where    Eq. 1: Tokenizer.encode              Eq. 5: unshift, Tokenizer.forward (released: starts)
         Eq. 2, 3, 4, 7: Tokenizer.forward    Eq. 8: shift, Decoding
         Eq. 6: Llama.forward                 Sec. 3.3, streaming: generate
Differs  Where the paper is silent or the released code does something else, a Config field offers
         both: `times`, `preview`, `lpips_dropout`. docs/paper_and_code.md lists all such points.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Recipe, Stage, UserError

HEAD = 64  # channels of each attention head of the tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape, training times and sampler of the tokenizer. The default is the published one."""
    image_size: int = 256    # pixels
    patch: int = 16          # side of the encoder's patches, pixels
    dim: int = 768           # width of the encoder; like the other widths a multiple of 64
    depth: int = 8           # encoder blocks
    queries: int = 256       # N
    query_rows: int = 1024   # rows in the tables of queries and positions; the first N are used
    query_rank: int = 8      # queries are made from vectors of this width
    codebook: int = 16384    # V
    code_dim: int = 8        # width of a code
    decoder_dim: int = 768   # width of the causal layers after the quantizer
    decoder_depth: int = 8   # their number
    groups: int = 8          # K; divides N
    beta: float = 2.0        # time shift: above 1, more tokens describe the early, noisy steps
    pixel_patch: int = 8     # side of the diffusion decoder's patches, pixels
    pixel_dim: int = 768     # its width
    pixel_depth: int = 12    # its blocks
    data_std: float = 0.6    # images are multiplied by it before noise is added
    times: str = "shifted"   # training draws u, t = S(u) (released), or t: "uniform" (Sec. 4)
    repa_layer: int = 8      # REPA aligns the input of this block; 0: the model has no REPA head
    steps: int = 0           # sampler: diffusion steps; 0: one for each group
    solver: str = "adams"    # sampler: "adams" (two-step Adams-Bashforth) or "euler"
    preview: str = "solver"  # jump to t = 1 by the "solver" (released) or along "v" (Sec. 5.1)

    def __post_init__(self):
        common_width = math.gcd(self.dim, self.decoder_dim, self.pixel_dim)
        patches = math.lcm(self.patch, self.pixel_patch)
        rules = {
            f"dim, decoder_dim, pixel_dim must be multiples of {HEAD}": common_width % HEAD == 0,
            "image_size must be divisible by patch and pixel_patch": self.image_size % patches == 0,
            "queries must be divisible by groups": self.queries % self.groups == 0,
            "queries must be 1 to query_rows": 0 < self.queries <= self.query_rows,
            "data_std and beta must be more than 0": min(self.data_std, self.beta) > 0,
            "steps must be 0 or more": self.steps >= 0}
        common.check(self, rules, times=("shifted", "uniform"), solver=("adams", "euler"),
                     preview=("solver", "v"))

    @property
    def group_size(self):
        """Tokens of a group, q."""
        return self.queries // self.groups


@dataclass(frozen=True)
class Config:
    """The AR model, its sampler's defaults, the tokenizer's training, and the tokenizer."""
    image_size: int = 256                # pixels; the tokenizer's follows
    classes: int = 1000                  # label `classes` means "no label"
    class_names: tuple[str, ...] = ()    # filled from the data
    dim: int = 768
    heads: int = 12
    depth: int = 12                      # blocks
    dropout: float = 0.1                 # after the embeddings, attention and MLP, 0 .. 1
    label_drop: float = 0.1              # share of training images that lose their label, 0 .. 1
    cfg: tuple[float, ...] = (1.1, 8.0)  # guidance scale of the first and the last token
    temperature: float = 1.0             # 0: always the most likely token
    top_k: int = 0                       # draw from the k most likely tokens; 0: from all
    top_p: float = 1.0                   # draw from the likeliest tokens of this joint probability
    crops: int = 10                      # views in training: 10 (the paper's) or 1 (the centre)
    lpips_weight: float = 0.5            # lambda_1 of Eq. 7
    lpips_dropout: float = 0.5           # before LPIPS' linear layers; 0.5 in released training
    repa_weight: float = 0.5             # lambda_2 of Eq. 7
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self):
        tokenizer = dataclasses.replace(self.tokenizer, image_size=self.image_size)
        object.__setattr__(self, "tokenizer", tokenizer)
        rules = {
            "dim must be divisible by twice the heads": self.dim % (2 * self.heads) == 0 < self.dim,
            "cfg must be a pair of numbers": len(self.cfg) == 2 and math.isfinite(sum(self.cfg)),
            "temperature and top_k must be 0 or more": self.temperature >= 0 and self.top_k >= 0,
            "top_p must be more than 0 and at most 1": 0 < self.top_p <= 1}
        common.check(self, rules, crops=(1, 10))


TINY_TOKENIZER = TokenizerConfig(
    image_size=32, patch=4, dim=128, depth=2, queries=64, query_rows=64, codebook=512, code_dim=3,
    decoder_dim=128, decoder_depth=2, pixel_patch=4, pixel_dim=128, pixel_depth=4, repa_layer=0)
ABLATION_TOKENIZER = TokenizerConfig(  # App. III, which does not state repa_layer
    dim=512, decoder_dim=512, pixel_dim=512, pixel_depth=8, repa_layer=5)
PRESETS = {
    "tiny": Config(
        image_size=32, classes=10, dim=192, heads=3, depth=4, dropout=0.0, cfg=(4.0, 4.0), crops=1,
        lpips_weight=0.0, repa_weight=0.0, tokenizer=TINY_TOKENIZER),
    "b": Config(tokenizer=ABLATION_TOKENIZER),
    "l": Config(dim=1024, heads=16, depth=24),
    "xl": Config(dim=1280, heads=20, depth=36, cfg=(1.1, 10.0)),
    "xxl": Config(dim=1536, heads=24, depth=48, cfg=(1.1, 10.0))}
PUBLISHED = {"b": "111M", "l": "343M", "xl": "775M", "xxl": "1.4B"}


# --- Layers of the tokenizer ----------------------------------------------------------------------

def plain_norm(x):
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def mlp(*widths):
    """Return linear layers from each width to the next, with SiLU between them."""
    layers = []
    for width, next_width in zip(widths, widths[1:]):
        layers += [nn.SiLU(), nn.Linear(width, next_width)]
    return nn.Sequential(*layers[1:])


def rotate(x, rotary):
    """Turn pairs of neighbouring channels of x (B, heads, n, C) by angles: rotary (2, n, C/2)."""
    cos, sin = rotary
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def rotary_line(n, width, dtype=torch.float32):
    """Return cos and sin (2, n, width/2) of the angles of positions 0 .. n - 1 (1D RoPE)."""
    omega = 10000 ** (-torch.arange(0, width, 2, dtype=dtype) / width)
    angles = torch.arange(n)[:, None] * omega
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotary_grid(side):
    """Return cos and sin (2, side^2, HEAD/2) for a square grid (2D RoPE).

    Half of the pairs turn by the row, the others by the column.
    """
    line = rotary_line(side, HEAD // 2, torch.float64)
    return torch.cat([line.repeat_interleave(side, 1), line.repeat(1, side, 1)], 2)


def split_heads(x):
    """Return (B, heads, n, HEAD) of x (B, n, dim)."""
    return x.unflatten(2, (-1, HEAD)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, dim):
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(HEAD, eps=1e-6)
        self.k_norm = nn.LayerNorm(HEAD, eps=1e-6)

    def forward(self, x, context=None, rotary=None, mask=None, causal=False):
        """Return (B, n, dim) of x (B, n, dim), which attends to a context (B, m, dim) or to itself.

        rotary (2, n, HEAD/2) tells the positions of x. The tokens of a context have none.
        """
        source = x if context is None else context
        v = split_heads(self.v(source))                            # (B, heads, m, HEAD)
        q = self.q_norm(split_heads(self.q(x))).to(v.dtype)        # autocast norms in float32
        k = self.k_norm(split_heads(self.k(source))).to(v.dtype)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary) if context is None else k
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block whose gates are zero at first."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, 4 * dim, dim)
        self.gate1 = nn.Parameter(torch.zeros(dim))
        self.gate2 = nn.Parameter(torch.zeros(dim))

    def forward(self, x, **attention):
        """Return (B, n, dim) of x (B, n, dim). attention: arguments of Attention.forward."""
        x = x + self.gate1 * self.attention(self.norm1(x), **attention)
        return x + self.gate2 * self.mlp(self.norm2(x))


class Quantizer(nn.Module):
    """The nearest of V unit vectors (van den Oord et al., 2017; l2-normalised as in LlamaGen)."""
    window = 65536  # latest tokens, of which `usage` is measured

    def __init__(self, size, dim):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.register_buffer("age", torch.full((size,), self.window))  # tokens since last use

    def codewords(self):
        """Return the codes (V, code_dim) with unit length, which the stored ones need not have."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    @torch.compiler.disable  # TF32 is a global setting, which compiled code does not switch
    def nearest(self, z):
        """Return the codes (B, N) of unit vectors z (B, N, code_dim)."""
        with common.true_float32():
            return (z @ self.codewords().T).argmax(-1)

    def forward(self, z):
        """Quantize vectors z (B, N, code_dim).

        Return code vectors like z with a straight-through gradient, codes (B, N), and for each
        token the codebook loss and the commitment loss of App. I, (2, B, N).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)
            codes = self.nearest(z)
            e = self.codewords()[codes]
            codebook = (e - z.detach()).square().mean(-1)
            commitment = 0.25 * (e.detach() - z).square().mean(-1)
            return z + (e - z).detach(), codes, torch.stack([codebook, commitment])

    @torch.no_grad()
    def usage(self, codes):
        """Count these codes. Return the share of the codebook in the latest `window` tokens."""
        self.age += codes.numel()
        self.age[codes.flatten()] = 0
        return (self.age < self.window).float().mean()


# --- The pixel diffusion decoder ------------------------------------------------------------------

class PixelBlock(nn.Module):
    """A DiT block whose modulation differs from patch to patch.

    It comes from the time embedding plus what the patch finds in the group by cross-attention,
    which adds nothing to the residual stream itself (Sec. 4).
    """

    def __init__(self, dim):
        super().__init__()
        self.time = mlp(dim, dim, dim)
        self.condition = mlp(dim, dim, dim)
        self.cross = Attention(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention = Attention(dim)
        self.mlp = mlp(dim, 4 * dim, dim)

    def forward(self, x, time, group, rotary):        # (B, n, dim), (B or 1, dim), (B, q, dim)
        h = plain_norm(x)
        found = self.cross(h, plain_norm(self.condition(group)), rotary)
        m = self.modulation(F.silu(self.time(time)[:, None] + found))      # (B, n, 6 dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        x = x + gate1 * self.attention(h * (1 + scale1) + shift1, rotary=rotary)
        return x + gate2 * self.mlp(plain_norm(x) * (1 + scale2) + shift2)


class PixelDecoder(nn.Module):
    """The velocity network D_FM(x_t, t, c) of Eq. 2, on patches of pixels."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.pixel_dim
        channels = 3 * config.pixel_patch**2
        self.condition = nn.Linear(config.decoder_dim, dim)
        self.input = nn.Linear(channels, dim)
        self.output = nn.Linear(dim, channels)
        self.blocks = nn.ModuleList(PixelBlock(dim) for _ in range(config.pixel_depth))
        if config.repa_layer:
            self.repa = mlp(dim, 2048, 2048, 768)
        self.side = config.image_size // config.pixel_patch  # patches
        self.register_buffer("rotary", rotary_grid(self.side), persistent=False)

    def forward(self, x, t, group, repa=False):
        """Return the velocity (B, 3, h, w) of x (B, 3, h, w), and REPA's features or None.

        t: (B,) or (1,) in 0 .. 1. group: c(t), (B, q, decoder_dim). Features: (B, 256, 768).
        """
        half = self.config.pixel_dim // 2
        angles = 1000 * t[:, None] * 10000 ** (-torch.arange(half, device=t.device) / half)
        time = torch.cat([angles.cos(), angles.sin()], 1)          # (B or 1, dim)
        group = plain_norm(self.condition(group))                  # (B, q, dim)
        patches = F.pixel_unshuffle(x, self.config.pixel_patch)
        x = self.input(patches.flatten(2).transpose(1, 2))         # (B, n, dim)
        features = None
        for i, block in enumerate(self.blocks):
            if repa and i == self.config.repa_layer:
                pooled = F.avg_pool2d(self.grid(x), self.side // 16)
                features = self.repa(pooled.flatten(2).transpose(1, 2))
            x = block(x, time, group, self.rotary)
        x = self.output(plain_norm(x)).float()
        return F.pixel_shuffle(self.grid(x), self.config.pixel_patch), features

    def grid(self, x):
        """Return (B, C, side, side) of patches x (B, side^2, C)."""
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))


# --- The tokenizer --------------------------------------------------------------------------------

def shift(u, beta):
    """Return the model time t = S(u) of token time u: slower near noise for beta above 1."""
    return u / (u + beta * (1 - u))                                # Eq. 8


def unshift(t, beta):
    """Return the token time u = t' of model time t: the inverse of S."""
    return t / (t + (1 - t) / beta)                                # Eq. 5


class Tokenizer(nn.Module):
    """Encoder, quantizer, causal layers and pixel diffusion decoder: images to codes and back."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
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
        grid = rotary_grid(c.image_size // c.patch)
        unturned = rotary_line(1, HEAD).expand(-1, c.queries, -1)  # position 0 for all queries
        self.register_buffer("rotary", torch.cat([grid, unturned], 1), persistent=False)
        # Set by `ready`: the perceptual losses of Eq. 7. They are functions, not modules, so that
        # the state dict does not contain their networks.
        self.lpips = None        # (images, images, dropout) -> parts of the distances (5, B)
        self.dino = None         # images -> features (B, 256, 768)
        self.loss_config = None  # the Config that has their weights
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Draw weights as released: blocks are the identity at first, the velocity is zero.

        Blocks narrower than 768 get larger weights, without which `tiny` learns markedly slower.
        """
        c = self.config
        for layers, dim in ((self.encoder_layers, c.dim), (self.decoder_layers, c.decoder_dim),
                            (self.pixels.blocks, c.pixel_dim)):
            for module in layers.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02 * math.sqrt(768 / min(dim, 768)))
                    nn.init.zeros_(module.bias)
        for block in self.pixels.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.pixels.output.weight)
        nn.init.zeros_(self.pixels.output.bias)
        nn.init.trunc_normal_(self.query_table.weight)
        nn.init.trunc_normal_(self.positions.weight, std=0.02)
        codes = self.quantizer.embedding.weight.uniform_(-1, 1)
        codes.copy_(F.normalize(codes, dim=-1))

    def carry(self, name, old, shape):
        """Return None: with --init, weights whose shape has changed start from random values."""

    def ready(self, config):
        """Attach the losses that a Config asks for. Raise UserError if they cannot be had."""
        c = self.config
        device = self.positions.weight.device
        side = self.pixels.side
        if config.repa_weight and (side % 16 or not 0 < c.repa_layer < c.pixel_depth):
            raise UserError(f"REPA needs a multiple of 16 patches a side (here {side}) and a"
                            " repa_layer below pixel_depth; --set repa_weight=0 trains without it")
        if config.lpips_weight:
            self.lpips = load_lpips(device)
        if config.repa_weight:
            self.dino = load_dino(device)
        self.loss_config = config

    def features(self, images):
        """Return the encoder's output (B, N, dim) at the queries.

        All tokens attend to all patches, and query j to the queries up to j. So token j depends on
        no later query, and patches depend on no query.
        """
        N = self.config.queries
        patches = plain_norm(self.patchify(images).flatten(2).transpose(1, 2))     # (B, P, dim)
        queries = self.query_linear(self.query_table.weight[:N]).to(patches.dtype)
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], 1)           # (B, P + N, dim)
        P = patches.shape[1]
        place = torch.arange(P + N, device=x.device)
        mask = (place < P) | (place <= place[:, None])                             # (P + N, P + N)
        for layer in self.encoder_layers:
            x = layer(x, rotary=self.rotary, mask=mask)
        return plain_norm(x[:, P:])

    def encode(self, images):
        """Return codes (B, N) of images (B, 3, h, w) as the smallest integers that hold them.

        Always in true float32: with less precision the nearest code is often another one.
        """
        with torch.autocast(images.device.type, enabled=False), common.true_float32():
            codes = self.quantizer(self.to_code(self.features(images)))[1]         # Eq. 1
        return codes.to(torch.int16 if self.config.codebook <= 2**15 else torch.int32)

    def codes(self, stored):
        """Return what `encode` made as the AR model takes it."""
        return stored.long()

    def condition(self, z):
        """Return z' (B, n, decoder_dim) of the first n code vectors z (B, n, code_dim)."""
        x = self.from_code(z) + self.positions.weight[:z.shape[1]]
        for layer in self.decoder_layers:
            x = layer(x, causal=True)
        return plain_norm(x)

    def starts(self, u):
        """Return the first token of the group at token times u (...,) in [0, 1).

        As released it is the group whose time j / K is nearest, halves up. Then the steps of Eq. 8
        use each group once; Eq. 5 read literally has no group for the first step.
        """
        c = self.config
        group = torch.floor(u * c.groups + 0.5).long()
        return group.clamp(max=c.groups - 1) * c.group_size

    def forward(self, images, labels=None, *, u=None, noise=None):
        """Return the training loss and its parts.

        u (B,) in [0, 1) and noise x_0 (like images) may be given; with times = "uniform", u is the
        model time. The quantizer's losses count the tokens up to the end of the selected group.
        usage: share of the codebook among the latest codes. dead: share of the positions at which
        all images of the batch have the same code.
        """
        c = self.config
        u = torch.rand(len(images), device=images.device) if u is None else u
        x_0 = torch.randn_like(images) if noise is None else noise                 # Eq. 4
        if c.times == "shifted":
            t = shift(u, c.beta)
            start = self.starts(u)
        else:
            t = u
            number = torch.ceil(c.groups * unshift(t, c.beta)).long()              # Eq. 5: 1 .. K
            start = (number - 1).clamp(min=0) * c.group_size
        z, codes, losses = self.quantizer(self.to_code(self.features(images)))
        tokens = start[:, None] + torch.arange(c.group_size, device=u.device)      # (B, q)
        counted = torch.arange(c.queries, device=u.device) <= tokens[:, -1:]       # (B, N)
        codebook, commitment = (losses * counted).sum((1, 2)) / counted.sum()
        group = self.condition(z).take_along_dim(tokens[..., None], 1)             # c(t)

        x_1 = c.data_std * images
        s = t[:, None, None, None]
        x_t = s * x_1 + (1 - s) * x_0                                              # Eq. 3
        v, features = self.pixels(x_t, t, group, repa=self.dino is not None)
        flow = F.mse_loss(v, x_1 - x_0) / c.data_std**2             # Eq. 2, in units of the images
        loss = flow + codebook + commitment                                        # Eq. 7
        out = {"flow": flow, "codebook": codebook, "commitment": commitment}
        if self.lpips:
            guess = (x_t + (1 - s) * v) / c.data_std
            dropout = self.loss_config.lpips_dropout if self.training else 0.0
            out["lpips"] = self.lpips(images, guess, dropout).sum(0).mean()
            loss = loss + self.loss_config.lpips_weight * out["lpips"]
        if self.dino:
            likeness = F.cosine_similarity(features.float(), self.dino(images), dim=-1)
            out["repa"] = (1 - likeness).mean()
            loss = loss + self.loss_config.repa_weight * out["repa"]
        elif c.repa_layer:  # DDP wants a gradient for every parameter
            loss = loss + 0 * sum(p.sum() for p in self.pixels.repa.parameters())
        if self.training:
            out["usage"] = self.quantizer.usage(codes)
            out["dead"] = (codes == codes[:1]).all(0).float().mean()
        return {"loss": loss, **out}

    @torch.no_grad()
    def decode(self, codes, noise, *, on_step=None, **options):
        """Return images (B, 3, h, w), not clamped, of codes (B, n) and normal noise (B, 3, h, w).

        With n < N it is the preview after the steps that n tokens allow. See Decoding.
        """
        decoding = Decoding(self, noise, on_step, **options)
        decoding.take(codes)
        return decoding.image

    def reconstruct(self, images, noise, on_step=None, **options):
        """Return images (B, 3, h, w) encoded and decoded, in -1 .. 1. noise: common.Noise."""
        start = noise.normal(images.shape[1:])
        return self.decode(self.encode(images), start, on_step=on_step, **options).clamp(-1, 1)


class Decoding:
    """An incremental decoder: takes tokens as they come and does the steps that they allow.

    on_step(images) gets the preview (B, 3, h, w) after each step, clamped to -1 .. 1. options are
    steps, solver and preview; None means the default of the tokenizer's config. `ends` are the
    numbers of tokens at which a step becomes possible. `image` is the latest preview, and after
    the last step the result, not clamped.
    """

    def __init__(self, tokenizer, noise, on_step=None, **options):
        c = self.config = common.with_options(tokenizer.config, **options)
        self.tokenizer = tokenizer
        self.on_step = on_step
        steps = c.steps or c.groups
        u = torch.arange(steps, dtype=torch.float64) / steps
        self.times = [*shift(u, c.beta).tolist(), 1.0]
        self.starts = tokenizer.starts(u).tolist()
        self.ends = [start + c.group_size for start in self.starts]
        self.done = 0                                              # steps
        self.x = noise
        self.image = noise / c.data_std
        self.previous_v = None

    def take(self, codes):
        """Take all tokens so far, codes (B, n), and do the steps that have become possible."""
        z = self.tokenizer.condition(self.tokenizer.quantizer.codewords()[codes.long()])
        while self.done < len(self.ends) and self.ends[self.done] <= codes.shape[1]:
            group = z[:, self.starts[self.done]:self.ends[self.done]]
            self.advance(group.contiguous())  # one memory layout, so that it is compiled once

    def advance(self, group):
        """Do one step of the solver. The preview is where the same step would lead at t = 1."""
        c = self.config
        t, t_next = self.times[self.done:self.done + 2]
        self.done += 1
        v = self.tokenizer.pixels(self.x, torch.full((1,), t, device=self.x.device), group)[0]
        slope = v
        if c.solver == "adams" and self.previous_v is not None:
            slope = 1.5 * v - 0.5 * self.previous_v  # for equal steps; of order 2 on these, too
        jump = v if c.preview == "v" and self.done < len(self.ends) else slope
        self.image = (self.x + (1 - t) * jump) / c.data_std
        self.x = self.x + (t_next - t) * slope
        self.previous_v = v
        if self.on_step:
            self.on_step(self.image.clamp(-1, 1))


# --- Networks of the tokenizer's perceptual losses ------------------------------------------------

def standardised(images, mean, std):
    """Return images (B, 3, h, w) minus the mean, divided by the deviation of each channel."""
    mean = images.new_tensor(mean)[:, None, None]
    return (images - mean) / images.new_tensor(std)[:, None, None]


def vgg_features(vgg, images):
    """Return five feature maps of images (B, 3, h, w) in -1 .. 1: relu1_2, 2_2, 3_3, 4_3, 5_3.

    vgg: state dict of VGG-16. h and w are 16 or more.
    """
    x = standardised(images, (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    maps = []
    for layer in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        if layer in (5, 10, 17, 24):
            x = F.max_pool2d(x, 2)
        name = f"features.{layer}"
        x = F.conv2d(x, vgg[f"{name}.weight"], vgg[f"{name}.bias"], padding=1).relu()
        if layer in (2, 7, 14, 21, 28):
            maps.append(x)
    return maps


def unit_length(x):
    """Return x (B, C, h, w) divided by its length over the channels. The slope at 0 is finite."""
    return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)


def lpips_parts(vgg, linear, x, y, dropout=0.0):
    """Return five parts (5, B) whose sum is the LPIPS distance of images x and y (B, 3, h, w).

    LPIPS (Zhang et al., 2018) weights the squared differences of VGG-16 features. vgg and linear:
    state dicts of VGG-16 and of the five layers of weights.
    """
    parts = []
    with torch.autocast(x.device.type, enabled=False):
        for i, (a, b) in enumerate(zip(vgg_features(vgg, x), vgg_features(vgg, y))):
            difference = F.dropout((unit_length(a) - unit_length(b)).square(), dropout)
            weighted = difference * linear[f"lin{i}.model.1.weight"]
            parts.append(weighted.sum(1).mean((1, 2)))
    return torch.stack(parts)


@torch.no_grad()
def dino_features(network, images):
    """Return DINOv2's patch features (B, 256, 768), at 224 pixels, of images (B, 3, h, w)."""
    x = standardised(0.5 * images + 0.5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = F.interpolate(x, (224, 224), mode="bicubic")
    return network.forward_features(x)["x_norm_patchtokens"].float()


def published(url, sha256=""):
    """Return the content of a published file, kept where torch.hub keeps its downloads."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    hint = "or train without LPIPS and REPA: --set lpips_weight=0 repa_weight=0"
    return common.read_checkpoint(common.download(url, path, sha256, hint))


def load_lpips(device):
    """Return lpips_parts with the published weights. Raise UserError if they cannot be had."""
    vgg = published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
    linear = published("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
                       "lpips/weights/v0.1/vgg.pth", "a78928a0af1e5f0f")
    vgg = {name: value.to(device) for name, value in vgg.items() if name.startswith("features")}
    linear = {name: value.to(device) for name, value in linear.items()}
    return functools.partial(lpips_parts, vgg, linear)


def load_dino(device):
    """Return dino_features with the published network. Raise UserError if it cannot be had."""
    file = "dinov2_vitb14_pretrain.pth"
    state = published(f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/{file}")
    code = "facebookresearch/dinov2"
    with common.untrusted(code, "not available: --set repa_weight=0 trains without it"):
        with common.rank_zero_first():
            network = torch.hub.load(code, "dinov2_vitb14", pretrained=False, trust_repo=True)
    common.load_strict(network, state, file)
    return functools.partial(dino_features, network.eval().requires_grad_(False).to(device))


# --- The AR model ---------------------------------------------------------------------------------

class LlamaBlock(nn.Module):
    """Pre-norm block: causal self-attention with rotary positions, then SwiGLU."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)  # two thirds of 4 dim, rounded up
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, rotary, cache=None, place=None, mask=None):
        """Return (B, n, dim) of x (B, n, dim).

        A single token comes with a cache of all keys and values, (B, heads, N, C) each. Its own are
        stored at place (1,). mask (1, N) bool: the places that are filled.
        """
        qkv = self.wqkv(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # (B, heads, n, C) each
        q = rotate(q, rotary)
        k = rotate(k, rotary)
        if cache is not None:  # written as a whole: through a view, compiled code would copy it
            k = cache[0].index_copy_(2, place, k)
            v = cache[1].index_copy_(2, place, v)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        x = x + self.dropout(self.wo(h.transpose(1, 2).flatten(2)))
        h = self.ffn_norm(x)
        return x + self.dropout(self.w2(F.silu(self.w1(h)) * self.w3(h)))


class Llama(nn.Module):
    """A language model of codes whose first token is the class (Touvron et al., 2023; LlamaGen)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.class_embed = nn.Embedding(c.classes + 1, c.dim)      # the last one: no label
        self.token_embed = nn.Embedding(c.tokenizer.codebook, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(LlamaBlock(c.dim, c.heads, c.dropout) for _ in range(c.depth))
        self.norm = nn.RMSNorm(c.dim, eps=1e-5)
        self.output = nn.Linear(c.dim, c.tokenizer.codebook, bias=False)
        rotary = rotary_line(c.tokenizer.queries, c.dim // c.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # all tokens are equally likely at first
        self.kept_cache = None              # see compile_steps

    def carry(self, name, old, shape):
        """Return None: with --init, weights whose shape has changed start from random values."""

    def logits(self, codes, labels):
        """Return logits (B, N, V): those of token i depend on labels (B,) and codes before i."""
        first = self.class_embed(labels)[:, None]
        x = self.dropout(torch.cat([first, self.token_embed(codes[:, :-1])], 1))
        for layer in self.layers:
            x = layer(x, self.rotary[:, :x.shape[1]])              # (B, N, dim)
        return self.output(self.norm(x)).float()

    def forward(self, codes, labels, *, drop=None):
        """Return the next-token loss for codes (B, N) and labels (B,), and the accuracy.

        drop (B,) bool, the images that lose their label, may be given. accuracy: share of the
        tokens that were the most likely ones.
        """
        if drop is None:
            rate = self.config.label_drop if self.training else 0.0
            drop = torch.rand(len(labels), device=labels.device) < rate
        labels = torch.where(drop, self.config.classes, labels)
        logits = self.logits(codes, labels).flatten(0, 1)
        codes = codes.flatten()
        return {"loss": F.cross_entropy(logits, codes),            # Eq. 6
                "accuracy": (logits.argmax(-1) == codes).float().mean()}

    def step(self, x, cache, place, mask):
        """Return logits (B, V) of the token at place (1,) from the embedding x (B, dim) before it.

        cache: keys and values of each layer. mask (1, N): True up to this place.
        """
        x = x[:, None]
        for layer, keys_and_values in zip(self.layers, cache):
            x = layer(x, self.rotary[:, place], keys_and_values, place, mask)
        return self.output(self.norm(x[:, 0])).float()

    @torch.no_grad()
    def stream(self, labels, noise, *, prefix=(), tokens=None, cfg=None, **options):
        """Generate codes for labels (B,). Yield all codes so far, (B, 1) to (B, N), after each one.

        prefix (k,): the first codes of all images. tokens: stop after this many. cfg: guidance
        scale of the logits, a number or a pair (first token, last token); 1 is off, 0 is
        unconditional. options: temperature, top_k, top_p; None means the config's default. Nothing
        in the loop waits for the device. Raise UserError for options out of range.
        """
        if isinstance(cfg, (int, float)):
            cfg = (cfg, cfg)
        c = common.with_options(self.config, cfg=cfg, **options)
        B = len(labels)
        N = c.tokenizer.queries
        scales = torch.linspace(*c.cfg, N, dtype=torch.float64).tolist()
        guided = any(scale != 1 for scale in scales)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, c.classes)])
        x = self.class_embed(labels)                               # (B or 2B, dim)
        shape = (len(x), c.heads, N, c.dim // c.heads)
        memory = self.kept_cache or common.KeyValueCache()
        dtype = self.output(x).dtype                               # that of autocast, if it is on
        cache = memory.allocate(c.depth, shape, dtype, x.device)
        draws = noise.uniform((N,))                                # one for each token
        places = torch.arange(N, device=x.device)
        visible = places <= places[:, None]                        # (N, N)
        codes = torch.zeros(B, N, dtype=torch.long, device=x.device)
        for i in range(tokens or N):
            logits = self.step(x, cache, places[i:i + 1], visible[i:i + 1])
            if guided:
                logits, unconditional = logits.chunk(2)
                logits = unconditional + scales[i] * (logits - unconditional)
            probs = probabilities(logits, c.temperature, c.top_k, c.top_p)
            codes[:, i] = prefix[i] if i < len(prefix) else draw_token(probs, draws[:, i])
            yield codes[:, :i + 1]
            x = self.token_embed(codes[:, i]).repeat(len(x) // B, 1)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Return the distribution (B, V) that tokens are drawn from, given logits (B, V).

    The filters act in this order: temperature, the k most likely tokens, the most likely tokens up
    to the one with which their joint probability passes p.
    """
    logits = logits / max(temperature, 1e-5)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share > top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logits.softmax(-1)


def draw_token(probs, u):
    """Return a token (B,) for each row of probs (B, V): where the cumulative sum passes u (B,)."""
    rising = probs.cumsum(-1)
    total = rising.amax(-1)
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u * total, below_total)      # rounding must not lead past the last token
    reached = (rising > target[:, None]) & (probs > 0)  # on CUDA, sums may waver where 0 is added
    return reached.float().argmax(-1)                   # the first


# --- Both together --------------------------------------------------------------------------------

def guidance(text):
    """Return a pair of scales: "1.1:8" is (1.1, 8), from first to last token, and "4" is (4, 4)."""
    first, _, last = text.partition(":")
    return float(first), float(last or first)


OPTIONS = {
    "cfg": dict(type=guidance, help="guidance scale: 4, or 1.1:8 from the first token to the last"),
    "steps": dict(type=int, help="diffusion steps; 0: one for each group of tokens"),
    "solver": dict(help="of the diffusion: adams or euler"),
    "preview": dict(help="jump to the image by the step of the solver, or along v"),
    "temperature": dict(type=float, help="of the tokens; 0 takes the most likely one"),
    "top_k": dict(type=int, help="draw from the k most likely tokens; 0: from all"),
    "top_p": dict(type=float, help="draw from the likeliest tokens of this joint probability"),
    "tokens": dict(type=int, help="stop after this many; the image is a preview (Table 5)"),
    "prefix_image": dict(metavar="FILE", help="take the first tokens from this picture (Fig. 6)"),
    "prefix_tokens": dict(type=int, metavar="K", help="how many")}


@functools.cache
def side_stream(device):
    """Return the CUDA stream on which images are decoded beside the tokens, or None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def encoded_prefix(tokenizer, file, count):
    """Return a picture (3, h, w) in -1 .. 1 and its first `count` codes, if they are asked for."""
    c = tokenizer.config
    if file is None and count is None:
        return None, ()
    if file is None or count is None:
        raise UserError("--prefix-image and --prefix-tokens go together")
    if not 0 <= count <= c.queries:
        raise UserError(f"--prefix-tokens {count}: the tokenizer has {c.queries} tokens")
    picture = common.to_float(common.load_picture(file, c.image_size))
    picture = picture.to(tokenizer.positions.weight.device)
    return picture, tokenizer.encode(picture[None])[0, :count].long()


@torch.no_grad()
def generate(model, tokenizer, labels, noise, *, on_step=None, steps=None, solver=None,
             preview=None, tokens=None, prefix_image=None, prefix_tokens=None, **options):
    """Return images (B, 3, h, w) in -1 .. 1 for labels (B,), and a dict of facts about each.

    A group's diffusion step is taken as soon as its tokens are there, on CUDA beside the next
    tokens (Sec. 3.3). on_step(images) gets the preview after each step. With `tokens` the image is
    the preview that so many tokens allow (Table 5). The first prefix_tokens codes come from a
    picture file (Fig. 6); the fact distance_to_reference (B,) is the root mean square difference
    from that picture. options: see Llama.stream. Raise UserError for options out of range.
    """
    c = tokenizer.config
    if tokens is not None and not c.group_size <= tokens <= c.queries:
        raise UserError(f"--tokens {tokens}: from {c.group_size} (one group) to {c.queries}")
    picture, prefix = encoded_prefix(tokenizer, prefix_image, prefix_tokens)
    start = noise.normal((3, c.image_size, c.image_size))
    decoding = Decoding(tokenizer, start, on_step, steps=steps, solver=solver, preview=preview)
    side = side_stream(start.device)
    for codes in model.stream(labels, noise, prefix=prefix, tokens=tokens, **options):
        if codes.shape[1] in decoding.ends:
            if side:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                          # of None: no effect
                decoding.take(codes)
    if side:
        torch.cuda.current_stream().wait_stream(side)
    images = decoding.image.clamp(-1, 1)
    if picture is None:
        return images, {}
    return images, {"distance_to_reference": (images - picture).square().mean((1, 2, 3)).sqrt()}


def compile_steps(model, tokenizer):
    """Compile what sampling repeats: the step of a token and the pixel decoder.

    The decoder is not recorded as a CUDA graph: graphs share their memory, and it may run beside a
    token's step on another stream.
    """
    model.step = common.compiled(model.step)
    model.kept_cache = common.KeyValueCache()
    tokenizer.pixels.compile()


def check(model, tokenizer):
    """Raise UserError if the model was made for another kind of tokenizer."""
    for name in ("queries", "codebook", "image_size"):
        has = getattr(tokenizer.config, name)
        needs = getattr(model.config.tokenizer, name)
        if has != needs:
            raise UserError(f"the tokenizer has {name} {has}, the model needs {needs}")


# --- Stages: what is trained, in order, and how ---------------------------------------------------

def random_scale_crop(image, size, rng):
    """Views: a random square of the picture at 1 to 1.25 times the size, and its mirror image."""
    image = common.shrink(image, int(rng.integers(size, math.ceil(size / 0.8) + 1)))
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    crop = common.cut(image, size, left, top)
    return [crop, common.mirror(crop)]


def ten_crops(image, size, rng):
    """Views: corners and centre of the picture at 1.1 times the size, and their mirror images."""
    image = common.centre_crop(image, int(size * 1.1))
    far = image.width - size
    corners = ((0, 0), (far, 0), (0, far), (far, far), (far // 2, far // 2))
    crops = [common.cut(image, size, left, top) for left, top in corners]
    return crops + [common.mirror(crop) for crop in crops]


def build_tokenizer(config):
    """Return the tokenizer of a Config."""
    return Tokenizer(config.tokenizer)


def tokenizer_views(config):
    """Return the views that the tokenizer is trained on."""
    return random_scale_crop if config.crops == 10 else common.centre


def ar_views(config):
    """Return the views whose codes the AR model is trained on."""
    return ten_crops if config.crops == 10 else common.centre


def load_tokenizer(path):
    """Return the frozen tokenizer of a checkpoint, ours or released, or raise UserError."""
    content = common.read_checkpoint(path)
    with common.untrusted(path, "not a tokenizer"):
        if content.get("stage") == "tokenizer":
            config = common.rebuild(TokenizerConfig, content["config"]["tokenizer"])
            tokenizer = Tokenizer(config)
            common.load_strict(tokenizer, content["model"], path)
            return tokenizer.eval().requires_grad_(False)
    tokenizer = load_official(path)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{path} holds an AR model, not a tokenizer")
    return tokenizer


IMAGENET = 1281167  # training images: the paper counts the tokenizer's training in steps
PAPER_TOKENIZER = Recipe(
    lr=2e-4, batch=1024, epochs=210_000 * 1024 / IMAGENET, warmup=500 / 210_000, weight_decay=0.0,
    clip=1.0, ema=0.999)
PAPER_AR = Recipe(lr=4e-4, batch=1024, epochs=300, decay=50 / 300, final=1e-5 / 4e-4,
                  weight_decay=0.05, clip=1.0)
TOKENIZER_RECIPES = {
    "tiny": Recipe(lr=3e-3, batch=16, epochs=1.6, warmup=0.02, decay=0.4, weight_decay=0.0,
                   clip=1.0, ema=0.998),
    "b": dataclasses.replace(PAPER_TOKENIZER, batch=256, epochs=50_000 * 256 / IMAGENET,
                             warmup=500 / 50_000),
    "l": PAPER_TOKENIZER, "xl": PAPER_TOKENIZER, "xxl": PAPER_TOKENIZER}
AR_RECIPES = {
    "tiny": Recipe(lr=2e-3, batch=64, epochs=1.1, warmup=0.03, decay=0.5, weight_decay=0.05,
                   clip=1.0, ema=0.998),
    "b": dataclasses.replace(PAPER_AR, epochs=50),
    "l": PAPER_AR, "xl": PAPER_AR, "xxl": PAPER_AR}
STAGES = [
    Stage("tokenizer", build_tokenizer, TOKENIZER_RECIPES, tokenizer_views, load=load_tokenizer),
    Stage("ar", Llama, AR_RECIPES, ar_views, first_stage="tokenizer")]


# --- Released checkpoints -------------------------------------------------------------------------

# Released name -> ours.
RELEASED = r"""
^query_embedding                -> query_table
^quant_in_conv                  -> to_code
^quant_out_conv                 -> from_code
^quantize\.                     -> quantizer.
^decoder_embedding              -> positions
^diff_decoder\.net\.            -> pixels.
cond_mlp                        -> condition
conv_in                         -> input
conv_out                        -> output
repa_out                        -> repa
cross_attn                      -> cross
adaLN_modulation\.1             -> modulation
time_embed\.mlp                 -> time
cond_embed                      -> condition
mlp\.fc1                        -> mlp.0
mlp\.fc2                        -> mlp.2
^cls_embedding\.embedding_table -> class_embed
^tok_embeddings                 -> token_embed
\.(attention|feed_forward)\.w   -> .w
"""
FIELDS = {  # field of the released configuration -> ours, where shapes do not tell
    "num_all_queries": "queries", "num_query_groups": "groups", "num_denoising_steps": "steps",
    "sampling_resolution": "image_size", "time_shift": "beta", "data_std": "data_std",
    "repa_layer": "repa_layer"}


def with_our_names(state):
    """Return a released state dict with the names of this file, in float32."""
    state = common.renamed(state, RELEASED)
    state.pop("quantizer.codebook_used", None)  # a monitor
    for name, value in state.items():
        if value.shape[2:] == (1, 1):           # a 1x1 convolution is a linear layer here
            state[name] = value[:, :, 0, 0]
    return state


def load_official(path, **overrides):
    """Return the tokenizer or the AR model in a released checkpoint; the latter also of LlamaGen.

    A tokenizer's EMA weights are used if the file has them, an AR model's plain ones, as its
    authors do. The configuration follows from the shapes; what they do not tell is read from the
    file, or else as published. overrides: fields of TokenizerConfig or Config. Raise UserError for
    an entry that is missing, extra or misshapen.
    """
    content = common.read_checkpoint(path)
    with common.untrusted(path, "not a D-AR checkpoint"):
        state = common.unwrap(content, "model", "module", "state_dict", "ema")
        if not any("quant_in_conv" in name for name in state):
            return ar_from_released(state, path, **overrides)
        config = content.get("config", {})
        config = getattr(config, "_data", config)
        state = common.unwrap(content, "ema", "model", "module", "state_dict")
        return tokenizer_from_released(state, config.get("model", {}), path, **overrides)


def tokenizer_from_released(state, released, path="the checkpoint", **overrides):
    """Return the tokenizer of a released state dict. released: its configuration, a dict."""
    state = with_our_names(state)
    released = {**released, **released.get("diff_decoder", {})}
    fields = {ours: released[name] for name, ours in FIELDS.items() if name in released}
    dim, _, patch, _ = state["patchify.weight"].shape
    query_rows, query_rank = state["query_table.weight"].shape
    codebook, code_dim = state["quantizer.embedding.weight"].shape
    pixel_dim, channels = state["pixels.input.weight"].shape
    if "pixels.repa.0.weight" not in state:
        fields["repa_layer"] = 0
    fields.update(
        dim=dim, patch=patch, query_rows=query_rows, query_rank=query_rank, codebook=codebook,
        code_dim=code_dim, decoder_dim=len(state["from_code.weight"]), pixel_dim=pixel_dim,
        pixel_patch=math.isqrt(channels // 3),
        depth=len(common.numbered(state, r"encoder_layers\.(\d+)")),
        decoder_depth=len(common.numbered(state, r"decoder_layers\.(\d+)")),
        pixel_depth=len(common.numbered(state, r"pixels\.blocks\.(\d+)")))
    tokenizer = Tokenizer(TokenizerConfig(**{**fields, **overrides}))
    common.load_strict(tokenizer, {**state, "quantizer.age": tokenizer.quantizer.age}, path)
    return tokenizer.eval().requires_grad_(False)


def ar_from_released(state, path="the checkpoint", **overrides):
    """Return the AR model of a released state dict."""
    state = with_our_names(state)
    codebook, dim = state["token_embed.weight"].shape
    fields = dict(
        dim=dim, heads=dim // 64, depth=len(common.numbered(state, r"layers\.(\d+)")),
        classes=len(state["class_embed.weight"]) - 1, tokenizer=TokenizerConfig(codebook=codebook),
        cfg=next((preset.cfg for preset in PRESETS.values() if preset.dim == dim), Config.cfg))
    model = Llama(Config(**{**fields, **overrides}))
    common.load_strict(model, state, path)
    return model.eval().requires_grad_(False)


def main():
    """Print the presets with their parameter counts, and walk one batch through the tiny model."""
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    print("size        AR model  published      tokenizer")
    with torch.device("meta"):
        for name, c in PRESETS.items():
            print(f"{name:5s} {parameters(Llama(c)):14,d} {PUBLISHED.get(name, '-'):>10s}"
                  f" {parameters(Tokenizer(c.tokenizer)):14,d}")
    print("Published tokenizers: 113M for b; 300M for the others, without 7M of the REPA head.")
    config = PRESETS["tiny"]
    tokenizer = Tokenizer(config.tokenizer)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    print("\nTokenizer.forward of images (2, 3, 32, 32)")
    print(f"  loss {common.walk(tokenizer, images)['loss'].item():.3f}")
    codes = tokenizer.encode(images).long()
    print("\nLlama.forward of codes (2, 64) and labels (2,)")
    print(f"  loss {common.walk(Llama(config), codes, torch.tensor([0, 1]))['loss'].item():.3f}")


if __name__ == "__main__":
    common.run_script(main)
