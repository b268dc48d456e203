"""Draw who attends to whom: the three attention patterns, as the models pass them to attention.

    python experiments/masks.py docs/masks.png

A row is a query, a column a key; dark means that the query sees the key.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import dar
import madformer
import transdiff

SIDE = 300  # of a panel, pixels


@torch.no_grad()
def pattern(n, function, *inputs):
    """Return (n, n) bool: what the first n queries see that function(*inputs) passes to attention.
    A sequence may come in several calls, whose keys go up to the end of their own queries."""
    seen = torch.zeros(0, n, dtype=torch.bool)
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **others):
        nonlocal seen
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if attn_mask is not None:
            mask = attn_mask.expand(len(q), 1, *mask.shape)[0, 0]
        seen = torch.cat([seen, F.pad(mask, (0, n - mask.shape[1]))])
        return attention(q, k, v, attn_mask, **others)

    F.scaled_dot_product_attention = spy
    try:
        function(*inputs)
    finally:
        F.scaled_dot_product_attention = attention
    return seen[:n]


def patterns():
    """Yield a title and the pattern of each model's `tiny`."""
    torch.manual_seed(0)
    c = replace(transdiff.PRESETS["tiny"], mrar=True)
    model = transdiff.TransDiff(c)
    images = [torch.randn(1, c.vae.channels, c.latent_size, c.latent_size)] * (c.images - 1)
    n = c.class_tokens + c.features
    yield ("TransDiff, MRAR: class, mask, three images",
           pattern(n, model.semantic, torch.tensor([0]), images))
    c = dar.PRESETS["tiny"].tokenizer
    n = c.queries + (c.image_size // c.patch) ** 2
    yield ("D-AR, encoder: patches, then queries",
           pattern(n, dar.Tokenizer(c).features, torch.rand(1, 3, c.image_size, c.image_size)))
    c = replace(madformer.PRESETS["tiny"], class_names=("ankle boot",))
    model = madformer.MADFormer(c)
    n = model.names.shape[1] + 1 + 2 * c.ar_length * c.tokens
    yield ("MADFormer, training: text, clean, noisy blocks",
           pattern(n, model, torch.randn(1, c.vae.channels, c.latent_size, c.latent_size),
                   torch.tensor([0])))


def main():
    """Write the three patterns side by side."""
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/masks.py PICTURE.png")
    sheet = Image.new("RGB", (3 * (SIDE + 10), SIDE + 24), "white")
    for k, (title, seen) in enumerate(patterns()):
        panel = Image.fromarray((235 - 190 * seen.byte()).numpy()).resize((SIDE, SIDE), 0)
        sheet.paste(panel, (k * (SIDE + 10), 24))
        ImageDraw.Draw(sheet).text((k * (SIDE + 10), 6), title, "black",
                                   ImageFont.load_default(11))
    common.save_picture(sys.argv[1], sheet)


if __name__ == "__main__":
    common.run_script(main)
