# For CPUs: for trying a cluster out, and for converting data.
#
#   docker build -f docker/cpu.Dockerfile -t REGISTRY/llama4:cpu .
#
# Stores other than Google's: --build-arg STORES=s3fs. Other extras of pyproject.toml: --build-arg EXTRAS=...

FROM python:3.11-slim-bookworm AS build
ARG EXTRAS=llama,hf-tokenizers
ARG STORES=gcsfs
WORKDIR /opt/llama4_jax
RUN python -m venv .venv
# What is installed changes less often than the sources, which are found by their path: layers before them are kept.
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir llama4_jax training data configs launch \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt -e ".[${EXTRAS}]" "${STORES}"
COPY llama4_jax ./llama4_jax
COPY training ./training
COPY data ./data
COPY configs ./configs
COPY launch ./launch

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 llama4
COPY --from=build /opt/llama4_jax /opt/llama4_jax
ENV PATH=/opt/llama4_jax/.venv/bin:$PATH PYTHONUNBUFFERED=1
USER llama4
WORKDIR /home/llama4
CMD ["llama4", "--help"]
