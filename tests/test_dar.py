"""D-AR beyond parity: clocks and solvers in closed form, causality, streaming, fast = plain."""
import dataclasses
import math

import numpy as np
import plain
import pytest
import torch
from test_parity import Spy, close

import common
import dar
from common import Noise, UserError
from dar import Config, Decoding, Llama, Tokenizer, TokenizerConfig

SMALL = TokenizerConfig(
    image_size=16, patch=4, dim=64, depth=2, queries=12, query_rows=16, codebook=32, code_dim=4,
    decoder_dim=128, decoder_depth=2, groups=4, pixel_patch=4, pixel_dim=64, pixel_depth=2,
    repa_layer=0)
CONFIG = Config(
    image_size=16, classes=5, dim=64, heads=2, depth=2, dropout=0.0, cfg=(1.5, 1.5), crops=1,
    lpips_weight=0.0, repa_weight=0.0, tokenizer=SMALL)
WITH_REPA = dataclasses.replace(SMALL, image_size=64, repa_layer=1)


def shaken(module):
    """Return the module with weights that all matter: the released initialisation has zeros."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def tokenizer(**changes):
    return shaken(Tokenizer(dataclasses.replace(SMALL, **changes)))


def llama(**changes):
    return shaken(Llama(dataclasses.replace(CONFIG, **changes)))


def images(n, size=16):
    """Return random images in -1 .. 1."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(n, 3, size, size, generator=generator) - 1


def generate(model, t, labels, first=0, **options):
    """Return the images that are sampled from the noise of seed 0, starting at image `first`."""
    noise = Noise(0, range(first, first + len(labels)))
    return dar.generate(model, t, torch.tensor(labels), noise, **options)[0]


# --- Clocks, groups, solvers ----------------------------------------------------------------------

def test_the_two_clocks_are_inverse():
    """Eq. 5 undoes Eq. 8; a beta on the wrong side of the fraction fails."""
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert dar.shift(u, 2.0).tolist() == pytest.approx([0, 1 / 7, 1 / 3, 3 / 5, 1])
    close(dar.unshift(dar.shift(u, 3.0), 3.0), u)


@pytest.mark.parametrize("N,K", [(256, 8), (30, 10)])
def test_groups_follow_the_nearest_rule(N, K):
    """Halves go up, and the times of Eq. 8 use each group once. Ceiling fails."""
    t = tokenizer(queries=N, query_rows=N, groups=K)
    groups = list(range(0, N, N // K))
    edges = (torch.arange(K).double() + 0.5) / K
    assert Decoding(t, torch.zeros(1)).starts == groups
    assert t.starts(edges - 1e-9).tolist() == groups
    assert t.starts(edges).tolist() == [*groups[1:], groups[-1]]


def test_uniform_times_take_the_group_of_equation_5():
    """t as drawn, group ceil(t' K) counted from 1. The released rounding takes other groups."""
    t = tokenizer(times="uniform", beta=1.0)
    numbers = torch.arange(12.0).view(1, 12, 1)
    t.condition = lambda z: numbers.expand(len(z), 12, 1)
    t.pixels.forward = Spy(lambda x, t, c, repa: (x, None))
    draws = torch.tensor([0.0, 0.2, 0.45, 0.7, 0.99])
    t(images(5), u=draws)
    [(_, times, group)] = t.pixels.forward.args
    assert torch.equal(times, draws)
    assert group[:, 0, 0].tolist() == [0, 0, 3, 6, 9]


def solve(velocity, beta, **options):
    """Return the image that the solver finds for a velocity v(x, t) and x_0 = 1."""
    t = tokenizer(groups=1, data_std=1.0, beta=beta)
    t.pixels.forward = lambda x, t, c: (velocity(x, t.item()), None)
    start = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    return t.decode(torch.zeros(1, 12), start, **options)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("adams", 2)])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_order_of_each_solver(solver, beta, order):
    """dx/dt = -2 t x has x(1) = x(0) / e. Twice the steps: half of the error, or a quarter."""
    errors = []
    for steps in (128, 256):
        image = solve(lambda x, t: -2 * t * x, beta, steps=steps, solver=solver)
        errors.append((image - math.exp(-1)).abs().max())
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "adams"])
@pytest.mark.parametrize("preview", ["solver", "v"])
def test_jump_estimates_of_a_straight_path_are_the_image(solver, preview):
    """v = x_1 - x_0 makes every preview the image, from the first step to the last."""
    previews = []
    solve(lambda x, t: torch.full_like(x, 0.5 - 1.0), 2.0, steps=8, solver=solver,
          preview=preview, on_step=previews.append)
    assert len(previews) == 8
    assert (torch.stack(previews) - 0.5).abs().max() < 1e-6


# --- The tokenizer --------------------------------------------------------------------------------

def test_tokens_never_depend_on_later_queries():
    """Another query j changes all tokens from j on and none before: a leak in the mask shows."""
    t = tokenizer()
    before = t.features(images(2))
    t.query_table.weight.data[7] += 1
    changes = (t.features(images(2)) - before).abs().amax((0, 2))
    assert changes[:7].max() == 0
    assert changes[7:].min() > 1e-4


def test_usage_counts_the_latest_codes():
    """Codes 1 and 2 have left the window at last."""
    q = dar.Quantizer(10, 2)
    q.window = 6
    shares = []
    for codes in ([1, 2, 2], [3, 4, 4], [0, 0, 0]):
        shares.append(q.usage(torch.tensor(codes)))
    assert shares == pytest.approx([0.2, 0.4, 0.3])


def test_codes_are_found_in_true_float32():
    """Under bf16 autocast and TF32, `encode` is exact, and in training the nearest-code product."""
    t = tokenizer()
    exact = t.encode(images(4))
    codewords = t.quantizer.codewords
    precisions = Spy(torch.get_float32_matmul_precision)
    t.quantizer.codewords = lambda: precisions() and codewords()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        codes = t.encode(images(4))
        t(images(4))
    torch.set_float32_matmul_precision(before)
    assert torch.equal(codes, exact)
    assert precisions.results == ["highest"] * 3 + ["high"]  # the last one looks codes up


def test_perceptual_losses_have_the_weights_of_equation_7(monkeypatch):
    """Two weights that change places, or a term that is left out, change the sum."""
    lpips = Spy(lambda x, y, dropout: (x - y).mean((2, 3)).T)
    dino = Spy(lambda x: torch.ones(2, 256, 768))
    monkeypatch.setattr(dar, "load_lpips", lambda device: lpips)
    monkeypatch.setattr(dar, "load_dino", lambda device: dino)
    t = Tokenizer(WITH_REPA)
    t.ready(Config(lpips_weight=0.5, repa_weight=0.25))
    out = t(images(2, 64))
    parts = out["flow"] + out["codebook"] + out["commitment"] + 0.5 * out["lpips"]
    close(out["loss"], parts + 0.25 * out["repa"], 1e-6)


def test_without_perceptual_losses_every_parameter_has_a_gradient():
    """Distributed training waits for all of them."""
    t = Tokenizer(WITH_REPA)
    t(images(2, 64))["loss"].backward()
    assert all(p.grad is not None for p in t.parameters())


def test_lpips_dropout_is_off_in_evaluation():
    """Validation losses would be noisy."""
    t = Tokenizer(SMALL)
    t.lpips = Spy(lambda x, y, dropout: torch.zeros(5, 2))
    t.loss_config = Config()
    t.train()(images(2))
    t.eval()(images(2))
    assert [dropout for _, _, dropout in t.lpips.args] == [0.5, 0.0]


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
    """DINO has 16 patches a side."""
    with pytest.raises(UserError, match="16 patches a side .here 4"):
        tokenizer().ready(Config())


# --- Streaming ------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [4, 3, 7])
def test_streaming_is_decoding_afterwards(steps):
    """A step that is taken too early reads codes that are not there yet."""
    model = llama()
    t = tokenizer()
    streamed = generate(model, t, [0, 3, 5], steps=steps)
    noise = Noise(0, range(3))
    start = noise.normal((3, 16, 16))
    *_, codes = model.stream(torch.tensor([0, 3, 5]), noise)
    afterwards = t.decode(codes, start, steps=steps).clamp(-1, 1)
    close(streamed, afterwards)


def test_previews_come_before_the_later_tokens():
    """A preview follows each group of three tokens at once."""
    model = llama()
    model.step = Spy(model.step)
    counts = []

    def show(x):
        counts.append(len(model.step.args))

    generate(model, tokenizer(), [1], on_step=show)
    assert counts == [3, 6, 9, 12]


def test_images_from_the_first_tokens_are_the_previews():
    """Table 5: stopping after n tokens gives the preview that the whole run showed then."""
    model = llama()
    t = tokenizer()
    previews = []
    generate(model, t, [0, 3], on_step=previews.append)
    for n, k in ((3, 0), (6, 1), (8, 1), (12, 3)):
        image = generate(model, t, [0, 3], tokens=n)
        assert torch.equal(image, previews[k]), n


def test_an_image_does_not_depend_on_its_batch():
    """Noise or caches that are shared between images show."""
    model = llama()
    t = tokenizer()
    labels = [0, 3, 5, 1]
    together = generate(model, t, labels)
    for k, label in enumerate(labels):
        close(generate(model, t, [label], first=k), together[k:k + 1], 1e-4)


def test_a_prefix_picture(tmp_path):
    """All of its tokens make its reconstruction, whose distance to the picture is a fact."""
    file = tmp_path / "x.png"
    common.draw_shape(0, 16).save(file)
    x = common.to_float(common.load_picture(file, 16))[None]
    t = tokenizer()
    noise = Noise(0, [0])
    image, facts = dar.generate(llama(), t, torch.tensor([0]), noise, prefix_image=file,
                                prefix_tokens=12)
    close(image, t.reconstruct(x, Noise(0, [0])), 1e-4)
    close(facts["distance_to_reference"], (image - x).square().mean().sqrt()[None])


# --- The AR model ---------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [(1.0, 1.0), (2.5, 2.5), (1.0, 3.0), (0.0, 0.0)])
def test_cached_sampling_is_plain_sampling(monkeypatch, cfg):
    """The same probabilities at every position: a wrong place in the cache or mask shows."""
    draw = Spy(dar.draw_token)
    monkeypatch.setattr(dar, "draw_token", draw)
    model = llama()
    labels = torch.tensor([0, 4, 5])
    *_, codes = model.stream(labels, Noise(0, range(3)), cfg=cfg)
    plain_codes = plain.llama_sample(model, labels, Noise(0, range(3)), cfg=cfg)
    assert torch.equal(codes, plain_codes)
    probs = torch.stack([probs for probs, _ in draw.args])
    close(probs[:12], probs[12:])


def test_compiled_sampling_is_eager_sampling(traced):
    """Other labels, scales or numbers of tokens make no further graph: one for each step."""
    model = llama()
    t = tokenizer()
    expected = generate(model, t, [0, 1, 2], cfg=3.0)
    dar.compile_steps(model, t)
    generate(model, t, [2, 1, 0], tokens=5, cfg=1.5)
    close(generate(model, t, [0, 1, 2], cfg=3.0), expected)
    assert len(traced) == 2


def test_the_compiled_step_writes_whole_caches_in_place(traced):
    """Written through a view, a cache would be copied as a whole at each token."""
    model = llama()
    dar.compile_steps(model, tokenizer())
    list(model.stream(torch.tensor([0, 1]), Noise(0, range(2))))
    [graph] = traced
    nodes = graph.graph.nodes
    writes = [node for node in nodes if node.target == "index_copy_"]
    caches = {write.args[0] for write in writes}
    assert len(writes) == len(caches) == 2 * CONFIG.depth
    assert all(cache.op == "placeholder" and len(cache.users) == 1 for cache in caches)
    others = {str(node.target) for node in nodes} - {"index_copy_"}
    assert not [name for name in others if "copy" in name or "scatter" in name]


def test_tokens_are_drawn_with_their_probabilities():
    """Frequencies over an even grid of u; impossible tokens never; u at both ends."""
    probs = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])
    u = (torch.arange(1000) + 0.5) / 1000
    counts = dar.draw_token(probs.expand(1000, -1), u).bincount(minlength=6)
    assert counts.tolist() == pytest.approx([0, 200, 0, 500, 300, 0], abs=1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert dar.draw_token(probs.expand(2, -1), ends).tolist() == [1, 4]


def test_labels_are_dropped_at_the_asked_rate_in_training_alone():
    """Guidance needs a model that was also trained without labels."""
    model = llama(label_drop=0.3)
    model.logits = Spy(lambda codes, labels: torch.zeros(*codes.shape, 32))
    codes = torch.zeros(4000, 12, dtype=torch.long)
    model.train()(codes, codes[:, 0])
    model.eval()(codes, codes[:, 0])
    dropped = [(labels == 5).float().mean() for _, labels in model.logits.args]
    assert dropped == pytest.approx([0.3, 0.0], abs=0.03)


# --- Sizes, recipes, options, files ---------------------------------------------------------------

def test_published_sizes_have_the_published_parameters():
    """To the last parameter, as computed for the released models; 300M without the REPA head."""
    with torch.device("meta"):
        models = [Llama(dar.PRESETS[name]) for name in ("b", "l", "xl", "xxl")]
        for config in (TokenizerConfig(), TokenizerConfig(repa_layer=0), dar.ABLATION_TOKENIZER):
            models.append(Tokenizer(config))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        110888448, 342910976, 774699520, 1410972672, 307444672, 300099776, 113433536]


@pytest.mark.parametrize("size,batch,steps,epochs,scale", [
    ("b", 256, 50_000, 50, 8.0),
    ("l", 1024, 210_000, 300, 8.0),
    ("xl", 1024, 210_000, 300, 10.0),
    ("xxl", 1024, 210_000, 300, 10.0)])
def test_recipes_and_defaults_are_the_papers(size, batch, steps, epochs, scale):
    """Sec. 5, and App. III for the smallest one, which is sampled there without guidance."""
    first, second = (stage.recipes[size] for stage in dar.STAGES)
    assert first.batch == batch
    assert first.epochs * 1281167 / batch == pytest.approx(steps)
    assert (first.lr, first.weight_decay, first.ema) == (2e-4, 0.0, 0.999)
    assert (second.lr, second.batch, second.epochs) == (4e-4, 1024, epochs)
    assert (second.betas, second.weight_decay) == ((0.9, 0.95), 0.05)
    assert second.decay == pytest.approx(50 / 300)
    assert second.final * second.lr == pytest.approx(1e-5)
    c = dar.PRESETS[size]
    assert (c.cfg, c.lpips_weight, c.repa_weight) == ((1.1, scale), 0.5, 0.5)
    t = c.tokenizer
    assert (t.queries, t.groups, t.beta, t.solver) == (256, 8, 2.0, "adams")


@pytest.mark.parametrize("change", [
    "tokenizer.queries=13", "tokenizer.dim=100", "tokenizer.patch=5", "tokenizer.patch=0",
    "tokenizer.solver=rk4", "tokenizer.times=log", "tokenizer.beta=0", "crops=3", "cfg=1",
    "heads=5", "heads=0"])
def test_impossible_configurations_are_refused(change):
    """In one line, before anything is built."""
    with pytest.raises(UserError):
        common.override(CONFIG, [change])


def test_the_tokenizers_image_size_follows():
    """So that a user sets one of them only."""
    assert common.override(CONFIG, ["image_size=32"]).tokenizer.image_size == 32


@pytest.mark.parametrize("options,words", [
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"steps": -1}, "steps"),
    ({"solver": "rk4"}, "solver"),
    ({"tokens": 2}, "3 .one group. to 12"),
    ({"prefix_image": "x.png"}, "together"),
    ({"prefix_tokens": 1}, "together"),
    ({"prefix_image": "x.png", "prefix_tokens": 13}, "has 12 tokens")])
def test_impossible_options_are_refused(options, words):
    """In one line that names the option."""
    with pytest.raises(UserError, match=words):
        generate(llama(), tokenizer(), [0], **options)


def test_another_tokenizer_than_the_models_is_refused():
    """Its codes would mean something else."""
    dar.check(llama(), tokenizer())
    with pytest.raises(UserError, match="tokenizer has codebook 64, the model needs 32"):
        dar.check(llama(), tokenizer(codebook=64))


def test_files_that_do_not_fit_are_named(tmp_path):
    """Missing entries, other files, and a damaged tokenizer of ours."""
    state = llama(heads=1).state_dict()
    del state["norm.weight"]
    for content, words in ((state, "missing norm.weight"), ({}, "not a D-AR checkpoint"),
                           ({"stage": "tokenizer", "config": 0}, "not a tokenizer")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt.* {words}"):
            dar.load_tokenizer(tmp_path / "x.pt")


# --- Crops ----------------------------------------------------------------------------------------

def test_ten_crops_and_their_places():
    """Corners, centre, mirrored, of the picture at 1.1 times the size."""
    pixels = np.random.default_rng(0).integers(256, size=(35, 35, 3)).astype(np.uint8)
    picture = common.Image.fromarray(pixels)
    views = [np.asarray(view) for view in dar.ten_crops(picture, 32, None)]
    assert len(views) == 10
    assert np.array_equal(views[3], pixels[3:, 3:])
    assert np.array_equal(views[4], pixels[1:33, 1:33])
    assert np.array_equal(views[9], views[4][:, ::-1])


def test_random_scale_crops_stay_inside_and_vary():
    """Between 1 and 1.25 times the size, and mirrored."""
    picture = common.Image.linear_gradient("L").rotate(90).convert("RGB")
    spans = []
    for k in range(100):
        views = dar.random_scale_crop(picture, 32, np.random.default_rng(k))
        crop, mirrored = map(np.asarray, views)
        assert crop.shape == (32, 32, 3)
        assert np.array_equal(crop[:, ::-1], mirrored)
        row = crop[16, :, 0].astype(int)
        spans.append(abs(row[-1] - row[0]))
    assert max(spans) > 240
    assert 150 < min(spans) < 205
