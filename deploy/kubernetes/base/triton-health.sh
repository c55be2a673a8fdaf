#!/bin/sh
# Check in Triton's container that it recognises speech: exit status 0 if it does. Triton's own readiness does not tell: a model
# stays ready when its process is dead, stopped or out of memory.
#   triton-health.sh          for Kubernetes, which restarts a container after several failures
#   triton-health.sh --kill   for Docker, which restarts only what has ended: kill Triton when it can't recover
# gateway/triton/canary.py makes the same check from outside.
stats=${STATS:-/proc/[0-9]*/stat}
url=${URL:-http://localhost:8000}
failures=${FAILURES:-/tmp/triton-health-failures}

end_triton() {
    if [ "$1" = --kill ]; then
        grep -hs '(tritonserver)' $stats | while read -r pid _; do kill -KILL "$pid"; done
        rm -f "$failures"
    fi
    exit 1
}

# A dead process of a Python model is a zombie, and Triton never starts another one.
if grep -qs '(triton_python_b) Z' $stats; then end_triton "$1"; fi
# Triton listens once its models are loaded.
curl --silent --fail --max-time 5 --output /dev/null "$url/v2/health/live" || exit 1
decoded() { curl --silent --max-time 2 "${METRICS:-http://localhost:8002/metrics}" | grep '^asr_decoder_calls_total'; }
before=$(decoded)
# One sample of silence, as a sequence of its own. Its number is one that no stream of a gateway has.
canary='{"inputs":[{"name":"AUDIO","datatype":"INT16","shape":[1,1],"data":[0]}],"parameters":{"sequence_id":'
canary="$canary$(printf '500000000000%07d' $$),\"sequence_start\":true,\"sequence_end\":true}}"
status=$(curl --silent --max-time 10 --output /dev/null --write-out '%{http_code}' --data "$canary" \
    "$url/v2/models/${ENSEMBLE:-asr_ensemble}/infer")
# A slow Triton answers late, but decodes other audio meanwhile.
if [ "$status" = 000 ] && [ "$(decoded)" != "$before" ]; then status=200; fi
case $status in
    2* | 4*) rm -f "$failures" ;;  # 4xx: there is no such ensemble, so this check says nothing
    *)
        echo "$status" >>"$failures"
        if [ "$(wc -l <"$failures")" -ge 3 ]; then end_triton "$1"; fi
        exit 1
        ;;
esac
