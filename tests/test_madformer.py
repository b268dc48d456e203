"""MADFormer beyond parity: who sees whom, samplers against closed forms, cached against plain, text, costs, options."""
import argparse
import base64
import dataclasses
import itertools
import math
import sys
import types

import pytest
import torch

import common
import madformer
from common import Noise, UserError
from madformer import CLEAN, NOISE, TEXT, Config, Layout, MADFormer, UNetConfig

SMALL = Config(image_size=16, classes=3, texts=("ox", "a horse", "Sheep"), text=True, text_drop=0.2, dim=128, mlp=96,
               depth=3, diffusion_depth=2, ar_length=4, target="clean", steps=3,
               unet=UNetConfig((8, 16), (1, 1), (0, 1), groups=4, heads=2, time_dim=16),
               vae=common.VAEConfig(channels=3, width=8, mult=(1, 2), blocks=1, attention=(), groups=4))
ABLATIONS = {"full": {}, "no text": {"text": False}, "no clean blocks": {"clean_blocks": False},
             "no condition": {"condition": False}, "shared": {"shared": True}, "mlp": {"mlp_denoising": True},
             "mlp, no clean blocks": {"mlp_denoising": True, "clean_blocks": False},
             "no text, mlp": {"text": False, "mlp_denoising": True}, "one block": {"ar_length": 1},
             "no text, one block": {"text": False, "ar_length": 1}, "all layers": {"diffusion_depth": 3},
             "neither": {"clean_blocks": False, "condition": False, "text": False},
             "clean tower": {"clean_weight": 0.1}, "no text, clean tower": {"text": False, "clean_weight": 0.1},
             "mlp, clean tower": {"mlp_denoising": True, "clean_weight": 0.1},
             "mlp, no condition": {"mlp_denoising": True, "condition": False, "text": False},
             "shared, no condition": {"shared": True, "condition": False, "clean_blocks": False, "text": False}}


def model_of(**changes):
    torch.manual_seed(0)
    return MADFormer(dataclasses.replace(SMALL, **changes)).eval()


def latents_of(model, n):
    c = model.config
    return torch.randn(n, c.vae.channels, c.latent_size, c.latent_size, generator=torch.Generator().manual_seed(1))


def assert_same(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


# --- Blocks -----------------------------------------------------------------------------------------------------------

def test_blocks_are_squares_in_raster_order():
    model = model_of(ar_length=16)
    latents = latents_of(model, 2)
    blocks, p = model.cut(latents), model.config.block
    for j in range(16):
        r, c = divmod(j, 4)
        assert torch.equal(blocks[:, j], latents[:, :, r * p:(r + 1) * p, c * p:(c + 1) * p])
    assert torch.equal(model.join(blocks), latents)


# --- Who sees whom ----------------------------------------------------------------------------------------------------

def statement(q, k, clean_blocks, alone):
    """The reference page's table, in words. A row is (kind, place); padding is never asked for."""
    (kq, pq), (kk, pk) = q, k
    if kq == TEXT and kk == TEXT:
        return pk <= pq  # text is causal
    if alone:
        return kq == kk and pq == pk  # while denoising, a block sees itself
    if kq == TEXT:  # text behind the image sees all of it, text before it nothing
        return pk < pq and kk == (CLEAN if clean_blocks else NOISE)
    if kk == TEXT:
        return pk < pq
    if kq == CLEAN:
        return kk == CLEAN and pk <= pq
    if kk == CLEAN:
        return pk < pq
    return pk == pq or (not clean_blocks and pk < pq)


def layout(model, tokens, clean):
    parts = []
    if tokens is not None:
        tokens = torch.nn.functional.pad(tokens, (0, 1), value=model.tokenizer.eoi)
        parts.append(model.text_layout(tokens, closed=True))
    if clean:
        parts.append(model.image_layout(CLEAN, 0, model.config.seen))
    return madformer.together([*parts, model.image_layout(NOISE, 0, model.config.ar_length)])


@pytest.mark.parametrize("text,clean_blocks,alone", list(itertools.product((False, True), repeat=3)))
def test_the_mask_is_the_statement(text, clean_blocks, alone):
    """Row by row against the statement, with padded texts of different lengths."""
    model = model_of(text=text, clean_blocks=clean_blocks)
    tokens = model.names if text else None
    rows = layout(model, tokens, clean_blocks)
    i = torch.arange(len(rows.place))
    mask = madformer.rule(rows, rows, alone)(torch.arange(len(rows.shown))[:, None, None], None, i[:, None], i)
    mask = mask if mask.ndim == 3 else mask[None]
    kinds = list(zip(rows.kind.tolist(), rows.place.tolist()))
    for b in range(len(mask)):
        padding = {k for k in range(tokens.shape[1]) if k >= len(SMALL.texts[b]) + 2} if text else set()
        for q, k in itertools.product(range(len(kinds)), repeat=2):
            expected = q == k if k in padding else statement(kinds[q], kinds[k], clean_blocks, alone)
            assert mask[b, q, k] == expected, (b, kinds[q], kinds[k])


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # slow, but here it is only to be right
@pytest.mark.parametrize("text,clean_blocks,alone", list(itertools.product((False, True), repeat=3)))
def test_flex_attention_is_masked_attention(text, clean_blocks, alone):
    model = model_of(text=text, clean_blocks=clean_blocks)
    rows = layout(model, model.names if text else None, clean_blocks)
    q, k, v = torch.randn(3, 3, 2, len(rows.place), 64)
    late = torch.arange(len(rows.place)) >= len(rows.place) - model.config.ar_length * model.config.tokens
    some = Layout(rows.kind[late], rows.place[late], rows.shown[:, late], None)  # the last layer asks for some rows
    for asked, part in ((rows, q), (some, q[:, :, late])):
        dense, flex = (madformer.attention(asked, rows, alone, flex)(part, k, v) for flex in (False, True))
        torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_later_block_leaves_earlier_predictions_untouched(name):
    """Teacher-forced: predictions of block j depend on blocks up to j, and on the text."""
    model = model_of(**ABLATIONS[name])
    T, rows = model.config.ar_length, []
    towers = model.towers

    def watched(*args):
        result = towers(*args)
        rows.append(result[0]["noise"].unflatten(1, (T, -1)))
        return result
    model.towers = watched
    x, t = latents_of(model, 2), torch.full((2, T), 300)
    eps = torch.randn(model.cut(x).shape)
    labels = torch.tensor([0, 1])
    model(x, labels, t=t, eps=eps)
    for j in range(T):
        changed = model.cut(x).clone()
        changed[:, j] += 1
        model(model.join(changed), labels, t=t, eps=eps)
        gaps = (rows[-1] - rows[0]).abs().amax((0, 2, 3))
        assert (gaps[:j] == 0).all() and gaps[j] > 1e-4
        blind = not model.config.condition and model.config.mlp_denoising
        assert blind or (gaps[j:] > 1e-6).all()
    if model.config.text:
        model(x, torch.tensor([2, 2]), t=t, eps=eps)
        assert ((rows[-1] - rows[0]).abs().amax((2, 3)) > 1e-6).all()


# --- Sampling ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler,target", list(itertools.product(("ddim", "dpm"), ("clean", "noise"))))
def test_a_known_image_is_reached_in_any_number_of_steps(sampler, target):
    """A network that knows x_0: a wrong sign, level or last step misses it."""
    x_0, start = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))

    def network(x, i, t):
        abar = madformer.alphas_bar()[t]
        return x_0 if target == "clean" else (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
    for steps in (1, 2, 7, 50, madformer.MOST[sampler]):
        torch.testing.assert_close(madformer.solve(network, start, sampler, steps, target), x_0, rtol=0, atol=2e-4)


@pytest.mark.parametrize("sampler,order", [("ddim", 1), ("dpm", 2)])
def test_the_order_of_each_sampler(sampler, order):
    """Of Gaussian data the flow keeps the standard scores. Twice the steps, half or a quarter of the error."""
    mean, std, errors = 0.7, 0.4, []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for steps in (40, 80):
        ts, alpha, sigma = madformer.schedule(sampler, steps)
        levels = {t: (a, s) for t, a, s in zip(ts, alpha, sigma)}

        def network(x, i, t, levels=levels):  # the posterior mean of x_0
            a, s = levels[t]
            return mean + std**2 * a / (a**2 * std**2 + s**2) * (x.double() - a * mean)

        a, s = alpha[0], sigma[0]
        exact = mean + std * (x - a * mean) / math.sqrt(a**2 * std**2 + s**2)
        errors.append((madformer.solve(network, x, sampler, steps, "clean").double() - exact).abs().max().item())
    assert errors[1] < errors[0] * (0.65 if order == 1 else 0.4), errors
    assert errors[1] < 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("how", [{}, {"sampler": "dpm"}, {"cfg": 1.25}, {"cfg": (1.5, 0.5)}])  # more magnifies rounding
def test_cached_sampling_is_plain_sampling(name, how):
    """Caches, padding, guidance and both samplers, under every switch."""
    model = model_of(**ABLATIONS[name])
    if "cfg" in how and not model.config.text:
        with pytest.raises(UserError, match="no text tower"):
            model.sample(torch.zeros(1, dtype=torch.long), Noise([0]), **how)
        return
    labels = torch.tensor([0, 1, 2])
    for clean_time in ("noisy", "zero"):
        model.config = dataclasses.replace(model.config, clean_time=clean_time)
        fast, plain = (way(labels, Noise.of(3, range(3)), **how) for way in (model.sample, model.sample_plainly))
        assert_same(fast, plain)


def test_what_is_clean_runs_once():
    """Text and clean blocks go through a layer once each, whatever the number of steps; NFE is counted as it is."""
    for steps in (2, 5):
        model, ran = model_of(), []
        for i, layer in enumerate(model.layers):
            def watched(name, x, *args, i=i, cached=layer.cached, **kwargs):
                ran.append((i, name))
                return cached(name, x, *args, **kwargs)
            layer.cached = watched
        model.sample(torch.tensor([0, 1]), Noise.of(0, range(2)), steps=steps)
        c = model.config
        for i in range(c.depth):
            assert ran.count((i, "text")) == 1
            assert ran.count((i, "clean")) == c.ar_length - 1
        noisy = sum(name == "noise" for _, name in ran)
        assert noisy == c.ar_length * c.evaluations(steps)


def test_guidance_means_what_it_says():
    """1 is off, 0 is the empty text, anything else lies on the line through the two predictions."""
    model, labels = model_of(), torch.tensor([0, 1])
    noise = lambda: Noise.of(0, range(2))  # noqa: E731
    empty = model.tokenizer.encode(["", ""])
    assert_same(model.sample(labels, noise(), cfg=0.0), model.sample(labels, noise(), cfg=1.0, text=empty))
    assert_same(model.sample(labels, noise(), cfg=3.0, interval=(2.0, 3.0)), model.sample(labels, noise(), cfg=1.0))
    assert (model.sample(labels, noise(), cfg=3.0) - model.sample(labels, noise())).abs().max() > 1e-3
    one = model_of(ar_length=1)  # of a single step DDIM returns the prediction
    null, cond, far = (one.sample(labels, noise(), cfg=g, steps=1) for g in (0.0, 1.0, 3.0))
    assert_same(far, null + 3 * (cond - null))
    with pytest.raises(UserError, match="trained with text_drop"):
        model_of(text_drop=0.0).sample(labels, noise(), cfg=2.0)


def test_an_image_does_not_depend_on_its_batch():
    model = model_of()
    labels = torch.tensor([0, 1, 2])
    together = model.sample(labels, Noise.of(5, range(3)))
    for k in range(3):
        assert_same(model.sample(labels[k:k + 1], Noise.of(5, [k])), together[k:k + 1])


def test_blocks_are_drawn_in_order_and_do_not_look_ahead():
    """Other noise for the last block changes the last block alone; another text changes all."""
    model, labels, c = model_of(), torch.tensor([0]), SMALL
    shape = (1, c.vae.channels, c.latent_size // 2, c.latent_size // 2)
    draws = [torch.randn(shape) for _ in range(5)]

    def sample(draws, **how):
        stream = iter(draws)
        return model.cut(model.sample(labels, types.SimpleNamespace(normal=lambda shape: next(stream)), **how))
    a, b = sample(draws[:4]), sample([*draws[:3], draws[4]])
    assert torch.equal(a[:, :3], b[:, :3]) and (a[:, 3] - b[:, 3]).abs().max() > 1e-3
    other = sample(draws[:4], text=model.tokenizer.encode(["a cow"]))
    assert ((a - other).abs().amax((0, 2, 3, 4)) > 1e-6).all()


def test_a_film_shows_finished_blocks_and_grey():
    model, vae, seen = model_of(), common.KLVAE(SMALL.vae).eval(), []
    labels = torch.tensor([0, 1])
    images, facts = madformer.generate(model, vae, labels, Noise.of(0, range(2)), on_step=seen.append)
    c, half = SMALL, SMALL.image_size // 2
    assert len(seen) == c.ar_length * c.steps and facts == {"steps": 3, "nfe_per_block": 7}
    assert torch.equal(seen[-1], images)
    assert (seen[0][:, :, half:] == 0).all() and (seen[0][:, :, :half, half:] == 0).all()
    assert seen[0][:, :, :half, :half].abs().max() > 0


@torch.no_grad()
def test_the_stream_stays_in_float32_under_autocast():
    """As released: only products are bfloat16; in training and in sampling."""
    model, types_seen = model_of(depth=2, diffusion_depth=1), set()
    for layer in model.layers:
        def cached(name, x, *args, cached=layer.cached, **kwargs):
            out = cached(name, x, *args, **kwargs)
            types_seen.update(part.dtype for part in (x, out) if part is not None)
            return out
        layer.cached = cached
        layer.register_forward_hook(lambda module, args, out: types_seen.update(
            part.dtype for part in (*args[0].values(), *out.values())))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(latents_of(model, 2), torch.tensor([0, 1]))
        model.sample(torch.tensor([0, 1]), Noise.of(0, range(2)), steps=1)
    assert types_seen == {torch.float32} and {value.dtype for value in loss.values()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("name, how", [("full", {"cfg": (1.5, 0.5)}), ("no text, mlp", {"sampler": "dpm"})])
def test_compiled_sampling_is_eager_sampling(traced, name, how):
    """Few graphs for all blocks, whose history grows, and for all steps; memory that stays is used again."""
    model, labels = model_of(**ABLATIONS[name]), torch.tensor([0, 1, 2])
    eager = model.sample(labels, Noise.of(3, range(3)), **how)
    madformer.compile_steps(model, None)
    for _ in range(2):
        assert_same(model.sample(labels, Noise.of(3, range(3)), **how), eager)
    assert len(model.kept) == 1 and len(traced) <= 3


@torch.no_grad()
@pytest.mark.parametrize("text, batch", [(False, 1), (True, 2)])
def test_training_on_cuda_compiles_to_one_graph(monkeypatch, text, batch):
    """The branch with FlexAttention, traced on the CPU: no break, the same loss."""
    model = model_of(text=text, depth=2, diffusion_depth=1)
    x, labels = latents_of(model, batch), torch.arange(batch)
    how = dict(t=torch.full((batch, 4), 500), eps=torch.ones(model.cut(x).shape), drop=torch.zeros(batch, dtype=bool))
    plain, dense = model(x, labels, **how)["loss"], madformer.attention
    monkeypatch.setattr(madformer, "attention", lambda queries, keys, alone, flex: dense(queries, keys, alone, True))
    traced = torch.compile(model, backend="eager", fullgraph=True)(x, labels, **how)["loss"]
    assert_same(traced, plain, 1e-5)


# --- Costs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth,budgets", [
    (7, {280: 37, 700: 97, 1400: 197, 2800: 397, 84: 9, 140: 17, 224: 29}),
    (14, {280: 19, 700: 49, 1400: 99, 2800: 199, 84: 5, 140: 9, 224: 15}),
    (28, {280: 10, 700: 25, 1400: 50, 2800: 100, 84: 3, 140: 5, 224: 8})])
def test_the_papers_budgets_are_met(depth, budgets):
    """Fig. 4: these splits reach the paper's evaluations exactly."""
    config = dataclasses.replace(madformer.PRESETS["ffhq"], diffusion_depth=depth)
    for nfe, steps in budgets.items():
        assert config.steps_within(nfe) == steps and config.evaluations(steps) == nfe


def test_a_budget_that_does_not_divide_is_not_exceeded():
    config = dataclasses.replace(madformer.PRESETS["ffhq"], diffusion_depth=21)
    for nfe, steps in ((280, 13), (700, 33), (1400, 66), (2800, 133), (84, 3)):
        assert config.steps_within(nfe) == steps and config.evaluations(steps) <= nfe
    assert config.steps_within(28) == 1 and config.steps_within(10**6) == 999
    with pytest.raises(UserError, match="one step takes 28"):
        config.steps_within(27)


def test_published_sizes_have_the_published_parameters():
    """The reference counts: each part, and the two models of 1.3B and 2.1B."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        ffhq, imagenet = (MADFormer(madformer.PRESETS[name]) for name in ("ffhq", "imagenet"))
        assert count(ffhq.layers[0].sets["noise"]) == 19_471_232
        assert (count(ffhq.down), count(ffhq.up), ffhq.boi.numel()) == (64_820_480, 144_739_460, 294_912)
        assert (count(ffhq), count(imagenet)) == (1_300_243_844, 2_140_718_980)


# --- Text -------------------------------------------------------------------------------------------------------------

def test_bytes_come_back():
    text = madformer.Text()
    tokens = text.encode(["Ankle boot", "é☃", ""])
    assert tokens[0, 0] == text.bos and tokens[0, 11] == text.boi and tokens.shape == (3, 12)
    assert text.lengths(tokens).tolist() == [12, 7, 2]
    assert [text.decode(row.tolist()) for row in tokens] == ["ankle boot", "é☃", ""]


def test_a_tiktoken_file_takes_the_place_of_bytes(monkeypatch, tmp_path):
    """Four special tokens follow its ranks, as in Llama 3; without the package the message says what to do."""
    class Encoding:
        def __init__(self, name, pat_str, mergeable_ranks, special_tokens):
            self.ranks = mergeable_ranks

        def encode_ordinary(self, text):
            return [self.ranks[part.encode()] for part in text.split("|")]

        def decode(self, tokens):
            return "|".join(next(k for k, v in self.ranks.items() if v == t).decode() for t in tokens)
    package = types.ModuleType("tiktoken")
    package.Encoding = Encoding
    monkeypatch.setitem(sys.modules, "tiktoken", package)
    file = str(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_text("\n".join(
        f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate((b"ankle", b"boot", b"bag"))))
    text = madformer.Text(file)
    assert text.encode(["Ankle|boot", "bag"]).tolist() == [[3, 0, 1, 5], [3, 2, 5, 4]]
    assert text.decode([3, 0, 1, 5]) == "ankle|boot" and text.size == 3 + 256
    with pytest.raises(UserError, match="vocabulary 100: the text tokenizer has 259 tokens"):
        model_of(text_tokenizer=file, vocabulary=100)
    for wrong in ("nowhere.model", str(tmp_path / "broken.model")):
        (tmp_path / "broken.model").write_text("what is this")
        with pytest.raises(UserError, match="cannot be read as a tiktoken file"):
            madformer.Text(wrong)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        madformer.Text(file)


def test_the_text_tower_learns_to_read():
    """The likelihood of a caption rises, greedy decoding gives it back, and its beginning is gone on with."""
    model = model_of(texts=("a red fox", "dog", "x"), text_drop=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, losses = latents_of(model, 2), []
    for _ in range(60):
        out = model(x, torch.tensor([0, 0]))
        losses.append(out["text"].item())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert model.eval().complete() == "a red fox" and model.complete("a r") == "a red fox"


def test_the_text_loss_is_the_next_tokens():
    """By hand: every token from those before it, text by text, without padding; EOS from EOI and the whole image. Of a
    text that was dropped only the end counts."""
    model, keep = model_of(text_drop=0.0), torch.zeros(3, dtype=torch.bool)
    x, labels = latents_of(model, 3), torch.tensor([0, 1, 2])
    how = dict(t=torch.full((3, 4), 10), eps=torch.zeros(model.cut(x).shape))

    def parts(text, k):  # summed over the text, and the end's
        tokens, seen = model.tokenizer.encode([text]), []
        rows, layout = model.embed(tokens), model.text_layout(tokens)
        for layer in model.layers:
            rows = layer.cached("text", rows, layout.rotary, causal=True)
        logits = model.head(rows[0, :-1])
        head = model.head.register_forward_hook(lambda module, args, out: seen.append(out[0, -1]))
        model(x[k:k + 1], labels[k:k + 1], text=tokens, t=how["t"][:1], eps=how["eps"][:1])
        head.remove()
        end = torch.nn.functional.cross_entropy(seen[0], torch.tensor(model.tokenizer.eos))
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"), end

    known = [parts(text, k) for k, text in enumerate(SMALL.texts)]
    count = sum(len(text) + 1 for text in SMALL.texts)
    assert_same(model(x, labels, drop=keep, **how)["text"], sum(a + b for a, b in known) / (count + 3), 1e-5)
    (_, first), (words, end), (_, last) = parts("", 0), known[1], parts("", 2)
    dropped = model(x, labels, drop=torch.tensor([True, False, True]), **how)["text"]
    assert_same(dropped, (first + words + end + last) / (len(SMALL.texts[1]) + 1 + 3), 1e-5)


# --- Training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ABLATIONS)
def test_idle_parameters_are_those_without_a_gradient(name):
    """Under DDP a parameter that is trained but gets no gradient is an error, one that is frozen would not learn."""
    model = model_of(**ABLATIONS[name]).train()
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.requires_grad_(True)
    model(latents_of(model, 2), torch.tensor([0, 1]))["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == idle


def test_the_loss_is_the_weighted_sum():
    """Eq. 6."""
    weights = dict(text_weight=1.5, image_weight=5.0, hidden_weight=0.3, clean_weight=0.7)
    model = model_of(**weights, text_drop=0.0)
    out = model(latents_of(model, 2), torch.tensor([0, 1]))
    assert_same(out["loss"], sum(weights[f"{k}_weight"] * out[k] for k in ("text", "image", "hidden", "clean")), 1e-6)


def test_the_loss_draws_what_the_paper_says(monkeypatch):
    """Steps uniform over 0 .. 999, one for each image and block; texts are dropped at the asked rate."""
    model, seen = model_of(text_drop=0.3).train(), []
    noised = model.noised
    model.noised = lambda x, eps, t: (seen.append((t, eps)), noised(x, eps, t))[1]
    drops = []
    monkeypatch.setattr(model.tokenizer, "lengths", lambda tokens, f=model.tokenizer.lengths: (
        drops.append((tokens[:, 1] == model.tokenizer.boi)), f(tokens))[1])
    for _ in range(20):
        model(latents_of(model, 32), torch.zeros(32, dtype=torch.long))
    t, eps = (torch.cat(parts).float() for parts in zip(*seen))
    assert t.shape == (640, 4) and t.min() >= 0 and 950 < t.max() < 1000
    assert abs(t.mean() - 499.5) < 25 and len(t[0].unique()) > 1
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert abs(torch.cat(drops[::2]).float().mean() - 0.3) < 0.06


def test_warmup_stable_decay():
    """WSD: linear from 0 over 1 %, constant, from 85 % on halved six times."""
    recipe, K = madformer.MAD.recipes["ffhq"], 10_000
    rates = [recipe.rate(k, K) / recipe.lr for k in range(K)]
    assert rates[0] == 0 and abs(rates[50] - 0.5) < 1e-9 and rates[100] == rates[8500] == 1
    for k in (9000, 9500, 9999):
        assert abs(rates[k] - 0.5 ** (6 * (k - 8500) / 1500)) < 1e-9
    assert round(recipe.epochs * madformer.FFHQ / recipe.batch) == 210_000
    imagenet = madformer.MAD.recipes["imagenet"]
    assert round(imagenet.epochs * madformer.IMAGENET / imagenet.batch) == 250_000


@pytest.mark.parametrize("changes,words", [
    (["ar_length=3"], "not a square"), (["diffusion_depth=0"], "1 to 3"), (["diffusion_depth=4"], "1 to 3"),
    (["ar_length=64"], "does not divide"), (["dim=100"], "multiple of 64"), (["target=velocity"], "clean, noise"),
    (["unet.channels=8,15"], "groups"), (["unet.blocks=1"], "entry for each level"),
    (["clean_blocks=0", "clean_weight=1"], "clean-tower"), (["steps=1001"], "1 to 1000"), (["texts=a,b"], "2 texts"),
    (["cfg=2", "text_drop=0"], "needs text and text_drop"), (["unet.groups=0"], "1 or more"),
    (["unet.channels=", "unet.blocks=", "unet.attention="], "entry for each level"), (["image_size=0"], "does not div"),
    (["unet.attention=2,2"], "attention is 0 or 1"), (["unet.channels=8,20", "unet.heads=3"], "3 heads"),
    (["nothing=1"], "no such field")])
def test_impossible_configurations_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        common.override(SMALL, changes)


# --- Released files ---------------------------------------------------------------------------------------------------

def released(model):
    """The state dict under the released names (written down here once more, from the page of the layout)."""
    state = {}
    for name, value in model.state_dict().items():
        part = name.split(".")
        if part[0] == "boi":
            name = "boi_block"
        elif part[0] == "layers":
            i, s, rest = part[1], {"clean": 0, "noise": 1}[part[3]], part[4:]
            group = {"qkv": "self_attn.qkv_list", "q_norm": "self_attn.q_norm_list", "k_norm": "self_attn.k_norm_list",
                     "proj": "self_attn.proj_list", "norm1": "input_layernorm_list",
                     "norm2": "post_attention_layernorm_list"}.get(rest[0])
            name = (f"blocks.{i}.{group}.{s}.{rest[1]}" if group else
                    f"blocks.{i}.mlp_list.{s}.{rest[0]}_proj.{rest[1]}")
        else:
            side = {"down": "downsampler", "up": "upsampler"}[part[0]]
            if part[1] == "time":
                name = f"{side}.time_embedding.linear_{1 if part[2] == 'first' else 2}.weight"
            elif part[1] == "levels":
                level, rest = f"{side}.{part[0]}_blocks.{part[2]}", part[3:]
                if rest[0] == "resample":
                    rest = [f"{side}s", "0", "conv", *rest[1:]]
                elif rest[0] == "resnets":
                    rest[2] = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}.get(rest[2], rest[2])
                else:
                    rest[2] = {"norm": "group_norm", "out": "to_out.0"}.get(rest[2], f"to_{rest[2]}")
                name = ".".join([level, *rest])
            else:
                name = f"{side}.{'.'.join(part[1:])}"
        state[name] = value
    return state


def published():
    """A small model of the published kind."""
    return model_of(text=False, texts=(), classes=1, target="noise", image_size=64,
                    unet=UNetConfig((16, 32), (2, 2), (0, 1), groups=8, heads=8, time_dim=16),
                    vae=dataclasses.replace(common.SD_VAE))


def test_released_files_load_with_their_ema_weights(tmp_path):
    model = published()
    state = released(model)
    raw = {k: v + 1 for k, v in state.items()}
    args = argparse.Namespace(diff_depth=2, ar_len=4, image_size=64, vae_latent_size=4, clear_clean=False)
    torch.save({"model": raw, "ema": state, "opt": {}, "args": args}, tmp_path / "a.pt")
    loaded = madformer.load_official(tmp_path / "a.pt")
    assert loaded.config == dataclasses.replace(Config(), image_size=64, dim=128, mlp=96, depth=3, diffusion_depth=2,
                                                ar_length=4, unet=model.config.unet)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    torch.save({"model": raw, "args": args}, tmp_path / "b.pt")
    assert torch.equal(madformer.load_official(tmp_path / "b.pt").boi, model.boi + 1)
    torch.save(state, tmp_path / "c.pt")
    bare = madformer.load_official(tmp_path / "c.pt", ar_length=4, diffusion_depth=2)
    assert bare.config == loaded.config


@pytest.mark.parametrize("switch,field,value", [(k, *v) for k, v in madformer.SWITCHES.items()])
def test_released_switches_are_read(tmp_path, switch, field, value):
    """With clean blocks off the file still has the clean tower."""
    args = argparse.Namespace(diff_depth=2, ar_len=4, image_size=64, **{switch: True})
    torch.save({"ema": released(published()), "args": args}, tmp_path / "a.pt")
    assert getattr(madformer.load_official(tmp_path / "a.pt").config, field) == value


def test_files_that_do_not_fit_are_named(tmp_path):
    state = released(published())
    args = argparse.Namespace(diff_depth=2, ar_len=4)
    key = "blocks.1.mlp_list.1.gate_proj.weight"
    torch.save({"ema": {k: v for k, v in state.items() if k != key}, "args": args}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="layers.1.sets.noise.gate.weight"):
        madformer.load_official(tmp_path / "a.pt")
    torch.save({"ema": {**state, "more": torch.zeros(1)}, "args": args}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="more"):
        madformer.load_official(tmp_path / "b.pt")
    torch.save({"ema": {"a": torch.zeros(1)}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="not a MADFormer checkpoint"):
        madformer.load_official(tmp_path / "c.pt")


def test_another_vae_than_the_models_is_refused():
    with pytest.raises(UserError, match="8 channels at f2, the model needs 3 channels at f2"):
        madformer.check(model_of(), common.KLVAE(dataclasses.replace(SMALL.vae, channels=8)))
