#!/usr/bin/env bash
# Claim   App. C: drift scale s1 and noise scale s2 of Eq. 18 below 1 trade stability and sharpness
#         against diversity. (The released L: s1 = 0.89, s2 = 0.95, 100 steps.)
# Here    s1 x s2, and Eq. 18 beside the ODE by the number of steps; some 40 minutes on two cores.
. "$(dirname "$0")/shared.sh"
run=(--model transdiff --run "$weights/transdiff")
names=()
for s1 in 0.9 1.0; do
    for s2 in 0.8 0.9 1.0; do
        judge s1_${s1}_s2_$s2 "${run[@]}" --drift-scale $s1 --noise-scale $s2
        names+=(s1_${s1}_s2_$s2)
    done
done
for steps in 10 25 50; do
    for solver in euler maruyama; do
        judge ${solver}_$steps "${run[@]}" --solver $solver --steps $steps
        names+=(${solver}_$steps)
    done
done
table "" "${names[@]}"
