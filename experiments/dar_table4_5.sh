#!/usr/bin/env bash
# Claim   Table 4: a guidance scale that rises from the first to the last token is better than a
#         constant one. Table 5: FID by tokens of 256: 7.38 (64), 3.94 (128), 2.93 (192), 2.44.
# Here    Guidance off, constant and rising; then previews from 16 to 48 of 64 tokens; a step for
#         each group. Some 10 minutes with one thread.
. "$(dirname "$0")/shared.sh"
run=(--model dar --run "$weights/dar" --steps 8)
names=()
for cfg in 1 1.5 2 4 1:4 1:8; do
    judge cfg_${cfg/:/_to_} "${run[@]}" --cfg $cfg
    names+=(cfg_${cfg/:/_to_})
done
for tokens in 16 32 48 64; do
    judge tokens_$tokens "${run[@]}" --tokens $tokens
    names+=(tokens_$tokens)
done
table "" "${names[@]}"
