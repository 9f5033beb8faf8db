#!/usr/bin/env bash
# Runs on a VM: STATE COMMAND…; runs the command to its end and writes down how it ended.
#
# In: a folder for pid, log and exit_code, and a command. Out: those files; exit_code comes last and whole.
set -uo pipefail
state=$1
shift
# At a shutdown every process gets a SIGTERM of its own; this one has to live until the command has ended.
trap : TERM HUP INT
"$@" >>"$state/log" 2>&1 &
child=$!
printf '%s\n' "$child" >"$state/pid"
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the wait was interrupted, not over
  wait "$child"
  code=$?
done
printf '%s\n' "$code" >"$state/exit_code.new"
mv "$state/exit_code.new" "$state/exit_code"
