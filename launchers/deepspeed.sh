#!/usr/bin/env bash
# Runs on many hosts with the DeepSpeed launcher. Options before -- go to deepspeed:
#
#   launchers/deepspeed.sh HOSTFILE [OPTIONS OF deepspeed] -- [OPTIONS OF launchers/train.py]
#
# HOSTFILE has one line per host, `10.0.0.1 slots=8`: name or address, and number of ranks. The first host has rank 0.
# Without --ds_config, ds_configs/zero2.json is used.
#
# With ssh, start it on one host. This needs pdsh here, ssh without a password to every host, and this checkout and its
# Python at the same path on each. The launcher passes on variables that begin with PYTHON, UCX and, on GPUs, NCCL; put
# others as NAME=VALUE lines into .deepspeed_env, here or in the home folder:
#
#   launchers/deepspeed.sh hosts.txt -- --output_dir /shared/run
#
# Without ssh, start it on every host, with the host's place in HOSTFILE, from 0, and the address of the first host:
#
#   launchers/deepspeed.sh hosts.txt --no_ssh --node_rank=1 --master_addr=10.0.0.1 -- --output_dir /shared/run

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

launchers=$(dirname "$0")
deepspeed=()
while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == -h || $1 == --help ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit
    fi
    deepspeed+=("$1")
    shift
done
(($#)) && shift
((${#deepspeed[@]})) || fail "HOSTFILE is missing; see --help"
hostfile=${deepspeed[0]}
options=" ${deepspeed[*]:1} "

# Otherwise the launcher would train on this host alone.
[[ -f $hostfile ]] || fail "hostfile $hostfile does not exist"
if [[ $options == *" --no_ssh "* ]]; then
    # Otherwise the launcher would ask the first host for its address, with ssh.
    [[ $options =~ " --master_addr"[=\ ] ]] || fail "--no_ssh needs --master_addr: the address of the first host"
    [[ $options =~ " --node_rank"[=\ ] ]] || fail "--no_ssh needs --node_rank: this host's place in $hostfile, from 0"
fi
[[ " $* " =~ " --ds_config"[=\ ] ]] || set -- "$@" --ds_config "$launchers/../ds_configs/zero2.json"

exec deepspeed --hostfile "$hostfile" "${deepspeed[@]:1}" "$launchers/train.py" "$@"
