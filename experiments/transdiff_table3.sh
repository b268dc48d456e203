#!/usr/bin/env bash
# Claim   Table 3: MRAR is better than 1-step AR at every size (L: FID 1.49 and 1.69), both with
#         guidance.
# Here    A guidance sweep for both. Without 1-step weights, only for MRAR. 35 minutes for each.
. "$(dirname "$0")/shared.sh"
names=()
for stage in 1step mrar; do
    [ -e "$weights/transdiff/$stage/model.pt" ] || continue
    for cfg in 1 1.5 2 3 4; do
        judge ${stage}_cfg_$cfg --model transdiff --run "$weights/transdiff/$stage" --cfg $cfg \
            --steps 25
        names+=(${stage}_cfg_$cfg)
    done
done
table feature_similarity "${names[@]}"
