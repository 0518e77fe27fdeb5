#!/usr/bin/env bash
# A run on many hosts, by the DeepSpeed launcher. Options before -- go to deepspeed:
#
#   launchers/deepspeed.sh HOSTFILE [OPTIONS OF deepspeed] -- [OPTIONS OF launchers/train.py]
#
# HOSTFILE has a line per host, `10.0.0.1 slots=8`: its name or address, and its number of ranks. The first has rank 0.
# ds_configs/zero2.json is used unless --ds_config is given.
#
# By ssh, started on one host. Needs pdsh here, ssh without a password to every host, and this checkout and its Python
# at the same path on each. Of this shell's variables the launcher hands on those that begin with PYTHON, UCX and, on
# GPUs, NCCL; others go as NAME=VALUE lines into .deepspeed_env, here or in the home folder:
#
#   launchers/deepspeed.sh hosts.txt -- --output_dir /shared/run
#
# Without ssh, started on every host with its own place in HOSTFILE, from 0, and the address of the first:
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

# The launcher would train on this host alone.
[[ -f $hostfile ]] || fail "hostfile $hostfile does not exist"
if [[ $options == *" --no_ssh "* ]]; then
    # The launcher would ask the first host for its address, by ssh.
    [[ $options =~ " --master_addr"[=\ ] ]] || fail "--no_ssh needs --master_addr: the address of the first host"
    [[ $options =~ " --node_rank"[=\ ] ]] || fail "--no_ssh needs --node_rank: this host's place in $hostfile, from 0"
fi
[[ " $* " =~ " --ds_config"[=\ ] ]] || set -- "$@" --ds_config "$launchers/../ds_configs/zero2.json"

exec deepspeed --hostfile "$hostfile" "${deepspeed[@]:1}" "$launchers/train.py" "$@"
