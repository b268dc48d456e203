#!/usr/bin/env bash
# Claim   Fig. 4: with few evaluations of layers, more AR layers are better; with many, more
#         diffusion layers. Table 1: with equal steps, more diffusion layers are better.
# Here    2, 4, 6 and 8 diffusion layers of 8 (tiny has 6), three budgets of evaluations per block
#         with both samplers, then 25 steps for all. Some 70 minutes with one thread.
. "$(dirname "$0")/shared.sh"
names=()
for d in 2 4 6 8; do
    fit 750 --model madformer --stage madformer --vae "$weights/madformer/vae/model.pt" \
        --out "$out/d_$d" --set depth=8 diffusion_depth=$d
    run=(--model madformer --run "$out/d_$d")
    for nfe in 24 56 200; do
        for sampler in ddim dpm; do
            judge d_${d}_nfe_${nfe}_$sampler "${run[@]}" --nfe $nfe --sampler $sampler
            names+=(d_${d}_nfe_${nfe}_$sampler)
        done
    done
    judge d_${d}_steps_25 "${run[@]}" --steps 25
    names+=(d_${d}_steps_25)
done
table "steps nfe_per_block" "${names[@]}"
