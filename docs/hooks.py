"""The version, the citation and the licence at the foot of every page."""

import tomllib
from pathlib import Path


def on_config(config):
    version = tomllib.loads(Path(config.config_file_path).with_name("pyproject.toml").read_text())["project"]["version"]
    files = f"{config.repo_url}/blob/main"
    config.copyright = (
        f"jaxsoft {version} · <a href='{files}/CITATION.cff'>cite</a> · <a href='{files}/LICENSE'>Apache-2.0</a>"
    )
    return config
