#!/usr/bin/env bash
# Claim   Table 2: rFID by steps and solver, 4: 2.35, 8: 1.58, 8 with Adams: 1.52, 12: 1.73,
#         16: 1.93. One step for each group is best.
# Here    The same, reconstructing test images. Some 10 minutes on two cores.
. "$(dirname "$0")/shared.sh"
run=(--model dar --tokenizer "$weights/dar/tokenizer/model.pt" --reconstruct "$data")
for steps in 4 8 12 16; do
    judge euler_$steps "${run[@]}" --solver euler --steps $steps
done
judge adams_8 "${run[@]}" --solver adams --steps 8
table psnr_after_each_step euler_4 euler_8 adams_8 euler_12 euler_16
