#!/usr/bin/env bash
# Claim   Fig. 4a: FID and the similarity of the semantic features fall together over training.
# Here    1-step AR, judged every 250 steps; some 25 minutes on two cores.
. "$(dirname "$0")/shared.sh"
fit 2000 --model transdiff --stage 1step --vae "$weights/transdiff/vae/model.pt" --out "$out/run" \
    --fid-every $((250 / short)) --fid-samples "$n"
python - "$out/run/1step/log.jsonl" <<'TABLE'
import json, sys
print("| step | fd_classifier | feature_similarity |\n|---|---|---|")
for row in map(json.loads, open(sys.argv[1])):
    if "fd_classifier" in row:
        print(f"| {row['step']} | {row['fd_classifier']:.3g} | {row['feature_similarity']:.3f} |")
TABLE
