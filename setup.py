"Package metadata; everything is read from settings.ini, which nbdev shares."
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
config = parser["DEFAULT"]
suffix = "_requirements"


class WithPins(build_py):
    "Copy the locked versions into the package, from where `rsnape bundle` takes them without the repository."

    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, config["lib_name"])
            copyfile(Path(__file__).parent / "requirements.txt", package / "kaggle" / "requirements.txt")


setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=config["author"],
    author_email=config["author_email"],
    license="Apache-2.0",
    keywords=config["keywords"],
    python_requires=f">={config['min_python']}",
    packages=find_packages(include=["rsnape_kit", "rsnape_kit.*"]),
    install_requires=config["requirements"].split(),
    extras_require={name.removesuffix(suffix): config[name].split() for name in config if name.endswith(suffix)},
    entry_points={"console_scripts": ["rsnape=rsnape_kit.cli:main"],
                  "nbdev": [f"{config['lib_name']}={config['lib_name']}._modidx:d"]},
    package_data={"rsnape_kit": ["kaggle/*.txt", "kaggle/*.sh", "kaggle/notebooks/*.ipynb", "report/*.css",
                                 "report/*.js", "py.typed"]},
    cmdclass={"build_py": WithPins},
    zip_safe=False,
)
