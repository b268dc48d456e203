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
Where    Eq. 1: Tokenizer.encode              Eq. 5: Tokenizer.forward (released: Tokenizer.starts)
         Eq. 2, 3, 4, 7: Tokenizer.forward    Eq. 8: shift, Tokenizer.decode
         Eq. 6: Llama.forward                 Sec. 3.3, streaming: Tokenizer.decode
Differs  Where the paper is silent or the released code does something else, a Config field offers
         both: `times`, `preview`, `lpips_dropout`. docs/paper_and_code.md lists all such points.
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import (LayerNorm, Matrix, Recipe, Stage, UserError, merge_heads, numbered, plain_norm,
                    split_heads)


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape, training times and sampler of the tokenizer. The default is the published one."""
    image_size: int = 256    # pixels
    patch: int = 16          # side of the encoder's patches, pixels
    dim: int = 768           # width of the encoder; like the other widths a multiple of `head`
    head: int = 64           # channels of each attention head
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
    repa_layer: int = 8      # REPA aligns the input of this block, if there is one; 0: no REPA head
    steps: int = 0           # sampler: diffusion steps; 0: one for each group
    solver: str = "adams"    # sampler: "adams" (two-step Adams-Bashforth) or "euler"
    preview: str = "solver"  # jump to t = 1 by the "solver" (released) or along "v" (Sec. 5.1)

    def __post_init__(self):
        common.check(self, {
            "dim, decoder_dim, pixel_dim must be multiples of head, and head of 4":
                0 == self.head % 4
                == math.gcd(self.dim, self.decoder_dim, self.pixel_dim) % self.head,
            "image_size must be divisible by patch and pixel_patch":
                self.image_size % math.lcm(self.patch, self.pixel_patch) == 0,
            "queries must be divisible by groups, and at most query_rows":
                self.queries % self.groups == 0 < self.queries <= self.query_rows,
            "steps must be 0 or more": self.steps >= 0,
        }, times=("shifted", "uniform"), solver=("adams", "euler"), preview=("solver", "v"))

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
        object.__setattr__(self, "tokenizer", replace(self.tokenizer, image_size=self.image_size))
        common.check(self, {
            "dim must be divisible by twice the heads": self.dim % (2 * self.heads) == 0 < self.dim,
            "cfg must be a pair of numbers": len(self.cfg) == 2,
            "temperature and top_k must be 0 or more": self.temperature >= 0 and self.top_k >= 0,
            "top_p must be more than 0 and at most 1": 0 < self.top_p <= 1,
        }, crops=(1, 10))


TINY_TOKENIZER = TokenizerConfig(
    patch=4, dim=128, head=32, depth=2, queries=64, query_rows=64, codebook=512, code_dim=3,
    decoder_dim=128, decoder_depth=2, pixel_patch=4, pixel_dim=128, pixel_depth=4, repa_layer=0,
    steps=16)
PRESETS = {
    "tiny": Config(
        image_size=32, classes=10, dim=192, heads=3, depth=4, dropout=0.0, cfg=(2.5, 2.5), crops=1,
        lpips_weight=0.0, repa_weight=0.0, tokenizer=TINY_TOKENIZER),
    "b": Config(tokenizer=TokenizerConfig(  # App. III, which does not state repa_layer
        dim=512, decoder_dim=512, pixel_dim=512, pixel_depth=8, repa_layer=5)),
    "l": Config(dim=1024, heads=16, depth=24),
    "xl": Config(dim=1280, heads=20, depth=36, cfg=(1.1, 10.0)),
    "xxl": Config(dim=1536, heads=24, depth=48, cfg=(1.1, 10.0))}
PUBLISHED = {"b": "111M", "l": "343M", "xl": "775M", "xxl": "1.4B"}


# --- Layers of the tokenizer ----------------------------------------------------------------------

RMSNorm = partial(nn.RMSNorm, eps=1e-5)


def mlp(dim, hidden, out):
    """Return two linear layers with SiLU between them."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, out))


def rotate(x, rotary):
    """Turn pairs of neighbouring channels of x (B, heads, n, C) by angles: rotary (2, n, C/2)."""
    cos, sin = rotary
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def cos_and_sin(positions, width):
    """Return cos and sin (2, n, C/2) of angles for C channels at positions (n,).

    positions may be (n, axes): then each axis has `width` channels, so that C = axes * width.
    """
    omega = 10000 ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angles = (positions[..., None] * omega).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def grid_positions(side):
    """Return row and column (side^2, 2) of the patches of an image, row by row."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, dim, head):
        super().__init__()
        self.heads = dim // head
        linear = partial(nn.Linear, dim, dim)
        self.q = linear()
        self.k = linear()
        self.v = linear()
        self.proj = linear()
        self.q_norm = LayerNorm(head)
        self.k_norm = LayerNorm(head)

    def forward(self, x, context=None, rotary=None, **mask):
        """Return (B, n, dim) of x (B, n, dim), which attends to a context (B, m, dim) or to itself.

        rotary (2, n, head/2) tells the positions of x. The tokens of a context have none. mask:
        attn_mask or is_causal of scaled_dot_product_attention.
        """
        source = x if context is None else context
        q = self.q_norm(split_heads(self.q(x), self.heads))
        k = self.k_norm(split_heads(self.k(source), self.heads))   # (B, heads, m, head)
        v = split_heads(self.v(source), self.heads)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary) if context is None else k
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, **mask)))


class Block(nn.Module):
    """Pre-norm transformer block whose gates are zero at first."""

    def __init__(self, dim, head):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attention = Attention(dim, head)
        self.norm2 = LayerNorm(dim)
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
        return F.normalize(self.embedding.weight.float())

    @torch.compiler.disable  # TF32 is a global setting, which compiled code does not switch
    def nearest(self, z):
        """Return the codes (B, N) of unit vectors z (B, N, code_dim)."""
        with torch.autocast(z.device.type, enabled=False), common.true_float32():
            return (z @ self.codewords().T).argmax(-1)

    def forward(self, z):
        """Quantize vectors z (B, N, code_dim).

        Return code vectors like z with a straight-through gradient, codes (B, N), and for each
        token the codebook loss and the commitment loss of App. I, (2, B, N).
        """
        z = F.normalize(z.float(), dim=-1)
        codes = self.nearest(z)
        e = self.codewords()[codes]
        codebook = (e - z.detach()).square().mean(-1)
        commitment = 0.25 * (e.detach() - z).square().mean(-1)
        return z + (e - z).detach(), codes, torch.stack([codebook, commitment])

    def usage(self, codes):
        """Count these codes. Return the share of the codebook in the latest `window` tokens."""
        self.age += codes.numel()
        self.age[codes] = 0
        return (self.age < self.window).float().mean()


# --- The pixel diffusion decoder ------------------------------------------------------------------

class PixelBlock(nn.Module):
    """A DiT block whose modulation differs from patch to patch.

    It comes from the time embedding plus what the patch finds in the group by cross-attention,
    which adds nothing to the residual stream itself (Sec. 4).
    """

    def __init__(self, dim, head):
        super().__init__()
        self.time = mlp(dim, dim, dim)
        self.condition = mlp(dim, dim, dim)
        self.cross = Attention(dim, head)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention = Attention(dim, head)
        self.mlp = mlp(dim, 4 * dim, dim)

    def forward(self, x, time, group, rotary):        # (B, n, dim), (B or 1, dim), (B, q, dim)
        h = plain_norm(x)
        found = self.cross(h, plain_norm(self.condition(group)), rotary)
        m = self.modulation(F.silu(self.time(time)[:, None] + found))      # (B, n, 6 dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, -1)
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
        self.blocks = nn.ModuleList(
            PixelBlock(dim, config.head) for _ in range(config.pixel_depth))
        if config.repa_layer:
            self.repa = nn.Sequential(*mlp(dim, 2048, 2048), nn.SiLU(), nn.Linear(2048, 768))
        side = config.image_size // config.pixel_patch
        self.grid = (side, side)                                   # of patches
        self.register_buffer("rotary", cos_and_sin(grid_positions(side), config.head // 2),
                             persistent=False)

    def forward(self, x, t, group, repa=False):
        """Return the velocity (B, 3, h, w) of x (B, 3, h, w), and REPA's features or None.

        t: (B,) or (1,) in 0 .. 1. group: c(t), (B, q, decoder_dim). Features: (B, 256, 768).
        """
        c = self.config
        time = torch.cat([*cos_and_sin(1000 * t, c.pixel_dim)], 1)             # (B or 1, dim)
        group = plain_norm(self.condition(group))                  # (B, q, dim)
        patches = F.pixel_unshuffle(x, c.pixel_patch)
        x = self.input(patches.flatten(2).mT)                      # (B, n, dim)
        features = None
        for i, block in enumerate(self.blocks):
            if repa and i == c.repa_layer:
                pooled = F.adaptive_avg_pool2d(x.mT.unflatten(2, self.grid), 16)
                features = self.repa(pooled.flatten(2).mT)
            x = block(x, time, group, self.rotary)
        patches = self.output(plain_norm(x)).float().mT.unflatten(2, self.grid)
        return F.pixel_shuffle(patches, c.pixel_patch), features


# --- The tokenizer --------------------------------------------------------------------------------

def shift(u, beta):
    """Return the model time t = S(u) of token time u: slower near noise for beta above 1.

    With 1 / beta it is the inverse, u = S^-1(t).
    """
    return u / (u + beta * (1 - u))                                # Eq. 8


def prefixes(stream, lengths):
    """Yield the first codes of a stream in each of these lengths, as soon as they are there.

    stream: yields codes (B, n) with growing n. lengths: a list in ascending order; it is emptied.
    """
    for codes in stream:
        while lengths and lengths[0] <= codes.shape[1]:
            yield codes[:, :lengths.pop(0)]


@lru_cache
def side_stream(device):
    """Return the CUDA stream on which images are decoded beside the tokens, or None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Tokenizer(nn.Module):
    """Encoder, quantizer, causal layers and pixel diffusion decoder: images to codes and back."""
    # Set by `ready`: the perceptual losses of Eq. 7. They are functions, not modules, so that the
    # state dict does not contain their networks.
    lpips = None        # (images, images, dropout) -> parts of the distances (5, B)
    dino = None         # images -> features (B, 256, 768)
    loss_config = None  # the Config that has their weights

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patchify = nn.Conv2d(3, c.dim, c.patch, c.patch)
        self.query_table = nn.Embedding(c.query_rows, c.query_rank)
        self.query_linear = nn.Linear(c.query_rank, c.dim)
        self.encoder_layers = nn.ModuleList(Block(c.dim, c.head) for _ in range(c.depth))
        self.to_code = Matrix(c.dim, c.code_dim)
        self.quantizer = Quantizer(c.codebook, c.code_dim)
        self.from_code = Matrix(c.code_dim, c.decoder_dim)
        self.positions = nn.Embedding(c.query_rows, c.decoder_dim)
        self.decoder_layers = nn.ModuleList(
            Block(c.decoder_dim, c.head) for _ in range(c.decoder_depth))
        self.pixels = PixelDecoder(c)
        positions = grid_positions(c.image_size // c.patch)
        positions = F.pad(positions, (0, 0, 0, c.queries))         # (P + N, 2), 0 for queries
        self.register_buffer("rotary", cos_and_sin(positions, c.head // 2), persistent=False)
        # As released: blocks are the identity at first, the velocity is zero. But blocks narrower
        # than 768 get larger weights, without which `tiny` learns markedly slower.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ("layers." in name or "blocks." in name):
                dim = min(*module.weight.shape, 768)
                nn.init.trunc_normal_(module.weight, std=0.02 * math.sqrt(768 / dim))
                nn.init.zeros_(module.bias)
                if name.endswith("modulation"):
                    nn.init.zeros_(module.weight)
        for parameter in self.pixels.output.parameters():
            nn.init.zeros_(parameter)
        nn.init.trunc_normal_(self.query_table.weight)
        nn.init.trunc_normal_(self.positions.weight, std=0.02)
        codes = self.quantizer.embedding.weight.detach()
        codes.copy_(F.normalize(codes.uniform_(-1, 1)))

    def ready(self, config):
        """Attach the losses that a Config asks for. Raise UserError if they cannot be had."""
        c = self.config
        device = self.positions.weight.device
        self.loss_config = config
        if config.lpips_weight:
            self.lpips = load_lpips(device)
        if config.repa_weight and 0 < c.repa_layer < c.pixel_depth:
            self.dino = load_dino(device)
        self.idle_parameters = c.repa_layer > 0 and self.dino is None

    def features(self, images):
        """Return the encoder's output (B, N, dim) at the queries.

        All tokens attend to all patches, and query j to the queries up to j. So token j depends on
        no later query, and patches depend on no query.
        """
        N = self.config.queries
        patches = plain_norm(self.patchify(images).flatten(2).mT)                  # (B, P, dim)
        queries = self.query_linear(self.query_table.weight[:N])
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], 1)           # (B, P + N, dim)
        P = patches.shape[1]
        place = torch.arange(P + N, device=x.device)
        mask = place <= place.clamp(min=P - 1)[:, None]                            # (P + N, P + N)
        for layer in self.encoder_layers:
            x = layer(x, rotary=self.rotary, attn_mask=mask)
        return plain_norm(x[:, P:])

    def encode(self, images):
        """Return codes (B, N) of images (B, 3, h, w), as small integers.

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
            x = layer(x, is_causal=True)
        return plain_norm(x)

    def starts(self, u):
        """Return the first token of the group at token times u (...,) in [0, 1).

        As released it is the group whose time j / K is nearest, halves up. Then the steps of Eq. 8
        use each group once; Eq. 5 read literally has no group for the first step.
        """
        c = self.config
        return (u * c.groups + 0.5).long().clamp(max=c.groups - 1) * c.group_size

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
            start = self.starts(shift(t, 1 / c.beta) - 0.5 / c.groups)  # Eq. 5: ceil(t' K), from 1
        z, codes, losses = self.quantizer(self.to_code(self.features(images)))
        place = torch.arange(c.queries, device=u.device)
        counted = place < start[:, None] + c.group_size                            # (B, N)
        codebook, commitment = (losses * counted).sum((1, 2)) / counted.sum()
        tokens = start[:, None] + place[:c.group_size]                             # (B, q)
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
            likeness = F.cosine_similarity(features, self.dino(images), dim=-1)
            out["repa"] = (1 - likeness).mean()
            loss = loss + self.loss_config.repa_weight * out["repa"]
        if self.training:
            out["usage"] = self.quantizer.usage(codes)
            out["dead"] = (codes == codes[:1]).all(0).float().mean()
        return {"loss": loss, **out}

    @torch.no_grad()
    def decode(self, stream, noise, on_step=None, **options):
        """Return images (B, 3, h, w) in -1 .. 1 of a stream of codes. noise: common.Noise.

        stream yields all codes so far, (B, n). A diffusion step is done as soon as the tokens of
        its group are there, on CUDA beside the next tokens. on_step(images) gets the preview after
        each step, not clamped: where the same step would lead at t = 1. The result is the last
        preview. options: steps, solver, preview; None means the default of the config.
        """
        c = common.with_options(self.config, **options)
        steps = c.steps or c.groups
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        times = shift(u, c.beta).tolist()
        ends = (self.starts(u) + c.group_size).tolist()            # of the groups, in tokens
        start = noise.normal((3, c.image_size, c.image_size))
        side = side_stream(start.device)
        x = start                                    # kept: the other stream may not reuse it yet
        previous_v = None
        for t, t_next, codes in zip(times, times[1:], prefixes(stream, ends)):
            if side:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                          # of None: no effect
                z = self.condition(self.quantizer.codewords()[codes.long()])
                group = z[:, -c.group_size:].contiguous()          # one layout: compiled once
                v = slope = self.pixels(x, x.new_full((1,), t), group)[0]
                if c.solver == "adams" and previous_v is not None:
                    slope = 1.5 * v - 0.5 * previous_v  # for equal steps; of order 2 on these, too
                jump = v if c.preview == "v" and t_next < 1 else slope
                image = (x + (1 - t) * jump) / c.data_std
                x = x + (t_next - t) * slope
                previous_v = v
                if on_step:
                    on_step(image)
        if side:
            torch.cuda.current_stream().wait_stream(side)
        return image.clamp(-1, 1)

    def reconstruct(self, images, noise, on_step=None, **options):
        """Return images (B, 3, h, w) encoded and decoded, in -1 .. 1. noise: common.Noise."""
        return self.decode([self.encode(images)], noise, on_step, **options)

    def sampled(self):
        """Return the parts that sampling runs, see common.cast_once."""
        return [self.from_code, self.decoder_layers, self.pixels]


# --- Networks of the tokenizer's perceptual losses ------------------------------------------------

def standardised(images):
    """Return images (B, 3, h, w) in -1 .. 1 with ImageNet's mean 0 and deviation 1 per channel."""
    mean, deviation = images.new_tensor(
        [[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
    return (images - mean) / deviation


def vgg_features(vgg, images):
    """Yield five feature maps of images (B, 3, h, w) in -1 .. 1: relu1_2, 2_2, 3_3, 4_3, 5_3.

    vgg: state dict of VGG-16. h and w are 16 or more.
    """
    x = standardised(images)
    for layer in range(29):
        name = f"features.{layer}"
        if layer in (4, 9, 16, 23):
            yield x
            x = F.max_pool2d(x, 2)
        elif f"{name}.weight" in vgg:  # the other layers are ReLUs
            x = F.conv2d(x, vgg[f"{name}.weight"], vgg[f"{name}.bias"], padding=1).relu()
    yield x


def lpips_parts(weights, x, y, dropout):
    """Return five parts (5, B) whose sum is the LPIPS distance of images x and y (B, 3, h, w).

    LPIPS (Zhang et al., 2018) weights the squared differences of VGG-16 features. weights: the
    state dicts of VGG-16 and of the five layers of weights in one.
    """
    parts = []
    with torch.autocast(x.device.type, enabled=False):
        for i, (a, b) in enumerate(zip(vgg_features(weights, x), vgg_features(weights, y))):
            difference = F.normalize(a) - F.normalize(b)
            weighted = F.dropout(difference.square(), dropout) * weights[f"lin{i}.model.1.weight"]
            parts.append(weighted.sum(1).mean((1, 2)))
    return torch.stack(parts)


@torch.no_grad()
def dino_features(network, images):
    """Return DINOv2's patch features (B, 256, 768), at 224 pixels, of images (B, 3, h, w)."""
    x = F.interpolate(standardised(images), (224, 224), mode="bicubic")
    return network.forward_features(x)["x_norm_patchtokens"]


def published(url, sha256=None):
    """Return the content of a published file, kept where torch.hub keeps its downloads."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    return common.read_checkpoint(common.download(
        url, path, sha256, "or train without LPIPS and REPA: --set lpips_weight=0 repa_weight=0"))


def load_lpips(device):
    """Return lpips_parts with the published weights. Raise UserError if they cannot be had."""
    vgg = published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
    linear = published("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
                       "lpips/weights/v0.1/vgg.pth", "a78928a0af1e5f0f")
    weights = {}
    for name, value in (vgg | linear).items():
        if value.ndim == 4:
            value = value.to(memory_format=torch.channels_last)
        if "classifier" not in name:
            weights[name] = value.detach().to(device)
    return partial(lpips_parts, weights)


def load_dino(device):
    """Return dino_features with the published network. Raise UserError if it cannot be had."""
    state = published(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth")
    hint = "not available: --set repa_weight=0 trains without it"
    with common.untrusted("facebookresearch/dinov2", hint), common.rank_zero_first():
        network = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14", pretrained=False,
                                 trust_repo=True)
        network.load_state_dict(state)
    return partial(dino_features, network.eval().to(device))


# --- The AR model ---------------------------------------------------------------------------------

class LlamaBlock(nn.Module):
    """Pre-norm block: causal self-attention with rotary positions, then SwiGLU."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        hidden = 256 * math.ceil(dim / 96)  # 8/3 dim, rounded up to a multiple of 256
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.attention_norm = RMSNorm(dim)
        self.wqkv = Matrix(dim, 3 * dim)
        self.wo = Matrix(dim, dim)
        self.ffn_norm = RMSNorm(dim)
        self.w1 = Matrix(dim, hidden)
        self.w3 = Matrix(dim, hidden)
        self.w2 = Matrix(hidden, dim)

    def forward(self, x, rotary, cache=None, place=None, mask=None):
        """Return (B, n, dim) of x (B, n, dim).

        A single token comes with a cache of all keys and values, (B, heads, N, C) each. Its own are
        stored at place (1,). mask (1, N) bool: the places that are filled.
        """
        qkv = self.wqkv(self.attention_norm(x))
        q, k, v = split_heads(qkv, 3 * self.heads).chunk(3, 1)     # (B, heads, n, C) each
        q = rotate(q, rotary)
        k = rotate(k, rotary)
        if cache is not None:  # written as a whole: through a view, compiled code would copy it
            k = cache[0].index_copy_(2, place, k)
            v = cache[1].index_copy_(2, place, v)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        x = x + self.dropout(self.wo(merge_heads(h)))
        h = self.ffn_norm(x)
        return x + self.dropout(self.w2(F.silu(self.w1(h)) * self.w3(h)))


class Llama(nn.Module):
    """A language model of codes whose first token is the class (Touvron et al., 2023; LlamaGen)."""
    key_value_pairs = staticmethod(common.key_value_pairs)  # see compile_steps

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.class_embed = nn.Embedding(c.classes + 1, c.dim)      # the last one: no label
        self.token_embed = nn.Embedding(c.tokenizer.codebook, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(LlamaBlock(c) for _ in range(c.depth))
        self.norm = RMSNorm(c.dim)
        self.output = Matrix(c.dim, c.tokenizer.codebook)
        rotary = cos_and_sin(torch.arange(c.tokenizer.queries), c.dim // c.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)  # all tokens are equally likely at first

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
        labels = common.drop_labels(self, labels, drop)
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

    def draw(self, logits, u, scale, filters):
        """Return tokens (B,) drawn by u (B,) from logits (B, V), or, with guidance of this scale
        (1,), from logits (2B, V). filters: the other arguments of `probabilities`."""
        if len(logits) > len(u):
            logits, unconditional = logits.chunk(2)
            logits = unconditional + scale * (logits - unconditional)
        return draw_token(probabilities(logits, *filters), u)

    @torch.no_grad()
    def stream(self, labels, noise, *, prefix=(), tokens=None, **options):
        """Generate codes for labels (B,). Yield all codes so far, (B, 1) to (B, N), after each one.

        prefix (k,): the first codes of all images. tokens: stop after this many. options: cfg (the
        guidance scales of the logits of the first and the last token; 1 is off, 0 unconditional),
        temperature, top_k, top_p; None means the config's default. Nothing in the loop waits for
        the device. Raise UserError for options out of range.
        """
        c = common.with_options(self.config, **options)
        N = c.tokenizer.queries
        scales = torch.linspace(*c.cfg, N, device=labels.device)
        filters = (c.temperature, c.top_k, c.top_p)
        guided = c.cfg != (1, 1)
        codes = labels.new_zeros(len(labels), N)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, c.classes)])
        x = self.class_embed(labels)                               # (B or 2B, dim)
        shape = (len(x), c.heads, N, c.dim // c.heads)
        dtype = self.output(x).dtype                               # that of autocast, if it is on
        cache = self.key_value_pairs(c.depth, shape, dtype, x.device)
        draws = noise.uniform((N,))                                # one for each token
        places = torch.arange(N, device=x.device)
        visible = places <= places[:, None]                        # (N, N)
        for i in range(tokens or N):
            here = slice(i, i + 1)
            logits = self.step(x, cache, places[here], visible[here])
            if i < len(prefix):
                codes[:, i] = prefix[i]
            else:
                codes[:, i] = self.draw(logits, draws[:, i], scales[here], filters)
            yield codes[:, :i + 1]
            x = self.token_embed(codes[:, i])
            if guided:
                x = x.repeat(2, 1)


def probabilities(logits, temperature, top_k, top_p):
    """Return the distribution (B, V) that tokens are drawn from, given logits (B, V).

    The filters act in this order: temperature, the k most likely tokens, the most likely tokens up
    to the one with which their joint probability passes p.
    """
    logits = logits / max(temperature, 1e-5)
    if top_k:
        largest = logits.topk(min(top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < largest[:, -1:], -math.inf)
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
    # Rounding must not lead past the last token.
    target = torch.minimum(u * total, torch.nextafter(total, -total))
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
    "prefix_image": dict(help="take the first tokens from this picture (Fig. 6)"),
    "prefix_tokens": dict(type=common.natural, help="how many, at most all")}


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
    if (prefix_image is None) != (prefix_tokens is None):
        raise UserError("--prefix-image and --prefix-tokens go together")
    prefix = ()
    if prefix_image:
        picture = common.to_float(common.load_picture(prefix_image, c.image_size)).to(labels.device)
        prefix = tokenizer.encode(picture[None])[0, :prefix_tokens]
    stream = model.stream(labels, noise, prefix=prefix, tokens=tokens, **options)
    images = tokenizer.decode(stream, noise, on_step, steps=steps, solver=solver, preview=preview)
    facts = {}
    if prefix_image:
        facts["distance_to_reference"] = (images - picture).square().mean((1, 2, 3)).sqrt()
    return images, facts


def compile_steps(model, tokenizer):
    """Compile what sampling repeats: the blocks, of equal code, and the pixel decoder. The step of
    a token and its draw are recorded as graphs."""
    for layer in model.layers:
        layer.compile()
    model.step = common.recorded(model.step)
    model.draw = common.recorded(model.draw)
    model.key_value_pairs = lru_cache(common.key_value_pairs)
    tokenizer.pixels.compile()


def check(model, tokenizer):
    """Raise UserError if the model was made for another kind of tokenizer, or is a tokenizer."""
    if isinstance(model, Tokenizer):
        raise UserError("--ckpt is a tokenizer: the file of an AR model belongs there")
    has, needs = tokenizer.config, model.config.tokenizer
    for name in ("queries", "codebook", "image_size"):
        if getattr(has, name) != getattr(needs, name):
            raise UserError(f"the model was trained with a tokenizer of another {name}")


# --- Stages: what is trained, in order, and how ---------------------------------------------------

def random_scale_crop(image, size, rng):
    """Views: a random square of the picture at 1 to 1.25 times the size, and its mirror image."""
    image = common.shrink(image, round(size * rng.uniform(1, 1.25)))
    crop = common.cut(image, size, *(rng.integers(side - size + 1) for side in image.size))
    return [crop, common.mirror(crop)]


def ten_crops(image, size, rng):
    """Views: corners and centre of the picture at 1.1 times the size, and their mirror images."""
    image = common.centre_crop(image, int(size * 1.1))
    far = image.width - size
    crops = [common.cut(image, size, left, top) for top in (0, far) for left in (0, far)]
    crops.append(common.cut(image, size, far // 2, far // 2))
    return crops + [common.mirror(crop) for crop in crops]


def load_tokenizer(path):
    """Return the frozen tokenizer of a checkpoint, ours or released, or raise UserError."""
    tokenizer = load_official(path)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{path} holds an AR model, not a tokenizer")
    return tokenizer.requires_grad_(False)


def paper_tokenizer(steps, batch):
    """Return the paper's recipe for the tokenizer, whose training it counts in steps."""
    return Recipe(lr=2e-4, batch=batch, epochs=steps * batch / 1281167, warmup=500 / steps,
                  weight_decay=0.0, clip=1.0, ema=0.999)


PAPER_TOKENIZER = paper_tokenizer(210_000, 1024)
PAPER_AR = Recipe(lr=4e-4, batch=1024, epochs=300, decay=50 / 300, final=1e-5 / 4e-4,
                  weight_decay=0.05, clip=1.0)
TOKENIZER_RECIPES = {
    "tiny": replace(PAPER_TOKENIZER, muon=True, lr=5e-3, batch=16, epochs=1.4, warmup=0.02,
                    decay=0.4, ema=0.998),
    "b": paper_tokenizer(50_000, 256),
    "l": PAPER_TOKENIZER, "xl": PAPER_TOKENIZER, "xxl": PAPER_TOKENIZER}
AR_RECIPES = {
    "tiny": replace(PAPER_AR, muon=True, lr=4e-3, batch=64, epochs=1.1, warmup=0.03, decay=0.5,
                    final=0.0, ema=0.998),
    "b": replace(PAPER_AR, epochs=50),
    "l": PAPER_AR, "xl": PAPER_AR, "xxl": PAPER_AR}
STAGES = [
    Stage("tokenizer", lambda config: Tokenizer(config.tokenizer), TOKENIZER_RECIPES,
          lambda config: random_scale_crop if config.crops == 10 else common.centre,
          load=load_tokenizer),
    Stage("ar", Llama, AR_RECIPES,
          lambda config: ten_crops if config.crops == 10 else common.centre,
          first_stage="tokenizer")]


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
# Entry of a tokenizer -> the fields that its shape tells; "_" is none.
SHAPES = """\
patchify.weight            -> dim _ patch
query_table.weight         -> query_rows query_rank
quantizer.embedding.weight -> codebook code_dim
from_code.weight           -> decoder_dim
pixels.input.weight        -> pixel_dim
"""
# Field of the released configuration of a tokenizer -> ours, where shapes do not tell.
FIELDS = """\
sampling_resolution -> image_size
num_all_queries     -> queries
num_query_groups    -> groups
num_denoising_steps -> steps
data_std            -> data_std
time_shift          -> beta
repa_layer          -> repa_layer
"""


def load_official(path, **overrides):
    """Return the tokenizer or the AR model in a released checkpoint; the latter also of LlamaGen.

    A tokenizer may also come from one of our checkpoints. A tokenizer's EMA weights are used if the
    file has them, an AR model's plain ones, as its authors do. overrides: fields of TokenizerConfig
    or Config. Raise UserError for an entry that is missing, extra or misshapen.
    """
    content = common.read_checkpoint(path)
    with common.untrusted(path, "not a D-AR checkpoint"):
        if content.get("stage") == "tokenizer":
            return from_released(content["model"], {}, path, **content["config"]["tokenizer"])
        state = common.unwrap(content, "model", "module", "state_dict", "ema")
        if "quant_in_conv.weight" in state:
            state = common.unwrap(content, "ema", "model", "module", "state_dict")
        config = content.get("config", {})
        config = getattr(config, "_data", config)
        return from_released(state, config.get("model", {}), path, **overrides)


def from_released(state, released, path="the checkpoint", **overrides):
    """Return the model of a released state dict, whose shapes give the configuration.

    released: the stored configuration of a tokenizer, a dict, for what shapes do not tell; what it
    lacks is as published.
    """
    state = common.renamed(state, RELEASED)
    if "token_embed.weight" in state:
        codebook, dim = state["token_embed.weight"].shape
        preset = next((preset for preset in PRESETS.values() if preset.dim == dim), Config())
        fields = dict(
            dim=dim, heads=dim // 64, depth=len(numbered(state, r"layers\.(\d+)")),
            classes=len(state["class_embed.weight"]) - 1, cfg=preset.cfg,
            tokenizer=TokenizerConfig(codebook=codebook))
        module = Llama(Config(**fields | overrides))
    else:
        for name in ("to_code.weight", "from_code.weight", "pixels.input.weight",
                     "pixels.output.weight"):
            state[name] = state[name].flatten(1)            # a 1x1 convolution is a linear layer
        fields = dict(
            pixel_patch=math.isqrt(state["pixels.input.weight"].shape[1] // 3),
            depth=len(numbered(state, r"encoder_layers\.(\d+)")),
            decoder_depth=len(numbered(state, r"decoder_layers\.(\d+)")),
            pixel_depth=len(numbered(state, r"pixels\.blocks\.(\d+)")))
        for line in SHAPES.splitlines():
            name, _, *axes = line.split()
            fields.update(zip(axes, state[name].shape))
        del fields["_"]
        released = released | released.get("diff_decoder", {})
        for line in FIELDS.splitlines():
            theirs, _, ours = line.split()
            if theirs in released:
                fields[ours] = released[theirs]
        if "pixels.repa.0.weight" not in state:
            fields["repa_layer"] = 0
        module = Tokenizer(TokenizerConfig(**fields | overrides))
        state.setdefault("quantizer.age", module.quantizer.age)
        state.pop("quantizer.codebook_used", None)          # a monitor
    return common.load_strict(module, state, path).eval()


def main():
    """Print the presets with their parameter counts, and walk one batch through the tiny model."""
    common.print_presets(
        PRESETS, PUBLISHED, tokenizer=lambda config: Tokenizer(config.tokenizer), model=Llama)
    print("Published tokenizers: 113M for b; 300M for the others, without 7M of the REPA head.")
    print("\nTiny: images (2, 3, 32, 32) through Tokenizer.forward")
    common.walk(Tokenizer(PRESETS["tiny"].tokenizer), torch.rand(2, 3, 32, 32))
    print("\nTiny: codes (2, 64) and labels (2,) through Llama.forward")
    common.walk(Llama(PRESETS["tiny"]), torch.zeros(2, 64, dtype=torch.long), torch.arange(2))


if __name__ == "__main__":
    common.run_script(main)
