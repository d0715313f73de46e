"""The licences of what a development machine installs, by its packages' metadata: python docs/hooks/licences.py"""
import re
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OSI = "License :: OSI Approved :: "


def locked(path: Path = REQUIREMENTS) -> list[str]:
    "Return the names of the locked packages."
    return re.findall(r"^([\w.-]+)==", path.read_text(), re.M)


def licence(name: str) -> str:
    "Return the licence of an installed package: its expression, else its classifiers, else the first line of its text."
    found = metadata.metadata(name)
    classifiers = [each.removeprefix(OSI) for each in found.get_all("Classifier") or () if each.startswith(OSI)]
    text = (found.get("License") or "").strip().splitlines()
    return found.get("License-Expression") or ", ".join(classifiers) or (text[0][:80] if text else "not stated")


def licence_table() -> str:
    "Return a Markdown table of the locked packages, their installed versions and licences."
    rows = []
    for name in locked():
        try:
            rows.append((name, metadata.version(name), licence(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed", ""))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (("package", "version", "licence"), ("---",) * 3, *rows))


if __name__ == "__main__":
    print(licence_table())
