#!/usr/bin/env bash
# Features, training and samples on two machines: two network namespaces of this one, joined by a virtual cable.
# Needs root and iproute2. Usage: bash tests/two_machines.sh FOLDER (an empty one). PYTHON=... picks a Python.
# Training runs three times: under torchrun; under accelerate launch in two halves; and with a cable that is pulled.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath "$1") python=${PYTHON:-python}
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 PYTHONPATH=.

clean() { for n in 1 2; do ip netns del "dcdit$n" 2>/dev/null || true; done; }
trap clean EXIT
printf '127.0.0.1 localhost\n10.83.0.1 machine1\n10.83.0.2 machine2\n' >"$folder/hosts"
clean
for n in 1 2; do ip netns add "dcdit$n"; ip -n "dcdit$n" link set lo up; done
ip link add dcdit1 netns dcdit1 type veth peer name dcdit2 netns dcdit2
for n in 1 2; do ip -n "dcdit$n" addr add "10.83.0.$n/24" dev "dcdit$n"; ip -n "dcdit$n" link set "dcdit$n" up; done

on() { # on N COMMAND...: as machine number N, under a host name of its own
    local n=$1
    shift
    HOSTS="$folder/hosts" GLOO_SOCKET_IFNAME="dcdit$n" ip netns exec "dcdit$n" unshare --uts --mount \
        bash -c 'hostname "machine$0"; mount --bind "$HOSTS" /etc/hosts; exec "$@"' "$n" "$@"
}
torchrun() { # torchrun N SCRIPT ARGUMENTS...: machine N's launcher
    local n=$1
    shift
    on "$n" "$python" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=test \
        --rdzv_endpoint=machine1:29500 "$@"
}
both() { # both SCRIPT ARGUMENTS...: on both machines, to the end
    torchrun 2 "$@" >>"$folder/machine2.txt" 2>&1 &
    torchrun 1 "$@"
    wait $!
}

"$python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from conftest import save_tiny_config, save_tiny_images, save_tiny_vae
folder = Path(sys.argv[1]).resolve()
save_tiny_config(folder, save_tiny_images(folder / "images"), save_tiny_vae(folder / "vae"))
PYTHON
store=(--data-path "$folder/images" --vae "$folder/vae" --image-size 32 --shard-size 1 --num-workers 0)
train=(train.py --config "$folder/tiny.yaml" --output)

echo "== extraction"
both extract_features.py "${store[@]}" --features-path "$folder/store"
"$python" -m data.features --verify "$folder/store"

echo "== training under torchrun"
both "${train[@]}" "$folder/run"

echo "== training under accelerate launch, first half and second half"
accelerate() {
    local n=$1
    shift
    on "$n" "$python" -m accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 \
        --machine_rank $((n - 1)) --main_process_ip machine1 --main_process_port 29600 --mixed_precision no "$@"
}
for steps in 4 8; do
    accelerate 2 "${train[@]}" "$folder/halves" --set training.max_steps=$steps >>"$folder/machine2.txt" 2>&1 &
    accelerate 1 "${train[@]}" "$folder/halves" --set training.max_steps=$steps
    wait $!
done
cmp "$folder/run/metrics.jsonl" "$folder/halves/metrics.jsonl" && echo "the same metrics"

echo "== samples"
both sample_ddp.py --ckpt "$folder/run/checkpoints/0000008.pt" --output-dir "$folder/samples" --num-fid-samples 8 \
    --per-proc-batch-size 2 --num-sampling-steps 3

echo "== the cable is pulled: each machine names the other, and training resumes afterwards"
lost=("${train[@]}" "$folder/lost" --set training.max_steps=100000 --set training.rank_timeout=10)
torchrun 2 "${lost[@]}" >"$folder/lost2.txt" 2>&1 &
second=$!
torchrun 1 "${lost[@]}" >"$folder/lost1.txt" 2>&1 &
first=$!
until [ -s "$folder/lost/metrics.jsonl" ]; do sleep 1; done
ip -n dcdit2 link set dcdit2 down
started=$SECONDS
until grep -qs "^error: process" "$folder/lost1.txt" && grep -qs "^error: process" "$folder/lost2.txt"; do sleep 1; done
echo "both training processes ended after $((SECONDS - started)) s"
for n in 1 2; do ip netns pids "dcdit$n" | xargs -r kill -KILL; done # torchrun waits for its lost half; schedulers end it
wait $first || true
wait $second || true
grep -h "^error: process" "$folder/lost1.txt" "$folder/lost2.txt"
ip -n dcdit2 link set dcdit2 up
steps=$(tail -n 1 "$folder/lost/metrics.jsonl" | sed 's/.*"step": \([0-9]*\),.*/\1/')
both "${lost[@]}" --set training.max_steps=$((steps + 5))
