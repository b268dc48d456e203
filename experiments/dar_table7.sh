#!/usr/bin/env bash
# Claim   Table 7: groups K = 1, 4, 8, 16 give rFID 23.18, 23.04, 28.65, 49.07 and gFID 52.91,
#         53.70, 54.26, 63.69: few groups reconstruct better, more are easier to predict.
# Here    The same, with at least 8 diffusion steps as in the paper. Some 120 minutes on two cores.
. "$(dirname "$0")/shared.sh"
names=()
for k in 1 4 8 16; do
    steps=$((k > 8 ? k : 8))
    fit 3000 --model dar --stage tokenizer --out "$out/k_$k" \
        --set tokenizer.groups=$k tokenizer.steps=$steps
    fit 1031 --model dar --stage ar --out "$out/k_$k"
    judge r_k_$k --model dar --tokenizer "$out/k_$k/tokenizer/model.pt" --reconstruct "$data"
    judge g_k_$k --model dar --run "$out/k_$k"
    names+=(r_k_$k g_k_$k)
done
table psnr_after_each_step "${names[@]}"
for run in "$out"/k_*/; do
    echo "$(basename "$run"): $(grep -o '"usage": [0-9.]*' "$run/tokenizer/log.jsonl" | tail -n 1)"
done
