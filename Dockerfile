# The whole system on a CPU, installed as `make` installs it:
#
#   docker build -t alpaca .
#   docker run --rm -v alpaca-cache:/home/alpaca/.cache alpaca                                          the demo
#   docker run --rm -v "$PWD:/data" alpaca python analyze_data.py stats --data_path /data/mine.json     any script
#
# PyPI's torch brings CUDA's libraries, which a CPU does not need: 7 GB in place of 2.5. To leave them out, give pip
# PyTorch's own index of CPU wheels (pytorch.org/get-started): docker build --build-arg PIP_EXTRA_INDEX_URL=… .

ARG BASE=python:3.13-slim
FROM ${BASE}

# git: runs/demo.sh asks it for the commit, and gets an empty answer here.
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 alpaca \
 && install -d -o alpaca -g alpaca /home/alpaca/app /home/alpaca/.cache

USER alpaca
WORKDIR /home/alpaca/app
ENV PATH=/home/alpaca/app/.venv/bin:$PATH PYTHONUNBUFFERED=1

# The environment, which lasts while these files stay the same. An editable install needs the package's name alone.
COPY --chown=alpaca Makefile pyproject.toml requirements.txt constraints.txt README.md *LICENSE ./
COPY --chown=alpaca alpaca/__init__.py alpaca/
ARG PIP_EXTRA_INDEX_URL PIP_NO_CACHE_DIR=1
RUN make .venv/installed

COPY --chown=alpaca . .

# The base model, converted once.
VOLUME /home/alpaca/.cache
CMD ["make", "demo"]
