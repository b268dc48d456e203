"""D-AR beyond parity: clocks and solvers in closed form, causality, streaming, fast = plain."""
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import plain
import pytest
import torch
from test_parity import Spy, close, replay

import common
import dar
from common import Noise, UserError
from dar import Config, Llama, Tokenizer, TokenizerConfig

SMALL = replace(
    dar.TINY_TOKENIZER, image_size=16, dim=64, queries=12, query_rows=16, codebook=32, code_dim=4,
    groups=4, pixel_dim=64, pixel_depth=2, steps=0)
CONFIG = replace(
    dar.PRESETS["tiny"], image_size=16, classes=5, dim=64, heads=2, depth=2, cfg=(1.5, 1.5),
    tokenizer=SMALL)
WITH_REPA = replace(SMALL, image_size=64, repa_layer=1)


def shaken(module):
    """Return the module with weights that all matter: the released initialisation has zeros."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def tokenizer(**changes):
    return shaken(Tokenizer(replace(SMALL, **changes)))


def llama(**changes):
    return shaken(Llama(replace(CONFIG, **changes)))


def images(n, size=16):
    """Return random images in -1 .. 1."""
    return 2 * Noise(0, range(n)).uniform((3, size, size)) - 1


def generate(model, t, labels, first=0, **options):
    """Return the images that are sampled from the noise of seed 0, starting at image `first`."""
    noise = Noise(0, range(first, first + len(labels)))
    return dar.generate(model, t, torch.tensor(labels), noise, **options)[0]


# --- Clocks, groups, solvers ----------------------------------------------------------------------

def test_the_two_clocks_are_inverse():
    """Eq. 8; with 1 / beta it is Eq. 5. A beta on the wrong side of the fraction fails."""
    u = torch.tensor([0, 1 / 4, 1 / 2, 1])
    t = dar.shift(u, 2.0)
    close(t, torch.tensor([0, 1 / 7, 1 / 3, 1]))
    close(dar.shift(t, 1 / 2.0), u)


def test_groups_follow_the_nearest_rule():
    """Halves go up, and the times of Eq. 8 use each group once. Ceiling fails."""
    t = tokenizer(queries=10, groups=5)
    groups = [0, 2, 4, 6, 8]
    times = torch.arange(5).double() / 5
    assert t.starts(times).tolist() == t.starts(times + 0.1 - 1e-9).tolist() == groups
    assert t.starts(times + 0.1).tolist() == [2, 4, 6, 8, 8]


def test_uniform_times_take_the_group_of_equation_5():
    """t as drawn, group ceil(t' K) counted from 1. The released rounding takes other groups."""
    t = tokenizer(times="uniform", beta=1.0)
    t.condition = lambda z: torch.arange(12.0)[:, None].expand(5, 12, 1)
    t.pixels.forward = Spy(lambda x, t, c, repa: (x, None))
    draws = torch.tensor([0.0, 0.2, 0.45, 0.7, 0.99])
    t(images(5), u=draws)
    [((_, times, group), _)] = t.pixels.forward
    assert torch.equal(times, draws)
    assert group[:, 0, 0].tolist() == [0, 0, 3, 6, 9]


def solve(velocity, **options):
    """Return the image that the solver finds for a velocity v(x, t) and x_0 = 1."""
    t = tokenizer(groups=1, data_std=1.0)
    t.pixels.forward = lambda x, t, c: (velocity(x, t.item()), None)
    start = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    return t.decode([torch.zeros(1, 12)], replay(start), **options)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("adams", 2)])
def test_the_order_of_each_solver(solver, order):
    """dx/dt = -2 t x has x(1) = x(0) / e. Twice the steps: half of the error, or a quarter."""
    errors = []
    for steps in (128, 256):
        image = solve(lambda x, t: -2 * t * x, steps=steps, solver=solver)
        errors.append((image - math.exp(-1)).abs().max())
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("preview", ["solver", "v"])
def test_jump_estimates_of_a_straight_path_are_the_image(preview):
    """v = x_1 - x_0 makes every preview the image, from the first step to the last."""
    previews = []
    solve(lambda x, t: torch.full_like(x, 0.5 - 1.0), steps=8, preview=preview,
          on_step=previews.append)
    assert (torch.stack(previews) - 0.5).abs().max() < 1e-6


def test_the_last_preview_is_the_result_of_the_solver():
    """A jump along v would make an Euler step of the last one."""
    along_v, result = (solve(lambda x, t: -2 * t * x, steps=4, preview=preview)
                       for preview in ("v", "solver"))
    assert torch.equal(along_v, result)


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
    shares = [q.usage(torch.tensor(codes)) for codes in ([1, 2, 2], [3, 4, 4], [0, 0, 0])]
    assert shares == pytest.approx([0.2, 0.4, 0.3])


def test_codes_are_found_in_true_float32():
    """Under bf16 autocast and TF32, also if the sampler has cast weights. In training it is only
    the product that finds the nearest code."""
    t = tokenizer()
    exact = t.encode(images(4))
    common.cast_once(*t.sampled())
    codewords = t.quantizer.codewords
    precisions = []
    t.quantizer.codewords = lambda: precisions.append(precision()) or codewords()
    precision = torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        codes = t.encode(images(4))
        t(images(4))
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(codes, exact)
    assert precisions == ["highest", "highest", "highest", "high"]  # the last one looks codes up


def test_perceptual_losses_have_the_weights_of_equation_7():
    """Two weights that change places, or a term that is left out, change the sum."""
    t = Tokenizer(WITH_REPA)
    t.loss_config = Config(lpips_weight=0.5, repa_weight=0.25)
    t.lpips = lambda x, y, dropout: (x - y).mean((2, 3)).T
    t.dino = lambda x: torch.ones(2, 256, 768)
    loss, flow, codebook, commitment, lpips, repa, *_ = t(images(2, 64)).values()
    close(loss, flow + codebook + commitment + 0.5 * lpips + 0.25 * repa, 1e-6)


def test_idle_parameters_are_announced():
    """Distributed training waits for a gradient of every parameter, unless it is told."""
    t = Tokenizer(WITH_REPA)
    t.ready(CONFIG)
    t(images(2, 64))["loss"].backward()
    idle = [name for name, p in t.named_parameters() if p.grad is None]
    assert t.idle_parameters
    assert all(name.startswith("pixels.repa.") for name in idle)


def test_lpips_dropout_is_off_in_evaluation():
    """Validation losses would be noisy."""
    t = Tokenizer(SMALL)
    t.lpips = lambda x, y, dropout: torch.full((5, 2), dropout)
    t.loss_config = Config()
    assert t.train()(images(2))["lpips"] == 2.5
    assert t.eval()(images(2))["lpips"] == 0


def test_lpips_convolutions_are_in_channels_last(monkeypatch):
    """Others are slower on a GPU. The classifier is left out."""
    layers = dict.fromkeys(["features.0.weight", "classifier.0.weight"], torch.zeros(2, 3, 3, 3))
    monkeypatch.setattr(dar, "published", lambda *args: layers)
    [weights] = dar.load_lpips("cpu").args
    [weight] = weights.values()
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_missing_networks_are_one_line(tmp_path, monkeypatch):
    """It names the file or repository, and the switch that does without."""
    offline = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(UserError, match="vgg16-397923af.pth .*--set lpips_weight=0 repa_weight=0"):
        dar.load_lpips("cpu")
    torch.save({}, tmp_path / "checkpoints" / "dinov2_vitb14_pretrain.pth")
    with pytest.raises(UserError, match="facebookresearch/dinov2 .*--set repa_weight=0"):
        dar.load_dino("cpu")


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
    close(streamed, t.decode([codes], replay(start), steps=steps))


def test_previews_come_before_the_later_tokens():
    """A preview follows each group of three tokens at once, not sooner."""
    model = llama()
    model.step = Spy(model.step)
    counts = []
    generate(model, tokenizer(), [1], on_step=lambda x: counts.append(len(model.step)))
    assert counts == [3, 6, 9, 12]


def test_images_from_the_first_tokens_are_the_previews():
    """Table 5: stopping after n tokens gives the preview that the whole run showed then."""
    model = llama()
    t = tokenizer()
    previews = []
    generate(model, t, [0, 3], on_step=previews.append)
    for n, k in ((3, 0), (8, 1)):
        image = generate(model, t, [0, 3], tokens=n)
        assert torch.equal(image, previews[k].clamp(-1, 1)), n


def test_an_image_does_not_depend_on_its_batch():
    """Noise or caches that are shared between images show."""
    model = llama()
    t = tokenizer()
    together = generate(model, t, [0, 3, 5])
    alone = [generate(model, t, [label], first=k) for k, label in enumerate([0, 3, 5])]
    close(torch.cat(alone), together, 1e-4)


def test_the_distance_to_the_picture_of_the_prefix_is_a_fact(tmp_path):
    """The root of the mean square, over all pixels."""
    file = tmp_path / "x.png"
    common.draw_shape(0, 16).save(file)
    x = common.to_float(common.load_picture(file, 16))[None]
    image, facts = dar.generate(llama(), tokenizer(), torch.tensor([0]), Noise(0, [0]),
                                prefix_image=file, prefix_tokens=3)
    close(facts["distance_to_reference"], (image - x).square().mean().sqrt()[None])


# --- The AR model ---------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [(1.0, 1.0), (1.0, 3.0), (0.0, 0.0)])
def test_cached_sampling_is_plain_sampling(monkeypatch, cfg):
    """The same probabilities at every position: a wrong place in the cache or mask shows."""
    draw = Spy(dar.draw_token)
    monkeypatch.setattr(dar, "draw_token", draw)
    model = llama()
    labels = torch.tensor([0, 4, 5])
    list(model.stream(labels, Noise(0, range(3)), cfg=cfg))
    plain.llama_sample(model, labels, Noise(0, range(3)), cfg=cfg)
    probs = torch.stack([args[0] for args, _ in draw])
    close(probs[:12], probs[12:])


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {"top_k": 1}])
def test_filters_act_by_default_and_by_option(filters):
    """Each leaves the most likely token only: other noise gives the same tokens."""
    *_, by_default = llama(**filters).stream(torch.tensor([0]), Noise(0, [0]))
    *_, by_option = llama().stream(torch.tensor([0]), Noise(1, [0]), **filters)
    assert torch.equal(by_default, by_option)


def test_compiled_sampling_is_eager_sampling(traced):
    """Other labels, scales or numbers of tokens make no further graph: one for each step."""
    model = llama()
    t = tokenizer()
    expected = generate(model, t, [0, 1, 2])
    dar.compile_steps(model, t)
    generate(model, t, [2, 1, 0], tokens=5, cfg=(1.0, 2.5))
    close(generate(model, t, [0, 1, 2]), expected)
    assert len(traced) == 2 and model.key_value_pairs.cache_info().misses == 1


def test_compiled_blocks_write_whole_caches_in_place(traced):
    """Written through a view, a cache would be copied as a whole at each token."""
    model = llama()
    dar.compile_steps(model, tokenizer())
    list(model.stream(torch.tensor([0, 1]), Noise(0, range(2))))
    [graph] = traced
    caches = {node.args[0] for node in graph.graph.nodes if node.target == "index_copy_"}
    assert len(caches) == 2
    assert all(cache.op == "placeholder" and len(cache.users) == 1 for cache in caches)


def test_tokens_are_drawn_with_their_probabilities():
    """Frequencies over an even grid of u; impossible tokens never; u at both ends."""
    probs = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])
    u = (torch.arange(1000) + 0.5) / 1000
    counts = dar.draw_token(probs.expand(1000, -1), u).bincount(minlength=6)
    assert counts.tolist() == pytest.approx([0, 200, 0, 500, 300, 0], abs=1)
    assert dar.draw_token(probs.expand(2, -1), torch.tensor([0.0, 1.0])).tolist() == [1, 4]


def test_sums_that_waver_draw_no_impossible_token(monkeypatch):
    """On CUDA a cumulative sum may grow where zero is added."""
    sums = torch.tensor([[0.5, 0.6, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda probs, dim: sums)
    assert dar.draw_token(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([0.55])) == 2


def test_labels_are_dropped_at_the_asked_rate_in_training_alone():
    """Guidance needs a model that was also trained without labels."""
    model = llama(label_drop=0.3)
    model.logits = Spy(lambda codes, labels: torch.zeros(4000, 1, 32))
    codes = torch.zeros(4000, 1, dtype=torch.long)
    model.train()(codes, codes[:, 0])
    model.eval()(codes, codes[:, 0])
    dropped = [(args[1] == 5).float().mean() for args, _ in model.logits]
    assert dropped == pytest.approx([0.3, 0.0], abs=0.03)


# --- Sizes, recipes, options, files ---------------------------------------------------------------

def test_published_sizes_have_the_published_parameters():
    """To the last parameter, as computed for the released models."""
    with torch.device("meta"):
        models = [Llama(dar.PRESETS[name]) for name in ("b", "l", "xl", "xxl")]
        for config in (TokenizerConfig(), dar.PRESETS["b"].tokenizer):
            models.append(Tokenizer(config))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        110888448, 342910976, 774699520, 1410972672, 307444672, 113433536]


@pytest.mark.parametrize("size,batch,steps,epochs,scale", [
    ("b", 256, 50_000, 50, 8.0), ("xxl", 1024, 210_000, 300, 10.0)])
def test_recipes_and_defaults_are_the_papers(size, batch, steps, epochs, scale):
    """Sec. 5, and App. III for the smallest one, which is sampled there without guidance."""
    first, second = (stage.recipes[size] for stage in dar.STAGES)
    assert (first.lr, first.batch, first.weight_decay, first.ema) == (2e-4, batch, 0.0, 0.999)
    assert first.epochs * 1281167 / batch == pytest.approx(steps)
    assert (second.lr, second.batch, second.epochs) == (4e-4, 1024, epochs)
    assert (second.betas, second.weight_decay) == ((0.9, 0.95), 0.05)
    assert (second.decay, second.final * second.lr) == pytest.approx((50 / 300, 1e-5))
    c = dar.PRESETS[size]
    assert (c.cfg, c.lpips_weight, c.repa_weight) == ((1.1, scale), 0.5, 0.5)


@pytest.mark.parametrize("change", [
    "tokenizer.queries=13", "tokenizer.dim=100", "tokenizer.patch=5", "tokenizer.patch=0",
    "tokenizer.solver=rk4", "tokenizer.times=log", "crops=3", "cfg=1", "heads=5", "heads=0"])
def test_impossible_configurations_are_refused(change):
    """In one line, before anything is built."""
    with pytest.raises(UserError):
        common.override(CONFIG, [change])


@pytest.mark.parametrize("options,words", [
    ({"temperature": -1.0}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"steps": -1}, "steps"),
    ({"tokens": 13}, "3 .one group. to 12")])
def test_impossible_options_are_refused(options, words):
    """In one line that names the option."""
    with pytest.raises(UserError, match=words):
        generate(llama(), tokenizer(), [0], **options)


def test_another_tokenizer_than_the_models_is_refused():
    """Its codes would mean something else."""
    dar.check(llama(), tokenizer())
    with pytest.raises(UserError, match="a tokenizer of another codebook"):
        dar.check(llama(), tokenizer(codebook=64))
    with pytest.raises(UserError, match="--ckpt is a tokenizer"):
        dar.check(tokenizer(), tokenizer())


def test_files_that_do_not_fit_are_named(tmp_path):
    """Missing entries, and a damaged tokenizer of ours."""
    state = llama().state_dict()
    del state["norm.weight"]
    for content, words in ((state, "norm.weight"), ({"stage": "tokenizer"}, "not a D-AR")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt.*{words}"):
            dar.load_tokenizer(tmp_path / "x.pt")


# --- Crops ----------------------------------------------------------------------------------------

def test_ten_crops_and_their_places():
    """Corners, centre, mirrored, of the picture at 1.1 times the size."""
    picture = common.draw_shape(0, 35)
    views = dar.ten_crops(picture, 32, None)
    assert len(views) == 10
    assert views[3] == picture.crop((3, 3, 35, 35))
    assert views[4] == picture.crop((1, 1, 33, 33))
    assert views[9] == common.mirror(views[4])


def test_random_scale_crops_stay_inside_and_vary():
    """Between 1 and 1.25 times the size, and mirrored."""
    picture = common.Image.linear_gradient("L").rotate(90).convert("RGB")
    spans = []
    for k in range(100):
        crop, mirrored = dar.random_scale_crop(picture, 32, np.random.default_rng(k))
        assert crop.size == (32, 32)
        assert mirrored == common.mirror(crop)
        spans.append(crop.getpixel((31, 16))[0] - crop.getpixel((0, 16))[0])
    assert 150 < min(spans) < 205 < 240 < max(spans)
