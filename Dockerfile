# docker build -t influence .
# docker run --rm -it influence                    every artifact at small scale
# docker run --rm -it influence ./run_all.sh test
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY requirements.lock /tmp/
RUN pip install --no-cache-dir --require-hashes -r /tmp/requirements.lock
WORKDIR /influence
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["./run_all.sh"]
