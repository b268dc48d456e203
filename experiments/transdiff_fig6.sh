#!/usr/bin/env bash
# Claim   Fig. 6: of 0, 4, 16 and 64 references, 4 give the lowest FID.
# Here    The same numbers of images per sample, from one 1-step model and for as many images in
#         training. 64 images have one feature each. Some 120 minutes on two cores.
. "$(dirname "$0")/shared.sh"
more=(--model transdiff --vae "$weights/transdiff/vae/model.pt")
fit 1875 "${more[@]}" --stage 1step --out "$out/start"
start=(--init "$out/start/1step/model.pt")
fit 1125 "${more[@]}" --stage 1step --lr 1e-3 "${start[@]}" --out "$out/images_0"
for images in 4 16; do
    fit 1125 "${more[@]}" --stage mrar "${start[@]}" --out "$out/images_$images" \
        --set images=$images --batch-size $((32 / images))
done
fit 562 "${more[@]}" --stage mrar "${start[@]}" --out "$out/images_64" \
    --set images=64 --batch-size 1
for images in 0 4 16 64; do
    judge images_$images --model transdiff --run "$out/images_$images"
done
table feature_similarity images_{0,4,16,64}
