#!/usr/bin/env bash
# Claim   Table 6: time shift beta 1, 2, 4 gives rFID 39.75, 28.65, 27.10 and a fuller codebook.
# Here    The same; reconstructions of test images. Some 60 minutes on two cores.
. "$(dirname "$0")/shared.sh"
for beta in 1 2 4; do
    fit 3000 --model dar --stage tokenizer --out "$out/beta_$beta" \
        --set tokenizer.beta=$beta tokenizer.steps=8
    judge beta_$beta --model dar --tokenizer "$out/beta_$beta/tokenizer/model.pt" \
        --reconstruct "$data"
done
table psnr_after_each_step beta_{1,2,4}
for run in "$out"/beta_*/; do
    echo "$(basename "$run"): $(grep -o '"usage": [0-9.]*' "$run/tokenizer/log.jsonl" | tail -n 1)"
done
