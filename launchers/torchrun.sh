#!/usr/bin/env bash
# Runs on many hosts with torchrun. Run the same line on every host:
#
#   NNODES=2 RDZV_ENDPOINT=10.0.0.1:29500 launchers/torchrun.sh -- --output_dir /shared/run
#   launchers/torchrun.sh [OPTIONS OF torchrun] -- [OPTIONS OF launchers/train.py]
#
# The environment sets where hosts meet. Options before -- go to torchrun and override what is set here.
#
#   NNODES          number of hosts (1)
#   NPROC_PER_NODE  ranks per host (one per GPU, or per core that may be used without a GPU)
#   RDZV_ENDPOINT   HOST:PORT of one of the hosts, where all meet and agree on their ranks (c10d)
#   MASTER_ADDR     alternatively the host of rank 0 (static), with MASTER_PORT (29500) and each host's NODE_RANK
#   RDZV_ID         name of the run, if several share an endpoint; restarts of the same name follow each other at once
#   RDZV_SECONDS    how long hosts, and then ranks, wait for each other at the start (600)
#   MAX_RESTARTS    number of restarts of all ranks after one fails (3)
#
# Restarted ranks resume from the newest checkpoint, so --resume auto is the default here, and --output_dir (or --config
# with output_dir) is required: a folder of the host of rank 0 (MASTER_ADDR), or one that all hosts share.

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints this host's address on the route to another, and whether it is that other. A host's own name is often unknown
# outside, or resolves to 127.0.1.1. Connecting a datagram socket sends nothing.
way_to() {
    python3 - "$1" <<'PYTHON'
import socket, sys

host = sys.argv[1]
try:
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        own = probe.getsockname()[0]
except OSError as error:
    sys.exit(f"error: RDZV_ENDPOINT: {host} cannot be reached from this host: {error.strerror}")
print(own, "true" if own == target[0] or own.startswith("127.") else "false")
PYTHON
}

torchrun=()
while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == -h || $1 == --help ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit
    fi
    torchrun+=("$1")
    shift
done
(($#)) && shift
[[ " $* " =~ " --"(output_dir|config)[=\ ] ]] || fail "--output_dir is missing: a restarted run finds its checkpoints there"
[[ " $* " =~ " --resume"[=\ ] ]] || set -- "$@" --resume auto

wait=${RDZV_SECONDS:-600}
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    host=${RDZV_ENDPOINT%:*}
    way=$(way_to "$host") || exit 2
    read -r own is_host <<<"$way"
    [[ $own != 127.* || ${NNODES:-1} == 1 ]] ||
        fail "RDZV_ENDPOINT=$RDZV_ENDPOINT: on this host $host is the loopback; give an address that all hosts reach"
    meeting=(--rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --local_addr "$own"
        --rdzv_conf "is_host=$is_host,join_timeout=$wait")
elif [[ -n ${MASTER_ADDR:-} ]]; then
    [[ -n ${NODE_RANK:-} ]] || fail "MASTER_ADDR=$MASTER_ADDR needs NODE_RANK: this host's place, from 0"
    meeting=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" --node_rank "$NODE_RANK"
        --rdzv_conf "timeout=$wait")
else
    fail "set RDZV_ENDPOINT=HOST:PORT, or MASTER_ADDR and NODE_RANK; see --help"
fi

# SIGUSR1 asks the ranks to save and end; torchrun ignores it. After SIGTERM, it would kill them within 30 seconds, or
# from torch 2.12 on TORCH_ELASTIC_SHUTDOWN_TIMEOUT.
trap '' USR1

# torchrun's auto counts all cores of the machine, whatever the container or the job may use.
count='import torch; from colm_scale.distributed.cores import usable_cores as c; print(torch.cuda.device_count() or c())'
ranks=${NPROC_PER_NODE:-$(PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}" python3 -c "$count")}

id=${RDZV_ID:-colm_scale-${RDZV_ENDPOINT:-$MASTER_ADDR:${MASTER_PORT:-29500}}}
exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "$ranks" --rdzv_id "$id" --max_restarts "${MAX_RESTARTS:-3}" \
    "${meeting[@]}" "${torchrun[@]}" "$(dirname "$0")/train.py" "$@"
