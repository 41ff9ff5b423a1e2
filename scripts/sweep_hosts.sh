#!/usr/bin/env bash
# A sweep on several hosts that are reached by ssh and share a folder.
#
#   scripts/sweep_hosts.sh sweep.toml /shared/sweeps/plateau host0 host1 host2
#
# "localhost" runs here instead; a host may be named more than once. PORT is the port of the first host (default 12355),
# TRPO_JAX the command (default: trpo-jax). Run it again after a failure to continue.
set -euo pipefail

sweep=$(realpath "$1") output=$(realpath -m "$2")
shift 2
hosts=("$@")
first=${hosts[0]}
[[ $first == localhost ]] && first=127.0.0.1
processes=()
for i in "${!hosts[@]}"; do
    command=("${TRPO_JAX:-trpo-jax}" sweep "$sweep" --output "$output"
        --coordinator "$first:${PORT:-12355}" --num-processes "${#hosts[@]}" --process-id "$i")
    if [[ ${hosts[i]} == localhost ]]; then
        "${command[@]}" &
    else
        ssh "${hosts[i]}" "$(printf '%q ' "${command[@]}")" &
    fi
    processes+=("$!")
done
status=0
for process in "${processes[@]}"; do
    wait "$process" || status=$?
done
exit "$status"
