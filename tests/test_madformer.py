"""MADFormer beyond parity: attention, samplers in closed form, fast = plain, text, costs, files."""
import argparse
import dataclasses
import itertools
import math
import re

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from test_parity import Fixture, Spy, close, replay, spied

import common
import madformer
import train
from common import Noise, UserError
from madformer import CLEAN, EOI, EOS, NOISE, TEXT, Config, MADFormer, UNetConfig

SMALL = Config(
    image_size=16, classes=3, class_names=("ox", "a horse", "Sheep"), text=True, dim=128, mlp=96,
    depth=3, diffusion_depth=2, ar_length=4, target="clean", steps=3,
    unet=UNetConfig((8, 16), (1, 1), (0, 1), groups=4, heads=2, time_dim=16),
    vae=common.VAEConfig(channels=3, width=8, mult=(1, 2), blocks=1, attention=(), groups=4))
ABLATIONS = [
    "", "text=false", "clean_blocks=false", "condition=false", "shared=true", "mlp_denoising=true",
    "ar_length=1", "ar_length=1 text=false", "diffusion_depth=3", "clean_weight=0.1",
    "diffusion_depth=3 condition=false text=false", "mlp_denoising=true text=false",
    "mlp_denoising=true clean_blocks=false", "mlp_denoising=true clean_weight=0.1",
    "clean_blocks=false condition=false text=false",
    "clean_blocks=false condition=false text=false shared=true"]
LABELS = torch.tensor([0, 1, 2])


def model_of(changes=""):
    """Return a small model with these fields of its config changed."""
    torch.manual_seed(0)
    return MADFormer(common.override(SMALL, changes.split())).eval()


def losses(model, n=2, **draws):
    """Return the losses of n images, on the same latents and draws each time."""
    torch.manual_seed(1)
    c = model.config
    latents = torch.randn(n, c.vae.channels, c.latent_size, c.latent_size)
    return model(latents, torch.arange(n) % 3, **draws)


def sample(model, labels=LABELS, **options):
    """Return latents."""
    return model.sample(labels, noise_of(labels), **options)


def noise_of(labels):
    """Return noise that goes with each label."""
    return Noise(5, labels.tolist())


# --- Attention ------------------------------------------------------------------------------------

def statement(query, key, clean_blocks, isolated):
    """Return whether a row attends to another, by the table of the paper put in words.

    A row is (kind, place). None of them is padding.
    """
    (kind_q, q), (kind_k, k) = query, key
    if kind_q == TEXT and kind_k == TEXT:
        return k <= q  # text is causal
    if isolated:
        return query == key  # while denoising, a block attends to itself
    if kind_k == (CLEAN if clean_blocks else NOISE) and k < q or kind_k == TEXT:
        return k < q  # earlier blocks; for text before the image there are none
    return query == key


def layout_of(text, clean_blocks):
    """Return the layout of all rows and the tokens of texts of different lengths."""
    model = model_of(f"text={text} clean_blocks={clean_blocks}")
    tokens = F.pad(model.names, (0, 1), value=EOI) if text else LABELS[None, :0]
    parts = [model.text_layout(tokens), model.image_layout(NOISE)]
    if clean_blocks:
        parts.insert(1, model.image_layout(CLEAN))
    return torch.cat(parts, 1), tokens


VARIANTS = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("text,clean_blocks,isolated", VARIANTS)
def test_the_mask_is_the_statement(text, clean_blocks, isolated):
    """Row by row, with padding: a row that attends to one too many, or to one too few."""
    layout, tokens = layout_of(text, clean_blocks)
    mask = madformer.attention_mask(layout, tokens, isolated)[:, 0]
    rows = list(zip(*layout[:2].tolist()))
    for b in range(len(mask)):
        padding = [k for k, token in enumerate(tokens[b]) if token == EOS]
        for q, k in itertools.product(range(len(rows)), repeat=2):
            if q not in padding:
                expected = k not in padding and statement(rows[q], rows[k], clean_blocks, isolated)
                assert mask[b, q, k] == expected, (b, rows[q], rows[k])


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # slow, but the same numbers
@pytest.mark.parametrize("text,clean_blocks,isolated", VARIANTS)
def test_flex_attention_is_masked_attention(monkeypatch, text, clean_blocks, isolated):
    """A mask that is shared by all images, or transposed, on CUDA alone."""
    monkeypatch.setattr(madformer, "compiled_flex_attention", lambda: madformer.flex_attention)
    layout, tokens = layout_of(text, clean_blocks)
    q, k, v = torch.randn(3, 3, 2, layout.shape[1], 64)
    dense = madformer.masked_attention(layout, tokens, isolated, flex=False)
    flex = madformer.masked_attention(layout, tokens, isolated, flex=True)
    close(flex(q, k, v), dense(q, k, v))


# --- Samplers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", madformer.MAX_STEPS)
@pytest.mark.parametrize("target", ["clean", "noise"])
def test_a_known_image_is_reached_in_any_number_of_steps(sampler, target):
    """A network that knows x_0: a wrong sign, level or last step misses it."""
    x_0, start = torch.randn(2, 2, 5)
    for steps in (1, 2, 7, 50, madformer.MAX_STEPS[sampler]):
        _, alpha, sigma = madformer.schedule(sampler, steps)

        def network(x, i):
            return x_0 if target == "clean" else (x - alpha[i] * x_0) / sigma[i]

        *_, result = madformer.solve(network, start, sampler, steps, target)
        torch.testing.assert_close(result, x_0, rtol=0, atol=2e-4)


@pytest.mark.parametrize("sampler,factor", [("ddim", 0.65), ("dpm", 0.4)])
def test_the_order_of_each_sampler(sampler, factor):
    """Of Gaussian data the flow keeps the standard scores. Twice the steps: 1/2, 1/4 the error."""
    mean = 0.7
    std = 0.4
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        _, alpha, sigma = madformer.schedule(sampler, steps)
        deviation = [math.hypot(a * std, s) for a, s in zip(alpha, sigma)]

        def network(x, i):  # the posterior mean of x_0
            return mean + std**2 * alpha[i] / deviation[i] ** 2 * (x - alpha[i] * mean)

        *_, result = madformer.solve(network, x, sampler, steps, "clean")
        exact = mean + std * (x - alpha[0] * mean) / deviation[0]
        errors.append((result - exact).abs().max())
    assert errors[1] < min(0.05, factor * errors[0]), errors


def test_the_last_step_of_dpm_is_of_first_order():
    """The result is the last estimate; one that is extrapolated from two overshoots."""
    estimates = torch.randn(5, 2, 3)
    *_, result = madformer.solve(lambda x, i: estimates[i], estimates[0], "dpm", 5, "clean")
    assert torch.equal(result, estimates[-1])


def test_steps_of_dpm_are_numpys():
    """Every number of steps: halves become even, and torch.linspace would make one of 30 be 500."""
    for n in range(1, 1000):
        expected = np.linspace(0, 999, n + 1).round().astype(int)[:0:-1].tolist()
        assert madformer.schedule("dpm", n)[0] == expected, n


# --- Sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", ABLATIONS)
@pytest.mark.parametrize("more", ["sampler=ddim clean_time=zero", "sampler=dpm"])
def test_cached_sampling_is_plain_sampling(changes, more):
    """Caches, padding and both samplers, under every switch."""
    model = model_of(f"{changes} {more}")
    close(sample(model), plain.madformer_sample(model, LABELS, noise_of(LABELS)), 1e-4)


def test_what_is_clean_runs_once():
    """Text and clean blocks run once whatever the number of steps; NFE is counted as it is."""
    model = model_of()
    c = model.config
    layers = [spied(layer) for layer in model.layers]
    sample(model, steps=5)
    towers = [name for layer in layers for (rows, _, _), _ in layer for name in rows]
    assert towers.count("text") == c.depth
    assert towers.count("clean") == c.depth * (c.ar_length - 1)
    assert towers.count("noise") == c.ar_length * c.evaluations(5)


def test_an_image_does_not_depend_on_its_batch():
    """Noise, caches or padding that is shared between images shows."""
    model = model_of()
    together = sample(model)
    for k in range(3):
        close(sample(model, LABELS[k:k + 1]), together[k:k + 1], 1e-4)


def test_blocks_are_drawn_in_order():
    """Other noise for the last block changes the last block alone; another prompt changes all."""
    model = model_of()
    *draws, last = torch.randn(5, 1, 3, 4, 4)
    before = model.sample(LABELS[:1], replay(*draws))
    after = model.sample(LABELS[:1], replay(*draws[:3], last))
    [differs] = model.cut(before != after)
    assert differs.flatten(1).any(1).tolist() == [False, False, False, True]
    assert (before != model.sample(LABELS[:1], replay(*draws), prompt=["a cow"])).all()


def test_previews_show_the_blocks_so_far_and_grey():
    """The last one is the image. The facts are of each image."""
    model = model_of()
    vae = common.KLVAE(SMALL.vae).eval()
    previews = []
    images, facts = madformer.generate(model, vae, LABELS, noise_of(LABELS),
                                       on_step=previews.append)
    assert len(previews) == 12
    assert torch.equal(previews[-1], images)
    [image, *_] = model.cut(previews[2])  # after the first of four blocks
    assert image.flatten(1).any(1).tolist() == [True, False, False, False]
    assert facts["nfe_per_block"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("options,words", [
    ({"nfe": 2}, "one step takes 3"),
    ({"steps": 1000, "sampler": "dpm"}, "steps is 1 to 999")])
def test_options_that_do_not_fit_are_refused(options, words):
    """In one line that names the option."""
    vae = common.KLVAE(SMALL.vae)
    with pytest.raises(UserError, match=words):
        madformer.generate(model_of(), vae, LABELS, noise_of(LABELS), **options)


def test_labels_stand_for_prompts_or_classes():
    """A model without text has one label, and no prompt."""
    without = common.override(SMALL, ["text=false"])
    assert madformer.conditions(SMALL, steps=3) == ["ox", "a horse", "Sheep"]
    assert madformer.conditions(without) == [""]
    with pytest.raises(UserError, match="no text tower"):
        madformer.conditions(without, prompt=["x"])


@torch.no_grad()
def test_what_stays_in_float32_under_autocast():
    """As released: rows, queries and keys in their norms, times, which bfloat16 cannot count."""
    model = model_of("depth=2 diffusion_depth=1")
    dtypes = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.RMSNorm, madformer.TimeEmbedding)):
            module.register_forward_hook(
                lambda module, args, output: dtypes.update([args[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        losses(model)
        sample(model, steps=1)
    assert dtypes == {torch.float32, torch.int64}  # steps are integers


@pytest.mark.parametrize("changes,writes", [("", 4), ("mlp_denoising=true text=false", 0)])
def test_compiled_sampling_is_eager_sampling(traced, changes, writes):
    """A graph for block 0 and one for all others, whose history grows, in two jobs.

    They change keys and values by index_copy_ on whole tensors alone: else each step copies the
    cache.
    """
    model = model_of(changes)
    eager = sample(model)
    madformer.compile_steps(model, None)
    sample(model, LABELS.flip(0))
    close(sample(model), eager, 1e-4)
    assert len(traced) == 2 and model.key_value_pairs.cache_info().misses == 1
    for graph in traced:
        calls = [node for node in graph.graph.nodes if node.op.startswith("call")]
        changing = [node for node in calls if re.search("setitem|[a-z]_$", str(node.target))]
        assert [node.target for node in changing] == ["index_copy_"] * writes
        assert all(node.args[0].op == "placeholder" for node in changing)


@torch.no_grad()
def test_training_on_cuda_compiles_each_layer(monkeypatch, traced):
    """FlexAttention and its mask, traced on the CPU: one graph for all layers, the same loss."""
    model = model_of()
    eager = losses(model)["loss"]
    masked = madformer.masked_attention
    monkeypatch.setattr(madformer, "masked_attention",
                        lambda layout, text, isolated, flex: masked(layout, text, isolated, True))
    train.compile_blocks(model)
    for _ in range(2):
        close(losses(model)["loss"], eager)
    assert len(traced) == 1


# --- Costs and recipes ----------------------------------------------------------------------------

@pytest.mark.parametrize("depth,budgets", [
    (7, {84: 9, 2800: 397}), (14, {84: 5, 2800: 199}), (21, {84: 3, 1400: 66}), (28, {84: 3})])
def test_the_papers_budgets_are_met(depth, budgets):
    """Fig. 4: all but those of depth 21 are reached exactly, and none is exceeded."""
    config = dataclasses.replace(madformer.PRESETS["ffhq"], diffusion_depth=depth)
    for nfe, steps in budgets.items():
        assert config.steps_within(nfe) == steps
        reached = config.evaluations(steps)
        assert reached == nfe or reached < nfe and depth == 21


def test_published_sizes_have_the_published_parameters():
    """The reference counts: each part, and the two models of 1.3B and 2.1B."""
    with torch.device("meta"):
        ffhq, imagenet = (MADFormer(madformer.PRESETS[name]) for name in ("ffhq", "imagenet"))
    parts = [ffhq.layers[0].towers["noise"], ffhq.down, ffhq.up, ffhq, imagenet]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        19_471_232, 64_820_480, 144_739_460, 1_300_243_844, 2_140_718_980]


@pytest.mark.parametrize("size,images,batch,steps,sampling_steps", [
    ("ffhq", 70_000, 64, 210_000, 250), ("imagenet", 1_281_167, 256, 250_000, 100)])
def test_published_recipes_and_samplers(size, images, batch, steps, sampling_steps):
    """Sec. 3.3, and the released schedule: up over 1 %, and from 85 % on halved six times."""
    config = madformer.PRESETS[size]
    assert (config.sampler, config.steps) == ("ddim", sampling_steps)
    recipe = madformer.RECIPES[size]
    assert (recipe.lr, recipe.weight_decay, recipe.clip, recipe.batch) == (3e-4, 0.05, 1.0, batch)
    assert round(recipe.epochs * images / batch) == steps
    for percent, factor in {0.5: 0.5, 1: 1, 85: 1, 90: 1 / 4}.items():
        assert recipe.rate(100 * percent, 10_000) == pytest.approx(factor * recipe.lr)


# --- Text -----------------------------------------------------------------------------------------

def test_texts_are_bytes_between_marks():
    """In lower case and stripped, padded at the end."""
    bos, eos, boi, _ = range(256, 260)
    assert madformer.tokenize([" Bag", "☃", ""]).tolist() == [
        [bos, *b"bag", boi],
        [bos, *"☃".encode(), boi],
        [bos, boi, eos, eos, eos]]


def test_the_text_loss_is_that_of_the_next_tokens():
    """By hand: each token from those before it, text by text, without padding; and EOS from EOI."""
    model = model_of()
    head = spied(model.head)
    loss = losses(model, 3)["text"]
    terms = []
    [(_, output)] = head
    for logits, text in zip(output, SMALL.class_names):
        [tokens] = madformer.tokenize([text])
        targets = torch.tensor([*tokens[1:], EOS])
        logits = torch.cat([logits[:len(tokens) - 1], logits[-1:]])
        terms.append(F.cross_entropy(logits, targets, reduction="none"))
    close(loss, torch.cat(terms).mean())


# --- Training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", ABLATIONS)
def test_ddp_is_told_about_parameters_without_gradient(changes):
    """Under DDP, one of which it does not know is an error."""
    model = model_of(changes)
    losses(model)["loss"].backward()
    assert model.idle_parameters or all(p.grad is not None for p in model.parameters())


def test_the_loss_is_the_weighted_sum():
    """Eq. 6: two weights that change places, or a term that is left out, change the sum."""
    model = model_of("text_weight=1.5 image_weight=5 hidden_weight=0.3 clean_weight=0.7")
    out = losses(model)
    expected = 1.5 * out["text"] + 5 * out["image"] + 0.3 * out["hidden"] + 0.7 * out["clean"]
    close(out["loss"], expected, 1e-6)


def test_the_loss_draws_what_the_paper_says():
    """Steps uniform over 0 .. 999, one for each image and block, and standard normal noise."""
    model = model_of()
    model.noised = Spy(model.noised)
    losses(model, 300)
    [((_, eps, t), _)] = model.noised
    assert t.shape == (300, 4)
    assert (t[:, 0] != t[:, 1]).any()
    assert 0 <= t.min() <= t.max() < 1000
    assert torch.histc(t.float(), 4, 0, 1000).min() > 240
    assert abs(eps.std() - 1) < 0.01


@pytest.mark.parametrize("clean_time", ["zero", "noisy"])
def test_the_time_of_clean_blocks(clean_time):
    """Zero, or the step of the noisy block: in the downsampler, and in the clean tower's output."""
    model = model_of(f"clean_time={clean_time} clean_weight=0.1")
    down = spied(model.down.time)
    up = spied(model.up.time)
    noisy = torch.tensor([5, 300, 7, 999])
    clean = noisy if clean_time == "noisy" else torch.zeros(4)
    losses(model, 1, t=noisy[None])
    close(torch.stack([t for (t,), _ in down]), torch.stack([clean, noisy]))
    close(torch.stack([t for (t,), _ in up]), torch.stack([noisy, noisy, clean]))


@pytest.mark.parametrize("changes,words", [
    ("ar_length=3", "square"), ("ar_length=64", "multiple of 32"), ("diffusion_depth=0", "1 to 3"),
    ("dim=100", "multiple of head"), ("steps=1001", "to 1000"), ("target=velocity", "clean, noise"),
    ("clean_blocks=false clean_weight=1", "clean-tower"), ("unet.blocks=1", "each level"),
    ("unet.channels=8,14", "4 groups"), ("unet.heads=3", "3 heads")])
def test_impossible_configurations_are_refused(changes, words):
    """In one line that says what must hold."""
    with pytest.raises(UserError, match=words):
        common.override(SMALL, changes.split())


# --- Released files -------------------------------------------------------------------------------

def load(folder, **content):
    """Return the model in a file with this content and the released arguments."""
    c = Fixture("madformer").config
    args = argparse.Namespace(diff_depth=c["diff_depth"], ar_len=c["ar_len"], clear_cond=True)
    torch.save({"args": args, **content}, folder / "a.pt")
    return madformer.load_official(folder / "a.pt")


@pytest.mark.parametrize("key", ["ema", "model"])
def test_released_files_load_with_their_ema_weights(tmp_path, key):
    """test_parity has their numbers. Without EMA the plain weights are taken."""
    f = Fixture("madformer")
    other = {name: value + 1 for name, value in f.state.items()}
    model = load(tmp_path, **{"model": other, key: f.state})
    assert torch.equal(model.boi, f.state["boi_block"])
    c = model.config
    assert (c.ar_length, c.diffusion_depth) == (f.config["ar_len"], f.config["diff_depth"])
    assert (c.clean_blocks, c.condition, c.mlp_denoising) == (True, False, False)


@pytest.mark.parametrize("entry,words", [
    ("blocks.1.mlp_list.1.gate_proj.weight", "layers.1.towers.noise.gate.weight.*more"),
    ("boi_block", "not a MADFormer checkpoint")])
def test_files_that_do_not_fit_are_named(tmp_path, entry, words):
    """By the entry that is missing and the one that is unknown."""
    state = Fixture("madformer").state
    state["more"] = state.pop(entry)
    with pytest.raises(UserError, match=words):
        load(tmp_path, ema=state)
