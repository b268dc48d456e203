#!/usr/bin/env bash
# Claim   Sec. 3.4 and App. C: stochastic sampling (Eq. 18) with scaled drift s1 and noise s2 is
#         better than the ODE; L uses s1 = 0.89, s2 = 0.95 with 100 steps.
# Here    s1 x s2, and the two solvers by their number of steps; some 40 minutes on two cores.
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
