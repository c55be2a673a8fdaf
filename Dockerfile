# The gateway. Triton runs in its own container: docker-compose.yml.
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/amira
COPY deploy/requirements.lock deploy/
RUN /opt/amira/bin/pip install --no-cache-dir --no-deps --require-hashes -r deploy/requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY amira amira
COPY model-repo model-repo
COPY backends backends
COPY tests/speech tests/speech
# The wheel's models and recordings are for the embedded engine, which the image does not have.
RUN /opt/amira/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && rm -r /opt/amira/lib/python3.*/site-packages/amira/data \
    && /opt/amira/bin/pip uninstall --yes pip

FROM python:3.12.11-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin amira
COPY --from=build /opt/amira /opt/amira
# The extra `containers` brings FFmpeg with GPL parts; whoever passes the image on has to keep to the GPL (docs/Deployment.md).
LABEL org.opencontainers.image.licenses="MIT AND GPL-3.0-or-later"
ENV PATH=/opt/amira/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    AMIRA_SERVER_PORT=8057
# A config.toml or config.yaml may be mounted here.
WORKDIR /etc/amira
USER 10001
EXPOSE 8057
# Liveness, not readiness: a gateway without Triton must not be restarted.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD \
  ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%(AMIRA_SERVER_PORT)s/health/live' % os.environ)"]
ENTRYPOINT ["amira"]
CMD ["serve"]
