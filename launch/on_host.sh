#!/usr/bin/env bash
# What tpu.sh does on each host of a slice; you don't have to run it yourself.
#
#   bash metamorph_jax/launch/on_host.sh setup ID EXTRAS [BUCKET[/FOLDER]]
#                                                       makes the environment, mounts at ~/bucket
#                                        start COMMAND…   starts it, detached
#                                        restart COMMAND… the same, unless `stop` came in between
#                                        status           one line for tpu.sh
#                                        stop             SIGTERM, so that it saves; no restarts
#                                        end SECONDS READY   the same, but it may be restarted;
#                                                            only if the set-up is this one
#                                        log LINES [follow]
#
# Everything about a run is in ~/metamorph_run: log, pid, exit (its code, once it has ended), program
# (fingerprint of its command), command, stopped (there was a `stop`), ready (fingerprint of the
# set-up: code, extras, bucket, variables; ends in -unfinished until it is done). ~/metamorph_run/env (readable by nobody else) holds
# variables from `tpu.sh setup --env`.
set -euo pipefail
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/words.sh
exec 3>&- # nothing that is started here may hold the connection open
run=$HOME/metamorph_run
mkdir -p "$run"

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

# After a reboot, a process id may belong to another process.
alive() {
    [ -f "$run/pid" ] && [ ! -f "$run/exit" ] && [ "$(cat "$run/boot")" = "$(boot)" ] &&
        kill -0 "$(cat "$run/pid")" 2>/dev/null
}

# `bucket` has the one that is wanted, `mounted` the one that was mounted last.
mount_bucket() {
    local wanted folder=() at=$HOME/bucket
    wanted=$(cat "$run/bucket")
    if mountpoint -q "$at"; then
        if [ -n "$wanted" ] && [ "$(cat "$run/mounted" 2>/dev/null)" = "$wanted" ]; then return; fi
        fusermount -u "$at"
    fi
    [ -n "$wanted" ] || return 0
    if ! command -v gcsfuse >/dev/null; then install_gcsfuse; fi
    mkdir -p "$at"
    if [[ $wanted == */* ]]; then folder=(--only-dir "${wanted#*/}"); fi
    # No cache of names and sizes: what one host writes, the others must see.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 ${folder[@]+"${folder[@]}"} \
        "${wanted%%/*}" "$at"
    printf %s "$wanted" > "$run/mounted"
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(
        lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
}

known() { cat "$run/$1" 2>/dev/null || echo none; }

status() {
    local what stopped=no
    if alive; then
        what="running $(cat "$run/pid")"
    elif [ ! -s "$run/ready" ]; then
        what=missing
    elif [ -f "$run/exit" ]; then
        what="ended $(cat "$run/exit")"
    elif [ -f "$run/pid" ]; then
        what="ended 137" # no exit code: killed, or the host went down
    else
        what=nothing
    fi
    [ ! -f "$run/stopped" ] || stopped=yes
    echo "metamorph-run: $what setup=$(known ready) program=$(known program) stopped=$stopped" \
        "command=$(known command)"
}

# Another one may be started meanwhile, by somebody else: that is left alone.
end() { # seconds that it has to save
    local pid
    if ! alive; then return; fi
    pid=$(cat "$run/pid")
    kill -TERM "$pid" || true
    for _ in $(seq "$1"); do
        if ! runs "$pid"; then return; fi
        sleep 1
    done
    if runs "$pid"; then
        kill -KILL -- "-$pid" 2>/dev/null || true
        echo 137 > "$run/exit"
    fi
}

runs() { alive && [ "$(known pid)" = "$1" ]; }

case ${1:?a command} in
    setup)
        rm -f "$run/exit" "$run/pid" "$run/program" "$run/command" "$run/stopped"
        printf %s "${4:-}" > "$run/bucket"
        mount_bucket
        # Images of TPU VMs have Python 3.10; uv brings a newer one.
        PATH=$HOME/.local/bin:$PATH
        command -v uv >/dev/null || python3 -m pip install --quiet --user uv
        [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
        uv pip install --quiet --python .venv/bin/python --editable ".[${3:?extras}]"
        echo "$2-$(cat "$run/env" 2>/dev/null | fingerprint)" > "$run/ready"
        echo "metamorph-run: ready"
        ;;
    start | restart)
        verb=$1
        shift
        program=$(printf '%s\0' "$@" | fingerprint)
        if alive; then
            [ "$(known program)" = "$program" ] ||
                fail "another program runs here: $(known command); 'tpu.sh stop' ends it"
            status
            exit 0
        fi
        if [ "$verb" = restart ] && [ -f "$run/stopped" ]; then
            status
            exit 0
        fi
        [[ -s $run/ready && $(known ready) != *-unfinished ]] ||
            fail "this host is not set up: run 'tpu.sh setup' first"
        [ -s "$run/bucket" ] || ! needs_bucket "$@" ||
            fail "the program names ../bucket, but 'tpu.sh setup' was run without --bucket=B"
        mount_bucket # a reboot has unmounted it
        rm -f "$run/exit" "$run/pid" "$run/stopped"
        boot > "$run/boot"
        echo "$program" > "$run/program"
        echo "${*@Q}" > "$run/command"
        printf '\n==== %s, started %s\n' "$(hostname)" "$(date -u '+%F %T UTC')" >> "$run/log"
        # shellcheck disable=SC2016 # expanded by the inner shell, which outlives this one
        setsid nohup bash -c '
            run=$1 && shift
            if [ -f "$run/env" ]; then . "$run/env"; fi
            export PATH="$PWD/.venv/bin:$PATH"
            "$@" & child=$!
            trap "kill -TERM $child 2>/dev/null" TERM
            echo $$ > "$run/pid.new" && mv "$run/pid.new" "$run/pid"
            wait $child; code=$?
            # A trapped signal ends the first wait early.
            while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
            echo $code > "$run/exit.new" && mv "$run/exit.new" "$run/exit"
        ' metamorph-run "$run" "$@" >> "$run/log" 2>&1 < /dev/null &
        for _ in $(seq 100); do
            if [ -f "$run/pid" ]; then break; fi
            sleep 0.1
        done
        status
        ;;
    status) status ;;
    stop)
        touch "$run/stopped" # also when nothing runs: a `watch` may be about to start it again
        end 120
        status
        ;;
    end)
        if [ "$(known ready)" = "$3" ]; then end "$2"; fi
        ;;
    log)
        if [ "${3:-}" = follow ]; then
            exec tail -n "${2:-100}" -F "$run/log"
        fi
        exec tail -n "${2:-100}" "$run/log"
        ;;
    *)
        echo "on_host.sh: no command $1" >&2
        exit 2
        ;;
esac
