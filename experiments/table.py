"""Print a Markdown table of sets that fid.py has judged.

    python experiments/table.py FOLDER "psnr_after_each_step steps" first second

A row for each of FOLDER/first.fid.json, FOLDER/second.fid.json. After the columns of every table
come the facts named in quotes, of which a list shows its last value.
"""
import json
import sys
from pathlib import Path

folder, facts, names = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
columns = ["fd_classifier", "floor", "accuracy", "precision", "recall", *facts]
print("|", " | ".join(["", *columns]), "|")
print("|---" * (1 + len(columns)) + "|")
for name in names:
    numbers = json.loads((folder / f"{name}.fid.json").read_text())
    cells = [name]
    for column in columns:
        value = numbers.get(column, "")
        value = value[-1] if isinstance(value, list) else value
        cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
    print("|", " | ".join(cells), "|")
