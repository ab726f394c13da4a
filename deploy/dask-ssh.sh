#!/usr/bin/env bash
# Runs a sweep on several machines over ssh: a Dask scheduler here, a worker on each host, and when the sweep has ended,
# or is interrupted, none of them any more.
#
#   deploy/dask-ssh.sh HOST... -- SPEC.toml [options of fleet sweep]
#
# BIN      directory of fleet, dask and python, the same on all machines [.venv/bin here]
# ADDRESS  of this machine, as the hosts reach it [its host name]
# PORT     of the scheduler [8786]
# RSH      what runs a command line on a host [ssh -o BatchMode=yes]
set -euo pipefail

bin=${BIN:-$PWD/.venv/bin}
address=${ADDRESS:-$(hostname)}
port=${PORT:-8786}
rsh=${RSH:-ssh -o BatchMode=yes}

hosts=()
while [[ $# -gt 0 && $1 != -- ]]; do
    hosts+=("$1")
    shift
done
if [[ ${#hosts[@]} -eq 0 || $# -lt 2 ]]; then
    echo "usage: $0 HOST... -- SPEC.toml [options of fleet sweep]" >&2
    exit 2
fi
shift

started=()
stop() {
    # Workers end when their scheduler does; one that it does not reach any more gives up by --death-timeout.
    kill "${started[@]}" 2> /dev/null || true
    wait
}
trap stop EXIT

"$bin/dask" scheduler --host "$address" --port "$port" --no-dashboard &
started+=($!)
for host in "${hosts[@]}"; do
    # One cell at a time on each machine, so that measured CPU is worth something.
    $rsh "$host" "$bin/dask worker tcp://$address:$port --nworkers 1 --nthreads 1 --no-dashboard \
        --death-timeout 60 --local-directory /tmp" &
    started+=($!)
done

"$bin/fleet" sweep "$@" --engine dask --scheduler "tcp://$address:$port"
