# shellcheck shell=bash
# What a job does before anything else, sourced by every job script. Copy it, edit the copy, and submit with TESSERA_ENV=COPY.

# Modules, conda, proxies: whatever makes python and the compilers of your cluster work.
# module purge
# module load gcc/13 cuda/12.8

# The Python of the ranks; the default is the repository's own .venv, else python3. With containers: the one inside.
# export TESSERA_PYTHON=/path/to/venv/bin/python

# Options that every srun gets, in words. Containers (pyxis):
# export TESSERA_SRUN_ARGS="--container-image=/images/tessera.sqsh --container-mounts=/data,/scratch"

# The network between nodes:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Compute nodes have no internet: nothing is asked of the Hugging Face hub, and wandb writes to the run folder.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_MODE=${WANDB_MODE:-offline}
