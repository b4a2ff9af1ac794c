# Two images. `docker build .` makes the daemon's, without torch; `--target client` makes one for the examples.
#
# The base is named by its exact version; where builds must be reproducible to the bit, give its digest:
# --build-arg BASE=debian@sha256:... What comes from PyPI is locked by hashes (deploy/image/lock renews that).
ARG BASE=debian:12.15-slim

FROM ${BASE} AS python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY deploy/image/build.lock deploy/image/server.lock constraints.txt ./
# pip stays behind in /build: what runs has no installer.
RUN python3 -m venv /build \
    && /build/bin/pip install --require-hashes --requirement build.lock \
    && python3 -m venv --without-pip /opt/penstock \
    && /build/bin/pip --python /opt/penstock/bin/python install --require-hashes --requirement server.lock
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY server server
COPY client client
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /build/bin/pip --python /opt/penstock/bin/python install --no-deps --no-index /wheels/*.whl

FROM build AS build-client
# torch has a build for each kind of accelerator: --build-arg TORCH_INDEX=... chooses another than PyPI's.
ARG TORCH_INDEX=
# The wheel by its path: by its name, a higher version on the index would be taken instead.
RUN python3 -m venv --without-pip /opt/client \
    && set -- /wheels/penstock-*.whl \
    && /build/bin/pip --python /opt/client/bin/python install --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && /build/bin/pip --python /opt/client/bin/python install --constraint constraints.txt \
        "${1}[client]"

FROM python AS client
LABEL org.opencontainers.image.title="penstock-client" \
      org.opencontainers.image.description="Loads model weights through a penstock daemon, for examples" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-client /opt/client /opt/client
COPY deploy/examples /opt/penstock/examples
ENV PATH=/opt/client/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["penstock"]

FROM python AS daemon
LABEL org.opencontainers.image.title="penstock" \
      org.opencontainers.image.description="Streams safetensors checkpoints through a capped shared-memory buffer" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/penstock /opt/penstock
RUN install --directory --owner=39464 --group=39464 /run/penstock
ENV PATH=/opt/penstock/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 9464
USER 39464:39464
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["penstock", "health"]
ENTRYPOINT ["penstockd"]
