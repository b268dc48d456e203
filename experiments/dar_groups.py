"""D-AR's claim: each group of tokens adds what the groups before it left out.

    python experiments/dar_groups.py runs/dar/tokenizer/model.pt fashion-mnist

Prints a Markdown table with a row for each group k, in dB PSNR, means over 200 test images:

preview       after the first k groups, as a sampler shows it: should rise from row to row
true x_t      one jump to the image from the true x_t at which group k begins. It contains more and
              more of the image, so this rises even if the tokens say nothing new
wrong own     the same, with the tokens of group k taken from another image
wrong before  the same, with all tokens before group k taken from another image: as high as
              "true x_t" if group k ignores what the earlier groups know
"""
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import dar


def psnr(images, truth):
    """Return the mean PSNR in dB of images (B, 3, h, w) in -1 .. 1."""
    errors = (images.clamp(-1, 1) - truth).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / errors).mean().item()


@torch.no_grad()
def measure(tokenizer, images):
    """Yield the four numbers of each group for images (B, 3, h, w)."""
    c = tokenizer.config
    noise = common.Noise(0, range(len(images))).normal(images.shape[1:])
    codes = tokenizer.encode(images).long()
    previews = []
    start = common.Noise(0, range(len(images)))                 # the same noise
    tokenizer.decode([codes], start, previews.append, steps=c.groups)
    z = tokenizer.quantizer.codewords()[codes]                  # (B, N, code_dim)
    other = z.roll(1, 0)
    for k, preview in enumerate(previews):
        t = dar.shift(torch.tensor([k / c.groups]), c.beta)
        x_t = t * c.data_std * images + (1 - t) * noise         # Eq. 3
        own = torch.arange(c.queries) // c.group_size == k
        before = torch.arange(c.queries) // c.group_size < k
        row = [psnr(preview, images)]
        for wrong in (own & False, own, before):
            group = tokenizer.condition(torch.where(wrong[:, None], other, z))[:, own]
            v, _ = tokenizer.pixels(x_t, t, group)
            row.append(psnr((x_t + (1 - t) * v) / c.data_std, images))
        yield row


def main():
    """Print the table for a tokenizer and a data set."""
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python experiments/dar_groups.py TOKENIZER.pt DATA [DATA_ROOT]")
    tokenizer = dar.load_tokenizer(sys.argv[1])
    size = tokenizer.config.image_size
    data = common.load_data(sys.argv[2], sys.argv[3] if sys.argv[3:] else "data", size, "test")
    pictures = [common.from_pil(common.centre_crop(data.read(i), size)) for i in range(200)]
    images = common.to_float(torch.stack(pictures))
    print("| group | preview | true x_t | wrong own | wrong before |\n|---|---|---|---|---|")
    for k, row in enumerate(measure(tokenizer, images), 1):
        print(f"| {k} |" + "".join(f" {value:.1f} |" for value in row))


if __name__ == "__main__":
    common.run_script(main)
