#!/usr/bin/env bash
# Collects every wheel that Tessera needs, for compute nodes without internet; run it where there is one:
#
#     slurm/wheelhouse.sh FOLDER [--python 3.12] [--platform manylinux_2_28_x86_64] [--extras onnx,tensorboard] [--without NAMES]
#
# Python and platform are the cluster's (default: those of the Python that runs this); glibc 2.28 is RHEL 8's, 2.34 RHEL 9's. Versions are
# those of configs/constraints.txt. What has no wheel, DeepSpeed first of all, is built here as a pure one; it compiles its
# operators where it runs. What is there already is not fetched again. --without leaves packages out that the cluster has
# as modules: names, and patterns such as 'nvidia-*'. About 3.5 GB with CUDA's libraries. Needs pip, nothing else.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
python=${TESSERA_PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$home/.venv/bin/python" ] || python=$home/.venv/bin/python
fi
"$python" -m pip --version >/dev/null 2>&1 ||
    { echo "error: $python has no pip. Needed: a Python with pip; name it in TESSERA_PYTHON." >&2; exit 2; }
exec "$python" "$home/slurm/wheels.py" "$@"
