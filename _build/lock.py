"""Writes what pip's report (``pip install --dry-run --report``) resolved as a lock: exact versions with the hashes of their files.

fasthyper is left out, and torch, whose build is chosen by machine (CPU or CUDA) and pinned by constraints.txt.
"""

import json
import sys

HEADER = """# {python} on {platform}: what `make` installs beside torch, made by `make lock`; other machines take constraints.txt.
"""


def main() -> None:
    with open(sys.argv[1]) as file:
        report = json.load(file)
    env, lines = report["environment"], []
    for entry in report["install"]:
        name, version = entry["metadata"]["name"].lower().replace("_", "-"), entry["metadata"]["version"]
        if name not in ("fasthyper", "torch"):
            hashes = entry["download_info"]["archive_info"]["hashes"]
            lines.append(f"{name}=={version} --hash=sha256:{hashes['sha256']}")
    about = {"python": f"Python {env['python_version']}", "platform": f"{env['platform_system']} {env['platform_machine']}"}
    print(HEADER.format(**about) + "\n".join(sorted(lines)))


if __name__ == "__main__":
    main()
