#!/usr/bin/env bash
# What tpu.sh does on each host of a slice; you don't have to run it yourself.
#
#   bash metamorph_jax/launch/on_host.sh setup EXTRAS [BUCKET]  makes the environment, mounts BUCKET
#                                                               at ~/bucket
#                                        start COMMAND…         starts it, detached
#                                        status                 one line for tpu.sh
#                                        stop                   SIGTERM, so that it saves
#                                        log LINES [follow]
#
# Everything about a run is in ~/metamorph_run: log, pid, exit (its code, once it has ended).
# ~/metamorph_run/env (readable by nobody else) holds variables from `tpu.sh setup --env`.
set -euo pipefail
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=$HOME/metamorph_run
mkdir -p "$run"

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

# After a reboot, a process id may belong to another process.
alive() {
    [ -f "$run/pid" ] && [ ! -f "$run/exit" ] && [ "$(cat "$run/boot")" = "$(boot)" ] &&
        kill -0 "$(cat "$run/pid")" 2>/dev/null
}

mount_bucket() {
    if [ ! -s "$run/bucket" ] || mountpoint -q "$HOME/bucket"; then return; fi
    if ! command -v gcsfuse >/dev/null; then
        local key=/usr/share/keyrings/cloud.google.asc
        curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
            sudo tee $key >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(
            lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get update -qq
        sudo apt-get install -qq -y gcsfuse
    fi
    mkdir -p "$HOME/bucket"
    # No cache of names and sizes: what one host writes, the others must see.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$(cat "$run/bucket")" "$HOME/bucket"
}

case ${1:?a command} in
    setup)
        rm -f "$run/ready"
        printf %s "${3:-}" > "$run/bucket"
        mount_bucket
        # Images of TPU VMs have Python 3.10; uv brings a newer one.
        PATH=$HOME/.local/bin:$PATH
        command -v uv >/dev/null || python3 -m pip install --quiet --user uv
        [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
        uv pip install --quiet --python .venv/bin/python --editable ".[${2:?extras}]"
        touch "$run/ready"
        echo "metamorph-run: ready"
        ;;
    start)
        shift
        if alive; then
            echo "metamorph-run: running $(cat "$run/pid")"
            exit 0
        fi
        mount_bucket # a reboot has unmounted it
        rm -f "$run/exit" "$run/pid"
        boot > "$run/boot"
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
        echo "metamorph-run: running $(cat "$run/pid")"
        ;;
    status)
        if [ ! -f "$run/ready" ]; then
            echo "metamorph-run: missing"
        elif [ -f "$run/exit" ]; then
            echo "metamorph-run: ended $(cat "$run/exit")"
        elif alive; then
            echo "metamorph-run: running $(cat "$run/pid")"
        elif [ -f "$run/pid" ]; then
            echo "metamorph-run: ended 137" # no exit code: killed, or the host went down
        else
            echo "metamorph-run: nothing"
        fi
        ;;
    stop)
        if alive; then
            kill -TERM "$(cat "$run/pid")"
            for _ in $(seq "${2:-120}"); do
                if ! alive; then break; fi
                sleep 1
            done
            if alive; then
                kill -KILL -- "-$(cat "$run/pid")" 2>/dev/null || true
                echo 137 > "$run/exit"
            fi
        fi
        bash launch/on_host.sh status
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
