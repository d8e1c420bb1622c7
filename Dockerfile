# The whole system on a CPU, installed as `make` installs it:
#
#   docker build -t alpaca .
#   docker run --rm -v alpaca-cache:/cache alpaca                 # the demo
#   docker run --rm --user "$(id -u):$(id -g)" -v alpaca-cache:/cache -v "$PWD:/data" alpaca \
#     python analyze_data.py stats --data_path /data/mine.json    # any script, on your files
#
# PyPI's torch brings CUDA's libraries, which a CPU does not need. To leave them out (2 GB in place of 6), give pip
# PyTorch's own index of CPU wheels (pytorch.org/get-started): docker build --build-arg PIP_EXTRA_INDEX_URL=… .

ARG BASE=python:3.13-slim
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 alpaca \
 && install -d -o alpaca -g alpaca /app \
 && install -d -m 1777 /cache

USER alpaca
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1

# The environment, made again only when one of these files changes. An editable install needs the package's name alone.
COPY --chown=alpaca Makefile pyproject.toml requirements.txt constraints.txt README.md *LICENSE ./
COPY --chown=alpaca alpaca/__init__.py alpaca/
ARG PIP_EXTRA_INDEX_URL PIP_NO_CACHE_DIR=1
RUN make .venv/installed

COPY --chown=alpaca . .

# The demo's base model, converted once, for whichever user runs the container.
VOLUME /cache
CMD ["make", "demo"]
