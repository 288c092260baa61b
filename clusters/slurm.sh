#!/usr/bin/env bash
# A sweep on Slurm: sbatch clusters/slurm.sh tune_ci_vit.py lr --seeds 5 --name lr
#
# Run from the repository's root, on a file system that all nodes share, after `make install` there. Every node of the job
# starts Ray, the first one also the sweep; when the sweep ends, Ray ends on all of them. A job that Slurm ends early is
# continued with: sbatch clusters/slurm.sh tune_ci_vit.py --resume lr
#
# Whole nodes (--exclusive), because Ray ends every Ray of yours on a node when one of your jobs ends there: ask for all GPUs
# and processors that a node of your site has. Flags of sbatch's command line override the lines below.
#SBATCH --job-name=lanewise
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.log
set -euo pipefail
if [[ $# -eq 0 ]]; then
    echo "usage: sbatch clusters/slurm.sh tune_FAMILY.py [FLAG...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
export LANEWISE_STORAGE=${LANEWISE_STORAGE:-$PWD/sweeps}
export LANEWISE_CACHE=${LANEWISE_CACHE:-${TMPDIR:-/tmp}/lanewise-$UID}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN       # a token of this job's own
RAY_AUTH_TOKEN=$(.venv/bin/python -c 'import secrets; print(secrets.token_hex(32))')
export PATH=$PWD/.venv/bin:$PATH                # `ray symmetric-run` starts plain `ray`
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300   # 30 s are short for Python on a shared file system
export RAY_gcs_rpc_server_reconnect_timeout_s=15    # the other nodes end this long after the sweep, instead of 60 s
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# an address, not a name: what a node calls itself may be its loopback, and Ray's own resolver does not read /etc/hosts
head=$(getent ahostsv4 "$node" | awk '$1 !~ /^127\./ {print $1; exit}')
head=${head:-$(hostname -I | awk '{print $1}')}
port=$((20000 + SLURM_JOB_ID % 20000))

exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats -- \
    python "$@" --address "$head:$port"
