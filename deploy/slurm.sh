#!/usr/bin/env bash
# Runs bnbench on a SLURM allocation: a Ray node on each machine, and the coordinator on the first of them.
#
#   sbatch deploy/slurm.sh                                   all studies
#   sbatch --nodes=4 deploy/slurm.sh convergence --preset full   what `bnbench run` is to get
#
# The same command again goes on where the last job ended. Before the first: `make install data RAY=auto` on the
# login node, whose home folder the compute nodes share.
#
# Edit what follows for your cluster: its partitions, how many cores and GPUs a machine has.
#SBATCH --job-name=bnbench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

# The checkout, its installation, and what outlives the job: one file with all rows that have been trained, and
# the page. At home, `bnbench import rows.parquet` and the same `bnbench run` train nothing, and publish all.
checkout=${CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
bin=${BIN:-$checkout/.venv/bin}
rows=${ROWS:-$checkout/rows.parquet}
results=${RESULTS:-$checkout/results}
# SQLite must not lie on a network file system: this is a folder on the first machine's own disk.
runs=${TMPDIR:-/tmp}/bnbench-$SLURM_JOB_ID/runs
# With MLFLOW_TRACKING_URI set, the runs are published to that server while they go on.
publishing=()
if [[ -z ${MLFLOW_TRACKING_URI:-} ]]; then publishing=(--offline); fi

export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Whoever reaches the head can run code as you; so this job's nodes talk to those only that know its password.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | tr ' ' '\n' | grep -m 1 -F .)
# Jobs that share a machine must not share a port.
head=$address:$((20000 + SLURM_JOB_ID % 20000))
cores=${SLURM_CPUS_PER_TASK:-1}

ray_node() {
    local count=$1
    shift
    srun --nodes="$count" --ntasks="$count" --cpus-per-task="$cores" --overlap "$@" &
}

# shellcheck disable=SC2329 # the trap below calls it
finish() {
    local code=$?
    trap - EXIT TERM
    if [[ -f $runs/bnbench.db ]]; then
        "$bin/bnbench" export "$rows.part.parquet" --runs "$runs" && mv "$rows.part.parquet" "$rows"
        mkdir -p "$results"
        for kept in report models; do
            if [[ -e $runs/$kept ]]; then cp -r "$runs/$kept" "$results/"; fi
        done
        rm -rf "${runs%/runs}"
    fi
    # Ends the Ray nodes, which are steps of this job.
    mapfile -t steps < <(jobs -p)
    kill "${steps[@]}" 2>/dev/null || true
    wait || true
    exit "$code"
}
trap finish EXIT

ray_node 1 --nodelist="$first" "$bin/ray" start --head --block --include-dashboard=false \
    --node-ip-address="$address" --port="${head##*:}" --num-cpus="$cores" \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID"
until "$bin/ray" status --address="$head" >/dev/null 2>&1; do sleep 1; done
if ((${#machines[@]} > 1)); then
    ray_node $((${#machines[@]} - 1)) --exclude="$first" "$bin/ray" start --block --address="$head" --num-cpus="$cores"
fi
# How many rows train at a time is counted once, when the coordinator joins.
for _ in $(seq 120); do
    if (($("$bin/ray" status --address="$head" | grep -c ' node_') >= ${#machines[@]})); then break; fi
    sleep 1
done

mkdir -p "$runs"
if [[ -f $rows ]]; then "$bin/bnbench" import "$rows" --runs "$runs"; fi

# SLURM tells the shell of the job that its time is nearly over; the coordinator must hear of it.
"$bin/bnbench" run "$@" --ray "$head" --runs "$runs" "${publishing[@]}" &
coordinator=$!
trap 'kill -TERM "$coordinator"' TERM
code=0
wait "$coordinator" || code=$?
# A trap ends the first wait before the coordinator has ended.
if kill -0 "$coordinator" 2>/dev/null; then wait "$coordinator" || code=$?; fi
exit "$code"
