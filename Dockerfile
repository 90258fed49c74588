# The service in a container that runs as an ordinary user and needs no writable file outside /data and
# /tmp: docs/service.md has the command.
FROM python:3.11-slim-bookworm

# libraries of the system that OpenCV opens, and slim images do not have
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 libxcb1 \
 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /build/
RUN pip install --no-cache-dir -c /build/constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
COPY . /build/
RUN pip install --no-cache-dir -c /build/constraints.txt '/build[serve,formats]' \
 && rm -rf /build \
 && useradd --uid 10001 --create-home dinocell \
 && install -d -o dinocell /data

USER 10001
WORKDIR /data
# compiled functions and settings of libraries
ENV NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib HOME=/tmp PYTHONDONTWRITEBYTECODE=1
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# DINOCELL_TOKEN must be set: without a token the service accepts no connections from outside
ENTRYPOINT ["dinocell"]
CMD ["serve", "--host", "0.0.0.0", "--jobs", "/data/jobs"]
