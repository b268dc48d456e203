"""The idea of each model in one picture: how a few samples come about.

    python experiments/strips.py transdiff docs/transdiff_rounds.png     # or --model's other names
    python experiments/strips.py dar docs/dar_previews.png runs/dar

TransDiff: the image of each round of MRAR. D-AR: the preview after each group, with the number of
tokens. MADFormer: the image after each block. Without a run, the weights that come with the code.
"""
import sys
from argparse import Namespace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import sample

CLASSES = [0, 3, 5, 7, 8, 9]  # of the rows; the seed is 0, as in sample.py


def columns(name, model_file, model, first_stage):
    """Yield a caption and images (B, 3, h, w) for each column."""
    labels = torch.tensor(CLASSES)

    def generate(**options):
        noise = common.Noise(0, range(len(CLASSES)))
        return model_file.generate(model, first_stage, labels, noise, **options)[0]

    steps = []
    if name == "transdiff":
        for k in range(1, model.config.rounds + 1):
            yield f"round {k}", generate(rounds=k)
        return
    if name == "dar":
        generate(on_step=steps.append, steps=first_stage.config.groups)
        for k, preview in enumerate(steps, 1):
            yield f"{k * first_stage.config.group_size} tokens", preview
    else:
        generate(on_step=steps.append)
        each = len(steps) // model.config.ar_length
        for k, blocks in enumerate(steps[each - 1::each], 1):
            yield f"block {k}", blocks


@torch.no_grad()
def main():
    """Write the picture: a row for each class, a column for each step."""
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python experiments/strips.py MODEL PICTURE.png [RUN]")
    name, path, *run = sys.argv[1:]
    model_file = common.load_model(name)
    args = Namespace(model=name, run=run[0] if run else f"weights/{name}", ckpt=None,
                     first_stage=None, raw=False)
    model, first_stage, _ = sample.load(args, model_file, torch.device("cpu"))
    captions, images = zip(*columns(name, model_file, model, first_stage))
    pictures = common.to_uint8(torch.stack(images, 1).flatten(0, 1))
    sheet = common.grid(pictures, len(captions))
    whole = Image.new("RGB", (sheet.width, sheet.height + 18), "white")
    whole.paste(sheet)
    draw = ImageDraw.Draw(whole)
    width = sheet.width // len(captions)
    for k, caption in enumerate(captions):
        draw.text(((k + 0.5) * width, sheet.height + 2), caption, "black",
                  ImageFont.load_default(11), anchor="ma")
    common.save_picture(path, whole)


if __name__ == "__main__":
    common.run_script(main)
