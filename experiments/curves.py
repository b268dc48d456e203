"""Draw the loss curves of a run: a panel for each stage.

    python experiments/curves.py runs/dar curves.png
"""
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 360, 240, 44  # of a panel, pixels
ORDER = ["vae", "tokenizer", "1step"]  # stages that others build on


def panel(folder):
    """Return a picture of the training loss of one stage, over its steps."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    points = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    last = points[-1][0]
    low = min(loss for _, loss in points)
    high = sorted(loss for _, loss in points)[-max(1, len(points) // 20)]  # the start is off scale
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    right, bottom = WIDTH - 14, HEIGHT - 28
    draw.rectangle([MARGIN, 24, right, bottom], outline="grey")
    path = []
    for step, loss in points:
        share = min(1, (loss - low) / max(high - low, 1e-9))
        path.append((MARGIN + step / last * (right - MARGIN), bottom - share * (bottom - 24)))
    draw.line(path, "navy", 2)
    draw.text((MARGIN, 6), f"{folder.name}: loss {points[-1][1]:.3g} at the end", "black", font)
    draw.text((4, 20), f"{high:.3g}", "black", font)
    draw.text((4, bottom - 8), f"{low:.3g}", "black", font)
    draw.text((MARGIN, bottom + 6), "0", "black", font)
    draw.text((right, bottom + 6), f"{last:,} steps", "black", font, anchor="ra")
    return picture


def main():
    """Write the panels side by side, in the order in which the stages were trained."""
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/curves.py RUN PICTURE.png")
    logs = [path for path in Path(sys.argv[1]).glob("*/log.jsonl") if '"loss"' in path.read_text()]
    logs.sort(key=lambda path: [*ORDER, path.parent.name].index(path.parent.name))
    if not logs:
        sys.exit(f"error: no stage in {sys.argv[1]} has a log.jsonl with a loss")
    panels = [panel(path.parent) for path in logs]
    sheet = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    for k, picture in enumerate(panels):
        sheet.paste(picture, (k * WIDTH, 0))
    sheet.save(sys.argv[2])
    print(f"wrote {sys.argv[2]}")


if __name__ == "__main__":
    main()
