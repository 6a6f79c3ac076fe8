#!/bin/sh
# Submitting with kcat: the record is JSON, the key is the job's id, a header names the type.
# usage: submit_kcat.sh BOOTSTRAP [TOPIC]
set -eu
bootstrap=${1:?usage: submit_kcat.sh BOOTSTRAP [TOPIC]}
topic=${2:-queue.default}
id="kcat-$(date +%s%N)"
printf '{"id": "%s", "command": ["echo", "hello"], "resources": {"cpu_millis": 100}}' "$id" |
    kcat -P -b "$bootstrap" -t "$topic" -k "$id" -H content-type=application/json -X acks=all
echo "$id"
