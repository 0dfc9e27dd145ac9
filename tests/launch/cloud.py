"""A `gcloud` for tests: records its calls, keeps a slice whose hosts are folders of this machine.

What is sent to a host over ssh really runs, with that folder as its home. `NEXT` lists what a
request goes through; a file `preempt` takes the slice away.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

HOSTS = 2


def kill_all(hosts):
    """Hosts vanish, and what runs there with them."""
    for pid in hosts.glob("*/metamorph_run/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass
    shutil.rmtree(hosts, ignore_errors=True)


def main(root, args):
    with (root / "calls.jsonl").open("a") as file:
        file.write(json.dumps(args) + "\n")
    assert args[:2] == ["compute", "tpus"] and "--quiet" in args, args
    state, hosts = root / "state", root / "hosts"
    flags = dict(a.lstrip("-").partition("=")[::2] for a in args if a.startswith("--"))
    names = [a for a in args[4:] if not a.startswith("--")]
    match args[2:4]:
        case ["queued-resources", "create"]:
            if state.exists():
                sys.exit("ERROR: ALREADY_EXISTS")
            if (root / "refuse").exists():
                sys.exit("ERROR: quota exceeded")
            state.write_text(os.environ.get("NEXT", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE"))
            for i in range(HOSTS):
                (hosts / str(i)).mkdir(parents=True)
        case ["queued-resources", "describe"]:
            if (root / "preempt").exists() and state.exists():
                (root / "preempt").unlink()
                state.write_text("SUSPENDING SUSPENDED")
                kill_all(hosts)
            if not state.exists():
                sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found")
            now, _, later = state.read_text().partition(" ")
            state.write_text(later or now)
            print(now)
        case ["queued-resources", "delete"]:
            state.unlink()
            kill_all(hosts)
        case ["queued-resources", "scp"]:
            target = names[1].partition(":")[2]
            for host in chosen(hosts, flags):
                shutil.copy(names[0], host / target)
        case ["queued-resources", "ssh"]:
            if (root / "unreachable").exists():
                sys.exit("ERROR: ssh: connect to host: Connection timed out")
            found = [shell(root, host, flags["command"]) for host in chosen(hosts, flags)]
            sys.exit(max(map(abs, found)))
        case other:
            sys.exit(f"ERROR: no such command {other}")


def chosen(hosts, flags):
    assert flags["node"] in ("all", "0")
    folders = sorted(hosts.iterdir())
    return folders if flags["worker"] == "all" else [folders[int(flags["worker"])]]


def shell(root, host, command):
    path = f"{root}/bin:/usr/bin:/bin"
    env = {"HOME": str(host), "PATH": path, "FAKE": str(root), "HOST": host.name}
    return subprocess.run(["bash", "-c", command], cwd=host, env=env, timeout=60).returncode


if __name__ == "__main__":
    main(pathlib.Path(os.environ["FAKE"]), sys.argv[1:])
