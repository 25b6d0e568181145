# Sourced by the job scripts: `launch SCRIPT ARGUMENTS...` runs a script on all GPUs of all nodes of the job.
#
# One torchrun per node; they meet at the first node. SIGTERM, which Slurm sends before the time limit and on preemption,
# makes training write a checkpoint; submitting the same job again goes on from it. Set NETWORK to the interface between the
# nodes where there are several (for example NETWORK=ib0).
set -euo pipefail
if [ -n "${NETWORK:-}" ]; then export NCCL_SOCKET_IFNAME="$NETWORK" GLOO_SOCKET_IFNAME="$NETWORK"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

launch() {
    local hosts first
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts%%$'\n'*}  # no `| head`: pipefail would end the job where that closes the pipe early
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
        --rdzv_backend=c10d --rdzv_endpoint="$first:${PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" "$@"
}
