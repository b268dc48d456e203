#!/usr/bin/env bash
# Claim   Table 2: the best AR length grows with resolution (ImageNet 256: 1 block, FFHQ 1024: 16).
# Here    1, 4 and 16 blocks at 32 and at 64 pixels. At 64 the VAE is trained here, and pictures
#         of 28 pixels are enlarged: they have no more detail. Some 200 minutes with one thread.
. "$(dirname "$0")/shared.sh"
names=()
fit 3000 --model madformer --stage vae --image-size 64 --out "$out/at_64"
for size in 32 64; do
    vae=$weights/madformer/vae/model.pt
    [ $size = 64 ] && vae=$out/at_64/vae/model.pt
    for length in 1 4 16; do
        name=at_${size}_length_$length
        fit 750 --model madformer --stage madformer --vae "$vae" --image-size $size \
            --out "$out/$name" --set ar_length=$length
        judge $name --model madformer --run "$out/$name"
        names+=($name)
    done
done
table "" "${names[@]}"
