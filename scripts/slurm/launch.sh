# Sourced by the job scripts: `launch SCRIPT ARGUMENTS...` runs a script on all GPUs of all nodes of the job.
#
# One torchrun per node; they meet at the first node. Before the time limit and on preemption Slurm sends SIGTERM, and
# training writes a checkpoint; submit the same job again to resume from it. On machines with several network interfaces,
# set NETWORK to the one between the nodes (for example NETWORK=ib0).
set -euo pipefail
if [ -n "${NETWORK:-}" ]; then export NCCL_SOCKET_IFNAME="$NETWORK" GLOO_SOCKET_IFNAME="$NETWORK"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

launch() {
    local hosts first
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Not `| head`, which may close the pipe early: pipefail would then end the job.
    first=${hosts%%$'\n'*}
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
        --rdzv_backend=c10d --rdzv_endpoint="$first:${PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" "$@"
}
