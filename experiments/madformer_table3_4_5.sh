#!/usr/bin/env bash
# Claim   FID on ImageNet. Table 3: clean blocks and condition 30.0, clean blocks alone 31.9,
#         condition alone 31.2. Table 4: one set of parameters 30.4. Table 5: MLP denoising 96.5.
# Here    The same five, trained equally long. Some 40 minutes with one thread.
. "$(dirname "$0")/shared.sh"
variants=(full: clean_blocks_only:condition=false condition_only:clean_blocks=false
          one_set:shared=true mlp_denoising:mlp_denoising=true)
names=()
for variant in "${variants[@]}"; do
    name=${variant%%:*} setting=${variant#*:}
    fit 750 --model madformer --stage madformer --vae "$weights/madformer/vae/model.pt" \
        --out "$out/$name" ${setting:+--set $setting}
    judge $name --model madformer --run "$out/$name"
    names+=($name)
done
table "" "${names[@]}"
