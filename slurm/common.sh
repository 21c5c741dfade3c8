# shellcheck shell=bash
# What all job scripts share; sourced once they know TESSERA_HOME. Sets TESSERA_PYTHON and `extra` (options of every srun);
# `step_shape` counts the ranks, `array_parts` the parts of an array.
fail() { # CODE TEXT...: one line, and out
    echo "error: ${*:2}" >&2
    exit "$1"
}

# What another launcher, or the shell that submitted this, has left would be taken for the ranks' own.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
[ -f "$TESSERA_HOME/launch/pretrain.py" ] || fail 2 "TESSERA_HOME is $TESSERA_HOME, where no launch/pretrain.py is. Set it to the repository."
TESSERA_HOME=$(cd "$TESSERA_HOME" && pwd)
TESSERA_ENV=${TESSERA_ENV:-$TESSERA_HOME/slurm/env.sh}
[ -f "$TESSERA_ENV" ] || fail 2 "TESSERA_ENV is $TESSERA_ENV, which is no file on $(hostname). Needed: a copy of slurm/env.sh."
set +u      # module files use variables that may not be set
# shellcheck source=/dev/null
. "$TESSERA_ENV"
set -u
if [ -z "${TESSERA_PYTHON:-}" ]; then
    TESSERA_PYTHON=python3
    [ ! -x "$TESSERA_HOME/.venv/bin/python" ] || TESSERA_PYTHON=$TESSERA_HOME/.venv/bin/python
fi
export PYTHONUNBUFFERED=1      # srun --unbuffered would give each task a terminal, and logs the codes of a progress bar
export PYTHONPATH=$TESSERA_HOME${PYTHONPATH:+:$PYTHONPATH}      # data_prep, also where nothing was installed
export TESSERA_PREFLIGHT_SECONDS=${TESSERA_PREFLIGHT_SECONDS:-300}
[[ $TESSERA_PREFLIGHT_SECONDS =~ ^[1-9][0-9]*$ ]] ||
    fail 2 "TESSERA_PREFLIGHT_SECONDS is $TESSERA_PREFLIGHT_SECONDS. Needed: a whole number of seconds."
# shellcheck disable=SC2034  # for who sources this
read -ra extra <<<"${TESSERA_SRUN_ARGS:-}"

step_shape() { # sets nodes, per_node, cpus (of a rank), shape (srun's options of every step), ranks (those of one task a rank)
    local cpus_a_node
    nodes=$SLURM_JOB_NUM_NODES
    per_node=${TESSERA_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
    [ "$per_node" != 0 ] || per_node=${SLURM_NTASKS_PER_NODE:-1}
    [[ $per_node =~ ^[1-9][0-9]*$ ]] || fail 2 "ranks a node: $per_node. Needed: a whole number in TESSERA_RANKS_PER_NODE."
    # srun does not take over sbatch's --cpus-per-task; without it a rank would be bound to one core.
    cpus_a_node=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | head -n 1)      # "72(x2),36": 36
    cpus=$((cpus_a_node / per_node))
    # shellcheck disable=SC2034  # for who sources this
    shape=(--nodes="$nodes" --export=ALL)
    ranks=(--ntasks="$((nodes * per_node))" --ntasks-per-node="$per_node")
    if [ "$cpus" -ge 1 ]; then ranks+=(--cpus-per-task="$cpus"); else ranks+=(--overcommit); fi
}

array_parts() { # sets parts: of how many a job array is made
    parts=${TESSERA_PARTS:-}
    if [ -z "$parts" ]; then
        parts=$SLURM_ARRAY_TASK_COUNT
        # shellcheck disable=SC2153  # they are SLURM's
        [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" = "1-$parts" ] ||
            fail 2 "the array is not 1-N, so nobody knows of how many parts these are. Set it: TESSERA_PARTS=N sbatch --array=..."
    fi
}
