#!/usr/bin/env bash
# Claim   Fig. 1: with more semantic features, images have more detail (32 to 256 of 256).
# Here    4 to 64 of 64 features, evenly spread, of the MRAR model; 35 minutes with one thread.
. "$(dirname "$0")/shared.sh"
for k in 4 8 16 32 64; do
    run=(--model transdiff --run "$weights/transdiff" --features $k)
    judge features_$k "${run[@]}"
    python sample.py "${run[@]}" --n 20 --out "$out/features_$k.png" >&2
done
table "" features_{4,8,16,32,64}
