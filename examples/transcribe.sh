#!/bin/sh
# Transcribe a recording with curl: examples/transcribe.sh [RECORDING] [URL]
# AMIRA_API_KEY, if set, is sent as the key.
set -eu
recording=${1:-speech.wav}
url=${2:-http://localhost:8057}
ask() { curl --fail-with-body --silent --show-error ${AMIRA_API_KEY:+-H "Authorization: Bearer $AMIRA_API_KEY"} "$@"; }

echo "# the project's own API, with word times"
ask --data-binary "@$recording" -H "Content-Type: application/octet-stream" "$url/v2/decode/batch/amira"
echo

echo "# OpenAI's API: text, then events as they come"
ask -F "file=@$recording" -F model=whisper-1 -F response_format=text "$url/v1/audio/transcriptions"
ask --no-buffer -F "file=@$recording" -F model=whisper-1 -F stream=true "$url/v1/audio/transcriptions"
