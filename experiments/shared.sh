# What the experiments share. Set these in the environment to change them:
data=${DATA:-fashion-mnist}     # data set, or a folder
n=${N:-1000}                    # samples of each set
short=${SHORT:-1}               # divides the steps of all trainings alike
weights=${WEIGHTS:-weights}     # trained models, and VAEs for those that are trained
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Results of other settings go to other folders.
out=${OUT:-runs/experiments}/$(basename "$0" .sh)
[ "$n/$short/$data/$weights" = 1000/1/fashion-mnist/weights ] ||
    out+=_n${n}_short${short}_$(basename "$data")_$(basename "$weights")
mkdir -p "$out"

fit() {    # STEPS OPTIONS...: train a tiny model; what is done already is skipped
    python train.py --data "$data" --steps $(($1 / short)) --cache "$(dirname "$out")/cache" \
        "${@:2}" >&2
}

judge() {  # NAME OPTIONS...: make a set of samples and compare it with the data
    if [ ! -e "$out/$1.fid.json" ]; then
        [ -e "$out/$1.npz" ] || python sample.py --n "$n" --out "$out/$1.npz" "${@:2}" >&2
        python fid.py "$out/$1.npz" "$data" --features classifier >&2
    fi
}

table() {  # FACTS NAME...: print a row for each set; FACTS: columns besides those of all tables
    python experiments/table.py "$out" "$@"
}
