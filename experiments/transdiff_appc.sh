#!/usr/bin/env bash
# Claim   App. C: drift scale s1 and noise scale s2 of Eq. 18 below 1 trade stability and sharpness
#         against diversity. (The released L: s1 = 0.89, s2 = 0.95, 100 steps.)
# Here    Eq. 18 beside the ODE by the number of steps, then s1 and s2 with 25 steps, where
#         1 and 1 is maruyama_25. Some 35 minutes with one thread.
. "$(dirname "$0")/shared.sh"
run=(--model transdiff --run "$weights/transdiff")
names=()
for steps in 5 10 25; do
    for solver in euler maruyama; do
        judge ${solver}_$steps "${run[@]}" --solver $solver --steps $steps
        names+=(${solver}_$steps)
    done
done
for scales in 1.0:0.9 0.9:1.0 0.9:0.9; do
    name=s1_${scales/:/_s2_}
    judge $name "${run[@]}" --solver maruyama --steps 25 \
        --drift-scale ${scales%:*} --noise-scale ${scales#*:}
    names+=($name)
done
table "" "${names[@]}"
