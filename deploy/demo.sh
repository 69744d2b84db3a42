#!/bin/sh
# make serve-demo: train a small adapter, start the service, make five calls with curl.
set -eu
bin=${1:-.venv/bin}
here=$(dirname "$0")
work=$(mktemp -d)
trap 'kill "$service" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$work"' EXIT
service=
"$bin/python" "$here/demo.py" "$work/adapter.safetensors"
"$bin/pymeta" serve "$work/adapter.safetensors" --port 0 --log-level warning \
  --store "sqlite:///$work/rows.db" >"$work/said" &
service=$!
until [ -s "$work/said" ]; do kill -0 "$service" || exit 1; sleep 0.1; done
url=$(sed 's/.*"url": *"\([^"]*\)".*/\1/' "$work/said")
cat "$work/said"

call() {
  echo
  echo "\$ curl -X $1 $2 -d '${3:-}'"
  curl --silent --show-error --fail-with-body -X "$1" "$url$2" -H 'Content-Type: application/json' ${3:+-d "$3"}
  echo
}

rows='"xs": [[0.2, 1.0, -0.5], [1.5, -0.3, 0.1], [-0.7, 0.9, 0.4], [0.9, 0.1, -1.2]], "ys": [0, 1, 0, 1]'
call POST '/v1/adapt-predict?probabilities=true' "{\"tasks\": [{$rows, \"xq\": [[0.3, 0.8, 0.0]]}]}"
call PUT /v1/entities/customer-17/rows "{$rows}"
call POST '/v1/entities/customer-17/predict?explain=true' '{"xq": [[0.3, 0.8, 0.0]]}'
call GET /v1/models
call DELETE /v1/entities/customer-17
echo
echo "That was pymeta serve; docs/serving.md says the rest."
