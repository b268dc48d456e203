"""D-AR beyond parity: clocks and solvers in closed form, causality, streaming, fast = plain."""
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F

import common
import dar
from common import Noise, UserError
from dar import Config, Decoding, Llama, Tokenizer, TokenizerConfig

SMALL = TokenizerConfig(
    image_size=16, patch=4, dim=64, depth=2, queries=12, query_rows=16, codebook=32, code_dim=4,
    decoder_dim=128, decoder_depth=2, groups=4, pixel_patch=4, pixel_dim=64, pixel_depth=2,
    repa_layer=0)
CONFIG = Config(image_size=16, classes=5, dim=64, heads=2, depth=2, dropout=0.0, cfg=(1.5, 1.5),
                crops=1, lpips_weight=0.0, repa_weight=0.0, tokenizer=SMALL)
WITH_REPA = dataclasses.replace(SMALL, image_size=64, repa_layer=1)


def shaken(module):
    """The released initialisation has zeros: with these weights everything matters."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def tokenizer(**changes):
    return shaken(Tokenizer(dataclasses.replace(SMALL, **changes)))


def llama(**changes):
    return shaken(Llama(dataclasses.replace(CONFIG, **changes)))


def images(n, size=16):
    shapes = [common.from_pil(common.draw_shape(k, size)) for k in range(n)]
    return common.to_float(torch.stack(shapes))


def random_codes(n):
    return torch.randint(32, (n, 12), generator=torch.Generator().manual_seed(0))


def sample(model, labels, **options):
    *_, codes = model.stream(torch.tensor(labels), Noise(0, range(len(labels))), **options)
    return codes


def generate(model, t, labels, first=0, **options):
    noise = Noise(0, range(first, first + len(labels)))
    return dar.generate(model, t, torch.tensor(labels), noise, **options)[0]


# --- Clocks, groups, solvers ----------------------------------------------------------------------

def test_the_two_clocks_are_inverse():
    """Eq. 5 undoes Eq. 8; a beta on the wrong side of the fraction fails."""
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    published = [0, 1 / 15, 1 / 7, 3 / 13, 1 / 3, 5 / 11, 3 / 5, 7 / 9, 1]
    assert dar.shift(u, 2.0).tolist() == pytest.approx(published)
    torch.testing.assert_close(dar.unshift(dar.shift(u, 3.0), 3.0), u)


@pytest.mark.parametrize("N,K", [(256, 8), (256, 1), (256, 16), (12, 4), (30, 10), (24, 6)])
def test_groups_follow_the_nearest_rule(N, K):
    """Halves go up, and the times of Eq. 8 use each group once. Ceiling fails."""
    t = tokenizer(queries=N, query_rows=N, groups=K)
    groups = [j * N // K for j in range(K)]
    edges = (torch.arange(K).double() + 0.5) / K
    assert t.starts(edges - 1e-9).tolist() == Decoding(t, torch.zeros(1)).starts == groups
    assert t.starts(edges).tolist() == [*groups[1:], N - N // K]


def test_uniform_times_take_the_group_of_equation_5():
    """t as drawn, group ceil(t' K) counted from 1. The released rounding takes other groups."""
    t = tokenizer(times="uniform", beta=1.0)
    given = []
    t.pixels.forward = lambda x, t, c, repa: given.extend([t, c]) or (x, None)
    t.condition = lambda z: torch.arange(12.0).view(1, 12, 1).expand(len(z), 12, 1)
    draws = torch.tensor([0.0, 0.2, 0.3, 0.45, 0.55, 0.7, 0.8, 0.99])
    t(images(8), u=draws)
    assert torch.equal(given[0], draws)
    assert given[1][:, 0, 0].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]


def solve(velocity, beta, **options):
    """The tokenizer's decoder with its network replaced by v(x, t); x_0 = 1."""
    t = tokenizer(groups=1, data_std=1.0, beta=beta)
    t.pixels.forward = lambda x, t, c: (velocity(x, t.item()), None)
    return t.decode(random_codes(1), torch.ones(1, 3, 16, 16, dtype=torch.float64), **options)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("adams", 2)])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_order_of_each_solver(solver, beta, order):
    """dx/dt = -2 t x has x(1) = x(0) / e. Twice the steps: half of the error, or a quarter."""
    errors = []
    for steps in (128, 256):
        image = solve(lambda x, t: -2 * t * x, beta, steps=steps, solver=solver)
        errors.append((image - math.exp(-1)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "adams"])
@pytest.mark.parametrize("preview", ["solver", "v"])
def test_jump_estimates_of_a_straight_path_are_the_image(solver, preview):
    """v = x_1 - x_0 makes every preview the image from the first step on."""
    seen = []
    solve(lambda x, t: torch.full_like(x, 0.5 - 1.0), 2.0, steps=8, solver=solver, preview=preview,
          on_step=seen.append)
    assert len(seen) == 8 and all((x - 0.5).abs().max() < 1e-6 for x in seen)


# --- Causality and the quantizer ------------------------------------------------------------------

def test_tokens_never_depend_on_later_queries():
    """Another query j changes tokens from j on and none before; and it does change them."""
    t, x = tokenizer(), images(2)
    before = t.features(x)
    t.query_table.weight.data[7] += 1
    changes = (before - t.features(x)).abs().amax((0, 2))
    assert changes[:7].max() == 0 and changes[7:].min() > 1e-4


def test_the_nearest_codeword_is_found_and_gradients_pass_straight_through():
    q = dar.Quantizer(16, 4)
    q.embedding.weight.data.mul_(torch.rand(16, 1) + 0.5)  # stored codes need not have unit length
    z = torch.randn(2, 5, 4, requires_grad=True)
    out, codes, _ = q(z)
    unit = F.normalize(z, dim=-1)
    assert torch.equal(codes, torch.cdist(unit, q.codewords().expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(out, q.codewords()[codes])
    weight = torch.randn(2, 5, 4)
    straight, = torch.autograd.grad((out * weight).sum(), z)
    torch.testing.assert_close(straight, torch.autograd.grad((unit * weight).sum(), z)[0])


def test_usage_counts_the_latest_codes():
    q = dar.Quantizer(10, 2)
    q.window = 6
    shares = [q.usage(torch.tensor(codes)).item() for codes in ([1, 2, 2], [3, 4, 4], [0, 0, 0])]
    assert shares == pytest.approx([0.2, 0.4, 0.3])  # at last, 1 and 2 have left the window


def test_codes_are_found_in_true_float32(monkeypatch):
    """Under bf16 autocast and TF32, `encode` is exact, and in training the nearest-code product."""
    t, x, seen = tokenizer(), images(4), []
    exact, nearest = t.encode(x), t.quantizer.codewords
    t.quantizer.codewords = lambda: seen.append(torch.get_float32_matmul_precision()) or nearest()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        codes = t.encode(x)
        t(x)
    torch.set_float32_matmul_precision(before)
    assert torch.equal(codes, exact)
    assert seen == ["highest"] * 3 + ["high"]  # the last one looks codes up


# --- Streaming ------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [4, 3, 7])
def test_streaming_is_decoding_afterwards(steps):
    model, t, noise = llama(), tokenizer(), Noise(0, range(3))
    streamed = generate(model, t, [0, 3, 5], steps=steps)
    start = noise.normal((3, 16, 16))
    *_, codes = model.stream(torch.tensor([0, 3, 5]), noise)
    afterwards = t.decode(codes, start, steps=steps).clamp(-1, 1)
    torch.testing.assert_close(streamed, afterwards, rtol=0, atol=1e-5)


def test_previews_come_before_the_later_tokens():
    model, order = llama(), []
    step = model.step
    model.step = lambda *args: order.append(args[2].item()) or step(*args)
    generate(model, tokenizer(), [1], on_step=lambda x: order.append("image"))
    assert order == [0, 1, 2, "image", 3, 4, 5, "image", 6, 7, 8, "image", 9, 10, 11, "image"]


def test_images_from_the_first_tokens_are_the_previews():
    """Table 5: stopping after n tokens gives the preview that the whole run showed then."""
    model, t, seen = llama(), tokenizer(), []
    generate(model, t, [0, 3], on_step=seen.append)
    for n, k in ((3, 0), (6, 1), (8, 1), (12, 3)):
        assert torch.equal(generate(model, t, [0, 3], tokens=n), seen[k]), n


def test_an_image_does_not_depend_on_its_batch():
    model, t, labels = llama(), tokenizer(), [0, 3, 5, 1]
    alone = torch.cat([generate(model, t, [label], first=k) for k, label in enumerate(labels)])
    torch.testing.assert_close(generate(model, t, labels), alone, rtol=0, atol=1e-4)


def test_a_prefix_picture(tmp_path):
    """Its own tokens make the reconstruction, whose distance to the picture is a fact."""
    t, x, file = tokenizer(), images(1), tmp_path / "x.png"
    common.draw_shape(0, 16).save(file)
    image, facts = dar.generate(llama(), t, torch.tensor([0]), Noise(0, [0]), prefix_image=file,
                                prefix_tokens=12)
    torch.testing.assert_close(image, t.reconstruct(x, Noise(0, [0])), rtol=0, atol=1e-4)
    distance = (image - x).square().mean().sqrt()
    torch.testing.assert_close(facts["distance_to_reference"], distance[None])


# --- The AR model ---------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [(1.0, 1.0), (2.5, 2.5), (1.0, 3.0), (0.0, 0.0)])
def test_cached_logits_are_plain_logits_at_every_position(monkeypatch, cfg):
    model, labels, seen, draw = llama(), [0, 4, 5], [], dar.draw_token
    monkeypatch.setattr(dar, "draw_token", lambda probs, u: seen.append(probs) or draw(probs, u))
    codes = sample(model, labels, cfg=cfg)
    noise = Noise(0, range(3))
    assert torch.equal(codes, plain.llama_sample(model, torch.tensor(labels), noise, cfg=cfg))
    torch.testing.assert_close(torch.stack(seen[:12]), torch.stack(seen[12:]), rtol=0, atol=1e-5)


def test_compiled_sampling_is_eager_sampling(traced):
    """Other labels, scales or numbers of tokens make no further graph: one for each step."""
    model, t = llama(), tokenizer()
    expected = generate(model, t, [0, 1, 2], cfg=3.0)
    dar.compile_steps(model, t)
    generate(model, t, [2, 1, 0], tokens=5, cfg=1.5)
    image = generate(model, t, [0, 1, 2], cfg=3.0)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    assert len(traced) == 2


def test_the_compiled_step_writes_whole_caches_in_place(traced):
    """Written through a view, a cache would be copied as a whole at each token."""
    model = llama()
    dar.compile_steps(model, tokenizer())
    sample(model, [0, 1])
    (graph,) = traced
    writes = [node for node in graph.graph.nodes if node.target == "index_copy_"]
    caches = {write.args[0] for write in writes}
    assert len(writes) == len(caches) == 2 * CONFIG.depth
    assert all(cache.op == "placeholder" and len(cache.users) == 1 for cache in caches)
    others = {str(node.target) for node in graph.graph.nodes} - {"index_copy_"}
    assert not [name for name in others if "copy" in name or "scatter" in name]


@pytest.mark.parametrize("cfg,rows", [(1.0, 2), (3.0, 4)])
def test_without_guidance_nothing_is_doubled(cfg, rows):
    model, seen = llama(), []
    step = model.step
    model.step = lambda x, *rest: seen.append(len(x)) or step(x, *rest)
    sample(model, [0, 1], cfg=cfg)
    assert seen == [rows] * 12


def test_tokens_are_drawn_with_their_probabilities():
    """Frequencies over an even grid of u; impossible tokens never; u at both ends."""
    probs = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])
    u = (torch.arange(1000) + 0.5) / 1000
    counts = dar.draw_token(probs.expand(1000, -1), u).bincount(minlength=6)
    assert counts.tolist() == pytest.approx([0, 200, 0, 500, 300, 0], abs=1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert dar.draw_token(probs.expand(2, -1), ends).tolist() == [1, 4]


def test_labels_are_dropped_at_the_asked_rate_in_training_alone():
    model, seen = llama(label_drop=0.3), []
    model.logits = lambda codes, labels: seen.append(labels == 5) or torch.zeros(*codes.shape, 32)
    for mode in (True, False):
        model.train(mode)(torch.zeros(4000, 12).long(), torch.zeros(4000).long())
    assert [drop.float().mean() for drop in seen] == pytest.approx([0.3, 0.0], abs=0.03)


# --- Losses of the tokenizer ----------------------------------------------------------------------

def test_perceptual_losses_have_the_weights_of_equation_7(monkeypatch):
    """And the state dict knows nothing of them."""
    monkeypatch.setattr(dar, "load_lpips", lambda device: lambda x, y, p: (x - y).mean((2, 3)).T)
    monkeypatch.setattr(dar, "load_dino", lambda device: lambda x: torch.ones(2, 256, 768))
    t = Tokenizer(WITH_REPA)
    names = list(t.state_dict())
    t.ready(Config(lpips_weight=0.5, repa_weight=0.25))
    out = t(images(2, 64))
    parts = out["flow"] + out["codebook"] + out["commitment"] + 0.5 * out["lpips"]
    torch.testing.assert_close(out["loss"], parts + 0.25 * out["repa"])
    assert list(t.state_dict()) == names


def test_without_perceptual_losses_every_parameter_has_a_gradient():
    """Distributed training waits for all of them."""
    t = Tokenizer(WITH_REPA)
    t(images(2, 64))["loss"].backward()
    assert all(p.grad is not None for p in t.parameters())


def test_lpips_dropout_is_off_in_evaluation():
    t, seen = Tokenizer(SMALL), []
    t.lpips = lambda x, y, dropout: seen.append(dropout) or torch.zeros(5, 2)
    t.loss_config = Config()
    for mode in (True, False):
        t.train(mode)(images(2))
    assert seen == [0.5, 0.0]


def test_features_of_zero_have_a_finite_gradient():
    """The length of a vector has an infinite slope there."""
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    dar.unit_length(x).sum().backward()
    assert x.grad.isfinite().all()


def test_missing_networks_are_one_line(tmp_path, monkeypatch):
    """It names the file, where to put it and the switch that does without."""
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "load", offline)
    words = "checkpoints/vgg16-397923af.pth.* --set lpips_weight=0 repa_weight=0$"
    with pytest.raises(UserError, match=f"^[^\n]*{tmp_path}/{words}"):
        tokenizer().ready(Config(repa_weight=0.0))
    torch.save({}, tmp_path / "checkpoints" / "dinov2_vitb14_pretrain.pth")
    with pytest.raises(UserError, match="facebookresearch/dinov2 .* --set repa_weight=0"):
        dar.load_dino("cpu")


def test_repa_refuses_grids_that_do_not_pool():
    with pytest.raises(UserError, match="16 patches a side .here 4"):
        tokenizer().ready(Config())


def test_files_that_do_not_fit_are_named(tmp_path):
    state = llama(heads=1).state_dict()
    del state["norm.weight"]
    for content, words in ((state, "missing norm.weight"), ({}, "not a D-AR checkpoint"),
                           ({"stage": "tokenizer", "config": 0}, "not a tokenizer")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt.* {words}"):
            dar.load_tokenizer(tmp_path / "x.pt")


# --- Sizes, recipes, options ----------------------------------------------------------------------

def test_published_sizes_have_the_published_parameters():
    """To the last parameter, as computed for the released models; 300M without the REPA head."""
    with torch.device("meta"):
        models = [Llama(dar.PRESETS[name]) for name in ("b", "l", "xl", "xxl")]
        for config in (TokenizerConfig(), TokenizerConfig(repa_layer=0), dar.ABLATION_TOKENIZER):
            models.append(Tokenizer(config))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        110888448, 342910976, 774699520, 1410972672, 307444672, 300099776, 113433536]


TOKENIZER = dict(lr=2e-4, batch=1024, steps=210_000, weight_decay=0.0, ema=0.999)  # Sec. 5
AR = dict(lr=4e-4, batch=1024, epochs=300, beta1=0.9, beta2=0.95, weight_decay=0.05, falling=50,
          lowest=1e-5)
PAPER = {  # size: tokenizer's and AR model's training, guidance
    "b": (dict(batch=256, steps=50_000), dict(epochs=50), (1.1, 8.0)),  # App. III; without guidance
    "l": (TOKENIZER, AR, (1.1, 8.0)),
    "xl": (TOKENIZER, AR, (1.1, 10.0)),
    "xxl": (TOKENIZER, AR, (1.1, 10.0))}


@pytest.mark.parametrize("size", PAPER)
def test_recipes_and_defaults_are_the_papers(size):
    *recipes, cfg = PAPER[size]
    for stage, numbers in zip(dar.STAGES, recipes):
        r = stage.recipes[size]
        values = dict(vars(r), steps=r.epochs * 1281167 / r.batch, falling=r.decay * r.epochs,
                      lowest=r.final * r.lr, beta1=r.betas[0], beta2=r.betas[1])
        assert {name: values[name] for name in numbers} == pytest.approx(numbers)
    c = dar.PRESETS[size]
    t = c.tokenizer
    assert (c.cfg, c.temperature, c.top_k, c.top_p) == (cfg, 1.0, 0, 1.0)
    assert (c.lpips_weight, c.repa_weight, t.beta, t.solver) == (0.5, 0.5, 2.0, "adams")
    assert (t.queries, t.groups, t.steps, t.codebook, t.code_dim) == (256, 8, 0, 16384, 8)


def test_every_numbered_equation_has_its_line():
    tagged = re.findall(r"\S +# Eq\. (\d)", Path(dar.__file__).read_text())
    assert set(tagged) == set("12345678")


@pytest.mark.parametrize("change", [
    "tokenizer.queries=13", "tokenizer.dim=100", "tokenizer.patch=5", "tokenizer.patch=0",
    "tokenizer.solver=rk4", "tokenizer.times=log", "tokenizer.beta=0", "crops=3", "cfg=1",
    "heads=5", "heads=0"])
def test_impossible_configurations_are_refused(change):
    with pytest.raises(UserError):
        common.override(CONFIG, [change])


def test_the_tokenizers_image_size_follows():
    assert common.override(CONFIG, ["image_size=32"]).tokenizer.image_size == 32


@pytest.mark.parametrize("options,words", [
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_k": -1}, "top_k"),
    ({"steps": -1}, "steps"), ({"solver": "rk4"}, "solver"), ({"tokens": 2}, "3 .one group. to 12"),
    ({"prefix_image": "x.png"}, "together"), ({"prefix_tokens": 1}, "together"),
    ({"prefix_image": "x.png", "prefix_tokens": 13}, "has 12 tokens")])
def test_impossible_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        generate(llama(), tokenizer(), [0], **options)


def test_guidance_is_a_number_or_a_pair():
    assert dar.guidance("4") == (4, 4) and dar.guidance("1.1:8") == (1.1, 8)


def test_another_tokenizer_than_the_models_is_refused():
    dar.check(llama(), tokenizer())
    with pytest.raises(UserError, match="tokenizer has codebook 64, the model needs 32"):
        dar.check(llama(), tokenizer(codebook=64))


# --- Crops ----------------------------------------------------------------------------------------

def test_ten_crops_and_their_places():
    """Corners, centre, mirrored, of the picture at 1.1 times the size."""
    pixels = np.random.default_rng(0).integers(256, size=(35, 35, 3)).astype(np.uint8)
    views = [np.asarray(v) for v in dar.ten_crops(common.Image.fromarray(pixels), 32, None)]
    assert np.array_equal(views[3], pixels[3:, 3:]) and np.array_equal(views[4], pixels[1:33, 1:33])
    assert len(views) == 10 and np.array_equal(views[9], views[4][:, ::-1])


def test_random_scale_crops_stay_inside_and_vary():
    """Between 1 and 1.25 times the size, and mirrored."""
    picture = common.Image.linear_gradient("L").rotate(90).convert("RGB")
    spans = []
    for k in range(100):
        crop, mirrored = (np.asarray(v) for v in dar.random_scale_crop(
            picture, 32, np.random.default_rng(k)))
        assert crop.shape == (32, 32, 3) and np.array_equal(crop[:, ::-1], mirrored)
        spans.append(abs(int(crop[16, -1, 0]) - int(crop[16, 0, 0])))
    assert max(spans) > 240 and 150 < min(spans) < 205
