# Sourced by the job scripts: `launch SCRIPT ARGUMENTS...` runs a script on all GPUs of all nodes of the job.
#
# Each node starts one torchrun; they meet at the first node. Slurm sends SIGTERM before the time limit and on
# preemption. Training then writes a checkpoint, and the same job, submitted again, resumes from it. If the nodes have
# several network interfaces, set NETWORK to the one between them (for example NETWORK=ib0).
set -euo pipefail
if [ -n "${NETWORK:-}" ]; then export NCCL_SOCKET_IFNAME="$NETWORK" GLOO_SOCKET_IFNAME="$NETWORK"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

launch() {
    local hosts first
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts%%$'\n'*}  # not `| head`: it closes the pipe early, and pipefail would end the job
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
        --rdzv_backend=c10d --rdzv_endpoint="$first:${PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" "$@"
}
