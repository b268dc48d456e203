"""MADFormer beyond parity: attention, samplers in closed form, fast = plain, text, costs, files."""
import argparse
import dataclasses
import itertools
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import madformer
import plain
from common import Noise, UserError
from madformer import CLEAN, EOI, EOS, NOISE, TEXT, Config, MADFormer, UNetConfig

SMALL = Config(
    image_size=16, classes=3, class_names=("ox", "a horse", "Sheep"), text=True, dim=128, mlp=96,
    depth=3, diffusion_depth=2, ar_length=4, target="clean", steps=3,
    unet=UNetConfig((8, 16), (1, 1), (0, 1), groups=4, heads=2, time_dim=16),
    vae=common.VAEConfig(channels=3, width=8, mult=(1, 2), blocks=1, attention=(), groups=4))
ABLATIONS = [
    "", "text=0", "clean_blocks=0", "condition=0", "shared=1", "mlp_denoising=1", "ar_length=1",
    "ar_length=1 text=0", "diffusion_depth=3", "diffusion_depth=3 condition=0 text=0",
    "mlp_denoising=1 text=0", "mlp_denoising=1 clean_blocks=0", "mlp_denoising=1 clean_weight=0.1",
    "clean_weight=0.1", "clean_blocks=0 condition=0 text=0",
    "clean_blocks=0 condition=0 text=0 shared=1"]
LABELS = torch.tensor([0, 1, 2])


def model_of(changes=""):
    torch.manual_seed(0)
    return MADFormer(common.override(SMALL, changes.split())).eval()


def latents_of(model, n):
    c = model.config
    shape = (n, c.vae.channels, c.latent_size, c.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def noise(n=3):
    return Noise(5, range(n))


def assert_same(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


def test_blocks_are_squares_in_raster_order():
    model = model_of("ar_length=16")
    latents = latents_of(model, 2)                # 8 x 8
    blocks = model.cut(latents)
    assert torch.equal(blocks[:, 6], latents[:, :, 2:4, 4:6])
    assert torch.equal(model.join(blocks), latents)


# --- Attention ------------------------------------------------------------------------------------

def statement(query, key, clean_blocks, isolated):
    """The reference page's table, in words. A row is (kind, place); none of them is padding."""
    (kind_q, q), (kind_k, k) = query, key
    if kind_q == TEXT and kind_k == TEXT:
        return k <= q  # text is causal
    if isolated:
        return query == key  # while denoising, a block attends to itself
    if kind_k == (CLEAN if clean_blocks else NOISE) and k < q or kind_k == TEXT:
        return k < q  # earlier blocks; for text before the image there are none
    return query == key


def layout_of(text, clean_blocks):
    model = model_of(f"text={text} clean_blocks={clean_blocks}")
    tokens = F.pad(model.names, (0, 1), value=EOI) if text else LABELS[None, :0]
    kinds = [CLEAN, NOISE] if clean_blocks else [NOISE]
    parts = [model.text_layout(tokens), *(model.image_layout(kind) for kind in kinds)]
    return torch.cat(parts, 1), tokens


VARIANTS = list(itertools.product((0, 1), repeat=3))


@pytest.mark.parametrize("text,clean_blocks,isolated", VARIANTS)
def test_the_mask_is_the_statement(text, clean_blocks, isolated):
    """Row by row against the statement, with padded texts of different lengths."""
    layout, tokens = layout_of(text, clean_blocks)
    mask = madformer.dense_mask(layout, tokens, isolated)[:, 0]
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
    monkeypatch.setattr(madformer, "compiled_flex_attention", lambda: madformer.flex_attention)
    layout, tokens = layout_of(text, clean_blocks)
    q, k, v = torch.randn(3, 3, 2, layout.shape[1], 64)
    dense, flex = (madformer.masked_attention(layout, tokens, isolated, flex)(q, k, v)
                   for flex in (False, True))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


# --- Samplers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler,target", [
    ("ddim", "clean"), ("ddim", "noise"), ("dpm", "clean"), ("dpm", "noise")])
def test_a_known_image_is_reached_in_any_number_of_steps(sampler, target):
    """A network that knows x_0: a wrong sign, level or last step misses it."""
    x_0, start = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 7, 50, madformer.MAX_STEPS[sampler]):
        _, alpha, sigma = madformer.schedule(sampler, steps)

        def network(x, i):
            return x_0 if target == "clean" else (x - alpha[i] * x_0) / sigma[i]
        *_, result = madformer.solve(network, start, sampler, steps, target)
        torch.testing.assert_close(result, x_0, rtol=0, atol=2e-4)


@pytest.mark.parametrize("sampler,factor", [("ddim", 0.65), ("dpm", 0.4)])
def test_the_order_of_each_sampler(sampler, factor):
    """Of Gaussian data the flow keeps the standard scores. Twice the steps: 1/2, 1/4 the error."""
    mean, std, errors = 0.7, 0.4, []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for steps in (40, 80):
        _, alpha, sigma = madformer.schedule(sampler, steps)
        deviation = [math.sqrt(a**2 * std**2 + s**2) for a, s in zip(alpha, sigma)]

        def network(x, i):  # the posterior mean of x_0
            return mean + std**2 * alpha[i] / deviation[i] ** 2 * (x - alpha[i] * mean)

        *_, result = madformer.solve(network, x, sampler, steps, "clean")
        exact = mean + std * (x - alpha[0] * mean) / deviation[0]
        errors.append((result - exact).abs().max())
    assert errors[1] < min(0.05, factor * errors[0]), errors


def test_steps_of_dpm_are_numpys():
    """torch.linspace rounds some of them to the other side: of 30, index 15 is 499."""
    assert madformer.schedule("dpm", 30)[0][-15] == 499
    for n in range(1, 1000):
        assert madformer.schedule("dpm", n)[0] == np.linspace(0, 999, n + 1).round()[:0:-1].tolist()


# --- Sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", ABLATIONS)
@pytest.mark.parametrize("more", ["sampler=ddim clean_time=zero", "sampler=dpm"])
def test_cached_sampling_is_plain_sampling(changes, more):
    """Caches, padding and both samplers, under every switch."""
    model = model_of(f"{changes} {more}")
    fast = model.sample(LABELS, noise())
    assert_same(fast, plain.madformer_sample(model, LABELS, noise()))


def test_what_is_clean_runs_once():
    """Text and clean blocks run once whatever the number of steps; NFE is counted as it is."""
    for steps in (2, 5):
        model, ran = model_of(), []
        for i, layer in enumerate(model.layers):
            layer.register_forward_hook(lambda m, args, out, i=i: ran.append((i, *args[0])))
        model.sample(LABELS, noise(), steps=steps)
        c = model.config
        for i in range(c.depth):
            assert ran.count((i, "text")) == 1
            assert ran.count((i, "clean")) == c.ar_length - 1
        noisy = sum(name == "noise" for _, name in ran)
        assert noisy == c.ar_length * c.evaluations(steps)


def test_an_image_does_not_depend_on_its_batch():
    model = model_of()
    together = model.sample(LABELS, noise())
    for k in range(3):
        assert_same(model.sample(LABELS[k:k + 1], Noise(5, [k])), together[k:k + 1])


def test_blocks_are_drawn_in_order():
    """Other noise for the last block changes the last block alone; another prompt changes all."""
    model = model_of()
    draws = torch.randn(5, 1, 3, 4, 4)

    def sample(order, **options):
        stream = types.SimpleNamespace(normal=lambda shape: draws[order.pop(0)])
        return model.cut(model.sample(LABELS[:1], stream, **options))[0]

    first = sample([0, 1, 2, 3])
    assert (first != sample([0, 1, 2, 4])).flatten(1).any(1).tolist() == [False] * 3 + [True]
    assert (first != sample([0, 1, 2, 3], prompt=["a cow"])).flatten(1).any(1).all()


def test_previews_show_the_blocks_so_far_and_grey():
    vae, seen = common.KLVAE(SMALL.vae).eval(), []
    images, facts = madformer.generate(model_of(), vae, LABELS, noise(), on_step=seen.append)
    assert len(seen) == 12 and torch.equal(seen[-1], images)
    assert facts["steps"].tolist() == [3] * 3 and facts["nfe_per_block"].tolist() == [7] * 3
    blocks = model_of().cut(seen[2])  # after the first of four
    assert (blocks[:, 1:] == 0).all() and (blocks[:, 0] != 0).any()


@pytest.mark.parametrize("options,words", [
    ({"nfe": 7, "steps": 3}, "--nfe and --steps"), ({"steps": 0}, "steps is 1 to 1000"),
    ({"steps": 1000, "sampler": "dpm"}, "steps is 1 to 999"), ({"nfe": 2}, "one step takes 3")])
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        madformer.generate(model_of(), common.KLVAE(SMALL.vae), LABELS, noise(), **options)


def test_labels_stand_for_prompts_or_classes():
    without = common.override(SMALL, ["text=0"])
    assert madformer.conditions(SMALL, steps=3) == ["ox", "a horse", "Sheep"]
    assert madformer.conditions(SMALL, prompt=["x"]) == ["x"]
    assert madformer.conditions(without) == [""]
    with pytest.raises(UserError, match="no text tower"):
        madformer.conditions(without, prompt=["x"])


@torch.no_grad()
def test_the_stream_stays_in_float32_under_autocast():
    """As released: only products are bfloat16; in training and in sampling."""
    model, kinds = model_of("depth=2 diffusion_depth=1"), set()
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: kinds.update(
            part.dtype for part in (*args[0].values(), *out.values())))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(latents_of(model, 2), LABELS[:2])
        model.sample(LABELS, noise(), steps=1)
    assert kinds == {torch.float32} == {value.dtype for value in loss.values()}


@pytest.mark.parametrize("changes,writes", [("", 4), ("mlp_denoising=1 text=0", 0)])
def test_compiled_sampling_is_eager_sampling(traced, changes, writes):
    """A graph for block 0 and one for all others, whose history grows, in two jobs. They change
    keys and values by index_copy_ on whole tensors alone: else each step copies the cache."""
    model = model_of(changes)
    eager = model.sample(LABELS, noise())
    madformer.compile_steps(model, None)
    for _ in range(2):
        assert_same(model.sample(LABELS, noise()), eager)
    assert len(traced) == 2
    for graph in traced:
        calls = [node for node in graph.graph.nodes if node.op.startswith("call")]
        changing = [node for node in calls if re.search("setitem|[a-z]_$", str(node.target))]
        assert [node.target for node in changing] == ["index_copy_"] * writes
        assert all(node.args[0].op == "placeholder" for node in changing)


@torch.no_grad()
def test_training_on_cuda_compiles_to_one_graph(monkeypatch):
    """The branch with FlexAttention, traced on the CPU: no break, the same loss."""
    model = model_of("depth=2 diffusion_depth=1 ar_length=1")
    given = dict(t=torch.tensor([[500], [7]]), eps=torch.ones(2, 1, 3, 8, 8))
    eager = model(latents_of(model, 2), LABELS[:2], **given)["loss"]
    masked = madformer.masked_attention
    monkeypatch.setattr(madformer, "masked_attention",
                        lambda layout, text, isolated, flex: masked(layout, text, isolated, True))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(latents_of(model, 2), LABELS[:2], **given)["loss"], eager, 1e-5)


# --- Costs and recipes ----------------------------------------------------------------------------

@pytest.mark.parametrize("depth,budgets", [
    (7, {280: 37, 700: 97, 1400: 197, 2800: 397, 84: 9, 140: 17, 224: 29}),
    (14, {280: 19, 700: 49, 1400: 99, 2800: 199, 84: 5, 140: 9, 224: 15}),
    (28, {280: 10, 700: 25, 1400: 50, 2800: 100, 84: 3, 140: 5, 224: 8}),
    (21, {280: 13, 700: 33, 1400: 66, 2800: 133, 84: 3})])
def test_the_papers_budgets_are_met(depth, budgets):
    """Fig. 4: all but those of depth 21 are reached exactly, and none is exceeded."""
    config = dataclasses.replace(madformer.PRESETS["ffhq"], diffusion_depth=depth)
    for nfe, steps in budgets.items():
        assert config.steps_within(nfe) == steps
        assert config.evaluations(steps) == nfe or depth == 21 and config.evaluations(steps) < nfe
    assert config.steps_within(10**6) == 999


def test_published_sizes_have_the_published_parameters():
    """The reference counts: each part, and the two models of 1.3B and 2.1B."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        ffhq, imagenet = (MADFormer(madformer.PRESETS[name]) for name in ("ffhq", "imagenet"))
    assert count(ffhq.layers[0].towers["noise"]) == 19_471_232
    assert (count(ffhq.down), count(ffhq.up)) == (64_820_480, 144_739_460)
    assert (count(ffhq), count(imagenet)) == (1_300_243_844, 2_140_718_980)


@pytest.mark.parametrize("size,images,batch,steps,sampling_steps", [
    ("ffhq", 70_000, 64, 210_000, 250), ("imagenet", 1_281_167, 256, 250_000, 100)])
def test_published_recipes_and_samplers(size, images, batch, steps, sampling_steps):
    """Sec. 3.3, and the released schedule: up over 1 %, and from 85 % on halved six times."""
    recipe, config = madformer.RECIPES[size], madformer.PRESETS[size]
    assert (config.sampler, config.steps) == ("ddim", sampling_steps)
    assert (recipe.lr, recipe.weight_decay, recipe.ema) == (3e-4, 0.05, 0.9999)
    assert (recipe.batch, recipe.betas, recipe.clip) == (batch, (0.9, 0.95), 1.0)
    assert round(recipe.epochs * images / batch) == steps
    for percent, factor in ((0, 0), (0.5, 0.5), (1, 1), (85, 1), (90, 0.25), (95, 1 / 16)):
        assert recipe.rate(100 * percent, 10_000) == pytest.approx(factor * recipe.lr)


# --- Text -----------------------------------------------------------------------------------------

def test_texts_are_bytes_between_marks():
    bos, eos, boi, _ = range(256, 260)
    expected = [[bos, *b"bag", boi], [bos, *"☃".encode(), boi], [bos, boi, eos, eos, eos]]
    assert madformer.tokenize([" Bag", "☃", ""]).tolist() == expected


def test_the_text_loss_is_that_of_the_next_tokens():
    """By hand: each token from those before it, text by text, without padding; and EOS from EOI."""
    model, seen = model_of(), []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    loss = model(latents_of(model, 3), LABELS)["text"]
    terms = []
    for row, text in zip(seen[0], SMALL.class_names):
        [tokens] = madformer.tokenize([text])
        rows = [*range(len(tokens) - 1), -1]
        targets = torch.tensor([*tokens[1:], EOS])
        terms.append(F.cross_entropy(row[rows], targets, reduction="none"))
    assert_same(loss, torch.cat(terms).mean(), 1e-5)


# --- Training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", ABLATIONS)
def test_ddp_is_told_about_parameters_without_gradient(changes):
    """Under DDP, one of which it does not know is an error."""
    model = model_of(changes)
    model(latents_of(model, 2), LABELS[:2])["loss"].backward()
    assert model.idle_parameters or all(p.grad is not None for p in model.parameters())


def test_the_loss_is_the_weighted_sum():
    """Eq. 6."""
    model = model_of("text_weight=1.5 image_weight=5 hidden_weight=0.3 clean_weight=0.7")
    out = model(latents_of(model, 2), LABELS[:2])
    expected = 1.5 * out["text"] + 5 * out["image"] + 0.3 * out["hidden"] + 0.7 * out["clean"]
    assert_same(out["loss"], expected, 1e-6)


def test_the_loss_draws_what_the_paper_says(monkeypatch):
    """Steps uniform over 0 .. 999, one for each image and block, and standard normal noise."""
    model, seen = model_of(), []
    noised = model.noised
    monkeypatch.setattr(model, "noised", lambda *args: seen.append(args) or noised(*args))
    model(latents_of(model, 300), torch.zeros(300, dtype=torch.long))
    [(_, eps, t)] = seen
    counts = torch.histc(t.float(), 4, 0, 1000)
    assert t.shape == (300, 4) and t.min() >= 0 and (counts > 240).all()
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


@pytest.mark.parametrize("clean_time", ["zero", "noisy"])
def test_the_time_of_clean_blocks(clean_time):
    """Zero, or the step of the noisy block: in the downsampler, and in the clean tower's output."""
    model, seen = model_of(f"clean_time={clean_time} clean_weight=0.1"), []
    t = torch.tensor([[5, 300, 7, 999]])
    for half in (model.down, model.up):
        half.time.register_forward_hook(lambda module, args, out: seen.append(args[0].tolist()))
    model(latents_of(model, 1), LABELS[:1], t=t)
    noisy = t[0].tolist()
    clean = noisy if clean_time == "noisy" else [0] * 4
    assert seen == [clean + noisy, noisy, noisy, clean]


@pytest.mark.parametrize("changes,words", [
    ("ar_length=3", "square"), ("ar_length=0", "square"), ("ar_length=64", "multiple of 32"),
    ("diffusion_depth=0", "1 to 3"), ("diffusion_depth=4", "1 to 3"), ("dim=100", "multiple of 64"),
    ("target=velocity", "clean, noise"), ("sampler=euler", "ddim, dpm"), ("steps=1001", "to 1000"),
    ("clean_blocks=0 clean_weight=1", "clean-tower"), ("class_names=a,b", "3 entries"),
    ("unet.channels=8,15", "groups"), ("unet.blocks=1", "each level"), ("unet.groups=0", "or more"),
    ("unet.channels=8,20 unet.heads=3", "3 heads"), ("image_size=0", "multiple of 8")])
def test_impossible_configurations_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        common.override(SMALL, changes.split())


# --- Released files -------------------------------------------------------------------------------

# Our name -> released name, written down once more from the page of the layout.
TO_RELEASED = r"""
^boi                                            -> boi_block
^(down|up)\.                                    -> \1sampler.
\.time\.first                                   -> .time_embedding.linear_1.weight
\.time\.second                                  -> .time_embedding.linear_2.weight
^(down|up)(.*)layers\.resample_(\d)\.           -> \1\2\1_blocks.\3.\1samplers.0.conv.
^(down|up)(.*)layers\.(\d)_(\d)\.attention\.    -> \1\2\1_blocks.\3.attentions.\4.
^(down|up)(.*)layers\.(\d)_(\d)\.               -> \1\2\1_blocks.\3.resnets.\4.
(resnets\.\d\.)time                             -> \1time_emb_proj
shortcut                                        -> conv_shortcut
(attentions\.\d\.)norm                          -> \1group_norm
(attentions\.\d\.)out                           -> \1to_out.0
(attentions\.\d\.)qkv\.                         -> \1to_
^layers\.(\d)\.towers\.clean                    -> blocks.\1.0
^layers\.(\d)\.towers\.noise                    -> blocks.\1.1
^(blocks\.\d)\.(\d)\.(qkv|q_norm|k_norm|proj)\. -> \1.self_attn.\3_list.\2.
^(blocks\.\d)\.(\d)\.(gate|up|down)\.           -> \1.mlp_list.\2.\3_proj.
^(blocks\.\d)\.(\d)\.norm1\.                    -> \1.input_layernorm_list.\2.
^(blocks\.\d)\.(\d)\.norm2\.                    -> \1.post_attention_layernorm_list.\2.
"""


def published(**args):
    """A small model of the published kind, its released state dict, and the file's arguments."""
    model = MADFormer(dataclasses.replace(
        Config(), image_size=64, dim=128, mlp=96, depth=3, diffusion_depth=2, ar_length=4,
        unet=UNetConfig((16, 32), (2, 2), (0, 1), time_dim=16)))
    args = argparse.Namespace(diff_depth=2, ar_len=4, **args)
    return model, common.renamed(model.state_dict(), TO_RELEASED), args


def test_released_files_load_with_their_ema_weights(tmp_path):
    model, state, args = published()
    raw = {name: value + 1 for name, value in state.items()}
    for content, more in (({"model": raw, "ema": state, "args": args}, {}),
                          ({"model": state, "args": args}, {}),
                          (state, {"ar_length": 4, "diffusion_depth": 2})):
        torch.save(content, tmp_path / "a.pt")
        loaded = madformer.load_official(tmp_path / "a.pt", **more)
        assert loaded.config == model.config
        for ours, theirs in zip(loaded.state_dict().values(), model.state_dict().values()):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("switch", ["clear_clean", "clear_cond", "denoising_mlp"])
def test_released_switches_are_read(tmp_path, switch):
    """With clean blocks off the file still has the clean tower."""
    _, state, args = published(**{switch: True})
    torch.save({"ema": state, "args": args}, tmp_path / "a.pt")
    field, value = madformer.ARGUMENTS[switch]
    assert getattr(madformer.load_official(tmp_path / "a.pt").config, field) == value


def test_files_that_do_not_fit_are_named(tmp_path):
    _, state, args = published()
    less = dict(state)
    del less["blocks.1.mlp_list.1.gate_proj.weight"]
    for content, words in ((less, "layers.1.towers.noise.gate.weight"),
                           ({**state, "more": torch.zeros(1)}, "more"),
                           ({"a": torch.zeros(1)}, "not a MADFormer checkpoint")):
        torch.save({"ema": content, "args": args}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=words):
            madformer.load_official(tmp_path / "a.pt")
