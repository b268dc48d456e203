"""D-AR beyond parity: clocks and solvers against closed forms, causality, streaming, cached against plain, options."""
import argparse
import dataclasses
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import dar
from common import Noise, UserError
from dar import Config, Decoding, Llama, Tokenizer, TokenizerConfig

SMALL = TokenizerConfig(image_size=16, patch=4, dim=64, depth=2, queries=12, query_rows=16, codebook=32, code_dim=4,
                        decoder_dim=128, decoder_depth=2, groups=4, pixel_patch=4, pixel_dim=64, pixel_depth=2,
                        repa_layer=0, steps=4)
CONFIG = Config(image_size=16, classes=5, dim=64, heads=2, depth=2, dropout=0.0, cfg=(1.5, 1.5), crops=1,
                lpips_weight=0.0, repa_weight=0.0, tokenizer=SMALL)


def shaken(module):
    """The released initialisation has zeros: with these weights everything matters."""
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def tokenizer(**changes):
    torch.manual_seed(0)
    return shaken(Tokenizer(dataclasses.replace(SMALL, **changes)))


def llama(**changes):
    torch.manual_seed(1)
    return shaken(Llama(dataclasses.replace(CONFIG, **changes)))


def images(n, size=16):
    return common.to_float(torch.stack([common.from_pil(common.draw_shape(k, size)) for k in range(n)]))


def codes_of(n, config=SMALL):
    return torch.from_numpy(np.random.default_rng(0).integers(config.codebook, size=(n, config.queries)))


# --- Clocks and groups ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 4.0])
def test_the_two_clocks_are_inverse(beta):
    """Eq. 5 undoes Eq. 8, both keep 0 and 1, and beta = 2 gives the published times."""
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(dar.unshift(dar.shift(u, beta), beta), u)
    assert dar.shift(u, beta)[[0, -1]].tolist() == [0, 1]
    eighths = torch.arange(9, dtype=torch.float64) / 8
    published = torch.tensor([0, 1 / 15, 1 / 7, 3 / 13, 1 / 3, 5 / 11, 3 / 5, 7 / 9, 1], dtype=torch.float64)
    torch.testing.assert_close(dar.shift(eighths, 2.0), published)


@pytest.mark.parametrize("N,K", [(256, 8), (256, 1), (256, 16), (12, 4), (30, 10), (24, 6)])
def test_groups_follow_the_nearest_rule(N, K):
    """Group 0 has half a share, the last one and a half, the others one; halves go up; each of the K sampling times of
    Eq. 8 has its own group. Ceiling instead of rounding, or a float that falls short of a whole number, fails."""
    t = tokenizer(queries=N, query_rows=N, groups=K)
    q = N // K
    edges = torch.tensor([(2 * j - 1) / (2 * K) for j in range(1, K)], dtype=torch.float64)
    assert t.starts(edges).tolist() == [j * q for j in range(1, K)]
    assert t.starts(edges - 1e-9).tolist() == [(j - 1) * q for j in range(1, K)]
    assert t.starts(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)).tolist() == [0, N - q]
    decoding = Decoding(t, torch.zeros(1, 3, 16, 16), steps=K)
    assert decoding.ends == [q * (j + 1) for j in range(K)]


def test_more_steps_than_groups_repeat_groups_in_order():
    """Table 2: 4, 12 and 16 steps for 8 groups."""
    t = tokenizer(queries=256, query_rows=256, groups=8)
    for steps in (4, 12, 16):
        starts = Decoding(t, torch.zeros(1, 3, 16, 16), steps=steps).starts
        assert starts == [min(math.floor(i / steps * 8 + 0.5), 7) * 32 for i in range(steps)]


# --- Solvers against closed forms -------------------------------------------------------------------------------------

def solve(velocity, steps, solver, beta=1.0, on_step=None, preview=None):
    """The tokenizer's decoder with its network replaced by v(x, t); x_0 = 1."""
    t = tokenizer(groups=1, beta=beta, data_std=1.0)
    t.pixels.forward = lambda x, t, c: (velocity(x, t.double()[:, None, None, None]), None)
    return t.decode(codes_of(1), torch.ones(1, 3, 16, 16, dtype=torch.float64), steps=steps, solver=solver,
                    preview=preview, on_step=on_step)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("adams", 2)])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_order_of_each_solver(solver, beta, order):
    """dx/dt = -2 t x has x(1) = x(0) / e. Twice the steps: Euler halves the error, Adams-Bashforth quarters it."""
    def error(steps):
        return (solve(lambda x, t: -2 * t * x, steps, solver, beta) - math.exp(-1)).abs().max().item()
    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.1)


def test_adams_bashforth_by_hand():
    """Two unequal steps of the shifted clock: Euler, then weights 1.5 and -0.5."""
    seen = []

    def velocity(x, t):
        seen.append(t.item())
        return x * (3.0 if t == 0 else 5.0)
    t1 = dar.shift(torch.tensor(0.5, dtype=torch.float64), 2.0).item()
    x1 = 1 + t1 * 3
    expected = x1 + (1 - t1) * (1.5 * 5 * x1 - 0.5 * 3)
    assert solve(velocity, 2, "adams", 2.0)[0, 0, 0, 0].item() == pytest.approx(expected)
    assert seen == pytest.approx([0, t1])


def test_jump_estimates_of_a_straight_path_are_the_image():
    """v = x_1 - x_0 makes every preview the image, whatever the solver, from the first step on."""
    for solver in ("euler", "adams"):
        for preview in ("solver", "v"):
            seen = []
            solve(lambda x, t: torch.full_like(x, 0.5 - 1.0), 8, solver, 2.0, lambda k, x: seen.append(x), preview)
            assert len(seen) == 8 and all((x - 0.5).abs().max() < 1e-12 for x in seen)


def test_the_loss_is_the_error_of_the_velocity():
    """A network that says zero: the flow loss is mean (sigma x - x_0)^2 / sigma^2, at any u."""
    t = Tokenizer(SMALL).eval()
    x, noise = images(6), torch.randn(6, 3, 16, 16)
    out = t(x, u=torch.rand(6), noise=noise)
    assert out["flow"].item() == pytest.approx(((0.6 * x - noise) / 0.6).square().mean().item(), rel=1e-5)


def test_uniform_times_are_the_papers():
    """times = "uniform": the draw is the network's clock, the group follows from Eq. 5."""
    t, seen = tokenizer(times="uniform"), []
    plain = t.pixels.forward
    t.pixels.forward = lambda x, s, c, repa: seen.append(s) or plain(x, s, c, repa)
    draws = torch.tensor([0.1, 0.3, 0.6])
    t(images(3), u=draws, noise=torch.zeros(3, 3, 16, 16))
    assert torch.equal(seen[0], draws)


# --- Causality --------------------------------------------------------------------------------------------------------

def test_tokens_never_depend_on_later_queries():
    """Another query j changes tokens from j on and none before; and it does change them."""
    t, x = tokenizer(), images(2)
    before = t.features(x)
    t.query_table.weight.data[7] += 1
    after = t.features(x)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(2).min() > 1e-4


def test_patches_do_not_see_queries_but_queries_see_all_patches():
    t, x = tokenizer(), images(2)
    mean = t.features(x)
    x[:, :, -4:, -4:] += 0.5  # the last patch
    assert (t.features(x) - mean).abs().amax(2).min() > 1e-4
    t.query_table.weight.data += 1  # were patches to see queries, query 0 would change through them
    changed = t.features(x)
    t.query_table.weight.data[1:] += 1
    assert torch.equal(t.features(x)[:, 0], changed[:, 0])


def test_a_later_token_leaves_earlier_previews_untouched():
    """The condition of group g follows from tokens up to its end; so do the previews, bit for bit."""
    t, noise = tokenizer(), torch.randn(2, 3, 16, 16)
    first, second = codes_of(2), codes_of(2)
    second[:, 7] = (second[:, 7] + 1) % SMALL.codebook  # in group 2 of 0 .. 3
    seen = [[], []]
    for codes, previews in zip((first, second), seen):
        t.decode(codes, noise, on_step=lambda k, x, previews=previews: previews.append(x))
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [True, True, False, False]


def test_counted_tokens_are_the_prefix():
    """Codebook and commitment losses know the tokens up to the drawn group's end and no others."""
    t, x = tokenizer(), images(4)
    u = torch.tensor([0.0, 0.3, 0.6, 0.9])
    _, codes, codebook, _ = t.quantizer(t.to_code(t.features(x)))
    ends = [3, 6, 9, 12]
    assert (t.starts(u) + 3).tolist() == ends
    expected = sum(codebook[b, :end].sum() for b, end in enumerate(ends)) / sum(ends)
    torch.testing.assert_close(t(x, u=u)["codebook"], expected)


# --- Quantizer --------------------------------------------------------------------------------------------------------

def test_the_nearest_codeword_is_found_and_gradients_pass_straight_through():
    q = dar.Quantizer(16, 4)
    q.embedding.weight.data.mul_(torch.rand(16, 1) + 0.5)  # what is stored need not be of length one
    z = torch.randn(2, 5, 4, requires_grad=True)
    out, codes, codebook, commitment = q(z)
    unit, words = F.normalize(z, dim=-1), F.normalize(q.embedding.weight, dim=-1)
    assert torch.equal(codes, torch.cdist(unit, words[None].expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(out, words[codes])
    weight = torch.randn(2, 5, 4)
    straight = torch.autograd.grad((out * weight).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(straight, torch.autograd.grad((unit * weight).sum(), z, retain_graph=True)[0])
    torch.testing.assert_close(commitment, 0.25 * codebook)
    assert torch.autograd.grad(codebook.sum(), z, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(commitment.sum(), q.embedding.weight, allow_unused=True)[0] is None


def test_usage_counts_the_latest_codes():
    q = dar.Quantizer(10, 2, window=6)
    assert q.usage(torch.tensor([[1, 2, 2]])).item() == pytest.approx(0.2)
    assert q.usage(torch.tensor([[3, 4, 4]])).item() == pytest.approx(0.4)
    assert q.usage(torch.tensor([[0, 0, 0]])).item() == pytest.approx(0.3)  # 1 and 2 have left the window


# --- Streaming --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [4, 3, 7])
def test_streaming_is_decoding_afterwards(steps):
    """Bit for bit: pictures made while tokens come, and pictures of the finished tokens."""
    model, t, labels = llama(), tokenizer(), torch.tensor([0, 3, 5])
    streamed = dar.generate(model, t, labels, Noise.of(0, range(3)), steps=steps)[0]
    noise = Noise.of(0, range(3))
    start = noise.normal((3, 16, 16))
    codes = model.sample(labels, noise)
    assert torch.equal(streamed, t.decode(codes, start, steps=steps).clamp(-1, 1))


def test_previews_come_before_the_later_tokens():
    """At the time of a preview only its own tokens are there."""
    model, t, order = llama(), tokenizer(), []
    step = model.step
    model.step = lambda x, cache, at, *rest: order.append(int(at)) or step(x, cache, at, *rest)
    dar.generate(model, t, torch.tensor([1]), Noise.of(0, [0]), on_step=lambda x: order.append("picture"))
    assert order == [0, 1, 2, "picture", 3, 4, 5, "picture", 6, 7, 8, "picture", 9, 10, 11, "picture"]


def test_the_condition_in_pieces_is_the_condition_at_once():
    """Causal layers with a cache, any pieces: what training computes in one go."""
    t = tokenizer()
    z = t.quantizer.codewords()[codes_of(2)]
    whole, past, parts = t.condition(z)[0], (), []
    for a, b in ((0, 1), (1, 5), (5, 12)):
        part, past = t.condition(z[:, a:b], past)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_pictures_from_the_first_tokens_are_the_previews():
    """Table 5: stopping after n tokens gives the preview that the whole run showed at that point."""
    model, t, labels, seen = llama(), tokenizer(), torch.tensor([0, 3]), []
    dar.generate(model, t, labels, Noise.of(0, range(2)), on_step=seen.append)
    for n, k in ((3, 1), (6, 2), (8, 2), (12, 4)):
        image = dar.generate(model, t, labels, Noise.of(0, range(2)), tokens=n)[0]
        assert torch.equal(image, seen[k - 1]), n
    with pytest.raises(UserError, match="from 3 .one group. to 12"):
        dar.generate(model, t, labels, Noise.of(0, range(2)), tokens=2)


# --- The AR model -----------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("cfg", [1.0, 2.5, (1.0, 3.0), 0.0])
def test_cached_logits_are_plain_logits_at_every_position(monkeypatch, cfg):
    model, labels, cached, plain = llama(), torch.tensor([0, 4, 5]), [], []
    for sampler, seen in ((model.sample, cached), (model.sample_plainly, plain)):
        keep = dar.probabilities
        monkeypatch.setattr(dar, "probabilities", lambda logits, *a, seen=seen: seen.append(logits) or keep(logits, *a))
        codes = sampler(labels, Noise.of(3, range(3)), cfg=cfg)
        monkeypatch.setattr(dar, "probabilities", keep)
        seen.append(codes)
    assert torch.equal(cached.pop(), plain.pop())
    torch.testing.assert_close(torch.stack(cached), torch.stack(plain), rtol=0, atol=1e-4)


@torch.no_grad()
def test_compiled_sampling_is_eager_sampling(traced):
    """A mask and a rounded length in place of the exact one; memory that stays; few graphs for all lengths."""
    model, t, labels, how = llama(), tokenizer(), torch.tensor([0, 1, 2]), {"cfg": 3.0, "interval": (0.0, 0.5)}
    codes = model.sample(labels, Noise.of(0, range(3)), **how)
    images = dar.generate(model, t, labels, Noise.of(0, range(3)), **how)[0]
    dar.compile_steps(model, t)
    model.stride = 4
    for _ in range(2):
        assert torch.equal(model.sample(labels, Noise.of(0, range(3)), **how), codes)
    compiled = dar.generate(model, t, labels, Noise.of(0, range(3)), **how)[0]
    torch.testing.assert_close(compiled, images, rtol=0, atol=1e-5)
    assert len(model.kept) == 1 and len(traced) <= 5


def test_without_guidance_nothing_is_doubled():
    """Rows of each step: doubled only up to the last token that is guided."""
    model, rows = llama(), []
    step = model.step
    model.step = lambda x, *rest: rows.append(len(x)) or step(x, *rest)
    model.sample(torch.tensor([0, 1]), Noise.of(0, range(2)), cfg=1.0)
    assert rows == [2] * 12
    rows.clear()
    guided = model.sample(torch.tensor([0, 1]), Noise.of(0, range(2)), cfg=3.0, interval=(0.0, 0.25))
    assert rows == [4] * 4 + [2] * 8
    plain = model.sample_plainly(torch.tensor([0, 1]), Noise.of(0, range(2)), cfg=3.0, interval=(0.0, 0.25))
    assert torch.equal(guided, plain)


def test_the_guidance_scale_means_what_it_says():
    """1 is the conditional model, 0 the unconditional one."""
    model, labels = llama(), torch.tensor([0, 1, 2])
    null = torch.full_like(labels, CONFIG.classes)
    assert torch.equal(model.sample(labels, Noise.of(0, range(3)), cfg=0.0),
                       model.sample(null, Noise.of(0, range(3)), cfg=1.0))
    assert not torch.equal(model.sample(labels, Noise.of(0, range(3)), cfg=1.0),
                           model.sample(null, Noise.of(0, range(3)), cfg=1.0))


def test_given_tokens_are_kept_and_steer_the_rest():
    """Zero-shot layout control: the prefix stays, row by row of any length, and later tokens take it into account."""
    model, labels = llama(), torch.tensor([0, 1, 2])
    prefix = codes_of(3)
    for row, k in enumerate((0, 5, 12)):
        prefix[row, k:] = -1
    free = model.sample(labels, Noise.of(0, range(3)))
    codes = model.sample(labels, Noise.of(0, range(3)), prefix=prefix)
    assert torch.equal(codes[0], free[0])
    assert torch.equal(codes[1, :5], prefix[1, :5]) and torch.equal(codes[2], prefix[2])
    assert not torch.equal(codes[1, 5:], free[1, 5:])
    given = model.logits(codes[1:2], labels[1:2])[:, 5]  # what token 5 should be drawn from
    null = model.logits(codes[1:2], torch.tensor([5]))[:, 5]
    u = Noise.of(0, [1]).uniform((12,))[:, 5]
    assert dar.pick(dar.probabilities(null + 1.5 * (given - null)), u).item() == codes[1, 5].item()


def test_tokens_are_drawn_with_their_probabilities():
    """Inverse transform: frequencies over an even grid of u; impossible tokens never; u at both ends."""
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    u = (torch.arange(10000) + 0.5) / 10000
    counts = dar.pick(probs.expand(10000, -1), u).bincount(minlength=6)
    assert counts.tolist() == pytest.approx([0, 2000, 0, 5000, 3000, 0], abs=1)
    ends = torch.tensor([0.0, np.nextafter(np.float32(1), np.float32(0))])
    assert dar.pick(probs.expand(2, -1), ends).tolist() == [1, 4]


def test_an_image_does_not_depend_on_its_batch():
    model, t, labels = llama(), tokenizer(), torch.tensor([0, 3, 5, 1])
    whole = dar.generate(model, t, labels, Noise.of(7, range(4)))[0]
    alone = torch.cat([dar.generate(model, t, labels[k:k + 1], Noise.of(7, [k]))[0] for k in range(4)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-4)


def test_a_temperature_of_zero_takes_the_most_likely_token():
    model, labels = llama(), torch.tensor([2])
    a, b = (model.sample(labels, Noise.of(seed, [0]), temperature=0.0, cfg=1.0) for seed in (0, 1))
    assert torch.equal(a, b) and torch.equal(model.logits(a, labels).argmax(-1), a)


def test_labels_are_dropped_at_the_asked_rate(monkeypatch):
    model, seen = llama(label_drop=0.3).train(), []
    monkeypatch.setattr(model, "logits", lambda codes, labels: seen.append(labels) or torch.zeros(*codes.shape, 32))
    torch.manual_seed(0)
    model(torch.zeros(4000, 12, dtype=torch.long), torch.zeros(4000, dtype=torch.long))
    assert (seen[0] == CONFIG.classes).float().mean() == pytest.approx(0.3, abs=0.03)
    model.eval()(torch.zeros(400, 12, dtype=torch.long), torch.zeros(400, dtype=torch.long))
    assert (seen[1] == 0).all()


# --- Losses of the tokenizer ------------------------------------------------------------------------------------------

class Judge(torch.nn.Module):
    """Stands in for LPIPS and for DINOv2."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, y, dropout):
        return (x - y).square().mean((1, 2, 3))[None] * self.weight

    def forward_features(self, x):
        assert x.shape[2:] == (224, 224)
        return {"x_norm_patchtokens": F.avg_pool2d(x, 14).flatten(2).transpose(1, 2).repeat(1, 1, 256)}


def test_judges_are_neither_saved_nor_trained(monkeypatch):
    """They judge with the weights of Eq. 7; state_dict, EMA and optimizer know nothing of them."""
    monkeypatch.setattr(dar, "load_lpips", lambda folder: Judge())
    monkeypatch.setattr(dar, "load_dino", lambda folder: Judge())
    c = dataclasses.replace(SMALL, image_size=64, repa_layer=1)
    t = Tokenizer(c)
    names = list(t.state_dict())
    dar.judged(t, dataclasses.replace(CONFIG, image_size=64, lpips_weight=0.5, repa_weight=0.25, tokenizer=c))
    assert list(t.state_dict()) == names and "pixels.repa.0.weight" in names
    assert all(p.requires_grad for p in t.parameters())
    out = t(images(2, 64))
    parts = out["flow"] + out["codebook"] + out["commitment"] + 0.5 * out["lpips"] + 0.25 * out["repa"]
    torch.testing.assert_close(out["loss"], parts)
    out["loss"].backward()
    assert t.pixels.repa[0].weight.grad.abs().sum() > 0 and t.judges[0][0].weight.grad is None
    without = Tokenizer(c)
    without(images(2, 64))["loss"].backward()
    assert all(p.grad is not None for p in without.parameters())  # distributed training waits for every gradient


def test_lpips_dropout_is_unbiased_and_off_in_evaluation():
    torch.manual_seed(0)
    network = dar.LPIPS()
    for p in network.lin:
        p.data.uniform_(0, 1)
    x, y = images(4, 32), images(8, 32)[4:]
    exact = network(x, y)
    drawn = torch.stack([network(x, y, 0.5) for _ in range(30)])
    assert (drawn.std(0) > 0).all()
    assert ((drawn.mean(0) - exact).abs() < 4 * drawn.std(0) / math.sqrt(30) + 1e-7).all()
    seen, t = [], Tokenizer(SMALL)
    t.judges = (lambda x, y, dropout: seen.append(dropout) or network(x, y, dropout), 0.5), None
    for mode in (True, False):
        t.train(mode)(F.interpolate(images(2), 16))
    assert seen == [0.5, 0.0]


def test_a_feature_map_of_zeros_gives_no_gradient_that_is_not_finite():
    """All channels zero: the length has an infinite slope there."""
    network = dar.LPIPS()
    for layer in network.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.data.fill_(-100.0)
    for p in network.lin:
        p.data.fill_(1.0)
    y = images(2, 32).requires_grad_(True)
    network(images(2, 32), y).sum().backward()
    assert y.grad.isfinite().all()


def test_missing_networks_are_one_line(tmp_path, monkeypatch):
    """It names the files and the flag that does without them; a wrong file is refused by its checksum."""
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="vgg16-397923af.pth.*vgg.pth.*dinov2.*--set lpips_weight=0 repa_weight=0") as e:
        dar.judged(tokenizer(), dataclasses.replace(dar.PRESETS["l"], teachers=str(tmp_path)))
    assert "\n" not in str(e.value) and "data-root" not in str(e.value) and "teachers=FOLDER" in str(e.value)
    torch.save({}, tmp_path / "vgg16-397923af.pth")
    torch.save({"lin0.model.1.weight": torch.ones(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="vgg.pth is not the published file"):
        dar.load_lpips(tmp_path)
    monkeypatch.setattr(torch.hub, "load", offline)
    torch.save({}, tmp_path / "dinov2_vitb14_pretrain.pth")
    with pytest.raises(UserError, match="facebookresearch/dinov2 .no network.; --set repa_weight=0"):
        dar.load_dino(tmp_path)


# --- Released files ---------------------------------------------------------------------------------------------------

def released(module):
    """A state dict under the released names, 1x1 convolutions and monitor included."""
    table = [(r"^query_table", "query_embedding"), (r"^to_code", "quant_in_conv"), (r"^from_code", "quant_out_conv"),
             (r"^quantizer\.age", "quantize.codebook_used"), (r"^quantizer\.", "quantize."),
             (r"^positions", "decoder_embedding"), (r"^(pixels\.blocks\.\d+\.)condition", r"\1cond_embed"),
             (r"^pixels\.condition", "pixels.cond_mlp"), (r"^pixels\.input", "pixels.conv_in"),
             (r"^pixels\.output", "pixels.conv_out"), (r"^pixels\.repa", "pixels.repa_out"),
             (r"\.cross\.", ".cross_attn."), (r"\.modulation", ".adaLN_modulation.1"),
             (r"\.time\.", ".time_embed.mlp."),
             (r"^pixels\.", "diff_decoder.net."), (r"^class_embed", "cls_embedding.embedding_table"),
             (r"^token_embed", "tok_embeddings")]
    state = {}
    for name, value in module.state_dict().items():
        for ours, theirs in table:
            name = re.sub(ours, theirs, name)
        state[name] = value[:, :, None, None] if "conv" in name and value.ndim == 2 else value
    return state


def released_config(t):
    c = t.config
    return {"model": {"encoder_patch_size": c.patch, "num_all_queries": c.queries, "num_query_groups": c.groups,
                      "queries_per_step": c.queries // c.groups, "num_denoising_steps": c.steps, "vq_enable": True,
                      "sampling_resolution": c.image_size, "query_low_rank": True,
                      "diff_decoder": {"dim": c.pixel_dim, "depth": c.pixel_depth, "patch_size": c.pixel_patch,
                                       "data_std": c.data_std, "time_shift": c.beta, "repa_layer": c.repa_layer}}}


@pytest.fixture
def pickled(monkeypatch):
    """The released configuration class: nothing but a dict, in a module of its own."""
    module = types.ModuleType("config_util")
    exec("class Config:\n    def __init__(self, data):\n        self._data = data", module.__dict__)
    monkeypatch.setitem(sys.modules, "config_util", module)
    return module.Config


@pytest.mark.parametrize("form", ["training", "no ema", "bare"])
def test_released_tokenizers_load_in_every_form(tmp_path, pickled, form):
    """EMA preferred; the pickled configuration is read as data; a bare state dict takes what shapes do not tell from
    the published configuration or the caller."""
    t = tokenizer(image_size=128, repa_layer=1, pixel_patch=8)
    other = {k: v + 1 for k, v in released(t).items()}
    content = {"training": {"model": other, "ema": released(t), "args": argparse.Namespace(lr=1),
                            "config": pickled(released_config(t)), "steps": 3},
               "no ema": {"model": {f"_orig_mod.{k}": v for k, v in released(t).items()},
                          "config": pickled(released_config(t))}, "bare": released(t)}[form]
    torch.save(content, tmp_path / "tokenizer.pt")
    more = {} if form != "bare" else dict(image_size=128, queries=12, groups=4, repa_layer=1, steps=4)
    loaded = dar.load_official(tmp_path / "tokenizer.pt", **more)
    assert loaded.config == t.config
    x = images(2, 128)
    assert torch.equal(loaded.encode(x), t.encode(x))
    noise = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(loaded.decode(t.encode(x), noise), t.decode(t.encode(x), noise))


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_released_ar_files_load_in_every_form(tmp_path, key):
    model = llama(heads=1)
    state = {f"_orig_mod.{k}": v for k, v in released(model).items()}
    ema = {k: v + 1 for k, v in state.items()}
    torch.save({key: state, "ema": ema, "args": argparse.Namespace()} if key else state, tmp_path / "ar.pt")
    loaded = dar.load_official(tmp_path / "ar.pt", repa_weight=0.0)
    codes, labels = codes_of(2), torch.tensor([0, 5])
    torch.testing.assert_close(loaded.logits(codes, labels), model.logits(codes, labels))


def test_files_that_do_not_fit_are_named(tmp_path):
    state = released(llama())
    state.pop("norm.weight")
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match="missing norm.weight"):
        dar.load_official(tmp_path / "a.pt", heads=2, repa_weight=0.0)
    state = released(tokenizer())
    state["patchify.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(UserError, match="unknown patchify.extra"):
        dar.load_official(tmp_path / "t.pt", queries=12, groups=4, image_size=16)
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a D-AR checkpoint"):
        dar.load_official(tmp_path / "x.pt")


def test_published_sizes_have_the_published_parameters():
    """To the last parameter, as computed for the released models; and the paper's 300M without the REPA head."""
    def parameters(module):
        return sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        counts = {name: parameters(Llama(dar.PRESETS[name])) for name in ("b", "l", "xl", "xxl")}
        assert counts == {"b": 110888448, "l": 342910976, "xl": 774699520, "xxl": 1410972672}
        whole, plain = (Tokenizer(TokenizerConfig(repa_layer=r)) for r in (8, 0))
        assert (parameters(whole), parameters(plain), parameters(plain.pixels)) == (307444672, 300099776, 185129664)
        ablation = TokenizerConfig(dim=512, decoder_dim=512, pixel_dim=512, pixel_depth=8, repa_layer=4)
        assert parameters(Tokenizer(ablation)) == 113433536


# --- Configuration ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [["tokenizer.queries=13"], ["tokenizer.dim=100"], ["tokenizer.patch=5"],
                                     ["tokenizer.solver=rk4"], ["heads=5"], ["crops=3"],
                                     ["tokenizer.times=log"], ["tokenizer.beta=0"]])
def test_impossible_configurations_are_refused(changes):
    with pytest.raises(UserError):
        common.override(CONFIG, changes)


def test_the_tokenizers_image_size_follows():
    assert dataclasses.replace(CONFIG, image_size=32).tokenizer.image_size == 32
    assert common.override(CONFIG, ["image_size=32"]).tokenizer.image_size == 32


@pytest.mark.parametrize("options,words", [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top-p"),
                                           ({"top_k": -1}, "top-k")])
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        llama().sample(torch.tensor([0]), Noise.of(0, [0]), **options)


def test_another_tokenizer_than_the_models_is_refused():
    dar.check(llama(), tokenizer())
    with pytest.raises(UserError, match="12 tokens of 64 codes for 16 pixels, the model needs 12 of 32 for 16"):
        dar.check(llama(), tokenizer(codebook=64))


def test_ten_crops_and_their_places():
    """The recipe's ten views: corners, centre, mirrored; and one of them, drawn."""
    image = common.Image.fromarray(np.arange(35 * 35 * 3, dtype=np.uint32).reshape(35, 35, 3).astype(np.uint8))
    views = [np.asarray(v) for v in common.ten_crops(image, 32)]
    pixels = np.asarray(image)
    assert np.array_equal(views[0], pixels[:32, :32]) and np.array_equal(views[3], pixels[3:, 3:])
    assert np.array_equal(views[4], pixels[1:33, 1:33]) and np.array_equal(views[9], views[4][:, ::-1])
    drawn = np.asarray(common.one_of_ten_crops(image, 32, np.random.default_rng(0)))
    assert any(np.array_equal(drawn, v) for v in views)


def test_random_scale_crops_stay_inside_and_vary():
    """Between 1 and 1.25 times the size, at every place, mirrored half of the time."""
    ramp = common.Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)) * 4).convert("RGB")
    crops = [np.asarray(common.random_scale_crop(ramp, 32, np.random.default_rng(k)))[:, :, 0].astype(int)
             for k in range(200)]
    rising = [c[16, -1] > c[16, 0] for c in crops]
    spans = [abs(c[16, -1] - c[16, 0]) for c in crops]
    assert 0.4 < np.mean(rising) < 0.6 and max(spans) > 240 and min(spans) < 205
    assert min(c.min() for c in crops) >= 0 and all(c.shape == (32, 32) for c in crops)
