#!/usr/bin/env bash
# Claim   Fig. 5: an image decoded from features of two classes, in turns, blends the two.
# Here    Three pairs of classes: the shares of images that the classifier of real images takes for
#         A, for B and for another class. The rows of the picture: A, the blend, B. 6 minutes.
. "$(dirname "$0")/shared.sh"
run=(--model transdiff --run "$weights/transdiff" --steps 25)
pairs=(t-shirt:dress pullover:shirt "sneaker:ankle boot")
for pair in "${pairs[@]}"; do
    a=${pair%:*} b=${pair#*:}
    name=${pair//[: ]/_}
    for kind in a b both; do
        class=$a fuse=()
        [ $kind = b ] && class=$b
        [ $kind = both ] && fuse=(--fuse "$b")
        [ -e "$out/${name}_$kind.npz" ] || python sample.py "${run[@]}" --classes "$class" \
            "${fuse[@]}" --n 100 --out "$out/${name}_$kind.npz" >&2
    done
done
python experiments/blends.py "$out" "$data" "${pairs[@]}"
