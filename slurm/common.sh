# shellcheck shell=bash
# What the smaller job scripts share; sourced once they know TESSERA_HOME. Sets TESSERA_PYTHON and `extra` (options of every srun).
fail() { # CODE TEXT...: one line, and out
    echo "error: ${*:2}" >&2
    exit "$1"
}

# What another launcher, or the shell that submitted this, has left would be taken for the ranks' own.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
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
# shellcheck disable=SC2034  # for who sources this
read -ra extra <<<"${TESSERA_SRUN_ARGS:-}"
