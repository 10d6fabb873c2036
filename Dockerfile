# Training on NVIDIA GPUs: torch from PyPI brings CUDA's libraries, the host has NVIDIA's driver
# (580 or newer) and container toolkit. The commands of README.md work in it as they stand.
#
#   docker build --tag v4-pretrain .
#   docker run --rm --gpus all --ipc host --volume /shared:/shared v4-pretrain \
#       v4 train /shared/my.yaml --nproc-per-node 8
FROM python:3.12-slim-bookworm

# A compiler for Triton's launchers and torch.compile. Debian removes old versions of packages, so
# pinned ones would break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/v4-pretrain
COPY . .
RUN PIP_NO_CACHE_DIR=1 make install

ENV PATH=/opt/v4-pretrain/.venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["v4", "--help"]
